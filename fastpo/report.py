"""report.html: what a run did, on one self-contained page. Made from its artefacts, finished or not."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastpo.artifacts import read_json, read_jsonl, write_text
from fastpo.charts import CHARTS, draw
from fastpo.console import COLUMNS
from fastpo.diagnostics import marked
from fastpo.errors import FastpoError
from fastpo.results import result_rows, stage_seconds

Row = Mapping[str, Any]
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 1120px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p.lead { color: #4a5568; margin: .3rem 0 1rem } p.question { margin: 1.2rem 0 .5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { font-weight: 600; color: #4a5568 }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e2e8f0 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem }
.charts svg { width: 100%; height: auto }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: .8rem }
.answer { border: 1px solid #e2e8f0; border-radius: 6px; padding: .5rem .7rem } .answer b { font-size: .85rem }
pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem }
ul.marked li { color: #c05621 }
.right { border-left: 4px solid #2f855a } .wrong { border-left: 4px solid #c05621 }
details summary { cursor: pointer; color: #4a5568 }
"""


def write_report(directory: str | Path) -> Path:
    """Writes ``directory/report.html`` and returns its path. Raises FastpoError for a directory without a run."""
    directory = Path(directory)
    if not (directory / "config.yaml").is_file():
        raise FastpoError(f"{directory} holds no run (no config.yaml)")
    rows = result_rows(directory)
    histories = [_history(directory / f"iteration_{k}") for k in range(1, len(rows))]
    sections = [
        f"<h1>fastpo run: {escape(directory.name)}</h1>",
        f'<p class="lead">{escape(_lead(rows))}</p>',
        _results(rows),
        _diagnosis(rows),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(svg for chart in CHARTS if (svg := draw(chart, rows, histories)))}</div>',
        _answers(directory, rows),
        _times(directory),
        _config(directory),
    ]
    path = directory / "report.html"
    write_text(path, _page(directory.name, "\n".join(filter(None, sections))))
    return path


def _page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _history(folder: Path) -> list[Row]:
    path = folder / "training.jsonl"
    return list(read_jsonl(path)) if path.is_file() else []


def _lead(rows: Sequence[Row]) -> str:
    """The run in a sentence."""
    for key, what in (("accuracy", "accuracy on held-out problems"), ("heldout_ranking_accuracy", "held-out ranking")):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            path = " → ".join(f"{value:.1%}" for value in values)
            seconds = sum(row["seconds"] or 0 for row in rows)
            return f"{what}: {path}, start to iteration {len(rows) - 1}, in {seconds / 60:.1f} minutes"
    return f"{len(rows) - 1} iterations"


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _results(rows: Sequence[Row]) -> str:
    columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]
    lines = [["" if row.get(c.key) is None else c.format.format(row[c.key]) for c in columns] for row in rows]
    return f"<h2>Results</h2>{_table([c.title for c in columns], lines)}"


def _diagnosis(rows: Sequence[Row]) -> str:
    """Iterations that look over-optimised, and why; the curves shade them."""
    lines = "".join(f"<li>{escape(rows[k]['name'])}: {escape(why)}</li>" for k, why in marked(rows).items())
    return f"<h2>Over-optimised</h2><ul class='marked'>{lines}</ul>" if lines else ""


def _answers(directory: Path, rows: Sequence[Row]) -> str:
    """The same held-out problems answered by each model, side by side."""
    answers: dict[str, list[str]] = {}
    for k, row in enumerate(rows):
        path = directory / (f"iteration_{k}" if k else "warm_start") / "evaluation.json"
        examples = read_json(path).get("examples", []) if path.is_file() else []
        for example in examples:
            answers.setdefault(str(example["prompt"]), []).append(_answer(row["name"], example))
    blocks = [
        f'<p class="question">{escape(prompt)}</p><div class="answers">{"".join(cards)}</div>'
        for prompt, cards in answers.items()
    ]
    return f"<h2>Answers to held-out problems</h2>{''.join(blocks)}" if blocks else ""


def _answer(name: str, example: Row) -> str:
    kind = "" if example["reward"] is None else "right" if example["reward"] > 0 else "wrong"
    head = f"{name}: {kind}" if kind else name
    return f'<div class="answer {kind}"><b>{escape(head)}</b><pre>{escape(example["response"])}</pre></div>'


def _times(directory: Path) -> str:
    """Seconds of each stage of each model."""
    seconds = stage_seconds(directory)
    if not seconds:
        return ""
    stages = list(dict.fromkeys(stage for times in seconds.values() for stage in times))
    lines = [
        [
            name.replace("_", " "),
            *(f"{times[s]:.1f}" if s in times else "" for s in stages),
            f"{sum(times.values()):.1f}",
        ]
        for name, times in seconds.items()
    ]
    return f"<h2>Seconds per stage</h2>{_table(['', *stages, 'all'], lines)}"


def _config(directory: Path) -> str:
    text = (directory / "config.yaml").read_text(encoding="utf-8")
    return f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
