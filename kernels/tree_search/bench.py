"""Benchmark cases of ``tree_search``: benchmarks/run.py finds and times them.

One wave of the ops: select a leaf of every tree and back its value up. Trees of 4 children a node, grown by UCB1 on
random values until they are full. The peer is the op's specification in PyTorch, vectorised over trees; searches that
are written as Python objects are timed in benchmarks/tree_search.py. No floor: a walk waits for one node after another.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastpo.kernels.tree_search import BackupRule, SearchTrees, SelectRule, backup, select

WIDTH = 4
RULES = {
    "ucb1, mean": (SelectRule("ucb1", c=1.4, unvisited="bonus"), BackupRule("mean")),
    "puct, children": (SelectRule("puct", c=1.0), BackupRule("children", min_visits=1.0)),
}


@dataclass(frozen=True)
class Case:
    name: str  # of RULES
    mode: str  # "select + backup"
    dtype: torch.dtype
    shape: dict[str, int]  # trees, nodes: of each


@dataclass
class Inputs:
    trees: SearchTrees
    source: SearchTrees  # what trees are before the wave
    values: Tensor  # [B, 1]


def cases(suite: str, device: str) -> list[Case]:
    if suite not in ("small", "quick", "full", "gpu"):
        return []
    trees, nodes = (64, 65) if suite == "small" else (4096, 513)
    return [Case(name, "select + backup", torch.float32, {"trees": trees, "nodes": nodes}) for name in RULES]


@cache
def _grown(trees: int, nodes: int) -> SearchTrees:
    generator, found = torch.Generator().manual_seed(0), SearchTrees.empty(trees, nodes)
    rule, backup_rule = RULES["ucb1, mean"]
    everyone, new = torch.arange(trees), trees * WIDTH
    flags = {"expandable": torch.ones(new, dtype=torch.bool), "closed": torch.zeros(new, dtype=torch.bool)}
    for _ in range((nodes - 1) // WIDTH):
        leaf = select(found, rule)[:, 0]
        found.expandable[everyone, leaf] = False
        columns = {name: torch.rand(new, generator=generator) for name in ("q", "value", "reward", "prior")}
        found.add(everyone.repeat_interleave(WIDTH), leaf.repeat_interleave(WIDTH), **columns, **flags)
        backup(found, leaf[:, None], torch.rand(trees, 1, generator=generator), backup_rule)
    return found


def _copy(trees: SearchTrees) -> SearchTrees:
    return replace(trees, **{field.name: getattr(trees, field.name).clone() for field in fields(trees)})


def setup(case: Case, device: str) -> Inputs:
    source = _grown(case.shape["trees"], case.shape["nodes"]).to(device)
    values = torch.rand(case.shape["trees"], 1, generator=torch.Generator().manual_seed(1))
    return Inputs(_copy(source), source, values.to(device))


def refresh(case: Case, inputs: Inputs) -> None:
    """A wave changes the trees."""
    for field in fields(inputs.trees):
        getattr(inputs.trees, field.name).copy_(getattr(inputs.source, field.name))


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """name -> run(inputs) -> (leaves [B, 1], visits [B, M], q [B, M])."""
    select_rule, backup_rule = RULES[case.name]

    def wave(inputs: Inputs) -> tuple[Tensor, ...]:
        leaves = select(inputs.trees, select_rule)
        backup(inputs.trees, leaves, inputs.values, backup_rule)
        return leaves, inputs.trees.visits, inputs.trees.q

    def in_torch(inputs: Inputs) -> tuple[Tensor, ...]:
        with patch.dict("os.environ", FASTPO_BACKEND="torch"):
            return wave(inputs)

    return {"fastpo": wave, "torch eager": in_torch}


def items(case: Case) -> tuple[int, str]:
    return case.shape["trees"], "trees/s"


def check(case: Case, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """Raises AssertionError where leaves, visits or values are not fastpo's."""
    leaves, visits, q = outputs["fastpo"]
    for name, (other_leaves, other_visits, other_q) in outputs.items():
        assert torch.equal(other_leaves, leaves), f"leaves of {name}"
        assert torch.equal(other_visits, visits), f"visits of {name}"
        torch.testing.assert_close(other_q, q, msg=f"q of {name}")
