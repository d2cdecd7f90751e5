"""Benchmark cases of ``linear_token_logprobs``: benchmarks/run.py finds and times them.

Log-probs of given labels from hidden states, and the gradients for an arbitrary upstream gradient per token. Every peer
gets the rows that count alone, which only some of them would find by themselves. ``trl`` is the head of TRL 1.16's
trainers, ``cut-cross-entropy`` its implementation for machines without a GPU, ``torch linear_cross_entropy`` torch
2.13's, in full and in chunks. Liger's log-probs per token are timed on a GPU only: elsewhere they are plain PyTorch.
The mode "trained head, mean loss" is cross-entropy, for quack and Liger, whose fastest heads know nothing else.

Cases called "oneDNN" run every implementation on the library that fastpo takes for its fp32 products, which on AMD
processors is 2.5 times as fast as MKL, torch's choice; the others run each on what it takes by itself.

The ceiling is the bare GEMMs of the mode, tile by tile, at the rate of the fastest GEMM that torch has here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels.linear_token_logprobs import linear_token_logprobs, plan


@dataclass(frozen=True)
class Case:
    name: str
    mode: str  # "no gradient", "frozen head", "trained head" or MEAN_LOSS
    dtype: torch.dtype
    shape: dict[str, int]  # tokens, hidden, vocab, masked: per cent of the tokens
    onednn: bool = False  # products of all implementations

    @property
    def trained_tokens(self) -> int:
        return self.shape["tokens"] - self.shape["tokens"] * self.shape["masked"] // 100

    @property
    def device(self) -> str:
        return "cpu" if self.name.startswith("cpu") else "cuda"


@dataclass
class Inputs:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    upstream: Tensor  # [N] dL/dlogps

    @property
    def compact(self) -> tuple[Tensor, Tensor]:
        """hidden and labels of the rows that count."""
        kept = self.labels != -100
        return self.hidden[kept], self.labels[kept]


MODES = ("no gradient", "frozen head", "trained head")
MEAN_LOSS = "trained head, mean loss"


def cases(suite: str, device: str) -> list[Case]:
    """grid: the mode without gradient; the others' grid is that of linear_preference_loss. small: milliseconds.

    full: the grid, of oneDNN on a CPU.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, tokens = (4096, 8192) if device == "cuda" else (1024, 2048)

    def case(mode: str, tokens: int, vocab: int, masked: int, hidden: int = hidden) -> Case:
        shape = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "masked": masked}
        return Case(f"{device} {mode}", mode, dtype, shape)

    grid = [case("no gradient", n, vocab, 25) for n in (2048, 4096) for vocab in (32000, 128256)]
    if suite == "small":
        return [case(mode, 256, 1000, 25, hidden=64) for mode in MODES]
    if suite == "full" and device == "cpu":
        return [grid[0], *map(with_onednn, grid)]
    if suite in ("quick", "full"):
        return [*(case(mode, tokens, 32000, 25) for mode in MODES), case("trained head", tokens, 128256, 25)]
    if suite == "gpu":
        modes = ("trained head", "frozen head", "no gradient")
        largest = [case(mode, tokens, 128256, 0) for mode in modes]
        return [*largest, case(MEAN_LOSS, 4096, 128256, 0), case("trained head", tokens, 128256, 25)]
    return grid if suite == "grid" else []


def with_onednn(case: Any) -> Any:
    """The case with the products of all implementations on oneDNN."""
    return replace(case, name=f"{case.name}, oneDNN", onednn=True)


@lru_cache(maxsize=2)
def head_weight(vocab: int, hidden: int, dtype: torch.dtype, device: str) -> Tensor:
    """[V, H], one for all cases of a size: drawing a large one takes longer than most calls."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(vocab, hidden, generator=generator, device=device).mul_(2 * hidden**-0.5).to(dtype)


def setup(case: Case, device: str) -> Inputs:
    shape, generator = case.shape, torch.Generator(device).manual_seed(0)
    n, h, v = shape["tokens"], shape["hidden"], shape["vocab"]
    on: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(n, h, **on).to(case.dtype)
    weight = head_weight(v, h, case.dtype, device).detach()
    labels = torch.randint(v, (n,), **on)
    labels[torch.randperm(n, **on)[case.trained_tokens :]] = -100
    upstream = torch.rand(n, **on).div(n)
    if case.mode != "no gradient":
        hidden.requires_grad_()
        weight.requires_grad_(case.mode.startswith("trained head"))
    return Inputs(hidden, weight, labels, upstream)


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """name -> run(inputs), which returns (logps of the rows that count or their mean, gradients of hidden, weight)."""
    mean = case.mode == MEAN_LOSS

    def of(logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Any]:
        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            return _run(inputs, logps(*inputs.compact, inputs.weight), inputs.upstream[inputs.labels != -100], mean)

        return run

    def fastpo(inputs: Inputs) -> tuple[Tensor, ...]:
        logps = linear_token_logprobs(inputs.hidden, inputs.weight, inputs.labels)
        return _run(inputs, logps, inputs.upstream, mean)

    runs = {"fastpo": fastpo, "torch eager": of(eager), "torch.compile": of(compiled())}
    runs |= {name: of(peer) for name, peer in (peers() | (mean_peers() if mean else {})).items()}
    return on_onednn(runs) if case.onednn else runs


def on_onednn(runs: dict[str, Callable[[Any], Any]]) -> dict[str, Callable[[Any], Any]]:
    """``runs`` with their fp32 products on oneDNN; without what lost to another way of the same library everywhere.

    Processors with AMX are left on MKL, their fastest library for fp32, since oneDNN would round to bf16 there.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    def chosen(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(inputs: Any) -> Any:
            before = settings.fp32_precision
            settings.fp32_precision = before if torch.cpu._is_amx_tile_supported() else "bf16"
            try:
                return run(inputs)
            finally:
                settings.fp32_precision = before

        return call

    return {name: chosen(run) for name, run in runs.items() if name != "torch linear_cross_entropy, chunked"}


def _run(inputs: Inputs, logps: Tensor, upstream: Tensor, mean: bool) -> tuple[Tensor, ...]:
    leaves = [leaf for leaf in (inputs.hidden, inputs.weight) if leaf.requires_grad]
    if mean:
        value = logps.mean()
        return (value.detach(), *torch.autograd.grad(value, leaves))
    grads = torch.autograd.grad(logps, leaves, upstream.to(logps.dtype)) if leaves else ()
    return (logps.detach(), *grads)


def eager(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Written as one would: hidden [N, H], labels [N] -> [N]."""
    return torch.log_softmax((hidden @ weight.t()).float(), dim=-1).gather(1, labels[:, None])[:, 0]


def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``eager`` for any number of rows: measured as fast as for a fixed one, and compiled once for all cases."""
    return torch.compile(eager, dynamic=True)


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is installed of: (hidden [N, H], labels [N], weight) -> logps [N]."""
    found = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda h, y, w: -F.linear_cross_entropy(h, w, y, reduction="none")
        found["torch linear_cross_entropy, chunked"] = lambda h, y, w: (
            -F.linear_cross_entropy(h, w, y, reduction="none", options=options)
        )
    try:
        from trl.kernels import ChunkedLogProbFunction

        found["trl"] = lambda h, y, w: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0]
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if torch.cuda.is_available() else "torch_compile"
        found["cut-cross-entropy"] = lambda h, y, w: -linear_cross_entropy(h, w, y, reduction="none", impl=impl)
    except ImportError:
        pass
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        if torch.cuda.is_available():
            found["liger"] = lambda h, y, w: -_first(LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y))
    except ImportError:
        pass
    return found


def mean_peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is installed of: (hidden [N, H], labels [N], weight) -> mean log-prob []."""
    found = {}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        found["liger, mean loss"] = lambda h, y, w: -_first(LigerFusedLinearCrossEntropyFunction.apply(h, w, y))
    except ImportError:
        pass
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        found["quack"] = lambda h, y, w: -chunked_linear_cross_entropy(h, w, y)
    except ImportError:
        pass
    return found


def _first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def bytes_moved(case: Case) -> int:
    return 0  # bound by the GEMMs


def flops(case: Case) -> int:
    """Operations of the GEMMs that fastpo runs; peers' rates are given for the same number."""
    return int(_gemms(case) * 2 * case.trained_tokens * case.shape["hidden"] * case.shape["vocab"])


def _gemms(case: Case) -> float:
    shape = case.shape
    return plan(
        case.trained_tokens,
        shape["vocab"],
        shape["hidden"],
        dtype=case.dtype,
        device=case.device,
        hidden_grad=case.mode != "no gradient",
        head_grad=case.mode.startswith("trained head"),
    ).gemms


def ceiling(case: Case) -> tuple[Callable[[Inputs], Any], int]:
    """The GEMMs that the mode needs at least, on tiles whose operands are at hand, and their operations."""
    least, on_gpu = {"no gradient": 1, "frozen head": 2}.get(case.mode, 3), case.name.startswith("cuda")
    vocab = case.shape["vocab"]
    rows, width = (8192, min(8192, vocab)) if on_gpu else (2048, 1024)
    rows = min(rows, case.trained_tokens)

    def run(inputs: Inputs) -> None:
        x = inputs.hidden.detach()[:rows].contiguous()
        d = x.new_zeros(width, rows) if least == 3 or on_gpu else None
        if d is not None and on_gpu:
            d.normal_()  # zeros take less power, and their products are faster
        for start in range(0, vocab * case.trained_tokens // rows, width):
            w = inputs.weight.detach()[start % max(1, vocab - width) :][:width]
            z = library_product(x, w)
            if least > 1:
                library_product(z if d is None or not on_gpu else d.t(), w.t())
            if least == 3 and d is not None:
                library_product(d, x.t())

    columns = len(range(0, vocab * case.trained_tokens // rows, width)) * width
    return run, 2 * least * rows * columns * case.shape["hidden"]


def library_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [N, K] -> a b^T [M, N] by the fastest library here that torch has: oneDNN, where it is MKL else."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t()) if a.dtype == torch.float32 else torch.mm(a, b.t(), out_dtype=torch.float32)


def check(case: Case, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """Raises AssertionError where an implementation's log-probs or gradients are not fastpo's."""
    logps, *grads = outputs["fastpo"]
    kept = inputs.labels != -100
    tolerance = 1e-4 if case.dtype == torch.float32 else 2e-2
    for name, (other, *other_grads) in outputs.items():
        if name.startswith("fastpo"):
            continue
        torch.testing.assert_close(
            other.float(),
            logps if logps.dim() == 0 else logps[kept],
            rtol=tolerance,
            atol=tolerance,
            msg=f"logps of {name}",
        )
        for ours, theirs in zip(grads, other_grads, strict=True):
            largest = largest_difference(ours, theirs)
            assert largest <= tolerance, f"gradient of {name} is off by {largest:.1e} of its largest element"


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Between two gradients, relative to the largest element of ours; NaN if there is one in either."""
    scale, apart = (torch.maximum(*(abs(end) for end in x.aminmax())).float() for x in (ours, theirs - ours))
    return (apart / scale.clamp_min(1e-30)).item()
