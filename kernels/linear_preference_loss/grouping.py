"""Which sequences are computed together, decided before anything runs: whole tuples, as many as the budget holds.

Sequences that share a tuple are connected; a connected component is never split, since the coefficients of its tokens
are known only when the log-probs of all its members are.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.kernels.linear_token_logprobs.planning import Plan, largest_chunk
from fastpo.kernels.linear_token_logprobs.planning import plan as plan_head
from fastpo.types import Pairs, Segments


@dataclass(frozen=True)
class Group:
    """Sequences that go through the head together."""

    tokens: int  # tokens that count
    rows: int  # hidden rows that predict them
    head: Plan  # what the head costs on them


@dataclass(frozen=True)
class LossPlan:
    """How ``linear_preference_loss`` runs and what it costs. GEMM work in units of F = 2 * rows * H * V operations."""

    groups: tuple[Group, ...]
    group_of: Tensor  # [S] int64, group of each sequence, on the CPU
    mode: str  # "no gradient", "frozen head" or "trained head"
    wide_sums: bool  # the head's gradients are summed in fp32 where the weight is narrower, and rounded at the end

    @property
    def rows(self) -> int:
        """Hidden rows that are computed."""
        return sum(group.rows for group in self.groups)

    @property
    def gemms(self) -> float:
        """GEMM work over all groups, in F."""
        return sum(group.rows * group.head.gemms for group in self.groups) / max(self.rows, 1)

    @property
    def bytes(self) -> int:
        """Extra memory at the peak: of the largest group; the gradients themselves not counted."""
        return max((group.head.bytes for group in self.groups), default=0)

    @property
    def reason(self) -> str:
        """Why the dearest group costs what it does."""
        return max(self.groups, key=lambda group: group.head.gemms).head.reason if self.groups else "no rows"

    @property
    def recomputed(self) -> int:
        """Number of groups that exceed the budget although no component can be split off."""
        return sum(not group.head.whole for group in self.groups)

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.0f} MiB, {len(self.groups)} groups of whole tuples"
        beyond = f", {self.recomputed} of them beyond the budget: {self.reason}" if self.recomputed else ""
        return f"{self.mode}, {self.gemms:.2f}F, {size}{beyond}"


def plan(
    segments: Segments,
    pairs: Pairs,
    vocab_size: int,
    hidden_size: int,
    *,
    rows: Tensor | None = None,  # [T]
    dtype: torch.dtype = torch.float32,
    hidden_grad: bool = True,
    head_grad: bool = True,
    weight_grad: bool | None = None,
    memory_budget: int | None = None,
) -> LossPlan:
    """How ``linear_preference_loss`` runs on these sequences, and what it costs; the op itself follows it.

    Args:
        segments, pairs, rows: as the op takes them; the mask should leave out tokens with ignored labels too.
        hidden_grad: the hidden states (or LoRA's A) need a gradient.
        head_grad: the weight, the bias or LoRA's B need one.
        weight_grad: the weight itself does; None: if head_grad.
        memory_budget: bytes of extra memory at the peak, gradients not counted. None: 1 GiB besides the rows' state.

    Raises ValueError where the budget does not hold the state of one component's rows and the smallest tile.
    """
    like = torch.empty(0, dtype=dtype, device=segments.cu_seqlens.device)
    lends = head_grad if weight_grad is None else weight_grad
    costs = Costs(like, vocab_size, hidden_size, hidden_grad, head_grad, lends, memory_budget)
    return group(segments.cu_seqlens, segments.mask, rows, pairs.index, costs)


@dataclass(frozen=True)
class Costs:
    """Plans of the head for a number of rows.

    The gradient of the weight, [V, H], is written only when the coefficients of the first group are known. Until then
    its memory is free: it holds exp(logits) of up to H of that group's rows (2H where it is fp32 and they are not), or
    those of a larger row chunk at as many vocabulary entries as fit.
    """

    like: Tensor  # of the weight's type, on its device
    vocab_size: int
    hidden_size: int
    hidden_grad: bool
    head_grad: bool
    weight_grad: bool
    memory_budget: int | None

    def lent_rows(self, wide_sums: bool) -> int:
        """Rows that the memory of the weight's gradient holds."""
        times = 4 // self.like.itemsize if wide_sums and self.like.itemsize < 4 else 1
        return self.hidden_size * times if self.weight_grad else 0

    def plan(self, num_rows: int, lent_rows: int = 0) -> Plan:
        """The plan for some rows, of which the gradient's memory may hold ``lent_rows``."""
        wide = self._plan(num_rows, lent_rows, wide_tiles=True)
        return wide if wide.whole else self._plan(num_rows, lent_rows, wide_tiles=False)

    def _plan(self, num_rows: int, lent_rows: int, wide_tiles: bool) -> Plan:
        plan = plan_head(
            num_rows,
            self.vocab_size,
            self.hidden_size,
            dtype=self.like.dtype,
            device=self.like.device.type,
            hidden_grad=self.hidden_grad,
            head_grad=self.head_grad,
            memory_budget=self.memory_budget,
            wide_tiles=wide_tiles,
        )
        return plan if lent_rows == 0 or num_rows == 0 else self._with_loan(plan, num_rows, lent_rows)

    def _with_loan(self, plan: Plan, num_rows: int, most: int) -> Plan:
        """The plan with what the gradient's memory holds: chunks of up to ``most`` rows, or first tiles of a larger.

        The gradient is written tile after tile of the vocabulary, each when the kept tiles of the same entries have
        been read. Kept ones that are smaller than theirs of the gradient lie at its end, side by side, larger ones (of
        one chunk) from its beginning: either way none is overwritten before its turn.
        """
        chunk = min(plan.row_chunk, num_rows)
        if chunk <= most:
            lent = min(num_rows, most // chunk * chunk) * self.vocab_size
        else:
            columns = most * self.vocab_size // chunk
            lent = chunk * (columns // plan.vocab_tile * plan.vocab_tile)
        kept = min(plan.kept_elements, plan.elements - lent)
        kept_bytes = kept * self.like.itemsize
        return replace(plan, kept_elements=kept, kept_bytes=kept_bytes, lent_elements=lent)

    def capacity(self, most: int, lent_rows: int = 0) -> int:
        """The largest number of rows, at most ``most``, that the budget and the loan hold with all of their logits."""

        def holds(num_rows: int) -> bool:
            try:
                return self.plan(num_rows, lent_rows).whole
            except ValueError:
                return False

        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(middle) else (low, middle - 1)
        return low


def group(
    cu_seqlens: Tensor,  # [S+1]
    mask: Tensor | None,  # [T] bool
    rows: Tensor | None,  # [T]
    index: Tensor,  # [P, K]
    costs: Costs,
) -> LossPlan:
    """Groups the sequences. Waits for the device: sizes depend on the values."""
    num_sequences = cu_seqlens.shape[0] - 1
    component = components(index.cpu(), num_sequences)
    tokens, row_counts = _sizes(cu_seqlens.cpu(), mask, rows, component)
    present = (tokens > 0).nonzero()[:, 0]
    sizes = row_counts[present].tolist()
    wide_sums, numbers = _numbers(sizes, costs)
    lent = costs.lent_rows(wide_sums)
    number = torch.zeros(num_sequences, dtype=torch.int64)
    number[present] = torch.tensor(numbers, dtype=torch.int64)
    num_groups = max(numbers, default=-1) + 1
    tokens_of = torch.zeros(num_groups, dtype=torch.int64).index_add_(0, number[present], tokens[present])
    rows_of = torch.zeros(num_groups, dtype=torch.int64).index_add_(0, number[present], row_counts[present])
    groups = []
    for i, (num_tokens, num_rows) in enumerate(zip(tokens_of.tolist(), rows_of.tolist(), strict=True)):
        groups.append(Group(num_tokens, num_rows, costs.plan(num_rows, lent if i == 0 else 0)))
    return LossPlan(tuple(groups), number[component], costs.plan(0).mode, wide_sums)


def _numbers(sizes: list[int], costs: Costs) -> tuple[bool, list[int]]:
    """Whether sums are wide, and the group of each component: one group if it holds all, rounded once per tile."""
    total = sum(sizes)
    if costs.capacity(total, costs.lent_rows(wide_sums=False)) == total:
        return False, [0] * len(sizes)
    first_room, room = costs.capacity(total, costs.lent_rows(wide_sums=True)), costs.capacity(total)
    chunk = largest_chunk(costs.like.device.type)
    if first_room > chunk:  # chunks of full size: small ones run at a lower rate
        first_room = first_room // chunk * chunk
    return True, fill(sizes, first_share(total, max(sizes), first_room, room), room)


def first_share(total: int, largest: int, first_room: int, room: int) -> int:
    """Rows of the first group: of two about half, not all that fit and a small rest, which runs at a low rate."""
    if total > first_room + room:
        return first_room
    return min(first_room, max(-(-total // 2), total - room) + largest - 1)


def components(index: Tensor, num_sequences: int) -> Tensor:
    """[S] int64: the least of the sequences that each one is connected with by tuples ``index`` [P, K] (-1: absent)."""
    least = torch.arange(num_sequences)
    tuple_id, _ = (index >= 0).nonzero(as_tuple=True)
    member = index[index >= 0].long()
    while True:
        of_tuple = torch.full((index.shape[0],), num_sequences).scatter_reduce_(0, tuple_id, least[member], "amin")
        lower = least.scatter_reduce(0, member, of_tuple[tuple_id], "amin")
        lower = lower[lower]  # halves the length of chains
        if torch.equal(lower, least):
            return least
        least = lower


def _sizes(cu_seqlens: Tensor, mask: Tensor | None, rows: Tensor | None, component: Tensor) -> tuple[Tensor, Tensor]:
    """[S] tokens that count and distinct hidden rows of each component, 0 where it has another number."""
    num_sequences = len(component)
    of_token = torch.repeat_interleave(component, cu_seqlens.diff())
    if mask is not None:
        of_token = of_token[mask.cpu()]
    tokens = torch.bincount(of_token, minlength=num_sequences)
    if rows is None:
        return tokens, tokens
    used = (rows if mask is None else rows[mask]).cpu()
    distinct = torch.unique(torch.stack((of_token, used)), dim=1)[0]
    return tokens, torch.bincount(distinct, minlength=num_sequences)


def fill(sizes: list[int], first_room: int, room: int) -> list[int]:
    """Group of each component: the first of up to ``first_room`` rows, then others of about equal size up to ``room``.

    The largest component, if it is larger than ``room``, goes into the first group; what exceeds its room is alone.
    """
    if not sizes:
        return []
    numbers = [-1] * len(sizes)
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    order = [i for i in range(len(sizes)) if i != largest]
    order.insert(0 if sizes[largest] > room else largest, largest)
    remaining, number, filled = sum(sizes), 0, 0
    for i in order:
        if filled and _full(filled, sizes[i], remaining, room if number else first_room, balanced=number > 0):
            remaining -= filled
            number, filled = number + 1, 0
        filled += sizes[i]
        numbers[i] = number
    return numbers


def _full(filled: int, size: int, remaining: int, room: int, balanced: bool) -> bool:
    """Whether a component of ``size`` rows begins another group."""
    groups_left = max(1, -(-remaining // max(room, 1)))
    return filled + size > room or (balanced and filled + size / 2 > remaining / groups_left)
