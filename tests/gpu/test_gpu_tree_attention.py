"""tree_attention on a GPU, every backend that runs there; tests/test_tree_attention_triton.py needs no GPU.

Tests with "small" in their name are quick enough for compute-sanitizer.
"""

import pytest
import torch
from one_backend import one_backend
from tree_attention_cases import chain, check, fan, random_forest, tensors

from fastpo import attention_blocks, tree_attention
from fastpo.kernels.tree_attention import triton_kernels
from fastpo.kernels.tree_attention.op import OP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORESTS = {
    "one token": chain(1),
    "roots only": random_forest(53, 1.0),
    "chain": chain(700),
    "prompt and answers": fan(600, 5, 130),
    "long branches": random_forest(1501, 0.02),
    "bushes": random_forest(300, 0.5),
}


backend = one_backend(OP, "triton", "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS.keys())
def test_forests(tree, dtype):
    tree = tree.to("cuda")
    check(tree, tensors(tree, (4, 1), 64, dtype, sinks=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "size"), [((1, 1), 1), ((3, 3), 32), ((5, 1), 80), ((6, 2), 96), ((8, 2), 128), ((2, 2), 256)]
)
def test_small_heads(heads, size, dtype):
    for name in ("bushes", "roots only"):
        tree = FORESTS[name].to("cuda")
        check(tree, tensors(tree, heads, size, dtype))


@pytest.mark.parametrize("settings", [{"window": 1}, {"window": 100}, {"softcap": 1.5}, {"window": 33, "softcap": 2.0}])
def test_settings(settings):
    for name in ("long branches", "chain"):
        tree = FORESTS[name].to("cuda")
        check(tree, tensors(tree, (4, 2), 128, torch.bfloat16, sinks=True), **settings)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_small_splits(splits, monkeypatch):
    """dK and dV from parts of the queries, some of them empty."""
    monkeypatch.setattr(triton_kernels, "_splits", lambda q, k: splits)
    for dtype in DTYPES[:2]:
        tree = FORESTS["bushes"].to("cuda")
        check(tree, tensors(tree, (2, 1), 64, dtype))


def test_same_bits_every_time():
    tree = FORESTS["long branches"].to("cuda")
    leaves = tensors(tree, (4, 2), 64, torch.bfloat16, sinks=True)
    results = []
    for _ in range(3):
        out = tree_attention(*leaves[:3], tree, sinks=leaves[3])
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_no_wait_for_the_device(backend):
    """Metadata, forward and backward are launched without a look at any value."""
    tree = FORESTS["long branches"].to("cuda")
    leaves = tensors(tree, (4, 2), 64, torch.bfloat16, sinks=True)
    weight = torch.ones_like(leaves[0])

    def step():
        out = tree_attention(*leaves[:3], attention_blocks(tree), window=50, sinks=leaves[3])
        torch.autograd.grad(out, leaves, weight)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_views_and_expanded_gradients():
    tree = FORESTS["bushes"].to("cuda")
    fused = torch.randn(tree.num_nodes, 2, 3, 64, device="cuda", requires_grad=True)
    copies = [x.detach().contiguous().requires_grad_() for x in fused.unbind(2)]
    (grad,) = torch.autograd.grad(tree_attention(*fused.unbind(2), tree).sum(), fused)
    assert torch.equal(grad, torch.stack(torch.autograd.grad(tree_attention(*copies, tree).sum(), copies), 2))
