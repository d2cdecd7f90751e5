"""What a run's artefacts say, read back: for the live table, the report and benchmarks."""

import json
from pathlib import Path
from typing import Any

from fastpo.artifacts import read_json

Row = dict[str, Any]


def result_row(directory: Path, iteration: int) -> Row:
    """What is known of M_k: its evaluation, its pairs, the last tenth of its training (``train_*``), its seconds."""
    folder = directory / stage_folder(iteration)
    row: Row = {"name": f"iteration {iteration}" if iteration else "start"}
    if (folder / "evaluation.json").is_file():
        row |= {k: v for k, v in read_json(folder / "evaluation.json").items() if k != "examples"}
    if (folder / "metrics.json").is_file():
        metrics = read_json(folder / "metrics.json")
        training = metrics.pop("training")
        row |= {**metrics, **{f"train_{name}": value for name, value in training.items()}}
    seconds = stage_seconds(directory).get(folder.name, {})
    return {**row, "seconds": sum(seconds.values()) if seconds else None}


def result_rows(directory: Path) -> list[Row]:
    """Rows of M_0 and of every iteration that has trained."""
    last = 0
    while (directory / stage_folder(last + 1) / "metrics.json").is_file():
        last += 1
    return [result_row(directory, k) for k in range(last + 1)]


def stage_folder(iteration: int) -> str:
    return f"iteration_{iteration}" if iteration else "warm_start"


def stage_seconds(directory: Path) -> dict[str, dict[str, float]]:
    """Folder -> stage -> seconds, from timings.jsonl. That is a log: a line cut off by a kill is passed over."""
    path = directory / "timings.jsonl"
    seconds: dict[str, dict[str, float]] = {}
    if not path.is_file():
        return seconds
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        folder, _, stage = entry["stage"].partition("/")
        times = seconds.setdefault(folder, {})
        times[stage] = times.get(stage, 0.0) + entry["seconds"]
    return seconds
