"""The correctness gate: an implementation is timed only if it computes what fastpo and the reference compute."""

import copy
from collections.abc import Callable
from typing import Any


def gate(bench: Any, case: Any, inputs: Any, runs: dict[str, Callable[[Any], Any]]) -> dict[str, str]:
    """Runs every implementation once, each on a copy of ``inputs``. Returns name -> why it is not to be timed.

    Raises RuntimeError where fastpo fails, or where peers ran and none of them agrees with it: nothing is timed, and no
    speed-up reported, on a red gate.
    """
    try:
        ours = runs["fastpo"](copy.deepcopy(inputs))
        bench.check(case, inputs, {"fastpo": ours})
    except Exception as error:
        raise RuntimeError(f"{case.name}: fastpo fails: {brief(error)}") from error
    failed, disagree = {}, 0
    others = {name: run for name, run in runs.items() if name != "fastpo"}
    for name, run in others.items():
        try:
            output = run(copy.deepcopy(inputs))
            bench.check(case, inputs, {"fastpo": ours, name: output})
        except AssertionError as error:
            failed[name] = f"computes something else: {brief(error)}"
            disagree += 1
        except Exception as error:
            failed[name] = brief(error)
    if disagree and disagree == len(others):
        raise RuntimeError(f"{case.name}: nothing agrees with fastpo: {'; '.join(failed.values())}")
    return failed


def brief(error: Exception) -> str:
    """One line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
