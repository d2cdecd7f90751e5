"""linear_token_logprobs against its spec in fp64, errors judged by those of the same computation in torch.

SHAPES take every path through the tiles: one and several, a tail of one row or one vocabulary entry. Budgets keep
nothing, some or all of the forward. HEADS are the ways logits come from hidden states.
"""

import pytest
import torch

from fastpo.dispatch import extension_missing
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs, plan, planning, reference
from fastpo.kernels.token_logprobs import STATS

BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(extension_missing("_C") is not None, reason="no _C"))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # N, H, V; tiles are 16 x 128 here
    "one row": (1, 8, 5),
    "one vocabulary entry": (3, 4, 1),
    "part of a tile": (7, 16, 100),
    "tails of one": (33, 16, 257),
    "many tiles": (40, 24, 1111),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "softcap": {"logit_softcap": 4.0, "bias": True, "logit_scale": 1.5},
    "temperature per row": {"temperature": "per row", "logit_scale": -0.5},
    "lora": {"lora": True},
    "lora and softcap": {"lora": True, "bias": True, "logit_softcap": 3.0, "temperature": "per row"},
}
LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", request.param)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (16, 128)})


def problem(n, h, v, dtype=torch.float32, seed=0, *, bias=False, lora=False, temperature=1.0, **settings):
    """Tensors and settings of a head with peaked predictions; a quarter of the labels ignored."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    tensors = {"hidden": normal(n, h), "weight": normal(v, h, scale=2 * h**-0.5)}
    if bias:
        tensors["bias"] = normal(v)
    if lora:
        tensors["lora_a"], tensors["lora_b"] = normal(3, h, scale=h**-0.5), normal(v, 3)
    labels = torch.randint(v, (n,), generator=generator)
    labels[1::4] = -100
    if temperature == "per row":
        temperature = torch.linspace(0.5, 2, n)
    return tensors, labels, {"temperature": temperature, **settings}


def call(function, tensors, labels, **settings):
    """The op or its spec on a problem."""
    head = {"bias": tensors["bias"]} if "bias" in tensors else {}
    if "lora_a" in tensors:
        head["lora"] = (tensors["lora_a"], tensors["lora_b"], 0.5)
    return function(tensors["hidden"], tensors["weight"], labels, **head, **settings)


def as_type(tensors, dtype):
    return {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}


def spec(tensors, labels, dtype, weights, **settings):
    """Values of the spec computed in ``dtype`` and the gradients of their weighted sum."""
    leaves = as_type(tensors, dtype)
    if isinstance(settings.get("temperature"), torch.Tensor):
        settings["temperature"] = settings["temperature"].to(dtype)
    values = call(reference.spec, leaves, labels, **settings)
    total = sum((values[name] * w.to(dtype)).sum() for name, w in weights.items())
    return values, dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def assert_as_exact(ours, torchs, exact, tiny, what):
    """``err <= 2 err_torch + tiny``, both against fp64, NaN where fp64 has NaN."""
    assert ours.shape == exact.shape, what
    if exact.numel() == 0:
        return
    assert torch.equal(ours.isnan(), exact.isnan()), what
    error = (ours.double() - exact).nan_to_num(0).abs().max()
    allowed = 2 * (torchs.double() - exact).nan_to_num(0).abs().max() + tiny
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def check(tensors, labels, settings, *, stats=(), memory_budget=None, train=LEAVES, upstream=("logps",)):
    """Values, and the gradients of a weighted sum of ``upstream``, against the spec in fp64 and in the own type."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(labels.numel(), generator=generator) for name in upstream}
    dtype = tensors["hidden"].dtype
    exact, exact_grads = spec(tensors, labels, torch.float64, weights, **settings)
    torchs, torchs_grads = spec(tensors, labels, dtype, weights, **settings)

    leaves = {name: tensor.requires_grad_(name in train) for name, tensor in as_type(tensors, dtype).items()}
    ours = call(linear_token_logprobs, leaves, labels, stats=stats, memory_budget=memory_budget, **settings)
    values = {"logps": ours[0], **ours[1]} if stats else {"logps": ours}
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    total = sum((values[name].reshape(-1) * w).sum() for name, w in weights.items())
    grads = dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))

    for name, value in values.items() if labels.numel() else ():
        assert value.dtype == torch.float32
        tiny = 2e-6 * max(1.0, largest(exact[name].detach()))
        assert_as_exact(value.detach().view(-1), torchs[name].detach(), exact[name].detach(), tiny, name)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        tiny = 4 * torch.finfo(torch.float32).eps * largest(exact_grads[name])
        assert_as_exact(grad, torchs_grads[name], exact_grads[name], tiny + 1e-9, f"gradient of {name}")


def largest(values):
    """The largest finite absolute value; 0 of an empty tensor."""
    return float(values.abs().nan_to_num(0, 0, 0).flatten().amax()) if values.numel() else 0.0


def budget(n, h, v, kept_share, dtype=torch.float32):
    """A memory budget that keeps this share of the forward."""
    least = next(int(word) for word in _refusal(n, h, v, dtype).split() if word.isdigit() and int(word) > 1)
    return least * 2 + int(kept_share * n * v * dtype.itemsize)


def _refusal(n, h, v, dtype):
    with pytest.raises(ValueError, match="memory_budget is 1 bytes; it should be at least") as refused:
        plan(n, v, h, dtype=dtype, memory_budget=1)
    return str(refused.value).split("at least")[1].split(":")[0]


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


def test_a_certain_label_keeps_the_precision_of_its_gradient():
    """p of the label within 1e-4 of 1: 1 - p must not be the difference of two rounded numbers."""
    tensors, labels, settings = problem(20, 16, 200, torch.bfloat16)
    tensors["weight"][labels.clamp_min(0)] += tensors["hidden"]
    check(tensors, labels, settings)
    check(tensors, labels, settings, memory_budget=budget(20, 16, 200, 0, torch.bfloat16))


def run(tensors, labels, settings, **more):
    leaves = as_type(tensors, tensors["hidden"].dtype)
    logps = call(linear_token_logprobs, leaves, labels, **settings, **more)
    return logps, torch.autograd.grad(logps.square().sum(), list(leaves.values()))


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


def test_autocast_takes_its_type():
    """fp32 master weights and bf16 hidden states, as trainers run them."""
    tensors, labels, _ = problem(9, 16, 60)
    hidden, weight = (tensors[name].clone().requires_grad_() for name in ("hidden", "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_token_logprobs(hidden.bfloat16(), weight, labels)
    expected = linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert weight.grad.dtype == torch.float32
