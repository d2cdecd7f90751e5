"""Response log-probs against the whole logits of the same model, one sequence at a time."""

import copy
import re

import pytest
import torch
from tiny_models import CONTEXT, NAMES, build, random_tokens

from fastpo.errors import FastpoError
from fastpo.models import (
    ResponseScorer,
    collate,
    load_model,
    load_tokenizer,
    response_logps,
    save_model,
    split_by_tokens,
)


def sequences() -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of mixed lengths, the shortest of one token each."""
    prompts, responses = random_tokens(1, 9, 4, 17, 6, seed=1), random_tokens(5, 1, 12, 3, 20, seed=2)
    return list(zip(prompts, responses, strict=True))


@torch.no_grad()
def expected_logps(model, prompt: list[int], response: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[n] from the logits of the one sequence, in float64."""
    model = copy.deepcopy(model).to(dtype)
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]  # [n, V]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000], ids=["one by one", "some", "all at once"])
def test_response_logps_are_those_of_the_whole_logits(name, micro_batch_tokens):
    model = build(name)
    logps, cu_seqlens = response_logps(model, sequences(), micro_batch_tokens=micro_batch_tokens)
    assert logps.dtype == torch.float32 and cu_seqlens.tolist() == [0, 5, 6, 18, 21, 41]
    for i, (prompt, response) in enumerate(sequences()):
        truth = expected_logps(model, prompt, response)
        same_type = expected_logps(model, prompt, response, torch.float32)
        error = (logps[cu_seqlens[i] : cu_seqlens[i + 1]] - truth).abs().max()
        assert error <= 2 * (same_type - truth).abs().max() + 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_whole_logits(name):
    """Scales, softcaps, a bias and tied weights included; float64, so that only a wrong formula can differ."""
    batch, gradients = collate(sequences()), []
    model = build(name).double()
    width = batch.input_ids.shape[1]
    logits = model(input_ids=batch.input_ids).logits[batch.rows // width, batch.rows % width]  # [R, V]
    whole = logits.log_softmax(-1).gather(1, batch.labels[:, None])
    scored = ResponseScorer(model)(batch, batch.logps)
    for logps in (whole, scored):
        model.zero_grad()
        logps.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_lora_on_the_head_is_honoured():
    """Adapters on the body and on the head, their B not zero; through peft's wrapper as the stages see it."""
    peft = pytest.importorskip("peft")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    torch.manual_seed(0)
    model = peft.get_peft_model(build("qwen2"), peft.LoraConfig(**settings)).eval()
    logps, cu_seqlens = response_logps(model, sequences())
    for i, (prompt, response) in enumerate(sequences()):
        truth = expected_logps(model, prompt, response)
        torch.testing.assert_close(logps[cu_seqlens[i] : cu_seqlens[i + 1]].double(), truth, rtol=1e-5, atol=1e-5)


def test_a_model_that_does_more_to_its_logits_is_refused():
    model = build()
    forward = model.forward

    def sharper(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = sharper
    with pytest.raises(FastpoError, match="does more to its logits than its LM head and config say"):
        ResponseScorer(model)


def test_split_by_tokens_keeps_every_index_once_within_the_budget():
    lengths = [5, 50, 7, 7, 30, 1, 12]
    groups = list(split_by_tokens(lengths, 30))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 30 for g in groups)
    assert groups[0] == [1], "longest first, and alone where it is over the budget"
    assert [len(g) for g in split_by_tokens([10] * 9, 20, multiple=2)] == [4, 4, 1]


def test_save_and_load(tmp_path):
    model = build()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert not load_model(tmp_path).training


@pytest.mark.parametrize(
    "bad, message",
    [
        (([2], []), "sequences[1] has an empty response; it should hold at least one token"),
        (([], [2]), "sequences[1] has an empty prompt; it should hold at least one token"),
        (([2] * 60, [2] * 5), f"sequences[1] has 60 + 5 tokens (prompt + response); it should have at most {CONTEXT}"),
    ],
)
def test_bad_sequences(bad, message):
    with pytest.raises(FastpoError, match=re.escape(message)):
        response_logps(build(), [([2], [3]), bad])


def test_missing_model_is_one_line(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(FastpoError, match="cannot be loaded") as caught:
            load(tmp_path / "nothing")
        assert "\n" not in str(caught.value)
