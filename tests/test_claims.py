"""docs/claims.md: figures come from rows, bounds are judged, what was not measured has no figure."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("no benchmarks/: not a checkout", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import claims  # noqa: E402
import demo  # noqa: E402
import figures  # noqa: E402
import prose  # noqa: E402
import suite  # noqa: E402
from facts import record  # noqa: E402
from figures import Found, Rows  # noqa: E402
from tables import Result  # noqa: E402

NOTHING = Rows([], [], [], [])


def result(case: str, times: dict[str, float], **columns: str) -> Result:
    """Of linear_preference_loss, p50 in ms by implementation, fastpo first."""
    row = {
        "op": "linear_preference_loss",
        "case": case,
        "mode": case.split("cpu ")[-1].split(",")[0],
        "dtype": "float32",
    }
    row |= {"shape": "tokens=4 hidden=2 vocab=8 masked=0 budget=1", "floor_share": "", "peak_mib": "", **columns}
    return Result(tuple({**row, "implementation": name, "p50_ms": str(ms)} for name, ms in times.items()))


@pytest.mark.parametrize(
    ("found", "bounds", "said"),
    [
        (Found(5.04, 12), {"least": 5}, "| it | at least 5x | 5.04x (12 points) | met |"),
        (Found(4.96), {"least": 5}, "| it | at least 5x | 4.96x | **not met** |"),
        (Found(0.2), {"most": 0.1, "unit": " ms"}, "| it | at most 0.1 ms | 0.2 ms | **not met** |"),
        (None, {"least": 90, "unit": "%"}, "| it | at least 90% | | no row |"),
    ],
)
def test_a_claim_is_judged_by_its_bound(found, bounds, said):
    assert claims.Claim("it", lambda _: found, **bounds).line(NOTHING).startswith(said)


def test_without_rows_nothing_has_a_figure():
    for group in claims.CLAIMS.values():
        assert all(claim.find(NOTHING) is None for claim in group)


def test_every_claim_of_the_suites_has_rows_and_every_command_exists():
    rows = Rows.of()
    for group in claims.CLAIMS.values():
        for claim in group:
            of_suite = claim.command.startswith("run.py")
            assert not of_suite or claim.find(rows) is not None, f"{claim.what}: run {claim.command}"
            script = claim.command.split()[0]
            assert script == "make" or (BENCHMARKS / script).is_file()
    programs = {program.rows for program in suite.PROGRAMS["full"]}
    assert programs == {"trees.csv", "tree_training.csv", "tree_host.csv", "tree_search.csv"}


def test_of_several_points_and_peers_the_worst_counts():
    points = [
        result("cpu trained head", {"fastpo": 10, "fastpo, two phases": 5, "torch eager": 30, "trl": 25}),
        result("cpu trained head", {"fastpo": 10, "torch eager": 21, "trl": 40}),
        result("cpu trained head", {"fastpo": 10}),
        result("cpu trained head, oneDNN", {"fastpo": 10, "trl": 1}),
    ]
    rows = Rows(points, [], [], [])
    assert figures.against("linear_preference_loss", "cpu trained head", "", rows) == Found(2.1, 2)
    assert figures.against("linear_preference_loss", "cpu trained head", "trl", rows) == Found(2.5, 2)
    assert figures.share("linear_preference_loss", "cpu trained head", rows) is None


def test_memory_of_a_head_is_judged_without_its_gradients():
    gradients = 2 * (4 + 8) * 4 / 2**20
    (alone,) = [result("cpu trained head, alone", {"fastpo": 10}, peak_mib=str(gradients + 3))]
    assert figures.over_budget(Rows([alone], [], [], [])).value == pytest.approx(2)


def test_seeds_and_iterations():
    def row(arm, seed, *values):
        return [{"arm": arm, "seed": seed, "accuracy": str(value)} for value in values]

    task = row("irpo", "0", 0.1, 0.9, 0.8) + row("irpo", "1", 0.3, 0.5, 1.0) + row("more_sft", "0", 0.25)
    search = row("mcts_dpo", "0", 0.2, 0.9) + row("irpo", "0", 0.2, 0.8) + row("mcts_dpo", "1", 0.2, 0.7)
    rows = Rows([], [], [], [], task=task, task_search=search)
    assert figures.irpo(lambda run: run[-1])(rows) == Found(90, 2)
    assert figures.fall(rows).value == pytest.approx(10)
    assert figures.supervised(rows).value == pytest.approx(65)
    assert figures.seeds_won(rows) == Found(1)


def test_sentences_have_the_figures_of_the_rows():
    assert set(prose.BLOCKS) and not any(sentence(NOTHING) for sentence in prose.BLOCKS.values())

    def step(name, implementation, seconds):
        columns = {"workload": name, "gemm": "oneDNN", "threads": "4"}
        return {**columns, "implementation": implementation, "step_s": seconds}

    runs = [{way: step(name, way, s) for way, s in times.items()} for name, times in STEPS.items()]
    points = [
        result("cpu trained head", {"fastpo": 10, "torch eager": 8}),
        result("cpu frozen head", {"fastpo": 10, "trl": 11}),
        result("cpu trained head, oneDNN", {"fastpo": 10, "trl": 9}, peak_mib="5"),
    ]
    facts = {"seconds": "108.04", **{f"accuracy {k}": str(v) for k, v in enumerate((11.4, 98.6, 99.8, 99.8))}}
    of_demo = [{"program": "demo.py", "figure": name, "value": value, "threads": "4"} for name, value in facts.items()]
    rows = Rows(points, [], [], runs, facts=of_demo)
    assert "On 4 CPU cores the demo takes 108 seconds" in prose.demo(rows)
    assert "from 11.4% to 99.8%" in prose.demo(rows).replace("\n", " ")
    assert "takes **4.03 s against 21.6 s** for" in prose.training(rows) and "1.1 s against 30 s" in prose.training(
        rows
    )
    slower = prose.losses(rows)
    assert (
        "- `linear_preference_loss`, trained head, fp32, tokens=4 hidden=2 vocab=8 budget=1: 0.80x torch eager"
        in slower
    )
    assert slower.count("- `") == 1
    assert "take 0.9 to 0.9 times the fused heads' time, in 1 to 1 times" in prose.like_for_like(rows).replace(
        "\n", " "
    )


STEPS = {"A": {"fastpo": "4.033", "trl": "21.567"}, "B": {"fastpo": "1.1", "trl": "30"}}


def test_facts_are_read_back_as_recorded(tmp_path):
    path = tmp_path / "facts.csv"
    record("demo.py", {"seconds": (110.0, "s"), "accuracy 0": (11.0, "%")}, path)
    record("demo.py", {"seconds": (104.2, "s")}, path)
    record("kill_resume.py", {"kills": (20, "")}, path)
    rows = Rows.of(tmp_path)
    assert rows.fact("demo.py", "seconds") == Found(104.2) and rows.fact("demo.py", "accuracy 0") == Found(11)
    assert rows.fact("kill_resume.py", "kills") == Found(20) and rows.fact("kill_resume.py", "seconds") is None


def test_figures_of_a_demo(tmp_path):
    for folder, accuracy in (("warm_start", 0.114), ("iteration_1", 0.998)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "evaluation.json").write_text(json.dumps({"accuracy": accuracy}))
    (tmp_path / "iteration_1" / "metrics.json").write_text(json.dumps({"training": {}}))
    found = demo.figures(107.96, tmp_path)
    assert found == {"seconds": (108.0, "s"), "accuracy 0": (11.4, "%"), "accuracy 1": (99.8, "%")}


def test_steps_are_those_of_the_small_vocabulary_where_there_are_any():
    def run(vocabulary, **shares):
        ours = {"workload": "A", "mode": "step", "gemm": "oneDNN", "vocabulary": vocabulary, "time_ratio": "1.0"}
        return {"fastpo": ours} | {
            name.replace("_", ", "): {"ceiling_share": share, "time_ratio": share} for name, share in shares.items()
        }

    rows = Rows([], [], [run("8192", paths_sampled="0.9"), run("32000", paths="0.7", trl="5.5")], [])
    assert figures.of_ceiling("A", rows) == Found(90)
    assert figures.of_ceiling("A", rows, vocabulary=32000) == Found(70)
    assert figures.slower("trl", rows, "A") == Found(5.5)
    assert figures.slower("dense", rows) is None
