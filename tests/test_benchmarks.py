"""The benchmarks' own logic: what is found, gated, reported. No timing decides anything here."""

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("no benchmarks/: not a checkout", allow_module_level=True)
sys.path.append(str(ROOT / "benchmarks"))

import discovery  # noqa: E402
import gpu_check  # noqa: E402
import measure  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
import suite  # noqa: E402
import tables  # noqa: E402
import verify  # noqa: E402
import workloads  # noqa: E402


@dataclass(frozen=True)
class Case:
    name: str = "case"
    mode: str = "forward"
    dtype: torch.dtype = torch.float32
    shape: dict[str, int] = field(default_factory=lambda: {"N": 3})


def doubling() -> SimpleNamespace:
    """A bench whose op doubles a tensor, and whose check compares with fastpo's output."""

    def check(case, inputs, outputs):
        for output in outputs.values():
            torch.testing.assert_close(output, outputs["fastpo"])

    return SimpleNamespace(check=check)


def row(**changes: str) -> dict[str, str]:
    """A row of results.csv, of the headline case of token_logprobs unless changed."""
    case = discovery.benches(["token_logprobs"])["token_logprobs"].cases("quick", "cpu")[0]
    figures = {"p20_ms": "1", "p50_ms": "2", "p80_ms": "3", "peak_mib": "4", "floor_share": "0.5", "speedup": "1"}
    where = {"device": "Some CPU", "threads": "4", "versions": "torch 2", "commit": "c", "implementation": "fastpo"}
    return {**where, **discovery.identity("token_logprobs", case), **figures, **changes}


def test_benches_are_found_and_have_a_headline():
    found = discovery.benches([])
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/bench.py")} <= found.keys()
    for name, bench in found.items():
        assert bench.cases("quick", "cpu") or bench.cases("gpu", "cuda"), name
        assert not bench.cases("no such suite", "cpu"), name
    with pytest.raises(SystemExit, match="no_such_op"):
        discovery.benches(["no_such_op"])


def test_a_peer_that_computes_something_else_is_not_timed():
    runs = {"fastpo": lambda x: 2 * x, "right": lambda x: x + x, "wrong": lambda x: 3 * x, "broken": lambda x: x[99]}
    failed = verify.gate_all(doubling(), Case(), torch.ones(3), runs)
    assert failed.keys() == {"wrong", "broken"}
    assert failed["wrong"].startswith("computes something else")


def test_nothing_is_timed_where_fastpo_fails_or_all_disagree_with_it():
    with pytest.raises(RuntimeError, match="fastpo fails: IndexError"):
        verify.gate(doubling(), Case(), torch.ones(3), {"fastpo": lambda x: x[99]})
    with pytest.raises(RuntimeError, match="nothing agrees with fastpo"):
        runs = {"fastpo": lambda x: 2 * x, "fastpo too": lambda x: 2 * x, "a": lambda x: x, "b": lambda x: -x}
        verify.gate_all(doubling(), Case(), torch.ones(3), runs)


def test_the_gate_leaves_the_inputs_as_they_are():
    inputs = torch.ones(3)
    verify.gate(doubling(), Case(), inputs, {"fastpo": lambda x: x.mul_(2), "other": lambda x: x.mul_(2)})
    assert inputs.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("seconds", "rounds", "called", "counted"),
    [(0.0, None, 3, 3), (0.0, 2, 2, 2), (0.01, None, 7, 5)],
    ids=["dear", "so many rounds", "cheap: one to warm up, five, one for memory"],
)
def test_calls_are_timed_in_turn_on_fresh_inputs(seconds, rounds, called, counted):
    calls = []
    runs = {"a": lambda x: calls.append(("a", x[0])), "b": lambda x: calls.append(("b", x[0]))}
    inputs = [0]
    times, peaks = measure.measured(runs, inputs, "cpu", seconds, lambda x: x.__setitem__(0, x[0] + 1), rounds)
    assert calls == [(name, i + 1) for i, (name, _) in enumerate(calls)]
    assert [name for name, _ in calls][: 2 * called] == ["a", "b"] * called
    assert len(calls) == 2 * called or seconds
    assert min(len(found) for found in times.values()) >= counted
    assert peaks.keys() == runs.keys()


def dear() -> SimpleNamespace:
    """``doubling`` with what ``timed_once`` asks beyond: a small case of the mode to load and compile on."""
    return SimpleNamespace(
        check=doubling().check, cases=lambda suite, device: [Case("small")], setup=lambda case, device: torch.zeros(1)
    )


def test_dear_calls_are_timed_and_checked_in_one():
    calls = []

    def right(x):
        calls.append(len(x))
        return x + x

    runs = {"fastpo": lambda x: 2 * x, "right": right, "wrong": lambda x: 3 * x + 1, "broken": lambda x: x[99]}
    runs["ceiling"] = lambda x: None
    times, peaks, failed = verify.timed_once(dear(), Case(), torch.ones(3), runs, "cpu")
    assert calls == [1, 3]  # the small case, then the call that counts
    assert failed.keys() == {"wrong", "broken"} and failed["wrong"].startswith("computes something else")
    assert len(times["right"]) == len(times["ceiling"]) == 1 and {"fastpo", "right", "ceiling"} <= peaks.keys()
    with pytest.raises(RuntimeError, match="nothing agrees with fastpo"):
        verify.timed_once(dear(), Case(), torch.ones(3), {"fastpo": lambda x: 2 * x, "wrong": torch.zeros_like}, "cpu")


def test_a_dear_call_that_compiled_is_made_again():
    calls = []

    def compiling(x):
        calls.append(len(x))
        verify.counters["stats"]["unique_graphs"] += len(calls) < 4  # the small case, and the first two of three
        return 2 * x

    times, *_ = verify.timed_once(dear(), Case(), torch.ones(3), {"fastpo": compiling}, "cpu")
    assert calls == [1, 3, 3, 3] and len(times["fastpo"]) == 1


def plan_of(monkeypatch, capsys, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--suite", "full", *options])
    assert run.main() == 0
    return capsys.readouterr().out


def test_the_full_suite_is_planned_for_twenty_minutes_with_all_of_the_grid(monkeypatch, capsys):
    plan = plan_of(monkeypatch, capsys, "--plan")
    cases, programs = (float(part.split()[-2]) for part in plan.splitlines()[1].replace("minutes", "m").split(";"))
    assert cases + programs <= run.MINUTES["full"] < 20
    grid = [line for line in plan.splitlines() if "oneDNN" in line and "tokens=" in line]
    assert len(grid) == 28
    for mode in ("trained head", "frozen head"):
        for masked in (0, 25, 60):
            shape = f"tokens=4096 hidden=1024 vocab=128256 masked={masked} "
            assert any(shape in line and f"cpu {mode}, oneDNN" in line for line in grid)
    assert "tree_training.py" in plan
    assert "tree_training.py" not in plan_of(monkeypatch, capsys, "--plan", "--ops", "tree_scan")


def test_programs_of_a_suite_exist_and_know_when_they_are_done(tmp_path):
    where = {"commit": "c", "device": "Some CPU", "threads": 4}
    for program in suite.PROGRAMS["full"]:
        assert (ROOT / "benchmarks" / program.command[0]).is_file()
        written = measure.read(ROOT / "benchmarks" / "results" / program.rows)
        assert set(program.values) <= {row[program.column] for row in written}
        lines = [f"commit,device,threads,{program.column}", *(f"c,Some CPU,4,{value}" for value in program.values)]
        assert not program.done(where, tmp_path / "none")
        (tmp_path / program.rows).write_text("\n".join(lines))
        assert program.done(where, tmp_path) and not program.done({**where, "commit": "d"}, tmp_path)


def test_a_program_that_fails_or_overruns_does_not_stop_the_next(monkeypatch, capfd):
    """A script that waits, of which a hundredth of a second is left; one that fails; one that is fine."""
    made = {"waits": "while True: pass", "fails": "raise SystemExit(3)", "fine": "print('ran')"}
    found = [suite.Program(name, (f"{name}.py",), "x.csv", "x", (), 1.0) for name in made]
    monkeypatch.setitem(suite.PROGRAMS, "full", tuple(found))
    monkeypatch.setattr(run, "wanted", lambda *_: [])

    def ended(command, limit_s, environment, output):
        name = Path(command[1]).stem
        return gpu_check.ended([sys.executable, "-c", made[name]], 0.01 if name == "waits" else 60, environment, output)

    monkeypatch.setattr(suite, "ended", ended)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--suite", "full", "--dry-run"])
    assert run.main() == 1
    text = capfd.readouterr().out
    assert "FAILED waits: FAILED (over 0 s)" in text and "FAILED fails: FAILED (exit 3)" in text and "ran" in text
    assert "FAILED fine" not in text


def test_the_summary_of_the_fused_loss_finds_the_worst_points():
    bench = discovery.benches(["linear_preference_loss"])["linear_preference_loss"]
    shape, small = "tokens=2048 hidden=1024 vocab=128256 masked=0 budget=300", "tokens=2048 hidden=1024 vocab=32000"
    gradients = 1024 * (2048 + 128256) * 4 / 2**20

    def of(implementation, shape=shape, **values):
        return row(implementation=implementation, mode="trained head", shape=shape, **values)

    def found(peak):
        rows = [of("fastpo", peak_mib=str(gradients + peak), floor_share="0.93"), of("trl", speedup="3.1")]
        rows += [of("torch eager", peak_mib="3000", speedup="2.4")]
        return bench.summary([*rows, of("fastpo", small + " masked=0 budget=192", peak_mib="0", floor_share="0.91")])

    lines = "\n".join(found(240))
    assert "2 points" in lines and "at least 91%" in lines and "at least 2.40x" in lines and "torch eager" in lines
    assert "at most 8.0% of the extra memory of eager" in lines and "within the stated budget" in lines
    assert "BEYOND the budget: 313 MiB" in "\n".join(found(313))


def test_rows_are_read_back_as_written(tmp_path):
    values = {name: "x" for name in measure.Row.__dataclass_fields__}
    measure.append([measure.Row(**values | {"peak_mib": None})], tmp_path / "rows.csv")
    measure.append([measure.Row(**values)], tmp_path / "rows.csv")
    assert measure.read(tmp_path / "rows.csv") == [values | {"peak_mib": ""}, values]


def test_the_last_run_of_a_case_on_the_last_device_counts():
    old = [row(p50_ms="9"), row(implementation="gone", p50_ms="1")]
    new = [row(), row(implementation="trl", p50_ms="8"), row(implementation="fastpo out of place", p50_ms="1")]
    (result,) = tables.latest([*old, *new], gpu=False)
    assert [r["implementation"] for r in result.rows] == ["fastpo", "trl", "fastpo out of place"]
    assert [r["implementation"] for r in result.peers] == ["trl"]
    assert not tables.latest(old, gpu=True)


def test_a_figure_without_a_row_is_not_printed():
    rows = [row(p50_ms="123"), row(implementation="trl", p50_ms="456", peak_mib="")]
    text = plot.blocks(rows)["table"]
    assert "| **123** |  |  | 456 trl | 3.7x | 4 / - | 50% |" in text
    assert plot.blocks([])["table"] == "Nothing here has run on a GPU yet.\n"
    assert not plot.blocks([])["figure"]
    assert "123" not in plot.blocks([row(case="not a headline", p50_ms="123")])["table"]


def test_an_op_without_rows_of_a_gpu_is_untested_there():
    lines = plot.blocks([row(), row(device="NVIDIA H100", op="preference_loss")])["status"].splitlines()
    cells = {line.split("|")[1].strip(" `"): [x.strip() for x in line.split("|")[2:4]] for line in lines[2:]}
    assert cells["token_logprobs"] == ["1 case", "**untested**"]
    assert cells["preference_loss"] == ["no rows", "1 case"]


def test_readme_and_docs_say_what_the_rows_say():
    assert not plot.stale(measure.read()), "python benchmarks/plot.py --readme writes them"


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results = tables.latest([row(), row(implementation="trl", peak_mib="", floor_share="")], gpu=False)
    plot.draw(results, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert plot.digest(results) in text
    assert "TRL" in text
    assert "token_logprobs" in text


def test_programs_with_rows_of_their_own_have_a_table(tmp_path):
    row = {
        "vocabulary": "32000",
        "workload": "A",
        "mode": "step",
        "gemm": "oneDNN",
        "device": "Some CPU",
        "threads": "4",
        "pairs": "60",
    }
    row |= {"distinct_tokens": "99", "implementation": "fastpo", "p50_s": "2"}
    rows = [row | {"p50_s": "7"}, row | {"implementation": "gone", "p50_s": "1"}, row]
    rows += [row | {"implementation": "trl", "p50_s": "9"}]
    with (tmp_path / "trees.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)
    text = workloads.tables(tmp_path)
    assert "| A, step, oneDNN, V=32000: 60 pairs, 99 distinct tokens | 2 | 9 (4.5x) |" in text
    assert "gone" not in text
