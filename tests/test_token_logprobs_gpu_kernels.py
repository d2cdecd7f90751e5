"""The GPU kernels of token_logprobs without a GPU, through the public function, against fp64.

Triton's run in triton's interpreter, the CUDA file in emulated_cuda. Both read a row in tiles (Triton 4096 elements,
256 where the vocabulary is small; CUDA 4096 fp32 or 8192 narrower ones, after peeling to 16 bytes) and split it over
programs where there are fewer than eight rows (both count as one multiprocessor here), so SHAPES takes every path:
less than a vector, a tile with a tail, a tail of one element, several tiles in one program, uneven parts of a row.
"""

from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from token_logprobs_cases import DTYPES, check, rows

from fastpo.dispatch import Backend, Op, always, triton_missing
from fastpo.kernels.token_logprobs import STATS, op, reference, token_logprobs

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter meets infinities
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU itself"),
]

SHAPES = {
    "one element": (3, 1),
    "a vector and a tail": (3, 13),
    "part of a tile": (9, 100),
    "a tile and one element": (9, 8193),
    "split, uneven parts": (2, 8192 * 2 + 4096 + 77),
    "split, many parts": (1, 4096 * 6),
}
NO_TRITON = triton_missing()
NO_EMULATOR = emulated_cuda.missing()


@pytest.fixture(scope="module")
def emulated():
    """forward and backward of csrc/token_logprobs.cu, for CPU tensors."""
    ops = emulated_cuda.load("token_logprobs", "token_logprobs_forward", "token_logprobs_backward")
    return SimpleNamespace(forward=ops.token_logprobs_forward, backward=ops.token_logprobs_backward)


@pytest.fixture(
    params=[
        pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))),
        pytest.param("cuda", marks=pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))),
    ],
    autouse=True,
)
def kernels(request, monkeypatch):
    """Makes the public function use one set of kernels; they are what the fixture gives."""
    if request.param == "cuda":
        impl = request.getfixturevalue("emulated")
    else:
        from fastpo.kernels.token_logprobs import triton_kernels as impl
    monkeypatch.delenv("FASTPO_BACKEND", raising=False)
    monkeypatch.setattr(op, "OP", Op("token_logprobs", [Backend(request.param, "any", always, always, impl)]))
    return impl


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
    logits, labels = rows(n, 4096 * 4 + 5 if n < 8 else 4096 + 5)
    temperature = torch.linspace(0.5, 2, n) if per_row else 0.7
    stats = STATS[:5] if n < 8 else STATS[:3]
    check(logits, labels, stats, temperature=temperature, logit_softcap=softcap)


def test_small_logits_under_a_softcap():
    """x of 1e-3 against a cap of 30: tanh must keep its relative precision near 0."""
    logits, labels = rows(9, 300)
    check(logits * 1e-3, labels, logit_softcap=30.0)


def test_large_offset():
    """Log-probs do not lose the precision that logits of a thousand leave them."""
    logits, labels = rows(9, 300)
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
    logits, labels = rows(3, vocab)
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
    logits, labels = rows(3, vocab)
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


@pytest.mark.parametrize("vocab", [300, 301], ids=["aligned", "gradients aligned unlike logits"])
def test_strided_views_and_expanded_gradients(vocab):
    """[B, T, V] shifted by one has two row strides; sum() sends back one number for all rows; labels step by two."""
    logits, labels = rows(12, vocab)
    check(logits.view(2, 6, vocab), labels.view(2, 6)[:, 1:], STATS[:3], view=lambda x: x[:, :-1])
    check(logits.half().view(2, 6, vocab), labels.view(2, 6)[:, 1:], STATS[:3], view=lambda x: x[:, 1:])
    check(logits.view(2, 6, vocab), labels.view(2, 6)[:, 1:], STATS[:3], view=lambda x: x[:, :-1], inplace=True)
    leaf = logits.clone().requires_grad_()
    token_logprobs(leaf[::2], labels[::2]).sum().backward()
    exact = logits.double().requires_grad_()
    reference.spec(exact[::2], labels[::2])["logps"].sum().backward()
    assert torch.allclose(leaf.grad.double(), exact.grad, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(dtype):
    check(*rows(9, 4097, dtype), inplace=True)


@pytest.mark.parametrize("vocab", [300, 4096 * 3], ids=["one tile", "split"])
def test_label_out_of_range_makes_its_row_nan(vocab, kernels):
    """As on a GPU, where nobody waits to look at the labels: no read out of bounds, NaN in that row only."""
    logits, labels = rows(4, vocab)
    labels[1:] = torch.tensor([-1, vocab, 3])
    logps, normalizer = torch.empty(4), torch.empty(2, 4)
    label_set, label_set_prob = torch.tensor([1, vocab]), torch.empty(4)
    settings = (1.0, 0.0, -100)
    stats = (*(torch.empty(0) for _ in STATS[1:]), label_set_prob)
    kernels.forward(logits[None], labels, None, label_set, *settings, 10, logps, normalizer, *stats)
    assert logps.isnan().tolist() == [False, True, True, False]
    assert label_set_prob.isnan().tolist() == [False, True, True, True]
    grad = torch.empty_like(logits)[None]
    kernels.backward(logits[None], labels, None, *settings, normalizer, torch.ones(4), None, grad)
    assert grad[0].isnan().all(dim=-1).tolist() == [False, True, True, False]
    assert not grad[0, [0, 3]].isnan().any()


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
def test_split_rows_cover_the_vocabulary(kernels):
    """Every element is read once, by parts of whole tiles, and a row is split only where rows are few."""
    if not hasattr(kernels, "split_row"):
        pytest.skip("decided inside the CUDA file")
    for num_rows in (1, 5, 100, 10_000):
        for vocab in (1, 4096, 32000, 128256, 151936):
            splits, part = kernels.split_row(num_rows, vocab, 4096, processors=132)
            assert (splits - 1) * part < vocab <= splits * part
            assert splits == 1 or (part % 4096 == 0 and num_rows < 8 * 132)
