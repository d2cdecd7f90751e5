"""The suite "full" beyond the ops: the end-to-end programs, as run.py runs them after its own cases.

Each is a process of its own, and has rows in its own file in results/. A program that fails or overruns its time is
ended and named, and the next one begins. Minutes are estimates for 4 quiet cores, made from the rows of earlier runs;
every way that they time runs once, in turn, and that run is also checked. On the largest trees, where the unshared ways
take minutes, every fourth of TRL's batches and every second unshared row run; their math is checked on the others.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check import ended
from measure import RESULTS, read

NOWHERE = ("--out", os.devnull)


@dataclass(frozen=True)
class Program:
    name: str
    command: tuple[str, ...]  # script of benchmarks/ and its arguments
    rows: str  # file in results/
    column: str  # of that file, which says what a row is of:
    values: tuple[str, ...]  # the last rows of a run have these
    minutes: float
    data: bool = True  # takes --data
    dry: tuple[str, ...] = NOWHERE  # arguments by which it leaves its file alone

    def done(self, where: Mapping[str, Any], folder: Path = RESULTS.parent) -> bool:
        """Whether there are rows of all of it, of this commit on this device."""
        same = ("commit", "device", "threads")
        rows = [row for row in read(folder / self.rows) if all(row[key] == str(where[key]) for key in same)]
        return set(self.values) <= {row[self.column] for row in rows}


TREES = ("tree_workloads.py", "--gemm", "oneDNN", "--seconds", "0", "--vocabulary", "8192", "--workloads")
PROGRAMS = {
    "full": (
        Program("trees A, B, C 2-2-2", (*TREES, "A", "B", "C2"), "trees.csv", "workload", ("A", "B", "C 2-2-2"), 3.3),
        Program(
            "training against TRL on A and B",
            ("tree_training.py", "--gemm", "oneDNN", "--no-unshared", "--steps", "1"),
            "tree_training.csv",
            "workload",
            ("A", "B"),
            1.3,
        ),
        Program(
            "search",
            ("tree_search.py", "--rounds", "1"),
            "tree_search.csv",
            "implementation",
            ("mcts_dpo", "published"),
            0.3,
            data=False,
            dry=("--dry-run",),
        ),
        Program(
            "trees on the host, loss curves",
            ("tree_host.py",),
            "tree_host.csv",
            "figure",
            ("trie", "packing", "metadata", "metadata share", "block efficiency", "loss curve"),
            0.3,
        ),
        Program(
            "trees C 5-3-3-2-2",
            (*TREES, "C5", "--every", "trl=4", "paths=2"),
            "trees.csv",
            "workload",
            ("C 5-3-3-2-2",),
            3.1,
        ),
    )
}


def minutes(chosen: Sequence[Program]) -> float:
    return sum(program.minutes for program in chosen)


def run(program: Program, limit_minutes: float, data: Path | None, dry_run: bool) -> str:
    """Runs a program, its output beside ours; "ok", or how it ended: it may take half as long again as estimated."""
    script, *arguments = program.command
    given = ("--data", str(data)) if data and program.data else ()
    command = [sys.executable, f"benchmarks/{script}", *arguments, *given, *(program.dry if dry_run else ())]
    limit = 60 * min(1.5 * program.minutes, limit_minutes)
    return ended(command, limit, dict(os.environ), None)
