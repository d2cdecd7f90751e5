"""The tile functions of reference.py in C++ (csrc/linear_token_logprobs.cpp): schemas, and their calls."""

import torch
from torch import Tensor

from fastpo.dispatch import extension_missing

_library = torch.library.Library("fastpo_c", "FRAGMENT")
_library.define(
    "linear_tile_forward(Tensor(a!) z, Tensor(b!)? out, Tensor? bias, Tensor inverse_temperature, Tensor starts, "
    "Tensor labels, int start, float logit_scale, float logit_softcap, Tensor(c!) largest, Tensor(d!) sums, "
    "Tensor(e!) decay, Tensor(f!) picked, Tensor(g!)? top, bool moments) -> ()"
)
_library.define(
    "linear_tile_gradient(Tensor(a!) z, Tensor(b!) out, Tensor? bias, Tensor inverse_temperature, Tensor starts, "
    "Tensor labels, int start, float logit_scale, float logit_softcap, Tensor largest, Tensor log_sum, Tensor coefs, "
    "Tensor values) -> ()"
)
_library.define(
    "linear_tile_rescale(Tensor kept, Tensor(a!) out, Tensor factor, Tensor starts, Tensor labels, int start, "
    "Tensor values) -> ()"
)
_library.define(
    "linear_tile_finish(Tensor product, Tensor factor, Tensor starts, Tensor labels, Tensor weight, Tensor values, "
    "Tensor(a!) out) -> ()"
)
_library.define("use_huge_pages(Tensor tensor) -> ()")
forward = torch.ops.fastpo_c.linear_tile_forward
gradient = torch.ops.fastpo_c.linear_tile_gradient
rescale = torch.ops.fastpo_c.linear_tile_rescale
finish = torch.ops.fastpo_c.linear_tile_finish


def large(tensor: Tensor) -> Tensor:
    """``tensor``, uninitialised; its first write goes to pages of 2 MiB where Linux has them and the C++ is built."""
    if tensor.device.type == "cpu" and extension_missing("_C") is None:
        torch.ops.fastpo_c.use_huge_pages(tensor)
    return tensor
