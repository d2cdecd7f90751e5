"""The integer work on trees and packs: the compiled ``fastpo._host``, or the same in plain Python, said aloud."""

import importlib
import warnings
from functools import cache
from typing import Any

from fastpo import host_python
from fastpo.dispatch import SlowBackendWarning, extension_missing, outdated


@cache
def host() -> Any:
    """The module whose functions ``fastpo.trees`` calls, on numpy arrays; plain Python is tens of times slower."""
    reason = extension_missing("_host") or _host_outdated()
    if reason is None:
        return importlib.import_module("fastpo._host")
    message = f"trees are built in plain Python ({reason}); python -m fastpo.info says what to do"
    warnings.warn(message, SlowBackendWarning, stacklevel=2)
    return host_python


def _host_outdated() -> str | None:
    """Why a built ``fastpo._host`` cannot be used: it has not all that the plain one has."""
    built = importlib.import_module("fastpo._host")
    lacking = [name for name in host_python.__all__ if not hasattr(built, name)]
    return outdated("_host", lacking[0]) if lacking else None
