"""Backward of ``tree_attention`` in Triton: delta, then dQ by tiles of queries, then dK and dV by blocks of keys.

The queries that see a block of keys are one contiguous range, and those that see all of it are one too: no list of
indices. Every program writes what only it writes: no atomics.
"""

import triton
import triton.language as tl

from fastpo.kernels.common.triton_online import LN2, LOG2E
from fastpo.kernels.tree_attention.triton_forward import (
    BLOCK,
    FULL,
    PARTIAL,
    PRECISION,
    block_state,
    depths,
    keys_seen,
    load_rows,
    reach,
    rows_of,
    scored,
    store_rows,
    visible,
)


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    grad_out_ptr,  # [N, Hq, D]
    grad_out_strides,
    out_ptr,  # [N, Hq, D]
    out_strides,
    delta_ptr,  # [Hq, N] fp32
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """grad_out . out of every row."""
    head = tl.program_id(1)
    token = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int32)
    present = token < tokens
    g = load_rows(grad_out_ptr, token, head, grad_out_strides[0], grad_out_strides[1], present, D, BLOCK_D)
    out = load_rows(out_ptr, token, head, out_strides[0], out_strides[1], present, D, BLOCK_D)
    at = head.to(tl.int64) * tokens + token
    tl.store(delta_ptr + at, tl.sum(g.to(tl.float32) * out.to(tl.float32), 1), mask=present)


@triton.jit
def _slopes(s, see, grad_p, logsumexp, delta, softcap, MASKED: tl.constexpr):
    """Probabilities and d loss / d scores, from scores, d loss / d probabilities and what broadcasts to them."""
    p = tl.exp2(s - logsumexp)
    if MASKED:
        p = tl.where(see, p, 0.0)
    ds = p * (grad_p - delta)
    if softcap is not None:
        t = s * (LN2 / softcap)
        ds = ds * (1.0 - t * t)
    return p, ds


@triton.jit
def _queries_step(
    acc, q, g, token, token_depth, logsumexp, delta, block, k_ptr, v_ptr, k_strides, v_strides, end_ptr, depth_ptr,
    tokens, head, scale, softcap, window, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ / scale of the rows after one more block of keys."""
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    present = key < tokens
    k = load_rows(k_ptr, key, head, k_strides[0], k_strides[1], present, D, BLOCK_D)
    s = scored(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
    see = present[None, :]
    if MASKED:
        see = keys_seen(token, token_depth, key, present, end_ptr, depth_ptr, window)
    v = load_rows(v_ptr, key, head, v_strides[0], v_strides[1], present, D, BLOCK_D)
    grad_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    _, ds = _slopes(s, see, grad_p, logsumexp[:, None], delta[:, None], softcap, MASKED)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "num_blocks"])
def queries_kernel(
    q_ptr,  # [N, Hq, D]
    k_ptr,  # [N, Hkv, D]
    v_ptr,  # [N, Hkv, D]
    grad_out_ptr,  # [N, Hq, D]
    q_strides,  # of tokens and heads
    k_strides,
    v_strides,
    grad_out_strides,
    end_ptr,  # [N] int32
    depth_ptr,  # [N] int32
    blocks_ptr,  # [4, num_blocks] int32
    logsumexp_ptr,  # [Hq, N] fp32
    delta_ptr,  # [Hq, N] fp32
    grad_q_ptr,  # [N, Hq, D] contiguous
    tokens,  # N
    num_blocks,
    kv_heads,
    scale,
    softcap,  # None: no cap
    window,  # None: no window
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    token, q_head, present = rows_of(tile, tokens, head, GROUP, BLOCK_M)
    q = load_rows(q_ptr, token, q_head, q_strides[0], q_strides[1], present, D, BLOCK_D)
    g = load_rows(grad_out_ptr, token, q_head, grad_out_strides[0], grad_out_strides[1], present, D, BLOCK_D)
    at = q_head.to(tl.int64) * tokens + token
    logsumexp = tl.load(logsumexp_ptr + at, mask=present, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + at, mask=present, other=0.0)
    depth = depths(depth_ptr, token, present, window)
    first, last, shallow, deep = reach(tile, token, depth, present, tokens, GROUP, BLOCK_M)
    rows = (first, last, shallow, deep, window)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    WINDOW: tl.constexpr = window is not None
    block, stop = 0, last // BLOCK_N + 1
    while block < stop:
        state = block_state(blocks_ptr, num_blocks, block, rows, WINDOW, BLOCK_N)
        end = block + 1
        while (end < stop) & (block_state(blocks_ptr, num_blocks, end, rows, WINDOW, BLOCK_N) == state):
            end += 1
        if state == FULL:
            for b in range(block, end):
                acc = _queries_step(
                    acc, q, g, token, depth, logsumexp, delta, b, k_ptr, v_ptr, k_strides, v_strides, end_ptr,
                    depth_ptr, tokens, head, scale, softcap, window, False, D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
        elif state == PARTIAL:
            for b in range(block, end):
                acc = _queries_step(
                    acc, q, g, token, depth, logsumexp, delta, b, k_ptr, v_ptr, k_strides, v_strides, end_ptr,
                    depth_ptr, tokens, head, scale, softcap, window, True, D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
        block = end
    store_rows(grad_q_ptr, acc * scale, token, q_head, kv_heads * GROUP, present, D, BLOCK_D)


@triton.jit
def _keys_step(
    grad_k, grad_v, k, v, key, key_end, key_depth, tile, q_ptr, grad_out_ptr, q_strides, grad_out_strides,
    depth_ptr, logsumexp_ptr, delta_ptr, tokens, head, scale, softcap, window, MASKED: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV of the keys after one more tile of queries."""
    token, q_head, present = rows_of(tile, tokens, head, GROUP, BLOCK_M)
    q = load_rows(q_ptr, token, q_head, q_strides[0], q_strides[1], present, D, BLOCK_D)
    at = q_head.to(tl.int64) * tokens + token
    logsumexp = tl.load(logsumexp_ptr + at, mask=present, other=0.0) * LOG2E
    s = scored(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap)
    see = present[None, :]
    if MASKED:
        depth = depths(depth_ptr, token, present, window)
        see = visible(token[None, :], depth[None, :], key[:, None], key_end[:, None], key_depth[:, None], window)
    g = load_rows(grad_out_ptr, token, q_head, grad_out_strides[0], grad_out_strides[1], present, D, BLOCK_D)
    delta = tl.load(delta_ptr + at, mask=present, other=0.0)
    grad_p = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    p, ds = _slopes(s, see, grad_p, logsumexp[None, :], delta[None, :], softcap, MASKED)
    grad_v = tl.dot(p.to(g.dtype), g, grad_v, input_precision=PRECISION)
    grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["tokens", "num_blocks"])
def keys_kernel(
    q_ptr,  # [N, Hq, D]
    k_ptr,  # [N, Hkv, D]
    v_ptr,  # [N, Hkv, D]
    grad_out_ptr,  # [N, Hq, D]
    q_strides,  # of tokens and heads
    k_strides,
    v_strides,
    grad_out_strides,
    end_ptr,  # [N] int32
    depth_ptr,  # [N] int32
    blocks_ptr,  # [4, num_blocks] int32
    logsumexp_ptr,  # [Hq, N] fp32
    delta_ptr,  # [Hq, N] fp32
    grad_k_ptr,  # [splits, N, Hkv, D] contiguous
    grad_v_ptr,  # [splits, N, Hkv, D] contiguous
    tokens,  # N
    num_blocks,
    kv_heads,
    scale,
    softcap,  # None: no cap
    window,  # None: no window
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    present = key < tokens
    k = load_rows(k_ptr, key, head, k_strides[0], k_strides[1], present, D, BLOCK_D)
    v = load_rows(v_ptr, key, head, v_strides[0], v_strides[1], present, D, BLOCK_D)
    key_end = tl.load(end_ptr + key, mask=present, other=0)
    key_depth = depths(depth_ptr, key, present, window)

    # Queries first .. last see some of the keys, full_first .. full_last all of them. In tiles of rows:
    column = block * BLOCK_N // BLOCK
    least_end = tl.load(blocks_ptr + column).to(tl.int64)
    largest_end = tl.load(blocks_ptr + num_blocks + column).to(tl.int64)
    first = block.to(tl.int64) * BLOCK_N
    tile_0 = first * GROUP // BLOCK_M
    tile_3 = (largest_end * GROUP + BLOCK_M - 1) // BLOCK_M
    tile_1 = ((first + BLOCK_N - 1) * GROUP + BLOCK_M - 1) // BLOCK_M
    tile_2 = least_end * GROUP // BLOCK_M
    if window is not None:
        tile_2 = tile_1  # what a window hides is no range: look at each
    # This program's part of them.
    begin = tile_0 + (tile_3 - tile_0) * split // splits
    stop = tile_0 + (tile_3 - tile_0) * (split + 1) // splits
    tile_1 = tl.minimum(tl.maximum(tile_1, begin), stop)
    tile_2 = tl.minimum(tl.maximum(tile_2, tile_1), stop)

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(begin, tile_1):
        grad_k, grad_v = _keys_step(
            grad_k, grad_v, k, v, key, key_end, key_depth, tile, q_ptr, grad_out_ptr, q_strides, grad_out_strides,
            depth_ptr, logsumexp_ptr, delta_ptr, tokens, head, scale, softcap, window, True, GROUP, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    for tile in range(tile_1, tile_2):
        grad_k, grad_v = _keys_step(
            grad_k, grad_v, k, v, key, key_end, key_depth, tile, q_ptr, grad_out_ptr, q_strides, grad_out_strides,
            depth_ptr, logsumexp_ptr, delta_ptr, tokens, head, scale, softcap, window, False, GROUP, D, BLOCK_D,
            BLOCK_M,
        )  # fmt: skip
    for tile in range(tile_2, stop):
        grad_k, grad_v = _keys_step(
            grad_k, grad_v, k, v, key, key_end, key_depth, tile, q_ptr, grad_out_ptr, q_strides, grad_out_strides,
            depth_ptr, logsumexp_ptr, delta_ptr, tokens, head, scale, softcap, window, True, GROUP, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    offset = split.to(tl.int64) * tokens * kv_heads * D
    store_rows(grad_k_ptr + offset, grad_k * scale, key, head, kv_heads, present, D, BLOCK_D)
    store_rows(grad_v_ptr + offset, grad_v, key, head, kv_heads, present, D, BLOCK_D)
