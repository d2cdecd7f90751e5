"""What ``token_logprobs`` refuses: one line each, before any work."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

STATS = ("logsumexp", "entropy", "sum_p2", "topk_mass", "topk_entropy", "label_set_prob")
MAX_TOPK = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(logits, labels, temperature, logit_softcap, stats, topk, label_set) -> None:
    """What can be told from types and shapes alone."""
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits is {logits.dtype}; it should be float32, bfloat16, float16 or float64")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; it should be [..., V] with V >= 1")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels is {labels.dtype}; it should be an integer type")
    if labels.shape != logits.shape[:-1]:
        wanted = list(logits.shape[:-1])
        raise ValueError(f"labels has shape {list(labels.shape)}; it should be {wanted}, as logits without the last")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}; it should be on {logits.device}, where logits is")
    if isinstance(temperature, Tensor):
        _check_temperatures(temperature, labels)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it should be a positive number")
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap is {logit_softcap}; it should be a positive number, or None for no cap")
    _check_stats(stats, topk, label_set, logits)


def _check_temperatures(temperature: Tensor, labels: Tensor) -> None:
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature is {temperature.dtype}; it should be a floating-point type")
    if temperature.shape != labels.shape:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}; it should be {list(labels.shape)}, as labels"
        )
    if temperature.device != labels.device:
        raise ValueError(f"temperature is on {temperature.device}; it should be on {labels.device}, where logits is")
    if temperature.requires_grad:
        raise ValueError("temperature requires grad; it takes no gradient: pass temperature.detach()")


def _check_stats(stats: Sequence[str], topk: int, label_set: Tensor | None, logits: Tensor) -> None:
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
    if label_set is None:
        return
    if label_set.dim() != 1 or label_set.dtype.is_floating_point or label_set.dtype == torch.bool:
        shape = list(label_set.shape)
        raise ValueError(f"label_set is {label_set.dtype} of shape {shape}; it should be a vector of integer token ids")
    if label_set.device != logits.device:
        raise ValueError(f"label_set is on {label_set.device}; it should be on {logits.device}, where logits is")


def check_values(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [N]
    temperatures: Tensor | None,  # [N]
    label_set: Tensor | None,  # [L]
    ignore_index: int,
) -> None:
    """What needs the values: on the CPU always, on a GPU only under FASTPO_DEBUG=1, for it waits for the device."""
    if logits.device.type != "cpu" and os.environ.get("FASTPO_DEBUG") != "1":
        return
    vocab = logits.shape[-1]
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        row = int(bad.nonzero()[0])
        allowed = f"from 0 to {vocab - 1}, or ignore_index ({ignore_index})"
        raise ValueError(f"labels has {int(labels[row])} at row {row}; it should be {allowed}")
    if temperatures is not None and not (temperatures > 0).all():
        row = int((~(temperatures > 0)).nonzero()[0])
        raise ValueError(f"temperature has {float(temperatures[row])} at row {row}; it should be positive")
    if label_set is None:
        return
    if ((label_set < 0) | (label_set >= vocab)).any():
        raise ValueError(f"label_set has {label_set.tolist()}; its ids should be from 0 to {vocab - 1}")
    if len(label_set.unique()) != len(label_set):
        raise ValueError(f"label_set has {label_set.tolist()}; its ids should be distinct")


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
