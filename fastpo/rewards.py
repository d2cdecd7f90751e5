"""Rewards: ``(prompt, response, row) -> float``, row being the data's JSON object.

``math`` compares the response's final answer with that of ``row["answer"]``: 1 where equal, else 0. A final answer
stands behind the last of these marks (GSM8K's, its model solutions', LaTeX's, and the phrase):

    #### N        A: N  (at the start of a line)        \\boxed{N}        the (final) answer is N

A response without a mark has no answer and scores 0: taking its last number would reward texts that were cut off there.
Plain numbers (signs, thousands commas, $ and other currency signs, %, units behind, fractions) are compared as exact
rationals in a microsecond; the rest goes to math-verify (sympy), a thousand times slower.
"""

import importlib
import importlib.util
import inspect
import math
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastpo.errors import FastpoError, RunError, suggestion

RewardFn = Callable[[str, str, dict[str, Any]], float]

_MARK = re.compile(
    r"####[ \t]*(?P<hash>[^\n]*)"
    r"|^[ \t]*A:[ \t]*(?P<line>[^\n]*)"
    r"|\\boxed(?=\{)"
    r"|\bthe (?:final )?answer is:?[ \t]*(?P<phrase>[^\n]*)",
    re.MULTILINE | re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)[$\u20ac\u00a3\u00a5]?(?P<minus>[-\u2212]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<decimals>\.\d*)?(?:[ ]?/[ ]?(?P<denominator>\d+))?"
    r"(?P<unit>[ ]?%|[ ]?[$\u20ac\u00a3\u00a5]|(?:[ ]?[A-Za-z]+(?:[ /.-]+[A-Za-z]+)*))?\.?"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_LONGEST_FORMULA = 200  # characters; longer answers are prose, and slow to parse
_RELATIVE_TOLERANCE = Fraction(1, 10**9)  # forgives what binary floating point prints: 201.89999999999998 is 201.9


def final_answer(text: str) -> str | None:
    """The text behind the last answer mark, trimmed; None where there is no mark or nothing behind it."""
    last = None
    for last in _MARK.finditer(text):  # noqa: B007 (the last match is what is wanted)
        pass
    if last is None:
        return None
    found = last["hash"] or last["line"] or last["phrase"]
    if text[last.start() : last.end()].endswith("boxed"):
        found = _braced(text, last.end())
    return (found or "").strip().rstrip(".").strip() or None


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at ``start`` and the one that closes it."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 1 : i]
    return None


@lru_cache(maxsize=1 << 16)
def plain_number(text: str) -> Fraction | None:
    """A number as people write it (``-$1,234.50``, ``75%``, ``3/4 cup``, ``2 million``), exactly; else None.

    A percent sign is a unit (75% is 75, as GSM8K's answers have it); a scale word multiplies; other words are units.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or not (match["whole"] or len(match["decimals"] or "") > 1):
        return None
    value = Fraction((match["whole"] or "0").replace(",", "") + (match["decimals"] or ".").rstrip(".") or "0")
    if match["denominator"]:
        if int(match["denominator"]) == 0:
            return None
        value /= int(match["denominator"])
    if match["sign"] in ("-", "\u2212") or match["minus"]:
        value = -value
    words = re.findall(r"[a-z]+", (match["unit"] or "").lower())
    return value * _SCALES.get(words[0], 1) if words else value


@lru_cache(maxsize=1 << 16)
def same_answer(answer: str, gold: str) -> bool:
    """Whether two final answers mean the same: as numbers, else as text, else by math-verify."""
    a, b = plain_number(answer), plain_number(gold)
    if a is not None and b is not None:
        return abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b))
    if answer.split() == gold.split():
        return True
    if max(len(answer), len(gold)) > _LONGEST_FORMULA:
        return False
    return _math_verify(answer, gold)


def _math_verify(answer: str, gold: str) -> bool:
    from math_verify import parse, verify

    # Its timeouts are signals, which only the main thread may set. The dollars make it read a formula: out of plain
    # text it takes the first number, and "10+John's age" would be 10.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    parsed = [parse(f"${text}$", parsing_timeout=limit) for text in (gold, answer)]
    return bool(all(parsed) and verify(*parsed, timeout_seconds=limit))


def gold_answer(row: dict[str, Any]) -> str | None:
    """The final answer of a data row: behind the mark of ``row["answer"]``, or the whole of it where it has none."""
    text = row.get("answer")
    if text is None:
        return None
    return final_answer(str(text)) or str(text).strip() or None


def math_reward(prompt: str, response: str, row: dict[str, Any]) -> float:
    """1.0 if the response's final answer equals that of ``row["answer"]``, else 0.0. Raises if the row has none."""
    gold = gold_answer(row)
    if gold is None:
        raise ValueError(f"the row has no 'answer' to compare with (keys: {', '.join(row)})")
    answer = final_answer(response)
    return float(answer is not None and same_answer(answer, gold))


@lru_cache(maxsize=1 << 16)
def vote_key(answer: str) -> str:
    """What an answer votes as: equal numbers share a key, other answers vote by their text without spaces."""
    number = plain_number(answer)
    return str(number) if number is not None else "".join(answer.split())


def load_reward(spec: str) -> RewardFn:
    """``math``, ``package.module:function`` or ``path/file.py:function``. Raises FastpoError if it cannot be had."""
    if spec == "math":
        return math_reward
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise FastpoError(
            f"reward is {spec!r}; it should be 'math', 'package.module:function' or 'file.py:function'"
            + suggestion(spec, ("math",))
        )
    module = _load_module(source)
    function = getattr(module, name, None)
    if function is None:
        names = [n for n, value in vars(module).items() if callable(value)]
        raise FastpoError(f"reward: {source} has no {name!r}{suggestion(name, names)}")
    if not callable(function):
        raise FastpoError(f"reward: {spec} is a {type(function).__name__}, it should be a function")
    _check_signature(function, spec)
    return function


def _load_module(source: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        if not Path(source).is_file():
            raise FastpoError(f"reward: file {source} not found")
        module_spec = importlib.util.spec_from_file_location(f"fastpo_reward_{Path(source).stem}", source)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module
        module_spec.loader.exec_module(module)
        return module
    except FastpoError:
        raise
    except Exception as error:
        raise FastpoError(
            f"reward: {source} cannot be imported ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _check_signature(function: Callable[..., Any], spec: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-ins have none
        return
    try:
        signature.bind("prompt", "response", {})
    except TypeError as error:
        raise FastpoError(f"reward: {spec}{signature} should take (prompt, response, row): {error}") from error


@dataclass
class Scorer:
    """A reward with its failures handled: ``stop`` raises a line that names the prompt, ``skip`` gives None."""

    reward: RewardFn
    on_error: str = "stop"
    failures: int = 0
    first_failure: str | None = None

    def __call__(self, prompt_id: str, prompt: str, response: str, row: dict[str, Any]) -> float | None:
        try:
            return _as_number(self.reward(prompt, response, row))
        except Exception as error:
            place = f"prompt {prompt_id}: {type(error).__name__}: {_first_line(error)} ({_where(error)})"
            if self.on_error == "stop":
                raise RunError(
                    f"the reward raised on {place}; samples and the rewards finished so far are kept: mend it and run "
                    "the same command again, or leave such samples out with --on_reward_error skip"
                ) from error
            self.failures += 1
            self.first_failure = self.first_failure or place
            return None


def _as_number(value: Any) -> float | None:
    """A finite number as float; NaN (no opinion) as None."""
    number = float(value)
    if math.isinf(number):
        raise ValueError(f"the reward is {number}, it should be finite")
    return None if math.isnan(number) else number


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0]


def _where(error: BaseException) -> str:
    """File and line of the frame that raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
