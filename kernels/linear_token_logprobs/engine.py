"""A fused LM head, tile by tile: GEMM, statistics, and, once the coefficient of each row is known, the gradients.

The gradient of a row is a combination of vectors that do not depend on what comes upstream, so dhidden is made in the
forward: with e_v = exp(t_v) dy/dz_v, 0 at the row's own labels, ``product_i = sum_v e_iv W_v``, rescaled where the
reference m of t rises; then ``dhidden_i = factor_i product_i + sum_e value_e W[label_e]``. Only the weight's gradient
has to wait for the coefficients: ``dW_v = sum_i e_iv (factor_i x_i) + sum_e value_e x[row_e]``, one GEMM on tiles of e
that were kept, two where the logits are made again.

    state = forward(head, batch, plan, ...)              # 1F; 2F with dhidden in the making
    slopes = Slopes.of(...)                              # from dL/dlogps
    hidden_gradient(head, batch, state, slopes, ...)     # no GEMM
    head_gradients(head, batch, plan, state, slopes, ...)   # 1F on tiles that were kept, 2F on the others
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastpo.kernels.linear_token_logprobs import gemm
from fastpo.kernels.linear_token_logprobs.entries import Entries
from fastpo.kernels.linear_token_logprobs.planning import Plan


@dataclass(frozen=True)
class Head:
    """How logits come from a hidden row x: ``y = softcap(logit_scale (W x + B u + bias))``, u from LoRA's A."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_b: Tensor | None = None  # [V, r]
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # 0: none

    @property
    def scalars(self) -> tuple[float, float]:
        return self.logit_scale, self.logit_softcap

    def tile(self, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight [v, H], LoRA's B [v, r] and bias [v] of some vocabulary entries, as GEMMs and kernels take them."""
        lora_b = None if self.lora_b is None else self.lora_b[start:stop]
        bias = None if self.bias is None else self.bias[start:stop].to(gemm.wide(self.bias.dtype))
        return self.weight[start:stop], lora_b, bias


@dataclass(frozen=True)
class Batch:
    """The R rows that are computed."""

    x: Tensor  # [R, H] as the GEMMs take it
    u: Tensor | None  # [R, r] lora_scale A x
    inverse_temperature: Tensor  # [R]
    entries: Entries

    def chunks(self, size: int) -> Iterator[tuple[int, int, "Batch"]]:
        """(start, stop, part) of at most ``size`` rows. ``entries.starts`` of a part index the labels of the whole."""
        for start in range(0, self.x.shape[0], size):
            stop = min(start + size, self.x.shape[0])
            u = None if self.u is None else self.u[start:stop]
            part = self.entries.part(start, stop)
            yield start, stop, Batch(self.x[start:stop], u, self.inverse_temperature[start:stop], part)


@dataclass(frozen=True)
class State:
    """What the forward finds of R rows with E entries. In a vocabulary shard: of this shard alone."""

    largest: Tensor  # [R] m, what t = (y - m) / temperature is relative to: near the largest y or above it
    sums: Tensor  # [3, R] float64, of e^t, t e^t, e^2t
    picked: Tensor  # [E] y of each entry's label; NaN where no tile has the label
    top: Tensor | None  # [R, k] the largest y, descending
    product: Tensor | None  # [R, H] relative to m; None where dhidden is not wanted
    lora_product: Tensor | None  # [R, r] the same with LoRA's B in place of W
    kept: Tensor  # [n] e of the first tiles: row chunk by row chunk, each tile in one piece
    references: Tensor  # [tiles, R] m at the time of each kept tile

    @staticmethod
    def empty(head: Head, batch: Batch, plan: Plan, *, with_hidden: bool, topk: int = 0) -> "State":
        """A state that ``forward`` fills."""
        num_rows, hidden_size = batch.x.shape
        dtype = gemm.wide(head.weight.dtype)
        tiles = -(-head.weight.shape[0] // plan.vocab_tile)

        def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device=batch.x.device)

        return State(
            largest=new(num_rows),
            sums=new(3, num_rows, of=torch.float64),
            picked=new(batch.entries.labels.shape[0]),
            top=new(num_rows, topk) if topk else None,
            product=new(num_rows, hidden_size) if with_hidden else None,
            lora_product=new(num_rows, batch.u.shape[1]) if with_hidden and batch.u is not None else None,
            kept=new(plan.kept_elements, of=head.weight.dtype),
            references=new(tiles if plan.kept_elements else 0, num_rows),
        )

    def kept_tile(self, first_row: int, rows: int, start: int, columns: int, vocab_size: int) -> Tensor | None:
        """The place of a tile [rows, columns] among the kept ones; None beyond their number."""
        return self.tile_at(first_row * vocab_size + rows * start, rows, columns)

    def tile_at(self, offset: int, rows: int, columns: int) -> Tensor | None:
        """A tile of ``kept``; None beyond its end."""
        if offset + rows * columns > self.kept.numel():
            return None
        return self.kept[offset : offset + rows * columns].view(rows, columns)


def _tiles(vocab_size: int, width: int) -> Iterator[tuple[int, int, int]]:
    for number, start in enumerate(range(0, vocab_size, width)):
        yield number, start, min(start + width, vocab_size)


def forward(head: Head, batch: Batch, plan: Plan, state: State, kernels: ModuleType, moments: bool = False) -> None:
    """Fills ``state``: 1F, or 2F with ``state.product``. ``moments``: whether sums of t e^t and e^2t are wanted."""
    state.largest.fill_(-torch.inf)
    state.sums.zero_()
    state.picked.fill_(torch.nan)
    if state.top is not None:
        state.top.fill_(-torch.inf)
    for first, last, part in batch.chunks(plan.row_chunk):
        _forward_rows(head, part, plan, state, first, last, kernels, moments)


def _forward_rows(
    head: Head, part: Batch, plan: Plan, state: State, first: int, last: int, kernels: ModuleType, moments: bool
) -> None:
    vocab_size = head.weight.shape[0]
    top = None if state.top is None else state.top[first:last]
    decay = torch.empty_like(state.largest[first:last])
    rows = (part.inverse_temperature, part.entries.starts, part.entries.labels)
    results = (state.largest[first:last], state.sums[:, first:last], decay, state.picked, top, moments)
    spare = gemm.spare(part.x, (last - first) * plan.vocab_tile)
    for number, start, stop in _tiles(vocab_size, plan.vocab_tile):
        w, lora_b, bias = head.tile(start, stop)
        kept = state.kept_tile(first, last - first, start, stop - start, vocab_size)
        z = _logits(part, w, lora_b, _room(spare, kept, last - first, stop - start))
        wanted = kept is not None or state.product is not None
        e = gemm.tile_for_product(z, w, kept) if wanted else None
        copy = kept if kept is not e else None
        kernels.forward(z, e, copy, bias, *rows, start, *head.scalars, _headroom(head.weight.dtype), *results)
        if kept is not None:
            state.references[number, first:last] = state.largest[first:last]
        before = None if number == 0 else decay
        if state.product is not None and e is not None:
            gemm.times(e, w, state.product[first:last], before)
        if state.lora_product is not None and e is not None and lora_b is not None:
            gemm.times(e, lora_b, state.lora_product[first:last], before)


def _room(spare: Tensor | None, kept: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """Where logits [rows, columns] go: to their kept tile, if it has their type, else to ``spare``; None: anywhere."""
    if spare is None:
        return None
    if kept is not None and kept.dtype == spare.dtype:
        return kept
    return spare[: rows * columns].view(rows, columns)


def _headroom(dtype: torch.dtype) -> float:
    """How far t may be above 0 before the reference of the row is raised: e^t must be finite in the weight's type.

    Not at every new maximum, so that on a CPU nearly all tiles of a row have the same reference.
    """
    return 10.0 if dtype == torch.float16 else 20.0


def _logits(part: Batch, w: Tensor, lora_b: Tensor | None, out: Tensor | None) -> Tensor:
    """[R, v] of a tile's weight [v, H] and LoRA factor [v, r], in ``out`` if it is given."""
    z = gemm.logits(part.x, w, out)
    return z if lora_b is None else z.add_(gemm.small(part.u, lora_b.t()))


@dataclass(frozen=True)
class Slopes:
    """dL/dz of all rows: ``dL/dt_v = sum over entries of grad_e 1[v = label_e] + p_v (a + b t_v + c p_v)``."""

    norm: Tensor  # [3, R] normalizer over the whole vocabulary: c, r, mean t
    scale: Tensor  # [R] logit_scale / temperature
    coefs: Tensor  # [3, R] a, b, c
    values: Tensor  # [E] dL/dz at the labels; of equal labels of a row the first has the part with p
    only_a: bool  # b and c are 0: what the forward made serves; else everything is computed again

    @staticmethod
    def of(
        head: Head,
        batch: Batch,
        norm: Tensor,  # [3, R]
        picked: Tensor,  # [E] y of each entry's label
        grads: Tensor,  # [E] dL/dlogps
        coefs: Tensor,  # [3, R]
        only_a: bool = True,
    ) -> "Slopes":
        owners, first = batch.entries.owners, batch.entries.first
        scale = batch.inverse_temperature * head.logit_scale
        centre, rest, _ = norm[:, owners].double()
        t = (picked.double() - centre) * batch.inverse_temperature[owners]
        p = (t - rest).exp()
        a, b, c = coefs[:, owners] if first is None else coefs[:, owners] * first
        values = grads + a * p  # in float64: where the model is sure, p is close to 1 and a = -grads
        if not only_a:
            values += c * p * p + torch.where(p == 0, 0.0, b * p * t)
        slope = scale[owners]
        if head.logit_softcap:
            slope = slope * (1 - (picked / head.logit_softcap).square())
        return Slopes(norm, scale, coefs, values.to(grads.dtype) * slope, only_a)

    def factor(self, rows: slice, reference: Tensor, inverse_temperature: Tensor) -> Tensor:
        """By what e of some rows, relative to ``reference`` [R], becomes dL/dz where b and c are 0."""
        centre, rest, _ = self.norm[:, rows].double()
        decay = ((reference.double() - centre) * inverse_temperature.double() - rest).exp()
        return self.coefs[0, rows] * self.scale[rows] * decay.to(self.coefs.dtype)


def hidden_gradient(
    head: Head, batch: Batch, state: State, slopes: Slopes, kernels: ModuleType, dx: Tensor, du: Tensor | None
) -> None:
    """Writes dL/dx [R, H] without LoRA's part, and dL/du [R, r]: from the forward's products, no GEMM."""
    factor = slopes.factor(slice(None), state.largest, batch.inverse_temperature)
    starts, labels, values = batch.entries.starts, batch.entries.labels, slopes.values
    kernels.finish(state.product, factor, starts, *_rows_of(head.weight, labels), values, dx)
    if du is not None and head.lora_b is not None:
        kernels.finish(state.lora_product, factor, starts, *_rows_of(head.lora_b, labels), values, du)


def _rows_of(weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [E] and a matrix with contiguous rows that they index: weight [V, H] itself if it has such rows."""
    if weight.stride(1) == 1:
        return labels, weight
    inside = (labels >= 0) & (labels < weight.shape[0])
    numbers = torch.arange(labels.shape[0], device=labels.device)
    return torch.where(inside, numbers, -1), weight.index_select(0, torch.where(inside, labels, 0))


@dataclass(frozen=True)
class Gradients:
    """Where ``head_gradients`` writes; None where a gradient is not wanted."""

    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_b: Tensor | None = None  # [V, r]
    x: Tensor | None = None  # [R, H] float32, zeroed: where dhidden was not made in the forward
    u: Tensor | None = None  # [R, r] likewise

    def multiplied(self, batch: Batch) -> dict[str, Tensor]:
        """By name of the head's gradients that are wanted, the m [R, k] that they are the product (dL/dz)^T m with."""
        found = {"weight": batch.x, "bias": torch.ones_like(batch.x[:, :1]), "lora_b": batch.u}
        return {name: m for name, m in found.items() if m is not None and getattr(self, name) is not None}


def head_gradients(
    head: Head, batch: Batch, plan: Plan, state: State, slopes: Slopes, into: Gradients, kernels: ModuleType,
    accumulate: bool = False, spare_rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the gradients in ``into``, tile by tile of the vocabulary, from what was kept or from the logits again.

    The head's gradients are summed over rows in fp32 and rounded once. ``accumulate`` adds to them. ``spare_rows``
    [R, H] may be overwritten.
    """
    vocab_size = head.weight.shape[0]
    factors = into.multiplied(batch)
    kept = Kept.of(batch, state, slopes, factors, vocab_size, spare_rows)
    spare = gemm.spare(batch.x, min(plan.row_chunk, len(batch.x)) * plan.vocab_tile)
    for number, start, stop in _tiles(vocab_size, plan.vocab_tile):
        operands, kept_rows = head.tile(start, stop), 0
        tiles = [
            state.kept_tile(first, last - first, start, stop - start, vocab_size) if slopes.only_a else None
            for first, last, _ in batch.chunks(plan.row_chunk)
        ]
        totals = {name: Total.of(getattr(into, name)[start:stop], tiles, slopes.coefs.dtype) for name in factors}
        for (first, last, part), d in zip(batch.chunks(plan.row_chunk), tiles, strict=True):
            rows = slice(first, last)
            if d is None:
                d = _tile_gradient(head, part, slopes, rows, start, operands, kernels, spare)
                multiplied = {name: m[rows] for name, m in factors.items()}
            else:
                multiplied, kept_rows = kept.scaled(rows, number), last
            for name, m in multiplied.items():
                totals[name].add(name, d, m, first > 0 or (accumulate and totals[name].direct))
            if into.x is not None:
                into.x[rows] += gemm.times(d, operands[0])
            if into.u is not None:
                into.u[rows] += gemm.small(d, operands[1])
        for name, total in totals.items():
            if kept_rows and total.sum is not None:
                kept.add_labels(name, total.sum, start, stop, kept_rows, kernels)
            total.finish(accumulate)


@dataclass
class Total:
    """The gradient of some vocabulary entries as it is summed over row chunks."""

    out: Tensor  # [v, k] where it belongs
    direct: bool  # it is summed there
    chunks: int
    sum: Tensor | None = None  # [v, k] of the wide type: out itself, or the first chunk's product

    @staticmethod
    def of(out: Tensor, tiles: list[Tensor | None], dtype: torch.dtype) -> "Total":
        """out [v, k] or [v], summed in place unless it is narrower than the sum or ``tiles`` lie in its memory."""
        out = out.view(out.shape[0], -1)
        direct = out.dtype == dtype and not any(tile is not None and _overlap(tile, out) for tile in tiles)
        return Total(out, direct, len(tiles), out if direct else None)

    def add(self, name: str, d: Tensor, m: Tensor, add: bool) -> None:
        """d^T m, d [R, v], m [R, k], added to the sum or in its place."""
        if name == "weight":
            self.sum = gemm.outer(d, m, self.sum, add, past_cache=self.direct and self.chunks == 1)
            return
        product = gemm.narrow_outer(d, m)
        if self.sum is None:
            self.sum = product
        elif add:
            self.sum.add_(product)
        else:
            self.sum.copy_(product)

    def finish(self, accumulate: bool) -> None:
        if self.direct or self.sum is None:
            return
        if accumulate:
            self.out.add_(self.sum)
        else:
            self.out.copy_(self.sum)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    starts, sizes = (a.data_ptr(), b.data_ptr()), (a.nbytes, b.nbytes)
    return starts[0] < starts[1] + sizes[1] and starts[1] < starts[0] + sizes[0]


def _tile_gradient(
    head: Head, part: Batch, slopes: Slopes, rows: slice, start: int, operands: tuple, kernels: ModuleType,
    spare: Tensor | None,
) -> Tensor:  # fmt: skip
    """dL/dz [R, v] of one tile, from its logits computed again."""
    w, lora_b, bias = operands
    z = _logits(part, w, lora_b, _room(spare, None, len(part.x), len(w)))
    d = gemm.tile_for_product(z, w)
    where = (part.inverse_temperature, part.entries.starts, part.entries.labels, start, *head.scalars)
    kernels.gradient(z, d, bias, *where, *slopes.norm[:2, rows], slopes.coefs[:, rows], slopes.values)
    return d


@dataclass(frozen=True)
class Kept:
    """How kept tiles become gradients of the head: ``e^T (factor m) + sum over labels of value_e m[row_e]``."""

    batch: Batch
    state: State
    slopes: Slopes
    m: dict[str, Tensor]  # [R, k] what dL/dz is multiplied with, by the name of the gradient
    starts: Tensor  # [V+1] int64: the entries whose label is v are starts[v]:starts[v+1] of the next two
    owners: Tensor  # [E] int64, computed rows of the entries in the order of their labels
    values: Tensor  # [E] dL/dz at the labels, likewise
    last: dict[int, tuple[Tensor, dict[str, Tensor]]]  # of each row chunk: reference, and m scaled for it
    spare_rows: Tensor | None  # [R, H] where x is scaled to, if its type is x's

    @staticmethod
    def of(
        batch: Batch, state: State, slopes: Slopes, m: dict[str, Tensor], vocab_size: int, spare_rows: Tensor | None
    ) -> "Kept":
        labels, order = torch.sort(batch.entries.labels, stable=True)
        starts = torch.searchsorted(labels, torch.arange(vocab_size + 1, device=labels.device))
        return Kept(batch, state, slopes, m, starts, batch.entries.owners[order], slopes.values[order], {}, spare_rows)

    def scaled(self, rows: slice, number: int) -> dict[str, Tensor]:
        """m of some rows times the factor that e of this tile needs."""
        reference = self.state.references[number, rows]
        known = self.last.get(rows.start)
        if known is not None and reference.device.type == "cpu" and torch.equal(known[0], reference):
            return known[1]
        factor = self.slopes.factor(rows, reference, self.batch.inverse_temperature[rows])
        scaled = {name: self._times(name, m[rows], factor[:, None], rows) for name, m in self.m.items()}
        self.last[rows.start] = reference, scaled
        return scaled

    def _times(self, name: str, m: Tensor, factor: Tensor, rows: slice) -> Tensor:
        if name == "weight" and self.spare_rows is not None and self.spare_rows.dtype == m.dtype:
            return torch.mul(m, factor, out=self.spare_rows[rows])
        return (m * factor).to(m.dtype)

    def add_labels(self, name: str, total: Tensor, start: int, stop: int, kept_rows: int, kernels: ModuleType) -> None:
        """Adds the part of the labels [start, stop) in the first ``kept_rows`` rows to total [stop - start, k]."""
        values = self.values
        if kept_rows < self.batch.x.shape[0]:
            values = torch.where(self.owners < kept_rows, values, 0)
        one = torch.ones_like(total[:, 0])
        kernels.finish(total, one, self.starts[start : stop + 1], self.owners, self.m[name], values, total)
