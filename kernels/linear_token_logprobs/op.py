"""``linear_token_logprobs``: schema, backends, autograd and the public function. README.md derives the formulas.

Shapes: N hidden rows of size H, V vocabulary entries, M labels, r LoRA's rank, L the size of ``label_set``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastpo.dispatch import Backend, Op, always, triton_missing
from fastpo.kernels.common.checks import STATS
from fastpo.kernels.common.once import once_differentiable
from fastpo.kernels.linear_token_logprobs import cpu_kernels, gemm, parallel, reference, run
from fastpo.kernels.linear_token_logprobs.checks import (
    check_ignore_index,
    check_kinds,
    check_settings,
    check_tensors,
)


class _Triton:
    """Imports the kernels when they first run: triton is not installed everywhere."""

    def __getattr__(self, name: str) -> Any:
        from fastpo.kernels.linear_token_logprobs import triton_kernels

        return getattr(triton_kernels, name)


def _why_not_fused(weight: Tensor) -> str | None:
    return "float64 is computed in float64, in plain PyTorch" if weight.dtype == torch.float64 else None


# Every backend has the four tile functions of reference.py; the GEMMs between them are the library's (gemm.py).
OP = Op(
    "linear_token_logprobs",
    [
        Backend("triton", "cuda", triton_missing, _why_not_fused, _Triton()),
        Backend("cpu", "cpu", cpu_kernels.MISSING, _why_not_fused, cpu_kernels),
        Backend("torch", "any", always, always, reference),
    ],
)

# The fields of run.Inputs.
_INPUTS = """Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? rows, Tensor? temperatures,
Tensor? lora_a, Tensor? lora_b, float lora_scale, float temperature, float logit_scale, float logit_softcap,
int? ignore_index, int? memory_budget, str group"""
_NUM_INPUTS = len(run.Inputs.__dataclass_fields__)


@torch.library.custom_op(
    "fastpo::linear_token_logprobs_fwd",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? label_set, str stats, int topk, bool hidden_grad, bool head_grad) -> Tensor[]",
)
def _forward_op(*args):
    gemm.tally.operations = 0
    return run.forward(run.Inputs(*args[:_NUM_INPUTS]), *args[_NUM_INPUTS:], op=OP)


@_forward_op.register_fake
def _(*args):
    _, stats, _, hidden_grad, head_grad = args[_NUM_INPUTS:]
    return list(run.allocate(run.Inputs(*args[:_NUM_INPUTS]), stats, hidden_grad, head_grad).values())


@torch.library.custom_op(
    "fastpo::linear_token_logprobs_bwd",
    mutates_args=(),
    schema=f"({_INPUTS}, bool[] wanted, Tensor[] saved, Tensor? grad_logps, Tensor? grad_logsumexp, "
    "Tensor? grad_entropy, Tensor? grad_sum_p2) -> Tensor[]",
)
def _backward_op(*args):
    gemm.tally.operations = 0
    inputs, (wanted, saved, *upstream) = run.Inputs(*args[:_NUM_INPUTS]), args[_NUM_INPUTS:]
    return run.backward(inputs, wanted, saved, upstream, op=OP)


@_backward_op.register_fake
def _(*args):
    return run.empty_gradients(run.Inputs(*args[:_NUM_INPUTS]), args[_NUM_INPUTS])


@register_flop_formula([torch.ops.fastpo.linear_token_logprobs_fwd, torch.ops.fastpo.linear_token_logprobs_bwd], True)
def operations_run(*_args, **_kwargs) -> int:
    """What the call that has just returned has run: it depends on how many labels count. 0 on fake tensors."""
    operations, gemm.tally.operations = gemm.tally.operations, 0
    return operations


def _setup_context(ctx, inputs, output) -> None:
    *shared, _label_set, stats, _topk, _hidden_grad, _head_grad = inputs
    differentiable = {"logps", *(set(stats.split(",")) & set(STATS[:3]))}
    ctx.mark_non_differentiable(*(t for name, t in zip(run.OUTPUTS, output, strict=True) if name not in differentiable))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*shared[:8], *output)
    ctx.scalars = shared[8:]


@once_differentiable("linear_token_logprobs")
def _backward(ctx, grad_outputs):
    upstream = grad_outputs[:4]
    nothing = [None] * (_NUM_INPUTS + 5)
    if all(grad is None for grad in upstream):
        return tuple(nothing)
    tensors, saved = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
    places = (0, 1, 3, 6, 7)  # of hidden, weight, bias, lora_a, lora_b among the inputs
    wanted = [ctx.needs_input_grad[place] for place in places]
    grads = _backward_op(*tensors, *ctx.scalars, wanted, saved, *upstream)
    for place, want, grad in zip(places, wanted, grads, strict=True):
        nothing[place] = grad if want else None
    return tuple(nothing)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def linear_token_logprobs(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...], or any shape with rows
    *,
    bias: Tensor | None = None,  # [V]
    rows: Tensor | None = None,  # shape of labels
    temperature: float | Tensor = 1.0,  # or [...] of hidden
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int | None = -100,
    stats: Sequence[str] = (),
    topk: int = 10,
    label_set: Tensor | None = None,  # [L]
    memory_budget: int | None = None,
    group: Any = None,
    lora: tuple[Tensor, Tensor, float] | None = None,  # A [r, H], B [V, r], scale
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each label under an LM head, from hidden states: ``token_logprobs`` without the logits.

    The spec, in fp32, with rows = 0, 1, 2, ... where it is not given::

        z     = hidden[rows] @ weight.T + bias + scale * (hidden[rows] @ A.T) @ B.T   # [..., V]
        y     = logit_softcap * tanh(logit_scale * z / logit_softcap)                 # or logit_scale * z
        logp  = torch.log_softmax(y / temperature[rows], dim=-1)
        logps = logp.gather(-1, labels[..., None])[..., 0]                            # 0 at ignored labels

    Args:
        hidden: float32, bfloat16, float16 or float64, any strides.
        weight: the head, of hidden's type; also a transposed view, or a DTensor as FSDP2 shards it: it is gathered, and
            its gradient averaged over the mesh and scattered, as FSDP2 does with the others.
        labels: any integer type. Rows of hidden that no label but ``ignore_index`` asks for cost nothing.
        bias: of weight's type.
        rows: which hidden row predicts each label; several labels may share one (a branch of a token tree), which is
            computed once. Without it label i is predicted by row i.
        temperature: a number, or one per hidden row; positive, takes no gradient.
        ignore_index: labels that count nowhere; None where there are none, which on a GPU saves waiting for the count.
        stats, topk, label_set: statistics of the distribution that predicts each label, as in ``token_logprobs``.
        memory_budget: bytes of extra memory at the peak, gradients not counted. It decides how much of the forward is
            kept for the weight's gradient. None: 1 GiB, besides what grows with the rows alone.
        group: the process group (or its name) over whose ranks the vocabulary is split in rank order: weight, bias and
            LoRA's B are this rank's rows, everything else is the same on all ranks, labels and ``label_set`` count from
            the start of the whole vocabulary. The gradients of hidden and LoRA's A are summed over the group.
        lora: low-rank factors that are added to the weight.

    Returns:
        logps, float32 (float64 for float64), in the shape of labels; with ``stats``, ``(logps, {name: tensor})``. Once
        differentiable.

    Raises:
        TypeError, ValueError: one line that names the argument, before any work. A label out of range raises on the
            CPU; on a GPU its logp and its gradients are NaN (and it raises under ``FASTPO_DEBUG=1``).

    Cost, in F = 2 N H V operations of GEMMs, N counting the rows that are computed; ``plan`` says it for given shapes:

    ======================================= ==============================================================
    no gradient                             1F
    weight, bias and LoRA's B frozen        2F: dhidden is made in the forward up to one factor per row
    weight, bias or LoRA's B trained        3F on what ``memory_budget`` keeps of exp(logits), 4F on the rest
    only they are trained, hidden is not    2F and 3F
    a gradient of entropy or sum_p2         3F with a frozen head, 5F with a trained one, and 1F for what
                                            the forward made in vain
    ======================================= ==============================================================

    The logits are fp32 whatever the type of hidden; the weight's gradient is summed in fp32 and rounded once.
    Deterministic. Source: derived in this folder's README; the online softmax of Milakov and Gimelshein (2018).
    """
    weight = parallel.local(weight, group)
    check_kinds(hidden, weight, bias, lora)
    hidden, weight, bias, lora = under_autocast(hidden, weight, bias, lora)
    check_tensors(hidden, weight, labels, bias, rows, lora)
    settings = (temperature, logit_scale, logit_softcap, stats, topk, label_set, memory_budget)
    check_settings(hidden, *settings)
    check_ignore_index(ignore_index, optional=True)
    lora_a, lora_b, lora_scale = lora if lora is not None else (None, None, 1.0)
    grads = torch.is_grad_enabled()
    hidden_grad = grads and any(t is not None and t.requires_grad for t in (hidden, lora_a))
    head_grad = grads and any(t is not None and t.requires_grad for t in (weight, bias, lora_b))
    per_row = isinstance(temperature, Tensor)
    outputs = _forward_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).to(torch.int64),
        bias,
        None if rows is None else rows.reshape(-1).to(torch.int64),
        temperature.reshape(-1).to(gemm.wide(hidden.dtype)) if isinstance(temperature, Tensor) else None,
        lora_a,
        lora_b,
        float(lora_scale),
        1.0 if per_row else float(temperature),
        float(logit_scale),
        0.0 if logit_softcap is None else float(logit_softcap),
        ignore_index,
        memory_budget,
        parallel.name_of(group),
        None if label_set is None else label_set.to(torch.int64),
        ",".join(stats),
        topk,
        hidden_grad,
        head_grad,
    )
    logps = outputs[0].view(labels.shape)
    if not stats:
        return logps
    by_name = dict(zip(run.OUTPUTS, outputs, strict=True))
    return logps, {name: by_name[name].view(labels.shape) for name in stats}


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None, lora) -> tuple:
    """Inputs of GEMMs in autocast's type where it is on, as torch's own linear takes them."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return hidden, weight, bias, lora
    dtype = torch.get_autocast_dtype(device)
    if lora is not None:
        lora = (lora[0].to(dtype), lora[1].to(dtype), lora[2])
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), lora
