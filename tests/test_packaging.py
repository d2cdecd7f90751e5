"""What an installation promises: every way of importing works, and transformers is undisturbed in the root."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = [*(ROOT / "benchmarks").glob("*.py")]
# An editable install of this checkout would lend its compiled modules to the wheel under test.
NO_EDITABLE = 'import sys; sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]\n'


def run(code: str, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTPO_BACKEND")} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_folder_is_not_taken_for_the_kernels_package():
    """transformers probes for a package called kernels; run from the root, ours must not answer."""
    code = (
        "import transformers.utils.import_utils as u; from transformers import LlamaForCausalLM; "
        "import fastpo.kernels.token_logprobs; print(u.is_kernels_available())"
    )
    assert run(code, ROOT, PYTHONPATH=str(ROOT)) == "False"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_bare_checkout_imports_from_elsewhere(tmp_path):
    code = "import fastpo, fastpo.kernels.preference_loss as p; print(p.__file__)"
    assert run(code, tmp_path, PYTHONPATH=str(ROOT)).startswith(str(ROOT / "kernels"))


def test_what_tests_import_is_declared():
    """By the package or by its dev extra; not what happens to come along with another package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in wanted} | {"setuptools", "pybind11", "ninja"}
    files = [*(ROOT / "tests").rglob("*.py")]
    own = {path.stem for path in files} | {"fastpo", "benchmarks", "emulated_cuda", *(p.stem for p in BENCHMARKS)}
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    names = {"yaml": "pyyaml"}
    foreign = {names.get(name, name).replace("_", "-") for name in imported - own - sys.stdlib_module_names}
    assert foreign <= declared


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel without compiled parts (FASTPO_BUILD=none), from a copy of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = ["pyproject.toml", "setup.py", "README.md", "fastpo", "kernels", "csrc", "recipes"]
    subprocess.run(["cp", "-r", *files, str(source)], cwd=ROOT, check=True)
    for stale in (source / "fastpo").glob("*.so"):
        stale.unlink()
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"FASTPO_BUILD": "none"}
    command = [*pip_wheel, "-w", str(out), str(source)]
    subprocess.run(command, check=True, env=environment, timeout=240, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_works_in_an_empty_folder_without_compiled_code(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    code = """
import warnings, torch, fastpo
from fastpo.dispatch import SlowBackendWarning
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    logps = fastpo.token_logprobs(torch.zeros(2, 5), torch.tensor([1, 2]))
assert torch.allclose(logps, torch.full((2,), 5.0).log().neg()), logps
assert any(issubclass(w.category, SlowBackendWarning) for w in caught), "the slow backend was taken in silence"
print(fastpo.kernels.token_logprobs.__file__)
"""
    assert run(NO_EDITABLE + code, empty, PYTHONPATH=str(tmp_path / "site")).startswith(str(tmp_path / "site"))
    state = run(
        NO_EDITABLE + "import fastpo.info; fastpo.info.main()", empty, PYTHONPATH=str(tmp_path / "site"), COLUMNS="200"
    )
    assert "fastpo._C is not built" in state and "to build the C++ ops" in state


def test_wheel_carries_recipes_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastpo/recipes/irpo.yaml" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
