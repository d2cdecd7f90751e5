"""What attention needs to know of a forest, in O(N): made once per batch, shared by all layers and by the backward."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.types import TokenTree, _Record

BLOCK = 64  # keys that one column of ``key_blocks`` speaks of


@dataclass(frozen=True)
class AttentionBlocks(_Record):
    """A forest as the kernels of ``tree_attention`` read it. ``attention_blocks`` makes it."""

    subtree_end: Tensor  # [N] int32; token i sees token j iff j <= i < subtree_end[j]
    depth: Tensor  # [N] int32
    key_blocks: Tensor  # [4, ceil(N / BLOCK)] int32: least and largest subtree_end, least and largest depth of a block

    @property
    def num_nodes(self) -> int:
        return self.subtree_end.shape[0]


def attention_blocks(tree: TokenTree) -> AttentionBlocks:
    """The record that ``tree_attention`` takes in place of ``tree``: build it once per batch, not once per layer.

    O(N), and no wait for a GPU. Of a block of keys and a block of queries [first, last] at or below it, some pair is
    visible iff the largest subtree_end is above ``first``; every pair is iff the last key is at most ``first`` and the
    least subtree_end is above ``last``. A last block of fewer than BLOCK keys counts as never full.
    """
    ends, depth = tree.subtree_end.to(torch.int32), tree.depth.to(torch.int32)
    padded = F.pad(torch.stack((ends, depth)), (0, -ends.shape[0] % BLOCK)).unflatten(1, (-1, BLOCK))
    least, largest = padded.amin(2), padded.amax(2)
    return AttentionBlocks(ends, depth, torch.stack((least[0], largest[0], least[1], largest[1])))


EMPTY, PARTIAL, FULL = range(3)


def block_states(blocks: AttentionBlocks, rows: int, window: int | None = None) -> Tensor:
    """[ceil(N / rows), ceil(N / BLOCK)] int64, EMPTY, PARTIAL or FULL: what ``rows`` queries see of a block of keys.

    The spec of what the Triton kernels decide block by block. EMPTY and FULL are always right. PARTIAL is wrong only
    where a window hides all of a block but one that no query's path crosses, or where the last block is not full.
    """
    least_end, largest_end, least_depth, largest_depth = blocks.key_blocks.long()
    tokens, device = blocks.num_nodes, blocks.depth.device
    first = torch.arange(0, tokens, rows, device=device)[:, None]
    last = (first + rows).clamp_max(tokens) - 1
    some = (largest_end > first) & (torch.arange(len(least_end), device=device) * BLOCK <= last)
    every = (least_end > last) & (torch.arange(1, len(least_end) + 1, device=device) * BLOCK <= first + 1)
    if window is not None:
        tiles = blocks.depth.long().split(rows)
        shallow = torch.stack([x.amin() for x in tiles])[:, None]
        deep = torch.stack([x.amax() for x in tiles])[:, None]
        some &= shallow - largest_depth < window
        every &= deep - least_depth < window
    return torch.where(some, torch.where(every, FULL, PARTIAL), EMPTY)
