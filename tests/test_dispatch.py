"""Backend choice: order, reasons, forcing, and that a slower backend is never taken in silence."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastpo import info
from fastpo.dispatch import Backend, Op, SlowBackendWarning, always, extension_missing

needs_cpp = pytest.mark.skipif(bool(extension_missing("_C")), reason="fastpo._C is not built")
CPU = torch.device("cpu")


def backend(name, device="cpu", missing=None, why_not=None):
    return Backend(name, device, lambda: missing, lambda *_: why_not, impl=name)


def test_first_able_backend_runs():
    op = Op("op", [backend("cuda", "cuda"), backend("cpu", why_not="odd strides"), backend("torch", "any")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # unsuitable arguments are no fault of the installation
        assert op.pick(CPU).name == "torch"


def test_a_missing_backend_is_announced_once():
    op = Op("op", [backend("cpu", missing="not built"), backend("torch", "any")])
    with pytest.warns(SlowBackendWarning, match="op runs in plain PyTorch .cpu: not built."):
        op.pick(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.pick(CPU).name == "torch"


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("cpu", "FASTPO_BACKEND=cpu cannot run op: not built"),
        ("cuda", "FASTPO_BACKEND=cuda cannot run op: it runs on cuda, the tensors are on cpu"),
        ("gpu", "FASTPO_BACKEND is 'gpu'; op has cuda, cpu, torch"),
    ],
)
def test_forcing_fails_loudly(monkeypatch, forced, message):
    op = Op("op", [backend("cuda", "cuda"), backend("cpu", missing="not built"), backend("torch", "any")])
    monkeypatch.setenv("FASTPO_BACKEND", forced)
    with pytest.raises(RuntimeError, match=message):
        op.pick(CPU)


def test_forcing_takes_the_named_backend(monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "torch")
    assert Op("op", [backend("cpu"), backend("torch", "any")]).pick(CPU).name == "torch"


def test_no_backend_names_every_reason():
    op = Op("op", [backend("cuda", "cuda"), backend("cpu", why_not="fp64 is not compiled")])
    with pytest.raises(RuntimeError, match=r"no backend can run .*cuda: it runs on cuda.*cpu: fp64 is not compiled"):
        op.pick(CPU)


OLD = """
import sys, types, warnings
sys.modules["fastpo._C"], sys.modules["fastpo._host"] = types.ModuleType("_C"), types.ModuleType("_host")
import torch, fastpo
from fastpo import info
from fastpo.dispatch import SlowBackendWarning

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tree = fastpo.build_tree([[1, 2, 3]], 1)
    fastpo.path_sum(torch.ones(3), tree)
    fastpo.token_logprobs(torch.zeros(2, 5), torch.tensor([1, 2]))
print(*(w.message for w in caught if w.category is SlowBackendWarning), sep="\\n")
for op in info.ops():
    print(next(info.state(b) for b in op.backends if b.name == "cpu"))
"""


def test_modules_built_before_an_op_was_written_say_so(tmp_path):
    """In one line that tells how to build them again; ops run in plain PyTorch meanwhile. An empty module stands in."""
    root = Path(__file__).resolve().parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "FASTPO_BACKEND"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", OLD]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    host, scan, logps, *states = done.stdout.strip().split("\n")
    how = "rebuild it: FASTPO_BUILD=cpu python setup.py build_ext --inplace"
    assert f"fastpo._host is older than this source, it has no Trie; {how}" in host
    assert f"fastpo._C is older than this source, it has no tree_path_sum; {how}" in scan
    assert f"it has no token_logprobs_forward; {how}" in logps
    assert len(states) >= 7 and all(how in state for state in states)


@needs_cpp
def test_backends_name_all_the_ops_that_they_call():
    """Of those in fastpo._C; what only tests call stands apart."""
    named = {op for o in info.ops() for b in o.backends if b.name == "cpu" for op in b.missing.ops}
    built = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        if name.startswith("fastpo_c::")
    }
    assert built - named == {"elementary", "logistic"}


def test_always_and_missing_extension():
    assert always(1, 2) is None
    assert extension_missing("_never_built") == "fastpo._never_built is not built (needs a C++ compiler at install)"
