"""Preference pairs among siblings: every rule of METHODS is one function of the children's columns.

Run once per search, on whatever device the trees are: a handful of vectorised torch operations, no backend of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .records import UNVISITED, SearchTrees

# A family is a parent with two children or more: F families of at most K children, one row each.


def _families(trees: SearchTrees) -> tuple[Tensor, Tensor]:
    """(tree [F], children [F, K] in ascending order, UNVISITED behind the last)."""
    used = trees.used().clone()
    used[:, 0] = False
    tree, node = used.nonzero(as_tuple=True)  # [C], by tree and node
    parent = trees.parent[tree, node]  # [C]
    family = tree * trees.capacity + parent
    order = family.argsort(stable=True)  # children stay in ascending order
    ids, index, counts = family[order].unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(order.shape[0], device=order.device) - (counts.cumsum(0) - counts)[index]
    width = int(counts.max()) if counts.numel() else 0
    children = torch.full((ids.shape[0], width), UNVISITED, device=order.device)
    children[index, rank] = node[order]
    several = counts >= 2
    return (ids // trees.capacity)[several], children[several]


def last_first(trees: SearchTrees, tree: Tensor, children: Tensor, min_gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Siblings sorted by (Q, p, r, v, N): the last against the first, where their Q differ by more than ``min_gap``."""
    order = torch.arange(children.shape[1], device=children.device).expand_as(children)  # [F, K]
    for name in ("visits", "value", "reward", "prior", "q"):  # least significant key first: every sort is stable
        column = _column(trees, tree, children, name).gather(1, order)
        order = order.gather(1, column.argsort(dim=1, stable=True))
    order = order.gather(1, (children.gather(1, order) != UNVISITED).to(torch.int8).argsort(dim=1, stable=True))
    first = (children == UNVISITED).sum(1, keepdim=True)  # absent children stand before the first
    worst, best = (children.gather(1, i)[:, 0] for i in (order.gather(1, first), order[:, -1:]))
    q = trees.q[tree, best] - trees.q[tree, worst]
    kept = q > min_gap
    return tree[kept], best[kept], worst[kept]


def signs(trees: SearchTrees, tree: Tensor, children: Tensor, min_gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every sibling with Q > 0 against every one with Q < 0. CPL (Wang et al. 2024)."""
    q = _column(trees, tree, children, "q")
    return _pairs(tree, children, (q[:, :, None] > 0) & (q[:, None, :] < 0) & _gap(q, min_gap))


def gaps(trees: SearchTrees, tree: Tensor, children: Tensor, min_gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every two siblings whose Q differ by ``min_gap`` or more. Tree-PLV (He et al. 2024): 3/8 of the rollouts."""
    q = _column(trees, tree, children, "q")
    difference = q[:, :, None] - q[:, None, :]
    return _pairs(tree, children, (difference >= min_gap) & (difference > 0))


def largest_gap(trees: SearchTrees, tree: Tensor, children: Tensor, min_gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every family the best against the worst Q, where they differ by more than ``min_gap``. AlphaLLM."""
    q = _column(trees, tree, children, "q")
    there = children != UNVISITED
    best = torch.where(there, q, -torch.inf).max(1).indices  # the first of equal ones
    worst = torch.where(there, q, torch.inf).min(1).indices
    best, worst = (children.gather(1, i[:, None])[:, 0] for i in (best, worst))
    kept = trees.q[tree, best] - trees.q[tree, worst] > min_gap
    return tree[kept], best[kept], worst[kept]


def _column(trees: SearchTrees, tree: Tensor, children: Tensor, name: str) -> Tensor:
    """[F, K] of the children; 0 where there is none."""
    column = getattr(trees, name)[tree[:, None], children.clamp(min=0)]
    return torch.where(children == UNVISITED, 0, column)


def _gap(q: Tensor, min_gap: float) -> Tensor:
    return q[:, :, None] - q[:, None, :] >= min_gap


def _pairs(tree: Tensor, children: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs (chosen, rejected) of ``wanted`` [F, K, K] that are there, family by family."""
    there = children != UNVISITED
    family, chosen, rejected = (wanted & there[:, :, None] & there[:, None, :]).nonzero(as_tuple=True)
    return tree[family], children[family, chosen], children[family, rejected]


PAIR_RULES: dict[str, Callable[[SearchTrees, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]] = {
    "last_first": last_first,
    "signs": signs,
    "gaps": gaps,
    "largest_gap": largest_gap,
}


def sibling_pairs(trees: SearchTrees, rule: str, min_gap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(tree [P], chosen [P], rejected [P]) int64: pairs of children of one node, by tree, parent, chosen, rejected.

    ``rule``: ``last_first``, ``signs``, ``gaps`` or ``largest_gap`` (the functions above say what each takes). No pair
    is made of equal Q.

    Raises ValueError for an unknown rule and a ``min_gap`` below 0.
    """
    if rule not in PAIR_RULES:
        raise ValueError(f"rule is {rule!r}; it should be one of {', '.join(PAIR_RULES)}")
    if not min_gap >= 0:
        raise ValueError(f"min_gap is {min_gap}; it should be 0 or more")
    tree, children = _families(trees)
    if tree.numel() == 0:
        return tree, tree.clone(), tree.clone()
    return PAIR_RULES[rule](trees, tree, children, min_gap)
