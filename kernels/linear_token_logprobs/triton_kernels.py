"""The tile functions of reference.py in Triton: a program holds one row of a tile in registers, so each is one read.

Between the GEMMs a tile is read and written once by ``forward`` and ``gradient`` each. A tile has at most
8192 vocabulary entries (planning.py): 16 registers a thread. No atomics: a row's labels are visited in order.

A pointer that is None in a kernel is an input that is not there, or an output that nobody asked for.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.aot import AotConfig
from fastpo.kernels.common.triton_online import NEGLIGIBLE, softcapped, top_add

SLOTS = tl.constexpr(16)  # the largest topk
WIDEST = 8192  # vocabulary entries of a tile
HIDDEN_BLOCK = 1024  # elements of a hidden row that one program of ``finish`` adds up


@triton.jit
def _transformed(z, bias_ptr, cols, inside, logit_scale, softcap):
    """y [BLOCK] of logits z [BLOCK]; -inf outside the tile."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0)
    return tl.where(inside, softcapped(z * logit_scale, softcap), -float("inf"))


@triton.jit(do_not_specialize=["start", "sums_stride", "topk"])
def _forward_kernel(
    z_ptr,  # [R, v] fp32
    z_stride,
    out_ptr,  # [R, v], or None
    out_stride,
    bias_ptr,  # [v] fp32 or None
    inverse_temperature_ptr,  # [R]
    starts_ptr,  # [R+1] int64
    labels_ptr,  # [E] int64
    start,
    width,  # v
    logit_scale,
    softcap,  # None: no cap
    headroom,
    largest_ptr,  # [R]
    sums_ptr,  # [3, R] fp64
    sums_stride,
    decay_ptr,  # [R]
    picked_ptr,  # [E]
    top_ptr,  # [R, k] in any order, or None
    topk,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    z = tl.load(z_ptr + row * z_stride + cols, mask=inside, other=0.0)
    y = _transformed(z, bias_ptr, cols, inside, logit_scale, softcap)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)

    before = tl.load(largest_ptr + row)
    highest = tl.max(y, 0)
    highest = tl.where((highest - before) * inverse_temperature > headroom, highest, before)
    finite = tl.where(highest == -float("inf"), 0.0, highest)
    shift = tl.where(before == highest, 0.0, tl.maximum((before - finite) * inverse_temperature, NEGLIGIBLE))
    decay = tl.exp(shift)
    tl.store(largest_ptr + row, highest)
    tl.store(decay_ptr + row, decay)
    t = (y - finite) * inverse_temperature
    e = tl.exp(t)
    s = tl.load(sums_ptr + row)
    if MOMENTS:
        old_t, old_q = tl.load(sums_ptr + sums_stride + row), tl.load(sums_ptr + 2 * sums_stride + row)
        new_t = (old_t + s * shift) * decay + tl.sum(tl.maximum(t, NEGLIGIBLE) * e, 0)
        tl.store(sums_ptr + sums_stride + row, new_t)
        tl.store(sums_ptr + 2 * sums_stride + row, old_q * decay * decay + tl.sum(e * e, 0))
    tl.store(sums_ptr + row, s * decay + tl.sum(e, 0))

    if softcap is not None:
        e *= 1.0 - (y / softcap) * (y / softcap)
    for entry in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        column = tl.load(labels_ptr + entry) - start
        if (column >= 0) & (column < width):
            here = cols == column
            tl.store(picked_ptr + entry, tl.sum(tl.where(here, y, 0.0), 0))
            e = tl.where(here, 0.0, e)
    if out_ptr is not None:
        tl.store(out_ptr + row * out_stride + cols, e.to(out_ptr.dtype.element_ty), mask=inside)
    if top_ptr is not None:
        slots = tl.arange(0, SLOTS)
        top = tl.load(top_ptr + row * topk + slots, mask=slots < topk, other=float("inf"))
        tile = tl.reshape(y, [BLOCK // VEC, VEC])
        top = top_add(top, tile, tl.max(tile, 1), SLOTS)
        tl.store(top_ptr + row * topk + slots, top, mask=slots < topk)


@triton.jit
def _with_labels(d, row, cols, width, starts_ptr, labels_ptr, values_ptr, start):
    """d [BLOCK] of a row with values at its labels, summed where they are equal; labels of a row are in order."""
    before = tl.full([], -1, tl.int64)
    for entry in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        column = tl.load(labels_ptr + entry) - start
        if (column >= 0) & (column < width):
            here = cols == column
            value = tl.load(values_ptr + entry)
            d = tl.where(here, tl.where(column == before, d + value, value), d)
            before = column
    return d


@triton.jit(do_not_specialize=["start", "coefs_stride"])
def _gradient_kernel(
    z_ptr,  # [R, v] fp32
    z_stride,
    out_ptr,  # [R, v]
    out_stride,
    bias_ptr,  # [v] fp32 or None
    inverse_temperature_ptr,  # [R], as all but coefs, starts, labels and values below
    starts_ptr,
    labels_ptr,
    start,
    width,
    logit_scale,
    softcap,  # None: no cap
    centre_ptr,
    rest_ptr,
    coefs_ptr,  # [3, R]
    coefs_stride,
    values_ptr,  # [E]
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    z = tl.load(z_ptr + row * z_stride + cols, mask=inside, other=0.0)
    y = _transformed(z, bias_ptr, cols, inside, logit_scale, softcap)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    t = (y - tl.load(centre_ptr + row)) * inverse_temperature
    p = tl.exp(t - tl.load(rest_ptr + row))
    a, b = tl.load(coefs_ptr + row), tl.load(coefs_ptr + coefs_stride + row)
    c = tl.load(coefs_ptr + 2 * coefs_stride + row)
    d = p * (a + b * tl.maximum(t, NEGLIGIBLE) + c * p) * (logit_scale * inverse_temperature)
    if softcap is not None:
        d *= 1.0 - (y / softcap) * (y / softcap)
    d = _with_labels(d, row, cols, width, starts_ptr, labels_ptr, values_ptr, start)
    tl.store(out_ptr + row * out_stride + cols, d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(
    product_ptr,  # [R, H] fp32
    product_stride,
    factor_ptr,  # [R]
    starts_ptr,
    labels_ptr,
    weight_ptr,  # [V, H]
    weight_stride,
    vocab,
    values_ptr,  # [E]
    out_ptr,  # [R, H]
    out_stride,
    size,  # H
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    d = tl.load(product_ptr + row * product_stride + cols, mask=inside, other=0.0) * tl.load(factor_ptr + row)
    for entry in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        label = tl.load(labels_ptr + entry)
        if (label >= 0) & (label < vocab):
            w = tl.load(weight_ptr + label * weight_stride + cols, mask=inside, other=0.0).to(tl.float32)
            d += tl.load(values_ptr + entry) * w
    tl.store(out_ptr + row * out_stride + cols, d.to(out_ptr.dtype.element_ty), mask=inside)


def _shape(width: int) -> dict[str, int]:
    """BLOCK and num_warps for tiles of this width."""
    if width > WIDEST:
        raise RuntimeError(f"a tile has {width} vocabulary entries; it should have at most {WIDEST}")
    block = max(256, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def forward(
    z, out, kept, bias, inverse_temperature, starts, labels, start, logit_scale, logit_softcap, headroom, largest, sums,
    decay, picked, top, moments,
) -> None:  # fmt: skip
    with torch.cuda.device_of(z):
        _forward_kernel[(z.shape[0],)](
            z, z.stride(0), out, 0 if out is None else out.stride(0), bias, inverse_temperature, starts, labels, start,
            z.shape[1], logit_scale, logit_softcap or None, headroom, largest, sums, sums.stride(0), decay, picked,
            top, 0 if top is None else top.shape[1], MOMENTS=moments, VEC=4, **_shape(z.shape[1]),
        )  # fmt: skip
    if kept is not None:  # on a GPU, out is where it is kept
        kept.copy_(out)


def gradient(
    z, out, bias, inverse_temperature, starts, labels, start, logit_scale, logit_softcap, centre, rest, coefs,
    values,
) -> None:  # fmt: skip
    z, written = z.contiguous(), _by_row(out)
    with torch.cuda.device_of(z):
        _gradient_kernel[(z.shape[0],)](
            z, z.stride(0), written, written.stride(0), bias, inverse_temperature, starts, labels, start, z.shape[1],
            logit_scale, logit_softcap or None, centre, rest, coefs, coefs.stride(0), values, **_shape(z.shape[1]),
        )  # fmt: skip
    if written is not out:
        out.copy_(written)


def _by_row(out: Tensor) -> Tensor:
    """out [R, v], or one like it whose rows are contiguous: CPU tensors, in the interpreter, have them for columns."""
    return out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)


def finish(
    product: Tensor, factor: Tensor, starts: Tensor, labels: Tensor, weight: Tensor, values: Tensor, out: Tensor
) -> None:
    rows, size = product.shape
    with torch.cuda.device_of(product):
        _finish_kernel[(rows, triton.cdiv(size, HIDDEN_BLOCK))](
            product, product.stride(0), factor, starts, labels, weight, weight.stride(0), weight.shape[0], values,
            out, out.stride(0), size, BLOCK=HIDDEN_BLOCK, num_warps=4,
        )  # fmt: skip


_TYPES = {
    "z_ptr": "*fp32:16", "z_stride": "i32:16", "out_stride": "i32:16", "bias_ptr": "*fp32:16", "starts_ptr": "*i64:16",
    "inverse_temperature_ptr": "*fp32:16", "labels_ptr": "*i64:16", "start": "i32", "width": "i32:16",
    "logit_scale": "fp32", "softcap": "fp32", "headroom": "fp32", "largest_ptr": "*fp32:16", "sums_ptr": "*fp64:16",
    "sums_stride": "i32",
    "decay_ptr": "*fp32:16", "picked_ptr": "*fp32:16", "top_ptr": "*fp32:16", "topk": "i32", "centre_ptr": "*fp32:16",
    "rest_ptr": "*fp32:16",
    "coefs_ptr": "*fp32:16", "coefs_stride": "i32", "values_ptr": "*fp32:16",
    "factor_ptr": "*fp32:16", "product_ptr": "*fp32:16", "product_stride": "i32:16", "weight_stride": "i32:16",
    "vocab": "i32:16", "size": "i32:16",
}  # fmt: skip


def _aot(kernel: Any, label: str, dtype: str, absent: tuple[str, ...] = (), **constexprs: Any) -> AotConfig:
    """How the launchers compile ``kernel`` for GEMM operands of ``dtype``, with the arguments in ``absent`` None."""
    element = f"*{dtype}:16"
    out = "*fp32:16" if kernel is _finish_kernel else element
    types = _TYPES | {"out_ptr": out, "weight_ptr": element}
    shape = {"BLOCK": HIDDEN_BLOCK} if kernel is _finish_kernel else {"BLOCK": WIDEST}
    constants = shape | constexprs | dict.fromkeys(absent)
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    return AotConfig(f"{label} {dtype}", kernel, signature, constants, 4 if kernel is _finish_kernel else 16)


_PLAIN = ("bias_ptr", "softcap", "top_ptr")
AOT = [
    config
    for dtype in ("fp32", "bf16", "fp16")
    for config in (
        _aot(_forward_kernel, "plain", dtype, _PLAIN, MOMENTS=False, VEC=4),
        _aot(_forward_kernel, "no gradient", dtype, (*_PLAIN, "out_ptr"), MOMENTS=False, VEC=4),
        _aot(_forward_kernel, "everything", dtype, MOMENTS=True, VEC=4),
        _aot(_gradient_kernel, "plain", dtype, ("bias_ptr", "softcap")),
        _aot(_gradient_kernel, "everything", dtype),
        _aot(_finish_kernel, "plain", dtype),
    )
]
