"""What ``linear_token_logprobs`` refuses: one line each, before any work."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.kernels.token_logprobs.checks import MAX_TOPK, STATS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(hidden, weight, labels, bias, rows, lora) -> None:
    """What can be told from types and shapes alone."""
    if not _is_torchs(hidden) or type(hidden).__name__ == "DTensor":
        raise TypeError(f"hidden is a {type(hidden).__name__}; it should be a plain tensor, such as to_local() gives")
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"hidden is {hidden.dtype}; it should be float32, bfloat16, float16 or float64")
    if hidden.dim() < 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; it should be [..., H], two dimensions at least")
    _check_weight(weight, hidden)
    _check_integers("labels", labels, hidden)
    leading = list(hidden.shape[:-1])
    if rows is None and list(labels.shape) != leading:
        raise ValueError(f"labels has shape {list(labels.shape)}; it should be {leading}, as hidden without the last")
    if rows is not None:
        _check_integers("rows", rows, hidden)
        if rows.shape != labels.shape:
            raise ValueError(f"rows has shape {list(rows.shape)}; it should be {list(labels.shape)}, as labels")
    if bias is not None:
        _check_float("bias", bias, [weight.shape[0]], weight)
    if lora is not None:
        _check_lora(lora, weight)


def check_settings(hidden, temperature, logit_scale, logit_softcap, stats, topk, label_set, memory_budget) -> None:
    """The same of everything that is no operand."""
    if isinstance(temperature, Tensor):
        _check_temperatures(temperature, hidden)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it should be a positive number")
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}; it should be a number other than 0")
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap is {logit_softcap}; it should be a positive number, or None for no cap")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}; it should be a positive number of bytes, or None")
    _check_stats(stats, topk, label_set, hidden)


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
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}; it should be on {hidden.device}, where hidden is")


def _is_torchs(tensor: Tensor) -> bool:
    """Not of a class of bitsandbytes, torchao, ..., whose data may be other than it says."""
    return type(tensor).__module__.split(".")[0] == "torch"


def _check_integers(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} is {value.dtype}; it should be an integer type")
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device}; it should be on {hidden.device}, where hidden is")


def _check_float(name: str, value: Tensor, shape: list[int], weight: Tensor) -> None:
    if list(value.shape) != shape:
        head = list(weight.shape)
        raise ValueError(f"{name} has shape {list(value.shape)}; it should be {shape}, weight being {head}")
    if value.dtype != weight.dtype:
        raise TypeError(f"{name} is {value.dtype}; it should be {weight.dtype}, as weight is")
    if value.device != weight.device:
        raise ValueError(f"{name} is on {value.device}; it should be on {weight.device}, where weight is")


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


def _check_temperatures(temperature: Tensor, hidden: Tensor) -> None:
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature is {temperature.dtype}; it should be a floating-point type")
    if temperature.shape != hidden.shape[:-1]:
        wanted = list(hidden.shape[:-1])
        raise ValueError(f"temperature has shape {list(temperature.shape)}; it should be {wanted}, one per hidden row")
    if temperature.device != hidden.device:
        raise ValueError(f"temperature is on {temperature.device}; it should be on {hidden.device}, where hidden is")
    if temperature.requires_grad:
        raise ValueError("temperature requires grad; it takes no gradient: pass temperature.detach()")


def _check_stats(stats: Sequence[str], topk: int, label_set: Tensor | None, hidden: Tensor) -> None:
    if isinstance(stats, str):
        raise TypeError(f"stats is the string {stats!r}; it should be a sequence of names, such as ({stats!r},)")
    for name in stats:
        if name not in STATS:
            raise ValueError(f"stats contains {name!r}; it should contain only {', '.join(STATS)}")
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk is {topk}; it should be from 1 to {MAX_TOPK}")
    if (label_set is not None) != ("label_set_prob" in stats):
        state = "missing" if label_set is None else "given"
        raise ValueError(f"label_set is {state}; it should be given exactly when stats contains 'label_set_prob'")
    if label_set is not None:
        _check_integers("label_set", label_set, hidden)
        if label_set.dim() != 1:
            raise ValueError(f"label_set has shape {list(label_set.shape)}; it should be a vector of token ids")


def check_values(
    labels: Tensor,  # [M] of the whole vocabulary
    rows: Tensor | None,  # [M]
    temperatures: Tensor | None,  # [N]
    label_set: Tensor | None,  # [L]
    num_rows: int,
    vocab_size: int,
    ignore_index: int | None,
) -> None:
    """What needs the values: on the CPU always, on a GPU only under FASTPO_DEBUG=1, for it waits for the device."""
    if labels.device.type != "cpu" and os.environ.get("FASTPO_DEBUG") != "1":
        return
    kept, allowed = torch.ones_like(labels, dtype=torch.bool), f"from 0 to {vocab_size - 1}"
    if ignore_index is not None:
        kept, allowed = labels != ignore_index, f"{allowed}, or ignore_index ({ignore_index})"
    _check_range("labels", labels, kept, vocab_size, allowed)
    if rows is not None:
        _check_range("rows", rows, kept, num_rows, f"from 0 to {num_rows - 1}, the rows of hidden")
    if temperatures is not None and not (temperatures > 0).all():
        row = int((~(temperatures > 0)).nonzero()[0])
        raise ValueError(f"temperature has {float(temperatures[row])} at row {row}; it should be positive")
    if label_set is not None:
        if ((label_set < 0) | (label_set >= vocab_size)).any():
            raise ValueError(f"label_set has {label_set.tolist()}; its ids should be from 0 to {vocab_size - 1}")
        if len(label_set.unique()) != len(label_set):
            raise ValueError(f"label_set has {label_set.tolist()}; its ids should be distinct")


def _check_range(name: str, values: Tensor, kept: Tensor, size: int, allowed: str) -> None:
    bad = kept & ((values < 0) | (values >= size))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} has {int(values[at])} at position {at}; it should be {allowed}")
