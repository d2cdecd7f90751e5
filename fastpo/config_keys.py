"""The keys of a run in groups, each with its default and its help: what ``fastpo.config`` reads and the flags show."""

from dataclasses import dataclass, field
from typing import Any, Literal


def _key(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class RunKeys:
    _argument_group_name = "run"

    output_dir: str = _key(
        "runs/demo", "the run's directory; each stage writes its artefact here", aliases=["--output"]
    )
    seed: int = _key(0, "same seed, same machine: same artefacts bit for bit")
    iterations: int = _key(3, "number of iterations; may be raised on a finished run to go on")
    mixed_precision: Literal["no", "bf16", "fp16"] = _key("no", "accelerate's autocast; weights stay in dtype")
    tensorboard: bool = _key(True, "write output_dir/tensorboard")


@dataclass
class ModelKeys:
    _argument_group_name = "model"

    model: str = _key(
        "embedded",
        "path or Hub name of a causal LM; 'embedded': the built-in character-level Llama; 'tiny-llama': a new Llama of "
        "the sizes below with a BPE tokenizer trained on the data",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = _key("float32", "type of the weights")
    vocab_size: int = _key(2048, "tiny-llama: entries of the BPE tokenizer")
    hidden_size: int = _key(128, "tiny-llama: width")
    num_layers: int = _key(4, "tiny-llama: layers")
    num_heads: int = _key(4, "tiny-llama: attention heads")
    context_length: int | None = _key(None, "longest prompt + response in tokens; none: what the model allows")


@dataclass
class DataKeys:
    _argument_group_name = "data"

    data: str | None = _key(
        None,
        'training prompts: JSONL of {"question" or "prompt", "answer"}; \'embedded\': generated word arithmetic',
    )
    eval_data: str | None = _key(None, "held-out prompts, same format; none: eval_prompts rows of data, not trained on")
    preferences: str | None = _key(
        None,
        'JSONL of {"prompt", "chosen", "rejected", optional "weight"}: iteration 1 trains on these pairs instead of '
        "sampling its own; further iterations need data",
    )
    eval_preferences: str | None = _key(None, "held-out pairs, same format: ranking accuracy and log-probs on them")
    prompt_template: str = _key("{prompt}\n", "text given to the model, {prompt} being the question")
    chat_template: bool = _key(False, "wrap prompts in the tokenizer's chat template (after prompt_template)")
    skip_bad: bool = _key(False, "skip and count malformed lines and rows that do not fit; else stop at the first")


@dataclass
class WarmStartKeys:
    _argument_group_name = "warm start (supervised, before iteration 1)"

    warm_start: str | None = _key(
        None,
        'demonstrations: JSONL of {"prompt" or "question", "response" or "answer"}; \'embedded\': generated, some '
        "worked step by step, some bare",
    )
    warm_start_examples: int = _key(20000, "embedded: number of demonstrations")
    warm_start_judgements: float = _key(0.0, "embedded: share of the demonstrations that teach to judge answers")
    warm_start_steps: int = _key(2000, "optimizer steps")
    warm_start_batch_size: int = _key(64, "demonstrations per step, over all processes")
    warm_start_learning_rate: float = _key(2e-3, "peak learning rate")


@dataclass
class SamplingKeys:
    _argument_group_name = "sampling"

    prompts_per_iteration: int | None = _key(600, "prompts per iteration, fresh while data lasts; none: all of data")
    num_samples: int = _key(8, "responses per prompt (N)")
    max_new_tokens: int = _key(96, "longest response in tokens")
    temperature: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "per iteration"})
    temperature_scan: list[float] = field(
        default_factory=list,
        metadata={"help": "before each iteration these are tried; the one of the best balance is used (B-STaR)"},
    )
    threshold_scan: list[float] = field(
        default_factory=list, metadata={"help": "with temperature_scan: the win_thresholds that are tried"}
    )
    scan_prompts: int = _key(64, "with temperature_scan: prompts that each is tried on")
    top_p: float = _key(1.0, "nucleus; 1: off")
    top_k: int = _key(0, "0: off")
    sample_batch_size: int = _key(512, "sequences generated at once")
    sample_chunk: int = _key(64, "prompts per part file: what a kill while sampling costs at most")


@dataclass
class SearchKeys:
    _argument_group_name = "search (in place of independent samples)"

    search: Literal[
        "none",
        "mcts_dpo",
        "cpl",
        "rest_mcts",
        "alphallm",
        "tree_plv",
        "rebase",
        "beam_q",
        "mc_nest",
        "muzero",
    ] = _key("none", "a tree search over all prompts at once; the keys below change its preset")
    search_simulations: int | None = _key(None, "expansions per tree; none here and below: the preset's")
    search_width: int | None = _key(None, "children per expansion")
    search_depth: int | None = _key(None, "steps of a response at most")
    search_leaves: int | None = _key(None, "expansions of a tree in one wave (beam_q: width of the beam)")
    search_c: float | None = _key(None, "weight of exploration")
    search_virtual_loss: float | None = _key(None, "what a visit under way costs; with several leaves a wave")
    search_value: Literal["outcome", "rollout", "self", "likelihood"] | None = _key(
        None,
        "of inner nodes. outcome: none before the end; rollout: share of completions that are right; self: probability "
        "of search_labels behind search_question; likelihood: the path's log-prob",
    )
    search_rollouts: int = _key(4, "rollout: completions per node")
    search_question: str = _key("\nIs this right so far? Answer: ", "self: asked behind a path")
    search_labels: list[str] = field(
        default_factory=lambda: ["A", "yes", "Yes", "correct", "Correct", "right", "Right"],
        metadata={"help": "self: what stands for right, each by its first token"},
    )
    search_refine: str | None = _key(
        None, "mc_nest: text behind the prompt with {answer}, the answer to be refined; none: answers are drawn anew"
    )
    search_step: str = _key("\n", "text that ends a step; empty: steps end by search_step_tokens alone")
    search_step_tokens: int = _key(64, "longest step in tokens")
    search_min_gap: float | None = _key(None, "difference in Q between the members of a pair")
    search_nodes: int | None = _key(None, "nodes a tree has room for at first; none: as many as the preset can make")
    search_full: Literal["grow", "stop"] = _key("grow", "a tree without room: more for all of them, or it stops")
    search_cache_tokens: int | None = _key(None, "tokens whose keys and values are kept between waves; none: all")
    search_checkpoint_waves: int = _key(16, "waves between checkpoints: what a kill while searching costs at most")


@dataclass
class RewardKeys:
    _argument_group_name = "reward"

    reward: str = _key(
        "math",
        "'math' (final answers compared, math-verify where needed), or your own: 'package.module:function' or "
        "'file.py:function', called with (prompt, response, row), returning a number",
    )
    on_reward_error: Literal["stop", "skip"] = _key(
        "stop", "a reward that raises: stop and name the prompt, or leave that sample out and count it"
    )


@dataclass
class JudgeKeys:
    _argument_group_name = "what pairs are chosen by, where it is not the reward"

    score_by: Literal["reward", "judge", "duels", "implicit"] = _key(
        "reward",
        "reward; judge: a model's grade of each response; duels: win rates where a model compares them two by two; "
        "implicit: the log-ratio of the iteration's start to M_0 (iteration 1: the mean log-prob)",
    )
    judge_model: str | None = _key(None, "path or Hub name of the judging model; none: the iteration's own start")
    judge_mode: Literal["labels", "text"] = _key(
        "labels", "labels: the expected grade from the probabilities of the grades; text: grades parsed from samples"
    )
    judge_samples: int = _key(3, "text mode: judgements per response, averaged")
    judge_template: str | None = _key(
        None, "what the judge is asked, with {prompt} and {response} (duels: {first} and {second}); none: the default"
    )
    judge_max_new_tokens: int = _key(256, "text mode: longest judgement in tokens")
    answer_marker: str | None = _key(None, "only what stands from its last occurrence on is judged and measured (TPO)")


@dataclass
class PairKeys:
    _argument_group_name = "pairs"

    pair_rule: Literal[
        "irpo",
        "scpo",
        "max_min",
        "max_random",
        "max_max",
        "tiers",
        "win_rate",
        "consistency",
        "spin",
        "unpaired",
        "list",
        "third",
        "edits",
        "judgements",
    ] = _key(
        "irpo",
        "irpo: right x wrong answers, cyclically; scpo: most x least consistent answer by vote; max_min: best x worst; "
        "max_random, max_max: best x a random lower one, x the next best; tiers: shortest of the best x longest of the "
        "worst; win_rate: best x worst by mean win rate; consistency: max_min with CREAM's soft labels; spin: the "
        "data's solution x samples; unpaired: winners and losers by themselves; list: the whole ranking; third: irpo "
        "and one more sample; edits: winners x themselves with an error put in; judgements: right x wrong judgements",
    )
    pairs_per_prompt: int = _key(4, "at most this many pairs per prompt (K); list: members")
    win_threshold: float = _key(1.0, "a reward of at least this wins, a lower one loses")
    gold_wins: bool = _key(False, "irpo, edits: the data's own solution joins the winners")
    vote_threshold: list[float] = field(
        default_factory=lambda: [0.5, 0.7],
        metadata={"help": "scpo, per iteration: a prompt counts if its best answer has at least this share of votes"},
    )
    length_rho: float = _key(0.0, "score: z(score) - rho z(length), over the samples of a prompt (TPO); tiers: width")
    length_penalty: float = _key(0.0, "score: less this for each token (RLHF workflow)")
    judge_pairs: int = _key(0, "tiers: of so many responses, the judgements that a meta-judge ranks are trained on too")


@dataclass
class ObjectiveKeys:
    _argument_group_name = "objective"

    objective: str = _key("irpo", "a preset of fastpo.objectives: irpo, scpo, dpo, cdpo, ipo, hinge, simpo, rpo, ...")
    beta: float | None = _key(None, "strength of the reference; none: the preset's")
    alpha: float | None = _key(None, "weight of the NLL term; none: the preset's")
    objective_settings: list[str] = field(
        default_factory=list, metadata={"help": "further settings of the preset, like gamma=0.5"}
    )
    contrast_prompts: list[str] = field(
        default_factory=lambda: ["Answer correctly.\n{prompt}", "Answer wrongly.\n{prompt}"],
        metadata={"help": "t_reg: a token is worth what its log-prob under the first gains over the second"},
    )
    reference_mix: float = _key(0.0, "share of M_0 in the reference log-probs, the rest being the iteration's start")


@dataclass
class TrainingKeys:
    _argument_group_name = "training"

    learning_rate: float = _key(2e-4, "peak learning rate")
    lr_schedule: Literal["cosine", "linear", "constant"] = _key("cosine", "after warmup_steps of linear warm-up")
    warmup_steps: int = _key(0, "steps of linear warm-up")
    batch_size: int = _key(64, "pairs per optimizer step, over all processes")
    max_steps: int | None = _key(None, "optimizer steps per iteration at most; none: num_epochs over the pairs")
    num_epochs: float = _key(1.0, "passes over the pairs of an iteration")
    weight_decay: float = _key(0.0, "AdamW")
    max_grad_norm: float = _key(1.0, "gradient clipping; 0: off")
    micro_batch_tokens: int = _key(16384, "tokens per forward; a batch is split into as many as it takes")
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward")
    sharing: bool = _key(
        True, "log-probs and training on trees: a token that several responses to a prompt share is computed once"
    )
    batch_by: Literal["prompt", "pair"] = _key(
        "prompt",
        "prompt: the pairs of a prompt stand side by side, which is what sharing saves on; pair: all pairs are mixed",
    )
    checkpoint_steps: int = _key(100, "steps between checkpoints: what a kill while training costs at most")


@dataclass
class EvaluationKeys:
    _argument_group_name = "evaluation"

    eval_prompts: int = _key(500, "held-out problems, answered greedily")
    eval_pairs: int = _key(256, "training pairs scored again after training: does the chosen log-prob hold? 0: off")
    report_samples: int = _key(4, "held-out answers per iteration shown in the report")


GROUPS = (
    RunKeys,
    ModelKeys,
    DataKeys,
    WarmStartKeys,
    SamplingKeys,
    SearchKeys,
    RewardKeys,
    JudgeKeys,
    PairKeys,
    ObjectiveKeys,
    TrainingKeys,
    EvaluationKeys,
)
