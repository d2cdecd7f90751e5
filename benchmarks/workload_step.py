"""Workload B end to end on a GPU: one DPO + NLL step, loss and all gradients, of 15 pairs behind a few-shot prefix.

Of a bf16 Llama of 0.9B parameters; log-probs of the reference are given. ``packed, unshared`` runs every pair's two
sequences through the same kernels; ``trl`` is TRL's fused forward and its loss on padded batches, where trl is
installed. tree_workloads.py measures this on a CPU, in more ways and on more workloads.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import tree_steps as ways
from torch import Tensor
from torch.nn.functional import logsigmoid
from tree_data import Workload, read_questions, search_workload, solutions_workload

from fastpo import Pairs, Segments, TokenTree, objectives, preference_loss, sequence_nodes
from fastpo.scoring import TreeScorer
from fastpo.trees import trained_nodes

ROW_TOKENS, TRL_TOKENS = 8192, 16384  # most of a forward


@dataclass(frozen=True)
class Case:
    name: str
    mode: str
    dtype: torch.dtype
    shape: dict[str, int]  # layers, hidden, vocab; pairs


@dataclass(frozen=True)
class Forward:
    """A row of trees, and the pairs whose members are all in it."""

    tree: TokenTree
    nodes: Tensor  # [M] that count
    places: Tensor  # [T] of each sequence's tokens among them
    segments: Segments
    pairs: Pairs
    ref_logps: Tensor  # [T]


@dataclass(frozen=True)
class Batch:
    """P padded pairs, the chosen before the rejected."""

    inputs: dict[str, Tensor]  # [2P, L]
    ref: Tensor  # [2P] sums
    lengths: Tensor  # [P] of the chosen


@dataclass(frozen=True)
class Inputs:
    scorer: TreeScorer
    shared: list[Forward]
    unshared: list[Forward]
    batches: list[Batch]
    number: int  # of pairs

    def __deepcopy__(self, _memo: dict) -> "Inputs":
        return self  # nothing but gradients is written, and each run begins by clearing them


def cases(suite: str, device: str) -> list[Case]:
    if suite == "small":
        return [Case("small", "step", torch.float32, {"layers": 1, "hidden": 64, "vocab": 300, "pairs": 7})]
    if suite == "gpu":
        return [Case("B", "step", torch.bfloat16, {"layers": 16, "hidden": 2048, "vocab": 32000, "pairs": 15})]
    return []


@cache
def workload(name: str) -> Workload:
    if name == "small":
        return search_workload((2, 2, 2), 300, prompt_tokens=16)
    return solutions_workload(read_questions(None, 12)[0], 1, 15, True)


def setup(case: Case, device: str) -> Inputs:
    shape, of = case.shape, workload(case.name)
    with torch.device(device):
        model = ways.build_model(shape["layers"], shape["hidden"], shape["vocab"]).to(case.dtype)
    if importlib.util.find_spec("trl"):
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
    shared, unshared = ways.shared_rows(of, ROW_TOKENS), ways.path_rows(of, ROW_TOKENS)
    return Inputs(
        TreeScorer(model),
        [forward(of, row, pairs_in(row), device) for row in shared],
        [forward(of, row, Pairs.interleaved(len(row.pairs)), device) for row in unshared],
        [batch_of(of, batch, device) for batch in ways.trl_batches(of, TRL_TOKENS)],
        len(of.all_pairs),
    )


def pairs_in(row: ways.Row) -> Pairs:
    """Every sequence stands in the row once."""
    place = {sequence: k for k, sequence in enumerate(row.sequences)}
    return Pairs(torch.tensor([[place[w], place[r]] for w, r in row.pairs]))


def forward(of: Workload, row: ways.Row, pairs: Pairs, device: str) -> Forward:
    counted, cu_seqlens = sequence_nodes(row.tree)
    nodes = trained_nodes(row.tree)
    ref = torch.cat([reference(of, sequence) for sequence in row.sequences])
    places = torch.searchsorted(nodes, counted)
    parts = (row.tree, nodes, places, Segments(cu_seqlens), pairs, ref)
    return Forward(*(part.to(device) for part in parts))


def batch_of(of: Workload, pairs: list[tuple[int, int]], device: str) -> Batch:
    inputs = ways.trl_inputs(of, pairs)
    ref = torch.stack([reference(of, pair[k]).sum() for k in (0, 1) for pair in pairs])
    lengths = (inputs["labels"] != -100).sum(1)[: len(pairs)]
    return Batch({name: x.to(device) for name, x in inputs.items()}, ref.to(device), lengths.to(device))


def reference(of: Workload, sequence: int) -> Tensor:
    return ways.reference_logps(of.sequences[sequence], of.all_starts[sequence])


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """name -> run(inputs) -> (loss [], some of the gradients)."""

    def of(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], tuple[Tensor, ...]]:
        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            inputs.scorer.zero_grad(set_to_none=True)
            value = loss(inputs)
            return (value, *(parameter.grad.clone() for parameter in watched(inputs.scorer)))

        return run

    runs = {
        "fastpo": of(lambda x: packed_loss(x, x.shared)),
        "packed, unshared": of(lambda x: packed_loss(x, x.unshared)),
    }
    return runs | ({"trl": of(padded_loss)} if importlib.util.find_spec("trl") else {})


def watched(scorer: TreeScorer) -> list[torch.nn.Parameter]:
    """Embeddings, which are the head too, and weights of the first and the last layer."""
    body = scorer.model.model
    return [body.embed_tokens.weight, body.layers[0].self_attn.q_proj.weight, body.layers[-1].mlp.down_proj.weight]


def packed_loss(inputs: Inputs, forwards: list[Forward]) -> Tensor:
    """[] mean over the pairs; gradients accumulate over rows."""
    objective, total = objectives.irpo(beta=ways.BETA, alpha=ways.ALPHA), 0
    for row in forwards:
        logps = inputs.scorer(row.tree, row.nodes)[row.places]
        out = preference_loss(logps, row.ref_logps, row.segments, row.pairs, objective)
        loss = out.loss * (len(row.pairs.index) / inputs.number)
        loss.backward()
        total = total + loss.detach()
    return total


def padded_loss(inputs: Inputs) -> Tensor:
    """The same by TRL's forward, its sigmoid loss and an NLL per sequence."""
    total = 0
    for batch in inputs.batches:
        logps = inputs.scorer.model(**batch.inputs, use_cache=False, fused_lm_head=True).log_probs  # [2P, L-1]
        sums = logps.sum(1)
        chosen, rejected = (sums - batch.ref).chunk(2)
        nll = sums[: len(batch.lengths)] / batch.lengths
        loss = (-logsigmoid(ways.BETA * (chosen - rejected)) - ways.ALPHA * nll).sum() / inputs.number
        loss.backward()
        total = total + loss.detach()
    return total


def items(case: Case) -> tuple[int, str]:
    return case.shape["pairs"], "pairs/s"


def check(case: Case, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """Raises AssertionError where a loss or a gradient is not fastpo's; bf16 rounds each micro-batch's gradients."""
    loss, *grads = outputs["fastpo"]
    tolerance = 1e-4 if case.dtype == torch.float32 else 0.05
    for name, (other, *other_grads) in outputs.items():
        torch.testing.assert_close(other, loss, rtol=tolerance, atol=0, msg=f"loss of {name}: {other} for {loss}")
        for ours, theirs in zip(grads, other_grads, strict=True):
            apart = float((ours.float() - theirs.float()).norm() / ours.float().norm())
            assert apart <= tolerance, f"a gradient of {name} is off by {apart:.1e}"
