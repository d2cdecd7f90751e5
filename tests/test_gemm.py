"""The CPU's matrix product (csrc/gemm.cpp), for every instruction set that this processor has."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpo.dispatch import extension_missing
from fastpo.kernels.linear_token_logprobs import gemm

pytestmark = pytest.mark.skipif(extension_missing("_C") is not None, reason="fastpo._C is not built; runs where it is")

# Sizes around tiles in registers (14 x 32, 6 x 16, 4 x 8), blocks of packed rows (4 tiles, 2048 deep), and what is
# packed at once of the right operand (4096 deep, 2^21 floats).
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (14, 32, 16),
    (15, 33, 17),
    (57, 70, 130),
    (29, 50, 2050),
    (5, 40, 4100),
    (8, 1100, 2047),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("rows", "columns")


@pytest.fixture(params=["avx512", "avx2", "generic"])
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTPO_CPU_ISA", request.param)
    try:
        gemm._multiply(torch.ones(1, 1), torch.ones(1, 1), torch.empty(1, 1), None, False, False)
    except RuntimeError as error:
        pytest.skip(f"{error}; runs on a processor with it")


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """[rows, columns] with a row stride that is no multiple of anything, or its columns side by side."""
    if layout == "columns":
        return torch.randn(columns, rows + 3).to(dtype)[:, :rows].t()
    return torch.randn(rows, columns + 5).to(dtype)[:, :columns]


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_in_place(isa, m, n, k, dtype):
    """ab, past the cache or not, out + ab, decay out + ab, of all layouts; nothing beside the result is written."""
    for of_a in LAYOUTS:
        for of_b in LAYOUTS:
            a, b = matrix(m, k, dtype, of_a), matrix(k, n, dtype, of_b)
            exact = a.double() @ b.double()
            by_torch = (a.float() @ b.float() - exact).abs().max()
            for mode in ("write", "past cache", "add", "decayed"):
                memory = torch.full(
                    (m, -(-n // 16) * 16 + 16), torch.nan
                )  # aligned, as what goes past the cache must be
                out = memory[:, :n]
                expected, decay = exact, None
                if mode in ("add", "decayed"):
                    out.normal_()
                    decay = torch.rand(m) if mode == "decayed" else None
                    expected = exact + out.double() * (1 if decay is None else decay[:, None])
                gemm._multiply(a, b, out, decay, mode == "add", mode == "past cache")
                assert (out - expected).abs().max() <= 2 * by_torch + 2e-6 * (1 + exact.abs().max())
                assert memory[:, n:].isnan().all()


def test_bits_depend_on_the_numbers_alone(isa):
    """Not on threads, layouts or the rows beside: each sum runs over the depth in one order.

    Logits made again in the backward are then those of the forward, and p sums to 1 where a token is near-certain.
    """
    a, b = torch.randn(300, 2500), torch.randn(2500, 90)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.append(gemm._product(a, b, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(gemm._product(a[100:117], b, None), found[0][100:117])
    assert torch.equal(gemm._product(a.t().contiguous().t(), b.t().contiguous().t(), None), found[0])


def test_names_what_it_does_not_take():
    x = torch.ones(4, 4)
    for arguments in ((x, torch.ones(3, 4), x), (x, x, torch.ones(4, 3)), (x, x, x.double()), (x.double(), x, x)):
        with pytest.raises(RuntimeError, match=r"should be|K, N"):
            gemm._multiply(*arguments, None, False, False)
    with pytest.raises(RuntimeError, match="stride of 1"):
        gemm._multiply(torch.ones(8, 8)[::2, ::2], x, x, None, False, False)


def test_strided_and_empty():
    """What has no stride of 1 is copied; an empty result is left alone."""
    a, b = torch.randn(8, 12)[::2, ::2], torch.randn(6, 5)
    torch.testing.assert_close(gemm._product(a, b, None), a @ b)
    for shape in ((0, 3), (3, 0)):
        assert gemm._product(torch.ones(shape[0], 2), torch.ones(2, shape[1]), None).shape == shape


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_library_s_product_is_not_copied(monkeypatch):
    """As on a GPU: where no place is given for it, what the library returns is the result; no pass over a tile more."""
    monkeypatch.setattr(gemm, "_ours", lambda x: False)
    x, w = torch.randn(5, 4), torch.randn(6, 4)
    with Calls() as calls:
        z = gemm.logits(x, w)
        gemm.times(z, w)
        gemm.outer(z, x)
    assert set(calls.names) == {"t", "mm"} and calls.names.count("mm") == 3
