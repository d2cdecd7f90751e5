"""Draws results.csv and writes what README.md and docs/results.md say of it: ``python benchmarks/plot.py --readme``.

In README.md everything between ``<!-- rows: NAME -->`` and ``<!-- /rows -->`` is written by this script: ``figure``,
``table`` (the suite "quick"), ``workloads`` (the end-to-end programs), ``status`` (which op was measured where), and
the sentences of prose.py.
docs/results.md holds every case, docs/claims.md every figure that was asked for. Without --readme it only says whether
they are current (exit code 1 if not).
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import claims  # noqa: E402
import prose  # noqa: E402
from measure import RESULTS, read  # noqa: E402
from tables import Result, comparison, headlines, latest, status, where  # noqa: E402
from workloads import tables  # noqa: E402

README, DOCS = ROOT / "README.md", ROOT / "docs"
_BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- /rows -->)", re.DOTALL)
STYLES = {  # beginning of the implementation's name -> (marker, colour, label)
    "fastpo": ("o", "#d1495b", "fastpo"),
    "torch eager": ("s", "#9a9a9a", "torch eager"),
    "torch.compile": ("D", "#5f5f5f", "torch.compile"),
    "trl": ("^", "#2e6f95", "TRL"),
    "liger": ("v", "#edae49", "Liger"),
    "cut-cross-entropy": ("P", "#66a182", "cut-cross-entropy"),
    "torch linear_cross_entropy": ("X", "#8d6a9f", "torch linear_cross_entropy"),
    "flex": ("<", "#00798c", "FlexAttention"),
    "quack": (">", "#30638e", "quack"),
    "": ("*", "#b0a990", "other"),
}


def draw(results: list[Result], path: Path) -> None:
    """Three panels with a line per case, ops apart: time relative to fastpo, peak memory, share of the floor."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"font.size": 8, "svg.hashsalt": "fastpo", "svg.fonttype": "none"})
    lines, op = [], ""
    for result in results:
        if result.fastpo["op"] != op:
            op = result.fastpo["op"]
            lines.append(op)
        lines.append(result)
    size = (10, 1.0 + 0.22 * len(lines))
    figure, panels = plt.subplots(1, 3, figsize=size, sharey=True, gridspec_kw={"width_ratios": (5, 3, 3)})
    shown: dict[str, object] = {}
    for y, result in enumerate(lines):
        if isinstance(result, Result):
            _dots(panels, y, result, shown)
    _axes(panels, lines)
    order = [label for _, _, label in STYLES.values() if label in shown]
    figure.legend([shown[label] for label in order], order, loc="upper center", ncols=len(order), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / size[1]))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": digest(results)})
    plt.close(figure)


def _dots(panels, y: int, result: Result, shown: dict[str, object]) -> None:
    """One line of the figure; fastpo is drawn last, on top."""
    for row in (*reversed(result.peers), result.fastpo):
        marker, colour, name = style(row["implementation"])
        dots = {"marker": marker, "color": colour, "s": 26, "zorder": 3, "linewidths": 0}
        shown[name] = panels[0].scatter(float(row["p50_ms"]) / float(result.fastpo["p50_ms"]), y, **dots)
        if row["peak_mib"]:
            panels[1].scatter(max(1.0, float(row["peak_mib"])), y, **dots)
        if row["floor_share"]:
            panels[2].scatter(100 * float(row["floor_share"]), y, **dots)


def _axes(panels, lines: list[Result | str]) -> None:
    from matplotlib.ticker import LogLocator

    for panel, title in zip(
        panels, ("time, fastpo = 1", "peak memory of a call, MiB", "share of the floor, %"), strict=True
    ):
        panel.set_title(title, fontsize=8)
        panel.grid(axis="x", color="#e6e6e6", zorder=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(length=0)
    for panel, unit in zip(panels[:2], ("x", ""), strict=True):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(numticks=9))
        panel.xaxis.set_major_formatter(lambda value, _, unit=unit: f"{value:g}{unit}")
    panels[0].axvline(1, color=STYLES["fastpo"][1], linewidth=0.8)
    panels[2].set_xlim(left=0)
    labels = panels[0].set_yticks(range(len(lines)), [x.label if isinstance(x, Result) else x for x in lines])
    for tick, line in zip(labels, lines, strict=True):
        tick.label1.set_fontweight("normal" if isinstance(line, Result) else "bold")
    panels[0].invert_yaxis()


def style(implementation: str) -> tuple[str, str, str]:
    return next(found for prefix, found in STYLES.items() if implementation.startswith(prefix))


def digest(results: list[Result]) -> str:
    """Says which rows a figure was drawn from."""
    return "rows " + hashlib.sha256(json.dumps([result.rows for result in results]).encode()).hexdigest()[:16]


def blocks(rows: list[dict[str, str]]) -> dict[str, str]:
    """Name of a block of README.md -> its text."""
    cpu, gpu = latest(rows, gpu=False), latest(rows, gpu=True)
    found = {"figure": "", "table": "", "status": status(cpu, gpu) + "\n", "workloads": tables() or "No rows yet.\n"}
    found |= {name: sentence(claims.Rows.of()) for name, sentence in prose.BLOCKS.items()}
    for results, name, device in ((cpu, "cpu", "CPU"), (gpu, "gpu", "GPU")):
        if shown := headlines(results, gpu=name == "gpu"):
            found["figure"] += f"![time, memory and share of the floor against peers on a {device}](docs/{name}.svg)\n"
            found["table"] += f"Milliseconds (median) on {where(shown)}.\n\n{comparison(shown)}\n\n"
    if not gpu:
        found["table"] += "Nothing here has run on a GPU yet.\n"
    return found


def rewritten(text: str, rows: list[dict[str, str]]) -> str:
    """README.md with its blocks as the rows have them."""
    found = blocks(rows)
    unknown = sorted({name for _, name, _ in _BLOCK.findall(text)} - set(found))
    if unknown:
        sys.exit(f"README.md has blocks {', '.join(unknown)}; there are {', '.join(found)}")
    return _BLOCK.sub(lambda match: match[1] + found[match[2]] + match[3], text)


def pages(rows: list[dict[str, str]]) -> dict[str, str]:
    """File in docs/ -> its text."""
    return {"results.md": every_case(rows), "claims.md": claims.page(claims.Rows.of())}


def every_case(rows: list[dict[str, str]]) -> str:
    """docs/results.md: op by op."""
    parts = [
        "# What was measured\n\nWritten by `python benchmarks/plot.py --readme` from `benchmarks/results/results.csv`."
    ]
    kinds = (sorted(latest(rows, gpu), key=lambda result: result.fastpo["op"]) for gpu in (False, True))
    parts += [f"## {where(results)}\n\n{comparison(results)}" for results in kinds if results]
    return "\n\n".join(parts) + "\n"


def figures(rows: list[dict[str, str]]) -> dict[Path, list[Result]]:
    """Figure -> the results it shows."""
    kinds = {
        DOCS / "cpu.svg": headlines(latest(rows, False), False),
        DOCS / "gpu.svg": headlines(latest(rows, True), True),
    }
    return {path: results for path, results in kinds.items() if results}


def stale(rows: list[dict[str, str]]) -> list[str]:
    """What does not say what the rows say."""
    found = []
    if README.read_text(encoding="utf-8") != rewritten(README.read_text(encoding="utf-8"), rows):
        found.append("README.md")
    for name, text in pages(rows).items():
        page = DOCS / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            found.append(f"docs/{name}")
    for path, results in figures(rows).items():
        if not path.exists() or digest(results) not in path.read_text(encoding="utf-8"):
            found.append(f"docs/{path.name}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write README.md, docs/results.md and the figures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another CSV of the same columns")
    arguments = parser.parse_args()
    rows = read(arguments.results)
    found = stale(rows)
    if not arguments.readme:
        print(f"not current: {', '.join(found)}; --readme writes them" if found else "all current")
        return 1 if found else 0
    README.write_text(rewritten(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    for path, results in figures(rows).items():
        draw(results, path)
    for name, text in pages(rows).items():
        (DOCS / name).write_text(text, encoding="utf-8")
    print(f"written: {', '.join(found)}" if found else "all were current")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
