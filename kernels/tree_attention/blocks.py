"""What attention needs to know of a forest, in O(N): made once per batch, shared by all layers and by the backward."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.types import TokenTree, _Record

BLOCK = 64  # tokens that one column of ``key_ends`` speaks of


@dataclass(frozen=True)
class AttentionBlocks(_Record):
    """A forest as the kernels of ``tree_attention`` read it. ``attention_blocks`` makes it."""

    subtree_end: Tensor  # [N] int32; token i sees token j iff j <= i < subtree_end[j]
    depth: Tensor  # [N] int32
    key_ends: Tensor  # [2, ceil(N / BLOCK)] int32: least and largest subtree_end of each block of BLOCK keys

    @property
    def num_nodes(self) -> int:
        return self.subtree_end.shape[0]


def attention_blocks(tree: TokenTree) -> AttentionBlocks:
    """The record that ``tree_attention`` takes in place of ``tree``: build it once per batch, not once per layer.

    Of a block of keys at or below the queries' block [first, last], some pair is visible iff its largest subtree_end is
    above ``first``; every pair is iff its last key is at most ``first`` and its least subtree_end is above ``last``. A
    last block that is not full counts as never full.
    """
    ends = tree.subtree_end.to(torch.int32)
    padded = F.pad(ends, (0, -ends.shape[0] % BLOCK)).view(-1, BLOCK)
    return AttentionBlocks(ends, tree.depth.to(torch.int32), torch.stack((padded.amin(1), padded.amax(1))))
