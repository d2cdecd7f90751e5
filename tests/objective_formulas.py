"""Presets whose loss is a function of the scores of a pair, beside their formulas.

Written down here from their sources in terms of sums over tokens, in fp64. ``FORMULAS``: name of a preset (``_name`` or
``_name__variant``) -> function of ``Data`` to (our loss, theirs by hand: a loss, or losses [P] of which the mean is
meant). Nothing of the engine is used on the right-hand side.
"""

import torch
from objective_data import formulas, logs, s

from fastpo import objectives


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


FORMULAS = formulas(globals())
