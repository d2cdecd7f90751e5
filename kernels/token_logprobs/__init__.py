"""``token_logprobs``: log-probabilities of given tokens, and statistics, in one read of the logits."""

from fastpo.kernels.token_logprobs.op import STATS, token_logprobs

__all__ = ["STATS", "token_logprobs"]
