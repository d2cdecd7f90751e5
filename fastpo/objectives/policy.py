"""Weighted likelihoods: ``- A sum_t l_t``, the policy gradients and reward-weighted losses of the family.

Tuples have one member, ``Pairs(index=[P, 1], weights=A [P])``. A coefficient per token is Segments.nll_weights.
"""

from dataclasses import replace

from .core import Objective, Term
from .coupling import TokenRewards


def remax() -> Objective:
    """``- A sum_t l_t``, A = Pairs.weights of ``remax_advantages``. ReMax, Li et al. 2023, their code.

    With their KL penalty, A differs by token: Segments.nll_weights carries it, and Pairs.weights is 1.
    """
    return Objective("remax", (), ref_coef=0.0, nll=(1.0,), nll_normalizer="none", requires=("pairs.weights",))


def rlsp() -> Objective:
    """``- A sum_t l_t``, A from an outcome reward and one for exploring, per token or sequence. RLSP, Ye et al. 2025.

    Their optimizer is PPO; this is its loss at the policy that sampled, without clipping.
    """
    return replace(remax(), name="rlsp")


def trice() -> Objective:
    """``- sum_t l_t`` of a chain's state, ``+ b sum_t l_t`` of its proposal. TRICE, Phan et al. 2023.

    Tuples of the states with weight 1 and of the proposals with weight ``-b``, b of ``trice_weights``.
    """
    return replace(remax(), name="trice")


def crpg() -> Objective:
    """``- (R - mean R) sum_t l_t``, R of ``calibrated_rewards``, mean over a prompt's samples. CGPO, Xu et al. 2024."""
    return replace(remax(), name="crpg")


def crraft() -> Objective:
    """``- R sum_t l_t``, R of ``calibrated_rewards``, over the best samples that keep all constraints. CGPO.

    Choosing the samples is a pair rule's work; 0 is the weight of one that was not chosen.
    """
    return replace(remax(), name="crraft")


def tree_plv(scale: float = 1.0) -> Objective:
    """``-log s(scale (s_w - s_l))`` of scores from outside: a reward head's at two steps. Tree-PLV, He et al. 2024.

    Pass them as ``preference_loss(None, None, None, pairs, tree_plv(), scores=head)``; also Bradley-Terry on whole
    answers. From notes: they compare steps of one parent whose rewards differ by .375 and more, which is a pair rule.
    """
    return Objective("tree_plv", (Term(scale=scale),), beta=scale, ref_coef=0.0)


def t_reg(beta: float = 0.1, alpha: float = 0.25) -> Objective:
    """``DPO + alpha omega [- beta sum_t rhat_t l_t]`` over both sequences, ``omega = s(-z)`` without gradient.

    T-REG, Zhou et al. 2024; alpha .1 to .5. Segments.token_coefs is rhat of ``contrast_token_rewards``. From notes:
    that the sum is over chosen and rejected, and that omega takes no gradient, is how they read the paper.
    """
    terms, required = (Term(scale=beta),), ("segments.token_coefs",)
    return Objective("t_reg", terms, beta=beta, requires=required, couple=TokenRewards(alpha))
