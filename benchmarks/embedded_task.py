"""The embedded task over seeds: IRPO, the same without the NLL term, ScPO, and the same compute spent on supervision.

    python benchmarks/embedded_task.py [--seeds 0 1 2] [--runs runs/embedded_task] [--arms irpo dpo ...]

All arms of a seed start from one warm start. irpo is ``fastpo demo``; dpo has no NLL term; irpo_hot and dpo_hot are the
two at four times the learning rate, where the NLL term matters; scpo takes its pairs from votes, without answers.
more_sft makes the warm start longer by as many steps as the iterations of irpo cost, counted in tokens through the
model (a training token counts as three sampled or scored ones). Runs are resumed, finished ones are read. Writes
benchmarks/results/embedded_task.csv, one row per model, and prints a table.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from fastpo.artifacts import read_json, read_jsonl
from fastpo.config import Config
from fastpo.console import Display
from fastpo.loop import train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "embedded_task.csv"
ARMS: dict[str, dict[str, Any]] = {
    "irpo": {},
    "dpo": {"objective": "dpo", "alpha": None},
    "irpo_hot": {"learning_rate": 2e-4},
    "dpo_hot": {"objective": "dpo", "alpha": None, "learning_rate": 2e-4},
    "scpo": {
        "objective": "scpo",
        "pair_rule": "scpo",
        "beta": None,
        "vote_threshold": [0.5],
        "learning_rate": 2e-4,
    },
}
FROM_EVALUATION = ("accuracy", "worked", "pairs_logps_per_token_chosen_before", "pairs_logps_per_token_chosen")
FROM_METRICS = ("sample_accuracy", "pairs")
COLUMNS = ("arm", "seed", "iteration", *FROM_EVALUATION, *FROM_METRICS, "seconds")


def run_arm(arm: str, seed: int, runs: Path) -> Path:
    directory = runs / f"{arm}_{seed}"
    start = {} if arm == "irpo" else {"model": str(runs / f"irpo_{seed}" / "warm_start" / "model"), "warm_start": None}
    config = Config.load("demo", output_dir=str(directory), seed=seed, tensorboard=False, **start, **ARMS[arm])
    run(config, f"{arm}, seed {seed}")
    return directory


def run_more_sft(seed: int, runs: Path) -> Path:
    base = Config.load("demo", seed=seed)
    steps = base.warm_start_steps + extra_steps(runs / f"irpo_{seed}", base)
    directory = runs / f"more_sft_{seed}"
    changes = {"output_dir": str(directory), "iterations": 0, "warm_start_steps": steps, "tensorboard": False}
    run(Config.load("demo", seed=seed, **changes), f"more_sft, seed {seed}: {steps} steps")
    return directory


def run(config: Config, title: str) -> None:
    with Display() as display:
        display.line(title)
        train(config, display)


def extra_steps(directory: Path, config: Config) -> int:
    """Supervised steps that cost what the iterations of a run did, rounded up."""
    tokens = sum(iteration_tokens(folder) for folder in sorted(directory.glob("iteration_*")))
    warm = read_jsonl(directory / "warm_start" / "training.jsonl")
    prompts = [len(row["prompt_ids"]) for row in read_jsonl(directory / "iteration_1" / "samples.jsonl")]
    per_step = sum(r["tokens"] for r in warm) / len(warm)
    per_step += config.warm_start_batch_size * sum(prompts) / len(prompts)
    return -int(-tokens // (3 * per_step))


def iteration_tokens(folder: Path) -> float:
    """Tokens through the model in one iteration, training tokens counted three times."""
    samples = {row["id"]: row for row in read_jsonl(folder / "samples.jsonl")}
    responses = {
        f"{row['id']}/{i}": len(row["prompt_ids"]) + len(response["ids"])
        for row in samples.values()
        for i, response in enumerate(row["responses"])
    }
    sampled = sum(len(row["prompt_ids"]) for row in samples.values())
    sampled += sum(len(r["ids"]) for row in samples.values() for r in row["responses"])
    pairs = read_jsonl(folder / "pairs.jsonl")
    keys = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    return sampled + sum(responses[key] for key in set(keys)) + 3 * sum(responses[key] for key in keys)


def rows_of(arm: str, seed: int, directory: Path) -> Iterator[dict[str, Any]]:
    """A row per model of a run."""
    seconds = stage_seconds(directory)
    for name in ("warm_start", *(f"iteration_{k}" for k in range(1, 100))):
        path = directory / name / "evaluation.json"
        if not path.is_file():
            return
        metrics = directory / name / "metrics.json"
        found = read_json(path) | (read_json(metrics) if metrics.is_file() else {})
        values = {key: found.get(key) for key in (*FROM_EVALUATION, *FROM_METRICS)}
        iteration = 0 if name == "warm_start" else int(name.rpartition("_")[2])
        yield {"arm": arm, "seed": seed, "iteration": iteration, **values, "seconds": seconds.get(name)}


def stage_seconds(directory: Path) -> dict[str, float]:
    """Seconds by folder; a stage that a resumed run went through again counts as often."""
    seconds: dict[str, float] = {}
    for line in (directory / "timings.jsonl").read_text(encoding="utf-8").splitlines():
        timing = json.loads(line)
        folder = timing["stage"].split("/")[0]
        seconds[folder] = round(seconds.get(folder, 0.0) + timing["seconds"], 1)
    return seconds


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Accuracy of the start and of each iteration, per run; then each arm's mean at its end."""
    by_run: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        by_run.setdefault((row["arm"], row["seed"]), []).append(row)
    for (arm, seed), models in by_run.items():
        accuracy = " -> ".join(f"{100 * m['accuracy']:.1f}" for m in models)
        last = models[-1]
        worked = f"{100 * models[0]['worked']:.0f} -> {100 * last['worked']:.0f}%"
        logps = ", ".join(" -> ".join(f"{m[key]:.3f}" for key in FROM_EVALUATION[2:]) for m in models[1:])
        print(f"{arm:9} seed {seed}: accuracy {accuracy}; worked {worked}; chosen log-prob per token {logps or '-'}")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        ends = [models[-1]["accuracy"] for (name, _), models in by_run.items() if name == arm]
        print(f"{arm:9} mean of {len(ends)}: {100 * sum(ends) / len(ends):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "more_sft"], default=[*ARMS, "more_sft"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "embedded_task")
    arguments = parser.parse_args()
    disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for arm in dict.fromkeys(("irpo", *arguments.arms)):  # the others start from irpo's warm start
            directory = run_more_sft(seed, arguments.runs) if arm == "more_sft" else run_arm(arm, seed, arguments.runs)
            rows += rows_of(arm, seed, directory)
            write(rows)
    show(rows)


if __name__ == "__main__":
    main()
