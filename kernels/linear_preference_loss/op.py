"""``linear_preference_loss``: schema, autograd and the public function. README.md derives it.

Shapes: N hidden rows of size H, V vocabulary entries, T tokens in S sequences, P tuples of K members, r the rank of
LoRA factors, L the size of ``label_set``. It has no kernels of its own: the backends are those of
``linear_token_logprobs`` and ``preference_loss``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastpo.kernels.common.once import once_differentiable
from fastpo.kernels.linear_token_logprobs import gemm, linear_token_logprobs, parallel
from fastpo.kernels.linear_token_logprobs.checks import check_ignore_index, check_kinds, check_tensors
from fastpo.kernels.linear_token_logprobs.op import operations_run, under_autocast
from fastpo.kernels.linear_token_logprobs.run import Inputs
from fastpo.kernels.preference_loss.records import (
    Tokens,
    TokenSettings,
    Tuples,
    TupleSettings,
    token_settings,
    tokens_of,
    tuples_of,
)
from fastpo.objectives import Objective
from fastpo.types import Pairs, PreferenceOutput, Segments

from . import run
from .checks import REFERENCE, TOKEN_LOGPS, check_loss_and_stats, check_reference, check_reference_given
from .coupled import coupled_loss, couples

# The fields of run.Inputs, of the four records of preference_loss, and of run.Wanted.
_HEAD = """Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? rows, Tensor? temperatures,
Tensor? lora_a, Tensor? lora_b, float lora_scale, float temperature, float logit_scale, float logit_softcap,
int? ignore_index, SymInt? memory_budget, str group"""
_TOKENS = """Tensor? logps, Tensor? ref_logps, Tensor cu_seqlens, Tensor mask, Tensor? weights, Tensor? kl,
Tensor? kl_weights, Tensor? nll_weights, Tensor? token_coefs"""
_TUPLES = "Tensor index, Tensor? tuple_weights, Tensor? margins, Tensor? params, Tensor? beta_scales"
_SETTINGS = """int phi, float ref_coef, float length_power, int score_map, float score_map_coef, int[] links,
float[] table, float[] nll, int nll_normalizer, bool mean, float beta"""
_WANTED = "str[] stats, int topk, Tensor? label_set, bool[] head, bool[] segments"

_RECORDS = (Inputs, Tokens, Tuples, TokenSettings, TupleSettings, run.Wanted)


def _fields(record: Any) -> tuple[str, ...]:
    return getattr(record, "_fields", None) or tuple(record.__dataclass_fields__)


_NAMES = [(record, name) for record in _RECORDS for name in _fields(record)]


def _records(arguments: tuple) -> list[Any]:
    """The op's flat arguments as records."""
    at = 0
    records = []
    for record in _RECORDS:
        count = len(_fields(record))
        records.append(record(*arguments[at : at + count]))
        at += count
    return records


@torch.library.custom_op(
    "fastpo::linear_preference_loss_fwd",
    mutates_args=(),
    schema=f"({_HEAD}, {_TOKENS}, {_TUPLES}, {_SETTINGS}, {_WANTED}) -> ({', '.join(['Tensor'] * len(run.OUTPUTS))})",
)
def _forward_op(*arguments):
    gemm.tally.operations = 0
    inputs, tokens, tuples, token_set, tuple_set, wanted = _records(arguments)
    return run.forward(inputs, run.Loss(tokens, tuples, token_set, tuple_set), wanted)


@_forward_op.register_fake
def _(*arguments):
    inputs, tokens, tuples, _, _, wanted = _records(arguments)
    return tuple(run.allocate(inputs, tokens, tuples, wanted).values())


register_flop_formula(torch.ops.fastpo.linear_preference_loss_fwd, True)(operations_run)

# Where the inputs stand that get the gradients d_* of run.OUTPUTS.
_GRADS = [name for name in run.OUTPUTS if name.startswith("d_")]
_PLACES = [
    next(i for i, (record, field) in enumerate(_NAMES) if field == name[2:] and record in (Inputs, Tokens))
    for name in _GRADS
]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-len(_GRADS) :])


@once_differentiable("linear_preference_loss")
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple:
    result: list[Tensor | None] = [None] * len(_NAMES)
    if upstream is None:
        return tuple(result)
    last, by_one = _is_last(upstream), _is_one(upstream)
    for place, made in zip(_PLACES, ctx.saved_tensors, strict=True):
        if not ctx.needs_input_grad[place]:
            continue
        if last:
            result[place] = made if by_one else made.mul_(upstream.to(made.dtype))
        else:
            result[place] = upstream.to(made.dtype) * made
    return tuple(result)


def _is_last(upstream: Tensor) -> bool:
    """Whether no other backward will ask for what was saved: then it may be given away. Never while compiling."""
    return type(upstream) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


def _is_one(upstream: Tensor) -> bool:
    """Whether nothing is to be multiplied, as after ``loss.backward()``: looked at where that costs no waiting."""
    return type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.item() == 1


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def linear_preference_loss(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T], or any shape of T elements
    ref_logps: Tensor | None,  # [T]
    segments: Segments,
    pairs: Pairs,
    objective: Objective,
    *,
    bias: Tensor | None = None,  # [V]
    rows: Tensor | None = None,  # shape of labels
    temperature: float | Tensor = 1.0,  # or [...] of hidden
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    lora: tuple[Tensor, Tensor, float] | None = None,  # A [r, H], B [V, r], scale
    ref_hidden: Tensor | None = None,  # [..., H']
    ref_weight: Tensor | None = None,  # [V, H']
    ref_bias: Tensor | None = None,  # [V]
    stats: Sequence[str] = (),
    topk: int = 10,
    label_set: Tensor | None = None,  # [L]
    memory_budget: int | None = None,
) -> PreferenceOutput | tuple[PreferenceOutput, dict[str, Tensor]]:
    """The loss of a preference objective from hidden states, its gradients made on the way: no logits are kept.

    The spec, where ``mask`` is ``segments.mask & (labels != ignore_index)``::

        logps = linear_token_logprobs(hidden, weight, labels.where(mask, ignore_index), ...)   # [T]
        return preference_loss(logps, ref_logps, replace(segments, mask=mask), pairs, objective)

    Values are exactly those of these two calls. Sequences that share a tuple stay together; as many of them as
    ``memory_budget`` holds go through the head at a time: log-probs, the coefficient of each token from
    ``preference_loss``, and with it the gradients. The backward multiplies them by the gradient of the loss.

    Args:
        hidden: float32, bfloat16, float16 or float64, any strides. Row t predicts label t but where ``rows`` is given.
        weight: the head, of hidden's type; a DTensor (FSDP2) is gathered and its gradient averaged and scattered.
        labels: any integer type; what stands at tokens that do not count may be anything.
        ref_logps: the reference's log-probs, a constant; None with ``ref_hidden`` or an objective without reference.
        segments: which tokens belong to which sequence, and their weights; float fields are differentiable.
        pairs, objective: as for ``preference_loss``; every preset of ``fastpo.objectives``, or your own. One that
            couples the tuples of the batch (``couple``, ``list_loss``) goes by the two calls above: no group of
            sequences can be finished before all are scored.
        bias, temperature, logit_scale, logit_softcap, lora, topk, label_set: as for ``linear_token_logprobs``.
        rows: which hidden row predicts each label. A row whose labels are in several groups is computed in each.
        ref_hidden: the reference's hidden states, in place of ``ref_logps``: 1F more, no gradient. Its head is
            ``ref_weight`` and ``ref_bias``, else ``weight`` and ``bias`` without ``lora`` (adapters off). Same
            ``rows``, ``temperature``, ``logit_scale`` and ``logit_softcap``.
        stats: values of each token to return as well, without gradient: "logps", the statistics of ``token_logprobs``.
        memory_budget: bytes of extra memory at the peak, gradients not counted. None: 1 GiB, besides what grows with
            the rows of a group alone.

    Returns:
        PreferenceOutput, of which ``loss`` carries gradient, once, to hidden, weight, bias, lora and the float fields
        of segments; with ``stats``, ``(PreferenceOutput, {name: [T]})``, 0 at tokens that do not count.

    Raises:
        TypeError, ValueError: one line that names the argument. ValueError too where the budget does not hold the rows
            of connected sequences and the smallest tile. Two phases, ``linear_token_logprobs`` and then
            ``sequence_scores`` or ``preference_loss``, are what this op cannot replace for losses of scores that no
            ``Objective`` says, for gradients of statistics, and for a vocabulary split over processes.

    Cost, in F = 2 R H V operations, R counting the hidden rows that predict tokens that count: 1F without gradient,
    **2F** with a frozen head, **3F** with a trained one, 1F more for ``ref_hidden``; connected sequences that alone
    exceed the budget have part of their logits computed again (up to 4F). ``plan`` says it for given segments.
    dweight is summed over tokens in fp32 and rounded once. The backward of ``loss`` itself multiplies nothing on a CPU;
    another upstream gradient than 1 scales the gradients in place. Where the graph is retained they are copied.
    Deterministic; independent of the grouping up to the rounding of sums. Source: derived in this folder's README.
    """
    weight = parallel.local(weight, None)
    check_kinds(hidden, weight, bias, lora)
    hidden, weight, bias, lora = under_autocast(hidden, weight, bias, lora)
    check_tensors(hidden, weight, labels, bias, rows, lora)
    check_ignore_index(ignore_index, optional=False)
    check_reference_given(ref_logps, ref_hidden, ref_weight, ref_bias, objective)
    if ref_hidden is not None:
        own = weight if ref_weight is None else parallel.local(ref_weight, None)
        check_kinds(ref_hidden, own, ref_bias, None, REFERENCE)
        ref_hidden, own, ref_bias, _ = under_autocast(ref_hidden, own, ref_bias, None)
        check_reference(hidden, weight, ref_hidden, own, ref_bias, shared=ref_weight is None)
    known = labels.new_zeros(labels.numel(), dtype=torch.float32) if ref_hidden is not None else ref_logps
    head = (temperature, logit_scale, logit_softcap)
    check_loss_and_stats(hidden, labels, known, segments, pairs, objective, stats, head, topk, label_set, memory_budget)
    flat = labels.reshape(-1).to(torch.int64)
    mask = flat != ignore_index if segments.mask is None else segments.mask & (flat != ignore_index)
    if ref_hidden is not None:
        ref_logps = _reference(
            ref_hidden,
            own,
            torch.where(mask, flat, ignore_index).view(labels.shape),
            bias=bias if ref_weight is None else ref_bias,
            rows=rows,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            ignore_index=ignore_index,
            memory_budget=memory_budget,
        )
    if couples(objective):
        out, values = coupled_loss(
            hidden,
            weight,
            labels,
            mask,
            ref_logps,
            segments,
            pairs,
            objective,
            bias=bias,
            rows=rows,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            ignore_index=ignore_index,
            lora=lora,
            stats=stats,
            topk=topk,
            label_set=label_set,
            memory_budget=memory_budget,
        )
        return (out, values) if stats else out
    lora_a, lora_b, lora_scale = lora if lora is not None else (None, None, 1.0)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=wide, device=hidden.device)
    inputs = Inputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat,
        bias,
        None if rows is None else rows.reshape(-1).to(torch.int64),
        temperature.reshape(-1).to(wide) if isinstance(temperature, Tensor) else None,
        lora_a,
        lora_b,
        float(lora_scale),
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        float(logit_scale),
        0.0 if logit_softcap is None else float(logit_softcap),
        None,
        memory_budget,
        "",
    )
    tokens = tokens_of(like, ref_logps, replace(segments, mask=mask), like)._replace(logps=None)
    records = (
        inputs,
        tokens,
        tuples_of(pairs, objective, like),
        token_settings(objective),
        TupleSettings.of(objective),
    )
    wanted = _wanted(inputs, tokens, stats, topk, label_set)
    arguments = [getattr(record, name) for record in (*records, wanted) for name in _fields(type(record))]
    outputs = dict(zip(run.OUTPUTS, _forward_op(*arguments), strict=True))
    result = PreferenceOutput(*(outputs[name] for name in _fields(PreferenceOutput)))
    if not stats:
        return result
    return result, {name: outputs["token_logps" if name == TOKEN_LOGPS else name].view(labels.shape) for name in stats}


@torch.no_grad()
def _reference(ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, **head: Any) -> Tensor:
    """[T] log-probs of the reference."""
    logps = linear_token_logprobs(ref_hidden, ref_weight, labels, **head)
    assert isinstance(logps, Tensor)
    return logps.reshape(-1)


def _wanted(inputs: Inputs, tokens: Tokens, stats: Sequence[str], topk: int, label_set: Tensor | None) -> run.Wanted:
    """What the op is to compute besides the loss."""
    grads = torch.is_grad_enabled()

    def needed(record: Any, names: Sequence[str]) -> list[bool]:
        values = (getattr(record, name) for name in names)
        return [grads and value is not None and value.requires_grad for value in values]

    return run.Wanted(
        [name for name in stats if name != TOKEN_LOGPS],
        topk,
        None if label_set is None else label_set.to(torch.int64),
        needed(inputs, run.HEAD_GRADS),
        needed(tokens, run.SEGMENT_GRADS),
    )
