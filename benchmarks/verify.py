"""The correctness gate: an implementation is timed only if it computes what the reference computes."""

from collections.abc import Callable
from types import ModuleType
from typing import Any


def gate(bench: ModuleType, case: Any, device: str, implementations: dict[str, Callable]) -> dict[str, str]:
    """Runs every implementation once on fresh inputs. Returns name -> why it is not timed, for those that failed.

    ``bench.check(case, inputs, {"fastpo": ..., name: ...})`` raises AssertionError where the outputs differ. If fastpo
    itself fails its check, nothing of the case is timed: no speed-up is reported on a red gate.
    """
    failed: dict[str, str] = {}
    outputs: dict[str, Any] = {}
    for name, run in implementations.items():
        try:
            outputs[name] = run(bench.setup(case, device))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if "fastpo" in failed:
        raise RuntimeError(f"{case.name}: fastpo fails: {failed['fastpo']}")
    for name, output in outputs.items():
        try:
            bench.check(case, bench.setup(case, device), {"fastpo": outputs["fastpo"], name: output})
        except AssertionError as error:
            failed[name] = f"computes something else: {str(error).splitlines()[0]}"
    if "fastpo" in failed:
        raise RuntimeError(f"{case.name}: fastpo {failed['fastpo']}")
    return failed
