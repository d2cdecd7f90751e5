"""linear_token_logprobs as an op: what it costs, torch's checks of custom ops, torch.compile, what it refuses."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastpo.dispatch import extension_missing
from fastpo.kernels.linear_token_logprobs import gemm, linear_token_logprobs, plan, planning
from fastpo.kernels.linear_token_logprobs.op import OP

H, V = 16, 300


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (8, 128), "cuda": (8192, 8192)})


def problem(n=20, h=H, v=V, dtype=torch.float32):
    """hidden [n, h], weight [v, h], labels [n] of which a quarter are ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(v, (n,), generator=generator)
    labels[::4] = -100
    return torch.randn(n, h, generator=generator).to(dtype), torch.randn(v, h, generator=generator).to(dtype), labels


@pytest.fixture
def counted(monkeypatch):
    """Operations of the GEMMs that the library was really asked for: a list of 2 M N K."""
    found = []

    def counting(function):
        def call(a, b, *rest, **named):
            found.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return function(a, b, *rest, **named)

        return call

    monkeypatch.setattr(torch, "mm", counting(torch.mm))
    monkeypatch.setattr(gemm, "_multiply", counting(gemm._multiply))
    return found


def work(counted, run) -> tuple[float, float]:
    """(what FlopCounterMode says, what the library was asked for) while ``run()`` runs."""
    counted.clear()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops(), sum(counted)


@pytest.mark.parametrize("train, forward, backward", [("", 1, 0), ("h", 2, 0), ("w", 1, 1), ("hw", 2, 1)])
def test_flops_of_each_mode(counted, train, forward, backward):
    """1F, 2F frozen, 3F trained, on the tokens that count alone: 15 of 20 rows."""
    hidden, weight, labels = problem()
    hidden.requires_grad_("h" in train)
    weight.requires_grad_("w" in train)
    f = 2 * int((labels >= 0).sum()) * H * V
    found = []
    assert work(counted, lambda: found.append(linear_token_logprobs(hidden, weight, labels))) == (forward * f,) * 2
    if train:
        assert work(counted, lambda: found[0].sum().backward()) == (backward * f,) * 2
    said = plan(20, V, H, hidden_grad="h" in train, head_grad="w" in train)
    assert said.gemms == forward + backward


def test_flops_where_the_budget_ends(counted):
    """4F with nothing kept, between 3F and 4F with some of the tiles; the plan says so before."""
    hidden, weight, labels = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = labels.clamp_min(0)
    f = 2 * 20 * H * V
    for share in (0, 0.5):
        budget = budget_that_keeps(share * 20 * V)
        said = plan(20, V, H, memory_budget=budget)
        run = partial(linear_token_logprobs, hidden, weight, labels, memory_budget=budget)
        flops, asked = work(counted, lambda run=run: run().sum().backward())
        assert flops == asked
        assert said.gemms == pytest.approx(4 - said.kept_elements / (20 * V))
        assert said.gemms <= flops / f <= said.gemms + 8 * 128 / (20 * V)  # a tile is kept whole or not at all


def least_budget(n: int, v: int, h: int) -> int:
    """The smallest memory budget that is not refused."""
    return int(re.search(r"at least (\d+)", refusal(lambda: plan(n, v, h, memory_budget=1))).group(1))


def budget_that_keeps(elements: float) -> int:
    """The smallest memory budget, to 100 bytes, that keeps so many elements."""
    least = least_budget(20, V, H)
    budgets = range(least, 20 * least, 100)
    return next(b for b in budgets if plan(20, V, H, memory_budget=b).kept_elements >= elements)


def test_flops_of_shared_rows_and_lora(counted):
    """A row that predicts three labels is computed once; LoRA costs its small products."""
    hidden, weight, _ = problem()
    hidden.requires_grad_()
    rows, labels = torch.tensor([3, 3, 3, 9, 12]), torch.tensor([0, 5, 299, 1, -100])
    f = 2 * 2 * H * V
    assert work(counted, lambda: linear_token_logprobs(hidden, weight, labels, rows=rows)) == (2 * f,) * 2
    rank = 2
    a, b = torch.randn(rank, H, requires_grad=True), torch.randn(V, rank, requires_grad=True)
    small, tiny = 2 * 2 * rank * V, 2 * 2 * rank * H
    logps = []
    run = lambda: logps.append(linear_token_logprobs(hidden, weight, labels, rows=rows, lora=(a, b, 0.5)))  # noqa: E731
    assert work(counted, run) == (2 * (f + small) + tiny,) * 2
    assert work(counted, lambda: logps[0].sum().backward()) == (small + 3 * tiny,) * 2


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_opcheck(ignored, everything):
    """With ignored labels nothing is kept: what is kept of fewer rows than there are is not written to its end."""
    hidden, weight, labels = problem(6, 4, 11)
    labels = labels if ignored else labels.clamp_min(0)
    rank = (2,) if everything else ()
    bias, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((11,), (*rank, 4), (11, *rank)))
    rows, temperatures = torch.tensor([5, 4, 1, 0, 2, 3]), torch.linspace(1, 2, 6)
    optional = (bias, rows, temperatures, a, b) if everything else (None,) * 5
    tensors = (hidden.requires_grad_(), weight.requires_grad_(), labels, *optional)
    budget = least_budget(6, 11, 4) if ignored else None
    scalars = (0.5, 1.0, 1.5, 3.0 if everything else 0.0, -100, budget, "")
    forward = (None, "entropy" if everything else "", 10, True, True)
    assert plan(6, 11, 4, memory_budget=budget).kept_elements == (0 if ignored else 66)
    torch.library.opcheck(torch.ops.fastpo.linear_token_logprobs_fwd, (*tensors, *scalars, *forward))


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile(dynamic):
    """One graph, whatever is ignored: forward, statistics, backward; also where sizes are dynamic."""

    def loss(hidden, weight, labels):
        logps, stats = linear_token_logprobs(hidden * 2, weight, labels, stats=("entropy",))
        return logps.sum() - 0.1 * stats["entropy"].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (20, 12):
        hidden, weight, labels = problem(n)
        leaves = (hidden.requires_grad_(), weight.requires_grad_())
        expected = torch.autograd.grad(loss(*leaves, labels), leaves)
        found = torch.autograd.grad(compiled(*leaves, labels), leaves)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    """Everything that is differentiable, in float64, against finite differences."""
    hidden, weight, labels = problem(5, 3, 7, torch.float64)
    bias, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((7,), (2, 3), (7, 2)))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias, a, b)]
    rows = torch.tensor([0, 0, 3, 4, 4])

    def function(hidden, weight, bias, a, b):
        logps, stats = linear_token_logprobs(
            hidden, weight, labels, rows=rows, bias=bias, lora=(a, b, 0.7), logit_softcap=2.0, temperature=0.8,
            stats=("logsumexp", "entropy", "sum_p2"),
        )  # fmt: skip
        return logps, *stats.values()

    torch.autograd.gradcheck(function, leaves)


def peak_memory(run) -> int:
    """Bytes of resident memory that ``run`` adds at its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = run()
    del kept
    return (status("VmHWM") - before) * 1024


def status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.skipif(extension_missing("_C") is not None, reason="no _C")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_within_the_budget(monkeypatch):
    """Logits would take 96 MiB; the budgets hold next to nothing and half of them."""
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (256, 1024)})
    torch.use_deterministic_algorithms(False)  # it writes to all that is allocated
    hidden, weight, labels = problem(1536, 64, 16384)
    hidden.requires_grad_()
    weight.requires_grad_()
    gradients = 4 * (hidden.numel() + weight.numel())

    def run(budget):
        logps = linear_token_logprobs(hidden, weight, labels.clamp_min(0), memory_budget=budget)
        return torch.autograd.grad(logps.sum(), (hidden, weight))

    run(2**30)
    for budget in (12 * 2**20, 60 * 2**20):
        assert peak_memory(lambda budget=budget: run(budget)) <= budget + gradients + 3 * 2**20


def refusal(run) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as refused:
        run()
    return str(refused.value)


def call(**changes):
    hidden, weight, labels = problem()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | changes
    return refusal(lambda: linear_token_logprobs(**arguments))


A, B = torch.randn(2, H), torch.randn(V, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": torch.zeros(20, H, dtype=torch.int64)}, "hidden is torch.int64; it should be float32"),
        ({"hidden": torch.zeros(H)}, "hidden has shape [16]; it should be [..., H], two dimensions"),
        ({"weight": torch.zeros(V, H + 1)}, "weight has shape [300, 17]; it should be [V, 16], hidden being [..., 16]"),
        ({"weight": torch.zeros(0, H)}, "weight has shape [0, 16]; it should be [V, 16]"),
        ({"weight": torch.zeros(V, H).bfloat16()}, "weight is torch.bfloat16; it should be torch.float32, as hidden"),
        ({"weight": torch.zeros(V, H, dtype=torch.int8)}, "weight is torch.int8 Tensor; it should be a torch.float32"),
        ({"weight": torch.zeros(V, H, device="meta")}, "weight is on meta; it should be on cpu, where hidden is"),
        ({"labels": torch.zeros(19, dtype=torch.int64)}, "labels has shape [19]; it should be [20], as hidden without"),
        ({"labels": torch.zeros(20)}, "labels is torch.float32; it should be an integer type"),
        ({"labels": torch.full((20,), V)}, "labels has 300 at position 0; it should be from 0 to 299, or ignore_index"),
        ({"rows": torch.zeros(20)}, "rows is torch.float32; it should be an integer type"),
        ({"rows": torch.zeros(7, dtype=torch.int64)}, "rows has shape [7]; it should be [20], as labels"),
        ({"rows": torch.full((20,), 20)}, "rows has 20 at position 1; it should be from 0 to 19, the rows of hidden"),
        ({"bias": torch.zeros(V + 1)}, "bias has shape [301]; it should be [300], weight being [300, 16]"),
        ({"bias": torch.zeros(V).half()}, "bias is torch.float16; it should be torch.float32, as weight is"),
        ({"lora": (A, B)}, "lora is tuple; it should be a tuple (A [r, H], B [V, r], scale)"),
        ({"lora": (A.t(), B, 1.0)}, "lora A has shape [16, 2]; it should be [16, 16]"),
        ({"lora": (A, B[:, :1], 1.0)}, "lora B has shape [300, 1]; it should be [300, 2]"),
        ({"temperature": 0.0}, "temperature is 0.0; it should be a positive number"),
        ({"temperature": torch.ones(19)}, "temperature has shape [19]; it should be [20], one per hidden row"),
        ({"temperature": torch.zeros(20)}, "temperature has 0.0 at row 0; it should be positive"),
        ({"temperature": torch.ones(20, requires_grad=True)}, "temperature requires grad; it takes no gradient"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0; it should be a number other than 0"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0; it should be a positive number"),
        ({"stats": "entropy"}, "stats is the string 'entropy'; it should be a sequence of names"),
        ({"stats": ("entrpy",)}, "stats contains 'entrpy'; it should contain only logsumexp"),
        ({"stats": ("topk_mass",), "topk": 0}, "topk is 0; it should be from 1 to 16"),
        ({"stats": ("label_set_prob",)}, "label_set is missing; it should be given exactly when"),
        ({"memory_budget": 0}, "memory_budget is 0; it should be a positive number of bytes"),
        ({"memory_budget": 1000}, "memory_budget is 1000 bytes; it should be at least"),
        ({"memory_budget": 1e9}, "memory_budget is 1000000000.0; it should be a whole number of bytes, or None"),
        ({"hidden": None}, "hidden is a NoneType; it should be a tensor"),
        ({"hidden": torch.zeros(20, H, device="meta")}, "weight is on cpu; it should be on meta, where hidden is"),
        ({"hidden": torch.zeros(20, H).to_sparse()}, "hidden is torch.sparse_coo; it should be torch.strided"),
        ({"weight": torch.zeros(V, H).to_sparse()}, "weight is torch.sparse_coo; it should be torch.strided"),
        ({"weight": torch.zeros(V, H).to(torch.float8_e5m2)}, "weight is torch.float8_e5m2; it should be"),
        ({"labels": [0] * 20}, "labels is a list; it should be a tensor"),
        ({"bias": [0.0] * V}, "bias is a list; it should be a tensor"),
        ({"lora": (A, B, torch.ones(()))}, "lora scale is a Tensor; it should be a number"),
        ({"temperature": [1.0] * 20}, "temperature is a list; it should be a number or a tensor"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, "logit_scale is a Tensor; it should be a number"),
        ({"logit_softcap": "30"}, "logit_softcap is a str; it should be a number"),
        ({"ignore_index": 1.5}, "ignore_index is 1.5; it should be an integer, or None where every label counts"),
        ({"stats": ("topk_mass",), "topk": 2.0}, "topk is 2.0; it should be from 1 to 16"),
        ({"group": 3}, "group is a int; it should be a process group, or the name of one"),
    ],
)  # fmt: skip
def test_what_it_refuses(changes, message):
    """One line that names the argument, what it is and what it should be."""
    said = call(**changes)
    assert said.startswith(message)
    assert "\n" not in said


def test_a_quantised_head_is_refused():
    class Params4bit(torch.Tensor):
        pass

    head = torch.zeros(V, H).as_subclass(Params4bit)
    assert "quantised heads are not supported" in call(weight=head)
    assert call(hidden=torch.zeros(20, H).as_subclass(Params4bit)).startswith("hidden is a Params4bit; it should be a")


def test_tensors_of_the_meta_device_have_shapes_alone():
    hidden, weight, labels = (t.to("meta") for t in problem())
    logps, stats = linear_token_logprobs(hidden, weight.requires_grad_(), labels, stats=("entropy",))
    assert logps.is_meta and logps.shape == stats["entropy"].shape == (20,) and logps.requires_grad


def test_the_plan_in_words():
    frozen = plan(4096, 128256, 4096, head_grad=False, dtype=torch.bfloat16, device="cuda")
    assert str(frozen).startswith("frozen head, 2.00F, ")
    trained = plan(8192, 128256, 4096, dtype=torch.bfloat16, device="cuda")
    assert "F for logits again that memory_budget does not hold" in str(trained)
    assert trained.bytes == trained.state_bytes + trained.tile_bytes + trained.kept_bytes


def test_the_backends_in_order():
    assert [backend.name for backend in OP.backends] == ["triton", "cpu", "torch"]
