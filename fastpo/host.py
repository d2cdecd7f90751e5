"""The integer work on trees and packs: the compiled ``fastpo._host``, or the same in plain Python, said aloud."""

import importlib
import warnings
from functools import cache
from typing import Any

from fastpo import host_python
from fastpo.dispatch import SlowBackendWarning, extension_missing


@cache
def host() -> Any:
    """The module whose functions ``fastpo.trees`` calls, on numpy arrays; plain Python is some 30 times slower."""
    reason = extension_missing("_host")
    if reason is None:
        return importlib.import_module("fastpo._host")
    message = f"trees are built in plain Python ({reason}); python -m fastpo.info says what to do"
    warnings.warn(message, SlowBackendWarning, stacklevel=2)
    return host_python
