"""From trees to pairs, a training forest, process values and votes."""

import pytest
import torch

from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import mcts_dpo, visit_soft_labels
from fastpo.search import (
    Search,
    Step,
    method_by_name,
    process_targets,
    search_pairs,
    training_tree,
    weighted_vote,
)
from fastpo.trees import sequence_nodes
from fastpo.types import Segments

# A tree by hand: below the prompt 1 and 2, below 1 the ends 3 (right), 4 and 5 (wrong). Tokens of siblings share
# beginnings.
PROMPT = (1, 2)
STEPS = {0: [(5, 6, 10), (5, 7, 10)], 1: [(8, 9), (8, 8, 9), (3, 9)]}


def grow(name, **settings):
    def propose(nodes, widths):
        return [[Step(ids, -1.0, n.node > 0) for ids in STEPS.get(n.node, [])] for n in nodes]

    def evaluate(nodes):
        return [{1: 0.5, 2: -0.5, 3: 1.0, 4: -1.0, 5: -0.25}[n.node] for n in nodes]

    method = method_by_name(name, simulations=2, width=3, **settings)
    return Search([PROMPT], method, propose, evaluate).run()


def right(node):
    return node.ids[-2:] == [8, 9] and node.ids[-3] != 8


def test_spans_begin_at_the_first_token_that_differs():
    search = grow("mcts_dpo")
    found = {(p.chosen, p.rejected): p for p in search_pairs(search, 10, right)}
    assert found.keys() == {(1, 2), (3, 4)}
    steps, ends = found[1, 2], found[3, 4]
    assert (steps.prompt_ids, steps.chosen_ids, steps.rejected_ids) == ([1, 2, 5], [6, 10], [7, 10])
    assert (ends.prompt_ids, ends.chosen_ids, ends.rejected_ids) == ([1, 2, 5, 6, 10, 8], [9], [8, 9])
    visits = search.trees.visits[0]
    assert steps.soft_label == pytest.approx(visit_soft_labels(visits[1:2], visits[2:3]).item())
    assert steps.margin == pytest.approx((search.trees.q[0, 1] - search.trees.q[0, 2]).item())


def test_cpl_pairs_ends_once_and_scales_them():
    """Signs: (1, 2) and, of the ends 3 against 4 and 5, the largest gap alone, at .3 of it. q of ends: their values."""
    found = {(p.chosen, p.rejected): p.margin for p in search_pairs(grow("cpl"), 10, right)}
    assert found.keys() == {(1, 2), (3, 4)}
    assert found[3, 4] == pytest.approx(0.3 * 2)


def test_solutions_are_whole_responses():
    found = search_pairs(grow("mcts_dpo", pairs="solutions"), 10, right)
    assert [(p.chosen, p.rejected) for p in found] == [(3, 4), (3, 5)]
    assert found[1].prompt_ids + found[1].chosen_ids == [1, 2, 5, 6, 10, 8, 9]
    assert len(search_pairs(grow("mcts_dpo", pairs="solutions"), 1, right)) == 1


def test_a_response_that_begins_another_keeps_a_token():
    steps = {0: [(5, 6), (5, 6, 7)]}
    method = method_by_name("muzero", simulations=1, width=2)
    search = Search(
        [PROMPT],
        method,
        lambda nodes, widths: [[Step(ids) for ids in steps[n.node]] for n in nodes],
        lambda nodes: [0.5, 0.0],
    ).run()
    (pair,) = search_pairs(search, 4, right)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ([1, 2, 5], [6], [6, 7])


def test_trees_go_to_training_as_tokens():
    """The forest holds each distinct token once, and the loss over it is that over the sequences one by one."""
    pairs = search_pairs(grow("mcts_dpo"), 10, right)
    tree, index = training_tree(pairs, mcts_dpo())
    sequences = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    assert tree.num_nodes == len({tuple((c + i)[: n + 1]) for c, i in sequences for n in range(len(c + i))})
    nodes, cu_seqlens = sequence_nodes(tree)
    lengths = cu_seqlens.diff()
    assert [lengths[i].item() for i in index.index.flatten()] == [len(ids) for _, ids in sequences]
    for (_, ids), i in zip(sequences, index.index.flatten().tolist(), strict=True):
        assert tree.tokens[nodes[cu_seqlens[i] : cu_seqlens[i + 1]]].tolist() == ids

    generator = torch.Generator().manual_seed(0)
    logps, ref = (-torch.rand(tree.num_nodes, generator=generator) for _ in range(2))
    out = preference_loss(logps[nodes], ref[nodes], Segments(cu_seqlens), index, mcts_dpo())
    z = torch.stack([(logps - ref)[nodes[cu_seqlens[i] : cu_seqlens[i + 1]]].sum() for i in index.index.flatten()])
    z = 0.1 * (z[0::2] - z[1::2])
    q = index.soft_labels
    expected = -(q * z.sigmoid().log() + (1 - q) * (-z).sigmoid().log()).mean()
    torch.testing.assert_close(out.loss, expected)


def test_no_pairs_make_no_tree():
    search = Search([PROMPT], method_by_name("cpl", simulations=1), lambda n, w: [[]], lambda n: [])
    assert search_pairs(search.run(), 4, right) == []


def test_process_targets_by_hand():
    """Root -> 1 -> right end 3: m = 2, then 1: 1/2, then 1/2 + 1/2. Ends 4, 5 are wrong: 1/2 - 1/2 / 1 = 0. 2 has no
    end.
    """
    found = process_targets(grow("mcts_dpo"), right)
    torch.testing.assert_close(found[0, :6], torch.tensor([0.0, 0.5, 0.0, 1.0, 0.0, 0.0]))


def test_weighted_vote():
    assert weighted_vote([("3", 0.4), ("4", 0.5), ("3", 0.2)]) == "3"
    assert weighted_vote([("3", 0.5), ("4", 0.5)]) == "3"
    assert weighted_vote([]) is None
