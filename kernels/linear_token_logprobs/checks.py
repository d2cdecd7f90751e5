"""What ``linear_token_logprobs`` refuses: one line each, before any work."""

import math

import torch
from torch import Tensor

from fastpo.kernels.common.checks import (
    FLOATS,
    check_device,
    check_integers,
    check_label_set_values,
    check_logit_scale,
    check_range,
    check_softcap,
    check_stats,
    check_temperature,
    check_temperature_values,
    values_checked,
)


def check_tensors(hidden, weight, labels, bias, rows, lora) -> None:
    """What can be told from types and shapes alone."""
    if not _is_torchs(hidden) or type(hidden).__name__ == "DTensor":
        raise TypeError(f"hidden is a {type(hidden).__name__}; it should be a plain tensor, such as to_local() gives")
    if hidden.dtype not in FLOATS:
        raise TypeError(f"hidden is {hidden.dtype}; it should be float32, bfloat16, float16 or float64")
    if hidden.dim() < 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; it should be [..., H], two dimensions at least")
    _check_weight(weight, hidden)
    check_integers("labels", labels, "hidden", hidden.device)
    leading = list(hidden.shape[:-1])
    if rows is None and list(labels.shape) != leading:
        raise ValueError(f"labels has shape {list(labels.shape)}; it should be {leading}, as hidden without the last")
    if rows is not None:
        check_integers("rows", rows, "hidden", hidden.device)
        if rows.shape != labels.shape:
            raise ValueError(f"rows has shape {list(rows.shape)}; it should be {list(labels.shape)}, as labels")
    if bias is not None:
        _check_float("bias", bias, [weight.shape[0]], weight)
    if lora is not None:
        _check_lora(lora, weight)


def check_settings(hidden, temperature, logit_scale, logit_softcap, stats, topk, label_set, memory_budget) -> None:
    """The same of everything that is no operand."""
    home = ("hidden", hidden.device)
    check_temperature(temperature, hidden.shape[:-1], "one per hidden row", *home)
    check_logit_scale(logit_scale)
    check_softcap(logit_softcap)
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}; it should be a positive number of bytes, or None")
    check_stats(stats, topk, label_set, *home)


def _check_weight(weight, hidden: Tensor) -> None:
    plain = isinstance(weight, Tensor) and weight.dtype.is_floating_point and _is_torchs(weight)
    if not plain:
        kind = f"{weight.dtype} {type(weight).__name__}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {kind}; it should be a {hidden.dtype} tensor: quantised heads are not supported")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        shape, size = list(weight.shape), hidden.shape[-1]
        raise ValueError(f"weight has shape {shape}; it should be [V, {size}], hidden being [..., {size}]")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight is {weight.dtype}; it should be {hidden.dtype}, as hidden is")
    check_device("weight", weight, "hidden", hidden.device)


def _is_torchs(tensor: Tensor) -> bool:
    """Not of a class of bitsandbytes, torchao, ..., whose data may be other than it says."""
    return type(tensor).__module__.split(".")[0] == "torch"


def _check_float(name: str, value: Tensor, shape: list[int], weight: Tensor) -> None:
    if list(value.shape) != shape:
        head = list(weight.shape)
        raise ValueError(f"{name} has shape {list(value.shape)}; it should be {shape}, weight being {head}")
    if value.dtype != weight.dtype:
        raise TypeError(f"{name} is {value.dtype}; it should be {weight.dtype}, as weight is")
    check_device(name, value, "weight", weight.device)


def _check_lora(lora, weight: Tensor) -> None:
    if not (isinstance(lora, tuple) and len(lora) == 3 and isinstance(lora[0], Tensor) and isinstance(lora[1], Tensor)):
        raise TypeError(f"lora is {type(lora).__name__}; it should be a tuple (A [r, H], B [V, r], scale)")
    a, b, scale = lora
    rank = a.shape[0] if a.dim() == 2 else 0
    if rank == 0:
        raise ValueError(f"lora A has shape {list(a.shape)}; it should be [r, {weight.shape[1]}] with r >= 1")
    _check_float("lora A", a, [rank, weight.shape[1]], weight)
    _check_float("lora B", b, [weight.shape[0], rank], weight)
    if not abs(scale) < math.inf:
        raise ValueError(f"lora scale is {scale}; it should be a finite number")


def check_values(
    labels: Tensor,  # [M] of the whole vocabulary
    rows: Tensor | None,  # [M]
    temperatures: Tensor | None,  # [N]
    label_set: Tensor | None,  # [L]
    num_rows: int,
    vocab_size: int,
    ignore_index: int | None,
) -> None:
    """What needs the values, where they are looked at."""
    if not values_checked(labels.device):
        return
    kept, allowed = torch.ones_like(labels, dtype=torch.bool), f"from 0 to {vocab_size - 1}"
    if ignore_index is not None:
        kept, allowed = labels != ignore_index, f"{allowed}, or ignore_index ({ignore_index})"
    check_range("labels", labels, kept, vocab_size, allowed)
    if rows is not None:
        check_range("rows", rows, kept, num_rows, f"from 0 to {num_rows - 1}, the rows of hidden")
    check_temperature_values(temperatures)
    check_label_set_values(label_set, vocab_size)
