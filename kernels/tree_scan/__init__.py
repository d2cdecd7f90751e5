"""``path_sum`` and ``subtree_sum``: sums over the ancestors and over the descendants of every node of a forest."""

from fastpo.kernels.tree_scan.op import path_sum, subtree_sum

__all__ = ["path_sum", "subtree_sum"]
