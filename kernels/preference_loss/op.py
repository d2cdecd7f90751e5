"""``preference_loss`` and ``sequence_scores``: schema, backends, autograd, public functions. README.md derives them.

The forward reads every token once and returns, next to the loss, its slope in each sequence's sums; the backward writes
``upstream * (slope of the token's sequence) * ...`` once. So the upstream gradient costs nothing, and an evaluation
computes no gradients.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fastpo.dispatch import Backend, Op, always, extension_missing, triton_missing
from fastpo.objectives import Objective
from fastpo.types import Pairs, PreferenceOutput, Segments

from . import checks, reference
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

_TOKENS = (
    "Tensor? logps, Tensor? ref_logps, Tensor? cu_seqlens, Tensor? mask, Tensor? weights, Tensor? kl, "
    "Tensor? kl_weights, Tensor? nll_weights, Tensor? token_coefs"
)
_TUPLES = "Tensor index, Tensor? tuple_weights, Tensor? margins, Tensor? params, Tensor? beta_scales"
_TOKEN_SETTINGS = "int phi, float ref_coef, float length_power"
_TUPLE_SETTINGS = (
    "int score_map, float score_map_coef, int[] links, float[] table, float[] nll, "
    "int nll_normalizer, bool mean, float beta"
)
_FORWARD = (
    f"({_TOKENS}, Tensor? scores, {_TUPLES}, {_TOKEN_SETTINGS}, {_TUPLE_SETTINGS}) -> "
    f"({', '.join(['Tensor'] * len(Outputs._fields))})"
)
_SCORES = f"({_TOKENS}, {_TOKEN_SETTINGS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor? grad, Tensor? score_grads, Tensor? nll_grads, {_TOKENS}, Tensor lengths, {_TOKEN_SETTINGS}, "
    f"bool[] needs) -> ({', '.join(['Tensor'] * len(TokenGrads._fields))})"
)

# The compiled ops take the same arguments as the public ones; C++ and CUDA implement them for their devices.
_compiled_library = torch.library.Library("fastpo_c", "FRAGMENT")
_compiled_library.define(f"preference_loss_forward{_FORWARD}")
_compiled_library.define(f"sequence_scores_forward{_SCORES}")
_compiled_library.define(f"preference_loss_backward{_BACKWARD}")


class _Compiled:
    """The C++ and CUDA backends: the arguments of reference.py's functions, laid out flat."""

    @staticmethod
    def forward(tokens: Tokens, scores: Tensor | None, tuples: Tuples, *settings: tuple) -> Outputs:
        flat = (*tokens, scores, *tuples, *settings[0], *settings[1])
        return Outputs(*torch.ops.fastpo_c.preference_loss_forward(*flat))

    @staticmethod
    def scores(tokens: Tokens, setting: TokenSettings) -> tuple[Tensor, Tensor]:
        return torch.ops.fastpo_c.sequence_scores_forward(*tokens, *setting)

    @staticmethod
    def backward(grad, score_grads, nll_grads, tokens, lengths, setting, needs) -> TokenGrads:
        flat = (grad, score_grads, nll_grads, *tokens, lengths, *setting, needs)
        return TokenGrads(*torch.ops.fastpo_c.preference_loss_backward(*flat))


class _Triton:
    """Imports the kernels when they first run: triton is not installed everywhere."""

    def __getattr__(self, name: str) -> Any:
        from . import triton_kernels

        return getattr(triton_kernels, name)


def _not_float64(dtype: torch.dtype, *_: Any) -> str | None:
    return "float64 log-probs are handled in float64, in plain PyTorch" if dtype == torch.float64 else None


def _not_cuda(dtype: torch.dtype, settings: Any = None) -> str | None:
    """CUDA's kernels take the objective as an argument, in arrays of the sizes in csrc/preference_loss_tuples.cuh."""
    if isinstance(settings, TupleSettings):
        sizes = len(settings.links), len(settings.nll), len(settings.table)
        if any(size > most for size, most in zip(sizes, (32, 32, 512), strict=True)):
            return "the objective has too many terms or members; triton takes any number"
    return _not_float64(dtype)


OP = Op(
    "preference_loss",
    [
        Backend("cuda", "cuda", lambda: extension_missing("_cuda"), _not_cuda, _Compiled),
        Backend("triton", "cuda", triton_missing, _not_float64, _Triton()),
        Backend("cpu", "cpu", lambda: extension_missing("_C"), _not_float64, _Compiled),
        Backend("torch", "any", always, always, reference),
    ],
)


def _run(name: str, like: Tensor, tokens: Tokens, index: Tensor | None, num_sequences: int, *args: Any) -> Any:
    """Calls ``name`` of a backend. Values are checked here: below compilation, and where reading them costs nothing."""
    backend = OP.pick(like.device, like.dtype, args[-1])
    function = getattr(backend.impl, name)
    checks_itself = backend.name == "cpu"
    if (like.device.type == "cpu" and not checks_itself) or os.environ.get("FASTPO_DEBUG") == "1":
        checks.check_values(tokens, index, num_sequences)
    try:
        return function(tokens, *args)
    except RuntimeError:
        if checks_itself:  # C++ has no ValueError to raise
            checks.check_values(tokens, index, num_sequences)
        raise


# ---------------------------------------------------------------- ops

_library = torch.library.Library("fastpo", "FRAGMENT")
_library.define(f"preference_loss_fwd{_FORWARD}")
_library.define(f"sequence_scores_fwd{_SCORES}")
_library.define(f"preference_loss_bwd{_BACKWARD}")

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


def _forward(*args: Any) -> Outputs:
    tokens, scores, tuples, token_set, tuple_set = _unflatten(args)
    like = tokens.logps if scores is None else scores
    num_sequences = tokens.cu_seqlens.shape[0] - 1 if scores is None else len(scores)
    return _run("forward", like, tokens, tuples.index, num_sequences, scores, tuples, token_set, tuple_set)


def _scores(*args: Any) -> tuple[Tensor, Tensor]:
    tokens = Tokens(*args[:_NT])
    num_sequences = tokens.cu_seqlens.shape[0] - 1
    return _run("scores", tokens.logps, tokens, None, num_sequences, TokenSettings(*args[_NT:]))


def _backward(grad, score_grads, nll_grads, *args: Any) -> TokenGrads:
    tokens, lengths, needs = Tokens(*args[:_NT]), args[_NT], args[-1]
    impl = OP.pick(lengths.device, tokens.logps.dtype).impl
    return impl.backward(grad, score_grads, nll_grads, tokens, lengths, TokenSettings(*args[_NT + 1 : -1]), needs)


for _name, _function in (
    ("preference_loss_fwd", _forward),
    ("sequence_scores_fwd", _scores),
    ("preference_loss_bwd", _backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpo::preference_loss_fwd", lib=_library)
def _(*args: Any) -> Outputs:
    tokens, scores, tuples, _, _ = _unflatten(args)
    return empty_outputs(tokens, scores, tuples)


@torch.library.register_fake("fastpo::sequence_scores_fwd", lib=_library)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_scores(Tokens(*args[:_NT]))


@torch.library.register_fake("fastpo::preference_loss_bwd", lib=_library)
def _(grad, score_grads, nll_grads, *args: Any) -> TokenGrads:
    return empty_grads(Tokens(*args[:_NT]), args[-1])


# ---------------------------------------------------------------- autograd


def _needs(tokens: Tokens, asked: tuple[bool, ...]) -> list[bool]:
    """Which of TokenGrads to compute, from which of Tokens require grad."""
    by_name = dict(zip(Tokens._fields, asked, strict=True))
    return [by_name[name] for name in TokenGrads._fields]


def _kept(tokens: Tokens, needs: list[bool]) -> Tokens:
    """The token fields that the backward reads; the others are not kept alive."""
    grads = TokenGrads(*needs)
    return tokens._replace(
        ref_logps=tokens.ref_logps if grads.weights else None,
        kl=tokens.kl if grads.kl_weights else None,
        kl_weights=tokens.kl_weights if grads.kl or grads.kl_weights else None,
    )


def _setup_loss(ctx: Any, inputs: tuple, output: tuple) -> None:
    tokens, scores, _, token_set, _ = _unflatten(inputs)
    outputs = Outputs(*output)
    ctx.needs = _needs(tokens, ctx.needs_input_grad[:_NT])
    ctx.setting = token_set
    ctx.given = scores is not None
    ctx.save_for_backward(outputs.score_grads, outputs.nll_grads, outputs.lengths, *_kept(tokens, ctx.needs))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_loss(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    score_grads, nll_grads, lengths, *rest = ctx.saved_tensors
    nothing = (None,) * (_NP + _NS + len(TupleSettings._fields))
    if grad is None:
        return (*(None,) * (_NT + 1), *nothing)
    of_scores = grad * score_grads if ctx.given and ctx.needs_input_grad[_NT] else None
    own = None if ctx.given else score_grads
    token_grads = _token_grads(grad, own, nll_grads, Tokens(*rest), lengths, ctx.setting, ctx.needs)
    return (*token_grads, of_scores, *nothing)


def _setup_scores(ctx: Any, inputs: tuple, output: tuple) -> None:
    tokens = Tokens(*inputs[:_NT])
    ctx.needs = _needs(tokens, ctx.needs_input_grad[:_NT])
    ctx.setting = TokenSettings(*inputs[_NT:])
    ctx.save_for_backward(output[1], *_kept(tokens, ctx.needs))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_scores(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    lengths, *rest = ctx.saved_tensors
    if grad is None:
        return (None,) * (_NT + _NS)
    token_grads = _token_grads(None, grad.contiguous(), None, Tokens(*rest), lengths, ctx.setting, ctx.needs)
    return (*token_grads, *(None,) * _NS)


def _token_grads(grad, score_grads, nll_grads, tokens: Tokens, lengths, setting, needs: list[bool]) -> list[Any]:
    """Gradients of the fields of Tokens, None where not needed."""
    if not any(needs):
        return [None] * _NT
    arguments = (grad, score_grads, nll_grads, *tokens, lengths, *setting, needs)
    grads = dict(zip(TokenGrads._fields, torch.ops.fastpo.preference_loss_bwd(*arguments), strict=True))
    wanted = dict(zip(TokenGrads._fields, needs, strict=True))
    return [grads[name] if wanted.get(name) else None for name in Tokens._fields]


torch.library.register_autograd("fastpo::preference_loss_fwd", _backward_loss, setup_context=_setup_loss, lib=_library)
torch.library.register_autograd(
    "fastpo::sequence_scores_fwd", _backward_scores, setup_context=_setup_scores, lib=_library
)


class _Loss(torch.autograd.Function):
    """What register_autograd makes of the op, without the 140 us a call that it spends on a schema of this length."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = torch.ops.fastpo.preference_loss_fwd(*args)
        _setup_loss(ctx, args, output)
        return output

    backward = staticmethod(_backward_loss)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = torch.ops.fastpo.sequence_scores_fwd(*args)
        _setup_scores(ctx, args, output)
        return output

    backward = staticmethod(_backward_scores)


def _eager_autograd() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


# ---------------------------------------------------------------- public functions


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

    In plain PyTorch, for two members and one logistic term (see fastpo/objectives.py for the whole formula)::

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
        require it; the other fields are constants. Everything is float32 (float64 if ``logps`` is). A sequence with no
        tokens, or with all of them masked, has score 0 and no gradient; without tuples the loss is 0.

    Raises:
        TypeError, ValueError: one line, naming the argument. Index values are checked on the CPU; on a GPU only with
            FASTPO_DEBUG=1, since that reads them back.

    Cost: forward one read of logps, ref_logps and mask (9 bytes a token); backward one write of the gradient and one
    read of the mask (5 bytes a token). Deterministic: a sequence in several tuples sums them in their order.
    """
    checks.check_loss(logps, ref_logps, segments, pairs, objective, scores)
    like = scores if logps is None else logps
    assert like is not None
    tokens = tokens_of(logps, ref_logps, segments, like)
    given = None if scores is None else as_float(scores, like)
    tuples = tuples_of(pairs, objective, like)
    flat = (*tokens, given, *tuples, *token_settings(objective), *TupleSettings.of(objective))
    run = _Loss.apply if _eager_autograd() else torch.ops.fastpo.preference_loss_fwd
    outputs = Outputs(*run(*flat))
    return PreferenceOutput(*outputs[: len(outputs) - 2])


def sequence_scores(
    logps: Tensor,  # [T]
    ref_logps: Tensor | None,  # [T]
    segments: Segments,
    objective: Objective,
) -> Tensor:
    """The scores ``S_i`` [S] of ``objective``, differentiable: the first phase of losses that couple a batch.

    ``S_i = n_i^-length_power * sum_t [ w_t (phi(l_t) - ref_coef r_t) + k_t K_t ]`` over the masked-in tokens of
    sequence i; 0 where there are none. Compute a loss of them (sorted, against a running mean, ...) in PyTorch, or
    build tuples from them, or pass them on as ``scores=`` of ``preference_loss``. ``torch.no_grad()``: scores only.

    Arguments, types and errors as ``preference_loss``; ``nll_weights`` and ``token_coefs`` do not enter scores.
    """
    checks.check_scores(logps, ref_logps, segments, objective)
    tokens = tokens_of(logps, ref_logps, segments, logps)._replace(nll_weights=None, token_coefs=None)
    run = _Scores.apply if _eager_autograd() else torch.ops.fastpo.sequence_scores_fwd
    return run(*tokens, *token_settings(objective))[0]
