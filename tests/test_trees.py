"""fastpo.trees: forests of random sequences against brute force; packing and cutting; what a bad input is told.

Two or three token ids make shared prefixes, duplicates and prefixes of one another likely. Everything runs on the
compiled functions and on their plain-Python twins.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpo import host_python, trees
from fastpo.dispatch import SlowBackendWarning
from fastpo.errors import FastpoError
from fastpo.host import host
from fastpo.tiny import build_bpe_tokenizer
from fastpo.trees import TreeBuilder, build_tree, check_tree, join, pack, sequence_nodes, trained_nodes
from fastpo.types import TokenTree

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), max_size=10)


@st.composite
def forests(draw):
    sequences = draw(SEQUENCES)
    starts = [draw(st.integers(1, len(s) - 1)) for s in sequences]
    return sequences, starts, build_tree(sequences, starts)


def path(tree: TokenTree, node: int) -> list[int]:
    """Nodes from the root to ``node``."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(tree.parent[node])
    return nodes[::-1]


@given(forests())
def test_sequences_are_the_paths_to_their_leaves(forest):
    sequences, _, tree = forest
    assert [tree.tokens[path(tree, leaf)].tolist() for leaf in tree.leaves.tolist()] == sequences
    assert tree.num_nodes == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})
    check_tree(tree)


@given(forests())
def test_a_token_sees_its_path_and_nothing_else(forest):
    _, _, tree = forest
    for i in range(tree.num_nodes):
        seen = [j for j in range(tree.num_nodes) if j <= i < tree.subtree_end[j]]
        assert seen == path(tree, i)
        assert len(seen) == tree.depth[i] + 1


@given(forests())
def test_sequence_nodes_are_the_counted_part_of_each_path(forest):
    _, starts, tree = forest
    nodes, cu_seqlens = sequence_nodes(tree)
    bounds = cu_seqlens.tolist()
    found = [nodes[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    expected = [path(tree, leaf)[start:] for leaf, start in zip(tree.leaves.tolist(), starts, strict=True)]
    assert found == expected
    assert trained_nodes(tree).tolist() == sorted({n for one in expected for n in one})


def test_tokens_may_come_as_lists_arrays_and_tensors():
    lists = [[3, 1, 4], [3, 1, 5, 9]]
    expected = build_tree(lists, 1)
    for kind in (np.array, torch.tensor, lambda s: torch.tensor(s, dtype=torch.int32), tuple):
        found = build_tree([kind(s) for s in lists], torch.tensor([1, 1]))
        assert all(torch.equal(getattr(found, f), getattr(expected, f)) for f in trees._Part._fields)


def test_a_tokenizer_that_merges_across_the_border_of_the_prompt():
    """Tokens are taken as given: a text tokenised as a whole has a prompt of its own, and shares what is equal."""
    tokenizer = build_bpe_tokenizer(["ab cd", "ab cd", "ab ce"], 270)
    prompt, response, whole = (tokenizer.encode(text) for text in ("ab c", "d", "ab cd"))
    assert whole != prompt + response and whole[:-1] == prompt[: len(whole) - 1], "the test's premise"
    tree = build_tree([prompt + response, whole], [len(prompt), len(whole) - 1])
    nodes, cu_seqlens = sequence_nodes(tree)
    assert tree.tokens[nodes].tolist() == [*response, whole[-1]] and cu_seqlens.tolist() == [
        0,
        len(response),
        len(response) + 1,
    ]
    assert tree.num_nodes == len(prompt) + len(response) + 1


def test_no_sequences_make_an_empty_tree():
    tree = build_tree([], [])
    assert (tree.num_nodes, tree.num_sequences) == (0, 0)
    assert check_tree(tree) is tree and pack([tree], 8).rows == ()
    assert sequence_nodes(tree)[1].tolist() == [0]


def test_duplicates_share_a_leaf_and_their_weights_add():
    """One sequence twice: the gradient of the weighted sum reaches its nodes with both weights."""
    tree = build_tree([[7, 1, 2], [7, 1, 2]], [1, 2])
    nodes, cu_seqlens = sequence_nodes(tree)
    logps = torch.zeros(tree.num_nodes, requires_grad=True)
    weights = torch.tensor([2.0, 3.0]).repeat_interleave(cu_seqlens.diff())
    (logps[nodes] * weights).sum().backward()
    assert tree.leaves.tolist() == [2, 2]
    assert logps.grad.tolist() == [0, 2, 5]


@given(SEQUENCES)
def test_a_tree_that_grew_step_by_step_is_the_tree_of_its_paths(sequences):
    builder = TreeBuilder()
    ends = []
    for s in sequences:
        node = builder.append(s[:1])
        for token in s[1:]:
            node = builder.append([token], below=node)
        ends.append(node)
    tree, position = builder.snapshot(ends, starts=1)
    expected = build_tree(sequences, 1)
    assert all(torch.equal(getattr(tree, f), getattr(expected, f)) for f in trees._Part._fields)
    assert position[ends].tolist() == tree.leaves.tolist()


def test_a_snapshot_stays_while_the_tree_grows():
    builder = TreeBuilder()
    root = builder.append([1, 2])
    before, _ = builder.snapshot()
    step = builder.append([3], below=root)
    after, position = builder.snapshot([step], [2])
    assert before.tokens.tolist() == [1, 2] and after.tokens.tolist() == [1, 2, 3] and len(builder) == 3
    assert position.tolist() == [0, 1, 2]


def test_builder_refuses_nodes_that_are_not_there():
    builder = TreeBuilder()
    with pytest.raises(FastpoError, match="below is 4; it should be -1 or a node below 0"):
        builder.append([1], below=4)
    builder.append([1, 2])
    with pytest.raises(FastpoError, match="leaves holds 2; it should hold nodes below 2"):
        builder.snapshot([2], 1)


@given(st.lists(forests(), max_size=4), st.integers(7, 20))
def test_rows_hold_every_sequence_once_and_every_node(made, budget):
    inputs = [tree for _, _, tree in made]
    whole = join(inputs)
    packed = pack(inputs, budget)
    for row, nodes, sequences in zip(packed.rows, packed.nodes, packed.sequences, strict=True):
        check_tree(row)
        assert 0 < row.num_nodes <= budget
        assert torch.equal(row.tokens, whole.tokens[nodes]) and torch.equal(row.depth, whole.depth[nodes])
        roots = row.parent < 0
        assert (
            torch.equal(nodes[row.parent[~roots]], whole.parent[nodes[~roots]])
            and (whole.parent[nodes[roots]] < 0).all()
        )
        assert torch.equal(nodes[row.leaves], whole.leaves[sequences])
        assert torch.equal(row.starts, whole.starts[sequences])
    held = torch.cat([torch.zeros(0, dtype=torch.int64), *packed.sequences])
    assert sorted(held.tolist()) == list(range(whole.num_sequences))
    distinct = {n for nodes in packed.nodes for n in nodes.tolist()}
    assert distinct == set(range(whole.num_nodes))
    assert packed.num_distinct == whole.num_nodes
    assert packed.num_replicated == sum(len(n) for n in packed.nodes) - whole.num_nodes


@given(forests(), st.integers(7, 14))
def test_cuts_replicate_as_little_as_any_cut_between_neighbours(forest, budget):
    """Against all ways of splitting the childless nodes into runs (up to ten of them)."""
    _, _, tree = forest
    tips = [i for i in range(tree.num_nodes) if tree.subtree_end[i] == i + 1]
    sizes = []
    for cuts in itertools.product([False, True], repeat=max(0, len(tips) - 1)):
        runs = [[tip for tip in tips[:1]]]
        for tip, is_cut in zip(tips[1:], cuts, strict=True):
            runs.append([tip]) if is_cut else runs[-1].append(tip)
        pieces = [{n for tip in run for n in path(tree, tip)} for run in runs]
        if all(len(piece) <= budget for piece in pieces):
            sizes.append(sum(map(len, pieces)))
    packed = pack([tree], budget)
    assert packed.num_nodes == min(sizes)


def test_a_tree_that_fits_is_not_cut():
    inputs = [build_tree([[i, 1, 2], [i, 1, 3]], 1) for i in range(5)]  # four nodes each
    packed = pack(inputs, 9)
    assert [row.num_nodes for row in packed.rows] == [8, 8, 4]
    assert packed.overhead == 0


def test_cut_overhead_is_reported():
    tree = build_tree([[0, 1, 2, 9, 9], [0, 1, 2, 8, 8], [0, 1, 2, 7, 7]], 3)  # nine nodes
    packed = pack([tree], 7)
    assert (packed.num_distinct, packed.num_replicated, len(packed.rows)) == (9, 3, 2)
    assert packed.overhead == pytest.approx(1 / 3)


def test_records_move_as_one():
    packed = pack([build_tree([[1, 2], [1, 3]], 1)], 8).to("meta")
    assert {t.device.type for t in (packed.rows[0].tokens, packed.nodes[0], packed.sequences[0])} == {"meta"}


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [
        ([[1, 2], []], 1, r"sequences\[1\] is empty; it should hold at least one integer"),
        ([[1, 2.5]], 1, r"sequences\[0\] is float64 of shape \[2\]"),
        ([[[1, 2]]], 1, r"sequences\[0\] is int64 of shape \[1, 2\]"),
        ([[1, 2], [3, -4]], 1, r"sequences\[1\] holds -4; it should hold numbers of at least 0"),
        (
            [[1, 2], [1, 2]],
            [1, 2],
            r"starts\[1\] is 2; it should be at least 1 and below 2, the tokens of sequences\[1\]",
        ),
        ([[1, 2]], 0, r"starts\[0\] is 0; it should be at least 1"),
        ([[1, 2]], [1, 1], "starts has 2 numbers; it should have one for each of 1 sequences"),
    ],
)
def test_bad_sequences_are_told_in_one_line(sequences, starts, message):
    with pytest.raises(FastpoError, match=message) as caught:
        build_tree(sequences, starts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("parent", [1, 0, 1, 0], r"tree.parent\[0\] is 1; it should be -1, or a node before its child"),
        ("parent", [-1, 0, 0, 0], r"tree.depth\[2\] is 2; it should be the parent's plus one"),
        ("parent", [-1, 0, 1, 2], r"tree.depth\[3\] is 1"),
        ("depth", [0, 1, 3, 1], r"tree.depth\[2\] is 3; it should be the parent's plus one"),
        ("subtree_end", [4, 3, 3, 5], r"tree.subtree_end\[3\] is 5; it should be behind the node, at most 4"),
        (
            "subtree_end",
            [4, 4, 3, 4],
            r"tree.parent\[3\] is 0; it should be the last node whose subtree holds the child",
        ),
        ("subtree_end", [4, 2, 3, 4], r"tree.subtree_end\[2\] is 3"),
        ("tokens", [0, -1, 0, 0], r"tree.tokens\[1\] is -1; it should be at least 0"),
        ("leaves", [2, 4], r"tree.leaves\[1\] is 4; it should be a node, below 4"),
        ("starts", [1, 2], r"tree.starts\[1\] is 2; it should be at least 1 and at most the depth of its leaf"),
        ("depth", [0, 1, 2], r"tree.depth is torch.int64 of shape \[3\]; it should be torch.int64 \[4\]"),
    ],
)
def test_hand_made_trees_are_checked(field, values, message):
    fields = {
        "tokens": [5, 6, 7, 8],
        "parent": [-1, 0, 1, 0],
        "depth": [0, 1, 2, 1],
        "subtree_end": [4, 3, 3, 4],
        "leaves": [2, 3],
        "starts": [1, 1],
    }
    good = TokenTree(**{name: torch.tensor(column) for name, column in fields.items()})
    assert check_tree(good) is good
    bad = TokenTree(**{name: torch.tensor(column) for name, column in (fields | {field: values}).items()})
    with pytest.raises(FastpoError, match=message):
        check_tree(bad)


@given(forests(), st.data())
def test_check_tree_accepts_no_tree_but_the_right_one(forest, data):
    """The shape of a forest follows from its parents: any other subtree_end, or depth, is refused."""
    _, _, tree = forest
    if not tree.num_nodes:
        return
    field = data.draw(st.sampled_from(["subtree_end", "depth", "parent"]))
    changed = getattr(tree, field).clone()
    i = data.draw(st.integers(0, tree.num_nodes - 1))
    changed[i] = data.draw(st.integers(-2, tree.num_nodes + 1).filter(lambda v: v != changed[i]))
    with pytest.raises(FastpoError):
        check_tree(TokenTree(**{**vars(tree), field: changed}))


def test_a_budget_below_the_longest_path_is_refused():
    inputs = [build_tree([[1, 2]], 1), build_tree([[1, 2, 3, 4], [1, 2, 5]], 1)]
    with pytest.raises(FastpoError, match=r"budget is 3; it should be at least 4, the longest path of trees\[1\]"):
        pack(inputs, 3)


@given(SEQUENCES, st.integers(7, 14))
def test_plain_python_computes_the_same(sequences, budget):
    compiled = host()
    tokens, cu_seqlens = trees._flat(sequences)
    orders, lasts = [], []
    for module in (compiled, host_python):
        trie = module.Trie()
        lasts.append(trie.insert_all(tokens, cu_seqlens))
        orders.append(trie.preorder())
    assert np.array_equal(*lasts)
    assert all(np.array_equal(orders[0][name], orders[1][name]) for name in orders[0])
    shape = [orders[0][name] for name in ("parent", "depth", "subtree_end")]
    leaves, starts = orders[0]["position"][lasts[0]], np.ones(len(sequences), dtype=np.int64)
    both = [module.sequence_nodes(*shape, leaves, starts) for module in (compiled, host_python)]
    for found, expected in zip(*both, strict=True):
        assert np.array_equal(found, expected)
    assert np.array_equal(*(m.trained_nodes(*shape, leaves, starts) for m in (compiled, host_python)))
    assert np.array_equal(compiled.cut(*shape, budget), host_python.cut(*shape, budget))


def test_without_the_compiled_module_trees_say_so_and_work(monkeypatch):
    monkeypatch.setattr("fastpo.host.extension_missing", lambda name: "fastpo._host is not built")
    host.cache_clear()
    try:
        with pytest.warns(SlowBackendWarning, match=r"plain Python \(fastpo._host is not built\)"):
            tree = build_tree([[1, 2, 3], [1, 2, 4]], 1)
        assert pack([tree], 3).num_replicated == 2
    finally:
        host.cache_clear()
