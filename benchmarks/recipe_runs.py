"""Every recipe on the embedded task, from a warm start that they share: does the method do what it is for?

    python benchmarks/recipe_runs.py [--recipes spin cream ...] [--seed 0] [--eval_prompts 500]

Runs are resumed, finished ones are read. benchmarks/results/recipes.csv is written anew after each run: a row per
model, with greedy accuracy, and how well the method's own scores order right above wrong samples. Some 40 seconds a
recipe on 4 quiet cores, and 3 minutes for the two warm starts (judging recipes have one that has seen judgements).
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from embedded_task import run
from transformers.utils.logging import disable_progress_bar

from fastpo.config import Config, read_recipe
from fastpo.errors import FastpoError
from fastpo.results import result_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recipes.csv"
VALUES = (
    "accuracy",
    "worked",
    "sample_accuracy",
    "score_auc",
    "judge_accuracy",
    "consistency",
    "pairs",
    "topk_entropy",
)
COLUMNS = ("recipe", "seed", "iteration", *VALUES, "seconds")


def embedded_recipes() -> list[str]:
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    return [name for name in names if read_recipe(name).get("data") == "embedded"]


def warm_start(recipe: str, seed: int, runs: Path) -> Path:
    """The model that a recipe starts from: one for all recipes of equal warm-start settings."""
    keys = {k: v for k, v in Config.load(recipe).to_dict().items() if k.startswith("warm_start")}
    name = f"start_{keys['warm_start_steps']}_{keys['warm_start_judgements']}_{seed}"
    model = runs / name / "warm_start" / "model"
    if not model.exists():
        settings = {**keys, "output_dir": str(runs / name), "iterations": 0, "seed": seed, "eval_prompts": 1}
        run(Config.load("demo", tensorboard=False, **settings), f"{name}: {keys['warm_start_steps']} steps")
    return model


def rows_of(recipe: str, seed: int, directory: Path) -> list[dict[str, Any]]:
    rows = enumerate(result_rows(directory))
    return [
        {"recipe": recipe, "seed": seed, "iteration": k, "seconds": row["seconds"], **{v: row.get(v) for v in VALUES}}
        for k, row in rows
    ]


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def show(recipe: str, rows: list[dict[str, Any]]) -> None:
    accuracy = " -> ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
    scores = [f"{row['score_auc']:.2f}" for row in rows if row["score_auc"] is not None]
    judged = [f"{100 * row['judge_accuracy']:.1f}%" for row in rows if row["judge_accuracy"] is not None]
    extra = (f"; score AUC {', '.join(scores)}" if scores else "") + (f"; judge {', '.join(judged)}" if judged else "")
    print(f"{recipe:22} accuracy {accuracy}{extra}; {sum(row['seconds'] or 0 for row in rows):.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=embedded_recipes())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval_prompts", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "recipes")
    arguments = parser.parse_args()
    disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for recipe in arguments.recipes:
        directory = arguments.runs / f"{recipe}_{arguments.seed}"
        settings = {"output_dir": str(directory), "seed": arguments.seed, "eval_prompts": arguments.eval_prompts}
        try:
            model = warm_start(recipe, arguments.seed, arguments.runs)
            start = {"model": str(model), "warm_start": None, "tensorboard": False}
            run(Config.load(recipe, **start, **settings), recipe)
        except FastpoError as error:  # the others still run
            print(f"{recipe}: {error}", flush=True)
            continue
        found = rows_of(recipe, arguments.seed, directory)
        show(recipe, found)
        rows += found
        write(rows)


if __name__ == "__main__":
    main()
