"""Every preset beside its formula, written down here from its source in terms of sums over tokens, in fp64.

``FORMULAS``: name of a preset (``_name`` or ``_name__variant``) -> function of ``Data`` to (our loss, theirs by hand:
a loss, or losses [P] of which the mean is meant). Nothing of the engine is used on the right-hand side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import Objective
from fastpo.types import Pairs, Segments

P, LENGTH = 6, 12


class Data:
    """Packed sequences of mixed lengths, chosen, rejected and a third of each tuple one behind the other; fp64."""

    def __init__(self, members: int = 2):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, LENGTH + 1, (P * members,), generator=generator)
        self.ids = torch.arange(P * members).repeat_interleave(lengths)  # [T] sequence of each token
        self.cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        size, self.members = len(self.ids), members

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        self.mask = rand(size) > 0.2
        self.mask[self.cu[:-1]] = True  # no sequence is empty
        self.logps, self.ref = -2 * rand(size) - 0.1, -2 * rand(size) - 0.1
        self.weights, self.kl, self.nll_weights = rand(size), rand(size), rand(size)
        self.omega, self.margins, self.labels = rand(P), rand(P), rand(P)
        self.targets = rand(P, 2) - 0.5
        self.relevance = rand(P, members)

    def sum(self, x: Tensor) -> list[Tensor]:
        """Sums over masked-in tokens [T] of the chosen, rejected, ... sequences: [P] each."""
        sums = torch.zeros(P * self.members, dtype=x.dtype).index_add(0, self.ids, torch.where(self.mask, x, 0.0))
        return list(sums.view(P, self.members).T)

    def n(self) -> list[Tensor]:
        return self.sum(torch.ones_like(self.logps))

    def ratios(self) -> list[Tensor]:
        """The D_i of each member, [P] each."""
        return self.sum(self.logps - self.ref)

    def sums(self) -> list[Tensor]:
        return self.sum(self.logps)

    def means(self) -> list[Tensor]:
        return [s / n for s, n in zip(self.sums(), self.n(), strict=True)]

    def loss(
        self, objective: Objective, segments: dict | None = None, *, index: Tensor | None = None, **columns: Tensor
    ) -> Tensor:
        index = torch.arange(P * self.members).view(P, self.members) if index is None else index
        records = Segments(self.cu, self.mask, **(segments or {})), Pairs(index, **columns)
        return preference_loss(self.logps, self.ref if objective.needs_reference else None, *records, objective).loss


def s(z: Tensor) -> Tensor:
    return torch.sigmoid(z)


def logs(z: Tensor) -> Tensor:
    return F.logsigmoid(z)


def _dpo(d):
    win, lose = d.ratios()
    return d.loss(objectives.dpo(0.1)), -logs(0.1 * (win - lose))


def _dpo__of_means(d):
    win, lose = (r / n for r, n in zip(d.ratios(), d.n(), strict=True))
    return d.loss(objectives.dpo(0.1, length_power=1.0)), -logs(0.1 * (win - lose))


def _cdpo(d):
    win, lose = d.ratios()
    z = 0.2 * (win - lose)
    return d.loss(objectives.cdpo(0.2, 0.15)), -0.85 * logs(z) - 0.15 * logs(-z)


def _robust(d):
    win, lose = d.ratios()
    z = 0.2 * (win - lose)
    return d.loss(objectives.robust(0.2, 0.15)), (-0.85 * logs(z) + 0.15 * logs(-z)) / (1 - 2 * 0.15)


def _soft_dpo(d):
    win, lose = d.ratios()
    z = 0.1 * (win - lose)
    return d.loss(objectives.soft_dpo(0.1), soft_labels=d.labels), -d.labels * logs(z) - (1 - d.labels) * logs(-z)


def _mcts_dpo(d):
    win, lose = d.ratios()
    z, visits_w, visits_l = 0.1 * (win - lose), torch.tensor([5, 4, 3, 0, 1, 9]), torch.tensor([1, 4, 7, 0, 2, 3])
    flip = torch.minimum(visits_l / (visits_l + visits_w.clamp(min=1)), torch.tensor(0.5))
    labels = objectives.visit_soft_labels(visits_w, visits_l)
    return d.loss(objectives.mcts_dpo(), soft_labels=labels), -(1 - flip) * logs(z) - flip * logs(-z)


def _step_apo(d):
    win, lose = d.ratios()
    return d.loss(objectives.step_apo(0.3, 0.7), margins=d.margins), -logs(0.3 * (win - lose) - 0.7 * d.margins)


def _ipo(d):
    win, lose = d.ratios()
    return d.loss(objectives.ipo(0.2)), (win - lose - 1 / (2 * 0.2)) ** 2


def _sharpening(d):
    win, lose = d.ratios()
    target = d.targets[:, :1]
    return d.loss(objectives.sharpening(0.3), targets=target), (0.3 * (win - lose) - target[:, 0]) ** 2


def _hinge(d):
    win, lose = d.ratios()
    return d.loss(objectives.hinge(0.4)), (1 - 0.4 * (win - lose)).clamp(min=0)


def _f_dpo__forward_kl(d):
    u_w, u_l = (r.exp() for r in d.ratios())
    return d.loss(objectives.f_dpo(0.1, "forward_kl")), -logs(0.1 * ((1 - 1 / u_w) - (1 - 1 / u_l)))


def _f_dpo__js(d):
    u_w, u_l = (r.exp() for r in d.ratios())
    return d.loss(objectives.f_dpo(0.1, "js")), -logs(0.1 * ((2 * u_w / (1 + u_w)).log() - (2 * u_l / (1 + u_l)).log()))


def _f_dpo__alpha(d):
    win, lose = ((r.exp() ** -0.5 - 1) / -0.5 for r in d.ratios())
    return d.loss(objectives.f_dpo(0.1, "alpha", alpha=0.5)), -logs(0.1 * (win - lose))


def _exo_pair(d):
    win, lose = d.ratios()
    z, e = 0.3 * (win - lose), 0.05
    kl = s(z) * (s(z) / (1 - e)).log() + s(-z) * (s(-z) / e).log()
    return d.loss(objectives.exo_pair(0.3, e)), kl


def _discopop(d):
    win, lose = d.ratios()
    z = 0.05 * (win - lose)
    g = s(z / 0.05)
    return d.loss(objectives.discopop(0.05, 0.05)), -logs(z) * (1 - g) + (-z).exp() * g


def _tdpo(d):
    (win, lose), (kl_w, kl_l) = d.ratios(), d.sum(0.7 * d.kl)
    ours = d.loss(objectives.tdpo(0.1), {"kl": d.kl, "kl_weights": torch.full_like(d.kl, 0.7)})
    return ours, -logs(0.1 * ((win - lose) - (kl_l - kl_w)))


def _tdpo1(d):
    (win, lose), (kl_w, kl_l) = d.ratios(), d.sum(d.kl)
    return d.loss(objectives.tdpo1(0.1), {"kl": d.kl}), -logs(0.1 * ((win - lose) - (kl_l - kl_w)))


def _tdpo2(d):
    (win, lose), (kl_w, kl_l) = d.ratios(), d.sum(d.kl)
    return d.loss(objectives.tdpo2(0.1, 0.6), {"kl": d.kl}), -logs(0.1 * ((win - lose) - 0.6 * (kl_l - kl_w.detach())))


def _sparse_po(d):
    (win, lose), (kl_w, kl_l) = d.sum(d.weights * (d.logps - d.ref)), d.sum(d.nll_weights * d.kl)
    ours = d.loss(objectives.sparse_po(0.1), {"weights": d.weights, "kl": d.kl, "kl_weights": d.nll_weights})
    return ours, -logs(0.1 * (win + kl_w - lose - kl_l))


def _irpo(d):
    win, lose = d.ratios()
    return d.loss(objectives.irpo(0.1, 0.7)), -logs(0.1 * (win - lose)) - 0.7 * d.means()[0]


def _scpo(d):
    win, lose = d.ratios()
    return d.loss(objectives.scpo(0.5, 0.7), weights=d.omega), d.omega * (
        -logs(0.5 * (win - lose)) - 0.7 * d.means()[0]
    )


def _rpo(d):
    win, lose = d.ratios()
    return d.loss(objectives.rpo(0.01, 0.005)), -logs(0.01 * (win - lose)) - 0.005 * d.sums()[0]


def _sft(d):
    return d.loss(objectives.sft()), -d.sums()[0].sum() / d.n()[0].sum()


def _simpo(d):
    win, lose = d.means()
    return d.loss(objectives.simpo(2.0, 0.9)), -logs(2.0 * (win - lose) - 0.9)


def _alphapo(d):
    win, lose = ((1 - m.exp() ** -0.3) / 0.3 for m in d.means())
    return d.loss(objectives.alphapo(2.5, 0.4, 0.3)), -logs(2.5 * (win - lose) - 0.4)


def _cpo(d):
    win, lose = d.sums()
    return d.loss(objectives.cpo(0.1, 0.8)), -logs(0.1 * (win - lose)).mean() - 0.8 * win.sum() / d.n()[0].sum()


def _orpo(d):
    win, lose = ((m.exp() / (1 - m.exp())).log() for m in d.means())
    nll = -d.sums()[0].sum() / d.n()[0].sum()
    return d.loss(objectives.orpo(0.2)), nll - 0.2 * logs(win - lose).mean()


def _sppo(d):
    (win, lose), rates = d.ratios(), d.targets + 0.5
    by_hand = 0.5 * ((win - (rates[:, 0] - 0.5) / 1e-2) ** 2 + (lose - (rates[:, 1] - 0.5) / 1e-2) ** 2)
    return d.loss(objectives.sppo(1e-2), targets=d.targets), by_hand


def _sppo_hard(d):
    win, lose = d.ratios()
    return d.loss(objectives.sppo_hard(1e-2)), (win - 0.5 / 1e-2) ** 2 + (lose + 0.5 / 1e-2) ** 2


def _nca_pair(d):
    win, lose = (0.2 * r for r in d.ratios())
    return d.loss(objectives.nca_pair(0.2)), -logs(win) - 0.5 * logs(-win) - 0.5 * logs(-lose)


def _bco_pair(d):
    win, lose = (0.2 * r for r in d.ratios())
    return d.loss(objectives.bco_pair(0.2), margins=d.margins), -logs(win - d.margins) - logs(-(lose - d.margins))


def _kto(d):
    win, lose = (0.2 * r for r in d.ratios())
    by_hand = 1.5 * (1 - s(win - d.margins)) + 0.5 * (1 - s(d.margins - lose))
    return d.loss(objectives.kto(0.2, 1.5, 0.5), margins=d.margins), by_hand


def _apo_zero(d):
    win, lose = (0.2 * r for r in d.ratios())
    return d.loss(objectives.apo_zero(0.2)), 1 - s(win) + s(lose)


def _apo_down(d):
    win, lose = (0.2 * r for r in d.ratios())
    return d.loss(objectives.apo_down(0.2)), s(win) + 1 - s(win - lose)


def _selm(d):
    win, lose, u = d.ratios()
    return d.loss(objectives.selm(0.1, 0.3)), -logs(0.1 * (win - lose)) + 0.3 * 0.1 * u


def _sigmoid_norm(d):
    win, lose = (r / n for r, n in zip(d.ratios(), d.n(), strict=True))
    return d.loss(objectives.sigmoid_norm(0.7)), -logs(0.7 * (win - lose))


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


def _advantage(preset):
    def formula(d):
        return d.loss(preset(), weights=d.targets[:, 0]), -d.targets[:, 0] * d.sums()[0]

    return formula


_remax, _rlsp, _trice, _crpg, _crraft = map(
    _advantage, (objectives.remax, objectives.rlsp, objectives.trice, objectives.crpg, objectives.crraft)
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


MEMBERS = {"selm": 3, "kto_batch": 3, "vpo": 3, "rationale_dpo": 3, "rise": 4, "srpo": 6}
MEMBERS |= dict.fromkeys(("lipo", "rrhf", "list_mle", "list_softmax"), 4)
MEMBERS |= dict.fromkeys(("remax", "rlsp", "trice", "crpg", "crraft"), 1)
FORMULAS = {name[1:]: value for name, value in globals().items() if name[0] == "_" and name[1] != "_"}
FORMULAS.pop("advantage")


def data_of(name: str) -> Data:
    """Data with as many sequences a tuple as the preset of the formula compares."""
    return Data(MEMBERS.get(name.partition("__")[0], 2))
