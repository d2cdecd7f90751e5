"""The Triton kernels of tree_attention in triton's interpreter, through the public function, against fp64.

Blocks are 64 keys of the metadata, in programs of 16, 32 or 64, and 16 to 128 rows (token x query head of a group):
FORESTS leave tails in them, have runs of empty, partial and full blocks in turn, and blocks that a window hides.
float32 and float16 only: the interpreter multiplies bfloat16's bits as integers in tl.dot.
"""

import pytest
import torch
from tree_attention_cases import chain, check, fan, forest, random_forest, tensors

from fastpo import attention_blocks, tree_attention
from fastpo.dispatch import triton_missing
from fastpo.kernels.tree_attention.blocks import BLOCK, block_states

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fastpo.kernels.tree_attention import triton_kernels  # noqa: E402
from fastpo.kernels.tree_attention.triton_forward import block_state  # noqa: E402

pytestmark = [
    pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter meets infinities
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU itself"),
]
FORESTS = {
    "one token": chain(1),
    "roots only": random_forest(20, 1.0),
    "chain": chain(193),
    "prompt and answers": fan(130, 3, 40),
    "branches": random_forest(150, 0.05),
    "bushes": random_forest(70, 0.5),
    "not seen by a tile's last token": forest([*range(-1, 94), -1, -1, -1]),
}


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "triton")


@pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS.keys())
def test_forests(tree):
    check(tree, tensors(tree, (2, 1), 16, sinks=True))
    check(tree, tensors(tree, (3, 1), 16, torch.float16))


@pytest.mark.parametrize(("heads", "size"), [((1, 1), 1), ((3, 3), 80), ((5, 1), 96), ((4, 2), 64), ((1, 1), 256)])
def test_heads(heads, size):
    for dtype in (torch.float32, torch.float16):
        check(FORESTS["bushes"], tensors(FORESTS["bushes"], heads, size, dtype))


@pytest.mark.parametrize("settings", [{"window": 5}, {"window": 70}, {"softcap": 1.5}, {"window": 33, "softcap": 2.0}])
def test_settings(settings):
    for name in ("chain", "branches"):
        check(FORESTS[name], tensors(FORESTS[name], (2, 1), 16, sinks="softcap" in settings), **settings)


@pytest.mark.parametrize(("splits", "dtype"), [(2, torch.float32), (7, torch.float16)], ids=str)
def test_split_queries(splits, dtype, monkeypatch):
    """dK and dV from parts of the queries, some of them empty."""
    monkeypatch.setattr(triton_kernels, "_splits", lambda q, k: splits)
    for name in ("prompt and answers", "bushes"):
        check(FORESTS[name], tensors(FORESTS[name], (2, 1), 16, dtype))


def test_no_tokens():
    leaves = tensors(chain(0), sinks=True)
    out = tree_attention(*leaves[:3], chain(0), sinks=leaves[3])
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]


def test_views_and_expanded_gradients():
    tree = FORESTS["bushes"]
    fused = torch.randn(tree.num_nodes, 2, 3, 16, requires_grad=True)
    copies = [x.detach().contiguous().requires_grad_() for x in fused.unbind(2)]
    (grad,) = torch.autograd.grad(tree_attention(*fused.unbind(2), tree).sum(), fused)
    assert torch.equal(grad, torch.stack(torch.autograd.grad(tree_attention(*copies, tree).sum(), copies), 2))


@triton.jit
def _states_kernel(blocks_ptr, depths_ptr, window, out_ptr, tokens, num_blocks, ROWS: tl.constexpr):
    tile = tl.program_id(0)
    first, last = tile * ROWS, tl.minimum(tile * ROWS + ROWS, tokens) - 1
    rows = (first, last, tl.load(depths_ptr + 2 * tile), tl.load(depths_ptr + 2 * tile + 1), window)
    for block in range(last // 64 + 1):
        state = block_state(blocks_ptr, num_blocks, block, rows, window is not None, 64)
        tl.store(out_ptr + tile * num_blocks + block, state)


@pytest.mark.parametrize("window", [None, 40])
def test_block_states(window):
    """What the kernels decide is what the spec says, which is tested against the mask on a thousand forests."""
    rows = 32
    trees = [random_forest(100 + 29 * seed, seed / 40, seed) for seed in range(12)]
    for seed, tree in enumerate([*trees, FORESTS["not seen by a tile's last token"]]):
        blocks = attention_blocks(tree)
        tiles = blocks.depth.split(rows)
        depths = torch.tensor([[x.amin(), x.amax()] for x in tiles], dtype=torch.int32)
        states = torch.zeros(len(tiles), blocks.key_blocks.shape[1], dtype=torch.int64)
        grid, sizes = (len(tiles),), (tree.num_nodes, states.shape[1])
        _states_kernel[grid](blocks.key_blocks, depths, window, states, *sizes, ROWS=rows)
        assert torch.equal(states, block_states(blocks, rows, window)), seed
    assert BLOCK == 64
