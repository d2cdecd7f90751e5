"""What can be said of a config and its input files before any work."""

from collections.abc import Iterator

from fastpo.config import Config
from fastpo.data import evaluation_prompts, load_demonstrations, load_preferences, training_prompts
from fastpo.errors import FastpoError
from fastpo.run import BUILT_MODELS
from fastpo.search.settings import method_of

_DEFAULTS = Config()


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
