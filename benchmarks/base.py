"""``run.py --base REV``: this checkout's fastpo against another commit's, built in a worktree, timed in turn.

Each side is a process of its own, so that both can hold their compiled ops; they run one call each, A B A B ..., and a
ratio is taken of every two neighbours. Cases are matched by name, mode, type and shape; each side gates its own.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "base.csv"
WORKTREES = ROOT / "build" / "base"
COLUMNS = ("commit", "base", "device", "threads", "op", "case", "mode", "dtype", "shape")
FIGURES = ("p50_ms", "base_p50_ms", "ratio_p20", "ratio_p50", "ratio_p80", "rounds")


def checkout(revision: str) -> Path:
    """A worktree of ``revision`` below build/, with its compiled ops; made once per commit."""
    sha = subprocess.run(["git", "rev-parse", "--short", revision], cwd=ROOT, capture_output=True, text=True)
    if sha.returncode:
        sys.exit(f"--base is {revision!r}; it should name a commit of this repository")
    tree = WORKTREES / sha.stdout.strip()
    if not (tree / ".built").exists():
        print(f"building {revision} in {tree.relative_to(ROOT)}", flush=True)
        if not tree.exists():
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, revision], cwd=ROOT, check=True)
        environment = os.environ | {"PYTHONPATH": str(tree)}
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        (tree / ".built").touch()
    return tree


class Side:
    """A process that runs fastpo of one checkout on request."""

    def __init__(self, tree: Path, device: str):
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, str(Path(__file__).resolve()), str(tree), device]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=tree, env=environment, text=True, **pipes)

    def ask(self, **request: Any) -> Any:
        """The answer to one request; raises RuntimeError with the reason why there is none."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with exit code {self.process.wait()}")
        found = json.loads(answer)
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(arguments: argparse.Namespace) -> int:
    """Prints a ratio with its spread for every case, and appends it to base.csv; the number of cases that failed."""
    from measure import machine, percentile

    tree, where, failed = checkout(arguments.base), machine(arguments.device), 0
    now, base = Side(ROOT, arguments.device), Side(tree, arguments.device)
    print(f"{where['device']}: {where['commit']} against {tree.name}; above 1, this checkout is faster")
    for case in now.ask(list=arguments.suite, ops=arguments.ops):
        label = " ".join(case.values())
        try:
            for side in (now, base):
                side.ask(prepare=case, suite=arguments.suite)
            times = in_turn(now, base, arguments.seconds)
        except RuntimeError as error:
            failed += 1
            print(f"FAILED {label}: {error}", flush=True)
            continue
        ratios = [theirs / ours for ours, theirs in times]
        p20, p50, p80 = (percentile(ratios, share) for share in (0.2, 0.5, 0.8))
        ours, theirs = (percentile(list(side), 0.5) * 1e3 for side in zip(*times, strict=True))
        print(f"{p50:6.3f}x ({p20:.3f}-{p80:.3f})  {ours:9.3f} ms, was {theirs:9.3f}  {label}", flush=True)
        if not arguments.dry_run:
            figures = (round(value, 4) for value in (ours, theirs, p20, p50, p80))
            append({**where, "base": tree.name, **case} | dict(zip(FIGURES, (*figures, len(times)), strict=True)))
    now.close()
    base.close()
    return failed


def in_turn(now: Side, base: Side, seconds: float) -> list[tuple[float, float]]:
    """Seconds of neighbouring calls, ours and theirs; who begins alternates. The first pair warms up."""
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < 6 or time.perf_counter() - start < seconds:
        order = (now, base) if len(times) % 2 else (base, now)
        taken = {side: side.ask(run=True) for side in order}
        times.append((taken[now], taken[base]))
    return times[1:]


def append(row: dict[str, Any]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *FIGURES), extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)


def serve(tree: Path, device: str) -> None:
    """The other end of a ``Side``: answers requests, a line each. Ops, cases and checks are those of ``tree``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed must not get between the answers
    from discovery import benches, identity, refresher
    from measure import stopwatch
    from verify import brief, gate

    seconds, prepared = stopwatch(device), None

    def answer(request: dict[str, Any]) -> Any:
        nonlocal prepared
        if "list" in request:
            found = benches(request["ops"]).items()
            return [identity(op, case) for op, bench in found for case in bench.cases(request["list"], device)]
        if "prepare" in request:
            op = request["prepare"]["op"]
            bench = benches([op])[op]
            cases = [c for c in bench.cases(request["suite"], device) if identity(op, c) == request["prepare"]]
            if not cases:
                raise LookupError(f"{tree.name} has no such case")
            inputs, run = bench.setup(cases[0], device), bench.implementations(cases[0])["fastpo"]
            gate(bench, cases[0], inputs, {"fastpo": run})
            prepared = run, inputs, refresher(bench, cases[0])
            return True
        run, inputs, refresh = prepared
        refresh(inputs)
        return seconds(run, inputs)

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except (Exception, SystemExit) as error:
            reply = {"error": brief(error)}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
