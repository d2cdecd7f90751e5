"""The spec of ``path_sum`` and ``subtree_sum`` in plain PyTorch, and their last backend. Sums in fp64, no subtraction.

By doubling: after k rounds a node knows the sum of 2^k nodes, of its path upwards or of the preorder onwards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def path_sum(
    values: Tensor,  # [N, K]
    parent: Tensor,  # [N] int64
    depth: Tensor,  # [N] int64, unused
    subtree_end: Tensor,  # [N] int64, unused
) -> Tensor:
    """[N, K] ``out[i] = sum of values[j] over j <= i < subtree_end[j]``, the nodes from the root down to i."""
    sums = F.pad(values.double(), (0, 0, 0, 1))  # [N+1, K]; the last row, 0, is above every root
    above = torch.where(parent < 0, len(values), parent)
    above = F.pad(above, (0, 1), value=len(values))  # [N+1], 2^k nodes up
    for _ in range(len(values).bit_length()):
        sums, above = sums + sums[above], above[above]
    return sums[:-1].to(values.dtype)


def subtree_sum(
    values: Tensor,  # [N, K]
    parent: Tensor,  # [N] int64, unused
    depth: Tensor,  # [N] int64, unused
    subtree_end: Tensor,  # [N] int64
) -> Tensor:
    """[N, K] ``out[i] = values[i:subtree_end[i]].sum(0)``."""
    nodes = len(values)
    at = torch.arange(nodes, device=values.device)  # [N], how far the subtree is summed already
    blocks, out = values.double(), torch.zeros_like(values, dtype=torch.float64)  # blocks[i]: of 2^k nodes from i on
    for k in range(nodes.bit_length()):
        takes = ((subtree_end - torch.arange(nodes, device=values.device)) >> k) & 1
        out = torch.where(takes[:, None] == 1, out + blocks[at.clamp(max=nodes - 1)], out)
        at = at + (takes << k)
        blocks = blocks + F.pad(blocks[1 << k :], (0, 0, 0, min(nodes, 1 << k)))
    return out.to(values.dtype)
