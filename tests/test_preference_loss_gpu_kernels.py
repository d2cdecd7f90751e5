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
from preference_loss_cases import COLUMNS, LENGTHS, LISTED, LONG, TOKEN_FIELDS, Batch, assert_as_exact, check

from fastpo import objectives
from fastpo.dispatch import Backend, Op, always, triton_missing
from fastpo.kernels.preference_loss import op, preference_loss, sequence_scores
from fastpo.kernels.preference_loss.records import Outputs, TokenGrads, Tokens, Tuples, TupleSettings, token_settings
from fastpo.objectives import PRESETS, SCORE_MAPS, TOKEN_MAPS, Objective, Term
from fastpo.types import Pairs

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
        others = [b for b in op.OP.backends if b.name != "cuda"]
        own = Backend("cuda", "any", always, always, request.getfixturevalue("emulated"))
        monkeypatch.setattr(op, "OP", Op("preference_loss", [own, *others]))
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


# ---------------------------------------------------------------- the op


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, backend, monkeypatch):
    check(Batch(PRESETS[name]()), monkeypatch, backend)


@pytest.mark.parametrize(
    "fields", [(), *((f"pairs.{c}",) for c in COLUMNS), tuple(f"pairs.{c}" for c in COLUMNS)], ids=str
)
def test_columns_of_pairs(fields, backend, monkeypatch):
    check(Batch(LISTED, fields=fields), monkeypatch, backend)


@pytest.mark.parametrize(
    "fields", [*((f"segments.{c}",) for c in TOKEN_FIELDS), tuple(f"segments.{c}" for c in TOKEN_FIELDS)], ids=str
)
@pytest.mark.parametrize("phi", TOKEN_MAPS)
def test_fields_of_tokens_and_their_gradients(fields, phi, backend, monkeypatch):
    objective = Objective("mapped", (Term(scale=0.02),), phi=phi, length_power=0.5, nll=(0.3, 0.1))
    check(Batch(objective, fields=fields), monkeypatch, backend)


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("length_power", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mask", [True, False])
def test_score_maps_and_lengths(score_map, length_power, mask, backend, monkeypatch):
    ref_coef = 0.0 if score_map == "log_odds" else 0.9
    objective = Objective(
        "mapped",
        (Term(scale=0.3),),
        ref_coef=ref_coef,
        length_power=length_power,
        score_map=score_map,
        score_map_coef=0.2,
    )
    check(Batch(objective, mask=mask), monkeypatch, backend)


@pytest.mark.parametrize("normalizer", objectives.NLL_NORMALIZERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nll_and_reduction(normalizer, reduction, backend, monkeypatch):
    """Many tuples: more than one program of them, and more of one sequence than it looks at at once."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, len(LENGTHS), (300, 2), generator=generator)
    index[:, 0] = torch.where(torch.arange(300) % 3 == 0, 3, index[:, 0])
    objective = Objective("nll", (Term(),), nll=(0.7, -0.2), nll_normalizer=normalizer, reduction=reduction)
    check(Batch(objective, index=index.tolist(), fields=("pairs.weights",)), monkeypatch, backend)


def test_a_large_index_is_sorted(backend, monkeypatch):
    """One element more than is searched."""
    index = torch.randint(-1, len(LENGTHS), (8193, 2), generator=torch.Generator().manual_seed(0))
    check(Batch(objectives.irpo(), index=index.tolist()), monkeypatch, backend)


@pytest.mark.parametrize("fields", [(), tuple(f"segments.{c}" for c in TOKEN_FIELDS)], ids=["plain", "everything"])
def test_long_sequences_are_shared_by_programs(fields, backend, monkeypatch):
    check(Batch(objectives.irpo(), LONG, ((0, 1),), fields), monkeypatch, backend)


@pytest.mark.parametrize("upstream", [0.0, -2.5])
def test_upstream_gradient(upstream, backend, monkeypatch):
    check(Batch(objectives.irpo(), fields=("segments.token_coefs",)), monkeypatch, backend, upstream=upstream)


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("nll", [(), (0.5, 0.1)])
def test_scores_from_outside(score_map, nll, backend, monkeypatch):
    """They take the place of the S_i; the tokens still have their NLL, and empty sequences scores like any other."""
    objective = Objective("given", (Term(scale=0.5),), score_map=score_map, score_map_coef=-0.3, nll=nll)
    scores = -torch.rand(len(LENGTHS), generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.1
    check(Batch(objective, fields=("segments.nll_weights",)), monkeypatch, backend, scores=scores)


def test_scores_from_outside_without_tokens(backend):
    scores = torch.linspace(-2, 1, 5, requires_grad=True)
    pairs = Pairs(torch.tensor([[0, 1], [2, -1], [1, 4]]))
    out = preference_loss(None, None, None, pairs, objectives.hinge(), scores=scores)
    (grad,) = torch.autograd.grad(out.loss, scores)
    z = 0.1 * torch.stack((scores[0] - scores[1], scores[2], scores[1] - scores[4]))
    torch.testing.assert_close(out.losses, 1 - z.detach())
    torch.testing.assert_close(grad, torch.autograd.grad((1 - z).mean(), scores)[0])
    assert out.scores.data_ptr() != scores.data_ptr()
    assert not out.lengths.any() and not out.logps.any() and not out.nll.any()


@pytest.mark.parametrize("fields", [(), tuple(f"segments.{c}" for c in TOKEN_FIELDS[:2])], ids=["plain", "everything"])
def test_sequence_scores(fields, backend, monkeypatch):
    batch = Batch(objectives.dpo(length_power=1.0), fields=fields)
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float32, "torch"), (torch.float64, "torch")):
        monkeypatch.setenv("FASTPO_BACKEND", name)
        leaves, (logps, ref, segments, _, objective) = batch.arguments(dtype)
        scores = sequence_scores(logps, ref, segments, objective)
        weights = torch.linspace(-1, 1, len(scores), dtype=dtype)
        grads = torch.autograd.grad((scores * weights).sum(), leaves.values(), allow_unused=True)
        results.append({"scores": scores.detach()} | dict(zip(leaves, grads, strict=True)))
    assert_as_exact(*results)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("lengths, num_tuples", [((), 0), ((0, 0), 0), ((0, 0), 1), ((3, 4), 0), ((), 2)], ids=str)
def test_nothing_there(lengths, num_tuples, backend, monkeypatch):
    """No sequences, no tokens, no tuples, or tuples of absent members only."""
    index = ((0, 1),) if lengths else ((-1, -1),)
    batch = Batch(objectives.irpo(), lengths, index * max(num_tuples, 1), ("segments.token_coefs",))
    batch.index = batch.index[:num_tuples]
    check(batch, monkeypatch, backend)


def test_masked_out_tokens_may_hold_anything(backend, monkeypatch):
    """They get gradient 0, and nothing that stands there reaches anything else."""
    fields = tuple(f"segments.{c}" for c in TOKEN_FIELDS)
    batch = Batch(Objective("mapped", (Term(),), phi="log1mexp", nll=(1.0, 1.0)), fields=fields)
    clean = batch.run(torch.float32, monkeypatch, backend)
    for junk in (float("nan"), float("inf"), -float("inf")):
        for leaf in (*batch.leaves.values(), batch.ref):
            leaf[~batch.mask] = junk
        dirty = batch.run(torch.float32, monkeypatch, backend)
        for name, value in clean.items():
            assert torch.equal(dirty[name], value), name


def test_nan_stays_in_its_tuples(backend, monkeypatch):
    batch = Batch(objectives.dpo(), index=((0, 2), (3, 4)))
    batch.mask[:] = True
    batch.leaves["logps"][1] = float("nan")  # of sequence 0
    out = batch.run(torch.float32, monkeypatch, backend)
    assert out["loss"].isnan() and out["losses"].isnan().tolist() == [True, False]
    bad = out["d logps"].isnan()
    inside = torch.zeros_like(bad)
    for i in (0, 2):
        inside[batch.cu[i] : batch.cu[i + 1]] = True
    assert torch.equal(bad, inside)


def direct(backend: str, batch: Batch, cu=None, index=None, shift=0):
    """The kernels below the op, which on a GPU does not look at values, and so lets bad ones through."""
    impl = next(b.impl for b in op.OP.backends if b.name == backend)
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


def test_twice_the_same_bits(backend, monkeypatch):
    batch = Batch(LISTED, fields=("segments.token_coefs", "pairs.weights"))
    first, second = (batch.run(torch.float32, monkeypatch, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "terms, members, fits", [(1, 2, True), (32, 2, True), (33, 2, False), (1, 33, False), (20, 30, False)]
)
def test_objectives_too_large_for_cuda_go_to_triton(terms, members, fits):
    coefs = (1.0,) * members
    settings = TupleSettings.of(Objective("large", (Term(coefs),) * terms, nll=coefs))
    assert (op._not_cuda(torch.float32, settings) is None) == fits


def test_many_terms(backend, monkeypatch):
    """As many as the CUDA kernels take."""
    terms = tuple(Term(scale=0.01 * j, weight=1 / (j + 1), margin=0.1 * j) for j in range(32))
    check(Batch(Objective("many", terms, nll=(1.0, 0.0))), monkeypatch, backend)
