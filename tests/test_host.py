"""fastpo._host against brute force in Python: tries on sequences that share prefixes, packings of random lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo import _host

# Two or three symbols make shared prefixes, duplicates and prefixes of one another likely.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12)


def build(sequences):
    trie = _host.Trie()
    leaves = [trie.insert(np.array(s, dtype=np.int64)) for s in sequences]
    return trie, leaves, trie.preorder()


def path(order, node):
    """Token ids from the root to a preorder index."""
    tokens = []
    while node >= 0:
        tokens.append(int(order["tokens"][node]))
        node = int(order["parent"][node])
    return tokens[::-1]


@given(SEQUENCES)
def test_every_sequence_is_the_path_to_its_leaf(sequences):
    _, leaves, order = build(sequences)
    for sequence, leaf in zip(sequences, leaves, strict=True):
        assert path(order, order["position"][leaf] if leaf >= 0 else -1) == sequence


@given(SEQUENCES)
def test_nodes_are_the_distinct_prefixes(sequences):
    trie, _, order = build(sequences)
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(trie) == len(prefixes)
    assert {tuple(path(order, i)) for i in range(len(trie))} == prefixes
    assert [len(path(order, i)) - 1 for i in range(len(trie))] == order["depth"].tolist()


@given(SEQUENCES)
def test_subtree_is_a_range_of_the_preorder(sequences):
    trie, _, order = build(sequences)
    for i in range(len(trie)):
        below = [j for j in range(len(trie)) if path(order, j)[: len(path(order, i))] == path(order, i)]
        assert below == list(range(i, int(order["subtree_end"][i])))


def test_appending_below_a_node_continues_its_path():
    trie = _host.Trie()
    step = trie.insert(np.array([1, 2]))
    leaf = trie.insert(np.array([3]), step)
    assert leaf == trie.insert(np.array([1, 2, 3]))
    assert trie.insert(np.array([], dtype=np.int64), step) == step


def test_wide_nodes_find_their_children():
    trie = _host.Trie()
    first = [trie.insert(np.array([token, 0])) for token in range(5000)]
    again = [trie.insert(np.array([token, 0])) for token in range(5000)]
    assert first == again and len(trie) == 10000


def test_trie_refuses_bad_arguments():
    trie = _host.Trie()
    with pytest.raises(ValueError, match="from_node is 3; it should be -1 or a node below 0"):
        trie.insert(np.array([1]), 3)
    with pytest.raises(ValueError, match="tokens has 2 dimensions"):
        trie.insert(np.array([[1]]))
    for bounds in ([], [1, 2], [0, 1], [0, 2, 1, 2]):
        with pytest.raises(ValueError, match="cu_seqlens should rise from 0 to the number of tokens, 2"):
            trie.insert_all(np.array([1, 2]), np.array(bounds, dtype=np.int64))


def test_trees_that_are_none_are_refused():
    """Before memory is read that is not theirs; fastpo.trees.check_tree says more."""
    good = {"parent": [-1, 0], "depth": [0, 1], "subtree_end": [2, 2], "leaves": [1], "starts": [1]}
    for change, message in (
        ({"parent": [-1, 1]}, "node 1 and its parent 1 are of no tree in preorder"),
        ({"depth": [0, 2]}, "node 1 and its parent 0"),
        ({"subtree_end": [2]}, "should be of one length"),
        ({"leaves": [2]}, "leaves should be nodes below 2"),
        ({"starts": [-1]}, "not below 0"),
        ({"starts": [1, 1]}, "with as many starts"),
    ):
        arrays = {name: np.array(column) for name, column in (good | change).items()}
        with pytest.raises(ValueError, match=message):
            _host.sequence_nodes(**arrays)
        with pytest.raises(ValueError, match=message):
            _host.trained_nodes(**arrays)
    with pytest.raises(ValueError, match="budget is 1; it should be at least 2, the length of a path"):
        _host.cut(np.array([-1, 0]), np.array([0, 1]), np.array([2, 2]), 1)


def first_fit_decreasing(lengths, budget):
    bins, assigned = [], [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        b = next((b for b, free in enumerate(bins) if free >= lengths[i]), len(bins))
        bins += [budget] * (b == len(bins))
        bins[b] -= lengths[i]
        assigned[i] = b
    return assigned


@given(st.lists(st.integers(0, 20), max_size=40))
def test_packing_equals_its_definition(lengths):
    packed = _host.first_fit_decreasing(np.array(lengths, dtype=np.int64), 20)
    assert packed.tolist() == first_fit_decreasing(lengths, 20)


def test_packing_refuses_an_item_over_the_budget():
    with pytest.raises(ValueError, match=r"lengths\[1\] is 9; it should be between 0 and the budget, 8"):
        _host.first_fit_decreasing(np.array([1, 9]), 8)
