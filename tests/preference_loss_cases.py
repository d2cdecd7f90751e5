"""Inputs and judge that the tests of preference_loss' backends share."""

import pytest
import torch

from fastpo.kernels.preference_loss import preference_loss, reference
from fastpo.kernels.preference_loss.records import TupleSettings, token_settings, tokens_of, tuples_of
from fastpo.objectives import Objective, Term
from fastpo.types import Pairs, Segments

FIELDS = ("losses", "scores", "logps", "lengths", "rewards", "nll")
# Empty, one token, a tile and its neighbours, several tiles; sequence 12 is masked out whole.
LENGTHS = (5, 0, 128, 300, 129, 1, 64, 127, 2, 511, 31, 40, 9, 17)
# Sequences 0, 2 and 4 stand in several tuples, 13 in none, 3 twice in one; members are absent on either side.
INDEX = (
    (0, 2, 4),
    (2, 3, -1),
    (4, 0, 5),
    (-1, 6, 7),
    (8, 9, 2),
    (3, 3, 0),
    (10, -1, 1),
    (-1, -1, 2),
    (1, 12, 11),
    (7, 0, 8),
)
LONG = (9000, 8192)

LISTED = Objective(
    "every link at once",
    (
        Term(link="logistic", scale=0.2, param=0.8, margin=0.3),
        Term((1.0, 0.0), "squared", 0.05, param=0.4, weight=0.5),
        Term((0.5, -1.0, 0.25), "hinge", 0.1, margin_coef=0.5),
        Term((0.0, 1.0, -1.0), "sigmoid", 0.1, weight=-0.7),
        Term(link="exo", scale=0.1),
        Term(link="discopop", scale=0.05),
        Term((0.0, 0.0, 1.0), "linear", 0.1, margin_coef=0.0),
    ),
    nll=(1.0, 0.0, 0.3),
)
COLUMNS = ("weights", "margins", "soft_labels", "targets", "beta_scales")
TOKEN_FIELDS = ("weights", "kl_weights", "nll_weights", "token_coefs")
EVERY_FIELD = tuple(f"segments.{name}" for name in TOKEN_FIELDS)


class Batch:
    """Random inputs of one call, in fp64; ``fields`` names the optional ones that are given."""

    def __init__(self, objective: Objective, lengths=LENGTHS, index=INDEX, fields=(), mask=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        cu = torch.tensor((0, *lengths)).cumsum(0)
        size, self.objective = int(cu[-1]), objective

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        self.leaves = {"logps": -3 * uniform(size) - 1e-3}
        self.ref = -3 * uniform(size) if objective.needs_reference else None
        asked = {*objective.requires, *fields}
        if "segments.kl_weights" in asked:
            asked.add("segments.kl")
        for name in ("weights", "kl", "kl_weights", "nll_weights", "token_coefs"):
            if f"segments.{name}" in asked:
                self.leaves[name] = uniform(size)
        columns = torch.tensor(index)
        lists = "pairs.relevance" in objective.requires or objective.list_loss is not None
        self.index = torch.cat((columns, columns.roll(1, 0)), dim=1)[:, : 6 if lists else objective.num_members]
        num_tuples = len(self.index)
        shapes = {"targets": (num_tuples, len(objective.terms)), "relevance": self.index.shape}
        self.columns = {
            name: uniform(*shapes.get(name, (num_tuples,)))
            for name in ("weights", "margins", "soft_labels", "targets", "beta_scales", "relevance")
            if f"pairs.{name}" in asked
        }
        self.cu, self.mask = cu, None
        if mask:
            self.mask = torch.rand(size, generator=generator) > 0.3
            for i, n in enumerate(lengths):
                if n == 9:
                    self.mask[cu[i] : cu[i + 1]] = False

    def to(self, device: str) -> "Batch":
        """Itself, with everything moved to ``device``."""
        self.leaves = {name: x.to(device) for name, x in self.leaves.items()}
        self.columns = {name: x.to(device) for name, x in self.columns.items()}
        self.index, self.cu = self.index.to(device), self.cu.to(device)
        self.ref, self.mask = (None if x is None else x.to(device) for x in (self.ref, self.mask))
        return self

    def arguments(self, dtype: torch.dtype):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in self.leaves.items()}
        logps = leaves["logps"]
        segments = Segments(self.cu, self.mask, **{n: x for n, x in leaves.items() if n != "logps"})
        pairs = Pairs(self.index, **{n: x.to(dtype) for n, x in self.columns.items()})
        ref = None if self.ref is None else self.ref.to(dtype)
        return leaves, (logps, ref, segments, pairs, self.objective)

    def run(self, dtype: torch.dtype, monkeypatch, backend: str, upstream: float = 1.0, scores=None):
        """Outputs by name and gradients of the leaves (and of ``scores``), by the named backend."""
        monkeypatch.setenv("FASTPO_BACKEND", backend)
        leaves, (logps, ref, segments, pairs, objective) = self.arguments(dtype)
        if scores is not None:
            scores = scores.to(dtype).requires_grad_()
            leaves, ref = {**leaves, "given": scores}, None
        out = preference_loss(logps, ref, segments, pairs, objective, scores=scores)
        grads = torch.autograd.grad(out.loss * upstream, leaves.values(), allow_unused=True)
        values = {"loss": out.loss.detach(), **{name: getattr(out, name) for name in FIELDS}}
        return values | {f"d {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}

    def spec(self):
        """Loss and gradients of the spec in fp64, by autograd; {} where a batch function or a list stands before it."""
        if self.objective.couple is not None or self.objective.list_loss is not None:
            return {}
        leaves, (logps, ref, segments, pairs, objective) = self.arguments(torch.float64)
        loss = reference.loss_value(
            tokens_of(logps, ref, segments, logps), None, tuples_of(pairs, objective, logps),
            token_settings(objective), TupleSettings.of(objective),
        )  # fmt: skip
        grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
        return {"loss": loss.detach()} | {f"d {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}


def assert_as_exact(ours: dict, torchs: dict, exact: dict) -> None:
    """``err <= 2 err_torch + 2 ulp of the largest``, both against fp64."""
    assert ours.keys() == torchs.keys() == exact.keys()
    for name, value in ours.items():
        want = exact[name].double()
        assert value.shape == want.shape and value.isfinite().all(), name
        if value.numel() == 0:
            continue
        error = (value.double() - want).abs().max()
        allowed = 2 * (torchs[name].double() - want).abs().max() + 2.4e-7 * want.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(batch: Batch, monkeypatch: pytest.MonkeyPatch, backend: str, **options) -> None:
    """``backend`` in fp32 against the torch backend in fp64, judged by that in fp32; and that against the spec."""
    ours = batch.run(torch.float32, monkeypatch, backend, **options)
    torchs = batch.run(torch.float32, monkeypatch, "torch", **options)
    exact = batch.run(torch.float64, monkeypatch, "torch", **options)
    if not options:
        for name, value in batch.spec().items():
            torch.testing.assert_close(exact[name], value, msg=f"the fp64 backend is not the spec: {name}")
    assert_as_exact(ours, torchs, exact)
