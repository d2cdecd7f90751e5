"""Objectives that couple the tuples of a batch, or compare whole lists: every log-prob first, then the loss."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import Objective
from fastpo.types import Pairs, PreferenceOutput, Segments

from .checks import TOKEN_LOGPS


def couples(objective: Objective) -> bool:
    """Whether no group of sequences can be finished before all of them are scored."""
    return objective.couple is not None or objective.list_loss is not None


def coupled_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    mask: Tensor,  # [T] bool
    ref_logps: Tensor | None,  # [T]
    segments: Segments,
    pairs: Pairs,
    objective: Objective,
    *,
    stats: Sequence[str],
    ignore_index: int,
    **head: Any,
) -> tuple[PreferenceOutput, dict[str, Tensor]]:
    """The spec of ``linear_preference_loss`` as it stands: ``linear_token_logprobs``, then ``preference_loss``."""
    counted = torch.where(mask, labels.reshape(-1).to(torch.int64), ignore_index).view(labels.shape)
    of_head = tuple(name for name in stats if name != TOKEN_LOGPS)
    found = linear_token_logprobs(hidden, weight, counted, stats=of_head, ignore_index=ignore_index, **head)
    logps, values = found if isinstance(found, tuple) else (found, {})
    out = preference_loss(logps.reshape(-1), ref_logps, replace(segments, mask=mask), pairs, objective)
    values = {**values, TOKEN_LOGPS: logps}
    return out, {name: values[name].detach() for name in stats}
