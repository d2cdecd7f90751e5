"""Times every op and workload against its peers: ``python benchmarks/run.py [--suite quick|full|gpu] [--ops NAME]``.

Each ``kernels/<op>/bench.py``, and each module of benchmarks/ that defines cases, offers implementations: fastpo, torch
eager, torch.compile, and the peers that are installed (``pip install .[peers]``). All implementations of a case are
checked to compute the same thing, then run in turn in one process. Rows are appended, case by case, to
``benchmarks/results/results.csv``; ``--skip-done`` goes on where a stopped run left off.

``--base REV`` times this checkout against another commit instead, built in a worktree of its own.
"""

import argparse
import itertools
import math
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# Threads that spin while others' code runs make every implementation slower; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from base import compare  # noqa: E402
from discovery import benches, identity, refresher, work  # noqa: E402
from measure import RESULTS, Row, append, machine, measured, percentile, read  # noqa: E402
from verify import brief, gate_all  # noqa: E402

MINUTES = {"quick": 12.0, "full": 20.0, "gpu": 4.0, "grid": 35.0}
DEAR = 5e11  # operations; seconds on a CPU


def chosen(runs: dict[str, Any], peers: list[str] | None) -> dict[str, Any]:
    """fastpo and its variants, and of the others those whose names begin with one of ``peers``; all for None."""
    if peers is None:
        return runs
    prefixes = ("fastpo", *(peer for peer in peers if peer != "none"))
    return {name: run for name, run in runs.items() if name.startswith(prefixes)}


def run_case(op: str, bench: Any, case: Any, arguments: argparse.Namespace, where: dict[str, Any]) -> list[Row]:
    """The rows of one case; peers that fail or compute something else are named and left out."""
    device, runs = arguments.device, chosen(bench.implementations(case), arguments.peers)
    inputs = bench.setup(case, device)
    for name, reason in gate_all(bench, case, inputs, runs).items():
        print(f"  {case.name}: {name} is not timed: {reason}", file=sys.stderr)
        del runs[name]
    refresh = refresher(bench, case)
    bound, bound_work = bench.ceiling(case) if hasattr(bench, "ceiling") else (None, 0)
    timed = runs if bound is None else {**runs, "ceiling": bound}
    times, peaks = measured(timed, inputs, device, arguments.seconds, refresh, arguments.rounds)
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
                **identity(op, case),
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
        wanted = {tuple(identity(op, case).values()) for case in bench.cases(arguments.suite, arguments.device)}
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
        if tuple(identity(op, case).values()) not in done and all(part in label(op, case) for part in arguments.cases)
    ]


def label(op: str, case: Any) -> str:
    return " ".join(identity(op, case).values())


def measure(arguments: argparse.Namespace) -> int:
    """Runs the suite, prints and appends rows; the number of cases that failed."""
    where, begin, failed, left_out, rows = machine(arguments.device), time.perf_counter(), [], [], []
    print(f"{where['device']}, {where['threads']} threads, commit {where['commit']}, {where['versions']}")
    cases = wanted(arguments, where)
    for number, (op, bench, case) in enumerate(cases, start=1):
        minutes = (time.perf_counter() - begin) / 60
        if minutes > arguments.minutes:
            left_out.append(label(op, case))
            continue
        print(f"\n[{number} of {len(cases)}, {minutes:.1f} min] {label(op, case)}", flush=True)
        try:
            found = run_case(op, bench, case, arguments, where)
        except Exception as error:
            failed.append(f"{label(op, case)}: {brief(error)}")
            traceback.print_exc()
            continue
        print_rows(found)
        rows += found
        if not arguments.dry_run:
            append(found)
    in_dry_run = [{name: str(value) for name, value in asdict(row).items()} for row in rows]
    print_summaries(in_dry_run if arguments.dry_run else rows_here(where), arguments)
    print(f"\n{len(rows)} rows in {(time.perf_counter() - begin) / 60:.1f} minutes", end="")
    print("" if arguments.dry_run else f", appended to {os.path.relpath(RESULTS)}")
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
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each case (default: 3)")
    parser.add_argument("--rounds", type=int, help="exactly so many rounds, memory read in the last one")
    parser.add_argument("--minutes", type=float, help="no case is begun after these (default: 12 quick, 20 full)")
    parser.add_argument("--skip-done", action="store_true", help="leave out cases with rows of this commit and device")
    parser.add_argument("--base", metavar="REV", help="time this checkout's fastpo against that of another commit")
    parser.add_argument("--dry-run", action="store_true", help="print the tables, leave results.csv alone")
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = MINUTES.get(arguments.suite, 60.0)
    return min(1, compare(arguments) if arguments.base else measure(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
