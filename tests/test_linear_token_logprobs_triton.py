"""The Triton kernels of linear_token_logprobs in triton's interpreter, through the public function, against fp64.

A program holds a row of a tile: 16 x 128 tiles, which leave tails in a block of 256, and one of a block and a half.
"""

import pytest
import torch
from linear_token_logprobs_cases import DTYPES, HEADS, LEAVES, SHAPES, TILES, budget, check, problem

from fastpo.dispatch import triton_missing
from fastpo.kernels.linear_token_logprobs import planning
from fastpo.kernels.token_logprobs import STATS

pytestmark = [
    pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter meets infinities
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU itself"),
]
BOTH_HEADS = {name: HEADS[name] for name in ("plain", "lora and softcap")}


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "triton")
    monkeypatch.setattr(planning, "_LARGEST_TILE", TILES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", BOTH_HEADS.values(), ids=BOTH_HEADS.keys())
def test_values_and_gradients(head, dtype):
    check(*problem(*SHAPES["tails of one"], dtype, **head))


@pytest.mark.parametrize("shape", ["one row", "one vocabulary entry", "part of a tile"])
def test_small_shapes(shape):
    check(*problem(*SHAPES[shape], **HEADS["bias"]))


def test_a_tile_wider_than_a_block(monkeypatch):
    """400 vocabulary entries in a block of 512, the last tile narrower."""
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (16, 400)})
    check(*problem(6, 8, 900, **HEADS["lora and softcap"]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("head", BOTH_HEADS.values(), ids=BOTH_HEADS.keys())
def test_recomputed(head, dtype):
    n, h, v = SHAPES["tails of one"]
    check(*problem(n, h, v, dtype, **head), memory_budget=budget(n, h, v, 0.3, dtype))


@pytest.mark.parametrize("train", [LEAVES, ("hidden",)], ids=["all", "frozen head"])
def test_statistics(train):
    n, h, v = SHAPES["tails of one"]
    tensors, labels, settings = problem(n, h, v, **HEADS["lora and softcap"])
    settings |= {"topk": 5, "label_set": torch.tensor([0, 200, v - 1])}
    check(tensors, labels, settings, stats=STATS, upstream=("logps", "logsumexp", "entropy", "sum_p2"), train=train)


@pytest.mark.parametrize("kept", [0, 10])
def test_several_labels_per_row(kept):
    n, h, v = 21, 16, 300
    tensors, _, settings = problem(n, h, v, **HEADS["plain"])
    settings |= {"rows": torch.tensor([20, 3, 3, 0, 17, 3, 3, 5, 20, 17, 9, 9])}
    labels = torch.tensor([299, 7, 8, 0, -100, 7, 200, 128, 127, 4, -100, -100])
    check(tensors, labels, settings, memory_budget=budget(n, h, v, kept))
    check(tensors, labels, settings, stats=STATS[:2], upstream=("logps", "entropy"))


def test_infinities_and_nan():
    """-inf in the bias is a mask, also over whole tiles; NaN shows in its row and nowhere else."""
    tensors, labels, settings = problem(12, 8, 300, bias=True)
    tensors["bias"][:200] = -1e30
    tensors["hidden"][2] = torch.nan
    check(tensors, torch.where(labels >= 0, labels.clamp_min(200), labels), settings, train=("hidden",))
