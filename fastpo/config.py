"""One flat set of settings: defaults here, a YAML recipe over them, the command line over both.

Every key is a field of one of the groups below, and a flag of the same name (``--num_samples`` or ``--num-samples``).
A recipe is a flat YAML mapping of the same keys, and ``extends``, another recipe that it adds to. Keys that may change
from iteration to iteration are lists: one value per iteration, the last one repeats (``temperature: [0.8, 0.8, 1.3]``).
"""

import dataclasses
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastpo.config_keys import (
    GROUPS,
    DataKeys,
    EvaluationKeys,
    JudgeKeys,
    ModelKeys,
    ObjectiveKeys,
    PairKeys,
    RewardKeys,
    RunKeys,
    SamplingKeys,
    SearchKeys,
    TrainingKeys,
    WarmStartKeys,
)
from fastpo.errors import FastpoError, suggestion

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
