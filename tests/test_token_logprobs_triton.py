"""The Triton kernels of token_logprobs in triton's interpreter, through the public function, against fp64.

A tile is 4096 elements (256 for a small vocabulary) and a row is split over programs where there are fewer than eight
rows (the interpreter counts as one multiprocessor), so the shapes of SHAPES take every path: one tile with a tail, a
tail of one element, several tiles in one program, several programs per row with uneven parts, a single element.
"""

import pytest
import torch

from fastpo.dispatch import triton_missing
from fastpo.kernels.token_logprobs import STATS, reference, token_logprobs

if triton_missing() is not None:
    pytest.skip(triton_missing() or "", allow_module_level=True)

from fastpo.kernels.token_logprobs import triton_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter meets infinities
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU itself"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "one element": (3, 1),
    "part of a tile": (9, 100),
    "a tile and one element": (9, 4097),
    "split, uneven parts": (2, 4096 * 4 + 77),
    "split, many parts": (1, 4096 * 6),
}


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "triton")


def rows(n: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocab] of a peaked distribution; labels [n], the first row ignored where there are several."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=generator).mul(4).to(dtype)
    labels = torch.randint(vocab, (n,), generator=generator)
    if n > 1:
        labels[0] = -100
    return logits, labels


def assert_as_exact(ours, torchs, exact, tiny: float, what: str = "") -> None:
    """``err <= 2 err_torch + tiny``, both against fp64, NaN where fp64 has NaN."""
    assert torch.equal(ours.isnan(), exact.isnan()), what
    error = (ours.double() - exact).nan_to_num(0).abs().max()
    allowed = 2 * (torchs.double() - exact).nan_to_num(0).abs().max() + tiny
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def spec(logits, labels, dtype, weights, *, temperature=1.0, logit_softcap=None, **settings):
    """Values of the spec computed in ``dtype``, and the gradient of their weighted sum, shaped like the logits."""
    flat = logits.detach().to(dtype).reshape(labels.numel(), logits.shape[-1])
    flat = torch.where(flat == -torch.inf, -1e5, flat)  # p is 0 all the same, and autograd makes no 0 * inf of it
    flat.requires_grad_()
    temperature = temperature.to(dtype) if isinstance(temperature, torch.Tensor) else temperature
    values = reference.spec(flat, labels.reshape(-1), temperature, logit_softcap or 0.0, **settings)
    (grad,) = torch.autograd.grad(sum((values[name] * w).sum() for name, w in weights.items()), flat)
    return {name: value.detach() for name, value in values.items()}, grad.view(logits.shape)


def check(logits, labels, stats=STATS[:5], inplace=False, **settings) -> None:
    """Values, and the gradient of a weighted sum of everything differentiable, against the spec in fp64 and fp32."""
    generator = torch.Generator().manual_seed(1)
    differentiable = ["logps", *(name for name in STATS[:3] if name in stats)]
    weights = {name: torch.randn(labels.numel(), generator=generator) for name in differentiable}
    exact, exact_grad = spec(logits, labels, torch.float64, weights, **settings)
    torchs, torchs_grad = spec(logits, labels, torch.float32, weights, **settings)

    leaf = logits.detach().clone().requires_grad_()
    ours = token_logprobs(leaf * 1, labels, stats=stats, inplace_backward=inplace, **settings)
    values = {"logps": ours[0], **ours[1]} if stats else {"logps": ours}
    (grad,) = torch.autograd.grad(sum((values[name].view(-1) * w).sum() for name, w in weights.items()), leaf)

    for name, value in values.items():
        scale = max(1.0, float(exact[name].abs().nan_to_num(0, 0, 0).max()))
        assert value.dtype == torch.float32
        assert_as_exact(value.detach().view(-1), torchs[name], exact[name], 1e-6 * scale, name)
    # The gradient is rounded to the type of the logits, and the interpreter's conversion to bf16 truncates.
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[logits.dtype]
    assert grad.dtype == logits.dtype
    assert_as_exact(grad, torchs_grad, exact_grad, ulp * float(exact_grad.abs().max()) + 1e-7, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape, dtype):
    label_set = torch.tensor([0]) if shape[1] == 1 else torch.tensor([0, shape[1] // 2, shape[1] - 1])
    check(*rows(*shape, dtype), stats=STATS, label_set=label_set)


@pytest.mark.parametrize("shape", [SHAPES["a tile and one element"], SHAPES["split, uneven parts"]], ids=str)
def test_without_statistics(shape):
    """The kernel that carries no state but (m, s), and the backward without coefficients."""
    check(*rows(*shape, torch.bfloat16), stats=())


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("n", [2, 9], ids=["split", "whole rows"])
def test_temperature_and_softcap(per_row, softcap, n):
    logits, labels = rows(n, 4096 * 3 + 5, torch.float32)
    temperature = torch.linspace(0.5, 2, n) if per_row else 0.7
    check(logits, labels, temperature=temperature, logit_softcap=softcap)


def test_small_logits_under_a_softcap():
    """x of 1e-3 against a cap of 30: tanh must keep its relative precision near 0."""
    logits, labels = rows(9, 300, torch.float32)
    check(logits * 1e-3, labels, logit_softcap=30.0)


def test_large_offset():
    """Log-probs do not lose the precision that logits of a thousand leave them."""
    logits, labels = rows(9, 300, torch.float32)
    check(logits + 1000, labels, stats=("entropy", "sum_p2", "topk_mass", "topk_entropy"))


@pytest.mark.parametrize("k", [1, 10, 16])
def test_topk_with_ties(k):
    """fp16 rounded to few distinct values: each counts as often as it occurs; fewer columns than k count all."""
    logits, labels = rows(3, 4096 * 3, torch.float16)
    check(logits.round(), labels, topk=k, stats=("topk_mass", "topk_entropy"))
    check(logits[:, :7].round(), labels.clamp(-100, 6), topk=k, stats=("topk_mass", "topk_entropy"))


@pytest.mark.parametrize("vocab", [300, 4096 * 3], ids=["one tile", "split"])
def test_masked_logits(vocab):
    """-inf is a mask, also where it fills whole tiles and begins the row."""
    logits, labels = rows(3, vocab, torch.float32)
    logits[:, ::2] = -torch.inf
    logits[1, : vocab - 3] = -torch.inf
    labels[1:] = torch.tensor([vocab - 1, 4])  # probable; impossible: -inf
    logps = token_logprobs(logits, labels)
    assert logps[2] == -torch.inf
    labels[2] = 5
    check(logits, labels)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab", [300, 4096 * 3], ids=["one tile", "split"])
def test_nan_and_inf_reach_every_output_of_their_row(poison, vocab):
    logits, labels = rows(3, vocab, torch.float32)
    labels[0] = 7
    logits[1, vocab - 2] = poison
    label_set = torch.tensor([0, 5])
    logps, stats = token_logprobs(logits, labels, stats=STATS, label_set=label_set)
    for name, value in {"logps": logps, **stats}.items():
        if name == "logsumexp" and poison == torch.inf:
            continue
        assert value.isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("vocab", [300, 4096 * 3], ids=["one tile", "split"])
def test_ignored_rows_are_not_read(vocab):
    """Rows of NaN that are ignored show nowhere: every output and the gradient are exactly 0."""
    logits = torch.full((3, vocab), torch.nan, requires_grad=True)
    labels = torch.full((3,), -100)
    logps, stats = token_logprobs(logits * 1, labels, stats=STATS, label_set=torch.tensor([1]))
    assert not any(value.any() for value in (logps, *stats.values()))
    (logps + stats["entropy"] + stats["sum_p2"] + stats["logsumexp"]).sum().backward()
    assert not logits.grad.any()


def test_empty_batch():
    logits = torch.randn(0, 300, requires_grad=True)
    token_logprobs(logits * 1, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert logits.grad.shape == (0, 300)


def test_strided_views_and_expanded_gradients():
    """[B, T, V] shifted by one has two row strides; sum() sends back one number for all rows; labels step by two."""
    logits, labels = rows(12, 300, torch.float32)
    check(logits.view(2, 6, 300)[:, :-1], labels.view(2, 6)[:, 1:])
    leaf = logits.clone().requires_grad_()
    token_logprobs(leaf[::2], labels[::2]).sum().backward()
    exact = logits.double().requires_grad_()
    reference.spec(exact[::2], labels[::2])["logps"].sum().backward()
    assert torch.allclose(leaf.grad.double(), exact.grad, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(dtype):
    check(*rows(9, 4097, dtype), inplace=True)


@pytest.mark.parametrize("vocab", [300, 4096 * 3], ids=["one tile", "split"])
def test_label_out_of_range_makes_its_row_nan(vocab):
    """As on a GPU, where nobody waits to look at the labels: no read out of bounds, NaN in that row only."""
    logits, labels = rows(4, vocab, torch.float32)
    labels[1:] = torch.tensor([-1, vocab, 3])
    logps, normalizer = torch.empty(4), torch.empty(2, 4)
    label_set, label_set_prob = torch.tensor([1, vocab]), torch.empty(4)
    settings = (1.0, 0.0, -100)
    stats = (*(torch.empty(0) for _ in STATS[1:]), label_set_prob)
    triton_kernels.forward(logits[None], labels, None, label_set, *settings, 10, logps, normalizer, *stats)
    assert logps.isnan().tolist() == [False, True, True, False]
    assert label_set_prob.isnan().tolist() == [False, True, True, True]
    grad = torch.empty_like(logits)[None]
    triton_kernels.backward(logits[None], labels, None, *settings, normalizer, torch.ones(4), None, grad)
    assert grad[0].isnan().all(dim=-1).tolist() == [False, True, True, False]
    assert not grad[0, [0, 3]].isnan().any()


def test_split_rows_cover_the_vocabulary():
    """Every element is read once, by parts of whole tiles, and a row is split only where rows are few."""
    for num_rows in (1, 5, 100, 10_000):
        for vocab in (1, 4096, 32000, 128256, 151936):
            splits, part = triton_kernels.split_row(num_rows, vocab, 4096, processors=132)
            assert (splits - 1) * part < vocab <= splits * part
            assert splits == 1 or (part % 4096 == 0 and num_rows < 8 * 132)
