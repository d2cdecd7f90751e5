"""What a run will cost, from its config and the model's sizes: ``fastpo train ... --dry_run``. No weights are loaded.

Upper bounds: every response is counted at max_new_tokens, every prompt with as many pairs as its rule can make. With
sharing the prompt is counted once for its responses, and a response once for its pairs, as far as they stand in one
batch (what responses have in common besides is not foreseen); without, once for each. A tree of a search has all nodes
that its settings allow, each a step of search_step_tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastpo import embedded
from fastpo.config import Config
from fastpo.info import pairs_of
from fastpo.integrations.head import unwrapped
from fastpo.kernels.linear_preference_loss import plan as plan_loss
from fastpo.kernels.linear_token_logprobs import plan
from fastpo.objectives import Objective
from fastpo.references import needs_kl, num_passes
from fastpo.search.engine import most_nodes
from fastpo.search.settings import method_of
from fastpo.tiny import llama_config
from fastpo.training import TrainConfig

JUDGE_TOKENS = 40  # a judge's template, beside prompt and responses
_MEMBERS = {"third": 3, "edits": 3}  # sequences of a tuple where that is not two
_ONCE = ("scpo", "max_min", "max_random", "max_max", "win_rate", "consistency", "list")  # one tuple per prompt
_ACTIVATIONS = 18  # values per token, layer and hidden unit that a decoder layer keeps for its backward, about


@dataclass(frozen=True)
class Sizes:
    """Of a model, in numbers and bytes."""

    parameters: int
    embedding: int  # of them those that are only looked up: an untied input embedding
    vocab: int
    hidden: int
    layers: int
    cache: int  # keys and values of a token in all layers, in elements
    itemsize: int  # bytes of a weight

    @property
    def body(self) -> int:
        """Parameters that every token is multiplied with before the LM head."""
        return self.parameters - self.embedding - self.vocab * self.hidden


@dataclass(frozen=True)
class Cost:
    """Of one stage of one iteration."""

    stage: str
    sequences: int
    tokens: int  # through the body
    flops: float


def sizes_of(config: Config) -> Sizes:
    """The model's sizes, from its structure on the meta device."""
    with torch.device("meta"):
        model = _skeleton(config)
    text: Any = model.config.get_text_config()
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()
    parameters: Any = model.parameters()
    query_heads = getattr(text, "num_attention_heads", 1)
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    return Sizes(
        parameters=sum(p.numel() for p in parameters),
        embedding=0 if inputs.weight is outputs.weight else inputs.weight.numel(),
        vocab=outputs.weight.shape[0],
        hidden=outputs.weight.shape[1],
        layers=text.num_hidden_layers,
        cache=2 * text.num_hidden_layers * heads * head_dim,
        itemsize=getattr(torch, config.dtype).itemsize,
    )


def _skeleton(config: Config) -> PreTrainedModel:
    if config.model == "embedded":
        return embedded.build_model(config.seed)
    if config.model == "tiny-llama":
        settings = llama_config(config, config.vocab_size, eos_token_id=1, pad_token_id=0)
    else:
        settings = AutoConfig.from_pretrained(config.model)
    return unwrapped(AutoModelForCausalLM.from_config(settings))


def pairs_at_most(config: Config, prompts: int) -> int:
    """Tuples that the pair rule can make of so many prompts."""
    if config.search != "none":
        return prompts * config.pairs_per_prompt
    per_prompt = {"unpaired": 2 * config.pairs_per_prompt, "tiers": 1 + config.judge_pairs}
    per_prompt |= dict.fromkeys(_ONCE, 1)
    return prompts * per_prompt.get(config.pair_rule, config.pairs_per_prompt)


def costs(config: Config, objective: Objective, sizes: Sizes, prompts: int, prompt_tokens: float) -> list[Cost]:
    """The stages of an iteration over ``prompts`` of ``prompt_tokens`` each (a mean)."""
    responses = prompts * config.num_samples
    whole = prompt_tokens + config.max_new_tokens
    found = []

    def add(stage: str, sequences: float, tokens: float, rows: float, passes: float = 1.0, gemms: float = 1.0) -> None:
        flops = 2 * sizes.body * tokens * passes + 2 * rows * sizes.hidden * sizes.vocab * gemms
        found.append(Cost(stage, round(sequences), round(tokens), flops))

    def sample(stage: str, asked: float, each: int, asked_tokens: float, new: int) -> None:
        add(stage, asked * each, asked * (asked_tokens + each * new), asked * each * new)

    if config.temperature_scan:
        tried = min(prompts, config.scan_prompts) * len(config.temperature_scan)
        sample("scan", tried, config.num_samples, prompt_tokens, config.max_new_tokens)
    if config.search == "none":
        sample("samples", prompts, config.num_samples, prompt_tokens, config.max_new_tokens)
    else:
        for stage, sequences, tokens, rows in _search_costs(config, prompts, prompt_tokens):
            add(stage, sequences, tokens, rows)
    if config.score_by == "implicit":
        rows = responses * config.max_new_tokens
        tokens = (prompts if config.sharing else responses) * prompt_tokens + rows
        add("implicit rewards, two or three models", 3 * responses, 3 * tokens, 3 * rows)
    if config.score_by in ("judge", "duels") or config.pair_rule == "judgements":
        asked, length = _judge_prompts(config, prompts), whole + JUDGE_TOKENS
        if config.score_by != "judge":
            length += config.max_new_tokens
        if config.judge_mode == "text" or config.pair_rule == "judgements":
            sample("judgements", asked, config.judge_samples, length, config.judge_max_new_tokens)
        else:
            add("grades", asked, asked * length, asked)
    members = pairs_at_most(config, prompts) * _members(config)
    sampled: float = responses + prompts if config.search == "none" and config.pair_rule != "unpaired" else math.inf
    if objective.needs_reference:
        distinct: float = min(members, sampled)
        prefixes: float = min(prompts, distinct) if config.sharing and config.search == "none" else distinct
        passes = num_passes(objective, config, iteration=2)
        tokens = distinct * config.max_new_tokens
        add("reference", distinct, prefixes * prompt_tokens + tokens, tokens, passes, passes)
    begun, trained = _trained(config, prompts, members, sampled)
    rows = trained * config.max_new_tokens
    kl, twice = needs_kl(objective), objective.couples_scores  # a forward: of the reference, of the whole batch
    passes = 3 + config.gradient_checkpointing + kl + twice
    add("training", trained, begun * prompt_tokens + rows, rows, passes, gemms=3 + 6 * kl + twice)
    return found


def _trained(config: Config, prompts: int, members: float, sampled: float) -> tuple[float, float]:
    """(prompts, responses) that go through the model in all epochs, of tuples of so many ``members`` together.

    ``sampled`` are the distinct responses at most. With sharing the pairs of a prompt that lie in one batch have its
    prompt, and each response, once: all of them with batch_by prompt, but for the prompt at each border of batches.
    """
    epochs, tuples = config.num_epochs, members / _members(config)
    if not config.sharing:
        return members * epochs, members * epochs
    if config.batch_by == "pair" or config.search != "none":  # pairs of a search begin behind steps of their own
        return tuples * epochs, members * epochs
    borders = math.ceil(tuples * epochs / config.batch_size)
    asked = min(prompts * epochs + borders, tuples * epochs)
    own = min(members, sampled) / max(1, prompts)  # responses of a prompt
    return asked, min(asked * own, members * epochs)


def _members(config: Config) -> int:
    """Sequences of a tuple."""
    if config.search != "none":
        return 2
    return config.pairs_per_prompt if config.pair_rule == "list" else _MEMBERS.get(config.pair_rule, 2)


def _search_costs(config: Config, prompts: int, prompt_tokens: float) -> Iterator[tuple[str, float, float, float]]:
    """(stage, sequences, tokens through the body, rows through the head) of searched trees."""
    method = method_of(config)
    nodes = prompts * most_nodes(method)
    longest = config.search_step_tokens if method.unit == "step" else config.max_new_tokens
    asked = config.max_new_tokens if method.unit == "answer" and config.search_refine else 0  # the answer to improve
    yield (
        f"search, {nodes // prompts} nodes a tree",
        nodes,
        prompts * prompt_tokens + nodes * (asked + longest),
        (nodes * longest),
    )
    completions = nodes * ((method.value == "rollout") * config.search_rollouts + bool(method.backup.rollout_mix))
    if completions and method.unit == "step":
        tokens = completions * config.max_new_tokens
        yield "rollouts", completions, tokens, tokens
    if method.value == "self":
        yield "self-evaluations", nodes, nodes * JUDGE_TOKENS, nodes


def _judge_prompts(config: Config, prompts: int) -> int:
    if config.pair_rule == "judgements":
        return prompts
    per_prompt = config.num_samples * (config.num_samples - 1 if config.score_by == "duels" else 1)
    return prompts * per_prompt


def describe(config: Config, objective: Objective, prompts: int, prompt_tokens: float, device: str) -> list[str]:
    """Lines for people: the model, the stages of an iteration, the fused head, the memory."""
    sizes = sizes_of(config)
    found = costs(config, objective, sizes, prompts, prompt_tokens)
    pairs = pairs_at_most(config, prompts)
    steps = TrainConfig(
        config.learning_rate, config.batch_size, num_epochs=config.num_epochs, max_steps=config.max_steps
    ).num_steps(pairs)
    lines = [
        f"model: {_short(sizes.parameters)} parameters, {sizes.layers} layers, hidden {sizes.hidden}, vocabulary "
        f"{sizes.vocab:,}, {config.dtype}",
        f"an iteration at most: {prompts:,} prompts of {prompt_tokens:.0f} tokens, {pairs:,} tuples, {steps:,} steps",
        f"  {'stage':38} {'sequences':>12} {'tokens':>14} {'FLOP':>10}",
    ]
    lines += [f"  {c.stage:38} {c.sequences:12,} {c.tokens:14,} {_short(c.flops):>10}" for c in found]
    tokens, flops = sum(c.tokens for c in found), sum(c.flops for c in found)
    lines.append(f"  {'together':38} {'':12} {tokens:14,} {_short(flops):>10}")
    return [*lines, *_head_and_memory(config, objective, sizes, prompt_tokens, device)]


def _head_and_memory(
    config: Config, objective: Objective, sizes: Sizes, prompt_tokens: float, device: str
) -> Sequence[str]:
    whole = prompt_tokens + config.max_new_tokens
    rows = max(1, int(config.micro_batch_tokens * config.max_new_tokens / whole))
    size, dtype = (sizes.vocab, sizes.hidden), getattr(torch, config.dtype)
    head: Any = plan(rows, *size, dtype=dtype, device=device)
    if not config.sharing and objective.path == "fused":
        head = plan_loss(*pairs_of(rows, device), *size, dtype=dtype)
    kept = 1 if config.gradient_checkpointing else _ACTIVATIONS
    parts = {
        "weights": sizes.parameters * sizes.itemsize,
        "gradients": sizes.parameters * sizes.itemsize,
        "AdamW": 2 * sizes.parameters * sizes.itemsize,
        "activations": config.micro_batch_tokens * sizes.hidden * sizes.layers * kept * sizes.itemsize,
        "head": head.bytes,
    }
    cache = config.sample_batch_size * whole * sizes.cache * sizes.itemsize
    sampling = parts["weights"] + cache
    shown = ", ".join(f"{name} {_bytes(value)}" for name, value in parts.items())
    return [
        f"objective {objective.name}: {objective.path} path; LM head on {rows:,} response tokens a micro-batch: "
        f"{head.mode}, {head.gemms:.2f}F in GEMMs ({head.reason})",
        f"memory of one process, about: training {_bytes(sum(parts.values()))} ({shown}); "
        f"sampling {_bytes(sampling)} (keys and values of {config.sample_batch_size} rows {_bytes(cache)})",
    ]


def _short(value: float) -> str:
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
