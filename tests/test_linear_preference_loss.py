"""linear_preference_loss against its spec in fp64: all the logits, then preference_loss. Errors as same-type torch's.

The batch has ragged sequences, an empty one and a fully masked one, prompts masked out, labels ignored here and
there, and a sequence that stands in several tuples. Budgets make one group of it, several, or components that alone
exceed the budget. Tiles are 16 x 128, so that every group has several.
"""

from dataclasses import replace

import pytest
import torch

from fastpo import objectives
from fastpo.dispatch import extension_missing
from fastpo.kernels.linear_preference_loss import linear_preference_loss, plan, reference
from fastpo.kernels.linear_preference_loss.grouping import components, fill
from fastpo.kernels.linear_token_logprobs import gemm, planning
from fastpo.kernels.token_logprobs import STATS
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
BUDGETS = {"one group": None, "several groups": 100_000, "recomputed": 45_000}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTPO_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (16, 128)})


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


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_preset(name):
    """In several groups, with the gradients of the segments' fields where a preset needs them."""
    objective, tuples = preset(name)
    check(Problem(objective, tuples=tuples), memory_budget=BUDGETS["several groups"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_heads_types_and_budgets(head, budget, dtype):
    check(Problem(objectives.irpo(), **head), dtype, memory_budget=budget)


def test_the_budgets_are_what_their_names_say():
    problem = Problem(objectives.dpo())
    plans = {name: plan(problem.segments(), Pairs(problem.index), V, H, memory_budget=b) for name, b in BUDGETS.items()}
    assert len(plans["one group"].groups) == 1 and plans["one group"].gemms == 3
    assert 1 < len(plans["several groups"].groups) < 5 and plans["several groups"].gemms == 3
    assert plans["recomputed"].recomputed and 3 < plans["recomputed"].gemms < 4
    for name, budget in BUDGETS.items():
        assert budget is None or plans[name].bytes <= budget
        assert plans[name].rows == int(problem.segments().mask.sum())
    assert str(plans["recomputed"]).startswith("trained head, 3.")
    assert "beyond the budget" in str(plans["recomputed"])


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("train", [(), *((name,) for name in LEAVES), ("hidden", "lora_a")], ids="+".join)
def test_each_gradient_alone(train, budget):
    """No gradient at all, frozen heads, frozen hidden states, LoRA factors alone."""
    check(Problem(objectives.irpo(), **HEADS["lora"]), train=train, memory_budget=budget)


def test_fields_of_the_segments():
    """w, K, k, u and v, all with gradients; v is a term of the loss that the mean over tuples does not divide."""
    problem = Problem(objectives.irpo())
    generator = torch.Generator().manual_seed(3)
    for name in ("weights", "kl", "kl_weights", "nll_weights", "token_coefs"):
        problem.fields[name] = torch.rand(problem.num_tokens, generator=generator)
    for name in ("weights", "margins", "soft_labels", "beta_scales"):
        problem.columns[name] = torch.rand(len(problem.index), generator=generator)
    check(problem, memory_budget=BUDGETS["several groups"])


# ---------------------------------------------------------------- grouping


def test_components():
    index = torch.tensor([[7, 3, -1], [2, 5, 2], [3, 1, -1], [6, 6, 6]])
    assert components(index, 9).tolist() == [0, 1, 2, 1, 4, 2, 6, 1, 8]
    chain = torch.stack((torch.arange(200), torch.arange(1, 201)), dim=1).flip(0)
    assert components(chain, 201).tolist() == [0] * 201
    assert components(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 1, 2]


def test_fill_makes_few_groups_of_about_equal_size():
    assert fill([4] * 10, 100, 100) == [0] * 10
    assert fill([5] * 9, 10, 20) == [0, 0, 1, 1, 1, 1, 2, 2, 2]  # not four, four, and one; the first has its own room
    assert fill([5] * 8, 10, 20) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert fill([3, 50, 3, 3], 30, 10) == [1, 0, 1, 1]  # what is larger than the room comes first
    assert fill([3, 50, 3, 30], 60, 10) == [0, 0, 0, 1]
    assert fill([], 10, 10) == [] and fill([2, 3], 0, 0) == [1, 0]


def test_the_gradient_of_the_weight_lends_its_memory():
    """Up to H rows cost 3F at a budget that holds no logits; twice as many where fp32 sums of narrow gradients do."""
    for dtype, wide in ((torch.float32, 1), (torch.bfloat16, 2)):
        shape = {"hidden_size": 64, "vocab_size": 5000, "dtype": dtype}

        def planned(rows, num_pairs=1, **wanted):
            cu_seqlens = torch.arange(2 * num_pairs + 1) * (rows // (2 * num_pairs))
            index = torch.arange(2 * num_pairs).view(-1, 2)
            return plan(Segments(cu_seqlens), Pairs(index), memory_budget=250_000, **shape, **wanted)  # noqa: B023

        assert planned(64).gemms == 3 and len(planned(64).groups) == 1
        assert planned(64 * wide + 16).gemms > 3
        assert planned(64, weight_grad=False).gemms > 3
        several = planned(64 * wide + 20, 10)
        assert several.groups[0].rows > 50 * wide and several.groups[0].head.gemms == 3


@pytest.mark.parametrize("name", ["irpo", "cpo", "orpo", "sppo"])
def test_independent_of_the_grouping(name):
    """To 1e-6; cpo and orpo normalise by the tokens of all tuples."""
    objective, tuples = preset(name)
    problem = Problem(objective, tuples=tuples, **HEADS["lora"])
    out, grads = problem.call(linear_preference_loss, torch.float32)
    for budget in (130_000, BUDGETS["several groups"], BUDGETS["recomputed"]):
        other, other_grads = problem.call(linear_preference_loss, torch.float32, memory_budget=budget)
        torch.testing.assert_close(other.loss, out.loss, rtol=1e-6, atol=1e-6)
        for key, grad in grads.items():
            assert largest(grad - other_grads[key]) <= 1e-6 * max(1.0, largest(grad)), key


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_runs(dtype, budget):
    problem = Problem(objectives.irpo(), **HEADS["lora"])
    first, again = (problem.call(linear_preference_loss, dtype, memory_budget=budget) for _ in range(2))
    assert torch.equal(first[0].loss, again[0].loss)
    assert all(torch.equal(grad, again[1][name]) for name, grad in first[1].items())


@pytest.fixture
def operations(monkeypatch):
    """Counts what goes into the head's three products: a list of one number of operations per call."""
    counts = []

    def counted(function, size):
        def run(a, b):
            counts.append(2 * a.shape[0] * a.shape[1] * size(b))
            return function(a, b)

        return run

    for name, size in (("logits", 0), ("logits_for_gradient", 0), ("times", 1), ("outer", 1)):
        monkeypatch.setattr(gemm, name, counted(getattr(gemm, name), lambda b, dim=size: b.shape[dim]))
    return counts


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize(("train", "work"), [((), 1), (("hidden",), 2), (("hidden", "weight"), 3), (("weight",), 2)])
def test_operations(operations, train, work, budget):
    """1F, 2F with a frozen head, 3F with a trained one, on the tokens that count alone; more where the plan says so."""
    problem = Problem(objectives.irpo())
    problem.call(linear_preference_loss, torch.float32, train, memory_budget=budget)
    wanted = {"hidden_grad": "hidden" in train, "head_grad": "weight" in train, "memory_budget": budget}
    planned = plan(problem.segments(), Pairs(problem.index), V, H, **wanted)
    unit = 2 * int(problem.segments().mask.sum()) * H * V
    if not planned.recomputed:
        assert sum(operations) == work * unit and planned.gemms == work
    else:
        assert work * unit < sum(operations) <= (work + 1) * unit


def test_shared_rows_of_a_tree():
    """Several labels per hidden row, rows that labels of different groups share, rows that nothing asks for."""
    problem = Problem(objectives.irpo(), **HEADS["softcap"])
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, problem.num_tokens // 2, (problem.num_tokens,), generator=generator)
    rows[40:60] = rows[0:20]
    problem.labels[40:50] = problem.labels[0:10]
    problem.settings["rows"] = rows
    for budget in BUDGETS.values():
        check(problem, memory_budget=budget)


# ---------------------------------------------------------------- the reference model in the same call


@pytest.mark.parametrize("own_head", [True, False], ids=["its own head", "the policy's head"])
def test_reference_in_the_same_call(operations, own_head):
    """Equal to passing its log-probs, 1F more; the policy's head is taken without its adapters."""
    problem = Problem(objectives.dpo(), **HEADS["lora"])
    generator = torch.Generator().manual_seed(7)
    more = {"ref_hidden": torch.randn(problem.num_tokens, H, generator=generator)}
    if own_head:
        more |= {"ref_weight": torch.randn(V, H, generator=generator), "ref_bias": torch.randn(V, generator=generator)}
    problem.ref_logps = None
    expected, expected_grads = problem.call(reference.spec, torch.float32, **more)
    out, grads = problem.call(linear_preference_loss, torch.float32, **more)
    assert sum(operations) == 2 * int(problem.segments().mask.sum()) * V * (4 * H + 3)  # and LoRA's part of dhidden
    torch.testing.assert_close(out.loss, expected.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- edges


def test_statistics_of_tokens():
    problem = Problem(objectives.irpo(), **HEADS["softcap"])
    more = {"stats": ("logps", *STATS), "topk": 5, "label_set": torch.tensor([3, 250])}
    alone, _ = problem.call(linear_preference_loss, torch.float32)
    for budget in BUDGETS.values():
        (out, stats), _ = problem.call(linear_preference_loss, torch.float32, memory_budget=budget, **more)
        torch.testing.assert_close(out.loss, alone.loss, rtol=1e-6, atol=1e-6)
        mask = problem.segments().mask
        labels = torch.where(mask, problem.labels, -100)
        settings = {name: problem.settings[name] for name in ("logit_softcap", "logit_scale")}
        expected = reference.from_hidden.spec(
            problem.leaves["hidden"], problem.leaves["weight"], labels, bias=problem.leaves["bias"], topk=5,
            label_set=more["label_set"], temperature=problem.temperature, **settings,
        )  # fmt: skip
        assert list(stats) == list(more["stats"])
        for name, values in stats.items():
            assert not values.requires_grad
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)


def test_empty_and_all_masked():
    """Nothing to compute: a loss of 0 and gradients of 0, never NaN."""
    for lengths, tuples in (((0, 0), ((0, 1),)), ((), ()), ((4, 5), ()), ((6, 7), ((0, 1),))):
        problem = Problem(objectives.irpo(), lengths, tuples, **HEADS["lora"])
        problem.mask[:] = not tuples
        check(problem)


def test_upstream_gradient_and_a_retained_graph():
    """The gradients scale with what comes from above, and a second backward gives them again."""
    problem = Problem(objectives.irpo())
    hidden, weight = (problem.leaves[name].requires_grad_() for name in ("hidden", "weight"))
    given = (hidden, weight, problem.labels, problem.ref_logps, problem.segments(), Pairs(problem.index))
    loss = linear_preference_loss(*given, problem.objective).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), torch.tensor(1.0).expand(()), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b, c in zip(once, again, thrice, strict=True):
        assert torch.equal(a, b) and torch.equal(3 * a, c)


def test_strided_views_and_batched_hidden_states():
    problem = Problem(objectives.dpo())
    n = problem.num_tokens - problem.num_tokens % 3
    lengths = (n // 3, n // 3, n // 3)
    problem = Problem(objectives.dpo(), lengths, ((0, 1), (2, 1)))
    expected, _ = problem.call(linear_preference_loss, torch.float32)
    wide = torch.stack((problem.leaves["hidden"], problem.leaves["hidden"]), dim=1).view(3, n // 3, 2 * H)
    weight = problem.leaves["weight"].t().contiguous().t()
    labels = problem.labels.view(3, -1).to(torch.int32)
    given = (problem.ref_logps.double().float(), problem.segments(), Pairs(problem.index), problem.objective)
    out = linear_preference_loss(wide[..., :H], weight, labels, *given)
    torch.testing.assert_close(out.loss, expected.loss)


def test_memory_stays_within_the_budget(backend):
    """The allocator's peak during forward and backward, gradients not counted; eager takes many times more."""
    if backend == "torch":
        pytest.skip("the tile functions of the torch backend make copies of their own")
    problem = Problem(objectives.irpo(), (150, 120, 130, 140, 90, 110), ((0, 1), (2, 3), (4, 5)))
    weight = torch.randn(4000, H).requires_grad_()
    hidden = problem.leaves["hidden"].requires_grad_()
    given = (hidden, weight, problem.labels, problem.ref_logps, problem.segments(), Pairs(problem.index))
    budget = 5_000_000

    def peak(function, **more):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(*given, problem.objective, **more).loss.backward()
        sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        total = torch.tensor(sizes).cumsum(0)
        hidden.grad = weight.grad = None
        return int(total.max()) - 4 * (hidden.numel() + weight.numel())

    planned = plan(problem.segments(), Pairs(problem.index), 4000, H, memory_budget=budget)
    assert len(planned.groups) == 3 and planned.gemms == 3
    assert peak(linear_preference_loss, memory_budget=budget) <= budget
    assert peak(reference.spec) > 5 * budget


# ---------------------------------------------------------------- compilation


def test_opcheck():
    problem = Problem(objectives.irpo(), **HEADS["lora"])
    calls = []
    op = torch.ops.fastpo.linear_preference_loss_fwd

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is op.default:
                calls.append(args)
            return function(*args, **(kwargs or {}))

    with Recorded():
        problem.call(linear_preference_loss, torch.float32, stats=("entropy",))
    arguments = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in calls[0]
    ]
    for place in (0, 1, 3, 6, 7):
        arguments[place].requires_grad_()
    torch.library.opcheck(op, tuple(arguments))


def test_compiles_without_graph_breaks():
    problem = Problem(objectives.irpo())
    hidden, weight = (problem.leaves[name].requires_grad_() for name in ("hidden", "weight"))
    given = (hidden, weight, problem.labels, problem.ref_logps, problem.segments(), Pairs(problem.index))

    def loss(*args):
        return 2 * linear_preference_loss(*args, problem.objective).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*given), (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(compiled(*given), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------- errors


ERRORS = {
    "no objective": ({"objective": "dpo"}, TypeError, r"objective is a str; it should be an Objective"),
    "labels": ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels has shape \[3\]; it should be"),
    "hidden size": ({"weight": torch.zeros(V, H + 1)}, ValueError, r"weight has shape \[300, 17\]; it should be"),
    "type": ({"weight": torch.zeros(V, H, dtype=torch.bfloat16)}, TypeError, r"weight is torch.bfloat16"),
    "no reference": ({"ref_logps": None}, ValueError, r"ref_logps is None; objective dpo needs the reference"),
    "two references": ({"ref_hidden": torch.zeros(93, H)}, ValueError, r"ref_logps and ref_hidden are both given"),
    "headless reference": ({"ref_weight": torch.zeros(V, H)}, ValueError, r"ref_weight is given without ref_hidden"),
    "reference rows": (
        {"ref_logps": None, "ref_hidden": torch.zeros(5, H)}, ValueError, r"ref_hidden has \[5\] rows on cpu",
    ),
    "reference head": (
        {"ref_logps": None, "ref_hidden": torch.zeros(93, 4)}, ValueError,
        r"weight, which is the reference's too, has shape \[300, 16\]; it should be \[300, 4\]",
    ),
    "reference bias": (
        {"ref_logps": None, "ref_hidden": torch.zeros(93, H), "ref_bias": torch.zeros(V)}, ValueError,
        r"ref_bias is given without ref_weight",
    ),
    "members": ({"pairs": Pairs(torch.zeros(2, 3, dtype=torch.int64))}, ValueError, r"pairs.index is .* \[2, 3\]"),
    "pair out of range": ({"pairs": Pairs(torch.tensor([[0, 10]]))}, ValueError, r"pairs.index should lie in \[-1, 10"),
    "label out of range": ({"labels": torch.full((93,), V)}, ValueError, r"labels has 300 at position 2"),
    "budget": ({"memory_budget": 3000}, ValueError, r"memory_budget is 3000 bytes; it should be at least \d+"),
    "no budget": ({"memory_budget": 0}, ValueError, r"memory_budget is 0"),
    "temperature": ({"temperature": 0.0}, ValueError, r"temperature is 0.0; it should be a positive number"),
    "statistics": ({"stats": ("entropi",)}, ValueError, r"stats contains 'entropi'"),
    "statistics as a string": ({"stats": "logps"}, TypeError, r"stats is the string 'logps'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(change, kind, message):
    problem = Problem(objectives.dpo())
    assert problem.num_tokens == 93
    arguments = {
        "hidden": problem.leaves["hidden"],
        "weight": problem.leaves["weight"],
        "labels": problem.labels,
        "ref_logps": problem.ref_logps,
        "segments": replace(problem.segments(), mask=problem.mask),
        "pairs": Pairs(problem.index),
        "objective": problem.objective,
    }
    with pytest.raises(kind, match=message) as refused:
        linear_preference_loss(**(arguments | change))
    assert "\n" not in str(refused.value)
