"""What can be said of a config and its input files before any work."""

from fastpo.config import Config
from fastpo.data import evaluation_prompts, load_demonstrations, load_preferences, training_prompts
from fastpo.errors import FastpoError
from fastpo.run import BUILT_MODELS
from fastpo.search.settings import method_of


def check(config: Config) -> None:
    """What a config says about itself and cannot be right, beyond single keys."""
    if config.data is None and config.preferences is None:
        raise FastpoError("nothing to train on: give data (prompts), preferences (pairs), or both")
    if config.model in BUILT_MODELS and config.warm_start is None:
        raise FastpoError(
            f"model {config.model} starts untrained and would sample noise; give warm_start (demonstrations), or a "
            "trained model's path"
        )
    if config.search != "none":
        method_of(config)


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
