"""What benchmarks/tree_workloads.py compares is the same work: one loss, one gradient, whatever the packing."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("no benchmarks/: not a checkout", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import tree_steps as ways  # noqa: E402
from tree_data import SOLUTIONS, read_questions, search_workload, solutions_workload  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from fastpo.scoring import TreeScorer  # noqa: E402

VOCABULARY = 300


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
    for name, step in steps.items():
        scorer.zero_grad()
        found[name] = step(), torch.cat([p.grad.flatten() for p in scorer.parameters()])
    loss, gradient = found.pop("paths")
    for name, (other_loss, other) in found.items():
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        tolerance = 1e-4 if name == "trl" else 1e-5  # its head rounds more
        assert float((other - gradient).norm()) < tolerance * float(gradient.norm()), name


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
