"""Sampling many responses per prompt from any causal LM of transformers.

A prompt is prefilled once and its keys and values are then repeated for its samples; rows leave the batch when they
are finished. Each prompt has random numbers of its own, so a result never depends on what else is in the batch.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fastpo.errors import FastpoError, RunError
from fastpo.integrations.head import unwrapped
from fastpo.models import context_length

COMPACT_BELOW = 0.8  # finished rows leave the batch when this share or less of its rows is still running


@dataclass(frozen=True)
class Request:
    """What every batch of one ``generate`` call shares."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    eos_token_id: int
    pad_token_id: int
    seed: int


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_token_id: int,
    pad_token_id: int,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """``num_samples`` responses to each of ``prompts`` (token ids), as ``[prompt][sample] -> token ids``.

    A response ends with ``eos_token_id`` where it stopped there, and without it where ``max_new_tokens`` cut it off.
    ``temperature=0`` is greedy. ``top_k`` (0: off) and ``top_p`` (1: off) restrict the sampled distribution, in this
    order, at the temperature. ``batch_size`` is the number of rows (prompts x samples) decoded together; ``progress``
    is told how many prompts each finished batch held.

    Sample j of prompt i inverts the cumulative distribution at uniform numbers drawn from ``(seed, i)`` alone: the
    result depends on the batch size only as far as floating-point sums do.

    Cost: one forward over the padded prompts, then one forward per token over the rows still running. Memory: the keys
    and values of ``batch_size`` rows.

    Raises FastpoError for an empty prompt, for one that leaves no room for ``max_new_tokens`` in the model's context,
    and for settings out of range, before any work; RunError for a model whose logits are NaN.
    """
    request = Request(num_samples, max_new_tokens, temperature, top_p, top_k, eos_token_id, pad_token_id, seed)
    _check(request, batch_size, prompts, context_length(model))
    responses: list[list[list[int]]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(prompts, max(1, batch_size // num_samples)):
                decoded = _generate_batch(model, batch, [prompts[i] for i in batch], request)
                for i, samples in zip(batch, decoded, strict=True):
                    responses[i] = samples
                if progress is not None:
                    progress(len(batch))
    finally:
        model.train(was_training)
    return responses


def _check(request: Request, batch_size: int, prompts: Sequence[Sequence[int]], context: int | None) -> None:
    for name in ("num_samples", "max_new_tokens"):
        if getattr(request, name) < 1:
            raise FastpoError(f"{name} is {getattr(request, name)}; it should be 1 or more")
    if batch_size < 1:
        raise FastpoError(f"batch_size is {batch_size}; it should be 1 or more")
    if not 0 <= request.temperature < float("inf"):
        raise FastpoError(f"temperature is {request.temperature}; it should be 0 (greedy) or more")
    if not 0 < request.top_p <= 1:
        raise FastpoError(f"top_p is {request.top_p}; it should be above 0 and at most 1")
    if request.top_k < 0:
        raise FastpoError(f"top_k is {request.top_k}; it should be 0 (off) or more")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise FastpoError(f"prompts[{i}] is empty; it should hold at least one token")
        if context is not None and len(prompt) + request.max_new_tokens > context:
            raise FastpoError(
                f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens={request.max_new_tokens} "
                f"it should have at most {context - request.max_new_tokens} (the model's context is {context})"
            )


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Prompt indices, longest prompts first, so that a batch pads little and the first one shows the peak memory."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _generate_batch(
    model: PreTrainedModel, indices: list[int], prompts: list[Sequence[int]], request: Request
) -> list[list[list[int]]]:
    device = next(model.parameters()).device
    accepted = inspect.signature(unwrapped(model).forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    input_ids, attention_mask = _left_pad(prompts, request, device)  # [B, L], [B, L]
    rows = len(prompts) * request.num_samples
    uniforms = _uniforms(indices, request).to(device)  # [R, max_new_tokens]
    generated = torch.full((rows, request.max_new_tokens), request.pad_token_id, device=device)  # [R, max_new_tokens]
    rows_left = torch.arange(rows, device=device)  # [A] rows of the batch that still go through the model
    running = torch.ones_like(rows_left, dtype=torch.bool)  # [A] False: finished, but not worth a compaction yet
    cache = _new_cache(model, input_ids.shape[1] + request.max_new_tokens)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, L]
    for step in range(request.max_new_tokens):
        positions = {"position_ids": position_ids} if "position_ids" in accepted else {}
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **last_only,
            **positions,
        ).logits[:, -1]  # [A, V]; [B, V] at the first step
        if step == 0 and logits.isnan().any():
            raise RunError("the model's logits are NaN: its weights, or its type (dtype), are not usable")
        if step == 0 and request.num_samples > 1:
            cache.batch_repeat_interleave(request.num_samples)
            logits, attention_mask, position_ids = (
                t.repeat_interleave(request.num_samples, 0) for t in (logits, attention_mask, position_ids)
            )
        tokens = pick_tokens(logits.float(), uniforms[rows_left, step], request)  # [A]
        generated[rows_left, step] = tokens
        running &= tokens != request.eos_token_id
        alive = running.nonzero().squeeze(1)
        if alive.numel() == 0:
            break
        if alive.numel() <= COMPACT_BELOW * running.numel():
            cache.batch_select_indices(alive)
            rows_left, tokens, attention_mask, position_ids, running = (
                t[alive] for t in (rows_left, tokens, attention_mask, position_ids, running)
            )
        input_ids = tokens[:, None]
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        position_ids = position_ids[:, -1:] + 1

    texts = [_until(row, request.eos_token_id) for row in generated.tolist()]
    return [texts[i : i + request.num_samples] for i in range(0, rows, request.num_samples)]


def _until(row: list[int], eos_token_id: int) -> list[int]:
    """A row up to and with its first end of sequence; behind it is what it drew before it left the batch."""
    return row[: row.index(eos_token_id) + 1] if eos_token_id in row else row


def _left_pad(prompts: list[Sequence[int]], request: Request, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), request.pad_token_id)  # [B, L]
    attention_mask = torch.zeros_like(input_ids)  # [B, L]
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _uniforms(indices: list[int], request: Request) -> Tensor:
    """[R, max_new_tokens] in [0, 1), from a stream per prompt; zeros when greedy."""
    shape = (request.num_samples, request.max_new_tokens)
    if request.temperature == 0:
        return torch.zeros(len(indices) * shape[0], shape[1])
    draws = [np.random.default_rng([request.seed, i]).random(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.concatenate(draws))


def pick_tokens(logits: Tensor, uniforms: Tensor, request: Request) -> Tensor:
    """The token of each row of ``logits`` [A, V] fp32 where the cumulative distribution passes ``uniforms`` [A]."""
    if request.temperature == 0:
        return logits.argmax(-1)
    logits = logits / request.temperature
    if request.top_k or request.top_p < 1:
        logits = _restrict(logits, request)
    cdf = logits.softmax(-1).cumsum(-1)  # [A, V]
    total = cdf[:, -1]
    # below the total even after rounding: the token found then always has a probability above zero
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(1)


def _restrict(logits: Tensor, request: Request) -> Tensor:
    """``logits`` [A, V] with -inf outside the top ``top_k``, then outside the smallest set of mass ``top_p``."""
    ranked, ids = logits.sort(dim=-1, descending=True, stable=True)  # [A, V]
    if request.top_k:
        ranked[:, request.top_k :] = -torch.inf
    if request.top_p < 1:
        probabilities = ranked.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the mass of the more probable tokens
        ranked = ranked.masked_fill(before >= request.top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, ids, ranked)


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into room reserved once; transformers' own copies the whole cache for each token."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._room: list[Tensor] = []  # keys, values: [rows, heads, capacity, head_dim]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends [rows, heads, new, head_dim]; returns all keys and values so far, as views."""
        states = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self._room = [s.new_empty(*s.shape[:2], self.capacity, s.shape[3]) for s in states]
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        for room, appended in zip(self._room, states, strict=True):
            room[:, :, old:new] = appended
        return self._view(new)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._room = [room.repeat_interleave(repeats, dim=0) for room in self._room]
        self._view(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        length, kept = self.get_seq_length(), indices.shape[0]
        for i, room in enumerate(self._room):
            room[:kept, :, :length] = room[indices, :, :length]
            self._room[i] = room[:kept]
        self._view(length)

    def _view(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[:, :, :length] for room in self._room)
        return self.keys, self.values


def _new_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
