"""Ops whose gradients have no graph say so in one line where one is asked for, on every backend."""

from unittest.mock import patch

import pytest
import torch

import fastpo
from fastpo import Pairs, Segments, objectives, preference_loss, token_logprobs
from fastpo.kernels.linear_preference_loss import linear_preference_loss
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.preference_loss import sequence_scores
from fastpo.kernels.token_kl import linear_token_kl, token_kl
from fastpo.kernels.tree_attention import tree_attention
from fastpo.kernels.tree_scan import path_sum, subtree_sum

TREE = fastpo.build_tree([[1, 2, 3], [1, 2, 4, 5, 6]], starts=1)  # 6 nodes
LABELS = torch.tensor([1, 2, 3, 0, 1, 2])
SEGMENTS, PAIRS = Segments(cu_seqlens=torch.tensor([0, 3, 6])), Pairs.interleaved(1)
REFERENCE = torch.linspace(-1, 0, 6)  # [T]
HEAD, OTHER = torch.linspace(-1, 1, 35).view(7, 5), torch.linspace(1, -1, 42).view(6, 7)  # [V, H], [T, V]
LOSS = (REFERENCE, SEGMENTS, PAIRS, objectives.irpo())

# name -> (a scalar function of its differentiable argument, the shape of that)
OPS = {
    "token_logprobs": (lambda x: token_logprobs(x, LABELS).sum(), (6, 7)),
    "preference_loss": (lambda x: preference_loss(x, *LOSS).loss, (6,)),
    "sequence_scores": (lambda x: sequence_scores(x, REFERENCE, SEGMENTS, objectives.dpo()).square().sum(), (6,)),
    "linear_token_logprobs": (lambda x: linear_token_logprobs(x, HEAD, LABELS).sum(), (6, 5)),
    "linear_preference_loss": (lambda x: linear_preference_loss(x, HEAD, LABELS, *LOSS).loss, (6, 5)),
    "token_kl": (lambda x: token_kl(x, OTHER).sum(), (6, 7)),
    "linear_token_kl": (lambda x: linear_token_kl(x, HEAD, 2 * x.detach(), HEAD).sum(), (6, 5)),
    "tree_attention": (lambda x: tree_attention(x, x, x, TREE).square().sum(), (6, 2, 4)),
}


@pytest.fixture(params=["cpu", "torch"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("FASTPO_BACKEND", "torch")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("outer", [lambda y: y, torch.square], ids=["loss", "of_loss"])  # upstream: a constant, or not
def test_no_graph_of_gradients_is_made(name, outer):
    op, shape = OPS[name]
    x = torch.randn(shape, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"^{name} is once differentiable; create_graph is True[^\n]*$"):
        torch.autograd.grad(outer(op(x)), x, create_graph=True)
    [found] = torch.autograd.grad(outer(op(x)), x)
    assert found.any() and not found.requires_grad


@pytest.mark.parametrize("name", OPS)
def test_none_is_made_below_compilation_either(name):
    """The ops themselves, which compiled code calls: where eager code has a shorter way, that is not taken."""
    op, shape = OPS[name]
    x = torch.randn(shape, requires_grad=True)
    with patch.object(torch.compiler, "is_compiling", return_value=True):
        loss = op(x)
    with pytest.raises(RuntimeError, match=f"^{name} is once differentiable"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("scan", [path_sum, subtree_sum])
def test_sums_over_trees_are_differentiable_any_number_of_times(scan):
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: scan(x.square(), TREE), x)
