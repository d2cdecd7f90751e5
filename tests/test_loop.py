"""A whole run on a tiny budget: killed and resumed it gives the same bytes; what stops it loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastpo import artifacts, cli, stages
from fastpo.artifacts import read_json, read_jsonl, write_jsonl
from fastpo.report import write_report
from fastpo.results import result_rows

ROOT = Path(__file__).resolve().parents[1]
# An untrained model gets no sum right, so the reward is the parity of the text: both sides of a pair exist.
REWARD = "def parity(prompt, response, row):\n    return sum(map(ord, response)) % 2\n"
WATCHED_ONLY = {"timings.jsonl", "report.html", "config.yaml"}  # times, and config holds output_dir
TINY = {
    "iterations": 2,
    "warm_start_steps": 6,
    "warm_start_batch_size": 4,
    "warm_start_examples": 40,
    "prompts_per_iteration": 6,
    "num_samples": 4,
    "max_new_tokens": 10,
    "sample_chunk": 2,
    "batch_size": 3,
    "checkpoint_steps": 2,
    "eval_prompts": 4,
    "eval_pairs": 4,
}


def arguments(output_dir, reward_file, **settings):
    settings = {**TINY, "output_dir": output_dir, "reward": f"{reward_file}:parity", **settings}
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    return ["demo", "--no_tensorboard", *flags]


def spawn(argv):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastpo", *argv]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(argv):
    process = spawn(argv)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output.decode()


def contents(directory):
    """Relative path -> bytes of every artefact: no leftovers are allowed, so nothing else may be there either."""
    files = (p for p in sorted(Path(directory).rglob("*")) if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files if p.name not in WATCHED_ONLY}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices of 32 to 128 columns: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, reward_file):
    """A run that was never stopped."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    finish(arguments(directory, reward_file))
    return directory


def test_artefacts(finished):
    for k in (1, 2):
        folder = finished / f"iteration_{k}"
        names = {p.name for p in folder.iterdir()}
        assert names == {
            *("samples.jsonl", "rewards.jsonl", "pairs.jsonl", "reference.safetensors", "training.jsonl"),
            *("metrics.json", "model", "evaluation.json", "evaluation.jsonl"),
        }
        metrics, evaluation = read_json(folder / "metrics.json"), read_json(folder / "evaluation.json")
        assert metrics["pairs"] == len(read_jsonl(folder / "pairs.jsonl")) > 0
        assert metrics["training"]["steps"] == len(read_jsonl(folder / "training.jsonl"))
        assert {
            "accuracy",
            "worked",
            "topk_mass",
            "pairs_logps_chosen",
            "pairs_logps_chosen_before",
        } <= evaluation.keys()
        assert evaluation["pairs_logps_chosen"] != evaluation["pairs_logps_chosen_before"], "it has trained"
    rows = result_rows(finished)
    assert [row["name"] for row in rows] == ["start", "iteration 1", "iteration 2"]
    assert all(row["seconds"] > 0 for row in rows)


def test_reference_is_the_start_of_the_iteration(finished):
    """The first step's log-ratios are zero: policy and reference are both M_(k-1)."""
    for k in (1, 2):
        first = read_jsonl(finished / f"iteration_{k}" / "training.jsonl")[0]
        assert abs(first["rewards_chosen"]) < 1e-5 and abs(first["rewards_rejected"]) < 1e-5


def test_report_is_one_file_with_everything(finished):
    page = write_report(finished).read_text()
    assert page.count("<svg") >= 8 and "src=" not in page and "href=" not in page.replace("xlink:href", "")
    for text in ("Results", "iteration 2", "Seconds per stage", "samples right", "sample_chunk: 2", "top-10 mass"):
        assert text in page


def test_killed_and_resumed_gives_the_same_bytes(finished, reward_file, tmp_path):
    """Each start is killed as soon as the named file appears: inside stages and between them."""
    argv = arguments(tmp_path / "run", reward_file)
    for moment in (
        "warm_start/checkpoints/step_*",
        "iteration_1/samples.parts/00001.jsonl",
        "iteration_1/.model.tmp/*",
        "iteration_2/reference.safetensors",
        "iteration_2/checkpoints/step_*",
    ):
        kill_when(spawn(argv), tmp_path / "run", moment)
    finish(argv)
    expected, found = contents(finished), contents(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_two_processes_share_the_work(finished, reward_file, tmp_path):
    """Two processes (gloo) sample the same texts, each its own chunks, and train to the same weights up to rounding."""
    argv = arguments(tmp_path / "run", reward_file, iterations=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fastpo", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    for name in ("iteration_1/samples.jsonl", "iteration_1/pairs.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    name = "iteration_1/model/model.safetensors"
    expected, found = (artifacts.read_tensors(folder / name) for folder in (finished, tmp_path / "run"))
    # in the mean: where a gradient is all but zero, Adam turns its rounding into a whole step
    assert all((found[key] - expected[key]).abs().mean() < 1e-4 for key in expected)


def test_without_sharing_the_loss_curve_is_the_same(finished, reward_file, tmp_path):
    """The first iteration: the same samples and pairs, its reference and training response by response."""
    finish([*arguments(tmp_path / "run", reward_file, iterations=1), "--no-sharing"])
    shared, unshared = (
        [row["loss"] for row in read_jsonl(folder / "iteration_1" / "training.jsonl")]
        for folder in (finished, tmp_path / "run")
    )
    assert shared == pytest.approx(unshared, rel=1e-4) and shared != unshared


def kill_when(process, directory, pattern):
    """SIGKILL as soon as a file matches. A run too fast to be caught there has simply finished: equally fine."""
    deadline = time.monotonic() + 240
    while process.poll() is None and not any(directory.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run whose second iteration has stopped after its samples."""
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    for name in ("rewards.jsonl", "pairs.jsonl", "reference.safetensors", "metrics.json", "evaluation.json"):
        (directory / "iteration_2" / name).unlink()
    shutil.rmtree(directory / "iteration_2" / "model")
    return directory


def resume(capsys, directory, reward_file, **settings):
    code = cli.main(arguments(directory, reward_file, **settings))
    return code, capsys.readouterr().err


def test_changed_config_is_refused(capsys, finished, reward_file):
    before = contents(finished)
    code, err = resume(capsys, finished, reward_file, beta=0.5, learning_rate=1e-3)
    assert code == 2 and "beta: None -> 0.5" in err.replace("0.1", "None") and "learning_rate: 5e-05 -> 0.001" in err
    assert contents(finished) == before


def test_more_iterations_go_on(capsys, copy, reward_file):
    samples = (copy / "iteration_2" / "samples.jsonl").stat().st_mtime_ns
    assert resume(capsys, copy, reward_file, iterations=3)[0] == 0
    assert (copy / "iteration_2" / "samples.jsonl").stat().st_mtime_ns == samples, "a finished stage is not run again"
    assert len(result_rows(copy)) == 4


def test_finished_parts_are_not_sampled_again(capsys, copy, reward_file, monkeypatch):
    """Killed while sampling, with one chunk of two prompts done: only the other four prompts are sampled."""
    folder = copy / "iteration_2"
    rows = read_jsonl(folder / "samples.jsonl")
    expected = (folder / "samples.jsonl").read_bytes()
    write_jsonl(folder / "samples.parts" / "00000.jsonl", rows[:2])
    (folder / "samples.jsonl").unlink()
    sampled, real = [], stages.sample

    def counting(model, prompts, *args, num_samples, **settings):
        sampled.extend(p.id for p in prompts if num_samples > 1)
        return real(model, prompts, *args, num_samples=num_samples, **settings)

    monkeypatch.setattr(stages, "sample", counting)
    assert resume(capsys, copy, reward_file)[0] == 0
    assert sampled == [row["id"] for row in rows[2:]]
    assert (folder / "samples.jsonl").read_bytes() == expected


def test_a_reward_that_raises_loses_nothing(capsys, copy, reward_file, tmp_path, monkeypatch):
    samples = (copy / "iteration_2" / "samples.jsonl").read_bytes()
    good = reward_file.read_text()
    try:
        reward_file.write_text("def parity(prompt, response, row):\n    raise KeyError('no score')\n")
        code, err = resume(capsys, copy, reward_file)
        assert code == 1 and err.count("\n") == 1
        assert "the reward raised on prompt 6: KeyError: 'no score' (reward.py:2)" in err
        assert (copy / "iteration_2" / "samples.jsonl").read_bytes() == samples
        assert not (copy / "iteration_2" / "rewards.jsonl").exists()
    finally:
        reward_file.write_text(good)
    assert resume(capsys, copy, reward_file)[0] == 0


def test_no_pairs_says_why(capsys, copy, reward_file):
    good = reward_file.read_text()
    try:
        reward_file.write_text("def parity(prompt, response, row):\n    return 0\n")
        code, err = resume(capsys, copy, reward_file)
    finally:
        reward_file.write_text(good)
    assert code == 1 and "iteration 2 has no pairs: of 6 prompts 0 are answered right" in err and "6 wrong" in err
    assert "take easier prompts" in err


def test_full_disk(capsys, copy, reward_file, monkeypatch):
    real = artifacts.os.fsync

    def full(handle):
        if "rewards" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(artifacts.os, "fsync", full)
    code, err = resume(capsys, copy, reward_file)
    assert code == 1 and "disk full" in err and err.count("\n") == 1
    monkeypatch.undo()
    assert not list(copy.rglob("*.tmp"))
    assert resume(capsys, copy, reward_file)[0] == 0


def test_given_preferences_with_a_tiny_llama(capsys, tmp_path):
    """--preferences, --warm_start and a BPE tokenizer made on the spot: one iteration end to end, no prompts needed."""
    pairs = [
        {
            "prompt": f"What is {i} + 1?",
            "chosen": f"It is {i + 1}.\nA: {i + 1}",
            "rejected": f"A: {i}",
            "weight": 1 + i % 2,
        }
        for i in range(12)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "demos.jsonl", [{"question": p["prompt"], "answer": p["chosen"]} for p in pairs])
    argv = f"""train gsm8k --warm_start {tmp_path}/demos.jsonl --preferences {tmp_path}/pairs.jsonl
        --eval_preferences {tmp_path}/pairs.jsonl --eval_data {tmp_path}/demos.jsonl --eval_prompts 3
        --output_dir {tmp_path}/run --vocab_size 300 --hidden_size 32 --num_layers 1 --num_heads 2
        --warm_start_steps 4 --batch_size 4 --max_new_tokens 8 --no_tensorboard""".split()
    assert cli.main(argv) == 0, capsys.readouterr().err
    rows = result_rows(tmp_path / "run")
    assert len(rows) == 2 and rows[1]["pairs"] == 12
    assert 0 <= rows[1]["heldout_ranking_accuracy"] <= 1
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write(json.dumps(pairs[0]) + "\n")
    code = cli.main(argv)
    assert code == 2 and "preferences" in (err := capsys.readouterr().err) and "changed since the run" in err


def test_scpo_without_gold_answers(capsys, tmp_path):
    """Votes need no reward: prompts without answers train, too. Votes come from a model that always answers."""
    questions = [{"question": f"{i}?"} for i in range(8)]
    write_jsonl(tmp_path / "q.jsonl", questions)
    write_jsonl(
        tmp_path / "demos.jsonl", [{"prompt": f"{i}?", "response": f"A: {j}"} for i in range(8) for j in (1, 1, 2)]
    )
    argv = f"""train scpo --model tiny-llama --data {tmp_path}/q.jsonl --warm_start {tmp_path}/demos.jsonl
        --output_dir {tmp_path}/run --iterations 1 --dtype float32 --vocab_size 260 --hidden_size 32 --num_layers 1
        --num_heads 2 --warm_start_steps 60 --warm_start_batch_size 12 --warm_start_learning_rate 1e-2 --num_samples 8
        --max_new_tokens 6 --temperature 1.0 --vote_threshold 0.3 --num_epochs 1 --batch_size 4 --eval_prompts 2
        --gradient_checkpointing false --no_tensorboard""".split()
    assert cli.main(argv) == 0, capsys.readouterr().err
    rewards = read_jsonl(tmp_path / "run" / "iteration_1" / "rewards.jsonl")
    assert all(reward is None for row in rewards for reward in row["rewards"])
    weights = [row["weight"] for row in read_jsonl(tmp_path / "run" / "iteration_1" / "pairs.jsonl")]
    assert weights and all(0 < w <= 1 for w in weights)
