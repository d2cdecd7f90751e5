"""token_logprobs through its public function, on the C++ and the plain PyTorch backend, against fp64.

The C++ backend sums blocks of 256 vectors in float (128 with moments; 16, 8 or 4 floats each, by instruction set),
groups them by segments of 16384 columns, takes 4 vectors a step and guesses its reference from the first 256 columns:
SHAPES take every tail and every border of these. Every case runs on each instruction set that this processor has. The
Triton kernels have tests of their own.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpo.dispatch import extension_missing
from fastpo.kernels.token_logprobs import STATS, token_logprobs
from fastpo.kernels.token_logprobs.op import _as_rows
from fastpo.kernels.token_logprobs.reference import spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(3, 1), (5, 13), (9, 64), (4, 257), (33, 4099), (3, 16384), (2, 40001)]


def backends() -> list[str]:
    """torch, and cpu once per instruction set."""
    if extension_missing("_C"):
        return ["torch"]
    flags = torch.backends.cpu.get_cpu_capability()
    isas = ["generic"] + ["avx2"] * (flags in ("AVX2", "AVX512")) + ["avx512"] * (flags == "AVX512")
    return ["torch", *(f"cpu-{isa}" for isa in isas)]


def choose(monkeypatch, backend: str) -> None:
    name, _, isa = backend.partition("-")
    monkeypatch.setenv("FASTPO_BACKEND", name)
    monkeypatch.setenv("FASTPO_CPU_ISA", isa)


@pytest.fixture(params=backends())
def backend(request, monkeypatch) -> str:
    choose(monkeypatch, request.param)
    return request.param


needs_cpp = pytest.mark.skipif(extension_missing("_C") is not None, reason="fastpo._C is not built")


def rows(n: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 3.0):
    """Logits [n, vocab] and labels [n]; the first row is ignored where there are several."""
    generator = torch.Generator().manual_seed(n * vocab)
    logits = torch.randn(n, vocab, generator=generator).mul(spread).to(dtype)
    labels = torch.randint(vocab, (n,), generator=generator)
    if n > 1:
        labels[0] = -100
    return logits, labels


def spec_values(logits, labels, dtype, weights, temperature=1.0, logit_softcap=None, **settings):
    """The spec in ``dtype``, and the gradient of the weighted sum of its values."""
    flat = logits.detach().to(dtype).reshape(labels.numel(), logits.shape[-1]).requires_grad_()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(dtype).reshape(-1)
    values = spec(flat, labels.reshape(-1), temperature, logit_softcap or 0.0, **settings)
    (grad,) = torch.autograd.grad(sum((values[name] * w.to(dtype)).sum() for name, w in weights.items()), flat)
    return {name: value.detach() for name, value in values.items()}, grad.view(logits.shape)


def assert_as_exact(ours, torchs, exact, tiny: float, what: str) -> None:
    """``err <= 2 err_torch + tiny``, all against fp64."""
    error, error_torch = ((x.double() - exact).abs().max().item() for x in (ours, torchs))
    assert error <= 2 * error_torch + tiny, f"{what}: error {error:.2e}, torch's {error_torch:.2e}"


def check(logits, labels, stats=STATS[:5], inplace=False, differentiate=None, **settings) -> None:
    """Values and gradient against fp64: twice the error of the spec in fp32, plus two roundings of the result."""
    generator = torch.Generator().manual_seed(1)
    names = differentiate or ["logps", *(name for name in STATS[:3] if name in stats)]
    weights = {name: torch.randn(labels.numel(), generator=generator) for name in names}
    exact, exact_grad = spec_values(logits, labels, torch.float64, weights, **settings)
    torchs, torchs_grad = spec_values(logits, labels, torch.float32, weights, **settings)

    leaf = logits.detach().requires_grad_()
    result = token_logprobs(leaf.clone(), labels, stats=stats, inplace_backward=inplace, **settings)
    values = {"logps": result[0], **result[1]} if stats else {"logps": result}
    (grad,) = torch.autograd.grad(sum((values[name].reshape(-1) * w).sum() for name, w in weights.items()), leaf)

    eps = torch.finfo(torch.float32).eps
    for name, value in values.items():
        assert value.dtype == torch.float32 and value.shape == labels.shape
        tiny = 2 * eps * max(1.0, exact[name].abs().max().item())
        assert_as_exact(value.detach().reshape(-1), torchs[name], exact[name], tiny, name)
    assert grad.dtype == logits.dtype
    tiny = (2 * eps if logits.dtype == torch.float32 else eps) * max(1e-3, exact_grad.abs().max().item())
    assert_as_exact(grad, torchs_grad.to(logits.dtype), exact_grad, tiny, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype):
    label_set = torch.tensor(sorted({0, shape[1] // 2, shape[1] - 1}))
    check(*rows(*shape, dtype), stats=STATS, label_set=label_set, topk=min(10, shape[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 64), (33, 4099), (2, 40001)], ids=str)
def test_log_probs_alone(backend, shape, dtype):
    """The kernels without statistics, and a backward without coefficients."""
    check(*rows(*shape, dtype), stats=())


@pytest.mark.parametrize("name", STATS[:3])
def test_gradient_of_one_statistic(backend, name):
    check(*rows(5, 300), stats=(name,), differentiate=[name])


@pytest.mark.parametrize("temperature", [0.3, "per row"])
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_and_softcap(backend, dtype, softcap, temperature):
    """A cap of 5 saturates these logits, one of 30 bends them."""
    logits, labels = rows(6, 5001, dtype)
    if temperature == "per row":
        temperature = torch.linspace(0.5, 2, 6)
    check(logits, labels, temperature=temperature, logit_softcap=softcap)


def test_large_offset_and_peaked_rows(backend):
    """A common offset costs nothing; rows of near certainty keep the gradient of their label."""
    logits, labels = rows(9, 300)
    check(logits + 4096, labels, stats=())
    check(logits * 10, labels, stats=("entropy",))


@pytest.mark.parametrize("order", ["ascending", "descending", "late peak", "masked start"])
def test_order_of_logits(backend, order):
    """The reference that the first columns suggest is wrong by hundreds: blocks are done again, sums rescaled."""
    logits, labels = rows(3, 50000, spread=1.0)
    if order == "late peak":
        logits[:, 49999] = 300
    elif order == "masked start":
        logits[:, :9000] = -1e30
    else:
        logits = (logits * 100).sort(dim=-1, descending=order == "descending").values
    check(logits, labels, topk=16)


@pytest.mark.parametrize("k", [1, 10, 16])
def test_topk_with_ties_and_few_columns(backend, k):
    logits, labels = rows(3, 20000, torch.float16)
    check(logits.round(), labels, topk=k, stats=("topk_mass", "topk_entropy"))
    check(logits[:, :7].round(), labels.clamp(max=6), topk=k, stats=("topk_mass", "topk_entropy"))


def test_float64_is_computed_in_float64():
    logits, labels = rows(4, 11, torch.float64)
    temperature = torch.linspace(0.5, 2, 4, dtype=torch.float64)

    def outputs(x):
        logps, stats = token_logprobs(x, labels, stats=STATS[:3], temperature=temperature, logit_softcap=5.0)
        return logps, *stats.values()

    assert torch.autograd.gradcheck(outputs, logits.requires_grad_())


def test_masked_logits(backend):
    """-inf is a mask: p = 0 adds nothing, its gradient is 0, the log-prob of a masked label is -inf. As in torch."""
    logits, labels = rows(5, 9000)
    logits[:, 1::2] = -torch.inf
    logits[2, :8990] = -torch.inf
    labels[1:] = torch.tensor([4, 8998, 5, 6])
    leaf = logits.requires_grad_()
    logps, stats = token_logprobs(leaf, labels, stats=("entropy", "sum_p2", "topk_mass"))
    exact = torch.log_softmax(logits.double(), -1)
    picked = exact.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    assert logps[3] == -torch.inf
    assert torch.allclose(logps[[1, 2, 4]].double(), picked[[1, 2, 4]], atol=1e-5)
    entropy = -torch.where(exact.isinf(), 0, exact.exp() * exact).sum(-1)
    assert torch.allclose(stats["entropy"][1:].double(), entropy[1:], atol=1e-5)
    (grad,) = torch.autograd.grad(logps[[1, 2, 4]].sum() + stats["entropy"].sum() + stats["sum_p2"].sum(), leaf)
    assert not grad.isnan().any() and not grad[logits == -torch.inf].any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, "all masked"])
@pytest.mark.parametrize("column", [0, 300, 4999])
def test_nan_reaches_every_output_of_its_row(backend, poison, column):
    """As torch.log_softmax: NaN, +inf, or a row without a possible token make NaN, in that row only."""
    logits, labels = rows(4, 5000)
    labels[0] = 7
    if poison == "all masked":
        logits[1] = -torch.inf
    else:
        logits[1, :column] = -torch.inf  # nothing before it sets a reference
        logits[1, column] = poison
    expected = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0].isnan().tolist()
    assert expected == [False, True, False, False]
    leaf = logits.requires_grad_()
    logps, stats = token_logprobs(leaf, labels, stats=STATS, label_set=torch.tensor([0, 5]))
    for name, value in {"logps": logps, **stats}.items():
        if name == "logsumexp" and poison != torch.nan:
            continue  # of +inf it is +inf, of nothing -inf, or NaN
        assert value.isnan().tolist() == expected, name
    (grad,) = torch.autograd.grad(logps.sum(), leaf)
    assert grad.isnan().any(-1).tolist() == expected


def test_ignored_rows_are_not_read(backend):
    logits = torch.full((3, 300), torch.nan, requires_grad=True)
    labels = torch.full((3,), 7)
    logps, stats = token_logprobs(logits, labels, stats=STATS, label_set=torch.tensor([1]), ignore_index=7)
    assert not any(value.any() for value in (logps, *stats.values()))
    (logps + stats["entropy"] + stats["sum_p2"] + stats["logsumexp"]).sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("shape", [(0, 300), (0, 4, 300)], ids=str)
def test_no_rows(backend, shape):
    logits = torch.randn(shape, requires_grad=True)
    logps, stats = token_logprobs(logits, torch.zeros(shape[:-1], dtype=torch.long), stats=("entropy",))
    (logps + stats["entropy"]).sum().backward()
    assert logps.shape == shape[:-1] and logits.grad.shape == shape


@given(data=st.data())
def test_layouts(data):
    """Any leading dimensions, sizes from 0, steps, shifts, transposed or expanded: as the same values packed."""
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=4), label="leading sizes")
    vocab = data.draw(st.integers(1, 40), label="vocab")
    base = torch.randn(*(2 * size + 1 for size in sizes), 2 * vocab + 1)
    view = base
    for dim, size in enumerate([*sizes, vocab]):
        how = data.draw(st.sampled_from(["step", "shift", "head", "expand"]), label=f"dimension {dim}")
        if how == "expand" and dim < len(sizes):
            view = view.narrow(dim, 0, 1).expand(*view.shape[:dim], size, *view.shape[dim + 1 :])
        elif how == "step":
            view = view[(slice(None),) * dim + (slice(1, 2 * size, 2),)]
        else:
            view = view.narrow(dim, int(how == "shift"), size)
    if len(sizes) >= 2 and data.draw(st.booleans(), label="transpose"):
        view = view.transpose(0, 1)
    labels = torch.randint(vocab, view.shape[:-1])
    leaf = view.detach().requires_grad_()
    weights = torch.randn(()).expand(labels.shape)  # stride 0, as sum() sends back
    logps = token_logprobs(leaf, labels)
    (grad,) = torch.autograd.grad(logps, leaf, weights)
    packed = view.double().reshape(-1, vocab).requires_grad_()
    exact = spec(packed, labels.reshape(-1))["logps"]
    (exact_grad,) = torch.autograd.grad(exact, packed, weights.reshape(-1).double())
    assert torch.allclose(logps.double(), exact.view(labels.shape), atol=1e-5)
    assert torch.allclose(grad.double(), exact_grad.view(view.shape), atol=1e-5)


def test_row_strided_views_are_not_copied():
    logits = torch.randn(3, 5, 7)
    for view in (logits[:, :-1], logits[:, 1:, :5], logits[0], logits[::2], logits[:, 1], logits[1, 2], logits[None]):
        assert _as_rows(view).data_ptr() == view.data_ptr()
        assert _as_rows(view).shape[-1] == view.shape[-1]


def test_more_than_two_to_the_31_elements():
    """The last row lies beyond what 32 bits can address. Only it is touched: the pages of the others stay unmapped."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    n, vocab = 2**15 + 8, 2**16
    logits = torch.empty(n, vocab, dtype=torch.bfloat16)
    labels = torch.full((n,), -100)
    labels[-1] = 5
    logits[-1] = torch.randn(vocab)
    exact = torch.log_softmax(logits[-1].double(), -1)[5]
    assert token_logprobs(logits, labels)[-1].item() == pytest.approx(exact.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place_is_the_same_backward(backend, dtype):
    logits, labels = rows(9, 4099, dtype)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        head = leaf * 1
        logps, stats = token_logprobs(head, labels, stats=("entropy",), inplace_backward=inplace)
        (grad,) = torch.autograd.grad((logps + stats["entropy"]).sum(), head)
        assert (grad.data_ptr() == head.data_ptr()) == inplace
        grads.append(grad)
    assert torch.equal(*grads)


def test_backward_in_place_of_a_view_leaves_the_rest_alone(backend):
    base = torch.randn(2, 4, 300, requires_grad=True) * 1
    before = base.detach().clone()
    token_logprobs(base[:, :-1], torch.ones(2, 3, dtype=torch.long), inplace_backward=True).sum().backward()
    assert torch.equal(base[:, -1], before[:, -1]) and not torch.equal(base[:, :-1], before[:, :-1])


def test_backward_in_place_refuses_what_must_not_be_overwritten():
    leaf, labels = torch.randn(4, 30, requires_grad=True), torch.arange(4)
    for logits in (leaf, leaf[:], leaf.view(2, 2, 30)):
        with pytest.raises(ValueError, match="logits is a leaf"):
            token_logprobs(logits, labels.view(logits.shape[:-1]), inplace_backward=True)
    with pytest.raises(ValueError, match="logits has rows that overlap"):
        token_logprobs((leaf[0] * 1).expand(4, 30), labels, inplace_backward=True)
    with torch.no_grad():
        token_logprobs(leaf, labels, inplace_backward=True)  # nothing will be overwritten


def test_autograd_notices_that_overwritten_logits_are_needed():
    leaf, labels = torch.randn(4, 30, requires_grad=True), torch.arange(4)
    saved = leaf.tanh()  # keeps its output for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_logprobs(saved, labels, inplace_backward=True).sum().backward()
    loss = token_logprobs(leaf * 1, labels, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_cpp
@pytest.mark.parametrize("n", [1, 3, 40])
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch, n):
    """Few rows are split over threads, many are not: the same sums in the same order, to the bit."""
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    logits, labels = rows(n, 70001)
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            logps, stats = token_logprobs(leaf, labels, stats=STATS[:5])
            (logps + stats["entropy"]).sum().backward()
            outcomes.append(torch.cat([x.detach().view(-1) for x in (logps, *stats.values(), leaf.grad)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


@pytest.mark.parametrize(
    ("which", "exact", "low", "high", "ulps"),
    [(0, torch.exp, -87.3, 88.7, 1.1), (1, torch.exp, -87.3, 40, 1.3), (2, torch.tanh, -20, 20, 1.2)],
    ids=["exp", "exp_rate", "tanh"],
)
@pytest.mark.parametrize("compiled", backends()[1:])
def test_errors_of_the_elementary_functions(monkeypatch, compiled, which, exact, low, high, ulps):
    """The errors that csrc/simd.h states, on two million points."""
    choose(monkeypatch, compiled)
    x = torch.linspace(low, high, 1_000_003)
    x = torch.cat((x, x / 64))
    out = torch.empty_like(x)
    torch.ops.fastpo_c.elementary(x, out, which)
    truth = exact(x.double())
    spacing = torch.exp2(torch.frexp(truth.abs().clamp(min=2**-126)).exponent.double() - 24)
    assert ((out.double() - truth).abs() / spacing).max() <= ulps
    edges = torch.tensor([0.0, -0.0, torch.nan])
    torch.ops.fastpo_c.elementary(edges, result := torch.empty(3), which)
    assert result.nan_to_num(7).tolist() == ([1, 1, 7] if which < 2 else [0, 0, 7])
    if which < 2:
        torch.ops.fastpo_c.elementary(torch.tensor([-torch.inf, -1e30, -104.0]), result, which)
        assert result.tolist() == [0, 0, 0]


@needs_cpp
def test_labels_out_of_range_below_the_check():
    """The compiled op itself reads nothing out of bounds: NaN in that row, forward and backward."""
    logits, labels = rows(4, 300)
    labels[1:] = torch.tensor([-1, 300, 3])
    logps, normalizer, none = torch.empty(4), torch.empty(2, 4), torch.empty(0)
    label_set, probs = torch.tensor([1, 300]), torch.empty(4)
    ops, settings = torch.ops.fastpo_c, (1.0, 0.0, -100)
    stats = (none,) * 5
    ops.token_logprobs_forward(logits[None], labels, None, label_set, *settings, 1, logps, normalizer, *stats, probs)
    assert logps.isnan().tolist() == [False, True, True, False]
    assert probs.isnan().tolist() == [False, True, True, True]
    grad = torch.empty_like(logits)[None]
    ops.token_logprobs_backward(logits[None], labels, None, *settings, normalizer, torch.ones(4), None, grad)
    assert grad[0].isnan().all(-1).tolist() == [False, True, True, False]
    assert not grad[0, [0, 3]].isnan().any()


@needs_cpp
@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_unknown_instruction_set(monkeypatch, isa):
    monkeypatch.setenv("FASTPO_BACKEND", "cpu")
    monkeypatch.setenv("FASTPO_CPU_ISA", isa)
    with pytest.raises(RuntimeError, match=f"FASTPO_CPU_ISA is {isa}; it should be avx512, avx2 or generic"):
        token_logprobs(*rows(2, 5))
