"""Losses of ranked lists: tuples of K sequences, -1 where a list is shorter, their worth in ``Pairs.relevance`` [P, K].

s_i is beta times the log-ratio of member i (the mean log-prob for ``rrhf``). ``losses`` and ``rewards`` of the output
are of lists for ``list_mle`` and ``list_softmax``, of the pairs that the lists become for ``lipo`` and ``rrhf``.
"""

import torch
from torch import Tensor

from .core import Objective, Term
from .coupling import BestAndPairs, LambdaPairs


def lipo(beta: float = 0.05) -> Objective:
    """``sum over psi_i > psi_j of Lambda_ij softplus(s_j - s_i)``. LiPO-lambda, Liu et al. 2024; lists of 8.

    ``Lambda_ij = |2^psi_i - 2^psi_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|``, psi = Pairs.relevance, ranks those of
    the current scores, without gradient. Natural logarithms; the mean is over lists, the sum over a list's pairs.
    """
    return Objective("lipo", (Term(scale=beta),), beta=beta, requires=("pairs.relevance",), couple=LambdaPairs())


def rrhf(weight: float = 1.0, nll: float = 1.0) -> Objective:
    """``weight sum over psi_i > psi_j of max(0, p_j - p_i)  -  nll sum_t l_t of the best``, p the mean log-prob.

    RRHF, Yuan et al. 2023. From memory: the paper sums the NLL over tokens, their code takes a mean over the padded
    length, which depends on the batch; this is the paper's. A hinge of unit slope that starts at 0, not at a margin.
    """
    term = Term((1.0, -1.0, 0.0), "hinge", 1.0, margin=-1.0, weight=weight)
    return Objective(
        "rrhf",
        (term,),
        beta=1.0,
        ref_coef=0.0,
        length_power=1.0,
        nll=(0.0, 0.0, nll),
        nll_normalizer="none",
        requires=("pairs.relevance",),
        couple=BestAndPairs(),
    )


def list_mle(beta: float = 0.1) -> Objective:
    """``- sum_k log [e^{s_(k)} / sum_{j >= k} e^{s_(j)}]``, members in the order of relevance: Plackett-Luce.

    DPO's appendix and LiPO's list-MLE. Without relevance the members are listed best first. Equal relevance: as listed.
    """
    return Objective("list_mle", (), beta=beta, list_loss=list_mle_loss)


def list_softmax(beta: float = 0.1) -> Objective:
    """``- sum_i psi_i / (sum psi) log softmax(s)_i`` over the list, psi = Pairs.relevance >= 0. LiPO's softmax loss.

    From memory, not confirmed: that psi is normalised.
    """
    return Objective("list_softmax", (), beta=beta, requires=("pairs.relevance",), list_loss=list_softmax_loss)


def list_mle_loss(scores: Tensor, present: Tensor, relevance: Tensor | None) -> Tensor:
    """[G] Plackett-Luce losses of scores [G, K]; see ``ListLoss``."""
    if relevance is not None:
        order = relevance.masked_fill(~present, -torch.inf).argsort(dim=1, descending=True, stable=True)
        scores, present = scores.gather(1, order), present.gather(1, order)
    place = torch.arange(scores.shape[1], device=scores.device)
    behind = present[:, None] & (place >= place[:, None])  # [G, K, K] whether j is there, at k or behind it
    totals = scores[:, None].masked_fill(~behind, -torch.inf).logsumexp(2)  # [G, K]
    return torch.where(present, totals - scores, 0.0).sum(1)


def list_softmax_loss(scores: Tensor, present: Tensor, relevance: Tensor | None) -> Tensor:
    """[G] cross-entropies of scores [G, K] with the shares of relevance; see ``ListLoss``."""
    assert relevance is not None
    worth = torch.where(present, relevance, 0.0)
    share = worth / worth.sum(1, keepdim=True).clamp(min=torch.finfo(worth.dtype).tiny)
    hidden = ~present & present.any(1, keepdim=True)  # an empty list keeps its zeros: its shares are 0
    logp = scores.masked_fill(hidden, -torch.inf).log_softmax(1)
    return -(share * torch.where(present, logp, 0.0)).sum(1)
