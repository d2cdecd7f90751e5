"""The math reward against answers as models write them, and user rewards with everything that can go wrong."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo.errors import FastpoError, RunError
from fastpo.rewards import Scorer, final_answer, load_reward, math_reward, plain_number, same_answer, vote_key


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+4=7\n#### 7", "7"),
        ("steps\nA: 1,200", "1,200"),
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("The answer is $18.", "$18"),
        ("The final answer is: 5", "5"),
        ("#### 1\n#### 2", "2"),  # the last mark counts
        ("A: 3\nwait, \\boxed{4}", "4"),
        ("it makes 13 * 2 = 26", None),  # no mark, no answer: the last number is not taken
        ("A:", None),
        ("Q/A: 3", None),
        ("\\boxed{1", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-18", -18),
        ("\u22124", -4),
        ("$1,234.50", Fraction(2469, 2)),
        ("-$3", -3),
        ("$-3", -3),
        ("75%", 75),
        ("3/4 cup", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("7.", 7),
        ("2 million", 2_000_000),
        ("18 dollars per day", 18),
        ("1,00", None),
        ("400 000", None),
        ("10+John's age", None),
        ("1/0", None),
        (".", None),
        ("", None),
    ],
)
def test_plain_number(text, value):
    assert plain_number(text) == value


@given(st.integers(-(10**12), 10**12))
def test_every_spelling_of_an_integer_is_that_integer(n):
    assert plain_number(str(n)) == plain_number(f"{n:,}") == plain_number(f"{n}.0") == plain_number(f"{n} eggs") == n


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("201.89999999999998", "201.9", True),
        ("1000000", "1000001", False),
        ("\\frac{1}{2}", "0.5", True),
        ("x+1", "1+x", True),
        ("2^3", "8", True),
        ("10+John's age", "10", False),  # plain text would be read as 10
        ("18 or 19", "18", False),
        ("x = 10", "10", True),
        ("10\\text{ apples}", "10", True),
        ("x+" * 200 + "1", "1", False),
        ("(1,2)", "(1, 2)", True),
        ("blue", "blue", True),
        ("blue", "red", False),
        ("-1.8 billion", "2", False),
    ],
)
def test_same_answer(answer, gold, same):
    assert same_answer(answer, gold) is same


def test_math_reward_reads_gold_of_any_format():
    for gold in ("work\n#### 72", "work\nA: 72", "72"):
        assert math_reward("q", "A: 72.0", {"answer": gold}) == 1.0
        assert math_reward("q", "72", {"answer": gold}) == 0.0
    with pytest.raises(ValueError, match="no 'answer'"):
        math_reward("q", "A: 1", {"question": "q"})


def test_equal_answers_vote_together():
    assert vote_key("1,200") == vote_key("$1200.0") != vote_key("1201")
    assert vote_key("x + 1") == vote_key("x+1")


def test_user_rewards(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompt, response, row):\n    return len(response)\nnumber = 3\ndef one(x):\n    return 1\n"
    )
    assert load_reward(f"{file}:length")("p", "four", {}) == 4
    assert load_reward("fastpo.rewards:math_reward") is math_reward
    for spec, message in [
        ("mth", "did you mean math"),
        (f"{file}:lenght", "has no 'lenght'; did you mean length"),
        (f"{file}:number", "is a int, it should be a function"),
        (f"{file}:one", r"should take \(prompt, response, row\)"),
        ("absent.py:f", "file absent.py not found"),
        ("no.such.module:f", "cannot be imported"),
    ]:
        with pytest.raises(FastpoError, match=message):
            load_reward(spec)


def raising(prompt, response, row):
    if response == "bad":
        raise ZeroDivisionError("by zero\nsecond line")
    return {"nan": float("nan"), "inf": float("inf"), "text": "x"}.get(response, 1)


def test_a_reward_that_raises_stops_and_names_the_prompt():
    scorer = Scorer(raising, "stop")
    assert scorer("7", "p", "good", {}) == 1.0
    with pytest.raises(
        RunError, match=r"prompt 7: ZeroDivisionError: by zero \(test_rewards.py:\d+\).*are kept"
    ) as error:
        scorer("7", "p", "bad", {})
    assert "second line" not in str(error.value)


def test_a_reward_that_raises_is_skipped_and_counted():
    scorer = Scorer(raising, "skip")
    assert [scorer("1", "p", r, {}) for r in ("good", "bad", "nan", "inf", "text")] == [1.0, None, None, None, None]
    assert scorer.failures == 3  # NaN is no opinion, not a failure
    assert "ZeroDivisionError" in scorer.first_failure
