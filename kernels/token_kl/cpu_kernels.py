"""The tile functions of reference.py in C++ (csrc/token_kl.cpp): schemas, and their calls."""

import torch
from torch import Tensor

from fastpo.dispatch import Extension

from .reference import Head

_library = torch.library.Library("fastpo_c", "FRAGMENT")
_library.define(
    "token_kl_divergence(Tensor x, Tensor ref, float temperature, float scale, float softcap) -> (Tensor, Tensor)"
)
_library.define(
    "token_kl_slope(Tensor x, Tensor ref, Tensor norms, Tensor? factor, float temperature, float scale, "
    "float softcap, Tensor(a!) out) -> ()"
)
MISSING = Extension("_C", ("token_kl_divergence", "token_kl_slope"))


def divergence(x: Tensor, ref_x: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    return torch.ops.fastpo_c.token_kl_divergence(*_of_one_type(x, ref_x), *head)


def slope(x: Tensor, ref_x: Tensor, norms: Tensor, factor: Tensor | None, head: Head, out: Tensor) -> None:
    own, other = _of_one_type(x, ref_x)
    target = out if out.dtype == own.dtype and out.stride(1) == 1 else torch.empty_like(own)
    torch.ops.fastpo_c.token_kl_slope(own, other, norms, factor, *head, target)
    if target is not out:
        out.copy_(target)


def _of_one_type(x: Tensor, ref_x: Tensor) -> tuple[Tensor, Tensor]:
    """Both with a unit last stride, in the type of x, or in fp32 where they differ."""
    dtype = x.dtype if x.dtype == ref_x.dtype else torch.float32
    own, other = (y.to(dtype) if y.stride(1) == 1 else y.to(dtype).contiguous() for y in (x, ref_x))
    return own, other
