"""What a config says about itself and cannot be right: keys that would do nothing, or that do not go together."""

import pytest

from fastpo.checks import check
from fastpo.config import Config
from fastpo.errors import FastpoError

DATA = {"data": "embedded", "warm_start": "embedded"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_model": "x"}, "judge_model is 'x', which does nothing here; it is for score_by judge or duels"),
        ({"judge_template": "{response}"}, "judge_template is .* does nothing here"),
        ({"judge_pairs": 1, "score_by": "judge"}, "judge_pairs is 1, which does nothing here"),
        ({"threshold_scan": [0.5]}, "threshold_scan is .* it is for temperature_scan"),
        ({"gold_wins": True, "pair_rule": "max_min"}, "gold_wins is True, which does nothing here"),
        ({"length_rho": 0.1, "pair_rule": "scpo"}, "length_rho is 0.1, .* it is for pair rules that go by scores"),
        ({"length_penalty": 0.1, "pair_rule": "spin"}, "length_penalty is 0.1, which does nothing here"),
        ({"search": "cpl", "score_by": "judge"}, "score_by is 'judge', .* independent samples, not for a search"),
        ({"search": "cpl", "temperature_scan": [0.5]}, "temperature_scan is .* not for a search"),
        ({"search": "cpl", "pair_rule": "scpo"}, "pair_rule is 'scpo', .* a search pairs its own nodes"),
        ({"search": "cpl", "search_refine": "{answer}"}, "search_refine is .* nodes are answers: mc_nest"),
        ({"length_rho": 0.5, "pair_rule": "tiers"}, "length_rho is 0.5; it should be below 0.5 with pair_rule tiers"),
        ({"pairs_per_prompt": 1, "pair_rule": "list"}, "pairs_per_prompt is 1; it should be 2 or more"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(FastpoError, match=f"^{message}"):
        check(Config(**DATA, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"judge_model": "x", "score_by": "duels"},
        {"judge_template": "{first} {second}", "pair_rule": "judgements"},
        {"judge_pairs": 1, "score_by": "judge", "pair_rule": "tiers", "length_rho": 0.4},
        {"threshold_scan": [0.5], "temperature_scan": [1.0]},
        {"gold_wins": True, "pair_rule": "edits"},
        {"search": "mc_nest", "search_refine": "{answer}"},
        {"search_width": 3},
    ],
)
def test_what_does(settings):
    check(Config(**DATA, **settings))
