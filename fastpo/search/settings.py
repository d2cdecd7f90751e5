"""A config's search keys as a ``Method``."""

from dataclasses import replace

from fastpo.config import Config
from fastpo.errors import FastpoError

from .methods import Method, method_by_name


def method_of(config: Config) -> Method:
    """The preset ``config.search`` with the keys that are given. Raises FastpoError for values out of range."""
    method = method_by_name(
        config.search,
        simulations=config.search_simulations,
        width=config.search_width,
        depth=config.search_depth,
        leaves=config.search_leaves,
        value=config.search_value,
        min_gap=config.search_min_gap,
    )
    changes = {"c": config.search_c, "virtual_loss": config.search_virtual_loss}
    try:
        return replace(method, select=replace(method.select, **{k: v for k, v in changes.items() if v is not None}))
    except ValueError as error:
        raise FastpoError(f"search_{error}") from error
