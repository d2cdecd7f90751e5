"""tree_search: hand-checked golden trees, one per published method; then every backend against the reference.

Golden trees stand in data/search_trees.json with the arithmetic of each in words. The grid of the backends: every
U-form and backup rule, on trees grown by the op itself with widths, closed nodes and equal scores that differ from tree
to tree.
"""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from fastpo.kernels.tree_search import (
    ROOT,
    UNVISITED,
    BackupRule,
    SearchTrees,
    SelectRule,
    backup,
    process_values,
    select,
    sibling_pairs,
)
from fastpo.kernels.tree_search import reference as spec
from fastpo.kernels.tree_search.records import FORMS

GOLDEN = json.loads((Path(__file__).parent / "data" / "search_trees.json").read_text())
BACKENDS = ("torch", "cpu", "triton")
SELECT_RULES = [
    SelectRule("puct", c=1.5, prior=True),
    SelectRule("puct", c=0.5, virtual_loss=1.0),
    SelectRule("ucb1", c=0.7, unvisited="bonus"),
    SelectRule("uct", unvisited="first", virtual_loss=0.3),
    SelectRule("muzero", c=1.25, prior=True),
    SelectRule("mc_nest", c=1.4, scope="frontier"),
    SelectRule("none", scope="frontier"),
    SelectRule("none"),
]
BACKUP_RULES = [
    BackupRule("mean", close=True),
    BackupRule("children", min_visits=1, rewards=True, gamma=0.9),
    BackupRule("children", close=True),
    BackupRule("max_mix", mix=0.25),
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


def clone(trees):
    return replace(trees, **{f.name: getattr(trees, f.name).clone() for f in fields(trees)})


def golden_trees(case):
    """The golden tree of a case, with room for two more nodes: what lies there must not matter."""
    columns = dict(zip(GOLDEN["tree"]["columns"], zip(*GOLDEN["tree"]["nodes"], strict=True), strict=True))
    count = len(columns["parent"])
    trees = SearchTrees.empty(1, count + 2)
    trees.expandable[0, 0] = False
    for name, column in columns.items():
        target = getattr(trees, name)
        target[0, :count] = torch.tensor(column, dtype=torch.float64).to(target.dtype)
    for node in range(1, count):
        siblings = [i for i in range(1, node) if columns["parent"][i] == columns["parent"][node]]
        if siblings:
            trees.next_sibling[0, siblings[-1]] = node
        else:
            trees.first_child[0, columns["parent"][node]] = node
    trees.size[0] = count
    trees.closed[0, case.get("closed", [])] = True
    trees.expandable[0, case.get("closed", [])] = False
    trees.q[0, count:] = trees.prior[0, count:] = 1e9
    return trees


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["name"])
def test_golden_trees(case, backend):
    trees = golden_trees(case)
    rule = SelectRule(**case["select"])
    for node, score in case["scores"].items():
        visits = trees.visits[0].double()
        u = spec.explore(FORMS.index(rule.form), rule.c, visits[trees.parent[0, int(node)]], visits[int(node)])
        u = torch.tensor(rule.bonus) if rule.unvisited == "bonus" and visits[int(node)] == 0 else u
        found = trees.q[0, int(node)] + u * (trees.prior[0, int(node)] if rule.prior else 1)
        assert found.item() == pytest.approx(score, abs=2e-6)
    assert select(trees, rule).tolist() == [[case["leaf"]]]
    pending = [i for i in range(trees.capacity) if trees.pending[0, i]]
    leaf = case["leaf"]
    path = [leaf]
    while path[-1] != ROOT:
        path.append(trees.parent[0, path[-1]].item())
    assert pending == sorted(path)

    leaf = torch.tensor([[case.get("backup_leaf", leaf)]])
    rollout = torch.tensor([[case["rollout"]]]) if "rollout" in case else None
    trees.pending.zero_()
    backup(trees, leaf, torch.tensor([[case["value"]]]), BackupRule(**case["backup"]), rollout)
    size = int(trees.size[0])
    torch.testing.assert_close(trees.q[0, :size], torch.tensor(case["q_after"]), atol=1e-6, rtol=0)
    assert trees.visits[0, :size].tolist() == case["visits_after"]
    if "process" in case:
        signs, distances = (torch.ones(1, trees.capacity) for _ in range(2))
        for name, tensor in (("signs", signs), ("distances", distances)):
            tensor[0, :size] = torch.tensor(case["process"][name])
        found = process_values(trees, signs, distances)
        torch.testing.assert_close(found[0, :size], torch.tensor(case["process_expected"]), atol=1e-6, rtol=0)
        assert not found[0, size:].any()


@pytest.mark.parametrize("case", [c for c in GOLDEN["cases"] if "pairs" in c], ids=lambda c: c["name"])
def test_golden_pairs(case):
    tree, chosen, rejected = sibling_pairs(golden_trees(case), **case["pairs"])
    assert tree.tolist() == [0] * len(case["pairs_expected"])
    assert torch.stack((chosen, rejected), 1).tolist() == case["pairs_expected"]


def grow(trees, rule, backup_rule, waves, seed, count=1, check=None):
    """Grows trees by the ops: 1 to 4 children a leaf, scores rounded so that many are equal, some terminals closed."""
    generator = torch.Generator().manual_seed(seed)

    def random(n):
        return (torch.rand(n, generator=generator) * 8).floor() / 8

    for _ in range(waves):
        leaves = select(trees, rule, count)
        tree, column = (leaves != UNVISITED).nonzero(as_tuple=True)
        node = leaves[tree, column]
        order = (tree * trees.capacity + node).argsort()
        tree, node = tree[order], node[order]
        room = (trees.capacity - trees.size)[tree] >= 4 * count
        terminal = trees.value[tree, node] > 0.8
        trees.expandable[tree, node] = False
        trees.closed[tree, node] |= terminal
        number = torch.randint(1, 5, tree.shape, generator=generator) * (room & ~terminal)
        tree, node = tree.repeat_interleave(number), node.repeat_interleave(number)
        new = tree.shape[0]
        columns = {name: random(new) for name in ("q", "value", "reward", "prior")}
        flags = {"expandable": torch.ones(new, dtype=torch.bool), "closed": torch.zeros(new, dtype=torch.bool)}
        trees.add(tree, node, **columns, **flags)
        backup(trees, leaves, random(leaves.numel()).view(leaves.shape), backup_rule)
        if check is not None:
            check(trees, leaves)
    return trees


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("number", range(len(SELECT_RULES)))
def test_backends_agree_with_the_reference(number, count, monkeypatch):
    """Grown by each backend from the same random numbers: one decision apart and everything behind it differs."""
    rule, found = SELECT_RULES[number], {}
    backup_rule = BACKUP_RULES[number % len(BACKUP_RULES)]
    for name in BACKENDS:
        monkeypatch.setenv("FASTPO_BACKEND", name)
        chosen = []
        grown = grow(SearchTrees.empty(3, 60), rule, backup_rule, 14, number, count, lambda _, x, c=chosen: c.append(x))
        found[name] = grown, torch.stack(chosen)
    trees, leaves = found["torch"]
    assert trees.size.sum() > 40 and leaves.unique().numel() > 8, "the trees should grow, or this tests nothing"
    assert count == 1 or (trees.pending == 0).all()
    for name in BACKENDS[1:]:
        assert torch.equal(found[name][1], leaves), name
        for field in fields(trees):
            expected, actual = getattr(trees, field.name), getattr(found[name][0], field.name)
            torch.testing.assert_close(
                actual, expected, atol=1e-6, rtol=1e-6, equal_nan=True, msg=f"{name} {field.name}"
            )


@pytest.mark.parametrize("rule", BACKUP_RULES, ids=lambda r: r.kind)
def test_backup_rules_on_one_grown_tree(rule, backend, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "torch")
    trees = grow(SearchTrees.empty(4, 50), SELECT_RULES[0], BackupRule(), 10, 7)
    generator = torch.Generator().manual_seed(1)
    leaves = torch.stack([torch.randint(-1, int(n), (3,), generator=generator) for n in trees.size])
    values, expected = torch.rand(4, 3, generator=generator), clone(trees)
    backup(expected, leaves, values, rule)
    monkeypatch.setenv("FASTPO_BACKEND", backend)
    backup(trees, leaves, values, rule)
    for field in fields(trees):
        torch.testing.assert_close(getattr(trees, field.name), getattr(expected, field.name), atol=1e-6, rtol=1e-6)


def test_the_mean_is_the_mean(backend):
    """Q of the running mean against a plain average of everything that passed, after 200 visits."""
    trees = SearchTrees.empty(1, 1)
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    backup(trees, torch.zeros(1, 200, dtype=torch.int64), values[None], BackupRule())
    assert trees.visits.item() == 200
    assert trees.q.item() == pytest.approx(values.double().mean().item(), abs=2e-6)


def test_ties_go_to_the_lowest_node(backend):
    trees = SearchTrees.empty(2, 8)
    star(trees, 5)
    for scope in ("path", "frontier"):
        assert select(clone(trees), SelectRule("none", scope=scope)).tolist() == [[1], [1]]


def star(trees, children):
    """A root with equal, visited children in every tree."""
    tree = torch.arange(trees.batch).repeat_interleave(children)
    zeros, yes = torch.zeros(len(tree)), torch.ones(len(tree), dtype=torch.bool)
    trees.expandable[:, ROOT] = False
    columns = {"q": zeros, "value": zeros, "reward": zeros, "prior": zeros + 1, "expandable": yes, "closed": ~yes}
    ids = trees.add(tree, torch.zeros_like(tree), **columns)
    trees.visits[tree, ids] = 1
    trees.visits[:, ROOT] = children


def test_virtual_loss_spreads_a_wave(backend):
    """Four leaves of four equal children: with it they are four, and the path of a leaf taken twice leaves no trace."""
    trees = SearchTrees.empty(1, 5)
    star(trees, 4)
    trees.q[0, 1] = 0.1
    rule = SelectRule("none", virtual_loss=1.0)
    assert select(clone(trees), rule, 4).tolist() == [[1, 2, 3, 4]]
    alone = clone(trees)
    assert select(alone, SelectRule("none"), 3).tolist() == [[1, UNVISITED, UNVISITED]]
    assert alone.pending[0].tolist() == [1, 1, 0, 0, 0]
    trees.expandable[0, 1:] = False  # terminals may be visited again
    assert select(trees, rule, 2).tolist() == [[1, 2]]


def test_closed_trees_give_nothing(backend):
    trees = SearchTrees.empty(2, 4)
    star(trees, 3)
    trees.closed[0, 1:] = True
    for scope in ("path", "frontier"):
        assert select(clone(trees), SelectRule("none", scope=scope)).tolist() == [[UNVISITED], [1]]
    trees.closed[1, 1:] = True
    trees.expandable[:, 1:] = False
    backup(trees, torch.tensor([[UNVISITED], [1]]), torch.zeros(2, 1), BackupRule(close=True))
    assert trees.closed[:, ROOT].tolist() == [False, True], "the last open child is closed, so the root is"
    assert trees.visits[:, ROOT].tolist() == [3, 4]


def test_paths_may_begin_below_the_root(backend):
    trees = SearchTrees.empty(2, 4)
    star(trees, 3)
    assert select(trees, SelectRule("none"), start=torch.tensor([2, 3])).tolist() == [[2], [3]]
    assert trees.pending[:, ROOT].tolist() == [1, 1]


def test_no_trees(backend):
    trees = SearchTrees.empty(0, 4)
    assert select(trees, SelectRule()).shape == (0, 1)
    backup(trees, torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), BackupRule())
    assert process_values(trees, torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert all(x.numel() == 0 for x in sibling_pairs(trees, "signs"))


def test_opcheck():
    trees = SearchTrees.empty(2, 6)
    star(trees, 3)
    ops = torch.ops.fastpo
    links = (trees.parent, trees.first_child, trees.next_sibling, trees.visits, trees.pending, trees.q)
    state = (*links, trees.prior, trees.expandable, trees.closed, trees.size, None)
    torch.library.opcheck(ops.tree_select, (*state, 1, 1.0, 0, 1.0, True, False, 0.0, 2))
    leaves, values = torch.tensor([[1, 2], [0, -1]]), torch.ones(2, 2)
    rest = (trees.reward, trees.expandable, trees.closed, leaves, values)
    torch.library.opcheck(ops.tree_backup, (*links, *rest, 1, 1.0, 1.0, True, 0.5, True))
    torch.library.opcheck(
        ops.tree_process_values, (trees.parent, trees.size, values[:, :1] + torch.ones(2, 6), torch.ones(2, 6))
    )


def test_compiles_without_a_break():
    trees = SearchTrees.empty(2, 6)
    star(trees, 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def wave(trees, values):
        leaves = select(trees, SelectRule("puct", prior=True), 2)
        backup(trees, leaves, values, BackupRule())
        return leaves

    other = clone(trees)
    values = torch.tensor([[0.5, 1.0], [0.25, 0.0]])
    leaves = wave(trees, values)
    assert torch.equal(leaves, select(other, SelectRule("puct", prior=True), 2))
    backup(other, leaves, values, BackupRule())
    assert torch.equal(trees.q, other.q) and torch.equal(trees.visits, other.visits)


def test_threads_do_not_matter():
    """Many trees on one thread and on two."""
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(grow(SearchTrees.empty(200, 40), SELECT_RULES[0], BACKUP_RULES[1], 8, 3, 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(getattr(results[0], f.name), getattr(results[1], f.name)) for f in fields(SearchTrees))


def test_last_first_breaks_ties_by_prior_reward_value_and_visits():
    trees = SearchTrees.empty(1, 4)
    star(trees, 3)
    trees.q[0, 1:] = torch.tensor([0.5, 0.5, 0.0])
    for name in ("prior", "reward", "value", "visits"):
        for better in (1, 2):
            changed = clone(trees)
            getattr(changed, name)[0, better] += 1
            assert [x.tolist() for x in sibling_pairs(changed, "last_first")] == [[0], [better], [3]]


def test_equal_siblings_make_no_pair():
    trees = SearchTrees.empty(1, 4)
    star(trees, 3)
    for rule in ("last_first", "signs", "gaps", "largest_gap"):
        assert sibling_pairs(trees, rule)[0].numel() == 0


def test_nodes_are_added_behind_their_siblings():
    trees = SearchTrees.empty(2, 8)
    star(trees, 2)
    columns = dict.fromkeys(("q", "value", "reward", "prior"), torch.zeros(3))
    flags = {"expandable": torch.ones(3, dtype=torch.bool), "closed": torch.zeros(3, dtype=torch.bool)}
    ids = trees.add(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 2]), **columns, **flags)
    assert ids.tolist() == [3, 4, 3]
    assert trees.next_sibling[0].tolist() == [-1, 2, 3, 4, -1, -1, -1, -1]
    assert trees.first_child[1].tolist() == [1, -1, 3, -1, -1, -1, -1, -1]
    assert trees.depth[:, 3].tolist() == [1, 2]
    wider = trees.grown(20)
    assert wider.capacity == 20 and torch.equal(wider.parent[:, :8], trees.parent)
    assert wider.parent[:, 8:].eq(-1).all() and wider.size.tolist() == [5, 4]


@pytest.mark.parametrize(
    "tree, parent, message",
    [
        ([1, 0], [0, 0], "tree is out of order"),
        ([0, 0], [0, 5], "parent names a node that is not in its tree"),
        ([0] * 3, [0] * 3, "tree 0 has 3 nodes and gets 3; its room is 5"),
        ([0, 0, 0], [0, 1, 0], "should stand together"),
    ],
)
def test_bad_additions_change_nothing(tree, parent, message):
    trees = SearchTrees.empty(2, 6 if "together" in message else 5)
    star(trees, 2)
    before = clone(trees)
    columns = dict.fromkeys(("q", "value", "reward", "prior"), torch.zeros(len(tree)))
    flags = dict.fromkeys(("expandable", "closed"), torch.zeros(len(tree), dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        trees.add(torch.tensor(tree), torch.tensor(parent), **columns, **flags)
    assert all(torch.equal(getattr(trees, f.name), getattr(before, f.name)) for f in fields(trees))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: SelectRule("pucb"), "form is 'pucb'; it should be one of"),
        (lambda t: SelectRule("ucb1"), "it should be bonus or first"),
        (lambda t: SelectRule(c=float("nan")), "c is nan"),
        (lambda t: SelectRule(virtual_loss=-1), "virtual_loss is -1"),
        (lambda t: BackupRule("sum"), "kind is 'sum'"),
        (lambda t: BackupRule(gamma=1.5), r"gamma is 1.5; it should be in \[0, 1\]"),
        (lambda t: SearchTrees.empty(1, 0), "capacity"),
        (lambda t: t.grown(1), "capacity is 1; it should be at least 4"),
        (lambda t: select(t, SelectRule(), 0), "count is 0"),
        (lambda t: select(t, SelectRule(), start=torch.zeros(3)), "start has shape"),
        (lambda t: backup(t, torch.zeros(2), torch.zeros(2), BackupRule()), "leaves has shape"),
        (lambda t: backup(t, torch.zeros(2, 1), torch.zeros(2, 2), BackupRule()), "values has shape"),
        (lambda t: backup(t, torch.zeros(2, 1), torch.zeros(2, 1), BackupRule(rollout_mix=0.5)), "rollouts is missing"),
        (lambda t: process_values(t, torch.zeros(2, 3), torch.zeros(2, 4)), "signs has shape"),
        (lambda t: sibling_pairs(t, "best"), "rule is 'best'"),
        (lambda t: sibling_pairs(t, "gaps", -1), "min_gap is -1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(SearchTrees.empty(2, 4))


def test_arrays_that_hold_no_tree_raise_instead_of_running_for_ever():
    """The C++ backend, also from its threads: a node that is its own child. In a process of its own, should it not
    end.
    """
    code = """
import torch
from fastpo.kernels.tree_search import SearchTrees, SelectRule, select
torch.set_num_threads(2)
trees = SearchTrees.empty(200, 4)
trees.expandable[:] = False
trees.first_child[:, 0] = 0
try:
    select(trees, SelectRule())
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "the arrays hold no tree" in done.stdout, done.stderr
