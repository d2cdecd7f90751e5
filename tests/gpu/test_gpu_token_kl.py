"""token_kl's Triton kernels on a GPU; tests/test_token_kl.py runs them in the interpreter."""

import pytest
import torch
import torch.nn.functional as F

from fastpo.kernels.token_kl import linear_token_kl, token_kl
from fastpo.kernels.token_kl.reference import Head, spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def as_exact(ours, torchs, exact, tiny):
    error, allowed = (ours.double() - exact).abs().max(), 2 * (torchs.double() - exact).abs().max() + tiny
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows, vocab", [(64, 1000), (33, 128256), (3, 151_937)])
def test_small_logits(rows, vocab, softcap, dtype, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "triton")
    logits, ref = normal(rows, vocab, scale=2, dtype=dtype), normal(rows, vocab, seed=1, scale=2, dtype=dtype)
    mask, upstream = normal(rows, seed=2) > -1, normal(rows, seed=3)
    results = []
    for wide in (torch.float64, torch.float32):
        x = logits.to(wide).requires_grad_()
        kl = spec(x, ref.to(wide), mask, Head(0.7, 1.0, softcap or 0.0))
        results.append((kl.detach(), torch.autograd.grad(kl, x, upstream.to(wide))[0]))
    x = logits.clone().requires_grad_()
    kl = token_kl(x, ref, mask=mask, temperature=0.7, logit_softcap=softcap)
    (grad,) = torch.autograd.grad(kl, x, upstream)
    exact, torchs = results
    as_exact(kl.detach(), torchs[0], exact[0], 1e-6 * exact[0].max())
    as_exact(grad, torchs[1].to(dtype), exact[1], 1e-6 * exact[1].abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_hidden(dtype):
    hidden, weight = normal(100, 256, dtype=dtype), normal(5000, 256, seed=1, scale=0.1, dtype=dtype)
    ref, ref_weight = normal(100, 128, seed=2, dtype=dtype), normal(5000, 128, seed=3, scale=0.1, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    kl = linear_token_kl(*leaves, ref, ref_weight, memory_budget=1 << 20)
    grads = torch.autograd.grad(kl.sum(), leaves)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = spec(F.linear(*wide), F.linear(ref.double(), ref_weight.double()), None, Head(1.0, 1.0, 0.0))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3  # of the largest; fp32 GEMMs may use TF32
    for own, truth in zip((kl, *grads), (exact, *torch.autograd.grad(exact.sum(), wide)), strict=True):
        assert (own.double() - truth).abs().max() <= tolerance * truth.abs().max()
