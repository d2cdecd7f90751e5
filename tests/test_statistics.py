"""Statistics on values known by hand or from an independent computation; ties, empty and single inputs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo.statistics import (
    balance_scores,
    bald,
    draw_certain,
    elo,
    kendall_tau,
    low_mode,
    path_votes,
    preference_matrix,
    votes,
    win_rates,
    z_scores,
)

SCORES = st.lists(st.integers(-3, 3), min_size=0, max_size=7)  # few values: many ties


def test_z_scores():
    assert z_scores([1, 2, 3]) == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    rows = z_scores([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert rows[1].tolist() == [0, 0, 0], "equal values have no spread"
    assert z_scores([0.1] * 3).tolist() == [0, 0, 0], "their mean is not 0.1 to the bit"
    assert z_scores([]).shape == (0,) and z_scores([7.0]).tolist() == [0.0]


def tau_by_counting(a, b):
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    untied = sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)
    return sum(x * y for x, y in signs) / math.sqrt(untied) if untied else 0.0


def test_kendall_tau_known_values():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6)), "tau-b"
    assert kendall_tau([1, 1], [1, 2]) == kendall_tau([], []) == kendall_tau([1], [2]) == 0
    assert kendall_tau([[1, 2], [1, 2]], [[3, 4], [4, 3]]).tolist() == [1, -1]
    with pytest.raises(ValueError, match=r"b has shape \(3,\); it should be that of a, \(2,\)"):
        kendall_tau([1, 2], [1, 2, 3])


@given(SCORES, st.randoms())
def test_kendall_tau_counts_pairs(a, rng):
    b = [rng.randint(-3, 3) for _ in a]
    assert kendall_tau(a, b) == pytest.approx(tau_by_counting(a, b))


def test_elo_of_two_is_the_log_odds():
    """Won 3 of 4 games: 400 log10(3) points apart."""
    ratings = elo([[0, 300], [100, 0]], prior=1e-9)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3), rel=1e-6) and ratings.mean() == 1000


def test_elo_solves_the_likelihood_equations():
    """At the maximum each player's expected score is his actual one."""
    wins = np.random.default_rng(0).integers(0, 9, (5, 6, 6)).astype(float)
    ratings = elo(wins, prior=1e-6)
    expected = 1 / (1 + 10 ** ((ratings[:, None] - ratings[:, :, None]) / 400))
    games = wins + wins.swapaxes(1, 2)
    off = 1 - np.eye(6)
    assert np.allclose((wins * off).sum(-1), (games * expected * off).sum(-1), atol=1e-3)
    assert np.allclose(ratings[2], elo(wins[2], prior=1e-6)), "prompts do not mix"


def test_elo_of_the_unbeaten_and_of_those_who_never_played():
    ratings = elo([[0, 5, 0], [0, 0, 0], [0, 0, 0]])
    assert np.isfinite(ratings).all() and ratings[0] > ratings[2] > ratings[1]
    assert elo(np.zeros((3, 3))).tolist() == [1000] * 3
    assert elo(np.zeros((0, 0))).shape == (0,) and elo([[3.0]]).tolist() == [1000]
    with pytest.raises(ValueError, match=r"wins has shape \(2, 3\)"):
        elo(np.zeros((2, 3)))


def test_preferences_and_win_rates():
    hard = preference_matrix([1, 0, 1])
    assert hard.tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    assert win_rates(hard).tolist() == [0.75, 0, 0.75]
    soft = preference_matrix([0.0, 1.0], scale=2.0)
    assert soft[1, 0] == pytest.approx(1 / (1 + math.exp(-2))) and np.allclose(soft + soft.T, 1)
    assert win_rates([[0.5]]).tolist() == [0.5] and win_rates(np.zeros((0, 0))).shape == (0,)


def test_votes():
    assert votes(["a", "b", None, "a"]).tolist() == [2, 1, 0, 2]
    assert votes(["a", "b", None, "a"], [0.5, 2, 9, 0.25]).tolist() == [0.75, 2, 0, 0.75]
    assert votes([]).shape == (0,) and votes([None]).tolist() == [0]


def test_path_votes_count_a_path_once():
    """Answer a: paths of log-probs -1 and -2; b: one of -1, sampled three times."""
    logps = [-1.0, -2.0, -1.0, -1.0, -1.0]
    found = path_votes(["a", "a", "b", "b", "b"], logps, ["p", "q", "r", "r", "r"])
    assert found == pytest.approx([1 + math.exp(-1)] * 2 + [1.0] * 3)
    assert path_votes(["a"], [-5000.0], ["p"]).tolist() == [1.0], "no underflow"
    assert path_votes([], [], []).shape == (0,)


def test_low_mode():
    assert low_mode([-1, -1.1, -0.9, -9, -9.5]).tolist() == [False, False, False, True, True]
    assert not low_mode([2.0, 2.0, 2.0]).any() and low_mode([]).shape == (0,) and not low_mode([1.0]).any()
    assert low_mode([0, 0, 0, 1]).tolist() == [True, True, True, False], "equal values stay together"


def test_balance_scores():
    """Prompt 1: 4 selected, 2 right; prompt 2: nothing reaches 0.5. Target 4."""
    rewards, correct = [[1, 1, 0.6, 0.6], [0, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]
    found = balance_scores(rewards, correct, [0.5, 1.0, 2.0], target=4)
    assert found == pytest.approx([(2 / 4) * (2 / 4) / 2, (2 / 4) * 1 / 2, 0])
    assert balance_scores(rewards, correct, [1.0], target=2) == pytest.approx([0.5]), "enough right ones"
    assert balance_scores(np.zeros((0, 4)), np.zeros((0, 4)), [0.5]).tolist() == [0]


def test_bald():
    assert bald([0.3, 0.3, 0.3]) == pytest.approx(0) and bald([0.0, 1.0]) == pytest.approx(1)
    h = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert bald([[0.5, 1.0], [0.5, 0.5]]) == pytest.approx([h - 0.5, 0])


def test_draw_certain():
    drawn = draw_certain([0.0, 1.0, 0.5, 0.2], 3, seed=0)
    assert drawn.tolist() == [0, 2, 3], "the uncertain one is never drawn"
    assert draw_certain([], 3, seed=0).shape == (0,)
    counts = np.zeros(2)
    for seed in range(2000):
        counts[draw_certain([0.0, 0.75], 1, seed)] += 1
    assert counts[0] / 2000 == pytest.approx(0.8, abs=0.03), "in proportion to 1 : 0.25"
    with pytest.raises(ValueError, match="uncertainty lies in"):
        draw_certain([1.5], 1, seed=0)
