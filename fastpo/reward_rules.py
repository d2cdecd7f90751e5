"""How published methods turn scores of a response into its reward: small functions of arrays of any shapes.

``math`` and your own rewards are in rewards.py, judges in judges.py; these combine what those return.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastpo.statistics import z_scores

Array = NDArray[np.float64]


def length_penalised(scores: ArrayLike, lengths: ArrayLike, rho: float) -> Array:
    """[..., N] ``z(score) - rho z(length)`` over the N responses of a prompt. TPO, Wu et al. 2024; rho in [0, .5].

    z: in standard deviations from the mean of the N. TPO scores and measures the response behind its thought only.
    """
    return z_scores(scores) - rho * z_scores(lengths)


def minus_length(scores: ArrayLike, lengths: ArrayLike, penalty: float) -> Array:
    """``score - penalty * length`` (tokens). The length-penalised rewards of RLHF workflow, Dong et al. 2024."""
    return np.asarray(scores, dtype=np.float64) - penalty * np.asarray(lengths, dtype=np.float64)


def outcome_and_process(outcome: ArrayLike, steps: ArrayLike) -> Array:
    """``ORM + PRM_min / 5``: [...] 1 or 0, whether the answer is right, and [..., M] scores of its steps. B-STaR."""
    process = np.asarray(steps, dtype=np.float64)
    worst = process.min(-1) if process.shape[-1] else np.zeros(process.shape[:-1])
    return np.asarray(outcome, dtype=np.float64) + worst / 5


def refusal_reward(right: ArrayLike, refused: ArrayLike, steps: ArrayLike, c1: float, c2: float) -> Array:
    """1 where right; where it says it does not know, ``2 / (1 + e^(-c2 (L - c1))) - 1`` after L steps; else -1.

    A refusal pays only after an effort longer than c1 steps. Auto-CEI, Zhao et al. 2024.
    """
    effort = np.tanh(c2 * (np.asarray(steps, dtype=np.float64) - c1) / 2)
    return np.where(np.asarray(right, dtype=bool), 1.0, np.where(np.asarray(refused, dtype=bool), effort, -1.0))


def implicit_rewards(logps: ArrayLike, ref_logps: ArrayLike, beta: float = 1.0) -> Array:
    """``beta (log pi(y|x) - log pi_ref(y|x))`` of whole responses: the reward that DPO's policy stands for. CREAM."""
    return beta * (np.asarray(logps, dtype=np.float64) - np.asarray(ref_logps, dtype=np.float64))


def contrast(strong_logps: ArrayLike, weak_logps: ArrayLike) -> Array:
    """``sum_t (l_strong - l_weak)`` of whole responses under a strong and a weak model. CDR."""
    return implicit_rewards(strong_logps, weak_logps)


def log_sigmoid_gap(rewards: ArrayLike, reference: ArrayLike) -> Array:
    """``log s(r - r_ref)``: the log-probability of beating a reference response; bounded above, linear below.

    Wang et al. 2024, "Transforming and Combining Rewards": sums of it over rewards are a logical and.
    """
    gap = np.asarray(rewards, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    return -np.logaddexp(0.0, -gap)


def ensemble_min(rewards: ArrayLike) -> Array:
    """[...] the least of M models' rewards [..., M]: worst-case optimisation. Coste et al. 2023."""
    return np.asarray(rewards, dtype=np.float64).min(-1)


def ensemble_cautious(rewards: ArrayLike, lam: float) -> Array:
    """[...] ``mean - lam * variance`` (population) of M models' rewards [..., M]. Coste et al. 2023."""
    r = np.asarray(rewards, dtype=np.float64)
    return r.mean(-1) - lam * r.var(-1)


def with_progress(rewards: ArrayLike, advantages: ArrayLike, alpha: float) -> Array:
    """``R + alpha A``: outcome plus the progress of a step under a prover policy. Setlur et al. 2024, alpha 3 to 5."""
    return np.asarray(rewards, dtype=np.float64) + alpha * np.asarray(advantages, dtype=np.float64)
