"""Keys and values of every token of a search, each computed once: a pool of slots shared by all nodes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fastpo.sampling import PreallocatedLayer

from .nodes import Step

_FIRST_SLOTS = 4096


class KeyValuePool:
    """Slots of one token each, in all layers. ``Step.cache`` is (epoch, first slot) of the step's tokens.

    The last token of a step has a slot from the start and is filled when the step is continued: its keys are computed
    with the first forward behind it, whoever asks. ``clear`` forgets everything.
    """

    def __init__(self, model: PreTrainedModel, limit: int | None = None):
        self.model = model
        self.limit = limit  # slots at most; None: as many as it takes
        self.cleared = 0  # times
        self._epoch = object()  # between two times; no two pools share one
        self.used = 1  # slot 0 stands for padding: zeros, never seen
        self.keys: list[Tensor] = []  # per layer [P, H, D]
        self.values: list[Tensor] = []

    @staticmethod
    def why_not(model: PreTrainedModel) -> str | None:
        """Why the keys of this model cannot be kept by token, or None."""
        layers = DynamicCache(config=model.config).layers
        odd = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
        return f"its cache has {', '.join(odd)}" if odd else None

    def clear(self) -> None:
        self.cleared += 1
        self._epoch = object()
        self.used = 1

    def has(self, step: Step) -> bool:
        return step.cache is not None and step.cache[0] is self._epoch

    def reserve(self, step: Step) -> int:
        """The first of slots for all tokens of ``step``."""
        first = self.used
        self.used += len(step.ids)
        step.cache = (self._epoch, first)
        return first

    def over(self, tokens: int) -> bool:
        """Whether ``tokens`` more would pass the limit."""
        return self.limit is not None and self.used + tokens > self.limit

    def write(self, slots: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """``keys`` and ``values`` per layer [n, H, D] into ``slots`` [n]."""
        self._make_room(keys, values)
        for pool, new in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            pool[slots] = new

    def _make_room(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        have = self.keys[0].shape[0] if self.keys else 0
        if self.used <= have:
            return
        wanted = max(self.used, 2 * have, _FIRST_SLOTS)
        grown = []
        for old, new in zip((*self.keys, *self.values) or [None] * 2 * len(keys), (*keys, *values), strict=True):
            room = new.new_zeros(wanted, *new.shape[1:])
            if old is not None:
                room[:have] = old
            grown.append(room)
        self.keys, self.values = grown[: len(keys)], grown[len(keys) :]

    def slots(self, path: Sequence[Step]) -> list[int]:
        """Of all tokens of a path but its last."""
        found = [slot for step in path for slot in range(step.cache[1], step.cache[1] + len(step.ids))]
        return found[:-1]

    def gather(self, slots: Tensor, room: int) -> Any:
        """A cache of the tokens in ``slots`` [B, L] (0: padding), with room for ``room`` more."""
        cache = new_cache(self.model, slots.shape[1] + room)
        if slots.shape[1]:
            for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
                layer.update(keys[slots].transpose(1, 2), values[slots].transpose(1, 2))
        return cache


def new_cache(model: PreTrainedModel, room: int) -> Any:
    """An empty cache whose plain layers have their memory from the start."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def taken(cache: Any, rows: Tensor, positions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer [n, H, D]: keys and values of ``cache`` at (rows [n], positions [n])."""
    keys = [layer.keys[rows, :, positions] for layer in cache.layers]
    values = [layer.values[rows, :, positions] for layer in cache.layers]
    return keys, values


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """[B, L] int64, right-aligned."""
    longest = max(map(len, rows), default=0)
    filled = [[fill] * (longest - len(row)) + list(row) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device).view(len(rows), longest)
