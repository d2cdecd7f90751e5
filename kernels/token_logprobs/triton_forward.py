"""Triton kernels of the forward of ``token_logprobs``: a row in one program, or its parts and their join.

A pointer that is None is an output that nobody asked for, or an input that is not there.
"""

import triton
import triton.language as tl

from fastpo.kernels.common.triton_online import (
    LN2,
    LOG2E,
    NEGLIGIBLE,
    lanes_add,
    lanes_empty,
    lanes_merge,
    softcapped,
    top_add,
    top_empty,
)
from fastpo.kernels.token_logprobs.triton_rows import ANY_VALUE, row_offset, row_temperature

SLOTS = tl.constexpr(16)  # the largest topk
STATE = tl.constexpr(4)  # floats of a part's state (m, s, t, q), before its top values


@triton.jit
def _finish(
    row,
    row_ptr,  # row's logits
    label,
    kept,  # False: an ignored row, all of whose outputs are 0
    m,  # [LANES] the lanes' states, as triton_online says; with them s, t, q
    s,
    t,
    q,
    top,  # [SLOTS] the largest values, +inf where unused; anything where they are not asked for
    scale,
    temperature,
    softcap,
    num_rows,
    vocab,
    label_set_ptr,
    label_set_size,
    logps_ptr,
    normalizer_ptr,
    logsumexp_ptr,
    entropy_ptr,
    sum_p2_ptr,
    topk_mass_ptr,
    topk_entropy_ptr,
    label_set_prob_ptr,
):
    """Writes every output of one row."""
    m, s, t, q = lanes_merge(m, s, t, q, scale, entropy_ptr is not None, sum_p2_ptr is not None)
    log_s = tl.log(s)
    in_range = (label >= 0) & (label < vocab)
    y = softcapped(tl.load(row_ptr + tl.where(in_range, label, 0)), softcap)
    nan = tl.where(in_range, 0.0, float("nan"))
    tl.store(logps_ptr + row, tl.where(kept, (y - m) / temperature - log_s + nan, 0.0))
    tl.store(normalizer_ptr + row, tl.where(kept, m, 0.0))
    tl.store(normalizer_ptr + num_rows + row, tl.where(kept, log_s + nan, 0.0))
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + row, tl.where(kept, m / temperature + log_s, 0.0))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(kept, log_s - t * LN2 / s, 0.0))
    if sum_p2_ptr is not None:
        tl.store(sum_p2_ptr + row, tl.where(kept, q / (s * s), 0.0))
    if topk_mass_ptr is not None or topk_entropy_ptr is not None:
        d = tl.where(top == float("inf"), -float("inf"), (top - m) * scale)
        p = tl.exp2(d) / s
        logp = tl.maximum(d, NEGLIGIBLE) * LN2 - log_s
        if topk_mass_ptr is not None:
            tl.store(topk_mass_ptr + row, tl.where(kept, tl.sum(p, 0), 0.0))
        if topk_entropy_ptr is not None:
            tl.store(topk_entropy_ptr + row, tl.where(kept, -tl.sum(p * logp, 0), 0.0))
    if label_set_prob_ptr is not None:
        e = 0.0
        for i in range(label_set_size):
            member = tl.load(label_set_ptr + i)
            x = tl.load(row_ptr + member, mask=(member >= 0) & (member < vocab), other=float("nan"))
            e += tl.exp2((softcapped(x, softcap) - m) * scale)
        tl.store(label_set_prob_ptr + row, tl.where(kept, e / s, 0.0))


@triton.jit(do_not_specialize=ANY_VALUE)
def forward_kernel(
    logits_ptr,  # [outer, inner, V]
    stride_outer,
    stride_inner,
    inner,
    labels_ptr,  # [N] int64
    temperatures_ptr,  # [N] or None
    label_set_ptr,  # [label_set_size] int64 or None
    label_set_size,
    temperature,
    softcap,  # None: no cap
    ignore_index,
    topk,
    num_rows,
    vocab,
    part_size,  # elements of a row that one program reads
    parts_ptr,  # [N, splits, STATE (+ SLOTS)], or None where a program reads a whole row and writes the outputs itself
    logps_ptr,
    normalizer_ptr,
    logsumexp_ptr,
    entropy_ptr,
    sum_p2_ptr,
    topk_mass_ptr,
    topk_entropy_ptr,
    label_set_prob_ptr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row begins at a multiple of 16 bytes
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    temperature = row_temperature(row, temperature, temperatures_ptr)
    scale = (1.0 / temperature) * LOG2E
    row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner)
    TOPK: tl.constexpr = topk_mass_ptr is not None or topk_entropy_ptr is not None

    m, s, t, q = lanes_empty(LANES)
    top = top_empty(topk, SLOTS)
    begin = part * part_size
    end = tl.where(kept, tl.minimum(begin + part_size, vocab), begin)  # an ignored row is not read
    for tile in range(begin, end, LANES * VEC):
        lane, i = tl.arange(0, LANES)[:, None], tl.arange(0, VEC)[None, :]
        # A thread holds whole lanes either way: 16 contiguous bytes, or elements that its neighbours' lie beside.
        offsets = tile + (lane * VEC + i if ALIGNED else i * LANES + lane)
        x = tl.load(row_ptr + offsets, mask=offsets < end, other=-float("inf"))
        y = softcapped(x, softcap)
        if softcap is not None:
            y = tl.where(offsets < end, y, -float("inf"))
        if TOPK:
            top = top_add(top, y, tl.max(y, 1), SLOTS)
        m, s, t, q = lanes_add(m, s, t, q, y, scale, entropy_ptr is not None, sum_p2_ptr is not None)

    if parts_ptr is None:
        _finish(
            row, row_ptr, label, kept, m, s, t, q, top, scale, temperature, softcap, num_rows, vocab,
            label_set_ptr, label_set_size, logps_ptr, normalizer_ptr, logsumexp_ptr, entropy_ptr, sum_p2_ptr,
            topk_mass_ptr, topk_entropy_ptr, label_set_prob_ptr,
        )  # fmt: skip
    else:
        m, s, t, q = lanes_merge(m, s, t, q, scale, entropy_ptr is not None, sum_p2_ptr is not None)
        parts_ptr += (row * tl.num_programs(1) + part) * (STATE + SLOTS if TOPK else STATE)
        tl.store(parts_ptr, m)
        tl.store(parts_ptr + 1, s)
        tl.store(parts_ptr + 2, t)
        tl.store(parts_ptr + 3, q)
        if TOPK:
            tl.store(parts_ptr + STATE + tl.arange(0, SLOTS), top)


@triton.jit(do_not_specialize=ANY_VALUE)
def join_kernel(
    logits_ptr,
    stride_outer,
    stride_inner,
    inner,
    labels_ptr,
    temperatures_ptr,
    label_set_ptr,
    label_set_size,
    temperature,
    softcap,
    ignore_index,
    topk,
    num_rows,
    vocab,
    splits,
    parts_ptr,  # [N, splits, STATE (+ SLOTS)], as forward_kernel wrote them
    logps_ptr,
    normalizer_ptr,
    logsumexp_ptr,
    entropy_ptr,
    sum_p2_ptr,
    topk_mass_ptr,
    topk_entropy_ptr,
    label_set_prob_ptr,
    LANES: tl.constexpr,  # splits, rounded up to a power of two
):
    """The outputs of one row from the states of its parts, each taken as one lane."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    temperature = row_temperature(row, temperature, temperatures_ptr)
    TOPK: tl.constexpr = topk_mass_ptr is not None or topk_entropy_ptr is not None

    part = tl.arange(0, LANES)
    part_ptr = parts_ptr + (row * splits + part) * (STATE + SLOTS if TOPK else STATE)
    m = tl.load(part_ptr, mask=part < splits, other=-float("inf"))
    s = tl.load(part_ptr + 1, mask=part < splits, other=0.0)
    t = tl.load(part_ptr + 2, mask=part < splits, other=0.0)
    q = tl.load(part_ptr + 3, mask=part < splits, other=0.0)
    top = top_empty(topk, SLOTS)
    if TOPK:
        slot_ptr = part_ptr[:, None] + STATE + tl.arange(0, SLOTS)[None, :]
        y = tl.load(slot_ptr, mask=(part < splits)[:, None], other=-float("inf"))
        y = tl.where(y == float("inf"), -float("inf"), y)
        top = top_add(top, y, tl.max(y, 1), SLOTS)
    _finish(
        row, logits_ptr + row_offset(row, inner, stride_outer, stride_inner), label, kept, m, s, t, q, top,
        (1.0 / temperature) * LOG2E, temperature, softcap, num_rows, vocab, label_set_ptr, label_set_size, logps_ptr,
        normalizer_ptr, logsumexp_ptr, entropy_ptr, sum_p2_ptr, topk_mass_ptr, topk_entropy_ptr, label_set_prob_ptr,
    )  # fmt: skip
