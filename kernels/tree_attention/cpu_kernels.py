"""The C++ backend (csrc/tree_attention.cpp): schemas, and calls with the signatures of reference.py."""

import torch
from torch import Tensor

from fastpo.dispatch import Extension
from fastpo.kernels.tree_attention.blocks import AttentionBlocks

_library = torch.library.Library("fastpo_c", "FRAGMENT")
_library.define(
    "tree_attention_forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor depth, Tensor? sinks, "
    "float scale, float softcap, int window, Tensor(a!) out, Tensor(b!) logsumexp) -> ()"
)
_library.define(
    "tree_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, "
    "Tensor depth, float scale, float softcap, int window, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, "
    "Tensor(d!) delta) -> ()"
)
_library.define("tree_attention_pairs(Tensor depth, int group, int window) -> (int, int)")
MISSING = Extension("_C", ("tree_attention_forward", "tree_attention_backward", "tree_attention_pairs"))


def forward(
    q, k, v, blocks: AttentionBlocks, sinks, scale: float, softcap: float, window: int
) -> tuple[Tensor, Tensor]:
    out, logsumexp = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    torch.ops.fastpo_c.tree_attention_forward(
        q, k, v, blocks.subtree_end, blocks.depth, sinks, scale, softcap, window, out, logsumexp
    )
    return out, logsumexp


def backward(grad_out, q, k, v, out, logsumexp, blocks: AttentionBlocks, sinks, scale, softcap, window) -> list[Tensor]:
    grad_q, delta = q.new_empty(q.shape), torch.empty_like(logsumexp)
    grad_k, grad_v = (x.new_empty(x.shape, dtype=torch.float32) for x in (k, v))
    torch.ops.fastpo_c.tree_attention_backward(
        grad_out, q, k, v, out, logsumexp, blocks.depth, scale, softcap, window, grad_q, grad_k, grad_v, delta
    )
    grads = [grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)]
    if sinks is not None:
        grads.append(-(torch.exp(sinks[:, None] - logsumexp) * delta).sum(1))
    return grads


def pairs(blocks: AttentionBlocks, group: int = 1, window: int = 0) -> tuple[int, int]:
    """(visible, computed) pairs of the forward of ``group`` query heads: what the tiles' edges cost, as counted."""
    reason = MISSING()
    if reason:
        raise RuntimeError(reason)
    return torch.ops.fastpo_c.tree_attention_pairs(blocks.depth, group, window)
