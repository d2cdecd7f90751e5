"""linear_preference_loss on a GPU, on the Triton kernels of its parts and in plain PyTorch; CPU tests need no GPU.

Tests with "small" in their name are quick enough for compute-sanitizer.
"""

import pytest
import torch
from linear_preference_loss_cases import BUDGETS, DTYPES, HEADS, Problem, check, preset
from one_backend import one_backend

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import linear_preference_loss
from fastpo.kernels.linear_token_logprobs import planning
from fastpo.kernels.linear_token_logprobs.op import OP
from fastpo.types import Pairs, Segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]


backend = one_backend(OP, "triton", "torch")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (16, 128), "cuda": (16, 128)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_small_heads_types_and_budgets(head, budget, dtype, small_tiles):
    check(Problem(objectives.irpo(), **head).to("cuda"), dtype, memory_budget=budget)


@pytest.mark.parametrize("train", [(), ("hidden",), ("weight",), ("hidden", "lora_a")], ids="+".join)
def test_small_each_gradient_alone(train, small_tiles):
    problem = Problem(objectives.irpo(), **HEADS["lora"]).to("cuda")
    check(problem, train=train, memory_budget=BUDGETS["several groups"])


@pytest.mark.parametrize("name", ["dpo", "orpo", "sppo", "kto", "aot", "beta_dpo", "lipo", "tdpo", "sparse_po"])
def test_presets(name, small_tiles):
    """Of each path, with and without a reference, fields and columns; preference_loss is tested with all."""
    objective, tuples = preset(name)
    check(Problem(objective, tuples=tuples).to("cuda"), memory_budget=BUDGETS["several groups"])


def batch(pairs=24, tokens=200, hidden=256, vocab=30000, dtype=torch.bfloat16):
    """Leaves, and the other arguments, of tiles of the size that is shipped."""
    generator = torch.Generator("cuda").manual_seed(0)
    on = {"generator": generator, "device": "cuda"}
    count = 2 * pairs * tokens
    leaves = [torch.randn(count, hidden, **on), torch.randn(vocab, hidden, **on).mul_(2 * hidden**-0.5)]
    labels, ref = torch.randint(vocab, (count,), **on), -6 * torch.rand(count, **on)
    segments = Segments(torch.arange(0, count + 1, tokens, device="cuda"))
    pairs = Pairs(torch.arange(2 * pairs, device="cuda").view(-1, 2))
    return [x.to(dtype).requires_grad_() for x in leaves], (labels, ref, segments, pairs, objectives.irpo())


def test_bit_identical_runs():
    leaves, arguments = batch()
    runs = []
    for _ in range(2):
        loss = linear_preference_loss(*leaves, *arguments, memory_budget=2**28).loss
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_group_and_several_agree():
    """fp32, so that the roundings of sums over groups are small."""
    leaves, arguments = batch(dtype=torch.float32)
    results = []
    for budget in (None, 2**28):
        loss = linear_preference_loss(*leaves, *arguments, memory_budget=budget).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, several in zip(*results, strict=True):
        assert (one - several).abs().max() <= 1e-5 * one.abs().max()
