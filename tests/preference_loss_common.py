"""What every backend of ``preference_loss`` has to do: the test modules of the backends import these tests.

Each has a fixture ``backend``, which makes one of its backends that of the public functions, and returns its name.
"""

from dataclasses import replace

import pytest
import torch
from preference_loss_cases import COLUMNS, EVERY_FIELD, LENGTHS, LISTED, LONG, Batch, assert_as_exact, check

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss, sequence_scores
from fastpo.objectives import PRESETS, SCORE_MAPS, TOKEN_MAPS, Objective, Term
from fastpo.types import Pairs


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, backend, monkeypatch):
    check(Batch(PRESETS[name]()), monkeypatch, backend)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("columns", [(), *((c,) for c in COLUMNS), COLUMNS], ids=str)
def test_columns_of_pairs(columns, mask, backend, monkeypatch):
    check(Batch(LISTED, fields=tuple(f"pairs.{c}" for c in columns), mask=mask), monkeypatch, backend)


@pytest.mark.parametrize("phi", TOKEN_MAPS)
@pytest.mark.parametrize("names", [(), *((f,) for f in EVERY_FIELD), EVERY_FIELD], ids=str)
def test_fields_of_tokens_and_their_gradients(names, phi, backend, monkeypatch):
    """SparsePO's mask among them: d loss / d weights and d loss / d kl_weights."""
    objective = Objective("mapped", (Term(scale=0.02),), phi=phi, length_power=0.5, nll=(0.3, 0.1))
    check(Batch(objective, fields=names), monkeypatch, backend)
    check(Batch(objective, (1300, 700), ((0, 1),), names, mask=False), monkeypatch, backend)


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("length_power", [0.0, 0.7, 1.0])
def test_score_maps_and_lengths(score_map, length_power, backend, monkeypatch):
    ref_coef = 0.0 if score_map == "log_odds" else 0.9  # a log-odds is of a probability
    settings = {"score_map": score_map, "score_map_coef": 0.2, "length_power": length_power, "ref_coef": ref_coef}
    check(Batch(Objective("mapped", (Term(scale=0.3),), **settings)), monkeypatch, backend)


@pytest.mark.parametrize("normalizer", objectives.NLL_NORMALIZERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nll_and_reduction(normalizer, reduction, backend, monkeypatch):
    """Many tuples, and a third of them of one sequence."""
    index = torch.randint(-1, len(LENGTHS), (700, 2), generator=torch.Generator().manual_seed(0))
    index[::3, 0] = 3
    objective = Objective("nll", (Term(),), nll=(0.7, -0.2), nll_normalizer=normalizer, reduction=reduction)
    check(Batch(objective, index=index.tolist(), fields=("pairs.weights",)), monkeypatch, backend)


@pytest.mark.parametrize("fields", [(), EVERY_FIELD], ids=["plain", "everything"])
def test_long_sequences(fields, backend, monkeypatch):
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
    z = 0.1 * torch.stack((scores[0] - scores[1], scores[2], scores[1] - scores[4]))
    torch.testing.assert_close(out.losses, 1 - z.detach())
    grads = (torch.autograd.grad(loss, scores)[0] for loss in (out.loss, (1 - z).mean()))
    torch.testing.assert_close(*grads)
    assert not out.lengths.any() and not out.logps.any() and not out.nll.any()


@pytest.mark.parametrize("names", [(), EVERY_FIELD[:2]], ids=["plain", "weighted"])
@pytest.mark.parametrize("phi", TOKEN_MAPS)
def test_sequence_scores(names, phi, backend, monkeypatch):
    batch = Batch(replace(objectives.dpo(length_power=1.0), phi=phi), fields=names)
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float32, "torch"), (torch.float64, "torch")):
        monkeypatch.setenv("FASTPO_BACKEND", name)
        leaves, (logps, ref, segments, _, objective) = batch.arguments(dtype)
        scores = sequence_scores(logps, ref, segments, objective)
        weights = torch.linspace(-1, 1, len(scores), dtype=dtype)
        grads = torch.autograd.grad((scores * weights).sum(), leaves.values(), allow_unused=True)
        results.append({"scores": scores.detach()} | dict(zip(leaves, grads, strict=True)))
    assert_as_exact(*results)


@pytest.mark.parametrize("lengths, num_tuples", [((), 0), ((0, 0), 0), ((0, 0), 1), ((3, 4), 0), ((), 2)], ids=str)
def test_nothing_there(lengths, num_tuples, backend, monkeypatch):
    """No sequences, no tokens, no tuples, or tuples of absent members only."""
    index = ((0, 1),) if lengths else ((-1, -1),)
    batch = Batch(objectives.irpo(), lengths, index * max(num_tuples, 1), ("segments.token_coefs",))
    batch.index = batch.index[:num_tuples]
    check(batch, monkeypatch, backend)


@pytest.mark.parametrize("phi", TOKEN_MAPS)
def test_masked_out_tokens_may_hold_anything(phi, backend, monkeypatch):
    """They get gradient 0, and nothing that stands there reaches anything else."""
    batch = Batch(Objective("mapped", (Term(),), phi=phi, nll=(1.0, 1.0)), fields=EVERY_FIELD)
    clean = batch.run(torch.float32, monkeypatch, backend)
    for junk in (float("nan"), float("inf"), -float("inf")):
        for leaf in (*batch.leaves.values(), batch.ref):
            leaf[~batch.mask] = junk
        dirty = batch.run(torch.float32, monkeypatch, backend)
        for name, value in clean.items():
            assert torch.equal(dirty[name], value), name


def test_nan_is_not_hidden_and_stays_in_its_tuples(backend, monkeypatch):
    batch = Batch(objectives.dpo(), index=((0, 2), (3, 4)))
    batch.mask[:] = True
    batch.leaves["logps"][1] = float("nan")  # of sequence 0
    out = batch.run(torch.float32, monkeypatch, backend)
    assert out["loss"].isnan() and out["losses"].isnan().tolist() == [True, False]
    inside = torch.zeros(len(batch.mask), dtype=torch.bool)
    for i in (0, 2):
        inside[batch.cu[i] : batch.cu[i + 1]] = True
    assert torch.equal(out["d logps"].isnan(), inside)


def test_twice_the_same_bits(backend, monkeypatch):
    batch = Batch(LISTED, fields=("segments.token_coefs", "pairs.weights"))
    first, second = (batch.run(torch.float32, monkeypatch, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
