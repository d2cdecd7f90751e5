"""The scalar functions of the engine, each with value and closed-form slope: links psi, score maps f, token maps phi.

The C++ and CUDA twin is csrc/links.h, the Triton one kernels/common/links.py; tests/test_links.py checks the slopes
against autograd of the values here, and the twins against these. Values and slopes are finite wherever fp32 can hold
them, and NaN stays NaN.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.objectives import LINKS as LINK_DEFAULTS
from fastpo.objectives import SCORE_MAPS as SCORE_MAP_NAMES
from fastpo.objectives import TOKEN_MAPS as TOKEN_MAP_NAMES

# Log-probs above -NEAREST count as -NEAREST, slope 0, where 1 - e^l is asked for: fp32 cannot tell e^l from 1 there.
NEAREST = 2.0**-24
# Exponents above this count as this, slope 0, in the power map: e^88 is the largest that fp32 holds. As TRL.
MAX_EXPONENT = 80.0


class Curve(NamedTuple):
    """A function of a tensor and a parameter (tensor or float), and its derivative by the tensor. Elementwise."""

    value: Callable[..., Tensor]
    slope: Callable[..., Tensor]


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus rounds to x above a threshold


def _logistic(z: Tensor, q: Tensor | float) -> Tensor:
    return _softplus(-z) + (1 - q) * z


def _logistic_slope(z: Tensor, q: Tensor | float) -> Tensor:
    return (1 - q) - torch.sigmoid(-z)  # not s(z) - q: that cancels where z is large


def _exo(z: Tensor, epsilon: Tensor | float) -> Tensor:
    log_p, log_rest = F.logsigmoid(z), F.logsigmoid(-z)
    return log_p.exp() * (log_p - _log(1 - epsilon)) + log_rest.exp() * (log_rest - _log(epsilon))


def _exo_slope(z: Tensor, epsilon: Tensor | float) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z) * (z - _log(1 - epsilon) + _log(epsilon))


def _discopop(z: Tensor, tau: Tensor | float) -> Tensor:
    # e^-z s(z/tau) as one exponential: for z << 0 the factors are inf and 0
    tail = torch.exp(-z - _softplus(-z / tau))
    return _softplus(-z) * torch.sigmoid(-z / tau) + tail


def _discopop_slope(z: Tensor, tau: Tensor | float) -> Tensor:
    g, rest = torch.sigmoid(z / tau), torch.sigmoid(-z / tau)
    tail = torch.exp(-z - _softplus(-z / tau))
    blend = _softplus(-z) * g * rest / tau
    return tail * (rest / tau - 1) - torch.sigmoid(-z) * rest - blend


def _log(x: Tensor | float) -> Tensor | float:
    return torch.log(x) if isinstance(x, Tensor) else math.log(x)


LINKS: dict[str, Curve] = {
    "logistic": Curve(_logistic, _logistic_slope),
    "squared": Curve(lambda z, tau: (z - tau) ** 2, lambda z, tau: 2 * (z - tau)),
    "hinge": Curve(lambda z, _: F.relu(1 - z), lambda z, _: torch.where(z < 1, -1.0, torch.zeros_like(z))),
    "sigmoid": Curve(lambda z, _: torch.sigmoid(-z), lambda z, _: -torch.sigmoid(z) * torch.sigmoid(-z)),
    "exo": Curve(_exo, _exo_slope),
    "discopop": Curve(_discopop, _discopop_slope),
    "linear": Curve(lambda z, _: z, lambda z, _: torch.ones_like(z)),
}


def _log1mexp(logp: Tensor, _: float = 0.0) -> Tensor:
    logp = logp.clamp(max=-NEAREST)
    # Two forms around -ln 2, each without cancellation on its side; the unused side is kept away from its pole.
    near, far = logp.clamp(min=-math.log(2)), logp.clamp(max=-math.log(2))
    return torch.where(logp > -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def _log1mexp_slope(logp: Tensor, _: float = 0.0) -> Tensor:
    return torch.where(logp > -NEAREST, torch.zeros_like(logp), -1 / torch.expm1(-logp.clamp(max=-NEAREST)))


def _power(score: Tensor, c: float) -> Tensor:
    return torch.expm1((c * score).clamp(max=MAX_EXPONENT)) / c


def _power_slope(score: Tensor, c: float) -> Tensor:
    return torch.where(
        c * score > MAX_EXPONENT, torch.zeros_like(score), torch.exp((c * score).clamp(max=MAX_EXPONENT))
    )


def _log_odds(score: Tensor, _: float = 0.0) -> Tensor:
    return score.clamp(max=-NEAREST) - _log1mexp(score)


def _log_odds_slope(score: Tensor, _: float = 0.0) -> Tensor:
    return torch.where(score > -NEAREST, torch.zeros_like(score), -1 / torch.expm1(score.clamp(max=-NEAREST)))


_IDENTITY = Curve(lambda x, _=0.0: x, lambda x, _=0.0: torch.ones_like(x))
SCORE_MAPS: dict[str, Curve] = {
    "identity": _IDENTITY,
    "power": Curve(_power, _power_slope),
    "js": Curve(lambda s, _: math.log(2) + F.logsigmoid(s), lambda s, _: torch.sigmoid(-s)),
    "log_odds": Curve(_log_odds, _log_odds_slope),
}
TOKEN_MAPS: dict[str, Curve] = {"identity": _IDENTITY, "log1mexp": Curve(_log1mexp, _log1mexp_slope)}

# By code, the position in objectives.LINKS and its like.
LINKS_BY_CODE = tuple(LINKS[name] for name in LINK_DEFAULTS)
SCORE_MAPS_BY_CODE = tuple(SCORE_MAPS[name] for name in SCORE_MAP_NAMES)
TOKEN_MAPS_BY_CODE = tuple(TOKEN_MAPS[name] for name in TOKEN_MAP_NAMES)
