"""``preference_loss`` and ``sequence_scores``: the C++ and the torch backend, autograd, compilation, errors.

The vectors of the C++ backend are 4, 8 or 16 floats wide and four of them make a step; it computes phi of 512 tokens at
a time and the links of 128 tuples: LENGTHS, sequences of 1300 and 700, and an index of 700 tuples cross each edge.
"""

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from preference_loss_cases import EVERY_FIELD, INDEX, LENGTHS, LISTED, Batch
from preference_loss_common import *  # noqa: F403
from torch._subclasses import FakeTensorMode

from fastpo import objectives
from fastpo.dispatch import extension_missing
from fastpo.kernels.preference_loss import preference_loss, sequence_scores
from fastpo.kernels.preference_loss.records import TupleSettings, token_settings, tokens_of, tuples_of
from fastpo.objectives import PRESETS, Objective, Term
from fastpo.types import Pairs, PreferenceOutput, Segments

NO_CPP = extension_missing("_C")


def backends() -> list[str]:
    """Those of this machine, the C++ one for each instruction set that it has."""
    flags = torch.backends.cpu.get_cpu_capability()
    isas = ["generic"] + ["avx2"] * (flags in ("AVX2", "AVX512")) + ["avx512"] * (flags == "AVX512")
    return ["torch", *(f"cpu {isa}" for isa in isas if NO_CPP is None)]


@pytest.fixture(params=backends())
def backend(request, monkeypatch) -> str:
    name, _, isa = request.param.partition(" ")
    monkeypatch.setenv("FASTPO_CPU_ISA", isa)
    monkeypatch.setenv("FASTPO_BACKEND", name)
    return name


def test_two_phases_make_one(backend, monkeypatch):
    """The scores of the first phase, passed on as those of the second, give the same loss and the same gradient."""
    batch = Batch(objectives.irpo())
    _, (logps, ref, segments, pairs, objective) = batch.arguments(torch.float32)
    scores = sequence_scores(logps, ref, segments, objective)
    two = preference_loss(logps, None, segments, pairs, objective, scores=scores).loss
    one = preference_loss(logps, ref, segments, pairs, objective).loss
    assert torch.equal(one, two)
    grads = (torch.autograd.grad(loss, logps)[0] for loss in (one, two))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


def test_no_tuples_cost_nothing(backend):
    """Loss 0 with gradient 0, so that a step without pairs is a step of nothing; the scores are there all the same."""
    logps = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    pairs = Pairs(torch.empty(0, 2, dtype=torch.int64))
    out = preference_loss(logps, torch.zeros(3), Segments(torch.tensor([0, 2, 3])), pairs, objectives.dpo())
    assert out.loss == 0 and out.scores.tolist() == [-3.0, -3.0] and out.accuracy.isnan()
    assert torch.autograd.grad(out.loss, logps)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_sequence_without_tokens_adds_nothing(name, backend):
    """All of it masked: its score, its NLL and its gradients are 0, and nothing is NaN."""
    objective = PRESETS[name]()
    batch = Batch(objective, (4, 3, 5), ((1, 0, 2),))
    batch.mask = torch.tensor([True] * 4 + [False] * 3 + [True] * 5)
    leaves, (logps, ref, segments, pairs, _) = batch.arguments(torch.float32)
    out = preference_loss(logps, ref, segments, pairs, objective)
    grads = torch.autograd.grad(out.loss, leaves.values(), allow_unused=True)
    assert out.loss.isfinite() and out.scores[1] == 0
    if objective.couple is None:  # else the tuples are others
        assert out.nll[0, 0] == 0 and out.rewards[0, 0] == 0
    assert all(g is None or (g.isfinite().all() and not g[4:7].any()) for g in grads)


@pytest.mark.parametrize("name", ["dpo", "orpo", "alphapo", "f_dpo"])
def test_a_sequence_without_tokens_counts_like_an_absent_one(name, backend):
    """Under every score map: f(S) of an empty sequence is 0, where ORPO's log-odds has a pole."""
    objective = PRESETS[name]()
    logps, ref = -torch.rand(4), -torch.rand(4) if objective.needs_reference else None
    pairs = Pairs(torch.tensor([[0, 1], [0, -1]]))
    out = preference_loss(logps, ref, Segments(torch.tensor([0, 4, 4])), pairs, objective)
    assert out.losses[0] == out.losses[1]


def test_a_term_without_members_is_left_out(backend):
    """KTO's tuples have one side only: the other's term does not count as one of score 0."""
    objective = objectives.kto(beta=1.0)
    pairs = Pairs(torch.tensor([[0, -1], [-1, 0], [-1, -1]]), margins=torch.zeros(3))
    out = preference_loss(torch.tensor([-2.0]), torch.zeros(1), Segments(torch.tensor([0, 1])), pairs, objective)
    chosen = torch.sigmoid(torch.tensor(2.0))
    torch.testing.assert_close(out.losses, torch.stack((chosen, 1 - chosen, torch.tensor(0.0))))


def test_deterministic_and_the_same_with_one_thread(backend, monkeypatch):
    """A sequence stands in several tuples; sums are in the order of the tuples whatever the threads do."""
    index = torch.randint(-1, len(LENGTHS), (1500, 3), generator=torch.Generator().manual_seed(0)).tolist()
    batch = Batch(LISTED, LENGTHS * 40, index, ("segments.token_coefs", "segments.weights"))
    runs = [batch.run(torch.float32, monkeypatch, backend) for _ in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs.append(batch.run(torch.float32, monkeypatch, backend))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_integer_types(dtype, backend):
    logps, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.zeros(3)
    segments, pairs = Segments(torch.tensor([0, 2, 3], dtype=dtype)), Pairs(torch.tensor([[1, 0]], dtype=dtype))
    out = preference_loss(logps, ref, segments, pairs, objectives.dpo())
    assert out.scores.tolist() == [-3.0, -3.0] and out.lengths.tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype, backend):
    """Log-probs in 16 bits are widened first; their gradient comes back in their type."""
    batch = Batch(objectives.irpo())
    _, (logps, ref, segments, pairs, objective) = batch.arguments(torch.float32)
    narrow = logps.detach().to(dtype).requires_grad_()
    out = preference_loss(narrow, ref.to(dtype), segments, pairs, objective)
    wide = narrow.detach().float().requires_grad_()
    expected = preference_loss(wide, ref.to(dtype).float(), segments, pairs, objective)
    assert out.loss.dtype == torch.float32 and torch.equal(out.loss, expected.loss)
    grad, wide_grad = torch.autograd.grad(out.loss, narrow)[0], torch.autograd.grad(expected.loss, wide)[0]
    assert grad.dtype == dtype and torch.equal(grad, wide_grad.to(dtype))


def test_strided_inputs_and_expanded_gradients(backend):
    """Every other element of everything; the gradient of ``scores.sum()`` has stride 0."""
    batch = Batch(objectives.sparse_po(), fields=("segments.kl_weights",))
    _, (logps, ref, segments, pairs, objective) = batch.arguments(torch.float32)

    def strided(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.detach().repeat_interleave(2, dim=0)[::2]

    names = [f.name for f in fields(Segments)]
    apart = Segments(**{name: strided(getattr(segments, name)) for name in names})
    twin = strided(logps).requires_grad_()
    spread = Pairs(pairs.index.repeat_interleave(2, dim=1)[:, ::2])
    ours = preference_loss(twin, strided(ref), apart, spread, objective)
    whole = preference_loss(logps, ref, segments, pairs, objective)
    assert torch.equal(ours.losses, whole.losses)
    assert torch.equal(torch.autograd.grad(ours.loss, twin)[0], torch.autograd.grad(whole.loss, logps)[0])
    scores = sequence_scores(logps, ref, segments, objective)
    (grad,) = torch.autograd.grad(scores.sum(), logps, retain_graph=True)
    assert torch.equal(grad, torch.autograd.grad(scores, logps, torch.ones_like(scores))[0])


def test_outputs(backend):
    """What is reported, by hand; only the loss carries gradient."""
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    segments = Segments(torch.tensor([0, 1, 4]), mask=torch.tensor([True, True, True, False]))
    pairs = Pairs.of(torch.tensor([0, 1, 0]), torch.tensor([1, 0, -1]))
    out = preference_loss(logps, torch.full((4,), -0.5), segments, pairs, objectives.dpo(beta=0.5))
    assert out.scores.tolist() == [-0.5, -4.0] and out.logps.tolist() == [-1.0, -5.0] and out.lengths.tolist() == [1, 2]
    assert out.rewards.tolist() == [[-0.25, -2.0], [-2.0, -0.25], [-0.25, 0.0]]
    assert out.nll.tolist() == [[1.0, 2.5], [2.5, 1.0], [1.0, 0.0]]
    assert out.margins.tolist() == [1.75, -1.75, -0.25] and out.accuracy == torch.tensor(1 / 3)
    torch.testing.assert_close(out.loss, out.losses.mean())
    assert [f.name for f in fields(PreferenceOutput) if getattr(out, f.name).requires_grad] == ["loss"]


def test_extreme_margins(backend):
    """z of +-1e4: finite losses, slopes of 0 or 1, for every link that has them."""
    scores = torch.tensor([1e5, -1e5, 0.0], requires_grad=True)
    pairs = Pairs(torch.tensor([[0, 1], [1, 0]]))
    for link in ("logistic", "hinge", "sigmoid", "exo", "linear"):
        out = preference_loss(None, None, None, pairs, Objective(link, (Term(link=link),)), scores=scores)
        assert out.losses.isfinite().all() and torch.autograd.grad(out.loss, scores)[0].isfinite().all(), link


@pytest.mark.parametrize("name", ["irpo", "orpo", "sparse_po", "sppo"])
def test_gradcheck(name, monkeypatch):
    """The closed-form slopes, numerically: every float input that takes a gradient."""
    monkeypatch.setenv("FASTPO_BACKEND", "torch")
    batch = Batch(PRESETS[name](), (5, 3, 0, 4), ((0, 1), (3, 0), (2, 1)), (*EVERY_FIELD, "pairs.weights"))
    leaves, (_, ref, segments, pairs, objective) = batch.arguments(torch.float64)

    def loss(logps, *rest):
        columns = dict(zip([n for n in leaves if n != "logps"], rest, strict=True))
        return preference_loss(logps, ref, replace(segments, **columns), pairs, objective).loss

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


def test_only_asked_gradients(backend):
    """A field that does not require grad gets none, and log-probs that do not, neither."""
    batch = Batch(objectives.sparse_po(), fields=EVERY_FIELD)
    for wanted in ("logps", "weights", "token_coefs"):
        leaves, (logps, ref, segments, pairs, objective) = batch.arguments(torch.float32)
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        preference_loss(logps, ref, segments, pairs, objective).loss.backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


def test_no_grad_keeps_nothing(backend):
    batch = Batch(objectives.irpo())
    _, arguments = batch.arguments(torch.float32)
    with torch.no_grad():
        out = preference_loss(*arguments)
        scores = sequence_scores(*arguments[:3], arguments[4])
    assert not out.loss.requires_grad and not scores.requires_grad
    assert torch.equal(scores, preference_loss(*arguments).scores)


def op_arguments(name: str, names: tuple[str, ...]):
    _, (logps, ref, segments, pairs, objective) = Batch(PRESETS[name](), (9, 4, 17), ((0, 1), (2, 1)), names).arguments(
        torch.float32
    )
    tokens, tuples = tokens_of(logps, ref, segments, logps), tuples_of(pairs, objective, logps)
    return tokens, tuples, token_settings(objective), TupleSettings.of(objective)


@pytest.mark.parametrize("name, names", [("dpo", ()), ("irpo", EVERY_FIELD), ("mcts_dpo", ())])
def test_opcheck(name, names, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tokens, tuples, token_set, tuple_set = op_arguments(name, names)
    flat = (*tokens, None, *tuples, *token_set, *tuple_set)
    torch.library.opcheck(torch.ops.fastpo.preference_loss_fwd.default, flat)
    torch.library.opcheck(torch.ops.fastpo.sequence_scores_fwd.default, (*tokens, *token_set))
    plain = [x if x is None else x.detach() for x in tokens]
    slopes, lengths = torch.rand(2, 3), torch.tensor([9, 4, 17])
    flat = (torch.ones(()), *slopes, *plain, lengths, *token_set, [True] * 6)
    torch.library.opcheck(torch.ops.fastpo.preference_loss_bwd.default, flat)


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_fake_tensors(monkeypatch):
    """Shapes without data, as memory estimators ask for them: eager calls are of the compiled ops, which have fakes."""
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        logps = torch.zeros(9, requires_grad=True)
        segments, pairs = Segments(torch.zeros(3, dtype=torch.int64)), Pairs(torch.zeros(4, 2, dtype=torch.int64))
        out = preference_loss(logps, torch.zeros(9), segments, pairs, objectives.dpo())
        assert out.scores.shape == (2,) and out.rewards.shape == (4, 2)
        assert torch.autograd.grad(out.loss, logps)[0].shape == (9,)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(dynamic, monkeypatch):
    """One graph, forward and backward, records and all; the same bits as eager."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    batch = Batch(objectives.irpo(), fields=("segments.weights", "pairs.weights"))
    leaves, (logps, ref, segments, pairs, objective) = batch.arguments(torch.float32)

    def step(logps, ref, segments, pairs):
        out = preference_loss(logps * 1.0, ref, segments, pairs, objective)
        return out.loss * 2, out.margins, sequence_scores(logps, ref, segments, objective)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        loss, margins, scores = run(logps, ref, segments, pairs)
        results.append((loss, margins, scores, *torch.autograd.grad(loss + scores.sum(), leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


LOGPS, REF = -torch.ones(5), -torch.ones(5)
SEGMENTS, PAIRS = Segments(torch.tensor([0, 2, 5])), Pairs(torch.tensor([[0, 1]]))
MISTAKES = {
    "logps is torch.float32 [1, 5]; it should be a float tensor [T]": {"logps": LOGPS[None]},
    "logps is torch.int64 [5]": {"logps": LOGPS.long()},
    "logps is a NoneType": {"logps": None},
    "ref_logps is None; objective dpo needs the reference's log-probs": {"ref_logps": None},
    "ref_logps is given; objective simpo has no reference, pass None": {"objective": objectives.simpo()},
    "ref_logps is torch.float32 [4]; it should be a float tensor [5]": {"ref_logps": REF[:4]},
    "ref_logps requires grad": {"ref_logps": REF.clone().requires_grad_()},
    "segments is torch.int64 [3]; it should be a Segments": {"segments": torch.tensor([0, 2, 5])},
    "segments.cu_seqlens is torch.float32 [2]; it should be int64 or int32 [S+1]": {
        "segments": Segments(torch.tensor([0.0, 5.0]))
    },
    "segments.cu_seqlens should rise from 0 to the number of tokens, 5": {"segments": Segments(torch.tensor([0, 6]))},
    "segments.cu_seqlens should rise from 0": {"segments": Segments(torch.tensor([0, 3, 2, 5]))},
    "segments.mask is torch.int64 [5]; it should be bool [5], like logps": {
        "segments": replace(SEGMENTS, mask=torch.ones(5, dtype=torch.int64))
    },
    "segments.weights is torch.float32 [2]": {"segments": replace(SEGMENTS, weights=torch.ones(2))},
    "segments.kl and segments.kl_weights go together": {"segments": replace(SEGMENTS, kl=torch.ones(5))},
    "segments.weights is None; objective sparse_po needs it": {"objective": objectives.sparse_po()},
    "pairs is torch.int64 [1, 2]; it should be a Pairs": {"pairs": torch.tensor([[0, 1]])},
    "pairs.index is torch.int64 [1, 3]; it should be int64 or int32 [P, 2] for objective dpo": {
        "pairs": Pairs(torch.tensor([[0, 1, 1]]))
    },
    "pairs.index should lie in [-1, 2), the sequences (-1: absent)": {"pairs": Pairs(torch.tensor([[0, 2]]))},
    "pairs.index should lie in [-1, 2)": {"pairs": Pairs(torch.tensor([[0, -2]]))},
    "pairs.weights is torch.float32 [2]; it should be a float tensor [1]": {
        "pairs": replace(PAIRS, weights=torch.ones(2))
    },
    "pairs.weights requires grad": {"pairs": replace(PAIRS, weights=torch.ones(1, requires_grad=True))},
    "pairs.weights is None; objective scpo needs it": {"objective": objectives.scpo()},
    "pairs.soft_labels is None; objective mcts_dpo needs it": {"objective": objectives.mcts_dpo()},
    "pairs.soft_labels is given; objective hinge has no logistic term": {
        "pairs": replace(PAIRS, soft_labels=torch.ones(1)),
        "objective": objectives.hinge(),
    },
    "pairs.targets is given; objective dpo has no squared term": {"pairs": replace(PAIRS, targets=torch.ones(1, 1))},
    "pairs.margins is given; objective m has no term that takes it": {
        "pairs": replace(PAIRS, margins=torch.ones(1)),
        "objective": Objective("m", (Term(margin_coef=0.0),)),
    },
    "objective is a str; it should be an Objective": {"objective": "dpo"},
    "scores is torch.float32 [2, 1]; it should be a float tensor [S]": {"scores": torch.ones(2, 1), "ref_logps": None},
    "ref_logps is given together with scores": {"scores": torch.ones(2)},
    "scores has 3 elements; segments has 2 sequences": {"scores": torch.ones(3), "ref_logps": None},
    "logps and segments go together": {"scores": torch.ones(2), "ref_logps": None, "logps": None},
    "logps is None; objective irpo has an NLL term": {
        **{"scores": torch.ones(2), "logps": None, "ref_logps": None, "segments": None},
        "objective": objectives.irpo(),
    },
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_in_one_line(message, backend):
    arguments = {"logps": LOGPS, "ref_logps": REF, "segments": SEGMENTS, "pairs": PAIRS, "objective": objectives.dpo()}
    with pytest.raises((TypeError, ValueError)) as caught:
        preference_loss(**(arguments | MISTAKES[message]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_devices_are_named(backend):
    with pytest.raises(ValueError, match=r"pairs.index is on meta; it should be on cpu, with the log-probs"):
        preference_loss(LOGPS, REF, SEGMENTS, PAIRS.to("meta"), objectives.dpo())


def test_without_the_compiled_extension():
    """The torch backend takes over, aloud, and computes the same."""
    code = (
        "import sys, warnings; sys.modules['fastpo._C'] = None; warnings.simplefilter('ignore');"
        "import torch; from fastpo import objectives; from fastpo.types import Pairs, Segments;"
        "from fastpo.kernels.preference_loss import preference_loss;"
        "out = preference_loss(-torch.ones(5), -torch.ones(5) / 2, Segments(torch.tensor([0, 2, 5])),"
        "Pairs(torch.tensor([[0, 1]])), objectives.dpo()); print(out.scores.tolist())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FASTPO_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[-1.0, -1.5]", done.stderr


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_the_compiled_backend_is_the_default(monkeypatch):
    from fastpo.kernels.preference_loss.backends import OP

    monkeypatch.delenv("FASTPO_BACKEND", raising=False)
    assert OP.pick(torch.device("cpu"), torch.float32).name == "cpu"
    assert OP.pick(torch.device("cpu"), torch.float64).name == "torch"


def test_index_of_cases_has_what_it_says():
    """INDEX has a sequence in several tuples, one in none, one twice in a tuple, and absent members on either side."""
    flat = [i for row in INDEX for i in row]
    assert flat.count(0) > 1 and 13 not in flat and any(row[0] == row[1] for row in INDEX)
    assert any(row[0] == -1 for row in INDEX) and any(row[1] == -1 for row in INDEX)
