"""Times every op and workload against its peers: ``python benchmarks/run.py [--suite quick|full|gpu] [--ops NAME]``.

Each ``kernels/<op>/bench.py``, and each module of benchmarks/ that defines cases, offers implementations: fastpo, torch
eager, torch.compile, and the peers that are installed (``pip install .[peers]``). All implementations of a case are
checked to compute the same thing, then run in turn in one process, torch being as it is installed. In cases "oneDNN"
and without peers all have fastpo's conditions: oneDNN's products, and freed memory kept (``fastpo.memory``). Rows are
appended, case by case, to ``benchmarks/results/results.csv``; ``--skip-done`` goes on where a stopped run left off.

``--suite full`` is all that is time or memory, in 20 minutes on 4 cores: short cases of every op; the fused heads' grid
of 28 points, every product on oneDNN, where each implementation is called once, timed and checked in that call; then
the end-to-end programs of ``suite.py`` (trees, training against TRL, search), whose rows have files of their own beside
``results.csv``. Accuracy is not time: embedded_task.py, embedded_search.py, kill_resume.py and recipe_runs.py stay
commands of their own, in ``make bench-all``.

``--base REV`` times this checkout against another commit instead, built in a worktree of its own.
"""

import argparse
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# Threads that spin while others' code runs make every implementation slower; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import suite  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from base import compare  # noqa: E402
from discovery import benches, identity, refresher, work  # noqa: E402
from measure import RESULTS, Row, append, machine, measured, percentile, read  # noqa: E402
from verify import brief, gate_all, timed_once  # noqa: E402

from fastpo.memory import default_freed_memory, keep_freed_memory  # noqa: E402

MINUTES = {"quick": 12.0, "full": 19.8, "gpu": 4.0, "grid": 35.0}
SECONDS = {"full": 0.4}
DEAR = 5e10  # operations; seconds of all implementations together on a CPU
# Of a case with all peers, called once each where it is dear: what it takes on 4 cores, and more by the operation.
CASE_S, OPERATION_S = 3.0, 1.5e-11


def chosen(runs: dict[str, Any], peers: list[str] | None) -> dict[str, Any]:
    """fastpo and its variants, and of the others those whose names begin with one of ``peers``; all for None."""
    if peers is None:
        return runs
    prefixes = ("fastpo", *(peer for peer in peers if peer != "none"))
    return {name: run for name, run in runs.items() if name.startswith(prefixes)}


def run_case(op: str, bench: Any, case: Any, arguments: argparse.Namespace, where: dict[str, Any]) -> list[Row]:
    """The rows of one case; peers that fail or compute something else are named and left out."""
    device, runs = arguments.device, chosen(bench.implementations(case), arguments.peers)
    set_memory(case, arguments)
    inputs = bench.setup(case, device)
    bound, bound_work = bench.ceiling(case) if hasattr(bench, "ceiling") else (None, 0)
    ceiling = {} if bound is None else {"ceiling": bound}
    if once(bench, case, arguments):
        times, peaks, failed = timed_once(bench, case, inputs, {**runs, **ceiling}, device)
    else:
        failed = gate_all(bench, case, inputs, runs)
        timed = {name: run for name, run in {**runs, **ceiling}.items() if name not in failed}
        refresh = refresher(bench, case)
        times, peaks = measured(timed, inputs, device, arguments.seconds, refresh, arguments.rounds)
    for name, reason in failed.items():
        print(f"  {case.name}: {name} is not timed: {reason}", file=sys.stderr)
        del runs[name]
    amount, unit, scale = work(bench, case)
    floor = math.nan if bound is None else amount / bound_work * percentile(times["ceiling"], 0.5)  # seconds
    ours = percentile(times["fastpo"], 0.5)
    rows = []
    for name in runs:
        p20, p50, p80 = (percentile(times[name], share) for share in (0.2, 0.5, 0.8))
        peak = peaks[name]
        rows.append(
            Row(
                **where,
                **named(op, case, arguments),
                implementation=name,
                p20_ms=round(p20 * 1e3, 4),
                p50_ms=round(p50 * 1e3, 4),
                p80_ms=round(p80 * 1e3, 4),
                peak_mib=None if peak is None else round(peak, 1),
                rate=round(amount / p50 / scale, 1) if amount else None,
                unit=unit,
                floor_share=None if math.isnan(floor) else round(floor / p50, 3),
                speedup=round(p50 / ours, 2),
            )
        )
    return rows


def set_memory(case: Any, arguments: argparse.Namespace) -> None:
    """Freed memory as any process has it; kept, as fastpo's command line does, where all have fastpo's products too."""
    like_for_like = getattr(case, "onednn", False) or arguments.peers == ["none"]
    if arguments.device == "cpu":
        keep_freed_memory() if like_for_like else default_freed_memory()


def once(bench: Any, case: Any, arguments: argparse.Namespace) -> bool:
    """Whether each implementation is called once, that call being timed, checked and watched for memory."""
    dear = arguments.suite == "full" and arguments.rounds is None and work(bench, case)[0] > DEAR
    return (arguments.rounds == 1 or dear) and not hasattr(bench, "refresh")


def print_rows(rows: list[Row]) -> None:
    unit = rows[0].unit or "rate"
    print(f"  {'':36s} {'p50 ms':>10s} {'p20-p80':>21s} {'peak MiB':>9s} {unit:>9s} {'floor':>6s}  fastpo")
    for row in rows:
        spread, peak = f"{row.p20_ms:.3f}-{row.p80_ms:.3f}", "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        rate = "-" if row.rate is None else f"{row.rate:.1f}"
        share = "-" if row.floor_share is None else f"{row.floor_share:.0%}"
        faster = "" if row.implementation == "fastpo" else f"{row.speedup:.2f}x"
        cells = f"{row.p50_ms:10.3f} {spread:>21s} {peak:>9s} {rate:>9s} {share:>6s}  {faster}"
        print(f"  {row.implementation:36s} {cells}".rstrip(), flush=True)


CASE = ("op", "case", "mode", "dtype", "shape")


def rows_here(where: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of this commit on this device."""
    return [row for row in read() if all(row[key] == str(where[key]) for key in ("commit", "device", "threads"))]


def done_cases(where: dict[str, Any]) -> set[tuple[str, ...]]:
    """Cases with a row of this commit on this device."""
    return {tuple(row[key] for key in CASE) for row in rows_here(where)}


def print_summaries(rows: list[dict[str, str]], arguments: argparse.Namespace) -> None:
    """What the suite's rows come to, of each op that can say it."""
    for op, bench in benches(arguments.ops).items():
        wanted = {tuple(named(op, case, arguments).values()) for case in bench.cases(arguments.suite, arguments.device)}
        found = [row for row in rows if tuple(row[key] for key in CASE) in wanted]
        if found and hasattr(bench, "summary"):
            print(f"\n{op}, {arguments.suite}:", *bench.summary(found), sep="\n  ")


def wanted(arguments: argparse.Namespace, where: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(op, module, case) to be timed: the first case of every op, the second of every op, ..., dear ones last."""
    done = done_cases(where) if arguments.skip_done else set()
    by_op = [
        [(op, bench, case) for case in bench.cases(arguments.suite, arguments.device)]
        for op, bench in benches(arguments.ops).items()
    ]
    in_turn = [found for turn in itertools.zip_longest(*by_op) for found in turn if found]
    in_turn.sort(key=lambda found: work(found[1], found[2])[0] > DEAR)
    return [
        (op, bench, case)
        for op, bench, case in in_turn
        if tuple(named(op, case, arguments).values()) not in done
        and all(part in label(op, case) for part in arguments.cases)
    ]


def wanted_programs(arguments: argparse.Namespace, where: dict[str, Any]) -> list[suite.Program]:
    """The suite's end-to-end programs; none where only some ops or cases are asked for, or on a GPU."""
    if arguments.ops or arguments.cases or arguments.peers is not None or arguments.device != "cpu":
        return []
    return [p for p in suite.PROGRAMS.get(arguments.suite, ()) if not (arguments.skip_done and p.done(where))]


def minutes_of(cases: Sequence[tuple[str, Any, Any]]) -> float:
    """An estimate for 4 cores."""
    work_of = (work(bench, case) for _, bench, case in cases)
    return sum(CASE_S + OPERATION_S * (amount if unit == "GFLOP/s" else 0) for amount, unit, _ in work_of) / 60


def named(op: str, case: Any, arguments: argparse.Namespace) -> dict[str, str]:
    """The columns that say which case a row is of; without peers it is another one, which replaces no comparison."""
    alone = {"case": f"{case.name}, alone"} if arguments.peers == ["none"] else {}
    return identity(op, case) | alone


def label(op: str, case: Any) -> str:
    return " ".join(identity(op, case).values())


def measure(arguments: argparse.Namespace) -> int:
    """Runs the suite, prints and appends rows; the number of cases that failed."""
    # As many shapes as there are cases: beyond the default of eight, torch.compile goes on as eager.
    torch._dynamo.config.recompile_limit = 256
    where, begin, failed, left_out, rows = machine(arguments.device), time.perf_counter(), [], [], []
    print(f"{where['device']}, {where['threads']} threads, commit {where['commit']}, {where['versions']}")
    cases, programs = wanted(arguments, where), wanted_programs(arguments, where)
    end_of_cases = arguments.minutes - suite.minutes(programs)
    estimate = f"{len(cases)} cases, about {minutes_of(cases):.1f} minutes"
    print(f"{estimate}; {len(programs)} programs, {suite.minutes(programs):.1f} minutes")
    if arguments.plan:
        for op, bench, case in cases:
            print(f"  {minutes_of([(op, bench, case)]) * 60:4.0f} s  {label(op, case)}")
        for program in programs:
            print(f"  {program.minutes * 60:4.0f} s  {' '.join(program.command)}")
        return 0
    for number, (op, bench, case) in enumerate(cases, start=1):
        started = time.perf_counter()
        minutes = (started - begin) / 60
        if minutes > end_of_cases:
            left_out.append(label(op, case))
            continue
        to_come = minutes_of(cases[number - 1 :]) + suite.minutes(programs)
        print(
            f"\n[{number} of {len(cases)}, {minutes:.1f} min, about {to_come:.1f} to go] {label(op, case)}", flush=True
        )
        try:
            found = run_case(op, bench, case, arguments, where)
        except Exception as error:
            failed.append(f"{label(op, case)}: {brief(error)}")
            traceback.print_exc()
            continue
        print_rows(found)
        print(f"  took {time.perf_counter() - started:.1f} s")
        rows += found
        if not arguments.dry_run:
            append(found)
    in_dry_run = [{name: str(value) for name, value in asdict(row).items()} for row in rows]
    print_summaries(in_dry_run if arguments.dry_run else rows_here(where), arguments)
    for number, program in enumerate(programs):
        minutes, to_come = (time.perf_counter() - begin) / 60, suite.minutes(programs[number:])
        print(
            f"\n[{program.name}, {minutes:.1f} min, about {to_come:.1f} to go] {' '.join(program.command)}", flush=True
        )
        result = suite.run(program, arguments.minutes - minutes, arguments.data, arguments.dry_run)
        if result != "ok":
            failed.append(f"{program.name}: {result}")
    minutes = (time.perf_counter() - begin) / 60
    print(f"\n{len(rows)} rows of ops and {len(programs)} programs in {minutes:.1f} minutes", end="")
    print("" if arguments.dry_run else f", appended to {os.path.relpath(RESULTS.parent)}")
    if left_out:
        print(f"LEFT OUT after {arguments.minutes:g} minutes, --skip-done goes on there: {'; '.join(left_out)}")
    for name in failed:
        print(f"FAILED {name}")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="quick", help="quick, full, gpu, small, or one that an op has beside them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="*", default=[], help="names of ops and workloads; all by default")
    parser.add_argument("--peers", nargs="*", help="beginnings of peers' names, or none; all by default")
    parser.add_argument("--cases", nargs="*", default=[], help="only cases whose line has all of these words")
    parser.add_argument("--seconds", type=float, help="time spent on each case (default: 3, full: 0.4)")
    parser.add_argument("--rounds", type=int, help="exactly so many rounds, memory read in the last one")
    parser.add_argument("--minutes", type=float, help="most that it may take (default: 12 quick, 19.8 full)")
    parser.add_argument("--data", type=Path, help="directory of GSM8K's model_solutions.jsonl, for the trees of full")
    parser.add_argument("--skip-done", action="store_true", help="leave out cases with rows of this commit and device")
    parser.add_argument("--base", metavar="REV", help="time this checkout's fastpo against that of another commit")
    parser.add_argument("--dry-run", action="store_true", help="print the tables, leave the rows' files alone")
    parser.add_argument("--plan", action="store_true", help="print what would run and how long it takes, run nothing")
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = MINUTES.get(arguments.suite, 60.0)
    if arguments.seconds is None:
        arguments.seconds = SECONDS.get(arguments.suite, 3.0)
    return min(1, compare(arguments) if arguments.base else measure(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
