"""Search as a stage of the loop, on a tiny budget: its artefacts, killed and resumed, its values, its complaints."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from fastpo import cli, config
from fastpo.artifacts import read_json, read_jsonl
from fastpo.embedded import build_tokenizer
from fastpo.search import METHODS, stage
from fastpo.search.settings import method_of

# An untrained model gets no sum right: the parity of the text is the reward.
REWARD = "def parity(prompt, response, row):\n    return sum(map(ord, response)) % 2\n"
TINY = """--iterations 1 --warm_start_steps 2 --warm_start_batch_size 2 --warm_start_examples 10 --eval_prompts 2
    --prompts_per_iteration 4 --max_new_tokens 10 --sample_chunk 2 --batch_size 4 --eval_pairs 2
    --search_checkpoint_waves 2 --no_tensorboard"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return f"{path}:parity"


def train(recipe, reward, output_dir, extra=""):
    steps = "" if recipe == "mc_nest" else " --search_step_tokens 4"  # its nodes are whole answers
    flags = f"{TINY}{steps} {extra}".split()
    return cli.main(["train", recipe, "--reward", reward, "--output_dir", str(output_dir), *flags])


def contents(directory):
    skipped = ("timings.jsonl", "report.html", "config.yaml")
    files = (p for p in sorted(Path(directory).rglob("*")) if p.is_file() and p.name not in skipped)
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def finished(reward, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    assert train("mcts_dpo", reward, path) == 0
    return path


def test_artefacts(finished):
    folder = finished / "iteration_1"
    rows, pairs = read_jsonl(folder / "search.jsonl"), read_jsonl(folder / "pairs.jsonl")
    assert not (folder / "samples.jsonl").exists() and not (folder / "search.parts").exists()
    tokenizer = build_tokenizer()
    for row in rows:
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"] + "\n"
        assert len(row["parent"]) == len(row["ids"]) == len(row["q"]) == len(row["process"]) > 5
        assert row["visits"][0] == 8, "one a simulation"
        for i, right in enumerate(row["right"]):
            assert (right is not None) == row["terminal"][i]
    by_id = {row["id"]: row for row in rows}
    for pair in pairs:
        row, start = by_id[pair["prompt"]], len(pair["prompt_ids"])
        for side in ("chosen", "rejected"):
            node, at = (int(x) for x in pair[side].partition("/")[2].split("@"))
            path = []
            while node >= 0:
                path = row["ids"][node] + path
                node = row["parent"][node]
            assert at == start and pair["prompt_ids"] + pair[f"{side}_ids"] == row["prompt_ids"] + path
        assert pair["chosen_ids"][0] != pair["rejected_ids"][0], "spans begin where the steps differ"
        assert 0.5 <= pair["soft_label"] <= 1
    metrics = read_json(folder / "metrics.json")
    assert metrics["pairs"] == len(pairs) > 0 and metrics["search_nodes"] == sum(len(row["parent"]) for row in rows)
    assert metrics["search_tokens"] > 0 and 0 <= metrics["search_solved"] <= 1


def test_a_killed_search_goes_on_to_the_bit(finished, reward, tmp_path, monkeypatch):
    """Stopped behind the third checkpoint, in the second chunk; once more; then to the end."""
    save, saves = stage.save_search, []

    def saving(search, path):
        save(search, path)
        saves.append(search.counts.waves)
        if len(saves) in (5, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "save_search", saving)
    for _ in range(2):
        assert train("mcts_dpo", reward, tmp_path / "run") == 130
    assert train("mcts_dpo", reward, tmp_path / "run") == 0
    assert saves == [2, 4, 6, 8, 2, 4, 6, 8], "nothing is searched twice"
    assert contents(tmp_path / "run") == contents(finished)


@pytest.mark.parametrize("value", ["self", "likelihood", "rollout"])
def test_values(value, reward, tmp_path):
    recipe = {"likelihood": "beam_q", "rollout": "tree_plv", "self": "mcts_dpo"}[value]
    # no response of an untrained model ends, so beams find no solutions to pair; the search itself is there
    code = 1 if value == "likelihood" else 0
    rollouts = "--search_rollouts 2" if value == "rollout" else ""
    assert train(recipe, reward, tmp_path / "run", f"--search_value {value} {rollouts}") == code
    values = {v for row in read_jsonl(tmp_path / "run/iteration_1/search.jsonl") for v in row["value"][1:]}
    inside = {"self": (-1, 1), "likelihood": (-1e9, 0), "rollout": (0, 1)}[value]
    assert all(inside[0] <= v <= inside[1] for v in values) and len(values) > 2


def test_refinements_read_the_answer_before(reward, tmp_path):
    seen = []
    original = stage.StepSampler.__call__

    def recorded(self, nodes, widths):
        seen.extend(node.ids for node in nodes)
        return original(self, nodes, widths)

    stage.StepSampler.__call__ = recorded
    try:
        extra = ["--search_refine", "Wrong: {answer} Better: "]
        assert (
            cli.main(["train", "mc_nest", "--reward", reward, "--output_dir", str(tmp_path), *TINY.split(), *extra])
            == 0
        )
    finally:
        stage.StepSampler.__call__ = original
    texts = [build_tokenizer().decode(ids) for ids in seen]
    assert any("How many?\nWrong: " in text and text.endswith(" Better: ") for text in texts)
    assert any(text.endswith("How many?\n") for text in texts), "the first answers are to the prompt alone"


def test_no_pairs_is_one_line(tmp_path, capsys):
    """The math reward: an untrained model is always wrong, so no solution stands against another."""
    assert train("beam_q", "math", tmp_path / "run") == 1
    message = capsys.readouterr().err.strip()
    assert "iteration 1 has no pairs: 0% of 4 trees hold a right response" in message and "\n" not in message


def test_the_config_knows_every_method():
    names = get_args(get_type_hints(config.SearchKeys)["search"])
    assert set(names) == {"none", *METHODS}
    for name in METHODS:
        assert method_of(config.Config(search=name)) == METHODS[name]
    changed = method_of(config.Config(search="cpl", search_width=7, search_c=0.3, search_virtual_loss=1.0))
    assert changed.width == 7 and changed.select.c == 0.3 and changed.select.virtual_loss == 1.0


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--search_simulations 0", "simulations is 0"),
        ("--search_c -1", "c is -1"),
        ("--search_step_tokens 0", "search_step_tokens is 0"),
        ("--objective sppo", "objective sppo needs pairs.targets, which search mcts_dpo does not give"),
        ("--objective t_reg", "objective t_reg needs segments.token_coefs, which search mcts_dpo does not give"),
    ],
)
def test_bad_keys(extra, message, reward, tmp_path, capsys):
    assert train("mcts_dpo", reward, tmp_path / "run", extra) == 2
    assert message in capsys.readouterr().err


def test_step_ends():
    tokenizer = build_tokenizer()
    assert stage.step_ends(tokenizer, "\n") == tokenizer("\n")["input_ids"]
