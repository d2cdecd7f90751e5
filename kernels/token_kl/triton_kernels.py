"""The tile functions of reference.py in Triton: a program goes over one row of both models' logits.

The row is read twice for K, once to find both logsumexps, once for the terms (which need them to be precise near the
reference), and once more for the gradient. Sums are over lanes first, in a fixed order; no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.aot import AotConfig
from fastpo.kernels.common.triton_online import softcapped

from .reference import Head

BLOCK = 2048  # elements of a row at a time
WARPS = 8
SMALLEST = tl.constexpr(-87.0)  # e^this is the smallest normal fp32


@triton.jit
def _z(x_ptr, cols, inside, scale, softcap, inverse_temperature):
    """z [BLOCK] fp32 of logits; -inf outside the row."""
    x = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, softcapped(x * scale, softcap) * inverse_temperature, -float("inf"))


@triton.jit
def _add(largest, total, z):
    """An online softmax in each lane: its largest z, and the sum of e^(z - largest)."""
    new = tl.maximum(largest, z)
    finite = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(tl.where(largest == new, 0.0, largest - finite)) + tl.exp(z - finite)


@triton.jit
def _logsumexp(largest, total):
    row = tl.max(largest, 0)
    finite = tl.where(row == -float("inf"), 0.0, row)
    return finite + tl.log(tl.sum(total * tl.exp(tl.where(largest == row, 0.0, largest - finite)), 0))


@triton.jit
def _excess(d):
    """``d + e^-d - 1``: its series where it cancels, to 2e-9 of itself."""
    p = 1.0 / 39916800.0 * -d + 1.0 / 3628800.0
    p = p * -d + 1.0 / 362880.0
    p = p * -d + 1.0 / 40320.0
    p = p * -d + 1.0 / 5040.0
    p = p * -d + 1.0 / 720.0
    p = p * -d + 1.0 / 120.0
    p = p * -d + 1.0 / 24.0
    p = p * -d + 1.0 / 6.0
    p = p * -d + 0.5
    return tl.where(tl.abs(d) < 1.0, p * d * d, d + (tl.exp(-d) - 1.0))


@triton.jit
def _divergence_kernel(
    x_ptr,  # [R, V] any float type
    x_stride,
    ref_ptr,  # [R, V]
    ref_stride,
    width,  # V
    scale,
    softcap,  # None: no cap
    inverse_temperature,
    kl_ptr,  # [R] fp32
    norms_ptr,  # [2, R] fp32, rows R apart
    norms_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    ref_ptr += row * ref_stride
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    ref_largest = largest
    ref_total = total
    for start in range(0, width, BLOCK):
        cols = start + lanes
        inside = cols < width
        largest, total = _add(largest, total, _z(x_ptr, cols, inside, scale, softcap, inverse_temperature))
        ref_z = _z(ref_ptr, cols, inside, scale, softcap, inverse_temperature)
        ref_largest, ref_total = _add(ref_largest, ref_total, ref_z)
    norm = _logsumexp(largest, total)
    ref_norm = _logsumexp(ref_largest, ref_total)
    kl = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + lanes
        inside = cols < width
        logp = _z(x_ptr, cols, inside, scale, softcap, inverse_temperature) - norm
        logq = _z(ref_ptr, cols, inside, scale, softcap, inverse_temperature) - ref_norm
        # Where q is 0 in this type, what is left of the term is p.
        kl += tl.where(logq < SMALLEST, tl.exp(logp), tl.exp(logq) * _excess(logq - logp))
    tl.store(kl_ptr + row, tl.sum(kl, 0))
    tl.store(norms_ptr + row, norm)
    tl.store(norms_ptr + norms_stride + row, ref_norm)


@triton.jit
def _slope_kernel(
    x_ptr,  # [R, V] any float type
    x_stride,
    ref_ptr,  # [R, V]
    ref_stride,
    width,  # V
    scale,
    softcap,  # None: no cap
    inverse_temperature,
    norms_ptr,  # [2, R] fp32
    norms_stride,
    factor_ptr,  # [R] fp32, or None for 1
    out_ptr,  # [R, V] any float type; may be x
    out_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    z = _z(x_ptr + row * x_stride, cols, inside, scale, softcap, inverse_temperature)
    ref_z = _z(ref_ptr + row * ref_stride, cols, inside, scale, softcap, inverse_temperature)
    p = tl.exp(z - tl.load(norms_ptr + row))
    slope = (p - tl.exp(ref_z - tl.load(norms_ptr + norms_stride + row))) * (scale * inverse_temperature)
    if softcap is not None:
        capped = z / (inverse_temperature * softcap)
        slope *= tl.where(inside, 1.0 - capped * capped, 0.0)
    if factor_ptr is not None:
        slope *= tl.load(factor_ptr + row)
    tl.store(out_ptr + row * out_stride + cols, slope.to(out_ptr.dtype.element_ty), mask=inside)


def divergence(x: Tensor, ref_x: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    x, ref_x = _by_row(x), _by_row(ref_x)
    rows, width = x.shape
    kl, norms = x.new_empty(rows, dtype=torch.float32), x.new_empty(2, rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            _divergence_kernel[(rows,)](
                x, x.stride(0), ref_x, ref_x.stride(0), width, head.logit_scale, head.logit_softcap or None,
                1 / head.temperature, kl, norms, rows, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return kl, norms


def slope(x: Tensor, ref_x: Tensor, norms: Tensor, factor: Tensor | None, head: Head, out: Tensor) -> None:
    x, ref_x = _by_row(x), _by_row(ref_x)
    rows, width = x.shape
    if rows:
        with torch.cuda.device_of(x):
            _slope_kernel[(rows, triton.cdiv(width, BLOCK))](
                x, x.stride(0), ref_x, ref_x.stride(0), width, head.logit_scale, head.logit_softcap or None,
                1 / head.temperature, norms, norms.stride(0), factor, out, out.stride(0), BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


def _by_row(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _aot(kernel: Any, label: str, dtype: str, absent: tuple[str, ...] = (), out: str = "") -> AotConfig:
    element, types = f"*{dtype}:16", dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32")
    types |= {"x_ptr": element, "ref_ptr": element, "out_ptr": f"*{out or dtype}:16"}
    types |= dict.fromkeys(("kl_ptr", "norms_ptr", "factor_ptr"), "*fp32:16")
    types |= dict.fromkeys(("x_stride", "ref_stride", "out_stride", "width", "norms_stride"), "i32:16")
    constants = {"BLOCK": BLOCK} | dict.fromkeys(absent)
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    return AotConfig(f"{label} {dtype}", kernel, signature, constants, WARPS)


AOT = [
    config
    for dtype in ("fp32", "bf16", "fp16")
    for config in (
        _aot(_divergence_kernel, "plain", dtype, ("softcap",)),
        _aot(_divergence_kernel, "softcap", dtype),
        _aot(_slope_kernel, "plain", dtype, ("softcap", "factor_ptr")),
        _aot(_slope_kernel, "everything", dtype),
    )
]
AOT += [
    _aot(_slope_kernel, f"for {dtype} products", "fp32", ("softcap", "factor_ptr"), dtype) for dtype in ("bf16", "fp16")
]
