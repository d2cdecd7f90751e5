"""linear_token_logprobs on a GPU, every backend that runs there; the CPU tests need no GPU.

Tests with "small" in their name are quick enough for compute-sanitizer.
"""

import pytest
import torch
from linear_token_logprobs_cases import DTYPES, HEADS, LEAVES, SHAPES, TILES, budget, check, problem
from one_backend import one_backend

from fastpo.kernels.linear_token_logprobs import linear_token_logprobs, planning
from fastpo.kernels.linear_token_logprobs.op import OP
from fastpo.kernels.token_logprobs import STATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]


backend = one_backend(OP, "triton", "torch")


def on_gpu(tensors, labels, settings):
    settings = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
    return {name: tensor.cuda() for name, tensor in tensors.items()}, labels.cuda(), settings


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_small_values_and_gradients(shape, head, dtype, monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", TILES)
    check(*on_gpu(*problem(*shape, dtype, **head)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0, 0.4])
def test_small_recomputed(kept, dtype, monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", TILES)
    n, h, v = SHAPES["many tiles"]
    given = on_gpu(*problem(n, h, v, dtype, **HEADS["lora and softcap"]))
    check(*given, memory_budget=budget(n, h, v, kept, dtype))


@pytest.mark.parametrize("train", [LEAVES, ("hidden",)], ids=["all", "frozen head"])
def test_small_statistics(train, monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", TILES)
    n, h, v = SHAPES["many tiles"]
    tensors, labels, settings = problem(n, h, v, **HEADS["lora and softcap"])
    settings |= {"topk": 5, "label_set": torch.tensor([0, 700, v - 1])}
    given = on_gpu(tensors, labels, settings)
    check(*given, stats=STATS, upstream=("logps", "logsumexp", "entropy", "sum_p2"), train=train)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_real_sizes(dtype):
    """Several tiles of the size that is shipped, an odd vocabulary."""
    check(*on_gpu(*problem(3000, 512, 50257, dtype)))


def test_bit_identical_runs():
    tensors, labels, _ = on_gpu(*problem(2048, 256, 30000, torch.bfloat16))
    runs = []
    for _ in range(2):
        leaves = [tensors[name].detach().requires_grad_() for name in ("hidden", "weight")]
        logps = linear_token_logprobs(*leaves, labels)
        runs.append((logps, *torch.autograd.grad(logps.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_label_out_of_range_is_nan_in_its_row_alone():
    tensors, labels, _ = on_gpu(*problem(30, 16, 300))
    labels = labels.clamp_min(0)
    labels[4] = 300
    logps = linear_token_logprobs(tensors["hidden"], tensors["weight"], labels)
    assert logps.isnan().nonzero().flatten().tolist() == [4]


def test_no_wait_for_the_device_without_ignore_index(backend):
    if backend == "torch":
        pytest.skip("the kernels are what is promised not to wait")
    tensors, labels, _ = on_gpu(*problem(30, 16, 300))
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    linear_token_logprobs(*leaves, labels.clamp_min(0), ignore_index=None).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_token_logprobs(*leaves, labels.clamp_min(0), ignore_index=None).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
