"""linear_preference_loss as an op: how it groups, what it costs and holds, torch's checks, what it refuses."""

import os
from dataclasses import replace

import pytest
import torch
from linear_preference_loss_cases import (  # noqa: F401
    BUDGETS,
    DTYPES,
    HEADS,
    H,
    Problem,
    V,
    backend,
    check,
    counted_operations,
    small_tiles,
)
from torch.utils.flop_counter import FlopCounterMode

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import linear_preference_loss, plan, reference
from fastpo.kernels.linear_preference_loss.grouping import components, fill, first_share
from fastpo.kernels.linear_token_logprobs import planning
from fastpo.types import Pairs, Segments


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


def test_two_groups_share_the_rows_about_equally():
    assert first_share(2048, 256, first_room=1792, room=1100) == 1024 + 255  # half, and what a component may overhang
    assert first_share(1536, 1, first_room=1344, room=448) == 1088  # no less than the second cannot take
    assert first_share(2048, 1, first_room=1280, room=448) == 1280  # three groups: all that fit
    assert first_share(1000, 900, first_room=950, room=500) == 950


def test_the_budget_of_a_cpu_counts_what_its_process_holds_besides():
    """12 MiB, nothing below 64 MiB: kept logits give way to it."""
    without = planning.plan(2048, 128256, 1024).state_bytes  # no budget is given
    for mib, besides in {63: 0, 64: 12, 300: 12}.items():
        counted = planning.plan(2048, 128256, 1024, memory_budget=mib * 2**20).state_bytes - without
        assert counted == besides * 2**20, mib


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


@pytest.mark.parametrize("most", [40, 80])
def test_a_chunk_of_more_rows_than_the_gradient_holds_lies_there_in_part(monkeypatch, most):
    """65 rows in chunks of 40 or 80, where the gradient has room for H = 16: the first tiles of the first chunk."""
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (most, 32)})
    problem = Problem(objectives.irpo())
    (group,) = plan(problem.segments(), Pairs(problem.index), V, H, memory_budget=100_000).groups
    chunk = group.head.row_chunk
    assert group.rows == 65 and chunk == min(most, 65) and group.head.gemms == 3
    assert group.head.lent_elements == chunk * (H * V // chunk // 32 * 32) > 0
    for dtype in DTYPES:
        check(problem, dtype, memory_budget=100_000)


def test_chunks_are_of_full_size_where_there_are_several_groups(monkeypatch):
    """A first group of more rows than a tile takes has a multiple of them."""
    cu_seqlens, index = torch.arange(101) * 8, torch.arange(100).view(-1, 2)
    monkeypatch.setattr(planning, "_LARGEST_TILE", {"cpu": (64, 128)})
    first, *others = plan(Segments(cu_seqlens), Pairs(index), 3000, 64, memory_budget=1_500_000).groups
    assert others and first.rows == first.head.row_chunk * (first.rows // 64) and first.head.row_chunk == 64


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize(("train", "work"), [((), 1), (("hidden",), 2), (("hidden", "weight"), 3), (("weight",), 2)])
def test_operations(monkeypatch, train, work, budget):
    """1F, 2F with a frozen head, 3F with a trained one, on the tokens that count alone; more where the plan says so."""
    operations = counted_operations(monkeypatch)
    problem = Problem(objectives.irpo())
    with FlopCounterMode(display=False) as counter:
        problem.call(linear_preference_loss, torch.float32, train, memory_budget=budget)
    assert counter.get_total_flops() == sum(operations)
    wanted = {"hidden_grad": "hidden" in train, "head_grad": "weight" in train, "memory_budget": budget}
    planned = plan(problem.segments(), Pairs(problem.index), V, H, **wanted)
    unit = 2 * int(problem.segments().mask.sum()) * H * V
    if not planned.recomputed:
        assert sum(operations) == work * unit and planned.gemms == work
    else:
        assert work * unit < sum(operations) <= (work + 1) * unit


def test_memory_stays_within_the_budget():
    """The allocator's peak during forward and backward, gradients not counted; eager takes many times more."""
    if os.environ["FASTPO_BACKEND"] == "torch":
        pytest.skip("the tile functions of the torch backend make copies of their own")
    problem = Problem(objectives.irpo(), (150, 120, 130, 140, 90, 110), ((0, 1), (2, 3), (4, 5)))
    weight = torch.randn(4000, H).requires_grad_()
    hidden = problem.leaves["hidden"].requires_grad_()
    given = (hidden, weight, problem.labels, problem.ref_logps, problem.segments(), Pairs(problem.index))
    budget = 5_000_000

    def peak(call):
        """Bytes that are allocated at once during a call, the gradients not counted."""
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return int(torch.tensor([0, *sizes]).cumsum(0).max())

    def step(function, **more):
        (2 * function(*given, problem.objective, **more).loss).backward()

    planned = plan(problem.segments(), Pairs(problem.index), 4000, H, memory_budget=budget)
    assert len(planned.groups) == 3 and planned.gemms == 3
    gradients = 4 * (hidden.numel() + weight.numel())
    assert peak(lambda: step(linear_preference_loss, memory_budget=budget)) <= budget + gradients
    assert peak(lambda: step(reference.spec)) > 5 * budget + gradients
    hidden.grad = weight.grad = None
    loss = 2 * linear_preference_loss(*given, problem.objective).loss
    assert peak(loss.backward) < 4 * weight.numel(), "the gradients should be scaled in place"


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
        r"weight, which is the reference's too, has shape \[300, 16\]; it should be \[V, 4\]",
    ),
    "reference bias": (
        {"ref_logps": None, "ref_hidden": torch.zeros(93, H), "ref_bias": torch.zeros(V)}, ValueError,
        r"ref_bias is given without ref_weight",
    ),
    "members": ({"pairs": Pairs(torch.zeros(2, 3, dtype=torch.int64))}, ValueError, r"pairs.index is .* \[2, 3\]"),
    "pair out of range": ({"pairs": Pairs(torch.tensor([[0, 10]]))}, ValueError, r"pairs.index should lie in \[-1, 10"),
    "label out of range": ({"labels": torch.full((93,), V)}, ValueError, r"labels has 300 at position 2"),
    "reference bias's size": (
        {"ref_logps": None, "ref_hidden": torch.ones(93, 4), "ref_weight": torch.ones(V, 4), "ref_bias": torch.ones(3)},
        ValueError, r"ref_bias has shape \[3\]; it should be \[300\], ref_weight being \[300, 4\]",
    ),
    "reference's type": (
        {"ref_logps": None, "ref_hidden": torch.zeros(93, H), "ref_weight": torch.zeros(V, H).half()}, TypeError,
        r"ref_weight is torch.float16; it should be torch.float32, as ref_hidden is",
    ),
    "quantised reference": (
        {"ref_logps": None, "ref_hidden": torch.zeros(93, H), "ref_weight": torch.zeros(V, H, dtype=torch.int8)},
        TypeError, r"ref_weight is torch.int8 Tensor; it should be a torch.float32 tensor: quantised heads",
    ),
    "reference's vocabulary": (
        {"ref_logps": None, "ref_hidden": torch.zeros(93, H), "ref_weight": torch.zeros(V - 1, H)}, ValueError,
        r"ref_weight has shape \[299, 16\]; it should be \[300, 16\], weight being",
    ),
    "reference with gradient": (
        {"ref_logps": None, "ref_hidden": torch.zeros(93, H, requires_grad=True)}, ValueError,
        r"ref_hidden requires grad; the reference is a constant",
    ),
    "reference as a list": ({"ref_logps": [0.0] * 93}, TypeError, r"ref_logps is a list; it should be a tensor"),
    "nothing ignored": ({"ignore_index": None}, TypeError, r"ignore_index is None; it should be an integer"),
    "no tensor": ({"hidden": None}, TypeError, r"hidden is a NoneType; it should be a tensor"),
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
