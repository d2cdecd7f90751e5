"""path_sum and subtree_sum on a GPU: against plain PyTorch, forward and backward, the same bits twice, no host sync."""

import pytest
import torch

from fastpo import build_tree
from fastpo.dispatch import extension_missing, triton_missing
from fastpo.kernels.tree_scan import path_sum, reference, subtree_sum
from fastpo.trees import join

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]
FUNCTIONS = ((path_sum, reference.path_sum), (subtree_sum, reference.subtree_sum))


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch) -> str:
    missing = extension_missing("_cuda") if request.param == "cuda" else triton_missing()
    if missing:
        pytest.skip(missing)
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


def forest():
    """Some 60,000 nodes, 2 to 5,000 deep, on the GPU."""
    generator = torch.Generator().manual_seed(0)
    trees = [build_tree([list(range(5000))], 1)]
    for _ in range(100):
        prompt = torch.randint(1000, (64,), generator=generator)
        answers = torch.randint(2, (16, 40), generator=generator)
        trees.append(build_tree([torch.cat((prompt, answer)) for answer in answers], 64))
    return join(trees).to("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 3])
def test_sums_and_gradients(backend, dtype, columns):
    tree = forest()
    values = torch.randn(tree.num_nodes, columns, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(values)
    shape = tree.parent, tree.depth, tree.subtree_end
    for (function, spec), (_, transpose) in zip(FUNCTIONS, FUNCTIONS[::-1], strict=True):
        found = function(values, tree)
        torch.testing.assert_close(found, spec(values.detach(), *shape), rtol=torch.finfo(dtype).eps, atol=1e-9)
        (grad,) = torch.autograd.grad(found, values, upstream)
        torch.testing.assert_close(grad, transpose(upstream, *shape), rtol=torch.finfo(dtype).eps, atol=1e-9)
        assert torch.equal(function(values, tree), found)


def test_no_host_sync(backend):
    tree = forest()
    values = torch.randn(tree.num_nodes, device="cuda")
    for function, _ in FUNCTIONS:
        function(values, tree)  # compiled, where that takes a while
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function, _ in FUNCTIONS:
            function(values, tree)
    finally:
        torch.cuda.set_sync_debug_mode("default")
