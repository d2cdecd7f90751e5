"""Which rows of the hidden states are computed, and which labels each of them predicts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """R computed rows and the E labels that count, ordered by (row, label)."""

    rows: Tensor | None  # [R] int64, ascending, rows of hidden; None: all of them, in order
    positions: Tensor | None  # [E] int64, where each entry stands among all labels; None: all of them, in order
    starts: Tensor  # [R+1] int64; the entries of computed row i are starts[i]:starts[i+1]
    owners: Tensor  # [E] int64, computed row of each entry
    labels: Tensor  # [E] int64
    first: Tensor | None  # [E] bool, False where the entry before has the same row and label; None: all True

    @property
    def num_rows(self) -> int:
        return self.starts.shape[0] - 1

    def part(self, start: int, stop: int) -> "Entries":
        """The entries of some computed rows; ``starts`` still index the labels of all."""
        return replace(self, starts=self.starts[start : stop + 1])

    def shifted(self, offset: int) -> "Entries":
        """The same with labels that count from ``offset``, the first vocabulary entry of a shard."""
        return replace(self, labels=self.labels - offset) if offset else self

    def compact(self, values: Tensor) -> Tensor:
        """[all labels] -> [E]."""
        return values if self.positions is None else values.index_select(0, self.positions)

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """[E] into out [all labels], zeroed elsewhere."""
        if self.positions is None:
            out.copy_(values)
        else:
            out.zero_().index_copy_(0, self.positions, values)

    def compact_rows(self, values: Tensor) -> Tensor:
        """[all rows, ...] -> [R, ...]."""
        return values if self.rows is None else values.index_select(0, self.rows)

    def scatter_rows(self, values: Tensor, out: Tensor) -> None:
        """[R, ...] into out [all rows, ...], zeroed elsewhere."""
        if self.rows is None:
            out.copy_(values)
        else:
            out.zero_().index_copy_(0, self.rows, values.to(out.dtype))

    def sum_rows(self, values: Tensor) -> Tensor:
        """[E] -> [R], summed over the entries of each row in order."""
        if self.first is None:
            return values
        return torch.segment_reduce(values, "sum", offsets=self.starts, axis=0, initial=0)


def entries(labels: Tensor, rows: Tensor | None, ignore_index: int | None) -> Entries:
    """The entries of labels [M], each predicted by row rows[m] of hidden (by row m without ``rows``).

    Waits for the device where ``ignore_index`` or ``rows`` is given: the sizes of what is computed depend on them.
    """
    if rows is None:
        return _one_label_per_row(labels, ignore_index)
    kept = torch.arange(labels.shape[0], device=labels.device)
    if ignore_index is not None:
        kept = (labels != ignore_index).nonzero()[:, 0]
    labels, rows = labels.index_select(0, kept), rows.index_select(0, kept)
    order = torch.argsort(labels, stable=True)
    order = order.index_select(0, torch.argsort(rows.index_select(0, order), stable=True))
    labels, rows = labels.index_select(0, order), rows.index_select(0, order)
    used, owners, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    first = torch.ones_like(labels, dtype=torch.bool)
    first[1:] = (labels[1:] != labels[:-1]) | (rows[1:] != rows[:-1])
    return Entries(used, kept.index_select(0, order), starts, owners, labels, first)


def _one_label_per_row(labels: Tensor, ignore_index: int | None) -> Entries:
    kept = None if ignore_index is None else (labels != ignore_index).nonzero()[:, 0]
    if kept is not None and kept.shape[0] == labels.shape[0]:
        kept = None
    count = labels.shape[0] if kept is None else kept.shape[0]
    starts = torch.arange(count + 1, device=labels.device)
    chosen = labels if kept is None else labels.index_select(0, kept)
    return Entries(kept, kept, starts, starts[:-1], chosen, None)
