"""Every shipped recipe, end to end on a tiny budget, from one warm start that all share: two iterations each."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from fastpo import cli
from fastpo.artifacts import read_json, read_jsonl
from fastpo.checks import check_given
from fastpo.commands import COMMANDS
from fastpo.config import read_recipe
from fastpo.methods import RECIPES as RECIPES_OF
from fastpo.results import result_rows

RECIPES = sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))
EMBEDDED = [name for name in RECIPES if read_recipe(name).get("data") == "embedded"]
# A model of so few steps gets no sum right, so the reward is the parity of the text: both sides of a pair exist.
REWARD = "def parity(prompt, response, row):\n    return sum(map(ord, response)) % 2\n"
TINY = {
    "iterations": 2,
    "prompts_per_iteration": 6,
    "num_samples": 4,
    "max_new_tokens": 12,
    "temperature": 1.0,
    "top_p": 1.0,
    "win_threshold": 1.0,
    "judge_samples": 4,
    "judge_pairs": 2,
    "vote_threshold": 0.01,
    "batch_size": 4,
    "eval_prompts": 4,
    "eval_pairs": 4,
}
ONLY_WHERE_SET = ("judge_pairs", "judge_samples", "vote_threshold")
# Few responses of such a model have an answer, and votes need two different ones.
MORE = {"scpo_embedded": {"num_samples": 96, "max_new_tokens": 24}}


# What a recipe promises: a check of its pairs and its metrics of iteration 2.
PROMISES = {
    "b_star": lambda pairs, metrics: metrics["scan_temperature"] in (0.6, 0.8, 1.0, 1.2) and "scan_balance" in metrics,
    "cream": lambda pairs, metrics: {p["soft_label"] for p in pairs} == {(metrics["consistency"] + 1) / 2},
    "dno": lambda pairs, metrics: all(p["soft_label"] == 1 for p in pairs),
    "kto": lambda pairs, metrics: all((p["chosen"] is None) != (p["rejected"] is None) for p in pairs),
    "lipo": lambda pairs, metrics: any(len(p["gains"]) > 2 for p in pairs),
    "meta_rewarding": lambda pairs, metrics: any("prompt_text" in p for p in pairs) and "score_auc" in metrics,
    "rise_edit": lambda pairs, metrics: any(p.get("texts") for p in pairs),
    "self_rewarding": lambda pairs, metrics: 0 <= metrics["score_auc"] <= 1,
    "self_taught_evaluator": lambda pairs, metrics: all("Better?" in p["prompt_text"] for p in pairs),
    "selm": lambda pairs, metrics: any(p["others"][0] is not None for p in pairs),
    "spin": lambda pairs, metrics: all(p["chosen"].endswith("/gold") for p in pairs),
    "sppo": lambda pairs, metrics: all(p["targets"][0] > 0 > p["targets"][1] for p in pairs),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A model that has seen answers and judgements for a few steps: it writes in their formats. And a reward."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "reward.py").write_text(REWARD)
    argv = f"""demo --output_dir {folder}/run --iterations 0 --warm_start_steps 120 --warm_start_batch_size 24
        --warm_start_judgements 0.5 --eval_prompts 1 --no_tensorboard""".split()
    assert cli.main(argv) == 0
    return folder


def settings(name, start, output_dir):
    recipe = read_recipe(name)
    tiny = {key: value for key, value in TINY.items() if key not in ONLY_WHERE_SET or key in recipe}
    tiny |= MORE.get(name, {})
    if "search" in recipe:
        del tiny["num_samples"]
    tiny |= {"model": start / "run/warm_start/model", "reward": f"{start}/reward.py:parity", "output_dir": output_dir}
    return [str(part) for key, value in tiny.items() for part in (f"--{key}", value)]


def test_every_recipe_is_of_a_method():
    assert {name for names in RECIPES_OF.values() for name in names} >= set(EMBEDDED) - {"demo"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_how_to_run_it(name):
    header = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert "fastpo " in header and header.startswith("# ")


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_the_header_are_taken(name):
    """No flag in them is unknown, or does nothing in that recipe."""
    header = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text().split("\n\n")[0]
    text = re.sub(r"^# ?", "", header, flags=re.MULTILINE).replace("\\\n", "")
    commands = re.findall(r"fastpo (train|demo)\b([^#`;\n]*)", text)
    assert commands
    for command, flags in commands:
        config, arguments = cli.parse(COMMANDS[command], flags.replace("...", "").split())
        check_given(config, arguments.given)


@pytest.mark.parametrize("name", EMBEDDED)
def test_dry_run(name, start, tmp_path, capsys):
    assert cli.main(["train", name, *settings(name, start, tmp_path / "run"), "--dry-run"]) == 0, (
        capsys.readouterr().err
    )
    out = capsys.readouterr().out
    assert "an iteration at most: 6 prompts" in out and "F in GEMMs" in out and "memory" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", EMBEDDED)
def test_recipe_runs(name, start, tmp_path, capsys):
    """Samples, scores, pairs, reference, training, evaluation, twice; what the recipe promises is in its artefacts."""
    run = tmp_path / "run"
    assert cli.main(["train", name, *settings(name, start, run), "--no_tensorboard"]) == 0, capsys.readouterr().err
    rows = result_rows(run)
    assert len(rows) == 3
    for k in (1, 2):
        folder = run / f"iteration_{k}"
        metrics = read_json(folder / "metrics.json")
        assert metrics["pairs"] == len(read_jsonl(folder / "pairs.jsonl")) > 0
        losses = [row["loss"] for row in read_jsonl(folder / "training.jsonl")]
        assert losses and all(abs(loss) < 1e7 for loss in losses)
    pairs = read_jsonl(run / "iteration_2" / "pairs.jsonl")
    assert PROMISES.get(name, lambda *_: True)(pairs, read_json(run / "iteration_2" / "metrics.json"))


@pytest.mark.parametrize("name", ["b_star", "meta_rewarding"])
def test_the_same_seed_gives_the_same_bytes(name, start, tmp_path):
    """Scans, judgements and pairs of judgements too; the second run is resumed after its samples."""
    for run in ("a", "b"):
        argv = ["train", name, *settings(name, start, tmp_path / run), "--no_tensorboard"]
        assert cli.main(argv) == 0
    for lost in ("rewards.jsonl", "pairs.jsonl", "reference.safetensors", "metrics.json", "evaluation.json"):
        (tmp_path / "b" / "iteration_2" / lost).unlink(missing_ok=True)  # sft has no reference
    shutil.rmtree(tmp_path / "b" / "iteration_2" / "model")
    assert cli.main(argv) == 0
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").glob("iteration_*/**/*") if p.is_file()]
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
