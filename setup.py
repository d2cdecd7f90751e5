"""Builds fastpo._C (C++ ops, stable libtorch ABI), fastpo._cuda (CUDA ops, likewise) and fastpo._host (pybind11).

FASTPO_BUILD chooses what is compiled: none, cpu, cuda (cpu and cuda), or auto (the default): cuda where torch has CUDA
and nvcc is found, cpu where there is a C++ compiler, none otherwise, said aloud. Only auto chooses less than
everything; a chosen build that fails, fails.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent.resolve()
# Oldest supported torch, 2.11: the stable ABI keeps a binary for it running on every later one.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CUDA_ARCHS = ("80", "90", "100")


def build_mode() -> str:
    mode = os.environ.get("FASTPO_BUILD", "auto")
    if mode not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"FASTPO_BUILD is {mode!r}; it should be one of auto, none, cpu, cuda")
    if mode != "auto":
        return mode
    if not shutil.which(os.environ.get("CXX", "c++")):
        print("fastpo: no C++ compiler found: nothing is compiled, ops will use their plain PyTorch backends")
        return "none"
    try:
        import torch
    except ImportError:
        print("fastpo: torch is not importable here: the C++ ops are not compiled")
        return "none"
    has_cuda = torch.version.cuda is not None and shutil.which("nvcc") is not None
    return "cuda" if has_cuda else "cpu"


def extensions(mode: str) -> tuple[list[Extension], dict]:
    if mode == "none":
        return [], {}
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    # Fused multiply-adds are written where they are meant: the compiler's own would round one value in two ways.
    cxx = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", TORCH_TARGET]
    modules: list[Extension] = [
        CppExtension(
            "fastpo._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx},
            py_limited_api=True,
        ),
        Pybind11Extension(
            "fastpo._host",
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "host").glob("*.cpp")),
            cxx_std=20,
            extra_compile_args=["-O3"],
        ),
    ]
    if mode == "cuda":
        nvcc = ["-O3", "-std=c++20", TORCH_TARGET, "-DUSE_CUDA"]
        nvcc += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        modules.append(
            CUDAExtension(
                "fastpo._cuda",
                sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cu")),
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc},
                py_limited_api=True,
            )
        )
    return modules, {"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)}


ext_modules, cmdclass = extensions(build_mode())
op_folders = {f"fastpo.kernels.{op}": f"kernels/{op}" for op in find_packages("kernels")}
setup(
    packages=[*find_packages(include=["fastpo", "fastpo.*"]), *op_folders, "fastpo.recipes"],
    package_dir={"": ".", "fastpo.recipes": "recipes", **op_folders},
    package_data={"fastpo.recipes": ["*.yaml"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
