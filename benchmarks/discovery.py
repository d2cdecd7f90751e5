"""What there is to measure: a module of benchmarks is found by the functions it defines, and meets ``Bench``."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

import fastpo.kernels

FOLDER = Path(__file__).resolve().parent
_DEFINES_CASES = re.compile(r"^def cases\(", re.MULTILINE)


class Case(Protocol):
    """One line of a table; usually a frozen dataclass with whatever else its module needs."""

    name: str
    mode: str  # what runs: "forward", "forward_backward", "frozen head", ...
    dtype: torch.dtype
    shape: dict[str, int]


class Bench(Protocol):
    """``kernels/<op>/bench.py``, or a module of benchmarks/ for a workload that no single op owns.

    Optional: ``bytes_moved(case)`` or ``flops(case)``, the work of the floor (0: the other one counts), or
    ``items(case) -> (count, "pairs/s")`` where neither means much; ``ceiling(case) -> (run(inputs), work)``, the bare
    operation that bounds the case and its work in the same unit; ``refresh(case, inputs)``, untimed before each timed
    call, where an implementation overwrites its inputs; ``summary(rows of results.csv) -> lines`` printed at the end.
    """

    def cases(self, suite: str, device: str) -> list[Case]:
        """Cases of a suite, most wanted first; none for a suite that the module does not know. "quick" is the
        headline, "full" everything for 20 minutes of all modules on a CPU, "gpu" for a minute a module on a GPU,
        "small" takes milliseconds (``pytest benchmarks``)."""

    def setup(self, case: Case, device: str) -> Any:
        """Inputs, always the same."""

    def implementations(self, case: Case) -> dict[str, Callable[[Any], Any]]:
        """name -> run(inputs) -> outputs. "fastpo", its variants "fastpo ...", and those peers that are installed."""

    def check(self, case: Case, inputs: Any, outputs: dict[str, Any]) -> None:
        """Raises AssertionError unless outputs, fastpo's and at most one other's, are right."""


def benches(names: list[str]) -> dict[str, Any]:
    """name -> module, of all that there are or of ``names``."""
    found = {}
    for root in fastpo.kernels.__path__:
        found |= {
            path.parent.name: f"fastpo.kernels.{path.parent.name}.bench" for path in Path(root).glob("*/bench.py")
        }
    workloads = (path for path in FOLDER.glob("*.py") if _DEFINES_CASES.search(path.read_text(encoding="utf-8")))
    found |= {path.stem: path.stem for path in workloads}
    unknown = sorted(set(names) - set(found))
    if unknown:
        sys.exit(f"--ops has {', '.join(unknown)}; it should name some of {', '.join(sorted(found))}")
    return {name: importlib.import_module(found[name]) for name in sorted(found) if not names or name in names}


def identity(op: str, case: Case) -> dict[str, str]:
    """The columns that say which case a row is of."""
    return {
        "op": op,
        "case": case.name,
        "mode": case.mode,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": " ".join(f"{k}={v}" for k, v in case.shape.items()),
    }


def work(bench: Any, case: Case) -> tuple[float, str, float]:
    """(work of one call, the unit of its rate, how many of work make one of the unit)."""
    for name, unit in (("flops", "GFLOP/s"), ("bytes_moved", "GB/s")):
        amount = getattr(bench, name)(case) if hasattr(bench, name) else 0
        if amount:
            return amount, unit, 1e9
    if not hasattr(bench, "items"):
        return 0.0, "", 1.0
    count, unit = bench.items(case)
    return count, unit, 1.0


def refresher(bench: Any, case: Case) -> Callable[[Any], None]:
    """refresh(inputs) of the case; nothing happens where the module has none."""
    if not hasattr(bench, "refresh"):
        return lambda inputs: None
    return lambda inputs: bench.refresh(case, inputs)
