"""The table of methods against what it speaks of: presets, functions, recipes, and the file made from it."""

import importlib
from pathlib import Path

import pytest

from fastpo import methods, objectives
from fastpo.methods import CHECKS, METHODS, OTHER, RECIPES, SOURCES

ROOT = Path(__file__).resolve().parent.parent


def test_the_file_is_current(capsys):
    assert methods.main(["--check"]) == 0, capsys.readouterr().out


def test_every_preset_is_of_a_method():
    assert {name for m in METHODS for name in m.presets} == set(objectives.PRESETS)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_rows_speak_of_what_is_there(method):
    assert method.presets and method.source in SOURCES and method.checked and set(method.checked) <= set(CHECKS)
    assert all(callable(getattr(objectives, name)) for name in (*method.presets, *method.columns))


def test_rules_are_importable():
    for rule in OTHER:
        assert rule.source in SOURCES
        for name in rule.where:
            module, _, function = name.rpartition(".")
            assert callable(getattr(importlib.import_module(module), function)), name


def test_recipes_are_files_of_known_methods():
    assert set(RECIPES) <= {row.name for row in (*METHODS, *OTHER)}
    for recipe in {name for names in RECIPES.values() for name in names}:
        assert (ROOT / "recipes" / f"{recipe}.yaml").is_file(), recipe


def test_names_are_unique():
    names = [row.name for row in (*METHODS, *OTHER)]
    assert len(set(names)) == len(names)


def test_readme_counts_presets_and_recipes():
    text = (ROOT / "README.md").read_text()
    assert f" {len(objectives.PRESETS)} presets " in text
    assert f"The {len(list((ROOT / 'recipes').glob('*.yaml')))} recipes are" in text
