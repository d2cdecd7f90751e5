"""When an iteration is marked as over-optimised: a narrowed or leaking distribution that has cost something."""

import pytest

from fastpo.artifacts import write_json, write_jsonl, write_text
from fastpo.diagnostics import marked, over_optimisation
from fastpo.report import write_report

GOOD = {"topk_entropy": 0.5, "topk_mass": 0.999, "accuracy": 0.9}


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ({**GOOD, "topk_entropy": 0.3, "accuracy": 0.8}, "top-10 entropy 0.5000 -> 0.3000; accuracy 90.0% -> 80.0%"),
        ({**GOOD, "topk_mass": 0.98, "accuracy": 0.8}, "top-10 mass 0.9990 -> 0.9800; accuracy 90.0% -> 80.0%"),
        ({**GOOD, "topk_entropy": 0.3}, None),  # narrower, as learning makes it
        ({**GOOD, "topk_entropy": 0.3, "accuracy": 0.95}, None),
        ({**GOOD, "accuracy": 0.8}, None),  # worse, but not for this reason
        ({**GOOD, "topk_entropy": 0.45, "accuracy": 0.8}, None),
        ({}, None),
    ],
)
def test_accuracy(after, reason):
    assert over_optimisation(GOOD, after) == reason


def test_ranking_of_held_out_pairs_counts_too():
    before = {"topk_entropy": 0.5, "heldout_ranking_accuracy": 0.7}
    assert "heldout ranking accuracy 70.0% -> 60.0%" in over_optimisation(
        before, {"topk_entropy": 0.2, "heldout_ranking_accuracy": 0.6}
    )


def test_without_held_out_data_the_chosen_responses_decide():
    """Likelihood displacement: the same pairs before and after training, both in the later row."""
    after = {"topk_entropy": 0.2, "pairs_logps_per_token_chosen_before": -0.11}
    shifted = over_optimisation({"topk_entropy": 0.5}, {**after, "pairs_logps_per_token_chosen": -0.61})
    assert shifted.endswith("log-prob per token of chosen responses -0.110 -> -0.610")
    assert over_optimisation({"topk_entropy": 0.5}, {**after, "pairs_logps_per_token_chosen": -0.12}) is None


def test_marked_rows():
    worse = {**GOOD, "topk_entropy": 0.1, "accuracy": 0.5}
    assert list(marked([GOOD, GOOD, worse, worse])) == [2] and marked([]) == marked([GOOD]) == {}


@pytest.mark.parametrize("accuracy", [0.5, 0.95])
def test_the_report_names_and_shades_it(tmp_path, accuracy):
    write_text(tmp_path / "config.yaml", "seed: 0\n")
    write_json(tmp_path / "warm_start" / "evaluation.json", GOOD)
    write_json(tmp_path / "iteration_1" / "evaluation.json", {**GOOD, "topk_entropy": 0.1, "accuracy": accuracy})
    write_json(tmp_path / "iteration_1" / "metrics.json", {"pairs": 3, "training": {"steps": 1, "margin": 0.1}})
    record = {"step": 1, "topk_entropy": 0.2, "ranking_accuracy": 0.5, "ranking_accuracy_per_token": 0.75}
    write_jsonl(tmp_path / "iteration_1" / "training.jsonl", [record, record])
    page = write_report(tmp_path).read_text()
    for title in ("entropy of greedy answers", "training pairs ranked right", "top-10 entropy in training"):
        assert title in page
    assert ("<h2>Over-optimised</h2>" in page) == (accuracy < 0.9) == ("iteration 1: top-10 entropy" in page)
