"""Each rule against its formula written out, on numbers small enough to check by hand."""

import math

import numpy as np
import pytest

from fastpo import reward_rules as rules


def test_length_penalised():
    """z of the scores (1, 3) is (-1, 1); of the lengths (10, 30) too."""
    assert rules.length_penalised([1, 3], [10, 30], 0.5).tolist() == [-0.5, 0.5]
    assert rules.length_penalised([1, 1], [10, 30], 0.5).tolist() == [0.5, -0.5], "a tie goes to the shorter one"


def test_minus_length():
    assert rules.minus_length([1.0, 1.0], [10, 30], 0.01) == pytest.approx([0.9, 0.7])


def test_outcome_and_process():
    assert rules.outcome_and_process([1, 0], [[0.9, 0.5], [1.0, 1.0]]) == pytest.approx([1.1, 0.2])
    assert rules.outcome_and_process([1.0], np.zeros((1, 0))) == pytest.approx([1.0]), "no steps"


def test_refusal_reward():
    found = rules.refusal_reward([1, 0, 0, 0], [0, 1, 1, 0], [9, 2, 4, 9], c1=2, c2=0.5)
    assert found == pytest.approx([1, 0, 2 / (1 + math.exp(-1)) - 1, -1])


def test_implicit_rewards_and_contrast():
    assert rules.implicit_rewards([-3.0, -2.0], [-4.0, -1.0], beta=0.5).tolist() == [0.5, -0.5]
    assert rules.contrast([-3.0], [-4.0]).tolist() == [1.0]


def test_log_sigmoid_gap():
    assert rules.log_sigmoid_gap([1.0, 1.0], [1.0, 0.0]) == pytest.approx([math.log(0.5), -math.log1p(math.exp(-1))])
    assert rules.log_sigmoid_gap(-1e4, 0.0) == -1e4, "linear far below, no overflow"


def test_ensembles():
    rewards = [[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]
    assert rules.ensemble_min(rewards).tolist() == [1, 2]
    assert rules.ensemble_cautious(rewards, lam=0.5) == pytest.approx([2 - 1 / 3, 2])


def test_with_progress():
    assert rules.with_progress([1.0, 0.0], [0.25, -0.5], alpha=4).tolist() == [2.0, -2.0]
