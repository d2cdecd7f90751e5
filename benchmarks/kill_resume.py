"""Kills a run with SIGKILL at random moments, resumes it each time, compares every artefact with an undisturbed run.

    python benchmarks/kill_resume.py --kills 20 [--kill_seed 0] [--key value ...]

Further arguments go to ``fastpo demo``. The moments are drawn uniformly over the undisturbed run's time after start-up,
one kill per start, until so many kills have hit. Prints what each kill met, and exits with 1 at the first difference.
Without further arguments rows go to results/facts.csv.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from facts import record  # noqa: E402

WATCHED_ONLY = {"timings.jsonl", "report.html", "config.yaml"}  # times; config.yaml holds output_dir
SMALL = {
    "warm_start_steps": 60,
    "warm_start_examples": 500,
    "prompts_per_iteration": 60,
    "iterations": 2,
    "eval_prompts": 20,
    "sample_chunk": 10,
    "batch_size": 16,
    "checkpoint_steps": 5,
    "gold_wins": True,
    "tensorboard": False,
}


def command(directory: Path, extra: list[str]) -> list[str]:
    small = [f"--{key}={value}" for key, value in SMALL.items()]
    return [sys.executable, "-m", "fastpo", "demo", *small, *extra, "--output_dir", str(directory)]


def start(directory: Path, extra: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(directory, extra), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(directory: Path, extra: list[str]) -> float:
    """Runs to the end; returns the seconds from the first artefact (imports take about as long as the small run)."""
    process = start(directory, extra)
    while not (directory / "config.yaml").exists() and process.poll() is None:
        time.sleep(0.01)
    begun = time.monotonic()
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed:\n{errors.decode()}")
    return time.monotonic() - begun


def contents(directory: Path) -> dict[str, bytes]:
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and "tensorboard" not in p.parts)
    return {str(p.relative_to(directory)): p.read_bytes() for p in files if p.name not in WATCHED_ONLY}


def last_artefact(directory: Path) -> str:
    files = [p for p in directory.rglob("*") if p.is_file()]
    return str(max(files, key=lambda p: p.stat().st_mtime_ns).relative_to(directory)) if files else "nothing"


def kill_once(directory: Path, extra: list[str], wait: float) -> bool:
    """Starts the run, waits ``wait`` seconds from when it is at work, kills it. False if it had finished by then."""
    stamp = directory / "config.yaml"
    before = stamp.stat().st_mtime_ns if stamp.exists() else 0
    process = start(directory, extra)
    while process.poll() is None and (not stamp.exists() or stamp.stat().st_mtime_ns == before):
        time.sleep(0.005)
    try:
        process.wait(timeout=wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"a resumed run failed:\n{process.stderr.read().decode()}")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill_seed", type=int, default=0)
    args, extra = parser.parse_known_args()
    rng = random.Random(args.kill_seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        seconds = finish(whole, extra)
        expected = contents(whole)
        print(f"undisturbed: {seconds:.1f} s at work, {len(expected)} artefacts")
        hits = 0
        while hits < args.kills:
            if not kill_once(killed, extra, wait=rng.uniform(0, seconds / 4)):
                differ = compare(expected, contents(killed))
                print(f"finished after {hits} kills: {differ or 'identical'}")
                if differ:
                    return 1
                killed = Path(scratch, f"killed_{hits}")
                continue
            hits += 1
            print(f"kill {hits}: last written {last_artefact(killed)}", flush=True)
        finish(killed, extra)
        differ = compare(expected, contents(killed))
    if not differ and not extra:
        record("kill_resume.py", {"kills": (hits, ""), "identical artefacts": (len(expected), "")})
    print(f"{hits} kills, resumed each time: {differ or 'every artefact identical, bit for bit'}")
    return 1 if differ else 0


def compare(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    names = sorted(expected.keys() | found.keys())
    return ", ".join(f"{n} differs" for n in names if expected.get(n) != found.get(n))


if __name__ == "__main__":
    sys.exit(main())
