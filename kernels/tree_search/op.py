"""``tree_search``: schemas, backends and the public functions. README.md says how the rules of the papers fit in.

B trees, M nodes of room in each, W leaves that a tree gives to a wave. Trees are changed in place.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from fastpo.dispatch import Backend, Extension, Op, always, triton_missing
from fastpo.kernels.tree_search import reference
from fastpo.kernels.tree_search.records import (
    BACKUPS,
    FORMS,
    SCOPES,
    UNVISITED_RULES,
    BackupRule,
    SearchTrees,
    SelectRule,
)

# Every backend has select, backup and process_values with the signatures of reference.py.

_library = torch.library.Library("fastpo_c", "FRAGMENT")
_library.define(
    """tree_select(Tensor parent, Tensor first_child, Tensor next_sibling, Tensor visits, Tensor(a!) pending, Tensor q,
Tensor prior, Tensor expandable, Tensor closed, Tensor size, Tensor? start, int form, float c, int unvisited,
float bonus, bool use_prior, bool frontier, float virtual_loss, Tensor(b!) leaves) -> ()"""
)
_library.define(
    """tree_backup(Tensor parent, Tensor first_child, Tensor next_sibling, Tensor(a!) visits, Tensor(b!) pending,
Tensor(c!) q, Tensor reward, Tensor expandable, Tensor(d!) closed, Tensor leaves, Tensor values, int kind, float gamma,
float min_visits, bool use_rewards, float mix, bool close) -> ()"""
)
_library.define(
    """tree_process_values(Tensor parent, Tensor size, Tensor signs, Tensor distances, Tensor(a!) values) -> ()"""
)
_OPS = ("tree_select", "tree_backup", "tree_process_values")
_compiled = SimpleNamespace(
    select=torch.ops.fastpo_c.tree_select,
    backup=torch.ops.fastpo_c.tree_backup,
    process_values=torch.ops.fastpo_c.tree_process_values,
)


class _Triton:
    """Imports the kernels when they first run: triton is not installed everywhere."""

    @staticmethod
    def select(*args) -> None:
        from fastpo.kernels.tree_search import triton_kernels

        triton_kernels.select(*args)

    @staticmethod
    def backup(*args) -> None:
        from fastpo.kernels.tree_search import triton_kernels

        triton_kernels.backup(*args)

    @staticmethod
    def process_values(*args) -> None:
        from fastpo.kernels.tree_search import triton_kernels

        triton_kernels.process_values(*args)


OP = Op(
    "tree_search",
    [
        Backend("triton", "cuda", triton_missing, always, _Triton),
        Backend("cpu", "cpu", Extension("_C", _OPS), always, _compiled),
        Backend("torch", "any", always, always, reference),
    ],
)


@torch.library.custom_op("fastpo::tree_select", mutates_args={"pending"})
def _select_op(
    parent: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    visits: Tensor,
    pending: Tensor,
    q: Tensor,
    prior: Tensor,
    expandable: Tensor,
    closed: Tensor,
    size: Tensor,
    start: Tensor | None,
    form: int,
    c: float,
    unvisited: int,
    bonus: float,
    use_prior: bool,
    frontier: bool,
    virtual_loss: float,
    count: int,
) -> Tensor:
    leaves = torch.empty(parent.shape[0], count, dtype=torch.int64, device=parent.device)
    trees = (parent, first_child, next_sibling, visits, pending, q, prior, expandable, closed, size, start)
    rule = (form, c, unvisited, bonus, use_prior, frontier, virtual_loss)
    OP.pick(parent.device).impl.select(*trees, *rule, leaves)
    return leaves


@_select_op.register_fake
def _(parent, *args):
    return torch.empty(parent.shape[0], args[-1], dtype=torch.int64, device=parent.device)


@torch.library.custom_op("fastpo::tree_backup", mutates_args={"visits", "pending", "q", "closed"})
def _backup_op(
    parent: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    visits: Tensor,
    pending: Tensor,
    q: Tensor,
    reward: Tensor,
    expandable: Tensor,
    closed: Tensor,
    leaves: Tensor,
    values: Tensor,
    kind: int,
    gamma: float,
    min_visits: float,
    use_rewards: bool,
    mix: float,
    close: bool,
) -> None:
    trees = (parent, first_child, next_sibling, visits, pending, q, reward, expandable, closed)
    rule = (kind, gamma, min_visits, use_rewards, mix, close)
    OP.pick(parent.device).impl.backup(*trees, leaves, values, *rule)


@_backup_op.register_fake
def _(*args):
    return None


@torch.library.custom_op("fastpo::tree_process_values", mutates_args=())
def _process_values_op(parent: Tensor, size: Tensor, signs: Tensor, distances: Tensor) -> Tensor:
    values = torch.empty(parent.shape, dtype=torch.float32, device=parent.device)
    OP.pick(parent.device).impl.process_values(parent, size, signs, distances, values)
    return values


@_process_values_op.register_fake
def _(parent, size, signs, distances):
    return torch.empty(parent.shape, dtype=torch.float32, device=parent.device)


def select(trees: SearchTrees, rule: SelectRule, count: int = 1, start: Tensor | None = None) -> Tensor:
    """The leaves [B, count] int64 that each tree gives to the next wave; UNVISITED where it has no (other) one.

    For one tree and one leaf, with ``score`` = Q + c p U as ``SelectRule`` has it::

        node = start or ROOT                                     # scope "path"; UNVISITED if it is closed
        while not expandable[node] and node has children:
            node = max((i for i in children(node) if not closed[i]), key=score)    # ties: the lowest
        pending[node and all above it] += 1

    and with scope ``frontier`` the node is ``max(i for i in range(size) if expandable[i] and not closed[i],
    key=score)`` (the root counts as its own parent). The second leaf of a tree is found with the first one pending, and
    so on. A path that ends in a leaf that the tree already gives makes UNVISITED and leaves no trace. Scores that are
    NaN are never taken.

    Args:
        trees: changed in place: ``pending`` counts the visits under way until ``backup`` returns them.
        count: leaves per tree and wave.
        start: [B] int64, where paths begin; the root where absent.

    Raises ValueError, one line that names the argument. Cost: on a CPU, threads over trees, the nodes along the paths
    and their siblings are read, nothing else (``frontier``: the whole tree); no copies. On a GPU one program per tree.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it should be 1 or more")
    if start is not None and start.shape != (trees.batch,):
        raise ValueError(f"start has shape {tuple(start.shape)}; it should be ({trees.batch},)")
    return _select_op(
        trees.parent,
        trees.first_child,
        trees.next_sibling,
        trees.visits,
        trees.pending,
        trees.q,
        trees.prior,
        trees.expandable,
        trees.closed,
        trees.size,
        start,
        FORMS.index(rule.form),
        rule.c,
        UNVISITED_RULES.index(rule.unvisited),
        rule.bonus,
        rule.prior,
        rule.scope == SCOPES[1],
        rule.virtual_loss,
        count,
    )


def backup(
    trees: SearchTrees,
    leaves: Tensor,  # [B, W] int64
    values: Tensor,  # [B, W]
    rule: BackupRule,
    rollouts: Tensor | None = None,  # [B, W]
) -> None:
    """Passes the value of each leaf up to the root of its tree, by ``rule``, in place: visits, pending, q, closed.

    For one leaf, first of all leaves ``leaves[:, 0]``, then the next column (BackupRule says what Q becomes)::

        x = value, or (1 - rollout_mix) value + rollout_mix rollout
        for node in (leaf, its parent, ..., root):
            visits[node] += 1;  pending[node] = max(0, pending[node] - 1);  q[node] = ...
        for node in the same path, with rule.close:
            closed[node] |= it has children, all of them closed, and is not expandable

    Means are taken in float64 and stored in float32. ``leaves`` may hold UNVISITED: nothing happens there. Nodes added
    below a leaf since it was selected count as its children.

    Raises ValueError, one line that names the argument. Cost: as ``select``; ``children`` and ``max_mix`` read the
    children of every node of the path, ``mean`` the path alone.
    """
    if leaves.dim() != 2 or leaves.shape[0] != trees.batch:
        raise ValueError(f"leaves has shape {tuple(leaves.shape)}; it should be ({trees.batch}, leaves per tree)")
    for name, tensor in (("values", values), ("rollouts", rollouts)):
        if tensor is not None and tensor.shape != leaves.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be {tuple(leaves.shape)}, as leaves")
    if (rollouts is None) != (rule.rollout_mix == 0):
        state = "given" if rollouts is not None else "missing"
        raise ValueError(f"rollouts is {state} and rollout_mix is {rule.rollout_mix}; they should go together")
    if rollouts is not None:
        values = (1 - rule.rollout_mix) * values + rule.rollout_mix * rollouts
    _backup_op(
        trees.parent,
        trees.first_child,
        trees.next_sibling,
        trees.visits,
        trees.pending,
        trees.q,
        trees.reward,
        trees.expandable,
        trees.closed,
        leaves.contiguous(),
        values.to(torch.float32).contiguous(),
        BACKUPS.index(rule.kind),
        rule.gamma,
        rule.min_visits,
        rule.rewards,
        rule.mix,
        rule.close,
    )


def process_values(trees: SearchTrees, signs: Tensor, distances: Tensor) -> Tensor:
    """[B, M] float32: values of partial solutions from the quality of their steps, from the root down.

    ``V_0 = 0`` at the root, ``V_k = max(0, V_{k-1} + sign_k (1 - V_{k-1}) / m_k)``: a good step (sign 1) closes the
    m-th part of the gap to 1, a bad one (-1) goes back as far. 0 in unused slots. ReST-MCTS* (Zhang et al. 2024),
    equations 1 and 2.

    Args:
        signs: [B, M], 1 or -1 (0: no step).
        distances: [B, M], m: steps from the parent to the end of the best solution through the node, at least 1.

    Raises ValueError for wrong shapes. Cost: each node once.
    """
    for name, tensor in (("signs", signs), ("distances", distances)):
        if tensor.shape != trees.parent.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be {tuple(trees.parent.shape)}")
    signs, distances = (x.to(torch.float32).contiguous() for x in (signs, distances))
    return _process_values_op(trees.parent, trees.size, signs, distances)
