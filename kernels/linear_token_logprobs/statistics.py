"""From a row's sums to its log-probs and statistics, and from their gradients to the row's coefficients."""

import torch
from torch import Tensor

from fastpo.kernels.linear_token_logprobs import gemm
from fastpo.kernels.linear_token_logprobs.engine import Batch, Head
from fastpo.kernels.token_logprobs.reference import softcapped


def normalizer(largest: Tensor, sums: Tensor, inverse_temperature: Tensor) -> Tensor:
    """[3, R] c, r and mean t such that ``logp = t - r`` with ``t = (y - c) / temperature``, from m [R] and sums [3, R].

    c is where p is 1, rounded, and r what the rounding left: of a token that the model is sure of, log p is then no
    difference of large numbers.
    """
    log_sum = sums[0].log()
    m, inverse = largest.double(), inverse_temperature.double()
    centre = (m + log_sum / inverse).to(largest.dtype)
    shift = (centre.double() - m) * inverse
    return torch.stack((centre.double(), log_sum - shift, sums[1] / sums[0] - shift)).to(largest.dtype)


def row_statistics(
    stats: list[str],
    batch: Batch,
    norm: Tensor,  # [3, R] normalizer over the whole vocabulary
    sums: Tensor,  # [3, R] float64: of e^t, t e^t, e^2t over the whole vocabulary
    top: Tensor | None,  # [R, k] largest y
    set_logits: Tensor | None,  # [R, L] y of the label set
) -> dict[str, Tensor]:
    """Each statistic that is asked for, [R]."""
    inverse = batch.inverse_temperature
    centre, rest, _ = norm
    rows = {}
    if "logsumexp" in stats:
        rows["logsumexp"] = centre * inverse + rest
    if "entropy" in stats:
        rows["entropy"] = (sums[0].log() - sums[1] / sums[0]).to(norm.dtype)
    if "sum_p2" in stats:
        rows["sum_p2"] = (sums[2] / sums[0].square()).to(norm.dtype)
    if top is not None:
        logp = (top - centre[:, None]) * inverse[:, None] - rest[:, None]
        p = logp.exp()
        rows["topk_mass"] = p.sum(dim=1)
        rows["topk_entropy"] = -torch.where(p == 0, 0.0, p * logp).sum(dim=1)
    if set_logits is not None:
        logp = (set_logits - centre[:, None]) * inverse[:, None] - rest[:, None]
        rows["label_set_prob"] = logp.exp().sum(dim=1)
    return rows


def set_logits(head: Head, batch: Batch, label_set: Tensor) -> Tensor:
    """y [R, L] of the ids in label_set [L]; -inf for ids outside the head's vocabulary (another shard's)."""
    inside = (label_set >= 0) & (label_set < head.weight.shape[0])
    ids = torch.where(inside, label_set, 0)
    z = gemm.small(batch.x, head.weight[ids].t())
    if head.lora_b is not None and batch.u is not None:
        z = z + gemm.small(batch.u, head.lora_b[ids].t())
    if head.bias is not None:
        z = z + head.bias[ids]
    y = softcapped(z * head.logit_scale, head.logit_softcap)
    return torch.where(inside, y, -torch.inf)


def entry_logps(batch: Batch, norm: Tensor, picked: Tensor) -> Tensor:
    """[E] log-probs from y at the labels [E] and the rows' normalizer [3, R]."""
    owners = batch.entries.owners
    centre, rest, _ = norm
    return (picked - centre[owners]) * batch.inverse_temperature[owners] - rest[owners]


def coefficients(
    batch: Batch,
    grad_logps: Tensor,  # [E]
    grad_logsumexp: Tensor | None,  # [E], as all that follow
    grad_entropy: Tensor | None,
    grad_sum_p2: Tensor | None,
    mean_t: Tensor,  # [R] sum p t, of the normalizer
    sum_p2: Tensor | None,  # [E]
) -> Tensor:
    """[3, R] a, b, c of ``dL/dt_v = sum_e grad_e 1[v = label_e] + p_v (a + b t_v + c p_v)``."""
    total = batch.entries.sum_rows
    a = -total(grad_logps)
    b, c = torch.zeros_like(a), torch.zeros_like(a)
    if grad_logsumexp is not None:
        a = a + total(grad_logsumexp)
    if grad_entropy is not None:
        b = -total(grad_entropy)
        a = a - b * mean_t
    if grad_sum_p2 is not None and sum_p2 is not None:
        a, c = a - 2 * total(grad_sum_p2 * sum_p2), 2 * total(grad_sum_p2)
    return torch.stack((a, b, c))
