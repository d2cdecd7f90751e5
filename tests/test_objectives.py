"""Every preset against its formula, written down here from its source in terms of sums; names, settings, mistakes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import objectives
from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import PRESETS, Objective, Term, by_name
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

    def loss(self, objective: Objective, segments: dict | None = None, **columns: Tensor) -> Tensor:
        index = torch.arange(P * self.members).view(P, self.members)
        records = Segments(self.cu, self.mask, **(segments or {})), Pairs(index, **columns)
        return preference_loss(self.logps, self.ref if objective.needs_reference else None, *records, objective).loss


def s(z: Tensor) -> Tensor:
    return torch.sigmoid(z)


def logs(z: Tensor) -> Tensor:
    return F.logsigmoid(z)


def _dpo(d):
    win, lose = d.ratios()
    return d.loss(objectives.dpo(0.1)), -logs(0.1 * (win - lose))


def _dpo_of_means(d):
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


def _forward_kl(d):
    u_w, u_l = (r.exp() for r in d.ratios())
    return d.loss(objectives.f_dpo(0.1, "forward_kl")), -logs(0.1 * ((1 - 1 / u_w) - (1 - 1 / u_l)))


def _js(d):
    u_w, u_l = (r.exp() for r in d.ratios())
    return d.loss(objectives.f_dpo(0.1, "js")), -logs(0.1 * ((2 * u_w / (1 + u_w)).log() - (2 * u_l / (1 + u_l)).log()))


def _alpha(d):
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


def _tdpo1(d):
    (win, lose), (kl_w, kl_l) = d.ratios(), d.sum(d.kl)
    ours = d.loss(objectives.tdpo(0.1), {"kl": d.kl, "kl_weights": torch.ones_like(d.kl)})
    return ours, -logs(0.1 * ((win - lose) - (kl_l - kl_w)))


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


FORMULAS = [value for name, value in globals().items() if name.startswith("_") and callable(value)]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__[1:])
def test_formula(formula):
    """Loss and gradients by the log-probs, both in fp64."""
    data = Data(members=3 if formula is _selm else 2)
    data.logps.requires_grad_()
    ours, by_hand = formula(data)
    torch.testing.assert_close(ours, by_hand.mean())
    grads = (torch.autograd.grad(loss, data.logps)[0] for loss in (ours, by_hand.mean()))
    torch.testing.assert_close(*grads)


def test_every_preset_has_a_formula():
    tested = {f.__name__[1:] for f in FORMULAS}
    aliases = {"f_dpo": "js", "tdpo": "tdpo1"}
    assert {aliases.get(name, name) for name in PRESETS} <= tested


def test_tdpo2_has_no_gradient_through_the_chosen_kl():
    """z = beta [(D_w - D_l) - alpha (K_l - sg K_w)]: kl detached on the chosen sequences."""
    d = Data()
    d.kl.requires_grad_()
    chosen = d.ids % 2 == 0
    kl = torch.where(chosen, d.kl.detach(), d.kl)
    loss = d.loss(objectives.tdpo(0.1), {"kl": kl, "kl_weights": torch.full_like(kl, 0.5)})
    (grad,) = torch.autograd.grad(loss, d.kl)
    (win, lose), (kl_w, kl_l) = d.ratios(), d.sum(d.kl)
    by_hand = -logs(0.1 * ((win - lose) - 0.5 * (kl_l - kl_w.detach()))).mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(grad, torch.autograd.grad(by_hand, d.kl)[0])
    assert not grad[chosen].any()


def test_inpo_is_ipo_against_a_mixed_reference():
    d, previous, eta, tau = Data(), None, 0.01, 0.003
    previous = d.logps.flip(0)
    win, lose = d.sums()
    (ref_w, ref_l), (prev_w, prev_l) = d.sum(d.ref), d.sum(previous)
    share = tau / eta
    by_hand = ((win - lose) - share * (ref_w - ref_l) - (1 - share) * (prev_w - prev_l) - 1 / (2 * eta)) ** 2
    d.ref = share * d.ref + (1 - share) * previous
    torch.testing.assert_close(d.loss(objectives.ipo(eta)), by_hand.mean())


# ---------------------------------------------------------------- names and settings


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


def test_visit_soft_labels():
    """Half where the rejected was visited as often or more; a chosen one without visits counts as one."""
    labels = objectives.visit_soft_labels(torch.tensor([6, 2, 2, 0, 0]), torch.tensor([2, 2, 5, 0, 3]))
    torch.testing.assert_close(labels, torch.tensor([0.75, 0.5, 0.5, 1.0, 0.5]))
