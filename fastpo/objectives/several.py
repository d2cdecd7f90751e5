"""Losses with more sequences than chosen and rejected: a third response, other prompts, steps.

D_i is the log-ratio of sequence i, ``sum_t (l_t - r_t)``; s the logistic function; w chosen, l rejected. An absent
member is -1 in ``Pairs.index``; a term that has none of its members is left out.
"""

from .core import Objective, Term


def selm(beta: float = 0.01, alpha: float = 1e-3) -> Objective:
    """``-log s(beta (D_w - D_l)) + alpha beta D_u``, tuples ``(w, l, u)``. SELM, Zhang et al. 2024, their code."""
    explore = Term((0.0, 0.0, 1.0), "linear", beta, margin_coef=0.0, weight=alpha)
    return Objective("selm", (Term(scale=beta), explore), beta=beta)


def vpo(beta: float = 0.1, alpha: float = 1e-2, online: bool = True) -> Objective:
    """``-log s(beta (D_w - D_l)) +- alpha beta D_u``, u drawn from a calibration policy: + online, - offline.

    VPO, Cen et al. 2024: optimism where data can be gathered, pessimism where it cannot. From memory; the signs are
    derived in preference_loss' README.md. D_u of one sample stands for their expectation.
    """
    sign = 1.0 if online else -1.0
    explore = Term((0.0, 0.0, 1.0), "linear", beta, margin_coef=0.0, weight=sign * alpha)
    return Objective("vpo", (Term(scale=beta), explore), beta=beta)


def srpo(beta: float = 0.1, alpha: float = 0.5) -> Objective:
    """Self-improving robust preference optimization: squared losses on signed sums of two and four log-ratios.

    With ``R(y | c)`` the log-ratio of y after the prompt and c, and tuples ``(w, l, w|l, l|l, l|w, w|w)``::

        (1-a) [beta (R(w) - R(l) + R(w|l) - R(l|w)) - 1]^2
        + a/2 [beta (R(w|l) - R(l|l)) - 1/2]^2  +  a/2 [beta (R(l|w) - R(w|w)) + 1/2]^2

    Choi et al. 2024. From memory: README.md of preference_loss derives both identities from their objective; the
    paper's own weighting of the three squares is not confirmed.
    """
    robust = Term((1.0, -1.0, 1.0, 0.0, -1.0, 0.0), "squared", beta, param=1.0, weight=1 - alpha)
    better = Term((0.0, 0.0, 1.0, -1.0, 0.0, 0.0), "squared", beta, param=0.5, weight=alpha / 2)
    worse = Term((0.0, 0.0, 0.0, 0.0, 1.0, -1.0), "squared", beta, param=-0.5, weight=alpha / 2)
    return Objective("srpo", (robust, better, worse), beta=beta)


def rationale_dpo(beta: float = 0.1, gamma: float = 0.1) -> Objective:
    """``-log s(beta (D_w - D_l)) - log s(gamma sum l_u)``, tuples ``(w, l, u)``, u a rationale. Just et al. 2024, code.

    The rationale's term has no reference: pass ``without_reference(ref_logps, segments, pairs, 2)`` as ``ref_logps``.
    """
    rationale = Term((0.0, 0.0, 1.0), scale=gamma, margin_coef=0.0)
    return Objective("rationale_dpo", (Term(scale=beta), rationale), beta=beta)


def rise(beta: float = 0.4, alpha: float = 0.05) -> Objective:
    """DPO on full solutions, DPO on steps with injected errors, NLL of the chosen solution. RISE, Xu et al. 2024.

    Tuples ``(w, l, step w, step l)``; ``(-1, -1, step w, step l)`` for further steps of a solution. Mask what a step
    pair shares. ``alpha`` multiplies ``-1/n_w sum_t l_t``. beta is from their code; alpha and the equal weight of the
    two kinds of pairs are from notes, not confirmed.
    """
    full, steps = Term((1.0, -1.0), scale=beta), Term((0.0, 0.0, 1.0, -1.0), scale=beta)
    return Objective("rise", (full, steps), beta=beta, nll=(alpha, 0.0, 0.0, 0.0))
