"""What the tests of linear_preference_loss share: a call in any type, by the op or its spec; how errors are judged.

The batch has ragged sequences, an empty one and a fully masked one, prompts masked out, labels ignored here and
there, and a sequence that stands in several tuples. Budgets make one group of it, several, or components that alone
exceed the budget. Tiles are 16 x 128, so that every group has several.
"""

import pytest
import torch

from fastpo import objectives
from fastpo.dispatch import extension_missing
from fastpo.kernels.linear_preference_loss import linear_preference_loss, reference
from fastpo.kernels.linear_token_logprobs import gemm, planning
from fastpo.types import Pairs, Segments

BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(extension_missing("_C") is not None, reason="no _C"))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
H, V = 16, 300
LENGTHS = (9, 14, 6, 0, 20, 11, 5, 17, 8, 3)
TUPLES = ((0, 1), (2, 3), (4, 5), (6, 5), (8, 9), (4, 7))  # 4, 5, 6 and 7 are connected; 3 is empty
HEADS = {
    "plain": {},
    "softcap": {"bias": True, "logit_softcap": 4.0, "logit_scale": 1.5, "temperature": 0.7},
    "lora": {"lora": True, "bias": True, "temperature": "per row"},
}
LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")
BUDGETS = {"one group": None, "several groups": 80_000, "recomputed": 35_000}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (16, 128)})


def counted_operations(monkeypatch):
    """Counts what goes into the head's three products: a list of one number of operations per call."""
    counts = []

    def counted(function, size):
        def run(a, b, *rest, **named):
            counts.append(2 * a.shape[0] * a.shape[1] * size(b))
            return function(a, b, *rest, **named)

        return run

    for name, size in (("logits", 0), ("times", 1), ("outer", 1)):
        monkeypatch.setattr(gemm, name, counted(getattr(gemm, name), lambda b, dim=size: b.shape[dim]))
    return counts


class Problem:
    """Tensors and settings of one call, in fp32; ``call`` computes them in any type with the op or its spec."""

    def __init__(
        self, objective, lengths=LENGTHS, tuples=TUPLES, *, bias=False, lora=False, temperature=1.0, **settings
    ):
        generator = torch.Generator().manual_seed(0)
        self.objective, self.settings = objective, settings

        def normal(*shape, scale=1.0):
            return torch.randn(shape, generator=generator) * scale

        self.cu_seqlens = torch.cat(
            (torch.zeros(1, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64).cumsum(0))
        )
        n = self.num_tokens = int(self.cu_seqlens[-1])
        self.leaves = {"hidden": normal(n, H), "weight": normal(V, H, scale=2 * H**-0.5)}
        if bias:
            self.leaves["bias"] = normal(V)
        if lora:
            self.leaves |= {"lora_a": normal(3, H, scale=H**-0.5), "lora_b": normal(V, 3)}
        self.labels = torch.randint(V, (n,), generator=generator)
        self.labels[5::11] = -100
        self.mask = torch.ones(n, dtype=torch.bool)
        for i, (start, length) in enumerate(zip(self.cu_seqlens, lengths, strict=False)):
            self.mask[start : start + (length if i == 9 else length // 4)] = False
        self.ref_logps = -torch.rand(n, generator=generator) * 6 if objective.needs_reference else None
        self.fields = {}  # float fields of the segments
        self.columns = {}  # columns of the pairs
        self.temperature = torch.linspace(0.5, 2, n) if temperature == "per row" else temperature
        self.index = torch.tensor(tuples, dtype=torch.int64).view(
            -1, objective.num_members or 3
        )  # lists of any size: 3
        self._add_required(generator)

    def _add_required(self, generator):
        """What the objective cannot do without."""
        num_tuples = len(self.index)
        for name in self.objective.requires:
            record, _, column = name.partition(".")
            if record == "segments":
                self.fields[column] = torch.rand(self.num_tokens, generator=generator)
            else:
                shapes = {"targets": (num_tuples, len(self.objective.terms)), "relevance": self.index.shape}
                shape = shapes.get(column, (num_tuples,))
                self.columns[column] = torch.rand(shape, generator=generator)

    def to(self, device):
        """Itself, with everything moved to ``device``."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        for tensors in (self.leaves, self.fields, self.columns):
            tensors |= {name: x.to(device) for name, x in tensors.items()}
        return self

    def call(self, function, dtype, train=LEAVES, **more):
        """(what the function returns, gradients of the loss by name)."""
        with pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                patch.setenv("FASTPO_BACKEND", "torch")
            return self._call(function, dtype, train, **more)

    def _call(self, function, dtype, train, **more):
        leaves = {name: x.to(dtype).requires_grad_(name in train) for name, x in self.leaves.items()}
        own = torch.float64 if dtype == torch.float64 else torch.float32
        fields = {name: x.to(own).requires_grad_() for name, x in self.fields.items()}
        head = {"bias": leaves["bias"]} if "bias" in leaves else {}
        if "lora_a" in leaves:
            head["lora"] = (leaves["lora_a"], leaves["lora_b"], 0.5)
        temperature = self.temperature.to(own) if isinstance(self.temperature, torch.Tensor) else self.temperature
        out = function(
            leaves["hidden"],
            leaves["weight"],
            self.labels,
            None if self.ref_logps is None else self.ref_logps.to(own),
            Segments(self.cu_seqlens, self.mask, **fields),
            Pairs(self.index, **{name: x.to(own) for name, x in self.columns.items()}),
            self.objective,
            temperature=temperature,
            **head,
            **self.settings,
            **more,
        )
        loss = (out[0] if isinstance(out, tuple) else out).loss
        trained = {name: x for name, x in (leaves | fields).items() if x.requires_grad}
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True) if trained else ()
        return out, dict(zip(trained, grads, strict=True))

    def segments(self):
        return Segments(self.cu_seqlens, self.mask & (self.labels != -100))


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


def assert_as_exact(ours, torchs, exact, tiny, what):
    """``err <= 2 err_torch + tiny``, both against fp64."""
    assert ours.shape == exact.shape, what
    error, allowed = largest(ours.double() - exact), 2 * largest(torchs.double() - exact) + tiny
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def check(problem, dtype=torch.float32, train=LEAVES, **more):
    """Every output and gradient against the spec in fp64 and in the own type."""
    exact, exact_grads = problem.call(reference.spec, torch.float64, train)
    torchs, torchs_grads = problem.call(reference.spec, dtype, train)
    ours, grads = problem.call(linear_preference_loss, dtype, train, **more)
    for name in ("loss", "losses", "scores", "logps", "rewards", "nll"):
        value, truth = getattr(ours, name).detach(), getattr(exact, name).detach()
        assert value.dtype == torch.float32
        assert_as_exact(value, getattr(torchs, name).detach(), truth, 4e-6 * max(1.0, largest(truth)), name)
    assert torch.equal(ours.lengths, exact.lengths)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        truth, tiny = exact_grads[name], 2e-6 * largest(exact_grads[name]) + 1e-9
        assert_as_exact(grad, torchs_grads[name], truth, tiny, f"gradient of {name}")


def preset(name):
    """A preset's objective and tuples that suit it."""
    objective = objectives.by_name(name)
    if name == "selm":
        return objective, tuple((a, b, a) for a, b in TUPLES)
    if name == "kto":
        return objective, ((0, -1), (-1, 1), (2, -1), (-1, 5), (4, -1), (4, -1))
    return objective, TUPLES
