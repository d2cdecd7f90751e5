"""linear_preference_loss against its spec in fp64: all logits, then preference_loss. Errors as same-type torch's."""

import pytest
import torch
from linear_preference_loss_cases import (  # noqa: F401
    BUDGETS,
    DTYPES,
    HEADS,
    LEAVES,
    H,
    Problem,
    V,
    backend,
    check,
    counted_operations,
    largest,
    preset,
    small_tiles,
)

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import linear_preference_loss, reference
from fastpo.kernels.token_logprobs import STATS
from fastpo.types import Pairs


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_preset(name):
    """In several groups, with the gradients of the segments' fields where a preset needs them."""
    objective, tuples = preset(name)
    check(Problem(objective, tuples=tuples), memory_budget=BUDGETS["several groups"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_heads_types_and_budgets(head, budget, dtype):
    check(Problem(objectives.irpo(), **head), dtype, memory_budget=budget)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("train", [(), *((name,) for name in LEAVES), ("hidden", "lora_a")], ids="+".join)
def test_each_gradient_alone(train, budget):
    """No gradient at all, frozen heads, frozen hidden states, LoRA factors alone."""
    check(Problem(objectives.irpo(), **HEADS["lora"]), train=train, memory_budget=budget)


def test_fields_of_the_segments():
    """w, K, k, u and v, all with gradients; v is a term of the loss that the mean over tuples does not divide."""
    problem = Problem(objectives.irpo())
    generator = torch.Generator().manual_seed(3)
    for name in ("weights", "kl", "kl_weights", "nll_weights", "token_coefs"):
        problem.fields[name] = torch.rand(problem.num_tokens, generator=generator)
    for name in ("weights", "margins", "soft_labels", "beta_scales"):
        problem.columns[name] = torch.rand(len(problem.index), generator=generator)
    check(problem, memory_budget=BUDGETS["several groups"])


@pytest.mark.parametrize("name", ["irpo", "cpo", "orpo", "sppo"])
def test_independent_of_the_grouping(name):
    """To 1e-6; cpo and orpo normalise by the tokens of all tuples."""
    objective, tuples = preset(name)
    problem = Problem(objective, tuples=tuples, **HEADS["lora"])
    out, grads = problem.call(linear_preference_loss, torch.float32)
    for budget in (130_000, BUDGETS["several groups"], BUDGETS["recomputed"]):
        other, other_grads = problem.call(linear_preference_loss, torch.float32, memory_budget=budget)
        torch.testing.assert_close(other.loss, out.loss, rtol=1e-6, atol=1e-6)
        for key, grad in grads.items():
            assert largest(grad - other_grads[key]) <= 1e-6 * max(1.0, largest(grad)), key


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_runs(dtype, budget):
    problem = Problem(objectives.irpo(), **HEADS["lora"])
    first, again = (problem.call(linear_preference_loss, dtype, memory_budget=budget) for _ in range(2))
    assert torch.equal(first[0].loss, again[0].loss)
    assert all(torch.equal(grad, again[1][name]) for name, grad in first[1].items())


def test_shared_rows_of_a_tree():
    """Several labels per hidden row, rows that labels of different groups share, rows that nothing asks for."""
    problem = Problem(objectives.irpo(), **HEADS["softcap"])
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, problem.num_tokens // 2, (problem.num_tokens,), generator=generator)
    rows[40:60] = rows[0:20]
    problem.labels[40:50] = problem.labels[0:10]
    problem.settings["rows"] = rows
    for budget in BUDGETS.values():
        check(problem, memory_budget=budget)


@pytest.mark.parametrize("own_head", [True, False], ids=["its own head", "the policy's head"])
def test_reference_in_the_same_call(monkeypatch, own_head):
    """Equal to passing its log-probs, 1F more; the policy's head is taken without its adapters."""
    operations = counted_operations(monkeypatch)
    problem = Problem(objectives.dpo(), **HEADS["lora"])
    generator = torch.Generator().manual_seed(7)
    more = {"ref_hidden": torch.randn(problem.num_tokens, H, generator=generator)}
    if own_head:
        more |= {"ref_weight": torch.randn(V, H, generator=generator), "ref_bias": torch.randn(V, generator=generator)}
    problem.ref_logps = None
    expected, expected_grads = problem.call(reference.spec, torch.float32, **more)
    out, grads = problem.call(linear_preference_loss, torch.float32, **more)
    assert sum(operations) == 2 * int(problem.segments().mask.sum()) * V * (4 * H + 3)  # and LoRA's part of dhidden
    torch.testing.assert_close(out.loss, expected.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)


def test_statistics_of_tokens():
    problem = Problem(objectives.irpo(), **HEADS["softcap"])
    more = {"stats": ("logps", *STATS), "topk": 5, "label_set": torch.tensor([3, 250])}
    alone, _ = problem.call(linear_preference_loss, torch.float32)
    for budget in BUDGETS.values():
        (out, stats), _ = problem.call(linear_preference_loss, torch.float32, memory_budget=budget, **more)
        torch.testing.assert_close(out.loss, alone.loss, rtol=1e-6, atol=1e-6)
        mask = problem.segments().mask
        labels = torch.where(mask, problem.labels, -100)
        settings = {name: problem.settings[name] for name in ("logit_softcap", "logit_scale")}
        expected = reference.from_hidden.spec(
            problem.leaves["hidden"], problem.leaves["weight"], labels, bias=problem.leaves["bias"], topk=5,
            label_set=more["label_set"], temperature=problem.temperature, **settings,
        )  # fmt: skip
        assert list(stats) == list(more["stats"])
        for name, values in stats.items():
            assert not values.requires_grad
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)


def test_empty_and_all_masked():
    """Nothing to compute: a loss of 0 and gradients of 0, never NaN."""
    for lengths, tuples in (((0, 0), ((0, 1),)), ((), ()), ((4, 5), ()), ((6, 7), ((0, 1),))):
        problem = Problem(objectives.irpo(), lengths, tuples, **HEADS["lora"])
        problem.mask[:] = not tuples
        check(problem)


def test_upstream_gradient_and_a_retained_graph():
    """The gradients scale with what comes from above, and a second backward gives them again."""
    problem = Problem(objectives.irpo())
    hidden, weight = (problem.leaves[name].requires_grad_() for name in ("hidden", "weight"))
    given = (hidden, weight, problem.labels, problem.ref_logps, problem.segments(), Pairs(problem.index))
    loss = linear_preference_loss(*given, problem.objective).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), torch.tensor(1.0).expand(()), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    twice = torch.autograd.grad(2 * loss, (hidden, weight))  # the last one: what was saved is scaled in place
    for a, b, c, d in zip(once, again, thrice, twice, strict=True):
        assert torch.equal(a, b) and torch.equal(3 * a, c) and torch.equal(2 * a, d)


def test_strided_views_and_batched_hidden_states():
    problem = Problem(objectives.dpo())
    n = problem.num_tokens - problem.num_tokens % 3
    lengths = (n // 3, n // 3, n // 3)
    problem = Problem(objectives.dpo(), lengths, ((0, 1), (2, 1)))
    expected, _ = problem.call(linear_preference_loss, torch.float32)
    wide = torch.stack((problem.leaves["hidden"], problem.leaves["hidden"]), dim=1).view(3, n // 3, 2 * H)
    weight = problem.leaves["weight"].t().contiguous().t()
    labels = problem.labels.view(3, -1).to(torch.int32)
    given = (problem.ref_logps.double().float(), problem.segments(), Pairs(problem.index), problem.objective)
    out = linear_preference_loss(wide[..., :H], weight, labels, *given)
    torch.testing.assert_close(out.loss, expected.loss)
