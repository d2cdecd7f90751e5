"""One flat set of settings: defaults here, a YAML recipe over them, the command line over both.

Every key is a field of one of the groups below, and a flag of the same name (``--num_samples`` or ``--num-samples``).
A recipe is a flat YAML mapping of the same keys, and ``extends``, another recipe that it adds to. Keys that may change
from iteration to iteration are lists: one value per iteration, the last one repeats (``temperature: [0.8, 0.8, 1.3]``).
"""

import dataclasses
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastpo.errors import FastpoError, suggestion


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

# A resumed run may differ in these: they say where, how far and how it is watched, not what is computed.
FREE_KEYS = frozenset({"output_dir", "iterations", "tensorboard", "checkpoint_steps"})


@dataclass
class Config(
    EvaluationKeys,
    TrainingKeys,
    ObjectiveKeys,
    PairKeys,
    JudgeKeys,
    RewardKeys,
    SearchKeys,
    SamplingKeys,
    WarmStartKeys,
    DataKeys,
    ModelKeys,
    RunKeys,
):
    """All settings of a run: ``Config()``, ``Config.load(recipe)`` or the command line. Checked on construction."""

    def __post_init__(self) -> None:
        for check, message in _CHECKS:
            if not check(self):
                raise FastpoError(message.format(**dataclasses.asdict(self)))

    @staticmethod
    def load(path: str | Path, **overrides: Any) -> "Config":
        """Defaults, then the recipe at ``path``, then ``overrides``."""
        return Config(**{**read_recipe(path), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every key in the order of the groups."""
        return {name: getattr(self, name) for name in key_types()}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def at(self, key: str, iteration: int) -> Any:
        """The value of a per-iteration list in ``iteration`` (from 1); the last one repeats."""
        values = getattr(self, key)
        return values[min(iteration, len(values)) - 1]


_CHECKS = [
    (lambda c: c.iterations >= 0, "iterations is {iterations}; it should be 0 or more"),
    (lambda c: c.num_samples >= 1, "num_samples is {num_samples}; it should be at least 1"),
    (lambda c: c.max_new_tokens >= 1, "max_new_tokens is {max_new_tokens}; it should be at least 1"),
    (
        lambda c: c.prompts_per_iteration is None or c.prompts_per_iteration >= 1,
        "prompts_per_iteration is {prompts_per_iteration}; it should be at least 1, or none for all of data",
    ),
    (
        lambda c: c.temperature and all(t >= 0 and math.isfinite(t) for t in c.temperature),
        "temperature is {temperature}; it should be one or more numbers >= 0",
    ),
    (lambda c: 0 < c.top_p <= 1, "top_p is {top_p}; it should be in (0, 1]"),
    (lambda c: c.top_k >= 0, "top_k is {top_k}; it should be 0 (off) or more"),
    (lambda c: c.sample_batch_size >= 1, "sample_batch_size is {sample_batch_size}; it should be at least 1"),
    (lambda c: c.sample_chunk >= 1, "sample_chunk is {sample_chunk}; it should be at least 1"),
    *(
        (
            lambda c, name=name: getattr(c, name) is None or getattr(c, name) >= 1,
            f"{name} is {{{name}}}; it should be 1 or more",
        )
        for name in (
            "search_rollouts",
            "search_step_tokens",
            "search_nodes",
            "search_cache_tokens",
            "search_checkpoint_waves",
        )
    ),
    (lambda c: c.pairs_per_prompt >= 1, "pairs_per_prompt is {pairs_per_prompt}; it should be at least 1"),
    (
        lambda c: c.vote_threshold and all(0 <= t <= 1 for t in c.vote_threshold),
        "vote_threshold is {vote_threshold}; it should be one or more shares in [0, 1]",
    ),
    (lambda c: c.beta is None or c.beta > 0, "beta is {beta}; it should be above 0"),
    (lambda c: c.alpha is None or c.alpha >= 0, "alpha is {alpha}; it should be 0 or more"),
    (
        lambda c: 0 <= c.warm_start_judgements <= 1,
        "warm_start_judgements is {warm_start_judgements}; it should be a share in [0, 1]",
    ),
    (lambda c: c.judge_samples >= 1, "judge_samples is {judge_samples}; it should be at least 1"),
    (lambda c: c.length_rho >= 0, "length_rho is {length_rho}; it should be 0 or more"),
    (lambda c: 0 <= c.reference_mix <= 1, "reference_mix is {reference_mix}; it should be a share in [0, 1]"),
    (
        lambda c: len(c.contrast_prompts) == 2 and all("{prompt}" in text for text in c.contrast_prompts),
        "contrast_prompts is {contrast_prompts}; it should be two texts that hold {{prompt}}",
    ),
    (
        lambda c: all("=" in setting for setting in c.objective_settings),
        "objective_settings is {objective_settings}; it should be a list of name=number",
    ),
    (lambda c: c.batch_size >= 1, "batch_size is {batch_size}; it should be at least 1"),
    (lambda c: c.learning_rate > 0, "learning_rate is {learning_rate}; it should be above 0"),
    (lambda c: c.num_epochs > 0, "num_epochs is {num_epochs}; it should be above 0"),
    (lambda c: c.max_steps is None or c.max_steps >= 1, "max_steps is {max_steps}; it should be at least 1, or none"),
    (lambda c: c.micro_batch_tokens >= 1, "micro_batch_tokens is {micro_batch_tokens}; it should be at least 1"),
    (lambda c: c.checkpoint_steps >= 1, "checkpoint_steps is {checkpoint_steps}; it should be at least 1"),
    (lambda c: c.warm_start_steps >= 0, "warm_start_steps is {warm_start_steps}; it should be 0 or more"),
    (
        lambda c: "{prompt}" in c.prompt_template,
        "prompt_template is {prompt_template!r}; it should hold {{prompt}}, where the question goes",
    ),
    (
        lambda c: c.hidden_size % (2 * c.num_heads) == 0,
        "hidden_size is {hidden_size}; it should be a multiple of twice num_heads ({num_heads})",
    ),
]


def key_types() -> dict[str, Any]:
    """Key -> its type, in the order of the groups."""
    return {f.name: get_type_hints(group)[f.name] for group in GROUPS for f in dataclasses.fields(group)}


def recipe_path(name: str | Path) -> Path:
    """A recipe file, or a shipped recipe by its bare name (``irpo``)."""
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).parent
    folders = [f for f in (package.parent / "recipes", package / "recipes") if f.is_dir()]
    shipped = {p.stem: p for folder in folders for p in sorted(folder.glob("*.yaml"))}
    if path.stem in shipped and path.parent in (Path("."), Path("recipes")):
        return shipped[path.stem]
    hint = suggestion(path.stem, list(shipped))
    raise FastpoError(f"recipe {name} not found{hint} (shipped: {', '.join(sorted(shipped))})")


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The keys of a recipe, checked: known names (the nearest is suggested), values of the key's type.

    ``extends: NAME`` takes the keys of another recipe first.
    """
    path = recipe_path(name)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise FastpoError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise FastpoError(f"{path}: a {type(loaded).__name__}, it should be a mapping of keys to values")
    known = key_types()
    base = loaded.pop("extends", None)
    values = {} if base is None else read_recipe(base)
    for key, value in loaded.items():
        key_name = str(key).replace("-", "_")
        if key_name not in known:
            raise FastpoError(f"{path}: unknown key {key!r}{suggestion(str(key), list(known))}")
        values[key_name] = _coerce(value, known[key_name], f"{path}: {key}")
    return values


def _coerce(value: Any, wanted: Any, where: str) -> Any:
    """``value`` as type ``wanted``. YAML reads 2e-4 as text and 1 as an integer: both are numbers here."""
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        value = {False: "no", True: "yes"}.get(value, value) if isinstance(value, bool) else value  # YAML's bare no
        if value not in args:
            raise FastpoError(f"{where} is {value!r}; it should be one of {', '.join(args)}")
        return value
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [_coerce(item, args[0], where) for item in items]
    if wanted is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    raise FastpoError(f"{where} is {value!r}; it should be {_describe(wanted)}")


def _describe(wanted: Any) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[wanted]


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: old -> new`` for each key on which a resumed run may not differ and does."""
    names = sorted((old.keys() | new.keys()) - FREE_KEYS)
    return [f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]
