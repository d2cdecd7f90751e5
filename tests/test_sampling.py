"""Sampling against transformers' own generate (greedy) and against the exact distribution (random)."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import EOS, NAMES, PAD, build, random_tokens

from fastpo.errors import FastpoError
from fastpo.sampling import Request, generate, pick_tokens

COMMON = {"eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 16}


def prompts(number: int = 7) -> list[list[int]]:
    return random_tokens(*range(3, 3 + 2 * number, 2))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers_generate(name):
    model = build(name)
    found = generate(model, prompts(), temperature=0, batch_size=4, **COMMON)
    for prompt, responses in zip(prompts(), found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, **COMMON
        )
        assert responses == [expected[0, len(prompt) :].tolist()]


def test_samples_do_not_depend_on_the_batch_size():
    """5 samples: a batch of 1 holds one prompt, 12 hold two, 1000 all of them; rows finish and leave throughout."""
    model = build()
    runs = [generate(model, prompts(), num_samples=5, seed=3, batch_size=size, **COMMON) for size in (1, 12, 1000)]
    assert runs[0] == runs[1] == runs[2]
    lengths = {len(response) for responses in runs[0] for response in responses}
    assert len(lengths) > 5, "the prompts should finish at different steps, or this tests nothing"
    assert runs[0] != generate(model, prompts(), num_samples=5, seed=4, **COMMON)


def test_random_numbers_belong_to_the_position_in_the_call():
    """Equal prompts draw differently; what stands at the other positions does not matter."""
    first, second = generate(build(), [prompts()[0]] * 2, num_samples=5, seed=3, **COMMON)
    assert first != second
    assert second == generate(build(), [prompts()[5], prompts()[0]], num_samples=5, seed=3, **COMMON)[1]


def test_responses_end_with_their_only_end_of_sequence_or_at_the_limit():
    found = generate(build(), prompts(), num_samples=8, seed=0, **COMMON)
    for response in (response for responses in found for response in responses):
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == COMMON["max_new_tokens"]


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),  # 0.4 + 0.3 < 0.8 <= 0.4 + 0.3 + 0.15
        ({"top_k": 2, "top_p": 0.5}, [0]),  # of the two kept, the first has 4/7 of the mass
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
    ],
)
def test_the_sampled_distribution_is_the_restricted_softmax(settings, kept):
    """Uniform numbers on a grid make the shares of the tokens exact up to the grid's step."""
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    order = torch.tensor([3, 0, 4, 1, 2])  # token ids are not in the order of their probability
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **settings}
    request = Request(num_samples=1, max_new_tokens=1, eos_token_id=EOS, pad_token_id=PAD, seed=0, **values)
    steps = 20_000
    logits = torch.empty(5).scatter(0, order, probabilities.log())
    tokens = pick_tokens(logits.expand(steps, 5), torch.arange(steps) / steps, request)
    shares = torch.bincount(tokens, minlength=5)[order] / steps
    expected = torch.zeros(5)
    expected[kept] = probabilities[kept] ** (1 / values["temperature"])
    torch.testing.assert_close(shares, expected / expected.sum(), atol=1e-3, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    request = Request(1, 1, 1.0, 1.0, 0, EOS, PAD, 0)
    assert pick_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), request).tolist() == [1, 3, 3]


def test_nan_logits_are_reported():
    model = build()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(FastpoError, match="the model's logits are NaN"):
            generate(model, prompts(2), temperature=temperature, **COMMON)


def test_a_peft_model_is_given_positions():
    """Its forward takes any keywords; left padding shifts the absolute positions of GPT-2 all the same."""
    model = build("gpt2")
    expected = generate(model, prompts(), temperature=0, **COMMON)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True))
    assert generate(adapted, prompts(), temperature=0, **COMMON) == expected


def test_training_mode_is_left_as_it_was():
    model = build().train()
    generate(model, prompts(1), **COMMON)
    assert model.training


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_samples": 0}, "num_samples is 0; it should be 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0; it should be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it should be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1; it should be 0"),
        ({"batch_size": 0}, "batch_size is 0; it should be 1 or more"),
        ({"prompts": [[2], []]}, r"prompts\[1\] is empty; it should hold at least one token"),
        (
            {"prompts": [[2] * 49]},
            r"prompts\[0\] has 49 tokens; .* it should have at most 48 \(the model's context is 64",
        ),
    ],
)
def test_bad_arguments(settings, message):
    arguments = {"prompts": prompts(1), **COMMON, **settings}
    with pytest.raises(FastpoError, match=message):
        generate(build(), arguments.pop("prompts"), **arguments)
