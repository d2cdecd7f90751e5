"""``StepSampler``: proposes steps with a language model, in one batch for all trees, every token computed once."""

import inspect
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpo.errors import FastpoError, RunError
from fastpo.integrations.head import unwrapped
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.models import context_length
from fastpo.sampling import COMPACT_BELOW, Request, pick_tokens

from .cache import KeyValuePool, new_cache, padded, taken
from .nodes import Node, Step


@dataclass(frozen=True)
class _Draw:
    """What is drawn below a node."""

    stop_ids: Tensor  # [K] a token of these is the last
    tokens: int  # at most
    stream: tuple[int, ...]  # tells its random numbers from those of other draws
    keep: bool  # its keys and values in the pool


@dataclass
class _Start:
    """A batch behind the last token of each node's path."""

    cache: Any
    logits: Tensor  # [B, V]
    mask: Tensor  # [B, L] int64
    positions: Tensor  # [B] int64, of the last token


class StepSampler:
    """``propose`` of a search: up to ``widths[i]`` sampled steps below each node.

    A step ends behind the first token of ``stop_ids``, behind ``eos_token_id`` (then it is ``finished``), or after
    ``step_tokens``. The j-th step of a node inverts the cumulative distribution at uniform numbers drawn from (seed,
    prompt, node, j): it does not depend on what else is in the batch, or in the search.

    Keys and values stay in a pool (``KeyValuePool``): a prompt goes through the model once, and of each step each token
    once, however many nodes lie below it. Past ``cache_tokens`` tokens the pool is emptied and the paths that are still
    needed are computed again. A model whose cache is not plain keys and values per token (sliding windows, states)
    computes the path of every expanded node again: ``why_no_pool`` says so.

    Cost of a wave: one forward of one token per node, then one per token of the longest step over the steps still
    running.

    Raises FastpoError for settings out of range; RunError for NaN logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        step_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
        stop_ids: Collection[int] = (),
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        batch_size: int = 1024,
        context: int | None = None,
        cache_tokens: int | None = None,
    ):
        for name, value, least in (("step_tokens", step_tokens, 1), ("batch_size", batch_size, 1), ("top_k", top_k, 0)):
            if value < least:
                raise FastpoError(f"{name} is {value}; it should be {least} or more")
        if not 0 <= temperature < float("inf"):
            raise FastpoError(f"temperature is {temperature}; it should be 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise FastpoError(f"top_p is {top_p}; it should be above 0 and at most 1")
        self.model = model
        self.device = next(model.parameters()).device
        self.eos = torch.tensor([eos_token_id], device=self.device)
        stops = torch.tensor(sorted({*stop_ids, eos_token_id}), device=self.device)
        self.step_draw = _Draw(stops, step_tokens, (), keep=True)
        self.seed, self.batch_size = seed, batch_size
        self.context = context or context_length(model)
        self.request = Request(1, step_tokens, temperature, top_p, top_k, eos_token_id, pad_token_id, seed)
        self.why_no_pool = KeyValuePool.why_not(model)
        self.pool = KeyValuePool(model, cache_tokens)
        accepted = inspect.signature(unwrapped(model).forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted
        self.forward_tokens = 0  # through the model so far, padding included
        self.seconds = 0.0  # in the model and in drawing tokens

    def forget(self) -> None:
        """Empties the pool: what is sampled next depends on the nodes alone, as after a restart."""
        self.pool.clear()

    def __call__(self, nodes: Sequence[Node], widths: Sequence[int]) -> list[list[Step]]:
        return self._run(nodes, widths, self.step_draw)

    def complete(self, nodes: Sequence[Node], number: int, max_tokens: int) -> list[list[list[int]]]:
        """``number`` responses completed from each node, at most ``max_tokens`` longer, on the same pool."""
        draw = _Draw(self.eos, max_tokens, (1,), keep=False)
        return [[list(step.ids) for step in steps] for steps in self._run(nodes, [number] * len(nodes), draw)]

    @torch.inference_mode()
    def _run(self, nodes: Sequence[Node], widths: Sequence[int], draw: _Draw) -> list[list[Step]]:
        was_training = self.model.training
        self.model.eval()
        found: list[list[Step]] = []
        try:
            for first, last in self._batches(widths):
                found += self._sample(nodes[first:last], widths[first:last], draw)
        finally:
            self.model.train(was_training)
        return found

    def _batches(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        """Ranges of nodes of at most ``batch_size`` steps, one node at least."""
        ranges, first, rows = [], 0, 0
        for i, width in enumerate(widths):
            if rows and rows + width > self.batch_size:
                ranges.append((first, i))
                first, rows = i, 0
            rows += width
        return [*ranges, (first, len(widths))] if widths else []

    def _sample(self, nodes: Sequence[Node], widths: Sequence[int], draw: _Draw) -> list[list[Step]]:
        rooms = [self._room(node, draw.tokens) for node in nodes]
        if not all(rooms):  # a path that fills the context gets nothing
            fits = [i for i, room in enumerate(rooms) if room]
            found = self._sample([nodes[i] for i in fits], [widths[i] for i in fits], draw) if fits else []
            at = dict(zip(fits, found, strict=True))
            return [at.get(i, []) for i in range(len(nodes))]
        start = self._start(nodes, max(rooms))
        if start.logits.isnan().any():
            raise RunError("the model's logits are NaN: its weights, or its type (dtype), are not usable")
        tokens, logps, saved = self._decode(start, nodes, widths, rooms, draw)
        steps = self._steps(nodes, widths, tokens, logps)
        if saved is not None:
            self._keep(steps, *saved)
        return steps

    def _room(self, node: Node, most: int) -> int:
        """Of ``most`` tokens below ``node``, those that the context has room for."""
        return most if self.context is None else max(0, min(most, self.context - len(node.ids)))

    def _start(self, nodes: Sequence[Node], room: int) -> _Start:
        if self.why_no_pool is not None:
            return self._forward_paths([node.ids for node in nodes], room)
        if self.pool.over(sum(len(node.ids) for node in nodes)):
            self.pool.clear()
        missing = [node for node in nodes if not all(self.pool.has(step) for step in node.steps)]
        if missing:
            self._fill(missing)
        slots = padded([self.pool.slots(node.steps) for node in nodes], 0, self.device)  # [B, L]
        lengths = torch.tensor([len(node.ids) for node in nodes], device=self.device)  # [B]
        cache = self.pool.gather(slots, room + 1)
        mask = torch.nn.functional.pad((slots != 0).long(), (0, 1), value=1)  # [B, L+1]
        last = torch.tensor([node.steps[-1].ids[-1] for node in nodes], device=self.device)  # [B]
        logits = self._forward(last[:, None], mask, lengths[:, None] - 1, cache)
        rows = torch.arange(len(nodes), device=self.device)
        ends = torch.tensor([n.steps[-1].cache[1] + len(n.steps[-1].ids) - 1 for n in nodes], device=self.device)
        self.pool.write(ends, *taken(cache, rows, torch.full_like(rows, slots.shape[1])))
        return _Start(cache, logits, mask, lengths - 1)

    def _fill(self, nodes: Sequence[Node]) -> None:
        """Computes the paths of ``nodes``, all but their last tokens, and keeps what is new."""
        paths = [node.ids[:-1] for node in nodes]
        cache = self._forward_paths(paths, 0).cache if any(paths) else None
        longest = max(map(len, paths))
        rows, positions, slots = [], [], []
        for row, (node, path) in enumerate(zip(nodes, paths, strict=True)):
            at = longest - len(path)
            for step in node.steps:
                if not self.pool.has(step):
                    first = self.pool.reserve(step)
                    known = range(min(len(step.ids), longest - at))  # not the last token of the path
                    rows += [row] * len(known)
                    positions += [at + i for i in known]
                    slots += [first + i for i in known]
                at += len(step.ids)
        if cache is not None:
            index = torch.tensor([rows, positions, slots], device=self.device)
            self.pool.write(index[2], *taken(cache, index[0], index[1]))

    def _forward_paths(self, paths: Sequence[Sequence[int]], room: int) -> _Start:
        """One forward over whole paths, left-padded; rows without a token see one of padding."""
        lengths = torch.tensor([len(path) for path in paths], device=self.device)
        input_ids = padded(paths, self.request.pad_token_id, self.device)  # [B, L]
        mask = (torch.arange(input_ids.shape[1], device=self.device) >= input_ids.shape[1] - lengths[:, None]).long()
        cache = new_cache(self.model, input_ids.shape[1] + room)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return _Start(cache, self._forward(input_ids, mask, positions, cache), mask, lengths - 1)

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The logits [B, V] behind ``input_ids`` [B, T]."""
        started = time.perf_counter()
        given = {"position_ids": positions} if self._takes_positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **self._last_only, **given
        )
        self.forward_tokens += int(input_ids.numel())
        self.seconds += time.perf_counter() - started
        return out.logits[:, -1]

    def _decode(
        self, start: _Start, nodes: Sequence[Node], widths: Sequence[int], rooms: Sequence[int], draw: _Draw
    ) -> tuple[list[list[int]], list[float], tuple[list[Tensor], list[Tensor]] | None]:
        """(tokens of each of the R steps, their summed log-probs, keys and values per layer [R, room, H, D])."""
        repeats = torch.tensor(widths, device=self.device)
        start.cache.batch_repeat_interleave(repeats)
        logits, mask, positions = (
            x.repeat_interleave(repeats, 0) for x in (start.logits, start.mask, start.positions + 1)
        )
        uniforms = self._uniforms(nodes, widths, draw).to(self.device)  # [R, T]
        rows, width, room = uniforms.shape[0], mask.shape[1], max(rooms)
        limits = torch.tensor(rooms, device=self.device).repeat_interleave(repeats)  # [R]
        generated = torch.full((rows, room), self.request.pad_token_id, device=self.device)  # [R, room]
        sums = torch.zeros(rows, dtype=torch.float64, device=self.device)  # [R]
        lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)  # [R]
        kept = draw.keep and self.why_no_pool is None
        saved = self._wave_buffer(start.cache, rows, room) if kept else None
        left = torch.arange(rows, device=self.device)  # [A] rows still in the batch
        running = torch.ones_like(left, dtype=torch.bool)  # [A]
        for t in range(room):
            started = time.perf_counter()
            tokens = pick_tokens(logits.float(), uniforms[left, t], self.request)  # [A]
            logp = token_logprobs(logits, tokens)  # [A]
            sums[left] += torch.where(running, logp, 0).double()
            lengths[left] += running
            generated[left, t] = tokens
            running &= ~torch.isin(tokens, draw.stop_ids) & (lengths[left] < limits[left])
            alive = running.nonzero()[:, 0]
            self.seconds += time.perf_counter() - started
            if alive.numel() == 0 or t + 1 == room:
                break
            if alive.numel() <= COMPACT_BELOW * running.numel():
                self._save(saved, start.cache, left, width, t)
                start.cache.batch_select_indices(alive)
                left, tokens, mask, positions, running = (x[alive] for x in (left, tokens, mask, positions, running))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits = self._forward(tokens[:, None], mask, positions[:, None], start.cache)
            positions = positions + 1
        self._save(saved, start.cache, left, width, start.cache.get_seq_length() - width)
        texts = [row[:n] for row, n in zip(generated.tolist(), lengths.tolist(), strict=True)]
        return texts, sums.tolist(), saved

    @staticmethod
    def _wave_buffer(cache: Any, rows: int, room: int) -> tuple[list[Tensor], list[Tensor]]:
        def empty(states: Tensor) -> Tensor:
            return states.new_zeros(rows, room, states.shape[1], states.shape[3])

        return [empty(layer.keys) for layer in cache.layers], [empty(layer.values) for layer in cache.layers]

    @staticmethod
    def _save(
        saved: tuple[list[Tensor], list[Tensor]] | None, cache: Any, rows: Tensor, width: int, count: int
    ) -> None:
        """Notes the keys and values of the ``count`` tokens drawn so far, before ``rows`` leave the batch or change."""
        if saved is None or count == 0:
            return
        for keys, values, layer in zip(*saved, cache.layers, strict=True):
            keys[rows, :count] = layer.keys[:, :, width : width + count].transpose(1, 2)
            values[rows, :count] = layer.values[:, :, width : width + count].transpose(1, 2)

    def _uniforms(self, nodes: Sequence[Node], widths: Sequence[int], draw: _Draw) -> Tensor:
        """[R, draw.tokens] in [0, 1), a stream for every step of every node; zeros when greedy."""
        length = draw.tokens
        if self.request.temperature == 0:
            return torch.zeros(sum(widths), length)
        draws = [
            np.random.default_rng([self.seed, node.prompt, node.node, node.children, *draw.stream]).random(
                (width, length), dtype=np.float32
            )
            for node, width in zip(nodes, widths, strict=True)
        ]
        return torch.from_numpy(np.concatenate(draws))

    def _steps(
        self, nodes: Sequence[Node], widths: Sequence[int], tokens: list[list[int]], logps: list[float]
    ) -> list[list[Step]]:
        eos = self.request.eos_token_id
        flat = [Step(tuple(ids), logp, ids[-1] == eos) for ids, logp in zip(tokens, logps, strict=True)]
        found, first = [], 0
        for width in widths:
            found.append(flat[first : first + width])
            first += width
        return found

    def _keep(self, steps: list[list[Step]], keys: list[Tensor], values: list[Tensor]) -> None:
        """The keys and values of the wave into the pool: all but the last token of each distinct step."""
        rows, positions, slots, row = [], [], [], 0
        for siblings in steps:
            seen: set[tuple[int, ...]] = set()
            for step in siblings:
                if step.ids not in seen:  # an equal one is merged: nobody will ask for it
                    seen.add(step.ids)
                    first, known = self.pool.reserve(step), range(len(step.ids) - 1)
                    rows += [row] * len(known)
                    positions += list(known)
                    slots += [first + i for i in known]
                row += 1
        index = torch.tensor([rows, positions, slots], device=self.device, dtype=torch.int64)
        self.pool.write(index[2], *([x[index[0], index[1]] for x in group] for group in (keys, values)))

    @torch.inference_mode()
    def label_set_prob(
        self, nodes: Sequence[Node], question_ids: Sequence[int], label_set: Sequence[int]
    ) -> list[float]:
        """P(label set) of the token behind each node's path and ``question_ids``: what the model thinks of the path."""
        if not nodes:
            return []
        if self.why_no_pool is not None or not all(self.pool.has(step) for node in nodes for step in node.steps):
            logits = self._forward_paths([[*node.ids, *question_ids] for node in nodes], 0).logits
        else:
            logits = self._behind(nodes, question_ids)
        labels = torch.tensor(sorted(set(label_set)), device=self.device)
        first = labels[:1].expand(len(nodes))
        _, stats = token_logprobs(logits, first, stats=("label_set_prob",), label_set=labels)
        return stats["label_set_prob"].tolist()

    def _behind(self, nodes: Sequence[Node], question_ids: Sequence[int]) -> Tensor:
        """The logits [B, V] behind the last token of each path and the question, on the pool's keys."""
        slots = padded([self.pool.slots(node.steps) for node in nodes], 0, self.device)  # [B, L]
        tail = torch.tensor([[node.steps[-1].ids[-1], *question_ids] for node in nodes], device=self.device)  # [B, T]
        lengths = torch.tensor([len(node.ids) for node in nodes], device=self.device)
        mask = torch.nn.functional.pad((slots != 0).long(), (0, tail.shape[1]), value=1)
        positions = lengths[:, None] - 1 + torch.arange(tail.shape[1], device=self.device)
        return self._forward(tail, mask, positions, self.pool.gather(slots, tail.shape[1]))
