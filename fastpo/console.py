"""What a run shows while it works: progress bars over a live table on a terminal, plain lines elsewhere.

Only the main process shows anything. Nothing here is an artefact: what is printed may differ between two equal runs.
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

log = logging.getLogger("fastpo")
PLAIN_INTERVAL = 15.0  # seconds between the lines that stand for a bar where there is no terminal


@dataclass(frozen=True)
class Column:
    title: str
    key: str
    format: str = "{}"


COLUMNS = (
    Column("model", "name"),
    Column("accuracy", "accuracy", "{:.1%}"),
    Column("worked", "worked", "{:.1%}"),
    Column("ranking", "heldout_ranking_accuracy_per_token", "{:.1%}"),
    Column("samples right", "sample_accuracy", "{:.1%}"),
    Column("score AUC", "score_auc", "{:.2f}"),
    Column("judge right", "judge_accuracy", "{:.1%}"),
    Column("pairs", "pairs", "{:,}"),
    Column("margin", "train_margin", "{:.2f}"),
    Column("chosen", "pairs_logps_chosen", "{:.1f}"),
    Column("rejected", "pairs_logps_rejected", "{:.1f}"),
    Column("top-10 mass", "topk_mass", "{:.4f}"),
    Column("seconds", "seconds", "{:.0f}"),
)


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per model; columns that no row fills are left out. chosen, rejected: log-probs of training pairs."""
    table = Table()
    columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]
    for column in columns:
        table.add_column(column.title, justify="left" if column.key == "name" else "right")
    for row in rows:
        cells = (row.get(c.key) for c in columns)
        table.add_row(*("" if v is None else c.format.format(v) for c, v in zip(columns, cells, strict=True)))
    return table


def make_console() -> Console:
    """Standard output; where that is no terminal, wide enough for the table."""
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=132)


@dataclass
class Display:
    """``with Display(main) as display``: bars by ``display.progress``, the table by ``display.results``."""

    enabled: bool = True
    console: Console = field(default_factory=make_console)
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    _live: Live | None = None
    _progress: Progress | None = None

    def __enter__(self) -> "Display":
        if self.enabled and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._live = Live(self._progress, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = self._progress = None

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The table as it stands: redrawn under the bars on a terminal; elsewhere only its last row as a line."""
        self.rows = list(rows)
        if self._live is not None and self._progress is not None:
            self._live.update(Group(results_table(self.rows), self._progress))
        elif rows:
            cells = ((c, rows[-1].get(c.key)) for c in COLUMNS)
            self.line("  ".join(f"{c.title} {c.format.format(v)}" for c, v in cells if v is not None)[len("model ") :])

    def final_table(self) -> None:
        """The whole table once more, for those who saw lines only."""
        if self.enabled and self.rows and not self.console.is_terminal:
            self.console.print(results_table(self.rows))

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator["Bar"]:
        bar = Bar(self, description, total)
        try:
            yield bar
        finally:
            bar.close()


class Bar:
    """One bar. ``advance(n, note)``; without a terminal a line now and then."""

    def __init__(self, display: Display, description: str, total: int):
        self.display, self.description, self.total = display, description, total
        self.done = 0
        self._last_line = time.monotonic()
        self._task = None
        if display._progress is not None:
            self._task = display._progress.add_task(description, total=total, note="")

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self._task is not None and self.display._progress is not None:
            self.display._progress.update(self._task, advance=n, note=note)
        elif time.monotonic() - self._last_line > PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            self.display.line(f"  {self.description}: {self.done:,} of {self.total:,} {note}".rstrip())

    def close(self) -> None:
        if self._task is not None and self.display._progress is not None:
            self.display._progress.remove_task(self._task)
