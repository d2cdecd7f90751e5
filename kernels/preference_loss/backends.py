"""The backends of ``preference_loss``: their schemas, which of them runs, and calls of them by groups of arguments."""

import os
from typing import Any

import torch
from torch import Tensor

from fastpo.dispatch import Backend, Extension, Op, always, triton_missing

from . import checks, reference
from .records import Outputs, TokenGrads, Tokens, TokenSettings, Tuples, TupleSettings, sequences_of

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
FORWARD = (
    f"({_TOKENS}, Tensor? scores, {_TUPLES}, {_TOKEN_SETTINGS}, {_TUPLE_SETTINGS}) -> "
    f"({', '.join(['Tensor'] * len(Outputs._fields))})"
)
SCORES = f"({_TOKENS}, {_TOKEN_SETTINGS}) -> (Tensor, Tensor)"
BACKWARD = (
    f"(Tensor? grad, Tensor? score_grads, Tensor? nll_grads, {_TOKENS}, Tensor lengths, {_TOKEN_SETTINGS}, "
    f"bool[] needs) -> ({', '.join(['Tensor'] * len(TokenGrads._fields))})"
)

# The compiled ops take the same arguments as the public ones; C++ and CUDA implement them for their devices.
LIBRARY = torch.library.Library("fastpo_c", "FRAGMENT")
LIBRARY.define(f"preference_loss_forward{FORWARD}")
LIBRARY.define(f"sequence_scores_forward{SCORES}")
LIBRARY.define(f"preference_loss_backward{BACKWARD}")
_OPS = ("preference_loss_forward", "sequence_scores_forward", "preference_loss_backward")
# The logistic of csrc/links.h as the C++ backend's vectors compute it, x [n] and out [4, n] float64 with n a multiple
# of 8, for the test of its errors.
LIBRARY.define("logistic(Tensor x, Tensor(a!) out) -> ()")


class Compiled:
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
        Backend("cuda", "cuda", Extension("_cuda", _OPS), _not_cuda, Compiled),
        Backend("triton", "cuda", triton_missing, _not_float64, _Triton()),
        Backend("cpu", "cpu", Extension("_C", _OPS), _not_float64, Compiled),
        Backend("torch", "any", always, always, reference),
    ],
)


def pick(tokens: Tokens, scores: Tensor | None = None, setting: TupleSettings | None = None) -> Backend:
    """The backend for these. Where its ``impl`` is Compiled it is an op itself, which eager code may call directly."""
    like: Any = tokens.logps if scores is None else scores
    return OP.pick(like.device, like.dtype, setting)


def forward(
    backend: Backend,
    tokens: Tokens,
    scores: Tensor | None,
    tuples: Tuples,
    token_set: TokenSettings,
    tuple_set: TupleSettings,
) -> Outputs:
    num_sequences = sequences_of(tokens) if scores is None else len(scores)
    return _run(backend, "forward", tokens, tuples.index, num_sequences, scores, tuples, token_set, tuple_set)


def scores(backend: Backend, tokens: Tokens, setting: TokenSettings) -> tuple[Tensor, Tensor]:
    return _run(backend, "scores", tokens, None, sequences_of(tokens), setting)


def _run(backend: Backend, name: str, tokens: Tokens, index: Any, num_sequences: int, *args: Any) -> Any:
    """Calls ``name`` of a backend. Values are checked here: below compilation, and where reading them costs nothing."""
    checks_itself = backend.name == "cpu"
    on_cpu = (tokens.cu_seqlens if index is None else index).device.type == "cpu"
    if (on_cpu and not checks_itself) or os.environ.get("FASTPO_DEBUG") == "1":
        checks.check_values(tokens, index, num_sequences)
    try:
        return getattr(backend.impl, name)(tokens, *args)
    except RuntimeError:
        if checks_itself:  # C++ has no ValueError to raise
            checks.check_values(tokens, index, num_sequences)
        raise
