"""GSM8K's published files to fastpo's.

reads:  --input, one of two kinds, told apart by their keys
        {"question", "answer"}: problems (train.jsonl, test.jsonl)
        {"question", "ground_truth", "<model>": {"is_correct", "solution"}, ...}: example_model_solutions.jsonl
writes: --out
        of problems: {"id", "prompt", "answer"}, for --warm_start, --data and --eval_data
        of solutions: {"id", "prompt", "chosen", "rejected"}, for --preferences: every right x wrong one, cyclically

Answers end in "A: N" in both, as the model solutions do ("####" becomes "A:"). Calculator annotations such as
<<48/2=24>> are dropped: no calculator reads them here. --holdout puts the last share of the problems in a second file,
OUT.heldout.jsonl, for --eval_preferences or --eval_data.

examples:
  fastpo convert gsm8k --input train.jsonl --out demonstrations.jsonl
  fastpo convert gsm8k --input example_model_solutions.jsonl --out preferences.jsonl --holdout 0.1
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpo.artifacts import read_jsonl, write_jsonl
from fastpo.errors import FastpoError
from fastpo.pair_rules import zip_cyclic

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_HASHES = re.compile(r"^####\s*", re.MULTILINE)


@dataclass(frozen=True)
class Conversion:
    kind: str  # "demonstrations" or "preferences"
    problems: int
    rows: int
    held_out: int
    paths: tuple[Path, ...]


def convert_gsm8k(
    source: str | Path, target: str | Path, *, keep_calculator: bool = False, holdout: float = 0.0, limit: int = 16
) -> Conversion:
    """Writes ``target`` (and, with ``holdout`` > 0, ``target`` with ``.heldout`` before its ending).

    ``limit``: at most so many pairs per problem. Held-out problems are the last ones: no problem stands in both files.
    """
    if not 0 <= holdout < 1:
        raise FastpoError(f"holdout is {holdout}; it should be a share in [0, 1)")
    problems = read_jsonl(source)
    if not problems:
        raise FastpoError(f"{source} is empty")
    kind = _kind(problems[0], source)
    make = _demonstration if kind == "demonstrations" else _preferences
    groups = [make(row, number, keep_calculator, limit) for number, row in enumerate(problems, start=1)]
    groups = [group for group in groups if group]
    cut = len(groups) - round(holdout * len(groups))
    target = Path(target)
    paths, parts = [target], [groups[:cut]]
    if holdout:
        paths.append(target.with_suffix(f".heldout{target.suffix}"))
        parts.append(groups[cut:])
    counts = []
    for path, part in zip(paths, parts, strict=True):
        rows = [row for group in part for row in group]
        write_jsonl(path, rows)
        counts.append(len(rows))
    return Conversion(kind, len(groups), sum(counts), counts[1] if holdout else 0, tuple(paths))


def _kind(row: dict[str, Any], source: str | Path) -> str:
    if "ground_truth" in row:
        return "preferences"
    if "question" in row and "answer" in row:
        return "demonstrations"
    raise FastpoError(
        f"{source}: rows have the keys {', '.join(row)}; they should be GSM8K's problems (question, answer) "
        "or model solutions (question, ground_truth, ...)"
    )


def _demonstration(row: dict[str, Any], number: int, keep_calculator: bool, limit: int) -> list[dict[str, Any]]:
    return [{"id": str(number), "prompt": row["question"], "answer": _clean(row["answer"], keep_calculator)}]


def _preferences(row: dict[str, Any], number: int, keep_calculator: bool, limit: int) -> list[dict[str, Any]]:
    solutions = [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
    right = _distinct([s["solution"] for s in solutions if s["is_correct"]], keep_calculator)
    wrong = _distinct([s["solution"] for s in solutions if not s["is_correct"]], keep_calculator)
    return [
        {"id": f"{number}-{n}", "prompt": row["question"], "chosen": right[i], "rejected": wrong[j]}
        for n, (i, j) in enumerate(zip_cyclic(range(len(right)), range(len(wrong)), limit))
    ]


def _distinct(solutions: Sequence[str], keep_calculator: bool) -> list[str]:
    return list(dict.fromkeys(_clean(text, keep_calculator) for text in solutions))


def _clean(text: str, keep_calculator: bool) -> str:
    text = text if keep_calculator else _CALCULATOR.sub("", text)
    return _HASHES.sub("A: ", text).strip()
