"""A judge's opinions: label probabilities against the model's own logits, parsing, and the columns of the samples."""

import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastpo import embedded, signals
from fastpo.collect import Collector
from fastpo.config import Config
from fastpo.data import Codec
from fastpo.errors import FastpoError
from fastpo.judges import Judge, Rubric, check_judge, mean_known, rubric
from fastpo.models import load_model
from fastpo.tiny import build_bpe_tokenizer, build_llama


@pytest.fixture(scope="module")
def model():
    return embedded.build_model(3).eval()


def judge_of(model, **settings):
    config = Config(**{"data": "embedded", "micro_batch_tokens": 300, "judge_max_new_tokens": 4, **settings})
    return Judge(model, Codec(embedded.build_tokenizer(), config, 256))


def rows_of(judge, *texts):
    codec = judge.codec
    responses = [{"text": t, "ids": codec.response_ids(t), "tokens": len(t), "finished": True} for t in texts]
    row = embedded.problems(0, 1)[0]
    ids = codec.prompt_ids(row["question"])
    return [{"id": "1", "prompt": row["question"], "row": row, "prompt_ids": ids, "responses": responses}]


def test_label_probabilities_are_the_models(model):
    judge = judge_of(model)
    prompts, labels = ["a?", "which one, then?", "b"], ("A", "B", "5")
    found, share = judge.label_probabilities(prompts, labels)
    ids = [ord(label) for label in labels]
    for i, prompt in enumerate(prompts):
        logits = model(torch.tensor([judge.codec.prompt_ids(prompt)])).logits[0, -1].double()
        assert torch.allclose(found[i].double(), logits[ids].softmax(0), atol=1e-6)
        assert share[i].item() == pytest.approx(logits.softmax(0)[ids].sum().item(), rel=1e-5)
    asked = Rubric("{prompt}{response}", labels, (1.0, 2.0, 4.0), "")
    expected = found.double() @ torch.tensor([1.0, 2.0, 4.0]).double()
    assert judge.expected(prompts, asked) == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_label_of_several_tokens_is_refused(model):
    with pytest.raises(FastpoError, match="judge label 'right' is 5 tokens; it should be one"):
        judge_of(model).label_probabilities(["a"], ("right", "no"))


def test_what_a_judge_cannot_be_asked_is_found_before_it_is_asked(model):
    check_judge(judge_of(model, score_by="judge").codec)
    check_judge(judge_of(model, score_by="duels", judge_mode="text").codec)
    with pytest.raises(FastpoError, match=r"judge_template is 'Good\?'; it should hold"):
        check_judge(judge_of(model, score_by="judge", judge_template="Good?").codec)
    with pytest.raises(FastpoError, match="chat_template is set, but the model's tokenizer has none"):
        check_judge(judge_of(model, score_by="judge", chat_template=True).codec)


def half():
    return torch.autocast("cpu", torch.bfloat16)


def test_opinions_under_mixed_precision_are_the_models_under_it(model):
    """Label probabilities, sampled judgements and implicit rewards."""
    judge = replace(judge_of(model), autocast=half)
    found, _ = judge.label_probabilities(["a?"], ("A", "B", "5"))
    with half():
        logits = model(torch.tensor([judge.codec.prompt_ids("a?")])).logits[0, -1].float()
    assert torch.allclose(found[0], logits[[ord(c) for c in "AB5"]].softmax(0), atol=1e-3)
    plain, _ = judge_of(model).label_probabilities(["a?"], ("A", "B", "5"))
    assert not torch.equal(found, plain)
    rows, entered = rows_of(judge, "a", "bb"), []

    @contextmanager
    def counted():
        entered.append(True)
        yield

    replace(judge, autocast=counted).sampled(["a?"], 2, seed=0)
    signals.implicit(rows, {0: model}.get, judge.codec, 1, counted)
    assert len(entered) == 2
    (rounded,), (exact,) = (signals.implicit(rows, {0: model}.get, judge.codec, 1, c) for c in (half, nullcontext))
    assert rounded["scores"] != exact["scores"] and rounded["scores"] == pytest.approx(exact["scores"], rel=2e-2)


def test_the_run_judges_with_the_judges_tokenizer_and_its_own_precision(model, tmp_path):
    """A judge_model of another vocabulary than the policy's; its labels are tokens of its own."""
    tokenizer = build_bpe_tokenizer(["How many? The answer is 4. A B 0 1 2 3 5"] * 3, 300)
    build_llama(Config(num_layers=1, hidden_size=16, num_heads=2), tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = Config(data="embedded", score_by="judge", judge_model=str(tmp_path))
    run = SimpleNamespace(
        config=config, accelerator=SimpleNamespace(autocast=half), judge=lambda _: load_model(tmp_path)
    )
    own = Codec(embedded.build_tokenizer(), config, 256)
    collector = Collector(run, own, None)
    assert len(collector.judge_codec.tokenizer) == len(tokenizer) != len(own.tokenizer)
    rows = rows_of(judge_of(model), "#### 2", "x")
    (columns,) = collector.signals(1, 0, rows)
    judge = Judge(load_model(tmp_path), collector.judge_codec, half)
    assert columns == signals.graded(rows, judge, 0)
    assert Collector(SimpleNamespace(config=Config()), own, None).judge_codec is own


def test_rubrics_read_the_last_verdict():
    grade = rubric("grade", Config(judge_mode="text"))
    assert grade.read("Score: 2? No.\nScore: 4") == 4.0 and grade.read("score 5") == 5.0
    assert grade.read("none") is None and grade.read("Score: 9") is None
    duel = rubric("duel", Config(judge_mode="text"))
    assert duel.read("Verdict: B") == 0.0 and duel.read("verdict: A") == 1.0
    assert "Score" in grade.template and "Verdict" in duel.template
    assert rubric("grade", Config(data="embedded")).read("5") == 5.0


def test_braces_in_a_response_stay():
    asked = Rubric("{prompt}|{response}|{first}", (), (), "")
    assert asked.ask(prompt="{response}", response="x") == "{response}|x|{first}"


def test_own_template_goes_where_it_belongs():
    config = Config(score_by="duels", judge_template="{prompt}: {first} or {second}?")
    assert rubric("duel", config).template == config.judge_template != rubric("meta", config).template
    with pytest.raises(FastpoError, match=r"judge_template is 'Good\?'; it should hold \{response\}"):
        rubric("grade", Config(score_by="judge", judge_template="Good?"))


def test_mean_known():
    assert mean_known([1.0, None, 4.0]) == 2.5 and mean_known([None]) is None and mean_known([]) is None


def test_graded_by_labels_and_by_text(model):
    judge = judge_of(model)
    rows = rows_of(judge, "1+1=2\n#### 2", "#### 7", "x")
    (found,) = signals.graded(rows, judge, seed=0)
    asked = rubric("grade", judge.codec.config)
    prompts = [asked.ask(prompt=rows[0]["prompt"], response=r["text"]) for r in rows[0]["responses"]]
    assert found["scores"] == pytest.approx(judge.expected(prompts, asked))
    text = judge_of(model, judge_mode="text", judge_samples=5)
    (found,) = signals.graded(rows, text, seed=0)
    assert [len(each) for each in found["judgements"]] == [5, 5, 5]
    assert found["scores"] == [mean_known([asked.read(t) for t in each]) for each in found["judgements"]]


def test_only_what_stands_behind_the_marker_is_judged(model):
    judge = judge_of(model, answer_marker="####")
    rows = rows_of(judge, "1+1=2\n#### 2", "9+9=0\n#### 2", "no answer")
    (found,) = signals.graded(rows, judge, seed=0)
    assert found["scores"][0] == found["scores"][1] != found["scores"][2]
    assert signals.visible_lengths(rows[0], judge.codec)["lengths"] == [6, 6, 9]


def test_duels_are_fair_to_both_places(model):
    judge = judge_of(model)
    (found,) = signals.duelled(rows_of(judge, "a", "bb", "a"), judge, seed=0)
    matrix = np.array(found["preferences"])
    assert np.allclose(matrix + matrix.T, 1), "i beats j as often as j loses to i"
    assert matrix[0, 2] == pytest.approx(0.5, abs=1e-6), "equal texts draw, whatever place the judge likes"
    assert found["scores"] == pytest.approx(((matrix.sum(1) - 0.5) / 2).tolist())


@pytest.mark.parametrize("sharing", [True, False])
def test_implicit_rewards_and_consistency(model, sharing):
    judge = judge_of(model)
    codec = replace(judge.codec, config=replace(judge.codec.config, sharing=sharing))
    rows = rows_of(judge, "a", "bb", "1+1=2", "#### 5")
    models = {0: model, 1: embedded.build_model(4).eval(), 2: embedded.build_model(5).eval()}

    def logp(j, i):
        ids = rows[0]["prompt_ids"], rows[0]["responses"][i]["ids"]
        logits = models[j](torch.tensor([[*ids[0], *ids[1]]])).logits[0, len(ids[0]) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[1])[:, None]).sum().item()

    (first,) = signals.implicit(rows, models.get, codec, iteration=1)
    assert first["scores"] == pytest.approx([logp(0, i) / len(rows[0]["responses"][i]["ids"]) for i in range(4)], 1e-4)
    assert "consistency" not in first
    (third,) = signals.implicit(rows, models.get, codec, iteration=3)
    assert third["scores"] == pytest.approx([logp(2, i) - logp(0, i) for i in range(4)], abs=1e-3)
    before = [logp(1, i) - logp(0, i) for i in range(4)]
    order = np.sign(np.subtract.outer(third["scores"], third["scores"]) * np.subtract.outer(before, before))
    assert third["consistency"] == pytest.approx(order.sum() / 12)


def test_embedded_judgements_are_right():
    """Each demonstration's verdict is that of the arithmetic in it."""
    for row in embedded.judgements(0, 300):
        question, answer = row["question"], row["answer"]
        body = question.split("How many?\n")[1]
        if "Grade?" in question:
            assert is_right(question, body.removesuffix("\nGrade?")) == (answer == "5")
        elif "\nB: " in question:
            first, second = body.removeprefix("A: ").removesuffix("\nBetter?").split("\nB: ")
            assert (is_right(question, first), is_right(question, second)) == (
                (True, False) if answer == "A" else (False, True)
            )
        else:
            response, grades = body.split("\nGrade A: ")
            good = "5" if is_right(question, response) else "0"
            assert grades.split(", B: ")[0 if answer == "A" else 1].startswith(good)


def is_right(question, response):
    story = question.split(" has ")[1].split(". How many?")[0]
    words = story.replace(",", "").split()
    total = int(words[0])
    for verb, number in itertools.pairwise(words):
        if number.isdigit():
            total += int(number) if verb in ("gets", "buys", "wins") else -int(number)
    return response.rsplit("#### ", 1)[1] == str(total)


def test_perturbed_questions_have_another_answer():
    for row in embedded.problems(1, 50):
        other = embedded.perturbed(row["question"], 7)
        assert other != row["question"] and other.split(" ")[0] == row["question"].split(" ")[0]
        assert not is_right(other, row["answer"])
