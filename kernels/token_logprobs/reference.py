"""The spec of ``token_logprobs`` in plain PyTorch, and the backend that runs where no other can (README.md derives it).

``spec`` is what the op means: differentiable, in the type it is given. ``forward`` and ``backward`` have the signature
that every backend of the op has; they compute in fp32 (fp64 for fp64 logits).
"""

import torch
from torch import Tensor


def softcapped(logits: Tensor, logit_softcap: float) -> Tensor:
    """``c tanh(x / c)`` of logits [...]; the logits themselves where c is 0 (no cap)."""
    return logit_softcap * torch.tanh(logits / logit_softcap) if logit_softcap else logits


def spec(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N] int64
    temperature: float | Tensor = 1.0,  # or [N]
    logit_softcap: float = 0.0,
    ignore_index: int = -100,
    topk: int = 10,
    label_set: Tensor | None = None,  # [L] int64
) -> dict[str, Tensor]:
    """Log-probs ("logps") and every statistic, each [N] and 0 at ignored rows, from one ``log_softmax``."""
    per_row = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    z = softcapped(logits, logit_softcap) / per_row
    logp = torch.log_softmax(z, dim=-1)  # [N, V]
    p = logp.exp()
    plogp = torch.where(p == 0, 0.0, p * logp)  # 0 log 0 = 0
    top = torch.topk(logp, min(topk, logits.shape[1]), dim=-1).indices  # [N, k]
    kept = labels != ignore_index
    rows = {
        "logps": logp.gather(1, torch.where(kept, labels, 0)[:, None])[:, 0],
        "logsumexp": torch.logsumexp(z, dim=-1),
        "entropy": -plogp.sum(dim=-1),
        "sum_p2": p.square().sum(dim=-1),
        "topk_mass": p.gather(1, top).sum(dim=-1),
        "topk_entropy": -plogp.gather(1, top).sum(dim=-1),
    }
    if label_set is not None:
        rows["label_set_prob"] = p[:, label_set].sum(dim=-1)
    return {name: torch.where(kept, row, 0.0) for name, row in rows.items()}


def forward(
    logits: Tensor,  # [B, T, V] any floating type, unit last stride; N = B * T
    labels: Tensor,  # [N] int64
    temperatures: Tensor | None,  # [N] float32; replaces temperature where given
    label_set: Tensor | None,  # [L] int64
    temperature: float,
    logit_softcap: float,  # 0: none
    ignore_index: int,
    topk: int,
    logps: Tensor,  # [N], written, as all that follow; float32 (float64 where the logits are)
    normalizer: Tensor,  # [2, N]: m = max_v y_v with y = softcapped logits, and log sum_v exp((y_v - m) / temperature)
    logsumexp: Tensor,  # [N]; this and every later one is empty ([0]) where it was not asked for
    entropy: Tensor,  # [N]
    sum_p2: Tensor,  # [N]
    topk_mass: Tensor,  # [N]
    topk_entropy: Tensor,  # [N]
    label_set_prob: Tensor,  # [N]
) -> None:
    """Writes 0 to every output at an ignored row; NaN to logps and normalizer[1] where a label is out of range."""
    if logps.numel() == 0:
        return
    kept = labels != ignore_index
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    y = softcapped(logits.reshape(len(labels), -1).to(logps.dtype), logit_softcap)
    m = y.amax(dim=-1)
    z = (y - m[:, None]) / (temperature if temperatures is None else temperatures[:, None])
    log_sum = z.exp().sum(dim=-1).log()
    logp = z - log_sum[:, None]

    def put(out: Tensor, row: Tensor) -> None:
        out.copy_(torch.where(kept, row, 0.0))

    picked = logp.gather(1, torch.where(in_range, labels, 0)[:, None])[:, 0]
    put(logps, torch.where(in_range, picked, torch.nan))
    put(normalizer[0], m)
    put(normalizer[1], torch.where(in_range, log_sum, torch.nan))
    if logsumexp.numel():
        put(logsumexp, m / (temperature if temperatures is None else temperatures) + log_sum)
    p = logp.exp()
    plogp = torch.where(p == 0, 0.0, p * logp)
    if entropy.numel():
        put(entropy, -plogp.sum(dim=-1))
    if sum_p2.numel():
        put(sum_p2, p.square().sum(dim=-1))
    if topk_mass.numel() or topk_entropy.numel():
        top = torch.topk(logp, min(topk, logp.shape[1]), dim=-1).indices
        if topk_mass.numel():
            put(topk_mass, p.gather(1, top).sum(dim=-1))
        if topk_entropy.numel():
            put(topk_entropy, -plogp.gather(1, top).sum(dim=-1))
    if label_set_prob.numel() and label_set is not None:
        put(label_set_prob, p[:, label_set].sum(dim=-1))


def backward(
    logits: Tensor,  # [B, T, V], as in forward
    labels: Tensor,  # [N] int64
    temperatures: Tensor | None,  # [N] float32
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    normalizer: Tensor,  # [2, N], as forward wrote it
    grad_logps: Tensor,  # [N] in the type of normalizer, contiguous
    coefs: Tensor | None,  # [3, N] a, b, c; None: a = -grad_logps, b = c = 0
    grad_logits: Tensor,  # [B, T, V] written; any row strides, or the logits themselves
) -> None:
    """``dL/dz_v = grad_logps 1[v = label] + p_v (a + b log p_v + c p_v)``, then through temperature and softcap.

    0 at ignored rows; ``p log p`` is 0 where p is.
    """
    if labels.numel() == 0:
        return
    kept = (labels != ignore_index)[:, None]
    per_row = temperature if temperatures is None else temperatures[:, None]
    y = softcapped(logits.reshape(len(labels), -1).to(normalizer.dtype), logit_softcap)
    logp = (y - normalizer[0, :, None]) / per_row - normalizer[1, :, None]
    p = logp.exp()
    if coefs is None:
        grad = -grad_logps[:, None] * p
    else:
        a, b, c = coefs[:, :, None]
        grad = p * (a + c * p) + b * torch.where(p == 0, 0.0, p * logp)
    index = labels.clamp(0, logits.shape[-1] - 1)[:, None]
    grad.scatter_add_(1, index, grad_logps[:, None])
    grad = grad / per_row
    if logit_softcap:
        grad = grad * (1 - (y / logit_softcap).square())
    grad_logits.copy_(torch.where(kept, grad, 0.0).view(logits.shape))
