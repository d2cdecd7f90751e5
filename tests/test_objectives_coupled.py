"""Objectives that couple a batch: paths, one graph, outside scores, lists, batch functions of one's own, mistakes."""

from dataclasses import dataclass, replace

import pytest
import torch

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss, sequence_scores
from fastpo.objectives import PRESETS, Objective, Term
from fastpo.types import Pairs, Segments

LENGTHS = (3, 1, 4, 2, 5, 3, 2, 4)
CU = torch.tensor((0, *LENGTHS)).cumsum(0)
GENERATOR = torch.Generator().manual_seed(0)
LOGPS, REF, FIELD = (-torch.rand(int(CU[-1]), generator=GENERATOR) for _ in range(3))
PAIRS = Pairs(torch.arange(8).view(4, 2))
TWO_PHASE = {"aot", "aot_unpaired", "beta_dpo", "bco", "kto_batch", "lipo", "list_mle", "list_softmax", "t_reg"}


def arguments(name, **changes):
    """What preference_loss takes for a preset, every required column filled."""
    objective = PRESETS[name]()
    members = objective.num_members if name != "rrhf" else 4
    index = torch.arange(8).repeat(3)[: 4 * (members or 4)].view(4, -1)
    if objective.list_loss is not None or "pairs.relevance" in objective.requires:
        index = torch.arange(8).view(2, 4)
    columns = (
        {"relevance": -torch.rand(index.shape, generator=GENERATOR)} if "pairs.relevance" in objective.requires else {}
    )
    if "pairs.margins" in objective.requires:
        columns["margins"] = torch.zeros(len(index))
    own = {n.removeprefix("segments."): -FIELD for n in objective.requires if n.startswith("segments.")}
    segments, pairs = Segments(CU, **own), Pairs(index, **{k: v.abs() for k, v in columns.items()})
    given = {"logps": LOGPS, "ref_logps": REF if objective.needs_reference else None, "segments": segments}
    return {**given, "pairs": pairs, "objective": objective} | changes


def test_paths():
    assert {name for name in PRESETS if PRESETS[name]().path == "two-phase"} == TWO_PHASE
    assert {PRESETS[name]().path for name in PRESETS} == set(objectives.PATHS)


@pytest.mark.parametrize("name", sorted({*TWO_PHASE, "tdpo2", "ld_dpo", "rrhf"}))
def test_fullgraph(name):
    """One graph, and eager's numbers."""
    torch.compiler.reset()
    given = arguments(name)
    logps = given.pop("logps").clone().requires_grad_()
    objective = given.pop("objective")

    def step(logps, ref_logps, segments, pairs):
        return preference_loss(logps, ref_logps, segments, pairs, objective).loss * 2

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = run(logps, **given)
        results.append((loss.detach(), torch.autograd.grad(loss, logps)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(TWO_PHASE - {"t_reg"}))
def test_scores_from_outside(name):
    """The scores of the first phase given as ``scores``: the same loss, and its gradient by them."""
    given = arguments(name)
    scores = sequence_scores(given["logps"], given["ref_logps"], given["segments"], given["objective"])
    inner = preference_loss(**given)
    leaf = scores.clone().requires_grad_()
    outer = preference_loss(**given | {"ref_logps": None}, scores=leaf)
    torch.testing.assert_close(inner.loss, outer.loss)
    assert torch.autograd.grad(outer.loss, leaf)[0].any()


@pytest.mark.parametrize("name", ["list_mle", "list_softmax", "lipo", "rrhf"])
def test_lists_of_nobody(name):
    """Lists without members, and no lists at all: 0, with gradient 0."""
    objective, absent = PRESETS[name](), torch.full((2, 3), -1)
    for index in (absent, absent[:0]):
        logps = LOGPS.clone().requires_grad_()
        pairs = Pairs(index, relevance=torch.ones(index.shape))
        out = preference_loss(logps, REF if objective.needs_reference else None, Segments(CU), pairs, objective)
        assert out.loss == 0 and not torch.autograd.grad(out.loss, logps)[0].any()


def test_what_a_list_reports():
    given = arguments("list_mle")
    given["pairs"] = replace(given["pairs"], weights=torch.tensor([2.0, 0.0]))
    out = preference_loss(**given)
    assert out.losses.shape == (2,) and out.losses[1] == 0 and out.loss == out.losses[0] / 2
    assert out.rewards.shape == (2, 4) and torch.equal(out.rewards, 0.1 * out.scores.view(2, 4))
    summed = preference_loss(**given | {"objective": replace(given["objective"], reduction="sum")})
    torch.testing.assert_close(summed.loss, 2 * out.loss)


def test_a_coefficient_of_tokens_beside_a_list():
    """``sum_t v_t l_t`` is part of the loss of lists too, gradient and all."""
    given = arguments("list_mle")
    logps = LOGPS.clone().requires_grad_()
    plain, with_term = (
        preference_loss(**given | {"logps": logps, "segments": Segments(CU, token_coefs=v)}).loss for v in (None, FIELD)
    )
    torch.testing.assert_close(with_term, plain + (FIELD * LOGPS).sum())
    grads = [torch.autograd.grad(loss, logps)[0] for loss in (plain, with_term)]
    torch.testing.assert_close(grads[1], grads[0] + FIELD)


@dataclass(frozen=True)
class _LeastFirst:
    """A user's batch function: weights fall with the score gap."""

    uses_scores = True
    makes = ("pairs.weights",)

    def __call__(self, batch):
        own = batch.scores[batch.pairs.index]
        return batch.segments, replace(batch.pairs, weights=(own[:, 1] - own[:, 0]).softmax(0))


def test_a_batch_function_of_ones_own():
    """It sees detached scores; the loss is that of the columns that it makes."""
    logps = LOGPS.clone().requires_grad_()
    objective = Objective("own", (Term(),), couple=_LeastFirst())
    ours = preference_loss(logps, REF, Segments(CU), PAIRS, objective).loss
    scores = torch.segment_reduce(LOGPS - REF, "sum", offsets=CU, axis=0)
    weights = (scores[1::2] - scores[::2]).softmax(0)
    theirs = preference_loss(logps, REF, Segments(CU), replace(PAIRS, weights=weights), objectives.dpo()).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs)))


MISTAKES = {
    "pairs.margins is given; objective bco makes it by itself, pass None": ("bco", {"margins": torch.ones(4)}),
    "pairs.margins is given; objective kto_batch makes it by itself": ("kto_batch", {"margins": torch.ones(4)}),
    "pairs.weights is given; objective aot_unpaired makes it by itself": ("aot_unpaired", {"weights": torch.ones(4)}),
    "pairs.margins is None; objective aot needs it": ("aot", {"margins": None}),
    "pairs.relevance is None; objective lipo needs it": ("lipo", {"relevance": None}),
    "pairs.relevance is torch.float32 [2, 3]; it should be a float tensor [2, 4]": (
        "lipo",
        {"relevance": torch.ones(2, 3)},
    ),
    "pairs.margins is given; objective lipo, of lists, has no term that takes it": ("lipo", {"margins": torch.ones(2)}),
    "pairs.relevance is given; objective bco is not of lists": ("bco", {"relevance": torch.ones(4, 2)}),
    "pairs.relevance is given; objective dpo is not of lists": ("dpo", {"relevance": torch.ones(4, 2)}),
    "pairs.index is torch.int64 [4, 3]; it should be int64 or int32 [P, 2] for objective bco": (
        "bco",
        {"index": torch.zeros(4, 3, dtype=torch.int64)},
    ),
    "pairs.index is torch.float32 [2, 4]; it should be int64 or int32 [P, K], a list in each row": (
        "list_mle",
        {"index": torch.zeros(2, 4)},
    ),
    "pairs.index should lie in [-1, 8), the sequences (-1: absent)": ("bco", {"index": torch.full((4, 2), 8)}),
    "pairs.weights is torch.float32 [3]; it should be a float tensor [2]": ("list_mle", {"weights": torch.ones(3)}),
    "segments.kl is None; objective tdpo2 needs it": ("tdpo2", {"kl": None}),
    "segments.kl_weights is given; objective tdpo2 makes it by itself": ("tdpo2", {"kl_weights": FIELD}),
    "segments.token_coefs is None; objective t_reg needs it": ("t_reg", {"token_coefs": None}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_in_one_line(message):
    name, columns = MISTAKES[message]
    given = arguments(name)
    for record in ("segments", "pairs"):
        own = {
            k: v for k, v in columns.items() if hasattr(given[record], k) and (k == "weights") <= (record == "pairs")
        }
        given[record] = replace(given[record], **own)
    with pytest.raises((TypeError, ValueError)) as caught:
        preference_loss(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_columns_without_segments():
    """A batch function that fills segments has none to fill where only scores are given."""
    with pytest.raises(ValueError, match="segments is None; objective tdpo2 computes columns of it"):
        preference_loss(None, None, None, PAIRS, objectives.tdpo2(), scores=torch.ones(8))


def test_a_list_stands_alone():
    with pytest.raises(ValueError, match="objective x: list_loss stands alone; terms and nll should be empty"):
        Objective("x", (Term(),), list_loss=objectives.list_mle().list_loss)
