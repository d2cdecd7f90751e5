"""linear_token_logprobs on the CPU against its spec in fp64, errors judged by those of the same types in torch."""

import pytest
import torch
from linear_token_logprobs_cases import (
    DTYPES,
    HEADS,
    LEAVES,
    SHAPES,
    TILES,
    as_type,
    budget,
    call,
    check,
    problem,
    run,
)

from fastpo.dispatch import extension_missing
from fastpo.kernels.linear_token_logprobs import gemm, linear_token_logprobs, planning, reference
from fastpo.kernels.token_logprobs import STATS

BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(extension_missing("_C") is not None, reason="no _C"))]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", TILES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape, head, dtype):
    """Everything trained, everything kept: 3F."""
    check(*problem(*shape, dtype, **head))


@pytest.mark.parametrize("kept", [0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["lora and softcap"]], ids=["plain", "lora and softcap"])
def test_recomputed(head, dtype, kept):
    """Nothing or some of the forward kept: the gradient of the weight from logits that are computed again."""
    n, h, v = SHAPES["many tiles"]
    check(*problem(n, h, v, dtype, **head), memory_budget=budget(n, h, v, kept, dtype))


@pytest.mark.parametrize("train", [("hidden",), ("weight",), ("bias",), ("lora_a",), ("lora_b",), ("hidden", "lora_a")])
def test_each_gradient_alone(train):
    """Frozen heads, frozen hidden states, LoRA factors alone."""
    check(*problem(*SHAPES["tails of one"], **HEADS["lora and softcap"]), train=train)


@pytest.mark.parametrize("train", [LEAVES, ("hidden",)], ids=["all", "frozen head"])
@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["lora and softcap"]], ids=["plain", "lora and softcap"])
def test_statistics(head, train):
    """Every statistic; gradients of those that have one, which take the way through recomputed logits."""
    n, h, v = SHAPES["many tiles"]
    tensors, labels, settings = problem(n, h, v, **head)
    everything = {**settings, "topk": 5, "label_set": torch.tensor([0, 700, v - 1])}
    upstream = ("logps", "logsumexp", "entropy", "sum_p2")
    check(tensors, labels, everything, stats=STATS, upstream=upstream, train=train)
    check(tensors, labels, settings, stats=("logsumexp",), upstream=("logps", "logsumexp"), train=train)
    check(tensors, labels, settings, stats=("entropy",), upstream=("entropy",), train=train)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["lora and softcap"]], ids=["plain", "lora and softcap"])
@pytest.mark.parametrize("kept", [0, 10])
def test_several_labels_per_row(head, dtype, kept):
    """Rows without a label, with several, with equal ones, in any order: gradients sum over a row's labels."""
    n, h, v = 21, 16, 300
    tensors, _, settings = problem(n, h, v, dtype, **head)
    rows = torch.tensor([20, 3, 3, 0, 17, 3, 3, 5, 20, 17, 9, 9])
    labels = torch.tensor([299, 7, 8, 0, -100, 7, 200, 128, 127, 4, -100, -100])
    settings |= {"rows": rows}
    check(tensors, labels, settings, memory_budget=budget(n, h, v, kept, dtype))
    everything = {"stats": STATS[:5], "upstream": ("logps", "entropy")}
    check(tensors, labels, settings, **everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0, 0.5, 10])
def test_logits_that_rise_from_tile_to_tile(dtype, kept):
    """Tiles of a row relative to different references, each e^t far below the next: in some rows, up or down."""
    n, h, v = SHAPES["many tiles"]
    tensors, labels, settings = problem(n, h, v, dtype, bias=True)
    tensors["bias"] = torch.linspace(-60, 60, v).to(dtype)
    tensors["weight"] = tensors["weight"] * torch.linspace(0, 8, v)[:, None].to(dtype)
    labels[::3] = v - 1
    check(tensors, labels, settings, memory_budget=budget(n, h, v, kept, dtype))
    check(tensors, labels, settings | {"temperature": 5.0}, stats=STATS[:5], upstream=("logps", "entropy"))


@pytest.mark.parametrize("kept", [0, 10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_label_keeps_the_precision_of_its_gradient(dtype, kept):
    """1 - p of 1e-6 to 1e-4: it must not be the difference of two numbers of the weight's type.

    Logits of up to 14 round in fp32 by up to 14 eps, and their exponentials by as much of themselves.
    """
    n, h, v = 20, 64, 300
    generator = torch.Generator().manual_seed(0)
    tensors, labels, settings = problem(n, h, v, dtype)
    hidden, labels = tensors["hidden"].float(), labels.clamp_min(0)
    gap = torch.linspace(9, 14, n)[:, None] / hidden.square().sum(1, keepdim=True)
    tensors["weight"] = (torch.randn(v, h, generator=generator) * 1e-2).index_add_(0, labels, hidden * gap).to(dtype)
    check(tensors, labels, settings, memory_budget=budget(n, h, v, kept, dtype), roundings=14)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kept", [0, 0.4, 10])
def test_low_precision_operands_as_on_a_gpu(monkeypatch, backend, dtype, kept):
    """GEMMs of bf16 and fp16 operands to fp32 results, in torch's products: exp(logits) rounded in between."""
    if backend == "cpu":
        pytest.skip("its kernels write float32 or over the logits")
    monkeypatch.setattr(gemm, "operand", lambda x: x)
    monkeypatch.setattr(gemm, "_ours", lambda x: False)
    monkeypatch.setattr(gemm, "tile_for_product", lambda z, w, kept=None: z.to(w.dtype) if kept is None else kept)
    monkeypatch.setattr(gemm, "_mm", lambda a, b: torch.mm(a.float(), b.float()))
    n, h, v = 200, 64, 1111
    for head in (HEADS["plain"], HEADS["lora and softcap"]):
        given = problem(n, h, v, dtype, **head)
        check(*given, memory_budget=budget(n, h, v, kept, dtype))
        check(*given, stats=("entropy",), upstream=("logps", "entropy"))


def test_independent_of_the_tiles(monkeypatch):
    """Results do not depend on the shape of the tiles to 1e-6 in fp32, nor on the budget."""
    n, h, v = 60, 32, 2000
    given = problem(n, h, v, **HEADS["lora and softcap"])
    outcomes = [run(*given, memory_budget=budget(n, h, v, 0.5))]
    for tile in ((1, 128), (7, 100), (64, 2048)):
        monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": tile})
        outcomes.append(run(*given))
    logps, grads = outcomes[0]
    for other_logps, other_grads in outcomes[1:]:
        torch.testing.assert_close(other_logps, logps, rtol=1e-6, atol=1e-6)
        for grad, other in zip(grads, other_grads, strict=True):
            assert (grad - other).abs().max() <= 1e-6 * grad.abs().max().clamp_min(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_runs(dtype):
    given = problem(*SHAPES["many tiles"], dtype, **HEADS["lora and softcap"])
    first, again = run(*given), run(*given)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("stats", [(), STATS[:5]])
def test_all_masked_and_empty(stats):
    """Zeros, never NaN; gradients too."""
    for n in (0, 6):
        tensors, labels, settings = problem(n, 8, 50, **HEADS["lora and softcap"])
        check(tensors, torch.full_like(labels, -100), settings, stats=stats)
        nothing = torch.zeros(0, dtype=torch.int64)
        check(tensors, nothing, settings | {"rows": nothing}, stats=stats)


def test_no_label_is_ignored_without_ignore_index():
    tensors, labels, _ = problem(9, 8, 50)
    labels = labels.clamp_min(0)
    expected = linear_token_logprobs(tensors["hidden"], tensors["weight"], labels)
    assert torch.equal(linear_token_logprobs(tensors["hidden"], tensors["weight"], labels, ignore_index=None), expected)
    with pytest.raises(ValueError, match=r"labels has -100 at position 1; it should be from 0 to 49$"):
        labels[1] = -100
        linear_token_logprobs(tensors["hidden"], tensors["weight"], labels, ignore_index=None)


def test_batched_and_strided_views():
    """[B, T, H] with strides, a transposed weight, an expanded upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 2, 16, generator=generator)[:, :-1, 1].requires_grad_()  # [3, 5, 16]
    weight = torch.randn(16, 70, generator=generator).t().requires_grad_()  # [70, 16]
    labels = torch.randint(70, (3, 6), generator=generator)[:, 1:]
    logps = linear_token_logprobs(hidden, weight, labels)
    grads = torch.autograd.grad(logps.sum(), (hidden, weight))
    flat = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(logps, flat)
    for ours, theirs in zip(grads, torch.autograd.grad(flat.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_infinities_and_nan():
    """-inf in the bias is a mask, also over whole tiles; NaN and +inf show in their rows and nowhere else."""
    tensors, labels, settings = problem(12, 8, 300, bias=True)
    tensors["bias"][:200] = -torch.inf
    labels = torch.where(labels >= 0, labels.clamp_min(200), labels)
    labels[0] = 3  # impossible
    tensors["hidden"][2] = torch.nan
    tensors["hidden"][3] = torch.inf
    ours = call(linear_token_logprobs, tensors, labels, **settings)
    exact = call(reference.spec, as_type(tensors, torch.float64), labels, **settings)["logps"].detach()
    assert ours[0] == -torch.inf
    torch.testing.assert_close(ours.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_retained_graph_gives_the_same_gradients_twice():
    """What the forward kept is not overwritten by a backward."""
    tensors, labels, settings = problem(*SHAPES["many tiles"])
    leaves = as_type(tensors, torch.float32)
    logps = call(linear_token_logprobs, leaves, labels, **settings)
    first = torch.autograd.grad(logps.sum(), list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("ours", [True, False])
def test_autocast_takes_its_type(monkeypatch, ours):
    """fp32 master weights and bf16 hidden states, as trainers run them; by torch's own products too."""
    if not ours:
        monkeypatch.setattr(gemm, "_ours", lambda x: False)
    tensors, labels, _ = problem(9, 16, 60)
    hidden, weight = (tensors[name].clone().requires_grad_() for name in ("hidden", "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_token_logprobs(hidden.bfloat16(), weight, labels)
    expected = linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert weight.grad.dtype == torch.float32
