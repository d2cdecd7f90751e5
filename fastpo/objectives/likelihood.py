"""Losses with a likelihood term, and without a reference.

D_i is the log-ratio of sequence i, ``sum_t (l_t - r_t)``; s the logistic function; w chosen, l rejected.
"""

from dataclasses import replace

from .core import Objective, Term


def irpo(beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """``-log s(beta (D_w - D_l)) - alpha / n_w * sum_t l_t of the chosen``. Iterative RPO, Pang et al. 2024.

    The reference is the model that the iteration starts from. The NLL is per sequence, by its response tokens; TRL's
    ``["sigmoid", "sft"]`` takes the mean over the batch's chosen tokens instead (``nll_normalizer="batch"``).
    """
    return Objective("irpo", (Term(scale=beta),), beta=beta, nll=(alpha, 0.0))


def codpo(beta: float = 0.1, lam: float = 1.0) -> Objective:
    """DPO with ``- lam / n_w sum_t l_t of the chosen``: CODPO of CGPO, Xu et al. 2024. IRPO by another name."""
    return replace(irpo(beta, lam), name="codpo")


def scpo(beta: float = 0.5, alpha: float = 1.0) -> Objective:
    """``omega * IRPO``: omega = Pairs.weights of ``vote_weights``, on both terms. Prasad et al. 2024.

    From third-party notes: that omega multiplies the NLL too is how they read the paper's equation.
    """
    return Objective("scpo", (Term(scale=beta),), beta=beta, nll=(alpha, 0.0), requires=("pairs.weights",))


def rpo(beta: float = 0.01, eta: float = 0.005) -> Objective:
    """``-log s(beta (D_w - D_l)) - eta sum_t l_t of the chosen``. Liu et al. 2024 (their cumulative variant)."""
    return Objective("rpo", (Term(scale=beta),), beta=beta, nll=(eta, 0.0), nll_normalizer="none")


def sft() -> Objective:
    """``- sum l over the chosen / number of their tokens in the batch``: supervised fine-tuning on the chosen."""
    return Objective("sft", (), ref_coef=0.0, nll=(1.0, 0.0), nll_normalizer="batch")


def simpo(beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Objective:
    """``-log s(beta (mean l_w - mean l_l) - gamma)``. Meng et al. 2024; they take gamma / beta near .5.

    ``label_smoothing`` e: ``(1-e)`` of it and ``e`` of that of ``-z``, as TRL's CPOTrainer has it.
    """
    term = Term(scale=beta, margin=gamma, param=1 - label_smoothing)
    return Objective("simpo", (term,), beta=beta, ref_coef=0.0, length_power=1.0)


def alphapo(beta: float = 2.5, gamma: float = 0.25, alpha: float = 0.25) -> Objective:
    """SimPO with the reward ``(1 - p^-alpha) / alpha``, p = e^(mean l), for ``mean l``. Gupta et al. 2025."""
    return Objective(
        "alphapo",
        (Term(scale=beta, margin=gamma),),
        beta=beta,
        ref_coef=0.0,
        length_power=1.0,
        score_map="power",
        score_map_coef=-alpha,
    )


def cpo(beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> Objective:
    """``-log s(beta (sum l_w - sum l_l)) - alpha * mean l over the batch's chosen tokens``. Xu et al. 2024.

    ``label_smoothing`` as in ``simpo``. TRL takes the NLL over the prompt's tokens too; here over the response's.
    """
    term = Term(scale=beta, param=1 - label_smoothing)
    return Objective("cpo", (term,), beta=beta, ref_coef=0.0, nll=(alpha, 0.0), nll_normalizer="batch")


def orpo(beta: float = 0.1) -> Objective:
    """``NLL - beta log s(log-odds_w - log-odds_l)``, log-odds ``m - log(1 - e^m)`` of the mean log-prob m.

    Hong et al. 2024. The NLL here is over the batch's chosen response tokens; theirs includes the prompt.
    """
    return Objective(
        "orpo",
        (Term(scale=1.0, weight=beta),),
        beta=beta,
        ref_coef=0.0,
        length_power=1.0,
        score_map="log_odds",
        nll=(1.0, 0.0),
        nll_normalizer="batch",
    )
