"""Token sequences -> ``TokenTree`` -> ``PackedTrees``: every distinct prefix once, in preorder, in rows of a budget.

::

    tree = build_tree([[1, 5, 7, 8], [1, 5, 9], [1, 5, 7, 8, 2]], starts=2)  # prompts of two tokens
    tree.tokens                                         # 1 5 7 8 2 9
    nodes, cu_seqlens = sequence_nodes(tree)            # 2 3 | 5 | 2 3 4
    logps = node_logps[nodes]                           # what preference_loss takes, with Segments(cu_seqlens)

Tokens are taken as given. A tokenizer that merges across the border of prompt and response gives a response a prompt of
its own; such sequences share what is equal token by token, never text.

The work is integers on the CPU, in csrc/host (in plain Python, with a warning, where that is not built); the records
move to a GPU by ``to``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpo.errors import FastpoError
from fastpo.host import host
from fastpo.types import PackedTrees, TokenTree

TokenIds = Sequence[int] | Tensor | np.ndarray


def build_tree(sequences: Sequence[TokenIds], starts: int | Sequence[int] | Tensor) -> TokenTree:
    """The forest of all prefixes of ``sequences``: S sequences of token ids, prompt and response.

    ``starts`` [S], or one number for all: the length of a sequence's prompt, so the depth of its first token that
    counts. ``leaves[s]`` and ``starts[s]`` are those of ``sequences[s]``; siblings stand in the order of their first
    appearance. Equal sequences are legal (they share a leaf: what a loss weighs them by adds up there), so is one that
    is a prefix of another.

    Raises FastpoError, before any work, for an empty sequence, ids that are negative or no integers, a start below 1
    (the first token of a sequence is predicted by nothing) or beyond the last token.

    Cost: O(tokens), some 25 ns a token (``benchmarks/tree_host.py``).
    """
    tokens, cu_seqlens = _flat(sequences)
    start_of = _starts(starts, np.diff(cu_seqlens), "sequences")
    trie = host().Trie()
    last = trie.insert_all(tokens, cu_seqlens)
    return _snapshot(trie.preorder(), last, start_of)


class TreeBuilder:
    """A tree that grows below its nodes, as a search expands it. Node ids stay what they are.

    ::

        builder = TreeBuilder()
        root = builder.append(prompt_ids)
        steps = [builder.append(ids, below=root) for ids in sampled]
        tree, position = builder.snapshot(leaves=steps, starts=len(prompt_ids))
    """

    def __init__(self) -> None:
        self._trie = host().Trie()

    def __len__(self) -> int:
        return len(self._trie)

    def append(self, tokens: TokenIds, below: int = -1) -> int:
        """The node of the last of ``tokens`` [n] in the tree below node ``below`` (-1: from a root); what is there
        already is shared. O(n)."""
        if not -1 <= below < len(self):
            raise FastpoError(f"below is {below}; it should be -1 or a node below {len(self)}")
        return int(self._trie.insert(_ids(tokens, "tokens"), below))

    def snapshot(
        self, leaves: Sequence[int] | Tensor = (), starts: int | Sequence[int] | Tensor = ()
    ) -> tuple[TokenTree, Tensor]:
        """The tree as it is, and ``position`` [nodes] int64: node id -> index in the tree's preorder. O(nodes).

        ``leaves`` [S] are ids of nodes where a sequence ends, ``starts`` as in ``build_tree``.
        """
        order = self._trie.preorder()
        last = _ids(leaves, "leaves", allow_empty=True)
        if last.size and last.max() >= len(self):
            raise FastpoError(f"leaves holds {last.max()}; it should hold nodes below {len(self)}")
        start_of = _starts(starts, order["depth"][order["position"][last]] + 1, "leaves")
        return _snapshot(order, last, start_of), torch.from_numpy(order["position"])


def check_tree(tree: TokenTree, name: str = "tree") -> TokenTree:
    """``tree``, or a FastpoError that says what is wrong with a tree made by hand: O(N), reads it on the CPU.

    ``name`` is what the error calls it.
    """
    if not isinstance(tree, TokenTree):
        raise FastpoError(f"{name} is a {type(tree).__name__}; it should be a TokenTree")
    for field in _Part._fields:
        value, length = getattr(tree, field), tree.num_sequences if field in ("leaves", "starts") else tree.num_nodes
        if value.dtype != torch.int64 or value.shape != (length,):
            shape = list(value.shape)
            raise FastpoError(f"{name}.{field} is {value.dtype} of shape {shape}; it should be torch.int64 [{length}]")
    tokens, parent, depth, end, leaves, starts = _part(tree)
    n, index = len(tokens), np.arange(len(tokens))

    def demand(good: np.ndarray, values: np.ndarray, field: str, wanted: str) -> None:
        bad = np.flatnonzero(~good)
        if bad.size:
            raise FastpoError(f"{name}.{field}[{bad[0]}] is {values[bad[0]]}; it should be {wanted}")

    demand(tokens >= 0, tokens, "tokens", "at least 0")
    demand((parent >= -1) & (parent < index), parent, "parent", "-1, or a node before its child (no cycles)")
    above = np.where(parent < 0, index, parent)  # roots stand for their own parents
    expected = np.where(parent < 0, 0, depth[above] + 1)
    demand(depth == expected, depth, "depth", "the parent's plus one, 0 at a root")
    inside = (end > index) & (end <= n) & (end <= end[above])
    demand(inside, end, "subtree_end", f"behind the node, at most {n}, and at most the parent's")
    around = index + 1 - np.cumsum(np.bincount(end, minlength=n + 1))[:n]  # subtrees that hold a node
    good = (index < end[above]) & (around == depth + 1)
    demand(good, parent, "parent", "the last node whose subtree holds the child")
    demand((leaves >= 0) & (leaves < n), leaves, "leaves", f"a node, below {n}")
    demand((starts >= 1) & (starts <= depth[leaves]), starts, "starts", "at least 1 and at most the depth of its leaf")
    return tree


def sequence_nodes(tree: TokenTree) -> tuple[Tensor, Tensor]:
    """The counted tokens of each sequence, in order: ``(nodes [T] int64, cu_seqlens [S+1] int64)``.

    ``node_logps[nodes]`` with ``Segments(cu_seqlens)`` is what ``preference_loss`` takes; weights and masks per token
    are those of each sequence. O(T) on the CPU.
    """
    part = _part(tree)
    nodes, cu_seqlens = host().sequence_nodes(*part.shape, part.leaves, part.starts)
    return torch.from_numpy(nodes).to(tree.tokens.device), torch.from_numpy(cu_seqlens).to(tree.tokens.device)


def trained_nodes(tree: TokenTree) -> Tensor:
    """[M] int64, the nodes of ``sequence_nodes`` once each, ascending: what the LM head has to score.

    Node i is predicted at ``tree.parent[i]``; several nodes may have one predictor. O(N + S) on the CPU.
    """
    part = _part(tree)
    nodes = host().trained_nodes(*part.shape, part.leaves, part.starts)
    return torch.from_numpy(nodes).to(tree.tokens.device)


def join(trees: Sequence[TokenTree]) -> TokenTree:
    """One forest of ``trees``, one behind the other; nothing is merged. Nodes and sequences are numbered through."""
    return _join([_part(tree) for tree in trees])


def pack(trees: Sequence[TokenTree], budget: int) -> PackedTrees:
    """Rows of at most ``budget`` nodes: first-fit decreasing, whole trees where they fit.

    A tree over the budget is cut at borders of subtrees; each piece has its path from the root as context. Cuts are
    chosen so that the fewest possible nodes are replicated, ``PackedTrees.overhead`` says how many. Each sequence lies
    in one row with its whole path, so ``sequence_nodes(row)`` is complete.

    Raises FastpoError where a path is longer than the budget.

    Cost: O(nodes), and O(childless nodes * budget) at worst for a tree that is cut.
    """
    first_node = np.cumsum([0, *(tree.num_nodes for tree in trees)])
    first_sequence = np.cumsum([0, *(tree.num_sequences for tree in trees)])
    pieces = [
        piece._replace(nodes=piece.nodes + first_node[i], sequences=piece.sequences + first_sequence[i])
        for i, tree in enumerate(trees)
        for piece in _pieces(_part(tree), budget, f"trees[{i}]")
    ]
    rows: dict[int, list[_Piece]] = {}
    sizes = np.array([len(piece.nodes) for piece in pieces], dtype=np.int64)
    for piece, row in zip(pieces, host().first_fit_decreasing(sizes, max(budget, 0)).tolist(), strict=True):
        rows.setdefault(row, []).append(piece)
    packed = [rows[row] for row in sorted(rows)]
    return PackedTrees(
        rows=tuple(_join([piece.part for piece in row]) for row in packed),
        nodes=tuple(torch.from_numpy(np.concatenate([piece.nodes for piece in row])) for row in packed),
        sequences=tuple(torch.from_numpy(np.concatenate([piece.sequences for piece in row])) for row in packed),
        budget=budget,
        num_distinct=int(first_node[-1]),
    )


class _Part(NamedTuple):
    """A TokenTree in numpy."""

    tokens: np.ndarray  # [N]
    parent: np.ndarray  # [N]
    depth: np.ndarray  # [N]
    subtree_end: np.ndarray  # [N]
    leaves: np.ndarray  # [S]
    starts: np.ndarray  # [S]

    @property
    def shape(self) -> tuple[np.ndarray, ...]:
        return self.parent, self.depth, self.subtree_end


class _Piece(NamedTuple):
    part: _Part
    nodes: np.ndarray  # [N], in the tree it is a piece of
    sequences: np.ndarray  # [S], likewise


def _part(tree: TokenTree) -> _Part:
    return _Part._make(getattr(tree, name).detach().cpu().numpy() for name in _Part._fields)


def _tree(part: _Part) -> TokenTree:
    return TokenTree(*map(torch.from_numpy, part))


def _snapshot(order: dict[str, np.ndarray], last: np.ndarray, starts: np.ndarray) -> TokenTree:
    """The tree of a trie's preorder whose sequences end at the trie's nodes ``last`` [S]."""
    leaves = order["position"][last]
    return _tree(_Part(order["tokens"], order["parent"], order["depth"], order["subtree_end"], leaves, starts))


def _join(parts: Sequence[_Part]) -> TokenTree:
    if not parts:
        return _tree(_Part._make(np.zeros(0, dtype=np.int64) for _ in _Part._fields))
    offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])[:-1]
    moved = [
        part._replace(
            parent=np.where(part.parent < 0, -1, part.parent + offset),
            subtree_end=part.subtree_end + offset,
            leaves=part.leaves + offset,
        )
        for part, offset in zip(parts, offsets, strict=True)
    ]
    return _tree(_Part._make(np.concatenate(columns) for columns in zip(*moved, strict=True)))


def _pieces(part: _Part, budget: int, name: str) -> list[_Piece]:
    """The tree, in pieces if it is over the budget; none of an empty one."""
    if not len(part.tokens):
        return []
    longest = int(part.depth.max()) + 1
    if longest > budget:
        raise FastpoError(f"budget is {budget}; it should be at least {longest}, the longest path of {name}")
    if len(part.tokens) <= budget:
        return [_Piece(part, np.arange(len(part.tokens)), np.arange(len(part.leaves)))]
    bounds = host().cut(*part.shape, budget)  # [pieces, 2]
    owner = np.searchsorted(bounds[:, 1], part.leaves, side="right")  # the first piece that has the leaf
    return [_piece(part, first, end, np.flatnonzero(owner == k)) for k, (first, end) in enumerate(bounds.tolist())]


def _piece(part: _Part, first: int, end: int, sequences: np.ndarray) -> _Piece:
    """The path to node ``first`` and the nodes ``first:end``."""
    node, path = first, []
    while (node := int(part.parent[node])) >= 0:
        path.append(node)
    nodes = np.concatenate((np.array(path[::-1], dtype=np.int64), np.arange(first, end)))
    chosen = _Part(
        tokens=part.tokens[nodes],
        parent=np.where(part.parent[nodes] < 0, -1, np.searchsorted(nodes, part.parent[nodes])),
        depth=part.depth[nodes],
        subtree_end=np.searchsorted(nodes, part.subtree_end[nodes]),
        leaves=np.searchsorted(nodes, part.leaves[sequences]),
        starts=part.starts[sequences],
    )
    return _Piece(chosen, nodes, sequences)


def _ids(values: TokenIds, name: str, allow_empty: bool = False) -> np.ndarray:
    """[n] int64."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if not array.size and array.ndim == 1 and allow_empty:
        return np.zeros(0, dtype=np.int64)
    if not array.size:
        raise FastpoError(f"{name} is empty; it should hold at least one integer")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise FastpoError(f"{name} is {array.dtype} of shape {list(array.shape)}; it should be a list of integers")
    if array.min() < 0:
        raise FastpoError(f"{name} holds {array.min()}; it should hold numbers of at least 0")
    return array.astype(np.int64, copy=False)


def _flat(sequences: Sequence[TokenIds]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [T], cu_seqlens [S+1])."""
    arrays = [_ids(sequence, f"sequences[{i}]") for i, sequence in enumerate(sequences)]
    cu_seqlens = np.cumsum([0, *map(len, arrays)])
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64), cu_seqlens


def _starts(starts: int | Sequence[int] | Tensor, lengths: np.ndarray, name: str) -> np.ndarray:
    """[S] int64, checked against the sequences' ``lengths`` [S]."""
    array = np.full(len(lengths), starts) if isinstance(starts, int) else _ids(starts, "starts", allow_empty=True)
    if array.shape != lengths.shape:
        raise FastpoError(f"starts has {len(array)} numbers; it should have one for each of {len(lengths)} {name}")
    bad = np.flatnonzero((array < 1) | (array >= lengths))
    if bad.size:
        i = bad[0]
        raise FastpoError(
            f"starts[{i}] is {array[i]}; it should be at least 1 and below {lengths[i]}, the tokens of {name}[{i}]"
        )
    return array
