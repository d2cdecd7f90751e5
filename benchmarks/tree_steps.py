"""One DPO + NLL step (loss and all gradients) of a workload in each of the ways that tree_workloads.py compares.

All have one model, one reference and one loss, the mean of DPO + NLL over the pairs; gradients accumulate over
micro-batches of at most ``budget`` tokens. What differs:

- ``fastpo``: each distinct token once. Rows of trees, tree attention.
- ``paths``: padding-free rows of whole sequences, every pair with its own two; the same attention on chains.
- ``dense``: fastpo's rows, but torch's SDPA with the dense mask of the tree.
- ``trl``: padded batches [chosen, rejected] in TRL 1.16's fused forward and loss.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from tree_data import Workload

from fastpo import Pairs, Segments, TokenTree, build_tree, objectives, pack, preference_loss, sequence_nodes
from fastpo.integrations.head import Head, hidden_states
from fastpo.scoring import TreeScorer
from fastpo.trees import join, trained_nodes

BETA, ALPHA = 0.1, 1.0
VOCABULARY = 32000
TRL_BUDGET = 2048  # tokens of a padded forward, if more than one pair: TRL's step is 20% faster than with 8192


def layers_for(vocabulary: int, parameters: int = 50_000_000, hidden: int = 512) -> int:
    """How many layers make up ``parameters`` beside the embeddings."""
    return round((parameters - vocabulary * hidden) / (hidden * hidden * (4 + 3 * 11 / 4)))


def build_model(
    layers: int = 10, hidden: int = 512, vocabulary: int = VOCABULARY, *, seed: int = 0
) -> LlamaForCausalLM:
    """A random Llama, of some 50M parameters by default; embeddings tied, fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def reference_logps(tokens: list[int], start: int) -> Tensor:
    """[n] fixed reference log-probs of a sequence's counted tokens: a function of token and position."""
    places = torch.arange(start, len(tokens))
    return -10.4 + 0.02 * torch.sin(torch.tensor(tokens[start:]) * 0.37 + places)


@dataclass(frozen=True)
class Row:
    """A forward and backward: a forest, and the pairs with a member in it."""

    tree: TokenTree
    sequences: list[int]  # of the workload, at each of the tree's leaves
    pairs: list[tuple[int, int]]  # (chosen, rejected) sequences of the workload


def shared_rows(workload: Workload, budget: int) -> list[Row]:
    """A tree per prompt, packed. A pair whose members lie in two rows stands in both."""
    trees = [build_tree(tokens, starts) for tokens, starts in zip(workload.trees, workload.starts, strict=True)]
    packed = pack(trees, budget)
    members = [set(sequences.tolist()) for sequences in packed.sequences]
    return [
        Row(tree, sequences.tolist(), [pair for pair in workload.all_pairs if set(pair) & owned])
        for tree, sequences, owned in zip(packed.rows, packed.sequences, members, strict=True)
    ]


def path_rows(workload: Workload, budget: int) -> list[Row]:
    """Chains: both sequences of every pair, first-fit decreasing."""
    tokens, starts = workload.sequences, workload.all_starts
    bins: list[tuple[int, list[tuple[int, int]]]] = []
    size = {pair: len(tokens[pair[0]]) + len(tokens[pair[1]]) for pair in workload.all_pairs}
    for pair in sorted(workload.all_pairs, key=lambda p: -size[p]):
        at = next((k for k, (used, _) in enumerate(bins) if used + size[pair] <= budget), None)
        if at is None:
            bins.append((size[pair], [pair]))
        else:
            bins[at] = bins[at][0] + size[pair], [*bins[at][1], pair]
    return [
        Row(join([build_tree([tokens[s]], starts[s]) for p in pairs for s in p]), [s for p in pairs for s in p], pairs)
        for _, pairs in bins
    ]


def packed_step(scorer: TreeScorer, rows: list[Row], workload: Workload, node_logps: Callable) -> float:
    """The loss, gradients accumulated. ``node_logps(scorer, tree, nodes)`` is what makes the log-probs [M].

    The loss of a pair is smooth in both log-probs: where its members lie in two rows, each row takes the other's
    log-probs as numbers, scored beforehand in a small tree of such sequences alone. That is exact.
    """
    number = len(workload.all_pairs)
    outside = _scored_outside(scorer, rows, workload)
    total = 0.0
    for row in rows:
        own = dict(zip(row.sequences, range(len(row.sequences)), strict=True))
        others = sorted({s for pair in row.pairs for s in pair} - own.keys())
        ids = own | {s: len(row.sequences) + k for k, s in enumerate(others)}
        counted, cu_seqlens = sequence_nodes(row.tree)
        nodes = trained_nodes(row.tree)
        logps = node_logps(scorer, row.tree, nodes)[torch.searchsorted(nodes, counted)]
        logps = torch.cat([logps, *(outside[s] for s in others)])
        lengths = torch.cat([cu_seqlens.diff(), torch.tensor([len(outside[s]) for s in others], dtype=torch.int64)])
        segments = Segments(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        index = torch.tensor([[ids[w], ids[r]] for w, r in row.pairs])
        ref = torch.cat([_reference(workload, s) for s in [*row.sequences, *others]])
        objective = objectives.irpo(beta=BETA, alpha=ALPHA)
        out = preference_loss(logps, ref, segments, Pairs(index), objective)  # the mean over the row's pairs
        (out.loss * (len(row.pairs) / number)).backward()
        total += float(out.losses[[w in own for w, _ in row.pairs]].sum())
    return total / number


def path_step(scorer: TreeScorer, rows: list[Row], workload: Workload) -> float:
    """As ``packed_step``; a sequence of two pairs is there twice, so pairs are numbered by their place."""
    number, total = len(workload.all_pairs), 0.0
    for row in rows:
        counted, cu_seqlens = sequence_nodes(row.tree)
        nodes = trained_nodes(row.tree)
        logps = scorer(row.tree, nodes)[torch.searchsorted(nodes, counted)]
        ref = torch.cat([_reference(workload, s) for s in row.sequences])
        pairs = Pairs.interleaved(len(row.pairs))
        out = preference_loss(logps, ref, Segments(cu_seqlens), pairs, objectives.irpo(beta=BETA, alpha=ALPHA))
        (out.loss * (len(row.pairs) / number)).backward()
        total += float(out.losses.sum())
    return total / number


def tree_logps(scorer: TreeScorer, tree: TokenTree, nodes: Tensor) -> Tensor:
    return scorer(tree, nodes)


def dense_logps(scorer: TreeScorer, tree: TokenTree, nodes: Tensor) -> Tensor:
    """[M] through torch's SDPA and the tree's [N, N] mask."""
    index = torch.arange(tree.num_nodes)
    mask = (index <= index[:, None]) & (index[:, None] < tree.subtree_end)
    inputs = {"input_ids": tree.tokens[None], "position_ids": tree.depth[None], "use_cache": False}
    hidden = hidden_states(scorer.model, attention_mask=mask[None, None], **inputs)[0]
    return Head.of(scorer.model).logps(hidden, tree.tokens[nodes], tree.parent[nodes])


def predictors(tree: TokenTree) -> int:
    """How many rows of the LM head a tree takes: nodes that predict one that counts."""
    return len(tree.parent[trained_nodes(tree)].unique())


@contextmanager
def flex(scorer: TreeScorer):
    """Inside the block ``flex_hidden`` works: transformers' layers attend by a compiled FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        return compiled(query, key, value, block_mask=attention_mask, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("benchmark_flex", attend)
    before = scorer.model.config._attn_implementation
    scorer.model.config._attn_implementation = "benchmark_flex"
    try:
        yield
    finally:
        scorer.model.config._attn_implementation = before


@torch.no_grad()
def flex_logps(scorer: TreeScorer, tree: TokenTree, nodes: Tensor) -> Tensor:
    """[M] without gradient, the block mask made anew, as a new batch needs it."""
    from torch.nn.attention.flex_attention import create_block_mask

    end, number = tree.subtree_end, tree.num_nodes

    def seen(batch, head, query, key):
        return (key <= query) & (query < end[key])

    mask = create_block_mask(seen, None, None, number, number, device="cpu")
    inputs = {"input_ids": tree.tokens[None], "position_ids": tree.depth[None], "use_cache": False}
    hidden = hidden_states(scorer.model, attention_mask=mask, **inputs)[0]
    return Head.of(scorer.model).logps(hidden, tree.tokens[nodes], tree.parent[nodes])


def trl_batches(workload: Workload, budget: int) -> list[list[tuple[int, int]]]:
    """Batches of one prompt's pairs, at most ``budget`` tokens when padded: pairs of like lengths, in TRL's favour.

    A trainer's random order would pad more: 5.5 tokens to a distinct one on workload A, where this pads 3.7.
    """
    batches: list[list[tuple[int, int]]] = []
    first = 0
    for tokens, pairs in zip(workload.trees, workload.pairs, strict=True):
        longest = budget  # so that each prompt begins a batch
        for w, r in pairs:
            longest = max(longest, len(tokens[w]), len(tokens[r]))
            if not batches or 2 * (len(batches[-1]) + 1) * longest > budget:
                batches.append([])
                longest = max(len(tokens[w]), len(tokens[r]))
            batches[-1].append((first + w, first + r))
        first += len(tokens)
    return batches


def trl_inputs(workload: Workload, batch: list[tuple[int, int]]) -> dict[str, Tensor]:
    """[2P, L], the chosen before the rejected, padded on the right as TRL's collator does."""
    order = [w for w, _ in batch] + [r for _, r in batch]
    tokens = [workload.sequences[s] for s in order]
    width = max(map(len, tokens))
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens])
    places = torch.arange(width)
    lengths = torch.tensor([len(ids) for ids in tokens])[:, None]
    starts = torch.tensor([workload.all_starts[s] for s in order])[:, None]
    labels = input_ids.masked_fill((places < starts) | (places >= lengths), -100)
    return {"input_ids": input_ids, "attention_mask": (places < lengths).long(), "labels": labels}


def trl_step(model: LlamaForCausalLM, batches: list[list[tuple[int, int]]], workload: Workload) -> float:
    """TRL's model call, and its sigmoid loss with an NLL per sequence; the reference is precomputed."""
    number, total = len(workload.all_pairs), 0.0
    for batch in batches:
        inputs = trl_inputs(workload, batch)
        logps = model(**inputs, use_cache=False, fused_lm_head=True).log_probs  # [2P, L-1]
        chosen, rejected = logps.sum(1).chunk(2)
        ref_chosen, ref_rejected = (
            torch.stack([_reference(workload, pair[k]).sum() for pair in batch]) for k in (0, 1)
        )
        lengths = (inputs["labels"] != -100).sum(1)[: len(batch)]
        z = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = (-torch.nn.functional.logsigmoid(z) - ALPHA * chosen / lengths).sum() / number
        loss.backward()
        total += loss.item()
    return total


def _reference(workload: Workload, sequence: int) -> Tensor:
    return reference_logps(workload.sequences[sequence], workload.all_starts[sequence])


@torch.no_grad()
def _scored_outside(scorer: TreeScorer, rows: list[Row], workload: Workload) -> dict[int, Tensor]:
    """[n] log-probs of the sequences whose pair has its other member in another row."""
    apart = sorted({s for row in rows for pair in row.pairs if not set(pair) <= set(row.sequences) for s in pair})
    if not apart:
        return {}
    tree = build_tree([workload.sequences[s] for s in apart], [workload.all_starts[s] for s in apart])
    counted, cu_seqlens = sequence_nodes(tree)
    nodes = trained_nodes(tree)
    logps = scorer(tree, nodes)[torch.searchsorted(nodes, counted)]
    return dict(zip(apart, logps.tensor_split(cu_seqlens[1:-1]), strict=True))
