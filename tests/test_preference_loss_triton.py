"""The Triton kernels of preference_loss in triton's interpreter, against the spec in fp64, judged by the spec in fp32.

A tile of tokens is 128 to 1024 wide (the mean length decides), a program has 128 tuples, a sequence's program looks at
64 entries of the index at once, and the interpreter counts as one multiprocessor, so that a sequence is shared by
several programs where there are fewer than eight. BATCH crosses each of those edges but the last, LONG that one.
"""

from functools import partial

import pytest
import torch
from preference_loss_cases import COLUMNS, INDEX, LENGTHS, LISTED, LONG, TOKEN_FIELDS, Batch, assert_as_exact, check

from fastpo import objectives
from fastpo.dispatch import triton_missing
from fastpo.kernels.preference_loss import links, preference_loss, sequence_scores
from fastpo.kernels.preference_loss.op import _tokens, _tuples
from fastpo.kernels.preference_loss.records import TokenSettings, TupleSettings, token_settings
from fastpo.objectives import LINKS, PRESETS, SCORE_MAPS, TOKEN_MAPS, Objective, Term
from fastpo.types import Pairs

if triton_missing() is not None:
    pytest.skip(triton_missing() or "", allow_module_level=True)

import triton
import triton.language as tl

from fastpo.kernels.common.links import (
    link_slope,
    link_value,
    score_map_slope,
    score_map_value,
    token_map_slope,
    token_map_value,
)
from fastpo.kernels.preference_loss import triton_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter meets infinities
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU itself"),
]

check = partial(check, backend="triton")


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "triton")


# ---------------------------------------------------------------- the link table


@triton.jit
def _curve(x_ptr, value_ptr, slope_ptr, size, param, KIND: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=-1.0)
    param = tl.zeros([BLOCK], x.dtype) + param
    if KIND == "link":
        value, slope = link_value(x, param, CODE), link_slope(x, param, CODE)
    elif KIND == "score map":
        value, slope = score_map_value(x, param, CODE), score_map_slope(x, param, CODE)
    else:
        value, slope = token_map_value(x, CODE), token_map_slope(x, CODE)
    tl.store(value_ptr + at, value, mask=at < size)
    tl.store(slope_ptr + at, slope, mask=at < size)


LINK_PARAMS = {"logistic": (1.0, 0.7, 0.0, 1.125), "squared": (0.0, -3.0), "exo": (1e-3, 0.25), "discopop": (0.05, 0.5)}
SCORE_MAP_PARAMS = {"power": (-1.0, 0.5, -0.25)}
CURVES = [
    *(("link", name, p) for name in LINKS for p in LINK_PARAMS.get(name, (0.0,))),
    *(("score map", name, p) for name in SCORE_MAPS for p in SCORE_MAP_PARAMS.get(name, (0.0,))),
    *(("token map", name, 0.0) for name in TOKEN_MAPS),
]
ROWS = {
    "link": (list(LINKS), links.LINKS_BY_CODE),
    "score map": (SCORE_MAPS, links.SCORE_MAPS_BY_CODE),
    "token map": (TOKEN_MAPS, links.TOKEN_MAPS_BY_CODE),
}


def abscissas(kind: str) -> torch.Tensor:
    """Both sides of every switch, far out, near 0; log-probs (and mean log-probs) are not positive."""
    magnitudes = torch.cat(
        (torch.logspace(-9, 2, 56), torch.tensor([2.0**-24, 2.0**-25, 0.6931471, 0.6931472, 1.0, 60.0]))
    )
    both = torch.cat((-magnitudes, torch.zeros(1), magnitudes, torch.tensor([-80.0, 80.0])))
    return both if kind == "link" else both[both <= 0]


@pytest.mark.parametrize("kind, name, param", CURVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_link_table_is_the_reference_table(kind, name, param, dtype):
    """Every row of links.py, in value and slope: a row that is missing here, or differs, fails."""
    names, table = ROWS[kind]
    code = names.index(name)
    x = abscissas(kind).to(dtype)
    param = float(torch.tensor(param, dtype=torch.float32))  # kernels take fp32 scalars
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _curve[(1,)](x, value, slope, len(x), param, kind, code, 256)
    for ours, curve in ((value, table[code].value), (slope, table[code].slope)):
        exact, torchs = curve(x.double(), param), curve(x, param)
        error, torch_error = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
        ulp = torch.finfo(dtype).eps
        excess = error - 2 * torch_error - 8 * ulp * exact.abs() - 1e-30
        # Where the reference cancels, the result is as good as its largest term.
        assert (excess - 4 * ulp <= 0).all(), (
            f"{name}: {x[excess.argmax()]}, {ours[excess.argmax()]}, {exact[excess.argmax()]}"
        )


@pytest.mark.parametrize("kind, name, param", CURVES)
def test_links_do_not_hide_nan(kind, name, param):
    x = torch.tensor([float("nan"), -1.0])
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _curve[(1,)](x, value, slope, 2, param, kind, ROWS[kind][0].index(name), 2)
    assert value.isnan().tolist() == [True, False]


# ---------------------------------------------------------------- the op


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, monkeypatch):
    check(Batch(PRESETS[name]()), monkeypatch)


@pytest.mark.parametrize(
    "fields", [(), *((f"pairs.{c}",) for c in COLUMNS), tuple(f"pairs.{c}" for c in COLUMNS)], ids=str
)
def test_columns_of_pairs(fields, monkeypatch):
    check(Batch(LISTED, fields=fields), monkeypatch)


@pytest.mark.parametrize(
    "fields", [*((f"segments.{c}",) for c in TOKEN_FIELDS), tuple(f"segments.{c}" for c in TOKEN_FIELDS)], ids=str
)
@pytest.mark.parametrize("phi", TOKEN_MAPS)
def test_fields_of_tokens_and_their_gradients(fields, phi, monkeypatch):
    objective = Objective("mapped", (Term(scale=0.02),), phi=phi, length_power=0.5, nll=(0.3, 0.1))
    check(Batch(objective, fields=fields), monkeypatch)


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("length_power", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mask", [True, False])
def test_score_maps_and_lengths(score_map, length_power, mask, monkeypatch):
    ref_coef = 0.0 if score_map == "log_odds" else 0.9
    objective = Objective(
        "mapped",
        (Term(scale=0.3),),
        ref_coef=ref_coef,
        length_power=length_power,
        score_map=score_map,
        score_map_coef=0.2,
    )
    check(Batch(objective, mask=mask), monkeypatch)


@pytest.mark.parametrize("normalizer", objectives.NLL_NORMALIZERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nll_and_reduction(normalizer, reduction, monkeypatch):
    """Many tuples: more than one program of them, and more of one sequence than it looks at at once."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, len(LENGTHS), (300, 2), generator=generator)
    index[:, 0] = torch.where(torch.arange(300) % 3 == 0, 3, index[:, 0])
    objective = Objective("nll", (Term(),), nll=(0.7, -0.2), nll_normalizer=normalizer, reduction=reduction)
    check(Batch(objective, index=index.tolist(), fields=("pairs.weights",)), monkeypatch)


@pytest.mark.parametrize("many", [False, True])
def test_a_large_index_is_sorted(many, monkeypatch):
    """The same bits either way, as both add in the order of the tuples."""
    index = torch.randint(-1, len(LENGTHS), (200, 2)).tolist() if many else INDEX
    batch = Batch(objectives.irpo(), index=index)
    searched = batch.run(torch.float32, monkeypatch, "triton")
    monkeypatch.setattr(triton_kernels, "SCAN", 3)
    ordered = batch.run(torch.float32, monkeypatch, "triton")
    for name, value in searched.items():
        torch.testing.assert_close(ordered[name], value, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("fields", [(), tuple(f"segments.{c}" for c in TOKEN_FIELDS)], ids=["plain", "everything"])
def test_long_sequences_are_shared_by_programs(fields, monkeypatch):
    block, _, splits = triton_kernels._tiles(sum(LONG), len(LONG), torch.device("cpu"))
    assert (block, splits) == (1024, 4)
    check(Batch(objectives.irpo(), LONG, ((0, 1),), fields), monkeypatch)


@pytest.mark.parametrize("upstream", [0.0, -2.5])
def test_upstream_gradient(upstream, monkeypatch):
    check(Batch(objectives.irpo(), fields=("segments.token_coefs",)), monkeypatch, upstream=upstream)


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("nll", [(), (0.5, 0.1)])
def test_scores_from_outside(score_map, nll, monkeypatch):
    """They take the place of the S_i; the tokens still have their NLL, and empty sequences scores like any other."""
    objective = Objective("given", (Term(scale=0.5),), score_map=score_map, score_map_coef=-0.3, nll=nll)
    scores = -torch.rand(len(LENGTHS), generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.1
    check(Batch(objective, fields=("segments.nll_weights",)), monkeypatch, scores=scores)


def test_scores_from_outside_without_tokens():
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
def test_sequence_scores(fields, monkeypatch):
    batch = Batch(objectives.dpo(length_power=1.0), fields=fields)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float32, "torch"), (torch.float64, "torch")):
        monkeypatch.setenv("FASTPO_BACKEND", backend)
        leaves, (logps, ref, segments, _, objective) = batch.arguments(dtype)
        scores = sequence_scores(logps, ref, segments, objective)
        weights = torch.linspace(-1, 1, len(scores), dtype=dtype)
        grads = torch.autograd.grad((scores * weights).sum(), leaves.values(), allow_unused=True)
        results.append({"scores": scores.detach()} | dict(zip(leaves, grads, strict=True)))
    assert_as_exact(*results)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("lengths, num_tuples", [((), 0), ((0, 0), 0), ((0, 0), 1), ((3, 4), 0), ((), 2)], ids=str)
def test_nothing_there(lengths, num_tuples, monkeypatch):
    """No sequences, no tokens, no tuples, or tuples of absent members only."""
    index = ((0, 1),) if lengths else ((-1, -1),)
    batch = Batch(objectives.irpo(), lengths, index * max(num_tuples, 1), ("segments.token_coefs",))
    batch.index = batch.index[:num_tuples]
    check(batch, monkeypatch)


def test_masked_out_tokens_may_hold_anything(monkeypatch):
    """They get gradient 0, and nothing that stands there reaches anything else."""
    fields = tuple(f"segments.{c}" for c in TOKEN_FIELDS)
    batch = Batch(Objective("mapped", (Term(),), phi="log1mexp", nll=(1.0, 1.0)), fields=fields)
    clean = batch.run(torch.float32, monkeypatch, "triton")
    for junk in (float("nan"), float("inf"), -float("inf")):
        for leaf in (*batch.leaves.values(), batch.ref):
            leaf[~batch.mask] = junk
        dirty = batch.run(torch.float32, monkeypatch, "triton")
        for name, value in clean.items():
            assert torch.equal(dirty[name], value), name


def test_nan_stays_in_its_tuples(monkeypatch):
    batch = Batch(objectives.dpo(), index=((0, 2), (3, 4)))
    batch.mask[:] = True
    batch.leaves["logps"][1] = float("nan")  # of sequence 0
    out = batch.run(torch.float32, monkeypatch, "triton")
    assert out["loss"].isnan() and out["losses"].isnan().tolist() == [True, False]
    bad = out["d logps"].isnan()
    inside = torch.zeros_like(bad)
    for i in (0, 2):
        inside[batch.cu[i] : batch.cu[i + 1]] = True
    assert torch.equal(bad, inside)


def direct(batch: Batch, cu=None, index=None):
    """The kernels below the op, which on a GPU does not look at values, and so lets bad ones through."""
    _, (logps, ref, segments, pairs, objective) = batch.arguments(torch.float32)
    tokens = _tokens(logps.detach(), ref, segments, logps)
    tokens = tokens if cu is None else tokens._replace(cu_seqlens=cu)
    tuples = _tuples(pairs, objective, logps)
    tuples = tuples if index is None else tuples._replace(index=index)
    setting: TokenSettings = token_settings(objective)
    out = triton_kernels.forward(tokens, None, tuples, setting, TupleSettings.of(objective))
    needs = [True] + [False] * 5
    grads = triton_kernels.backward(None, out.score_grads, out.nll_grads, tokens, out.lengths, setting, needs)
    return out, grads.logps


@pytest.mark.parametrize("bad", [14, 2**40, -2])
def test_a_sequence_out_of_range_is_nan(bad):
    """Nothing is read or written outside, and nobody trains on it unawares."""
    batch = Batch(objectives.irpo())
    index = batch.index.clone()
    index[3, 1] = bad
    out, grad = direct(batch, index=index)
    assert out.loss.isnan() and out.losses.isnan().tolist() == [p == 3 for p in range(len(index))]
    assert out.rewards[3, 1].isnan() and grad.isfinite().all()


def test_tokens_of_no_sequence_get_gradient_zero():
    batch = Batch(objectives.irpo(), (10, 20, 300, 5), ((0, 1), (2, 3)), mask=False)
    cu = torch.tensor([4, 10, 30, 330, 331])
    _, grad = direct(batch, cu=cu)
    assert grad.isfinite().all() and not grad[:4].any() and not grad[331:].any() and grad[4:331].all()
    cu = torch.tensor([-7, 10, 30, 2**40, 2**41])
    out, grad = direct(batch, cu=cu)
    assert grad.isfinite().all() and out.lengths.tolist() == [10, 20, 305, 0]


def test_twice_the_same_bits(monkeypatch):
    batch = Batch(LISTED, fields=("segments.token_coefs", "pairs.weights"))
    first, second = (batch.run(torch.float32, monkeypatch, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
