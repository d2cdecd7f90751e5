"""The tile functions of reference.py in C++ (csrc/linear_token_logprobs.cpp): schemas, and their calls."""

import torch

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
forward = torch.ops.fastpo_c.linear_tile_forward
gradient = torch.ops.fastpo_c.linear_tile_gradient
rescale = torch.ops.fastpo_c.linear_tile_rescale
finish = torch.ops.fastpo_c.linear_tile_finish
