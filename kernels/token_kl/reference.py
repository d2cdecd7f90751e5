"""The spec of ``token_kl`` in plain PyTorch, and the arithmetic of one tile of the op. README.md derives it.

R rows of a tile, V vocabulary entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """What happens to a row of logits x before its softmax: ``z = softcap(scale x) / temperature``."""

    temperature: float
    logit_scale: float
    logit_softcap: float  # c of ``c tanh(y / c)``; 0: none

    def apply(self, logits: Tensor) -> Tensor:
        """z of logits x, in their type."""
        y = logits if self.logit_scale == 1 else logits * self.logit_scale
        if self.logit_softcap:
            y = self.logit_softcap * torch.tanh(y / self.logit_softcap)
        return y if self.temperature == 1 else y / self.temperature

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/dx from z."""
        factor = self.logit_scale / self.temperature
        if not self.logit_softcap:
            return factor
        return factor * (1 - (z * (self.temperature / self.logit_softcap)) ** 2)


def spec(logits: Tensor, ref_logits: Tensor, mask: Tensor | None, head: Head) -> Tensor:
    """[...] ``KL(q || p)``, q of ref_logits and p of logits [..., V]; 0 where mask is False. Differentiable by p."""
    logp = torch.log_softmax(head.apply(logits), dim=-1)
    logq = torch.log_softmax(head.apply(ref_logits), dim=-1)
    each = torch.where(logq == -torch.inf, 0.0, logq.exp() * (logq - logp))  # 0 log 0 = 0
    kl = each.sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


def divergence(x: Tensor, ref_x: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """[R] KL and [2, R] logsumexps of z and ref_z, from logits x and ref_x [R, V], fp32 (fp64 of fp64 logits).

    Term by term ``q (d - 1 + e^-d)``, d = log q - log p, in place of ``q d``: the same sum, since p and q sum to 1, of
    terms that are never negative and of second order where p is near q. So K is not the rounding of what cancels.
    """
    z, ref_z = _z(x, head), _z(ref_x, head)
    norms = torch.stack((z.logsumexp(1), ref_z.logsumexp(1)))
    logp, logq = z - norms[0, :, None], ref_z - norms[1, :, None]
    d, q = logq - logp, logq.exp()
    terms = torch.expm1(-d).add_(d).mul_(q)
    # Where q is 0 in this type, what is left of the term is p.
    lost = q < torch.finfo(q.dtype).tiny
    return torch.where(lost, logp.exp(), terms).sum(1), norms


def slope(x: Tensor, ref_x: Tensor, norms: Tensor, factor: Tensor | None, head: Head, out: Tensor) -> None:
    """out [R, V] becomes dKL/dx = (p - q) dz/dx, times factor [R] where there is one. norms as of ``divergence``."""
    z = _z(x, head)
    own = (z - norms[0, :, None]).exp_().sub_((_z(ref_x, head) - norms[1, :, None]).exp_()).mul_(head.slope(z))
    out.copy_(own if factor is None else own.mul_(factor[:, None]))


def _z(x: Tensor, head: Head) -> Tensor:
    return head.apply(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
