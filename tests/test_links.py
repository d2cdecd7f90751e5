"""The link table: slopes against autograd of the values, far out, and the C++ twin against the PyTorch one.

The grids hold both sides of every switch (0, 1 of the hinge, ln 2, the clamps) and arguments up to 100.
"""

import math

import mpmath
import pytest
import torch

from fastpo import objectives
from fastpo.dispatch import extension_missing
from fastpo.kernels.preference_loss import preference_loss, sequence_scores
from fastpo.kernels.preference_loss.links import LINKS, MAX_EXPONENT, NEAREST, SCORE_MAPS, TOKEN_MAPS
from fastpo.objectives import Objective, Term
from fastpo.types import Pairs, Segments

PARAMS = {"logistic": (1.0, 0.7, 0.0, 1.125), "squared": (0.0, -3.0), "exo": (1e-3, 0.25), "discopop": (0.05, 0.5)}
COEFS = {"power": (-1.0, 0.5, -0.25)}
LINK_CASES = [(name, p) for name in LINKS for p in PARAMS.get(name, (0.0,))]
MAP_CASES = [(name, c) for name in SCORE_MAPS for c in COEFS.get(name, (0.0,))]

SIZES = torch.cat((torch.logspace(-9, 2, 67), torch.tensor([0.5, 1.0, 20.0, 60.0, NEAREST, NEAREST / 2])))
GRID = torch.cat((-SIZES, torch.zeros(1), SIZES))  # [N]
# Log-probs and their means are not positive. ln 2 is where log1mexp changes form.
NEGATIVE = torch.cat((-SIZES, torch.zeros(1), torch.tensor([-0.693147, -0.693148])))

# Instruction sets of this processor, which csrc/preference_loss_logistic.h is compiled for.
ISAS = ("generic", "avx2", "avx512")[: {"AVX2": 2, "AVX512": 3}.get(torch.backends.cpu.get_cpu_capability(), 1)]


def derivative(curve, x: torch.Tensor, param: float) -> torch.Tensor:
    x = x.double().requires_grad_()
    return torch.autograd.grad(curve.value(x, param).sum(), x)[0]


def test_tables_have_the_rows_of_objectives():
    assert list(LINKS) == list(objectives.LINKS)
    assert list(SCORE_MAPS) == list(objectives.SCORE_MAPS)
    assert list(TOKEN_MAPS) == list(objectives.TOKEN_MAPS)


@pytest.mark.parametrize("name, param", LINK_CASES)
def test_link_slopes_are_derivatives(name, param):
    slope = LINKS[name].slope(GRID.double(), param)
    torch.testing.assert_close(slope, derivative(LINKS[name], GRID, param), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, coef", MAP_CASES)
def test_score_map_slopes_are_derivatives(name, coef):
    x = NEGATIVE if name == "log_odds" else GRID
    torch.testing.assert_close(SCORE_MAPS[name].slope(x.double(), coef), derivative(SCORE_MAPS[name], x, coef))


@pytest.mark.parametrize("name", TOKEN_MAPS)
def test_token_map_slopes_are_derivatives(name):
    slope = TOKEN_MAPS[name].slope(NEGATIVE.double())
    torch.testing.assert_close(slope, derivative(TOKEN_MAPS[name], NEGATIVE, 0.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "curve, x, param",
    [
        *((LINKS[name], GRID, p) for name, p in LINK_CASES),
        *((SCORE_MAPS[name], NEGATIVE, c) for name, c in MAP_CASES),
        *((TOKEN_MAPS[name], NEGATIVE, 0.0) for name in TOKEN_MAPS),
    ],
)
def test_everything_is_finite(curve, x, param, dtype):
    assert curve.value(x.to(dtype), param).isfinite().all()
    assert curve.slope(x.to(dtype), param).isfinite().all()


def test_values_at_points_worked_out_by_hand():
    z = torch.tensor([0.0, 2.0], dtype=torch.float64)
    s = 1 / (1 + math.exp(-2))
    by_hand = {
        ("logistic", 0.7): [math.log(2), -0.7 * math.log(s) - 0.3 * math.log(1 - s)],
        ("squared", 3.0): [9.0, 1.0],
        ("hinge", 0.0): [1.0, 0.0],
        ("sigmoid", 0.0): [0.5, 1 - s],
        ("exo", 0.25): [
            0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
            s * math.log(s / 0.75) + (1 - s) * math.log((1 - s) / 0.25),
        ],
        ("discopop", 0.5): [
            0.5 * math.log(2) + 0.5,
            -math.log(s) * (1 - 1 / (1 + math.exp(-4))) + math.exp(-2) / (1 + math.exp(-4)),
        ],
        ("linear", 0.0): [0.0, 2.0],
    }
    for (name, param), values in by_hand.items():
        torch.testing.assert_close(LINKS[name].value(z, param), torch.tensor(values, dtype=torch.float64), msg=name)


def test_f_divergence_maps_are_zero_at_zero():
    """So that an empty sequence, whose score is 0, counts the same under each of them."""
    for name, coef in MAP_CASES:
        if name != "log_odds":
            assert SCORE_MAPS[name].value(torch.zeros(1, dtype=torch.float64), coef).abs() < 1e-15, name


def test_clamps():
    """Beyond what fp32 can tell the slope is 0, not the largest float."""
    x = torch.tensor([0.0, -NEAREST / 2])
    assert not TOKEN_MAPS["log1mexp"].slope(x).any() and not SCORE_MAPS["log_odds"].slope(x, 0.0).any()
    far = torch.tensor([MAX_EXPONENT + 1, 1e9])
    assert not SCORE_MAPS["power"].slope(far, 1.0).any() and SCORE_MAPS["power"].value(far, 1.0).isfinite().all()


needs_cpu = pytest.mark.skipif(extension_missing("_C") is not None, reason=str(extension_missing("_C")))


def assert_like_torch(ours: torch.Tensor, curve, part: str, x: torch.Tensor, param: float) -> None:
    """Pointwise ``err <= 2 err_torch + 8 ulp``, and 4 ulp of 1 where the value cancels."""
    function = getattr(curve, part)
    exact, torchs = function(x.double(), param), function(x, param)
    allowed = 2 * (torchs.double() - exact).abs() + 1e-6 * exact.abs() + 5e-7
    assert ((ours.double() - exact).abs() <= allowed).all(), f"{part} at {x[(ours - exact).abs().argmax()]}"


@needs_cpu
@pytest.mark.parametrize("name, param", LINK_CASES)
def test_cpp_links(name, param, monkeypatch):
    """z is the score itself: the losses are the values, and the gradient of their sum the slopes."""
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    x, param = GRID, float(torch.tensor(param))  # kernels take fp32
    objective = Objective("link", (Term((1.0,), name, 1.0, param=param),), reduction="sum")
    scores = x.clone().requires_grad_()
    out = preference_loss(None, None, None, Pairs(torch.arange(len(x))[:, None]), objective, scores=scores)
    assert_like_torch(out.losses, LINKS[name], "value", x, param)
    assert_like_torch(torch.autograd.grad(out.loss, scores)[0], LINKS[name], "slope", x, param)


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
def test_error_of_the_vectors_logistic(isa, monkeypatch):
    """The error that csrc/preference_loss.h states: 3 ulp of fp64. Points near 0, around it, and down to 1e-306."""
    monkeypatch.setenv("FASTPO_CPU_ISA", isa)
    normal = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat((normal[:1000] * 0.01, normal[1000:] * 5, torch.linspace(-706, 706, 2000, dtype=torch.float64)))
    torch.ops.fastpo_c.logistic(x, out := torch.empty(4, len(x), dtype=torch.float64))
    with mpmath.workdps(40):
        for ours, exact in zip(out, zip(*map(exact_logistic, x.tolist()), strict=True), strict=True):
            errors = [float(abs(a - b)) / math.ulp(float(b)) for a, b in zip(ours.tolist(), exact, strict=True)]
            assert max(errors) <= 3, x[errors.index(max(errors))]
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, -1e300, 0.0], dtype=torch.float64)
    torch.ops.fastpo_c.logistic(edges, out := torch.empty(4, 8, dtype=torch.float64))
    up, down, cost_up, cost_down = out.nan_to_num(7, posinf=math.inf).tolist()
    assert [round(y, 9) for y in up] == [0.5, 0.5, 1, 0, 7, 1, 0, 0.5]
    assert [round(y, 9) for y in down] == [0.5, 0.5, 0, 1, 7, 0, 1, 0.5]
    assert [round(y, 1) for y in cost_up] == [0.7, 0.7, 0, math.inf, 7, 0, 1e300, 0.7]
    assert [round(y, 1) for y in cost_down] == [0.7, 0.7, math.inf, 0, 7, 1e300, 0, 0.7]


def exact_logistic(x: float) -> tuple[mpmath.mpf, ...]:
    """s(x), s(-x), -log s(x), -log s(-x)."""
    up, down = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    return up, down, mpmath.log1p(mpmath.exp(-x)), mpmath.log1p(mpmath.exp(x))


@needs_cpu
@pytest.mark.parametrize("name, coef", MAP_CASES)
def test_cpp_score_maps(name, coef, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    term = Term((1.0,), "linear", 1.0)
    objective = Objective("map", (term,), score_map=name, score_map_coef=coef, reduction="sum")
    scores = NEGATIVE.clone().requires_grad_()
    out = preference_loss(None, None, None, Pairs(torch.arange(len(scores))[:, None]), objective, scores=scores)
    assert_like_torch(out.losses, SCORE_MAPS[name], "value", NEGATIVE, coef)
    assert_like_torch(torch.autograd.grad(out.loss, scores)[0], SCORE_MAPS[name], "slope", NEGATIVE, coef)


@needs_cpu
@pytest.mark.parametrize("name", TOKEN_MAPS)
def test_cpp_token_maps(name, monkeypatch):
    """Sequences of one token each: the score of each is phi of its log-prob."""
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    logps = NEGATIVE.clone().requires_grad_()
    segments = Segments(torch.arange(len(logps) + 1))
    scores = sequence_scores(logps, None, segments, Objective("map", (Term(),), phi=name, ref_coef=0.0))
    assert_like_torch(scores.detach(), TOKEN_MAPS[name], "value", NEGATIVE, 0.0)
    assert_like_torch(torch.autograd.grad(scores.sum(), logps)[0], TOKEN_MAPS[name], "slope", NEGATIVE, 0.0)
