"""Models on a GPU: trees through their attention and heads, and the training of the fused heads in a trainer's model.

What the CPU finds is the truth here; tests/test_attention.py and test_scoring.py hold that against plain forwards.
"""

import pytest
import torch
from integration_cases import gradients
from tree_cases import build, tree

import fastpo
from fastpo.scoring import TreeScorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]
# Rotary and absolute positions, norms of queries and keys, windows, softcaps, biases.
NAMES = ("llama", "qwen3", "gemma2", "mistral", "gpt2")


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_cpu(name):
    model, trees = build(name), [tree(seed) for seed in range(4)]
    expected = fastpo.score(model, trees, token_budget=40, stats=("entropy", "topk_mass"))
    for ours, truth in zip(
        fastpo.score(model.cuda(), trees, token_budget=40, stats=("entropy", "topk_mass")), expected, strict=True
    ):
        torch.testing.assert_close(ours.sums, truth.sums, rtol=1e-4, atol=1e-4)
        for name in truth.stats:
            torch.testing.assert_close(ours.stats[name], truth.stats[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_cpu(name):
    model, found = build(name), []
    for device in ("cpu", "cuda"):
        logps = TreeScorer(model.to(device))(tree().to(device))
        model.zero_grad()
        (logps * torch.linspace(-1, 1, len(logps)).to(device)).sum().backward()
        found.append({name: grad.cpu() for name, grad in gradients(model).items()})
        fastpo.disable(model)
    cpu, gpu = found
    largest = max(float(grad.abs().max()) for grad in cpu.values())
    for name, grad in cpu.items():
        torch.testing.assert_close(gpu[name], grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_bf16_runs():
    model = build().to(torch.bfloat16).cuda()
    [scores] = fastpo.score(model, [tree()])
    [exact] = fastpo.score(build(), [tree()])
    torch.testing.assert_close(scores.sums, exact.sums, rtol=0.1, atol=1.0)
