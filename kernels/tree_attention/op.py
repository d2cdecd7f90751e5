"""``tree_attention``: schema, backends, autograd and the public function. README.md derives what the kernels do.

Shapes: N tokens of a forest in preorder, Hq query heads, Hkv key and value heads, D the head size.
"""

import torch
from torch import Tensor

from fastpo.dispatch import Backend, Op, always, triton_missing
from fastpo.kernels.common.once import once_differentiable
from fastpo.kernels.tree_attention import cpu_kernels, reference
from fastpo.kernels.tree_attention.blocks import AttentionBlocks, attention_blocks
from fastpo.kernels.tree_attention.checks import check_arguments
from fastpo.types import TokenTree


class _Triton:
    """Imports the kernels when they first run: triton is not installed everywhere."""

    @staticmethod
    def forward(*args) -> tuple[Tensor, Tensor]:
        from fastpo.kernels.tree_attention import triton_kernels

        return triton_kernels.forward(*args)

    @staticmethod
    def backward(*args) -> list[Tensor]:
        from fastpo.kernels.tree_attention import triton_kernels

        return triton_kernels.backward(*args)


def _why_not_fused(q: Tensor) -> str | None:
    return "float64 is computed in float64, in plain PyTorch" if q.dtype == torch.float64 else None


# Every backend has forward(...) and backward(...) with the signatures of reference.py.
OP = Op(
    "tree_attention",
    [
        Backend("triton", "cuda", triton_missing, _why_not_fused, _Triton),
        Backend("cpu", "cpu", cpu_kernels.MISSING, _why_not_fused, cpu_kernels),
        Backend("torch", "any", always, always, reference),
    ],
)


@torch.library.custom_op("fastpo::tree_attention_fwd", mutates_args=())
def _forward_op(
    q: Tensor,  # [N, Hq, D]
    k: Tensor,  # [N, Hkv, D]
    v: Tensor,  # [N, Hkv, D]
    sinks: Tensor | None,  # [Hq] fp32, fp64 where q is
    subtree_end: Tensor,  # [N] int32
    depth: Tensor,  # [N] int32
    key_blocks: Tensor,  # [4, ceil(N / BLOCK)] int32
    scale: float,
    softcap: float,  # 0: none
    window: int,  # 0: none
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in the type of q; logsumexp [Hq, N] fp32 (fp64 for fp64)."""
    blocks = AttentionBlocks(subtree_end, depth, key_blocks)
    impl = OP.pick(q.device, q).impl
    return impl.forward(q, k, v, blocks, sinks, scale, softcap, window)


@_forward_op.register_fake
def _(q, k, v, sinks, subtree_end, depth, key_blocks, scale, softcap, window):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_accumulator(q.dtype))


@torch.library.custom_op("fastpo::tree_attention_bwd", mutates_args=())
def _backward_op(
    grad_out: Tensor,  # [N, Hq, D]
    q: Tensor,  # [N, Hq, D]
    k: Tensor,  # [N, Hkv, D]
    v: Tensor,  # [N, Hkv, D]
    out: Tensor,  # [N, Hq, D]
    logsumexp: Tensor,  # [Hq, N]
    sinks: Tensor | None,  # [Hq]
    subtree_end: Tensor,  # [N] int32
    depth: Tensor,  # [N] int32
    key_blocks: Tensor,  # [4, ceil(N / BLOCK)] int32
    scale: float,
    softcap: float,
    window: int,
) -> list[Tensor]:
    """Gradients of q, k, v and, where they are there, of sinks."""
    blocks = AttentionBlocks(subtree_end, depth, key_blocks)
    impl = OP.pick(q.device, q).impl
    return impl.backward(grad_out, q, k, v, out, logsumexp, blocks, sinks, scale, softcap, window)


@_backward_op.register_fake
def _(grad_out, q, k, v, out, logsumexp, sinks, subtree_end, depth, key_blocks, scale, softcap, window):
    return [x.new_empty(x.shape) for x in ((q, k, v) if sinks is None else (q, k, v, sinks))]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *rest = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, logsumexp, *rest[:4])
    ctx.scalars = rest[4:]


@once_differentiable("tree_attention")
def _backward(ctx, grad_out, _grad_logsumexp):
    nothing = [None] * 10
    if grad_out is None:
        return tuple(nothing)
    grads = _backward_op(_unit_last_stride(grad_out), *ctx.saved_tensors, *ctx.scalars)
    return *grads, *nothing[len(grads) :]


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def tree_attention(
    q: Tensor,  # [N, Hq, D]
    k: Tensor,  # [N, Hkv, D]
    v: Tensor,  # [N, Hkv, D]
    tree: TokenTree | AttentionBlocks,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,  # [Hq]
) -> Tensor:
    """Attention in a forest of tokens in preorder: token i sees token j iff ``j <= i < tree.subtree_end[j]``.

    The spec, in fp32, with g = Hq / Hkv query heads to each key head::

        s    = scale * q[:, h] @ k[:, h // g].T                        # [N, N]
        s    = softcap * tanh(s / softcap)                             # with softcap
        s    = where(visible, s, -inf)
        p    = softmax(cat((s, sinks[h].expand(N, 1)), 1), 1)[:, :N]   # without sinks: softmax(s, 1)
        out  = p @ v[:, h // g]

    where ``visible[i, j] = (j <= i) & (i < subtree_end[j]) & (depth[i] - depth[j] < window)``. A chain is causal
    attention; a forest of chains is packed sequences; equal prefixes of a trie's sequences are computed once.

    Args:
        q: float32, bfloat16, float16 or float64, D from 1 to 256; any strides: views of a fused QKV projection are read
            where they are as long as the last stride is 1.
        k: of the type of q; Hkv divides Hq.
        v: as k.
        tree: only ``subtree_end`` and ``depth`` are read. ``attention_blocks(tree)`` in its place saves making its O(N)
            metadata again in every layer.
        scale: 1 / sqrt(D) by default.
        softcap: bounds the scaled scores, as Gemma2 does; before the mask.
        window: how far back a token sees along its own path, itself included: a distance in depth, not in index.
        sinks: one logit per query head that only joins the denominator, as in GPT-OSS; any floating-point type.

    Returns:
        [N, Hq, D] in the type of q, contiguous. Differentiable in q, k, v and sinks, once.

    Raises:
        TypeError, ValueError: one line that names the argument, before any work. On the CPU a tree that is not in
            preorder raises RuntimeError.

    Cost: 4 D operations per visible pair and query head forward, 10 D backward; nothing of size N x N, and per token D
    numbers for the output and one per head. Accumulation is fp32; on the CPU bfloat16 and float16 are converted to fp32
    as they are read and the products are fp32's, so they save memory and no time. Deterministic: no atomics, and on the
    CPU the same bits on any number of threads. Under autocast q, k and v take its type, as in torch's own attention.

    Source: derived in this folder's README; the online softmax of Milakov and Gimelshein (2018) in the tiles of
    FlashAttention (Dao et al. 2022).
    """
    q, k, v = _under_autocast(q, k, v)
    check_arguments(q, k, v, tree, scale, softcap, window, sinks)
    q, k, v = (_unit_last_stride(x) for x in (q, k, v))
    blocks = tree if isinstance(tree, AttentionBlocks) else attention_blocks(tree)
    out, _ = _forward_op(
        q,
        k,
        v,
        None if sinks is None else sinks.to(_accumulator(q.dtype)),
        blocks.subtree_end,
        blocks.depth,
        blocks.key_blocks,
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        0.0 if softcap is None else float(softcap),
        0 if window is None else window,
    )
    return out


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's type where it is on: rotary embeddings leave q and k in fp32, v in autocast's type."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
