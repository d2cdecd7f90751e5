"""Limits that tie presets together, the theorem that ties DPO's loss to the ranking, known values of columns."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_data import Data, P

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss
from fastpo.methods import METHODS
from fastpo.objectives import dpo, simpo
from fastpo.types import Pairs, Segments

ONES = torch.ones(P, dtype=torch.float64)
HALF = torch.stack((ONES, -ONES), 1) / 2  # SPPO's targets of a sure win
ABSENT = torch.cat((torch.arange(2 * P).view(P, 2), torch.full((P, 2), -1)), dim=1)  # pairs without further members
BEST_FIRST = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(P, 2)
RANKS = 1 / math.log(2) - 1 / math.log(3)  # what a swap of the first two ranks costs


def of_tokens(value: float):
    return lambda d: torch.full_like(d.logps, value, requires_grad=False)


# preset -> (objective, segments, columns, factor, what it is then): equal in loss and in gradient by the log-probs.
LIMITS = {
    "robust": (objectives.robust(0.1, 0.0), {}, {}, 1.0, dpo(0.1)),
    "cdpo": (objectives.cdpo(0.1, 0.0), {}, {}, 1.0, dpo(0.1)),
    "irpo": (objectives.irpo(0.1, 0.0), {}, {}, 1.0, dpo(0.1)),
    "codpo": (objectives.codpo(0.1, 0.4), {}, {}, 1.0, objectives.irpo(0.1, 0.4)),
    "scpo": (objectives.scpo(0.5, 0.7), {}, {"weights": ONES}, 1.0, objectives.irpo(0.5, 0.7)),
    **{
        name: (getattr(objectives, name)(0.1), {}, {"soft_labels": ONES}, 1.0, dpo(0.1))
        for name in ("mcts_dpo", "cream", "osp", "dno", "soft_dpo")
    },
    "step_apo": (objectives.step_apo(0.3), {}, {"margins": 0 * ONES}, 1.0, dpo(0.3)),
    "sppo": (objectives.sppo(1e-2), {}, {"targets": HALF}, 0.5, objectives.sppo_hard(1e-2)),
    "inpo": (objectives.inpo(0.01), {}, {}, 1.0, objectives.ipo(0.01)),
    "selm": (objectives.selm(0.1, 0.3), {}, {"index": ABSENT[:, :3]}, 1.0, dpo(0.1)),
    "vpo": (objectives.vpo(0.1, 0.3), {}, {"index": ABSENT[:, :3]}, 1.0, dpo(0.1)),
    "rationale_dpo": (objectives.rationale_dpo(0.1), {}, {"index": ABSENT[:, :3]}, 1.0, dpo(0.1)),
    "rise": (objectives.rise(0.4, 0.3), {}, {"index": ABSENT}, 1.0, objectives.irpo(0.4, 0.3)),
    "lipo": (objectives.lipo(0.1), {}, {"relevance": BEST_FIRST}, RANKS, dpo(0.1)),
    "list_mle": (objectives.list_mle(0.1), {}, {}, 1.0, dpo(0.1)),
    "list_softmax": (objectives.list_softmax(0.1), {}, {"relevance": BEST_FIRST}, 1.0, dpo(0.1)),
    "tdpo": (objectives.tdpo(0.1), {"kl": of_tokens(0), "kl_weights": of_tokens(1)}, {}, 1.0, dpo(0.1)),
    "tdpo1": (objectives.tdpo1(0.1), {"kl": of_tokens(0)}, {}, 1.0, dpo(0.1)),
    "tdpo2": (objectives.tdpo2(0.1), {"kl": of_tokens(0)}, {}, 1.0, dpo(0.1)),
    "sparse_po": (objectives.sparse_po(0.1), {"weights": of_tokens(1)}, {}, 1.0, dpo(0.1)),
    "t_reg": (objectives.t_reg(0.1), {"token_coefs": of_tokens(0)}, {}, 1.0, dpo(0.1)),
    "f_dpo": (objectives.f_dpo(0.1, "alpha", 1 + 1e-9), {}, {}, 1.0, dpo(0.1)),
    "bco": (objectives.bco(0.1, 0.0, 0.0), {}, {}, 1.0, objectives.bco_pair(0.1)),
    "alphapo": (objectives.alphapo(2.0, 0.5, 1e-9), {}, {}, 1.0, simpo(2.0, 0.5)),
    "simpo": (simpo(2.0, 0.0), {}, {}, 1.0, replace(objectives.sigmoid_norm(2.0), ref_coef=0.0)),
    "ld_dpo": (objectives.ld_dpo(0.1, 1.0), {}, {}, 1.0, dpo(0.1)),
    "beta_dpo": (objectives.beta_dpo(0.1, 0.0), {}, {}, 1.0, dpo(0.1)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit(name):
    objective, segments, columns, factor, other = LIMITS[name]
    d = Data()
    d.logps.requires_grad_()
    if name == "simpo":  # the reference of its twin is zero
        d.ref = torch.zeros_like(d.ref)
    ours = d.loss(objective, {field: make(d) for field, make in segments.items()}, **columns)
    theirs = factor * d.loss(other)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    grads = (torch.autograd.grad(loss, d.logps)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


def test_dpo_of_small_beta():
    """beta -> 0: the loss is log 2, its gradient beta/2 a token: raise the chosen, lower the rejected, all alike."""
    d, beta = Data(), 1e-7
    d.logps.requires_grad_()
    loss = d.loss(dpo(beta))
    torch.testing.assert_close(loss.item(), math.log(2), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, d.logps)
    expected = torch.where(d.mask, (d.ids % 2 * 2 - 1) * beta / (2 * P), 0.0).double()
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=0)


def test_kto_batch_without_mismatches():
    d = Data(3)
    index = torch.arange(3 * P).view(P, 3)
    index[::2, 0], index[1::2, 1], index[:, 2] = -1, -1, -1
    plain = d.loss(objectives.kto(0.2), index=index[:, :2], margins=0 * ONES)
    torch.testing.assert_close(d.loss(objectives.kto_batch(0.2), index=index), plain)


def test_every_row_that_says_limit_is_here():
    rows = {name for m in METHODS if "limit" in m.checked for name in m.presets}
    others = {"dpo", "kto", "kto_batch", "bco_pair", "sppo_hard"}  # in tests of their own, or on the right-hand side
    assert rows - others <= set(LIMITS)


nats = st.floats(-50, 50)


@settings(max_examples=300, deadline=None)
@given(nats, nats, nats, nats, st.floats(0.01, 2.0))
def test_the_pair_is_ranked_right_iff_the_loss_is_small(win, lose, ref_win, ref_lose, beta):
    """``l_w >= l_l  iff  L_DPO <= -log s(beta c)``, ``c = log(ref(l) / ref(w))``: ranking accuracy is not the reward's.

    Because ``z = beta (l_w - l_l + c)`` and -log s falls. Sums over two tokens; ties within rounding are left out.
    """
    if abs(win - lose) < 1e-6:
        return
    logps = torch.tensor([win - 1, 1, lose - 2, 2], dtype=torch.float64)
    ref = torch.tensor([ref_win, 0, ref_lose, 0], dtype=torch.float64)
    pairs = Pairs.of(torch.tensor([0]), torch.tensor([1]))
    loss = preference_loss(logps, ref, Segments(torch.tensor([0, 2, 4])), pairs, dpo(beta)).losses[0]
    c = torch.tensor(ref_lose - ref_win, dtype=torch.float64)
    bound = -torch.nn.functional.logsigmoid(beta * c)
    if abs(loss - bound) <= 1e-12 * bound:  # both have saturated
        return
    assert bool(loss <= bound) == (win >= lose)


WIN_RATES = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]], dtype=torch.float64)  # P(row > column)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def test_srpo_holds_at_the_optimum():
    """Both identities of the README, at the closed-form revision and policy of its minimax problem."""
    beta = 0.4
    tilted = REFERENCE.log() + WIN_RATES.T / beta  # [y1, y2]; P(y2 > y1)
    revision = tilted.log_softmax(1) - REFERENCE.log()  # R(y2 | y1)
    value = beta * tilted.logsumexp(1)
    policy = (REFERENCE.log() - value / beta).log_softmax(0) - REFERENCE.log()  # R(y)
    gap = policy[:, None] - policy + revision.T - revision  # R(a) - R(b) + R(a|b) - R(b|a)
    torch.testing.assert_close(beta * gap, 2 * WIN_RATES - 1)
    improvement = revision - revision.diagonal()[:, None]  # R(y2|y1) - R(y1|y1)
    torch.testing.assert_close(beta * improvement, WIN_RATES.T - 0.5)


def test_vpo_bonus_is_the_value_of_the_reward():
    """``J = -beta E_cal R`` for a reward whose mean under the calibration policy is 0."""
    beta, calibration = 0.4, torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    reward = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    reward = reward - calibration @ reward
    best = (REFERENCE.log() + reward / beta).log_softmax(0)
    ratios = best - REFERENCE.log()
    value = best.exp() @ (reward - beta * ratios)
    torch.testing.assert_close(value, -beta * (calibration @ ratios))


@pytest.mark.parametrize("objective", [objectives.sharpening(0.4), objectives.dno(0.4)], ids=lambda o: o.name)
def test_reward_differences_are_the_optimum(objective):
    """``beta R = r + const`` has no gradient: of sharpening with r = log pi_0, of DNO with q = s(r_w - r_l)."""
    reward = REFERENCE.log() if objective.name == "sharpening" else WIN_RATES.mean(1)
    best = (REFERENCE.log() + reward / 0.4).log_softmax(0).requires_grad_()
    pairs = Pairs(torch.tensor([[0, 1], [2, 1], [0, 2]]))
    gaps = reward[pairs.index[:, 0]] - reward[pairs.index[:, 1]]
    column = {"targets": gaps[:, None]} if objective.name == "sharpening" else {"soft_labels": gaps.sigmoid()}
    out = preference_loss(best, REFERENCE.log(), Segments(torch.arange(4)), replace(pairs, **column), objective)
    (grad,) = torch.autograd.grad(out.loss, best)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_visit_soft_labels():
    """Half where the rejected was visited as often or more; a chosen one without visits counts as one."""
    labels = objectives.visit_soft_labels(torch.tensor([6, 2, 2, 0, 0]), torch.tensor([2, 2, 5, 0, 3]))
    torch.testing.assert_close(labels, torch.tensor([0.75, 0.5, 0.5, 1.0, 0.5]))


def test_labels_weights_and_betas():
    close = torch.testing.assert_close
    close(objectives.rank_soft_labels(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([0.0, 0.5, 1.0]))
    close(objectives.strength_soft_labels(torch.tensor([1.0]), torch.tensor([1.0])), torch.tensor([0.5]))
    close(objectives.vote_weights(torch.tensor([6]), torch.tensor([2]), 8), torch.tensor([0.5]))
    scales = objectives.gap_beta_scales(torch.tensor([0.0, 1e9]), weight=0.1)
    close(scales, torch.tensor([1.0, 1.1]))
    close(objectives.contrast_token_rewards(torch.tensor([-1.0]), torch.tensor([-1.0])), torch.tensor([0.0]))


def test_advantages():
    close = torch.testing.assert_close
    close(objectives.remax_advantages(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), torch.tensor([0.0, -1.0]))
    close(objectives.trice_weights(torch.tensor([True, False, True])), torch.tensor([0.5, 1.0, 0.5]))
    satisfied = torch.tensor([True, False])
    close(
        objectives.calibrated_rewards(torch.tensor([2.0, 9.0]), torch.tensor([2.0, 0.0]), satisfied),
        torch.tensor([0.5, 0.0]),
    )


def test_trice_gradient_is_unbiased():
    """Proposals of a softmax policy: the control variate's expectation is 0 whatever b is. Enumerated, two chains."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    p, correct = logits.softmax(0), torch.tensor([True, False, True])
    score = torch.eye(3, dtype=torch.float64) - p  # [y, v] d log p_y / d logits_v
    total = torch.zeros(3, dtype=torch.float64)
    for y in range(3):
        for other in range(3):
            b = objectives.trice_weights(correct[torch.tensor([y, other])]).double()
            total += p[y] * p[other] * (b[0] * score[y] + b[1] * score[other])
    torch.testing.assert_close(total, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_mean_reference_is_two():
    ref, previous = torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -2.0])
    torch.testing.assert_close(objectives.mixed_reference(ref, previous, 1 / 3), torch.tensor([-3.0, -2.0]))
    with pytest.raises(ValueError, match="share is 2; mixed_reference needs it in"):
        objectives.mixed_reference(ref, previous, 2)


def test_without_reference_and_spans():
    segments = Segments(torch.tensor([0, 2, 2, 4, 8]))
    pairs = Pairs(torch.tensor([[0, 1, 3], [0, 1, -1]]))
    ref = objectives.without_reference(-torch.ones(8), segments, pairs, 2)
    assert ref.tolist() == [-1] * 4 + [0] * 4
    tokens = torch.tensor([7, 1, 5, 2, 1, 5, 2, 5])  # a span left open, an end alone, a whole span
    keep = objectives.outside_spans(tokens, 1, 2, segments)
    assert keep.tolist() == [True, False, True, True, False, False, False, True]


def test_ld_dpo_of_several_partners_and_masks():
    """Sequence 0 of 3 counted tokens stands against 2 and against 1: the tail begins behind the first."""
    segments = Segments(torch.tensor([0, 4, 6, 7]), torch.tensor([True, False, True, True, True, True, True]))
    pairs = Pairs(torch.tensor([[0, 1], [0, 2], [-1, 1]]))
    logps, ref = -torch.arange(1.0, 8.0), torch.zeros(7)
    out = preference_loss(logps, ref, segments, pairs, objectives.ld_dpo(0.1, 0.5))
    assert out.scores.tolist() == [-(1 + 0.5 * (3 + 4)), -(5 + 6), -7]
