"""``fastpo info``: what this installation can run, why the rest is off, and what a fused LM head costs.

    fastpo info [--head TOKENS VOCABULARY HIDDEN] [--memory_budget BYTES]

The head's costs are those of the modes that its ops choose by what needs a gradient: GEMM work in F = 2 TOKENS HIDDEN
VOCABULARY, and memory besides inputs and gradients; fp32 on a CPU, bf16 on a GPU.
"""

import argparse
import importlib
import os
import pkgutil
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import torch

import fastpo
import fastpo.kernels
from fastpo import objectives
from fastpo.columns import aligned
from fastpo.dispatch import Backend, Op
from fastpo.errors import FastpoError
from fastpo.kernels.linear_preference_loss import plan as plan_loss
from fastpo.kernels.linear_token_logprobs import plan
from fastpo.types import Pairs, Segments

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


# What the loop runs the LM head by, where training shares tokens and where it does not.
LOOP = {
    True: "linear_token_logprobs; on trees a hidden row predicts several labels, preference_loss takes the log-probs",
    False: "linear_preference_loss for preference steps; linear_token_logprobs for supervised steps and references",
}
HEAD = (8192, 128256, 4096)  # tokens, vocabulary, hidden size of the example
SEQUENCE = 256  # tokens of its sequences, of which pairs are made
MODES = ((False, False), (True, False), (True, True))  # whether hidden states and head need a gradient


def head_rows(sizes: Sequence[int] = HEAD, memory_budget: int | None = None) -> list[tuple[str, str, str, str, str]]:
    """(op, mode, GEMM work, MiB, why) of the fused ops on tokens, vocabulary, hidden size, as their ``plan`` says."""
    tokens, vocab, hidden = sizes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logps, losses = [], []
    for hidden_grad, head_grad in MODES:
        wanted: dict[str, Any] = {"dtype": dtype, "hidden_grad": hidden_grad, "head_grad": head_grad}
        wanted["memory_budget"] = memory_budget
        each = plan(tokens, vocab, hidden, device=device, **wanted)
        logps.append(("linear_token_logprobs", each.mode, each.gemms, each.bytes, each.reason))
        loss = plan_loss(*pairs_of(tokens, device), vocab, hidden, **wanted)
        groups = f"{len(loss.groups)} group{'s' * (len(loss.groups) != 1)} of whole pairs"
        losses.append(("linear_preference_loss", loss.mode, loss.gemms, loss.bytes, f"{groups}: {loss.reason}"))
    rows = [*logps, *losses]
    return [(op, mode, f"{gemms:.2f}F", f"{size / 2**20:.0f}", why) for op, mode, gemms, size, why in rows]


def pairs_of(tokens: int, device: str) -> tuple[Segments, Pairs]:
    """Pairs of sequences of SEQUENCE tokens, the last ones shorter, ``tokens`` in all."""
    number = max(1, -(-tokens // (2 * SEQUENCE)))
    bounds = (torch.arange(2 * number + 1, device=device) * SEQUENCE).clamp_max(tokens)
    return Segments(bounds), Pairs.interleaved(number, device)


def objective_rows() -> list[tuple[str, str]]:
    """(path, presets) of fastpo.objectives: which read the log-probs once, and which once more to couple a batch."""
    names = {path: [n for n, f in objectives.PRESETS.items() if f().path == path] for path in objectives.PATHS}
    return [
        (path if at == 0 else "", ", ".join(own[at : at + 8]))
        for path, own in names.items()
        for at in range(0, len(own), 8)
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FastpoError(f"info: {message}")


def main(arguments: Sequence[str] = ()) -> int:
    parser = _Parser(prog="fastpo info", usage=__doc__, add_help=False)
    parser.add_argument("--head", nargs=3, type=int, default=HEAD)
    parser.add_argument("--memory_budget", type=int)
    given = parser.parse_args(list(arguments))
    if min(given.head) < 1:
        raise FastpoError(f"info: --head is {' '.join(map(str, given.head))}; it should be three positive numbers")
    costs = head_rows(given.head, given.memory_budget)
    print(f"fastpo {fastpo.__version__}  |  {machine()}")
    print("  ".join(f"{p} {installed(p)}" for p in PACKAGES))
    forced = os.environ.get("FASTPO_BACKEND")
    if forced:
        print(f"FASTPO_BACKEND={forced}: every op runs on this backend or fails")
    rows = backend_rows()
    print(f"\nbackends, in order of preference\n{aligned([('op', 'backend', 'state'), *rows])}")
    tokens, vocab, hidden = given.head
    print(f"\nwhat a fused head costs: {tokens} tokens, {vocab} x {hidden} weight (F: one GEMM of all of it)")
    print(aligned([("op", "mode", "GEMMs", "MiB", "why"), *costs]))
    print("\nobjectives by path: two-phase ones read the log-probs once more, for the scores that couple a batch")
    print(aligned([("path", "presets"), *objective_rows()]), end="\n\n")
    for hint in hints(rows):
        print(f"- {hint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
