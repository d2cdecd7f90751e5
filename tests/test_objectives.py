"""Every preset against its formula in fp64, values and gradients; names, settings, mistakes."""

from dataclasses import replace

import objective_formulas
import objective_formulas_columns
import pytest
import torch
from objective_data import data_of

from fastpo import objectives
from fastpo.objectives import PRESETS, Objective, Term, by_name

FORMULAS = objective_formulas.FORMULAS | objective_formulas_columns.FORMULAS
GRADIENTS = ("logps", "kl", "weights", "nll_weights")  # of the tokens, where the formula has them


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    """Loss and gradients: by the log-probs, by K and by the masks of SparsePO, all in fp64."""
    data = data_of(name)
    leaves = [getattr(data, field).requires_grad_() for field in GRADIENTS]
    ours, by_hand = FORMULAS[name](data)
    torch.testing.assert_close(ours, by_hand.mean())
    options = {"allow_unused": True, "retain_graph": True}
    grads = (torch.autograd.grad(loss, leaves, **options) for loss in (ours, by_hand.mean()))
    for field, own, hand in zip(GRADIENTS, *grads, strict=True):
        none = torch.zeros_like(data.logps)
        own, hand = (none if g is None else g for g in (own, hand))
        torch.testing.assert_close(own, hand, msg=lambda text, field=field: f"by {field}: {text}")


def test_every_preset_has_a_formula():
    assert {name.partition("__")[0] for name in FORMULAS} == set(PRESETS)


def test_by_name():
    assert by_name("irpo", beta=0.2, alpha=0.5) == objectives.irpo(0.2, 0.5)
    assert all(by_name(name).name == name for name in PRESETS)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: by_name("irp"), "objective is 'irp'; it should be one of .* (did you mean 'irpo'?)"),
        (lambda: by_name("irpo", bta=1), "setting of objective irpo is 'bta'; .* (did you mean 'beta'?)"),
        (lambda: Term(link="logstic"), "link is 'logstic'; .* (did you mean 'logistic'?)"),
        (lambda: replace(objectives.dpo(), phi="log"), "phi is 'log'; it should be one of identity, log1mexp"),
        (lambda: replace(objectives.dpo(), nll_normalizer="x"), "nll_normalizer is 'x'"),
        (lambda: replace(objectives.dpo(), reduction="avg"), "reduction is 'avg'"),
        (lambda: replace(objectives.dpo(), score_map="power"), "score_map_coef is 0"),
        (lambda: Objective("none", ()), "terms and nll are empty"),
        (lambda: objectives.robust(label_smoothing=0.5), "label_smoothing is 0.5; robust needs it in [0, 0.5)"),
        (lambda: objectives.exo_pair(epsilon=0.0), "epsilon is 0.0; exo_pair needs it in (0, 1)"),
        (lambda: objectives.f_dpo(divergence="kl"), "divergence is 'kl'"),
    ],
)
def test_mistakes_are_named_in_one_line(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    start, *rest = message.split(" .* ")
    assert text.startswith(start) or start in text
    assert all(part in text for part in rest) and "\n" not in text
