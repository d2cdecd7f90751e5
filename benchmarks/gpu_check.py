"""Everything that needs a GPU, in one command: ``make gpu-check``. Nothing is downloaded or needs to be installed.

Builds the CUDA ops, runs the GPU tests, lets compute-sanitizer watch a few of them, measures the ceilings (copy
bandwidth, bf16 GEMM) and the GPU benchmark suite, whose rows go to ``benchmarks/results/results.csv``. A step that
fails or overruns does not stop the next; the table at the end says what failed. ``--peers DIR`` adds wheels of peers to
the path.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 540
SANITIZED = "small"  # the GPU tests that compute-sanitizer is quick enough for have this word in their name


@dataclass
class Step:
    name: str
    command: list[str]
    limit_s: int
    result: str = "not run"
    seconds: float = 0.0


def steps() -> list[Step]:
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    found = [
        Step("build CUDA ops", [*python, "setup.py", "build_ext", "--inplace"], 240),
        Step("info", [*python, "-m", "fastpo.info"], 60),
        Step("GPU tests", pytest, 240),
        Step("ceilings", [*python, "benchmarks/gpu_check.py", "--ceilings"], 60),
        Step("benchmarks", [*python, "benchmarks/run.py", "--suite", "gpu", "--device", "cuda", "--seconds", "1"], 240),
    ]
    if shutil.which("compute-sanitizer"):
        command = ["compute-sanitizer", "--error-exitcode", "9", *pytest, "-k", SANITIZED]
        found.append(Step("compute-sanitizer", command, 120))
    return found


def run(step: Step, left_s: float, environment: dict[str, str]) -> None:
    """Runs a step in its own process, its output passed through; what is left of the budget bounds it."""
    print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
    limit, begin = min(step.limit_s, left_s), time.perf_counter()
    try:
        code = subprocess.run(step.command, cwd=ROOT, env=environment, timeout=limit).returncode
        step.result = "ok" if code == 0 else f"FAILED (exit {code})"
    except subprocess.TimeoutExpired:
        step.result = f"FAILED (over {limit:.0f} s)"
    step.seconds = time.perf_counter() - begin


def ceilings() -> None:
    """The two numbers that shares of the floor refer to, on this GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gemm_s = seconds_of(lambda: a @ b)
    print(f"{torch.cuda.get_device_name()}: copy {2 * 2**30 / copy_s / 1e12:.2f} TB/s (read + written), ", end="")
    print(f"bf16 GEMM 8192^3 {2 * 8192**3 / gemm_s / 1e12:.0f} TFLOP/s")


def seconds_of(call, runs: int = 20) -> float:
    """Median seconds of a call on the current stream, by CUDA events, after three warm-up calls."""
    times = []
    for i in range(runs + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[runs // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ceilings", action="store_true", help="only measure copy bandwidth and bf16 GEMM")
    parser.add_argument("--peers", type=Path, help="folder of peers' wheels or packages, put on the path")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU; there is none here", file=sys.stderr)
        return 2
    if arguments.ceilings:
        ceilings()
        return 0
    path = [str(ROOT), *([str(p) for p in sorted(arguments.peers.iterdir())] if arguments.peers else [])]
    environment = os.environ | {"FASTPO_BUILD": "cuda", "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    todo, begin = steps(), time.perf_counter()
    for step in todo:
        left = BUDGET_S - (time.perf_counter() - begin)
        if left > 10:
            run(step, left, environment)
    print()
    for step in todo:
        print(f"{step.name:20s} {step.seconds:6.1f} s  {step.result}")
    return 0 if all(step.result == "ok" for step in todo) else 1


if __name__ == "__main__":
    raise SystemExit(main())
