"""The tile functions of reference.py in C++ (csrc/linear_token_logprobs.cpp): schemas, and their calls."""

import torch
from torch import Tensor

from fastpo.dispatch import Extension

_library = torch.library.Library("fastpo_c", "FRAGMENT")
_library.define(
    "linear_tile_forward(Tensor(a!) z, Tensor(b!)? out, Tensor(c!)? kept, Tensor? bias, Tensor inverse_temperature, "
    "Tensor starts, Tensor labels, int start, float logit_scale, float logit_softcap, float headroom, "
    "Tensor(d!) largest, Tensor(e!) sums, Tensor(f!) decay, Tensor(g!) picked, Tensor(h!)? top, bool moments) -> ()"
)
_library.define(
    "linear_tile_gradient(Tensor(a!) z, Tensor(b!) out, Tensor? bias, Tensor inverse_temperature, Tensor starts, "
    "Tensor labels, int start, float logit_scale, float logit_softcap, Tensor centre, Tensor rest, Tensor coefs, "
    "Tensor values) -> ()"
)
_library.define(
    "linear_tile_finish(Tensor product, Tensor factor, Tensor starts, Tensor labels, Tensor weight, Tensor values, "
    "Tensor(a!) out) -> ()"
)
_library.define("prefault(Tensor(a!) tensor) -> ()")
_OPS = ("linear_tile_forward", "linear_tile_gradient", "linear_tile_finish", "prefault", "gemm")
MISSING = Extension("_C", _OPS)
forward = torch.ops.fastpo_c.linear_tile_forward
gradient = torch.ops.fastpo_c.linear_tile_gradient
finish = torch.ops.fastpo_c.linear_tile_finish


def prefault(tensor: Tensor) -> Tensor:
    """``tensor``, uninitialised, with its pages made by all threads at once; nothing on a GPU or where it is small."""
    if tensor.device.type == "cpu" and MISSING() is None:
        torch.ops.fastpo_c.prefault(tensor)
    return tensor
