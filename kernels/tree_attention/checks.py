"""What ``tree_attention`` refuses: one line each, before any work."""

import math

import torch
from torch import Tensor

from fastpo.kernels.tree_attention.blocks import AttentionBlocks
from fastpo.types import TokenTree

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_SIZE = 256


def check_arguments(q, k, v, tree, scale, softcap, window, sinks) -> None:
    """All that can be told without reading a value."""
    _check_tensors(q, k, v)
    if not isinstance(tree, TokenTree | AttentionBlocks):
        raise TypeError(
            f"tree is a {type(tree).__name__}; it should be a TokenTree, or what attention_blocks makes of it"
        )
    if tree.num_nodes != q.shape[0]:
        raise ValueError(f"tree has {tree.num_nodes} nodes; it should have {q.shape[0]}, the tokens of q")
    if tree.subtree_end.device != q.device:
        raise ValueError(f"tree is on {tree.subtree_end.device}; it should be on {q.device}, where q is")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it should be a finite number, or None for 1 / sqrt(D)")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it should be a positive number, or None for no cap")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window is a {type(window).__name__}; it should be an int, or None for no window")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it should be at least 1 token, or None for no window")
    if sinks is not None:
        _check_sinks(sinks, q)


def _check_tensors(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it should be a tensor")
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; it should be [N, heads, D]")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q is {q.dtype}; it should be float32, bfloat16, float16 or float64")
    tokens, heads, size = q.shape
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"q has head size {size}; it should be from 1 to {MAX_HEAD_SIZE}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}; it should be {q.dtype}, as q is")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it should be on {q.device}, where q is")
        if x.shape[0] != tokens or x.shape[2] != size:
            raise ValueError(f"{name} has shape {list(x.shape)}; it should be [{tokens}, heads, {size}], as q")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {list(v.shape)}; it should be {list(k.shape)}, as k")
    if k.shape[1] == 0 or heads == 0 or heads % k.shape[1] != 0:
        raise ValueError(f"q has {heads} heads; it should have a multiple of the {k.shape[1]} heads of k")


def _check_sinks(sinks, q: Tensor) -> None:
    if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point:
        kind = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise TypeError(f"sinks is {kind}; it should be a floating-point tensor")
    if list(sinks.shape) != [q.shape[1]]:
        raise ValueError(f"sinks has shape {list(sinks.shape)}; it should be [{q.shape[1]}], one logit per head of q")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}; it should be on {q.device}, where q is")
