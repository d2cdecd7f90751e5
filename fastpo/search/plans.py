"""Which nodes a wave expands, and how many children each may get."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpo.kernels.tree_search import UNVISITED, SelectRule, select

if TYPE_CHECKING:
    from .engine import Search

_BEST_OPEN = SelectRule("none", scope="frontier")


class Expansion(NamedTuple):
    tree: int
    node: int
    width: int  # children it may get; 0: a terminal, visited once more


def plan(search: "Search") -> list[Expansion]:
    """The expansions of the next wave; none where every tree is done. Selected nodes are pending afterwards."""
    return {"select": _select, "beam": _beam, "rebase": _rebase}[search.method.plan](search)


def _select(search: "Search") -> list[Expansion]:
    method, trees = search.method, search.trees
    found = []
    for tree, nodes in enumerate(select(trees, method.select, method.leaves).tolist()):
        room = search.limit - search.expansions[tree]
        chosen = [node for node in nodes if node != UNVISITED]
        if search.finished[tree]:
            continue
        if not chosen:
            search.finished[tree] = True
        for node in chosen[:room]:
            width = 1 if method.refine else search.wanted.get((tree, node), method.width)
            found.append(Expansion(tree, node, 0 if search.terminal[tree][node] else width))
    return found


def _beam(search: "Search") -> list[Expansion]:
    """The ``leaves`` best open nodes of each tree; the other open ones are given up."""
    method, trees = search.method, search.trees
    found = []
    chosen = select(trees, _BEST_OPEN, method.leaves)
    trees.expandable.zero_()
    for tree, nodes in enumerate(chosen.tolist()):
        nodes = [] if search.finished[tree] else [node for node in nodes if node != UNVISITED]
        if not nodes:
            search.finished[tree] = True
        trees.expandable[tree, nodes] = True
        found += [Expansion(tree, node, method.width) for node in nodes]
    return found


def _rebase(search: "Search") -> list[Expansion]:
    """Every open node of each tree, by its share of the budget; those without one are given up."""
    method, trees = search.method, search.trees
    found = []
    for tree in range(trees.batch):
        nodes = [] if search.finished[tree] else (trees.expandable[tree]).nonzero()[:, 0].tolist()
        budget = method.width - sum(search.terminal[tree])
        widths = rebase_widths(trees.q[tree, nodes], budget, method.temperature).tolist() if budget > 0 else []
        kept = [Expansion(tree, node, width) for node, width in zip(nodes, widths, strict=False) if width]
        trees.expandable[tree] = False
        trees.expandable[tree, [e.node for e in kept]] = True
        if not kept:
            search.finished[tree] = True
        found += kept
    return found


def rebase_widths(scores: Tensor, budget: int, temperature: float) -> Tensor:
    """[n] int64 children of n nodes with ``scores`` [n]: ``round(B softmax(scores / temperature))``, halves to even.

    REBASE (Wu et al. 2024). The sum may miss the budget by rounding, as theirs.
    """
    return (budget * torch.softmax(scores.double() / temperature, 0)).round().to(torch.int64)
