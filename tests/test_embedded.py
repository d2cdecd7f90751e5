"""The embedded task: right, reproducible, with a test split that nothing else can touch."""

import re

import pytest
import torch
from transformers import AutoTokenizer

from fastpo import embedded
from fastpo.errors import FastpoError


def evaluate_steps(answer: str) -> int:
    """The result of a worked answer, every step checked against the one before it."""
    *steps, last = answer.split("\n")
    total = None
    for step in steps:
        left, sign, right, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
        assert total is None or int(left) == total
        total = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert total == int(result) >= 0
    assert last == f"#### {total}"
    return total


def test_worked_answers_follow_from_their_questions():
    for row in embedded.problems(0, 200):
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        used = [int(n) for n in re.findall(r"^(\d+)|[+-](\d+)=", row["answer"]) for n in n if n]
        assert used[: len(numbers)] == numbers or sorted(used) == sorted(numbers)
        evaluate_steps(row["answer"])


def test_rows_are_a_pure_function_of_their_arguments():
    assert embedded.problems(3, 20) == embedded.problems(3, 20)
    assert embedded.problems(3, 20)[:5] == embedded.problems(3, 5)
    assert embedded.problems(3, 20) != embedded.problems(4, 20)
    assert embedded.problems(3, 20, "train") != embedded.problems(3, 20, "warm_start")


def test_no_test_question_is_ever_trained_on():
    held_out = {row["question"] for seed in range(3) for row in embedded.problems(seed, 1000, "test")}
    for split in ("train", "warm_start"):
        assert held_out.isdisjoint(row["question"] for row in embedded.problems(0, 5000, split))


def test_demonstrations_are_right_and_of_mixed_quality():
    rows = embedded.demonstrations(0, 1000, worked_share=0.4)
    worked = [row for row in rows if embedded.is_worked(row["answer"])]
    assert 0.35 < len(worked) / len(rows) < 0.45
    for row, full in zip(rows, embedded.problems(0, 1000, "warm_start"), strict=True):
        assert row["question"] == full["question"]
        assert row["answer"] in (full["answer"], embedded.bare(full["answer"]))


@pytest.mark.parametrize("text", ["12+7=19\n#### 19", "né 日本\x00\t", ""])
def test_the_tokenizer_is_lossless_and_survives_saving(tmp_path, text):
    tokenizer = embedded.build_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == ids
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_model_comes_from_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (embedded.build_model(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: embedded.problems(0, 1, "dev"), "split is 'dev'; it should be one of warm_start, train, test"),
        (lambda: embedded.problems(0, -1), "n is -1; it should be 0 or more"),
        (lambda: embedded.demonstrations(0, 1, 1.5), "worked_share is 1.5; it should be between 0 and 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(FastpoError, match=re.escape(message)):
        call()
