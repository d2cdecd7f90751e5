"""``token_kl`` and ``linear_token_kl``: against the spec in fp64, its precision near p = q, chunks, masks, mistakes."""

import pytest
import torch
import torch.nn.functional as F

from fastpo.dispatch import extension_missing, triton_missing
from fastpo.kernels.token_kl import linear_token_kl, op, token_kl
from fastpo.kernels.token_kl.reference import Head, spec

N, H, V = 13, 12, 101
HEADS = [(1.0, None), (0.7, None), (1.0, 4.0), (1.6, 2.5)]  # temperature, softcap


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def judged(ours, torchs, exact, tiny):
    error, allowed = (ours.double() - exact).abs().max(), 2 * (torchs.double() - exact).abs().max()
    assert error <= allowed + tiny, f"error {error:.2e}, allowed {allowed + tiny:.2e}"


NO_CPP = extension_missing("_C")
FLAGS = torch.backends.cpu.get_cpu_capability()
ISAS = ["generic"] + ["avx2"] * (FLAGS in ("AVX2", "AVX512")) + ["avx512"] * (FLAGS == "AVX512")
BACKENDS = [
    "torch",
    *(f"cpu {isa}" for isa in ISAS if NO_CPP is None),
    *(["triton"] if triton_missing() is None and not torch.cuda.is_available() else []),
]


@pytest.fixture(
    params=[(name, rows) for name in BACKENDS for rows in (1, 5, 1000)], ids="{0[0]} {0[1]}".format, autouse=True
)
def chunk(request, monkeypatch):
    """One row, some rows, all rows in a chunk; Triton in its interpreter, rows longer than a block."""
    backend, rows = request.param
    backend, _, isa = backend.partition(" ")
    monkeypatch.setenv("FASTPO_BACKEND", backend)
    monkeypatch.setenv("FASTPO_CPU_ISA", isa)
    monkeypatch.setattr(op, "_logits_rows", lambda logits, run: rows)
    monkeypatch.setattr(op, "DEFAULT_BUDGET", rows * op.TILES * V * 4)
    if backend == "triton":
        from fastpo.kernels.token_kl import triton_kernels

        monkeypatch.setattr(triton_kernels, "BLOCK", 64)
    return backend


def own_backend(dtype, monkeypatch):
    """fp64 is computed in PyTorch everywhere."""
    if dtype == torch.float64:
        monkeypatch.delenv("FASTPO_BACKEND")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature, softcap", HEADS)
def test_logits(temperature, softcap, dtype, chunk, monkeypatch):
    own_backend(dtype, monkeypatch)
    logits, ref, mask = (normal(N, V, seed=s, scale=3).to(dtype) for s in (0, 1, 2))
    mask, upstream, head = mask[:, 0] > -1, normal(N, seed=3), Head(temperature, 1.0, softcap or 0.0)
    results = []
    for own in (dtype, torch.float64):
        wide = torch.float64 if own == torch.float64 else torch.float32
        x = logits.to(own).requires_grad_()
        kl = spec(x.to(wide), ref.to(wide), mask, head)
        results.append((kl.detach(), *torch.autograd.grad(kl, x, upstream.to(wide))))
    x = logits.clone().requires_grad_()
    kl = token_kl(x, ref, mask=mask, temperature=temperature, logit_softcap=softcap)
    ours = (kl.detach(), *torch.autograd.grad(kl, x, upstream.to(kl.dtype)))
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not kl[~mask].any()
    for name, own, torchs, exact in zip(("kl", "grad"), ours, *results, strict=True):
        assert own.dtype == (kl.dtype if name == "kl" else dtype)
        # Triton's interpreter truncates where it should round to bf16: one unit in the last place.
        unit = 2.0**-8 if own.dtype == torch.bfloat16 and chunk == "triton" else 2.4e-7
        judged(own, torchs, exact, unit * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("train", [(), ("hidden",), ("hidden", "weight", "bias"), ("weight",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature, softcap", HEADS[::3])
def test_hidden(temperature, softcap, dtype, train, monkeypatch):
    own_backend(dtype, monkeypatch)
    leaves = {"hidden": normal(N, H, scale=2), "weight": normal(V, H, seed=1), "bias": normal(V, seed=2)}
    ref = [normal(N, H - 3, seed=4).to(dtype), normal(V, H - 3, seed=5).to(dtype)]
    mask, upstream, head = normal(N, seed=6) > -1, normal(N, seed=7), Head(temperature, 0.8, softcap or 0.0)
    results = []
    for own in (dtype, torch.float64):
        wide = torch.float64 if own == torch.float64 else torch.float32
        x = {name: v.to(dtype).to(own).requires_grad_(name in train) for name, v in leaves.items()}
        logits = F.linear(x["hidden"].to(wide), x["weight"].to(wide), x["bias"].to(wide))
        kl = spec(logits, F.linear(*(r.to(wide) for r in ref)), mask, head)
        grads = torch.autograd.grad(kl, [x[name] for name in train], upstream.to(wide)) if train else ()
        results.append((kl.detach(), *grads))
    x = {name: v.to(dtype).requires_grad_(name in train) for name, v in leaves.items()}
    settings = {"mask": mask, "temperature": temperature, "logit_scale": 0.8, "logit_softcap": softcap}
    kl = linear_token_kl(x["hidden"], x["weight"], *ref, bias=x["bias"], **settings)
    assert kl.requires_grad == bool(train) and not kl[~mask].any()
    grads = torch.autograd.grad(kl, [x[name] for name in train], upstream.to(kl.dtype)) if train else ()
    for own, torchs, exact in zip((kl.detach(), *grads), *results, strict=True):
        tiny = (8e-3 if dtype == torch.bfloat16 else 2e-6) * max(1.0, float(exact.abs().max()))
        judged(own, torchs, exact, tiny)


def test_near_the_reference():
    """K of 1e-7 to three digits, where the formula as it stands has none; 0 where the models are equal."""
    ref = normal(N, V, scale=3).float()
    moved = ref + normal(N, V, seed=1).float() * 3e-4
    exact = spec(moved.double(), ref.double(), None, Head(1.0, 1.0, 0.0))
    torch.testing.assert_close(token_kl(moved, ref).double(), exact, rtol=2e-3, atol=0)
    naive = spec(moved, ref, None, Head(1.0, 1.0, 0.0)).double()
    assert ((naive - exact).abs() / exact).max() > 0.02
    assert not token_kl(ref, ref).any()


def test_extremes():
    """Masked logits (-inf) of both, of the reference alone; distributions that have nothing in common."""
    inf = torch.inf
    logits = torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, 2.0], [200.0, 0.0, 0.0]], requires_grad=True)
    ref = torch.tensor([[1.0, 0.0, -inf], [1.0, 0.0, -inf], [0.0, 200.0, 0.0]])
    kl = token_kl(logits, ref)
    expected = spec(logits.detach()[:2].double().nan_to_num(neginf=-800), ref[:2].double(), None, Head(1.0, 1.0, 0.0))
    torch.testing.assert_close(kl[:2].detach().double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(kl[2].detach(), torch.tensor(200.0))
    (grad,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(grad[2], torch.tensor([1.0, -1.0, 0.0]))
    assert grad.isfinite().all()


def test_several_blocks():
    """Rows of more than two of C++'s blocks of 2048: logits that rise from block to block, a first one of -inf only."""
    size = 4500
    rising = torch.linspace(-60, 60, size, dtype=torch.float64)
    logits, ref = rising + normal(3, size), rising + normal(3, size, seed=1)
    logits[1, :2100], ref[1, :2100] = -torch.inf, -torch.inf
    ref[2, 2048:] = -torch.inf  # only the policy has mass there
    x = logits.float().requires_grad_()
    kl = token_kl(x, ref.float())
    wide = logits.clone().requires_grad_()
    finite = [y.nan_to_num(neginf=-1e4) for y in (wide, ref)]
    exact = spec(*finite, None, Head(1.0, 1.0, 0.0))
    torch.testing.assert_close(kl.double(), exact, rtol=4e-6, atol=1e-6)
    grads = torch.autograd.grad(kl.sum(), x)[0], torch.autograd.grad(exact.sum(), wide)[0]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=2e-5, atol=1e-6)


def test_leading_shapes_and_nothing_there():
    x, ref = normal(2, 3, 4, V).float(), normal(2, 3, 4, V, seed=1).float()
    assert torch.equal(token_kl(x, ref).flatten(), token_kl(x.view(-1, V), ref.view(-1, V)))
    assert token_kl(x[:0], ref[:0]).shape == (0, 3, 4)
    hidden, weight = normal(2, 3, H).float().requires_grad_(), normal(V, H).float()
    masked = linear_token_kl(hidden, weight, hidden, weight + 1, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert masked.shape == (2, 3) and not masked.any() and not torch.autograd.grad(masked.sum(), hidden)[0].any()


def test_opcheck_and_fullgraph(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    logits, ref = normal(4, V).float().requires_grad_(), normal(4, V, seed=1).float()
    torch.library.opcheck(torch.ops.fastpo.token_kl_fwd.default, (logits, ref, None, 1.0, 1.0, 0.0))
    hidden, weight = normal(4, H).float().requires_grad_(), normal(V, H).float().requires_grad_()
    flat = (hidden, weight, hidden.detach(), weight.detach() + 1, None, None, None, 1.0, 1.0, 0.0, 3, True)
    torch.library.opcheck(torch.ops.fastpo.linear_token_kl_fwd.default, flat)
    compiled = torch.compile(token_kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, ref), token_kl(logits, ref))


X, W = torch.zeros(4, H), torch.zeros(V, H)
MISTAKES = {
    "ref_logits is torch.float32 [4, 12] on cpu; it should be [4, 13]": lambda: token_kl(torch.zeros(4, 13), X),
    "logits is torch.int64 [4]": lambda: token_kl(torch.zeros(4, dtype=torch.int64), X),
    "mask is torch.bool [3]; it should be bool [4]": lambda: token_kl(X, X, mask=torch.ones(3, dtype=torch.bool)),
    "temperature is 0.0": lambda: token_kl(X, X, temperature=0.0),
    "weight is torch.float32 [101, 11]; it should be torch.float32 [V, 12]": lambda: linear_token_kl(X, W[:, 1:], X, W),
    "ref_weight has 7 rows; weight has 101: one vocabulary": lambda: linear_token_kl(X, W, X, W[:7]),
    "ref_hidden is torch.float32 [3, 12]; it should be [4]": lambda: linear_token_kl(X, W, X[:3], W),
    "bias is torch.float32 [12]": lambda: linear_token_kl(X, W, X, W, bias=X[0]),
    "memory_budget is 0": lambda: linear_token_kl(X, W, X, W, memory_budget=0),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_in_one_line(message):
    with pytest.raises(ValueError) as caught:
        MISTAKES[message]()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tdpo_from_hidden_states():
    """TDPO-2 whole, two heads and no logits kept: loss and gradients of what one would write, sg on the chosen's K."""
    from fastpo import Pairs, Segments, linear_preference_loss, linear_token_logprobs, objectives

    hidden, weight, ref = (normal(*s, seed=i).float() for i, s in enumerate(((12, H), (V, H), (12, H))))
    weight, ref_weight = weight * 0.3, weight * 0.25
    labels = torch.arange(12) * 7 % V
    segments, pairs = Segments(torch.tensor([0, 4, 7, 9, 12])), Pairs(torch.tensor([[0, 1], [3, 2]]))

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    kl = linear_token_kl(*leaves, ref, ref_weight)
    with torch.no_grad():
        ref_logps = linear_token_logprobs(ref, ref_weight, labels)
    records = Segments(segments.cu_seqlens, kl=kl), pairs, objectives.tdpo2(0.3, 0.5)
    ours = linear_preference_loss(*leaves, labels, ref_logps, *records).loss

    plain = [x.double().requires_grad_() for x in (hidden, weight)]
    logp, logq = F.linear(*plain).log_softmax(-1), F.linear(ref.double(), ref_weight.double()).log_softmax(-1)
    ratios = (logp - logq)[torch.arange(12), labels]
    tokens = torch.stack((ratios, (logq.exp() * (logq - logp)).sum(-1)))
    (d0, k0), (d1, k1), (d2, k2), (d3, k3) = (x.sum(1) for x in tokens.split((4, 3, 2, 3), dim=1))
    z = 0.3 * torch.stack((d0 - d1 - 0.5 * (k1 - k0.detach()), d3 - d2 - 0.5 * (k2 - k3.detach())))
    exact = -F.logsigmoid(z).mean()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    for own, truth in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, plain), strict=True):
        torch.testing.assert_close(own.double(), truth, rtol=1e-4, atol=1e-6)
