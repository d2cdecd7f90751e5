"""Problems for linear_token_logprobs and their judgement against fp64, for tests of every backend and device.

SHAPES take every path through the tiles of ``TILES``: one and several, a tail of one row or one vocabulary entry.
Budgets keep nothing, some or all of the forward. HEADS are the ways logits come from hidden states.
"""

import pytest
import torch

from fastpo.kernels.linear_token_logprobs import linear_token_logprobs, plan, reference

TILES = {"cpu": (16, 128), "cuda": (16, 128)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # N, H, V
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


def check(tensors, labels, settings, *, stats=(), memory_budget=None, train=LEAVES, upstream=("logps",), roundings=4):
    """Values, and the gradients of a weighted sum of ``upstream``, against the spec in fp64 and in the own type.

    ``roundings``: fp32 eps of the largest gradient that any gradient may be off beyond twice torch's error.
    """
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(labels.numel(), generator=generator).to(labels.device) for name in upstream}
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
        tiny = roundings * torch.finfo(torch.float32).eps * largest(exact_grads[name])
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


def run(tensors, labels, settings, **more):
    leaves = as_type(tensors, tensors["hidden"].dtype)
    logps = call(linear_token_logprobs, leaves, labels, **settings, **more)
    return logps, torch.autograd.grad(logps.square().sum(), list(leaves.values()))
