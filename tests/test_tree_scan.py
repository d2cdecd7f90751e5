"""path_sum and subtree_sum on every backend, against the dense definition in fp64 and against each other's transpose.

The forests: random ones of up to 50 nodes (hypothesis), and three of 2 to 2,000 nodes that cross the edges of the GPU
kernels: 256 nodes and 1,024 steps to a program. Triton's run in its interpreter, which truncates where the compiler
rounds to bfloat16; the CUDA file runs in emulated_cuda.
"""

import os

import emulated_cuda
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpo import build_tree
from fastpo.dispatch import Backend, Op, always, triton_missing
from fastpo.kernels.tree_scan import op, path_sum, subtree_sum
from fastpo.trees import join
from fastpo.types import TokenTree

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_TRITON = triton_missing()
NO_EMULATOR = emulated_cuda.missing()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where the interpreter meets infinities


@pytest.fixture(scope="module")
def emulated():
    """csrc/tree_scan.cu for CPU tensors, as a backend's implementation."""
    ops = emulated_cuda.load("tree_scan", "tree_path_sum", "tree_subtree_sum")

    class Emulated:
        path_sum = ops.tree_path_sum
        subtree_sum = ops.tree_subtree_sum

    return Emulated


@pytest.fixture(
    params=[
        "cpu",
        "torch",
        pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))),
        pytest.param("cuda", marks=pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))),
    ]
)
def backend(request, monkeypatch) -> str:
    """The name of the backend that the public functions use."""
    if request.param == "cuda":
        own = Backend("cuda", "any", always, always, request.getfixturevalue("emulated"))
        monkeypatch.setattr(op, "OP", Op("tree_scan", [own, *op.OP.backends[1:]]))
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


def visible(tree: TokenTree) -> torch.Tensor:
    """[N, N] float64, 1 where j is an ancestor of i or i."""
    i = torch.arange(tree.num_nodes)
    return ((i <= i[:, None]) & (i[:, None] < tree.subtree_end)).double()


def chain(length: int) -> TokenTree:
    return build_tree([list(range(length))], 1)


def prompts(number: int, length: int) -> TokenTree:
    """Trees of a prompt and random answers that share prefixes, and a chain."""
    generator = torch.Generator().manual_seed(0)
    trees = []
    for _ in range(number):
        prompt = torch.randint(50, (length,), generator=generator)
        answers = torch.randint(2, (number, 10), generator=generator)
        trees.append(build_tree([torch.cat((prompt, answer)) for answer in answers], length))
    return join([*trees, chain(20 * length)])


FORESTS = {"node": build_tree([[1, 2]], 1), "chain": chain(1100), "forest": prompts(12, 30)}
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), max_size=10)


def values_of(tree: TokenTree, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(tree.num_nodes, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(found: torch.Tensor, exact: torch.Tensor, values: torch.Tensor) -> None:
    """Rounded to the type of the values: within half a step of the sum in fp64, whose own error is added."""
    assert found.dtype == values.dtype and found.is_contiguous()
    step = torch.finfo(values.dtype).eps / 2
    if values.dtype in (torch.bfloat16, torch.float16):  # fp64 to these goes through fp32
        step += torch.finfo(torch.float32).eps / 2
    if values.dtype == torch.bfloat16 and os.environ.get("FASTPO_BACKEND") == "triton":
        step *= 2
    noise = 4 * torch.finfo(torch.float64).eps * (1 + values.double().abs().sum())
    assert ((found.double() - exact).abs() <= step * exact.abs() + noise).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(SEQUENCES, st.sampled_from([1, 3]), st.sampled_from(DTYPES))
def test_random_forests_equal_the_definition(backend, sequences, columns, dtype):
    tree = build_tree(sequences, 1)
    values = values_of(tree, columns, dtype)
    assert_same(path_sum(values, tree), visible(tree) @ values.double(), values)
    assert_same(subtree_sum(values, tree), visible(tree).T @ values.double(), values)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("columns", [1, 2, 70])  # the CPU's columns go 64 at a time
def test_large_forests_equal_the_definition(backend, name, columns):
    if columns == 70 and backend in ("triton", "cuda") and name != "node":
        pytest.skip("slow where kernels are interpreted; their columns are independent")
    tree = FORESTS[name]
    values = values_of(tree, columns, torch.float32)
    assert_same(path_sum(values, tree), visible(tree) @ values.double(), values)
    assert_same(subtree_sum(values, tree), visible(tree).T @ values.double(), values)


def test_one_is_the_gradient_of_the_other(backend):
    """First and second derivatives, on a forest with several roots."""
    tree = build_tree([[0, 1, 2], [0, 1, 3, 4], [5, 6], [5, 7, 8], [5, 7]], 1)
    values = values_of(tree, 2, torch.float64).requires_grad_()
    for function in (path_sum, subtree_sum):
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, tree), values)
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v, tree).square(), values)
    upstream = values_of(tree, 2, torch.float64, seed=1)
    (grad,) = torch.autograd.grad(path_sum(values, tree), values, upstream)
    assert torch.equal(grad, subtree_sum(upstream, tree))


def test_cancellation_costs_nothing(backend):
    """Small values below and beside large ones: float32 sums to the last bit."""
    trees = [build_tree([[i, 1, 2], [i, 1, 3], [i, 4]], 1) for i in range(40)]
    tree = join(trees)
    large = 1e3 if backend == "triton" else 1e7  # a hundred of these leave 1e-10 of fp64
    values = torch.where(tree.depth == 0, large, 1e-3) * (1 + torch.arange(tree.num_nodes) % 7)
    values = torch.where(torch.arange(tree.num_nodes) % 2 == 0, values, -values).float()
    assert_same(subtree_sum(values, tree), visible(tree).T @ values.double(), torch.ones(1))
    assert_same(path_sum(values, tree), visible(tree) @ values.double(), torch.ones(1))


def test_strides_shapes_and_expanded_gradients(backend):
    tree = FORESTS["forest"]
    values = values_of(tree, 6, torch.float32)
    for view in (values[:, ::2], values.T.contiguous().T, values[:, :1].expand(-1, 3), values[:, 0]):
        assert torch.equal(path_sum(view, tree), path_sum(view.contiguous(), tree))
        assert torch.equal(subtree_sum(view, tree), subtree_sum(view.contiguous(), tree))
    cube = values.view(-1, 2, 3)
    assert torch.equal(path_sum(cube, tree), path_sum(values, tree).view(-1, 2, 3))
    leaf = values.clone().requires_grad_()
    path_sum(leaf, tree).sum().backward()  # its upstream gradient has stride 0
    expected = (tree.subtree_end - torch.arange(tree.num_nodes)).float()
    assert torch.equal(leaf.grad, expected[:, None].expand(-1, 6))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_nothing_to_sum(backend, shape):
    tree = build_tree([[1, 2]] if shape[0] else [], 1)
    for function in (path_sum, subtree_sum):
        assert function(torch.zeros(shape), tree).shape == shape


def test_repeated_calls_give_the_same_bits(backend):
    tree, values = FORESTS["forest"], values_of(FORESTS["forest"], 2, torch.float32)
    for function in (path_sum, subtree_sum):
        assert torch.equal(function(values, tree), function(values, tree))


def test_any_number_of_threads_gives_the_same_bits():
    tree, before = join([FORESTS["forest"]] * 30), torch.get_num_threads()
    values = values_of(tree, 2, torch.float32)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((path_sum(values, tree), subtree_sum(values, tree)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_log_probs_of_zero_stay_on_their_paths(monkeypatch, name):
    """-inf reaches what lies below (or above) it, and nothing else."""
    monkeypatch.setenv("FASTPO_BACKEND", name)
    tree = build_tree([[0, 1, 2], [0, 3]], 1)
    values = torch.tensor([-1.0, -torch.inf, -1.0, -1.0])
    assert path_sum(values, tree).tolist() == [-1, -torch.inf, -torch.inf, -2]
    assert subtree_sum(values, tree).tolist() == [-torch.inf, -torch.inf, -1, -1]


def test_opcheck_and_compile():
    tree = FORESTS["forest"]
    values = values_of(tree, 2, torch.float32).requires_grad_()
    for custom in (torch.ops.fastpo.path_sum, torch.ops.fastpo.subtree_sum):
        torch.library.opcheck(custom, (values, tree.parent, tree.depth, tree.subtree_end))

    def weighed(v):
        return (path_sum(v.sin(), tree) * subtree_sum(v, tree)).sum()

    values = values_of(tree, 2, torch.float64).requires_grad_()  # no rounding of large sums between the two
    compiled = torch.compile(weighed, fullgraph=True)
    expected, found = (torch.autograd.grad(f(values), values)[0] for f in (weighed, compiled))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0], TypeError, "values is a list; it should be a tensor"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "values is torch.int64; it should be float32"),
        (torch.zeros(3, 2), ValueError, r"values has shape \[3, 2\]; it should have 2 rows, the nodes of tree"),
        (torch.zeros(()), ValueError, r"values has shape \[\]"),
        (torch.zeros(2, device="meta"), ValueError, "tree is on cpu; it should be on meta, where values is"),
    ],
)
def test_bad_arguments_are_told_in_one_line(values, error, message):
    for function in (path_sum, subtree_sum):
        with pytest.raises(error, match=message):
            function(values, build_tree([[1, 2]], 1))
    with pytest.raises(TypeError, match="tree is a int; it should be a TokenTree"):
        path_sum(torch.zeros(2), 3)


def test_depths_of_no_preorder_are_refused_on_the_cpu():
    tree = build_tree([[1, 2, 3]], 1)
    wanted = r"^tree\.depth is of no forest in preorder: it should start at 0 and rise by at most 1$"
    for depths in ([1, 1, 2], [0, 2, 3], [0, 1, -1]):
        bad = TokenTree(**{**vars(tree), "depth": torch.tensor(depths)})
        with pytest.raises(RuntimeError, match=wanted):
            path_sum(torch.zeros(3), bad)
