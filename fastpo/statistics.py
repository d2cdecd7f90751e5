"""Statistics that rewards and pair rules are made of: vectorised numpy; ties and empty input handled.

N responses (or players) to one prompt, M votes or models. Functions take anything ``numpy.asarray`` takes and compute
in float64; leading axes ``...`` are prompts.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_ELO_SCALE = 400 / np.log(10)  # points per unit of log-odds


def z_scores(values: ArrayLike) -> Array:
    """[..., N] values minus their mean over N, in standard deviations (of the N); zeros where all are equal."""
    x = np.asarray(values, dtype=np.float64)
    if x.shape[-1] == 0:
        return x
    centred = x - x.mean(-1, keepdims=True)
    spread = x.std(-1, keepdims=True)
    tiny = 1e-12 * np.abs(x).max(-1, keepdims=True)  # equal values whose mean is rounded
    return np.where(spread > tiny, centred / np.where(spread > tiny, spread, 1.0), 0.0)


def kendall_tau(a: ArrayLike, b: ArrayLike) -> Array:
    """[...] Kendall's tau-b between the rankings of [..., N] scores: 1 the same order, -1 the reverse, 0 none to see.

    ``sum_ij sign(a_i - a_j) sign(b_i - b_j) / sqrt(untied pairs in a * untied pairs in b)``; without ties that is
    (concordant - discordant) / (N choose 2). 0 where either ranks nothing: fewer than two, or all tied. O(N^2).
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"b has shape {y.shape}; it should be that of a, {x.shape}")
    sx, sy = (np.sign(v[..., :, None] - v[..., None, :]) for v in (x, y))
    agreement = (sx * sy).sum((-1, -2))
    untied = np.sqrt((sx**2).sum((-1, -2)) * (sy**2).sum((-1, -2)))
    return np.where(untied > 0, agreement / np.where(untied > 0, untied, 1.0), 0.0)


def elo(wins: ArrayLike, prior: float = 0.1, rounds: int = 50) -> Array:
    """[..., N] Elo ratings from wins[..., i, j], how often (or how much) i beat j; a draw counts half for each.

    The maximum-likelihood ratings of Bradley and Terry, ``P(i beats j) = 1 / (1 + 10^((e_j - e_i)/400))``, all games at
    once, so that the order of the games does not matter; their mean is 1000. ``prior`` draws per player against an
    average one keep the ratings of who never lost or never played finite. Newton's method, O(rounds N^3).
    """
    w = np.asarray(wins, dtype=np.float64)
    if w.ndim < 2 or w.shape[-1] != w.shape[-2]:
        raise ValueError(f"wins has shape {w.shape}; it should be [..., N, N]")
    n = w.shape[-1]
    w = w * (1 - np.eye(n))
    games = w + w.swapaxes(-1, -2)
    ratings = np.zeros(w.shape[:-1])
    for _ in range(rounds):
        expected = _logistic(ratings[..., :, None] - ratings[..., None, :])
        own = _logistic(ratings)
        gradient = (w - games * expected).sum(-1) + prior * (0.5 - own)
        slope = games * expected * (1 - expected)
        hessian = np.zeros_like(w) - slope
        hessian[..., range(n), range(n)] = slope.sum(-1) + prior * own * (1 - own) + 1e-12
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        ratings = ratings + np.clip(step, -2.0, 2.0)
    return 1000 + _ELO_SCALE * (ratings - ratings.mean(-1, keepdims=True) if n else ratings)


def preference_matrix(rewards: ArrayLike, scale: float | None = None) -> Array:
    """[..., N, N] probability that i beats j from rewards [..., N]: 1, 1/2, 0; with ``scale`` s(scale (r_i - r_j))."""
    r = np.asarray(rewards, dtype=np.float64)
    gap = r[..., :, None] - r[..., None, :]
    return (np.sign(gap) + 1) / 2 if scale is None else _logistic(scale * gap)


def win_rates(preferences: ArrayLike) -> Array:
    """[..., N] mean of preferences[..., i, j] over the other responses j; 1/2 where there is no other."""
    p = np.asarray(preferences, dtype=np.float64)
    n = p.shape[-1]
    if n < 2:
        return np.full(p.shape[:-1], 0.5)
    return (p.sum(-1) - p[..., range(n), range(n)]) / (n - 1)


def votes(answers: Sequence[Hashable | None], weights: ArrayLike | None = None) -> Array:
    """[N] votes that the answer of each response has: responses that share it, or the sum of their ``weights``.

    None is no answer and gets 0.
    """
    ids = {answer: i for i, answer in enumerate(dict.fromkeys(a for a in answers if a is not None))}
    index = np.array([ids.get(a, len(ids)) if a is not None else len(ids) for a in answers], dtype=np.int64)
    w = np.ones(len(answers)) if weights is None else np.asarray(weights, dtype=np.float64)
    totals = np.bincount(index, weights=w, minlength=len(ids) + 1).astype(np.float64)
    totals[len(ids)] = 0.0
    return totals[index]


def path_votes(answers: Sequence[Hashable | None], logps: ArrayLike, paths: Sequence[Hashable]) -> Array:
    """[N] probability of the answer of each response: the sum over its distinct paths of ``exp(logps)``. RPC.

    A path that was sampled twice counts once: what sums is the model's probability of it, not its frequency. Scaled so
    that the most probable path of all has 1, since whole responses have probabilities near e^-100.
    """
    x = np.asarray(logps, dtype=np.float64)
    if not len(x):
        return x
    first: dict[Hashable, int] = {}
    new = [first.setdefault(path, i) == i for i, path in enumerate(paths)]
    return votes(answers, np.where(new, np.exp(x - x.max()), 0.0))


def low_mode(values: ArrayLike) -> NDArray[np.bool_]:
    """[N] bool, whether a value belongs to the lower of two modes and lies below the mean. RPC's reasoning pruning.

    The cut is the one with the least variance inside the two sides (Otsu's). RPC (Zhou et al. 2025; from notes, not
    its code) fits a mixture of two Weibull distributions to the probabilities instead; give log-probabilities here.
    All False where the values do not differ.
    """
    x = np.asarray(values, dtype=np.float64)
    order = np.sort(x)
    n = len(order)
    if n < 2 or order[0] == order[-1]:
        return np.zeros(n, dtype=bool)
    left = np.arange(1, n)
    below = np.cumsum(order)[:-1]
    between = (below - left * order.mean()) ** 2 / (left * (n - left))  # variance between the sides, up to 1/n^2
    between[order[1:] == order[:-1]] = -1.0  # equal values stay together
    cut = order[int(between.argmax())]
    return (x <= cut) & (x < x.mean())


def balance_scores(rewards: ArrayLike, correct: ArrayLike, thresholds: ArrayLike, target: float = 8.0) -> Array:
    """[K] B-STaR's balance of exploration and exploitation at each threshold [K], a mean over prompts.

    Per prompt, of the responses with a reward of at least the threshold: ``min(n_right / target, 1) * n_right / n``, n
    those selected and n_right the right ones among them; 0 where none is selected. Zeng et al. 2024.

    Args:
        rewards, correct: [P, N]; distinct responses only are to count: give the repeated ones a reward of -inf.
    """
    r, c = np.asarray(rewards, dtype=np.float64), np.asarray(correct, dtype=bool)
    chosen = r[None] >= np.asarray(thresholds, dtype=np.float64)[:, None, None]  # [K, P, N]
    selected = chosen.sum(-1)
    right = (chosen & c).sum(-1)
    score = np.minimum(right / target, 1.0) * right / np.maximum(selected, 1)
    return score.mean(-1) if r.shape[0] else np.zeros(chosen.shape[0])


def bald(probabilities: ArrayLike) -> Array:
    """[...] information of M estimates [..., M] of one preference about their model, in bits: H(mean) - mean(H).

    0 where the estimates agree, 1 where half are sure of yes and half of no. UPO takes them from dropout at inference.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    return _binary_entropy(p.mean(-1)) - _binary_entropy(p).mean(-1)


def draw_certain(uncertainty: ArrayLike, number: int, seed: int) -> NDArray[np.int64]:
    """[<= number] distinct indices drawn in proportion to ``1 - uncertainty`` [N], in ascending order. UPO.

    Uncertainty is in [0, 1], like ``bald``; what has 1 is never drawn.
    """
    w = 1 - np.asarray(uncertainty, dtype=np.float64)
    if len(w) and (w.min() < 0 or w.max() > 1):
        raise ValueError(f"uncertainty lies in [{1 - w.max()}, {1 - w.min()}]; it should in [0, 1]")
    u = np.random.default_rng(seed).random(len(w))
    # the largest u^(1/w) without replacement (Efraimidis and Spirakis), as logarithms
    keys = np.where(w > 0, np.log(u) / np.where(w > 0, w, 1.0), -np.inf)
    return np.sort(np.argsort(-keys, kind="stable")[: min(number, int((w > 0).sum()))])


def _logistic(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def _binary_entropy(p: Array) -> Array:
    q = np.clip(p, 1e-300, 1.0)
    r = np.clip(1 - p, 1e-300, 1.0)
    return -(p * np.log2(q) + (1 - p) * np.log2(r))
