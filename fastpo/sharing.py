"""What training on trees and the reference's log-probs have in common: what shares a row, and which model cannot."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fastpo.errors import FastpoError
from fastpo.host import host
from fastpo.models import PromptResponse, check_sequences, context_length
from fastpo.scoring import TreeScorer, score_stream
from fastpo.trees import build_tree, sequence_nodes
from fastpo.types import TokenTree


def sharing_scorer(model: Any) -> TreeScorer:
    """A TreeScorer of ``model``; FastpoError with the reason and the way out for a model that cannot take trees."""
    try:
        return TreeScorer(model)
    except FastpoError as error:
        raise FastpoError(f"{error}; --no-sharing trains it without trees") from error


def tree_response_logps(
    model: Any,
    sequences: Sequence[PromptResponse],
    *,
    stats: tuple[str, ...] = (),
    micro_batch_tokens: int = 16384,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """``models.response_logps``, arguments and result, with each distinct token of a prompt's responses scored once,
    and what all prompts begin with once in each row of ``micro_batch_tokens``.

    Raises FastpoError, besides, for a model that cannot take trees.
    """
    check_sequences(sequences, context_length(model), "sequences")
    sharing_scorer(model)
    budget = max([micro_batch_tokens, *(len(prompt) + len(response) for prompt, response in sequences)])
    together = _together(sequences, budget)
    trees = [_tree_of(sequences, own) for own in together]
    cu_seqlens = torch.tensor([0, *(len(response) for _, response in sequences)]).cumsum(0)
    values = torch.zeros(1 + len(stats), int(cu_seqlens[-1]))  # [1 + stats, T]
    scores = score_stream(model, trees, token_budget=budget, stats=stats, accelerator=accelerator)
    for own, tree, scored in zip(together, trees, scores, strict=True):
        nodes, bounds = sequence_nodes(tree)
        found = torch.stack([scored.logps, *(scored.stats[name] for name in stats)])[:, nodes]
        for i, part in zip(own, found.split(bounds.diff().tolist(), dim=1), strict=True):
            values[:, cu_seqlens[i] : cu_seqlens[i + 1]] = part
        if progress is not None:
            progress(len(own))
    return values if stats else values[0], cu_seqlens


def rows_of(prompts: Sequence[Sequence[Sequence[int]]], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """The groups of each row of at most ``budget`` nodes, by number: first-fit decreasing.

    What all prompts begin with (few-shot examples, a chat template) a row has once.

    Args:
        prompts: those of each group.
        sizes: nodes of each group's tree, at most ``budget``.
    """
    if not prompts:
        return []
    shared = _common_prefix([prompt for own in prompts for prompt in own])
    lengths = np.array(sizes, dtype=np.int64) - shared
    rows: dict[int, list[int]] = {}
    for group, row in enumerate(host().first_fit_decreasing(lengths, budget - shared).tolist()):
        rows.setdefault(row, []).append(group)
    return [rows[row] for row in sorted(rows)]


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them start with."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _together(sequences: Sequence[PromptResponse], budget: int) -> list[list[int]]:
    """Places of the sequences of each tree: rows, and prompts whose responses alone are over the budget."""
    found = _sharing([prompt for prompt, _ in sequences])
    sizes = [_tree_of(sequences, own).num_nodes for own in found]
    fitting = [own for own, size in zip(found, sizes, strict=True) if size <= budget]
    prompts = [[sequences[i][0] for i in own] for own in fitting]
    rows = rows_of(prompts, [size for size in sizes if size <= budget], budget)
    cut = [own for own, size in zip(found, sizes, strict=True) if size > budget]
    return [[i for k in row for i in fitting[k]] for row in rows] + cut


def _tree_of(sequences: Sequence[PromptResponse], places: Sequence[int]) -> TokenTree:
    """The forest of the sequences at ``places``."""
    chosen = [sequences[i] for i in places]
    return build_tree([[*prompt, *response] for prompt, response in chosen], [len(prompt) for prompt, _ in chosen])


def _sharing(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of prompts that are equal, or begin with the shortest of their list: what a search has grown from one."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(i)
    found: list[list[int]] = []
    root: tuple[int, ...] | None = None
    for prompt in sorted(places):  # what begins with a prompt comes right behind it
        if root is None or prompt[: len(root)] != root:
            found.append([])
            root = prompt
        found[-1] += places[prompt]
    return sorted(map(sorted, found))
