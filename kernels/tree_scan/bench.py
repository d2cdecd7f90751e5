"""Benchmark cases of ``path_sum`` and ``subtree_sum``: benchmarks/run.py finds and times them.

The peer is what one would write without the op: flat prefix sums in fp64 (README.md) in plain PyTorch. The forest is
that of a batch of preference pairs: prompts of 256 tokens with 16 answers of 256 that branch at random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels.tree_scan import path_sum, subtree_sum
from fastpo.trees import build_tree, join
from fastpo.types import TokenTree


@dataclass(frozen=True)
class Case:
    name: str  # "path" or "subtree"
    mode: str  # "forward"
    dtype: torch.dtype
    shape: dict[str, int]  # prompts, nodes: of all their trees, columns


@dataclass
class Inputs:
    values: Tensor  # [N, K]
    tree: TokenTree


def cases(suite: str, device: str) -> list[Case]:
    if suite not in ("small", "quick", "full", "gpu"):
        return []
    columns = (1,) if suite == "quick" else (1, 16)
    return [
        Case(name, "forward", torch.float32, {"prompts": 32, "nodes": _forest(32).num_nodes, "columns": k})
        for name in ("path", "subtree")
        for k in columns
    ]


def _forest(prompts: int) -> TokenTree:
    generator = torch.Generator().manual_seed(0)
    trees = []
    for _ in range(prompts):
        prompt, answer = (torch.randint(32000, (256,), generator=generator) for _ in range(2))
        sequences = []
        for cut in torch.randint(256, (16,), generator=generator).tolist():
            answer = torch.cat((answer[:cut], torch.randint(32000, (256 - cut,), generator=generator)))
            sequences.append(torch.cat((prompt, answer)))
        trees.append(build_tree(sequences, 256))
    return join(trees)


def setup(case: Case, device: str) -> Inputs:
    tree = _forest(case.shape["prompts"])
    shape = (tree.num_nodes, case.shape["columns"])
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    return Inputs(values.to(device), tree.to(device))


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    fused, eager = {"path": (path_sum, eager_path_sum), "subtree": (subtree_sum, eager_subtree_sum)}[case.name]
    compiled = torch.compile(eager, dynamic=False)
    return {
        "fastpo": lambda x: fused(x.values, x.tree),
        "torch eager": lambda x: eager(x.values, x.tree),
        "torch.compile": lambda x: compiled(x.values, x.tree),
    }


def eager_path_sum(values: Tensor, tree: TokenTree) -> Tensor:
    """[N, K] -> [N, K]."""
    entered = 2 * torch.arange(len(values), device=values.device) - tree.depth
    left = 2 * tree.subtree_end - tree.depth - 1
    exact = values.double()
    steps = exact.new_zeros(2 * len(values), values.shape[1])
    steps = steps.index_copy(0, entered, exact).index_copy(0, left, -exact)
    return steps.cumsum(0)[entered].to(values.dtype)


def eager_subtree_sum(values: Tensor, tree: TokenTree) -> Tensor:
    """[N, K] -> [N, K]."""
    before = F.pad(values.double().cumsum(0), (0, 0, 1, 0))
    return (before[tree.subtree_end] - before[:-1]).to(values.dtype)


def bytes_moved(case: Case) -> int:
    """Values read and sums written once, and one index of each node."""
    nodes = case.shape["nodes"]
    return nodes * (case.shape["columns"] * 2 * case.dtype.itemsize + 8)


def flops(case: Case) -> int:
    return 0  # bound by memory


def ceiling(case: Case) -> tuple[Callable[[Inputs], Any], int]:
    """The floor's bytes, read and written by torch's fastest operations."""

    def run(inputs: Inputs) -> Any:
        return inputs.values.sum(), inputs.tree.depth.sum(), torch.ones_like(inputs.values)

    return run, bytes_moved(case)


def check(case: Case, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """Raises AssertionError where an implementation's sums are not fastpo's."""
    for name, sums in outputs.items():
        torch.testing.assert_close(sums, outputs["fastpo"], rtol=1e-5, atol=1e-6, msg=f"sums of {name}")
