"""What the backends of ``preference_loss`` take: the arguments of its op, in the order of its schema, in three groups.

T tokens, S sequences, P tuples, K members, J terms. Floats are all float32, contiguous (or all float64: torch backend).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.objectives import NLL_NORMALIZERS, SCORE_MAPS, TOKEN_MAPS, Objective
from fastpo.types import Pairs, Segments


class Tokens(NamedTuple):
    """The tokens. All fields are absent where scores come from outside and no NLL is asked for."""

    logps: Tensor | None  # [T]
    ref_logps: Tensor | None  # [T]
    cu_seqlens: Tensor | None  # [S+1] int64
    mask: Tensor | None  # [T] bool
    weights: Tensor | None  # [T] w
    kl: Tensor | None  # [T] K
    kl_weights: Tensor | None  # [T] k
    nll_weights: Tensor | None  # [T] u
    token_coefs: Tensor | None  # [T] v


class Tuples(NamedTuple):
    index: Tensor  # [P, K] int64, -1: absent
    weights: Tensor | None  # [P] omega
    margins: Tensor | None  # [P]
    params: Tensor | None  # [P, J] replaces the link parameters of the settings' table
    beta_scales: Tensor | None  # [P]


class TokenSettings(NamedTuple):
    phi: int  # position in objectives.TOKEN_MAPS
    ref_coef: float
    length_power: float


class TupleSettings(NamedTuple):
    score_map: int  # position in objectives.SCORE_MAPS
    score_map_coef: float
    links: list[int]  # [J] positions in objectives.LINKS
    table: list[float]  # [J * (K+5)], per term: coefs [K], scale, margin, margin_coef, param, weight
    nll: list[float]  # [K] or empty
    nll_normalizer: int  # position in objectives.NLL_NORMALIZERS
    mean: bool  # reduction over tuples; else the sum
    beta: float  # of the reported rewards

    @staticmethod
    def of(objective: Objective) -> "TupleSettings":
        return TupleSettings(
            SCORE_MAPS.index(objective.score_map),
            objective.score_map_coef,
            list(objective.links),
            list(objective.table),
            list(objective.nll_coefs),
            NLL_NORMALIZERS.index(objective.nll_normalizer),
            objective.reduction == "mean",
            objective.beta,
        )


def token_settings(objective: Objective) -> TokenSettings:
    return TokenSettings(TOKEN_MAPS.index(objective.phi), objective.ref_coef, objective.length_power)


def tokens_of(logps: Tensor | None, ref_logps: Tensor | None, segments: Segments | None, like: Tensor) -> Tokens:
    """The arguments of the public functions, checked before, in the types that are computed in: those of ``like``."""
    if logps is None or segments is None:
        return Tokens(*(None,) * len(Tokens._fields))
    s = segments
    floats = (as_float(x, like) for x in (s.weights, s.kl, s.kl_weights, s.nll_weights, s.token_coefs))
    mask = None if s.mask is None else s.mask.contiguous()
    cu_seqlens = s.cu_seqlens.to(torch.int64).contiguous()
    return Tokens(as_float(logps, like), as_float(ref_logps, like), cu_seqlens, mask, *floats)


def tuples_of(pairs: Pairs, objective: Objective, like: Tensor) -> Tuples:
    params = _link_params(pairs, objective)
    columns = (as_float(x, like) for x in (pairs.weights, pairs.margins, params, pairs.beta_scales))
    return Tuples(pairs.index.to(torch.int64).contiguous(), *columns)


def _link_params(pairs: Pairs, objective: Objective) -> Tensor | None:
    """[P, J] link parameters of each tuple, where the pairs replace some of the objective's."""
    if pairs.soft_labels is None and pairs.targets is None:
        return None
    width = objective.num_members + 5
    columns = []
    for j, term in enumerate(objective.terms):
        column = None
        if term.takes_soft_label and pairs.soft_labels is not None:
            column = pairs.soft_labels
        if term.link == "squared" and pairs.targets is not None:
            column = pairs.targets[:, j]
        if column is None:
            column = pairs.index.new_full(
                (len(pairs.index),), objective.table[j * width + width - 2], dtype=torch.float32
            )
        columns.append(column)
    return columns[0][:, None] if len(columns) == 1 else torch.stack(columns, dim=1)


def as_float(x: Tensor | None, like: Tensor) -> Any:
    """``x`` in the type that is computed in, contiguous."""
    if x is None:
        return None
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32).contiguous()


class Outputs(NamedTuple):
    """What ``forward`` returns: the fields of PreferenceOutput, and what ``backward`` needs."""

    loss: Tensor  # []
    losses: Tensor  # [P]
    scores: Tensor  # [S]
    logps: Tensor  # [S]
    lengths: Tensor  # [S] int64
    rewards: Tensor  # [P, K]
    nll: Tensor  # [P, K]
    score_grads: Tensor  # [S] d loss / d S_i
    nll_grads: Tensor  # [S] d loss / d (sum_t u_t l_t of sequence i)


class TokenGrads(NamedTuple):
    """What ``backward`` returns: the gradients of the token fields, empty [0] where not asked for."""

    logps: Tensor  # [T]
    weights: Tensor  # [T]
    kl: Tensor  # [T]
    kl_weights: Tensor  # [T]
    nll_weights: Tensor  # [T]
    token_coefs: Tensor  # [T]


def empty_outputs(tokens: Tokens, scores: Tensor | None, tuples: Tuples) -> Outputs:
    """Uninitialised outputs of the right shapes, for fakes and for kernels to fill."""
    like = tokens.logps if scores is None else scores
    num_sequences = sequences_of(tokens) if scores is None else scores.shape[0]
    assert like is not None
    per_tuple, per_sequence, per_member = tuples.index.shape[:1], (num_sequences,), tuples.index.shape
    return Outputs(
        loss=like.new_empty(()),
        losses=like.new_empty(per_tuple),
        scores=like.new_empty(per_sequence),
        logps=like.new_empty(per_sequence),
        lengths=like.new_empty(per_sequence, dtype=torch.int64),
        rewards=like.new_empty(per_member),
        nll=like.new_empty(per_member),
        score_grads=like.new_empty(per_sequence),
        nll_grads=like.new_empty(per_sequence),
    )


def empty_scores(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Uninitialised [S] scores and [S] lengths."""
    assert tokens.logps is not None
    shape = (sequences_of(tokens),)
    return tokens.logps.new_empty(shape), tokens.logps.new_empty(shape, dtype=torch.int64)


def empty_grads(tokens: Tokens, needs: list[bool]) -> TokenGrads:
    """Uninitialised gradients, [0] where not needed."""
    assert tokens.logps is not None
    return TokenGrads(*(tokens.logps.new_empty(tokens.logps.shape if needed else (0,)) for needed in needs))


def sequences_of(tokens: Tokens) -> int:
    assert tokens.cu_seqlens is not None
    return tokens.cu_seqlens.shape[0] - 1
