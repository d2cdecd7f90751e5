"""Objectives: a method is a row of settings of one engine. Presets are functions: ``dpo()``, ``irpo()``, ...

A tuple p = (chosen, rejected, ...) of sequences costs

    omega_p * [ sum_j weight_j * psi_j(z_pj)  +  sum_k nll_k * NLL(sequence k) ]
    z_pj = scale_j * beta_scales_p * sum_k coefs_jk * f(S_k)  -  margin_j  -  margin_coef_j * m_p
    S_i  = n_i^-length_power * sum_t [ w_t (phi(l_t) - ref_coef r_t) + k_t K_t ]

over terms j and members k; the loss is the mean of that over tuples (or the sum), plus ``sum_t v_t l_t``. omega, m,
beta_scales come with the ``Pairs``; w, k, K, v, u (weights of the NLL) with the ``Segments``.

D_i below is the log-ratio of sequence i, ``sum_t (l_t - r_t)``; s the logistic function; w chosen, l rejected.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Link psi -> its parameter's default. The order is the code that the kernels know a link by.
LINKS: dict[str, float] = {
    "logistic": 1.0,  # -q log s(z) - (1-q) log s(-z); parameter: the soft label q
    "squared": 0.0,  # (z - tau)^2; parameter: the target tau
    "hinge": 0.0,  # max(0, 1 - z); no parameter
    "sigmoid": 0.0,  # s(-z); no parameter
    "exo": 1e-3,  # KL((s(z), s(-z)) || (1-e, e)); parameter: e
    "discopop": 0.05,  # (1-g) softplus(-z) + g exp(-z), g = s(z/tau); parameter: tau
    "linear": 0.0,  # z; no parameter
}
TOKEN_MAPS = ("identity", "log1mexp")  # phi(l): l, log(1 - e^l)
SCORE_MAPS = ("identity", "power", "js", "log_odds")  # f(S): S, (e^{cS} - 1)/c, log 2 + log s(S), S - log(1 - e^S)
NLL_NORMALIZERS = ("sequence", "batch", "none")


@dataclass(frozen=True)
class Term:
    """One link term ``weight * psi(z)`` of a tuple. It is left out of tuples that have none of its members."""

    coefs: tuple[float, ...] = (1.0, -1.0)  # over the members of the tuple
    link: str = "logistic"  # a key of LINKS
    scale: float = 0.1  # beta, where it multiplies the scores
    margin: float = 0.0
    margin_coef: float = 1.0  # what Pairs.margins is multiplied with
    param: float | None = None  # the link's parameter (see LINKS); None: its default
    weight: float = 1.0

    def __post_init__(self) -> None:
        _one_of("link", self.link, LINKS)

    @property
    def takes_soft_label(self) -> bool:
        """Pairs.soft_labels replaces the parameter of logistic terms that compare members."""
        return self.link == "logistic" and min(self.coefs) < 0 < max(self.coefs)


@dataclass(frozen=True)
class Objective:
    """The settings of the engine for one method. Immutable; cheap to build; build it once."""

    name: str
    terms: tuple[Term, ...]
    beta: float = 0.1  # what a score is multiplied with to be reported as a reward
    phi: str = "identity"  # token map, one of TOKEN_MAPS
    ref_coef: float = 1.0  # rho: 0 makes the objective reference-free
    length_power: float = 0.0  # lambda: 1 averages over the sequence's tokens
    score_map: str = "identity"  # f, one of SCORE_MAPS
    score_map_coef: float = 0.0  # c of the power map
    nll: tuple[float, ...] = ()  # weight of the NLL of each member; () for none
    nll_normalizer: str = "sequence"  # by n_i, by the "batch"'s mean number of NLL tokens per tuple, or "none"
    reduction: str = "mean"  # over tuples: "mean" or "sum"
    requires: tuple[str, ...] = ()  # like "pairs.margins": fields without which it would silently be another method

    # What the kernels take, derived from the terms.
    links: tuple[int, ...] = field(init=False, repr=False, compare=False)  # [J] codes
    table: tuple[float, ...] = field(init=False, repr=False, compare=False)  # [J, K+5] see `_row`, row by row
    num_members: int = field(init=False, repr=False, compare=False)  # K

    def __post_init__(self) -> None:
        _one_of("phi", self.phi, TOKEN_MAPS)
        _one_of("score_map", self.score_map, SCORE_MAPS)
        _one_of("nll_normalizer", self.nll_normalizer, NLL_NORMALIZERS)
        _one_of("reduction", self.reduction, ("mean", "sum"))
        if self.score_map == "power" and self.score_map_coef == 0:
            raise ValueError(f"objective {self.name}: score_map_coef is 0; the power map needs another (0 is identity)")
        members = max((len(c) for c in (self.nll, *(t.coefs for t in self.terms))), default=0)
        if members == 0:
            raise ValueError(f"objective {self.name}: terms and nll are empty; it needs at least one of them")
        object.__setattr__(self, "num_members", members)
        object.__setattr__(self, "links", tuple(list(LINKS).index(t.link) for t in self.terms))
        object.__setattr__(self, "table", tuple(x for t in self.terms for x in _row(t, members)))

    @property
    def needs_reference(self) -> bool:
        """Whether ``preference_loss`` needs ``ref_logps`` for it."""
        return self.ref_coef != 0

    @property
    def nll_coefs(self) -> tuple[float, ...]:
        """[K] ``nll``, zeros appended; () where there is no NLL."""
        return self.nll + (0.0,) * (self.num_members - len(self.nll)) if any(self.nll) else ()


def _row(term: Term, members: int) -> tuple[float, ...]:
    """What a term is for the kernels: coefs [K], scale, margin, margin_coef, link parameter, weight."""
    param = LINKS[term.link] if term.param is None else term.param
    coefs = term.coefs + (0.0,) * (members - len(term.coefs))
    return (*coefs, term.scale, term.margin, term.margin_coef, param, term.weight)


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(known)}{_nearest(value, known)}")


def _nearest(value: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(str(value), list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


# ---------------------------------------------------------------- pairs against a reference


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


def soft_dpo(beta: float = 0.1) -> Objective:
    """``-q log s(z) - (1-q) log s(-z)``, q = Pairs.soft_labels. CREAM (q = (Kendall tau + 1)/2), OSP, DNO."""
    return Objective("soft_dpo", (Term(scale=beta),), beta=beta, requires=("pairs.soft_labels",))


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

    INPO is this with beta = eta and ``r = (tau/eta) r_ref + (1 - tau/eta) r_previous`` for the reference log-probs.
    """
    term = Term(link="squared", scale=1.0, param=1 / (2 * beta))
    return Objective("ipo", (term,), beta=beta, length_power=float(average))


def sharpening(beta: float = 0.1) -> Objective:
    """``(beta (D_w - D_l) - tau)^2``, tau = Pairs.targets [P, 1]: here the base model's log-prob difference."""
    return Objective("sharpening", (Term(link="squared", scale=beta),), beta=beta, requires=("pairs.targets",))


def hinge(beta: float = 0.1) -> Objective:
    """``max(0, 1 - beta (D_w - D_l))``. SLiC, Zhao et al. 2023; RSO, Liu et al. 2023."""
    return Objective("hinge", (Term(link="hinge", scale=beta),), beta=beta)


def f_dpo(beta: float = 0.1, divergence: str = "forward_kl", alpha: float = 0.5) -> Objective:
    """DPO under another divergence: ``-log s(beta (f'(u_w) - f'(u_l)))``, u = e^D. Wang et al. 2023.

    f'(u): forward_kl ``1 - 1/u``; js ``log(2u/(1+u))``; alpha ``(u^(alpha-1) - 1)/(alpha - 1)``, alpha != 1 (1 is DPO).
    """
    _one_of("divergence", divergence, ("forward_kl", "js", "alpha"))
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
    """``-log s(beta [(D_w + k K_w) - (D_l + k K_l)])``, K the summed token KL. Zeng et al. 2024, their code.

    TDPO-1: ``Segments.kl_weights = 1``. TDPO-2: ``alpha`` (.5), and ``kl`` detached on the chosen sequences.
    """
    return Objective("tdpo", (Term(scale=beta),), beta=beta, requires=("segments.kl", "segments.kl_weights"))


def sparse_po(beta: float = 0.1) -> Objective:
    """DPO of masked log-ratios, ``S = sum_t [m^u_t (l_t - r_t) + m^d_t K_t]``. SparsePO, Christopoulou et al. 2024.

    m^u = Segments.weights, m^d = Segments.kl_weights (optional); both get gradients. Their L1 is the caller's.
    """
    return Objective("sparse_po", (Term(scale=beta),), beta=beta, requires=("segments.weights",))


# ---------------------------------------------------------------- with a likelihood term


def irpo(beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """``-log s(beta (D_w - D_l)) - alpha / n_w * sum_t l_t of the chosen``. Iterative RPO, Pang et al. 2024.

    The reference is the model that the iteration starts from. Also CODPO of CGPO.
    """
    return Objective("irpo", (Term(scale=beta),), beta=beta, nll=(alpha, 0.0))


def scpo(beta: float = 0.5, alpha: float = 1.0) -> Objective:
    """``omega * IRPO``: omega = Pairs.weights = (V_w - V_l) / k, the gap in votes. Prasad et al. 2024."""
    return Objective("scpo", (Term(scale=beta),), beta=beta, nll=(alpha, 0.0), requires=("pairs.weights",))


def rpo(beta: float = 0.01, eta: float = 0.005) -> Objective:
    """``-log s(beta (D_w - D_l)) - eta sum_t l_t of the chosen``. Liu et al. 2024 (their cumulative variant)."""
    return Objective("rpo", (Term(scale=beta),), beta=beta, nll=(eta, 0.0), nll_normalizer="none")


def sft() -> Objective:
    """``- sum l over the chosen / number of their tokens in the batch``: supervised fine-tuning on the chosen."""
    return Objective("sft", (), ref_coef=0.0, nll=(1.0, 0.0), nll_normalizer="batch")


# ---------------------------------------------------------------- reference-free


def simpo(beta: float = 2.0, gamma: float = 1.0) -> Objective:
    """``-log s(beta (mean l_w - mean l_l) - gamma)``. Meng et al. 2024; they take gamma / beta near .5."""
    return Objective("simpo", (Term(scale=beta, margin=gamma),), beta=beta, ref_coef=0.0, length_power=1.0)


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


def cpo(beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """``-log s(beta (sum l_w - sum l_l)) - alpha * mean l over the batch's chosen tokens``. Xu et al. 2024."""
    return Objective("cpo", (Term(scale=beta),), beta=beta, ref_coef=0.0, nll=(alpha, 0.0), nll_normalizer="batch")


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


# ---------------------------------------------------------------- one score at a time


def sppo(beta: float = 1e-3) -> Objective:
    """``1/2 sum_i (D_i - (P_i - 1/2)/beta)^2``, ``Pairs.targets[p, i] = P_i - 1/2``. Wu et al. 2024.

    P_i: mean win rate of response i over the samples of its prompt.
    """
    chosen, rejected = (Term(coefs, "squared", beta, weight=0.5 / beta**2) for coefs in ((1.0, 0.0), (0.0, 1.0)))
    return Objective("sppo", (chosen, rejected), beta=beta, requires=("pairs.targets",))


def sppo_hard(beta: float = 1e-3) -> Objective:
    """``(D_w - 1/(2 beta))^2 + (D_l + 1/(2 beta))^2``: SPPO with win rates 1 and 0, as TRL has it."""
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

    d = Pairs.margins (0 where absent, as in TRL 1.16): the running mean of the rewards, kept by the caller.
    """
    chosen = Term((1.0, 0.0), scale=beta)
    rejected = Term((0.0, 1.0), scale=beta, param=0.0)
    return Objective("bco_pair", (chosen, rejected), beta=beta)


def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """``a (1 - s(R_w - d))`` of a desirable, ``b (1 - s(d - R_l))`` of an undesirable sequence. Ethayarajh et al. 2024.

    Unpaired: tuples ``(i, -1)`` and ``(-1, j)``. d = Pairs.margins = beta KL, estimated by the caller from
    ``sequence_scores`` of mismatched pairs.
    """
    chosen = Term((1.0, 0.0), "sigmoid", beta, weight=desirable_weight)
    rejected = Term((0.0, -1.0), "sigmoid", beta, margin_coef=-1.0, weight=undesirable_weight)
    return Objective("kto", (chosen, rejected), beta=beta, requires=("pairs.margins",))


def apo_zero(beta: float = 0.1) -> Objective:
    """``1 - s(R_w) + s(R_l)``, R = beta D. D'Oosterlinck et al. 2024, equation 7."""
    return Objective("apo_zero", (Term((1.0, 0.0), "sigmoid", beta), Term((0.0, -1.0), "sigmoid", beta)), beta=beta)


def apo_down(beta: float = 0.1) -> Objective:
    """``s(R_w) + 1 - s(R_w - R_l)``, R = beta D. D'Oosterlinck et al. 2024, equation 8."""
    return Objective("apo_down", (Term((-1.0, 0.0), "sigmoid", beta), Term((1.0, -1.0), "sigmoid", beta)), beta=beta)


def selm(beta: float = 0.01, alpha: float = 1e-3) -> Objective:
    """``-log s(beta (D_w - D_l)) + alpha beta D_u``, u a third sequence. SELM, Zhang et al. 2024; VPO with E[D]."""
    explore = Term((0.0, 0.0, 1.0), "linear", beta, margin_coef=0.0, weight=alpha)
    return Objective("selm", (Term(scale=beta), explore), beta=beta)


def visit_soft_labels(chosen_visits: Tensor, rejected_visits: Tensor) -> Tensor:
    """Pairs.soft_labels [P] of ``mcts_dpo`` from visit counts [P]: ``1 - q = min(N_l / (N_l + max(1, N_w)), 1/2)``."""
    rejected = rejected_visits.to(torch.float32)
    return 1 - (rejected / (rejected + chosen_visits.clamp(min=1))).clamp(max=0.5)


PRESETS: dict[str, Callable[..., Objective]] = {
    f.__name__: f
    for f in (
        *(dpo, cdpo, robust, soft_dpo, mcts_dpo, step_apo, ipo, sharpening, hinge, f_dpo, exo_pair, discopop, tdpo),
        *(sparse_po, irpo, scpo, rpo, sft, simpo, alphapo, cpo, orpo),
        *(sppo, sppo_hard, nca_pair, bco_pair, kto, apo_zero, apo_down, selm),
    )
}


def by_name(name: str, **settings: Any) -> Objective:
    """``by_name("irpo", beta=0.1, alpha=1.0)``: the preset of that name. Errors suggest the nearest name or key."""
    _one_of("objective", name, PRESETS)
    keys = inspect.signature(PRESETS[name]).parameters
    for key in settings:
        _one_of(f"setting of objective {name}", key, keys)
    return PRESETS[name](**settings)
