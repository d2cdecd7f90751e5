"""The GPU kernels of preference_loss without a GPU: against the spec in fp64, judged by the spec in fp32.

Triton's run in triton's interpreter, the CUDA file in emulated_cuda. A tile of tokens is 128 to 1024 wide, a program or
block has 128 tuples, a sequence's program or warp looks at 64 or 32 entries of the index at once; both count as one
multiprocessor here, so that long sequences are shared by several programs where there are fewer than eight. LENGTHS and
INDEX cross the first of these edges, the tests of many tuples and of LONG sequences the others.
"""

from typing import Any

import emulated_cuda
import pytest
import torch
from preference_loss_cases import LENGTHS, Batch, check
from preference_loss_common import *  # noqa: F403

from fastpo import objectives
from fastpo.dispatch import Backend, Op, always, triton_missing
from fastpo.kernels.preference_loss import backends
from fastpo.kernels.preference_loss.records import Outputs, TokenGrads, Tokens, Tuples, TupleSettings, token_settings
from fastpo.objectives import Objective, Term

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter meets infinities
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU itself"),
]
NO_TRITON = triton_missing()
NO_EMULATOR = emulated_cuda.missing()


class Emulated:
    """csrc/preference_loss.cu for CPU tensors, as a backend's implementation."""

    def __init__(self) -> None:
        names = ("preference_loss_forward", "sequence_scores_forward", "preference_loss_backward")
        self.ops = emulated_cuda.load("preference_loss", *names)

    def forward(self, tokens, scores, tuples, token_set, tuple_set) -> Outputs:
        return Outputs(*self.ops.preference_loss_forward(*tokens, scores, *tuples, *token_set, *tuple_set))

    def scores(self, tokens, setting) -> Any:
        return self.ops.sequence_scores_forward(*tokens, *setting)

    def backward(self, grad, score_grads, nll_grads, tokens, lengths, setting, needs) -> TokenGrads:
        slopes = (grad, score_grads, nll_grads)
        return TokenGrads(*self.ops.preference_loss_backward(*slopes, *tokens, lengths, *setting, needs))


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    return Emulated()


@pytest.fixture(
    params=[
        pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))),
        pytest.param("cuda", marks=pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))),
    ]
)
def backend(request, monkeypatch) -> str:
    """The name of the backend that the public function uses."""
    if request.param == "cuda":
        others = [b for b in backends.OP.backends if b.name != "cuda"]
        own = Backend("cuda", "any", always, always, request.getfixturevalue("emulated"))
        monkeypatch.setattr(backends, "OP", Op("preference_loss", [own, *others]))
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


def test_a_large_index_is_sorted(backend, monkeypatch):
    """One element more than is searched."""
    index = torch.randint(-1, len(LENGTHS), (8193, 2), generator=torch.Generator().manual_seed(0))
    check(Batch(objectives.irpo(), index=index.tolist()), monkeypatch, backend)


def direct(backend: str, batch: Batch, cu=None, index=None, shift=0):
    """The kernels below the op, which on a GPU does not look at values, and so lets bad ones through."""
    impl = next(b.impl for b in backends.OP.backends if b.name == backend)
    logps = torch.cat((torch.zeros(shift), batch.leaves["logps"].float()))[shift:]
    cu = batch.cu if cu is None else cu
    tokens = Tokens(logps, batch.ref.float(), cu, batch.mask, *(None,) * (len(Tokens._fields) - 4))
    tuples = Tuples(batch.index if index is None else index, *(None,) * (len(Tuples._fields) - 1))
    setting = token_settings(batch.objective)
    out = impl.forward(tokens, None, tuples, setting, TupleSettings.of(batch.objective))
    needs = [True] + [False] * 5
    return out, impl.backward(None, out.score_grads, out.nll_grads, tokens, out.lengths, setting, needs).logps


@pytest.mark.parametrize("mask", [True, False])
def test_an_unaligned_pointer_changes_nothing(mask, backend):
    """CUDA takes single tokens where a tensor does not begin at 16 bytes."""
    batch = Batch(objectives.irpo(), mask=mask)
    (out, grad), (shifted, shifted_grad) = direct(backend, batch), direct(backend, batch, shift=1)
    assert torch.equal(shifted.lengths, out.lengths) and torch.equal(grad != 0, shifted_grad != 0)
    torch.testing.assert_close(shifted.scores, out.scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [14, 2**40, -2])
def test_a_sequence_out_of_range_is_nan(bad, backend):
    """Nothing is read or written outside, and nobody trains on it unawares."""
    batch = Batch(objectives.irpo())
    index = batch.index.clone()
    index[3, 1] = bad
    out, grad = direct(backend, batch, index=index)
    assert out.loss.isnan() and out.losses.isnan().tolist() == [p == 3 for p in range(len(index))]
    assert out.rewards[3, 1].isnan() and grad.isfinite().all()


def test_tokens_of_no_sequence_get_gradient_zero(backend):
    batch = Batch(objectives.irpo(), (10, 20, 300, 5), ((0, 1), (2, 3)), mask=False)
    cu = torch.tensor([4, 10, 30, 330, 331])
    _, grad = direct(backend, batch, cu=cu)
    assert grad.isfinite().all() and not grad[:4].any() and not grad[331:].any() and grad[4:331].all()
    cu = torch.tensor([-7, 10, 30, 2**40, 2**41])
    out, grad = direct(backend, batch, cu=cu)
    assert grad.isfinite().all() and out.lengths.tolist() == [10, 20, 305, 0]


@pytest.mark.parametrize(
    "terms, members, fits", [(1, 2, True), (32, 2, True), (33, 2, False), (1, 33, False), (20, 30, False)]
)
def test_objectives_too_large_for_cuda_go_to_triton(terms, members, fits):
    coefs = (1.0,) * members
    settings = TupleSettings.of(Objective("large", (Term(coefs),) * terms, nll=coefs))
    assert (backends._not_cuda(torch.float32, settings) is None) == fits


def test_many_terms(backend, monkeypatch):
    """As many as the CUDA kernels take."""
    terms = tuple(Term(scale=0.01 * j, weight=1 / (j + 1), margin=0.1 * j) for j in range(32))
    check(Batch(Objective("many", terms, nll=(1.0, 0.0))), monkeypatch, backend)
