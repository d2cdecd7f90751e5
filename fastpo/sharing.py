"""What the loop does on trees beside training: reference log-probs, and saying why a model cannot share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fastpo.errors import FastpoError
from fastpo.models import PromptResponse, check_sequences, context_length
from fastpo.scoring import TreeScorer, score_stream
from fastpo.trees import build_tree, sequence_nodes


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
    """``models.response_logps``, arguments and result, with each distinct token of a prompt's responses scored once.

    Raises FastpoError, besides, for a model that cannot take trees.
    """
    check_sequences(sequences, context_length(model), "sequences")
    sharing_scorer(model)
    together = _sharing([prompt for prompt, _ in sequences])
    trees = [
        build_tree([[*sequences[i][0], *sequences[i][1]] for i in own], [len(sequences[i][0]) for i in own])
        for own in together
    ]
    budget = max([micro_batch_tokens, *(len(prompt) + len(response) for prompt, response in sequences)])
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
