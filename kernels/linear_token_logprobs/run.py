"""What the forward and the backward op of ``linear_token_logprobs`` do: rows compacted, engine, shards, statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.dispatch import Op
from fastpo.kernels.common.checks import STATS
from fastpo.kernels.linear_token_logprobs import engine, gemm, parallel, statistics
from fastpo.kernels.linear_token_logprobs.checks import check_values
from fastpo.kernels.linear_token_logprobs.cpu_kernels import prefault
from fastpo.kernels.linear_token_logprobs.engine import Batch, Gradients, Head, Slopes, State
from fastpo.kernels.linear_token_logprobs.entries import Entries, entries
from fastpo.kernels.linear_token_logprobs.planning import Plan, plan

# What the forward returns, in this order. Sizes depend on shapes and the plan, not on how many labels are ignored.
OUTPUTS = ("logps", *STATS, "picked", "normalizer", "product", "lora_product", "kept", "references")


@dataclass(frozen=True)
class Inputs:
    """The arguments that both ops start with."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]; of this rank's shard where there is a group
    labels: Tensor  # [M] int64, of the whole vocabulary
    bias: Tensor | None  # [V]
    rows: Tensor | None  # [M] int64
    temperatures: Tensor | None  # [N], replaces temperature where given
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    lora_scale: float
    temperature: float
    logit_scale: float
    logit_softcap: float  # 0: none
    ignore_index: int | None
    memory_budget: int | None
    group: str  # name of a process group; "": none

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.lora_b, self.logit_scale, self.logit_softcap)

    def plan(self, hidden_grad: bool, head_grad: bool) -> Plan:
        return plan(
            self.hidden.shape[0],
            *self.weight.shape,
            dtype=self.weight.dtype,
            device=self.weight.device.type,
            hidden_grad=hidden_grad,
            head_grad=head_grad,
            memory_budget=self.memory_budget,
        )

    def entries(self, offset: int) -> Entries:
        """The labels that count; ``offset`` is the first vocabulary entry of this shard."""
        return entries(self.labels, self.rows, self.ignore_index).shifted(offset)

    def batch(self, found: Entries) -> Batch:
        """The rows that are computed, as the GEMMs take them."""
        x = gemm.operand(found.compact_rows(self.hidden)).contiguous()
        u = None if self.lora_a is None else (gemm.small(x, self.lora_a.t()) * self.lora_scale).to(x.dtype)
        if self.temperatures is None:
            inverse = torch.full((found.num_rows,), 1 / self.temperature, dtype=gemm.wide(x.dtype), device=x.device)
        else:
            inverse = found.compact_rows(self.temperatures).reciprocal()
        return Batch(x, u, inverse, found)


def allocate(inputs: Inputs, stats: str, hidden_grad: bool, head_grad: bool) -> dict[str, Tensor]:
    """The forward's outputs, uninitialised."""
    cost = inputs.plan(hidden_grad, head_grad)
    n, m = inputs.hidden.shape[0], inputs.labels.shape[0]
    product_rows = n if hidden_grad else 0
    tiles = -(-inputs.weight.shape[0] // cost.vocab_tile) if head_grad else 0
    shapes: dict[str, tuple[int, ...]] = {
        "logps": (m,),
        **{name: (m if name in stats.split(",") else 0,) for name in STATS},
        "picked": (m,),  # y of the labels, by entry
        "normalizer": (4, n),  # by computed row: m of this shard, then the normalizer over the whole vocabulary
        "product": (product_rows, inputs.hidden.shape[1]),
        "lora_product": (product_rows, 0 if inputs.lora_b is None else inputs.lora_b.shape[1]),
        "kept": (cost.kept_elements,),
        "references": (tiles, n),
    }
    wide = gemm.wide(inputs.hidden.dtype)
    types = {"kept": inputs.weight.dtype}
    return {name: inputs.hidden.new_empty(shapes[name], dtype=types.get(name, wide)) for name in OUTPUTS}


def _zero_rest(outputs: dict[str, Tensor], found: Entries) -> None:
    """The per-row outputs beyond the rows that are computed, so that no output depends on what memory held before."""
    rows, count = found.num_rows, found.labels.shape[0]
    outputs["picked"][count:] = 0
    outputs["normalizer"][:, rows:] = 0
    outputs["references"].zero_()
    for name in ("product", "lora_product"):
        outputs[name][rows:] = 0


def _state(outputs: dict[str, Tensor], found: Entries, topk: int = 0) -> State:
    """Views of the outputs for the rows and entries that are computed."""
    rows, count = found.num_rows, found.labels.shape[0]
    normalizer, product, lora_product = outputs["normalizer"], outputs["product"], outputs["lora_product"]
    return State(
        largest=normalizer[0, :rows],
        sums=normalizer.new_empty(3, rows, dtype=torch.float64),
        picked=outputs["picked"][:count],
        top=normalizer.new_empty(rows, topk) if topk else None,
        product=product[:rows] if product.numel() else None,
        lora_product=lora_product[:rows] if lora_product.numel() else None,
        kept=outputs["kept"],
        references=outputs["references"][:, :rows],
    )


def forward(
    inputs: Inputs, label_set: Tensor | None, stats: str, topk: int, hidden_grad: bool, head_grad: bool, op: Op
) -> list[Tensor]:
    """The outputs in the order of ``OUTPUTS``. ``label_set`` [L], ``stats`` names, comma-separated."""
    group = parallel.resolve(inputs.group)
    offset, vocab_size = parallel.vocab_range(inputs.weight.shape[0], inputs.weight.device, group)
    values = (inputs.labels, inputs.rows, inputs.temperatures, label_set)
    check_values(*values, inputs.hidden.shape[0], vocab_size, inputs.ignore_index)
    outputs = allocate(inputs, stats, hidden_grad, head_grad)
    wanted = [name for name in STATS if name in stats.split(",")]
    found = inputs.entries(offset)
    _zero_rest(outputs, found)
    if found.num_rows == 0:
        for name in ("logps", *STATS):
            outputs[name].zero_()
        return list(outputs.values())
    prefault(outputs["kept"][: found.num_rows * inputs.weight.shape[0]])
    prefault(outputs["product"][: found.num_rows])
    batch, head = inputs.batch(found), inputs.head
    state = _state(outputs, found, min(topk, vocab_size) if {"topk_mass", "topk_entropy"} & set(wanted) else 0)
    kernels = op.pick(inputs.weight.device, inputs.weight).impl
    moments = "entropy" in wanted or "sum_p2" in wanted
    engine.forward(head, batch, inputs.plan(hidden_grad, head_grad), state, kernels, moments)
    largest, sums, picked, top = parallel.combine(state, batch.inverse_temperature, group)
    in_set = None
    if label_set is not None:
        in_set = parallel.maximum_over(group, statistics.set_logits(head, batch, label_set - offset))
    norm = statistics.normalizer(largest, sums, batch.inverse_temperature)
    by_row = statistics.row_statistics(wanted, batch, norm, sums, top, in_set)
    outputs["normalizer"][1:, : found.num_rows] = norm
    state.picked.copy_(picked)
    found.scatter(statistics.entry_logps(batch, norm, picked), outputs["logps"])
    for name in wanted:
        found.scatter(by_row[name].index_select(0, found.owners), outputs[name])
    return list(outputs.values())


def empty_gradients(inputs: Inputs, wanted: list[bool]) -> list[Tensor]:
    """For hidden, weight, bias, lora_a, lora_b: contiguous and uninitialised, [0] where it is not wanted."""
    tensors = (inputs.hidden, inputs.weight, inputs.bias, inputs.lora_a, inputs.lora_b)
    return [
        inputs.hidden.new_empty(like.shape if want and like is not None else 0)
        for like, want in zip(tensors, wanted, strict=True)
    ]


def backward(
    inputs: Inputs, wanted: list[bool], saved: list[Tensor], upstream: list[Tensor | None], op: Op
) -> list[Tensor]:
    """The gradients of hidden, weight, bias, lora_a, lora_b.

    ``saved``: the forward's outputs. ``upstream``: gradients [M] of logps, logsumexp, entropy, sum_p2.
    """
    group = parallel.resolve(inputs.group)
    offset, _ = parallel.vocab_range(inputs.weight.shape[0], inputs.weight.device, group)
    grads = [prefault(grad) for grad in empty_gradients(inputs, wanted)]
    found = inputs.entries(offset)
    if found.num_rows == 0:
        return [grad.zero_() for grad in grads]
    outputs = dict(zip(OUTPUTS, saved, strict=True))
    batch, state = inputs.batch(found), _state(outputs, found)
    slopes = _slopes(inputs.head, batch, state, outputs, upstream)
    dx, du = _shard_gradients(inputs, batch, state, slopes, grads, wanted, op)
    parallel.sum_over(group, dx, du)
    _finish_hidden(inputs, batch, dx, du, grads)
    return grads


def _slopes(
    head: Head, batch: Batch, state: State, outputs: dict[str, Tensor], upstream: list[Tensor | None]
) -> Slopes:
    found = batch.entries
    grad_logps, *of_stats = (None if grad is None else found.compact(grad) for grad in upstream)
    grad_logps = torch.zeros_like(state.picked) if grad_logps is None else grad_logps
    norm = outputs["normalizer"][1:, : found.num_rows]
    sum_p2 = found.compact(outputs["sum_p2"]) if outputs["sum_p2"].numel() else None
    coefs = statistics.coefficients(batch, grad_logps, *of_stats, norm[2], sum_p2)
    only_a = of_stats[1] is None and of_stats[2] is None
    return Slopes.of(head, batch, norm, state.picked, grad_logps, coefs, only_a)


def _shard_gradients(
    inputs: Inputs, batch: Batch, state: State, slopes: Slopes, grads: list[Tensor], wanted: list[bool], op: Op
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the head's gradients; returns dL/dx [R, H] without LoRA's part and dL/du [R, r], of this shard."""
    of_hidden, of_weight, of_bias, of_a, of_b = wanted
    kernels = op.pick(inputs.weight.device, inputs.weight).impl
    made = slopes.only_a and state.product is not None
    dx = du = None
    if (of_hidden or of_a) and not made:
        dx = torch.zeros_like(batch.x, dtype=slopes.coefs.dtype)
        du = None if batch.u is None else torch.zeros_like(batch.u, dtype=slopes.coefs.dtype)
    if dx is not None or of_weight or of_bias or of_b:
        cost = inputs.plan(state.product is not None, state.references.shape[0] > 0)
        of_head = [grads[i] if wanted[i] else None for i in (1, 2, 4)]
        into = Gradients(*of_head, x=dx, u=du)
        engine.head_gradients(inputs.head, batch, cost, state, slopes, into, kernels)
    if (of_hidden or of_a) and made:
        dx = torch.empty_like(batch.x, dtype=slopes.coefs.dtype)
        du = None if batch.u is None else torch.empty_like(batch.u, dtype=slopes.coefs.dtype)
        engine.hidden_gradient(inputs.head, batch, state, slopes, kernels, dx, du)
    return dx, du


def _finish_hidden(inputs: Inputs, batch: Batch, dx: Tensor | None, du: Tensor | None, grads: list[Tensor]) -> None:
    """Adds LoRA's part to dx [R, H], and writes the gradients of hidden [N, H] and of lora_a [r, H]."""
    if dx is None:
        return
    if du is not None:
        du = (du * inputs.lora_scale).to(batch.x.dtype)
        dx += gemm.small(du, inputs.lora_a)
        if grads[3].numel():
            grads[3].copy_(gemm.small(du.t(), batch.x))
    if grads[0].numel():
        batch.entries.scatter_rows(dx, grads[0])
