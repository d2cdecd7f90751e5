"""The Triton kernels of preference_loss that go over tuples: losses and their slopes. See triton_kernels.py.

Everything here is fp64: there is little of it, and it is what the gradient of every token is multiplied with.
"""

import triton
import triton.language as tl

from fastpo.kernels.common.links import link_slope, link_value, score_map_slope, score_map_value

BATCH = tl.constexpr(1)  # positions in objectives.NLL_NORMALIZERS
UNNORMALIZED = tl.constexpr(2)


@triton.jit(do_not_specialize=["num_sequences", "num_tuples"])
def count_kernel(index_ptr, lengths_ptr, nll_coefs, num_sequences, num_tuples, counts_ptr, LANES: tl.constexpr):
    """counts[program] = tokens of the members with an NLL, over LANES tuples."""
    K: tl.constexpr = len(nll_coefs)
    p = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    count = tl.zeros([LANES], tl.int64)
    for k in tl.static_range(K):
        i = tl.load(index_ptr + p * K + k, mask=p < num_tuples, other=-1)
        counted = (i >= 0) & (i < num_sequences) & (nll_coefs[k] != 0.0)
        count += tl.load(lengths_ptr + i, mask=counted, other=0)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count, 0))


@triton.jit(do_not_specialize=["num_sequences", "num_tuples", "num_counts"])
def tuples_kernel(
    index_ptr,  # [P, K] int64
    omegas_ptr,  # [P] or None, as the next ones
    margins_ptr,
    params_ptr,  # [P, J]
    beta_scales_ptr,
    table,  # J rows of K+5 floats, as TupleSettings.table
    nll_coefs,  # K floats, or () for no NLL
    score_map_coef,
    factor,  # of the reduction
    beta,
    num_sequences,
    num_tuples,
    scores_ptr,  # [S]
    lengths_ptr,  # [S]
    nll_sums_ptr,  # [S] fp64
    counts_ptr,  # [num_counts] int64, where the NLL is normalized by the batch
    num_counts,
    losses_ptr,  # [P]
    rewards_ptr,  # [P, K]
    nll_ptr,  # [P, K]
    score_slopes_ptr,  # [P, K] fp64, d loss / d f(S_k) by this tuple
    nll_slopes_ptr,  # [P, K] fp64, d loss / d (sum u l), or None for no NLL
    partials_ptr,  # [programs] fp64, sums of losses
    first_ptr,  # [S] int64, or None where ``index`` is sorted
    last_ptr,
    LINKS: tl.constexpr,  # J codes
    K: tl.constexpr,
    SCORE_MAP: tl.constexpr,
    GIVEN: tl.constexpr,  # scores are from outside, where no length says which are empty
    NORMALIZER: tl.constexpr,
    LANES: tl.constexpr,
):
    J: tl.constexpr = len(LINKS)
    p = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    real = p < num_tuples
    omega = tl.full([LANES], 1.0, tl.float64)
    if omegas_ptr is not None:
        omega = tl.load(omegas_ptr + p, mask=real, other=0.0).to(tl.float64)
    beta_scale = tl.full([LANES], 1.0, tl.float64)
    if beta_scales_ptr is not None:
        beta_scale = tl.load(beta_scales_ptr + p, mask=real, other=0.0).to(tl.float64)
    nan = float("nan")

    there = ()  # per member: not absent. One that is out of range is there, and is NaN.
    mapped = ()  # f(S)
    for k in tl.static_range(K):
        i = tl.load(index_ptr + p * K + k, mask=real, other=-1)
        inside = (i >= 0) & (i < num_sequences)
        score = tl.load(scores_ptr + i, mask=inside, other=nan).to(tl.float64)
        length = tl.load(lengths_ptr + i, mask=inside, other=1)
        nll_sum = tl.load(nll_sums_ptr + i, mask=inside, other=nan)
        value = score_map_value(score, score_map_coef, SCORE_MAP)
        if not GIVEN:
            value = tl.where(length == 0, 0.0, value)
        there += (i != -1,)
        mapped += (value,)
        tl.store(rewards_ptr + p * K + k, tl.where(i == -1, 0.0, beta * score).to(tl.float32), mask=real)
        nll = tl.where(i == -1, 0.0, -nll_sum / tl.maximum(length, 1).to(tl.float64))
        tl.store(nll_ptr + p * K + k, nll.to(tl.float32), mask=real)
        if first_ptr is not None:
            tl.atomic_min(first_ptr + i, p * K + k, mask=inside, sem="relaxed")
            tl.atomic_max(last_ptr + i, p * K + k, mask=inside, sem="relaxed")

    loss = tl.zeros([LANES], tl.float64)
    slopes = ()  # per term: weight psi'(z) scale
    for j in tl.static_range(J):
        row = table[j]
        scale = row[K] * beta_scale
        z = tl.zeros([LANES], tl.float64)
        here = p < 0
        for k in tl.static_range(K):
            counted = there[k] & (row[k] != 0.0)
            z += tl.where(counted, row[k] * mapped[k], 0.0)
            here = here | counted
        z = scale * z - row[K + 1]
        if margins_ptr is not None:
            margin = tl.load(margins_ptr + p, mask=real, other=0.0).to(tl.float64)
            z -= tl.where(row[K + 2] != 0.0, row[K + 2] * margin, 0.0)
        param = tl.zeros([LANES], tl.float64) + row[K + 3]
        if params_ptr is not None:
            param = tl.load(params_ptr + p * J + j, mask=real, other=0.5).to(tl.float64)
        weight = tl.where(here, row[K + 4], 0.0)
        loss += tl.where(here, weight * link_value(z, param, LINKS[j]), 0.0)
        slopes += (tl.where(here, weight * link_slope(z, param, LINKS[j]) * scale, 0.0),)
    for k in tl.static_range(K):
        slope = tl.zeros([LANES], tl.float64)
        for j in tl.static_range(J):
            coef = table[j][k]
            slope += tl.where(coef != 0.0, coef * slopes[j], 0.0)
        tl.store(score_slopes_ptr + p * K + k, slope * omega * factor, mask=real)

    if nll_slopes_ptr is not None:
        batch = 0.0
        if NORMALIZER == BATCH:
            total = tl.zeros([LANES], tl.int64)
            for c in range(0, num_counts, LANES):
                total += tl.load(
                    counts_ptr + c + tl.arange(0, LANES), mask=c + tl.arange(0, LANES) < num_counts, other=0
                )
            batch = tl.sum(total, 0).to(tl.float64) / num_tuples
        for k in tl.static_range(K):
            i = tl.load(index_ptr + p * K + k, mask=real, other=-1)
            inside = (i >= 0) & (i < num_sequences)
            size = tl.load(lengths_ptr + i, mask=inside, other=1).to(tl.float64)
            if NORMALIZER == BATCH:
                size = tl.zeros([LANES], tl.float64) + batch
            if NORMALIZER == UNNORMALIZED:
                size = tl.full([LANES], 1.0, tl.float64)
            counted = (i != -1) & (nll_coefs[k] != 0.0) & (size > 0.0)
            nll_factor = tl.where(counted, -nll_coefs[k] / tl.where(counted, size, 1.0), 0.0)
            nll_sum = tl.load(nll_sums_ptr + i, mask=inside, other=nan)
            loss += tl.where(counted, nll_factor * nll_sum, 0.0)
            tl.store(nll_slopes_ptr + p * K + k, nll_factor * omega * factor, mask=real)

    loss = tl.where(real, loss * omega, 0.0)
    tl.store(losses_ptr + p, loss.to(tl.float32), mask=real)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(loss, 0))


@triton.jit
def _total(values_ptr, size):
    """The sum of a vector, in a fixed order."""
    lane = tl.arange(0, 1024)
    total = tl.zeros([1024], tl.float64)
    for start in range(0, size, 1024):
        total += tl.load(values_ptr + start + lane, mask=start + lane < size, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_sequences", "num_tuples", "num_partials"])
def sequences_kernel(
    index_ptr,  # [P, K], flat
    order_ptr,  # [P K] int64, the order that sorts ``index``; or None where it is searched
    first_ptr,  # [S] int64, where the entries of a sequence begin, in ``index`` or in ``order``
    last_ptr,  # [S] int64, and the last of them
    num_sequences,
    num_tuples,
    score_slopes_ptr,  # [P, K] fp64
    nll_slopes_ptr,  # [P, K] fp64 or None
    scores_ptr,  # [S]
    lengths_ptr,  # [S]
    score_map_coef,
    partials_ptr,  # [num_partials] fp64
    num_partials,
    linear_ptr,  # [S] fp64 or None
    score_grads_ptr,  # [S]
    nll_grads_ptr,  # [S]
    loss_ptr,  # []
    SCORE_MAP: tl.constexpr,
    GIVEN: tl.constexpr,
    MEAN: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    if sequence == num_sequences:  # one program more, for the loss
        loss = _total(partials_ptr, num_partials)
        if MEAN:
            loss = loss / tl.maximum(num_tuples, 1)
        if linear_ptr is not None:
            loss += _total(linear_ptr, num_sequences)
        tl.store(loss_ptr, loss.to(tl.float32))
    else:
        score_grad = tl.zeros([ENTRIES], tl.float64)
        nll_grad = tl.zeros([ENTRIES], tl.float64)
        last = tl.load(last_ptr + sequence)
        for start in range(tl.load(first_ptr + sequence), last + 1, ENTRIES):
            entry = start + tl.arange(0, ENTRIES)
            own = entry <= last
            if order_ptr is not None:
                entry = tl.load(order_ptr + entry, mask=own, other=0)
            own = own & (tl.load(index_ptr + entry, mask=own, other=-1) == sequence)
            score_grad += tl.load(score_slopes_ptr + entry, mask=own, other=0.0)
            if nll_slopes_ptr is not None:
                nll_grad += tl.load(nll_slopes_ptr + entry, mask=own, other=0.0)
        score = tl.load(scores_ptr + sequence).to(tl.float64)
        grad = tl.sum(score_grad, 0) * score_map_slope(score, score_map_coef, SCORE_MAP)
        if not GIVEN:
            grad = tl.where(tl.load(lengths_ptr + sequence) == 0, 0.0, grad)
        tl.store(score_grads_ptr + sequence, grad.to(tl.float32))
        tl.store(nll_grads_ptr + sequence, tl.sum(nll_grad, 0).to(tl.float32))
