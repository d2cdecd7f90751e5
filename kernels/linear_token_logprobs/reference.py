"""The spec of ``linear_token_logprobs`` in plain PyTorch, and the tile functions that run where no faster ones can.

``spec`` is what the op means: differentiable, in the type it is given, with the logits in full. The other functions are
the work between the GEMMs, on one tile of R rows and v vocabulary entries; every backend has them with these signatures
(README.md derives them). Notation: z a GEMM's output, y = softcap(logit_scale (z + bias)), t = (y - m) / temperature.
"""

import torch
from torch import Tensor

from fastpo.kernels.token_logprobs import reference as from_logits


def spec(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [M] int64
    *,
    bias: Tensor | None = None,  # [V]
    rows: Tensor | None = None,  # [M] int64
    temperature: float | Tensor = 1.0,  # or [N]
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    topk: int = 10,
    label_set: Tensor | None = None,  # [L] int64
    lora: tuple[Tensor, Tensor, float] | None = None,  # A [r, H], B [V, r], scale
) -> dict[str, Tensor]:
    """Log-probs ("logps") and every statistic, each [M], from all the logits."""
    if rows is not None:
        rows = torch.where(labels == ignore_index, 0, rows)
        hidden = hidden[rows]
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    logits = torch.nn.functional.linear(hidden, weight, bias)  # [M, V]
    if lora is not None:
        a, b, scale = lora
        logits = logits + scale * (hidden @ a.T) @ b.T
    return from_logits.spec(
        logits * logit_scale, labels, temperature, logit_softcap or 0.0, ignore_index, topk, label_set
    )


def forward(
    z: Tensor,  # [R, v]; overwritten
    out: Tensor | None,  # [R, v]: e^t dy/dz without its factor logit_scale / temperature; 0 at the rows' own labels
    kept: Tensor | None,  # [R, v]: the same, for the backward
    bias: Tensor | None,  # [v]
    inverse_temperature: Tensor,  # [R]
    starts: Tensor,  # [R+1] int64: the entries of row i are starts[i]:starts[i+1]
    labels: Tensor,  # [E] int64
    start: int,  # vocabulary entry of the tile's first column
    logit_scale: float,
    logit_softcap: float,  # 0: none
    headroom: float,  # how far t may be above 0
    largest: Tensor,  # [R]: m; -inf before the first tile; raised to this tile's largest y where headroom would not do
    sums: Tensor,  # [3, R] float64: of e^t, t e^t (t finite) and e^2t over the tiles so far, updated
    decay: Tensor,  # [R], written: what sums relative to m before this tile are multiplied with
    picked: Tensor,  # [E]: y at the labels that are in this tile, written
    top: Tensor | None,  # [R, k]: the largest y so far in descending order, updated
    moments: bool,  # whether sums[1:] are wanted
) -> None:
    """The logits of one more tile: statistics so far, and out."""
    y = z if bias is None else z + bias
    y = from_logits.softcapped(y * logit_scale, logit_softcap)
    highest = y.amax(dim=1)
    highest = torch.where((highest - largest) * inverse_temperature > headroom, highest, largest)
    finite = torch.where(highest == -torch.inf, 0.0, highest)  # of nothing but -inf: any finite m makes zeros of them
    shift = torch.where(largest == highest, 0.0, (largest - finite) * inverse_temperature).clamp_min(-1e4)
    decay.copy_(shift.exp())
    t = ((y - finite[:, None]) * inverse_temperature[:, None]).clamp_min(-1e4)
    e = t.exp()
    if moments:
        sums[1] = (sums[1] + sums[0] * shift) * decay + (t * e).sum(dim=1)
        sums[2] = sums[2] * decay * decay + e.square().sum(dim=1)
    sums[0] = sums[0] * decay + e.sum(dim=1)
    largest.copy_(highest)
    owner, column, which = _labels_of_tile(starts, labels, start, z.shape[1])
    picked[which] = y[owner, column]
    if top is not None:
        top.copy_(torch.cat((top, y), dim=1).topk(top.shape[1]).values)
    if out is None:
        return
    if logit_softcap:
        e = e * (1 - (y / logit_softcap).square())
    e[owner, column] = 0
    out.copy_(e)
    if kept is not None:
        kept.copy_(e)


def gradient(
    z: Tensor,  # [R, v]
    out: Tensor,  # [R, v], written; may be z
    bias: Tensor | None,  # [v]
    inverse_temperature: Tensor,  # [R]
    starts: Tensor,  # [R+1] int64
    labels: Tensor,  # [E] int64
    start: int,
    logit_scale: float,
    logit_softcap: float,
    centre: Tensor,  # [R], c of the normalizer, in the place of m
    rest: Tensor,  # [R], r of the normalizer
    coefs: Tensor,  # [3, R]: a, b, c
    values: Tensor,  # [E]: what stands at the labels, summed where labels of a row are equal
) -> None:
    """``out = dL/dz = dy/dz / temperature * p (a + b t + c p)``, and values at the labels."""
    y = z if bias is None else z + bias
    y = from_logits.softcapped(y * logit_scale, logit_softcap)
    t = ((y - centre[:, None]) * inverse_temperature[:, None]).clamp_min(-1e4)
    p = (t - rest[:, None]).exp()
    a, b, c = coefs[:, :, None]
    d = p * (a + b * t + c * p) * (logit_scale * inverse_temperature[:, None])
    if logit_softcap:
        d = d * (1 - (y / logit_softcap).square())
    out.copy_(_with_labels(d, starts, labels, start, values))


def finish(
    product: Tensor,  # [R, H]; may be out
    factor: Tensor,  # [R]
    starts: Tensor,  # [R+1] int64
    labels: Tensor,  # [E] int64
    weight: Tensor,  # [V, H], unit last stride
    values: Tensor,  # [E]
    out: Tensor,  # [R, H], written
) -> None:
    """``out_i = factor_i product_i + sum over the entries of row i of value_e weight[label_e]``.

    dhidden; and dweight, its rows in the place of hidden's and the other way round.
    """
    owner, column, which = _labels_of_tile(starts, labels, 0, weight.shape[0])
    d = factor[:, None] * product
    d.index_put_((owner,), values[which, None] * weight[column].to(d.dtype), accumulate=True)
    out.copy_(d)


def _labels_of_tile(starts: Tensor, labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row of the tile, column of the tile, and number of each entry whose label the tile holds."""
    which = torch.arange(int(starts[0]), int(starts[-1]), device=labels.device)
    owner = torch.repeat_interleave(torch.arange(len(starts) - 1, device=labels.device), starts.diff())
    column = labels[which] - start
    inside = (column >= 0) & (column < width)
    return owner[inside], column[inside], which[inside]


def _with_labels(d: Tensor, starts: Tensor, labels: Tensor, start: int, values: Tensor) -> Tensor:
    owner, column, which = _labels_of_tile(starts, labels, start, d.shape[1])
    d[owner, column] = 0
    return d.index_put_((owner, column), values[which], accumulate=True)
