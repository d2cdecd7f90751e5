"""Benchmark cases of ``preference_loss``: benchmarks/run.py finds and times them.

The peers work on padded batches [2P, L], chosen first, as TRL does; fastpo on the same tokens packed. ``trl`` is what
TRL 1.16's DPOTrainer computes from per-token log-probs to the loss, for its losses "sigmoid" and "sigmoid" + "sft": it
expects log-probs that are 0 at masked positions, as its fused head gives them, and its gradient of a sum is a view of
stride 0, written by whoever reads it. ``trl + mask`` multiplies by the completion mask first, as the trainer does with
ld_alpha and as log-probs from anywhere else need. (The method itself cannot be timed apart from its metrics;
tests/test_objectives_trl.py calls it.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import Objective
from fastpo.types import Pairs, PreferenceOutput, Segments

BETA = 0.1
_FLOATS = {"forward": 2, "forward_backward": 3}  # of a token that have to be moved
OBJECTIVES = {"dpo": objectives.dpo(BETA), "irpo": objectives.irpo(BETA, alpha=1.0)}


@dataclass(frozen=True)
class Case:
    name: str
    mode: str  # "forward" or "forward_backward"
    dtype: torch.dtype
    shape: dict[str, int]  # pairs, tokens: per sequence; masked: prompt tokens among them; ragged: 1 for mixed lengths

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.name.split()[0]]


@dataclass
class Inputs:
    logps: Tensor  # [T] packed, requires grad
    ref_logps: Tensor  # [T]
    segments: Segments
    pairs: Pairs
    padded: Tensor  # [2P, L], requires grad; 0 where masked
    ref_padded: Tensor  # [2P, L]
    mask: Tensor  # [2P, L] int64, as TRL's collator makes it


def cases(suite: str, device: str) -> list[Case]:
    if suite not in ("small", "quick", "full", "gpu"):
        return []
    large, small = {"pairs": 4096, "tokens": 256}, {"pairs": 8, "tokens": 64}
    if device == "cuda":
        large = {"pairs": 8192, "tokens": 1024}
    plain, ragged = {"masked": 0, "ragged": 0}, {"masked": 0, "ragged": 1}
    prompts = {"masked": large["tokens"] // 8, "ragged": 0}
    if suite == "small":
        return [Case(f"{name} small", "forward_backward", torch.float32, small | plain) for name in OBJECTIVES]
    chosen = [
        Case("dpo", "forward_backward", torch.float32, large | plain),
        Case("dpo masked", "forward_backward", torch.float32, large | prompts),
        Case("irpo masked", "forward_backward", torch.float32, large | prompts),
        Case("dpo small", "forward_backward", torch.float32, small | plain),
    ]
    if suite == "quick":
        return chosen
    return [
        *chosen,
        Case("dpo ragged", "forward_backward", torch.float32, large | ragged),
        Case("dpo masked", "forward", torch.float32, large | prompts),
        Case("irpo small", "forward_backward", torch.float32, small | plain),
    ]


def setup(case: Case, device: str) -> Inputs:
    shape, generator, real = case.shape, torch.Generator().manual_seed(0), _real(case)
    mask = real & (torch.arange(shape["tokens"]) >= shape["masked"])
    padded, ref_padded = (torch.rand(real.shape, generator=generator).sub(1.01) * mask for _ in range(2))
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0))
    segments = Segments(cu_seqlens, mask[real] if shape["masked"] else None)
    chosen = torch.arange(shape["pairs"])
    return Inputs(
        padded[real].to(device).requires_grad_(),
        ref_padded[real].to(device),
        segments.to(device),
        Pairs.of(chosen, chosen + shape["pairs"]).to(device),
        padded.to(device).requires_grad_(),
        ref_padded.to(device),
        mask.long().to(device),
    )


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """name -> run(inputs), which returns (loss [], gradient by the log-probs or None)."""
    backward, objective = case.mode == "forward_backward", case.objective

    def of(loss: Callable[[Inputs], Tensor], leaf: str) -> Callable[[Inputs], Any]:
        def run(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
            if not backward:
                with torch.no_grad():
                    return loss(inputs), None
            value = loss(inputs)
            return value.detach(), torch.autograd.grad(value, getattr(inputs, leaf))[0]

        return run

    compiled = torch.compile(eager_loss, dynamic=False)
    return {
        "fastpo": of(lambda x: fastpo_output(x, objective).loss, "logps"),
        "torch eager": of(lambda x: eager_loss(x.padded, x.ref_padded, x.mask, objective), "padded"),
        "torch.compile": of(lambda x: compiled(x.padded, x.ref_padded, x.mask, objective), "padded"),
        "trl": of(lambda x: trl_loss(x.padded, x.ref_padded, x.mask, objective), "padded"),
        "trl + mask": of(lambda x: trl_loss(x.padded * x.mask, x.ref_padded * x.mask, x.mask, objective), "padded"),
    }


def fastpo_output(inputs: Inputs, objective: Objective) -> PreferenceOutput:
    return preference_loss(inputs.logps, inputs.ref_logps, inputs.segments, inputs.pairs, objective)


def eager_loss(logps: Tensor, ref_logps: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    """Written as one would: [2P, L] -> []."""
    mask = mask.bool()
    ratios = torch.where(mask, logps - ref_logps, 0.0).sum(1)
    chosen, rejected = ratios.chunk(2)
    losses = -F.logsigmoid(BETA * (chosen - rejected))
    if objective.nll:
        half = len(logps) // 2
        losses = losses - torch.where(mask[:half], logps[:half], 0.0).sum(1) / mask[:half].sum(1)
    return losses.mean()


def trl_loss(per_token_logps: Tensor, ref_per_token_logps: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    """The operations of DPOTrainer._compute_loss, in its order, its losses added up as it does. [2P, L] -> []."""
    chosen_logps, rejected_logps = per_token_logps.sum(dim=1).chunk(2, dim=0)
    ref_chosen_logps, ref_rejected_logps = ref_per_token_logps.sum(dim=1).chunk(2, dim=0)
    chosen_logratios = chosen_logps - ref_chosen_logps
    rejected_logratios = rejected_logps - ref_rejected_logps
    delta_score = chosen_logratios - rejected_logratios
    loss = (-F.logsigmoid(BETA * delta_score)).mean()
    if objective.nll:
        chosen_mask, _ = mask.chunk(2, dim=0)
        chosen_per_token_logps, _ = per_token_logps.chunk(2, dim=0)
        batch_loss = -chosen_per_token_logps[chosen_mask.bool()].mean()
        loss = loss + batch_loss.expand(chosen_per_token_logps.size(0)).mean()
    return loss


def bytes_moved(case: Case) -> int:
    """The floor: log-probs and reference read once, the gradient written once, the mask read in either pass."""
    masks = (1 if case.mode == "forward" else 2) if case.shape["masked"] else 0
    return _tokens(case) * (_FLOATS[case.mode] * 4 + masks)


def flops(case: Case) -> int:
    return 0  # bound by memory


def ceiling(case: Case) -> tuple[Callable[[Inputs], Any], int]:
    """Reads and writes of the floor's floats by torch's fastest operations, and their bytes."""

    def run(inputs: Inputs) -> Any:
        sums = inputs.logps.detach().sum(), inputs.ref_logps.sum()
        return sums, torch.ones_like(inputs.logps) if case.mode == "forward_backward" else None

    return run, _tokens(case) * _FLOATS[case.mode] * 4


def check(case: Case, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """Raises AssertionError where an implementation's loss or gradient is not fastpo's."""
    loss, grad = outputs["fastpo"]
    real = _real(case).to(inputs.mask.device)
    for name, (other_loss, other_grad) in outputs.items():
        torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-6, msg=f"loss of {name}")
        if grad is not None and name != "fastpo":
            packed = (other_grad * inputs.mask)[real]
            torch.testing.assert_close(packed, grad, rtol=1e-3, atol=1e-9, msg=f"gradient of {name}")


def _real(case: Case) -> Tensor:
    """[2P, L] bool, False where the batch is padded."""
    rows, width = 2 * case.shape["pairs"], case.shape["tokens"]
    lengths = torch.full((rows,), width)
    if case.shape["ragged"]:
        lengths = torch.randint(width // 8, width + 1, (rows,), generator=torch.Generator().manual_seed(1))
    return torch.arange(width) < lengths[:, None]


def _tokens(case: Case) -> int:
    return int(_real(case).sum())
