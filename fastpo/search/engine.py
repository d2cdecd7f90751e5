"""``Search``: waves of simulate -> expand -> backup over many prompts at once."""

import time
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from math import isfinite

import torch
from torch import Tensor

from fastpo.errors import FastpoError, RunError
from fastpo.kernels.tree_search import ROOT, UNVISITED, SearchTrees, backup

from .methods import FULL, Method
from .nodes import Evaluate, IsTerminal, Node, Propose, Step
from .plans import Expansion, plan
from .progress import Counts, Progress, Timer

MOST_CHILDREN = 10  # of an adaptive width


class Search:
    """A tree per prompt, grown wave by wave; every wave makes one call of ``propose`` and one of ``evaluate`` for all
    of them::

        search = Search(prompts, method_by_name("mcts_dpo"), propose, evaluate)
        search.run(progress=print)
        search.trees, search.node(0, 7).response_ids

    Args:
        prompts: token ids of each prompt.
        propose: called with the nodes to expand and how many steps each may get; returns the steps of each. Equal steps
            are merged, none make the node a dead end; both are counted (``search.counts``).
        evaluate: called with all new nodes of a wave; returns a value in [method.low, method.high] each.
        is_terminal: which nodes end a response; by default those whose last step is ``finished``. Nodes at
            ``method.depth`` are terminals always.
        rollout: called with the nodes that a wave expands, where ``method.backup.rollout_mix`` is not 0; returns the
            value of a response completed from each.
        capacity: nodes a tree has room for at first.
        when_full: ``grow`` doubles the room of all trees when one is full; ``stop`` ends that tree.

    Raises FastpoError for bad settings and RunError, in one line, for a propose or evaluate that returns the wrong
    number of things, steps without tokens, or values that are NaN or out of range; the search is then as it was before
    the wave.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        method: Method,
        propose: Propose,
        evaluate: Evaluate,
        is_terminal: IsTerminal | None = None,
        *,
        rollout: Evaluate | None = None,
        capacity: int | None = None,
        when_full: str = "grow",
    ):
        if when_full not in FULL:
            raise FastpoError(f"when_full is {when_full!r}; it should be one of {', '.join(FULL)}")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise FastpoError(f"prompts[{i}] is empty; it should hold at least one token")
        if (rollout is None) != (method.backup.rollout_mix == 0):
            state = "missing" if rollout is None else "given"
            raise FastpoError(f"rollout is {state}; rollout_mix of {method.name} is {method.backup.rollout_mix}")
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.method = method
        self.propose = propose
        self.evaluate = evaluate
        self.is_terminal = is_terminal or (lambda node: node.finished)
        self.rollout = rollout
        self.when_full = when_full
        self.trees = SearchTrees.empty(len(prompts), capacity or default_capacity(method))
        self.trees.value[:, ROOT] = self.trees.q[:, ROOT] = 0.0 if method.low <= 0 <= method.high else method.low
        self.steps: list[list[Step]] = [[Step(prompt)] for prompt in self.prompts]  # [tree][node]
        # what the host asks of single nodes, again in plain lists
        self.parents: list[list[int]] = [[-1] for _ in self.prompts]
        self.children: list[list[list[int]]] = [[[]] for _ in self.prompts]
        self.values: list[list[float]] = [[float(self.trees.value[b, ROOT])] for b in range(len(self.prompts))]
        self.terminal: list[list[bool]] = [[False] for _ in self.prompts]
        self.expansions = [0] * len(self.prompts)  # per tree
        self.finished = [False] * len(self.prompts)  # trees that take no part in waves any more
        self.wanted: dict[tuple[int, int], int] = {}  # (tree, node) -> children that an adaptive width still asks for
        self.counts = Counts()
        self.timer = Timer()

    def run(
        self,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[["Search"], bool] | None = None,
        after_wave: Callable[["Search"], None] | None = None,
    ) -> "Search":
        """Waves until every tree is done or ``stop`` says so; ``after_wave`` may save."""
        started, before = time.perf_counter(), self.num_nodes
        while self.wave():
            if progress is not None:
                progress(self._progress(time.perf_counter() - started, before))
            if after_wave is not None:
                after_wave(self)
            if stop is not None and stop(self):
                break
        return self

    def wave(self) -> bool:
        """One wave. False, and nothing done, where no tree has anything left to expand."""
        started = time.perf_counter()
        expansions = plan(self)
        if not expansions:
            self.trees.pending.zero_()
            return False
        try:
            self._grow_by(expansions)
        except BaseException:
            self.trees.pending.zero_()
            raise
        self.trees.pending.zero_()
        self.counts.waves += 1
        self.timer.total += time.perf_counter() - started
        return True

    def _progress(self, seconds: float, before: int) -> Progress:
        done, total = sum(self.expansions), self.total
        rate = (self.num_nodes - before) / seconds
        open_trees = [b for b, finished in enumerate(self.finished) if not finished]
        left = sum(self.limit - self.expansions[b] for b in open_trees)
        return Progress(
            done=total - left,
            total=total,
            waves=self.counts.waves,
            nodes=self.num_nodes,
            depth=int(self.trees.depth.max()) if self.prompts else 0,
            nodes_per_second=rate,
            seconds_left=left * seconds / max(1, done),
        )

    @property
    def limit(self) -> int:
        """Expansions per tree at most."""
        method = self.method
        return method.simulations if method.plan == "select" else method.depth * max(method.leaves, method.width)

    @property
    def total(self) -> int:
        return self.limit * len(self.prompts)

    @property
    def num_nodes(self) -> int:
        return sum(map(len, self.steps))

    def node(self, tree: int, node: int) -> Node:
        children = len(self.children[tree][node])
        return Node(tree, node, self._path(tree, node), children, self.terminal[tree][node])

    def _path(self, tree: int, node: int) -> tuple[Step, ...]:
        steps, parents, path = self.steps[tree], self.parents[tree], []
        while node >= 0:
            path.append(steps[node])
            node = parents[node]
        return tuple(reversed(path))

    def _grow_by(self, expansions: list[Expansion]) -> None:
        expansions = sorted(expansions)
        opened = [e for e in expansions if e.width]
        nodes = [self.node(e.tree, e.node) for e in opened]
        proposals = self._proposed(nodes, [e.width for e in opened])
        rollouts = self._valued(self.rollout, "rollout", nodes) if self.rollout is not None else None
        new = self._new_nodes(opened, nodes, proposals)
        values = self._valued(self.evaluate, "evaluate", [node for _, node in new])
        # from here on nothing of the caller's runs: the wave is done whole
        self.counts.tokens += sum(len(step.ids) for steps in proposals for step in steps)
        self.counts.duplicates += sum(map(len, proposals)) - len(new)
        new, values = self._fitting(new, values)
        ids = self._add(new, values)
        self._shut(opened, {expansion for expansion, _ in new})
        self._back_up(expansions, opened, new, ids, values, rollouts)
        self._finish(expansions, new, values)

    def _proposed(self, nodes: list[Node], widths: list[int]) -> Sequence[Sequence[Step]]:
        if not nodes:
            return []
        started = time.perf_counter()
        proposals = self.propose(nodes, widths)
        self.timer.propose += time.perf_counter() - started
        if len(proposals) != len(nodes):
            raise RunError(f"propose returned steps for {len(proposals)} nodes; it should be {len(nodes)}")
        for node, width, steps in zip(nodes, widths, proposals, strict=True):
            if len(steps) > width:
                raise RunError(f"propose returned {len(steps)} steps for {_name(node)}; it should be {width} at most")
            if any(not step.ids for step in steps):
                raise RunError(f"propose returned a step without tokens for {_name(node)}")
        return proposals

    def _new_nodes(
        self, opened: list[Expansion], nodes: list[Node], proposals: Sequence[Sequence[Step]]
    ) -> list[tuple[Expansion, Node]]:
        """The steps that are not merged, as the nodes that they will be."""
        found, sizes = [], {e.tree: len(self.steps[e.tree]) for e in opened}
        for expansion, node, steps in zip(opened, nodes, proposals, strict=True):
            siblings = [self.steps[node.prompt][i] for i in self.children[node.prompt][node.node]]
            value = self.values[node.prompt][node.node]
            for step in steps:
                if any(_same(step, sibling, self.method.merge) for sibling in siblings):
                    continue
                siblings.append(step)
                child = Node(node.prompt, sizes[node.prompt], (*node.steps, step), parent_value=value)
                sizes[node.prompt] += 1
                found.append((expansion, _with_end(child, self._ends(child))))
        return found

    def _ends(self, node: Node) -> bool:
        if node.depth >= self.method.depth:
            return True
        return self.method.unit == "step" and bool(self.is_terminal(node))

    def _valued(self, evaluate: Evaluate, name: str, nodes: list[Node]) -> list[float]:
        if not nodes:
            return []
        started = time.perf_counter()
        values = [float(value) for value in evaluate(nodes)]
        self.timer.evaluate += time.perf_counter() - started
        if len(values) != len(nodes):
            raise RunError(f"{name} returned {len(values)} values for {len(nodes)} nodes")
        low, high = self.method.low, self.method.high
        for node, value in zip(nodes, values, strict=True):
            if not (isfinite(value) and low <= value <= high):
                raise RunError(f"{name} returned {value} for {_name(node)}; it should be in [{low:g}, {high:g}]")
        return values

    def _fitting(
        self, new: list[tuple[Expansion, Node]], values: list[float]
    ) -> tuple[list[tuple[Expansion, Node]], list[float]]:
        """Makes room, or leaves out what has none: those trees are done."""
        most = max((node.node + 1 for _, node in new), default=0)
        if most <= self.trees.capacity:
            return new, values
        if self.when_full == "grow":
            self.trees = self.trees.grown(max(most, 2 * self.trees.capacity))
            return new, values
        full = {node.prompt for _, node in new if node.node >= self.trees.capacity}
        for tree in full:
            self.finished[tree] = True
        self.counts.full += len(full)
        kept = [i for i, (_, node) in enumerate(new) if node.node < self.trees.capacity]
        return [new[i] for i in kept], [values[i] for i in kept]

    def _add(self, new: list[tuple[Expansion, Node]], values: list[float]) -> list[int]:
        tree = torch.tensor([node.prompt for _, node in new], dtype=torch.int64)  # [C]
        parent = torch.tensor([expansion.node for expansion, _ in new], dtype=torch.int64)  # [C]
        column = torch.tensor(values, dtype=torch.float32)  # [C]
        reward = column - self.trees.value[tree, parent]  # [C]
        terminal = torch.tensor([node.terminal for _, node in new], dtype=torch.bool)  # [C]
        q = reward if self.method.backup.rewards else column
        prior = torch.tensor([_prior(node.steps[-1], self.method.prior_power) for _, node in new])
        ids = self.trees.add(
            tree,
            parent,
            q=q,
            value=column,
            reward=reward,
            prior=prior,
            expandable=~terminal,
            closed=terminal & self.method.close_terminals,
        )
        for (expansion, node), value in zip(new, values, strict=True):
            self._note(node.prompt, expansion.node, node.steps[-1], value, node.terminal)
        return ids.tolist()

    def _note(self, tree: int, parent: int, step: Step, value: float, terminal: bool) -> None:
        """The host's lists of a node that the trees have got."""
        self.children[tree][parent].append(len(self.steps[tree]))
        self.steps[tree].append(step)
        self.parents[tree].append(parent)
        self.children[tree].append([])
        self.values[tree].append(value)
        self.terminal[tree].append(terminal)

    def _back_up(
        self,
        expansions: list[Expansion],
        opened: list[Expansion],
        new: list[tuple[Expansion, Node]],
        ids: list[int],
        values: list[float],
        rollouts: list[float] | None,
    ) -> None:
        """Passes up the leaves of the wave, or their children, in the order of their trees."""
        method = self.method
        below: dict[Expansion, list[int]] = {e: [] for e in expansions}
        for i, (expansion, _) in enumerate(new):
            below[expansion].append(i)
        rolled = dict(zip(opened, rollouts, strict=True)) if rollouts is not None else {}
        leaves: list[list[tuple[int, float, float]]] = [[] for _ in self.prompts]  # [tree] node, value, rollout
        for expansion in expansions:
            children = below[expansion]
            own = [i for i in children if method.backup_children or (method.close_terminals and new[i][1].terminal)]
            for i in own:
                leaves[expansion.tree].append((ids[i], 0.0 if method.backup.rewards else values[i], values[i]))
            if not (own and method.backup_children):
                value = self._leaf_value(expansion, [values[i] for i in children])
                leaves[expansion.tree].append((expansion.node, value, rolled.get(expansion, value)))
        most = max(map(len, leaves))
        padded = torch.tensor([row + [(UNVISITED, 0.0, 0.0)] * (most - len(row)) for row in leaves])  # [B, W, 3]
        rollout = padded[..., 2] if rollouts is not None else None
        backup(self.trees, padded[..., 0].to(torch.int64), padded[..., 1], method.backup, rollout)

    def _leaf_value(self, expansion: Expansion, children: list[float]) -> float:
        if self.method.backup.rewards:
            return 0.0
        if expansion.node == ROOT and children:  # nobody has evaluated the root
            return sum(children) / len(children)
        return self.values[expansion.tree][expansion.node]

    def _shut(self, opened: list[Expansion], grown: set[Expansion]) -> None:
        """Which nodes of the wave get no further children: before the backup, which closes what is done."""
        shut = [e for e in opened if not self._stays_open(e, e in grown)]
        dead = [not self.children[e.tree][e.node] for e in shut]
        tree, node = (torch.tensor([e[i] for e in shut], dtype=torch.int64) for i in (0, 1))
        self.trees.expandable[tree, node] = False
        self.trees.closed[tree, node] |= torch.tensor(dead, dtype=torch.bool)
        self.counts.empty += sum(end and not self.finished[e.tree] for e, end in zip(shut, dead, strict=True))

    def _finish(self, expansions: list[Expansion], new: list[tuple[Expansion, Node]], values: list[float]) -> None:
        """Counts the wave; which trees are done."""
        for expansion in expansions:
            self.expansions[expansion.tree] += 1
        self.counts.expansions += len(expansions)
        for (_, node), value in zip(new, values, strict=True):
            if (node.terminal or self.method.unit == "answer") and value >= self.method.stop_value:
                self.finished[node.prompt] = True
        closed = self.trees.closed[:, ROOT].tolist()
        for b in {e.tree for e in expansions}:
            self.finished[b] |= self.expansions[b] >= self.limit or closed[b]

    def _stays_open(self, expansion: Expansion, grown: bool) -> bool:
        """Whether a node that was expanded may get further children."""
        tree, node, method = expansion.tree, expansion.node, self.method
        children = self.children[tree][node]
        self.wanted.pop((tree, node), None)
        if not grown:
            return False
        if method.refine:
            q = self.trees.q[tree, [node, *children]].tolist()
            better = node != ROOT and max(q[1:]) > q[0]
            return len(children) < method.width and not better
        if method.adaptive:
            values = [self.values[tree][child] for child in children]
            mean = sum(values) / len(values)
            limit = min(int(method.adaptive * max(abs(v - mean) for v in values)), MOST_CHILDREN)
            if limit > len(children):
                self.wanted[tree, node] = limit - len(children)
                return True
        return False

    def column(self, name: str) -> list[list[float]]:
        """[tree][node] of a field of ``trees``, used slots only."""
        values: Tensor = getattr(self.trees, name)
        return [row[: len(steps)] for row, steps in zip(values.tolist(), self.steps, strict=True)]


def most_nodes(method: Method) -> int:
    """Nodes that a tree can get below its root (rebase: but for its rounding)."""
    if method.plan == "select":
        width = max(method.width, MOST_CHILDREN) if method.adaptive else method.width
        return method.simulations * (1 if method.refine else width)
    return method.depth * (method.width * method.leaves if method.plan == "beam" else method.width)


def default_capacity(method: Method) -> int:
    """Room for all that the settings allow, up to 4,096 nodes."""
    return min(4096, 1 + most_nodes(method))


def _prior(step: Step, power: float) -> float:
    return float(torch.tensor(step.logp / len(step.ids) ** power).exp())


def _same(a: Step, b: Step, similarity: float) -> bool:
    if a.finished != b.finished:
        return False
    if a.ids == b.ids:
        return True
    return similarity < 1 and SequenceMatcher(None, a.ids, b.ids, autojunk=False).ratio() >= similarity


def _with_end(node: Node, terminal: bool) -> Node:
    return Node(node.prompt, node.node, node.steps, node.children, terminal, node.parent_value)


def _name(node: Node) -> str:
    return f"node {node.node} of prompt {node.prompt}"
