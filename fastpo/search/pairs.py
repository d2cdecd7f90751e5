"""From searched trees to training: preference pairs, solutions and votes. Tokens all the way, no text in between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.kernels.tree_search import process_values, sibling_pairs
from fastpo.objectives import Objective, visit_soft_labels
from fastpo.trees import build_tree
from fastpo.types import Pairs, TokenTree

from .engine import Search
from .nodes import Node
from .values import answer_ids, is_end

IsRight = Callable[[Node], bool]  # of a node that ends a response


@dataclass(frozen=True)
class SearchPair:
    """Two continuations of one context. The context holds the prompt, the steps that both share, and what their own
    steps
    share: spans begin at the first token that differs."""

    tree: int
    chosen: int  # nodes
    rejected: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    soft_label: float  # from visit counts (MCTS-DPO)
    margin: float  # Q_chosen - Q_rejected (Step-APO)
    weight: float = 1.0


def search_pairs(search: Search, limit: int, is_right: IsRight) -> list[SearchPair]:
    """At most ``limit`` pairs per tree by the method's rule, those of the largest gap in Q first (ties: the lowest
    nodes).

    ``solutions`` pairs whole responses that ``is_right`` tells apart, right against wrong, each side by Q; the other
    rules pair siblings (kernels/tree_search/pairs.py). Where siblings end the response, ``signs`` takes the best of
    them against the worst alone, and their margin counts ``solution_scale``.
    """
    method = search.method
    if method.pairs == "solutions":
        found = _solution_pairs(search, is_right)
    else:
        columns = sibling_pairs(search.trees, method.pairs, method.min_gap)
        found = list(zip(*(column.tolist() for column in columns), strict=True))
        if method.pairs == "signs":
            found = _thin_ends(search, found)
    q = search.column("q")
    by_tree: dict[int, list[tuple[int, int]]] = {}
    for tree, chosen, rejected in found:
        by_tree.setdefault(tree, []).append((chosen, rejected))
    kept = []
    for tree, pairs in sorted(by_tree.items()):
        ordered = sorted(pairs, key=lambda p: (q[tree][p[1]] - q[tree][p[0]], p))
        kept += [(tree, *pair) for pair in ordered[:limit]]
    return _records(search, kept, q)


def _solution_pairs(search: Search, is_right: IsRight) -> list[tuple[int, int, int]]:
    """Right x wrong ends of each tree, distinct responses only."""
    found = []
    for tree, steps in enumerate(search.steps):
        sides: dict[bool, dict[tuple[int, ...], int]] = {True: {}, False: {}}
        for i in range(1, len(steps)):
            if not (search.terminal[tree][i] or search.method.unit == "answer"):
                continue
            node = search.node(tree, i)
            sides[is_right(node)].setdefault(tuple(answer_ids(node, search.method)), i)
        found += [(tree, chosen, rejected) for chosen in sides[True].values() for rejected in sides[False].values()]
    return found


def _thin_ends(search: Search, pairs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Of the pairs of two ends below one parent, the one of the largest and the smallest Q."""
    q, kept = search.trees.q, []
    best: dict[tuple[int, int], tuple[float, tuple[int, int, int]]] = {}
    for tree, chosen, rejected in pairs:
        if not (search.terminal[tree][chosen] and search.terminal[tree][rejected]):
            kept.append((tree, chosen, rejected))
            continue
        family = tree, search.parents[tree][chosen]
        gap = float(q[tree, chosen] - q[tree, rejected])
        if family not in best or gap > best[family][0]:
            best[family] = gap, (tree, chosen, rejected)
    return kept + [pair for _, pair in best.values()]


def _records(search: Search, pairs: list[tuple[int, int, int]], q: list[list[float]]) -> list[SearchPair]:
    if not pairs:
        return []
    tree, chosen, rejected = torch.tensor(pairs).T
    visits = search.trees.visits
    labels = visit_soft_labels(visits[tree, chosen], visits[tree, rejected]).tolist()
    found = []
    for (b, won, lost), label in zip(pairs, labels, strict=True):
        ends = search.terminal[b][won] and search.terminal[b][lost]
        scale = search.method.solution_scale if ends else 1.0
        found.append(SearchPair(b, won, lost, *_spans(search, b, won, lost), label, scale * (q[b][won] - q[b][lost])))
    return found


def _spans(search: Search, tree: int, chosen: int, rejected: int) -> tuple[list[int], list[int], list[int]]:
    """(context, chosen, rejected) token ids; each of the two keeps one token at least."""
    prompt = list(search.prompts[tree])
    if search.method.pairs == "solutions":
        a, b = (answer_ids(search.node(tree, i), search.method) for i in (chosen, rejected))
    else:
        a, b = (search.node(tree, i).response_ids for i in (chosen, rejected))
    shortest = min(len(a), len(b)) - 1
    shared = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    return prompt + a[:shared], a[shared:], b[shared:]


def training_tree(pairs: Sequence[SearchPair], objective: Objective) -> tuple[TokenTree, Pairs]:
    """Every distinct token of the pairs once, as a forest that ``fastpo.trees.pack`` takes; and the pairs over its
    sequences, with the columns that ``objective`` asks for.

    A sequence begins to count at the first token in which its pair differs: one that stands in pairs of different
    contexts is a sequence for each.
    """
    sequences: dict[tuple[tuple[int, ...], int], int] = {}

    def number(context: list[int], ids: list[int]) -> int:
        return sequences.setdefault((tuple(context + ids), len(context)), len(sequences))

    index = [(number(p.prompt_ids, p.chosen_ids), number(p.prompt_ids, p.rejected_ids)) for p in pairs]
    tree = build_tree([ids for ids, _ in sequences], [start for _, start in sequences])
    columns = {"weights": torch.tensor([p.weight for p in pairs])}
    for name, values in (("soft_labels", [p.soft_label for p in pairs]), ("margins", [p.margin for p in pairs])):
        if f"pairs.{name}" in objective.requires:  # another objective would take them for settings of its own
            columns[name] = torch.tensor(values)
    return tree, Pairs(torch.tensor(index, dtype=torch.int64).view(len(pairs), 2), **columns)


def process_targets(search: Search, is_right: IsRight) -> Tensor:
    """[B, M] values of partial solutions for a process reward model (ReST-MCTS*), from what the search found.

    A step is good where a right end lies below it (or is it); m counts the steps from its parent to the nearest right
    end below, or where there is none to the nearest end at all. 0 for nodes without an end below them.
    """
    signs, distances = (torch.zeros(search.trees.parent.shape) for _ in range(2))
    distances += 1
    for tree, parents in enumerate(search.parents):
        far = float("inf")
        right, any_end = [far] * len(parents), [far] * len(parents)
        for i in range(len(parents) - 1, 0, -1):
            if is_end(node := search.node(tree, i), search.method):
                any_end[i] = 0
                right[i] = 0 if is_right(node) else far
            for steps in (right, any_end):
                steps[parents[i]] = min(steps[parents[i]], steps[i] + 1)
        for i in range(1, len(parents)):
            nearest = right[i] if right[i] < far else any_end[i]
            if nearest < far:
                signs[tree, i] = 1 if right[i] < far else -1
                distances[tree, i] = nearest + 1
    return process_values(search.trees, signs, distances)


def weighted_vote(votes: Sequence[tuple[str, float]]) -> str | None:
    """The answer of the largest summed weight (REBASE, AlphaLLM); the first of equal ones, None without votes."""
    totals: dict[str, float] = {}
    for answer, weight in votes:
        totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=lambda answer: totals[answer]) if totals else None
