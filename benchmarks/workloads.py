"""Tables of the end-to-end programs, which keep rows of their own in results/: tree_workloads.py, tree_training.py."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from measure import RESULTS, read

Row = dict[str, str]
NAMES = {
    "paths": "packed, unshared",
    "dense": "shared, dense mask",
    "trl": "TRL, padded",
    "paths, sampled": "packed, unshared: some rows, by their tokens",
    "trl, sampled": "TRL, padded: some batches, by their tokens",
    "flex": "FlexAttention",
    "unshared": "packed, unshared",
}


@dataclass(frozen=True)
class Program:
    file: str  # in results/
    title: str
    keys: tuple[str, ...]  # columns that tell its measurements apart
    seconds: str  # column
    sizes: Callable[[Row], str]  # of fastpo's row


PROGRAMS = (
    Program(
        "trees.csv",
        "A step (forward and backward), or a forward, of a Llama of 50M parameters, `benchmarks/tree_workloads.py`,",
        ("workload", "mode", "gemm", "vocabulary"),
        "p50_s",
        lambda row: f"{row['pairs']} pairs, {row['distinct_tokens']} distinct tokens",
    ),
    Program(
        "tree_training.csv",
        "A training step of the loop, `benchmarks/tree_training.py`,",
        ("workload", "gemm"),
        "step_s",
        lambda row: f"{row['pairs']} pairs",
    ),
)


def latest(rows: Iterable[Row], program: Program) -> list[dict[str, Row]]:
    """The last run of each measurement: implementation -> row, fastpo's first."""
    runs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in program.keys)
        if row["implementation"] == "fastpo":
            runs[key] = {}
        if key in runs:
            runs[key][row["implementation"]] = row
    return list(runs.values())


def table(rows: list[Row], program: Program) -> str:
    """A line per measurement: seconds of fastpo, and of every other way with how much longer that is."""
    runs = latest(rows, program)
    others = list(dict.fromkeys(name for run in runs for name in run if name != "fastpo"))
    where = f"{rows[-1]['device']}, {rows[-1]['threads']} threads"
    lines = [
        f"{program.title} on {where}; seconds, and how many times fastpo's.\n",
        "| | " + " | ".join(("fastpo", *(NAMES.get(name, name) for name in others))) + " |",
        "|---|" + "---|" * (1 + len(others)),
    ]
    for run in runs:
        ours = run["fastpo"]
        names = {name: ours[name] for name in program.keys if ours[name] != "default"}
        label = ", ".join(f"V={value}" if name == "vocabulary" else value for name, value in names.items())
        cells = (_cell(run.get(name), ours, program.seconds) for name in others)
        lines.append(f"| {label}: {program.sizes(ours)} | {float(ours[program.seconds]):.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None, ours: Row, seconds: str) -> str:
    return f"{float(row[seconds]):.3g} ({float(row[seconds]) / float(ours[seconds]):.2g}x)" if row else ""


def tables(folder: Path = RESULTS.parent) -> str:
    """The tables of all programs that have rows."""
    found = ((read(folder / program.file), program) for program in PROGRAMS)
    return "".join(f"{table(rows, program)}\n\n" for rows, program in found if rows)
