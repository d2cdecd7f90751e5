"""The argument checks of ``preference_loss`` and ``sequence_scores``: one line each, naming the argument."""

import torch
from torch import Tensor

from fastpo.objectives import Objective
from fastpo.types import Pairs, Segments

from .records import Tokens

_INTEGERS = (torch.int32, torch.int64)


def check_loss(
    logps: Tensor | None,
    ref_logps: Tensor | None,
    segments: Segments | None,
    pairs: Pairs,
    objective: Objective,
    scores: Tensor | None,
) -> None:
    _check_inputs(logps, ref_logps, segments, objective, scores)
    if objective.couple is not None or objective.list_loss is not None:
        _check_coupled(logps, segments, pairs, objective, scores)
        return
    like = logps if logps is not None else scores
    assert like is not None
    _check_pairs(pairs, objective, like)
    _check_required(segments, pairs, objective)


def _check_coupled(
    logps: Tensor | None, segments: Segments | None, pairs: Pairs, objective: Objective, scores: Tensor | None
) -> None:
    """What a batch function or a loss of lists is given. What it makes is checked as the tuples of any objective."""
    if segments is None and objective.couple is not None:
        raise ValueError(f"segments is None; objective {objective.name} computes columns of it")
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs is {_of(pairs)}; it should be a Pairs")
    _check_required(segments, pairs, objective)
    listed = objective.list_loss is not None or pairs.relevance is not None
    like = logps if logps is not None else scores
    assert like is not None
    if not listed:
        _check_index(pairs.index, objective.num_members, objective, like)
    elif pairs.index.dim() != 2 or pairs.index.dtype not in _INTEGERS:
        raise ValueError(f"pairs.index is {_of(pairs.index)}; it should be int64 or int32 [P, K], a list in each row")
    _check_not_made(segments, pairs, objective)
    if pairs.relevance is not None:
        if "pairs.relevance" not in objective.requires and objective.list_loss is None:
            raise ValueError(f"pairs.relevance is given; objective {objective.name} is not of lists")
        _check_column("relevance", pairs.relevance, pairs.index.shape, like)
    for name in ("weights", "margins", "soft_labels", "targets", "beta_scales"):
        if listed and name != "weights" and getattr(pairs, name) is not None:
            raise ValueError(f"pairs.{name} is given; objective {objective.name}, of lists, has no term that takes it")
    if pairs.weights is not None:
        _check_column("weights", pairs.weights, pairs.index.shape[:1], like)
    if pairs.margins is not None:
        _check_column("margins", pairs.margins, pairs.index.shape[:1], like)


def _made(objective: Objective) -> tuple[str, ...]:
    return () if objective.couple is None else objective.couple.makes


def _check_not_made(segments: Segments | None, pairs: Pairs, objective: Objective) -> None:
    """What a batch function makes by itself would overwrite what is given."""
    for name in _made(objective):
        record, _, column = name.partition(".")
        if getattr(segments if record == "segments" else pairs, column) is not None:
            raise ValueError(f"{name} is given; objective {objective.name} makes it by itself, pass None")


def _check_inputs(
    logps: Tensor | None,
    ref_logps: Tensor | None,
    segments: Segments | None,
    objective: Objective,
    scores: Tensor | None,
) -> None:
    if scores is None:
        check_scores(logps, ref_logps, segments, objective)
    else:
        _check_given(logps, ref_logps, segments, objective, scores)


def check_scores(
    logps: Tensor | None, ref_logps: Tensor | None, segments: Segments | None, objective: Objective
) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; it should be an Objective, like objectives.dpo()")
    if objective.needs_reference and ref_logps is None:
        raise ValueError(f"ref_logps is None; objective {objective.name} needs the reference's log-probs")
    if not objective.needs_reference and ref_logps is not None:
        raise ValueError(f"ref_logps is given; objective {objective.name} has no reference, pass None")
    _check_tokens(logps, ref_logps, segments, objective)


def _check_given(
    logps: Tensor | None, ref_logps: Tensor | None, segments: Segments | None, objective: Objective, scores: Tensor
) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; it should be an Objective, like objectives.dpo()")
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(f"scores is {_of(scores)}; it should be a float tensor [S]")
    if ref_logps is not None:
        raise ValueError(
            "ref_logps is given together with scores; scores stand in place of all that it enters, pass None"
        )
    if (logps is None) != (segments is None):
        raise ValueError("logps and segments go together; one of them is None")
    if logps is None and any(objective.nll):
        raise ValueError(f"logps is None; objective {objective.name} has an NLL term, which needs it")
    if segments is not None:
        _check_tokens(logps, ref_logps, segments, objective)
        if segments.num_sequences != len(scores):
            raise ValueError(f"scores has {len(scores)} elements; segments has {segments.num_sequences} sequences")


def _check_tokens(
    logps: Tensor | None, ref_logps: Tensor | None, segments: Segments | None, objective: Objective
) -> None:
    if not isinstance(logps, Tensor) or logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(f"logps is {_of(logps)}; it should be a float tensor [T], sequences one behind the other")
    if not isinstance(segments, Segments):
        raise TypeError(f"segments is {_of(segments)}; it should be a Segments")
    if ref_logps is not None and ref_logps.requires_grad:
        raise ValueError("ref_logps requires grad; the reference is a constant, pass ref_logps.detach()")
    cu_seqlens, mask = segments.cu_seqlens, segments.mask
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in _INTEGERS:
        raise ValueError(f"segments.cu_seqlens is {_of(cu_seqlens)}; it should be int64 or int32 [S+1]")
    _same_device("segments.cu_seqlens", cu_seqlens, logps)
    if mask is not None and (mask.shape != logps.shape or mask.dtype != torch.bool):
        raise ValueError(f"segments.mask is {_of(mask)}; it should be bool {list(logps.shape)}, like logps")
    if mask is not None:
        _same_device("segments.mask", mask, logps)
    fields = {"ref_logps": ref_logps, "segments.weights": segments.weights, "segments.kl": segments.kl}
    fields |= {"segments.kl_weights": segments.kl_weights, "segments.nll_weights": segments.nll_weights}
    fields |= {"segments.token_coefs": segments.token_coefs}
    for name, x in fields.items():
        if x is not None:
            _check_float(name, x, logps.shape, "logps", logps)
    made = segments.kl_weights is None and "segments.kl_weights" in _made(objective)
    if (segments.kl is None) != (segments.kl_weights is None) and not made:
        raise ValueError("segments.kl and segments.kl_weights go together; one of them is None")


def _check_pairs(pairs: Pairs, objective: Objective, like: Tensor) -> None:
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs is {_of(pairs)}; it should be a Pairs")
    index = pairs.index
    _check_index(index, objective.num_members, objective, like)
    num_tuples = index.shape[:1]
    shape_of = {"weights": num_tuples, "margins": num_tuples, "soft_labels": num_tuples, "beta_scales": num_tuples}
    shape_of["targets"] = torch.Size((len(index), len(objective.terms)))
    for name, shape in shape_of.items():
        x = getattr(pairs, name)
        if x is not None:
            _check_column(name, x, shape, like)
    _check_used(pairs, objective)


def _check_index(index: Tensor, members: int, objective: Objective, like: Tensor) -> None:
    if index.dim() != 2 or index.shape[1] != members or index.dtype not in _INTEGERS:
        wanted = f"int64 or int32 [P, {members}] for objective {objective.name}"
        raise ValueError(f"pairs.index is {_of(index)}; it should be {wanted}")
    _same_device("pairs.index", index, like)


def _check_column(name: str, x: Tensor, shape: torch.Size, like: Tensor) -> None:
    _check_float(f"pairs.{name}", x, shape, "pairs.index", like)
    if x.requires_grad:
        raise ValueError(f"pairs.{name} requires grad; the columns of pairs are constants, pass it detached")


def _check_used(pairs: Pairs, objective: Objective) -> None:
    """A column that no term looks at is a mistake, never ignored."""
    if pairs.soft_labels is not None and not any(t.takes_soft_label for t in objective.terms):
        raise ValueError(f"pairs.soft_labels is given; objective {objective.name} has no logistic term between members")
    if pairs.targets is not None and not any(t.link == "squared" for t in objective.terms):
        raise ValueError(f"pairs.targets is given; objective {objective.name} has no squared term")
    if pairs.margins is not None and not any(t.margin_coef for t in objective.terms):
        raise ValueError(f"pairs.margins is given; objective {objective.name} has no term that takes it")
    if pairs.relevance is not None:
        raise ValueError(f"pairs.relevance is given; objective {objective.name} is not of lists")
    if pairs.beta_scales is not None and not objective.terms:
        raise ValueError(f"pairs.beta_scales is given; objective {objective.name} has no term that takes it")


def _check_required(segments: Segments | None, pairs: Pairs, objective: Objective) -> None:
    for name in objective.requires:
        record, _, column = name.partition(".")
        owner = segments if record == "segments" else pairs
        if owner is not None and getattr(owner, column) is None:
            raise ValueError(f"{name} is None; objective {objective.name} needs it")


def check_values(tokens: Tokens, index: Tensor | None, num_sequences: int) -> None:
    """Checks of values, which read them back from the device."""
    if tokens.cu_seqlens is not None and tokens.logps is not None:
        cu_seqlens, num_tokens = tokens.cu_seqlens, tokens.logps.shape[0]
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"segments.cu_seqlens should rise from 0 to the number of tokens, {num_tokens}")
    if index is not None:
        check_index_values(index, num_sequences)


def check_index_values(index: Tensor, num_sequences: int) -> None:
    if bool(((index < -1) | (index >= num_sequences)).any()):
        raise ValueError(f"pairs.index should lie in [-1, {num_sequences}), the sequences (-1: absent)")


def _check_float(name: str, x: Tensor, shape: torch.Size, owner: str, like: Tensor) -> None:
    if x.shape != shape or not x.is_floating_point():
        raise ValueError(f"{name} is {_of(x)}; it should be a float tensor {list(shape)}, to go with {owner}")
    _same_device(name, x, like)


def _same_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; it should be on {like.device}, with the log-probs")


def _of(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
