"""The batch functions that presets couple their tuples with: ``Objective.couple``, see core.py.

S sequences, P tuples, T tokens. None of them waits for the device.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.types import Pairs, Segments

from .core import Batch
from .segments import is_member, members, sequence_ids, sequence_lengths


def _member_scores(batch: Batch) -> Tensor:
    """[P, K] scores of the tuples' members, 0 for absent ones."""
    assert batch.scores is not None
    return members(batch.scores, batch.pairs.index)


@dataclass(frozen=True)
class RankedPairs:
    """AOT: the chosen and the rejected of equal rank become the pairs. A sort is locally constant: exact gradients."""

    paired: bool  # ranks of ``S_w - S_l`` of the given pairs, against Pairs.margins by rank; else of S_w and S_l
    uses_scores: ClassVar[bool] = True
    # Columns of a pair have no meaning for pairs of ranks.
    makes: ClassVar[tuple[str, ...]] = ("pairs.weights", "pairs.soft_labels", "pairs.beta_scales")

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        own, pairs = _member_scores(batch), batch.pairs
        if not self.paired:
            return batch.segments, replace(pairs, index=pairs.index.gather(0, own.argsort(dim=0, stable=True)))
        assert pairs.margins is not None
        index = pairs.index[(own[:, 0] - own[:, 1]).argsort(stable=True)]
        return batch.segments, replace(pairs, index=index, margins=pairs.margins.sort().values)


@dataclass(frozen=True)
class MismatchKl:
    """KTO: the margin of every tuple is ``beta max(0, mean S_m)`` over the tuples' third members."""

    uses_scores: ClassVar[bool] = True
    makes: ClassVar[tuple[str, ...]] = ("pairs.margins",)

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        present = (batch.pairs.index[:, 2] >= 0).sum().clamp(min=1)
        kl = _member_scores(batch)[:, 2].sum() / present
        margin = batch.objective.beta * kl.clamp(min=0)
        return batch.segments, replace(batch.pairs, margins=margin.expand(len(batch.pairs.index)))


@dataclass(frozen=True)
class RewardShift:
    """BCO: the margin of every tuple is the running mean of the rewards, with this batch in it."""

    mean: float | Tensor  # [], before this batch
    rate: float  # the batch's share
    uses_scores: ClassVar[bool] = True
    makes: ClassVar[tuple[str, ...]] = ("pairs.margins",)

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        present = (batch.pairs.index >= 0).sum().clamp(min=1)
        mean = batch.objective.beta * _member_scores(batch).sum() / present
        shift = self.mean + self.rate * (mean - self.mean)
        return batch.segments, replace(batch.pairs, margins=shift.expand(len(batch.pairs.index)))


@dataclass(frozen=True)
class GapBeta:
    """beta-DPO: ``beta_p = beta max(1 + alpha (mean gap - M), least)`` for the whole batch, gap = S_w - S_l."""

    alpha: float
    mean_gap: float | Tensor  # M, []
    least: float
    uses_scores: ClassVar[bool] = True
    makes: ClassVar[tuple[str, ...]] = ("pairs.beta_scales",)

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        own = _member_scores(batch)
        gap = (own[:, 0] - own[:, 1]).sum() / max(len(own), 1)
        scale = (1 + self.alpha * (gap - self.mean_gap)).clamp(min=self.least)
        return batch.segments, replace(batch.pairs, beta_scales=scale.expand(len(own)))


@dataclass(frozen=True)
class TokenRewards:
    """T-REG: token rewards rhat [T] become coefficients ``- alpha beta rhat_t mean_p [omega_p s(-z_p)]``."""

    alpha: float
    uses_scores: ClassVar[bool] = True
    by_tuple: ClassVar[bool] = True
    makes: ClassVar[tuple[str, ...]] = ("pairs.beta_scales",)

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        own, pairs, beta = _member_scores(batch), batch.pairs, batch.objective.beta
        rewards = batch.segments.token_coefs
        assert rewards is not None and batch.scores is not None
        z = beta * (own[:, 0] - own[:, 1])
        if pairs.margins is not None:
            z = z - pairs.margins
        omega = self.alpha * beta * torch.sigmoid(-z)
        if pairs.weights is not None:
            omega = omega * pairs.weights
        if batch.objective.reduction == "mean":
            omega = omega / max(len(own), 1)
        total = torch.zeros(len(batch.scores) + 1, dtype=torch.float64, device=own.device)
        total.index_put_((pairs.index.flatten(),), omega.double().repeat_interleave(2), accumulate=True)
        by_token = total[:-1].to(own.dtype)[sequence_ids(batch.segments, batch.num_tokens)]
        return replace(batch.segments, token_coefs=-by_token * rewards), pairs


@dataclass(frozen=True)
class TokenKl:
    """TDPO: K_t of Segments.kl counts ``weight``; without gradient on sequences that are chosen, if so asked."""

    weight: float
    detach_chosen: bool
    uses_scores: ClassVar[bool] = False
    makes: ClassVar[tuple[str, ...]] = ("segments.kl_weights",)

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        segments, kl = batch.segments, batch.segments.kl
        assert kl is not None
        if self.detach_chosen:
            chosen = is_member(batch.pairs, 0, segments.num_sequences)
            kl = torch.where(chosen[sequence_ids(segments, batch.num_tokens)], kl.detach(), kl)
        return replace(segments, kl=kl, kl_weights=torch.full_like(kl.detach(), self.weight)), batch.pairs


@dataclass(frozen=True)
class SharedLengths:
    """LD-DPO: tokens behind the first ``min(n_w, n_l)`` of a response count ``alpha``."""

    alpha: float
    uses_scores: ClassVar[bool] = False
    makes: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        segments, index = batch.segments, batch.pairs.index
        lengths = sequence_lengths(segments, batch.num_tokens)
        shared = members(lengths, index[:, :2], absent=torch.iinfo(torch.int64).max).amin(1)  # [P]
        limits = torch.full((len(lengths) + 1,), torch.iinfo(torch.int64).max, device=lengths.device)
        limits = limits.scatter_reduce(0, index[:, :2].flatten() % len(limits), shared.repeat_interleave(2), "amin")
        ids = sequence_ids(segments, batch.num_tokens)
        counted = torch.ones_like(ids) if segments.mask is None else segments.mask.long()
        before = torch.cat((counted.new_zeros(1), counted.cumsum(0)))  # [T+1] counted tokens before each
        place = before[:-1] - before[segments.cu_seqlens[:-1]][ids]
        tail = torch.where(place < limits[ids], 1.0, self.alpha)
        weights = tail if segments.weights is None else tail * segments.weights
        return replace(segments, weights=weights), batch.pairs


@dataclass(frozen=True)
class LambdaPairs:
    """LiPO-lambda: all pairs of a list [G, K] by relevance, weighted by what swapping their ranks would cost in DCG."""

    uses_scores: ClassVar[bool] = True
    by_tuple: ClassVar[bool] = True
    makes: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        pairs, own = batch.pairs, _member_scores(batch)  # [G, K]
        assert pairs.relevance is not None
        present = pairs.index >= 0
        place = torch.arange(own.shape[1], device=own.device)
        above = (own[:, None] > own[:, :, None]) | ((own[:, None] == own[:, :, None]) & (place < place[:, None]))
        ranks = 1 + (above & present[:, None]).sum(2)  # [G, K], of the current scores; ties by place
        discount, gain = 1 / torch.log1p(ranks.to(own.dtype)), torch.exp2(pairs.relevance)
        i, j = torch.triu_indices(own.shape[1], own.shape[1], 1, device=own.device)
        weights = (gain[:, i] - gain[:, j]).abs() * (discount[:, i] - discount[:, j]).abs()
        return batch.segments, _flat(batch, _ordered(pairs, i, j), weights)


@dataclass(frozen=True)
class BestAndPairs:
    """RRHF: all pairs of a list [G, K] by relevance, as ``(better, worse, -1)``, and its best as ``(-1, -1, best)``."""

    uses_scores: ClassVar[bool] = False
    makes: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]:
        index, relevance = batch.pairs.index, batch.pairs.relevance
        assert relevance is not None
        i, j = torch.triu_indices(index.shape[1], index.shape[1], 1, device=index.device)
        pairs = F.pad(_ordered(batch.pairs, i, j), (0, 1), value=-1)  # [G, M, 3]
        best = index.gather(1, relevance.masked_fill(index < 0, -torch.inf).argmax(1, keepdim=True))  # [G, 1]
        tuples = torch.cat((pairs, F.pad(best[:, :, None], (2, 0), value=-1)), dim=1)
        return batch.segments, _flat(batch, tuples, torch.ones_like(relevance[:, :1]).expand(tuples.shape[:2]))


def _ordered(pairs: Pairs, i: Tensor, j: Tensor) -> Tensor:
    """[G, M, 2] the members i and j of each list [G, K], the more relevant one first; -1 where equal or absent."""
    assert pairs.relevance is not None
    first, second = pairs.index[:, i], pairs.index[:, j]  # [G, M]
    swap = pairs.relevance[:, i] < pairs.relevance[:, j]
    ordered = torch.stack((torch.where(swap, second, first), torch.where(swap, first, second)), dim=2)
    void = (first < 0) | (second < 0) | (pairs.relevance[:, i] == pairs.relevance[:, j])
    return ordered.masked_fill(void[:, :, None], -1)


def _flat(batch: Batch, tuples: Tensor, weights: Tensor) -> Pairs:
    """Tuples [G, M, K] of G lists as Pairs of G M, of which the mean is the mean over lists of sums over tuples."""
    size = tuples.shape[1] if batch.objective.reduction == "mean" else 1
    own = weights * size
    if batch.pairs.weights is not None:
        own = own * batch.pairs.weights[:, None]
    return Pairs(tuples.flatten(0, 1), weights=own.flatten())
