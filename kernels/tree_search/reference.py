"""tree_search in plain PyTorch: the spec. Vectorised over trees; loops go over levels, siblings and leaves of a wave.

Scores and means are computed in float64. Codes stand for the names in records.py, by their position there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.kernels.tree_search.records import BACKUPS, FORMS, NO_PARENT, UNVISITED, UNVISITED_RULES

_MUZERO_BASE = 19652.0
_MC_NEST_EPSILON = 1e-10


def explore(form: int, c: float, parent_visits: Tensor, visits: Tensor) -> Tensor:
    """c U of SelectRule, float64; infinite where a formula has no value."""
    name = FORMS[form]
    if name == "none":
        return torch.zeros_like(visits)
    if name == "puct":
        return c * parent_visits.sqrt() / (1 + visits)
    if name == "muzero":
        growing = c + ((parent_visits + _MUZERO_BASE + 1) / _MUZERO_BASE).log()
        return growing * parent_visits.sqrt() / (1 + visits)
    log = parent_visits.clamp(min=1).log()
    if name == "ucb1":
        return c * (2 * log / visits).sqrt()
    if name == "uct":
        return c * (log / visits).sqrt()
    return c * ((log + 1) / (visits + _MC_NEST_EPSILON)).sqrt()


@dataclass
class _Selection:
    """What ``select`` knows of its trees, all [B, M] but ``first`` [B]; ids are offsets into the flat arrays there."""

    parent: Tensor
    first_child: Tensor
    next_sibling: Tensor
    visits: Tensor
    pending: Tensor
    q: Tensor
    prior: Tensor
    expandable: Tensor
    closed: Tensor
    size: Tensor
    first: Tensor
    form: int
    c: float
    unvisited: int
    bonus: float
    use_prior: bool
    virtual_loss: float

    def score(self, node: Tensor, above: Tensor) -> Tensor:
        """Q + c p U of ``node`` below ``above``, [B] or [B, M] float64."""
        waiting, visits = self._at(self.pending, node), self._at(self.visits, node)
        total = visits + waiting
        above_total = self._at(self.visits, above) + self._at(self.pending, above)
        u = explore(self.form, self.c, above_total, total)
        if self.use_prior:
            u = u * self._at(self.prior, node)
        rule = UNVISITED_RULES[self.unvisited]
        if rule != "formula":
            u = torch.where(total == 0, self.bonus if rule == "bonus" else torch.inf, u)
        return self._at(self.q, node) - self.virtual_loss * waiting / (visits.clamp(min=1) + waiting) + u

    def _at(self, field: Tensor, node: Tensor) -> Tensor:
        flat = (node[:, None] if node.dim() == 1 else node).clamp(min=0)
        return field.gather(1, flat).view(node.shape).double()

    def descend(self) -> Tensor:
        """[B] where the path of each tree ends; UNVISITED where all of it is closed."""
        node, dead = self.first.clone(), self._at(self.closed, self.first).bool()
        while True:
            child = self.first_child.gather(1, node[:, None])[:, 0]
            ends = dead | self._at(self.expandable, node).bool() | (child == UNVISITED)
            if ends.all():
                return torch.where(dead, UNVISITED, node)
            best, best_score = torch.full_like(node, UNVISITED), torch.full_like(node, -torch.inf, dtype=torch.float64)
            while (child != UNVISITED).any():
                score = self.score(child, node)
                better = (child != UNVISITED) & ~self._at(self.closed, child).bool() & (score > best_score)
                best, best_score = torch.where(better, child, best), torch.where(better, score, best_score)
                child = torch.where(
                    child == UNVISITED, UNVISITED, self.next_sibling.gather(1, child[:, None].clamp(min=0))[:, 0]
                )
            dead = dead | (~ends & (best == UNVISITED))
            node = torch.where(ends | dead, node, best)

    def best_open(self, taken: Tensor) -> Tensor:
        """[B] the best expandable node of each tree that is none of ``taken`` [B, w]; UNVISITED where there is none."""
        nodes = torch.arange(self.parent.shape[1], device=self.parent.device).expand_as(self.parent)  # [B, M]
        above = torch.where(self.parent == NO_PARENT, nodes, self.parent)
        score = self.score(nodes, above)
        there = (nodes < self.size[:, None]) & self.expandable & ~self.closed & (score > -torch.inf)
        there &= ~(nodes[:, :, None] == taken[:, None, :]).any(2)
        score = torch.where(there, score, -torch.inf)
        best = score.max(1, keepdim=True).values
        first = torch.where(there & (score == best), nodes, nodes.shape[1]).min(1).values  # ties: the lowest node
        return torch.where(there.any(1), first, UNVISITED)


def select(
    parent: Tensor,  # [B, M] int64, and so on as in SearchTrees
    first_child: Tensor,
    next_sibling: Tensor,
    visits: Tensor,
    pending: Tensor,  # changed: one more on the path of each leaf
    q: Tensor,
    prior: Tensor,
    expandable: Tensor,
    closed: Tensor,
    size: Tensor,  # [B] int64
    start: Tensor | None,  # [B] int64, where paths begin; the root where absent
    form: int,
    c: float,
    unvisited: int,
    bonus: float,
    use_prior: bool,
    frontier: bool,
    virtual_loss: float,
    leaves: Tensor,  # [B, W] int64, the output
) -> None:
    first = torch.zeros_like(size) if start is None else start
    fields = (parent, first_child, next_sibling, visits, pending, q, prior, expandable, closed, size, first)
    selection = _Selection(*fields, form, c, unvisited, bonus, use_prior, virtual_loss)
    for w in range(leaves.shape[1]):
        taken = leaves[:, :w]
        chosen = selection.best_open(taken) if frontier else selection.descend()
        chosen = torch.where((taken == chosen[:, None]).any(1), UNVISITED, chosen)
        leaves[:, w] = chosen
        _up(parent, chosen, lambda rows, nodes: pending.index_put_((rows, nodes), pending[rows, nodes] + 1))


def _up(parent: Tensor, leaf: Tensor, visit: Callable[[Tensor, Tensor], object]) -> None:
    """``visit(rows, nodes)`` for the nodes of each tree from ``leaf`` [B] to its root, level by level."""
    rows = (leaf != UNVISITED).nonzero()[:, 0]
    nodes = leaf[rows]
    while rows.numel():
        visit(rows, nodes)
        nodes = parent[rows, nodes]
        there = nodes != NO_PARENT
        rows, nodes = rows[there], nodes[there]


def backup(
    parent: Tensor,  # [B, M] int64, and so on as in SearchTrees
    first_child: Tensor,
    next_sibling: Tensor,
    visits: Tensor,  # changed
    pending: Tensor,  # changed: one less on the path of each leaf, not below 0
    q: Tensor,  # changed
    reward: Tensor,
    expandable: Tensor,
    closed: Tensor,  # changed with ``close``
    leaves: Tensor,  # [B, W] int64; UNVISITED: none
    values: Tensor,  # [B, W] float32
    kind: int,
    gamma: float,
    min_visits: float,
    use_rewards: bool,
    mix: float,
    close: bool,
) -> None:
    name = BACKUPS[kind]

    def children(rows: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum of weights, weighted sum of Q and largest Q of the children; whether there are any."""
        child = first_child[rows, nodes]
        total = torch.zeros(rows.shape[0], dtype=torch.float64, device=q.device)
        weighted, best, has = total.clone(), total - torch.inf, child != UNVISITED
        while (there := child != UNVISITED).any():
            at = child.clamp(min=0)
            weight = torch.where(there, visits[rows, at].double().clamp(min=min_visits), 0)
            found = torch.where(there, q[rows, at].double(), -torch.inf)
            total, best = total + weight, torch.maximum(best, found)
            weighted = weighted + torch.where(there, weight * found, 0)
            child = torch.where(there, next_sibling[rows, at], UNVISITED)
        return total, weighted, best, has

    for w in range(leaves.shape[1]):
        leaf, value = leaves[:, w], values[:, w].double()

        def visit(rows: Tensor, nodes: Tensor, leaf: Tensor = leaf, value: Tensor = value) -> None:
            visits[rows, nodes] += 1
            pending[rows, nodes] = (pending[rows, nodes] - 1).clamp(min=0)
            old, x, is_leaf = q[rows, nodes].double(), value[rows], nodes == leaf[rows]
            if name == "mean":
                n = visits[rows, nodes]
                new = torch.where(n == 1, x, old + (x - old) / n)
            elif name == "children":
                total, weighted, _, _ = children(rows, nodes)
                r = reward[rows, nodes].double() if use_rewards else 0.0
                new = r + gamma * torch.where(total > 0, weighted / total, x)
                new = torch.where((total > 0) | is_leaf, new, old)
            else:
                *_, best, has = children(rows, nodes)
                new = torch.where(has, (1 - mix) * old + mix * best, torch.where(is_leaf, x, old))
            q[rows, nodes] = new.float()

        _up(parent, leaf, visit)
        if close:
            _close(parent, first_child, next_sibling, expandable, closed, leaf)


def _close(
    parent: Tensor, first_child: Tensor, next_sibling: Tensor, expandable: Tensor, closed: Tensor, leaf: Tensor
) -> None:
    def visit(rows: Tensor, nodes: Tensor) -> None:
        child = first_child[rows, nodes]
        done = (child != UNVISITED) & ~expandable[rows, nodes]
        while (there := child != UNVISITED).any():
            at = child.clamp(min=0)
            done &= ~there | closed[rows, at]
            child = torch.where(there, next_sibling[rows, at], UNVISITED)
        closed[rows, nodes] |= done

    _up(parent, leaf, visit)


def process_values(
    parent: Tensor,  # [B, M] int64
    size: Tensor,  # [B] int64
    signs: Tensor,  # [B, M] float32
    distances: Tensor,  # [B, M] float32
    values: Tensor,  # [B, M] float32, the output
) -> None:
    values.zero_()
    rows = torch.arange(parent.shape[0], device=parent.device)
    for i in range(1, int(size.max()) if size.numel() else 1):  # a parent stands before its children
        above = values[rows, parent[:, i].clamp(min=0)].double()
        found = (above + signs[:, i].double() * (1 - above) / distances[:, i].double()).clamp(min=0)
        values[:, i] = torch.where(i < size, found, 0).float()
