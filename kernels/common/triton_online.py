"""Triton device functions for one pass over a row of logits: the online softmax and its statistics.

A row (or a part of it) is read in tiles [LANES, VEC], VEC elements being one 16-byte load of one thread. Each lane
keeps its own state, fp32 [LANES]; only the end of the row crosses threads:

    m   max of its y (softcapped logits)
    s   sum of e,         e = 2^d,  d = (y - m) scale,  scale = log2(e) / temperature
    t   sum of e d
    q   sum of e^2

A lane that has seen nothing, or only -inf, has m = -inf and zeros. Subtracting m before scaling, as torch does, keeps
full precision where the logits are large. NaN and +inf reach s, and with it every output.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Stands in for d = -inf where it is multiplied: 2^-10000 is 0 in fp32, and 0 * -10000 is 0 where 0 * -inf is NaN.
NEGLIGIBLE = tl.constexpr(-10000.0)


@triton.jit
def tanh(x):
    """Within 2 ulp: Cephes' polynomial below 0.625, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = p * z * x + x
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def softcapped(x, softcap):
    """``softcap * tanh(x / softcap)`` in fp32; x itself where softcap is None."""
    y = x.to(tl.float32)
    if softcap is not None:
        y = softcap * tanh(y * (1.0 / softcap))
    return y


@triton.jit
def lanes_empty(LANES: tl.constexpr):
    """The state (m, s, t, q) before the first tile."""
    zero = tl.zeros([LANES], tl.float32)
    return zero - float("inf"), zero, zero, zero


@triton.jit
def lanes_add(m, s, t, q, y, scale, T: tl.constexpr, Q: tl.constexpr):
    """The state after the tile y [LANES, VEC] fp32. t and q stay as they are unless T, Q ask for them."""
    m_new = tl.maximum(m, tl.max(y, 1))
    # exp(-inf - -inf) must be 0 for elements and any finite factor for sums that are still 0.
    m_finite = tl.where(m_new == -float("inf"), 0.0, m_new)
    shift = tl.where(m == m_new, 0.0, tl.maximum((m - m_finite) * scale, NEGLIGIBLE))
    decay = tl.exp2(shift)
    d = (y - m_finite[:, None]) * scale
    e = tl.exp2(d)
    if T:
        t = decay * (t + s * shift) + tl.sum(e * tl.maximum(d, NEGLIGIBLE), 1)
    if Q:
        q = decay * decay * q + tl.sum(e * e, 1)
    s = decay * s + tl.sum(e, 1)
    return m_new, s, t, q


@triton.jit
def lanes_merge(m, s, t, q, scale, T: tl.constexpr, Q: tl.constexpr):
    """One state (scalars) from those of all lanes [LANES]; the order of the sums is fixed."""
    m_row = tl.max(m, 0)
    shift = tl.where(m == m_row, 0.0, tl.maximum((m - m_row) * scale, NEGLIGIBLE))
    decay = tl.exp2(shift)
    s_row = tl.sum(s * decay, 0)
    t_row = 0.0
    q_row = 0.0
    if T:
        t_row = tl.sum(decay * (t + s * shift), 0)
    if Q:
        q_row = tl.sum(decay * decay * q, 0)
    return m_row, s_row, t_row, q_row


@triton.jit
def top_empty(k, SLOTS: tl.constexpr):
    """A multiset of k values, all -inf, in SLOTS >= k slots; the slots beyond k hold +inf and never give way."""
    return tl.where(tl.arange(0, SLOTS) < k, -float("inf"), float("inf"))


@triton.jit
def top_add(top, y, lane_max, SLOTS: tl.constexpr):
    """The k largest of top [SLOTS] and the tile y [LANES, VEC], whose maxima along axis 1 are lane_max [LANES].

    Takes the largest values out of y one after the other while they beat the smallest kept: about k (1 + log(tiles))
    rounds for a whole row in random order. Equal values count as often as they occur. NaN is never taken.
    """
    largest = tl.max(lane_max, 0)
    while largest > tl.min(top, 0):
        for _ in range(tl.minimum(tl.sum(tl.sum((y == largest).to(tl.int32), 1), 0), SLOTS)):
            slot = tl.argmin(top, 0)
            top = tl.where((tl.arange(0, SLOTS) == slot) & (top < largest), largest, top)
        y = tl.where(y == largest, -float("inf"), y)
        largest = tl.max(tl.max(y, 1), 0)
    return top
