"""Every GPU kernel compiles for every architecture, none spills registers, all can be launched. Needs no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastpo.kernels
from fastpo import aot
from fastpo.dispatch import triton_missing

ROOT = Path(__file__).resolve().parents[1]


def reports(*only: str) -> list[dict]:
    """What ``python -m fastpo.aot`` says. A process of its own: this one may interpret its Triton kernels."""
    command = [sys.executable, "-m", "fastpo.aot", "--json", "--only", *only]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def assert_fit(found: list[dict]) -> None:
    """No spills, and no more shared memory than a block can have."""
    beyond = [
        f"{r['source']} {r['kernel']} sm_{r['arch']}: {r['spill_bytes']} bytes spilled, {r['shared_bytes']} shared"
        for r in found
        if r["spill_bytes"] or r["shared_bytes"] > aot.MOST_SHARED[r["arch"]]
    ]
    assert not beyond, "\n".join(beyond)


def launched_kernels(op: str) -> set[str]:
    """Names of an op's Triton kernels: by convention those functions whose name ends in _kernel."""
    kernel = re.compile(r"^@triton\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
    files = [path for root in fastpo.kernels.__path__ for path in Path(root, op).glob("*.py")]
    return {name for path in files for name in kernel.findall(path.read_text("utf-8"))}


OPS = sorted(path.parent.name for root in fastpo.kernels.__path__ for path in Path(root).glob("*/op.py"))


@pytest.mark.timeout(900)  # Triton keeps what it compiled: minutes of a core the first time, seconds from then on
@pytest.mark.skipif(triton_missing() == "triton is not installed", reason="triton is not installed")
@pytest.mark.parametrize("op", [op for op in OPS if launched_kernels(op)])
def test_triton_kernels_compile_without_spills(op):
    found = reports("triton", "--ops", op)
    assert {r["kernel"].split(" ")[0] for r in found} == launched_kernels(op)
    assert {r["arch"] for r in found} == set(aot.ARCHS)
    assert_fit(found)


@pytest.mark.timeout(900)
@pytest.mark.skipif(aot.nvcc_missing() is not None, reason=str(aot.nvcc_missing()))
def test_cuda_files_compile_without_spills():
    found = reports("cuda")
    with_kernels = {path.name for path in aot.cuda_sources() if "<<<" in path.read_text()}
    assert {r["source"] for r in found} == with_kernels
    assert {r["arch"] for r in found} == set(aot.ARCHS)
    assert_fit(found)


@pytest.mark.skipif(triton_missing() == "triton is not installed", reason="triton is not installed")
def test_a_spill_is_seen():
    """The gate can fail: a kernel held to 24 registers spills, and the report says so."""
    script = (
        "from fastpo import aot; from fastpo.kernels.token_logprobs.triton_kernels import AOT;"
        "config = next(c for c in AOT if 'everything' in c.label);"
        "print(aot.triton_report(config, 90, maxnreg=24).spill_bytes)"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert int(done.stdout) > 0, done.stderr


def test_ptxas_output_is_parsed():
    text = """ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 1 barriers, 64 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 6.831 ms
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_100'
ptxas info    : Function properties for _Z1kPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
    first, second = aot.parse_ptxas(text, "k.cu")
    assert (first.arch, first.registers, first.shared_bytes, first.spill_bytes) == (80, 8, 64, 0)
    assert (second.arch, second.registers, second.shared_bytes, second.spill_bytes) == (100, 32, 0, 16)


def test_nvcc_flags_are_those_of_the_build():
    """setup.py cannot import this package, so it repeats the flags."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no setup.py: not a checkout")
    text = (ROOT / "setup.py").read_text()
    missing = [flag for flag in aot.NVCC_FLAGS if flag.split("=")[-1] not in text]
    assert not missing
    assert all(f'"{arch}"' in text for arch in aot.ARCHS)
