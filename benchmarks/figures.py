"""Figures of the rows in results/: functions of ``Rows`` that give a number, or None where nothing was measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import workloads
from measure import RESULTS, read
from tables import Result, Row, latest

SMALL = 8192  # vocabulary of the trees in the full suite, whose head is a twelfth of the model
# Files of results/ that are kept row by row, in the order of the last fields of Rows.
OTHERS = ("tree_host", "tree_search", "embedded_task", "embedded_search", "facts")


@dataclass(frozen=True)
class Found:
    value: float
    of: int = 1  # how many measurements it is the worst, or the mean, of


@dataclass(frozen=True)
class Rows:
    """The last measurements of everything."""

    ops: list[Result]
    gpu: list[Result]
    trees: list[dict[str, Row]]  # of tree_workloads.py: implementation -> row
    training: list[dict[str, Row]]  # of tree_training.py, likewise
    host: list[Row] = field(default_factory=list)
    search: list[Row] = field(default_factory=list)
    task: list[Row] = field(default_factory=list)  # the embedded task's models
    task_search: list[Row] = field(default_factory=list)
    facts: list[Row] = field(default_factory=list)

    def fact(self, program: str, figure: str) -> Found | None:
        """Of the last run of a program that has no table of its own."""
        of_it = [row for row in self.facts if (row["program"], row["figure"]) == (program, figure)]
        return Found(float(of_it[-1]["value"])) if of_it else None

    @staticmethod
    def of(folder: Path = RESULTS.parent) -> "Rows":
        results, (trees, training) = read(folder / RESULTS.name), workloads.PROGRAMS
        return Rows(
            latest(results, gpu=False),
            latest(results, gpu=True),
            workloads.latest(read(folder / trees.file), trees),
            workloads.latest(read(folder / training.file), training),
            *(read(folder / f"{name}.csv") for name in OTHERS),
        )


def worst(values: Iterable[float], most: bool = False) -> Found | None:
    """The least of them, or the largest."""
    found = list(values)
    return Found((max if most else min)(found), len(found)) if found else None


def p50(row: Row) -> float:
    return float(row["p50_ms"])


def points(results: Sequence[Result], op: str, case: str, **columns: str) -> list[Result]:
    """Those of an op whose case is this one, and whose other columns begin so."""
    of_case = (r for r in results if (r.fastpo["op"], r.fastpo["case"]) == (op, case))
    return [r for r in of_case if all(r.fastpo[name].startswith(value) for name, value in columns.items())]


def against(op: str, case: str, peer: str, rows: Rows, gpu: bool = False, **columns: str) -> Found | None:
    """How much longer the peers of that name take, at least; any peer for ""."""
    ratios = []
    for result in points(rows.gpu if gpu else rows.ops, op, case, **columns):
        times = [p50(row) for row in result.peers if row["implementation"].startswith(peer)]
        ratios += [min(times) / p50(result.fastpo)] if times else []
    return worst(ratios)


def share(op: str, case: str, rows: Rows, gpu: bool = False, **columns: str) -> Found | None:
    """Of the floor, in percent."""
    found = points(rows.gpu if gpu else rows.ops, op, case, **columns)
    return worst(100 * float(r.fastpo["floor_share"]) for r in found if r.fastpo["floor_share"])


def tflops(case: str, rows: Rows, backward: bool = False) -> Found | None:
    """Of tree attention on a GPU: two products a visible pair forward, five backward (whose time is a difference)."""
    forward, both = (points(rows.gpu, "tree_attention", case, mode=mode) for mode in ("forward", "forward_backward"))
    forward = [result for result in forward if result.fastpo["mode"] == "forward"]
    if not forward or (backward and not both):
        return None
    work, time = (float(forward[0].fastpo[name]) for name in ("rate", "p50_ms"))
    if not backward:
        return Found(work / 1e3)
    return Found(work * time * 2.5 / (p50(both[0].fastpo) - time) / 1e3)


def gib_over(case: str, rows: Rows) -> Found | None:
    """GiB of a fused head on a GPU beyond its gradients."""
    return worst((extra_mib(r, 2) / 1024 for r in points(rows.gpu, "linear_preference_loss", case)), most=True)


def narrow(mode: str, rows: Rows) -> Found | None:
    """Time in bf16 over time in fp32."""
    name = f"llama3 {mode}"
    both = [points(rows.ops, "token_logprobs", name, dtype=dtype) for dtype in ("bfloat16", "float32")]
    return worst(p50(a.fastpo) / p50(b.fastpo) for a, b in zip(*both, strict=False))


def extra_mib(result: Result, itemsize: int = 4) -> float:
    """Memory of a fused head beyond its gradients, at the peak."""
    sizes = sizes_of(result)
    written = sizes["tokens"] + (sizes["vocab"] if result.fastpo["mode"] == "trained head" else 0)
    return float(result.fastpo["peak_mib"]) - written * sizes["hidden"] * itemsize / 2**20


def sizes_of(result: Result) -> dict[str, int]:
    return {name: int(value) for name, value in (part.split("=") for part in result.fastpo["shape"].split())}


def heads(case: str, rows: Rows) -> list[Result]:
    """The points of the grid; what else has the case's name is of other sizes."""
    return points(rows.ops, "linear_preference_loss", case)


def over_budget(rows: Rows) -> Found | None:
    found = heads("cpu trained head, alone", rows) + heads("cpu frozen head, alone", rows)
    return worst((extra_mib(r) - sizes_of(r)["budget"] for r in found if r.fastpo["peak_mib"]), most=True)


def of_eager(rows: Rows) -> Found | None:
    """Extra memory of the trained head over eager's on all rows, in percent, at the large vocabulary."""
    eager = {
        sizes_of(r)["tokens"]: float(row["peak_mib"])
        for r in heads("cpu trained head", rows)
        if sizes_of(r)["masked"] == 0 and sizes_of(r)["vocab"] == 128256 and (row := r.of("torch eager"))
    }
    found = heads("cpu trained head, alone", rows) + heads("cpu frozen head, alone", rows)
    large = [r for r in found if sizes_of(r)["vocab"] == 128256 and sizes_of(r)["tokens"] in eager]
    return worst((100 * extra_mib(r) / eager[sizes_of(r)["tokens"]] for r in large), most=True)


def steps(way: str, rows: Rows, *names: str, vocabulary: int = SMALL) -> list[Row]:
    """The rows of a way, sampled or whole, on the workloads of those names, any for none.

    Of the larger vocabulary where it was not measured with the small one.
    """
    found: dict[str, Row] = {}
    for run in sorted(rows.trees, key=lambda run: int(run["fastpo"]["vocabulary"]), reverse=True):
        ours = run["fastpo"]
        wanted = (ours["mode"], ours["gemm"]) == ("step", "oneDNN") and int(ours["vocabulary"]) >= vocabulary
        for name in run:
            if wanted and name.startswith(way):
                found[ours["workload"]] = run[name]
    return [row for name, row in found.items() if not names or name in names]


def of_ceiling(name: str, rows: Rows, vocabulary: int = SMALL) -> Found | None:
    """Of the unshared way's tokens over the distinct ones, in percent."""
    return worst(100 * float(row["ceiling_share"]) for row in steps("paths", rows, name, vocabulary=vocabulary))


def slower(way: str, rows: Rows, *names: str) -> Found | None:
    return worst(float(row["time_ratio"]) for row in steps(way, rows, *names))


def trained(name: str, rows: Rows) -> Found | None:
    """TRL's time of a training step over fastpo's, oneDNN for both."""
    found = [run for run in rows.training if (run["fastpo"]["workload"], run["fastpo"]["gemm"]) == (name, "oneDNN")]
    return worst(float(run["trl"]["step_s"]) / float(run["fastpo"]["step_s"]) for run in found if "trl" in run)


def apart(rows: Rows) -> Found | None:
    """Difference of the last losses of TRL's trainer and of the loop."""
    found = [run for run in rows.training if "trl" in run]
    return worst((abs(float(r["trl"]["last_loss"]) - float(r["fastpo"]["last_loss"])) for r in found), most=True)


def host(figure: str, most: bool, rows: Rows) -> Found | None:
    last = {row["case"]: row for row in rows.host if row["figure"] == figure}
    commit = next((row["commit"] for row in reversed(rows.host) if row["figure"] == figure), None)
    return worst((float(row["p50"]) for row in last.values() if row["commit"] == commit), most=most)


def searched(column: str, implementation: str, rows: Rows, factor: float = 1.0) -> Found | None:
    of_name = (row for row in rows.search if row["case"].startswith("search") and row[column])
    found = [row for row in of_name if row["implementation"] == implementation]
    return Found(factor * float(found[-1][column])) if found else None


def wave(rows: Rows) -> Found | None:
    last = {row["implementation"]: p50(row) for row in rows.search if row["case"].startswith("select")}
    return worst(last.values(), most=True)


def accuracy(rows: Sequence[Row], arm: str) -> dict[str, list[float]]:
    """Seed -> percent at the start and after each iteration."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault(row["seed"], []).append(100 * float(row["accuracy"]))
    return found


def mean(values: Iterable[float]) -> Found | None:
    found = list(values)
    return Found(sum(found) / len(found), len(found)) if found else None


def fall(rows: Rows) -> Found | None:
    """The largest from one iteration to the next, of any seed."""
    runs = accuracy(rows.task, "irpo").values()
    return worst((a - b for run in runs for a, b in pairwise(run)), most=True)


def seeds_won(rows: Rows) -> Found | None:
    ours, theirs = (accuracy(rows.task_search, arm) for arm in ("mcts_dpo", "irpo"))
    both = [seed for seed in ours if seed in theirs]
    return Found(sum(ours[seed][-1] > theirs[seed][-1] for seed in both)) if both else None


def irpo(find: Callable[[list[float]], float]) -> Callable[[Rows], Found | None]:
    return lambda rows: mean(find(run) for run in accuracy(rows.task, "irpo").values())


def supervised(rows: Rows) -> Found | None:
    ours, theirs = (mean(run[-1] for run in accuracy(rows.task, arm).values()) for arm in ("irpo", "more_sft"))
    return Found(ours.value - theirs.value, ours.of) if ours and theirs else None
