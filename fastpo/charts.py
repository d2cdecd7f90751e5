"""The report's charts: matplotlib figures as inline SVG, the same bytes for the same data."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastpo.diagnostics import marked

Row = Mapping[str, Any]
BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#c05621", "#2f855a", "#718096"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fastpo",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.edgecolor": "#a0aec0",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    label: str
    key: str
    color: str
    style: str = "-"


@dataclass(frozen=True)
class Chart:
    """Lines over iterations (``steps`` False) or over the optimizer steps of all iterations (True)."""

    title: str
    series: tuple[Series, ...]
    steps: bool = False
    percent: bool = False
    zero: bool = False  # a line at 0


CHARTS = (
    Chart(
        "accuracy",
        (
            Series("held-out problems, greedy", "accuracy", BLUE),
            Series("samples the iteration trained on", "sample_accuracy", GREY, "--"),
            Series("their majority vote", "majority_accuracy", GREY, ":"),
            Series("worked step by step", "worked", GREEN, "--"),
        ),
        percent=True,
    ),
    Chart(
        "held-out pairs ranked right",
        (
            Series("by summed log-prob", "heldout_ranking_accuracy", BLUE),
            Series("per token", "heldout_ranking_accuracy_per_token", ORANGE),
        ),
        percent=True,
    ),
    Chart(
        "log-prob per token of the training pairs, after training (dashed: before)",
        (
            Series("chosen", "pairs_logps_per_token_chosen", BLUE),
            Series("", "pairs_logps_per_token_chosen_before", BLUE, "--"),
            Series("rejected", "pairs_logps_per_token_rejected", ORANGE),
            Series("", "pairs_logps_per_token_rejected_before", ORANGE, "--"),
        ),
    ),
    Chart("pairs", (Series("pairs", "pairs", BLUE), Series("prompts with pairs", "paired_prompts", GREY, "--"))),
    Chart("top-10 mass of greedy answers", (Series("mean over tokens", "topk_mass", BLUE),)),
    Chart(
        "entropy of greedy answers",
        (Series("top 10 tokens", "topk_entropy", BLUE), Series("all", "entropy", GREY, "--")),
    ),
    Chart(
        "judge of the samples",
        (
            Series("right above wrong (AUC)", "score_auc", BLUE),
            Series("right verdicts", "judge_accuracy", ORANGE),
            Series("consistency (Kendall)", "consistency", GREEN),
        ),
        percent=True,
    ),
    Chart("reward margin in training", (Series("chosen - rejected", "margin", BLUE),), steps=True, zero=True),
    Chart(
        "implicit rewards in training",
        (Series("chosen", "rewards_chosen", BLUE), Series("rejected", "rewards_rejected", ORANGE)),
        steps=True,
        zero=True,
    ),
    Chart(
        "log-prob per token in training",
        (Series("chosen", "logps_per_token_chosen", BLUE), Series("rejected", "logps_per_token_rejected", ORANGE)),
        steps=True,
    ),
    Chart(
        "training pairs ranked right",
        (
            Series("by reward", "accuracy", GREEN),
            Series("by summed log-prob", "ranking_accuracy", BLUE),
            Series("by log-prob per token", "ranking_accuracy_per_token", ORANGE),
        ),
        steps=True,
        percent=True,
    ),
    Chart("loss", (Series("objective", "loss", BLUE), Series("NLL of chosen", "nll", GREY, "--")), steps=True),
    Chart("top-10 mass in training", (Series("mean over tokens", "topk_mass", BLUE),), steps=True),
    Chart("top-10 entropy in training", (Series("mean over tokens", "topk_entropy", BLUE),), steps=True),
)


def draw(chart: Chart, rows: Sequence[Row], histories: Sequence[Sequence[Row]]) -> str | None:
    """The chart as ``<svg>``; None if there is nothing to draw. ``rows``: M_0 first; ``histories``: per iteration."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        drawn = _over_steps(axes, chart, histories) if chart.steps else _over_iterations(axes, chart, rows)
        if not drawn:
            return None
        axes.set_title(chart.title, loc="left", fontsize=9.5)
        if chart.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(-0.02, 1.02)
        if chart.zero:
            axes.axhline(0, color=GREY, linewidth=0.8)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _over_iterations(axes: Axes, chart: Chart, rows: Sequence[Row]) -> bool:
    drawn = False
    for k in marked(rows):
        axes.axvspan(k - 0.5, k + 0.5, color=ORANGE, alpha=0.12, linewidth=0)
    for series in chart.series:
        points = [(k, row[series.key]) for k, row in enumerate(rows) if row.get(series.key) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, series.style, color=series.color, marker="o", markersize=4, label=series.label or None)
            drawn = True
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.2, len(rows) - 0.8)
    axes.set_xlabel("iteration (0: start)")
    return drawn


def _over_steps(axes: Axes, chart: Chart, histories: Sequence[Sequence[Row]]) -> bool:
    """Each iteration's steps behind the last one's; a thin line where an iteration begins; smoothed over 2% of them."""
    total = sum(map(len, histories))
    width = max(1, total // 50)
    start, drawn = 0, False
    for history in histories:
        for series in chart.series:
            values = [row[series.key] for row in history if series.key in row]
            if values:
                x = range(start, start + len(values))
                first = start == 0 or not drawn
                axes.plot(
                    x, _smooth(values, width), series.style, color=series.color, label=series.label * first or None
                )
                drawn = True
        if start:
            axes.axvline(start, color=GREY, linewidth=0.6, linestyle=":")
        start += len(history)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    return drawn


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Running means over at most the last ``width`` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]
