"""What several ops refuse in the same words: one line each, before any work.

``home`` is the name of the tensor that the others follow.
"""

import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATS = ("logsumexp", "entropy", "sum_p2", "topk_mass", "topk_entropy", "label_set_prob")
MAX_TOPK = 16


def check_plain(name: str, value: Any) -> None:
    """A tensor whose elements lie here, as its strides say."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it should be a tensor")
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor; it should be a plain tensor, such as to_local() gives")
    if value.layout != torch.strided:
        raise TypeError(f"{name} is {value.layout}; it should be torch.strided, such as to_dense() gives")


def check_number(name: str, value: Any, wanted: str = "a number") -> None:
    """A number: not a tensor, whose gradient would be lost."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}; it should be {wanted}")


def check_device(name: str, value: Tensor, home: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it should be on {device}, where {home} is")


def check_integers(name: str, value: Tensor, home: str, device: torch.device) -> None:
    check_plain(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} is {value.dtype}; it should be an integer type")
    check_device(name, value, home, device)


def check_temperature(temperature: float | Tensor, rows: Sequence[int], why: str, home: str, device) -> None:
    """A positive number, or one per row: a tensor of the shape ``rows``."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, "a number or a tensor")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; it should be a positive number")
        return
    check_plain("temperature", temperature)
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature is {temperature.dtype}; it should be a floating-point type")
    if list(temperature.shape) != list(rows):
        raise ValueError(f"temperature has shape {list(temperature.shape)}; it should be {list(rows)}, {why}")
    check_device("temperature", temperature, home, device)
    if temperature.requires_grad:
        raise ValueError("temperature requires grad; it takes no gradient: pass temperature.detach()")


def check_logit_scale(logit_scale: float) -> None:
    check_number("logit_scale", logit_scale)
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}; it should be a number other than 0")


def check_softcap(logit_softcap: float | None) -> None:
    if logit_softcap is None:
        return
    check_number("logit_softcap", logit_softcap)
    if not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap is {logit_softcap}; it should be a positive number, or None for no cap")


def check_stats(stats: Sequence[str], topk: int, label_set: Tensor | None, home: str, device) -> None:
    if isinstance(stats, str):
        raise TypeError(f"stats is the string {stats!r}; it should be a sequence of names, such as ({stats!r},)")
    for name in stats:
        if name not in STATS:
            raise ValueError(f"stats contains {name!r}; it should contain only {', '.join(STATS)}")
    if not isinstance(topk, int) or not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk is {topk}; it should be from 1 to {MAX_TOPK}")
    if (label_set is not None) != ("label_set_prob" in stats):
        state = "missing" if label_set is None else "given"
        raise ValueError(f"label_set is {state}; it should be given exactly when stats contains 'label_set_prob'")
    if label_set is None:
        return
    check_integers("label_set", label_set, home, device)
    if label_set.dim() != 1:
        raise ValueError(f"label_set has shape {list(label_set.shape)}; it should be a vector of integer token ids")


def values_checked(device: torch.device) -> bool:
    """Values are looked at on the CPU always, on a GPU only under FASTPO_DEBUG=1, for it waits for the device."""
    return device.type == "cpu" or os.environ.get("FASTPO_DEBUG") == "1"


def check_range(name: str, values: Tensor, kept: Tensor, size: int, allowed: str) -> None:
    """Kept values [...] are indices below ``size``."""
    bad = kept & ((values < 0) | (values >= size))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} has {int(values[at])} at position {at}; it should be {allowed}")


def check_temperature_values(temperatures: Tensor | None) -> None:
    if temperatures is not None and not (temperatures > 0).all():
        row = int((~(temperatures > 0)).nonzero()[0])
        raise ValueError(f"temperature has {float(temperatures[row])} at row {row}; it should be positive")


def check_label_set_values(label_set: Tensor | None, vocab_size: int) -> None:
    if label_set is None:
        return
    if ((label_set < 0) | (label_set >= vocab_size)).any():
        raise ValueError(f"label_set has {label_set.tolist()}; its ids should be from 0 to {vocab_size - 1}")
    if len(label_set.unique()) != len(label_set):
        raise ValueError(f"label_set has {label_set.tolist()}; its ids should be distinct")
