"""Losses of one score at a time.

D_i is the log-ratio of sequence i, ``sum_t (l_t - r_t)``; s the logistic function; w chosen, l rejected.
"""

from dataclasses import replace

from torch import Tensor

from .core import Objective, Term
from .coupling import MismatchKl, RewardShift


def sppo(beta: float = 1e-3) -> Objective:
    """``1/2 sum_i (D_i - (P_i - 1/2)/beta)^2``, ``Pairs.targets[p, i] = P_i - 1/2``. Wu et al. 2024.

    P_i: mean win rate of response i over the samples of its prompt. The sum is over the pair, as in their code.
    """
    chosen, rejected = (Term(coefs, "squared", beta, weight=0.5 / beta**2) for coefs in ((1.0, 0.0), (0.0, 1.0)))
    return Objective("sppo", (chosen, rejected), beta=beta, requires=("pairs.targets",))


def sppo_hard(beta: float = 1e-3) -> Objective:
    """``(D_w - 1/(2 beta))^2 + (D_l + 1/(2 beta))^2``: TRL's SPPO with win rates 1 and 0, twice ``sppo``."""
    chosen = Term((1.0, 0.0), "squared", beta, param=0.5, weight=1 / beta**2)
    rejected = Term((0.0, 1.0), "squared", beta, param=-0.5, weight=1 / beta**2)
    return Objective("sppo_hard", (chosen, rejected), beta=beta)


def nca_pair(beta: float = 0.1) -> Objective:
    """``-log s(R_w) - 1/2 log s(-R_w) - 1/2 log s(-R_l)``, R = beta D. Chen et al. 2024."""
    chosen = Term((1.0, 0.0), scale=beta, param=2 / 3, weight=1.5)
    rejected = Term((0.0, 1.0), scale=beta, param=0.0, weight=0.5)
    return Objective("nca_pair", (chosen, rejected), beta=beta)


def bco_pair(beta: float = 0.1) -> Objective:
    """``-log s(R_w - d) - log s(-(R_l - d))``, R = beta D. Jung et al. 2024.

    d = Pairs.margins (0 where absent, as in TRL 1.16): the running mean of the rewards. ``bco`` keeps it by itself.
    """
    chosen = Term((1.0, 0.0), scale=beta)
    rejected = Term((0.0, 1.0), scale=beta, param=0.0)
    return Objective("bco_pair", (chosen, rejected), beta=beta)


def bco(beta: float = 0.1, mean: float | Tensor = 0.0, rate: float = 1.0) -> Objective:
    """``bco_pair`` with the shift ``d = mean + rate (mean of this batch's rewards - mean)``. Jung et al. 2024.

    ``mean`` is the running mean so far, a number or a tensor []; ``rate`` the batch's share of it. The next one is
    ``mean + rate * (out.rewards.mean() - mean)``: it belongs to the caller, and with it the resumption of a run.
    """
    return replace(bco_pair(beta), name="bco", couple=RewardShift(mean, rate))


def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """``a (1 - s(R_w - d))`` of a desirable, ``b (1 - s(d - R_l))`` of an undesirable sequence. Ethayarajh et al. 2024.

    Unpaired: tuples ``(i, -1)`` and ``(-1, j)``. d = Pairs.margins = beta KL, a constant. ``kto_batch`` estimates it.
    """
    chosen = Term((1.0, 0.0), "sigmoid", beta, weight=desirable_weight)
    rejected = Term((0.0, -1.0), "sigmoid", beta, margin_coef=-1.0, weight=undesirable_weight)
    return Objective("kto", (chosen, rejected), beta=beta, requires=("pairs.margins",))


def kto_batch(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """KTO with ``d = beta max(0, mean D over the mismatched sequences of the batch)``, as TRL 1.16's KTOTrainer.

    Tuples ``(i, -1, m)`` and ``(-1, j, m)``: m is a response to another prompt, -1 for none. Over several processes
    TRL averages the estimate: there take ``sequence_scores`` of the m, reduce, and use ``kto``.
    """
    plain = kto(beta, desirable_weight, undesirable_weight)
    terms = tuple(replace(t, coefs=(*t.coefs, 0.0)) for t in plain.terms)
    return Objective("kto_batch", terms, beta=beta, couple=MismatchKl())


def apo_zero(beta: float = 0.1) -> Objective:
    """``1 - s(R_w) + s(R_l)``, R = beta D. D'Oosterlinck et al. 2024, equation 7."""
    return Objective("apo_zero", (Term((1.0, 0.0), "sigmoid", beta), Term((0.0, -1.0), "sigmoid", beta)), beta=beta)


def apo_down(beta: float = 0.1) -> Objective:
    """``s(R_w) + 1 - s(R_w - R_l)``, R = beta D. D'Oosterlinck et al. 2024, equation 8."""
    return Objective("apo_down", (Term((-1.0, 0.0), "sigmoid", beta), Term((1.0, -1.0), "sigmoid", beta)), beta=beta)
