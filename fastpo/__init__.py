"""fastpo: fused kernels and a fast training loop for iterative preference optimization of language models."""

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import linear_preference_loss
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.preference_loss import preference_loss, sequence_scores
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.kernels.tree_attention import attention_blocks, tree_attention
from fastpo.objectives import Objective, Term
from fastpo.trees import TreeBuilder, build_tree, check_tree, pack, sequence_nodes, trained_nodes
from fastpo.types import PackedTrees, Pairs, PreferenceOutput, Segments, TokenTree

__version__ = "0.1.0"

__all__ = [
    "Objective",
    "PackedTrees",
    "Pairs",
    "PreferenceOutput",
    "Segments",
    "Term",
    "TokenTree",
    "TreeBuilder",
    "attention_blocks",
    "build_tree",
    "check_tree",
    "linear_preference_loss",
    "linear_token_logprobs",
    "objectives",
    "pack",
    "preference_loss",
    "sequence_nodes",
    "sequence_scores",
    "token_logprobs",
    "trained_nodes",
    "tree_attention",
]
