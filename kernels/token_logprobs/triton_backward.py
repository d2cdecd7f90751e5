"""The Triton kernel of the backward of ``token_logprobs``: a program reads and writes one tile, in place if asked.

A pointer that is None is an input that is not there.
"""

import triton
import triton.language as tl

from fastpo.kernels.common.triton_online import LOG2E, NEGLIGIBLE, softcapped
from fastpo.kernels.token_logprobs.triton_rows import ANY_VALUE, row_offset, row_temperature


@triton.jit(do_not_specialize=ANY_VALUE)
def backward_kernel(
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
    row_ptr = logits_ptr + row_offset(row, inner, stride_outer, stride_inner)
    x = tl.load(row_ptr + offsets, mask=offsets < tl.where(kept, vocab, 0), other=0.0)  # an ignored row is not read
    m = tl.load(normalizer_ptr + row)
    log_s = tl.load(normalizer_ptr + num_rows + row)
    g = tl.load(grad_logps_ptr + row)
    inverse = 1.0 / row_temperature(row, temperature, temperatures_ptr)

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
    out_ptr = grad_ptr + row_offset(row, inner, grad_stride_outer, grad_stride_inner) + offsets
    tl.store(out_ptr, tl.where(kept, grad, 0.0).to(grad_ptr.dtype.element_ty), mask=offsets < vocab)
