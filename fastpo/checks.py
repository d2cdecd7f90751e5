"""What can be said of a config and its input files before any work."""

from collections.abc import Collection, Iterator
from dataclasses import fields

from fastpo.config import Config
from fastpo.config_keys import SearchKeys
from fastpo.data import evaluation_prompts, load_demonstrations, load_preferences, training_prompts
from fastpo.errors import FastpoError
from fastpo.references import contrast_texts
from fastpo.run import BUILT_MODELS
from fastpo.search.settings import method_of

_DEFAULTS = Config()
_WARM_START = ("warm_start_steps", "warm_start_batch_size", "warm_start_learning_rate")
_SEARCH = tuple(field.name for field in fields(SearchKeys) if field.name != "search")
_SEVERAL = ("irpo", "third", "edits", "spin", "unpaired", "list", "judgements")  # pairs of a prompt, or members
_JUDGE = ("judge_mode", "judge_samples", "judge_max_new_tokens")


def check(config: Config) -> None:
    """What a config says about itself and cannot be right, beyond single keys."""
    if config.data is None and config.preferences is None:
        raise FastpoError("nothing to train on: give data (prompts), preferences (pairs), or both")
    if config.model in BUILT_MODELS and config.warm_start is None:
        raise FastpoError(
            f"model {config.model} starts untrained and would sample noise; give warm_start (demonstrations), or a "
            "trained model's path"
        )
    check_keys(config)


def check_keys(config: Config) -> None:
    """FastpoError for keys that do not go together, or would do nothing beside the others."""
    if config.pair_rule == "tiers" and config.length_rho >= 0.5:
        raise FastpoError(f"length_rho is {config.length_rho}; it should be below 0.5 with pair_rule tiers")
    if config.pair_rule == "list" and config.pairs_per_prompt < 2:
        raise FastpoError("pairs_per_prompt is 1; it should be 2 or more with pair_rule list, whose members it counts")
    unit = None if config.search == "none" else method_of(config).unit
    for name, used, where in _uses(config, unit):
        if not used and getattr(config, name) != getattr(_DEFAULTS, name):
            raise FastpoError(f"{name} is {getattr(config, name)!r}, which does nothing here; it is for {where}")


def check_given(config: Config, given: Collection[str]) -> None:
    """FastpoError for one of ``given``, keys of the command line, that does nothing beside the others.

    Recipes may hold such keys: what extends them, or is given over them, takes them up.
    """
    for names, used, where in _wanted(config):
        for name in names:
            if name in given and not used:
                raise FastpoError(f"{name} does nothing here; it is for {where}")


def _wanted(config: Config) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """(keys, whether this config uses them, what does), beside those of ``_uses``."""
    method = None if config.search == "none" else method_of(config)
    yield ("vocab_size", "hidden_size", "num_layers", "num_heads"), config.model == "tiny-llama", "model tiny-llama"
    yield _WARM_START, config.warm_start is not None, "warm_start"
    yield ("warm_start_examples", "warm_start_judgements"), config.warm_start == "embedded", "warm_start embedded"
    yield ("num_samples",), method is None, "independent samples, not for a search"
    yield ("scan_prompts",), bool(config.temperature_scan), "temperature_scan"
    yield _SEARCH, method is not None, "a search"
    yield (
        ("search_step", "search_step_tokens"),
        method is None or method.unit == "step",
        "searches whose nodes are steps",
    )
    yield ("search_rollouts",), method is None or method.value == "rollout", "search_value rollout"
    yield ("search_question", "search_labels"), method is None or method.value == "self", "search_value self"
    yield _JUDGE, judges(config), "score_by judge or duels, and pair_rule judgements"
    several = method is not None or config.pair_rule in _SEVERAL
    yield ("pairs_per_prompt",), several, f"a search, and pair_rule {', '.join(_SEVERAL)}"
    yield ("vote_threshold",), method is None and config.pair_rule == "scpo", "pair_rule scpo"
    yield ("contrast_prompts",), bool(contrast_texts(config)), "objective t_reg"


def _uses(config: Config, unit: str | None) -> Iterator[tuple[str, bool, str]]:
    """(key, whether this config uses it, what does) of the keys that others can make idle.

    ``unit`` is what nodes of a search are; None without one.
    """
    sampled, judged = unit is None, judges(config)
    yield "pair_rule", sampled, "independent samples: a search pairs its own nodes"
    for name in ("score_by", "temperature_scan", "answer_marker", "length_penalty", "length_rho"):
        yield name, sampled, "independent samples, not for a search"
    yield "threshold_scan", bool(config.temperature_scan), "temperature_scan"
    yield "gold_wins", sampled and config.pair_rule in ("irpo", "third", "edits"), "pair_rule irpo, third or edits"
    scored = config.pair_rule not in ("scpo", "spin", "judgements")
    for name in ("length_penalty", "length_rho"):
        yield name, scored, "pair rules that go by scores"
    for name in ("judge_model", "judge_template"):
        yield name, judged, "score_by judge or duels, and pair_rule judgements"
    graded = sampled and config.score_by == "judge" and config.pair_rule == "tiers"
    yield "judge_pairs", graded, "score_by judge with pair_rule tiers"
    yield "search_refine", unit in (None, "answer"), "searches whose nodes are answers: mc_nest"


def judges(config: Config) -> bool:
    """Whether a model is asked for its opinion of samples."""
    return config.search == "none" and (config.score_by in ("judge", "duels") or config.pair_rule == "judgements")


def read_inputs(config: Config) -> None:
    """Reads every file that the config names once, for the complaints about its rows."""
    for path in (config.preferences, config.eval_preferences):
        if path:
            load_preferences(path, config)
    if config.warm_start != "embedded":
        load_demonstrations(config)
    if config.data:
        training_prompts(config, 1)
    evaluation_prompts(config)


def iterations_of(config: Config) -> int:
    """``iterations``, or 1 where there are given pairs and no prompts for more."""
    return min(config.iterations, 1) if config.data is None else config.iterations
