"""Presets against TRL 1.16's own code: the loss functions of its trainers, run on given log-probs."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss
from fastpo.methods import METHODS
from fastpo.objectives import Objective, Term
from fastpo.types import Pairs, Segments

P, LENGTH = 6, 12

TRL = [
    ("sigmoid", {}, objectives.dpo(0.1)),
    ("sigmoid_norm", {}, objectives.dpo(0.1, length_power=1.0)),
    ("sigmoid_norm", {}, objectives.sigmoid_norm(0.1)),
    ("sigmoid", {"ld_alpha": 0.4}, objectives.ld_dpo(0.1, 0.4)),
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


def trl_loss(
    losses: str, padded: Tensor, ref: Tensor, mask: Tensor, sum_p2: Tensor | None = None, **settings
) -> Tensor:
    """DPOTrainer._compute_loss on a model whose log-probs [2P, L] are given; chosen sequences first."""
    from trl import DPOTrainer

    def model(log_probs: Tensor):
        zeros = torch.zeros_like(log_probs)
        outputs = {"log_probs": log_probs, "entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        outputs["log_sum_sq_probs"] = zeros if sum_p2 is None else sum_p2.log()
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


class Padded:
    """Log-probs of P chosen and P rejected responses, padded, and the same tokens packed."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (2 * P, 1), generator=generator)
        logps, ref = (-2 * torch.rand(2 * P, LENGTH, generator=generator) - 0.1 for _ in range(2))
        self.logps, self.ref = (logps * self.mask).requires_grad_(), ref * self.mask  # [2P, LENGTH]
        self.segments = Segments(F.pad(self.mask.sum(1).cumsum(0), (1, 0)))
        self.pairs = Pairs.of(torch.arange(P), torch.arange(P) + P)

    def packed(self, x: Tensor) -> Tensor:
        return x[self.mask]

    def check(self, theirs: Tensor, objective: Objective, ref_logps: Tensor | None, **columns: Tensor) -> None:
        """Our loss and gradient are those of ``theirs``, in fp32."""
        logps = self.packed(self.logps.detach()).requires_grad_()
        ours = preference_loss(logps, ref_logps, self.segments, replace(self.pairs, **columns), objective).loss
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
        own, their = torch.autograd.grad(ours, logps)[0], torch.autograd.grad(theirs, self.logps)[0]
        torch.testing.assert_close(own, their[self.mask], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "losses, settings, objective", TRL, ids=lambda x: x if isinstance(x, str) else getattr(x, "name", None)
)
def test_trl(losses, settings, objective):
    """The loss and the gradient of TRL 1.16 in fp32, on the same tokens padded."""
    batch = Padded()
    theirs = trl_loss(losses, batch.logps, batch.ref, batch.mask, **settings)
    batch.check(theirs, objective, batch.packed(batch.ref) if objective.needs_reference else None)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted(name, smoothing):
    """TRL's losses of order statistics: ranks over the batch, the reference's own where the pairs are kept."""
    batch = Padded()
    theirs = trl_loss(name, batch.logps, batch.ref, batch.mask, label_smoothing=smoothing)
    objective, columns, ref = getattr(objectives, name)(0.1, smoothing), {}, batch.packed(batch.ref)
    if name == "aot":
        columns, ref = {"margins": objectives.reference_margins(ref, batch.segments, batch.pairs)}, None
    batch.check(theirs, objective, ref, **columns)


def test_weighted_by_probability():
    """WPO: ``use_weighting`` multiplies each pair by what the policy would have sampled of it."""
    batch = Padded()
    sum_p2 = torch.rand(2 * P, LENGTH, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.05
    theirs = trl_loss("sigmoid", batch.logps, batch.ref, batch.mask, sum_p2, use_weighting=True)
    logps = batch.packed(batch.logps.detach())
    weights = objectives.wpo_weights(logps, batch.packed(sum_p2), batch.segments, batch.pairs)
    batch.check(theirs, objectives.wpo(0.1), batch.packed(batch.ref), weights=weights)


CPO = [
    ("sigmoid", {}, objectives.cpo(0.3, 0.0)),
    ("sigmoid", {"label_smoothing": 0.2}, objectives.cpo(0.3, 0.0, 0.2)),
    ("simpo", {"simpo_gamma": 0.4}, objectives.simpo(0.3, 0.4)),
    ("simpo", {"simpo_gamma": 0.4, "label_smoothing": 0.1}, objectives.simpo(0.3, 0.4, 0.1)),
    ("simpo", {"simpo_gamma": 0.4, "alpha": 0.3}, objectives.alphapo(0.3, 0.4, 0.3)),
    ("hinge", {}, replace(objectives.hinge(0.3), ref_coef=0.0)),
    ("ipo", {}, replace(objectives.ipo(0.3, average=True), ref_coef=0.0)),
]


@pytest.mark.parametrize("loss_type, settings, objective", CPO, ids=str)
def test_cpo(loss_type, settings, objective):
    """CPOTrainer.cpo_loss on the log-probs that its trainer gives it: means for simpo and ipo, else sums."""
    from trl.experimental.cpo import CPOTrainer

    batch = Padded()
    trainer = SimpleNamespace(beta=0.3, alpha=0.0, label_smoothing=0.0, loss_type=loss_type)
    trainer.accelerator = SimpleNamespace(device=batch.logps.device)
    trainer.__dict__.update(settings)
    own = batch.logps.sum(1)
    if loss_type in ("simpo", "ipo"):
        own = own / batch.mask.sum(1)
    losses, *_ = CPOTrainer.cpo_loss(trainer, *own.chunk(2))
    batch.check(losses.mean(), objective, None)


def test_orpo():
    """ORPOTrainer.odds_ratio_loss; its NLL, over prompts too, is added here over the responses."""
    from trl.experimental.orpo import ORPOTrainer

    batch = Padded()
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=batch.logps.device))
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, *(batch.logps.sum(1) / batch.mask.sum(1)).chunk(2))
    nll = -batch.logps[:P].sum() / batch.mask[:P].sum()
    batch.check(nll - ratio.mean(), objectives.orpo(0.3), None)


@pytest.mark.parametrize("higher", [True, False], ids=["kl", "kl clamped at 0"])
def test_kto(higher):
    """KTOTrainer._compute_loss: half of the sequences desirable, and a mismatched response to each prompt."""
    from trl import KTOTrainer

    batch, other = Padded(), Padded(seed=1)
    other_ref = (other.logps.detach() - (0.3 if higher else -0.3)) * other.mask
    own_ids, other_ids = (F.pad(b.mask.long(), (1, 0)) for b in (batch, other))
    labels = torch.arange(2 * P) < P
    inputs = {"input_ids": own_ids, "attention_mask": own_ids, "completion_mask": own_ids, "label": labels}
    inputs |= {"KL_input_ids": other_ids, "KL_attention_mask": other_ids, "KL_completion_mask": other_ids}

    def model(own, mismatched):
        def call(input_ids, **_):
            log_probs = own if input_ids is own_ids else mismatched
            zeros = torch.zeros_like(log_probs)
            return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, aux_loss=None)

        return call

    def same(x):
        return x

    policy = torch.nn.Module()
    policy.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=policy,
        ref_model=model(batch.ref, other_ref),
        accelerator=SimpleNamespace(device=batch.ref.device, gather=same, gather_for_metrics=same),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        **{"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, "loss_type": "kto", "calculate_KL": True},
        **{"aux_loss_enabled": False, "precompute_ref_logps": False, "_total_train_tokens": 0, "_tp_size": 1},
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    their_model = model(batch.logps, other.logps.detach())
    trainer._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(trainer, *args)
    theirs = KTOTrainer._compute_loss(trainer, their_model, inputs, return_outputs=False)

    ids, absent = torch.arange(2 * P), torch.full((P,), -1)
    chosen, rejected = torch.cat((ids[:P], absent)), torch.cat((absent, ids[P:]))
    cu_seqlens = F.pad(torch.cat((batch.mask.sum(1), other.mask.sum(1))).cumsum(0), (1, 0))
    packed = torch.cat((batch.packed(batch.logps.detach()), other.packed(other.logps.detach()))).requires_grad_()
    ref = torch.cat((batch.packed(batch.ref), other.packed(other_ref)))
    index = torch.stack((chosen, rejected, ids + 2 * P), dim=1)
    ours = preference_loss(packed, ref, Segments(cu_seqlens), Pairs(index), objectives.kto_batch(0.3, 1.5, 0.5)).loss
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    own, their = torch.autograd.grad(ours, packed)[0], torch.autograd.grad(theirs, batch.logps)[0]
    torch.testing.assert_close(own[: batch.mask.sum()], their[batch.mask], rtol=1e-4, atol=1e-7)
    assert not own[batch.mask.sum() :].any()


def test_every_row_that_says_trl_is_here():
    """The presets that fastpo.methods says equal TRL's code are compared with it in this file."""
    text = Path(__file__).read_text()
    rows = [name for m in METHODS if "trl" in m.checked for name in m.presets]
    own = {"bco": "bco_pair", "sppo": "sppo_hard", "kto": "kto_batch"}  # the form that TRL has
    assert [n for n in rows if f"objectives.{own.get(n, n)}(" not in text and f'"{n}"' not in text] == []
