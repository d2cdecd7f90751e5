"""The command line in this process: what is parsed, one-line errors, exit codes, and the stages alone on files."""

import json

import pytest

from fastpo import cli, embedded
from fastpo.artifacts import read_jsonl, write_jsonl
from fastpo.commands import COMMANDS
from fastpo.config import Config


def run(capsys, *argv):
    """(exit code, stdout, stderr) of ``fastpo argv``."""
    code = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained embedded model on disk."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = embedded.build_tokenizer()
    embedded.build_model(0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, embedded.problems(0, 10))
    return path


def test_overview_and_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"\n  {name} " in out for name in [*COMMANDS, "info"])
    assert run(capsys)[0] == 2
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "example" in out and "writes:" in out, name


def test_recipe_then_command_line_with_dashes_or_underscores(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("num_samples: 5\nbeta: 0.3\ntemperature: [0.8, 1.3]\n")
    argv = [
        str(recipe),
        "--num-samples",
        "7",
        "--max_new_tokens=9",
        "--context_length",
        "none",
        "--skip_bad",
        "--no-tensorboard",
    ]
    config, _ = cli.parse(COMMANDS["train"], argv)
    assert config == Config(
        num_samples=7, beta=0.3, temperature=[0.8, 1.3], max_new_tokens=9, skip_bad=True, tensorboard=False
    )
    assert cli.parse(COMMANDS["demo"], ["--output", "x"])[0] == Config.load("demo", output_dir="x")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train", "irpo", "--bta", "0.2"], "no option --bta; did you mean beta?"),
        (["train", "irpo", "--beta", "x"], "argument --beta: invalid float value"),
        (["train", "irpo", "--beta", "-1"], "beta is -1.0; it should be above 0"),
        (["train", "ipro"], "recipe ipro not found; did you mean irpo?"),
        (["train"], "nothing to train on"),
        (["train", "--data", "embedded"], "model embedded starts untrained"),
        (["train", "demo", "--data", "absent.jsonl"], "cannot read absent.jsonl"),
        (["train", "irpo", "--data", "x", "--model", "/absent/model"], "model /absent/model cannot be loaded"),
        (["demo", "--objective", "irop"], "irpo"),
        (["demo", "--reward", "nope"], "reward is 'nope'"),
        (["demo", "--context_length", "999999"], "context_length is 999999; the model allows at most"),
        (
            ["demo", "--dry_run", "--max_new_tokens", "256"],
            "max_new_tokens is 256; it should be below 256, the context",
        ),
        (
            ["demo", "--dry_run", "--score_by", "judge", "--judge_model", "/absent"],
            "tokenizer /absent cannot be loaded",
        ),
        (
            ["demo", "--dry_run", "--score_by", "judge", "--judge_template", "?"],
            "judge_template is '?'; it should hold {response}",
        ),
        (["demo", "--judge_model", "x"], "judge_model is 'x', which does nothing here"),
        (["sample", "--data", "embedded"], "model embedded is untrained"),
        (["pairs"], "--input is missing"),
        (["pairs", "--input", "x", "--pair_rule", "scpo", "--gold_wins"], "gold_wins is True, which does nothing here"),
        (["pairs", "--input", "x", "--pair_rule", "judgements"], "pair_rule judgements needs a model that judges"),
        (["info", "--all"], "info takes no arguments, not --all"),
        (["report", "/absent"], "/absent holds no run"),
        (["convert", "csv"], "convert knows the format gsm8k, not 'csv'"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("fastpo: error: ") and message in err
    assert not out and not list(tmp_path.iterdir()), "nothing may be written before the arguments are checked"


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "train", "ipro", "--debug")
    assert code == 2 and "Traceback" in err and "recipe ipro not found" in err.strip().splitlines()[-1]


def test_interrupt_is_130(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    code, _, err = run(capsys, "demo")
    assert code == 130 and "kept" in err


def test_dry_run_writes_nothing(capsys, tmp_path):
    code, out, _ = run(capsys, "demo", "--output_dir", tmp_path / "run", "--dry_run")
    assert code == 0 and "iteration 3: 600 prompts x 8 samples" in out
    assert not (tmp_path / "run").exists()


def test_stages_alone(capsys, tmp_path, model, prompts):
    """sample -> pairs -> (what --preferences reads) and score, evaluate, each on files."""
    common = ("--model", model, "--max_new_tokens", 8)
    samples, again = tmp_path / "samples.jsonl", tmp_path / "again.jsonl"
    settings = ("--data", prompts, "--num_samples", 3, "--eval_prompts", 2)
    code, out, _ = run(capsys, "sample", *common, "--data", prompts, "--num_samples", 3, "--out", samples)
    assert code == 0 and "x 3 samples" in out
    assert run(capsys, "sample", *common, "--data", prompts, "--num_samples", 3, "--out", again)[0] == 0
    assert samples.read_bytes() == again.read_bytes(), settings
    assert {len(row["responses"]) for row in read_jsonl(samples)} == {3}

    reward = tmp_path / "reward.py"
    reward.write_text("def parity(prompt, response, row):\n    return sum(map(ord, response)) % 2\n")
    pairs = tmp_path / "pairs.jsonl"
    code, out, _ = run(capsys, "pairs", "--input", samples, "--reward", f"{reward}:parity", "--out", pairs)
    rows = read_jsonl(pairs)
    assert code == 0 and rows and rows[0].keys() == {"id", "prompt", "chosen", "rejected", "weight"}
    code, _, err = run(capsys, "pairs", "--input", samples, "--out", tmp_path / "none.jsonl")
    assert code == 1 and "has no pairs" in err and not (tmp_path / "none.jsonl").exists()

    responses, scores = tmp_path / "responses.jsonl", tmp_path / "scores.jsonl"
    write_jsonl(responses, [{"prompt": r["prompt"], "response": "#### 1" * (1 + i % 2)} for i, r in enumerate(rows)])
    code, _, _ = run(capsys, "score", "--model", model, "--input", responses, "--out", scores)
    assert code == 0
    for i, row in enumerate(read_jsonl(scores)):
        assert row["tokens"] == 6 * (1 + i % 2) + 1
        assert row["logp"] == pytest.approx(row["logp_per_token"] * row["tokens"])
        assert row["logp"] < 0

    numbers = tmp_path / "evaluation.json"
    code, out, _ = run(capsys, "evaluate", *common, "--eval_data", prompts, "--eval_prompts", 4, "--out", numbers)
    assert code == 0 and "accuracy" in out
    assert json.loads(numbers.read_text())["problems"] == 4


def test_malformed_jsonl_and_skip_bad(capsys, tmp_path, model, prompts, caplog):
    with open(prompts, "a") as file:
        file.write("{broken\n")
    argv = ("sample", "--model", model, "--data", prompts, "--max_new_tokens", 2, "--num_samples", 1)
    code, _, err = run(capsys, *argv, "--out", tmp_path / "s.jsonl")
    assert code == 2 and f"{prompts}:11: not JSON" in err
    assert run(capsys, *argv, "--out", tmp_path / "s.jsonl", "--skip-bad")[0] == 0
    assert "skipped 1 bad lines" in caplog.text


def test_prompt_longer_than_the_context(capsys, tmp_path, model):
    write_jsonl(tmp_path / "p.jsonl", [{"question": "x" * 300}] * 1)
    argv = ("sample", "--model", model, "--data", tmp_path / "p.jsonl", "--max_new_tokens", 8, "--out", tmp_path / "s")
    code, _, err = run(capsys, *argv)
    assert code == 2 and "prompt 1 has 301 tokens with max_new_tokens 8; the context is 256" in err
