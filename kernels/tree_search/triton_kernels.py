"""tree_search in Triton: ``select``, ``backup`` and ``process_values`` with the signatures of reference.py.

A program is a tree, of one warp: thousands of trees hide the latency of each one's chain of loads. All arithmetic of
scores and means is fp64, as in the reference. Nothing syncs with the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.aot import AotConfig

from .records import BACKUPS, FORMS, UNVISITED_RULES

NONE_, PUCT, UCB1, UCT, MUZERO, MC_NEST = (tl.constexpr(i) for i in range(len(FORMS)))
FORMULA, BONUS, FIRST = (tl.constexpr(i) for i in range(len(UNVISITED_RULES)))
MEAN, CHILDREN, MAX_MIX = (tl.constexpr(i) for i in range(len(BACKUPS)))
BLOCK = 256  # nodes that ``frontier`` looks at at once
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _score(node, parent_visits, mask, visits, pending, q, prior, c, bonus, virtual_loss, FORM: tl.constexpr,
           UNVISITED_RULE: tl.constexpr, USE_PRIOR: tl.constexpr):  # fmt: skip
    """Q + c p U of the nodes ``node`` (a scalar or a block), fp64; ``parent_visits`` as there."""
    done = tl.load(visits + node, mask=mask, other=0).to(tl.float64)
    waiting = tl.load(pending + node, mask=mask, other=0).to(tl.float64)
    total = done + waiting
    found = tl.load(q + node, mask=mask, other=0.0).to(tl.float64)
    found -= virtual_loss * waiting / (tl.maximum(done, 1.0) + waiting)
    log = tl.log(tl.maximum(parent_visits, 1.0))
    u = tl.zeros_like(total)
    if FORM == PUCT:
        u = c * tl.sqrt(parent_visits) / (1.0 + total)
    elif FORM == MUZERO:
        u = (c + tl.log((parent_visits + 19653.0) / 19652.0)) * tl.sqrt(parent_visits) / (1.0 + total)
    elif FORM == UCB1:
        u = c * tl.sqrt(2.0 * log / tl.maximum(total, 1.0))
    elif FORM == UCT:
        u = c * tl.sqrt(log / tl.maximum(total, 1.0))
    elif FORM == MC_NEST:
        u = c * tl.sqrt((log + 1.0) / (total + 1e-10))
    if USE_PRIOR:
        u *= tl.load(prior + node, mask=mask, other=0.0).to(tl.float64)
    if UNVISITED_RULE == BONUS:
        u = tl.where(total == 0.0, bonus, u)
    elif UNVISITED_RULE == FIRST:
        u = tl.where(total == 0.0, INFINITY, u)
    return found + u


@triton.jit
def _totals(visits, pending, node, mask):
    return (tl.load(visits + node, mask=mask, other=1) + tl.load(pending + node, mask=mask, other=0)).to(tl.float64)


@triton.jit(do_not_specialize=["num_nodes", "count"])
def select_kernel(
    parent, first_child, next_sibling, visits, pending, q, prior, expandable, closed,  # [B, M]
    size,  # [B]
    start,  # [B] or None
    leaves,  # [B, W]
    num_nodes, count, c, bonus, virtual_loss,
    FORM: tl.constexpr,
    UNVISITED_RULE: tl.constexpr,
    USE_PRIOR: tl.constexpr,
    FRONTIER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tree = tl.program_id(0).to(tl.int64)
    at = tree * num_nodes
    parent += at
    first_child += at
    next_sibling += at
    visits += at
    pending += at
    q += at
    prior += at
    expandable += at
    closed += at
    leaves += tree * count
    for w in range(count):
        leaf = tl.full([], -1, tl.int64)
        if FRONTIER:
            used = tl.load(size + tree)
            best = tl.full([], -INFINITY, tl.float64)
            for first in range(0, used, BLOCK):
                node = first + tl.arange(0, BLOCK).to(tl.int64)
                there = node < used
                there = there & (tl.load(expandable + node, mask=there, other=0).to(tl.int32) != 0)
                there = there & (tl.load(closed + node, mask=there, other=1).to(tl.int32) == 0)
                for taken in range(w):
                    there = there & (node != tl.load(leaves + taken))
                above = tl.load(parent + node, mask=there, other=0)
                above = tl.where(above < 0, node, above)
                n = _totals(visits, pending, above, there)
                score = _score(node, n, there, visits, pending, q, prior, c, bonus, virtual_loss, FORM, UNVISITED_RULE,
                               USE_PRIOR)  # fmt: skip
                score = tl.where(there & (score == score), score, -INFINITY)
                top = tl.max(score, 0)
                lowest = tl.min(tl.where(score == top, node, num_nodes), 0).to(tl.int64)
                better = top > best
                leaf = tl.where(better, lowest, leaf)
                best = tl.where(better, top, best)
        else:
            node = tl.full([], 0, tl.int64)
            if start is not None:
                node = tl.load(start + tree)
            going = tl.load(closed + node).to(tl.int32) == 0
            while going:
                child = tl.load(first_child + node)
                if (tl.load(expandable + node).to(tl.int32) != 0) | (child < 0):
                    leaf = node
                    going = False
                else:
                    n = _totals(visits, pending, node, True)
                    node = tl.full([], -1, tl.int64)
                    best = tl.full([], -INFINITY, tl.float64)
                    while child >= 0:
                        score = _score(child, n, True, visits, pending, q, prior, c, bonus, virtual_loss, FORM,
                                       UNVISITED_RULE, USE_PRIOR)  # fmt: skip
                        better = (score > best) & (tl.load(closed + child).to(tl.int32) == 0)
                        node = tl.where(better, child, node)
                        best = tl.where(better, score, best)
                        child = tl.load(next_sibling + child)
                    going = node >= 0
        for taken in range(w):
            leaf = tl.where(tl.load(leaves + taken) == leaf, tl.full([], -1, tl.int64), leaf)
        tl.store(leaves + w, leaf)
        node = leaf
        while node >= 0:
            tl.store(pending + node, tl.load(pending + node) + 1)
            node = tl.load(parent + node)
        tl.debug_barrier()  # the next leaf reads what was just stored


@triton.jit(do_not_specialize=["num_nodes", "count"])
def backup_kernel(
    parent, first_child, next_sibling, visits, pending, q, reward, expandable, closed,  # [B, M]
    leaves, values,  # [B, W]
    num_nodes, count, gamma, min_visits, mix,
    KIND: tl.constexpr,
    REWARDS: tl.constexpr,
    CLOSE: tl.constexpr,
):  # fmt: skip
    tree = tl.program_id(0).to(tl.int64)
    at = tree * num_nodes
    parent += at
    first_child += at
    next_sibling += at
    visits += at
    pending += at
    q += at
    reward += at
    expandable += at
    closed += at
    for w in range(count):
        leaf = tl.load(leaves + tree * count + w)
        x = tl.load(values + tree * count + w).to(tl.float64)
        node = leaf
        while node >= 0:
            n = tl.load(visits + node) + 1
            tl.store(visits + node, n)
            tl.store(pending + node, tl.maximum(tl.load(pending + node) - 1, 0))
            old = tl.load(q + node).to(tl.float64)
            new = old
            if KIND == MEAN:
                new = tl.where(n == 1, x, old + (x - old) / n.to(tl.float64))
            else:
                child = tl.load(first_child + node)
                alone = child < 0
                total = tl.full([], 0.0, tl.float64)
                weighted = tl.full([], 0.0, tl.float64)
                best = tl.full([], -INFINITY, tl.float64)
                while child >= 0:
                    found = tl.load(q + child).to(tl.float64)
                    weight = tl.maximum(tl.load(visits + child).to(tl.float64), min_visits)
                    total += weight
                    weighted += weight * found
                    best = tl.maximum(best, found)
                    child = tl.load(next_sibling + child)
                if KIND == CHILDREN:
                    v = tl.where(total > 0.0, weighted / tl.where(total > 0.0, total, 1.0), x)
                    r = tl.full([], 0.0, tl.float64)
                    if REWARDS:
                        r = tl.load(reward + node).to(tl.float64)
                    new = tl.where((total > 0.0) | (node == leaf), r + gamma * v, old)
                else:
                    mixed = (1.0 - mix) * old + mix * best
                    new = tl.where(alone, tl.where(node == leaf, x, old), mixed)
            tl.store(q + node, new.to(tl.float32))
            tl.debug_barrier()  # its parent reads what was just stored
            node = tl.load(parent + node)
        if CLOSE:
            node = leaf
            while node >= 0:
                child = tl.load(first_child + node)
                done = (child >= 0) & (tl.load(expandable + node).to(tl.int32) == 0)
                while child >= 0:
                    done = done & (tl.load(closed + child).to(tl.int32) != 0)
                    child = tl.load(next_sibling + child)
                done = done | (tl.load(closed + node).to(tl.int32) != 0)
                tl.store(closed + node, done)
                tl.debug_barrier()
                node = tl.where(done, tl.load(parent + node), tl.full([], -1, tl.int64))


@triton.jit(do_not_specialize=["num_nodes"])
def process_values_kernel(parent, size, signs, distances, values, num_nodes, BLOCK: tl.constexpr):
    tree = tl.program_id(0).to(tl.int64)
    at = tree * num_nodes
    used = tl.load(size + tree)
    for first in range(0, num_nodes, BLOCK):  # the root, and what holds no node
        node = first + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(
            values + at + node, tl.zeros([BLOCK], tl.float32), mask=(node < num_nodes) & ((node >= used) | (node == 0))
        )
    tl.debug_barrier()
    for i in range(1, used):
        above = tl.load(values + at + tl.load(parent + at + i)).to(tl.float64)
        step = tl.load(signs + at + i).to(tl.float64) / tl.load(distances + at + i).to(tl.float64)
        tl.store(values + at + i, tl.maximum(above + step * (1.0 - above), 0.0).to(tl.float32))
        tl.debug_barrier()


def select(
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
    leaves: Tensor,
) -> None:
    if parent.shape[0] == 0:
        return
    with torch.cuda.device_of(parent):
        select_kernel[(parent.shape[0],)](
            parent, first_child, next_sibling, visits, pending, q, prior, expandable, closed, size, start, leaves,
            parent.shape[1], leaves.shape[1], c, bonus, virtual_loss, FORM=form, UNVISITED_RULE=unvisited,
            USE_PRIOR=use_prior, FRONTIER=frontier, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip


def backup(
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
    if parent.shape[0] == 0:
        return
    with torch.cuda.device_of(parent):
        backup_kernel[(parent.shape[0],)](
            parent, first_child, next_sibling, visits, pending, q, reward, expandable, closed, leaves, values,
            parent.shape[1], leaves.shape[1], gamma, min_visits, mix, KIND=kind, REWARDS=use_rewards, CLOSE=close,
            num_warps=1,
        )  # fmt: skip


def process_values(parent: Tensor, size: Tensor, signs: Tensor, distances: Tensor, values: Tensor) -> None:
    if parent.shape[0] == 0:
        return
    with torch.cuda.device_of(parent):
        process_values_kernel[(parent.shape[0],)](
            parent, size, signs, distances, values, parent.shape[1], BLOCK=BLOCK, num_warps=1
        )


_TYPES = {
    **dict.fromkeys(("parent", "first_child", "next_sibling", "visits", "pending", "size", "start", "leaves"), "*i64"),
    **dict.fromkeys(("q", "prior", "reward", "values", "signs", "distances"), "*fp32"),
    **dict.fromkeys(("expandable", "closed"), "*i1"),
    **dict.fromkeys(("num_nodes", "count"), "i32"),
    **dict.fromkeys(("c", "bonus", "virtual_loss", "gamma", "min_visits", "mix"), "fp32"),
}


def _aot(kernel: "triton.JITFunction", label: str, **constants: object) -> AotConfig:
    signature = {name: _TYPES[name] for name in kernel.arg_names if name not in constants}
    return AotConfig(label, kernel, signature, constants, num_warps=1)


AOT = [
    *(
        _aot(
            select_kernel,
            f"{name}, {'frontier' if frontier else 'path'}",
            **({} if frontier else {"start": None}),
            FORM=form,
            UNVISITED_RULE=1 if name in ("ucb1", "uct") else 0,
            USE_PRIOR=name == "puct",
            FRONTIER=frontier,
            BLOCK=BLOCK,
        )
        for form, name in enumerate(FORMS)
        for frontier in (False, True)
    ),
    *(
        _aot(backup_kernel, name, KIND=kind, REWARDS=name == "children", CLOSE=True)
        for kind, name in enumerate(BACKUPS)
    ),
    _aot(process_values_kernel, "", BLOCK=BLOCK),
]
