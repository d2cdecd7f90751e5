"""``python -m fastpo.info``: what this installation can run, and why the rest is off."""

import importlib
import os
import pkgutil
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastpo
import fastpo.kernels
from fastpo import objectives
from fastpo.columns import aligned
from fastpo.dispatch import Backend, Op
from fastpo.kernels.linear_token_logprobs import plan

PACKAGES = ("torch", "triton", "transformers", "accelerate", "flash-attn", "peft", "math-verify", "vllm")
BUILD_HINT = "to build the C++ ops: install a C++ compiler, then  pip install --no-build-isolation .  in the checkout"


def ops() -> list[Op]:
    """Every op of ``kernels/``, found by looking: a folder with an ``op`` module that has an ``OP``."""
    found = []
    for module in sorted(pkgutil.iter_modules(fastpo.kernels.__path__), key=lambda m: m.name):
        if not module.ispkg or module.name == "common":
            continue
        op = getattr(importlib.import_module(f"fastpo.kernels.{module.name}.op"), "OP", None)
        if op is not None:
            found.append(op)
    return found


def state(backend: Backend) -> str:
    """The word ready, or why this backend is off on this machine."""
    if backend.device == "cuda" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "off: no CUDA device"
    reason = backend.missing()
    return "ready" if reason is None else f"off: {reason}"


def backend_rows() -> list[tuple[str, str, str]]:
    """(op, backend, state) of every backend of every op."""
    return [(op.name, backend.name, state(backend)) for op in ops() for backend in op.backends]


def hints(rows: list[tuple[str, str, str]]) -> list[str]:
    """What to do about the backends that are off."""
    found = []
    if any(backend == "cpu" and status != "ready" for _, backend, status in rows):
        found.append(f"CPU tensors run in plain PyTorch, several times slower: {BUILD_HINT}")
    if torch.cuda.is_available() and any(b == "cuda" and status != "ready" for _, b, status in rows):
        found.append("the CUDA C++ ops are off, Triton runs in their place: install with FASTPO_BUILD=cuda and nvcc")
    return found


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def machine() -> str:
    """Device, threads and instruction set, on one line."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {accelerator}"
    )


LOOP = "linear_preference_loss for preference steps; linear_token_logprobs for supervised steps, references, statistics"
HEAD = (8192, 128256, 4096)  # tokens, vocabulary, hidden size of the example


def head_rows() -> list[tuple[str, str, str, str]]:
    """(mode, GEMM work, MiB, why) of linear_token_logprobs on the example; its ``plan`` says it of other shapes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plans = [
        plan(*HEAD, dtype=dtype, device=device, hidden_grad=hidden_grad, head_grad=head_grad)
        for hidden_grad, head_grad in ((False, False), (True, False), (True, True))
    ]
    return [(each.mode, f"{each.gemms:.2f}F", f"{each.bytes / 2**20:.0f}", each.reason) for each in plans]


def objective_rows() -> list[tuple[str, str]]:
    """(path, presets) of fastpo.objectives: which read the log-probs once, and which once more to couple a batch."""
    names = {path: [n for n, f in objectives.PRESETS.items() if f().path == path] for path in objectives.PATHS}
    return [
        (path if at == 0 else "", ", ".join(own[at : at + 8]))
        for path, own in names.items()
        for at in range(0, len(own), 8)
    ]


def main(_arguments: list[str] | None = None) -> int:
    print(f"fastpo {fastpo.__version__}  |  {machine()}")
    print("  ".join(f"{p} {installed(p)}" for p in PACKAGES))
    forced = os.environ.get("FASTPO_BACKEND")
    if forced:
        print(f"FASTPO_BACKEND={forced}: every op runs on this backend or fails")
    rows = backend_rows()
    print(f"\nbackends, in order of preference\n{aligned([('op', 'backend', 'state'), *rows])}")
    tokens, vocab, hidden = HEAD
    print(f"\nwhat a fused head costs: {tokens} tokens, {vocab} x {hidden} weight (F: one GEMM of all of it)")
    print(aligned([("mode", "GEMMs", "MiB", "why"), *head_rows()]))
    print("\nobjectives by path: two-phase ones read the log-probs once more, for the scores that couple a batch")
    print(aligned([("path", "presets"), *objective_rows()]), end="\n\n")
    for hint in hints(rows):
        print(f"- {hint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
