"""The search engine over made-up callables: what it does with what they return, methods by their golden walks,
saving."""

import math

import pytest
import torch

from fastpo.errors import FastpoError, RunError
from fastpo.kernels.tree_search import BackupRule
from fastpo.search import METHODS, Method, Sampled, Search, Step, load_search, method_by_name, save_search
from fastpo.search.plans import rebase_widths
from fastpo.search.progress import Progress

PROMPTS = [[1, 2], [3], [4, 5, 6]]
END = 9


def propose(nodes, widths):
    """Tokens that depend on the path alone; the third and later children of a node end the response."""
    return [
        [Step((7 + j, sum(n.ids) % 50, n.children), logp=-0.1 * (j + 1), finished=j >= 2) for j in range(width)]
        for n, width in zip(nodes, widths, strict=True)
    ]


def evaluate(nodes):
    """In [0, 1], from the path."""
    return [(sum(n.ids) * 37 % 101) / 100 for n in nodes]


def make(method="mcts_dpo", prompts=PROMPTS, propose=propose, evaluate=evaluate, **settings):
    options = {k: settings.pop(k) for k in ("capacity", "when_full", "is_terminal") if k in settings}
    method = method_by_name(method, **settings) if isinstance(method, str) else method
    if method.name == "beam_q":
        evaluate = lambda nodes: [n.logp for n in nodes]  # noqa: E731
    rollout = (lambda nodes: [0.5] * len(nodes)) if method.backup.rollout_mix else None
    return Search(prompts, method, propose, evaluate, rollout=rollout, **options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_to_its_end(name):
    seen = []
    search = make(name, simulations=12, depth=4).run(progress=seen.append)
    assert not search.wave(), "a search that is done stays done"
    assert all(search.finished) and search.num_nodes > 3 * 6
    assert (search.trees.pending == 0).all()
    assert search.trees.size.tolist() == [len(steps) for steps in search.steps]
    assert int(search.trees.depth.max()) <= 4
    assert isinstance(seen[-1], Progress)
    if search.method.plan == "select":  # the others see at the next wave that nothing is left
        assert seen[-1].done == seen[-1].total and seen[-1].seconds_left == 0
    assert seen[-1].nodes == search.num_nodes and "nodes/s" in str(seen[-1])
    for tree in range(3):
        for i in range(1, len(search.steps[tree])):
            node, parent = search.node(tree, i), search.parents[tree][i]
            assert node.ids == search.node(tree, parent).ids + list(node.steps[-1].ids)
            assert int(search.trees.parent[tree, i]) == parent and i in search.children[tree][parent]
            assert bool(search.trees.expandable[tree, i]) <= (not search.terminal[tree][i])


def test_a_tree_does_not_depend_on_the_others():
    together = make("cpl").run()
    for i, prompt in enumerate(PROMPTS):
        alone = make("cpl", prompts=[prompt]).run()
        size = int(alone.trees.size[0])
        assert int(together.trees.size[i]) == size > 10
        for name in ("parent", "visits", "q", "prior"):
            assert torch.equal(getattr(together.trees, name)[i, :size], getattr(alone.trees, name)[0, :size]), name


def test_one_call_of_each_per_wave():
    calls = []

    def counted(function, name):
        def call(nodes, *rest):
            calls.append((name, len(nodes)))
            return function(nodes, *rest)

        return call

    search = make("tree_plv", propose=counted(propose, "propose"), evaluate=counted(evaluate, "evaluate"))
    search.wave()
    search.wave()
    assert calls == [("propose", 3), ("evaluate", 12)] * 2


def test_mcts_dpo_by_hand():
    """One prompt, width 2, values 0.4 and 0.2, then 0.6 and 0.5 below the first; priors 1 (logp 0), gamma 1.

    Wave 1 at the root: Q = r = 0.4, 0.2; the root's V is their mean 0.3. Wave 2: N_root = 1, U = 1 for both: node 1.
    Its children have r = 0.2, 0.1, so V = 0.15 and Q_1 = 0.4 + 0.15 = 0.55; root (1 x 0.55 + 1 x 0.2) / 2 = 0.375.
    """
    values = iter([0.4, 0.2, 0.6, 0.5])
    search = make(
        prompts=[[1]],
        propose=lambda nodes, widths: [[Step((5,)), Step((6,))] for _ in nodes],
        evaluate=lambda nodes: [next(values) for _ in nodes],
        width=2,
        simulations=2,
    ).run()
    torch.testing.assert_close(search.trees.q[0], torch.tensor([0.375, 0.55, 0.2, 0.2, 0.1]))
    assert search.trees.visits[0].tolist() == [2, 1, 0, 0, 0]


def test_adaptive_width_of_alphallm():
    """width 2 first; values 0 and 1 differ from their mean by 0.5: min(floor(s 0.5), 10) children, s = 8: two more
    later.
    """
    values = iter([0.0, 1.0, *[0.5] * 50])
    widths_seen = []

    def proposing(nodes, widths):
        widths_seen.extend(widths)
        return propose(nodes, widths)

    search = make(
        "alphallm", prompts=[[1]], propose=proposing, evaluate=lambda nodes: [next(values) for _ in nodes], adaptive=8.0
    )
    search.wave()
    assert bool(search.trees.expandable[0, 0]) and search.wanted == {(0, 0): 2}
    search.wave()
    assert widths_seen == [2, 2] and len(search.children[0][0]) == 4
    assert not search.trees.expandable[0, 0], "0, 1, .5, .5 differ by .5: four children are enough"


def test_near_duplicates_are_merged():
    """8 of 10 tokens equal: a ratio of 0.8."""
    steps = [Step(tuple(range(10))), Step((*range(8), 20, 21)), Step(tuple(range(30, 40)))]
    kept = {
        merge: make("alphallm", propose=lambda n, w: [steps] * 3, width=3, merge=merge) for merge in (1.0, 0.8, 0.81)
    }
    for search in kept.values():
        search.wave()
    assert [search.counts.duplicates for search in kept.values()] == [0, 3, 0]


def test_equal_steps_are_merged_and_counted():
    search = make(propose=lambda nodes, widths: [[Step((7, 8))] * width for width in widths])
    search.wave()
    assert search.counts.duplicates == 9 and search.trees.size.tolist() == [2, 2, 2]
    assert Step((7,), finished=True) != Step((7,))


def test_sampled_scores_of_mc_nest():
    """Scores .9, .1, .5 of a node: (.1 + .5) / 2. An average alone would give .5, the least alone .1."""
    draws = iter([0.9, 0.1, 0.5] * 50)

    def judge(nodes):
        score = next(draws)
        return [score if n.node else 0.0 for n in nodes]

    search = make("mc_nest", prompts=[[1]], evaluate=Sampled(judge, 3), simulations=1).run()
    values = search.trees.value[0, 1 : len(search.steps[0])]
    torch.testing.assert_close(values, torch.full_like(values, 0.3))


def test_refinement_of_mc_nest():
    """One child at a time; below the root a node is done when a child is better or it has ``width`` of them."""
    search = make("mc_nest", prompts=[[1]], evaluate=lambda nodes: [0.1 * n.node for n in nodes], simulations=6).run()
    assert all(len(children) <= 3 for children in search.children[0])
    assert len(search.steps[0]) == 7, "one node a wave"
    for i in range(1, 7):
        children = search.children[0][i]
        assert len(children) <= 1, "children are younger, so better: one is enough"


def test_beam_keeps_the_best():
    """Of each level the two best by summed log-prob are expanded, no others."""
    search = make("beam_q", prompts=[[1]], leaves=2, width=3, depth=3).run()
    depth = search.column("depth")[0]
    for level in range(1, 3):
        open_nodes = [i for i in range(len(depth)) if depth[i] == level and not search.terminal[0][i]]
        expanded = {i for i in open_nodes if search.children[0][i]}
        assert expanded == set(sorted(open_nodes, key=lambda i: (-search.values[0][i], i))[:2])


def test_rebase_by_hand():
    """e^(R / .1): scores .3, .2, .1 weigh e^2, e, 1: shares .665, .245, .090 of 16 are 10.64, 3.92, 1.44."""
    assert rebase_widths(torch.tensor([0.3, 0.2, 0.1]), 16, 0.1).tolist() == [11, 4, 1]
    search = make("rebase", prompts=[[1]], depth=3)
    search.wave()
    first = [i for i in search.children[0][0] if not search.terminal[0][i]]
    ends = sum(search.terminal[0])
    search.wave()
    expected = rebase_widths(torch.tensor([search.values[0][i] for i in first]), 16 - ends, 0.1).tolist()
    assert [len(search.children[0][i]) for i in first] == expected


def test_terminals_are_visited_again_or_not():
    again = make(prompts=[[1]], simulations=40, depth=2).run()
    once = make("cpl", prompts=[[1]], simulations=40, depth=2).run()
    assert max(n for n, end in zip(again.column("visits")[0], again.terminal[0], strict=True) if end) > 1
    assert {n for n, end in zip(once.column("visits")[0], once.terminal[0], strict=True) if end} == {1}
    assert once.trees.closed[0, 0] and sum(once.expansions) < 40, "the whole tree was seen"


def test_early_stop():
    search = make("rest_mcts", evaluate=lambda nodes: [0.95 if n.terminal else 0.1 for n in nodes]).run()
    assert search.counts.waves == 1, "a right end ends its tree"
    stopped = make().run(stop=lambda s: s.counts.waves == 3)
    assert stopped.counts.waves == 3 and not any(stopped.finished)


def test_several_leaves_a_wave():
    one, four = make("cpl", simulations=12).run(), make("cpl", simulations=12, leaves=4).run()
    assert sum(four.expansions) == sum(one.expansions) == 36
    assert four.counts.waves < one.counts.waves


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("waves", [1, 3])
def test_a_continued_search_is_the_undisturbed_one(name, waves, tmp_path):
    whole = make(name, simulations=10, depth=4).run()
    begun = make(name, simulations=10, depth=4).run(stop=lambda s: s.counts.waves == waves)
    save_search(begun, tmp_path / "search.safetensors")
    continued = load_search(make(name, simulations=10, depth=4), tmp_path / "search.safetensors")
    assert continued.counts == begun.counts
    for search in (continued.run(), begun.run()):
        assert search.steps == whole.steps and search.counts == whole.counts and search.children == whole.children
        for field in (
            "size",
            "parent",
            "visits",
            "q",
            "value",
            "reward",
            "prior",
            "expandable",
            "closed",
            "next_sibling",
        ):
            assert torch.equal(getattr(search.trees, field), getattr(whole.trees, field)), field


def test_another_search_is_refused(tmp_path):
    path = tmp_path / "search.safetensors"
    save_search(make(), path)
    for other in (make("cpl"), make(prompts=PROMPTS[:2]), make(simulations=3)):
        with pytest.raises(FastpoError, match="other prompts or another method"):
            load_search(other, path)


def snapshot(search):
    return [t.clone() for t in vars(search.trees).values()], [list(s) for s in search.steps], vars(search.counts).copy()


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"evaluate": lambda n: [math.nan] * len(n)}, r"evaluate returned nan for node 5 of prompt 0; .* \[0, 1\]"),
        ({"evaluate": lambda n: [2.0] * len(n)}, "evaluate returned 2.0 for node 5 of prompt 0"),
        ({"evaluate": lambda n: [0.0]}, "evaluate returned 1 values for 12 nodes"),
        ({"propose": lambda n, w: [[Step((1,))]]}, "propose returned steps for 1 nodes; it should be 3"),
        (
            {"propose": lambda n, w: [[Step((i,)) for i in range(9)] for _ in n]},
            "returned 9 steps for node .*; .* 4 at most",
        ),
        ({"propose": lambda n, w: [[Step(())] for _ in n]}, "a step without tokens for node"),
    ],
)
def test_what_callables_return_wrong_stops_the_wave_and_loses_nothing(replaced, message):
    search = make("tree_plv")
    search.wave()
    before = snapshot(search)
    good = search.propose, search.evaluate
    vars(search).update(replaced)
    with pytest.raises(RunError, match=message) as error:
        search.wave()
    assert "\n" not in str(error.value)
    tensors, steps, counts = snapshot(search)
    assert steps == before[1] and counts == before[2]
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))
    search.propose, search.evaluate = good
    assert torch.equal(search.run().trees.q, make("tree_plv").run().trees.q)


def test_a_propose_that_raises_loses_nothing():
    search = make()
    search.wave()
    search.propose = lambda nodes, widths: 1 / 0
    with pytest.raises(ZeroDivisionError):
        search.wave()
    search.propose = propose
    assert torch.equal(search.run().trees.q, make().run().trees.q)


def test_nothing_proposed_is_a_dead_end():
    """Below prompt 1 nothing comes; elsewhere nothing below node 1. The others go on."""
    search = make(
        "cpl",
        propose=lambda nodes, widths: [
            [] if n.prompt == 1 or n.node == 1 else steps
            for n, steps in zip(nodes, propose(nodes, widths), strict=True)
        ],
    ).run()
    assert search.trees.size[1] == 1 and search.expansions[1] == 1 and search.finished[1]
    assert search.counts.empty >= 2 and "got no step" in search.counts.notes()[0]
    assert search.trees.size[0] > 20
    assert search.trees.closed[0, 1] and not search.children[0][1]


@pytest.mark.parametrize("when_full", ["grow", "stop"])
def test_full_trees(when_full):
    """Room for 11 nodes: three expansions do not fit."""
    search = make(capacity=11, when_full=when_full, simulations=6).run()
    whole = make(simulations=6).run()
    if when_full == "grow":
        assert search.counts.full == 0 and search.steps == whole.steps
        size = int(whole.trees.size[0])
        assert torch.equal(search.trees.q[:, :size], whole.trees.q[:, :size])
        return
    assert search.counts.full == 3 and "3 trees stopped" in search.counts.notes()[0]
    assert search.trees.size.tolist() == [11] * 3 and search.steps == [steps[:11] for steps in whole.steps]


def test_no_prompts():
    search = make(prompts=[]).run()
    assert search.num_nodes == 0 and search.counts.waves == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: method_by_name("mcts"), "search is 'mcts'; it should be one of"),
        (lambda: method_by_name("cpl", width=0), "width is 0"),
        (lambda: Method("x", plan="dfs"), "plan is 'dfs'"),
        (lambda: Method("x", low=1.0), "low should be below high"),
        (lambda: make(prompts=[[1], []]), r"prompts\[1\] is empty"),
        (lambda: make(when_full="burst"), "when_full is 'burst'"),
        (
            lambda: Search(PROMPTS, Method("x", backup=BackupRule(rollout_mix=0.5)), propose, evaluate),
            "rollout is missing; rollout_mix of x is 0.5",
        ),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(FastpoError, match=message):
        call()
