"""Forests, and the check against fp64, that the tests of tree_attention share."""

import random

import torch

from fastpo import tree_attention
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


def chain(n: int) -> TokenTree:
    return forest(list(range(-1, n - 1)))


def random_forest(n: int, leave: float, seed: int = 0) -> TokenTree:
    """After each token every level of its path is left with this probability, from the lowest up: 0 is a chain."""
    generator, path, parents = random.Random(seed), [], []
    for i in range(n):
        while path and generator.random() < leave:
            path.pop()
        parents.append(path[-1] if path else -1)
        path.append(i)
    return forest(parents)


def fan(prefix: int, branches: int, length: int) -> TokenTree:
    """A prompt and its answers."""
    parents = list(range(-1, prefix - 1))
    for _ in range(branches):
        parents += [prefix - 1, *range(len(parents), len(parents) + length - 1)]
    return forest(parents)


def tensors(tree: TokenTree, heads=(4, 2), size=32, dtype=torch.float32, sinks=False, seed=0) -> list[torch.Tensor]:
    """q, k, v and, where wanted, sinks; leaves, where the tree is."""
    generator, device, n = torch.Generator().manual_seed(seed), tree.depth.device, tree.num_nodes
    shapes = [(n, heads[0], size), (n, heads[1], size), (n, heads[1], size)]
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    return [*leaves, torch.randn(heads[0], generator=generator).to(device).requires_grad_()] if sinks else leaves


def spec_values(leaves, tree, weight, dtype, scale=None, softcap=None, window=None) -> list[torch.Tensor]:
    """out and the gradients of its sum weighted by ``weight``, by autograd of the spec in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    mask = reference.visible(tree.subtree_end, tree.depth, window)
    scale = leaves[0].shape[2] ** -0.5 if scale is None else scale
    out = reference.spec(*leaves[:3], mask, scale, softcap, *leaves[3:])
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))]


def check(tree: TokenTree, leaves: list[torch.Tensor], **settings) -> None:
    """out and all gradients against fp64: twice the error of the spec in the same type, plus two roundings in fp32.

    Roundings of delta = grad_out . out too: d loss / d score is p (grad_out . v - delta), which for a token that sees
    nothing but itself is 0, and exactly so only where both are summed in one order. A 16-bit result may be off by one
    rounding of its largest element besides.
    """
    dtype = leaves[0].dtype
    weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(leaves[0])
    extra = {"sinks": leaves[3]} if len(leaves) == 4 else {}
    out = tree_attention(*leaves[:3], tree, **settings, **extra)
    assert out.dtype == dtype and out.is_contiguous()
    ours = [out.detach(), *torch.autograd.grad(out, leaves, weight)]
    exact = spec_values(leaves, tree, weight, torch.float64, **settings)
    torchs = spec_values(leaves, tree, weight, dtype, **settings)
    delta = (exact[0] * weight).sum(2).abs().amax().item()
    for name, x, x_torch, x_exact in zip(("out", "q", "k", "v", "sinks"), ours, torchs, exact, strict=False):
        assert x.shape == x_exact.shape
        error, error_torch = ((y.double() - x_exact).abs().amax().item() for y in (x, x_torch))
        largest = x_exact.abs().amax().item()
        tiny = 2 * torch.finfo(torch.float32).eps * max(1.0, delta, largest) + torch.finfo(dtype).eps / 2 * largest
        assert error <= 2 * error_torch + tiny, f"{name}: error {error:.2e}, torch's {error_torch:.2e}"
