"""One flat set of settings: defaults here, a YAML recipe over them, the command line over both.

Every key is a field of one of the groups below, and a flag of the same name (``--num_samples`` or ``--num-samples``).
A recipe is a flat YAML mapping of the same keys, and ``extends``, another recipe that it adds to. Keys that may change
from iteration to iteration are lists: one value per iteration, the last one repeats (``temperature: [0.8, 0.8, 1.3]``).
"""

import dataclasses
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
from fastpo.config_ranges import complaints
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
        for complaint in complaints(vars(self)):
            raise FastpoError(complaint)

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
