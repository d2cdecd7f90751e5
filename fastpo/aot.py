"""Compiles every GPU kernel without a GPU and reads what it costs: ``python -m fastpo.aot``.

Each ``kernels/<op>/triton_*.py`` that launches kernels lists their shipped configurations in ``AOT: list[AotConfig]``,
and is found by that; each goes through triton's compiler for sm_80, sm_90 and sm_100, and registers, shared memory and
stack are read from the cubin. Each ``csrc/*.cu`` goes
through nvcc for the same architectures, with the report of ptxas. Both are machine code for the GPU named, so spills
seen here are spills there. What this cannot see is whether a kernel computes the right thing: the interpreter tests
and ``make gpu-check`` do that.

Triton decides at import whether kernels are compiled or interpreted, so run this without ``TRITON_INTERPRET``.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpo.columns import aligned

ARCHS = (80, 90, 100)
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have; a launch beyond fails
ROOT = Path(__file__).resolve().parents[1]
NVCC_FLAGS = ("-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")  # as in setup.py


@dataclass(frozen=True)
class AotConfig:
    """One shipped configuration of a triton kernel, an element of the list ``AOT`` of a ``kernels/<op>/triton_*.py``.

    ``signature`` maps each run-time argument to its triton type, ``"*bf16"``, ``"i64"``, ...; ``"*bf16:16"`` says that
    the value is divisible by 16, as triton's launcher finds out of pointers and integers by itself; a tuple
    has a tuple of types. The remaining arguments, and those that are None, are ``constexprs``.
    """

    label: str
    kernel: Any  # a @triton.jit function
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None  # limit of registers per thread; None leaves the choice to ptxas


@dataclass(frozen=True)
class Report:
    """What one kernel costs on one architecture."""

    source: str  # op folder or .cu file
    kernel: str  # name, and configuration
    arch: int  # 80, 90, 100
    registers: int  # per thread
    shared_bytes: int  # static shared memory per program or block
    spill_bytes: int  # per thread: stack frame (triton), the larger of stack frame, spill stores and loads (nvcc)


def triton_reports(
    ops: Sequence[str] | None = None, archs: Sequence[int] = ARCHS, workers: int | None = None
) -> list[Report]:
    """Compiles the shipped configurations of ``ops`` (None: all) in ``workers`` processes (None: one a core, up to 8).

    Triton keeps what it compiled: a second call takes a second, the first one 0.1 to 1.5 s of a core per configuration
    and architecture.
    """
    modules = [module for module in triton_modules() if ops is None or module.partition(".")[0] in ops]
    tasks = [(module, i, arch) for module in modules for i in range(len(shipped_configs(module))) for arch in archs]
    with ProcessPoolExecutor(workers or min(8, os.cpu_count() or 2)) as pool:
        return list(pool.map(_shipped_report, tasks, chunksize=len(archs)))


def triton_modules() -> list[str]:
    """``"<op>.triton_<something>"`` of the modules of the op folders that list configurations in ``AOT``."""
    import fastpo.kernels

    found = [path for root in fastpo.kernels.__path__ for path in Path(root).glob("*/triton_*.py")]
    listing = re.compile(r"^AOT\b.*=", re.MULTILINE)
    return sorted(f"{path.parent.name}.{path.stem}" for path in found if listing.search(path.read_text("utf-8")))


def shipped_configs(module: str) -> list[AotConfig]:
    """The list ``AOT`` of one module that ``triton_modules`` names."""
    return importlib.import_module(f"fastpo.kernels.{module}").AOT


def _shipped_report(task: tuple[str, int, int]) -> Report:
    module, index, arch = task
    return triton_report(shipped_configs(module)[index], arch, source=module.partition(".")[0])


def triton_report(config: AotConfig, arch: int, source: str = "", **options: Any) -> Report:
    """Compiles one configuration for one architecture. ``options`` go to the compiler (``maxnreg=``, ...)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(config.kernel, triton.runtime.JITFunction):
        raise RuntimeError(f"{config.kernel} is interpreted; run without TRITON_INTERPRET to compile it")
    names = config.kernel.arg_names
    unknown = (config.signature.keys() | config.constexprs.keys()) ^ set(names)
    if unknown:
        raise ValueError(f"AOT config {config.label!r} and {config.kernel.__name__} disagree on {sorted(unknown)}")
    signature = {n: _without_hint(config.signature.get(n, "constexpr")) for n in names}
    aligned: dict[tuple[int, ...], list] = {}
    for i, name in enumerate(names):
        aligned |= {place: [["tt.divisibility", 16]] for place in _aligned(config.signature.get(name, ""), (i,))}
    compiled = triton.compile(
        ASTSource(config.kernel, signature, dict(config.constexprs), aligned),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.maxnreg,
            "enable_fp_fusion": True,
            **options,
        },
    )
    registers, stack = _cubin_usage(compiled.asm["cubin"])
    label = f"{config.kernel.__name__} [{config.label}]"
    return Report(source, label, arch, registers, compiled.metadata.shared, stack)


def _without_hint(kind: Any) -> Any:
    """The triton type alone, of an argument or of each in a tuple."""
    return kind.split(":")[0] if isinstance(kind, str) else tuple(map(_without_hint, kind))


def _aligned(kind: Any, path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where the argument at ``path``, or what is in the tuple there, is divisible by 16."""
    if isinstance(kind, str):
        return [path] if kind.endswith(":16") else []
    return [place for i, inner in enumerate(kind) for place in _aligned(inner, (*path, i))]


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, read by the cuobjdump that triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no usage: {text!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def cuda_sources() -> list[Path]:
    """The CUDA files of the checkout; empty in an installed package, which carries none."""
    return sorted((ROOT / "csrc").glob("*.cu"))


def nvcc_missing() -> str | None:
    """Why the .cu files cannot be compiled here, or None."""
    if not cuda_sources():
        return "there is no csrc/*.cu beside this package"
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def cuda_reports(sources: Sequence[Path] | None = None, archs: Sequence[int] = ARCHS, workers: int = 2) -> list[Report]:
    """Compiles CUDA files to objects, ``workers`` at a time. Any torch will do: the CPU-only one has the headers."""
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda source: cuda_report(source, archs), cuda_sources() if sources is None else sources)
    return [report for reports in found for report in reports]


def cuda_report(source: Path, archs: Sequence[int] = ARCHS) -> list[Report]:
    """Compiles one CUDA file to an object for all ``archs``; one report per kernel instance and architecture."""
    from torch.utils.cpp_extension import include_paths

    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"), ROOT / "csrc")]
    with tempfile.TemporaryDirectory() as folder:
        target = ["-c", str(source), "-o", f"{folder}/object.o"]
        command = ["nvcc", *target, *NVCC_FLAGS, *gencode, *includes, "-Xptxas=-v", "-Xcompiler=-fPIC", "--threads=2"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc does not compile {source.name}:\n{done.stderr[:2000]}")
    return parse_ptxas(done.stderr, source.name)


_PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse_ptxas(text: str, source: str) -> list[Report]:
    """The reports in what ``ptxas -v`` printed."""
    reports = []
    for entry in _PTXAS_ENTRY.finditer(text):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spill = max(int(entry[key]) for key in ("frame", "stores", "loads"))
        shared_bytes = int(shared[1]) if shared else 0
        name = _demangle(entry["name"])
        reports.append(Report(source, name, int(entry["arch"]), int(entry["registers"]), shared_bytes, spill))
    return reports


def _demangle(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |\(anonymous namespace\)::|\(.*\)$", "", text.replace("(anonymous namespace)::", ""))


def table(reports: Sequence[Report]) -> str:
    """One line per kernel and configuration; registers / shared bytes / spilled bytes per architecture."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for r in reports:
        cells.setdefault((r.source, r.kernel), {})[r.arch] = f"{r.registers}/{r.shared_bytes}/{r.spill_bytes}"
    archs = sorted({r.arch for r in reports})
    head = ("source", "kernel", *(f"sm_{a}" for a in archs))
    rows = [head, *((source, kernel, *(cell.get(a, "-") for a in archs)) for (source, kernel), cell in cells.items())]
    return aligned(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastpo.aot",
        description="Compile all GPU kernels for sm_80, sm_90, sm_100; print registers/shared/spilled bytes of each.",
    )
    parser.add_argument("--only", choices=("triton", "cuda"), help="only the triton kernels, or only the .cu files")
    parser.add_argument("--ops", nargs="*", help="only the triton kernels of these ops")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1" and args.only != "cuda":
        parser.error("TRITON_INTERPRET is 1, which interprets kernels; unset it to compile them")
    reports = triton_reports(args.ops) if args.only != "cuda" else []
    if args.only != "triton":
        reason = nvcc_missing()
        if reason and args.only == "cuda":
            parser.error(reason)
        if reason:
            print(f"skipped the .cu files: {reason}", file=sys.stderr)
        else:
            reports += cuda_reports()
    print(json.dumps([asdict(r) for r in reports]) if args.json else table(reports))
    return 1 if any(r.spill_bytes or r.shared_bytes > MOST_SHARED[r.arch] for r in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
