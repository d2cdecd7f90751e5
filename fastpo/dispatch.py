"""Which backend runs an op, and why the others do not.

An op lists its backends in order of preference. Each answers ``why_not(*args)`` with ``None`` (it can) or the reason it
cannot, in words. ``FASTPO_BACKEND=name`` forces one and fails loudly when that one cannot. Taking the plain-PyTorch
backend because a faster one is missing (not built, not installed) warns once per op: never in silence.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


class SlowBackendWarning(UserWarning):
    """A slower backend runs because a faster one is missing. ``python -m fastpo.info`` says what to do."""


@dataclass(frozen=True)
class Backend:
    name: str  # "cuda", "triton", "cpu" or "torch"
    device: str  # device type it is made for: "cuda", "cpu", or "any"
    missing: Callable[[], str | None]  # why it cannot run on this machine at all, or None
    why_not: Callable[..., str | None]  # why it cannot run for these arguments, or None
    impl: Any  # what the op calls: a module or namespace, the same functions in every backend of an op


class Op:
    """The ordered backends of one op."""

    def __init__(self, name: str, backends: Sequence[Backend]):
        self.name = name
        self.backends = tuple(backends)
        self._warned: set[str] = set()

    def pick(self, device: torch.device, *args: Any) -> Backend:
        """The first backend that can run ``args`` on ``device``. Raises if none, or if the forced one cannot."""
        forced = os.environ.get("FASTPO_BACKEND")
        if forced:
            return self._pick_forced(forced, device, args)
        absent = []
        for backend in self.backends:
            if backend.device not in (device.type, "any"):
                continue
            reason = backend.missing()
            if reason is not None:
                absent.append(f"{backend.name}: {reason}")
                continue
            if backend.why_not(*args) is not None:
                continue
            if backend.device == "any":
                self._warn_slow(absent)
            return backend
        reasons = "; ".join(f"{b.name}: {self.reason(b, device, args)}" for b in self.backends)
        raise RuntimeError(f"{self.name}: no backend can run these arguments on {device} ({reasons})")

    def reason(self, backend: Backend, device: torch.device, args: tuple) -> str | None:
        """Why ``backend`` cannot run ``args`` on ``device``; None if it can."""
        if backend.device not in (device.type, "any") and not _interpreted(backend):
            return f"it runs on {backend.device}, the tensors are on {device.type}"
        return backend.missing() or backend.why_not(*args)

    def _pick_forced(self, forced: str, device: torch.device, args: tuple) -> Backend:
        by_name = {b.name: b for b in self.backends}
        if forced not in by_name:
            raise RuntimeError(f"FASTPO_BACKEND is {forced!r}; {self.name} has {', '.join(by_name)}")
        reason = self.reason(by_name[forced], device, args)
        if reason is not None:
            raise RuntimeError(f"FASTPO_BACKEND={forced} cannot run {self.name}: {reason}")
        return by_name[forced]

    def _warn_slow(self, absent: list[str]) -> None:
        key = "; ".join(absent)
        if absent and key not in self._warned:
            self._warned.add(key)
            warnings.warn(
                f"{self.name} runs in plain PyTorch ({key}); python -m fastpo.info says what to do",
                SlowBackendWarning,
                stacklevel=3,
            )


def _interpreted(backend: Backend) -> bool:
    """Triton kernels also run on CPU tensors, in triton's interpreter, where that is switched on (tests)."""
    return backend.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def always(*_args: Any) -> str | None:
    """A ``why_not`` (or ``missing``) of a backend that has no limits."""
    return None


@dataclass(frozen=True)
class Extension:
    """A ``missing``: why a backend cannot use ``fastpo.<module>`` (_C, _cuda), or None.

    ``ops``: what the backend calls of it, names in fastpo_c. A module that was built before one of them was written
    loads, and would fail at that call.
    """

    module: str
    ops: tuple[str, ...]

    def __call__(self) -> str | None:
        return _ops_missing(self.module, self.ops)


@cache
def _ops_missing(module: str, ops: tuple[str, ...]) -> str | None:
    reason = extension_missing(module)
    if reason is not None:
        return reason
    key = "CUDA" if module == "_cuda" else "CPU"
    lacking = [op for op in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpo_c::{op}", key)]
    return outdated(module, lacking[0]) if lacking else None


def outdated(module: str, name: str) -> str:
    """Why ``fastpo.<module>`` cannot be used that has no ``name``."""
    build = f"FASTPO_BUILD={'cuda' if module == '_cuda' else 'cpu'} python setup.py build_ext --inplace"
    return f"fastpo.{module} is older than this source, it has no {name}; rebuild it: {build}"


@cache
def extension_missing(module: str) -> str | None:
    """Why ``fastpo.<module>`` (_C, _cuda, _host) cannot be used, or None. Importing it registers its ops."""
    try:
        importlib.import_module(f"fastpo.{module}")
    except ImportError as error:
        built = any(spec.startswith(f"{module}.") for spec in _package_files())
        if not built:
            compiler = "CUDA" if module == "_cuda" else "C++"
            return f"fastpo.{module} is not built (needs a {compiler} compiler at install)"
        return f"fastpo.{module} does not load: {str(error).splitlines()[0]}"
    return None


def _package_files() -> list[str]:
    return os.listdir(os.path.dirname(__file__))


@cache
def triton_missing() -> str | None:
    """Why triton kernels cannot run, or None."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None
    return "no CUDA device (TRITON_INTERPRET=1 runs triton kernels on the CPU, for tests)"
