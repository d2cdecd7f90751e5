"""Everything that needs a GPU, in one command: ``make gpu-check``. Nothing is downloaded or needs to be installed.

Builds the compiled ops, runs the GPU tests (every op's in a process of its own, all at once), measures the ceilings
(copy bandwidth, bf16 GEMM) and the suite "gpu" op by op, and lets compute-sanitizer watch the small tests. Rows are
appended to ``benchmarks/results/results.csv`` as they are measured. A part that fails or overruns does not stop the
next; the table at the end says what failed and what was measured. ``--wheels DIR`` puts peers' wheels on the path.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# The ops whose rows are wanted most; others follow.
FIRST = ("token_logprobs", "linear_token_logprobs", "linear_preference_loss", "tree_attention", "workload_step")
LARGE = "more_than_2_to_the_31"  # the GPU tests that take tens of GB: one after another, in one process
# The GPU tests that compute-sanitizer is quick enough for have "small" in their name; torch's own kernels are not ours.
SANITIZED = "small and not [torch-"
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--print-limit", "5")
SANITIZER_NEEDS_S = 40
TESTS_S = 220.0  # all parts of the tests run at once
# Processes for the GPU tests of a file whose kernels take Triton minutes to compile; one for any other file.
SHARDS = {"test_gpu_tree_attention": 4}
COMPILER_S = 30.0  # what the last case of a part that measures may take beyond its time
NEEDED = ("torch", "triton", "transformers", "pytest", "hypothesis", "pybind11", "setuptools")


@dataclass
class Part:
    name: str
    command: Sequence[str]
    limit_s: float
    optional: bool = False  # what it does not get done in its time, or not on this machine, is no failure
    environment: dict[str, str] = field(default_factory=dict)  # besides that of all parts
    result: str = "not run: no time left"
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return not self.result.startswith(("ok", "left out"))


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def run(part: Part, limit_s: float, environment: dict[str, str]) -> None:
    """Runs a part in its own process; prints its output when it has ended. Sets result and seconds."""
    limit, begin = min(part.limit_s, limit_s), time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        part.result = ended(part.command, limit, environment | part.environment, output)
        output.seek(0)
        text = output.read()
    part.seconds = time.perf_counter() - begin
    counts = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error).*?) in [\d.]+s", text, re.MULTILINE)
    part.result += f": {counts[-1]}" if counts else ""
    if part.optional and part.result.startswith("FAILED (over"):
        part.result = part.result.replace("FAILED", "left out")
    print(f"\n=== {part.name} ({part.seconds:.0f} s): {' '.join(part.command)}\n{text[-6000:]}", flush=True)


def ended(command: Sequence[str], limit_s: float, environment: dict[str, str], output: IO[str] | int | None) -> str:
    """How a command ended within its time; without ``output`` it prints where we do."""
    options = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    except OSError as error:
        return f"FAILED ({error})"
    try:
        code = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"FAILED (over {limit_s:.0f} s)"
    finally:
        _end(process)
    return "ok" if code == 0 else f"FAILED (exit {code})"


def _end(process: subprocess.Popen) -> None:
    """Ends a part with all that it started: a compiler left behind would hold the next part up."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def run_together(parts: Sequence[Part], limit_s: float, environment: dict[str, str]) -> None:
    threads = [threading.Thread(target=run, args=(part, limit_s, environment)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def builds() -> list[Part]:
    """The C++ ops first: they do not depend on CUDA's compiler."""
    build = python("setup.py", "--quiet", "build_ext", "--inplace")
    return [
        Part("build C++ ops", ["env", "FASTPO_BUILD=cpu", *build], 150),
        Part("build CUDA ops", ["env", "FASTPO_BUILD=cuda", *build], 150),
    ]


def tests() -> list[Part]:
    """A part per test file that holds GPU tests, or several: a kernel that breaks the GPU's context breaks its own."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    # No -q: pyproject.toml has one, and of two pytest does not say how many passed.
    options = ("-m", "gpu", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider", "-k")
    parts = []
    for path in files:
        command = python("-m", "pytest", str(path.relative_to(ROOT)), *options, f"not {LARGE}")
        shards = SHARDS.get(path.stem, 1)
        for i in range(shards):
            name = f"tests {path.stem}" + (f" {i + 1} of {shards}" if shards > 1 else "")
            parts.append(Part(name, command, TESTS_S, environment={"FASTPO_SHARD": f"{i}/{shards}"}))
    large = [str(path.relative_to(ROOT)) for path in files if LARGE in path.read_text("utf-8")]
    return [*parts, Part("tests of more than 2^31 elements", python("-m", "pytest", *large, *options, LARGE), TESTS_S)]


def sanitized(parts: Sequence[Part]) -> list[Part]:
    """The small ones of the tests under compute-sanitizer, which sees each allocation by itself."""
    return [
        Part(
            f"sanitizer {part.name}",
            [*SANITIZER, *part.command[:-1], SANITIZED],
            90,
            optional=True,
            environment={**part.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for part in parts
        if part.command[-1] != LARGE and re.search(r"def test_\w*small", (ROOT / part.command[3]).read_text("utf-8"))
    ]


def sanitizer_missing(environment: dict[str, str]) -> str | None:
    """Why compute-sanitizer cannot watch a process of this torch here, or None. It does not run on every machine."""
    if shutil.which("compute-sanitizer", path=environment["PATH"]) is None:
        return "no compute-sanitizer on PATH"
    trial = python("-c", "import torch; torch.ones(9, device='cuda').sum()")
    result = ended([*SANITIZER, *trial], 60, environment, subprocess.DEVNULL)
    return None if result == "ok" else f"compute-sanitizer does not run here: {result}"


def measurements() -> list[Part]:
    """A part per op and workload that has cases for a GPU, the most wanted first; ``--minutes`` is still to be said."""
    from discovery import benches

    names = [name for name, bench in benches([]).items() if bench.cases("gpu", "cuda")]
    names.sort(key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    suite = ("benchmarks/run.py", "--suite", "gpu", "--device", "cuda", "--seconds", "0.5")
    return [Part(f"measure {name}", python(*suite, "--ops", name), 90) for name in names]


def run_measurement(part: Part, limit_s: float, environment: dict[str, str]) -> None:
    """Runs a part that measures; no case begins when the time that compilers may take is all that is left."""
    limit = min(part.limit_s, limit_s)
    part.command = [*part.command, "--minutes", f"{max(limit - COMPILER_S, 1) / 60:.2f}"]
    run(part, limit, environment)


def ceilings() -> None:
    """Two rows: what shares of the floor refer to on this GPU."""
    import torch
    from measure import Row, append, machine, measured, percentile

    source = torch.randint(256, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    runs = {"copy": lambda _: target.copy_(source), "bf16 GEMM": lambda _: a @ b}
    amounts = {"copy": (2 * len(source), "GB/s", "bytes=2^31"), "bf16 GEMM": (2 * 8192**3, "GFLOP/s", "M=N=K=8192")}
    times, where = measured(runs, None, "cuda", 2.0)[0], machine("cuda")
    for name, (amount, unit, shape) in amounts.items():
        p20, p50, p80 = (percentile(times[name], share) for share in (0.2, 0.5, 0.8))
        case = {"op": "ceiling", "case": name, "mode": "read and written" if name == "copy" else "", "shape": shape}
        figures = {f"{key}_ms": round(s * 1e3, 4) for key, s in (("p20", p20), ("p50", p50), ("p80", p80))}
        dtype = "uint8" if name == "copy" else "bfloat16"
        rate = {
            "peak_mib": None,
            "rate": round(amount / p50 / 1e9, 1),
            "unit": unit,
            "floor_share": 1.0,
            "speedup": 1.0,
        }
        append([Row(**where, **case, dtype=dtype, implementation="torch", **figures, **rate)])
        print(f"{where['device']}: {name} {rate['rate']:.0f} {unit}")


def summary(rows: list[dict[str, str]]) -> str:
    """What was measured, against the ceilings of the same run and the fastest peer."""
    from tables import latest, milliseconds

    tops = {row["unit"]: float(row["rate"]) for row in rows if row["op"] == "ceiling"}
    lines = []
    for result in latest(rows, gpu=True):
        ours, peers = result.fastpo, result.peers
        top = tops.get(ours["unit"])
        share = f"{float(ours['rate']) / top:4.0%} of {top:.0f}" if top and ours["rate"] else ""
        faster = (
            f"{float(peers[0]['p50_ms']) / float(ours['p50_ms']):.2f}x {peers[0]['implementation']}" if peers else ""
        )
        rate = f"{ours['rate']} {ours['unit']}"
        lines.append(f"{ours['op']}: {result.label:70s} {milliseconds(ours):>7s} ms {rate:>17s} {share:14s} {faster}")
    return "\n".join(lines)


def unusable() -> str | None:
    """Why nothing can be checked here, or None."""
    absent = [name for name in NEEDED if not _importable(name)]
    if absent:
        return f"{sys.executable} lacks {', '.join(absent)}"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; PYTHON= chooses another Python for make gpu-check"
    return None if torch.cuda.is_available() else "torch finds no NVIDIA GPU"


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def toolkit(environment: dict[str, str]) -> dict[str, str]:
    """CUDA_HOME and a PATH with the tools of CUDA, as far as they can be found; nvcc on PATH may be a mere script."""
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), on_path and Path(on_path).resolve().parents[1]]
    for home in map(Path, filter(None, [*homes, "/usr/local/cuda"])):
        if (home / "include" / "cuda_runtime.h").exists():
            tools = [environment.get("PATH", os.defpath), str(home / "bin"), str(home / "compute-sanitizer")]
            return {"CUDA_HOME": str(home), "PATH": os.pathsep.join(tools)}
    return {"PATH": environment.get("PATH", os.defpath)}


def unpacked(wheels: Path) -> str:
    """A folder with the contents of the wheels, for the path; they are not installed, and bring none of their needs."""
    folder = ROOT / "build" / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    found = sorted(wheels.glob("*.whl"))
    if not found:
        sys.exit(f"--wheels is {wheels}; it should be a folder of .whl files")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ceilings", action="store_true", help="only measure copy bandwidth and bf16 GEMM")
    parser.add_argument("--wheels", type=Path, help="folder of peers' wheels, which are used without being installed")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for everything (default: 530)")
    arguments = parser.parse_args()
    if reason := unusable():
        print(f"gpu-check needs a Python with CUDA's torch and an NVIDIA GPU: {reason}", file=sys.stderr)
        return 2
    if arguments.ceilings:
        ceilings()
        return 0
    begin = time.perf_counter()
    path = [
        str(ROOT),
        *([unpacked(arguments.wheels)] if arguments.wheels else []),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTPO_BACKEND")
    }
    environment |= {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment |= toolkit(environment)

    def left() -> float:
        return arguments.budget - (time.perf_counter() - begin)

    from measure import read

    before, parts = len(read()), builds()
    parts += [Part("info", python("-m", "fastpo.info"), 40)]
    parts += [Part("ceilings", python("benchmarks/gpu_check.py", "--ceilings"), 40)]
    for part in parts:
        run(part, left(), environment)
    testing, measuring = tests(), measurements()
    run_together(testing, left() / 2, environment)
    for i, part in enumerate(measuring):
        if left() > COMPILER_S:
            run_measurement(part, left() / max(1.0, (len(measuring) - i) / 2), environment)
    watching = sanitized(testing)
    reason = "no time left" if left() < SANITIZER_NEEDS_S else sanitizer_missing(environment)
    for part in watching:
        part.result = f"left out: {reason}"
    if reason is None:
        run_together(watching, left() - 10, environment)
    parts += [*testing, *measuring, *watching]
    print(f"\n{summary(read()[before:])}\n")
    for part in parts:
        print(f"{part.name:45s} {part.seconds:6.1f} s  {part.result}")
    print(
        f"{time.perf_counter() - begin:.0f} s in all; python benchmarks/plot.py --readme writes the rows into README.md"
    )
    return 1 if any(part.failed for part in parts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
