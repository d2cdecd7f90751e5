"""Timing, memory and the identity of the machine: what a row of results.csv consists of."""

import csv
import gc
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "results.csv"


@dataclass(frozen=True)
class Row:
    date: str
    commit: str
    device: str
    threads: int
    versions: str
    op: str
    case: str
    mode: str
    dtype: str
    shape: str
    implementation: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_mib: float  # memory above what was there before the call
    rate: float  # GB/s of the floor's bytes, or GFLOP/s where the op counts operations
    unit: str
    floor_share: float  # floor time, at the ceiling measured in the same run, over p50
    speedup: float  # p50 of this implementation over p50 of fastpo


def interleaved(
    runs: dict[str, Callable[[Any], Any]], inputs: dict[str, Any], device: str, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds per call of each implementation, run in turn (A B C A B C ...) so that drift hits all alike."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for name, run in runs.items():
        run(inputs[name])
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < least or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            synchronize()
            begin = time.perf_counter()
            run(inputs[name])
            synchronize()
            times[name].append(time.perf_counter() - begin)
    return times


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def peak_memory(run: Callable[[Any], Any], inputs: Any, device: str) -> float:
    """MiB that one call holds at its peak beyond what was allocated before it (Linux and CUDA; NaN elsewhere)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    clear.write_text("5")  # resets the high-water mark of resident memory
    before = _status("VmRSS")
    run(inputs)
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def machine(device: str) -> dict[str, Any]:
    """The columns of a row that say where and with what it was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    import transformers
    import triton

    versions = f"torch {torch.__version__}; triton {triton.__version__}; transformers {transformers.__version__}"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def append(rows: list[Row], path: Path = RESULTS) -> None:
    """Adds rows to the append-only CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
