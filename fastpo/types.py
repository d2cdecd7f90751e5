"""The records that the ops and the loop exchange. Frozen; a shape comment on every field; no behaviour beyond checks.

T tokens, S sequences, P tuples (pairs), K members of a tuple (chosen, rejected, ...), J link terms of an objective, N
nodes of a tree.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Record:
    def to(self, device: torch.device | str) -> Any:
        """The same record with every tensor on ``device``."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    return value.to(device) if isinstance(value, (Tensor, _Record)) else value


@dataclass(frozen=True)
class Segments(_Record):
    """Which tokens belong to which sequence, and what each counts. Sequences lie one behind the other (packed).

    All fields but ``cu_seqlens`` and ``mask`` may require grad.
    """

    cu_seqlens: Tensor  # [S+1] int64 or int32; sequence i owns tokens cu_seqlens[i]:cu_seqlens[i+1]; may be empty
    mask: Tensor | None = None  # [T] bool; False: a token that counts nowhere (prompt, shared step, padding)
    weights: Tensor | None = None  # [T] float, w_t; 1 where absent
    kl: Tensor | None = None  # [T] float, K_t = KL(ref || policy) over the vocabulary
    kl_weights: Tensor | None = None  # [T] float, k_t; the K_t term is absent without it
    nll_weights: Tensor | None = None  # [T] float, u_t; 1 where absent
    token_coefs: Tensor | None = None  # [T] float, v_t: a term  + sum_t v_t l_t  of the loss

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class TokenTree(_Record):
    """A forest of tokens in preorder: every distinct prefix of its sequences once. ``fastpo.trees`` makes them.

    Token i sees token j iff ``j <= i < subtree_end[j]``. ``tokens[i]`` is predicted at ``parent[i]``.
    """

    tokens: Tensor  # [N] int64
    parent: Tensor  # [N] int64, below i; -1 at a root
    depth: Tensor  # [N] int64, the position of the token in each sequence through it; 0 at a root
    subtree_end: Tensor  # [N] int64; the subtree of i is i:subtree_end[i]
    leaves: Tensor  # [S] int64, the node of each sequence's last token; equal sequences share it
    starts: Tensor  # [S] int64, the depth of each sequence's first token that counts: the length of its prompt

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.leaves.shape[0]


@dataclass(frozen=True)
class PackedTrees(_Record):
    """Forests that a model takes one at a time, ``fastpo.trees.pack`` makes them. R rows.

    Nodes and sequences of the packed trees are numbered through, one tree behind the other. A sequence stands in one
    row, with all its nodes; a node of a tree that was cut may stand in several.
    """

    rows: tuple[TokenTree, ...]  # R forests of at most ``budget`` nodes
    nodes: tuple[Tensor, ...]  # R times [N_r] int64, the node of the input that each of the row's nodes is
    sequences: tuple[Tensor, ...]  # R times [S_r] int64, the input's sequence at each of the row's leaves
    budget: int
    num_distinct: int  # nodes of the input

    @property
    def num_nodes(self) -> int:
        """Nodes of all rows."""
        return sum(row.num_nodes for row in self.rows)

    @property
    def num_replicated(self) -> int:
        """Nodes that stand in a row as context only because their tree was cut."""
        return self.num_nodes - self.num_distinct

    @property
    def overhead(self) -> float:
        """What cutting costs: replicated nodes per distinct one."""
        return self.num_replicated / max(1, self.num_distinct)


@dataclass(frozen=True)
class Pairs(_Record):
    """Tuples of sequences that a loss term compares; pairs are tuples of two.

    ``index[p, k]`` is the k-th member of tuple p: 0 chosen, 1 rejected, further ones as the objective says. -1: absent.
    """

    index: Tensor  # [P, K] int64 or int32, sequence ids; -1: no such member
    weights: Tensor | None = None  # [P] float, omega_p; 1 where absent
    margins: Tensor | None = None  # [P] float, m_p; margin_coef * m_p is subtracted from z of each term
    soft_labels: Tensor | None = None  # [P] float, q_p, probability that chosen is better; replaces the objective's
    targets: Tensor | None = None  # [P, J] float, tau of the squared link in term j; replaces the objective's
    beta_scales: Tensor | None = None  # [P] float, beta_p = beta * beta_scales[p]
    relevance: Tensor | None = None  # [P, K] float, how good each member of a list is; for objectives of lists

    @staticmethod
    def of(chosen: Tensor, rejected: Tensor, **columns: Tensor) -> "Pairs":
        """Pairs from two id vectors: ``Pairs.of(chosen [P], rejected [P], weights=...)``."""
        return Pairs(torch.stack((chosen, rejected), dim=1), **columns)

    @staticmethod
    def interleaved(num_pairs: int, device: torch.device | str = "cpu") -> "Pairs":
        """Sequences 2p and 2p+1 are the chosen and the rejected one of pair p."""
        return Pairs(torch.arange(2 * num_pairs, device=device).view(num_pairs, 2))


@dataclass(frozen=True)
class PreferenceOutput(_Record):
    """What ``preference_loss`` returns. Only ``loss`` carries gradient; the rest is for metrics.

    float64 in place of float32 where the log-probs are.
    """

    loss: Tensor  # [] float32
    losses: Tensor  # [P] float32, omega_p * (link terms + NLL terms) of each tuple, before the reduction
    scores: Tensor  # [S] float32, S_i of fastpo/objectives/core.py
    logps: Tensor  # [S] float32, sum of l_t over the sequence's masked-in tokens
    lengths: Tensor  # [S] int64, n_i: number of masked-in tokens
    rewards: Tensor  # [P, K] float32, beta * S of each member (implicit rewards); 0 for an absent one
    nll: Tensor  # [P, K] float32, -sum u l / n of each member; 0 for an absent one

    @property
    def margins(self) -> Tensor:
        """[P] chosen minus rejected reward."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    @property
    def accuracy(self) -> Tensor:
        """[] share of pairs whose chosen reward is the larger one."""
        return (self.margins > 0).float().mean()
