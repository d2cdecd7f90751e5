"""Which sequences are computed together, decided before anything runs: whole tuples, as many as the budget holds.

Sequences that share a tuple are connected; a connected component is never split, since the coefficients of its tokens
are known only when the log-probs of all its members are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastpo.kernels.linear_token_logprobs.planning import Plan
from fastpo.kernels.linear_token_logprobs.planning import plan as plan_head
from fastpo.types import Pairs, Segments


@dataclass(frozen=True)
class Group:
    """Sequences that go through the head together."""

    tokens: int  # tokens that count
    rows: int  # hidden rows that predict them
    head: Plan  # what the head costs on them
    whole: bool  # all that is to be kept of them fits the budget; else their logits are computed again in part


@dataclass(frozen=True)
class LossPlan:
    """How ``linear_preference_loss`` runs and what it costs. GEMM work in units of F = 2 * rows * H * V operations."""

    groups: tuple[Group, ...]
    group_of: Tensor  # [S] int64, group of each sequence, on the CPU
    mode: str  # "no gradient", "frozen head" or "trained head"

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
        return sum(not group.whole for group in self.groups)

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
    memory_budget: int | None = None,
) -> LossPlan:
    """How ``linear_preference_loss`` runs on these sequences, and what it costs; the op itself follows it.

    Args:
        segments, pairs, rows: as the op takes them; the mask should leave out tokens with ignored labels too.
        hidden_grad: the hidden states need a gradient.
        head_grad: the weight, the bias or LoRA's B need one.
        memory_budget: bytes of extra memory at the peak, gradients not counted. None: 1 GiB besides the rows' state.

    Raises ValueError where the budget does not hold the state of one component's rows and the smallest tile.
    """
    like = torch.empty(0, dtype=dtype, device=segments.cu_seqlens.device)
    cost = head_cost(like, vocab_size, hidden_size, hidden_grad, head_grad, memory_budget)
    return group(segments.cu_seqlens, segments.mask, rows, pairs.index, cost, vocab_size if head_grad else 0)


def head_cost(
    weight: Tensor, vocab_size: int, hidden_size: int, hidden_grad: bool, head_grad: bool, memory_budget: int | None
) -> Callable[[int], Plan]:
    """The plan of a head like ``weight`` for a number of rows."""
    return partial(
        plan_head,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        dtype=weight.dtype,
        device=weight.device.type,
        hidden_grad=hidden_grad,
        head_grad=head_grad,
        memory_budget=memory_budget,
    )


def group(
    cu_seqlens: Tensor,  # [S+1]
    mask: Tensor | None,  # [T] bool
    rows: Tensor | None,  # [T]
    index: Tensor,  # [P, K]
    cost: Callable[[int], Plan],  # of a number of rows
    kept: int,  # elements per row that are kept where the budget allows
) -> LossPlan:
    """Groups the sequences in their order. Waits for the device: sizes depend on the values."""
    num_sequences = cu_seqlens.shape[0] - 1
    component = components(index.cpu(), num_sequences)
    tokens, row_counts = _sizes(cu_seqlens.cpu(), mask, rows, component)
    present = (tokens > 0).nonzero()[:, 0]
    sizes = row_counts[present].tolist()
    room = _capacity(cost, sum(sizes), kept)
    number = torch.zeros(num_sequences, dtype=torch.int64)
    number[present] = torch.tensor(fill(sizes, room), dtype=torch.int64)
    group_of = number[component]
    num_groups = int(number.max()) + 1 if sizes else 0
    tokens_of = torch.zeros(num_groups, dtype=torch.int64).index_add_(0, number[present], tokens[present])
    rows_of = torch.zeros(num_groups, dtype=torch.int64).index_add_(0, number[present], row_counts[present])
    groups = []
    for num_tokens, num_rows in zip(tokens_of.tolist(), rows_of.tolist(), strict=True):
        head = cost(num_rows)
        groups.append(Group(num_tokens, num_rows, head, head.kept_elements >= kept * num_rows))
    return LossPlan(tuple(groups), group_of, cost(0).mode)


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


def _capacity(cost: Callable[[int], Plan], most: int, kept: int) -> int:
    """The largest number of rows, at most ``most``, that the budget holds with all that is to be kept of them."""

    def holds(num_rows: int) -> bool:
        try:
            return cost(num_rows).kept_elements >= kept * num_rows
        except ValueError:
            return False

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def fill(sizes: list[int], room: int) -> list[int]:
    """Group of each component in order: of about equal size, at most ``room`` rows unless one alone is larger."""
    remaining, numbers, number, filled = sum(sizes), [], 0, 0
    for size in sizes:
        groups_left = max(1, -(-remaining // max(room, 1)))
        if filled and (filled + size > room or filled + size / 2 > remaining / groups_left):
            remaining -= filled
            number, filled = number + 1, 0
        filled += size
        numbers.append(number)
    return numbers
