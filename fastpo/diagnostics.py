"""What the numbers of two successive models say: METHODS.md section 5 as one question, asked of each iteration."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
ENTROPY_FALL = 0.2  # of the top-k entropy, relative
MASS_FALL = 0.005  # of the top-k mass, absolute
LOSS_OF_QUALITY = 0.01  # of accuracy or ranking, absolute
FALL_OF_CHOSEN = 0.05  # of the chosen log-prob per token, in nats


def over_optimisation(before: Row, after: Row) -> str | None:
    """Why the step from one row of results to the next looks over-optimised; None where it does not.

    Two things have to come together. The distribution has narrowed or leaked: the entropy over the top 10 tokens has
    fallen by a fifth, or their mass by 0.005 (Shi et al. 2024 find both before quality falls). And it has cost
    something: held-out accuracy, or the ranking of held-out pairs, fell by a point; where neither is known, the chosen
    responses of the training pairs lost 0.05 nats a token. Narrowing alone is what learning looks like too.
    """
    shape = _first(
        _relative_fall("topk_entropy", "top-10 entropy", before, after),
        _fall("topk_mass", "top-10 mass", before, after, MASS_FALL, "{:.4f}"),
    )
    if shape is None:
        return None
    known = [key for key in ("accuracy", "heldout_ranking_accuracy") if key in before and key in after]
    cost = _first(*(_fall(key, key.replace("_", " "), before, after, LOSS_OF_QUALITY, "{:.1%}") for key in known))
    if not known:
        own = {"chosen": after.get("pairs_logps_per_token_chosen")}
        earlier = {"chosen": after.get("pairs_logps_per_token_chosen_before")}
        cost = _fall("chosen", "log-prob per token of chosen responses", earlier, own, FALL_OF_CHOSEN, "{:.3f}")
    return None if cost is None else f"{shape}; {cost}"


def marked(rows: Sequence[Row]) -> dict[int, str]:
    """Index of each over-optimised row of results -> why."""
    found = {k: over_optimisation(rows[k - 1], rows[k]) for k in range(1, len(rows))}
    return {k: reason for k, reason in found.items() if reason is not None}


def _relative_fall(key: str, name: str, before: Row, after: Row) -> str | None:
    start = before.get(key)
    return None if not start else _fall(key, name, before, after, ENTROPY_FALL * start, "{:.4f}")


def _fall(key: str, name: str, before: Row, after: Row, limit: float, form: str) -> str | None:
    start, end = before.get(key), after.get(key)
    if start is None or end is None or start - end < limit:
        return None
    return f"{name} {form.format(start)} -> {form.format(end)}"


def _first(*values: str | None) -> str | None:
    return next((value for value in values if value is not None), None)
