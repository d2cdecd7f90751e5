"""Judgements that are trained on: which the meta-judge and the self-taught evaluator make of a judge whose opinions are
known. Grades, duels and implicit rewards of real models are in test_judges.py."""

import pytest

from fastpo import embedded, signals
from fastpo.config import Config
from fastpo.data import Codec
from fastpo.pairs import build_pairs


class KnownJudge:
    """Answers duels by ``better(prompt)``, the probability that the first one wins; samples from ``texts(prompt)``."""

    def __init__(self, better=None, texts=None, **settings):
        config = Config(**{"data": "embedded", "judge_mode": "text", "judge_samples": 4, "judge_pairs": 2, **settings})
        self.codec = Codec(embedded.build_tokenizer(), config, 256)
        self.better, self.texts, self.asked = better, texts, []

    def opinions(self, prompts, rubric, *, seed, progress=None):
        return [self.better(prompt) for prompt in prompts]

    def sampled(self, prompts, number, *, seed, max_new_tokens=None, progress=None):
        self.asked.append((list(prompts), number, max_new_tokens))
        return [[self.texts(prompt)] * number if number == 1 else self.texts(prompt)[:number] for prompt in prompts]


def row(prompt_id, *texts):
    responses = [{"text": text, "ids": [0], "tokens": len(text)} for text in texts]
    return {"id": prompt_id, "prompt": f"Question {prompt_id}?", "row": {}, "responses": responses}


def test_the_meta_judge_ranks_the_judgements_of_the_most_disputed_responses():
    judge = KnownJudge(better=lambda prompt: float("A: 5" in prompt))  # likes the grade 5, wherever it stands
    rows = [row("1", "agreed", "disputed", "worse disputed"), row("2", "agreed")]
    columns = [
        {"judgements": [["5", "5"], ["0", "5", "5", "5"], ["0", "5", "?", "0", "5"]]},
        {"judgements": [["3", "3"]]},
    ]
    first, second = signals.meta_judged(rows, columns, judge, seed=0)
    pairs = first["judgement_pairs"]
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("5", "0")] * 2 and second["judgement_pairs"] == []
    assert pairs[0]["prompt"] == "Question 1?\nworse disputed\nGrade?", "the most disputed one first"
    assert pairs[1]["prompt"] == "Question 1?\ndisputed\nGrade?"


def test_a_meta_judge_that_likes_a_place_only_ranks_nothing():
    judge = KnownJudge(better=lambda prompt: 1.0)
    found = signals.meta_judged([row("1", "x")], [{"judgements": [["0", "5"]]}], judge, seed=0)
    assert found == [{"judgement_pairs": []}]


def test_judgements_are_sampled_where_the_grades_come_from_labels():
    judge = KnownJudge(
        better=lambda prompt: 0.9 if "A: 5" in prompt else 0.2, texts=lambda prompt: ["5", "0", "5", "0"]
    )
    (found,) = signals.meta_judged([row("1", "x")], [{"scores": [2.5]}], judge, seed=0)
    assert [(p["chosen"], p["rejected"]) for p in found["judgement_pairs"]] == [("5", "0")]
    assert judge.asked[0][1] == 4


@pytest.mark.parametrize(
    ("texts", "accuracy", "pairs"),
    [
        (("right", "wrong", "?", "right"), 0.5, [("right", "wrong")]),
        (("right",) * 4, 1.0, [("right", None)]),
        (("wrong",) * 4, 0.0, []),
    ],
)
def test_the_worse_response_answers_a_changed_question(texts, accuracy, pairs):
    """The place of the good response changes from prompt to prompt; its verdict with it."""

    def answer(prompt):
        if "Better?" not in prompt:
            return "bad"
        good = "A" if "A: good" in prompt else "B"
        return [{"right": good, "wrong": "AB".replace(good, "")}.get(text, text) for text in texts]

    judge = KnownJudge(texts=answer, max_new_tokens=17)
    rows = [{**row(str(i), "good"), "prompt": p["question"]} for i, p in enumerate(embedded.problems(0, 12))]
    found = signals.verdicts(rows, judge, 4, seed=0)
    firsts = set()
    for column in found:
        assert column["worse"] == "bad" and column["judge_accuracy"] == accuracy
        assert len(column["judgement_pairs"]) == len(pairs)
        for pair, (_, wrong) in zip(column["judgement_pairs"], pairs, strict=True):
            good = "A" if "A: good" in pair["prompt"] else "B"
            assert pair["chosen"] == good and (pair["rejected"] is None) == (wrong is None)
            firsts.add(good)
    assert firsts == ({"A", "B"} if pairs else set())
    assert judge.asked[0][1:] == (1, 17), "a response is as long as responses may be, not as judgements"
    assert all(a != b["prompt"] for a, b in zip(judge.asked[0][0], rows, strict=True))


def test_right_judgements_alone_are_for_fine_tuning():
    rows = [row("1", "good")]
    columns = [{"id": "1", "rewards": [None], "judgement_pairs": [{"prompt": "p", "chosen": "A", "rejected": None}]}]
    for objective, number in (("sft", 1), ("dpo", 0)):
        pairs, _ = build_pairs(rows, columns, Config(pair_rule="judgements", objective=objective))
        assert len(pairs) == number
    assert build_pairs(rows, columns, Config(pair_rule="judgements", objective="sft"))[0] == [
        {
            **{"prompt": "1", "chosen": "1/new0", "rejected": None, "weight": 1.0},
            **{"prompt_text": "p", "texts": {"1/new0": "A"}},
        }
    ]


def test_visible():
    assert signals.visible("thought #### 1 #### 2", "####") == "#### 2"
    assert signals.visible("no mark", "####") == "no mark" and signals.visible("a#b", None) == "a#b"
