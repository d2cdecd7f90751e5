"""``fastpo score``: forms of rows, forms of output, parts that survive a kill."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_cli import run
from tiny_models import build
from tree_cases import alone

from fastpo import score_files
from fastpo.artifacts import read_jsonl, write_jsonl
from fastpo.score_files import Parts, parse_scored, score_rows
from fastpo.tiny import build_bpe_tokenizer

TEXTS = ["what is two and two? it is four.", "two and two? it is five, or four."]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_bpe_tokenizer(TEXTS, 280)
    model = build()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ROWS = [
    {"prompt": "two and", "responses": [" two", " two? it is", " four"]},
    {"question": "two?", "answer": " four", "id": "x"},
    {"tokens": [[5, 6, 7, 8], [5, 6, 9]], "start": 2},
    {"tokens": [5, 6, 7], "start": 1},
]


def test_tokens_that_the_model_does_not_know(model_folder, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", [*ROWS, {"tokens": [5, 6, 10**6], "start": 1}])
    command = ("score", tmp_path / "in.jsonl", "--model", model_folder, "--out", tmp_path / "out.jsonl")
    code, _, error = run(capsys, *command)
    assert code == 2 and "in.jsonl:5: 'tokens' holds 1000000; it should hold ids below" in error
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl"}, "nothing was scored, nothing is left"


def test_every_form_of_row(model_folder, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", ROWS)
    command = ("score", tmp_path / "in.jsonl", "--model", model_folder)
    code, _, error = run(capsys, *command, "--out", tmp_path / "out.jsonl")
    assert code == 0, error
    many, one, nested, tokens = read_jsonl(tmp_path / "out.jsonl")
    assert [s["tokens"] for s in nested["scores"]] == [2, 1] and len(many["scores"]) == 3
    assert one.keys() == {"prompt", "response", "logp", "logp_per_token", "tokens"}

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    wanted = alone(model, [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7]], [2, 2, 1]).detach()
    found = [*(s["logp"] for s in nested["scores"]), tokens["scores"][0]["logp"]]
    torch.testing.assert_close(torch.tensor(found), torch.stack([wanted[:2].sum(), wanted[2], wanted[3:].sum()]))
    assert tokens["scores"][0]["logp_per_token"] == pytest.approx(found[2] / 2)

    assert run(capsys, *command, "--out", tmp_path / "out.safetensors")[0] == 0
    saved = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(saved["logps"][-5:], wanted)
    assert saved["cu_seqlens"].diff().tolist()[-3:] == [2, 1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.safetensors"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "responses": []}, "'responses' is [], it should be a list of at least one text"),
        (
            {"tokens": [[1, 2]], "start": 2},
            "'start' is 2; it should be the length of the prompt, at least 1 and below 2",
        ),
        ({"tokens": [1, 2.5], "start": 1}, "'tokens' holds something else than token ids"),
        ({"tokens": []}, "'tokens' is empty or no list"),
        ({"tokens": [1, 2]}, "'start' is None"),
    ],
)
def test_rows_that_do_not_fit(row, complaint, tmp_path, capsys, model_folder):
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    command = ("score", tmp_path / "in.jsonl", "--model", model_folder, "--out", tmp_path / "out.jsonl")
    code, _, error = run(capsys, *command)
    assert code == 2 and "in.jsonl:1: " in error and complaint in error and error.count("\n") == 1


def test_a_response_beyond_the_context(tmp_path, capsys, model_folder):
    write_jsonl(tmp_path / "in.jsonl", [{"tokens": [5] * 70, "start": 1}])
    code, _, error = run(capsys, "score", tmp_path / "in.jsonl", "--model", model_folder)
    assert code == 2 and "line 1 has 70 tokens; the context is 64" in error


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(score_files, "_PART", 1)
    sequences = [parse_scored({"tokens": [1, 2, 3 + k], "start": 1}, k).sequences(None) for k in range(6)]
    scored, done = [], []

    def score(part, progress, limit):
        if len(scored) == limit:
            raise KeyboardInterrupt
        scored.append(len(part))
        progress(len(part))
        return torch.full((2 * len(part),), float(len(scored))), torch.arange(0, 2 * len(part) + 1, 2)

    def go(settings, limit=99):
        parts = Parts(tmp_path / "out.jsonl", settings)
        return score_rows(sequences, lambda *part: score(*part, limit), parts, 6, done.append)

    with pytest.raises(KeyboardInterrupt):
        go({"model": "a"}, limit=2)
    logps, cu_seqlens = go({"model": "a"})
    assert scored == [2, 2, 2] and logps.tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    assert cu_seqlens.tolist() == [0, 2, 4, 6, 8, 10, 12] and sum(done[2:]) == 6
    go({"model": "b"})  # parts of another model are no use
    assert scored == [2] * 6
