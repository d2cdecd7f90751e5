"""``preference_loss`` and ``sequence_scores``: schema, backends, autograd, public functions. README.md derives them.

The forward reads every token once and returns, next to the loss, its slope in each sequence's sums; the backward writes
``upstream * (slope of the token's sequence) * ...`` once. So the upstream gradient costs nothing, and an evaluation
computes no gradients.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpo.dispatch import Backend
from fastpo.kernels.common.once import once_differentiable
from fastpo.objectives import Batch, Objective, Term
from fastpo.types import Pairs, PreferenceOutput, Segments

from . import backends, checks
from .records import (
    Outputs,
    TokenGrads,
    Tokens,
    TokenSettings,
    Tuples,
    TupleSettings,
    as_float,
    empty_grads,
    empty_outputs,
    empty_scores,
    token_settings,
    tokens_of,
    tuples_of,
)

OP = backends.OP  # for fastpo.info


_library = torch.library.Library("fastpo", "FRAGMENT")
_library.define(f"preference_loss_fwd{backends.FORWARD}")
_library.define(f"sequence_scores_fwd{backends.SCORES}")
_library.define(f"preference_loss_bwd{backends.BACKWARD}")

_NT, _NP, _NS = len(Tokens._fields), len(Tuples._fields), len(TokenSettings._fields)


def _unflatten(args: tuple) -> tuple[Tokens, Tensor | None, Tuples, TokenSettings, TupleSettings]:
    """The groups in the flat arguments of ``preference_loss_fwd``."""
    tuples_at, settings_at = _NT + 1, _NT + 1 + _NP
    return (
        Tokens(*args[:_NT]),
        args[_NT],
        Tuples(*args[tuples_at:settings_at]),
        TokenSettings(*args[settings_at : settings_at + _NS]),
        TupleSettings(*args[settings_at + _NS :]),
    )


def _forward_op(*args: Any) -> Outputs:
    tokens, scores, tuples, token_set, tuple_set = _unflatten(args)
    return backends.forward(backends.pick(tokens, scores, tuple_set), tokens, scores, tuples, token_set, tuple_set)


def _scores_op(*args: Any) -> tuple[Tensor, Tensor]:
    tokens = Tokens(*args[:_NT])
    return backends.scores(backends.pick(tokens), tokens, TokenSettings(*args[_NT:]))


def _backward_op(grad, score_grads, nll_grads, *args: Any) -> TokenGrads:
    tokens, lengths, setting = Tokens(*args[:_NT]), args[_NT], TokenSettings(*args[_NT + 1 : -1])
    impl = backends.pick(tokens).impl
    return impl.backward(grad, score_grads, nll_grads, tokens, lengths, setting, args[-1])


def _forward_fake(*args: Any) -> Outputs:
    tokens, scores, tuples, _, _ = _unflatten(args)
    return empty_outputs(tokens, scores, tuples)


def _scores_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_scores(Tokens(*args[:_NT]))


def _backward_fake(grad, score_grads, nll_grads, *args: Any) -> TokenGrads:
    return empty_grads(Tokens(*args[:_NT]), args[-1])


for _name, _compiled, _function, _fake in (
    ("preference_loss_fwd", "preference_loss_forward", _forward_op, _forward_fake),
    ("sequence_scores_fwd", "sequence_scores_forward", _scores_op, _scores_fake),
    ("preference_loss_bwd", "preference_loss_backward", _backward_op, _backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpo::{_name}", _fake, lib=_library)
    torch.library.register_fake(f"fastpo_c::{_compiled}", _fake, lib=backends.LIBRARY)


def _kept(tokens: Tokens, needs: list[bool]) -> Tokens:
    """The token fields that the backward reads; the others are not kept alive."""
    grads = TokenGrads(*needs)
    return tokens._replace(
        ref_logps=tokens.ref_logps if grads.weights else None,
        kl=tokens.kl if grads.kl_weights else None,
        kl_weights=tokens.kl_weights if grads.kl or grads.kl_weights else None,
    )


def _save(ctx: Any, needs: list[bool], tokens: Tokens, setting: TokenSettings, output: tuple, slopes: tuple) -> None:
    """The caller sets ``ctx.direct``: whether the backward too calls the compiled backend without the public op."""
    ctx.needs, ctx.setting = needs, setting
    ctx.save_for_backward(*slopes, *_kept(tokens, needs))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _save_loss(ctx: Any, needs: list[bool], groups: tuple, output: tuple) -> None:
    tokens, scores, _, setting, _ = groups
    ctx.given = scores is not None
    *_, lengths, _, _, score_grads, nll_grads = output
    _save(ctx, needs, tokens, setting, output, (score_grads, nll_grads, lengths))


def _loss_grads(ctx: Any, grad: Tensor | None, needs_scores: bool) -> tuple[TokenGrads, Tensor | None]:
    """Gradients by the token fields and by the scores, None where not needed."""
    score_grads, nll_grads, lengths, *tokens = ctx.saved_tensors
    if grad is None:
        return TokenGrads(*(None,) * len(ctx.needs)), None
    of_scores = grad * score_grads if needs_scores else None
    own = None if ctx.given else score_grads
    return _token_grads(ctx, grad, own, nll_grads, Tokens(*tokens), lengths), of_scores


def _scores_grads(ctx: Any, grad: Tensor | None) -> TokenGrads:
    lengths, *tokens = ctx.saved_tensors
    if grad is None:
        return TokenGrads(*(None,) * len(ctx.needs))
    return _token_grads(ctx, None, grad.contiguous(), None, Tokens(*tokens), lengths)


def _token_grads(ctx: Any, grad, score_grads, nll_grads, tokens: Tokens, lengths: Tensor) -> TokenGrads:
    if not any(ctx.needs):
        return TokenGrads(*(None,) * len(ctx.needs))
    grads: Any
    if ctx.direct:
        grads = backends.Compiled.backward(grad, score_grads, nll_grads, tokens, lengths, ctx.setting, ctx.needs)
    else:
        flat = (grad, score_grads, nll_grads, *tokens, lengths, *ctx.setting, ctx.needs)
        grads = torch.ops.fastpo.preference_loss_bwd(*flat)
    return TokenGrads(*(g if needed else None for g, needed in zip(grads, ctx.needs, strict=True)))


# As ops: gradients in the order of their arguments.

_GRADS_AT = [Tokens._fields.index(name) for name in TokenGrads._fields]


def _by_argument(grads: TokenGrads) -> list[Any]:
    by_name = grads._asdict()
    return [by_name.get(name) for name in Tokens._fields]


def _setup_loss(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.direct = False
    _save_loss(ctx, [ctx.needs_input_grad[at] for at in _GRADS_AT], _unflatten(inputs), output)


@once_differentiable("preference_loss")
def _backward_loss(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    grads, of_scores = _loss_grads(ctx, grad, ctx.needs_input_grad[_NT])
    return (*_by_argument(grads), of_scores, *(None,) * (_NP + _NS + len(TupleSettings._fields)))


def _setup_scores(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.direct, tokens, setting = False, Tokens(*inputs[:_NT]), TokenSettings(*inputs[_NT:])
    _save(ctx, [ctx.needs_input_grad[at] for at in _GRADS_AT], tokens, setting, output, output[1:])


@once_differentiable("sequence_scores")
def _backward_scores(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    return (*_by_argument(_scores_grads(ctx, grad)), *(None,) * _NS)


torch.library.register_autograd("fastpo::preference_loss_fwd", _backward_loss, setup_context=_setup_loss, lib=_library)
torch.library.register_autograd(
    "fastpo::sequence_scores_fwd", _backward_scores, setup_context=_setup_scores, lib=_library
)


# In eager mode: register_autograd would spend 140 us a call on a schema of this length; and the compiled backends are
# ops themselves, visible to whatever traces or counts: calling them without the public op in between saves 35 us.


def _outputs(backend: Backend, *groups: Any) -> Any:
    if backend.impl is backends.Compiled:
        return backends.forward(backend, *groups)
    tokens, scores, tuples, token_set, tuple_set = groups
    return torch.ops.fastpo.preference_loss_fwd(*tokens, scores, *tuples, *token_set, *tuple_set)


class _Loss(torch.autograd.Function):
    """``apply(*the differentiable token fields, scores, tokens, tuples, token_set, tuple_set)``"""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        scores, tokens, tuples, token_set, tuple_set = args[len(TokenGrads._fields) :]
        groups = (tokens, scores, tuples, token_set, tuple_set)
        backend = backends.pick(tokens, scores, tuple_set)
        ctx.direct = backend.impl is backends.Compiled
        output = _outputs(backend, *groups)
        _save_loss(ctx, list(ctx.needs_input_grad[: len(TokenGrads._fields)]), groups, output)
        return tuple(output)

    @staticmethod
    @once_differentiable("preference_loss")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
        grads, of_scores = _loss_grads(ctx, grad, ctx.needs_input_grad[len(TokenGrads._fields)])
        return (*grads, of_scores, None, None, None, None)


class _Scores(torch.autograd.Function):
    """``apply(*the differentiable token fields, tokens, setting)``"""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        tokens, setting = args[len(TokenGrads._fields) :]
        backend = backends.pick(tokens)
        ctx.direct = backend.impl is backends.Compiled
        output: Any
        if ctx.direct:
            output = backends.scores(backend, tokens, setting)
        else:
            output = torch.ops.fastpo.sequence_scores_fwd(*tokens, *setting)
        _save(ctx, list(ctx.needs_input_grad[: len(TokenGrads._fields)]), tokens, setting, output, output[1:])
        return output

    @staticmethod
    @once_differentiable("sequence_scores")
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
        return (*_scores_grads(ctx, grad), None, None)


def _loss(tokens: Tokens, scores: Tensor | None, tuples: Tuples, *settings: Any) -> Any:
    leaves = (*_differentiable(tokens), scores)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return _Loss.apply(*leaves, tokens, tuples, *settings)
    return _outputs(backends.pick(tokens, scores, settings[1]), tokens, scores, tuples, *settings)


def _differentiable(tokens: Tokens) -> list[Tensor | None]:
    return [tokens[at] for at in _GRADS_AT]


def preference_loss(
    logps: Tensor | None,  # [T]
    ref_logps: Tensor | None,  # [T]
    segments: Segments | None,
    pairs: Pairs,
    objective: Objective,
    *,
    scores: Tensor | None = None,  # [S]
) -> PreferenceOutput:
    """The loss of ``objective`` over tuples of sequences, its metrics, and gradients for every token in one pass.

    In plain PyTorch, for two members and one logistic term (fastpo/objectives/core.py has the whole formula)::

        S = torch.stack([(logps - ref_logps)[a:b].sum() for a, b in pairwise(segments.cu_seqlens)])
        z = beta * (S[pairs.index[:, 0]] - S[pairs.index[:, 1]])
        loss = -(pairs.weights * F.logsigmoid(z)).mean()

    Args:
        logps: [T] log-probs of the policy, any float type; differentiable. May hold anything where the mask is False.
        ref_logps: [T] the reference's, a constant; None for an objective without reference (``not needs_reference``).
        segments: which tokens belong to which sequence, their weights; float fields are differentiable.
        pairs: the tuples and their columns; constants.
        objective: a preset of ``fastpo.objectives``, or your own.
        scores: [S] used in place of the S_i (a reward head's, or ``sequence_scores`` after some coupling of the batch);
            differentiable. ``ref_logps`` must then be None, and the weights and KL of ``segments`` are part of the
            scores. ``logps`` and ``segments`` may be None too if the objective has no NLL.

    Returns:
        PreferenceOutput. ``loss`` carries gradient to ``logps``, ``scores`` and the float fields of ``segments`` that
        require it, once; the other fields are constants. Everything is float32 (float64 if ``logps`` is). A sequence
        with no tokens, or with all of them masked, has score 0 and no gradient; without tuples the loss is 0.

    Raises:
        TypeError, ValueError: one line, naming the argument. Index values are checked on the CPU; on a GPU only with
            FASTPO_DEBUG=1, since that reads them back.

    Cost: forward one read of logps, ref_logps and mask (9 bytes a token); backward one write of the gradient and one
    read of the mask (5 bytes a token). Deterministic: a sequence in several tuples sums them in their order. An
    objective whose ``path`` is "two-phase" reads the tokens once more, for the scores that its batch function takes.
    """
    checks.check_loss(logps, ref_logps, segments, pairs, objective, scores)
    if objective.couple is not None or objective.list_loss is not None:
        return _coupled_loss(logps, ref_logps, segments, pairs, objective, scores)
    like = scores if logps is None else logps
    assert like is not None
    tokens = tokens_of(logps, ref_logps, segments, like)
    given = None if scores is None else as_float(scores, like)
    tuples, settings = tuples_of(pairs, objective, like), (token_settings(objective), TupleSettings.of(objective))
    if torch.compiler.is_compiling():
        outputs = torch.ops.fastpo.preference_loss_fwd(*tokens, given, *tuples, *settings[0], *settings[1])
    else:
        outputs = _loss(tokens, given, tuples, *settings)
    return PreferenceOutput(*outputs[: len(outputs) - 2])


def _coupled_loss(
    logps: Tensor | None,
    ref_logps: Tensor | None,
    segments: Segments | None,
    pairs: Pairs,
    objective: Objective,
    scores: Tensor | None,
) -> PreferenceOutput:
    """``preference_loss`` of an objective with a batch function or a loss of lists: scores, then records, then loss."""
    if pairs.index.device.type == "cpu" and not torch.compiler.is_compiling():  # before anything is picked by it
        count = segments.num_sequences if scores is None and segments is not None else len(scores)  # type: ignore[arg-type]
        checks.check_index_values(pairs.index, count)
    own = scores
    if scores is None and objective.path == "two-phase":
        assert logps is not None and segments is not None
        with torch.set_grad_enabled(objective.list_loss is not None and torch.is_grad_enabled()):
            own = sequence_scores(logps, ref_logps, segments, objective)
    if objective.couple is not None:
        given = own.detach() if own is not None and objective.couple.uses_scores else None
        size = 0 if logps is None else logps.shape[0]
        segments, pairs = objective.couple(Batch(given, segments, pairs, objective, size))
        plain = replace(objective, couple=None, requires=())  # they were checked before
        return preference_loss(logps, ref_logps, segments, pairs, plain, scores=scores)
    return _list_loss(logps, ref_logps, segments, pairs, objective, scores, own)


def _list_loss(logps, ref_logps, segments, pairs: Pairs, objective: Objective, scores, own: Tensor) -> PreferenceOutput:
    """The engine makes what is reported, by a term that costs nothing; the loss is of ``own`` [S], the scores."""
    term = Term((0.0,) * pairs.index.shape[1], "linear", margin_coef=0.0, weight=0.0)
    reported = replace(objective, list_loss=None, terms=(term,), requires=())
    bare = Pairs(pairs.index)
    linear = segments is not None and segments.token_coefs is not None
    with torch.set_grad_enabled(linear and torch.is_grad_enabled()):
        out = preference_loss(logps, ref_logps, segments, bare, reported, scores=scores)
    present = pairs.index >= 0
    members = objective.beta * torch.cat((own, own.new_zeros(1)))[pairs.index]  # [P, K]; -1 is the zero
    losses = objective.list_loss(members, present, pairs.relevance)  # type: ignore[misc]
    if pairs.weights is not None:
        losses = losses * pairs.weights
    total = losses.sum(dtype=torch.float64).to(losses.dtype)
    size = max(len(losses), 1) if objective.reduction == "mean" else 1
    return replace(out, loss=out.loss + total / size, losses=losses.detach())


def sequence_scores(
    logps: Tensor,  # [T]
    ref_logps: Tensor | None,  # [T]
    segments: Segments,
    objective: Objective,
) -> Tensor:
    """The scores ``S_i`` [S] of ``objective``, differentiable: the first phase of losses that couple a batch.

    ``S_i = n_i^-length_power * sum_t [ w_t (phi(l_t) - ref_coef r_t) + k_t K_t ]`` over the masked-in tokens of
    sequence i; 0 where there are none. Compute a loss of them in PyTorch, or pass them on as ``scores=`` of
    ``preference_loss``; a batch function that makes columns of them belongs into ``Objective.couple``.
    ``torch.no_grad()``: scores only.

    Arguments, types and errors as ``preference_loss``; ``nll_weights`` and ``token_coefs`` do not enter scores.
    """
    checks.check_scores(logps, ref_logps, segments, objective)
    tokens = tokens_of(logps, ref_logps, segments, logps)._replace(nll_weights=None, token_coefs=None)
    setting = token_settings(objective)
    if torch.compiler.is_compiling():
        return torch.ops.fastpo.sequence_scores_fwd(*tokens, *setting)[0]
    return _Scores.apply(*_differentiable(tokens), tokens, setting)[0]
