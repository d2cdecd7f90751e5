"""What ``benchmarks/run.py`` times of token_kl and linear_token_kl: the KL term of TDPO and SparsePO, with gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels.token_kl import linear_token_kl, token_kl


@dataclass(frozen=True)
class Case:
    name: str
    mode: str  # "forward" or "forward_backward" from logits; "frozen head" or "trained head" from hidden states
    dtype: torch.dtype
    shape: dict[str, int]  # N rows, V vocabulary entries, H hidden size where there is one


@dataclass
class Inputs:
    logits: Tensor  # [N, V], or hidden states [N, H]
    ref_logits: Tensor  # the same of the reference
    weight: Tensor | None  # [V, H]
    ref_weight: Tensor | None  # [V, H]
    grad: Tensor  # [N] of K


def cases(suite: str, device: str) -> list[Case]:
    """From logits and from hidden states, with gradient; small vocabularies in the suite "small"."""
    if suite not in ("small", "quick", "full", "gpu"):
        return []
    rows, vocab, hidden = (
        (32, 500, 16) if suite == "small" else (2048, 128256, 4096) if device == "cuda" else (256, 128256, 512)
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = {"N": rows, "V": vocab}
    found = [Case("from logits", "forward_backward", dtype, sizes)]
    if suite != "quick":
        found.insert(0, Case("from logits", "forward", dtype, sizes))
    heads = ("frozen head",) if suite == "quick" else ("frozen head", "trained head")
    return found + [Case("from hidden", mode, dtype, sizes | {"H": hidden}) for mode in heads]


def setup(case: Case, device: str) -> Inputs:
    """A reference, and a policy that has moved a little."""
    generator = torch.Generator(device).manual_seed(0)
    n, vocab, hidden = case.shape["N"], case.shape["V"], case.shape.get("H")

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.empty(shape, dtype=case.dtype, device=device).normal_(0, scale, generator=generator)

    grad = torch.randn(n, generator=generator, device=device)
    if hidden is None:
        ref = normal(n, vocab, scale=2.0)
        return Inputs((ref + normal(n, vocab, scale=0.1)).requires_grad_(), ref, None, None, grad)
    ref, ref_weight = normal(n, hidden, scale=1.0), normal(vocab, hidden, scale=2 * hidden**-0.5)
    weight = ref_weight + normal(vocab, hidden, scale=0.1 * hidden**-0.5)
    own = ref.clone().requires_grad_()
    return Inputs(own, ref, weight.requires_grad_(case.mode == "trained head"), ref_weight, grad)


def _torch(logits: Tensor, ref_logits: Tensor, weight: Tensor | None, ref_weight: Tensor | None) -> Tensor:
    """What trainers write; the reference's logits without gradient."""
    if weight is not None and ref_weight is not None:
        logits = F.linear(logits, weight)
        with torch.no_grad():
            ref_logits = F.linear(ref_logits, ref_weight)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, logq = logits.to(wide).log_softmax(-1), ref_logits.to(wide).log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)


def _fastpo(logits: Tensor, ref_logits: Tensor, weight: Tensor | None, ref_weight: Tensor | None) -> Tensor:
    if weight is None or ref_weight is None:
        return token_kl(logits, ref_logits)
    return linear_token_kl(logits, weight, ref_logits, ref_weight)


def _run(kl: Callable[..., Tensor], case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """K [N], and the gradients that the mode asks for."""
    models = inputs.logits, inputs.ref_logits, inputs.weight, inputs.ref_weight
    if case.mode == "forward":
        with torch.no_grad():
            return (kl(*models),)
    values = kl(*models)
    leaves = [x for x in (inputs.logits, inputs.weight) if x is not None and x.requires_grad]
    return (values.detach(), *torch.autograd.grad(values, leaves, inputs.grad))


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    found = {"fastpo": _fastpo, "torch eager": _torch, "torch.compile": torch.compile(_torch)}
    return {name: partial(_run, kl, case) for name, kl in found.items()}


def flops(case: Case) -> int:
    """F = 2 N H V: both models' logits, and what dhidden and dweight cost; 0 from logits, where bytes count."""
    gemms = {"frozen head": 3, "trained head": 4}.get(case.mode, 0)
    return gemms * 2 * case.shape["N"] * case.shape["V"] * case.shape.get("H", 0)


def bytes_moved(case: Case) -> int:
    """Both logits read once; backward: read once more, and one gradient written."""
    return case.shape["N"] * case.shape["V"] * case.dtype.itemsize * (2 if case.mode == "forward" else 5)


def check(case: Case, inputs: Inputs, outputs: dict[str, tuple[Tensor, ...]]) -> None:
    """The first 8 rows of K against fp64; gradients, where there are some, against the other implementation's."""
    rows = slice(0, 8)
    with torch.no_grad():
        weights = (x if x is None else x.double() for x in (inputs.weight, inputs.ref_weight))
        truth = _torch(inputs.logits[rows].double(), inputs.ref_logits[rows].double(), *weights).float()
    for name, (kl, *_) in outputs.items():
        # PyTorch's sum cancels (README.md); logits of 16 bits are what the head of a peer rounds to.
        rounding = 2e-2 if case.dtype == torch.bfloat16 and "H" in case.shape else 2e-5 if name == "fastpo" else 1e-3
        error = ((kl[rows].float() - truth) / truth).abs().max().item()
        assert error <= rounding, f"{name}: K off by {error:.1e}"
    first, *others = outputs.values()
    for other in others:
        for ours, theirs in zip(first[1:], other[1:], strict=True):
            scale = 5e-2 if case.dtype == torch.bfloat16 else 1e-3
            assert (ours - theirs).abs().max() <= scale * theirs.abs().max(), "gradients differ"
