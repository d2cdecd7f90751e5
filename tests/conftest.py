"""For every test: one seed, uninitialised memory is NaN, torch runs its deterministic algorithms, no hub is asked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall on a busy machine; read when torch loads
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported: Triton kernels run on CPU tensors

# Timing never decides a test, so hypothesis keeps no deadline; derandomised, so that a red run can be repeated.
settings.register_profile("fastpo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fastpo")


def pytest_configure(config):
    """A slower backend taken for want of a faster one is an error. Not in pyproject.toml: pytest imports what a filter
    names before this file, and with fastpo comes triton, whose mode is decided at its import."""
    config.addinivalue_line("filterwarnings", "error::fastpo.dispatch.SlowBackendWarning")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in whatever order and process the tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that an output that a kernel forgot to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
