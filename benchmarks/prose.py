"""Sentences of README.md that hold figures, made from the rows; "" where there are none."""

import textwrap

from figures import Rows, accuracy, mean, p50, searched
from tables import Result, Row


def paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), 128, break_on_hyphens=False) + "\n"


def training(rows: Rows) -> str:
    """A step of the loop's training stage against TRL's trainer."""
    runs = {
        run["fastpo"]["workload"]: run for run in rows.training if run["fastpo"]["gemm"] == "oneDNN" and "trl" in run
    }
    if not {"A", "B"} <= runs.keys():
        return ""
    (a, b), threads = (_both(runs[name]) for name in "AB"), runs["A"]["fastpo"]["threads"]
    return paragraph(
        f"On {threads} CPU cores a DPO training step of a 50M Llama on GSM8K prompts, 10 pairs each, takes",
        f"**{a[0]:.3g} s against {a[1]:.3g} s** for TRL's DPOTrainer on the same GEMM library; behind a few-shot",
        f"prefix of 1,024 tokens {b[0]:.3g} s against {b[1]:.3g} s (`benchmarks/results/tree_training.csv`).",
    )


def _both(run: dict[str, Row]) -> tuple[float, float]:
    return float(run["fastpo"]["step_s"]), float(run["trl"]["step_s"])


def search(rows: Rows) -> str:
    """Nodes per second over many prompts."""
    rate, faster = searched("nodes_per_second", "fastpo", rows), searched("speedup", "published", rows)
    if rate is None or faster is None:
        return ""
    return paragraph(
        f"64 prompts are searched at {rate.value:,.0f} nodes/s, {faster.value:.0f} times one prompt at a time as",
        "published codes do it (`benchmarks/results/tree_search.csv`).",
    )


def task(rows: Rows) -> str:
    """Accuracy of the embedded task, mean over seeds."""
    runs, more = list(accuracy(rows.task, "irpo").values()), list(accuracy(rows.task, "more_sft").values())
    if not runs or not more:
        return ""
    means = [mean(values) for values in zip(*runs, strict=True)]
    supervised = mean(run[-1] for run in more)
    assert supervised is not None
    return paragraph(
        f"Over {len(runs)} seeds (`python benchmarks/embedded_task.py`):",
        " -> ".join(f"{found.value:.1f}" for found in means if found) + "% greedy accuracy, where the same compute",
        f"spent on more supervision reaches {supervised.value:.1f}%.",
    )


def demo(rows: Rows) -> str:
    """``make demo``."""
    accuracies = [rows.fact("demo.py", f"accuracy {k}") for k in range(4)]
    seconds = rows.fact("demo.py", "seconds")
    if seconds is None or accuracies[0] is None or accuracies[3] is None:
        return ""
    threads = next(row["threads"] for row in reversed(rows.facts) if row["program"] == "demo.py")
    return paragraph(
        f"On {threads} CPU cores the demo takes {seconds.value:.0f} seconds: three IRPO iterations take",
        f"greedy accuracy on 500 held-out problems from {accuracies[0].value:.1f}% to {accuracies[3].value:.1f}%",
        "(`python benchmarks/demo.py`).",
    )


def losses(rows: Rows) -> str:
    """Every case in which a peer is faster, everyone on torch as it is installed."""
    default = (r for r in rows.ops if not r.fastpo["case"].endswith(("oneDNN", "alone")))
    slower = [(result, result.peers[0]) for result in default if result.peers and ratio(result) < 1]
    lines = [
        f"- `{result.fastpo['op']}`, {result.label}: {ratio(result):.2f}x {peer['implementation']}"
        for result, peer in sorted(slower, key=lambda pair: ratio(pair[0]))
    ]
    return "\n".join(["Where a peer is faster, everyone on torch as it is installed:\n", *lines, ""]) if lines else ""


def ratio(result: Result) -> float:
    """The fastest peer's time over fastpo's."""
    return p50(result.peers[0]) / p50(result.fastpo)


def like_for_like(rows: Rows) -> str:
    """The fused heads and their best peers on the same products."""
    found = [
        r for r in rows.ops if r.fastpo["case"].endswith("oneDNN") and r.fastpo["op"].startswith("linear") and r.peers
    ]
    if not found:
        return ""
    times = [ratio(r) for r in found]
    with_memory = [r for r in found if r.fastpo["peak_mib"] and r.peers[0]["peak_mib"]]
    memory = [float(r.peers[0]["peak_mib"]) / float(r.fastpo["peak_mib"]) for r in with_memory]
    return paragraph(
        "Peers run as torch is installed, on MKL's products, the fused heads on their own (`csrc/gemm.cpp`). Given",
        "oneDNN's products, which run at the same rate and which torch offers its users no way to (the cases",
        '"oneDNN" in [docs/results.md](docs/results.md)), the best of them take',
        f"{min(times):.2g} to {max(times):.2g} times the fused heads' time, in {min(memory):.2g} to {max(memory):.2g}",
        "times the memory.",
    )


BLOCKS = {
    "training": training,
    "demo": demo,
    "search": search,
    "task": task,
    "losses": losses,
    "like_for_like": like_for_like,
}
