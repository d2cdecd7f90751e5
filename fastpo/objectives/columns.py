"""What methods put into the columns of ``Pairs`` and ``Segments``: vectorised functions of votes, visits, rewards.

P tuples, S sequences, T tokens. Everything is a constant of the loss: no gradient flows through these.
"""

import torch
from torch import Tensor

from fastpo.types import Pairs, Segments

from .segments import is_member, members, sequence_ids, sequence_lengths, sequence_sums


def visit_soft_labels(chosen_visits: Tensor, rejected_visits: Tensor) -> Tensor:
    """Pairs.soft_labels [P] of ``mcts_dpo`` from visit counts [P]: ``1 - q = min(N_l / (N_l + max(1, N_w)), 1/2)``."""
    rejected = rejected_visits.to(torch.float32)
    return 1 - (rejected / (rejected + chosen_visits.clamp(min=1))).clamp(max=0.5)


def rank_soft_labels(kendall_tau: Tensor) -> Tensor:
    """Pairs.soft_labels [P] of ``cream``: ``(tau + 1) / 2``, Kendall's tau [P] between two iterates' rankings."""
    return (kendall_tau.to(torch.float32) + 1) / 2


def strength_soft_labels(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Pairs.soft_labels [P] of ``dno`` and ``osp``: ``s(r_w - r_l)``, the strength of the preference by rewards [P]."""
    return torch.sigmoid(chosen_rewards.to(torch.float32) - rejected_rewards)


def vote_weights(chosen_votes: Tensor, rejected_votes: Tensor, num_samples: int) -> Tensor:
    """Pairs.weights [P] of ``scpo``: ``(V_w - V_l) / k``, votes [P] of k samples."""
    return (chosen_votes.to(torch.float32) - rejected_votes) / num_samples


def gap_beta_scales(reward_gaps: Tensor, weight: float = 0.1, rate: float = 0.5) -> Tensor:
    """Pairs.beta_scales [P] of ``mm_rlhf``: ``1 + w (1 - e^(-k delta))`` of a reward model's gap delta >= 0 [P]."""
    return 1 - weight * torch.expm1(-rate * reward_gaps.to(torch.float32))


def wpo_weights(logps: Tensor, sum_p2: Tensor, segments: Segments, pairs: Pairs) -> Tensor:
    """Pairs.weights [P] of ``wpo``: ``u_w u_l``, ``u = exp(mean_t [l_t - log sum_v p_v^2])`` of each sequence.

    ``sum_p2`` [T] comes with the log-probs: ``token_logprobs(..., stats=("sum_p2",))``. As TRL's ``use_weighting``.
    """
    counted = torch.ones_like(logps, dtype=torch.bool) if segments.mask is None else segments.mask
    aligned = torch.where(counted, logps.detach() - torch.where(counted, sum_p2.detach(), 1.0).log(), 0.0)
    sums, lengths = sequence_sums(aligned, segments), sequence_lengths(segments, len(logps))
    weights = (sums / lengths.clamp(min=1)).exp().to(logps.dtype)
    return members(weights, pairs.index[:, :2], absent=1.0).prod(1)


def reference_margins(ref_logps: Tensor, segments: Segments, pairs: Pairs) -> Tensor:
    """Pairs.margins [P] of ``aot``: ``sum r_w - sum r_l`` of the reference's log-probs [T]."""
    own = members(sequence_sums(ref_logps, segments), pairs.index)
    return (own[:, 0] - own[:, 1]).to(ref_logps.dtype)


def mixed_reference(ref_logps: Tensor, previous_logps: Tensor, share: float = 1 / 3) -> Tensor:
    """[T] ``share r + (1 - share) r'``: the one reference that the two of ``inpo`` are; share = tau / eta.

    A sum over tokens is linear, so the two log-ratios of a pair are one against the weighted mean of the log-probs.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; mixed_reference needs it in [0, 1]: tau / eta")
    return torch.lerp(previous_logps, ref_logps, share)


def without_reference(ref_logps: Tensor, segments: Segments, pairs: Pairs, member: int) -> Tensor:
    """[T] log-probs that are 0 on the sequences at place ``member`` of the tuples: D of those is then ``sum l``."""
    free = is_member(pairs, member, segments.num_sequences)
    return torch.where(free[sequence_ids(segments, len(ref_logps))], 0.0, ref_logps)


def contrast_token_rewards(better_logps: Tensor, worse_logps: Tensor) -> Tensor:
    """Segments.token_coefs [T] of ``t_reg``: ``s(l_better - l_worse) - 1/2``, log-probs [T] under opposite prompts."""
    return torch.sigmoid(better_logps - worse_logps) - 0.5


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Pairs.weights [P] of ``remax``: reward of a sample minus that of its prompt's greedy answer, each [P]."""
    return (rewards - greedy_rewards).to(torch.float32)


def trice_weights(accepted: Tensor) -> Tensor:
    """[M] ``b_m``, the mean of ``accepted`` [M] over the other chains: the weight of ``trice``'s control variate.

    Tuples are the chains' states with weight 1 and their proposals with weight ``-b_m``. A proposal is drawn from the
    policy, whose score function has mean 0, and b_m does not depend on it: the estimate stays unbiased.
    """
    hits = accepted.to(torch.float32)
    return (hits.sum() - hits) / max(len(hits) - 1, 1)


def calibrated_rewards(rewards: Tensor, baseline_rewards: Tensor, satisfied: Tensor | None = None) -> Tensor:
    """[P] ``s(r - r_baseline)``, 0 where a constraint is not ``satisfied`` [P] bool. CGPO, Xu et al. 2024.

    Pairs.weights of ``crraft`` as they are, and of ``crpg`` minus their mean over the samples of a prompt.
    """
    calibrated = torch.sigmoid(rewards.to(torch.float32) - baseline_rewards)
    return calibrated if satisfied is None else torch.where(satisfied, calibrated, 0.0)


def outside_spans(tokens: Tensor, start: int, end: int, segments: Segments) -> Tensor:
    """[T] bool, False from each ``start`` token up to and with the next ``end``: a mask without the thinking.

    PRefLexOR's second stage, ``exo_pair`` on the answer alone. A span that is not closed lasts to the end of its
    sequence; ``end`` without a start counts as a token like any other.
    """
    ids = sequence_ids(segments, len(tokens))
    position = torch.arange(len(tokens), device=tokens.device)
    first = segments.cu_seqlens[:-1][ids]  # [T] where the token's sequence begins
    opened = torch.where(tokens == start, position, -1).cummax(0).values
    closed = torch.where(tokens == end, position, -1).cummax(0).values
    closed_before = torch.cat((closed.new_full((1,), -1), closed[:-1]))
    inside = (opened >= first) & (opened > torch.where(closed_before >= first, closed_before, -1))
    return ~inside
