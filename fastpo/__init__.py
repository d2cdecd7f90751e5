"""fastpo: fused kernels and a fast training loop for iterative preference optimization of language models."""

from typing import TYPE_CHECKING, Any

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import linear_preference_loss
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.preference_loss import preference_loss, sequence_scores
from fastpo.kernels.token_kl import linear_token_kl, token_kl
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.kernels.tree_attention import attention_blocks, tree_attention
from fastpo.kernels.tree_scan import path_sum, subtree_sum
from fastpo.objectives import Objective, Term
from fastpo.trees import TreeBuilder, build_tree, check_tree, pack, sequence_nodes, trained_nodes
from fastpo.types import PackedTrees, Pairs, PreferenceOutput, Segments, TokenTree

if TYPE_CHECKING:
    from fastpo.attention import disable, enable, tree_inputs
    from fastpo.scoring import TreeScorer, TreeScores, score, score_stream

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
    "TreeScorer",
    "TreeScores",
    "attention_blocks",
    "build_tree",
    "check_tree",
    "disable",
    "enable",
    "linear_preference_loss",
    "linear_token_kl",
    "linear_token_logprobs",
    "objectives",
    "pack",
    "path_sum",
    "preference_loss",
    "score",
    "score_stream",
    "sequence_nodes",
    "sequence_scores",
    "subtree_sum",
    "token_kl",
    "token_logprobs",
    "trained_nodes",
    "tree_attention",
    "tree_inputs",
]

_NEED_TRANSFORMERS = {
    **dict.fromkeys(("disable", "enable", "tree_inputs"), "attention"),
    **dict.fromkeys(("TreeScorer", "TreeScores", "score", "score_stream"), "scoring"),
}


def __getattr__(name: str) -> Any:
    """Names whose modules import transformers, which takes seconds, when they are first asked for."""
    if name not in _NEED_TRANSFORMERS:
        raise AttributeError(f"module 'fastpo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"fastpo.{_NEED_TRANSFORMERS[name]}"), name)
