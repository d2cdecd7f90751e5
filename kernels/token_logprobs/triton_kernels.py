"""token_logprobs in Triton: ``forward`` and ``backward`` with the signatures of reference.py.

Forward: a program reads one row, or one of ``splits`` parts of it where there are too few rows to fill the GPU; a
second kernel then joins the parts in a fixed order. Backward: a program reads and writes one tile, in place if asked.
Floor: the bytes of the logits over the memory bandwidth, once forward, twice backward.

A pointer that is None in a kernel is an output that nobody asked for, or an input that is not there.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.aot import AotConfig
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

SLOTS = tl.constexpr(16)  # the largest topk
STATE = tl.constexpr(4)  # floats of a part's state (m, s, t, q), before its top values

# Arguments that change from batch to batch: compiled for any value, so that no batch waits for the compiler.
_ANY_VALUE = ["inner", "label_set_size", "ignore_index", "topk", "num_rows", "splits", "tiles"]


@triton.jit
def _row_offset(row, inner, stride_outer, stride_inner):
    """Where row ``row`` of [outer, inner, V] begins; int64, since N * V > 2^31 is ordinary."""
    row = row.to(tl.int64)
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def _temperature(row, temperature, temperatures_ptr):
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row)
    return temperature


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


@triton.jit(do_not_specialize=_ANY_VALUE)
def _forward_kernel(
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
    temperature = _temperature(row, temperature, temperatures_ptr)
    scale = (1.0 / temperature) * LOG2E
    row_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner)
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


@triton.jit(do_not_specialize=_ANY_VALUE)
def _join_kernel(
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
    parts_ptr,  # [N, splits, STATE (+ SLOTS)], as _forward_kernel wrote them
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
    temperature = _temperature(row, temperature, temperatures_ptr)
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
        row, logits_ptr + _row_offset(row, inner, stride_outer, stride_inner), label, kept, m, s, t, q, top,
        (1.0 / temperature) * LOG2E, temperature, softcap, num_rows, vocab, label_set_ptr, label_set_size, logps_ptr,
        normalizer_ptr, logsumexp_ptr, entropy_ptr, sum_p2_ptr, topk_mass_ptr, topk_entropy_ptr, label_set_prob_ptr,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ANY_VALUE)
def _backward_kernel(
    logits_ptr,  # [outer, inner, V]
    stride_outer,
    stride_inner,
    grad_ptr,  # [outer, inner, V]; may be the logits
    grad_stride_outer,
    grad_stride_inner,
    inner,
    labels_ptr,  # [N] int64
    temperatures_ptr,  # [N] or None
    temperature,
    softcap,  # None: no cap
    ignore_index,
    num_rows,
    vocab,
    tiles,  # of a row
    normalizer_ptr,  # [2, N]
    grad_logps_ptr,  # [N]
    coefs_ptr,  # [3, N] or None
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // tiles
    offsets = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    row_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner)
    x = tl.load(row_ptr + offsets, mask=offsets < tl.where(kept, vocab, 0), other=0.0)  # an ignored row is not read
    m = tl.load(normalizer_ptr + row)
    log_s = tl.load(normalizer_ptr + num_rows + row)
    g = tl.load(grad_logps_ptr + row)
    inverse = 1.0 / _temperature(row, temperature, temperatures_ptr)

    y = softcapped(x, softcap)
    logp = (y - m) * inverse - log_s
    p = tl.exp2(logp * LOG2E)
    if coefs_ptr is None:
        grad = -g * p
    else:
        a = tl.load(coefs_ptr + row)
        b = tl.load(coefs_ptr + num_rows + row)
        c = tl.load(coefs_ptr + 2 * num_rows + row)
        grad = p * (a + b * tl.maximum(logp, NEGLIGIBLE) + c * p)
    grad = (grad + tl.where(offsets == label, g, 0.0)) * inverse
    if softcap is not None:
        u = y * (1.0 / softcap)
        grad *= 1.0 - u * u
    out_ptr = grad_ptr + _row_offset(row, inner, grad_stride_outer, grad_stride_inner) + offsets
    tl.store(out_ptr, tl.where(kept, grad, 0.0).to(grad_ptr.dtype.element_ty), mask=offsets < vocab)


def forward(
    logits: Tensor,  # [B, T, V] float32, bfloat16 or float16, unit last stride; the rest as in reference.forward
    labels: Tensor,
    temperatures: Tensor | None,
    label_set: Tensor | None,
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    topk: int,
    logps: Tensor,
    normalizer: Tensor,
    *stats: Tensor,  # logsumexp, entropy, sum_p2, topk_mass, topk_entropy, label_set_prob: [N], or [0] if not asked for
) -> None:
    num_rows, vocab = labels.shape[0], logits.shape[2]
    if num_rows == 0:
        return
    wanted = [out if out.numel() else None for out in stats]
    top = wanted[3] is not None or wanted[4] is not None
    lanes, vec, num_warps = tile_shape(logits.dtype, vocab, top)
    splits, part_size = split_row(num_rows, vocab, lanes * vec, multiprocessors(logits.device))
    fields = STATE.value + (SLOTS.value if top else 0)
    parts = logps.new_empty(num_rows, splits, fields) if splits > 1 else None
    row_args = (
        logits, logits.stride(0), logits.stride(1), logits.shape[1], labels, temperatures, label_set,
        0 if label_set is None else label_set.shape[0], temperature, logit_softcap or None, ignore_index,
        min(topk, vocab), num_rows, vocab,
    )  # fmt: skip
    outputs = (parts, logps, normalizer, *wanted)
    with torch.cuda.device_of(logits):
        _forward_kernel[(num_rows, splits)](
            *row_args, part_size, *outputs,
            LANES=lanes, VEC=vec, ALIGNED=_aligned(logits), num_warps=num_warps, maxnreg=_registers(top),
            enable_fp_fusion=True,
        )  # fmt: skip
        if parts is not None:
            joined = triton.next_power_of_2(splits)
            _join_kernel[(num_rows,)](*row_args, splits, *outputs, LANES=joined, num_warps=1, enable_fp_fusion=True)


def backward(
    logits: Tensor,  # [B, T, V], as in forward; the rest as in reference.backward
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    normalizer: Tensor,
    grad_logps: Tensor,
    coefs: Tensor | None,
    grad_logits: Tensor,
) -> None:
    num_rows, vocab = labels.shape[0], logits.shape[2]
    if num_rows == 0:
        return
    lanes, vec, num_warps = tile_shape(logits.dtype, vocab)
    tiles = triton.cdiv(vocab, lanes * vec)
    with torch.cuda.device_of(logits):
        _backward_kernel[(num_rows * tiles,)](
            logits, logits.stride(0), logits.stride(1), grad_logits, grad_logits.stride(0), grad_logits.stride(1),
            logits.shape[1], labels, temperatures, temperature, logit_softcap or None, ignore_index, num_rows, vocab,
            tiles, normalizer, grad_logps, coefs, TILE=lanes * vec, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _registers(top: bool) -> int | None:
    """A limit that nothing reaches: left to itself, ptxas trades a few spills for occupancy here."""
    return 64 if top else None


def _aligned(logits: Tensor) -> bool:
    return all(x * logits.itemsize % 16 == 0 for x in logits.stride()[:2]) and logits.data_ptr() % 16 == 0


def tile_shape(dtype: torch.dtype, vocab: int, top: bool = False) -> tuple[int, int, int]:
    """LANES, VEC (16 bytes) and num_warps: 4096 elements over 256 threads, less for a small vocabulary.

    Half as many with the top k, whose search holds the tile in registers.
    """
    vec = 16 // dtype.itemsize
    tile = min(2048 if top else 4096, max(256, triton.next_power_of_2(vocab)))
    return tile // vec, vec, 8 if tile >= 2048 else 4


def split_row(num_rows: int, vocab: int, tile: int, processors: int) -> tuple[int, int]:
    """How many programs share a row, and how many elements each reads: eight programs per multiprocessor in all."""
    tiles = triton.cdiv(vocab, tile)
    splits = max(1, min(triton.cdiv(8 * processors, num_rows), tiles // 2))
    tiles_each = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, tiles_each), tiles_each * tile


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; in the interpreter, where only the splitting itself is of interest, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_SCALARS = {
    "temperature": "fp32", "softcap": "fp32", "ignore_index": "i32", "topk": "i32", "num_rows": "i32", "inner": "i32",
    "label_set_size": "i32", "splits": "i32", "tiles": "i32", "vocab": "i32:16", "part_size": "i32:16",
}  # fmt: skip
_POINTERS = dict.fromkeys(
    (
        "temperatures_ptr", "parts_ptr", "logps_ptr", "normalizer_ptr", "logsumexp_ptr", "entropy_ptr", "sum_p2_ptr",
        "topk_mass_ptr", "topk_entropy_ptr", "label_set_prob_ptr", "grad_logps_ptr", "coefs_ptr",
    ), "*fp32:16",
)  # fmt: skip
_EXTRAS = {"temperatures_ptr", "label_set_ptr", "softcap", "coefs_ptr"}
_STATS = {"logsumexp_ptr", "entropy_ptr", "sum_p2_ptr", "topk_mass_ptr", "topk_entropy_ptr", "label_set_prob_ptr"}


def _aot(kernel: Any, label: str, dtype: torch.dtype, absent: set[str], aligned: bool = True) -> AotConfig:
    """How the launchers above compile ``kernel`` for a large vocabulary, with the arguments in ``absent`` None."""
    top = kernel is _forward_kernel and "topk_mass_ptr" not in absent
    lanes, vec, num_warps = tile_shape(dtype, 128256, top)
    if kernel is _join_kernel:
        num_warps = 1
    shape = {
        _forward_kernel: {"LANES": lanes, "VEC": vec, "ALIGNED": aligned},
        _join_kernel: {"LANES": 16},
        _backward_kernel: {"TILE": lanes * vec},
    }[kernel]
    element = {torch.float32: "*fp32:16", torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16"}[dtype]
    types = _SCALARS | _POINTERS | {"labels_ptr": "*i64:16", "label_set_ptr": "*i64:16"}
    types |= {"logits_ptr": element, "grad_ptr": element}
    types |= {name: "i64:16" for name in kernel.arg_names if "stride" in name}
    if not aligned:
        types = {name: kind.removesuffix(":16") if kind[0] == "i" else kind for name, kind in types.items()}
    signature = {name: types[name] for name in kernel.arg_names if name not in absent | shape.keys()}
    constexprs = shape | {name: None for name in kernel.arg_names if name in absent}
    name = f"{label} {dtype}".replace("torch.", "")
    return AotConfig(name, kernel, signature, constexprs, num_warps, maxnreg=_registers(top))


AOT = [
    *(
        _aot(kernel, label, dtype, absent)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for kernel, label, absent in (
            (_forward_kernel, "plain", _STATS | _EXTRAS | {"parts_ptr"}),
            (_forward_kernel, "entropy", _STATS - {"entropy_ptr"} | _EXTRAS | {"parts_ptr"}),
            (_forward_kernel, "everything", {"parts_ptr"}),
            (_forward_kernel, "split", _STATS | _EXTRAS),
            (_forward_kernel, "split, everything", set()),
            (_join_kernel, "plain", _STATS | _EXTRAS),
            (_join_kernel, "everything", set()),
            (_backward_kernel, "plain", _EXTRAS),
            (_backward_kernel, "everything", set()),
        )
    ),
    _aot(_forward_kernel, "plain, odd vocabulary,", torch.bfloat16, _STATS | _EXTRAS | {"parts_ptr"}, aligned=False),
    _aot(_backward_kernel, "plain, odd vocabulary,", torch.bfloat16, _EXTRAS, aligned=False),
]
