"""What ``benchmarks/run.py`` times of token_logprobs, against whom, and its floor: a bare read of the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpo.kernels.token_logprobs import token_logprobs


@dataclass(frozen=True)
class Case:
    name: str
    mode: str  # "forward" or "forward_backward"
    dtype: torch.dtype
    shape: dict[str, int]  # N rows, V columns
    settings: dict[str, Any] = field(default_factory=dict)  # keyword arguments of token_logprobs


@dataclass
class Inputs:
    logits: Tensor  # [N, V]
    source: Tensor  # [N, V] what logits are, the same tensor where nothing overwrites them
    labels: Tensor  # [N] int64
    grad: Tensor  # [N] float32, of the log-probs
    head: Tensor  # [] requires grad: stands for the parameters of the LM head


LLAMA3, QWEN2, LLAMA2 = 128256, 151936, 32000


def cases(suite: str, device: str) -> list[Case]:
    """quick: the headline shape. full: few rows, a small vocabulary, settings. gpu: the shapes peers publish."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if suite not in ("small", "quick", "full", "gpu"):
        return []
    if suite == "small":
        shapes = {"small": (64, 1000)}
    elif device == "cuda":
        shapes = {"llama3": (8192, LLAMA3), "qwen2": (8192, QWEN2), "few rows": (8, LLAMA3), "llama2": (32768, LLAMA2)}
    else:
        shapes = {"llama3": (512, LLAMA3)}
        if suite != "quick":
            shapes |= {"one row": (1, LLAMA3), "llama2": (2048, LLAMA2), "characters": (65536, 64)}
    found = [
        Case(f"{name} {mode}", mode, dtype, {"N": n, "V": v})
        for name, (n, v) in shapes.items()
        for dtype in ((bf16,) if device == "cuda" else (fp32, bf16))
        for mode in ("forward", "forward_backward")
    ]
    if suite in ("small", "quick"):
        return found
    n, v = shapes["llama3"]
    settings = {
        "entropy": {"stats": ("entropy",)},
        "every statistic": {"stats": ("logsumexp", "entropy", "sum_p2", "topk_mass", "topk_entropy")},
        "temperature": {"temperature": 0.7},
        "softcap": {"logit_softcap": 30.0},
    }
    return found + [
        Case(f"llama3 {name} forward_backward", "forward_backward", bf16, {"N": n, "V": v}, chosen)
        for name, chosen in settings.items()
    ]


def setup(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    n, vocab = case.shape["N"], case.shape["V"]
    logits = torch.empty(n, vocab, dtype=case.dtype, device=device).normal_(0, 2, generator=generator)
    labels = torch.randint(vocab, (n,), generator=generator, device=device)
    grad = torch.randn(n, generator=generator, device=device)
    source = logits.clone() if case.mode == "forward_backward" else logits
    return Inputs(logits, source, labels, grad, torch.ones((), device=device, requires_grad=True))


def refresh(case: Case, inputs: Inputs) -> None:
    """A backward in place leaves its gradient in the logits."""
    if inputs.source is not inputs.logits:
        inputs.logits.copy_(inputs.source)


class _Head(torch.autograd.Function):
    """Stands for the LM head: its output is no leaf, so that a backward may overwrite it, and costs nothing here."""

    @staticmethod
    def forward(ctx, head: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, grad_logits: Tensor) -> tuple[None, None]:
        return None, None


def _run(logps: Callable[[Tensor, Tensor], Tensor], case: Case, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """(log-probs [N], gradient of the logits [N, V] or None)."""
    if case.mode == "forward":
        with torch.no_grad():
            return logps(inputs.logits, inputs.labels), None
    logits = _Head.apply(inputs.head, inputs.logits)
    values = logps(logits, inputs.labels)
    return values.detach(), torch.autograd.grad(values, logits, inputs.grad.to(values.dtype))[0]


def _fastpo(case: Case, inplace: bool, logits: Tensor, labels: Tensor) -> Tensor:
    result = token_logprobs(logits, labels, inplace_backward=inplace, **case.settings)
    return result[0] if isinstance(result, tuple) else result


def _torch(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    """What trainers write. It rounds to the type of the logits, and computes no statistics."""
    if cap := case.settings.get("logit_softcap"):
        logits = cap * torch.tanh(logits / cap)
    if temperature := case.settings.get("temperature"):
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]


def _trl(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, labels, temperature=case.settings.get("temperature", 1.0))


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """fastpo's backward is in place; peers that are not installed, or lack what the case asks for, are absent.

    So is TRL beyond 8,192 rows, over which it loops in Python: seconds a call.
    """
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"fastpo": partial(_fastpo, case, True)}
    if case.mode == "forward_backward":
        found["fastpo out of place"] = partial(_fastpo, case, False)
    found["torch eager"] = partial(_torch, case)
    found["torch.compile"] = torch.compile(partial(_torch, case))
    if _trl_installed() and "logit_softcap" not in case.settings and case.shape["N"] <= 8192:
        found["trl"] = partial(_trl, case)
    return {name: partial(_run, logps, case) for name, logps in found.items()}


def _trl_installed() -> bool:
    try:
        from trl.trainer.utils import selective_log_softmax  # noqa: F401
    except ImportError:
        return False
    return True


def ceiling(case: Case) -> tuple[Callable[[Inputs], Any], int]:
    """A bare read of the logits, and its bytes."""
    return lambda inputs: inputs.logits.sum(), _logits_bytes(case)


def bytes_moved(case: Case) -> int:
    """Forward reads the logits; backward reads them and writes the gradient."""
    return _logits_bytes(case) * (3 if case.mode == "forward_backward" else 1)


def _logits_bytes(case: Case) -> int:
    return case.shape["N"] * case.shape["V"] * case.dtype.itemsize


def flops(case: Case) -> int:
    """0: it is bytes that count."""
    return 0


def check(case: Case, inputs: Inputs, outputs: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    """The first 16 rows against fp64; peers may be off by what rounding to the type of the logits costs."""
    rows = slice(0, 16)
    logits = inputs.logits[rows].double().requires_grad_()
    truth = _torch(case, logits, inputs.labels[rows])
    (truth_grad,) = torch.autograd.grad(truth, logits, inputs.grad[rows].double())
    for name, (logps, grad) in outputs.items():
        rounding = 1e-6 if name.startswith("fastpo") else 4 * torch.finfo(case.dtype).eps
        error = ((logps[rows].double() - truth) / truth.abs()).abs().max().item()
        assert error <= rounding, f"{name}: log-probs off by {error:.1e}"
        if grad is None:
            continue
        scale = truth_grad.abs().max()
        error = ((grad[rows].double() - truth_grad).abs().max() / scale).item()
        allowed = 1e-6 + 4 * torch.finfo(case.dtype).eps
        assert error <= allowed, f"{name}: gradient off by {error:.1e}"
