"""tree_attention through its public function against fp64, each backend."""

import pytest
import torch

from fastpo import attention_blocks, tree_attention
from fastpo.kernels.tree_attention import reference
from fastpo.types import TokenTree


def forest(parents: list[int]) -> TokenTree:
    """The forest in preorder whose nodes have these parents; -1 for a root."""
    n, depth, end = len(parents), [], list(range(1, len(parents) + 1))
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    for i in reversed(range(n)):
        if parents[i] >= 0:
            end[parents[i]] = max(end[parents[i]], end[i])
    tokens, nobody = torch.zeros(n, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    columns = (torch.tensor(x, dtype=torch.int64) for x in (parents, depth, end))
    return TokenTree(tokens, *columns, nobody, nobody)


def test_a_chain_is_causal_attention():
    q, k, v = (torch.randn(40, 4, 16, dtype=torch.float64) for _ in range(3))
    out = tree_attention(q, k, v, forest(list(range(-1, 39))))
    sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, sdpa.transpose(0, 1))


@pytest.mark.parametrize("sinks", [False, True])
def test_formulas_of_the_reference(sinks, monkeypatch):
    """The written gradients are those of autograd through the spec."""
    monkeypatch.setenv("FASTPO_BACKEND", "torch")
    tree = forest([-1, 0, 1, 1, 3, 0, 5, -1, 7, 7])
    leaves = [torch.randn(10, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    extra = {"sinks": torch.randn(4, dtype=torch.float64, requires_grad=True)} if sinks else {}
    out = tree_attention(*leaves, attention_blocks(tree), softcap=2.0, window=2, **extra)
    mask = reference.visible(tree.subtree_end, tree.depth, 2)
    exact = reference.spec(*leaves, mask, 8**-0.5, 2.0, **extra)
    torch.testing.assert_close(out, exact)
    weight = torch.randn_like(out)
    everything = [*leaves, *extra.values()]
    for ours, autograds in zip(*(torch.autograd.grad(x, everything, weight) for x in (out, exact)), strict=True):
        torch.testing.assert_close(ours, autograds)
