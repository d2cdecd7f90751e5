"""``linear_token_logprobs``: log-probabilities of tokens from hidden states and an LM head, without the logits."""

from fastpo.kernels.linear_token_logprobs.op import linear_token_logprobs
from fastpo.kernels.linear_token_logprobs.planning import Plan, plan

__all__ = ["Plan", "linear_token_logprobs", "plan"]
