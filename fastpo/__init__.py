"""fastpo: fused kernels and a fast training loop for iterative preference optimization of language models."""

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import linear_preference_loss
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.preference_loss import preference_loss, sequence_scores
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.kernels.tree_attention import attention_blocks, tree_attention
from fastpo.objectives import Objective, Term
from fastpo.types import Pairs, PreferenceOutput, Segments, TokenTree

__version__ = "0.1.0"

__all__ = [
    "Objective",
    "Pairs",
    "PreferenceOutput",
    "Segments",
    "Term",
    "TokenTree",
    "attention_blocks",
    "linear_preference_loss",
    "linear_token_logprobs",
    "objectives",
    "preference_loss",
    "sequence_scores",
    "token_logprobs",
    "tree_attention",
]
