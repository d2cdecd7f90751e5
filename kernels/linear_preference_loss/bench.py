"""Benchmark cases of ``linear_preference_loss``: benchmarks/run.py finds and times them.

DPO + NLL from hidden states with the gradients of hidden states and head, sequences of LENGTH tokens of which the
first ones, the prompt, are masked. Peers get the rows that count alone, which few of them would find by themselves,
and so does Liger, whose batches [2P, L, H] are cut to the completions. ``torch eager, all rows`` is what trainers do
that mask the loss but not the head; memory is compared with it, that is with eager's where nothing is masked.
Reference log-probs are zeros, since Liger takes none. Peaks include the results, of which the gradient of the weight is
most: V * H * 4 bytes.

``fastpo, two phases`` is ``linear_token_logprobs`` and ``preference_loss`` at the same memory budget.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import LossPlan, linear_preference_loss, plan
from fastpo.kernels.linear_token_logprobs import bench as head_bench
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.preference_loss import preference_loss
from fastpo.types import Pairs, Segments

LENGTH, BETA = 128, 0.1
OBJECTIVE = objectives.irpo(BETA, alpha=1.0)
# Configurations that lost to another one of the same library at every point of the suites quick and full.
SLOWER = ("fastpo, two phases", "torch eager, all rows", "torch linear_cross_entropy, chunked")

KEPT_BY_MALLOC = 12  # MiB of freed blocks by which resident memory exceeds what is in use


@dataclass(frozen=True)
class Case:
    name: str
    mode: str  # "frozen head" or "trained head"
    dtype: torch.dtype
    shape: dict[str, int]  # tokens, hidden, vocab, masked: per cent of each sequence, budget: in MiB
    best_only: bool = False  # of each peer its faster configuration alone, and fastpo's
    onednn: bool = False  # products of all implementations: linear_token_logprobs/bench.py

    @property
    def prompt(self) -> int:
        """Masked tokens of each sequence."""
        return LENGTH * self.shape["masked"] // 100

    @property
    def sequences(self) -> int:
        return self.shape["tokens"] // LENGTH

    @property
    def trained_tokens(self) -> int:
        return self.sequences * (LENGTH - self.prompt)

    @property
    def budget(self) -> int:
        return self.shape["budget"] * 2**20

    def plan(self, device: str) -> LossPlan:
        """What fastpo does."""
        segments, pairs = packed(self, device)
        grads = {"head_grad": self.mode == "trained head", "memory_budget": self.budget}
        return plan(segments, pairs, self.shape["vocab"], self.shape["hidden"], dtype=self.dtype, **grads)


@dataclass
class Inputs:
    hidden: Tensor  # [N, H], N = 2P * LENGTH: first the chosen, then the rejected sequences
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    segments: Segments
    pairs: Pairs
    prompt: int
    budget: int

    @property
    def completions(self) -> tuple[Tensor, Tensor]:
        """hidden [2P, L, H] and labels [2P, L] of the tokens that count."""
        hidden = self.hidden.view(-1, LENGTH, self.hidden.shape[1])
        return hidden[:, self.prompt :], self.labels.view(-1, LENGTH)[:, self.prompt :]


GRID = ((2048, 4096), (32000, 128256), (0, 25, 60))  # tokens, vocab, masked on a CPU


def cases(suite: str, device: str) -> list[Case]:
    """grid: GRID, for which two rounds take half an hour on four cores (--rounds 2); small: milliseconds.

    full: the headline at V=32000, and GRID on oneDNN, where peers take half the time.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, tokens = (4096, 8192) if device == "cuda" else (1024, 2048)

    def case(mode: str, tokens: int, vocab: int, masked: int, hidden: int = hidden, best_only: bool = False) -> Case:
        # A tenth of what eager holds, three fp32 tensors [N, V], but not less than 192 MiB.
        budget = max(192, 3 * tokens * vocab * 4 // 10 // 2**20)
        shape = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "masked": masked, "budget": budget}
        return Case(f"{device} {mode}", mode, dtype, shape, best_only)

    modes = ("trained head", "frozen head")
    grid = [case(mode, *point, best_only=True) for point in itertools.product(*GRID) for mode in modes]
    if suite == "small":
        return [case(mode, 512, 1000, 25, hidden=64) for mode in modes]
    if suite in ("quick", "full"):
        headline = [*(case(mode, tokens, 32000, 25) for mode in modes), case("trained head", tokens, 128256, 25)]
        if suite == "full" and device == "cpu":
            return [*headline[:2], *map(head_bench.with_onednn, grid)]
        return headline
    if suite == "gpu":
        return [*(case(mode, tokens, 128256, 0) for mode in modes), case("trained head", tokens, 128256, 25)]
    return grid if suite == "grid" else []


def packed(case: Case, device: str) -> tuple[Segments, Pairs]:
    cu_seqlens = torch.arange(case.sequences + 1, device=device) * LENGTH
    mask = torch.arange(case.shape["tokens"], device=device) % LENGTH >= case.prompt
    chosen = torch.arange(case.sequences // 2, device=device)
    return Segments(cu_seqlens, mask if case.prompt else None), Pairs.of(chosen, chosen + len(chosen))


def setup(case: Case, device: str) -> Inputs:
    shape, on = case.shape, {"generator": torch.Generator(device).manual_seed(0), "device": device}
    n, h, v = shape["tokens"], shape["hidden"], shape["vocab"]
    hidden = torch.randn(n, h, **on).to(case.dtype).requires_grad_()
    weight = head_bench.head_weight(v, h, case.dtype, device).detach()
    labels = torch.randint(v, (n,), **on)
    weight.requires_grad_(case.mode == "trained head")
    return Inputs(hidden, weight, labels, *packed(case, device), case.prompt, case.budget)


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """name -> run(inputs), which returns (loss [], gradients of hidden and weight)."""

    def of(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], tuple[Tensor, ...]]:
        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            value = loss(inputs)
            leaves = [leaf for leaf in (inputs.hidden, inputs.weight) if leaf.requires_grad]
            return (value.detach(), *torch.autograd.grad(value, leaves))

        return run

    def of_logps(logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], tuple[Tensor, ...]]:
        """logps: (hidden [M, H], labels [M], weight) -> [M]."""

        def loss(inputs: Inputs) -> Tensor:
            hidden, labels = inputs.completions
            found = logps(hidden.reshape(-1, hidden.shape[2]), labels.reshape(-1), inputs.weight)
            return eager_loss(found.view(labels.shape), torch.ones_like(labels, dtype=torch.bool))

        return of(loss)

    runs = {
        "fastpo": of(fused),
        "fastpo, two phases": of(two_phases),
        "torch eager, all rows": of(all_rows),
        "torch eager": of_logps(head_bench.eager),
        "torch.compile": of_logps(head_bench.compiled()),
        **{name: of_logps(peer) for name, peer in head_bench.peers().items()},
        **{name: of(peer) for name, peer in liger().items()},
    }
    runs = {name: run for name, run in runs.items() if not (case.best_only and name in SLOWER)}
    return head_bench.on_onednn(runs) if case.onednn else runs


def fused(inputs: Inputs) -> Tensor:
    x = inputs
    zeros = torch.zeros(len(x.labels), device=x.labels.device)
    given = (x.hidden, x.weight, x.labels, zeros, x.segments, x.pairs, OBJECTIVE)
    output = linear_preference_loss(*given, memory_budget=x.budget)
    return output.loss


def two_phases(inputs: Inputs) -> Tensor:
    x = inputs
    labels = x.labels if x.segments.mask is None else torch.where(x.segments.mask, x.labels, -100)
    logps = linear_token_logprobs(x.hidden, x.weight, labels, memory_budget=x.budget)
    return preference_loss(logps, torch.zeros_like(logps), x.segments, x.pairs, OBJECTIVE).loss


def all_rows(inputs: Inputs) -> Tensor:
    logps = head_bench.eager(inputs.hidden, inputs.labels, inputs.weight).view(-1, LENGTH)
    return eager_loss(logps, (torch.arange(LENGTH, device=logps.device) >= inputs.prompt).expand(logps.shape))


def eager_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Written as one would: log-probs [2P, L] and mask [2P, L] -> []."""
    logps = torch.where(mask, logps, 0.0)
    chosen, rejected = logps.sum(1).chunk(2)
    nll = -chosen / mask[: len(chosen)].sum(1)
    return (-F.logsigmoid(BETA * (chosen - rejected)) + nll).mean()


def liger() -> dict[str, Callable[[Inputs], Tensor]]:
    """Liger's chunked DPO + NLL, compiled as it is by default, where it is installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError:
        return {}
    loss = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=True, use_ref_model=False, average_log_prob=False)

    def run(inputs: Inputs) -> Tensor:
        hidden, labels = inputs.completions
        return loss(inputs.weight, hidden, labels)[0]

    return {"liger": run}


def bytes_moved(case: Case) -> int:
    return 0  # bound by the GEMMs


def flops(case: Case) -> int:
    """Operations of the GEMMs that fastpo runs; peers' rates are given for the same number."""
    unit = 2 * case.trained_tokens * case.shape["hidden"] * case.shape["vocab"]
    return int(case.plan("cpu" if case.name.startswith("cpu") else "cuda").gemms * unit)


ceiling = head_bench.ceiling  # the bare GEMMs of the mode


def check(case: Case, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """Raises AssertionError where an implementation's loss or gradients are not fastpo's."""
    loss, *grads = outputs["fastpo"]
    tolerance = 1e-4 if case.dtype == torch.float32 else 2e-2
    for name, (other, *other_grads) in outputs.items():
        torch.testing.assert_close(other.float(), loss, rtol=tolerance, atol=tolerance, msg=f"loss of {name}")
        for ours, theirs in zip(grads, other_grads, strict=True):
            largest = head_bench.largest_difference(ours, theirs)
            assert largest <= tolerance, f"gradient of {name} is off by {largest:.1e} of its largest element"


def summary(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """What rows of results.csv come to: the least share of the bare GEMMs' rate, speed-up and saving of memory."""
    found: dict[tuple[str, str], dict[str, dict[str, Mapping[str, str]]]] = {}  # case, mode -> shape -> name -> row
    for row in rows:
        points = found.setdefault((row["case"], row["mode"]), {})
        points.setdefault(row["shape"], {})[row["implementation"]] = row
    return [line for (case, mode), points in found.items() for line in _summary_of(case, mode, points)]


def _summary_of(case: str, mode: str, points: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[str]:
    shares, speedups, ratios, over = [], [], [], []
    for shape, found in points.items():
        extra, budget = _extra_mib(mode, shape, found["fastpo"]), _sizes(shape)["budget"]
        shares.append((float(found["fastpo"]["floor_share"]), shape))
        peers = [name for name in found if not name.startswith("fastpo")]
        speedups += [(float(found[name]["speedup"]), f"{name}, {shape}") for name in peers]
        unmasked = shape.replace(f"masked={_sizes(shape)['masked']} ", "masked=0 ")
        if "torch eager" in points.get(unmasked, {}) and _sizes(shape)["vocab"] == max(GRID[1]):
            eager = float(points[unmasked]["torch eager"]["peak_mib"] or "nan")  # before there are any gradients
            ratios.append((extra / eager, shape))
        if extra > budget + KEPT_BY_MALLOC:
            over.append(f"  extra memory BEYOND the budget: {extra:.0f} MiB, {shape}")
    lines = [f"{case}, {len(points)} points", "  at least {:.0%} of the bare GEMMs' rate ({})".format(*min(shares))]
    if speedups:
        lines.append("  at least {:.2f}x as fast as any peer ({})".format(*min(speedups)))
    if ratios:
        lines.append("  at most {:.1%} of the extra memory of eager on all rows, V=128256 ({})".format(*max(ratios)))
    return lines + (over or [f"  extra memory within the stated budget at every point, to {KEPT_BY_MALLOC} MiB"])


def _sizes(shape: str) -> dict[str, int]:
    """A row's column of that name, read back."""
    return {name: int(value) for name, value in (part.split("=") for part in shape.split())}


def _extra_mib(mode: str, shape: str, row: Mapping[str, str]) -> float:
    """Peak of a row without the gradients, which are results."""
    sizes = _sizes(shape)
    results = sizes["hidden"] * (sizes["tokens"] + (sizes["vocab"] if mode == "trained head" else 0)) * 4 / 2**20
    return float(row["peak_mib"] or "nan") - results
