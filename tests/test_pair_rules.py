"""Each pair rule on lists small enough to check by eye. Those of IRPO and ScPO are in test_pairs.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo import pair_rules as rules
from fastpo.pair_rules import GOLD, Choice

ALL = [0, 1, 2, 3]


def test_best_worst():
    assert rules.best_worst([2, 5, None, 1], ALL) == (1, 3)
    assert rules.best_worst([5, 5, 1, 1], ALL) == (0, 2), "the first of equals"
    assert rules.best_worst([5, 1, 9, 0], [0, 1]) == (0, 1), "among the kept ones"
    assert rules.best_worst([2, 2, None, 2], ALL) is rules.best_worst([None] * 4, ALL) is None


def test_best_random_and_best_two():
    assert rules.best_random([3, 5, 1, 4], ALL) == (1, 0) and rules.best_two([3, 5, 1, 4], ALL) == (1, 3)
    assert rules.best_random([5, 5, 1, 4], ALL) == (0, 2), "an equal one is no pair"
    assert rules.best_two([5, 5, 1, 4], ALL) == (0, 3)
    assert rules.best_two([1, 1, 1, 1], ALL) is rules.best_random([1, 1, 1, 1], ALL) is None
    assert rules.best_two([None] * 4, ALL) is None


def test_tier_pair():
    """rho = .2 of the range 0..5: the top tier is 4 and above, the bottom tier 1 and below."""
    scores, lengths = [5, 4, 1, 0, 2], [30, 10, 25, 20, 99]
    assert rules.tier_pair(scores, lengths, range(5), rho=0.2) == (1, 2)
    assert rules.tier_pair(scores, lengths, range(5), rho=0.0) == (0, 3), "without tiers the best and the worst"
    assert rules.tier_pair([1, 1], [1, 2], [0, 1], rho=0.2) is None


def test_win_rate_choice():
    matrix = np.array([[0.5, 0.9, 0.6], [0.1, 0.5, 0.2], [0.4, 0.8, 0.5]])
    choice = rules.win_rate_choice(matrix, [0, 1, 2])
    assert choice.members == (0, 1) and choice.soft_label == 0.9
    assert choice.targets == pytest.approx((0.25, -0.35)) and choice.margin == pytest.approx(0.6)
    assert rules.win_rate_choice(matrix, [0, 2]).members == (0, 2)
    assert rules.win_rate_choice(np.full((3, 3), 0.5), [0, 1, 2]) is None
    assert rules.win_rate_choice(matrix, []) is None


def test_score_preferences_take_the_unscored_as_worst():
    assert rules.score_preferences([1.0, None, 0.0]).tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]


def test_gold_pairs_and_unpaired():
    assert rules.gold_pairs([3, 5, 7], limit=2) == [(GOLD, 3), (GOLD, 5)]
    found = rules.unpaired([1, 0, None, 1], ALL, threshold=1.0, limit=1)
    assert [c.members for c in found] == [(0, None), (None, 1)]


def test_ranked_list():
    choice = rules.ranked_list([1, 4, None, 2], ALL, limit=8)
    assert choice.members == (1, 3, 0) and choice.gains == pytest.approx((1, 1 / 3, 0))
    many = rules.ranked_list(range(9), range(9), limit=3)
    assert many.members == (8, 4, 0) and many.gains == (1, 0.5, 0), "evenly from the whole ranking"
    assert rules.ranked_list([1, 1, None, 1], ALL, limit=8) is rules.ranked_list([1], [0], limit=8) is None


def test_with_third():
    assert rules.with_third((0, 1), ALL).members == (0, 1, 2)
    assert rules.with_third((0, 3), ALL).members == (0, 3, 1)
    assert rules.with_third((GOLD, 0), [0]).members == (GOLD, 0, None)


def test_rpc_pair():
    """Answer b has more samples, all of one path; a two paths of the same probability."""
    logps, paths = [-1.0, -1.0, -1.0, -1.0, -1.0], ["p", "q", "r", "r", "r"]
    assert rules.rpc_pair(["a", "a", "b", "b", "b"], paths, logps, [0, 1, 2]) == (0, 2)
    assert rules.rpc_pair(["a", "b"], ["p", "q"], [-1.0, -1.0], [0, 1]) is None
    assert rules.rpc_pair([None, None], ["p", "q"], [-1.0, -2.0], [0, 1]) is None
    # one improbable path does not vote
    assert rules.rpc_pair(["a", "a", "b"], ["p", "q", "r"], [-1.0, -1.1, -30.0], [0, 1, 2]) == (0, 2)


@given(st.integers(0, 50), st.text("0123456789+-= abc", max_size=30))
def test_edit_number_changes_one_number(seed, text):
    edited = rules.edit_number(text, seed)
    if edited is None:
        assert not any(c.isdigit() for c in text)
        return
    before, after = ("".join(c if c.isdigit() else " " for c in t).split() for t in (text, edited))
    changed = [(int(a), int(b)) for a, b in zip(before, after, strict=True) if int(a) != int(b)]
    assert len(changed) == 1 and abs(changed[0][0] - changed[0][1]) <= 9
    assert "".join(c for c in text if not c.isdigit()) == "".join(c for c in edited if not c.isdigit())
    assert edited == rules.edit_number(text, seed), "a function of text and seed"


def test_with_edits():
    texts = ["1+1=2", "1+1=3", "no number"]
    first, second, third, gold = rules.with_edits([(0, 1), (2, 1), (None, None, 0), (GOLD, 1)], texts, "#### 2")
    assert first.members == (0, 1, 0, rules.edit_number(texts[0], 0)) and first.members[3] != texts[0]
    assert second.members == (2, 1, None, None), "no number to change: the pair alone"
    assert third.members[:3] == (None, None, 0) and isinstance(third.members[3], str)
    assert gold.members[2] == GOLD and gold.members[3].startswith("#### ")


def test_judgement_pair_and_most_varied():
    wins = np.array([[0, 2, 2], [0, 0, 1], [0, 1, 0]])
    assert rules.judgement_pair(wins) in ((0, 1), (0, 2))
    assert rules.judgement_pair(np.ones((3, 3))) is None
    assert rules.most_varied([[1, 1], [0, 5], [None], [2, 3]], 3) == [1, 3], "those that vary, most first"


def test_verdict_pairs():
    assert rules.verdict_pairs(["A", "B", None, "A"], "A", limit=4) == [(0, 1), (3, 1)]
    assert rules.verdict_pairs(["A", None, "A"], "A", limit=1) == [(0, None)], "right ones alone"
    assert rules.verdict_pairs(["B", "B"], "A", limit=4) == []


def test_choice_is_hashable():
    assert len({Choice((0, "x")), Choice((0, "x"))}) == 1
