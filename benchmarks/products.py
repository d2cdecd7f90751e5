"""The rate of the fused heads' products on a CPU (csrc/gemm.cpp) against the libraries': rows in results/facts.csv.

    python benchmarks/products.py

GFLOP/s of the three products of a tile of 2,048 rows, 992 vocabulary entries and H = 1,024, fp32, for each instruction
set that the processor has, and of one product by oneDNN and by torch.mm. Run it with ONEDNN_MAX_CPU_ISA=AVX2 for
oneDNN's rate without AVX-512, which is then the row "oneDNN, AVX2". All take turns; seconds.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from facts import record  # noqa: E402
from measure import percentile  # noqa: E402

from fastpo.kernels.linear_token_logprobs import gemm  # noqa: E402
from fastpo.kernels.linear_token_logprobs.bench import library_product  # noqa: E402
from fastpo.memory import keep_freed_memory  # noqa: E402

ROWS, HIDDEN, WIDTH, ROUNDS = 2048, 1024, 992, 15


def main() -> None:
    keep_freed_memory()
    times: dict[str, list[float]] = {}
    runs = products()
    for _ in range(ROUNDS + 2):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times.setdefault(name, []).append(time.perf_counter() - begun)
    operations = 2 * ROWS * HIDDEN * WIDTH
    rates = {name: round(operations / percentile(taken[2:], 0.5) / 1e9, 1) for name, taken in times.items()}
    record("products.py", {name: (rate, "GFLOP/s") for name, rate in rates.items()})
    print(rates)


def products() -> dict[str, Callable[[], object]]:
    """name -> one product."""
    x, w = torch.randn(ROWS, HIDDEN), torch.randn(WIDTH, HIDDEN)
    z, total, gradient, decay = torch.randn(ROWS, WIDTH), torch.zeros_like(x), torch.zeros_like(w), torch.ones(ROWS)
    ours = {
        "logits": lambda: gemm.logits(x, w, z),
        "times": lambda: gemm.times(z, w, total, decay),
        "outer": lambda: gemm.outer(z, x, gradient, add=True),
    }
    narrow = ", AVX2" if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" else ""
    found: dict[str, Callable[[], object]] = {f"oneDNN{narrow}": lambda: library_product(x, w)}
    if not narrow:
        found["torch.mm"] = lambda: torch.mm(x, w.t())
    for isa in ("avx512", "avx2"):
        try:
            with forced(isa):
                ours["logits"]()
        except RuntimeError:  # the processor does not have it
            continue
        found |= {f"{name}, {isa}": under(isa, run) for name, run in ours.items()}
    return found


def under(isa: str, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with forced(isa):
            return run()

    return call


@contextmanager
def forced(isa: str):
    os.environ["FASTPO_CPU_ISA"] = isa
    try:
        yield
    finally:
        del os.environ["FASTPO_CPU_ISA"]


if __name__ == "__main__":
    main()
