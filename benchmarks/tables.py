"""From rows of results.csv to the tables of README.md and docs/results.md. No row, no figure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from discovery import benches, identity

CASE = ("op", "case", "mode", "dtype", "shape")
BASELINES = ("torch eager", "torch.compile")
Row = dict[str, str]  # of results.csv


@dataclass(frozen=True)
class Result:
    """What was last measured of one case on one device: rows of one run, fastpo's first."""

    rows: tuple[Row, ...]

    @property
    def fastpo(self) -> Row:
        return self.rows[0]

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.fastpo[column] for column in CASE)

    @property
    def label(self) -> str:
        """Case and mode, type and sizes; what is zero is not said."""
        row = self.fastpo
        name = row["case"] if row["mode"] in row["case"] else f"{row['case']} {row['mode']}"
        name = name.removeprefix("cpu ").removeprefix("cuda ").replace("forward_backward", "forward + backward")
        dtype = row["dtype"].replace("bfloat", "bf").replace("float", "fp")
        return f"{name}, {dtype}, " + " ".join(size for size in row["shape"].split() if not size.endswith("=0"))

    def of(self, implementation: str) -> Row | None:
        return next((row for row in self.rows if row["implementation"] == implementation), None)

    @property
    def peers(self) -> list[Row]:
        """All but fastpo and its variants, fastest first."""
        others = (row for row in self.rows if not row["implementation"].startswith("fastpo"))
        return sorted(others, key=lambda row: float(row["p50_ms"]))


def latest(rows: Iterable[Row], gpu: bool) -> list[Result]:
    """The last run of each case on the kind of device, of which the one that was used last counts."""
    of_kind = [row for row in rows if row["device"].startswith("NVIDIA") == gpu]
    if not of_kind:
        return []
    where = [(row["device"], row["threads"]) for row in of_kind]
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for row, at in zip(of_kind, where, strict=True) if at == where[-1]):
        key = tuple(row[column] for column in CASE)
        if row["implementation"] == "fastpo":
            runs[key] = []
        if key in runs:
            runs[key].append(row)
    return [Result(tuple(found)) for found in runs.values()]


def headlines(results: list[Result], gpu: bool) -> list[Result]:
    """Those of the suite "quick", op by op."""
    device, by_key = "cuda" if gpu else "cpu", {result.key: result for result in results}
    keys = [tuple(identity(op, c).values()) for op, bench in benches([]).items() for c in bench.cases("quick", device)]
    return [by_key[key] for key in keys if key in by_key]


def comparison(results: list[Result]) -> str:
    """A line per case: fastpo, the baselines, the fastest peer; memory; the share of the floor."""
    if not results:
        return "No rows yet."
    lines = [
        "| ms | fastpo | torch eager | torch.compile | fastest other | faster | MiB, fastpo / eager | of the floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    op = ""
    for result in results:
        if result.fastpo["op"] != op:
            op = result.fastpo["op"]
            lines.append(f"| **`{op}`** | | | | | | | |")
        lines.append("| " + " | ".join(_cells(result)) + " |")
    return "\n".join(lines)


def _cells(result: Result) -> list[str]:
    ours, peers, eager = result.fastpo, result.peers, result.of("torch eager")
    fastest = min(result.rows, key=lambda row: float(row["p50_ms"]))

    def cell(row: Row | None) -> str:
        text = milliseconds(row) if row else ""
        return f"**{text}**" if row is fastest else text

    others = [row for row in peers if row["implementation"] not in BASELINES]
    other = f"{cell(others[0])} {others[0]['implementation']}" if others else ""
    faster = f"{float(peers[0]['p50_ms']) / float(ours['p50_ms']):.2g}x" if peers else ""
    memory = " / ".join(
        f"{max(0.0, float(row['peak_mib'])):.0f}" if row and row["peak_mib"] else "-" for row in (ours, eager)
    )
    share = f"{float(ours['floor_share']):.0%}" if ours["floor_share"] else ""
    return [result.label, cell(ours), *(cell(result.of(name)) for name in BASELINES), other, faster, memory, share]


def milliseconds(row: Row) -> str:
    """The median, three digits of it."""
    value = float(row["p50_ms"])
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def status(cpu: list[Result], gpu: list[Result]) -> str:
    """A line per op or workload: on how many cases it was measured where; untested where it was not."""
    lines = ["| | CPU | NVIDIA GPU |", "|---|---|---|"]
    for name in benches([]):
        cells = [_measured([r for r in results if r.fastpo["op"] == name]) for results in (cpu, gpu)]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1] if cells[1] != 'no rows' else '**untested**'} |")
    return "\n".join(lines)


def _measured(results: list[Result]) -> str:
    if not results:
        return "no rows"
    slower = sum(1 for r in results if r.peers and float(r.peers[0]["p50_ms"]) < float(r.fastpo["p50_ms"]))
    beaten = f", {slower} of them slower than the fastest peer" if slower else ""
    return f"{len(results)} case{'s' if len(results) > 1 else ''}{beaten}"


def where(results: list[Result]) -> str:
    """Device, threads, versions."""
    row: Any = results[-1].fastpo
    threads = "" if row["device"].startswith("NVIDIA") else f", {row['threads']} threads"
    return f"{row['device']}{threads}; {row['versions']}"
