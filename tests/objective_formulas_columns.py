"""Presets with columns made beforehand, whole batches, lists and weighted likelihoods, beside their formulas.

Written down here from their sources in terms of sums over tokens, in fp64. ``FORMULAS``: name of a preset (``_name`` or
``_name__variant``) -> function of ``Data`` to (our loss, theirs by hand: a loss, or losses [P] of which the mean is
meant). Nothing of the engine is used on the right-hand side.
"""

import torch
import torch.nn.functional as F
from objective_data import P, formulas, logs, s

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss
from fastpo.types import Pairs, Segments


def _cream(d):
    win, lose = d.ratios()
    z, tau = 0.1 * (win - lose), 2 * d.labels - 1
    labels = objectives.rank_soft_labels(tau).double()
    return d.loss(objectives.cream(0.1), soft_labels=labels), -(1 + tau) / 2 * logs(z) - (1 - tau) / 2 * logs(-z)


def _dno(d):
    """Cross-entropy between the reward's preference and the policy's."""
    win, lose = d.ratios()
    z, (r_w, r_l) = 0.1 * (win - lose), d.targets.T
    labels = objectives.strength_soft_labels(r_w, r_l).double()
    by_hand = -s(r_w - r_l) * logs(z) - s(r_l - r_w) * logs(-z)
    return d.loss(objectives.dno(0.1), soft_labels=labels), by_hand


def _osp(d):
    win, lose = d.ratios()
    z = 0.1 * (win - lose)
    return d.loss(objectives.osp(0.1), soft_labels=d.labels), -d.labels * logs(z) - (1 - d.labels) * logs(-z)


def _inpo(d):
    eta, tau, previous = 0.01, 0.003, d.logps.detach().flip(0)
    (win, lose), (ref_w, ref_l), (prev_w, prev_l) = d.sums(), d.sum(d.ref), d.sum(previous)
    share = tau / eta
    by_hand = ((win - lose) - share * (ref_w - ref_l) - (1 - share) * (prev_w - prev_l) - 1 / (2 * eta)) ** 2
    d.ref = objectives.mixed_reference(d.ref, previous, share)
    return d.loss(objectives.inpo(eta)), by_hand


def _mm_rlhf(d):
    win, lose = d.ratios()
    gap = d.omega * 3
    beta = 0.1 * (1 + 0.2 * (1 - (-0.5 * gap).exp()))
    sft = -d.sums()[0].sum() / d.n()[0].sum()
    scales = objectives.gap_beta_scales(gap, 0.2, 0.5).double()
    return d.loss(objectives.mm_rlhf(0.1, 0.3), beta_scales=scales), -logs(beta * (win - lose)) + 0.3 * sft


def _wpo(d):
    win, lose = d.ratios()
    sum_p2 = d.weights.detach() + 0.01
    likely = [(a / n).exp() for a, n in zip(d.sum(d.logps.detach() - sum_p2.log()), d.n(), strict=True)]
    pairs = Pairs(torch.arange(2 * P).view(P, 2))
    weights = objectives.wpo_weights(d.logps, sum_p2, Segments(d.cu, d.mask), pairs)
    return d.loss(objectives.wpo(0.1), weights=weights), -likely[0] * likely[1] * logs(0.1 * (win - lose))


def _ld_dpo(d):
    alpha, ratio = 0.3, d.logps - d.ref
    rows = [ratio[(d.ids == i) & d.mask] for i in range(2 * P)]
    losses = []
    for win, lose in zip(rows[::2], rows[1::2], strict=True):
        n = min(len(win), len(lose))
        win, lose = (x[:n].sum() + alpha * x[n:].sum() for x in (win, lose))
        losses.append(-logs(0.1 * (win - lose)))
    return d.loss(objectives.ld_dpo(0.1, alpha)), torch.stack(losses)


def _aot(d):
    (win, lose), (ref_w, ref_l) = d.sums(), d.sum(d.ref)
    z = 0.2 * ((win - lose).sort().values - (ref_w - ref_l).sort().values)
    segments, pairs = Segments(d.cu, d.mask), Pairs(torch.arange(2 * P).view(P, 2))
    margins = objectives.reference_margins(d.ref, segments, pairs)
    return d.loss(objectives.aot(0.2, 0.1), margins=margins), -0.9 * logs(z) - 0.1 * logs(-z)


def _aot_unpaired(d):
    win, lose = d.ratios()
    z = 0.2 * (win.sort().values - lose.sort().values)
    return d.loss(objectives.aot_unpaired(0.2, 0.1)), -0.9 * logs(z) - 0.1 * logs(-z)


def _beta_dpo(d):
    win, lose = d.ratios()
    beta = 0.1 * (1 + 0.1 * ((win - lose).detach().mean() - 0.3))
    return d.loss(objectives.beta_dpo(0.1, 0.1, 0.3)), -logs(beta * (win - lose))


def _codpo(d):
    win, lose = d.ratios()
    return d.loss(objectives.codpo(0.1, 0.4)), -logs(0.1 * (win - lose)) - 0.4 * d.means()[0]


def _bco(d):
    win, lose = (0.2 * r for r in d.ratios())
    shift = 0.4 + 0.3 * (torch.cat((win, lose)).detach().mean() - 0.4)
    return d.loss(objectives.bco(0.2, 0.4, 0.3)), -logs(win - shift) - logs(-(lose - shift))


def _kto_batch(d):
    """Half of the tuples desirable, half not; a mismatched third in each but one."""
    win, lose, other = d.ratios()
    index = torch.arange(3 * P).view(P, 3)
    index[: P // 2, 1], index[P // 2 :, 0], index[1, 2] = -1, -1, -1
    shift = (0.2 * other[torch.arange(P) != 1].mean()).clamp(min=0).detach()
    good, bad = 1.5 * (1 - s(0.2 * win - shift)), 0.5 * (1 - s(shift - 0.2 * lose))
    return d.loss(objectives.kto_batch(0.2, 1.5, 0.5), index=index), torch.cat((good[: P // 2], bad[P // 2 :]))


def _vpo(d):
    win, lose, u = d.ratios()
    return d.loss(objectives.vpo(0.1, 0.3, online=False)), -logs(0.1 * (win - lose)) - 0.3 * 0.1 * u


def _vpo__online(d):
    win, lose, u = d.ratios()
    return d.loss(objectives.vpo(0.1, 0.3)), -logs(0.1 * (win - lose)) + 0.3 * 0.1 * u


def _srpo(d):
    win, lose, win_l, lose_l, lose_w, win_w = (0.2 * r for r in d.ratios())
    robust = (win - lose + win_l - lose_w - 1) ** 2
    revised = (win_l - lose_l - 0.5) ** 2 + (lose_w - win_w + 0.5) ** 2
    return d.loss(objectives.srpo(0.2, 0.3)), 0.7 * robust + 0.15 * revised


def _rationale_dpo(d):
    (win, lose, _), (_, _, rationale) = d.ratios(), d.sums()
    pairs = Pairs(torch.arange(3 * P).view(P, 3))
    d.ref = objectives.without_reference(d.ref, Segments(d.cu, d.mask), pairs, 2)
    return d.loss(objectives.rationale_dpo(0.1, 0.2)), -logs(0.1 * (win - lose)) - logs(0.2 * rationale)


def _rise(d):
    win, lose, step_w, step_l = (0.4 * r for r in d.ratios())
    return d.loss(objectives.rise(0.4, 0.3)), -logs(win - lose) - logs(step_w - step_l) - 0.3 * d.means()[0]


def _lipo(d):
    """Pair by pair, list by list; member 2 of the last list is absent."""
    scores = torch.stack(d.ratios(), 1) * 0.05
    index = torch.arange(4 * P).view(P, 4)
    index[-1, 2] = -1
    total = 0.0
    for row, ids, psi in zip(scores, index, d.relevance, strict=True):
        there = [k for k in range(4) if ids[k] >= 0]
        rank = {k: 1 + sum(bool(row[o] > row[k]) for o in there) for k in there}
        for i in there:
            for j in there:
                if psi[i] > psi[j]:
                    ranks = torch.tensor([rank[i], rank[j]], dtype=torch.float64)
                    change = (1 / (1 + ranks).log()).diff().abs()[0] * (2 ** psi[i] - 2 ** psi[j]).abs()
                    total = total + change * F.softplus(row[j] - row[i])
    return d.loss(objectives.lipo(0.05), index=index, relevance=d.relevance), total / P


def _rrhf(d):
    means, sums = torch.stack(d.means(), 1), torch.stack(d.sums(), 1)
    total = 0.0
    for row, own, psi in zip(means, sums, d.relevance, strict=True):
        for i in range(4):
            for j in range(4):
                if psi[i] > psi[j]:
                    total = total + 0.7 * (row[j] - row[i]).clamp(min=0)
        total = total - 0.4 * own[psi.argmax()]
    return d.loss(objectives.rrhf(0.7, 0.4), relevance=d.relevance), total / P


def _list_mle(d):
    scores = torch.stack(d.ratios(), 1) * 0.1
    losses = []
    for row, psi in zip(scores, d.relevance, strict=True):
        best_first = row[psi.argsort(descending=True)]
        losses.append(-sum((best_first[k] - best_first[k:].exp().sum().log()) for k in range(4)))
    return d.loss(objectives.list_mle(0.1), relevance=d.relevance), torch.stack(losses)


def _list_mle__as_listed(d):
    """Best first, weighted; the last of the first list is absent."""
    scores, index = torch.stack(d.ratios(), 1) * 0.1, torch.arange(4 * P).view(P, 4)
    index[0, 3] = -1
    losses = [
        -sum(row[k] - row[k:n].exp().sum().log() for k in range(n))
        for n, row in zip([3] + [4] * (P - 1), scores, strict=True)
    ]
    return d.loss(objectives.list_mle(0.1), index=index, weights=d.omega), d.omega * torch.stack(losses)


def _list_softmax(d):
    scores = torch.stack(d.ratios(), 1) * 0.1
    share = d.relevance / d.relevance.sum(1, keepdim=True)
    return d.loss(objectives.list_softmax(0.1), relevance=d.relevance), -(share * scores.log_softmax(1)).sum(1)


def advantage(preset):
    def formula(d):
        return d.loss(preset(), weights=d.targets[:, 0]), -d.targets[:, 0] * d.sums()[0]

    return formula


_remax, _rlsp, _trice, _crpg, _crraft = map(
    advantage, (objectives.remax, objectives.rlsp, objectives.trice, objectives.crpg, objectives.crraft)
)


def _remax__by_token(d):
    ones = torch.ones(P, dtype=torch.float64)
    return d.loss(objectives.remax(), {"nll_weights": d.kl}, weights=ones), -d.sum(d.kl * d.logps)[0]


def _tree_plv(d):
    """Scores of a head; here any function of the log-probs, for a gradient to compare."""
    head = torch.stack(d.means()).T.flatten().tanh()
    index = torch.arange(2 * P).view(P, 2)
    ours = preference_loss(None, None, None, Pairs(index), objectives.tree_plv(2.0), scores=head).loss
    return ours, -logs(2 * (head[::2] - head[1::2]))


def _t_reg(d):
    win, lose = d.ratios()
    rewards, omega = d.weights - 0.5, s(-0.1 * (win - lose)).detach()
    by_token = d.sum(rewards * d.logps)
    by_hand = -logs(0.1 * (win - lose)) - 0.3 * omega * 0.1 * (by_token[0] + by_token[1])
    return d.loss(objectives.t_reg(0.1, 0.3), {"token_coefs": rewards}), by_hand


def _exo_pair__without_thinking(d):
    """PRefLexOR's second stage: the tokens between the marks 1 and 2 do not count."""
    tokens = torch.randint(0, 5, d.logps.shape, generator=torch.Generator().manual_seed(1))
    keep = torch.ones_like(d.mask)
    for i in range(2 * P):
        inside = False
        for t in torch.where(d.ids == i)[0].tolist():
            inside = inside or tokens[t] == 1
            keep[t] = not inside
            inside = inside and tokens[t] != 2
    d.mask = d.mask & keep
    win, lose = d.ratios()
    assert torch.equal(objectives.outside_spans(tokens, 1, 2, Segments(d.cu)), keep)
    z, e = 0.3 * (win - lose), 0.05
    kl = s(z) * (s(z) / (1 - e)).log() + s(-z) * (s(-z) / e).log()
    return d.loss(objectives.exo_pair(0.3, e)), kl


FORMULAS = formulas(globals())
