"""How long ``fastpo demo`` takes, and what comes of it: a row per figure in results/facts.csv.

    python benchmarks/demo.py

Seconds of a process of its own from start to end, set-up not counted, and greedy accuracy on the held-out problems
after the warm start and after each iteration. Some two minutes on 4 quiet cores.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from facts import record  # noqa: E402

from fastpo.results import result_rows  # noqa: E402


def main() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "demo")
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastpo", "demo", "--output_dir", output], env=environment, check=True)
        found = figures(time.perf_counter() - begun, output)
    record("demo.py", found)
    print(found)


def figures(seconds: float, run: Path) -> dict[str, tuple[float, str]]:
    """Seconds, and accuracy after the warm start (0) and after each iteration."""
    rows = enumerate(result_rows(run))
    return {"seconds": (round(seconds, 1), "s")} | {
        f"accuracy {k}": (round(100 * r["accuracy"], 1), "%") for k, r in rows
    }


if __name__ == "__main__":
    main()
