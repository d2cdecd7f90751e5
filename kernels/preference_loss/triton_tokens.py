"""The Triton kernels of preference_loss that go over tokens: sums forward, gradients backward. See triton_kernels.py.

Per-token terms are fp32, their sums fp64. Masked-out tokens are not read: they may hold anything.
"""

import triton
import triton.language as tl

from fastpo.kernels.common.links import token_map_slope, token_map_value

SUMS = tl.constexpr(5)  # of a sequence: score, log-prob, NLL, linear, number of tokens


@triton.jit
def _range(cu_seqlens_ptr, sequence, num_tokens):
    """Tokens [start, end) of a sequence; within the tensor even where cu_seqlens is not."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), num_tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), start), num_tokens)
    return start, end


@triton.jit
def _finish_sums(
    sequence, score, logp, nll, linear, count, length_power, scores_ptr, logps_ptr, nll_ptr, linear_ptr, lengths_ptr
):
    """Writes what the sums of a sequence are wanted for."""
    tl.store(lengths_ptr + sequence, count.to(tl.int64))
    if scores_ptr is not None:
        scale = tl.exp2(-length_power * tl.log2(tl.maximum(count, 1.0)))
        tl.store(scores_ptr + sequence, (score * scale).to(tl.float32))
    if logps_ptr is not None:
        tl.store(logps_ptr + sequence, logp.to(tl.float32))
    if nll_ptr is not None:
        tl.store(nll_ptr + sequence, nll)
    if linear_ptr is not None:
        tl.store(linear_ptr + sequence, linear)


@triton.jit(do_not_specialize=["num_tokens", "num_entries"])
def sums_kernel(
    logps_ptr,  # [T] fp32, or None where scores come from outside: no tokens at all
    ref_ptr,  # this and the next ones: [T] or None, as records.Tokens
    cu_seqlens_ptr,  # [S+1]
    mask_ptr,
    weights_ptr,
    kl_ptr,
    kl_weights_ptr,
    nll_weights_ptr,
    token_coefs_ptr,
    ref_coef,
    length_power,
    num_tokens,
    splits,  # programs of one sequence
    parts_ptr,  # [S, splits, SUMS] fp64, or None where splits is 1
    scores_ptr,  # [S]
    logp_sums_ptr,  # [S]
    nll_sums_ptr,  # [S] fp64
    linear_ptr,  # [S] fp64
    lengths_ptr,  # [S] int64
    first_ptr,  # [S] int64, made ready for the minimum over ``index``, and its length
    last_ptr,  # [S] int64, for the maximum
    num_entries,
    PHI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64) // splits
    part = tl.program_id(0) % splits
    if first_ptr is not None:
        tl.store(first_ptr + sequence, num_entries)
        tl.store(last_ptr + sequence, -1)
    score = tl.zeros([BLOCK], tl.float64)
    logp = tl.zeros([BLOCK], tl.float64)
    nll = tl.zeros([BLOCK], tl.float64)
    linear = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    if logps_ptr is not None:
        start, end = _range(cu_seqlens_ptr, sequence, num_tokens)
        size = tl.cdiv(tl.cdiv(end - start, splits), BLOCK) * BLOCK
        start += part * size
        end = tl.minimum(start + size, end)
        for block in range(start, end, BLOCK):
            t = block + tl.arange(0, BLOCK)
            kept = t < end
            if mask_ptr is not None:
                kept = tl.load(mask_ptr + t, mask=kept, other=0) != 0
            x = tl.load(logps_ptr + t, mask=kept, other=-1.0)
            if scores_ptr is not None:
                term = token_map_value(x, PHI)
                if ref_ptr is not None:
                    term -= ref_coef * tl.load(ref_ptr + t, mask=kept, other=0.0)
                if weights_ptr is not None:
                    term *= tl.load(weights_ptr + t, mask=kept, other=0.0)
                if kl_weights_ptr is not None:
                    kl = tl.load(kl_ptr + t, mask=kept, other=0.0)
                    term += kl * tl.load(kl_weights_ptr + t, mask=kept, other=0.0)
                score += tl.where(kept, term, 0.0)
            x = tl.where(kept, x, 0.0)
            logp += x
            if nll_weights_ptr is not None:
                nll += x * tl.load(nll_weights_ptr + t, mask=kept, other=0.0)
            if token_coefs_ptr is not None:
                linear += x * tl.load(token_coefs_ptr + t, mask=kept, other=0.0)
            count += kept.to(tl.int32)
    score_sum = tl.sum(score, 0)
    logp_sum = tl.sum(logp, 0)
    nll_sum = logp_sum
    if nll_weights_ptr is not None:
        nll_sum = tl.sum(nll, 0)
    linear_sum = tl.sum(linear, 0)
    length = tl.sum(count.to(tl.int64), 0).to(tl.float64)
    if parts_ptr is None:
        _finish_sums(
            sequence, score_sum, logp_sum, nll_sum, linear_sum, length, length_power, scores_ptr, logp_sums_ptr,
            nll_sums_ptr, linear_ptr, lengths_ptr,
        )  # fmt: skip
    else:
        out_ptr = parts_ptr + (sequence * splits + part) * SUMS
        tl.store(out_ptr, score_sum)
        tl.store(out_ptr + 1, logp_sum)
        tl.store(out_ptr + 2, nll_sum)
        tl.store(out_ptr + 3, linear_sum)
        tl.store(out_ptr + 4, length)


@triton.jit
def join_kernel(
    parts_ptr,  # [S, splits, SUMS] fp64
    splits,
    length_power,
    scores_ptr,
    logp_sums_ptr,
    nll_sums_ptr,
    linear_ptr,
    lengths_ptr,
    LANES: tl.constexpr,  # >= splits
):
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, LANES)
    part_ptr = parts_ptr + (sequence * splits + part) * SUMS
    there = part < splits
    _finish_sums(
        sequence,
        tl.sum(tl.load(part_ptr, mask=there, other=0.0), 0),
        tl.sum(tl.load(part_ptr + 1, mask=there, other=0.0), 0),
        tl.sum(tl.load(part_ptr + 2, mask=there, other=0.0), 0),
        tl.sum(tl.load(part_ptr + 3, mask=there, other=0.0), 0),
        tl.sum(tl.load(part_ptr + 4, mask=there, other=0.0), 0),
        length_power, scores_ptr, logp_sums_ptr, nll_sums_ptr, linear_ptr, lengths_ptr,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"])
def backward_kernel(
    grad_ptr,  # [] or None, upstream gradient
    score_grads_ptr,  # [S] or None
    nll_grads_ptr,  # [S] or None
    logps_ptr,  # [T]; as in sums_kernel, with the next ones
    ref_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    weights_ptr,
    kl_ptr,
    kl_weights_ptr,
    nll_weights_ptr,
    token_coefs_ptr,
    lengths_ptr,  # [S]
    ref_coef,
    length_power,
    num_tokens,
    num_sequences,
    splits,
    grad_logps_ptr,  # [T] or None, as the next ones
    grad_weights_ptr,
    grad_kl_ptr,
    grad_kl_weights_ptr,
    grad_nll_weights_ptr,
    grad_token_coefs_ptr,
    PHI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64) // splits
    part = tl.program_id(0) % splits
    start, end = _range(cu_seqlens_ptr, sequence, num_tokens)
    # Tokens before the first sequence or behind the last get a gradient too: 0.
    low = tl.where(sequence == 0, 0, start)
    high = tl.where(sequence == num_sequences - 1, num_tokens, end)
    size = tl.cdiv(tl.cdiv(high - low, splits), BLOCK) * BLOCK
    low += part * size
    high = tl.minimum(low + size, high)

    upstream = 1.0
    if grad_ptr is not None:
        upstream = tl.load(grad_ptr)
    of_score = 0.0
    if score_grads_ptr is not None:
        length = tl.maximum(tl.load(lengths_ptr + sequence), 1).to(tl.float64)
        scale = tl.exp2(-length_power * tl.log2(length))
        of_score = (tl.load(score_grads_ptr + sequence) * scale * upstream).to(tl.float32)
    of_nll = 0.0
    if nll_grads_ptr is not None:
        of_nll = tl.load(nll_grads_ptr + sequence) * upstream

    for block in range(low, high, BLOCK):
        t = block + tl.arange(0, BLOCK)
        own = t < high
        kept = own & (t >= start) & (t < end)
        if mask_ptr is not None:
            kept = tl.load(mask_ptr + t, mask=kept, other=0) != 0
        x = tl.load(logps_ptr + t, mask=kept, other=-1.0)
        if grad_logps_ptr is not None:
            grad = token_map_slope(x, PHI) * of_score
            if weights_ptr is not None:
                grad *= tl.load(weights_ptr + t, mask=kept, other=0.0)
            if nll_weights_ptr is not None:
                grad += of_nll * tl.load(nll_weights_ptr + t, mask=kept, other=0.0)
            else:
                grad += of_nll
            if token_coefs_ptr is not None:
                grad += upstream * tl.load(token_coefs_ptr + t, mask=kept, other=0.0)
            tl.store(grad_logps_ptr + t, tl.where(kept, grad, 0.0), mask=own)
        if grad_weights_ptr is not None:
            ratio = token_map_value(x, PHI)
            if ref_ptr is not None:
                ratio -= ref_coef * tl.load(ref_ptr + t, mask=kept, other=0.0)
            tl.store(grad_weights_ptr + t, tl.where(kept, of_score * ratio, 0.0), mask=own)
        if grad_kl_ptr is not None:
            k = tl.load(kl_weights_ptr + t, mask=kept, other=0.0)
            tl.store(grad_kl_ptr + t, tl.where(kept, of_score * k, 0.0), mask=own)
        if grad_kl_weights_ptr is not None:
            kl = tl.load(kl_ptr + t, mask=kept, other=0.0)
            tl.store(grad_kl_weights_ptr + t, tl.where(kept, of_score * kl, 0.0), mask=own)
        if grad_nll_weights_ptr is not None:
            tl.store(grad_nll_weights_ptr + t, tl.where(kept, of_nll * x, 0.0), mask=own)
        if grad_token_coefs_ptr is not None:
            tl.store(grad_token_coefs_ptr + t, tl.where(kept, upstream * x, 0.0), mask=own)
