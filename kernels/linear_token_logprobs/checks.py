"""What ``linear_token_logprobs`` refuses: one line each, before any work."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.kernels.common.checks import (
    FLOATS,
    check_device,
    check_integers,
    check_label_set_values,
    check_logit_scale,
    check_number,
    check_plain,
    check_range,
    check_softcap,
    check_stats,
    check_temperature,
    check_temperature_values,
    values_checked,
)


def check_kinds(hidden, weight, bias, lora, names: Sequence[str] = ("hidden", "weight", "bias")) -> None:
    """That the operands are tensors that a GEMM can read: what has to hold before autocast looks at them."""
    check_plain(names[0], hidden)
    if not _is_torchs(hidden):
        raise TypeError(f"{names[0]} is a {type(hidden).__name__}; it should be a plain tensor")
    plain = isinstance(weight, Tensor) and weight.dtype.is_floating_point and _is_torchs(weight)
    if not plain:
        kind = f"{weight.dtype} {type(weight).__name__}" if isinstance(weight, Tensor) else type(weight).__name__
        wanted = f"a {hidden.dtype} tensor: quantised heads are not supported"
        raise TypeError(f"{names[1]} is {kind}; it should be {wanted}")
    check_plain(names[1], weight)
    if bias is not None:
        check_plain(names[2], bias)
    if lora is not None:
        _check_factors(lora)


def check_tensors(hidden, weight, labels, bias, rows, lora) -> None:
    """What can be told from types and shapes alone, of operands that ``check_kinds`` has passed."""
    check_operands(hidden, weight, bias)
    check_integers("labels", labels, "hidden", hidden.device)
    leading = list(hidden.shape[:-1])
    if rows is None and list(labels.shape) != leading:
        raise ValueError(f"labels has shape {list(labels.shape)}; it should be {leading}, as hidden without the last")
    if rows is not None:
        check_integers("rows", rows, "hidden", hidden.device)
        if rows.shape != labels.shape:
            raise ValueError(f"rows has shape {list(rows.shape)}; it should be {list(labels.shape)}, as labels")
    if lora is not None:
        _check_lora(lora, weight)


def check_operands(hidden, weight, bias, names: Sequence[str] = ("hidden", "weight", "bias")) -> None:
    """Hidden states and the head that they go through, called by their ``names``."""
    home, head, _ = names
    if hidden.dtype not in FLOATS:
        raise TypeError(f"{home} is {hidden.dtype}; it should be float32, bfloat16, float16 or float64")
    if hidden.dim() < 2:
        raise ValueError(f"{home} has shape {list(hidden.shape)}; it should be [..., H], two dimensions at least")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        shape, size = list(weight.shape), hidden.shape[-1]
        raise ValueError(f"{head} has shape {shape}; it should be [V, {size}], {home} being [..., {size}]")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{head} is {weight.dtype}; it should be {hidden.dtype}, as {home} is")
    check_device(head, weight, home, hidden.device)
    if bias is not None:
        _check_float(names[2], bias, [weight.shape[0]], weight, head)


def check_ignore_index(ignore_index, optional: bool) -> None:
    """An integer, or None where that is ``optional``."""
    if (ignore_index is None and optional) or _is_int(ignore_index):
        return
    wanted = "an integer, or None where every label counts" if optional else "an integer"
    raise TypeError(f"ignore_index is {ignore_index!r}; it should be {wanted}")


def check_settings(hidden, temperature, logit_scale, logit_softcap, stats, topk, label_set, memory_budget) -> None:
    """The same of everything that is no operand."""
    home = ("hidden", hidden.device)
    check_temperature(temperature, hidden.shape[:-1], "one per hidden row", *home)
    check_logit_scale(logit_scale)
    check_softcap(logit_softcap)
    check_budget(memory_budget)
    check_stats(stats, topk, label_set, *home)


def check_budget(memory_budget) -> None:
    """A positive integer, or None."""
    if memory_budget is None:
        return
    if not _is_int(memory_budget):
        raise TypeError(f"memory_budget is {memory_budget!r}; it should be a whole number of bytes, or None")
    if memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}; it should be a positive number of bytes, or None")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_torchs(tensor: Tensor) -> bool:
    """Not of a class of bitsandbytes, torchao, ..., whose data may be other than it says."""
    return type(tensor).__module__.split(".")[0] == "torch"


def _check_float(name: str, value: Tensor, shape: list[int], weight: Tensor, head: str = "weight") -> None:
    if list(value.shape) != shape:
        size = list(weight.shape)
        raise ValueError(f"{name} has shape {list(value.shape)}; it should be {shape}, {head} being {size}")
    if value.dtype != weight.dtype:
        raise TypeError(f"{name} is {value.dtype}; it should be {weight.dtype}, as {head} is")
    check_device(name, value, head, weight.device)


def _check_factors(lora) -> None:
    if not (isinstance(lora, tuple) and len(lora) == 3):
        raise TypeError(f"lora is {type(lora).__name__}; it should be a tuple (A [r, H], B [V, r], scale)")
    check_plain("lora A", lora[0])
    check_plain("lora B", lora[1])
    check_number("lora scale", lora[2])


def _check_lora(lora, weight: Tensor) -> None:
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
    mask: Tensor | None = None,  # [M] bool
) -> None:
    """What needs the values, where they are looked at and ``mask`` is True."""
    if not values_checked(labels.device):
        return
    kept = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    allowed = f"from 0 to {vocab_size - 1}"
    if ignore_index is not None:
        kept, allowed = kept & (labels != ignore_index), f"{allowed}, or ignore_index ({ignore_index})"
    check_range("labels", labels, kept, vocab_size, allowed)
    if rows is not None:
        check_range("rows", rows, kept, num_rows, f"from 0 to {num_rows - 1}, the rows of hidden")
    check_temperature_values(temperatures)
    check_label_set_values(label_set, vocab_size)
