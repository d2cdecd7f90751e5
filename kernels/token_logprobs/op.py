"""``token_logprobs``: schema, backends, autograd and the public function. README.md derives the formulas.

Shapes: logits [..., V] with leading sizes multiplying to N. Below the public function logits are [B, T, V] with a unit
last stride and any row strides, so that ``logits[:, :-1]`` needs no copy; everything else is one row per token, [N].
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from fastpo.dispatch import Backend, Extension, Op, always, triton_missing
from fastpo.kernels.common.checks import STATS
from fastpo.kernels.common.once import once_differentiable
from fastpo.kernels.token_logprobs import reference
from fastpo.kernels.token_logprobs.checks import check_arguments, check_overwritable, check_values

DIFFERENTIABLE = STATS[:3]

# Every backend has forward(...) and backward(...) with the signatures of reference.py.

_FORWARD = """token_logprobs_forward(Tensor logits, Tensor labels, Tensor? temperatures, Tensor? label_set,
float temperature, float logit_softcap, int ignore_index, int topk, Tensor(a!) logps, Tensor(b!) normalizer,
Tensor(c!) logsumexp, Tensor(d!) entropy, Tensor(e!) sum_p2, Tensor(f!) topk_mass, Tensor(g!) topk_entropy,
Tensor(h!) label_set_prob) -> ()"""
_BACKWARD = """token_logprobs_backward(Tensor logits, Tensor labels, Tensor? temperatures, float temperature,
float logit_softcap, int ignore_index, Tensor normalizer, Tensor grad_logps, Tensor? coefs,
Tensor(a!) grad_logits) -> ()"""

_library = torch.library.Library("fastpo_c", "FRAGMENT")
_library.define(_FORWARD)
_library.define(_BACKWARD)
_library.define("labels_in_range(Tensor labels, int ignore_index, int vocab) -> bool")
# exp, exp_rate and tanh (which: 0, 1, 2) as the C++ backend computes them, for the test of their errors.
_library.define("elementary(Tensor x, Tensor(a!) out, int which) -> ()")
_OPS = ("token_logprobs_forward", "token_logprobs_backward")
for _name in _OPS:
    torch.library.register_fake(f"fastpo_c::{_name}", lambda *_: None, lib=_library)
torch.library.register_fake("fastpo_c::labels_in_range", lambda *_: True, lib=_library)
_compiled = SimpleNamespace(
    forward=torch.ops.fastpo_c.token_logprobs_forward, backward=torch.ops.fastpo_c.token_logprobs_backward
)


class _Triton:
    """Imports the kernels when they first run: triton is not installed everywhere."""

    @staticmethod
    def forward(*args) -> None:
        from fastpo.kernels.token_logprobs import triton_kernels

        triton_kernels.forward(*args)

    @staticmethod
    def backward(*args) -> None:
        from fastpo.kernels.token_logprobs import triton_kernels

        triton_kernels.backward(*args)


def _why_not_fused(logits: Tensor) -> str | None:
    return "float64 logits are computed in float64, in plain PyTorch" if logits.dtype == torch.float64 else None


OP = Op(
    "token_logprobs",
    [
        Backend("cuda", "cuda", Extension("_cuda", _OPS), _why_not_fused, _compiled),
        Backend("triton", "cuda", triton_missing, _why_not_fused, _Triton),
        Backend("cpu", "cpu", Extension("_C", (*_OPS, "labels_in_range")), _why_not_fused, _compiled),
        Backend("torch", "any", always, always, reference),
    ],
)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """What log-probs of logits of this type are returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _allocate(logits: Tensor, labels: Tensor, stats: Sequence[str]) -> tuple[Tensor, ...]:
    """logps [N], normalizer [2, N], then each statistic: [N], or [0] where it was not asked for."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=_accumulator(logits.dtype), device=logits.device)

    n = labels.shape[0]
    return empty(n), empty(2, n), *(empty(n if name in stats else 0) for name in STATS)


@torch.library.custom_op("fastpo::token_logprobs_fwd", mutates_args=())
def _forward_op(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [N] int64
    temperatures: Tensor | None,  # [N]
    label_set: Tensor | None,  # [L] int64
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    topk: int,
    stats: str,  # names, comma-separated
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalars = (temperature, logit_softcap, ignore_index, topk)
    return _run_forward(OP.pick(logits.device, logits), logits, labels, temperatures, label_set, *scalars, stats)


def _run_forward(backend: Backend, logits, labels, temperatures, label_set, *scalars) -> tuple[Tensor, ...]:
    """``scalars``: temperature, logit_softcap, ignore_index, topk, stats."""
    *scalars, stats = scalars
    ignore_index, vocab = scalars[2], logits.shape[-1]
    in_range = backend.name == "cpu" and torch.ops.fastpo_c.labels_in_range(labels, ignore_index, vocab)
    check_values(logits, None if in_range else labels, temperatures, label_set, ignore_index)
    outputs = _allocate(logits, labels, stats.split(","))
    backend.impl.forward(logits, labels, temperatures, label_set, *scalars, *outputs)
    return outputs


@_forward_op.register_fake
def _(logits, labels, temperatures, label_set, temperature, logit_softcap, ignore_index, topk, stats, inplace_backward):
    return _allocate(logits, labels, stats.split(","))


@torch.library.custom_op("fastpo::token_logprobs_bwd", mutates_args=())
def _backward_op(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [N] int64
    temperatures: Tensor | None,  # [N]
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    normalizer: Tensor,  # [2, N]
    grad_logps: Tensor,  # [N]
    coefs: Tensor | None,  # [3, N]
) -> Tensor:
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    scalars = (temperature, logit_softcap, ignore_index)
    impl = OP.pick(logits.device, logits).impl
    impl.backward(logits, labels, temperatures, *scalars, normalizer, grad_logps, coefs, grad_logits)
    return grad_logits


@_backward_op.register_fake
def _(logits, labels, temperatures, temperature, logit_softcap, ignore_index, normalizer, grad_logps, coefs):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("fastpo::token_logprobs_bwd_", mutates_args={"logits"})
def _backward_op_(
    logits: Tensor,  # [B, T, V], overwritten with its gradient
    labels: Tensor,  # [N] int64
    temperatures: Tensor | None,  # [N]
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    normalizer: Tensor,  # [2, N]
    grad_logps: Tensor,  # [N]
    coefs: Tensor | None,  # [3, N]
) -> None:
    scalars = (temperature, logit_softcap, ignore_index)
    impl = OP.pick(logits.device, logits).impl
    impl.backward(logits, labels, temperatures, *scalars, normalizer, grad_logps, coefs, logits)


@_backward_op_.register_fake
def _(logits, labels, temperatures, temperature, logit_softcap, ignore_index, normalizer, grad_logps, coefs):
    return None


def _setup_context(ctx, inputs, output) -> None:
    logits, labels, temperatures, _, temperature, logit_softcap, ignore_index, _, stats, inplace_backward = inputs
    _, normalizer, *values = output
    _, entropy, sum_p2, *_ = values
    with_grad = set(stats.split(",")) & set(DIFFERENTIABLE)
    constants = [value for name, value in zip(STATS, values, strict=True) if name not in with_grad]
    ctx.mark_non_differentiable(normalizer, *constants)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, temperatures, normalizer, entropy, sum_p2)
    ctx.scalars = (temperature, logit_softcap, ignore_index)
    ctx.inplace_backward, ctx.direct = inplace_backward, False


@once_differentiable("token_logprobs")
def _backward(ctx, grad_logps, _normalizer, grad_logsumexp, grad_entropy, grad_sum_p2, *_metrics):
    logits, labels, temperatures, normalizer, entropy, sum_p2 = ctx.saved_tensors
    nothing = (None,) * 9
    if all(grad is None for grad in (grad_logps, grad_logsumexp, grad_entropy, grad_sum_p2)):
        return None, *nothing
    grad_logps = torch.zeros_like(normalizer[0]) if grad_logps is None else grad_logps.contiguous()
    coefs = _coefs(grad_logps, grad_logsumexp, grad_entropy, grad_sum_p2, entropy, sum_p2)
    args = (labels, temperatures, *ctx.scalars, normalizer, grad_logps, coefs)
    if ctx.direct:
        return _direct_backward(logits, ctx.inplace_backward, args), *nothing
    if not ctx.inplace_backward:
        return _backward_op(logits, *args), *nothing
    storage = logits.detach()
    _backward_op_(storage, *args)
    return storage, *nothing


def _coefs(
    grad_logps: Tensor,  # [N], as all the others
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_sum_p2: Tensor | None,
    entropy: Tensor,
    sum_p2: Tensor,
) -> Tensor | None:
    """[3, N] a, b, c of ``dL/dz_v = g 1[v = label] + p_v (a + b log p_v + c p_v)``; None where only g is there."""
    if grad_logsumexp is None and grad_entropy is None and grad_sum_p2 is None:
        return None
    a, b, c = -grad_logps, torch.zeros_like(grad_logps), torch.zeros_like(grad_logps)
    if grad_logsumexp is not None:
        a = a + grad_logsumexp
    if grad_entropy is not None:
        a, b = a - grad_entropy * entropy, -grad_entropy
    if grad_sum_p2 is not None:
        a, c = a - 2 * grad_sum_p2 * sum_p2, 2 * grad_sum_p2
    return torch.stack((a, b, c))


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# In eager mode: the compiled backends are ops themselves, visible to whatever traces or counts; calling them without
# the public custom op around them saves 40 us forward and 40 us backward.


def _direct_backward(logits: Tensor, inplace: bool, args: tuple) -> Tensor:
    grad_logits = logits.detach() if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _compiled.backward(logits, *args, grad_logits)
    if inplace:
        torch.autograd.graph.increment_version(grad_logits)  # so that autograd notices, as for any operation in place
    return grad_logits


class _Direct(torch.autograd.Function):
    """``apply(backend, *the arguments of the op)``, for a compiled backend."""

    @staticmethod
    def forward(ctx, backend: Backend, *inputs) -> tuple[Tensor, ...]:
        output = _run_forward(backend, *inputs[:-1])
        _setup_context(ctx, inputs, output)
        ctx.direct = True
        return output

    @staticmethod
    def backward(ctx, *grads) -> tuple:
        return None, *_backward(ctx, *grads)


def _forward(*args) -> tuple[Tensor, ...]:
    """The op, by the shortest way."""
    logits = args[0]
    if torch.compiler.is_compiling():
        return _forward_op(*args)
    backend = OP.pick(logits.device, logits)
    if backend.impl is not _compiled:
        return _forward_op(*args)
    if logits.requires_grad and torch.is_grad_enabled():
        return _Direct.apply(backend, *args)
    return _run_forward(backend, *args[:-1])


def token_logprobs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    temperature: float | Tensor = 1.0,  # or [...]
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
    topk: int = 10,
    label_set: Tensor | None = None,  # [L]
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label under the softmax of its row of logits, and statistics of that distribution.

    The spec, with y = logits (or ``logit_softcap * tanh(logits / logit_softcap)``) in fp32::

        logp  = torch.log_softmax(y / temperature, dim=-1)            # [..., V]
        p     = logp.exp()
        logps = logp.gather(-1, labels[..., None])[..., 0]            # [...], 0 where labels == ignore_index

    ``stats`` names what is wanted besides, each [...] and from the same single read of the logits:

    ================== ============================================ ============
    ``logsumexp``      ``(y / temperature).logsumexp(-1)``          with gradient
    ``entropy``        ``-(p * logp).sum(-1)``, in nats             with gradient
    ``sum_p2``         ``p.square().sum(-1)``                       with gradient
    ``topk_mass``      ``p.topk(k).values.sum(-1)``                 no gradient
    ``topk_entropy``   ``-(p * logp)`` summed over the same k       no gradient
    ``label_set_prob`` ``p[..., label_set].sum(-1)``                no gradient
    ================== ============================================ ============

    ``topk_entropy`` is the top-k's share of the entropy; the entropy of the renormalised top-k distribution is
    ``topk_entropy / topk_mass + topk_mass.log()``.

    Args:
        logits: float32, bfloat16, float16 or float64. Views of up to three dimensions with a unit last stride are read
            in place whatever their row strides (``logits[:, :-1]``); others are copied once.
        labels: any integer type. Rows labelled ``ignore_index`` are not read: logp, statistics and gradient are 0.
        temperature: a number, or a tensor with one per row (shape of ``labels``), positive; takes no gradient.
        logit_softcap: c > 0 of Gemma's ``c * tanh(x / c)``, applied before the temperature.
        topk: k of the top-k statistics, 1 to 16; the whole row where it has fewer columns.
        label_set: distinct token ids of ``label_set_prob``, integer, on the logits' device.
        inplace_backward: the backward writes the gradient over the logits instead of allocating as much again. After
            it ``logits`` holds its gradient. Autograd raises when another op needs the old values later in the
            backward; a leaf, a view of a leaf, and rows that overlap in memory are refused at once.

    Returns:
        logps [...], float32 (float64 for float64 logits); with ``stats``, ``(logps, {name: tensor})``. Once
        differentiable.

    Raises:
        TypeError, ValueError: one line that names the argument. A label out of range raises on the CPU; on a GPU, which
            is never waited for, its logp and its row of the gradient are NaN (and it raises under ``FASTPO_DEBUG=1``).

    NaN and infinite logits act as in ``torch.log_softmax``: -inf is a mask (p = 0); a row with NaN or +inf, or all
    -inf, is NaN.

    Cost: forward reads the logits once; backward reads them once and writes the gradient once. Statistics add no bytes.
    Source: the online logsumexp of Milakov and Gimelshein (2018); gradients are derived in this folder's README.
    """
    check_arguments(logits, labels, temperature, logit_softcap, stats, topk, label_set)
    if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
        check_overwritable(logits)
    temperatures = temperature if isinstance(temperature, Tensor) else None
    logps, _, *values = _forward(
        _as_rows(logits),
        labels.reshape(-1).to(torch.int64).contiguous(),
        None if temperatures is None else temperatures.reshape(-1).to(_accumulator(logits.dtype)).contiguous(),
        None if label_set is None else label_set.to(torch.int64).contiguous(),
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        0.0 if logit_softcap is None else float(logit_softcap),
        ignore_index,
        topk,
        ",".join(stats),
        inplace_backward,
    )
    logps = logps.view(labels.shape)
    if not stats:
        return logps
    by_name = dict(zip(STATS, values, strict=True))
    return logps, {name: by_name[name].view(labels.shape) for name in stats}


def _as_rows(logits: Tensor) -> Tensor:
    """[..., V] as [B, T, V] with a unit last stride: a view up to three dimensions and where strides allow one."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() > 3:
        return logits.flatten(0, -3)
    return logits[(None,) * (3 - logits.dim())]
