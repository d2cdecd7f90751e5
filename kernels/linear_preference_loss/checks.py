"""What ``linear_preference_loss`` refuses beyond what its two halves refuse: one line each, before any work."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.kernels.common.checks import check_plain
from fastpo.kernels.linear_token_logprobs.checks import check_operands, check_settings
from fastpo.kernels.preference_loss.checks import check_loss
from fastpo.objectives import Objective
from fastpo.types import Pairs, Segments

TOKEN_LOGPS = "logps"  # besides the names of the statistics
REFERENCE = ("ref_hidden", "ref_weight", "ref_bias")


def check_loss_and_stats(
    hidden: Tensor,  # [..., H]
    labels: Tensor,  # of T elements
    ref_logps: Tensor | None,  # [T]
    segments: Segments,
    pairs: Pairs,
    objective: Objective,
    stats: Sequence[str],
    settings: tuple,  # temperature, logit_scale, logit_softcap
    topk: int,
    label_set: Tensor | None,  # [L]
    memory_budget: int | None,
) -> None:
    """What can be told from types and shapes alone; the head's operands are checked by ``check_tensors``."""
    of_head = stats if isinstance(stats, str) else tuple(name for name in stats if name != TOKEN_LOGPS)
    check_settings(hidden, *settings, of_head, topk, label_set, memory_budget)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logps = torch.empty(labels.numel(), dtype=dtype, device=labels.device)
    check_loss(logps, ref_logps, segments, pairs, objective, None)


def check_reference_given(
    ref_logps: Tensor | None,  # [T]
    ref_hidden: Tensor | None,  # [..., H']
    ref_weight: Tensor | None,  # [V', H']
    ref_bias: Tensor | None,  # [V']
    objective: Objective,
) -> None:
    """A reference is given once: as log-probs, or as hidden states with a head."""
    if ref_logps is not None:
        check_plain("ref_logps", ref_logps)
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} is given without ref_hidden; it is the head of the reference's hidden states")
        return
    if ref_logps is not None:
        raise ValueError("ref_logps and ref_hidden are both given; the reference should be given once")
    if isinstance(objective, Objective) and not objective.needs_reference:
        raise ValueError(f"ref_hidden is given; objective {objective.name} has no reference, pass None")
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias is given without ref_weight; the policy's weight comes with the policy's bias")


def check_reference(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    ref_hidden: Tensor,  # [..., H']
    ref_weight: Tensor,  # [V', H']
    ref_bias: Tensor | None,  # [V']
    shared: bool,
) -> None:
    """The reference's hidden states and head go with the policy's; ``shared``: it is the policy's own head."""
    if ref_hidden.requires_grad:
        raise ValueError("ref_hidden requires grad; the reference is a constant, pass ref_hidden.detach()")
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_hidden.device != hidden.device:
        wanted = f"{list(hidden.shape[:-1])} rows on {hidden.device}, as hidden"
        raise ValueError(
            f"ref_hidden has {list(ref_hidden.shape[:-1])} rows on {ref_hidden.device}; it should have {wanted}"
        )
    name = "weight, which is the reference's too," if shared else "ref_weight"
    check_operands(ref_hidden, ref_weight, ref_bias, ("ref_hidden", name, "ref_bias"))
    if ref_weight.shape[0] != weight.shape[0]:
        wanted = f"[{weight.shape[0]}, {ref_hidden.shape[-1]}], weight being {list(weight.shape)}"
        raise ValueError(f"ref_weight has shape {list(ref_weight.shape)}; it should be {wanted}")
