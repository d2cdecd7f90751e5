"""Inputs and judge that the tests of token_logprobs' GPU kernels share, whether those run on a GPU or without one."""

import torch
from torch import Tensor

from fastpo.kernels.token_logprobs import STATS, reference, token_logprobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(n: int, vocab: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits [n, vocab] of a peaked distribution; labels [n], the first row ignored where there are several."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocab, generator=generator).mul(4).to(dtype)
    labels = torch.randint(vocab, (n,), generator=generator)
    if n > 1:
        labels[0] = -100
    return logits.to(device), labels.to(device)


def spec(logits, labels, dtype, weights, view, *, temperature=1.0, logit_softcap=None, **settings):
    """Values of the spec computed in ``dtype``, and the gradient of their weighted sum, shaped like the logits."""
    leaf = logits.detach().to(dtype)
    leaf = torch.where(leaf == -torch.inf, -1e5, leaf)  # p is 0 all the same, and autograd makes no 0 * inf of it
    leaf.requires_grad_()
    flat = view(leaf).reshape(labels.numel(), logits.shape[-1])
    temperature = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    values = reference.spec(flat, labels.reshape(-1), temperature, logit_softcap or 0.0, **settings)
    (grad,) = torch.autograd.grad(sum((values[name] * w).sum() for name, w in weights.items()), leaf)
    return {name: value.detach() for name, value in values.items()}, grad


def assert_as_exact(ours, torchs, exact, tiny: float, what: str) -> None:
    """``err <= 2 err_torch + tiny``, both against fp64, NaN where fp64 has NaN."""
    assert torch.equal(ours.isnan(), exact.isnan()), f"{what}: NaN elsewhere"
    error = (ours.double() - exact).nan_to_num(0).abs().max()
    allowed = 2 * (torchs.double() - exact).nan_to_num(0).abs().max() + tiny
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def check(logits, labels, stats=STATS[:5], inplace=False, view=lambda x: x, **settings) -> None:
    """Values, and the gradient of a weighted sum of everything differentiable, against the spec in fp64 and fp32.

    The kernels see ``view(logits)``, with the strides that it has.
    """
    generator = torch.Generator().manual_seed(1)
    differentiable = ["logps", *(name for name in STATS[:3] if name in stats)]
    weights = {name: torch.randn(labels.numel(), generator=generator).to(logits.device) for name in differentiable}
    exact, exact_grad = spec(logits, labels, torch.float64, weights, view, **settings)
    torchs, torchs_grad = spec(logits, labels, torch.float32, weights, view, **settings)

    leaf = logits.detach().clone().requires_grad_()
    ours = token_logprobs(view(leaf * 1), labels, stats=stats, inplace_backward=inplace, **settings)
    values = {"logps": ours[0], **ours[1]} if stats else {"logps": ours}
    (grad,) = torch.autograd.grad(sum((values[name].view(-1) * w).sum() for name, w in weights.items()), leaf)

    for name, value in values.items():
        scale = max(1.0, float(exact[name].abs().nan_to_num(0, 0, 0).max()))
        assert value.dtype == torch.float32
        assert_as_exact(value.detach().view(-1), torchs[name], exact[name], 1e-6 * scale, name)
    # The gradient is rounded to the type of the logits, and triton's interpreter truncates to bf16.
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[logits.dtype]
    assert grad.dtype == logits.dtype
    assert_as_exact(grad, torchs_grad, exact_grad, ulp * float(exact_grad.abs().max()) + 1e-7, "gradient")
