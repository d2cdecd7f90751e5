"""Forward of ``tree_attention`` in Triton, and the device functions that the backward shares.

A program holds BLOCK_M rows of one key head: rows are (token, query head of the group) pairs, token by token, so that a
block of keys is read once for all heads of its group. Scores are in units of log 2.
"""

import triton
import triton.language as tl

from fastpo.kernels.common.triton_online import LN2, LOG2E, softcapped
from fastpo.kernels.tree_attention import blocks

BLOCK = tl.constexpr(blocks.BLOCK)
# Of products of fp32: three passes of the tensor cores, which leave an error of fp32's size. Other types have one.
PRECISION = tl.constexpr("tf32x3")
EMPTY = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)


@triton.jit
def block_state(blocks_ptr, num_blocks, block, rows, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """EMPTY, PARTIAL or FULL: what the queries see of a block of keys. rows: their first and last token, least and
    largest depth, and the window."""
    first, last, shallow, deep, window = rows
    column = block * BLOCK_N // BLOCK  # a part of a block of BLOCK keys is as empty, or as full, as that
    inside = column < num_blocks
    least_end = tl.load(blocks_ptr + column, mask=inside, other=0)
    largest_end = tl.load(blocks_ptr + num_blocks + column, mask=inside, other=0)
    some = largest_end > first
    every = (least_end > last) & ((block + 1) * BLOCK_N <= first + 1)
    if WINDOW:
        least_depth = tl.load(blocks_ptr + 2 * num_blocks + column, mask=inside, other=0)
        largest_depth = tl.load(blocks_ptr + 3 * num_blocks + column, mask=inside, other=0)
        some = some & (shallow - largest_depth < window)
        every = every & (deep - least_depth < window)
    return tl.where(some, tl.where(every, FULL, PARTIAL), EMPTY)


@triton.jit
def rows_of(tile, tokens, head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tokens and query heads of the rows of a tile, and which of the rows there are; [BLOCK_M] each."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    token = (row // GROUP).to(tl.int32)
    return token, head * GROUP + (row % GROUP).to(tl.int32), token < tokens


@triton.jit
def depths(depth_ptr, token, present, window):
    """Of tokens [BLOCK]; 0 where no window asks for them."""
    if window is not None:
        return tl.load(depth_ptr + token, mask=present, other=0)
    return tl.zeros_like(token)


@triton.jit
def reach(tile, token, depth, present, tokens, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """First and last token, least and largest depth of the rows of a tile: what ``block_state`` asks."""
    first = (tile * BLOCK_M // GROUP).to(tl.int32)
    last = tl.minimum(tl.max(token, 0), tokens - 1)
    return first, last, tl.min(tl.where(present, depth, 2147483647), 0), tl.max(depth, 0)


@triton.jit
def load_rows(ptr, token, head, token_stride, head_stride, present, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of a tensor [N, heads, D]; 0 where there is none."""
    dims = tl.arange(0, BLOCK_D)
    at = token.to(tl.int64) * token_stride + head * head_stride
    if D == BLOCK_D:
        return tl.load(ptr + at[:, None] + dims[None, :], mask=present[:, None], other=0.0)
    return tl.load(ptr + at[:, None] + dims[None, :], mask=present[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, x, token, head, heads, present, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [BLOCK, BLOCK_D] into a contiguous tensor [N, heads, D]."""
    dims = tl.arange(0, BLOCK_D)
    at = (token.to(tl.int64) * heads + head) * D
    inside = present[:, None] & (dims < D)[None, :]
    tl.store(ptr + at[:, None] + dims[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def visible(query, query_depth, key, key_end, key_depth, window):
    """Whether each query sees each key; the shapes broadcast."""
    see = (key <= query) & (query < key_end)
    if window is not None:
        see = see & (query_depth - key_depth < window)
    return see


@triton.jit
def keys_seen(token, token_depth, key, present, end_ptr, depth_ptr, window):
    """[rows, keys] whether each row sees each key; ``present``: of keys."""
    key_end = tl.load(end_ptr + key, mask=present, other=0)
    key_depth = depths(depth_ptr, key, present, window)
    return visible(token[:, None], token_depth[:, None], key[None, :], key_end[None, :], key_depth[None, :], window)


@triton.jit
def scored(product, scale, softcap):
    """Scores in units of log 2 from q @ k."""
    if softcap is not None:
        return softcapped(product * scale, softcap) * LOG2E
    return product * (scale * LOG2E)


@triton.jit
def _step(
    acc, m, total, q, token, token_depth, block, k_ptr, v_ptr, k_strides, v_strides, end_ptr, depth_ptr, tokens, head,
    scale, softcap, window, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state (acc, m, total) of the rows after one more block of keys."""
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    present = key < tokens
    k = load_rows(k_ptr, key, head, k_strides[0], k_strides[1], present, D, BLOCK_D)
    s = scored(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap)
    if MASKED:
        see = keys_seen(token, token_depth, key, present, end_ptr, depth_ptr, window)
        s = tl.where(see, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    finite = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s - finite[:, None])
    decay = tl.exp2(m - finite)
    total = total * decay + tl.sum(p, 1)
    v = load_rows(v_ptr, key, head, v_strides[0], v_strides[1], present, D, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, m_new, total


@triton.jit(do_not_specialize=["tokens", "num_blocks"])
def forward_kernel(
    q_ptr,  # [N, Hq, D]
    k_ptr,  # [N, Hkv, D]
    v_ptr,  # [N, Hkv, D]
    q_strides,  # of tokens and heads
    k_strides,
    v_strides,
    sinks_ptr,  # [Hq] fp32 or None
    end_ptr,  # [N] int32
    depth_ptr,  # [N] int32
    blocks_ptr,  # [4, num_blocks] int32
    out_ptr,  # [N, Hq, D] contiguous
    logsumexp_ptr,  # [Hq, N] fp32
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
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # the longest first
    head = tl.program_id(1)
    token, q_head, present = rows_of(tile, tokens, head, GROUP, BLOCK_M)
    q = load_rows(q_ptr, token, q_head, q_strides[0], q_strides[1], present, D, BLOCK_D)
    depth = depths(depth_ptr, token, present, window)
    first, last, shallow, deep = reach(tile, token, depth, present, tokens, GROUP, BLOCK_M)
    rows = (first, last, shallow, deep, window)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        m = tl.load(sinks_ptr + q_head) * LOG2E
        total = total + 1.0
    WINDOW: tl.constexpr = window is not None
    block, stop = 0, last // BLOCK_N + 1
    while block < stop:  # runs of blocks in one state
        state = block_state(blocks_ptr, num_blocks, block, rows, WINDOW, BLOCK_N)
        end = block + 1
        while (end < stop) & (block_state(blocks_ptr, num_blocks, end, rows, WINDOW, BLOCK_N) == state):
            end += 1
        if state == FULL:
            for b in range(block, end):
                acc, m, total = _step(
                    acc, m, total, q, token, depth, b, k_ptr, v_ptr, k_strides, v_strides, end_ptr, depth_ptr, tokens,
                    head, scale, softcap, window, False, D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
        elif state == PARTIAL:
            for b in range(block, end):
                acc, m, total = _step(
                    acc, m, total, q, token, depth, b, k_ptr, v_ptr, k_strides, v_strides, end_ptr, depth_ptr, tokens,
                    head, scale, softcap, window, True, D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
        block = end

    store_rows(out_ptr, acc / total[:, None], token, q_head, kv_heads * GROUP, present, D, BLOCK_D)
    at = q_head.to(tl.int64) * tokens + token
    tl.store(logsumexp_ptr + at, (m + tl.log2(total)) * LN2, mask=present)
