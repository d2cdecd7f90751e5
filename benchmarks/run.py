"""Times every op against its peers: ``python benchmarks/run.py [--suite quick|full|gpu] [--ops NAME ...]``.

Each ``kernels/<op>/bench.py`` offers cases and implementations (fastpo, torch eager, torch.compile, and the peers that
are installed: ``pip install .[peers]``). All of a case's implementations are checked to compute the same thing, then
run in turn in one process. Rows are appended to ``benchmarks/results/results.csv``.
"""

import argparse
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import RESULTS, Row, append, interleaved, machine, peak_memory, percentile  # noqa: E402
from verify import gate  # noqa: E402

import fastpo.kernels  # noqa: E402


def benches(names: list[str]) -> dict[str, ModuleType]:
    """op name -> its bench module."""
    folders = [m.name for m in pkgutil.iter_modules(fastpo.kernels.__path__) if m.ispkg]
    ops = sorted(name for name in folders if importlib.util.find_spec(f"fastpo.kernels.{name}.bench"))
    unknown = sorted(set(names) - set(ops))
    if unknown:
        sys.exit(f"--ops has {', '.join(unknown)}; it should name ops of kernels/: {', '.join(ops)}")
    return {op: importlib.import_module(f"fastpo.kernels.{op}.bench") for op in ops if not names or op in names}


def run_case(op: str, bench: ModuleType, case: Any, arguments: argparse.Namespace, where: dict[str, Any]) -> list[Row]:
    """The rows of one case; peers that compute something else are named and left out."""
    device = arguments.device
    runs = bench.implementations(case)
    if not arguments.peers:
        runs = {name: run for name, run in runs.items() if name == "fastpo"}
    for name, reason in gate(bench, case, device, runs).items():
        print(f"  {case.name}: {name} is not timed: {reason}", file=sys.stderr)
        del runs[name]
    ceiling_run, ceiling_work = bench.ceiling(case)
    inputs = {name: bench.setup(case, device) for name in [*runs, "ceiling"]}
    times = interleaved({**runs, "ceiling": ceiling_run}, inputs, device, arguments.seconds)
    ceiling = ceiling_work / percentile(times["ceiling"], 0.5)  # bytes or operations per second
    work = bench.flops(case) or bench.bytes_moved(case)
    unit = "GFLOP/s" if bench.flops(case) else "GB/s"
    fastpo_p50 = percentile(times["fastpo"], 0.5)
    rows = []
    for name, run in runs.items():
        p20, p50, p80 = (percentile(times[name], share) for share in (0.2, 0.5, 0.8))
        peak = peak_memory(run, inputs[name], device)
        rows.append(
            Row(
                **where,
                op=op,
                case=case.name,
                mode=case.mode,
                dtype=str(case.dtype).removeprefix("torch."),
                shape=" ".join(f"{k}={v}" for k, v in case.shape.items()),
                implementation=name,
                p20_ms=round(p20 * 1e3, 4),
                p50_ms=round(p50 * 1e3, 4),
                p80_ms=round(p80 * 1e3, 4),
                peak_mib=round(peak, 1),
                rate=round(work / p50 / 1e9, 1),
                unit=unit,
                floor_share=round(work / ceiling / p50, 3),
                speedup=round(p50 / fastpo_p50, 2),
            )
        )
    return rows


def print_rows(console: Console, rows: list[Row]) -> None:
    head = rows[0]
    table = Table(title=f"{head.op}  {head.mode}  {head.dtype}  {head.shape}", title_justify="left")
    for column in ("implementation", "p50 ms", "p20-p80", "peak MiB", head.unit, "of floor", "fastpo is faster by"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for row in rows:
        spread = f"{row.p20_ms:.3f}-{row.p80_ms:.3f}"
        share, faster = f"{row.floor_share:.0%}", "" if row.implementation == "fastpo" else f"{row.speedup:.2f}x"
        cells = (
            row.implementation,
            f"{row.p50_ms:.3f}",
            spread,
            f"{row.peak_mib:.0f}",
            f"{row.rate:.1f}",
            share,
            faster,
        )
        table.add_row(*cells)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("quick", "full", "gpu"), default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="*", default=[], help="names of ops; all by default")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="time the peers as well")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each case (default: 3)")
    parser.add_argument("--dry-run", action="store_true", help="print the table, leave results.csv alone")
    arguments = parser.parse_args()
    where, console, failed = machine(arguments.device), Console(), []
    console.print(f"{where['device']}, {where['threads']} threads, commit {where['commit']}, {where['versions']}")
    for op, bench in benches(arguments.ops).items():
        for case in bench.cases(arguments.suite, arguments.device):
            try:
                rows = run_case(op, bench, case, arguments, where)
            except RuntimeError as error:
                failed.append(f"{op} {error}")
                console.print(f"[red]{failed[-1]}")
                continue
            print_rows(console, rows)
            if not arguments.dry_run:
                append(rows)
    if not arguments.dry_run:
        console.print(f"rows appended to {os.path.relpath(RESULTS)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
