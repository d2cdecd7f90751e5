"""What csrc/host computes, in plain Python: for where it is not built, and for its tests. Same names, same results."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["Trie", "cut", "first_fit_decreasing", "sequence_nodes", "trained_nodes"]  # of fastpo._host too
Ids = np.ndarray | Sequence[int]  # int64


class Trie:
    """A trie over token ids that grows by appending; nodes are numbered as they are inserted."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._children: list[list[int]] = [[]]  # of node i at i + 1, the roots at 0
        self._edges: dict[tuple[int, int], int] = {}  # (parent, token) -> node

    def __len__(self) -> int:
        return len(self._tokens)

    def insert(self, tokens: Ids, from_node: int = -1) -> int:
        """The node of the last token below ``from_node`` (-1: a root); ``from_node`` itself if there is none."""
        if not -1 <= from_node < len(self):
            raise ValueError(f"from_node is {from_node}; it should be -1 or a node below {len(self)}")
        node = from_node
        for token in map(int, tokens):
            found = self._edges.get((node, token))
            node = self._add(node, token) if found is None else found
        return node

    def insert_all(self, tokens: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        """``insert`` of ``tokens[cu_seqlens[s]:cu_seqlens[s+1]]`` for every s. [S]"""
        bounds = cu_seqlens.tolist()
        ids = tokens.tolist()
        return _array([self.insert(ids[a:b]) for a, b in pairwise(bounds)])

    def _add(self, parent: int, token: int) -> int:
        node = len(self)
        self._tokens.append(token)
        self._parents.append(parent)
        self._children.append([])
        self._children[parent + 1].append(node)
        self._edges[parent, token] = node
        return node

    def preorder(self) -> dict[str, np.ndarray]:
        """tokens, parent, depth, subtree_end [N] in preorder, and position: node -> preorder index."""
        n = len(self)
        position, parent, depth, end = [-1] * n, [-1] * n, [0] * n, [0] * n
        order: list[int] = []
        stack = self._children[0][::-1]
        while stack:
            node = stack.pop()
            position[node] = i = len(order)
            order.append(node)
            if self._parents[node] >= 0:
                parent[i] = position[self._parents[node]]
                depth[i] = depth[parent[i]] + 1
            stack += self._children[node + 1][::-1]
        for i in reversed(range(n)):
            end[i] = max(end[i], i + 1)
            if parent[i] >= 0:
                end[parent[i]] = max(end[parent[i]], end[i])
        tokens = [self._tokens[node] for node in order]
        columns = {"tokens": tokens, "parent": parent, "depth": depth, "subtree_end": end, "position": position}
        return {name: _array(column) for name, column in columns.items()}


def first_fit_decreasing(lengths: Ids, budget: int) -> np.ndarray:
    """Bin of each item [n]: longest first, each into the first bin with room."""
    bins: list[int] = []  # free space
    assigned = [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 0 <= lengths[i] <= budget:
            raise ValueError(f"lengths[{i}] is {lengths[i]}; it should be between 0 and the budget, {budget}")
        b = next((b for b, free in enumerate(bins) if free >= lengths[i]), len(bins))
        bins += [budget] * (b == len(bins))
        bins[b] -= int(lengths[i])
        assigned[i] = b
    return _array(assigned)


def sequence_nodes(
    parent: np.ndarray, depth: np.ndarray, subtree_end: np.ndarray, leaves: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(nodes [T], cu_seqlens [S+1]): the nodes of each sequence from depth ``starts`` on."""
    up, nodes, cu_seqlens = parent.tolist(), [], [0]
    for leaf, start, last in zip(leaves.tolist(), starts.tolist(), depth[leaves].tolist(), strict=True):
        path = []
        for _ in range(start, last + 1):
            path.append(leaf)
            leaf = up[leaf]
        nodes += path[::-1]
        cu_seqlens.append(len(nodes))
    return _array(nodes), _array(cu_seqlens)


def trained_nodes(*tree: np.ndarray) -> np.ndarray:
    """The nodes in ``sequence_nodes``, once each, ascending. [M]"""
    return np.unique(sequence_nodes(*tree)[0])


def cut(parent: np.ndarray, depth: np.ndarray, subtree_end: np.ndarray, budget: int) -> np.ndarray:
    """[pieces, 2] (first, end): the path to ``first`` and ``first:end``. See csrc/host/tree.h."""
    if len(depth) and depth.max() >= budget:
        long = int(depth[depth >= budget][0]) + 1
        raise ValueError(f"budget is {budget}; it should be at least {long}, the length of a path")
    childless = np.flatnonzero(subtree_end == np.arange(len(parent)) + 1)
    path = (depth[childless] + 1).tolist()
    shared = (depth[childless] + 1 - np.diff(childless, prepend=-1)).tolist()
    tips = childless.tolist()
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # of the first b tips: nodes in two pieces, pieces, last one's start
    for b, tip in enumerate(tips):
        options = []
        for a in range(b, -1, -1):
            if tip - tips[a] >= budget:
                break
            if tip - tips[a] + path[a] <= budget:
                options.append((best[a][0] + shared[a], best[a][1] + 1, -a))
        replicated, pieces, start = min(options)
        best.append((replicated, pieces, -start))
    bounds, b = [], len(tips)
    while b > 0:
        a = best[b][2]
        bounds.append((tips[a], tips[b - 1] + 1))
        b = a
    return _array(bounds[::-1]).reshape(-1, 2)


def _array(values: Sequence) -> np.ndarray:
    return np.array(values, dtype=np.int64)
