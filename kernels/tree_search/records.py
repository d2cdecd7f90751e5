"""The records of tree_search: trees as a struct of arrays, and the rules that read them.

B trees, M nodes of room in each, C new nodes, W leaves that a tree gives to a wave.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

ROOT = 0  # the node that every tree begins with
NO_PARENT = -1  # parent of the root
UNVISITED = -1  # no such node: no child, no sibling, no leaf

FORMS = ("none", "puct", "ucb1", "uct", "muzero", "mc_nest")  # U of SelectRule, in the order of their codes
UNVISITED_RULES = ("formula", "bonus", "first")
SCOPES = ("path", "frontier")
BACKUPS = ("mean", "children", "max_mix")


@dataclass(frozen=True)
class SelectRule:
    """Which node a tree gives to the next wave: the one of the largest Q + c p U. Equal ones: the lowest node.

    With N visits of the node and N_p of its parent, both counting visits that are under way (``SearchTrees.pending``):

    ======== ============================================= ===========================================
    form     U                                             source
    ======== ============================================= ===========================================
    puct     ``sqrt(N_p) / (1 + N)``                       MCTS-DPO (Xie et al. 2024), CPL, their code
    ucb1     ``sqrt(2 ln N_p / N)``                        ReST-MCTS* (Zhang et al. 2024), their code
    uct      ``sqrt(ln N_p / N)``                          AlphaLLM (Tian et al. 2024), their code
    muzero   ``(c + ln((N_p + 19653) / 19652)) sqrt(N_p)   MuZero (Schrittwieser et al. 2020); here c is
             / (1 + N)``                                   added, not multiplied: 1.25
    mc_nest  ``sqrt((ln N_p + 1) / (N + 1e-10))``          MC-NEST, MCTSr (Zhang et al. 2024)
    none     0                                             best first (Tree-PLV), beams
    ======== ============================================= ===========================================

    A node without visits under ucb1 and uct, whose formulas have no value there: ``bonus`` scores Q + bonus (ReST's V +
    1), ``first`` puts it before every visited one. puct, muzero, mc_nest and none need no such rule: ``formula``.

    ``prior``: whether U is multiplied by the node's prior p. ``scope``: ``path`` goes down from the root, at each node
    to its best child, until a node that may still get children (``expandable``) or has none; ``frontier`` takes the
    best of all expandable nodes of the tree, wherever they are. ``virtual_loss``: v of Q - v P / (max(N, 1) + P), P
    visits under way:
    several leaves of one wave spread out. 0: only the counts do that.
    """

    form: str = "puct"
    c: float = 1.0
    unvisited: str = "formula"
    bonus: float = 1.0
    prior: bool = False
    scope: str = "path"
    virtual_loss: float = 0.0

    def __post_init__(self) -> None:
        _one_of("form", self.form, FORMS)
        _one_of("unvisited", self.unvisited, UNVISITED_RULES)
        _one_of("scope", self.scope, SCOPES)
        if not (math.isfinite(self.c) and self.c >= 0):
            raise ValueError(f"c is {self.c}; it should be a number of 0 or more")
        if not (math.isfinite(self.virtual_loss) and self.virtual_loss >= 0):
            raise ValueError(f"virtual_loss is {self.virtual_loss}; it should be a number of 0 or more")
        if self.form in ("ucb1", "uct") and self.unvisited == "formula":
            raise ValueError(f"unvisited is 'formula', which {self.form} lacks; it should be bonus or first")


@dataclass(frozen=True)
class BackupRule:
    """How the value x of a leaf changes the Q of the nodes above it. Every node of the path gets one visit more.

    - ``mean``: Q = mean of all x that passed (running mean). CPL, AlphaLLM, plain MCTS.
    - ``children``: ``V = sum_c w_c Q_c / sum_c w_c``, ``w_c = max(min_visits, N_c)``; ``Q = r + gamma V`` with
      ``rewards``, else ``Q = gamma V``. The leaf: V = x, unless it has children of some weight. Nodes whose children
      weigh nothing keep their Q. MCTS-DPO: min_visits 1, rewards; ReST-MCTS*: min_visits 0.
    - ``max_mix``: ``Q = (1 - mix) Q + mix max_c Q_c``; a leaf without children gets Q = x. MCTSr, MC-NEST: mix 1/2.

    ``rollout_mix`` blends x with the return of a rollout, ``(1 - rollout_mix) x + rollout_mix rollout`` (ReST: 1/2).
    ``close``: a node that may get no more children and all of whose children are closed is closed too: no path enters
    it.
    """

    kind: str = "mean"
    gamma: float = 1.0
    min_visits: float = 0.0
    rewards: bool = False
    mix: float = 0.5
    rollout_mix: float = 0.0
    close: bool = False

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, BACKUPS)
        for name, least, most in (("gamma", 0, 1), ("mix", 0, 1), ("rollout_mix", 0, 1), ("min_visits", 0, math.inf)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it should be in [{least}, {most}]")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(known)}")


@dataclass(frozen=True)
class SearchTrees:
    """B search trees in preallocated arrays of M nodes. The ops change them in place.

    Node ids grow from parent to child and from sibling to sibling: the children of i are ``first_child[i]``, then each
    one's ``next_sibling``, in ascending order. Slots from ``size`` on hold nothing.
    """

    size: Tensor  # [B] int64, nodes in use
    parent: Tensor  # [B, M] int64; NO_PARENT at the root
    first_child: Tensor  # [B, M] int64; UNVISITED where there is none
    next_sibling: Tensor  # [B, M] int64; UNVISITED behind the last
    depth: Tensor  # [B, M] int64; 0 at the root
    visits: Tensor  # [B, M] int64, N
    pending: Tensor  # [B, M] int64, visits under way: selected and not yet backed up
    q: Tensor  # [B, M] float32, what select maximises and backup writes
    value: Tensor  # [B, M] float32, v: what evaluate said of the node itself
    reward: Tensor  # [B, M] float32, r of the step that leads to the node
    prior: Tensor  # [B, M] float32, p of that step
    expandable: Tensor  # [B, M] bool; may get (more) children
    closed: Tensor  # [B, M] bool; no path enters it any more

    @staticmethod
    def empty(batch: int, capacity: int, device: torch.device | str = "cpu") -> "SearchTrees":
        """``batch`` trees of a root each, with room for ``capacity`` nodes."""
        if batch < 0 or capacity < 1:
            raise ValueError(f"batch and capacity are {batch} and {capacity}; they should be at least 0 and 1")

        def full(fill: float | int, dtype: torch.dtype) -> Tensor:
            return torch.full((batch, capacity), fill, dtype=dtype, device=device)

        ids, reals = torch.int64, torch.float32
        trees = SearchTrees(
            size=torch.ones(batch, dtype=ids, device=device),
            parent=full(NO_PARENT, ids),
            first_child=full(UNVISITED, ids),
            next_sibling=full(UNVISITED, ids),
            depth=full(0, ids),
            visits=full(0, ids),
            pending=full(0, ids),
            q=full(0, reals),
            value=full(0, reals),
            reward=full(0, reals),
            prior=full(1, reals),
            expandable=full(0, torch.bool),
            closed=full(0, torch.bool),
        )
        trees.expandable[:, ROOT] = True
        return trees

    @property
    def batch(self) -> int:
        return self.parent.shape[0]

    @property
    def capacity(self) -> int:
        return self.parent.shape[1]

    def grown(self, capacity: int) -> "SearchTrees":
        """A copy with room for ``capacity`` nodes, at least as many as now."""
        if capacity < self.capacity:
            raise ValueError(f"capacity is {capacity}; it should be at least {self.capacity}, what the trees have")
        wider = SearchTrees.empty(self.batch, capacity, self.parent.device)
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(wider, field.name)
            if old.dim() == 1:
                new.copy_(old)
            else:
                new[:, : self.capacity] = old
        return wider

    def to(self, device: torch.device | str) -> "SearchTrees":
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def used(self) -> Tensor:
        """[B, M] bool: slots that hold a node."""
        return torch.arange(self.capacity, device=self.size.device) < self.size[:, None]

    def add(
        self,
        tree: Tensor,  # [C] int64, ascending
        parent: Tensor,  # [C] int64; children of one parent stand together
        *,
        q: Tensor,  # [C]
        value: Tensor,  # [C]
        reward: Tensor,  # [C]
        prior: Tensor,  # [C]
        expandable: Tensor,  # [C] bool
        closed: Tensor,  # [C] bool
    ) -> Tensor:
        """Appends C nodes; returns their ids [C] int64. One vectorised pass, whatever the trees.

        Raises ValueError, before anything is changed, for trees out of order, children of one parent apart from each
        other, parents that are not there, and a tree without room.
        """
        if tree.numel() == 0:
            return tree.new_empty(0)
        counts = torch.bincount(tree, minlength=self.batch)  # [B]
        self._check_new(tree, parent, counts)
        before = counts.cumsum(0) - counts  # [B] new nodes of earlier trees
        ids = self.size[tree] + torch.arange(tree.shape[0], device=tree.device) - before[tree]  # [C]
        same = (tree[1:] == tree[:-1]) & (parent[1:] == parent[:-1])  # [C-1] siblings of the one before
        first = torch.cat((same.new_ones(1), ~same))  # [C]
        self._link_first(tree[first], parent[first], ids[first])
        self.next_sibling[tree[1:][same], ids[:-1][same]] = ids[1:][same]
        self.parent[tree, ids] = parent
        self.depth[tree, ids] = self.depth[tree, parent] + 1
        columns = {"q": q, "value": value, "reward": reward, "prior": prior, "expandable": expandable, "closed": closed}
        for name, column in columns.items():
            target = getattr(self, name)
            target[tree, ids] = column.to(target.dtype)
        self.size.add_(counts)
        return ids

    def _check_new(self, tree: Tensor, parent: Tensor, counts: Tensor) -> None:
        if (tree[1:] < tree[:-1]).any():
            raise ValueError("tree is out of order; new nodes should come tree by tree")
        if ((parent < 0) | (parent >= self.size[tree])).any():
            raise ValueError("parent names a node that is not in its tree")
        full = (self.size + counts > self.capacity).nonzero()
        if full.numel():
            b = int(full[0])
            raise ValueError(
                f"tree {b} has {int(self.size[b])} nodes and gets {int(counts[b])}; its room is {self.capacity}"
            )
        runs = torch.unique_consecutive(tree * self.capacity + parent)
        if runs.shape[0] != runs.unique().shape[0]:
            raise ValueError("parent: the new children of a node should stand together")

    def _link_first(self, tree: Tensor, parent: Tensor, ids: Tensor) -> None:
        """Makes ``ids`` [R] the next child of ``parent`` [R]: the first one, or behind its last."""
        last = self.first_child[tree, parent]  # [R]
        new = last == UNVISITED
        self.first_child[tree[new], parent[new]] = ids[new]
        tree, last, ids = tree[~new], last[~new], ids[~new]
        while (after := self.next_sibling[tree, last]).ne(UNVISITED).any():
            last = torch.where(after == UNVISITED, last, after)
        self.next_sibling[tree, last] = ids
