"""The scalar functions of ``preference_loss`` as Triton device functions: links psi, score maps f, token maps phi.

The table, its order (the codes) and its constants are those of kernels/preference_loss/links.py, which says what each
function is; tests/test_links_triton.py compares every entry with it, in value and slope. ``preference_loss`` evaluates
links and score maps, of which there is one per tuple or sequence, in fp64, and token maps in fp32: that is what they
are precise for.
"""

import triton
import triton.language as tl

from fastpo.kernels.preference_loss import links as reference
from fastpo.objectives import LINKS, SCORE_MAPS, TOKEN_MAPS

_LINKS = list(LINKS)
LOGISTIC = tl.constexpr(_LINKS.index("logistic"))
SQUARED = tl.constexpr(_LINKS.index("squared"))
HINGE = tl.constexpr(_LINKS.index("hinge"))
SIGMOID = tl.constexpr(_LINKS.index("sigmoid"))
EXO = tl.constexpr(_LINKS.index("exo"))
DISCOPOP = tl.constexpr(_LINKS.index("discopop"))
LINEAR = tl.constexpr(_LINKS.index("linear"))
POWER = tl.constexpr(SCORE_MAPS.index("power"))
JS = tl.constexpr(SCORE_MAPS.index("js"))
LOG_ODDS = tl.constexpr(SCORE_MAPS.index("log_odds"))
LOG1MEXP = tl.constexpr(TOKEN_MAPS.index("log1mexp"))
IDENTITY = tl.constexpr(SCORE_MAPS.index("identity"))
LN2 = tl.constexpr(0.6931471805599453)
NEAREST = tl.constexpr(reference.NEAREST)
MAX_EXPONENT = tl.constexpr(reference.MAX_EXPONENT)


@triton.jit
def at_most(x, bound):
    """The smaller of the two; NaN stays NaN, which tl.minimum would hide."""
    return tl.where(x > bound, bound, x)


@triton.jit
def log1p(x):
    """For -1 < x < inf, precise for small x too: the rounding of 1 + x cancels in log(u) / (u - 1). Kahan."""
    u = 1.0 + x
    small = u == 1.0
    return tl.where(small, x, tl.log(u) * (x / tl.where(small, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """For x below the logarithm of the largest float; precise for small x too, as ``log1p``. Kahan."""
    u = tl.exp(x)
    inside = (u != 1.0) & (u - 1.0 != -1.0)
    ratio = x / tl.log(tl.where(inside, u, 2.0))
    return tl.where(u == 1.0, x, tl.where(inside, (u - 1.0) * ratio, u - 1.0))


@triton.jit
def sigmoid(x):
    """Relative precision on both sides: e^x of a large -x is small, not 1 minus something."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _discopop_tail(z, tau):
    """``e^-z s(z/tau)`` as one exponential: for z << 0 the factors are inf and 0."""
    return tl.exp(-z - softplus(-z / tau))


@triton.jit
def link_value(z, param, LINK: tl.constexpr):
    """psi(z; param)."""
    if LINK == LOGISTIC:
        return softplus(-z) + (1.0 - param) * z
    elif LINK == SQUARED:
        return (z - param) * (z - param)
    elif LINK == HINGE:
        return tl.where(z >= 1.0, 0.0, 1.0 - z)
    elif LINK == SIGMOID:
        return sigmoid(-z)
    elif LINK == EXO:
        up = sigmoid(z) * (softplus(-z) + tl.log(1.0 - param))
        return -up - sigmoid(-z) * (softplus(z) + tl.log(param))
    elif LINK == DISCOPOP:
        return softplus(-z) * sigmoid(-z / param) + _discopop_tail(z, param)
    else:
        tl.static_assert(LINK == LINEAR)
        return z


@triton.jit
def link_slope(z, param, LINK: tl.constexpr):
    """psi'(z; param)."""
    if LINK == LOGISTIC:
        return (1.0 - param) - sigmoid(-z)
    elif LINK == SQUARED:
        return 2.0 * (z - param)
    elif LINK == HINGE:
        return tl.where(z < 1.0, -1.0, tl.zeros_like(z))
    elif LINK == SIGMOID:
        return -sigmoid(z) * sigmoid(-z)
    elif LINK == EXO:
        return sigmoid(z) * sigmoid(-z) * (z - tl.log(1.0 - param) + tl.log(param))
    elif LINK == DISCOPOP:
        g = sigmoid(z / param)
        rest = sigmoid(-z / param)
        blend = softplus(-z) * g * rest / param
        return _discopop_tail(z, param) * (rest / param - 1.0) - sigmoid(-z) * rest - blend
    else:
        tl.static_assert(LINK == LINEAR)
        return tl.zeros_like(z) + 1.0


@triton.jit
def _log1mexp(x):
    """log(1 - e^x), x <= -NEAREST. Two forms around -ln 2, each kept away from the other side's cancellation."""
    near = tl.log(-expm1(tl.where(x < -LN2, -LN2, x)))
    far = log1p(-tl.exp(at_most(x, -LN2)))
    return tl.where(x > -LN2, near, far)


@triton.jit
def score_map_value(score, c, MAP: tl.constexpr):
    """f(S); c is the coefficient of the power map."""
    if MAP == POWER:
        return expm1(at_most(c * score, MAX_EXPONENT)) / c
    elif MAP == JS:
        return -softplus(-score) + LN2
    elif MAP == LOG_ODDS:
        x = at_most(score, -NEAREST)
        return x - _log1mexp(x)
    else:
        tl.static_assert(MAP == IDENTITY)
        return score


@triton.jit
def score_map_slope(score, c, MAP: tl.constexpr):
    """f'(S)."""
    if MAP == POWER:
        exponent = c * score
        return tl.where(exponent > MAX_EXPONENT, 0.0, tl.exp(at_most(exponent, MAX_EXPONENT)))
    elif MAP == JS:
        return sigmoid(-score)
    elif MAP == LOG_ODDS:
        return tl.where(score > -NEAREST, 0.0, -1.0 / expm1(at_most(score, -NEAREST)))
    else:
        tl.static_assert(MAP == IDENTITY)
        return tl.zeros_like(score) + 1.0


@triton.jit
def token_map_value(logp, MAP: tl.constexpr):
    """phi(l)."""
    if MAP == LOG1MEXP:
        return _log1mexp(at_most(logp, -NEAREST))
    else:
        tl.static_assert(MAP == IDENTITY)
        return logp


@triton.jit
def token_map_slope(logp, MAP: tl.constexpr):
    """phi'(l)."""
    if MAP == LOG1MEXP:
        x = at_most(logp, -NEAREST)
        # -1 / (e^-x - 1) without e^-x, which overflows
        return tl.where(logp > -NEAREST, 0.0, tl.exp(x) / expm1(x))
    else:
        tl.static_assert(MAP == IDENTITY)
        return tl.zeros_like(logp) + 1.0
