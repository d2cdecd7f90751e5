"""Single figures of programs that time nothing in turn: a row each in results/facts.csv."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from measure import RESULTS, machine

FACTS = RESULTS.parent / "facts.csv"


@dataclass(frozen=True)
class Fact:
    date: str
    commit: str
    device: str
    threads: int
    versions: str
    program: str  # of benchmarks/
    figure: str
    value: float
    unit: str


def record(program: str, found: dict[str, tuple[float, str]], path: Path = FACTS) -> None:
    """Appends figure -> (value, unit) of one run."""
    where, new = machine("cpu"), not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Fact)])
        if new:
            writer.writeheader()
        for figure, (value, unit) in found.items():
            writer.writerow(asdict(Fact(**where, program=program, figure=figure, value=value, unit=unit)))
