"""What ``token_logprobs`` refuses: one line each, before any work."""

import torch
from torch import Tensor

from fastpo.kernels.common.checks import (
    FLOATS,
    check_integers,
    check_label_set_values,
    check_plain,
    check_range,
    check_softcap,
    check_stats,
    check_temperature,
    check_temperature_values,
    values_checked,
)


def check_arguments(logits, labels, temperature, logit_softcap, stats, topk, label_set) -> None:
    """What can be told from types and shapes alone."""
    check_plain("logits", logits)
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits is {logits.dtype}; it should be float32, bfloat16, float16 or float64")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; it should be [..., V] with V >= 1")
    home = ("logits", logits.device)
    check_integers("labels", labels, *home)
    if labels.shape != logits.shape[:-1]:
        wanted = list(logits.shape[:-1])
        raise ValueError(f"labels has shape {list(labels.shape)}; it should be {wanted}, as logits without the last")
    check_temperature(temperature, labels.shape, "as labels", *home)
    check_softcap(logit_softcap)
    check_stats(stats, topk, label_set, *home)


def check_values(
    logits: Tensor,  # [B, T, V]
    labels: Tensor | None,  # [N]; None: known to be in range
    temperatures: Tensor | None,  # [N]
    label_set: Tensor | None,  # [L]
    ignore_index: int,
) -> None:
    """What needs the values, where they are looked at."""
    if not values_checked(logits.device):
        return
    vocab = logits.shape[-1]
    if labels is not None:
        allowed = f"from 0 to {vocab - 1}, or ignore_index ({ignore_index})"
        check_range("labels", labels, labels != ignore_index, vocab, allowed)
    check_temperature_values(temperatures)
    check_label_set_values(label_set, vocab)


def check_overwritable(logits: Tensor) -> None:
    """Refuses logits whose storage a backward must not overwrite."""
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf:
        raise ValueError("logits is a leaf (or a view of one) that requires grad; inplace_backward would overwrite it")
    if torch.compiler.is_compiling():
        return  # compiled graphs write to a copy where memory may overlap
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError("logits has rows that overlap in memory; inplace_backward needs one place per element")
        extent = max(extent, stride * (size - 1) + extent)
