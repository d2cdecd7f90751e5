"""The embedded task: iterations of MCTS-DPO against IRPO on the same number of sampled tokens, over seeds.

    python benchmarks/embedded_search.py [--seeds 0 1 2] [--jobs 3] [--runs runs/embedded_search] [--starts DIR]

All arms of a seed start from one warm start (``fastpo demo``'s; ``--starts`` takes those of ``embedded_task.py``:
``DIR/irpo_SEED/warm_start/model``). Arms: ``mcts_dpo``, the recipe; ``irpo``, as ``fastpo demo`` trains;
``irpo_same``, IRPO with the recipe's batch size, epochs and learning rate. IRPO gets so many prompts that it samples
as many tokens in all iterations as the search did, judged by its rate at the start: later answers are longer, so
rather more.

One thread and one process per seed, ``--jobs`` at once: some five minutes on three quiet cores, most of it the warm
starts. Runs are resumed, finished ones are read. Writes benchmarks/results/embedded_search.csv, a row per model, as
each run ends.
"""

import argparse
import csv
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from fastpo import embedded
from fastpo.artifacts import read_json, read_jsonl
from fastpo.config import Config
from fastpo.console import Display
from fastpo.loop import train
from fastpo.sampling import generate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "embedded_search.csv"
ITERATIONS, PILOT = 3, 40
SAME = ("batch_size", "num_epochs", "learning_rate")
COLUMNS = ("arm", "seed", "iteration", "tokens", "accuracy", "worked", "pairs", "steps", "sample_accuracy")


def run_seed(seed: int, runs: Path, starts: Path | None) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    disable_progress_bar()
    start = (starts or runs) / f"irpo_{seed}" / "warm_start" / "model"
    if not start.exists():
        run(Config.load("demo", seed=seed, iterations=0, output_dir=str(start.parents[1]), tensorboard=False))
    rows = list(run_arm("mcts_dpo", "mcts_dpo", seed, runs, start, {}))
    prompts = -int(-rows[-1]["tokens"] // (ITERATIONS * tokens_per_prompt(start, seed)))
    recipe = Config.load("mcts_dpo")
    for arm, changes in (("irpo", {}), ("irpo_same", {key: getattr(recipe, key) for key in SAME})):
        rows += run_arm(arm, "demo", seed, runs, start, {"prompts_per_iteration": prompts, **changes})
    return rows


def run_arm(
    arm: str, recipe: str, seed: int, runs: Path, start: Path, changes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    directory = runs / f"{arm}_{seed}_search"
    run(
        Config.load(
            recipe,
            **{"seed": seed, "iterations": ITERATIONS, "output_dir": str(directory), "tensorboard": False},
            **{"model": str(start), "warm_start": None, **changes},
        )
    )
    tokens = 0
    for k in range(ITERATIONS + 1):
        folder = directory / (f"iteration_{k}" if k else "warm_start")
        metrics = read_json(folder / "metrics.json") if k else {}
        tokens += metrics.get("search_tokens") or sampled_tokens(folder / "samples.jsonl")
        found = {**metrics, **read_json(folder / "evaluation.json")}
        steps = metrics.get("training", {}).get("steps")
        known = {key: found.get(key) for key in COLUMNS}
        yield {**known, "arm": arm, "seed": seed, "iteration": k, "tokens": tokens, "steps": steps}


def run(config: Config) -> None:
    with Display(enabled=False) as display:
        train(config, display)


def sampled_tokens(path: Path) -> int:
    return sum(len(r["ids"]) for row in read_jsonl(path) for r in row["responses"]) if path.exists() else 0


def tokens_per_prompt(start: Path, seed: int) -> float:
    """What IRPO's samples of a prompt hold at the start."""
    tokenizer, config = embedded.build_tokenizer(), Config.load("demo")
    prompts = [tokenizer(row["question"] + "\n")["input_ids"] for row in embedded.problems(seed, PILOT, "warm_start")]
    found = generate(
        AutoModelForCausalLM.from_pretrained(start),
        prompts,
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return sum(len(ids) for samples in found for ids in samples) / PILOT


def show(rows: list[dict[str, Any]]) -> None:
    for arm, seed in dict.fromkeys((row["arm"], row["seed"]) for row in rows):
        models = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        accuracy = " -> ".join(f"{100 * m['accuracy']:.1f}" for m in models)
        print(f"{arm:9} seed {seed}: accuracy {accuracy}; {models[-1]['tokens']:,} tokens sampled", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "embedded_search")
    parser.add_argument("--starts", type=Path, help="a directory of runs whose warm starts are taken")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        tasks = [pool.apply_async(run_seed, (seed, arguments.runs, arguments.starts)) for seed in arguments.seeds]
        for task in tasks:
            found = task.get()
            show(found)
            rows += found
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(
                    {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
                )


if __name__ == "__main__":
    main()
