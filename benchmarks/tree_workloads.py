"""Trees against the same work unshared, end to end on the CPU: one DPO + NLL step of a Llama of 50M parameters.

    python benchmarks/tree_workloads.py --data DIR      # model_solutions.jsonl of GSM8K; without it, text is made up
    python benchmarks/tree_workloads.py --quick         # a small model and small trees: does it run?

Workloads: A, GSM8K questions with 16 solutions each, 10 pairs a prompt; B, 15 pairs a prompt behind a few-shot prefix
of 1,024 tokens; C, search trees 2-2-2 and 5-3-3-2-2 with steps of 32-128 tokens. Ways: see tree_steps.py; and the
forward alone of fastpo against FlexAttention. Loss and gradients of all are compared before any time counts.

GEMMs are most of the work and their library is no merit of trees, so the rows that sharing is judged by run every way
on oneDNN (``fastpo.models.onednn_matmul``); rows called "default" run every way on what torch takes by itself.
Peak memory is the rise of the process's resident memory in a way's first run, after freed memory was handed back.

A model of 50M parameters with a vocabulary of 32,000 has a third of them in its LM head, where prompts cost nothing
and sharing saves less; a model of 8B has a fifteenth. ``--vocabulary 8192``, the size of the tokenizer used here, gives
a head of a twelfth, and more layers. Compare ``ceiling``, of tokens, with ``work_ceiling``, of operations.

Rows go to results/trees.csv as each workload ends. Takes some 12 minutes on 4 quiet cores.
"""

import argparse
import csv
import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import tree_steps as ways  # noqa: E402
from measure import machine, peak_memory, percentile  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tree_data import Workload, read_questions, search_workload, solutions_workload  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from fastpo import build_tree  # noqa: E402
from fastpo.models import onednn_matmul  # noqa: E402
from fastpo.scoring import TreeScorer  # noqa: E402
from fastpo.trees import trained_nodes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "trees.csv"


@dataclass(frozen=True)
class Row:
    date: str
    commit: str
    device: str
    threads: int
    versions: str
    vocabulary: int
    layers: int
    workload: str
    data: str
    gemm: str  # oneDNN or default
    mode: str  # step: forward and backward; forward
    implementation: str
    pairs: int
    distinct_tokens: int
    run_tokens: int  # that went through the layers: distinct and replicated, unshared, or padded
    head_tokens: int  # that went through the LM head: distinct predictors, or response tokens
    runs: int
    p20_s: float
    p50_s: float
    p80_s: float
    peak_mib: float
    time_ratio: float  # p50 over fastpo's p50 of the same mode
    ceiling: float  # run_tokens over distinct_tokens
    ceiling_share: float  # time_ratio / ceiling
    work_ceiling: float  # operations of the matrix products over fastpo's: prompts are in the layers, not in the head


@dataclass(frozen=True)
class Way:
    run: Callable[[], object]
    tokens: int
    head_tokens: int


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    console = Console()
    questions, data = read_questions(arguments.data, 12)
    console.print(f"data: {data}; {arguments.threads} threads")
    layers = ways.layers_for(arguments.vocabulary)
    model = ways.build_model(2, 128) if arguments.quick else ways.build_model(layers, vocabulary=arguments.vocabulary)
    add_fused_lm_head(model)
    scorer = TreeScorer(model)
    where = {**machine("cpu"), "vocabulary": arguments.vocabulary, "layers": model.config.num_hidden_layers}
    for workload, gemm, seconds in plan(arguments, questions):
        begin = time.perf_counter()
        with onednn_matmul() if gemm == "oneDNN" else nullcontext():
            source = "random tokens" if workload.name.startswith("C") else data
            rows = measure(scorer, workload, gemm, seconds, arguments, {**where, "data": source})
        append(rows, arguments.out)
        console.print(table(rows), f"{workload.name} ({gemm}) took {time.perf_counter() - begin:.0f} s", "", sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with model_solutions.jsonl")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=int, default=8192, help="most tokens of a forward, padding included")
    parser.add_argument("--trl-budget", type=int, default=ways.TRL_BUDGET, help="the same of TRL, which is fastest so")
    parser.add_argument("--seconds", type=float, default=40, help="of repetitions of each workload, beyond the first")
    names = ["A", "B", "C2", "C2-steps", "C5", "C5-steps"]
    parser.add_argument("--workloads", nargs="+", default=["A", "B", "C2", "C2-steps", "C5"], choices=names)
    parser.add_argument("--vocabulary", type=int, default=ways.VOCABULARY, help="at least 8192")
    parser.add_argument("--gemm", nargs="+", default=["oneDNN", "default"], choices=["oneDNN", "default"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="small model, small trees, rows to no file")
    return parser.parse_args()


def plan(arguments: argparse.Namespace, questions: list) -> list[tuple[Workload, str, float]]:
    """Workloads, GEMM libraries and seconds of repetitions."""
    if arguments.quick:
        arguments.out = Path(os.devnull)
        small = search_workload((2, 2), ways.VOCABULARY, prompt_tokens=32)
        return [(solutions_workload(questions, 1, 4, False), "oneDNN", 0), (small, "default", 0)]
    makers = {
        "A": lambda: solutions_workload(questions, 6, 10, False),
        "B": lambda: solutions_workload(questions, 1, 15, True),
        "C2": lambda: search_workload((2, 2, 2), arguments.vocabulary),
        "C2-steps": lambda: search_workload((2, 2, 2), arguments.vocabulary, steps=True),
        "C5": lambda: search_workload((5, 3, 3, 2, 2), arguments.vocabulary),
        "C5-steps": lambda: search_workload((5, 3, 3, 2, 2), arguments.vocabulary, steps=True),
    }
    made = {name: makers[name]() for name in arguments.workloads}
    seconds = arguments.seconds
    chosen = [(workload, "oneDNN", seconds) for workload in made.values()]
    chosen += [(made[name], "default", seconds / 2) for name in ("A", "C2") if name in made]
    return [row for row in chosen if row[1] in arguments.gemm]


def measure(
    scorer: TreeScorer, workload: Workload, gemm: str, seconds: float, arguments: argparse.Namespace, where: dict
) -> list[Row]:
    budget = arguments.budget
    shared, paths = ways.shared_rows(workload, budget), ways.path_rows(workload, budget)
    batches = ways.trl_batches(workload, arguments.trl_budget)
    distinct = sum(build_tree(*tree).num_nodes for tree in zip(workload.trees, workload.starts, strict=True))
    ours = sum(row.tree.num_nodes for row in shared), sum(ways.predictors(row.tree) for row in shared)
    chains = sum(row.tree.num_nodes for row in paths), sum(ways.predictors(row.tree) for row in paths)
    padded = sum(ways.trl_inputs(workload, batch)["input_ids"].numel() for batch in batches)
    steps = {
        "fastpo": Way(partial(ways.packed_step, scorer, shared, workload, ways.tree_logps), *ours),
        "paths": Way(partial(ways.path_step, scorer, paths, workload), *chains),
        "dense": Way(partial(ways.packed_step, scorer, shared, workload, ways.dense_logps), *ours),
        "trl": Way(partial(ways.trl_step, scorer.model, batches, workload), padded, chains[1]),
    }
    common = {**where, "workload": workload.name, "gemm": gemm, "pairs": len(workload.all_pairs)}
    peaks, first = check_steps(scorer, steps)
    times = first if sum(map(sum, first.values())) > seconds else timed(steps, seconds, scorer)
    rows = rows_of(steps, times, peaks, "step", distinct, common, scorer)
    if gemm != "oneDNN" or "steps" in workload.name or len(shared) > 1:
        return rows
    tree = shared[0].tree
    nodes = trained_nodes(tree)
    with ways.flex(scorer):
        size = tree.num_nodes, ways.predictors(tree)
        forwards = {
            "fastpo": Way(partial(_forward, ways.tree_logps, scorer, tree, nodes), *size),
            "flex": Way(partial(ways.flex_logps, scorer, tree, nodes), *size),
        }
        found = {name: way.run() for name, way in forwards.items()}
        torch.testing.assert_close(found["flex"], found["fastpo"], rtol=1e-4, atol=1e-4)
        peaks = {name: peak(way.run) for name, way in forwards.items()}
        times = timed(forwards, seconds / 4, scorer)
    return rows + rows_of(forwards, times, peaks, "forward", tree.num_nodes, common, scorer)


@torch.no_grad()
def _forward(logps: Callable, *arguments: object) -> torch.Tensor:
    return logps(*arguments)


def check_steps(scorer: TreeScorer, steps: dict[str, Way]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Peak memory and seconds of each way's first run; all must give one loss and one gradient."""
    peaks, times, wanted = {}, {}, None
    for name, way in steps.items():
        scorer.zero_grad(set_to_none=True)
        kept: list = []
        start = time.perf_counter()
        peaks[name] = peak(lambda way=way, kept=kept: kept.append(way.run()))
        times[name] = [time.perf_counter() - start]
        print(f"  {name}: {times[name][0]:.1f} s, {peaks[name]:.0f} MiB", flush=True)
        found = kept[0], torch.cat([p.grad.flatten() for p in scorer.parameters()])
        wanted = wanted or found
        apart = float((found[1] - wanted[1]).norm() / wanted[1].norm())
        if abs(found[0] - wanted[0]) > 1e-5 * abs(wanted[0]) or apart > 1e-4:
            sys.exit(f"{name} computes something else: loss {found[0]} for {wanted[0]}, gradient off by {apart:.1e}")
    return peaks, times


def timed(chosen: dict[str, Way], seconds: float, scorer: TreeScorer) -> dict[str, list[float]]:
    """In turn, at least one round and at most five, until the seconds are up."""
    times: dict[str, list[float]] = {name: [] for name in chosen}
    begin = time.perf_counter()
    while not times["fastpo"] or (len(times["fastpo"]) < 5 and time.perf_counter() - begin < seconds):
        for name, way in chosen.items():
            scorer.zero_grad(set_to_none=True)
            start = time.perf_counter()
            way.run()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(
    chosen: dict[str, Way],
    times: dict[str, list[float]],
    peaks: dict[str, float],
    mode: str,
    distinct: int,
    common: dict,
    scorer: TreeScorer,
) -> list[Row]:
    head = scorer.model.lm_head.weight.numel()
    body = sum(p.numel() for p in scorer.parameters()) - head  # embeddings are tied
    work = {name: body * way.tokens + head * way.head_tokens for name, way in chosen.items()}
    least = percentile(times["fastpo"], 0.5)
    rows = []
    for name, way in chosen.items():
        p20, p50, p80 = (percentile(times[name], share) for share in (0.2, 0.5, 0.8))
        row = Row(
            **common,
            mode=mode,
            implementation=name,
            distinct_tokens=distinct,
            run_tokens=way.tokens,
            head_tokens=way.head_tokens,
            runs=len(times[name]),
            p20_s=round(p20, 4),
            p50_s=round(p50, 4),
            p80_s=round(p80, 4),
            peak_mib=round(peaks[name]),
            time_ratio=round(p50 / least, 3),
            ceiling=round(way.tokens / distinct, 3),
            ceiling_share=round(p50 / least * distinct / way.tokens, 3),
            work_ceiling=round(work[name] / work["fastpo"], 3),
        )
        rows.append(row)
    return rows


def peak(run: Callable[[], object]) -> float:
    """MiB of resident memory that one call adds at its peak; what was freed before is handed back first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return peak_memory(lambda _: run(), None, "cpu")


def append(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def table(rows: list[Row]) -> Table:
    first = rows[0]
    made = Table(title=f"{first.workload}: {first.pairs} pairs, {first.distinct_tokens} distinct tokens, {first.gemm}")
    columns = ("mode", "implementation", "run_tokens", "p50_s", "peak_mib", "time_ratio", "ceiling", "work_ceiling")
    for name in columns:
        made.add_column(name, justify="left" if name in columns[:2] else "right")
    for row in rows:
        made.add_row(*(str(getattr(row, name)) for name in columns))
    return made


if __name__ == "__main__":
    main()
