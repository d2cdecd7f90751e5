"""preference_loss on a GPU, both of its own backends; tests/test_preference_loss_gpu_kernels.py needs no GPU.

The small batches cross the tiles of the kernels; RAGGED fills a GPU, with sequences of every alignment; LONG ones are
split over blocks. Tests with "small" in their name are quick enough for compute-sanitizer.
"""

import pytest
import torch
from one_backend import one_backend
from preference_loss_cases import COLUMNS, LISTED, TOKEN_FIELDS, Batch, check

from fastpo import objectives
from fastpo.kernels.preference_loss import links, preference_loss, sequence_scores
from fastpo.kernels.preference_loss.backends import OP
from fastpo.objectives import LINKS, NLL_NORMALIZERS, PRESETS, SCORE_MAPS, TOKEN_MAPS, Objective, Term
from fastpo.types import Pairs, Segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
]

EVERYTHING = tuple(f"segments.{name}" for name in TOKEN_FIELDS) + tuple(f"pairs.{name}" for name in COLUMNS)
# Their slopes have one sign, and no sequence is in two tuples: nothing cancels, so errors are those of the functions.
TERMS = (Term(scale=0.2, param=0.8, margin=0.3), Term(link="hinge"), Term(link="discopop", scale=0.05))
DISJOINT = ((0, 2), (3, 5), (4, 6), (7, 8), (9, 10), (13, 1), (11, 12))
RAGGED = [int(n) for n in torch.randint(0, 900, (2000,), generator=torch.Generator().manual_seed(0))]
PAIRED = [(i, i + 1000) for i in range(1000)]
LONG = (200_001, 99_999, 1, 130_000)


backend = one_backend(OP, "cuda", "triton")


def plain_batch(num_pairs: int = 1000) -> tuple[torch.Tensor, torch.Tensor, Segments, Pairs]:
    """Arguments of an objective with reference: [T] log-probs, [T] the reference's, and the records, on the GPU."""
    batch = Batch(objectives.dpo(), RAGGED, PAIRED[:num_pairs]).to("cuda")
    leaves, (_, ref, segments, pairs, _) = batch.arguments(torch.float32)
    return leaves["logps"], ref, segments, pairs


@pytest.mark.parametrize("name", PRESETS)
def test_small_presets(name, backend, monkeypatch):
    check(Batch(PRESETS[name]()).to("cuda"), monkeypatch, backend)


@pytest.mark.parametrize("phi", TOKEN_MAPS)
@pytest.mark.parametrize("score_map", SCORE_MAPS)
def test_small_everything(phi, score_map, backend, monkeypatch):
    """All optional tensors at once, with each pair of maps."""
    settings = {"phi": phi, "score_map": score_map, "score_map_coef": -0.3, "length_power": 1.0}
    fields = [name for name in EVERYTHING if name != "pairs.targets"]
    if score_map == "log_odds":  # of negative scores only
        settings["ref_coef"] = 0.0
        fields.remove("segments.kl_weights")
    objective = Objective("everything", TERMS, nll=(1.0, 0.3), **settings)
    check(Batch(objective, index=DISJOINT, fields=fields).to("cuda"), monkeypatch, backend)


def test_small_every_link_and_column(backend, monkeypatch):
    fields = tuple(f"pairs.{name}" for name in COLUMNS)
    check(Batch(LISTED, index=[(*pair, -1) for pair in DISJOINT], fields=fields).to("cuda"), monkeypatch, backend)


@pytest.mark.parametrize("lengths", [(), (0, 0), (3, 4)], ids=str)
def test_small_nothing_there(lengths, backend, monkeypatch):
    batch = Batch(objectives.irpo(), lengths, ((0, 1),) if lengths else ((-1, -1),))
    check(batch.to("cuda"), monkeypatch, backend)
    batch.index = batch.index[:0]
    check(batch, monkeypatch, backend)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("normalizer", NLL_NORMALIZERS)
def test_many_pairs(mask, normalizer, backend, monkeypatch):
    objective = Objective("many", (Term(),), nll=(1.0, 0.1), nll_normalizer=normalizer)
    check(Batch(objective, RAGGED, PAIRED, mask=mask).to("cuda"), monkeypatch, backend)


@pytest.mark.parametrize("num_tuples", [5000, 20000], ids=["searched", "sorted"])
def test_shared_sequences(num_tuples, backend, monkeypatch):
    """Every sequence in many tuples, one of them in a third of all."""
    index = torch.randint(-1, 2000, (num_tuples, 2), generator=torch.Generator().manual_seed(0))
    index[::3, 1] = 7
    check(Batch(objectives.irpo(), RAGGED, index.tolist()).to("cuda"), monkeypatch, backend)


@pytest.mark.parametrize("fields", [(), EVERYTHING[:4]], ids=["plain", "everything"])
def test_long_sequences(fields, backend, monkeypatch):
    check(Batch(objectives.irpo(), LONG, ((0, 1), (2, 3)), fields).to("cuda"), monkeypatch, backend)


@pytest.mark.parametrize("name", LINKS)
def test_small_links(name):
    """z is the score itself: the losses are the values of the link, the gradient of their sum its slopes."""
    sizes = torch.cat((torch.logspace(-9, 2, 60), torch.tensor([1.0, 20.0, 60.0])))
    x = torch.cat((-sizes, torch.zeros(1), sizes)).cuda()
    param = float(torch.tensor(LINKS[name]))
    objective = Objective("link", (Term((1.0,), name, 1.0, param=param),), reduction="sum")
    scores = x.clone().requires_grad_()
    pairs = Pairs(torch.arange(len(x), device="cuda")[:, None])
    out = preference_loss(None, None, None, pairs, objective, scores=scores)
    (grad,) = torch.autograd.grad(out.loss, scores)
    for ours, function in ((out.losses, links.LINKS[name].value), (grad, links.LINKS[name].slope)):
        exact = function(x.double(), param)
        allowed = 2 * (function(x, param) - exact).abs() + 1e-6 * exact.abs() + 5e-7
        assert ((ours - exact).abs() <= allowed).all(), name


def test_half_precision_strided_and_expanded(backend):
    """bf16 log-probs of every other token, and a gradient that is one number expanded."""
    wide = (-3 * torch.rand(400, 2, device="cuda")).bfloat16().requires_grad_()
    segments = Segments(torch.tensor([0, 100, 250, 400], device="cuda"))
    pairs = Pairs(torch.tensor([[0, 1], [2, 1]], device="cuda"))
    ref = torch.zeros(400, device="cuda", dtype=torch.bfloat16)
    scores = sequence_scores(wide[:, 0], ref, segments, objectives.dpo())
    scores.sum().backward()
    assert wide.grad[:, 0].eq(1).all() and not wide.grad[:, 1].any()
    sums = [wide[a:b, 0].double().sum().item() for a, b in ((0, 100), (100, 250), (250, 400))]
    torch.testing.assert_close(scores.double().tolist(), sums, rtol=1e-6, atol=0)
    assert preference_loss(wide[:, 0], ref, segments, pairs, objectives.dpo()).loss.dtype == torch.float32


def test_sequences_out_of_range():
    """On a GPU values are not looked at: a tuple of a sequence that does not exist is NaN, with its other member."""
    logps, ref, segments, pairs = plain_batch(4)
    pairs.index[1, 0], pairs.index[3, 1] = 2000, -2
    out = preference_loss(logps, ref, segments, pairs, objectives.irpo())
    assert out.loss.isnan() and out.losses.isnan().tolist() == [False, True, False, True]
    (grad,) = torch.autograd.grad(out.loss, logps)
    lost = torch.zeros_like(segments.mask)
    for i in (1001, 3):
        lost[segments.cu_seqlens[i] : segments.cu_seqlens[i + 1]] = True
    assert torch.equal(grad.isnan(), lost & segments.mask) and lost.any()


def test_deterministic():
    logps, ref, segments, pairs = plain_batch()
    pairs = Pairs(pairs.index[torch.randint(0, 1000, (8000,), device="cuda")])

    def outputs():
        out = preference_loss(logps, ref, segments, pairs, objectives.irpo())
        return [out.loss, out.losses, out.scores, *torch.autograd.grad(out.loss, logps)]

    first = outputs()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(), strict=True))


@pytest.mark.parametrize("copies", [1, 9], ids=["searched", "sorted"])
def test_no_host_sync(copies):
    logps, ref, segments, pairs = plain_batch()
    pairs = Pairs(pairs.index.repeat(copies, 1))

    def step():
        preference_loss(logps, ref, segments, pairs, objectives.irpo()).loss.backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream_and_in_a_graph():
    logps, ref, segments, pairs = plain_batch()

    def step():
        out = preference_loss(logps, ref, segments, pairs, objectives.irpo())
        return out.loss.detach(), *torch.autograd.grad(out.loss, logps)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the arguments
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for x in results:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_compiles_without_graph_breaks():
    logps, ref, segments, pairs = plain_batch()

    def loss(x):
        return preference_loss(x * 1, ref, segments, pairs, objectives.irpo()).loss

    (expected,) = torch.autograd.grad(loss(logps), logps)
    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logps), logps)
    torch.testing.assert_close(grad, expected)


def test_more_than_2_to_the_31_tokens():
    """Offsets are 64 bits wide: the last sequences lie beyond token 2^31."""
    if torch.cuda.get_device_properties(0).total_memory < 48 * 2**30:
        pytest.skip("needs 48 GB of GPU memory")
    first, lengths = 2**31 + 5, torch.tensor([1000, 777])
    size = first + int(lengths.sum())
    logps, ref = (torch.full((size,), x, device="cuda") for x in (-1.0, -1.25))
    logps[first:] = -torch.rand(size - first, device="cuda")
    ends = first + lengths.cumsum(0)
    cu_seqlens = torch.tensor([0, first, *ends.tolist()], device="cuda")
    pairs = Pairs(torch.tensor([[1, 2], [1, 0]], device="cuda"))
    leaf = logps.requires_grad_()
    out = preference_loss(leaf, ref, Segments(cu_seqlens), pairs, objectives.dpo(beta=1e-9))
    tail = (logps.detach()[first:] - ref[first:]).double()
    sums = [0.25 * first, *(x.sum().item() for x in tail.split(lengths.tolist()))]
    torch.testing.assert_close(out.scores.double().tolist(), sums, rtol=1e-6, atol=0)
    assert out.lengths.tolist() == [first, 1000, 777]
    (grad,) = torch.autograd.grad(out.loss, leaf)
    for begin, end in ((0, 100), (2**31 - 50, first), (first, first + 1000), (first + 1000, size)):
        assert grad[begin:end].eq(grad[begin]).all() and grad[begin] != 0
    assert grad[first] < 0 < grad[-1]
