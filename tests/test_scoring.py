"""``score``: the log-probs of a tree's paths, whatever they are packed with, and its statistics."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integration_cases import assert_same_gradients, gradients
from tiny_models import CONTEXT, random_tokens
from tree_cases import alone, build, sequences, tree

import fastpo
from fastpo import scoring
from fastpo.errors import FastpoError
from fastpo.integrations.head import hidden_states
from fastpo.scoring import TreeScorer


@pytest.fixture(scope="module")
def model():
    return build()


def forests(number):
    return [tree(seed) for seed in range(number)]


@pytest.mark.parametrize("budget", [18, 40, 10_000])  # cut trees, a tree a row, all in one row
def test_sums_and_logps_of_many_trees(model, budget):
    trees = forests(7)
    scores = fastpo.score(model, trees, token_budget=budget)
    for seed, (t, found) in enumerate(zip(trees, scores, strict=True)):
        nodes, cu_seqlens = fastpo.sequence_nodes(t)
        wanted = alone(model, *sequences(seed)).detach()
        torch.testing.assert_close(found.logps[nodes], wanted, rtol=1e-5, atol=1e-5)
        sums = torch.stack([part.sum() for part in wanted.tensor_split(cu_seqlens[1:-1])])
        torch.testing.assert_close(found.sums, sums, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.lengths, cu_seqlens.diff())
        other = torch.ones(t.num_nodes, dtype=torch.bool)
        other[nodes] = False
        assert not found.logps[other].any()


def test_a_forward_is_of_a_multiple_of_8_tokens(model, monkeypatch):
    """With roots behind the tree that nothing reads: the scores are those of the tree alone."""
    taken = []
    monkeypatch.setattr(scoring, "hidden_states", lambda *a, **k: taken.append(k) or hidden_states(*a, **k))
    trees = [fastpo.build_tree(random_tokens(n), starts=1) for n in (7, 8, 9)]
    found = [fastpo.score(model, [t])[0].logps for t in trees]
    assert [k["input_ids"].shape[1] for k in taken] == [8, 8, 16]
    monkeypatch.setattr(scoring, "_padded", lambda t: t)
    for t, logps in zip(trees, found, strict=True):
        torch.testing.assert_close(logps, fastpo.score(model, [t])[0].logps, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_predicting_distribution(model):
    t = tree()
    [found] = fastpo.score(model, [t], stats=("entropy", "topk_mass"), topk=3)
    with torch.no_grad():
        logits = model(**fastpo.tree_inputs(t)).logits[0]
    nodes = fastpo.trained_nodes(t)
    p = logits.softmax(-1)[t.parent[nodes]]
    torch.testing.assert_close(found.stats["entropy"][nodes], -(p * p.log()).sum(-1))
    torch.testing.assert_close(found.stats["topk_mass"][nodes], p.topk(3).values.sum(-1))


def test_trees_are_taken_as_they_are_needed(model):
    taken, done = [], []

    def stream():
        for seed in range(100):
            taken.append(seed)
            yield tree(seed % 3)

    scores = fastpo.score_stream(model, stream(), token_budget=40, progress=done.append)
    next(scores)
    assert 16 <= len(taken) < 32
    assert 1 + len(list(scores)) == 100 == sum(done)


def test_no_trees(model):
    assert fastpo.score(model, []) == []


def test_a_head_of_its_own_is_honoured():
    """Softcap and a window, through the fused head and the tree."""
    model = build("gemma2")
    [found] = fastpo.score(model, [tree()])
    wanted = alone(model, *sequences()).detach()
    torch.testing.assert_close(found.logps[fastpo.sequence_nodes(tree())[0]], wanted, rtol=1e-5, atol=1e-5)


def test_the_head_runs_once_per_distinct_predictor(model, monkeypatch):
    """Six counted nodes below two predictors are two rows of the head."""
    from fastpo.kernels.linear_token_logprobs import engine

    rows = []
    original = engine.forward

    def counted(head, batch, *rest, **settings):
        rows.append(batch.x.shape[0])
        return original(head, batch, *rest, **settings)

    monkeypatch.setattr(engine, "forward", counted)
    t = fastpo.build_tree([[5, 6, i] for i in range(10, 16)], starts=1)
    with torch.no_grad():
        assert len(TreeScorer(model)(t)) == 7
    assert rows == [2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"parent": [-1, 0, 3, 2, 1]}, "parent[2] is 3; it should be -1, or a node before its child (no cycles)"),
        ({"parent": [1, 0, 1, 2, 1]}, "parent[0] is 1; it should be -1, or a node before its child (no cycles)"),
        ({"parent": [-1, 0, 1]}, "parent is torch.int64 of shape [3]; it should be torch.int64 [5]"),
        ({"depth": [0, 1, 2, 3, 200]}, "depth[4] is 200; it should be the parent's plus one, 0 at a root"),
        ({"subtree_end": [5, 5, 4, 9, 5]}, "subtree_end[3] is 9; it should be behind the node, at most 5"),
        ({"leaves": [3, 9]}, "leaves[1] is 9; it should be a node, below 5"),
        ({"starts": [2, 3]}, "starts[1] is 3; it should be at least 1 and at most the depth of its leaf"),
        ({"tokens": [1, -2, 3, 4, 5]}, "tokens[1] is -2; it should be at least 0"),
    ],
)
def test_a_wrong_tree_made_by_hand(columns, message, model):
    """One line that names the field, before a forward: of a list of trees, and of the scorer that training calls."""
    good = fastpo.build_tree([[1, 2, 3, 4], [1, 2, 5]], starts=2)
    bad = replace(good, **{name: torch.tensor(values) for name, values in columns.items()})
    with pytest.raises(FastpoError, match=rf"^trees\[1\]\.{re.escape(message)}") as found:
        fastpo.score(model, [good, bad])
    assert "\n" not in str(found.value)
    with pytest.raises(FastpoError, match=rf"^tree\.{re.escape(message)}"):
        TreeScorer(model)(bad)


def test_a_tree_of_too_many_positions_is_refused_in_training_too(model):
    with pytest.raises(FastpoError, match="tree has a path of 65 tokens; it should have at most 64"):
        TreeScorer(model)(fastpo.build_tree(random_tokens(CONTEXT + 1), starts=3))


def test_a_path_beyond_the_context(model):
    trees = [tree(), fastpo.build_tree(random_tokens(CONTEXT + 1), starts=3)]
    with pytest.raises(FastpoError, match=r"trees\[1\] has a path of 65 tokens; it should have at most 64"):
        fastpo.score(model, trees)


def test_a_token_that_the_model_does_not_know(model):
    known = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(FastpoError, match=rf"trees\[0\] holds the token {known}; it should hold tokens below {known}"):
        fastpo.score(model, [fastpo.build_tree([[1, 2, known]], 1)])


def test_a_budget_that_is_too_small(model):
    with pytest.raises(FastpoError, match="token_budget is 8; it should be at least 18, the longest path of trees"):
        fastpo.score(model, [tree()], token_budget=8)


def test_a_model_that_cannot():
    with pytest.raises(FastpoError, match="cannot take trees"):
        fastpo.score(build("bloom"), [tree()])


def test_two_processes(tmp_path):
    """DDP, and FSDP2 with checkpointing: the mean gradient of one process. Scores are those of one process."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(folder.parent), str(folder)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command += [str(folder / "tree_two_processes.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")

    model = build()
    scorer = TreeScorer(model)
    (sum(scorer(tree(seed)).sum() for seed in range(2)) / 2).backward()
    for name in ("ddp", "fsdp2"):
        assert_same_gradients(found[name], gradients(model))
    for sums, scores in zip(found["scores"], fastpo.score(model, forests(5)), strict=True):
        torch.testing.assert_close(sums, scores.sums, rtol=1e-5, atol=1e-5)
