"""Runs csrc/*.cu on the CPU, so that their arithmetic, indexing and warp logic are tested without a GPU.

``load("token_logprobs", ...)`` turns csrc/token_logprobs.cu and the .cuh files into C++ (launches become calls, the
``CUDA`` registration becomes one for CPU tensors under the namespace ``fastpo_emulated``), compiles that against the
emulator in cuda_runtime.h, and loads it. The library is kept in build/, under a hash of everything that went in.
"""

import fcntl
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

# What only nvcc understands -> C++.
_REWRITES = (
    (r"(\w+(?:<[\w\s,]*>)?)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)("),
    (r'asm\("ex2\.approx\.ftz\.f32 [^;]*;" *: *"=f"\((\w+)\) *: *"f"\((\w+)\)\);', r"\1 = exp2f(\2);"),
    (r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);", ""),
    (r"STD_CUDA_CHECK\(", "static_cast<void>("),
    (r".*DeviceGuard guard\(.*\n", "\n"),
    (r"STABLE_TORCH_LIBRARY_IMPL\(fastpo_c, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(fastpo_emulated, CPU,"),
)
_libraries: list[torch.library.Library] = []  # definitions last as long as these objects
_SHIMS = """
extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** s) {
  *s = nullptr;
  return 0;
}
"""


def missing() -> str | None:
    """Why CUDA sources cannot be emulated here, or None."""
    if not CSRC.is_dir():
        return "there is no csrc/: not a checkout"
    return None if shutil.which("g++") else "the emulator needs g++"


def as_cpp(source: str) -> str:
    for pattern, replacement in _REWRITES:
        source = re.sub(pattern, replacement, source)
    return source


def load(stem: str, *ops: str) -> Any:
    """``torch.ops.fastpo_emulated`` with these ops of csrc/<stem>.cu, under the schemas that they have in fastpo_c."""
    library = torch.library.Library("fastpo_emulated", "FRAGMENT")
    for name in ops:
        schema = str(getattr(torch.ops.fastpo_c, name).default._schema)
        library.define(schema.removeprefix("fastpo_c::"))
    _libraries.append(library)
    torch.ops.load_library(build(stem))
    return torch.ops.fastpo_emulated


def build(stem: str) -> Path:
    """The shared library of csrc/<stem>.cu, compiled unless it is there already."""
    files = {
        path.name: as_cpp(path.read_text()) for path in (*CSRC.glob("*.cuh"), CSRC / "links.h", CSRC / f"{stem}.cu")
    }
    files[f"{stem}.cu"] += _SHIMS
    command = ["g++", "-x", "c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"{stem}.cu", "-o", f"{stem}.so"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}"]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu"]
    emulator = "".join(path.read_text() for path in sorted(HERE.glob("*.h")))
    key = hashlib.sha256("".join([torch.__version__, *command, *files.values(), emulator]).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "emulated_cuda" / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes: one compiles, the others wait
        if not (folder / f"{stem}.so").exists():
            for name, text in files.items():
                (folder / name).write_text(text)
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the emulated {stem}.cu does not compile:\n{done.stderr[:4000]}")
    return folder / f"{stem}.so"
