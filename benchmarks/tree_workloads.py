"""Trees against the same work unshared, end to end on the CPU: one DPO + NLL step of a Llama of 50M parameters.

    python benchmarks/tree_workloads.py --data DIR      # model_solutions.jsonl of GSM8K; without it, text is made up
    python benchmarks/tree_workloads.py --quick         # a small model and small trees: does it run?

Workloads: A, GSM8K questions with 16 solutions each, 10 pairs a prompt; B, 15 pairs a prompt behind a few-shot prefix
of 1,024 tokens; C, search trees with steps of 32-128 tokens: four of 2-2-2, one of 5-3-3-2-2. Ways: see
tree_steps.py; and the forward alone of fastpo against FlexAttention. Loss and gradients of all are compared before any
time counts.

GEMMs are most of the work and their library is no merit of trees, so the rows that sharing is judged by run every way
on oneDNN (``fastpo.models.onednn_matmul``); rows called "default" (``--gemm default``) run every way on what torch
takes by itself. Likewise every way runs in a process that keeps freed memory (``fastpo.memory``), as ``fastpo train``
does. Each way first runs its largest micro-batch, untimed: peak memory is the rise of the process's resident memory in
that run, after freed memory was handed back. Then all take turns: one step each, checked against each other, and in
``--seconds`` more of those that take no longer than that.

A model of 50M parameters with a vocabulary of 32,000 has a third of them in its LM head, where prompts cost nothing
and sharing saves less; a model of 8B has a fifteenth. ``--vocabulary 8192``, the size of the tokenizer used here, gives
a head of a twelfth, and more layers. Compare ``ceiling``, of tokens, with ``work_ceiling``, of operations: those of the
matrix products and of the attention.

Rows go to results/trees.csv as each workload ends. Takes some 8 minutes on 4 quiet cores, of which TRL's step on the
largest trees takes more than two: ``--every trl=4 paths=2`` runs every fourth of its batches, and half of the unshared
way's, in rows "trl, sampled" and "paths, sampled" whose time is that of all by their tokens. One round of all but that
workload, ``--workloads A B C2 --seconds 0``, takes some 3 minutes.
"""

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import tree_steps as ways  # noqa: E402
from measure import Measured, append, machine, peak_memory, percentile  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tree_data import Workload, read_questions, search_workload, solutions_workload  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from fastpo import TokenTree, build_tree  # noqa: E402
from fastpo.memory import keep_freed_memory  # noqa: E402
from fastpo.models import onednn_matmul  # noqa: E402
from fastpo.scoring import TreeScorer  # noqa: E402
from fastpo.trees import trained_nodes  # noqa: E402

WAYS = ("fastpo", "paths", "dense", "trl")
RESULTS = ROOT / "benchmarks" / "results" / "trees.csv"


@dataclass(frozen=True)
class Row(Measured):
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
    work_ceiling: float  # operations over fastpo's: prompts are in the layers, not in the head


@dataclass(frozen=True)
class Way:
    run: Callable[[], object]  # a step
    warm: Callable[[], object]  # its largest micro-batch
    tokens: int
    head_tokens: int
    scores: int  # pairs of a token and one that it attends to
    share: float = 1.0  # of the step's tokens that ``run`` runs


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
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
    parser.add_argument("--seconds", type=float, default=16, help="of rounds of each workload, beyond the first")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="fastpo always runs")
    every = "of trl or paths: run every N-th micro-batch alone"
    parser.add_argument("--every", nargs="+", type=sampling, default=[], metavar="WAY=N", help=every)
    names = ["A", "B", "C2", "C2-steps", "C5", "C5-steps"]
    parser.add_argument("--workloads", nargs="+", default=["A", "B", "C2", "C5"], choices=names)
    parser.add_argument("--vocabulary", type=int, default=ways.VOCABULARY, help="at least 8192")
    parser.add_argument("--gemm", nargs="+", default=["oneDNN"], choices=["oneDNN", "default"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="small model, small trees, rows to no file")
    return parser.parse_args()


def sampling(text: str) -> tuple[str, int]:
    """("trl", 4) of "trl=4"."""
    name, _, number = text.partition("=")
    if name not in ("trl", "paths") or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be trl=N or paths=N")
    return name, int(number)


def plan(arguments: argparse.Namespace, questions: list) -> list[tuple[Workload, str, float]]:
    """Workloads, GEMM libraries and seconds of repetitions."""
    if arguments.quick:
        arguments.out = Path(os.devnull)
        small = search_workload((2, 2), ways.VOCABULARY, prompt_tokens=32)
        return [(solutions_workload(questions, 1, 4, False), "oneDNN", 0), (small, "default", 0)]
    makers = {
        "A": lambda: solutions_workload(questions, 6, 10, False),
        "B": lambda: solutions_workload(questions, 1, 15, True),
        "C2": lambda: search_workload((2, 2, 2), arguments.vocabulary, number=4),
        "C2-steps": lambda: search_workload((2, 2, 2), arguments.vocabulary, number=4, steps=True),
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
    ours, chains = sizes(row.tree for row in shared), sizes(row.tree for row in paths)
    padded = [ways.trl_inputs(workload, batch)["input_ids"].shape for batch in batches]
    sizes_of = {"trl": [n * width for n, width in padded], "paths": [row.tree.num_nodes for row in paths]}

    def way(step: Callable, rows: list, size: tuple[int, int, int], largest: int) -> Way:
        return Way(partial(step, rows), partial(step, rows[largest : largest + 1]), *size)

    def packed(logps: Callable) -> Callable:
        return lambda rows: ways.packed_step(scorer, rows, workload, logps)

    trl_size = (sum(sizes_of["trl"]), chains[1], sum(n * width * (width + 1) // 2 for n, width in padded))
    most = largest_of(row.tree.num_nodes for row in shared)
    alone = {
        "paths": lambda rows: ways.path_step(scorer, rows, workload),
        "trl": lambda rows: ways.trl_step(scorer.model, rows, workload),
    }
    steps = {
        "fastpo": way(packed(ways.tree_logps), shared, ours, most),
        "paths": way(alone["paths"], paths, chains, 0),
        "dense": way(packed(ways.dense_logps), shared, ours, most),
        "trl": way(alone["trl"], batches, trl_size, largest_of(sizes_of["trl"])),
    }
    steps = {name: way for name, way in steps.items() if name in ("fastpo", *arguments.ways)}
    for name, every in arguments.every:
        if name in steps and every > 1:
            run = partial(alone[name], {"paths": paths, "trl": batches}[name][::every])
            share = sum(sizes_of[name][::every]) / sum(sizes_of[name])
            steps[f"{name}, sampled"] = replace(steps.pop(name), run=run, share=share)
    common = {**where, "workload": workload.name, "gemm": gemm, "pairs": len(workload.all_pairs)}
    peaks = warmed(steps, scorer)
    times = timed(steps, seconds, scorer, checked=True)
    rows = rows_of(steps, times, peaks, "step", distinct, common, scorer)
    if gemm != "oneDNN" or "steps" in workload.name or len(shared) > 1:
        return rows
    tree = shared[0].tree
    nodes = trained_nodes(tree)
    with ways.flex(scorer):
        runs = {
            "fastpo": partial(_forward, ways.tree_logps, scorer, tree, nodes),
            "flex": partial(ways.flex_logps, scorer, tree, nodes),
        }
        forwards = {name: Way(run, run, *sizes([tree])) for name, run in runs.items()}
        found = {name: way.run() for name, way in forwards.items()}
        torch.testing.assert_close(found["flex"], found["fastpo"], rtol=1e-4, atol=1e-4)
        peaks = warmed(forwards, scorer)
        times = timed(forwards, seconds / 4, scorer)
    return rows + rows_of(forwards, times, peaks, "forward", tree.num_nodes, common, scorer)


@torch.no_grad()
def _forward(logps: Callable, *arguments: object) -> torch.Tensor:
    return logps(*arguments)


def sizes(trees: Iterable[TokenTree]) -> tuple[int, int, int]:
    """Tokens, predictors of the LM head, and pairs that attention sees."""
    found = [(tree.num_nodes, ways.predictors(tree), int((tree.depth + 1).sum())) for tree in trees]
    tokens, predictors, scores = map(sum, zip(*found, strict=True))
    return tokens, predictors, scores


def largest_of(sizes: Iterable[int]) -> int:
    numbers = list(sizes)
    return numbers.index(max(numbers))


def warmed(chosen: dict[str, Way], scorer: TreeScorer) -> dict[str, float]:
    """MiB at the peak of each way's largest micro-batch, which also warms it up."""
    peaks = {}
    for name, way in chosen.items():
        scorer.zero_grad(set_to_none=True)
        peaks[name] = peak(way.warm)
    return peaks


def timed(chosen: dict[str, Way], seconds: float, scorer: TreeScorer, checked: bool = False) -> dict[str, list[float]]:
    """A step of each, ``checked`` where it is whole: one loss, one gradient; then more in turn, of those that take at
    most ``seconds``.

    At most five each, until the seconds are up.
    """
    times: dict[str, list[float]] = {name: [] for name in chosen}
    wanted = None
    for name, way in chosen.items():
        loss = _clocked(way, times[name], scorer)
        if checked:
            print(f"  {name}: {times[name][0]:.2f} s", flush=True)
        if checked and way.share == 1:
            wanted = _compared(name, loss, scorer, wanted)
    again = {name: way for name, way in chosen.items() if times[name][0] <= seconds}
    begin = time.perf_counter()
    while again and len(times[next(iter(again))]) < 5 and time.perf_counter() - begin < seconds:
        for name, way in again.items():
            _clocked(way, times[name], scorer)
    return times


def _clocked(way: Way, times: list[float], scorer: TreeScorer) -> object:
    scorer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = way.run()
    times.append((time.perf_counter() - start) / way.share)
    return loss


def _compared(
    name: str, loss: object, scorer: TreeScorer, wanted: tuple[float, torch.Tensor] | None
) -> tuple[float, torch.Tensor]:
    """``wanted``, or else what ``name`` has found: a loss and the gradient of all parameters."""
    found = float(loss), torch.cat([p.grad.flatten() for p in scorer.parameters()])
    if wanted is None:
        return found
    apart = float((found[1] - wanted[1]).norm() / wanted[1].norm())
    if abs(found[0] - wanted[0]) > 1e-5 * abs(wanted[0]) or apart > 1e-4:
        sys.exit(f"{name} computes something else: loss {found[0]} for {wanted[0]}, gradient off by {apart:.1e}")
    return wanted


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
    passes = 3 if mode == "step" else 1  # of a product: 2 operations a parameter and token, twice that backward
    config = scorer.model.config
    of_score = (14 if mode == "step" else 4) * config.hidden_size * config.num_hidden_layers
    work = {
        name: 2 * passes * (body * way.tokens + head * way.head_tokens) + of_score * way.scores
        for name, way in chosen.items()
    }
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
