"""The command line in this process: what is parsed, one-line errors, exit codes, and the stages alone on files."""

import json

import pytest

from fastpo import cli, embedded
from fastpo.artifacts import read_jsonl, write_jsonl
from fastpo.commands import COMMANDS
from fastpo.config import Config, key_types


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
        (["pairs", "self_rewarding", "--input", "x"], "score_by judge needs a model that judges"),
        (["demo", "--num_heads", "2"], "num_heads does nothing here; it is for model tiny-llama"),
        (["train", "irpo", "--data", "x", "--warm_start_steps", "9"], "warm_start_steps does nothing here"),
        (["demo", "--search_depth", "4"], "search_depth does nothing here; it is for a search"),
        (["train", "mc_nest", "--search_step_tokens", "9"], "search_step_tokens does nothing here; it is for searches"),
        (["train", "mcts_dpo", "--search_rollouts", "2"], "search_rollouts does nothing here"),
        (["train", "mcts_dpo", "--num_samples", "2"], "num_samples does nothing here; it is for independent samples"),
        (["demo", "--judge_samples", "3"], "judge_samples does nothing here; it is for score_by judge"),
        (["demo", "--contrast_prompts", "a {prompt}", "b {prompt}"], "contrast_prompts does nothing here"),
        (["train", "scpo", "--data", "x", "--pairs_per_prompt", "2"], "pairs_per_prompt does nothing here"),
        (["pairs", "--input", "x", "--vote_threshold", "0.5"], "vote_threshold does nothing here; it is for pair_rule"),
        (["info", "--all"], "info: unrecognized arguments: --all"),
        (["info", "--head", "8", "0", "4"], "info: --head is 8 0 4; it should be three positive numbers"),
        (["info", "--memory_budget", "9"], "memory_budget is 9 bytes; it should be at least"),
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


STAGES = ("sample", "pairs", "score", "evaluate")


@pytest.mark.parametrize("name", [*STAGES, "report", "convert"])
def test_a_key_that_a_command_does_not_use_is_refused(name, capsys):
    """One line that names the key and those that the command takes; an on/off key under both its names."""
    others = key_types().keys() - COMMANDS[name].keys
    flags = [f"--{key}" for key in others] + [f"--no-{key}" for key in ("sharing", "tensorboard") if key in others]
    for flag in flags:
        subject = [] if name in STAGES else ["x"]
        code, out, err = run(capsys, name, *subject, flag, "1")
        assert code == 2 and not out and err.count("\n") == 1
        start, _, taken = err.partition("; it takes ")
        assert start == f"fastpo: error: {name} does not use {flag}"
        assert set(taken.strip().split(", ")) - {"no keys"} >= {*COMMANDS[name].keys}


def test_recipes_may_hold_keys_of_other_stages(tmp_path):
    """One file for all commands: each takes from it what it uses."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rate: 3e-4\nnum_samples: 3\nsearch_depth: 4\n")
    config, arguments = cli.parse(COMMANDS["sample"], [str(recipe), "--top_k", "5"])
    assert (config.learning_rate, config.num_samples, config.top_k) == (3e-4, 3, 5)
    assert arguments.given == {"top_k"}


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "train", "ipro", "--debug")
    assert code == 2 and "Traceback" in err and "recipe ipro not found" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("texts", [("x" * 250 + " {prompt}", "b {prompt}"), ("a {prompt}", "x" * 250 + " {prompt}")])
def test_prompts_that_do_not_fit_what_t_reg_puts_them_into(texts, capsys, tmp_path):
    """Said before anything is trained or sampled, of sampled and of given pairs."""
    number = int(len(texts[1]) > 250)
    command = ("train", "t_reg", "--contrast_prompts", *texts, "--output_dir", tmp_path / "run")
    code, _, err = run(capsys, *command)
    assert code == 2 and f"prompt 0 inside contrast_prompts[{number}] has 30" in err and "the context is 256" in err
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {"config.yaml", "inputs.json", "tensorboard"}

    pair = {"prompt": "1 + 1", "chosen": "#### 2" * 38, "rejected": "#### 3"}  # 5 + 229 tokens
    write_jsonl(tmp_path / "pairs.jsonl", [pair])
    long = ("Put the right answer here: {prompt}", "{prompt}")
    given = ("--preferences", tmp_path / "pairs.jsonl", "--max_new_tokens", 9, "--dry_run")
    code, _, err = run(capsys, "train", "t_reg", *given, "--contrast_prompts", *long[:: 1 - 2 * number])
    assert code == 2 and f"inside contrast_prompts[{number}] has 262 tokens" in err and err.count("\n") == 1


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


def test_every_key_that_a_stage_takes_is_read(capsys, tmp_path, model, prompts, monkeypatch):
    """What is on the command line is looked at by the code behind it: no key is taken and ignored."""
    read = set()

    def getattribute(config, name):
        read.add(name)
        return object.__getattribute__(config, name)

    def go(name, *argv):
        monkeypatch.setattr(Config, "__getattribute__", getattribute)
        assert run(capsys, name, *argv)[0] == 0
        monkeypatch.undo()

    reward, samples, responses = tmp_path / "reward.py", tmp_path / "samples.jsonl", tmp_path / "responses.jsonl"
    reward.write_text("def parity(prompt, response, row):\n    return sum(map(ord, response)) % 2\n")
    write_jsonl(responses, [{"prompt": "1 + 1", "response": "#### 2"}])
    short = ("--model", model, "--max_new_tokens", 8)
    paired = ("--input", samples, "--reward", f"{reward}:parity", "--out", tmp_path / "pairs.jsonl")
    stages = {
        "sample": [(*short, "--data", prompts, "--out", samples)],
        "pairs": [paired, (*paired, "--pair_rule", "max_min", "--length_penalty", 0.1)],
        "score": [(responses, "--model", model, "--out", tmp_path / "scores.jsonl")],
        "evaluate": [(*short, "--data", prompts)],
    }
    idle = {"pairs": {"vote_threshold"}}  # scpo's alone, and no two responses of this model give an answer
    for name, calls in stages.items():
        read.clear()
        for argv in calls:
            go(name, *argv)
        assert read >= set(COMMANDS[name].keys) - idle.get(name, set()), name


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
