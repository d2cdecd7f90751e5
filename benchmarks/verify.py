"""The correctness gate: an implementation is timed only if it computes what fastpo and the reference compute."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from measure import peak_memory, stopwatch
from torch._dynamo.utils import counters


def gate(bench: Any, case: Any, inputs: Any, runs: dict[str, Callable[[Any], Any]]) -> dict[str, str]:
    """Runs every implementation once, each on a copy of ``inputs``. Returns name -> why it is not to be timed.

    Raises RuntimeError where fastpo fails: nothing is timed, and no speed-up reported, on a red gate.
    """
    try:
        ours = runs["fastpo"](copy.deepcopy(inputs))
        bench.check(case, inputs, {"fastpo": ours})
    except Exception as error:
        raise RuntimeError(f"fastpo fails: {brief(error)}") from error
    failed = {}
    for name, run in runs.items():
        if name == "fastpo":
            continue
        try:
            output = run(copy.deepcopy(inputs))
            bench.check(case, inputs, {"fastpo": ours, name: output})
        except Exception as error:
            failed[name] = _reason(error)
    return failed


def _reason(error: Exception) -> str:
    return f"computes something else: {brief(error)}" if isinstance(error, AssertionError) else brief(error)


def gate_all(bench: Any, case: Any, inputs: Any, runs: dict[str, Callable[[Any], Any]]) -> dict[str, str]:
    """As ``gate``; raises also where peers are asked and every one of them computes something else than fastpo."""
    failed = gate(bench, case, inputs, runs)
    _refuse_lone(runs, failed)
    return failed


def _refuse_lone(runs: Iterable[str], failed: dict[str, str]) -> None:
    peers = [name for name in runs if not name.startswith(("fastpo", "ceiling"))]
    reasons = [failed.get(name, "") for name in peers]
    if peers and all(reason.startswith("computes something else") for reason in reasons):
        raise RuntimeError(f"nothing agrees with fastpo: {'; '.join(reasons)}")


def timed_once(
    bench: Any, case: Any, inputs: Any, runs: dict[str, Callable[[Any], Any]], device: str
) -> tuple[dict[str, list[float]], dict[str, float | None], dict[str, str]]:
    """(seconds, MiB at the peak, why it was not timed) by name: one call of each, timed, watched and then checked.

    For calls that take seconds. What is loaded at the first call is loaded before, in calls of the case of the suite
    "small" with the same mode; a call that compiled something is made again. Nothing checks "ceiling". Raises
    RuntimeError as ``gate_all`` does.
    """
    clock, outputs = stopwatch(device), {}
    warm = bench.setup(next(c for c in bench.cases("small", device) if c.mode == case.mode), device)
    times: dict[str, list[float]] = {}
    peaks: dict[str, float | None] = {}
    failed: dict[str, str] = {}

    def timed(name: str, inputs: Any) -> None:
        times[name] = [clock(lambda x: outputs.update({name: runs[name](x)}), inputs)]

    def call(name: str) -> None:
        if name != "ceiling":
            runs[name](warm)
        compiled = None
        while compiled != _graphs():
            compiled = _graphs()
            outputs.pop(name, None)
            peaks[name] = peak_memory(partial(timed, name), inputs, device)

    for name in runs:
        try:
            call(name)
            if name != "ceiling":
                bench.check(case, inputs, outputs)
        except Exception as error:
            if name == "fastpo":
                raise RuntimeError(f"fastpo fails: {brief(error)}") from error
            failed[name] = _reason(error)
        if name != "fastpo":
            outputs.pop(name, None)
    _refuse_lone(runs, failed)
    return times, peaks, failed


def _graphs() -> int:
    """How many torch.compile has compiled in this process."""
    return counters["stats"]["unique_graphs"]


def brief(error: Exception) -> str:
    """One line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
