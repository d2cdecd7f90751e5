"""The spec of ``linear_preference_loss`` in plain PyTorch: all the logits, then the spec of ``preference_loss``."""

from dataclasses import replace

import torch
from torch import Tensor

from fastpo.kernels.linear_token_logprobs import reference as from_hidden
from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import Objective
from fastpo.types import Pairs, PreferenceOutput, Segments


def spec(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    ref_logps: Tensor | None,  # [T]
    segments: Segments,
    pairs: Pairs,
    objective: Objective,
    *,
    ref_hidden: Tensor | None = None,  # [N, H']
    ref_weight: Tensor | None = None,  # [V, H']
    ref_bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    **head,  # bias, rows, temperature, logit_scale, logit_softcap, lora
) -> PreferenceOutput:
    """Differentiable, in the type it is given."""
    mask = labels != ignore_index
    if segments.mask is not None:
        mask = mask & segments.mask
    labels = torch.where(mask, labels, ignore_index)
    if ref_hidden is not None:
        own = {name: value for name, value in head.items() if name not in ("bias", "lora")}
        own["bias"] = head.get("bias") if ref_weight is None else ref_bias
        of = (ref_hidden, weight if ref_weight is None else ref_weight, labels)
        ref_logps = from_hidden.spec(*of, ignore_index=ignore_index, **own)["logps"].detach()
    logps = from_hidden.spec(hidden, weight, labels, ignore_index=ignore_index, **head)["logps"]
    return preference_loss(logps, ref_logps, replace(segments, mask=mask), pairs, objective)
