"""What benchmarks/tree_workloads.py compares is the same work: one loss, one gradient, whatever the packing.

FASTPO_GSM8K=DIR, with GSM8K's model_solutions.jsonl, puts real solutions in the place of made-up ones.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("no benchmarks/: not a checkout", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import tree_host  # noqa: E402
import tree_steps as ways  # noqa: E402
import tree_workloads  # noqa: E402
import workload_step  # noqa: E402
from test_tree_training import ONE_ROW, assert_same_step, step  # noqa: E402
from tree_data import SOLUTIONS, pair_records, read_questions, search_workload, solutions_workload  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from fastpo import objectives  # noqa: E402
from fastpo.models import response_logps  # noqa: E402
from fastpo.references import Reference, responses_of, split_by_key  # noqa: E402
from fastpo.scoring import TreeScorer  # noqa: E402
from fastpo.tasks import PreferenceTask  # noqa: E402
from fastpo.tree_task import TreePreferenceTask, plan  # noqa: E402

VOCABULARY = 300
GSM8K = os.environ.get("FASTPO_GSM8K")


@pytest.fixture(scope="module")
def scorer():
    model = ways.build_model(layers=1, hidden=64, vocabulary=VOCABULARY)
    add_fused_lm_head(model)
    return TreeScorer(model)


@pytest.mark.parametrize("budget", [450, 4000])  # the tree in three rows with pairs across them; in one
def test_all_ways_give_one_loss_and_one_gradient(scorer, budget):
    workload = search_workload((2, 2, 2), VOCABULARY, prompt_tokens=16)
    shared, paths = ways.shared_rows(workload, budget), ways.path_rows(workload, max(budget, 1000))
    assert (len(shared) > 1) == (budget == 450)
    steps = {
        "paths": partial(ways.path_step, scorer, paths, workload),
        "fastpo": partial(ways.packed_step, scorer, shared, workload, ways.tree_logps),
        "dense": partial(ways.packed_step, scorer, shared, workload, ways.dense_logps),
        "trl": partial(ways.trl_step, scorer.model, ways.trl_batches(workload, 2000), workload),
    }
    found = {}
    for name, run in steps.items():
        scorer.zero_grad()
        found[name] = run(), torch.cat([p.grad.flatten() for p in scorer.parameters()])
    loss, gradient = found.pop("paths")
    for name, (other_loss, other) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        tolerance = 1e-4 if name == "trl" else 1e-5  # its head rounds more
        assert float((other - gradient).norm()) < tolerance * float(gradient.norm()), name


@pytest.mark.parametrize("name", ["irpo", "tdpo2"])
def test_solutions_give_the_gradients_of_their_paths(name):
    """The loop's step on 16 solutions to each of two questions: in one row, and cut across rows."""
    questions, source = read_questions(GSM8K and Path(GSM8K), 12)
    records = pair_records(solutions_workload(questions, 2, 10, False))
    assert ("synthetic" in source) == (GSM8K is None)
    build = partial(ways.build_model, layers=1, hidden=64, vocabulary=8192)
    start, responses = build(), responses_of(records)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter *= 1.1  # log-ratios and a KL other than 0
    logps, cu_seqlens = response_logps(start, list(responses.values()))
    given = Reference(split_by_key(responses, {"logps": logps, "cu_seqlens": cu_seqlens}), model=start)
    objective = objectives.by_name(name)
    expected = step(PreferenceTask, records, objective, 16384, build(), given)
    assert [len(plan(records, budget)) > 1 for budget in (600, ONE_ROW)] == [True, False]
    for budget in (600, ONE_ROW):
        assert_same_step(step(TreePreferenceTask, records, objective, budget, build(), given), expected)


@pytest.mark.parametrize(("pairs", "few_shot"), [(10, False), (15, True)])
def test_solutions_workload(pairs, few_shot):
    questions, source = read_questions(None, 12)
    workload = solutions_workload(questions, 2, pairs, few_shot)
    assert "synthetic" in source and len(workload.all_pairs) == 2 * pairs
    assert len(workload.sequences) == 2 * SOLUTIONS == len(set(map(tuple, workload.sequences)))
    assert {s for pair in workload.all_pairs for s in pair} == set(range(2 * SOLUTIONS))  # none is there for nothing
    assert len(set(workload.all_pairs)) == 2 * pairs
    assert all(start > 1024 * few_shot for start in workload.all_starts)


def test_batches_for_trl_hold_every_pair_once_and_one_prompt_each():
    questions, _ = read_questions(None, 3)
    workload = solutions_workload(questions, 3, 10, False)
    batches = ways.trl_batches(workload, 3000)
    assert [pair for batch in batches for pair in batch] == workload.all_pairs
    assert all(len({w // SOLUTIONS for w, _ in batch}) == 1 for batch in batches)
    assert max(ways.trl_inputs(workload, batch)["input_ids"].numel() for batch in batches) <= 3000


def test_a_sampled_way_is_timed_as_a_whole_one_and_compared_with_none(scorer):
    calls = []

    def recorded(name, loss):
        def run():
            calls.append(name)
            for parameter in scorer.parameters():
                parameter.grad = torch.full_like(parameter, loss)
            time.sleep(0.02)
            return loss

        return run

    def way(name, loss, share=1.0):
        return tree_workloads.Way(recorded(name, loss), recorded(name, loss), 10, 10, 10, share)

    found = tree_workloads.timed({"fastpo": way("a", 1.0), "part": way("b", 2.0, 0.25)}, 0, scorer, checked=True)
    assert calls == ["a", "b"] and found["part"][0] >= 0.08 > found["fastpo"][0]
    with pytest.raises(SystemExit, match="whole computes something else"):
        tree_workloads.timed({"fastpo": way("a", 1.0), "whole": way("b", 2.0)}, 0, scorer, checked=True)


def test_figures_of_the_host(monkeypatch):
    """Counted, not timed: a chain's pairs are nearly all visible, and sharing changes no loss."""
    monkeypatch.setattr(tree_host, "build_model", lambda *_: ways.build_model(1, 64, VOCABULARY))
    workload = search_workload((2, 2, 2), VOCABULARY, prompt_tokens=16)
    found = {figure: readings for figure, _, readings, _ in tree_host.metadata([workload])}
    assert found.keys() == {"metadata", "metadata share", "block efficiency"}
    assert 50 < found["block efficiency"][0] <= 100
    ((figure, case, (apart,), _),) = tree_host.curve(workload)
    assert figure == "loss curve" and case.startswith("2 steps in two epochs") and apart < 1e-4


def test_a_step_of_the_gpu_suite_is_one_loss_and_one_gradient():
    (case,) = workload_step.cases("small", "cpu")
    inputs = workload_step.setup(case, "cpu")
    outputs = {name: run(inputs) for name, run in workload_step.implementations(case).items()}
    assert outputs.keys() == {"fastpo", "packed, unshared", "trl"}
    workload_step.check(case, inputs, outputs)
    loss, *grads = outputs["trl"]
    for wrong in ([loss * 1.001, *grads], [loss, *(grad * 1.001 for grad in grads)]):
        with pytest.raises(AssertionError, match="of trl"):
            workload_step.check(case, inputs, {"fastpo": outputs["fastpo"], "trl": wrong})
    (real,) = workload_step.cases("gpu", "cuda")
    of = workload_step.workload(real.name)
    assert len(of.all_pairs) == real.shape["pairs"] and len(ways.shared_rows(of, workload_step.ROW_TOKENS)) == 1
