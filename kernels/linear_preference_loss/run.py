"""What the op ``linear_preference_loss`` does: group by group through the head, coefficients, gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.kernels.common.checks import STATS
from fastpo.kernels.linear_token_logprobs import engine, gemm, statistics
from fastpo.kernels.linear_token_logprobs.checks import check_values
from fastpo.kernels.linear_token_logprobs.cpu_kernels import prefault
from fastpo.kernels.linear_token_logprobs.engine import Batch, Gradients, Slopes, State
from fastpo.kernels.linear_token_logprobs.entries import Entries, entries
from fastpo.kernels.linear_token_logprobs.op import OP as HEAD
from fastpo.kernels.linear_token_logprobs.planning import Plan
from fastpo.kernels.linear_token_logprobs.run import Inputs
from fastpo.kernels.preference_loss.checks import check_values as check_sequences
from fastpo.kernels.preference_loss.records import Outputs, TokenGrads, Tokens, TokenSettings, Tuples, TupleSettings

from .grouping import Costs, LossPlan, group

HEAD_GRADS = ("hidden", "weight", "bias", "lora_a", "lora_b")
SEGMENT_GRADS = TokenGrads._fields[1:]  # all but the gradient of the log-probs
# What the op returns, in this order. Sizes depend on shapes alone; [0] where something is not wanted.
OUTPUTS = (
    *Outputs._fields[:-2],
    "token_logps",
    *STATS,
    *(f"d_{name}" for name in HEAD_GRADS),
    *(f"d_{name}" for name in SEGMENT_GRADS),
)


@dataclass(frozen=True)
class Loss:
    """The loss as a function of the log-probs: arguments of preference_loss's own ops."""

    tokens: Tokens  # logps are ignored; the mask says which tokens count
    tuples: Tuples
    token_set: TokenSettings
    tuple_set: TupleSettings

    def forward(self, logps: Tensor) -> Outputs:
        """logps [T]; what stands there for sequences that are not known yet reaches only tuples that they are in."""
        arguments = (*self.tokens._replace(logps=logps), None, *self.tuples, *self.token_set, *self.tuple_set)
        return Outputs(*torch.ops.fastpo.preference_loss_fwd(*arguments))

    def slopes(self, logps: Tensor, outputs: Outputs, needs: list[bool]) -> TokenGrads:
        """Gradients of the loss by logps [T] and the fields of the segments."""
        made = (None, outputs.score_grads, outputs.nll_grads)
        arguments = (*made, *self.tokens._replace(logps=logps), outputs.lengths, *self.token_set, needs)
        return TokenGrads(*torch.ops.fastpo.preference_loss_bwd(*arguments))

    def by_logps(self, logps: Tensor) -> Tensor:
        """[T] d loss / d logps."""
        return self.slopes(logps, self.forward(logps), [True] + [False] * len(SEGMENT_GRADS)).logps


@dataclass(frozen=True)
class Wanted:
    """What is asked for besides the loss."""

    stats: list[str]
    topk: int
    label_set: Tensor | None  # [L]
    head: list[bool]  # gradients of HEAD_GRADS
    segments: list[bool]  # gradients of SEGMENT_GRADS

    @property
    def hidden_grad(self) -> bool:
        return self.head[0] or self.head[3]

    @property
    def head_grad(self) -> bool:
        return self.head[1] or self.head[2] or self.head[4]


def allocate(inputs: Inputs, tokens: Tokens, tuples: Tuples, wanted: Wanted) -> dict[str, Tensor]:
    """Uninitialised outputs."""
    per_token, per_tuple = tokens.mask.shape, tuples.index.shape[:1]
    per_sequence, per_member = (tokens.cu_seqlens.shape[0] - 1,), tuples.index.shape
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("scores", "logps", "lengths"), per_sequence)
    shapes |= {"loss": (), "losses": per_tuple, "rewards": per_member, "nll": per_member, "token_logps": per_token}
    shapes |= {name: per_token if name in wanted.stats else (0,) for name in STATS}
    for name, needed in zip(SEGMENT_GRADS, wanted.segments, strict=True):
        shapes[f"d_{name}"] = per_token if needed else (0,)
    for name, needed in zip(HEAD_GRADS, wanted.head, strict=True):
        shapes[f"d_{name}"] = getattr(inputs, name).shape if needed else (0,)
    wide = gemm.wide(inputs.hidden.dtype)
    types = {f"d_{name}": inputs.hidden.dtype for name in HEAD_GRADS} | {"lengths": torch.int64}
    return {name: inputs.hidden.new_empty(shapes[name], dtype=types.get(name, wide)) for name in OUTPUTS}


def forward(inputs: Inputs, loss: Loss, wanted: Wanted) -> tuple[Tensor, ...]:
    """The outputs in the order of OUTPUTS."""
    mask, labels = loss.tokens.mask, inputs.labels
    outputs = allocate(inputs, loss.tokens, loss.tuples, wanted)
    logps = outputs["token_logps"].zero_()
    if labels.device.type == "cpu":
        check_sequences(loss.tokens._replace(logps=logps), loss.tuples.index, loss.tokens.cu_seqlens.shape[0] - 1)
    values = (labels, inputs.rows, inputs.temperatures, wanted.label_set)
    check_values(*values, inputs.hidden.shape[0], inputs.weight.shape[0], None, mask)
    for name in wanted.stats:
        outputs[name].zero_()
    plan = plan_of(inputs, loss, wanted)
    totals = Totals(inputs, outputs, wanted, plan)
    for positions, head_plan in parts(plan, loss.tokens.cu_seqlens, mask):
        _run_group(positions, head_plan, inputs, loss, wanted, outputs, totals)
    totals.finish()
    result = loss.forward(logps)
    for name in Outputs._fields[:-2]:
        outputs[name].copy_(getattr(result, name))
    if any(wanted.segments):
        slopes = loss.slopes(logps, result, [False, *wanted.segments])
        for name in SEGMENT_GRADS:
            outputs[f"d_{name}"].copy_(getattr(slopes, name))
    return tuple(outputs[name] for name in OUTPUTS)


def _run_group(
    positions: Tensor, head_plan: Plan, inputs: Inputs, loss: Loss, wanted: Wanted, outputs: dict, totals: "Totals"
) -> None:
    """Log-probs and statistics of a group's tokens into the outputs, their gradients into the totals."""
    logps = outputs["token_logps"]
    found = entries_at(inputs.labels, inputs.rows, positions)
    known = Known.of(inputs, found, head_plan, wanted, totals)
    logps.index_copy_(0, known.positions, known.logps)
    for name in wanted.stats:
        outputs[name].index_copy_(0, known.positions, known.by_row[name].index_select(0, found.owners))
    if totals.any:
        totals.add(known, loss.by_logps(logps).index_select(0, known.positions))


def plan_of(inputs: Inputs, loss: Loss, wanted: Wanted) -> LossPlan:
    """The plan for these tensors."""
    weight, (vocab_size, hidden_size) = inputs.weight, inputs.weight.shape
    grads = (wanted.hidden_grad, wanted.head_grad, wanted.head[1])
    costs = Costs(weight, vocab_size, hidden_size, *grads, inputs.memory_budget)
    return group(loss.tokens.cu_seqlens, loss.tokens.mask, inputs.rows, loss.tuples.index, costs)


def parts(plan: LossPlan, cu_seqlens: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Plan]]:
    """(positions [t] of the tokens that count, plan of the head) of each group; positions in ascending order."""
    kept = mask.nonzero()[:, 0]
    group_of = plan.group_of.to(mask.device)
    of_token = torch.repeat_interleave(group_of, cu_seqlens.diff(), output_size=mask.shape[0]).index_select(0, kept)
    order = torch.argsort(of_token, stable=True)
    positions = kept.index_select(0, order).split([each.tokens for each in plan.groups])
    yield from zip(positions, (each.head for each in plan.groups), strict=True)


def entries_at(labels: Tensor, rows: Tensor | None, positions: Tensor) -> Entries:
    """The entries of some labels [t] alone; ``positions`` of the result are among all labels."""
    labels = labels.index_select(0, positions)
    if rows is None:
        starts = torch.arange(labels.shape[0] + 1, device=labels.device)
        return Entries(positions, positions, starts, starts[:-1], labels, None)
    found = entries(labels, rows.index_select(0, positions), None)
    return replace(found, positions=found.compact(positions))


@dataclass(frozen=True)
class Known:
    """What the head's forward finds of a group of R rows with E entries."""

    batch: Batch
    plan: Plan
    state: State
    positions: Tensor  # [E] of the entries among all tokens
    norm: Tensor  # [3, R] normalizer
    by_row: dict[str, Tensor]  # statistics, [R] each
    logps: Tensor  # [E]

    @staticmethod
    def of(inputs: Inputs, found: Entries, plan: Plan, wanted: Wanted, totals: "Totals") -> "Known":
        batch, head = inputs.batch(found), inputs.head
        top = {"topk_mass", "topk_entropy"} & set(wanted.stats)
        k = min(wanted.topk, len(inputs.weight)) if top else 0
        state = _state(inputs, batch, plan, totals, wanted.hidden_grad, k)
        moments = "entropy" in wanted.stats or "sum_p2" in wanted.stats
        engine.forward(head, batch, plan, state, HEAD.pick(inputs.weight.device, inputs.weight).impl, moments)
        in_set = None if wanted.label_set is None else statistics.set_logits(head, batch, wanted.label_set)
        norm = statistics.normalizer(state.largest, state.sums, batch.inverse_temperature)
        by_row = statistics.row_statistics(wanted.stats, batch, norm, state.sums, state.top, in_set)
        logps = statistics.entry_logps(batch, norm, state.picked)
        assert found.positions is not None
        return Known(batch, plan, state, found.positions, norm, by_row, logps)


@dataclass(frozen=True)
class LentState(State):
    """A state whose first tiles are kept in memory that the weight's gradient will overwrite, tile after tile.

    Chunks of at most L rows together lie at its end, tile by tile and there side by side; of a larger chunk the first
    tiles lie at its beginning, one after another (Costs._with_loan says why that is safe).
    """

    lent: Tensor  # [V * L], of the weight's type
    lent_elements: int  # of them used
    row_chunk: int  # rows of a tile

    def kept_tile(self, first_row: int, rows: int, start: int, columns: int, vocab_size: int) -> Tensor | None:
        at, size = first_row * vocab_size + rows * start, rows * columns  # where all tiles stood one after another
        if at >= self.lent_elements:
            return self.tile_at(at - self.lent_elements, rows, columns)
        if self.row_chunk * vocab_size <= self.lent.shape[0]:
            rows_lent = self.lent_elements // vocab_size
            at = self.lent.shape[0] - (vocab_size - start) * rows_lent + first_row * columns
        return self.lent[at : at + size].view(rows, columns)


def _state(inputs: Inputs, batch: Batch, plan: Plan, totals: "Totals", with_hidden: bool, topk: int) -> State:
    """An empty one of the R rows."""
    rows, wide = batch.x.shape[0], gemm.wide(batch.x.dtype)
    tiles = -(-inputs.weight.shape[0] // plan.vocab_tile) if plan.head_grad else 0
    new = batch.inverse_temperature.new_empty
    lent = totals.sums["weight"].view(-1).view(inputs.weight.dtype) if plan.lent_elements else totals.kept[:0]
    return LentState(
        largest=new(rows),
        sums=new(3, rows, dtype=torch.float64),
        picked=new(batch.entries.labels.shape[0]),
        top=new(rows, topk) if topk else None,
        product=new(batch.x.shape, dtype=wide) if with_hidden else None,
        lora_product=new(batch.u.shape, dtype=wide) if with_hidden and batch.u is not None else None,
        kept=prefault(totals.kept[: plan.kept_elements]),  # no more than this group needs
        references=new(tiles, rows),
        lent=lent,
        lent_elements=plan.lent_elements,
        row_chunk=plan.row_chunk,
    )


class Totals:
    """The gradients of the head's inputs, summed over groups: in the outputs, or in fp32 where several are rounded."""

    def __init__(self, inputs: Inputs, outputs: dict[str, Tensor], wanted: Wanted, plan: LossPlan) -> None:
        self.inputs, self.outputs, self.wanted = inputs, outputs, wanted
        self.any = any(wanted.head)
        self.wide_sums = plan.wide_sums
        self.first = True
        elements = max((each.head.kept_elements for each in plan.groups), default=0)
        self.kept = inputs.weight.new_empty(elements)  # for all groups in turn
        self.sums = {name: self._sum(name) for name, needed in zip(HEAD_GRADS, wanted.head, strict=True) if needed}

    def _sum(self, name: str) -> Tensor:
        out = prefault(self.outputs[f"d_{name}"])
        wide = gemm.wide(out.dtype)
        if name == "hidden":
            return out.zero_()
        return out if not self.wide_sums or out.dtype == wide else prefault(torch.empty_like(out, dtype=wide))

    def add(self, known: Known, grads: Tensor) -> None:
        """grads [E]: dL/dlogps of the group's entries."""
        batch, head, state = known.batch, self.inputs.head, known.state
        kernels = HEAD.pick(head.weight.device, head.weight).impl
        a = -batch.entries.sum_rows(grads)
        coefs = torch.stack((a, torch.zeros_like(a), torch.zeros_like(a)))
        slopes = Slopes.of(head, batch, known.norm, state.picked, grads, coefs)
        dx, du = state.product, state.lora_product  # in place: no one asks for the products again
        if dx is not None:
            engine.hidden_gradient(head, batch, state, slopes, kernels, dx, du)
            self._add_hidden(batch, dx, du)
        if self.wanted.head_grad:
            into = Gradients(*(self.sums.get(name) for name in ("weight", "bias", "lora_b")))
            rest = {"accumulate": not self.first, "spare_rows": dx}
            engine.head_gradients(head, batch, known.plan, state, slopes, into, kernels, **rest)
        self.first = False

    def _add_hidden(self, batch: Batch, dx: Tensor, du: Tensor | None) -> None:
        """dx [R, H] without LoRA's part, du [R, r]."""
        if du is not None:
            du = (du * self.inputs.lora_scale).to(batch.x.dtype)
            dx += gemm.small(du, self.inputs.lora_a)
        if "lora_a" in self.sums and du is not None:
            of_a = gemm.small(du.t(), batch.x)
            self.sums["lora_a"].copy_(of_a if self.first else self.sums["lora_a"] + of_a)
        if "hidden" in self.sums:
            out, rows = self.sums["hidden"], batch.entries.rows
            if self.inputs.rows is not None:  # a row may have labels in several groups
                dx += out.index_select(0, rows)
            out.index_copy_(0, rows, dx.to(out.dtype))

    def finish(self) -> None:
        """Rounds what was summed in fp32; zero where no token counts."""
        for name, total in self.sums.items():
            out = self.outputs[f"d_{name}"]
            if self.first:
                out.zero_()
            elif total is not out:
                out.copy_(total)
