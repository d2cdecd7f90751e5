"""The correctness gate: an implementation is timed only if it computes what fastpo and the reference compute."""

import copy
from collections.abc import Callable
from typing import Any


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
        except AssertionError as error:
            failed[name] = f"computes something else: {brief(error)}"
        except Exception as error:
            failed[name] = brief(error)
    return failed


def gate_all(bench: Any, case: Any, inputs: Any, runs: dict[str, Callable[[Any], Any]]) -> dict[str, str]:
    """As ``gate``; raises also where peers are asked and every one of them computes something else than fastpo."""
    failed = gate(bench, case, inputs, runs)
    peers = [name for name in runs if not name.startswith("fastpo")]
    reasons = [failed.get(name, "") for name in peers]
    if peers and all(reason.startswith("computes something else") for reason in reasons):
        raise RuntimeError(f"nothing agrees with fastpo: {'; '.join(reasons)}")
    return failed


def brief(error: Exception) -> str:
    """One line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
