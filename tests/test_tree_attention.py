"""tree_attention through its public function, on the C++ and the plain PyTorch backend, against fp64.

The C++ backend takes tiles of 48 rows (token x query head of a group), six rows at a time; the current path in vectors
of 16, 8 or 4 slots (by instruction set) and blocks of 256; and cuts the preorder into chunks where the work is worth
it. SHAPES and FORESTS take every tail and border of these. The Triton kernels have tests of their own.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from tree_attention_cases import chain, check, fan, forest, random_forest, tensors

from fastpo import attention_blocks, tree_attention
from fastpo.dispatch import extension_missing
from fastpo.kernels.tree_attention import cpu_kernels, reference
from fastpo.kernels.tree_attention.blocks import BLOCK, EMPTY, FULL, block_states
from fastpo.types import TokenTree

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORESTS = {
    "one token": chain(1),
    "roots only": forest([-1] * 53),
    "a tile and one token": chain(49),
    "chain over a block": chain(300),
    "long branches": random_forest(301, 0.02),
    "short branches": random_forest(201, 0.3),
    "bushes": random_forest(130, 0.6),
    "prompt and answers": fan(61, 5, 33),
    "branches over a block": fan(270, 3, 20),
}
SHAPES = {  # heads of q, heads of k and v, head size
    "one of one": ((1, 1), 1),
    "odd": ((3, 3), 13),
    "grouped": ((8, 2), 64),
    "group of five": ((5, 1), 80),
    "group over a tile": ((50, 1), 16),
    "large": ((2, 1), 256),
}
SETTINGS = {
    "window of 1": {"window": 1},
    "window": {"window": 17},
    "window over a block": {"window": 260},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.4},
    "all": {"window": 40, "softcap": 3.0, "scale": -0.3},
}
ERRORS = {
    "q has shape .5, 32.; it should be .N, heads, D.": lambda q, k, v, t: (q[:, 0], k, v, t),
    "v has shape .5, 1, 32.; it should be .5, 2, 32., as k": lambda q, k, v, t: (q, k, v[:, :1], t),
    "k has shape .4, 2, 32.; it should be .5, heads, 32., as q": lambda q, k, v, t: (q, k[:4], v, t),
    "k has shape .5, 2, 31.; it should be .5, heads, 32., as q": lambda q, k, v, t: (q, k[..., :31], v, t),
    "q has 3 heads; it should have a multiple of the 2 heads of k": lambda q, k, v, t: (q[:, :3], k, v, t),
    "q has head size 0; it should be from 1 to 256": lambda q, k, v, t: (q[..., :0], k, v, t),
    "tree has 4 nodes; it should have 5, the tokens of q": lambda q, k, v, t: (q, k, v, chain(4)),
    "k is on meta; it should be on cpu, where q is": lambda q, k, v, t: (q, k.to("meta"), v, t),
    "tree is on meta; it should be on cpu, where q is": lambda q, k, v, t: (q, k, v, t.to("meta")),
}
TYPE_ERRORS = {
    "q is torch.int64; it should be float32, bfloat16, float16 or float64": lambda q, k, v, t: (q.long(), k, v, t),
    "v is torch.bfloat16; it should be torch.float32, as q is": lambda q, k, v, t: (q, k, v.bfloat16(), t),
    "tree is a list; it should be a TokenTree": lambda q, k, v, t: (q, k, v, [0]),
    "k is a list; it should be a tensor": lambda q, k, v, t: (q, [0], v, t),
}


def backends() -> list[str]:
    """torch, and cpu once per instruction set."""
    if extension_missing("_C"):
        return ["torch"]
    flags = torch.backends.cpu.get_cpu_capability()
    isas = ["generic"] + ["avx2"] * (flags in ("AVX2", "AVX512")) + ["avx512"] * (flags == "AVX512")
    return ["torch", *(f"cpu-{isa}" for isa in isas)]


@pytest.fixture(params=backends())
def backend(request, monkeypatch) -> str:
    name, _, isa = request.param.partition("-")
    monkeypatch.setenv("FASTPO_BACKEND", name)
    monkeypatch.setenv("FASTPO_CPU_ISA", isa)
    return request.param


needs_cpp = pytest.mark.skipif(extension_missing("_C") is not None, reason="fastpo._C is not built")


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("tree", FORESTS.values(), ids=FORESTS.keys())
def test_forests(backend, tree, sinks):
    check(tree, tensors(tree, sinks=sinks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_heads(backend, shape, dtype):
    for tree in (FORESTS["short branches"], FORESTS["prompt and answers"]):
        check(tree, tensors(tree, *shape, dtype))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(backend, settings):
    for name in ("chain over a block", "short branches", "branches over a block"):
        check(FORESTS[name], tensors(FORESTS[name], sinks="scale" in settings), **settings)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_chunks(backend, dtype):
    """Enough work to be cut into chunks, in the middle of branches and of the prompt: their dK and dV meet again."""
    tree = fan(700, 4, 90)
    check(tree, tensors(tree, (4, 2), 16, dtype, sinks=True))


@given(st.integers(1, 150), st.floats(0, 0.9), st.integers(0, 10**6), st.sampled_from([None, 1, 2, 9, 33]))
def test_random_forests(n, leave, seed, window):
    tree = random_forest(n, leave, seed)
    check(tree, tensors(tree, (3, 1), 8, sinks=seed % 2 == 0, seed=seed), window=window)


def test_each_path_alone(backend):
    """A token of a packed forest gets what it gets in its own sequence, a window included."""
    tree = random_forest(90, 0.15, seed=3)
    q, k, v = (x.detach() for x in tensors(tree))
    out = tree_attention(q, k, v, tree, window=6)
    for leaf in range(tree.num_nodes):
        path = [leaf]
        while tree.parent[path[0]] >= 0:
            path.insert(0, int(tree.parent[path[0]]))
        alone = tree_attention(q[path], k[path], v[path], chain(len(path)), window=6)
        torch.testing.assert_close(out[path], alone)


def test_a_chain_is_causal_attention(backend):
    q, k, v = (x.detach() for x in tensors(chain(200), (4, 4)))
    sdpa = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(tree_attention(q, k, v, chain(200)), sdpa.transpose(0, 1))


def test_sinks_and_softcap_as_transformers():
    """GPT-OSS's sinks and Gemma2's softcap, by their eager attention."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

    tree = random_forest(70, 0.1)
    *qkv, sinks = (x.detach() for x in tensors(tree, (4, 2), 16, sinks=True))
    mask = torch.zeros(70, 70).masked_fill(~reference.visible(tree.subtree_end, tree.depth), -1e30)[None, None]
    heads = [x.transpose(0, 1)[None] for x in qkv]
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks = 2, sinks
    theirs, _ = gpt_oss(module, *heads, mask, 0.25)
    torch.testing.assert_close(tree_attention(*qkv, tree, scale=0.25, sinks=sinks), theirs[0])
    theirs, _ = gemma2(module, *heads, mask, scaling=0.25, softcap=2.0)
    torch.testing.assert_close(tree_attention(*qkv, tree, scale=0.25, softcap=2.0), theirs[0])


def test_no_tokens(backend):
    leaves = tensors(chain(0), sinks=True)
    out = tree_attention(*leaves[:3], chain(0), sinks=leaves[3])
    assert out.shape == (0, 4, 32)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves] and not grads[3].any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_views_and_expanded_gradients(backend, dtype):
    """q, k, v out of one projection; then with a last stride of 2; the gradient of a sum is one number, expanded."""
    tree = FORESTS["short branches"]
    fused = torch.randn(tree.num_nodes, 4, 3, 24, dtype=dtype, requires_grad=True)
    for views in (fused.unbind(2), [x[..., ::2] for x in fused.unbind(2)]):
        copies = [x.detach().contiguous().requires_grad_() for x in views]
        (grad,) = torch.autograd.grad(tree_attention(*views, tree).sum(), fused)
        grads = torch.autograd.grad(tree_attention(*copies, tree).sum(), copies)
        for at, expected in enumerate(grads):
            got = grad[:, :, at, :: 24 // expected.shape[2]]
            assert torch.equal(got, expected)


def test_large_scores(backend):
    """Scores of hundreds, and one key that outweighs all others: no overflow."""
    tree = FORESTS["long branches"]
    q, k, v = tensors(tree)
    check(tree, [(q.detach() * 30).requires_grad_(), k, v])
    check(tree, [q, k, v, torch.full((4,), 80.0, requires_grad=True)])
    check(tree, [q, k, v, torch.full((4,), -torch.inf, requires_grad=True)][:3])


def test_nan_stays_in_its_path(backend):
    """What is NaN in one answer shows in no other."""
    tree = fan(60, 2, 50)
    q, k, v = (x.detach() for x in tensors(tree))
    k[70] = torch.nan
    bad = tree_attention(q, k, v, tree).isnan().any(dim=2).any(dim=1)
    assert bad[70:110].all() and not bad[:60].any() and not bad[110:].any()


@needs_cpp
def test_same_bits_on_any_number_of_threads(monkeypatch):
    tree, threads = fan(700, 4, 90), torch.get_num_threads()
    leaves = tensors(tree, (4, 2), 16, sinks=True)
    results = []
    try:
        for number in (1, 2, 4, 4):
            torch.set_num_threads(number)
            out = tree_attention(*leaves[:3], tree, sinks=leaves[3])
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_metadata_made_once(backend):
    tree = FORESTS["short branches"]
    leaves = tensors(tree)
    assert torch.equal(tree_attention(*leaves, tree), tree_attention(*leaves, attention_blocks(tree)))


def test_half_precision_under_autocast():
    tree = FORESTS["short branches"]
    leaves = tensors(tree)
    with torch.autocast("cpu", torch.bfloat16):
        out = tree_attention(*leaves, tree)
    assert torch.equal(out, tree_attention(*(x.bfloat16() for x in leaves), tree))


@needs_cpp
def test_opcheck():
    tree = FORESTS["bushes"]
    blocks = attention_blocks(tree)
    columns = (blocks.subtree_end, blocks.depth, blocks.key_blocks)
    for *qkv, sinks in (tensors(tree, sinks=True), [*tensors(tree, dtype=torch.float64), None]):
        opcheck(torch.ops.fastpo.tree_attention_fwd.default, (*qkv, sinks, *columns, 0.2, 3.0, 5))
        with torch.no_grad():
            out, logsumexp = torch.ops.fastpo.tree_attention_fwd(*qkv, sinks, *columns, 0.2, 3.0, 5)
        saved = [x if x is None else x.detach() for x in (*qkv, out, logsumexp, sinks)]
        opcheck(torch.ops.fastpo.tree_attention_bwd.default, (torch.randn_like(out), *saved, *columns, 0.2, 3.0, 5))


@needs_cpp
def test_fullgraph_compile():
    """The metadata in the graph too, and one graph for forests of any size."""
    compiled = torch.compile(tree_attention, fullgraph=True, dynamic=True)
    for name in ("short branches", "long branches"):
        tree = FORESTS[name]
        leaves = tensors(tree, sinks=True)
        out = compiled(*leaves[:3], tree, window=9, sinks=leaves[3])
        expected = tree_attention(*leaves[:3], tree, window=9, sinks=leaves[3])
        assert torch.equal(out, expected)
        grads = (torch.autograd.grad(x.sum(), leaves) for x in (out, expected))
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_formulas_of_the_reference(monkeypatch):
    """The written gradients are those of autograd through the spec."""
    monkeypatch.setenv("FASTPO_BACKEND", "torch")
    tree = FORESTS["bushes"]
    for sinks in (False, True):
        leaves = [x.detach().double().requires_grad_() for x in tensors(tree, sinks=sinks)]
        check(tree, leaves, softcap=2.0, window=3)


@pytest.mark.parametrize(("message", "arguments"), ERRORS.items(), ids=ERRORS.keys())
def test_value_errors(message, arguments):
    with pytest.raises(ValueError, match=message):
        tree_attention(*arguments(*tensors(chain(5)), chain(5)))


@pytest.mark.parametrize(("message", "arguments"), TYPE_ERRORS.items(), ids=TYPE_ERRORS.keys())
def test_type_errors(message, arguments):
    with pytest.raises(TypeError, match=message):
        tree_attention(*arguments(*tensors(chain(5)), chain(5)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"window": 0}, ValueError, "window is 0; it should be at least 1 token, or None"),
        ({"window": 2.5}, TypeError, "window is a float; it should be an int, or None"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; it should be a positive number, or None"),
        ({"scale": float("inf")}, ValueError, "scale is inf; it should be a finite number"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape .2.; it should be .4., one logit per head of q"),
        ({"sinks": torch.zeros(4).long()}, TypeError, "sinks is torch.int64; it should be a floating-point tensor"),
    ],
)
def test_errors_of_settings(settings, error, message):
    with pytest.raises(error, match=message):
        tree_attention(*tensors(chain(5)), chain(5), **settings)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_fp32_inside_on_the_cpu(dtype, monkeypatch):
    """The output, and the gradient of v, are those of the converted inputs in fp32, rounded once: as documented."""
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    tree = random_forest(300, 0.2)
    own = tensors(tree, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in own]
    found, wanted = tree_attention(*own, tree), tree_attention(*wide, tree)
    assert torch.equal(found, wanted.to(dtype))
    [grad], [wanted_grad] = (torch.autograd.grad(y.float().sum(), x[2]) for y, x in ((found, own), (wanted, wide)))
    assert torch.equal(grad, wanted_grad.to(dtype))


@needs_cpp
@pytest.mark.parametrize(
    ("depth", "ends", "message"),
    [
        ([0, 2, 1], [3, 2, 3], "tree.depth has 2 at node 1; it should be from 0 to 1"),
        ([0, -1, 0], [1, 2, 3], "tree.depth has -1 at node 1"),
        ([0, 1, 1], [3, 3, 3], "tree.subtree_end has 3 at node 1; it should be 2"),
        ([0, 1, 0], [2, 2, 9], "tree.subtree_end has 9 at node 2; it should be 3"),
    ],
)
def test_wrong_trees(depth, ends, message, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    columns = [torch.tensor(x) for x in ([0] * 3, [-1] * 3, depth, ends, [], [])]
    with pytest.raises(RuntimeError, match=f"^{message}"):  # one line, without a place in C++ before it
        tree_attention(*tensors(chain(3)), TokenTree(*columns))


def test_block_states_of_a_thousand_forests():
    """Against the mask: no visible pair is skipped, nothing is taken for full that is not, nothing visited in vain."""
    for seed in range(1000):
        tree = random_forest(20 + seed % 331, (seed % 17) / 20, seed)
        for window in (None, 1 + seed % 90):
            for rows in (16, 64):
                assert_states(tree, rows, window)
    for end in (79, 80, 81, 127, 128, 129):  # a block that the last token of a tile, or the next one, does not see
        assert_states(forest([*range(-1, end - 1), *[-1] * 20]), 16, None)


def assert_states(tree: TokenTree, rows: int, window: int | None) -> None:
    states = block_states(attention_blocks(tree), rows, window)
    mask = reference.visible(tree.subtree_end, tree.depth, window)
    n = tree.num_nodes
    edges = (0, -n % BLOCK, 0, -n % rows)
    some = F.pad(mask, edges).unflatten(0, (-1, rows)).unflatten(2, (-1, BLOCK)).any(3).any(1)
    every = F.pad(mask, edges, value=True).unflatten(0, (-1, rows)).unflatten(2, (-1, BLOCK)).all(3).all(1)
    assert not (some & (states == EMPTY)).any()
    assert not (~every & (states == FULL)).any()
    if window is None:
        assert torch.equal(some, states != EMPTY)
        whole = n // BLOCK
        assert torch.equal(every[:, :whole], (states == FULL)[:, :whole])


@needs_cpp
@pytest.mark.parametrize("window", [None, 20])
def test_counted_pairs(window):
    """Visible pairs are those of the mask; the tiles' edges cost less than a tenth on prompts with answers."""
    for tree in (*FORESTS.values(), fan(100, 16, 100)):
        mask = reference.visible(tree.subtree_end, tree.depth, window)
        visible, computed = cpu_kernels.pairs(attention_blocks(tree), 2, window or 0)
        assert visible == 2 * mask.sum() and visible <= computed
    if window is None:
        assert visible > 0.9 * computed
