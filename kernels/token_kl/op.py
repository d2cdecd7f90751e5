"""``token_kl`` and ``linear_token_kl``: schemas, autograd, public functions; library GEMMs.

N rows (tokens), V vocabulary entries, H and H' hidden sizes of policy and reference.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.dispatch import Backend, Op, always, triton_missing
from fastpo.kernels.common.once import once_differentiable
from fastpo.kernels.linear_token_logprobs import gemm

from . import cpu_kernels, reference
from .reference import Head

TORCH_CHUNK = 1 << 22  # bytes of a tile of logits: where PyTorch goes over it several times, the cache should hold it
DEFAULT_BUDGET = 1 << 30
TILES = 6  # of the size of a chunk's logits that are alive at a time


class _Triton:
    """Imports the kernels when they first run: triton is not installed everywhere."""

    def __getattr__(self, name: str) -> Any:
        from . import triton_kernels

        return getattr(triton_kernels, name)


def _not_float64(dtype: torch.dtype) -> str | None:
    return "float64 is handled in float64, in plain PyTorch" if dtype == torch.float64 else None


OP = Op(
    "token_kl",
    [
        Backend("triton", "cuda", triton_missing, _not_float64, _Triton()),
        Backend("cpu", "cpu", cpu_kernels.MISSING, _not_float64, cpu_kernels),
        Backend("torch", "any", always, always, reference),
    ],
)


def _run(like: Tensor) -> Any:
    """The functions of one tile, ``divergence`` and ``slope``, of the backend for these."""
    return OP.pick(like.device, like.dtype).impl


@torch.library.custom_op("fastpo::token_kl_fwd", mutates_args=())
def _forward_op(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    head, run = Head(temperature, scale, softcap), _run(logits)
    kl, norms = _forward_fake(logits, ref_logits, mask, temperature, scale, softcap)
    for rows in _chunks(len(logits), _logits_rows(logits, run)):
        kl[rows], norms[:, rows] = run.divergence(logits[rows], ref_logits[rows], head)
    return (kl if mask is None else kl.masked_fill_(~mask, 0.0)), norms


@_forward_op.register_fake
def _forward_fake(logits, ref_logits, mask, temperature, scale, softcap):
    wide = gemm.wide(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=wide), logits.new_empty(2, logits.shape[0], dtype=wide)


@torch.library.custom_op("fastpo::token_kl_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    norms: Tensor,
    temperature: float,
    scale: float,
    softcap: float,
) -> Tensor:
    head, run = Head(temperature, scale, softcap), _run(logits)
    factor = grad if mask is None else torch.where(mask, grad, 0.0)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _chunks(len(logits), _logits_rows(logits, run)):
        own = norms[:, rows].contiguous()
        run.slope(logits[rows], ref_logits[rows], own, factor[rows].contiguous(), head, result[rows])
    return result if mask is None else result.masked_fill_(~mask[:, None], 0.0)


@_backward_op.register_fake
def _(grad, logits, ref_logits, mask, norms, temperature, scale, softcap):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, ref_logits, mask, *ctx.head = inputs
    ctx.save_for_backward(logits, ref_logits, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable("token_kl")
def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    none = (None,) * 5
    if grad is None or not ctx.needs_input_grad[0]:
        return (None, *none)
    return (_backward_op(grad, *ctx.saved_tensors, *ctx.head), *none)


_forward_op.register_autograd(_backward, setup_context=_setup)


def token_kl(
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    *,
    mask: Tensor | None = None,  # [...] bool
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """``K_t = KL(reference || policy)`` over the whole vocabulary at each token: what TDPO and SparsePO penalise.

    The spec, with z = logits (softcapped) / temperature in fp32, and the same of the reference::

        logp, logq = z.log_softmax(-1), ref_z.log_softmax(-1)
        return (logq.exp() * (logq - logp)).sum(-1)                 # [...], 0 where mask is False

    Args:
        logits: the policy's, float32, bfloat16, float16 or float64; differentiable: ``dK/dz_v = p_v - q_v``.
            Two-dimensional views with a unit last stride are read in place, others copied once.
        ref_logits: the reference's, a constant.
        mask: False: a token that counts nowhere; K and its gradient are 0 there. Its logits are read.

    Returns:
        [...] float32 (float64 for float64 logits), never negative: near p = q it is summed from terms of second order,
        where the formula above would give the rounding of what cancels. Once differentiable.

    Raises:
        TypeError, ValueError: one line that names the argument.

    Cost: forward reads both logits twice (the second time for terms that know the logsumexps), backward once more and
    writes one gradient; no extra memory of their size. Rows of several labels (trees) have one K: index the result.
    Source: Zeng et al. 2024; derived in this folder's README.
    """
    _check_logits("logits", logits, None)
    _check_logits("ref_logits", ref_logits, logits)
    _check_mask(mask, logits)
    head = _head(temperature, 1.0, logit_softcap)
    flat = None if mask is None else mask.reshape(-1)
    kl, _ = _forward_op(*(x.reshape(-1, x.shape[-1]) for x in (logits, ref_logits.detach())), flat, *head)
    return kl.view(logits.shape[:-1])


class _Operands(NamedTuple):
    """Both models at the rows that count; on a CPU hidden states are widened, weights are not."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    ref_hidden: Tensor  # [M, H']
    ref_weight: Tensor  # [V, H']
    bias: Tensor | None  # [V]
    ref_bias: Tensor | None  # [V]
    kept: Tensor | None  # [M] int64, of N rows; None: all

    def tile(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Both models' logits [R, V] of a chunk, fp32."""
        own = _logits(self.hidden[rows], self.weight, self.bias)
        return own, _logits(self.ref_hidden[rows], self.ref_weight, self.ref_bias)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = gemm.logits(hidden, weight)
    return x if bias is None else x.add_(bias.to(x.dtype))


def _operands(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask) -> _Operands:
    kept = None if mask is None else mask.nonzero()[:, 0]
    own, other = (gemm.operand(x if kept is None else x[kept]) for x in (hidden, ref_hidden))
    return _Operands(own, weight, other, ref_weight, bias, ref_bias, kept)


@torch.library.custom_op("fastpo::linear_token_kl_fwd", mutates_args=())
def _linear_op(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float,
    chunk: int,
    hidden_grad: bool,
) -> tuple[Tensor, Tensor]:
    """[N] K and [N, H] dK/dhidden (empty unless asked for)."""
    head, run = Head(temperature, scale, softcap), _run(hidden)
    both = _operands(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask)
    wide = gemm.wide(hidden.dtype)
    kl = hidden.new_zeros(len(hidden), dtype=wide)
    grads = hidden.new_zeros(hidden.shape if hidden_grad else (0, hidden.shape[1]), dtype=wide)
    for rows in _chunks(len(both.hidden), chunk):
        logits, ref_logits = both.tile(rows)
        place = rows if both.kept is None else both.kept[rows]
        kl[place], norms = run.divergence(logits, ref_logits, head)
        if hidden_grad:
            own = torch.empty_like(logits, dtype=both.hidden.dtype)
            run.slope(logits, ref_logits, norms, None, head, own)
            grads[place] = gemm.times(own, both.weight)
    return kl, grads


@_linear_op.register_fake
def _(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask, temperature, scale, softcap, chunk, hidden_grad):
    wide = gemm.wide(hidden.dtype)
    rows = hidden.shape[0] if hidden_grad else 0
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(rows, hidden.shape[1], dtype=wide)


@torch.library.custom_op("fastpo::linear_token_kl_bwd", mutates_args=())
def _linear_backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    scale: float,
    softcap: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """[V, H] dweight and [V] dbias: the logits again, and one GEMM more."""
    head, run = Head(temperature, scale, softcap), _run(hidden)
    both = _operands(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask)
    wide = gemm.wide(hidden.dtype)
    dweight, dbias = weight.new_zeros(weight.shape, dtype=wide), weight.new_zeros(len(weight), dtype=wide)
    for rows in _chunks(len(both.hidden), chunk):
        logits, ref_logits = both.tile(rows)
        upstream = grad[rows if both.kept is None else both.kept[rows]].to(wide).contiguous()
        _, norms = run.divergence(logits, ref_logits, head)
        tile = torch.empty_like(logits)
        run.slope(logits, ref_logits, norms, upstream, head, tile)
        dbias += tile.sum(0)
        gemm.outer(tile.to(both.hidden.dtype), both.hidden[rows], dweight, add=True)
    return dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


@_linear_backward_op.register_fake
def _(grad, hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask, temperature, scale, softcap, chunk):
    return torch.empty_like(weight), (weight if bias is None else bias).new_empty(weight.shape[0])


def _linear_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, temperature, scale, softcap, chunk, _ = inputs
    ctx.settings = (temperature, scale, softcap, chunk)
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable("linear_token_kl")
def _linear_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    *tensors, slopes = ctx.saved_tensors
    result: list[Tensor | None] = [None] * 12
    if grad is None:
        return tuple(result)
    if ctx.needs_input_grad[0]:
        result[0] = (grad[:, None] * slopes).to(tensors[0].dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
        dweight, dbias = _linear_backward_op(grad.contiguous(), *tensors, *ctx.settings)
        result[1] = dweight if ctx.needs_input_grad[1] else None
        result[4] = dbias if ctx.needs_input_grad[4] else None
    return tuple(result)


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear_token_kl(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    ref_hidden: Tensor,  # [..., H']
    ref_weight: Tensor,  # [V, H']
    *,
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,  # [...] bool
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """``token_kl`` from hidden states: neither model's logits are kept.

    The spec::

        logits, ref_logits = F.linear(hidden, weight, bias), F.linear(ref_hidden, ref_weight, ref_bias)
        return token_kl(logit_scale * logits, logit_scale * ref_logits, mask=mask, ...)

    Args:
        hidden, weight, bias: the policy's, of one float type; differentiable.
        ref_hidden, ref_weight, ref_bias: the reference's, constants.
        mask: rows where it is False are left out: they cost nothing, and K and gradients are 0 there.
        memory_budget: bytes of logits that may be alive at a time; None: 1 GiB.

    Returns:
        [...] float32 (float64 for float64 hidden), never negative, once differentiable. Use it as ``Segments.kl``.

    Raises:
        TypeError, ValueError: one line that names the argument.

    Cost, in F = 2 M H V operations, M the rows that count: 2F without gradient (each model's logits), 3F with a frozen
    head (dK/dhidden is known in the forward, the backward is a row scale), 6F with a trained one (the logits again).
    Source: derived in this folder's README.
    """
    _check_model("hidden", hidden, "weight", weight, "bias", bias, None)
    _check_model("ref_hidden", ref_hidden, "ref_weight", ref_weight, "ref_bias", ref_bias, (hidden, weight))
    _check_mask(mask, hidden)
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}; it should be a positive number of bytes, or None")
    size = TILES * weight.shape[0] * gemm.wide(hidden.dtype).itemsize
    chunk = max(1, (DEFAULT_BUDGET if memory_budget is None else memory_budget) // size)
    ref = (x if x is None else x.detach() for x in (ref_hidden.reshape(-1, ref_hidden.shape[-1]), ref_weight, ref_bias))
    ref_rows, ref_head, ref_shift = ref
    kl, _ = _linear_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ref_rows,
        ref_head,
        bias,
        ref_shift,
        None if mask is None else mask.reshape(-1),
        *_head(temperature, logit_scale, logit_softcap),
        chunk,
        torch.is_grad_enabled() and hidden.requires_grad,
    )
    return kl.view(hidden.shape[:-1])


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits_rows(logits: Tensor, run: Any) -> int:
    """Rows in a chunk: all of them where a kernel goes over the logits by itself."""
    return max(1, TORCH_CHUNK // (4 * logits.shape[1]) if run is reference else len(logits))


def _head(temperature: float, logit_scale: float, logit_softcap: float | None) -> Head:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it should be a positive number")
    if not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}; it should be a number other than 0")
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap is {logit_softcap}; it should be a positive number, or None for no cap")
    return Head(float(temperature), float(logit_scale), 0.0 if logit_softcap is None else float(logit_softcap))


def _check_logits(name: str, x: Tensor, like: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name} is {_of(x)}; it should be a float tensor [..., V]")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise ValueError(
            f"{name} is {_of(x)} on {x.device}; it should be {list(like.shape)} on {like.device}, as logits"
        )


def _check_model(name, hidden, weight_name, weight, bias_name, bias, policy: tuple[Tensor, Tensor] | None) -> None:
    for own, x in ((name, hidden), (weight_name, weight)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            raise ValueError(f"{own} is {_of(x)}; it should be a float tensor of two dimensions at least")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype or 0 in weight.shape:
        wanted = f"{hidden.dtype} [V, {hidden.shape[-1]}], to go with {name}"
        raise ValueError(f"{weight_name} is {_of(weight)}; it should be {wanted}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"{bias_name} is {_of(bias)}; it should be a float tensor [{weight.shape[0]}]")
    if policy is None:
        return
    if hidden.shape[:-1] != policy[0].shape[:-1]:
        raise ValueError(f"{name} is {_of(hidden)}; it should be {list(policy[0].shape[:-1])} with a last dimension")
    if weight.shape[0] != policy[1].shape[0]:
        raise ValueError(f"{weight_name} has {weight.shape[0]} rows; weight has {policy[1].shape[0]}: one vocabulary")


def _check_mask(mask: Tensor | None, like: Tensor) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != like.shape[:-1]):
        raise ValueError(f"mask is {_of(mask)}; it should be bool {list(like.shape[:-1])}")


def _of(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
