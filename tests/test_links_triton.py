"""kernels/common/links.py, the link table for Triton, is links.py of the op: on a GPU, or in triton's interpreter."""

import pytest
import torch

from fastpo.dispatch import triton_missing
from fastpo.kernels.preference_loss import links
from fastpo.objectives import LINKS, SCORE_MAPS, TOKEN_MAPS

if triton_missing() is not None:
    pytest.skip(triton_missing() or "", allow_module_level=True)

import triton
import triton.language as tl

from fastpo.kernels.common.links import (
    link_slope,
    link_value,
    score_map_slope,
    score_map_value,
    token_map_slope,
    token_map_value,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where the interpreter meets infinities
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _curve(x_ptr, value_ptr, slope_ptr, size, param, KIND: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=-1.0)
    param = tl.zeros([BLOCK], x.dtype) + param
    if KIND == "link":
        value, slope = link_value(x, param, CODE), link_slope(x, param, CODE)
    elif KIND == "score map":
        value, slope = score_map_value(x, param, CODE), score_map_slope(x, param, CODE)
    else:
        value, slope = token_map_value(x, CODE), token_map_slope(x, CODE)
    tl.store(value_ptr + at, value, mask=at < size)
    tl.store(slope_ptr + at, slope, mask=at < size)


LINK_PARAMS = {"logistic": (1.0, 0.7, 0.0, 1.125), "squared": (0.0, -3.0), "exo": (1e-3, 0.25), "discopop": (0.05, 0.5)}
SCORE_MAP_PARAMS = {"power": (-1.0, 0.5, -0.25)}
CURVES = [
    *(("link", name, p) for name in LINKS for p in LINK_PARAMS.get(name, (0.0,))),
    *(("score map", name, p) for name in SCORE_MAPS for p in SCORE_MAP_PARAMS.get(name, (0.0,))),
    *(("token map", name, 0.0) for name in TOKEN_MAPS),
]
ROWS = {
    "link": (list(LINKS), links.LINKS_BY_CODE),
    "score map": (SCORE_MAPS, links.SCORE_MAPS_BY_CODE),
    "token map": (TOKEN_MAPS, links.TOKEN_MAPS_BY_CODE),
}


def abscissas(kind: str) -> torch.Tensor:
    """Both sides of every switch, far out, near 0; log-probs (and mean log-probs) are not positive."""
    magnitudes = torch.cat(
        (torch.logspace(-9, 2, 56), torch.tensor([2.0**-24, 2.0**-25, 0.6931471, 0.6931472, 1.0, 60.0]))
    )
    both = torch.cat((-magnitudes, torch.zeros(1), magnitudes, torch.tensor([-80.0, 80.0])))
    return both if kind == "link" else both[both <= 0]


@pytest.mark.parametrize("kind, name, param", CURVES)
def test_the_link_table_is_the_reference_table(kind, name, param):
    """Every row of links.py, in value and slope, in the type it is used in: one that is missing, or differs, fails."""
    names, table = ROWS[kind]
    code, dtype = names.index(name), torch.float32 if kind == "token map" else torch.float64
    x = abscissas(kind).to(DEVICE, dtype)
    param = float(torch.tensor(param, dtype=torch.float32))  # kernels take fp32 scalars
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _curve[(1,)](x, value, slope, len(x), param, kind, code, 256)
    for ours, curve in ((value, table[code].value), (slope, table[code].slope)):
        exact, torchs = curve(x.double(), param), curve(x, param)
        error, torch_error = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
        ulp = torch.finfo(dtype).eps
        excess = error - 2 * torch_error - 8 * ulp * exact.abs() - 1e-30
        # Where the reference cancels, the result is as good as its largest term.
        assert (excess - 4 * ulp <= 0).all(), (
            f"{name}: {x[excess.argmax()]}, {ours[excess.argmax()]}, {exact[excess.argmax()]}"
        )


@pytest.mark.parametrize("kind, name, param", CURVES)
def test_links_do_not_hide_nan(kind, name, param):
    x = torch.tensor([float("nan"), -1.0], device=DEVICE)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _curve[(1,)](x, value, slope, 2, param, kind, ROWS[kind][0].index(name), 2)
    assert value.isnan().tolist() == [True, False]
