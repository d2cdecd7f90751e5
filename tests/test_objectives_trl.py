"""Presets against TRL 1.16's own code: DPOTrainer._compute_loss, run on given log-probs."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import Objective, Term
from fastpo.types import Pairs, Segments

P, LENGTH = 6, 12

TRL = [
    ("sigmoid", {}, objectives.dpo(0.1)),
    ("sigmoid_norm", {}, objectives.dpo(0.1, length_power=1.0)),
    ("hinge", {}, objectives.hinge(0.1)),
    ("ipo", {}, objectives.ipo(0.1, average=True)),
    ("exo_pair", {"label_smoothing": 0.05}, objectives.exo_pair(0.1, 0.05)),
    ("nca_pair", {}, objectives.nca_pair(0.1)),
    ("robust", {"label_smoothing": 0.2}, objectives.robust(0.1, 0.2)),
    ("bco_pair", {}, objectives.bco_pair(0.1)),
    ("sppo_hard", {}, objectives.sppo_hard(0.1)),
    ("apo_zero", {}, objectives.apo_zero(0.1)),
    ("apo_down", {}, objectives.apo_down(0.1)),
    ("discopop", {}, objectives.discopop(0.1, 0.05)),
    ("sft", {}, objectives.sft()),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, objectives.f_dpo(0.1, "forward_kl")),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, objectives.f_dpo(0.1, "js")),
    ("sigmoid", {"f_divergence_type": "alpha_divergence"}, objectives.f_dpo(0.1, "alpha", 0.5)),
    # Two losses of TRL at once: CPO's normaliser with DPO's term.
    ("sigmoid+sft", {}, Objective("both", (Term(),), nll=(1.0, 0.0), nll_normalizer="batch")),
]


def trl_loss(losses: str, padded: Tensor, ref: Tensor, mask: Tensor, **settings) -> Tensor:
    """DPOTrainer._compute_loss on a model whose log-probs [2P, L] are given; chosen sequences first."""
    pytest.importorskip("trl", reason='needs pip install ".[peers]"')
    from trl import DPOTrainer

    def model(log_probs: Tensor):
        zeros = torch.zeros_like(log_probs)
        outputs = {"log_probs": log_probs, "entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return lambda **_: SimpleNamespace(**outputs, aux_loss=None)

    def same(x: Tensor) -> Tensor:
        return x

    policy = torch.nn.Module()
    policy.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=policy,
        ref_model=model(ref),
        accelerator=SimpleNamespace(device=padded.device, gather=same, gather_for_metrics=same),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        beta=0.1,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        loss_types=losses.split("+"),
        loss_weights=[1.0] * len(losses.split("+")),
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.__dict__.update(settings)
    # The trainer drops the first column of its mask: log-prob t predicts token t + 1.
    completion_mask = F.pad(mask.long(), (1, 0))
    inputs = {"input_ids": completion_mask, "attention_mask": completion_mask, "completion_mask": completion_mask}
    return DPOTrainer._compute_loss(trainer, model(padded), inputs, return_outputs=False)


@pytest.mark.parametrize(
    "losses, settings, objective", TRL, ids=lambda x: x if isinstance(x, str) else getattr(x, "name", None)
)
def test_trl(losses, settings, objective):
    """The loss and the gradient of TRL 1.16 in fp32, on the same tokens padded."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (2 * P, 1), generator=generator)
    padded, ref = (-2 * torch.rand(2 * P, LENGTH, generator=generator) - 0.1 for _ in range(2))
    padded, ref = (padded * mask).requires_grad_(), ref * mask
    theirs = trl_loss(losses, padded, ref, mask, **settings)
    (their_grad,) = torch.autograd.grad(theirs, padded)

    logps = padded.detach()[mask].requires_grad_()
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
    pairs = Pairs.of(torch.arange(P), torch.arange(P) + P)
    reference = ref[mask] if objective.needs_reference else None
    ours = preference_loss(logps, reference, Segments(cu_seqlens), pairs, objective).loss
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, logps)[0], their_grad[mask], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("paired", [True, False], ids=["aot", "aot_unpaired"])
def test_aot_is_dpo_on_pairs_by_rank(paired):
    """TRL's sorted losses: tuples of equal ranks; for the paired one the sorted reference difference is a margin."""
    padded, ref = -torch.rand(2 * P, LENGTH), -torch.rand(2 * P, LENGTH)
    mask = torch.ones(2 * P, LENGTH, dtype=torch.bool)
    theirs = trl_loss("aot" if paired else "aot_unpaired", padded, ref, mask)

    segments = Segments(torch.arange(2 * P + 1) * LENGTH)
    policy_w, policy_l = padded.sum(1).chunk(2)
    ref_w, ref_l = ref.sum(1).chunk(2)
    if paired:
        free = replace(objectives.dpo(0.1), ref_coef=0.0)
        order = (policy_w - policy_l).argsort()
        pairs = Pairs.of(order, order + P, margins=0.1 * (ref_w - ref_l).sort().values)
        ours = preference_loss(padded.flatten(), None, segments, pairs, free).loss
    else:
        pairs = Pairs.of((policy_w - ref_w).argsort(), (policy_l - ref_l).argsort() + P)
        ours = preference_loss(padded.flatten(), ref.flatten(), segments, pairs, objectives.dpo(0.1)).loss
    torch.testing.assert_close(ours, theirs)
