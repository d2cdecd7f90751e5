"""The spec of ``tree_attention`` in plain PyTorch, with the whole N x N mask; and the last backend, made of it."""

import torch
from torch import Tensor

from fastpo.kernels.tree_attention.blocks import AttentionBlocks


def visible(
    subtree_end: Tensor,  # [N]
    depth: Tensor,  # [N]
    window: int | None = None,
) -> Tensor:
    """[N, N] bool: whether query i (row) sees key j (column)."""
    index = torch.arange(len(subtree_end), device=subtree_end.device)
    mask = (index <= index[:, None]) & (index[:, None] < subtree_end)
    if window is not None:
        mask &= depth[:, None] - depth < window
    return mask


def probabilities(
    q: Tensor,  # [N, Hq, D]; as in spec, some rows of it will do, with the mask's
    k: Tensor,  # [N, Hq, D], heads repeated
    mask: Tensor,  # [N, N] bool
    scale: float,
    softcap: float,  # 0: none
    sinks: Tensor | None,  # [Hq]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and p [Hq, N, N], logsumexp [Hq, N] (sinks included)."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    joined = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(-1, len(q), 1)
        joined = torch.cat((joined, sink), dim=-1)
    return scores, torch.softmax(joined, dim=-1)[..., : len(k)], torch.logsumexp(joined, dim=-1)


def spec(
    q: Tensor,  # [N, Hq, D]
    k: Tensor,  # [N, Hkv, D]
    v: Tensor,  # [N, Hkv, D]
    mask: Tensor,  # [N, N] bool
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
) -> Tensor:
    """out [N, Hq, D] in the type of q, differentiable."""
    _, p, _ = probabilities(q, _repeated(k, q), mask, scale, softcap or 0.0, sinks)
    return torch.einsum("hij,jhd->ihd", p, _repeated(v, q))


def forward(
    q, k, v, blocks: AttentionBlocks, sinks, scale: float, softcap: float, window: int
) -> tuple[Tensor, Tensor]:
    """out in the type of q, logsumexp in fp32 (fp64 for fp64). softcap and window are 0 where there is none."""
    mask = visible(blocks.subtree_end, blocks.depth, window or None)
    wide = [_wide(x) for x in (q, k, v)]
    _, p, logsumexp = probabilities(wide[0], _repeated(wide[1], q), mask, scale, softcap, sinks)
    return torch.einsum("hij,jhd->ihd", p, _repeated(wide[2], q)).to(q.dtype).contiguous(), logsumexp


def backward(grad_out, q, k, v, out, logsumexp, blocks: AttentionBlocks, sinks, scale, softcap, window) -> list[Tensor]:
    """Gradients of q, k, v in their type and of sinks in fp32, by the formulas of README.md."""
    mask = visible(blocks.subtree_end, blocks.depth, window or None)
    wide_q, g = _wide(q), _wide(grad_out)
    wide_k, wide_v = _repeated(_wide(k), q), _repeated(_wide(v), q)
    scores, p, _ = probabilities(wide_q, wide_k, mask, scale, softcap, sinks)
    delta = torch.einsum("hij,jhd,ihd->hi", p, wide_v, g)
    grad_scores = p * (torch.einsum("ihd,jhd->hij", g, wide_v) - delta[..., None]) * scale
    if softcap:
        grad_scores = grad_scores * (1 - (scores / softcap) ** 2)
    grads = [
        torch.einsum("hij,jhd->ihd", grad_scores, wide_k).to(q.dtype),
        _summed(torch.einsum("hij,ihd->jhd", grad_scores, wide_q), k),
        _summed(torch.einsum("hij,ihd->jhd", p, g), v),
    ]
    if sinks is not None:
        grads.append(-(torch.exp(sinks[:, None] - logsumexp) * delta).sum(1))
    return [g.contiguous() for g in grads]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """[N, Hkv, D] -> [N, Hq, D]"""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """The transpose of ``_repeated``, in the type of x: [N, Hq, D] -> [N, Hkv, D]"""
    return grad.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype)
