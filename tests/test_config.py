"""One config: defaults, recipe, command line; wrong keys and values are refused with the nearest right one."""

import pytest
import yaml

from fastpo import config_ranges
from fastpo.config import FREE_KEYS, GROUPS, Config, changed_keys, key_types, read_recipe, recipe_path
from fastpo.errors import FastpoError
from fastpo.stages import build_objective


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_key_has_help_and_one_group():
    names = [name for group in GROUPS for name in group.__dataclass_fields__]
    assert len(names) == len(set(names)) == len(key_types())
    for group in GROUPS:
        assert all(field.metadata["help"] for field in group.__dataclass_fields__.values())


@pytest.mark.parametrize("name", ["demo", "irpo", "scpo", "gsm8k"])
def test_shipped_recipes_load_and_name_an_objective(name):
    config = Config.load(name)
    assert build_objective(config).name == config.objective
    assert recipe_path(f"recipes/{name}.yaml").resolve() == recipe_path(name).resolve()


def test_yaml_numbers(tmp_path):
    """YAML reads 2e-4 as text, 1 as an integer and a bare no as false."""
    path = recipe(
        tmp_path, "learning_rate: 2e-4\nbeta: 1\ntemperature: 0.8\nmixed_precision: no\ncontext_length: null\n"
    )
    values = read_recipe(path)
    assert values == {
        "learning_rate": 2e-4,
        "beta": 1.0,
        "temperature": [0.8],
        "mixed_precision": "no",
        "context_length": None,
    }
    assert isinstance(values["beta"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bta: 0.1", "unknown key 'bta'; did you mean beta?"),
        ("num-smples: 3", "unknown key 'num-smples'; did you mean num_samples?"),
        ("zzz: 1", "unknown key 'zzz'$"),
        ("num_samples: many", "num_samples is 'many'; it should be an integer"),
        ("num_samples: true", "num_samples is True; it should be an integer"),
        ("skip_bad: 1", "skip_bad is 1; it should be true or false"),
        ("pair_rule: irop", "pair_rule is 'irop'; it should be one of irpo, scpo"),
        ("learning_rate: fast", "learning_rate is 'fast'; it should be a number"),
        ("- a", "a list, it should be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_recipes(tmp_path, text, message):
    with pytest.raises(FastpoError, match=message):
        read_recipe(recipe(tmp_path, text))


def test_unknown_recipe_suggests():
    with pytest.raises(FastpoError, match="recipe ipro not found; did you mean irpo"):
        recipe_path("ipro")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_samples", 0),
        ("temperature", [-1.0]),
        ("temperature", []),
        ("top_p", 0.0),
        ("beta", 0.0),
        ("vote_threshold", [1.5]),
        ("prompt_template", "no place"),
        ("max_steps", 0),
        ("hidden_size", 130),
        ("prompts_per_iteration", 0),
        ("warm_start_batch_size", 0),
        ("warm_start_learning_rate", -1.0),
        ("learning_rate", float("inf")),
        ("win_threshold", float("nan")),
        ("temperature_scan", [0.5, float("nan")]),
        ("warmup_steps", -1),
        ("max_grad_norm", -1.0),
        ("eval_pairs", -1),
        ("judge_max_new_tokens", 0),
        ("num_heads", 0),
        ("context_length", 1),
        ("search_depth", 0),
        ("search_labels", [""]),
        ("search_refine", "no place"),
        ("objective_settings", ["gamma=x"]),
        ("objective_settings", ["gamma"]),
        ("reference_mix", 1.5),
    ],
)
def test_values_out_of_range_name_the_key(key, value):
    with pytest.raises(FastpoError, match=rf"^{key} is .*it should"):
        Config(**{key: value})


def test_every_number_has_a_range_and_every_range_a_key():
    """Counts and sizes have a least value; a key that a range names is a key."""
    ranged = {name for names in config_ranges._AT_LEAST.values() for name in names}
    ranged |= {*config_ranges._ABOVE_0, *config_ranges._SHARES, *config_ranges._OTHERS}
    assert ranged <= key_types().keys()
    counts = {name for name, kind in key_types().items() if kind in (int, int | None)}
    assert counts - ranged == {"seed"}


def test_lists_are_per_iteration():
    config = Config(temperature=[0.8, 1.3])
    assert [config.at("temperature", k) for k in (1, 2, 3)] == [0.8, 1.3, 1.3]


def test_yaml_round_trip():
    config = Config(beta=0.3, temperature=[0.7], data="embedded")
    assert Config(**yaml.safe_load(config.to_yaml())) == config


def test_changed_keys_names_what_matters():
    old = Config().to_dict()
    assert changed_keys(old, Config(iterations=9, output_dir="elsewhere").to_dict()) == []
    assert changed_keys(old, Config(beta=0.2, seed=1).to_dict()) == ["beta: None -> 0.2", "seed: 0 -> 1"]
    assert key_types().keys() >= FREE_KEYS


@pytest.mark.parametrize(
    ("name", "message"),
    [("irop", "irpo"), ("mcts_dpo", "needs pairs.soft_labels"), ("selm", "compares 3 responses")],
)
def test_objectives_the_loop_cannot_serve(name, message):
    with pytest.raises(FastpoError, match=message):
        build_objective(Config(objective=name))


def test_a_mixed_reference_needs_a_reference():
    with pytest.raises(FastpoError, match=r"reference_mix is 0\.5; it should be 0 with objective simpo"):
        build_objective(Config(objective="simpo", reference_mix=0.5))
