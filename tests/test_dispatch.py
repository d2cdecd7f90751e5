"""Backend choice: order, reasons, forcing, and that a slower backend is never taken in silence."""

import warnings

import pytest
import torch

from fastpo.dispatch import Backend, Op, SlowBackendWarning, always, extension_missing

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


def test_always_and_missing_extension():
    assert always(1, 2) is None
    assert extension_missing("_never_built") == "fastpo._never_built is not built (needs a C++ compiler at install)"
