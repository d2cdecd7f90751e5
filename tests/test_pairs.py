"""The pair rules of IRPO and ScPO on lists small enough to check by eye, and their invariants on random ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo.config import Config
from fastpo.pair_rules import GOLD, irpo_pairs, scpo_pair, zip_cyclic
from fastpo.pairs import build_pairs, candidates, explain_no_pairs


def sample(texts, prompt_id="1", answer="x"):
    return {"id": prompt_id, "row": {"answer": answer}, "responses": [{"text": t, "tokens": len(t)} for t in texts]}


def scored(rewards, answers=None):
    return {"rewards": rewards, "answers": answers or [None] * len(rewards)}


@given(st.integers(0, 7), st.integers(0, 7), st.integers(1, 60))
def test_zip_cyclic_is_distinct_and_balanced(a, b, limit):
    pairs = zip_cyclic(range(a), range(b), limit)
    assert len(pairs) == len(set(pairs)) == min(limit, a * b)
    if pairs:  # no member is used twice more than another
        for side, size in ((0, a), (1, b)):
            used = [sum(pair[side] == i for pair in pairs) for i in range(size)]
            assert max(used) - min(used) <= 1 + (limit % math.lcm(a, b) > 0)


def test_zip_cyclic_order():
    assert zip_cyclic([0, 1], [2, 3, 4], 4) == [(0, 2), (1, 3), (0, 4), (1, 2)]
    assert zip_cyclic([0, 1], [2, 3], 9) == [(0, 2), (1, 3), (0, 3), (1, 2)]


def test_candidates_drop_repeats_and_empty_ones():
    kept = candidates(["a", "b", "a", "", "b"], [1, 1, 1, 0, 1])
    assert (kept.keep, kept.duplicates, kept.empty) == ([0, 1], 2, 1)


def test_irpo_sides():
    pairs, winners, losers = irpo_pairs([1.0, 0.0, None, 0.5, 1.0], [0, 1, 2, 3, 4], limit=3)
    assert (winners, losers) == ([0, 4], [1, 3])
    assert pairs == [(0, 1), (4, 3), (0, 3)]
    assert irpo_pairs([1.0, 1.0], [0, 1], limit=3)[0] == []
    assert irpo_pairs([0.0], [0], limit=3, gold=True)[0] == [(GOLD, 0)]
    assert irpo_pairs([0.5, 0.2], [0, 1], limit=3, win_threshold=0.5)[0] == [(0, 1)]


def test_scpo_votes():
    answers = ["7", "7", "5", "7", None, "5", "9", "7"]
    assert scpo_pair(answers, range(8), threshold=0.5) == (0, 6, (4 - 1) / 8)
    assert scpo_pair(answers, range(8), threshold=0.6) == "below_threshold"
    assert scpo_pair(["7", "7"], [0, 1], threshold=0.5) == "unanimous"
    assert scpo_pair([None, None], [0, 1], threshold=0.0) == "no_answer"
    assert scpo_pair(["7", "5"], [0, 1], threshold=0.5) == "below_threshold"  # a tie is no preference
    # a repeated text votes, but only its first occurrence can be chosen
    assert scpo_pair(["5", "7", "7"], [0, 1], threshold=0.5) == (1, 0, 1 / 3)


def test_build_irpo_pairs_and_counts():
    samples = [
        sample(["good", "bad", "bad", ""], "1"),
        sample(["good", "fine"], "2"),
        sample(["bad"], "3"),
        sample(["good", "odd"], "4"),
    ]
    rewards = [scored([1, 0, 0, 0]), scored([1, 1]), scored([0]), scored([1, None])]
    rows, counts = build_pairs(samples, rewards, Config())
    assert rows == [{"prompt": "1", "chosen": "1/0", "rejected": "1/1", "weight": 1.0}]
    assert (counts.prompts, counts.pairs, counts.paired_prompts) == (4, 1, 1)
    assert (counts.all_right, counts.all_wrong, counts.duplicates, counts.empty, counts.unscored) == (2, 1, 1, 1, 1)


def test_gold_wins_unless_a_sample_says_the_same():
    samples = [sample(["bad"], "1", answer="gold text"), sample(["gold", "bad"], "2", answer="gold")]
    rows, _ = build_pairs(samples, [scored([0]), scored([1, 0])], Config(gold_wins=True))
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("1/gold", "1/0"), ("2/0", "2/1")]


def test_build_scpo_pairs_weigh_by_votes():
    config = Config(pair_rule="scpo", vote_threshold=[0.5, 0.7])
    samples = [sample(["a", "b", "c"], "1")]
    rewards = [scored([None] * 3, ["7", "7", "5"])]
    rows, _ = build_pairs(samples, rewards, config, iteration=1)
    assert rows == [{"prompt": "1", "chosen": "1/0", "rejected": "1/2", "weight": 1 / 3}]
    assert build_pairs(samples, rewards, config, iteration=2)[0] == []


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([[0, 0], [0, 0]], "2 wrong by every sample.*take easier prompts"),
        ([[1, 1], [1, 1]], "2 are answered right.*harder"),
    ],
)
def test_no_pairs_says_why_and_what_to_change(rewards, words):
    rows, counts = build_pairs([sample(["a", "b"]), sample(["a", "b"], "2")], [scored(r) for r in rewards], Config())
    assert rows == []
    import re

    assert re.search(words, explain_no_pairs(counts, Config(), 3))
    assert explain_no_pairs(counts, Config(), 3).startswith("iteration 3 has no pairs: of 2 prompts")


def test_no_scpo_pairs_says_why():
    config = Config(pair_rule="scpo")
    _, counts = build_pairs([sample(["a", "b"])], [scored([None, None], ["1", "1"])], config)
    assert "1 have one answer only" in explain_no_pairs(counts, config, 1)
