"""Pairs against a reference: the family of DPO.

D_i is the log-ratio of sequence i, ``sum_t (l_t - r_t)``; s the logistic function; w chosen, l rejected.
"""

from dataclasses import replace

from torch import Tensor

from .core import Objective, Term, one_of
from .coupling import GapBeta, RankedPairs, SharedLengths, TokenKl


def dpo(beta: float = 0.1, length_power: float = 0.0) -> Objective:
    """``-log s(beta (D_w - D_l))``. Rafailov et al. 2023. ``length_power=1``: of mean log-ratios (TRL's sigmoid_norm).

    Also SPIN (the reference is the previous iterate), Self-Rewarding, Meta-Rewarding, TPO: they differ in their pairs.
    """
    return Objective("dpo", (Term(scale=beta),), beta=beta, length_power=length_power)


def cdpo(beta: float = 0.1, label_smoothing: float = 0.1) -> Objective:
    """``-(1-e) log s(z) - e log s(-z)``, z as in DPO, e the share of flipped labels. Mitchell 2023."""
    return Objective("cdpo", (Term(scale=beta, param=1 - label_smoothing),), beta=beta)


def robust(beta: float = 0.1, label_smoothing: float = 0.1) -> Objective:
    """``[-(1-e) log s(z) + e log s(-z)] / (1 - 2e)``: unbiased under flips of rate e < 1/2. Chowdhury et al. 2024."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; robust needs it in [0, 0.5)")
    q = (1 - label_smoothing) / (1 - 2 * label_smoothing)
    return Objective("robust", (Term(scale=beta, param=q),), beta=beta)


def sigmoid_norm(beta: float = 0.1) -> Objective:
    """DPO of mean log-ratios, ``-log s(beta (D_w / n_w - D_l / n_l))``: TRL's ``sigmoid_norm``, also LN-DPO's.

    TRL divides by the response's tokens, as here; its ``beta`` is per token too and wants to be larger than DPO's.
    """
    return replace(dpo(beta, length_power=1.0), name="sigmoid_norm")


def soft_dpo(beta: float = 0.1) -> Objective:
    """``-q log s(z) - (1-q) log s(-z)``, q = Pairs.soft_labels: the probability that the chosen one is better."""
    return Objective("soft_dpo", (Term(scale=beta),), beta=beta, requires=("pairs.soft_labels",))


def cream(beta: float = 0.1) -> Objective:
    """Soft DPO, q of ``rank_soft_labels``: how much two iterates agree on a prompt's ranking. Wang et al. 2024."""
    return replace(soft_dpo(beta), name="cream")


def dno(beta: float = 0.1) -> Objective:
    """Soft DPO against the policy of the iteration's start, q of ``strength_soft_labels``. Rosset et al. 2024.

    Their regression ``-s(r_w - r_l) log s(z) - s(r_l - r_w) log s(-z)``, r a response's win rate against the policy.
    From memory, not confirmed against the paper; README.md of preference_loss derives that its optimum is theirs.
    """
    return replace(soft_dpo(beta), name="dno")


def osp(beta: float = 0.1) -> Objective:
    """Soft DPO, q = the strength that the policy itself gives the preference. Online Self-Preferring, Zhai et al. 2024.

    From memory, not confirmed against the paper.
    """
    return replace(soft_dpo(beta), name="osp")


def mm_rlhf(beta: float = 0.1, sft: float = 0.25) -> Objective:
    """``-log s(beta_p (D_w - D_l)) + sft NLL(chosen)``, ``beta_p = beta (1 + w (1 - e^(-k gap)))``. Zhang et al. 2025.

    Pairs.beta_scales of ``gap_beta_scales``. The NLL is over the batch's chosen tokens, as TRL's ``sft``; the notes
    it is from do not say which normaliser is meant.
    """
    terms, required = (Term(scale=beta),), ("pairs.beta_scales",)
    return Objective("mm_rlhf", terms, beta=beta, nll=(sft, 0.0), nll_normalizer="batch", requires=required)


def wpo(beta: float = 0.1) -> Objective:
    """``omega * DPO``, omega = Pairs.weights of ``wpo_weights``: what the policy would have sampled. Zhou et al. 2024.

    As TRL's ``use_weighting``: the mean is over pairs, not over omega.
    """
    return Objective("wpo", (Term(scale=beta),), beta=beta, requires=("pairs.weights",))


def ld_dpo(beta: float = 0.1, alpha: float = 0.5) -> Objective:
    """DPO whose tokens beyond the pair's shorter response count ``alpha``. LD-DPO, Liu et al. 2024; TRL's ``ld_alpha``.

    A sequence in several tuples takes the shortest of its partners, so give each pair sequences of its own, as
    ``fastpo train`` does.
    """
    return Objective("ld_dpo", (Term(scale=beta),), beta=beta, couple=SharedLengths(alpha))


def mcts_dpo(beta: float = 0.1) -> Objective:
    """DPO on siblings of a search tree with soft labels from visit counts: q of ``visit_soft_labels``.

    Xie et al. 2024 and their code. Mask the steps that the two share: spans start at the first differing token.
    """
    return Objective("mcts_dpo", (Term(scale=beta),), beta=beta, requires=("pairs.soft_labels",))


def step_apo(beta: float = 0.3, alpha: float = 1.0) -> Objective:
    """``-log s(z - alpha (Q_w - Q_l))``, Q_w - Q_l = Pairs.margins. Step-APO of CPL, Wang et al. 2024, their code."""
    return Objective("step_apo", (Term(scale=beta, margin_coef=alpha),), beta=beta, requires=("pairs.margins",))


def ipo(beta: float = 0.1, average: bool = False) -> Objective:
    """``(D_w - D_l - 1/(2 beta))^2``. Azar et al. 2023. ``average``: of mean log-ratios, as in TRL.

    TRL's ``ipo`` is ``average=True``; the paper's equation 17 sums.
    """
    term = Term(link="squared", scale=1.0, param=1 / (2 * beta))
    return Objective("ipo", (term,), beta=beta, length_power=float(average))


def inpo(eta: float = 7.5e-3) -> Objective:
    """``(d - (tau/eta) d_ref - (1 - tau/eta) d_previous - 1/(2 eta))^2``, d the chosen's log-prob minus the rejected's.

    INPO, Zhang et al. 2024; eta 7.5e-3, tau = eta/3 in third-party code. Two references: pass ``mixed_reference`` of
    them, with share = tau/eta, as ``ref_logps``.
    """
    return replace(ipo(eta), name="inpo")


def sharpening(beta: float = 0.1) -> Objective:
    """``(beta (D_w - D_l) - tau)^2``, tau = Pairs.targets [P, 1]: here ``log pi_0(w) - log pi_0(l)`` of the base model.

    Huang et al. 2024, with the base model as reference. From memory; derived in preference_loss' README.md.
    """
    return Objective("sharpening", (Term(link="squared", scale=beta),), beta=beta, requires=("pairs.targets",))


def hinge(beta: float = 0.1) -> Objective:
    """``max(0, 1 - beta (D_w - D_l))``. SLiC, Zhao et al. 2023; RSO, Liu et al. 2023."""
    return Objective("hinge", (Term(link="hinge", scale=beta),), beta=beta)


def f_dpo(beta: float = 0.1, divergence: str = "forward_kl", alpha: float = 0.5) -> Objective:
    """DPO under another divergence: ``-log s(beta (f'(u_w) - f'(u_l)))``, u = e^D. Wang et al. 2023.

    f'(u): forward_kl ``1 - 1/u``; js ``log(2u/(1+u))``; alpha ``(u^(alpha-1) - 1)/(alpha - 1)``, alpha != 1 (1 is DPO).
    """
    one_of("divergence", divergence, ("forward_kl", "js", "alpha"))
    if divergence == "js":
        return Objective("f_dpo", (Term(scale=beta),), beta=beta, score_map="js")
    coef = -1.0 if divergence == "forward_kl" else alpha - 1
    return Objective("f_dpo", (Term(scale=beta),), beta=beta, score_map="power", score_map_coef=coef)


def exo_pair(beta: float = 0.1, epsilon: float = 1e-3) -> Objective:
    """``KL( (s(z), s(-z)) || (1-e, e) )``. Ji et al. 2024, their equation 16."""
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}; exo_pair needs it in (0, 1)")
    return Objective("exo_pair", (Term(link="exo", scale=beta, param=epsilon),), beta=beta)


def discopop(beta: float = 0.05, tau: float = 0.05) -> Objective:
    """``(1-g) softplus(-z) + g e^-z``, ``g = s(z/tau)``. Lu et al. 2024, found by a language model."""
    return Objective("discopop", (Term(link="discopop", scale=beta, param=tau),), beta=beta)


def tdpo(beta: float = 0.1) -> Objective:
    """``-log s(beta [(D_w + k K_w) - (D_l + k K_l)])``, K and k the caller's, token by token. ``tdpo1`` and ``tdpo2``
    fill k themselves.
    """
    return Objective("tdpo", (Term(scale=beta),), beta=beta, requires=("segments.kl", "segments.kl_weights"))


def tdpo1(beta: float = 0.1) -> Objective:
    """``-log s(beta [(D_w - D_l) - (K_l - K_w)])``, K the sum of Segments.kl over tokens. Zeng et al. 2024, their code.

    Segments.kl is K_t = KL(ref || policy) of ``fastpo.token_kl``, with gradient.
    """
    return Objective("tdpo1", (Term(scale=beta),), beta=beta, requires=("segments.kl",), couple=TokenKl(1.0, False))


def tdpo2(beta: float = 0.1, alpha: float = 0.5) -> Objective:
    """``-log s(beta [(D_w - D_l) - alpha (K_l - sg K_w)])``, as ``tdpo1`` otherwise. Zeng et al. 2024, their code.

    A sequence that is chosen in any tuple gets no gradient through its K; its log-probs do. ``fastpo train`` makes two
    of one that is rejected in another.
    """
    return Objective("tdpo2", (Term(scale=beta),), beta=beta, requires=("segments.kl",), couple=TokenKl(alpha, True))


def sparse_po(beta: float = 0.1) -> Objective:
    """DPO of masked log-ratios, ``S = sum_t [m^u_t (l_t - r_t) + m^d_t K_t]``. SparsePO, Christopoulou et al. 2024.

    m^u = Segments.weights, m^d = Segments.kl_weights (optional); both get gradients. Their L1 on the masks is
    added outside: ``out.loss + lam * m.abs().sum()``.
    """
    return Objective("sparse_po", (Term(scale=beta),), beta=beta, requires=("segments.weights",))


def aot(beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """DPO on order statistics: ``z_(k) = beta ([l_w - l_l]_(k) - [r_w - r_l]_(k))``, each sorted over the batch.

    Melnyk et al. 2024, paired; TRL's ``aot``, label smoothing as there. Takes Pairs.margins of ``reference_margins`` in
    place of ``ref_logps``: the sorts differ, so no log-ratio of a sequence enters.
    """
    term = Term(scale=beta, margin_coef=beta, param=1 - label_smoothing)
    couple = RankedPairs(paired=True)
    return Objective("aot", (term,), beta=beta, ref_coef=0.0, requires=("pairs.margins",), couple=couple)


def aot_unpaired(beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """``z_(k) = beta ([D_w]_(k) - [D_l]_(k))``, each sorted over the batch. Melnyk et al. 2024; TRL's too."""
    term = Term(scale=beta, param=1 - label_smoothing)
    return Objective("aot_unpaired", (term,), beta=beta, couple=RankedPairs(paired=False))


def beta_dpo(beta: float = 0.1, alpha: float = 0.6, mean_gap: float | Tensor = 0.0, least: float = 1e-3) -> Objective:
    """DPO with one beta a batch: ``beta max(1 + alpha (mean_p [D_w - D_l] - mean_gap), least)``. Wu et al. 2024.

    ``mean_gap`` is M_0, their running mean of the gap (momentum .9), a number or a tensor []: the caller's, as in
    ``bco``. Their filter of outlying pairs is a choice of ``Pairs.weights``. The formula is that of third-party code.
    """
    return Objective("beta_dpo", (Term(scale=beta),), beta=beta, couple=GapBeta(alpha, mean_gap, least))
