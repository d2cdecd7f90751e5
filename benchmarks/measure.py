"""Timing, memory and the identity of the machine: what a row of results.csv consists of."""

import csv
import ctypes
import gc
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpo.memory import return_freed_memory

RESULTS = Path(__file__).resolve().parent / "results" / "results.csv"
# The first three always count; peers where they are installed.
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


@dataclass(frozen=True)
class Measured:
    """The columns that every row of figures begins with: when, where and with what. ``machine`` fills them."""

    date: str
    commit: str
    device: str
    threads: int
    versions: str


@dataclass(frozen=True)
class Row(Measured):
    op: str
    case: str
    mode: str
    dtype: str
    shape: str
    implementation: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_mib: float | None  # memory above what was there before the call
    rate: float | None  # GB/s of the floor's bytes, GFLOP/s where the op counts operations, items/s of a workload
    unit: str
    floor_share: float | None  # floor time, at the ceiling measured in the same run, over p50
    speedup: float  # p50 of this implementation over p50 of fastpo


def measured(
    runs: dict[str, Callable[[Any], Any]],
    inputs: Any,
    device: str,
    seconds: float,
    refresh: Callable[[Any], None] = lambda inputs: None,
    rounds: int | None = None,
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """(seconds of each call, MiB at the peak) by name, run in turn (A B C A B C ...) so that drift hits all alike.

    At least five rounds after one for warming up, until ``seconds`` are over, and a call each for memory. Where one
    round takes longer than that: three, the first one among them, memory read in the last; or ``rounds``, likewise. The
    round that memory is read in is slower: of five, the median is of a warm one.
    """
    clock, peaks = stopwatch(device), {}

    def one_round() -> dict[str, float]:
        taken = {}
        for name, run in runs.items():
            refresh(inputs)
            taken[name] = clock(run, inputs)
        return taken

    def last_round() -> dict[str, float]:
        taken = {}
        for name, run in runs.items():
            refresh(inputs)
            timed = partial(_keep, taken, name, clock, run)
            peaks[name] = peak_memory(timed, inputs, device, live_only=True)
        return taken

    start = time.perf_counter()
    found = [one_round()]
    if rounds or time.perf_counter() - start > seconds:
        found += [one_round() for _ in range((rounds or 3) - 2)]
        found.append(last_round())
    else:
        found = []
        while len(found) < 5 or time.perf_counter() - start < seconds:
            found.append(one_round())
        last_round()
    return {name: [taken[name] for taken in found] for name in runs}, peaks


def _keep(
    taken: dict[str, float], name: str, clock: Callable[..., float], run: Callable[[Any], Any], inputs: Any
) -> None:
    taken[name] = clock(run, inputs)


def stopwatch(device: str) -> Callable[[Callable[[Any], Any], Any], float]:
    """(run, inputs) -> seconds of one call.

    On a GPU by events, with a cold L2; the write that empties it also hides the host's time to launch the first kernel.
    """
    if device == "cpu":
        return _cpu_seconds
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)

    def seconds(run: Callable[[Any], Any], inputs: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        run(inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def _cpu_seconds(run: Callable[[Any], Any], inputs: Any) -> float:
    begin = time.perf_counter()
    run(inputs)
    return time.perf_counter() - begin


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def peak_memory(run: Callable[[Any], Any], inputs: Any, device: str, live_only: bool = False) -> float | None:
    """MiB that one call holds at its peak, results included, beyond what was held before (Linux and CUDA).

    On a CPU that is resident memory, with what malloc keeps for later. ``live_only``: without, which slows the call;
    freed memory is given back at once from then on.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process keeps would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    if not live_only:
        run(inputs)
        return (_status("VmHWM") - before) / 2**10
    return_freed_memory()
    run(inputs)
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def machine(device: str) -> dict[str, Any]:
    """The columns of ``Measured``, by name."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": "; ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with a + where the code differs from it; "unknown" outside of git."""
    root = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
    return "unknown" if head is None else head + ("+" if changed else "")


def append(rows: Sequence[Measured], path: Path = RESULTS) -> None:
    """Adds rows of one kind to an append-only CSV."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    """Rows in the order in which they were measured; columns are text, "" where there is no figure."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
