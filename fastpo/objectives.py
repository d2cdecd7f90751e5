"""Objectives: a method is a row of settings of one engine (METHODS.md P1-P3). Presets are functions: ``dpo()``, ``irpo()``, ...

A tuple p = (chosen, rejected, ...) costs

    omega_p * [ sum_j term_j.weight * psi_j(z_pj; q, tau)  +  sum_k nll[k] * NLL(sequence k) ]
    z_pj = term_j.scale * sum_k term_j.coefs[k] * S_k  -  term_j.margin  -  m_p
    S_i = n_i^-length_power * sum_t [ w_t (phi(l_t) - ref_coef r_t) + k_t K_t ]

and the loss is their mean over tuples (or sum).
"""

from dataclasses import dataclass

LINKS = ("logistic", "squared", "hinge", "sigmoid", "exo", "discopop", "linear")


@dataclass(frozen=True)
class Term:
    """One link term psi(z) of a tuple."""

    coefs: tuple[float, ...] = (1.0, -1.0)  # c_k over the members of the tuple
    link: str = "logistic"
    scale: float = 0.1  # beta of METHODS.md P2: z = scale * sum_k c_k S_k - margin
    margin: float = 0.0
    label: float = 1.0  # q of the soft logistic link
    target: float = 0.0  # tau of the squared link
    temperature: float = 0.05  # discopop's tau; exo's epsilon
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    name: str
    terms: tuple[Term, ...]
    beta: float = 0.1  # what a log-ratio is multiplied with to be reported as a reward
    phi: str = "identity"  # or "log1mexp": log(1 - e^l), ORPO's and the unlikelihood's
    ref_coef: float = 1.0  # rho: 0 makes the objective reference-free
    length_power: float = 0.0  # lambda: 1 averages over the sequence's tokens
    nll: tuple[float, ...] = ()  # a_k: weight of the NLL of the k-th member; () for none
    nll_normalizer: str = "sequence"  # N_i: "sequence" (n_i), "batch" (all NLL tokens of the batch) or "none" (1)
    reduction: str = "mean"  # over tuples: "mean" or "sum"
