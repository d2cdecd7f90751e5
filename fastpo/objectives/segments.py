"""Sums over the tokens of each sequence, for the columns that methods compute by themselves. No host sync."""

import torch
from torch import Tensor

from fastpo.types import Pairs, Segments


def sequence_ids(segments: Segments, num_tokens: int) -> Tensor:
    """[T] int64, the sequence of each token."""
    counts = segments.cu_seqlens.diff()
    ids = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(ids, counts, output_size=num_tokens)


def sequence_sums(values: Tensor, segments: Segments) -> Tensor:
    """[S] float64, sums of values [T] over the masked-in tokens of each sequence, in a fixed order."""
    counted = values if segments.mask is None else torch.where(segments.mask, values, 0)
    return torch.segment_reduce(counted.double(), "sum", offsets=segments.cu_seqlens, axis=0, initial=0.0)


def sequence_lengths(segments: Segments, num_tokens: int) -> Tensor:
    """[S] int64, how many tokens of each sequence are masked in."""
    if segments.mask is None:
        return segments.cu_seqlens.diff().to(torch.int64)
    return sequence_sums(torch.ones(num_tokens, device=segments.mask.device), segments).round().to(torch.int64)


def members(values: Tensor, index: Tensor, absent: float = 0.0) -> Tensor:
    """[P, K] of values [S] by index [P, K]; ``absent`` where the index is -1."""
    return torch.cat((values, values.new_full((1,), absent)))[index]


def is_member(pairs: Pairs, k: int, num_sequences: int) -> Tensor:
    """[S] bool, which sequences stand at place k of some tuple."""
    found = torch.zeros(num_sequences + 1, dtype=torch.bool, device=pairs.index.device)
    found[pairs.index[:, k]] = True
    return found[:-1]
