"""``tree_attention``: attention in a forest of tokens in preorder; each token sees its ancestors and itself."""

from fastpo.kernels.tree_attention.blocks import AttentionBlocks, attention_blocks
from fastpo.kernels.tree_attention.op import tree_attention

__all__ = ["AttentionBlocks", "attention_blocks", "tree_attention"]
