"""Preference training on trees: each distinct token of a prompt's responses goes through the model once.

The responses of a prompt make a tree; trees share rows of at most the budget, and a row is one forward and backward.
The gradient is that of the mean over the batch's pairs, whatever the packing: losses are sums over pairs. Where the
members of a pair do not lie in one row (their tree is over the budget), or the objective couples a batch of several
rows, the loss is taken from log-probs that are scored first, without gradient; its slopes are then the coefficients of
each row's own log-probs. The KL of whole distributions (TDPO, SparsePO) goes beside the log-probs: it belongs to a
node as they do.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.integrations.head import take
from fastpo.kernels.preference_loss import preference_loss
from fastpo.models import PromptResponse
from fastpo.objectives.coupling import TokenRewards
from fastpo.pairs import PairRecord
from fastpo.sharing import rows_of, sharing_scorer
from fastpo.tasks import NUM_PAIR_SUMS, STATS, PreferenceTask, token_sums, with_kl
from fastpo.trees import build_tree, pack, sequence_nodes, trained_nodes
from fastpo.types import TokenTree

Responses = dict[str, PromptResponse]  # by key


@dataclass(frozen=True)
class Row:
    """What one forward takes: the i-th sequence of ``tree`` is the response ``keys[i]`` behind its prompt."""

    tree: TokenTree
    keys: list[str]
    pairs: list[PairRecord]  # with all their members here: their loss is taken here
    slopes: Mapping[str, Tensor] = field(default_factory=dict)  # key -> [C, n], of other pairs' loss, by its columns
    values: Tensor | None = None  # [NUM_PAIR_SUMS] of those pairs, in one of their rows


class TreePreferenceTask(PreferenceTask):
    """``PreferenceTask`` with the same values and gradients, at the cost of the distinct tokens."""

    def scorer(self, model: Any) -> nn.Module:
        """Raises FastpoError for a model that cannot take trees."""
        return sharing_scorer(model)

    def rounds(
        self, scorer: nn.Module, batch: Sequence[int], budget: int, processes: int, device: torch.device
    ) -> list[list[Row]]:
        pairs = [self.pairs[i] for i in batch]
        rows = plan(pairs, budget)
        here = {id(pair) for row in rows for pair in row.pairs}
        apart = [pair for pair in pairs if id(pair) not in here]
        # a response has one set of coefficients: T-REG's token rewards, or slopes that they have gone into
        if (self.objective.couples_scores and len(rows) > 1) or (
            apart and isinstance(self.objective.couple, TokenRewards)
        ):
            rows, apart = [replace(row, pairs=[]) for row in rows], pairs
        if apart:
            rows = self._with_slopes(scorer, apart, rows, batch, device)
        rows.sort(key=lambda row: -row.tree.num_nodes)
        return [rows[start : start + processes] for start in range(0, len(rows), processes)]

    def loss(self, scorer: nn.Module, share: Row, batch: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        columns, cu_seqlens, stats = self._columns(scorer, share.tree, device)  # [C, T], [S+1], [T] each
        values = columns.new_zeros(NUM_PAIR_SUMS) if share.values is None else share.values
        slopes = self._slopes(share, columns, cu_seqlens)  # [C, T]
        if not share.pairs:
            return (columns * slopes).sum(), torch.cat((values, torch.stack(token_sums(stats)).float()))
        logps, *kl = columns
        ref_logps, segments, table = self.arguments(share.pairs, share.keys, cu_seqlens)
        if share.slopes:
            segments = replace(segments, token_coefs=slopes[0])
        out = preference_loss(logps, ref_logps, with_kl(segments, *kl), table, self.summed(batch))
        sums = self.sums(out, table, cu_seqlens, stats)
        sums[:NUM_PAIR_SUMS] += values
        return out.loss + (columns[1:] * slopes[1:]).sum(), sums

    def _slopes(self, row: Row, columns: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[C, T] of a row's columns: the slopes of a response that has them, else its own coefficients of log-probs."""
        own = {} if self.reference is None else self.reference.columns.get("token_coefs", {})
        slopes = torch.zeros_like(columns)
        for key, part in zip(row.keys, slopes.split(cu_seqlens.diff().tolist(), dim=1), strict=True):
            if key in row.slopes:
                part.copy_(row.slopes[key])
            elif key in own:
                part[0] = own[key]
        return slopes

    def _columns(
        self, scorer: nn.Module, tree: TokenTree, device: torch.device
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(columns [C, T], cu_seqlens [S+1], statistics [T]) of the counted tokens of the tree's sequences.

        The columns that the loss has slopes by: log-probs and, where the objective takes it, the KL.
        """
        nodes, (tokens, cu_seqlens) = trained_nodes(tree), sequence_nodes(tree)
        index = torch.searchsorted(nodes, tokens).to(device)  # [T] into nodes
        logps, stats = scorer(tree.to(device), nodes.to(device), STATS, reference=self.ref_scorer)  # [M] each
        kl = [] if self.ref_scorer is None else [stats["kl"]]
        columns = torch.stack([take(values, index) for values in (logps, *kl)])
        return columns, cu_seqlens.to(device), {name: stats[name][index] for name in STATS}

    def _with_slopes(
        self,
        scorer: nn.Module,
        apart: Sequence[PairRecord],
        rows: Sequence[Row],
        batch: Sequence[int],
        device: torch.device,
    ) -> list[Row]:
        """``rows`` with the slopes of pairs that lie in none of them. Every process scores all the rows concerned."""
        wanted = {key for pair in apart for key, *_ in pair.present}
        scored: dict[str, Tensor] = {}
        for row in rows:
            if not wanted.isdisjoint(row.keys):
                with torch.no_grad():
                    columns, cu_seqlens, _ = self._columns(scorer, row.tree, device)
                found = zip(row.keys, columns.split(cu_seqlens.diff().tolist(), dim=1), strict=True)
                scored |= {key: part for key, part in found if key in wanted}
        slopes, values = self.slopes(apart, scored, batch)
        taken = [row for row in rows if not wanted.isdisjoint(row.keys)]
        others = [row for row in rows if wanted.isdisjoint(row.keys)]
        first, *rest = (replace(row, slopes=slopes) for row in taken)
        return [replace(first, values=values), *rest, *others]


def plan(pairs: Sequence[PairRecord], budget: int) -> list[Row]:
    """Rows of at most ``budget`` nodes (or one path, however long), with every response of ``pairs`` in one of them.

    The responses of a prompt stay together where they fit: first-fit decreasing; what prompts have in common, a row
    has once. A tree over the budget is cut. A pair belongs to the row that has all of its members, if one does.
    """
    budget = max(budget, *(pair.longest for pair in pairs))
    together = [_responses_of(group) for group in groups(pairs)]
    trees = [tree_of(responses) for responses in together]
    fitting = [i for i, tree in enumerate(trees) if tree.num_nodes <= budget]
    cut = [i for i, tree in enumerate(trees) if tree.num_nodes > budget]
    prompts = [[prompt for prompt, _ in together[i].values()] for i in fitting]
    placed = []
    for row in rows_of(prompts, [trees[i].num_nodes for i in fitting], budget):
        responses = {key: response for k in row for key, response in together[fitting[k]].items()}
        placed.append((tree_of(responses), list(responses)))
    if cut:
        packed, keys = pack([trees[i] for i in cut], budget), [key for i in cut for key in together[i]]
        names = [[keys[s] for s in sequences.tolist()] for sequences in packed.sequences]
        placed += zip(packed.rows, names, strict=True)
    row_of = {key: row for row, (_, keys) in enumerate(placed) for key in keys}
    own: list[list[PairRecord]] = [[] for _ in placed]
    for pair in pairs:
        rows = {row_of[key] for key, *_ in pair.present}
        if len(rows) == 1:
            own[rows.pop()].append(pair)
    return [Row(tree, keys, mine) for (tree, keys), mine in zip(placed, own, strict=True) if keys]


def groups(pairs: Sequence[PairRecord]) -> list[list[PairRecord]]:
    """Pairs that share a prompt, a response or a search tree, directly or through others."""
    above: dict[Hashable, Hashable] = {}

    def top(one: Hashable) -> Hashable:
        while above.setdefault(one, one) != one:
            one = above[one]
        return one

    for pair in pairs:
        for key, prompt, _ in pair.present:
            for one in (key, tuple(prompt)):
                above[top(one)] = top(tuple(pair.prompt_ids))
        if pair.group:
            above[top(("group", pair.group))] = top(tuple(pair.prompt_ids))
    found: dict[Hashable, list[PairRecord]] = {}
    for pair in pairs:
        found.setdefault(top(tuple(pair.prompt_ids)), []).append(pair)
    return list(found.values())


def tree_of(responses: Responses) -> TokenTree:
    """The forest of prompts and responses; its sequences are in the order of the keys."""
    sequences = [[*prompt, *response] for prompt, response in responses.values()]
    return build_tree(sequences, [len(prompt) for prompt, _ in responses.values()])


def _responses_of(pairs: Sequence[PairRecord]) -> Responses:
    return {key: (prompt, ids) for pair in pairs for key, prompt, ids in pair.present}
