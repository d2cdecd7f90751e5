"""token_logprobs on a GPU, every backend that runs there; tests/test_token_logprobs_gpu_kernels.py needs no GPU.

SHAPES crosses the tiles of both kernels (4096 to 8192 elements), their alignment (odd vocabularies) and the splitting
of a row over blocks (few rows). Tests with "small" in their name are quick enough for compute-sanitizer.
"""

import pytest
import torch
from one_backend import one_backend
from token_logprobs_cases import DTYPES, check, rows

from fastpo.kernels.token_logprobs import STATS, token_logprobs
from fastpo.kernels.token_logprobs.op import OP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]

SHAPES = {
    "one element": (3, 1),
    "a vector and a tail": (3, 13),
    "odd vocabulary": (70, 50257),
    "few rows": (3, 151936),
    "one row": (1, 128256),
    "many rows": (3000, 4097),
}


backend = one_backend(OP, "cuda", "triton", "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape, dtype):
    label_set = torch.arange(0, shape[1], max(1, shape[1] // 3), device="cuda")
    check(*rows(*shape, dtype, "cuda"), stats=STATS, label_set=label_set)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_shapes(dtype):
    """Every kernel at a size that compute-sanitizer is soon done with: whole rows, split rows, in place, unaligned."""
    check(*rows(2000, 37, dtype, "cuda"), stats=STATS, label_set=torch.tensor([0, 36], device="cuda"))
    check(*rows(3, 20011, dtype, "cuda"), stats=STATS, label_set=torch.tensor([0, 36], device="cuda"))
    check(*rows(3, 20011, dtype, "cuda"), stats=(), inplace=True)
    logits, labels = rows(12, 301, dtype, "cuda")
    check(logits.view(2, 6, 301), labels.view(2, 6)[:, 1:], view=lambda x: x[:, :-1])


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_temperature_and_softcap(per_row, softcap):
    logits, labels = rows(65, 32001, device="cuda")
    temperature = torch.linspace(0.5, 2, 65, device="cuda") if per_row else 0.7
    check(logits, labels, temperature=temperature, logit_softcap=softcap)


@pytest.mark.parametrize("k", [1, 10, 16])
def test_topk_with_ties(k):
    """Rounded fp16 logits take few values; ascending ones make every element a new maximum."""
    logits, labels = rows(20, 32000, torch.float16, "cuda")
    check(logits.round(), labels, topk=k)
    check(logits.sort(dim=1).values, labels, topk=k)


@pytest.mark.parametrize("vocab", [301, 32000])
def test_masked_poisoned_and_ignored_rows(vocab):
    """-inf is a mask; NaN and +inf make their row NaN; an ignored row of NaN is 0 in everything."""
    logits, labels = rows(6, vocab, device="cuda")
    labels[1:] = 5
    logits[0] = torch.nan
    logits[1, : vocab - 3] = -torch.inf
    labels[1] = vocab - 1
    logits[2, vocab - 1] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    leaf = logits.requires_grad_()
    logps, stats = token_logprobs(leaf * 1, labels, stats=("entropy", "sum_p2", "topk_mass", "topk_entropy"))
    logps.sum().backward()
    for value in (logps, *stats.values()):
        assert value.isnan().tolist() == [False, False, True, True, True, False]
        assert value[0] == 0
    assert leaf.grad.isnan().any(dim=1).tolist() == [False, False, True, True, True, False]
    assert not leaf.grad[0].any()


def test_label_out_of_range_makes_its_row_nan():
    logits, labels = rows(4, 32000, device="cuda")
    labels[1:] = torch.tensor([-1, 32000, 3])
    leaf = logits.requires_grad_()
    logps = token_logprobs(leaf, labels)
    logps.sum().backward()
    assert logps.isnan().tolist() == [False, True, True, False]
    assert leaf.grad.isnan().all(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(dtype):
    logits, labels = rows(70, 32001, dtype, "cuda")
    check(logits, labels, inplace=True)
    leaf = logits.requires_grad_()
    work = leaf * 1
    (grad,) = torch.autograd.grad(token_logprobs(work, labels, inplace_backward=True).sum(), work)
    assert grad.data_ptr() == work.data_ptr()


def test_strided_views_and_expanded_gradients():
    for vocab in (32000, 32001):
        logits, labels = rows(12, vocab, torch.bfloat16, "cuda")
        check(logits.view(2, 6, vocab), labels.view(2, 6)[:, 1:], view=lambda x: x[:, :-1])
        check(logits.view(2, 6, vocab), labels.view(2, 6)[:, 1:], view=lambda x: x[:, 1:], inplace=True)
        leaf = logits.requires_grad_()
        token_logprobs(leaf[::2], labels[::2]).sum().backward()
        assert not leaf.grad[1::2].any()


@pytest.mark.parametrize("n", [5, 3000])
def test_deterministic(n):
    logits, labels = rows(n, 32001, torch.bfloat16, "cuda")

    def outputs():
        leaf = logits.detach().clone().requires_grad_()
        logps, stats = token_logprobs(leaf * 1, labels, stats=STATS[:5])
        (logps.sum() + stats["entropy"].sum()).backward()
        return [logps, *stats.values(), leaf.grad]

    first = outputs()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(), strict=True))


def test_no_host_sync(backend):
    """Neither direction waits for the device, statistics included."""
    if backend == "torch":
        pytest.skip("the kernels are what is promised not to wait")
    logits, labels = rows(70, 32001, torch.bfloat16, "cuda")
    leaf = logits.requires_grad_()
    label_set = torch.tensor([1, 2], device="cuda")

    def step():
        logps, stats = token_logprobs(leaf, labels, stats=STATS, label_set=label_set)
        (logps.sum() + stats["entropy"].sum()).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream_and_in_a_graph(backend):
    if backend == "torch":
        pytest.skip("the kernels are what must find the stream")
    logits, labels = rows(5, 128256, torch.bfloat16, "cuda")
    expected = token_logprobs(logits, labels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logps = token_logprobs(logits, labels)
    logps.zero_()
    graph.replay()
    assert torch.equal(logps, expected)


def test_compiles_without_graph_breaks():
    logits, labels = rows(70, 32001, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda x: token_logprobs(x * 2, labels, stats=("entropy",)), fullgraph=True)
    logps, stats = compiled(logits)
    eager_logps, eager_stats = token_logprobs(logits * 2, labels, stats=("entropy",))
    assert torch.allclose(logps, eager_logps, atol=1e-4)
    assert torch.allclose(stats["entropy"], eager_stats["entropy"], atol=1e-4)


def test_more_than_2_to_the_31_elements(backend):
    """Offsets are 64 bits wide in both directions: the last rows lie beyond element 2^31. In place, for memory."""
    if backend == "torch":
        pytest.skip("plain PyTorch holds several fp32 copies of the logits")
    vocab = 128256
    n = 2**31 // vocab + 50
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GB of GPU memory")
    last, last_labels = rows(30, vocab, torch.bfloat16, "cuda")
    logits = torch.zeros(n, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-30:] = last
    labels = torch.full((n,), 7, device="cuda")
    labels[-30:] = last_labels
    expected_leaf = last.clone().requires_grad_()
    expected = token_logprobs(expected_leaf, last_labels)
    expected.sum().backward()
    work = logits.requires_grad_() * 1
    logps = token_logprobs(work, labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(logps.sum(), work)
    assert torch.allclose(logps[-30:], expected, atol=1e-5)
    assert torch.allclose(grad[-30:].float(), expected_leaf.grad.float(), atol=1e-2)
    assert torch.allclose(logps[: n - 30], -torch.tensor(float(vocab), device="cuda").log(), atol=1e-4)
