"""``preference_loss`` in plain PyTorch: the spec, and the backend of last resort.

``loss_value`` is the spec: values only, differentiable by autograd. ``forward``, ``scores`` and ``backward`` are the
backend: the same values with the closed-form slopes of links.py, since ops run below autograd. Tests hold the two
against each other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .links import LINKS_BY_CODE, SCORE_MAPS_BY_CODE, TOKEN_MAPS_BY_CODE
from .records import Outputs, TokenGrads, Tokens, TokenSettings, Tuples, TupleSettings


class Sums(NamedTuple):
    """Sums over the tokens of each sequence, P1."""

    scores: Tensor  # [S] S_i
    logps: Tensor  # [S] sum l
    nll: Tensor  # [S] sum u l
    lengths: Tensor  # [S] int64
    linear: Tensor  # [] sum v l over all tokens


class TermValues(NamedTuple):
    """One link term over all tuples."""

    z: Tensor  # [P]
    param: Tensor | float  # [P] or one for all
    here: Tensor  # [P] bool, whether the tuple has any of the term's members
    slope: Tensor  # [P, K] d z / d s of each member
    link: int
    weight: float


def loss_value(
    tokens: Tokens, scores: Tensor | None, tuples: Tuples, token_set: TokenSettings, tuple_set: TupleSettings
) -> Tensor:
    """The loss, []: the spec. Differentiate it with autograd."""
    sums = token_sums(tokens, token_set) if tokens.logps is not None else no_sums(scores)
    given = scores is not None
    losses = tuple_losses(scores if given else sums.scores, sums, given, tuples, tuple_set)
    return reduce(losses, tuple_set) + sums.linear


def token_sums(tokens: Tokens, setting: TokenSettings) -> Sums:
    t = tokens
    assert t.logps is not None and t.cu_seqlens is not None
    mask = torch.ones_like(t.logps, dtype=torch.bool) if t.mask is None else t.mask
    # Masked-out tokens may hold anything, NaN too: they are replaced before any arithmetic.
    logps = torch.where(mask, t.logps, -1.0)
    ratio = TOKEN_MAPS_BY_CODE[setting.phi].value(logps)
    if t.ref_logps is not None:
        ratio = ratio - setting.ref_coef * torch.where(mask, t.ref_logps, 0.0)
    terms = ratio if t.weights is None else ratio * torch.where(mask, t.weights, 0.0)
    if t.kl is not None and t.kl_weights is not None:
        terms = terms + torch.where(mask, t.kl * t.kl_weights, 0.0)
    u = 1.0 if t.nll_weights is None else torch.where(mask, t.nll_weights, 0.0)
    columns = torch.stack((terms, logps, logps * u, torch.ones_like(logps)), dim=1).double()
    sums = torch.segment_reduce(
        torch.where(mask[:, None], columns, 0.0), "sum", offsets=t.cu_seqlens, axis=0, initial=0.0
    ).to(logps.dtype)
    lengths = sums[:, 3].detach()
    linear = logps.new_zeros(())
    if t.token_coefs is not None:
        linear = (torch.where(mask, t.token_coefs, 0.0) * logps).sum(dtype=torch.float64).to(logps.dtype)
    scale = lengths.clamp(min=1) ** -setting.length_power
    return Sums(sums[:, 0] * scale, sums[:, 1], sums[:, 2], lengths.long(), linear)


def no_sums(scores: Tensor) -> Sums:
    """The sums where there are no tokens at all."""
    zeros = torch.zeros_like(scores)
    return Sums(zeros, zeros, zeros, zeros.long(), scores.new_zeros(()))


def tuple_losses(scores: Tensor, sums: Sums, given: bool, tuples: Tuples, setting: TupleSettings) -> Tensor:
    """[P] omega (link terms + NLL terms). ``given``: scores are from outside, lengths do not say which are empty."""
    mapped = map_scores(scores, sums.lengths, given, setting)
    losses = scores.new_zeros(tuples.index.shape[0])
    for term in link_terms(mapped, tuples, setting):
        value = LINKS_BY_CODE[term.link].value(term.z, term.param)
        losses = losses + torch.where(term.here, term.weight * value, 0.0)
    if setting.nll:
        nll = members(sums.nll, tuples.index) * nll_factors(sums.lengths, tuples, setting)
        losses = losses + nll.sum(1).to(losses.dtype)
    return losses if tuples.weights is None else losses * tuples.weights


def map_scores(scores: Tensor, lengths: Tensor, given: bool, setting: TupleSettings) -> Tensor:
    """[S] s_i = f(S_i); 0 for an empty sequence (f(0) = 0 but for log_odds, which has a pole there)."""
    curve = SCORE_MAPS_BY_CODE[setting.score_map]
    if given:
        return curve.value(scores, setting.score_map_coef)
    empty = lengths == 0
    return torch.where(empty, 0.0, curve.value(torch.where(empty, -1.0, scores), setting.score_map_coef))


def link_terms(mapped: Tensor, tuples: Tuples, setting: TupleSettings) -> Iterator[TermValues]:
    num_tuples, num_members = tuples.index.shape
    own = members(mapped, tuples.index)
    present = tuples.index >= 0
    width = num_members + 5
    for j, link in enumerate(setting.links):
        row = setting.table[j * width : (j + 1) * width]
        coefs = torch.tensor(row[:num_members], dtype=mapped.dtype, device=mapped.device)
        scale, margin, margin_coef, param, weight = row[num_members:]
        slope = (scale * coefs).expand(num_tuples, num_members)
        if tuples.beta_scales is not None:
            slope = slope * tuples.beta_scales[:, None]
        z = (slope * own).sum(1) - margin
        if tuples.margins is not None and margin_coef != 0:
            z = z - margin_coef * tuples.margins
        here = (present & (coefs != 0)).any(1)
        yield TermValues(z, param if tuples.params is None else tuples.params[:, j], here, slope, link, weight)


def members(values: Tensor, index: Tensor) -> Tensor:
    """[P, K] values [S] of each member, 0 for an absent one (-1 picks the zero appended at the end)."""
    return torch.cat((values, values.new_zeros(1)))[index]


def nll_factors(lengths: Tensor, tuples: Tuples, setting: TupleSettings) -> Tensor:
    """[P, K] float64, what sum u l of each member is multiplied with: -nll_k / N_i; 0 for an empty one."""
    n = members(lengths, tuples.index).to(torch.float64)
    coefs = torch.tensor(setting.nll, dtype=torch.float64, device=n.device)
    if setting.nll_normalizer == 2:
        n = torch.ones_like(n)
    elif setting.nll_normalizer == 1:
        n = (n * (coefs != 0)).sum() / max(len(n), 1)
    return torch.where(n > 0, -coefs / n, 0.0)


def reduce(losses: Tensor, setting: TupleSettings) -> Tensor:
    """The mean over tuples, 0 where there are none; or the sum."""
    total = losses.sum(dtype=torch.float64).to(losses.dtype)
    return total / max(len(losses), 1) if setting.mean else total


def scores(tokens: Tokens, setting: TokenSettings) -> tuple[Tensor, Tensor]:
    """[S] S_i and [S] lengths."""
    sums = token_sums(tokens, setting)
    return sums.scores, sums.lengths


def forward(
    tokens: Tokens, scores: Tensor | None, tuples: Tuples, token_set: TokenSettings, tuple_set: TupleSettings
) -> Outputs:
    sums = no_sums(scores) if tokens.logps is None else token_sums(tokens, token_set)
    given = scores is not None
    own = scores.clone() if given else sums.scores
    losses = tuple_losses(own, sums, given, tuples, tuple_set)
    score_grads, nll_grads = slopes(own, sums, given, tuples, tuple_set)
    n = members(sums.lengths, tuples.index).clamp(min=1)
    return Outputs(
        loss=reduce(losses, tuple_set) + sums.linear,
        losses=losses,
        scores=own,
        logps=sums.logps,
        lengths=sums.lengths,
        rewards=tuple_set.beta * members(own, tuples.index),
        nll=-members(sums.nll, tuples.index) / n,
        score_grads=score_grads,
        nll_grads=nll_grads,
    )


def slopes(scores: Tensor, sums: Sums, given: bool, tuples: Tuples, setting: TupleSettings) -> tuple[Tensor, Tensor]:
    """[S] d loss / d S_i and [S] d loss / d (sum u l of sequence i), summed over tuples in their order."""
    num_tuples = tuples.index.shape[0]
    factor = scores.new_full((num_tuples, 1), 1 / max(num_tuples, 1) if setting.mean else 1.0)
    if tuples.weights is not None:
        factor = factor * tuples.weights[:, None]
    by_member = torch.zeros_like(tuples.index, dtype=scores.dtype)  # [P, K]
    mapped = map_scores(scores, sums.lengths, given, setting)
    for term in link_terms(mapped, tuples, setting):
        slope = torch.where(term.here, term.weight * LINKS_BY_CODE[term.link].slope(term.z, term.param), 0.0)
        by_member = by_member + slope[:, None] * term.slope
    map_slope = SCORE_MAPS_BY_CODE[setting.score_map].slope(scores, setting.score_map_coef)
    if not given:
        map_slope = torch.where(sums.lengths == 0, 0.0, map_slope)
    score_grads = sum_over_tuples(by_member * factor, tuples.index, scores) * map_slope
    nll_grads = torch.zeros_like(scores)
    if setting.nll:
        nll_grads = sum_over_tuples(nll_factors(sums.lengths, tuples, setting) * factor, tuples.index, scores)
    return score_grads, nll_grads


def sum_over_tuples(by_member: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """[S] sums of [P, K] by sequence, absent members dropped. In fp64: torch adds fp32 on CPU in no fixed order."""
    total = torch.zeros(like.shape[0] + 1, dtype=torch.float64, device=like.device)
    total.index_put_((index.flatten(),), by_member.double().flatten(), accumulate=True)
    return total[:-1].to(like.dtype)


def backward(
    grad: Tensor | None,
    score_grads: Tensor | None,
    nll_grads: Tensor | None,
    tokens: Tokens,
    lengths: Tensor,
    setting: TokenSettings,
    needs: list[bool],
) -> TokenGrads:
    """Token gradients: ``grad * mask * [score_grads n^-lambda w phi'(l) + nll_grads u + v]`` for ``logps``.

    Args:
        grad: [] upstream gradient of the loss; None counts as 1.
        score_grads, nll_grads: [S] as ``forward`` returns them; None counts as 0.
        needs: which gradients to compute, in the order of TokenGrads.
    """
    t = tokens
    assert t.logps is not None and t.cu_seqlens is not None
    upstream: Tensor | float = 1.0 if grad is None else grad
    zeros = torch.zeros_like(t.logps)
    mask = torch.ones_like(t.logps, dtype=torch.bool) if t.mask is None else t.mask
    logps = torch.where(mask, t.logps, -1.0)
    u = 1.0 if t.nll_weights is None else t.nll_weights
    counts = t.cu_seqlens.diff()

    def per_token(values: Tensor | None) -> Tensor:
        """[T] upstream * values [S] of the token's sequence."""
        if values is None:
            return zeros
        return torch.repeat_interleave(values * upstream, counts, output_size=len(zeros))

    phi = TOKEN_MAPS_BY_CODE[setting.phi]
    scale = lengths.clamp(min=1).to(zeros.dtype) ** -setting.length_power
    of_scores = per_token(None if score_grads is None else score_grads * scale)
    of_nll = per_token(nll_grads)
    weighted = of_scores if t.weights is None else of_scores * t.weights
    ratio = phi.value(logps) if t.ref_logps is None else phi.value(logps) - setting.ref_coef * t.ref_logps
    grads = TokenGrads(
        logps=weighted * phi.slope(logps) + of_nll * u + (0.0 if t.token_coefs is None else upstream * t.token_coefs),
        weights=of_scores * ratio,
        kl=zeros if t.kl_weights is None else of_scores * t.kl_weights,
        kl_weights=zeros if t.kl is None else of_scores * t.kl,
        nll_weights=of_nll * logps,
        token_coefs=upstream * logps,
    )
    none = zeros.new_empty(0)
    return TokenGrads(*(torch.where(mask, g, 0.0) if needed else none for g, needed in zip(grads, needs, strict=True)))
