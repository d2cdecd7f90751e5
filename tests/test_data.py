"""Reading prompts, preferences and demonstrations: every complaint names file and line, --skip_bad counts."""

import json

import pytest

from fastpo import embedded
from fastpo.config import Config
from fastpo.convert import convert_gsm8k
from fastpo.data import (
    Codec,
    evaluation_prompts,
    load_demonstrations,
    load_prompts,
    parse_demonstration,
    parse_preference,
    parse_prompt,
    read_rows,
    training_prompts,
)
from fastpo.errors import FastpoError
from fastpo.tiny import build_bpe_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows))
    return str(path)


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, "no 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejectd": "b"}, "did you mean rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "'chosen' is an empty response"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is a int"),
        ({**GOOD, "weight": -1}, "'weight' is -1"),
        ({**GOOD, "weight": "x"}, "'weight' is 'x'"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "a message should be"),
        ({"prompt": "p", "chosen": [], "rejected": "b"}, "'chosen' is a list of 0"),
        ("{broken", "not JSON"),
    ],
)
def test_bad_preferences(tmp_path, row, reason):
    path = write(tmp_path / "pairs.jsonl", [GOOD, row, GOOD])
    with pytest.raises(FastpoError, match=rf"pairs\.jsonl:2: .*{reason}.*--skip_bad"):
        read_rows(path, parse_preference)
    rows, skipped = read_rows(path, parse_preference, skip_bad=True)
    assert len(rows) == 2 and len(skipped) == 1 and "pairs.jsonl:2" in skipped[0]


def test_no_usable_rows(tmp_path):
    with pytest.raises(FastpoError, match=r"holds no usable rows \(1 bad lines\)"):
        read_rows(write(tmp_path / "x.jsonl", ["nope"]), parse_prompt, skip_bad=True)


def test_accepted_forms():
    chat = [{"role": "user", "content": "p"}]
    preference = parse_preference(
        {"prompt": chat, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}, 4
    )
    assert (preference.prompt, preference.chosen, preference.id, preference.weight) == (chat, "a", "4", 1.0)
    assert parse_prompt({"question": "q", "answer": 7}, 1).answer == "7"
    assert parse_prompt({"prompt": "q", "id": "x"}, 1).id == "x"
    assert parse_demonstration({"question": "q", "answer": "a"}, 1).response == "a"


def test_prompts_are_fresh_per_iteration_and_never_held_out(tmp_path):
    data = write(tmp_path / "d.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(50)])
    config = Config(data=data, prompts_per_iteration=16, eval_prompts=5)
    parts = [{p.id for p in training_prompts(config, k)} for k in (1, 2, 3)]
    held = {p.id for p in evaluation_prompts(config)}
    assert [len(part) for part in parts] == [16, 16, 16] and len(held) == 5
    assert not parts[0] & parts[1] and not held & set.union(*parts)
    assert [p.id for p in training_prompts(config, 1)] == [p.id for p in training_prompts(config, 1)]
    assert len(training_prompts(Config(data=data, prompts_per_iteration=None, eval_prompts=5), 1)) == 45


def test_embedded_prompts_are_fresh_too():
    config = Config(data="embedded", prompts_per_iteration=10, eval_prompts=10)
    first, second = training_prompts(config, 1), training_prompts(config, 2)
    assert [p.id for p in second] == [str(i) for i in range(10, 20)]
    assert {p.text for p in first}.isdisjoint(p.text for p in evaluation_prompts(config))


def test_equal_ids_are_refused(tmp_path):
    data = write(tmp_path / "d.jsonl", [{"id": 1, "question": "a"}, {"id": 1, "question": "b"}])
    with pytest.raises(FastpoError, match="two rows have the id '1'"):
        load_prompts(Config(data=data))


def codec(**settings):
    return Codec(embedded.build_tokenizer(), Config(**settings), context=32)


def test_codec_round_trip_and_template():
    coder = codec(prompt_template="Q: {prompt}\nA: ")
    assert coder.text(coder.prompt_ids("1+1?")) == "Q: 1+1?\nA: "
    ids = coder.response_ids("two")
    assert ids[-1] == coder.tokenizer.eos_token_id and coder.text(ids) == "two"


def test_messages_need_a_chat_template():
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(FastpoError, match="need --chat_template"):
        codec().prompt_ids(messages)
    with pytest.raises(FastpoError, match="tokenizer has none"):
        codec(chat_template=True).prompt_ids(messages)
    coder = codec(chat_template=True)
    coder.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    assert coder.text(coder.prompt_ids(messages)) == "<user>hello<assistant>"
    assert coder.text(coder.prompt_ids("hello")) == "<user>hello\n<assistant>"


def test_prompts_longer_than_the_context(caplog):
    prompts = [parse_prompt({"question": "x" * n}, i) for i, n in enumerate((5, 40), start=1)]
    lengths = [len(p.text) for p in prompts]

    def name(prompt):
        return f"prompt {prompt.id}"

    message = "prompt 2 has 40 tokens with max_new_tokens 8; the context is 32, so it should have at most 24"
    with pytest.raises(FastpoError, match=message):
        codec().fitting(prompts, lengths, name, room=8)
    assert codec(skip_bad=True).fitting(prompts, lengths, name, room=8) == prompts[:1]
    assert "skipped 1 of 2" in caplog.text
    with pytest.raises(FastpoError, match="nothing fits"):
        codec(skip_bad=True).fitting(prompts[1:], lengths[1:], name)
    assert codec().fitting([], [], name) == []


def test_bpe_tokenizer_is_exact_and_reproducible():
    texts = ["Natalia sold 48 clips in May.", "naïve 12 + 7 = 19\n"] * 20
    first, second = (build_bpe_tokenizer(texts, 300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) <= 300 and (first.pad_token_id, first.eos_token_id) == (0, 1)
    text = "Unseen: 日本 48/2 = 24\n"
    assert first.decode(first(text)["input_ids"]) == text
    assert first.tokenize("48") == ["4", "8"]  # digits stand alone
    with pytest.raises(FastpoError, match="vocab_size is 100; it should be at least 258"):
        build_bpe_tokenizer(texts, 100)


def solutions(*correct):
    return {f"m{i}": {"is_correct": ok, "solution": f"s{i} <<1+1=2>>2\nA: {i}"} for i, ok in enumerate(correct)}


def test_convert_gsm8k(tmp_path):
    problems = write(
        tmp_path / "train.jsonl", [{"question": f"q{i}", "answer": "1+1=<<1+1=2>>2\n#### 2"} for i in range(10)]
    )
    made = convert_gsm8k(problems, tmp_path / "d.jsonl", holdout=0.2)
    assert (made.kind, made.rows, made.held_out) == ("demonstrations", 10, 2)
    rows = load_demonstrations(Config(warm_start=str(tmp_path / "d.jsonl")))
    assert len(rows) == 8 and rows[0].response == "1+1=2\nA: 2"
    assert load_prompts(Config(data=str(tmp_path / "d.heldout.jsonl")))[0].answer == "1+1=2\nA: 2"

    labelled = write(
        tmp_path / "solutions.jsonl",
        [
            {"question": "a", "ground_truth": "A: 1", **solutions(True, False, False)},
            {"question": "b", "ground_truth": "A: 1", **solutions(True, True)},
        ],
    )
    made = convert_gsm8k(labelled, tmp_path / "p.jsonl")
    assert (made.kind, made.problems, made.rows) == ("preferences", 1, 2)
    rows, _ = read_rows(tmp_path / "p.jsonl", parse_preference)
    assert [(r.id, r.chosen, r.rejected) for r in rows] == [
        ("1-0", "s0 2\nA: 0", "s1 2\nA: 1"),
        ("1-1", "s0 2\nA: 0", "s2 2\nA: 2"),
    ]
    with pytest.raises(FastpoError, match="rows have the keys x"):
        convert_gsm8k(write(tmp_path / "x.jsonl", [{"x": 1}]), tmp_path / "y.jsonl")
