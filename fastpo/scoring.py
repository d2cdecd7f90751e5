"""Log-probs on trees: ``score`` for any number of trees without gradient, ``TreeScorer`` with one, for training.

    tree = fastpo.build_tree([prompt + a for a in answers], starts=len(prompt))
    [scores] = fastpo.score(model, [tree], stats=("entropy",))
    scores.sums                                         # [S] log-prob of each answer
    scores.logps                                        # [N] log-prob of each counted token

N nodes of a tree, S its sequences, M nodes that count.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastpo.attention import enable, transformers_model, tree_inputs
from fastpo.errors import FastpoError
from fastpo.integrations.head import Head, check_head, evaluating, hidden_states
from fastpo.kernels.common.checks import values_checked
from fastpo.models import context_length, vocabulary
from fastpo.trees import check_tree, pack, sequence_nodes, trained_nodes
from fastpo.types import TokenTree

_MULTIPLE = 8  # of tokens in a forward: GEMM libraries are up to a fifth slower on odd numbers of rows
_ROWS_AHEAD = 16  # rows' worth of trees that are packed together: more pack tighter, and wait longer


@dataclass(frozen=True)
class TreeScores:
    """What ``score`` finds of one tree, on the CPU."""

    logps: Tensor  # [N] float32, log p(tokens[i] | the path above i); 0 at nodes that count in no sequence
    sums: Tensor  # [S] float32, of logps over the counted tokens of each sequence
    lengths: Tensor  # [S] int64, the number of those
    stats: dict[str, Tensor]  # name -> [N] float32 of the distribution that predicts node i; 0 where logps is


class TreeScorer(nn.Module):
    """Log-probs of a tree's nodes under ``model``, with gradient, as a module that accelerate, DDP and FSDP2 can wrap.

    ``scorer(tree, nodes, stats)`` is, in plain PyTorch::

        logits = model(**tree_inputs(tree)).logits[0]                       # [N, V]
        token_logprobs(logits[tree.parent[nodes]], tree.tokens[nodes], stats=stats)   # [M] fp32, and statistics if any

    but no logits are stored, and the LM head sees each distinct predictor of ``nodes`` once: where a tree branches,
    several nodes share one. ``nodes`` [M] may hold no roots, which nothing predicts; None: ``trained_nodes(tree)``.

    With ``reference``, the scorer of another model, the statistics hold ``kl`` [M] besides, with gradient:
    KL(reference || policy) over the vocabulary where node i is predicted, in the policy's precision.

    Enables the model. Raises FastpoError where trees cannot go through it (see ``enable``), or where its logits are
    more than its LM head and config say; of a tree on the CPU (on a GPU under FASTPO_DEBUG=1) what ``score`` refuses.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = enable(model)
        base = transformers_model(model)
        check_head(base)
        self._no_split_modules = getattr(base, "_no_split_modules", None)  # where FSDP's wrapping policy looks

    def forward(
        self,
        tree: TokenTree,
        nodes: Tensor | None = None,
        stats: tuple[str, ...] = (),
        topk: int = 10,
        reference: "TreeScorer | None" = None,
    ) -> Any:
        if values_checked(tree.tokens.device):
            _check(tree, "tree", self.model, context_length(transformers_model(self.model)))
        if nodes is None:
            nodes = trained_nodes(tree)
        (head, hidden), rows = self._states(tree), tree.parent[nodes]
        found = head.logps(hidden, tree.tokens[nodes], rows, stats=stats, topk=topk)
        if reference is None:
            return found
        with torch.no_grad():
            known = reference._states(tree)
        logps, values = found if stats else (found, {})
        return logps, {**values, "kl": head.token_kl(hidden, *known, rows)}

    def _states(self, tree: TokenTree) -> tuple[Head, Tensor]:
        """The LM head and the hidden states [N, H] of the tree, with rows behind them that nothing reads."""
        base = transformers_model(self.model)
        return Head.of(base), hidden_states(base, **tree_inputs(_padded(tree)))[0]


def _padded(tree: TokenTree) -> TokenTree:
    """``tree`` [N] with roots behind it, up to a multiple of ``_MULTIPLE`` nodes. They see and are seen by none."""
    missing = -tree.num_nodes % _MULTIPLE
    if not missing:
        return tree
    ends = tree.num_nodes + torch.arange(1, missing + 1, device=tree.tokens.device)
    return replace(
        tree,
        tokens=nn.functional.pad(tree.tokens, (0, missing)),
        parent=nn.functional.pad(tree.parent, (0, missing), value=-1),
        depth=nn.functional.pad(tree.depth, (0, missing)),
        subtree_end=torch.cat([tree.subtree_end, ends]),
    )


def score(model: Any, trees: Iterable[TokenTree], **settings: Any) -> list[TreeScores]:
    """``list(score_stream(model, trees, **settings))``."""
    return list(score_stream(model, trees, **settings))


def score_stream(
    model: Any,
    trees: Iterable[TokenTree],
    *,
    token_budget: int = 16384,
    stats: Sequence[str] = (),
    topk: int = 10,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[TreeScores]:
    """Scores of each of ``trees`` under ``model``, in their order, without gradient and dropout.

    Any number of trees: they are taken from the iterable some rows ahead, packed into rows of at most ``token_budget``
    nodes, and forgotten when their scores are out. A tree over the budget is cut (see ``pack``). ``stats`` are those
    of ``token_logprobs``: entropy, topk_mass, ... With an ``accelerator`` the rows are shared out among its processes,
    each gets all scores, and its mixed precision applies. ``progress`` is told how many trees are done since last.

    Cost: a forward of the body over the distinct nodes, and 1F of the LM head over the distinct predictors of those
    that count.

    Raises FastpoError for a model that cannot take trees, and before a tree's row is run for a tree that is none (see
    ``check_tree``), a path that is longer than the model's context or than ``token_budget``, and a token that the model
    does not know.
    """
    scorer, context = TreeScorer(model), context_length(transformers_model(model))
    run = _Run(scorer, token_budget, tuple(stats), topk, accelerator)
    waiting: list[TokenTree] = []
    for number, tree in enumerate(trees):
        _check(tree, f"trees[{number}]", scorer.model, context)
        _check_budget(tree, number, token_budget)
        waiting.append(tree)
        if sum(t.num_nodes for t in waiting) >= _ROWS_AHEAD * token_budget:
            yield from _reported(run.scores(waiting), progress)
            waiting = []
    if waiting:
        yield from _reported(run.scores(waiting), progress)


@dataclass(frozen=True)
class _Run:
    scorer: TreeScorer
    token_budget: int
    stats: tuple[str, ...]
    topk: int
    accelerator: Accelerator | None

    def scores(self, trees: list[TokenTree]) -> list[TreeScores]:
        """Scores of ``trees``, packed together."""
        sizes = [tree.num_nodes for tree in trees]
        values = self._values(trees, sum(sizes)).split(sizes, dim=1)  # of each tree [1 + stats, N]
        return [_scores_of(tree, value, self.stats) for tree, value in zip(trees, values, strict=True)]

    def _values(self, trees: list[TokenTree], num_nodes: int) -> Tensor:
        """[1 + stats, all nodes] log-probs and statistics."""
        rank, world = (0, 1) if self.accelerator is None else _place(self.accelerator)
        device = next(self.scorer.parameters()).device
        packed = pack(trees, self.token_budget)
        values = torch.zeros(1 + len(self.stats), num_nodes)
        done = torch.zeros(num_nodes, dtype=torch.bool)  # a node of a tree that was cut may stand in several rows
        for start in range(0, len(packed.rows), world):
            for number in range(start, min(start + world, len(packed.rows))):
                nodes = trained_nodes(packed.rows[number])
                nodes = nodes[~done[packed.nodes[number][nodes]]]
                done[packed.nodes[number][nodes]] = True
                if number == start + rank:
                    values[:, packed.nodes[number][nodes]] = self._row(packed.rows[number].to(device), nodes.to(device))
            if start + rank >= len(packed.rows):  # sharded weights are gathered by all processes together
                self._row(packed.rows[start].to(device), trained_nodes(packed.rows[start]).to(device))
        if world > 1 and self.accelerator is not None:  # every process holds zeros where the others scored
            values = self.accelerator.reduce(values.to(device)).cpu()
        return values

    def _row(self, tree: TokenTree, nodes: Tensor) -> Tensor:
        """[1 + stats, M] on the CPU."""
        with evaluating(self.scorer), _autocast(self.accelerator):
            found = self.scorer(tree, nodes, self.stats, self.topk)
        logps, stats = found if self.stats else (found, {})
        return torch.stack([logps, *(stats[name] for name in self.stats)]).float().cpu()


def _scores_of(tree: TokenTree, values: Tensor, stats: tuple[str, ...]) -> TreeScores:
    """``values`` [1 + stats, N]."""
    nodes, cu_seqlens = sequence_nodes(tree)
    lengths = cu_seqlens.diff()
    owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owners, values[0, nodes].double())
    return TreeScores(values[0], sums.float(), lengths, dict(zip(stats, values[1:], strict=True)))


def _check(tree: TokenTree, name: str, model: Any, context: int | None) -> None:
    """What a forward of ``model`` would stumble over, before it runs."""
    check_tree(tree, name)
    if not tree.num_nodes:
        return
    longest, largest, known = int(tree.depth.max()) + 1, int(tree.tokens.max()), vocabulary(model)
    if context is not None and longest > context:
        raise FastpoError(
            f"{name} has a path of {longest} tokens; it should have at most {context}, the model's context"
        )
    if largest >= known:
        raise FastpoError(f"{name} holds the token {largest}; it should hold tokens below {known}, the model's")


def _check_budget(tree: TokenTree, number: int, token_budget: int) -> None:
    longest = int(tree.depth.max()) + 1 if tree.num_nodes else 0
    if longest > token_budget:
        raise FastpoError(
            f"token_budget is {token_budget}; it should be at least {longest}, the longest path of trees[{number}]"
        )


def _reported(scores: list[TreeScores], progress: Callable[[int], None] | None) -> list[TreeScores]:
    if progress is not None:
        progress(len(scores))
    return scores


def _place(accelerator: Accelerator) -> tuple[int, int]:
    return accelerator.process_index, accelerator.num_processes


def _autocast(accelerator: Accelerator | None) -> AbstractContextManager[Any]:
    return nullcontext() if accelerator is None else accelerator.autocast()
