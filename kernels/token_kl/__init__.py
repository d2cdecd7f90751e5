"""``token_kl`` and ``linear_token_kl``: KL(reference || policy) over the vocabulary at each token, with gradient."""

from .op import linear_token_kl, token_kl

__all__ = ["linear_token_kl", "token_kl"]
