"""Causal-LM loss and log-probs of transformers models with the fused head: no [B, L, V] logits anywhere.

A plain ``Trainer`` by a mixin, or your own loop by a function::

    class MyTrainer(FusedLossMixin, Trainer): ...           # same loss, gradients and logs as Trainer
    loss = fused_causal_lm_loss(model, batch)                # model(**batch).loss, in your own loop

Peft's LoRA is honoured everywhere, also on the head; softcapped and scaled logits too (see ``head.Head``). What
cannot be honoured is refused with the setting's name.

B sequences of L tokens, R labels that count, T tokens that are no padding.
"""

import functools
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpo.errors import FastpoError
from fastpo.integrations.head import Head, check_head, evaluating, unwrapped
from fastpo.integrations.packing import check_packing, pack

# Outputs that are statistics of linear_token_logprobs; log_probs and mean_logits are not.
_STATS = {"entropy": "entropy", "log_sum_sq_probs": "sum_p2", "is_top1": "topk_mass"}
_PACKABLE = {"input_ids", "attention_mask", "use_cache", "output_router_logits", "return_dict"}
_checked: tuple[weakref.WeakSet, weakref.WeakSet] = (weakref.WeakSet(), weakref.WeakSet())  # padded, packed


@dataclass
class FusedOutput(ModelOutput):
    """What a fused forward returns. Per-token fields are 0 where the label is -100, and None where not asked for."""

    loss: Tensor = None  # type: ignore[assignment]  # [], mean negative log-likelihood, and the MoE balancing loss as the model adds it
    log_probs: Tensor = None  # type: ignore[assignment]  # [B, L-1] fp32
    entropy: Tensor | None = None  # [B, L-1] fp32
    log_sum_sq_probs: Tensor | None = None  # [B, L-1] fp32, log sum p^2, no gradient
    mean_logits: Tensor | None = None  # [B, L-1] fp32, over the vocabulary, no gradient
    is_top1: Tensor | None = None  # [B, L-1] bool, no token is likelier than the label, to 1e-6
    label_mask: Tensor | None = None  # [B, L-1] bool, labels that are not -100
    aux_loss: Tensor | None = None  # [], MoE balancing loss where router logits are asked for


def fused_forward(
    model: PreTrainedModel,
    *,
    labels: Tensor,  # [B, L], -100 where a token does not count
    outputs: Sequence[str] = ("log_probs",),
    padding_free: bool = False,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,  # of the model's body: input_ids [B, L], attention_mask [B, L], ...
) -> FusedOutput:
    """``model(**kwargs, labels=labels)`` with ``linear_token_logprobs`` in place of the head: the R counted rows only.

    ``padding_free`` takes the T tokens that are no padding through the body as one packed row (see ``packing``).
    """
    if shift_labels is not None:
        raise FastpoError("shift_labels is given (sequence parallelism); the fused head needs whole sequences")
    _check_call(labels, kwargs)
    kwargs["use_cache"] = False
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    mask = labels[:, 1:] != -100  # [B, L-1]
    places = torch.arange(labels.numel(), device=labels.device).view(labels.shape)  # [B, L]
    if padding_free:
        kwargs, places = _packed(kwargs, mask)
    body = model.base_model(**kwargs)
    hidden = body.last_hidden_state.flatten(0, 1)  # [B*L, H], or [T, H]
    head = Head.of(model)
    values = _token_values(head, hidden, labels[:, 1:][mask], places[:, :-1][mask], outputs)
    number = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -values["log_probs"].sum() / (number.to(hidden.device) if isinstance(number, Tensor) else number)
    aux_loss = _balancing_loss(body, config, kwargs) if kwargs.get("output_router_logits") else None
    if aux_loss is not None:
        loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
    mask = mask.to(loss.device)
    per_token = {k: v.new_zeros(mask.shape).masked_scatter(mask, v) for k, v in values.items()}
    return FusedOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **per_token)


def add_fused_head(model: PreTrainedModel, outputs: Sequence[str] = ("log_probs",), padding_free: bool = False) -> None:
    """Makes ``model(..., labels=labels, fused_lm_head=True)`` a ``fused_forward``; other calls stay what they were.

    The forward is the model's own attribute, so that DDP, FSDP and peft may wrap the model afterwards. The model is
    tried on a few tokens first, and refused if the head, or its packing, would not give what the model gives.
    """
    _check_once(model, padding_free)
    original = model.forward

    @functools.wraps(type(model).forward)  # Trainer and generate read the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        return fused_forward(self, *args, outputs=outputs, padding_free=padding_free, **kwargs)

    model.forward = types.MethodType(forward, model)


def fused_causal_lm_loss(
    model: PreTrainedModel | PeftModel,
    batch: Mapping[str, Any],
    *,
    num_items_in_batch: Tensor | int | None = None,
    padding_free: bool = False,
) -> Tensor:
    """``model(**batch, num_items_in_batch=...).loss`` [] without logits; ``batch`` has input_ids and labels [B, L].

    A batch without any label costs 0 and gives zero gradients, where the model's own loss is NaN. Cost of the head:
    that of ``linear_token_logprobs`` on R rows, 2F for a frozen head, 3F to 4F for a trained one. Raises FastpoError
    for a model wrapped by DDP or FSDP, whose hooks would be missed: there ``FusedLossMixin`` does it.
    """
    return _call(model, batch, padding_free, num_items_in_batch=num_items_in_batch).loss


def causal_lm_logps(
    model: PreTrainedModel | PeftModel, batch: Mapping[str, Any], *, padding_free: bool = False
) -> Tensor:
    """Log-probs [B, L-1] fp32 of ``batch["labels"][:, 1:]``, with gradient; 0 where the label is -100.

    ``torch.log_softmax(model(**batch).logits[:, :-1], -1).gather(-1, labels[:, 1:, None])``, without logits.
    """
    return _call(model, batch, padding_free).log_probs


def reference_logps(
    reference: Tensor | PreTrainedModel | PeftModel, batch: Mapping[str, Any], *, padding_free: bool = False
) -> Tensor:
    """Log-probs [B, L-1] of the reference, without gradient and dropout, from whichever reference there is.

    ``reference``: log-probs [B, L-1] that were stored; a second model; or the peft model in training, whose adapters
    are off for the call (or exchanged for the one called "ref", where it has one, as in TRL).
    """
    if isinstance(reference, Tensor):
        wanted = [batch["labels"].shape[0], batch["labels"].shape[1] - 1]
        if list(reference.shape) != wanted:
            raise FastpoError(f"reference has shape {list(reference.shape)}; it should be {wanted}, as labels[:, 1:]")
        return reference.detach()
    if not isinstance(reference, torch.nn.Module):
        raise FastpoError(f"reference is a {type(reference).__name__}; it should be log-probs [B, L-1] or a model")
    adapters = _reference_adapter(reference) if isinstance(reference, PeftModel) else nullcontext()
    with adapters, evaluating(reference):
        return _call(reference, batch, padding_free).log_probs


class FusedLossMixin:
    """``class MyTrainer(FusedLossMixin, Trainer)``: Trainer's loss and gradients without logits.

    Gradient accumulation, ``num_items_in_batch``, peft, DDP and FSDP2 go through Trainer's own code. Calls that ask for
    logits (``predict``, ``compute_metrics``) run the model's own forward.

    Refuses ``label_smoothing_factor`` and ``compute_loss_func``, which read the logits, and Liger's fused loss, which
    would replace the forward.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        trainer: Any = self
        settings = trainer.args
        if settings.label_smoothing_factor:
            raise FastpoError(
                f"label_smoothing_factor is {settings.label_smoothing_factor}; it should be 0 with the fused loss"
            )
        if trainer.compute_loss_func is not None:
            raise FastpoError("compute_loss_func is given, which reads logits; the fused loss makes none")
        if settings.use_liger_kernel and (settings.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise FastpoError('use_liger_kernel is True; set liger_kernel_config={"fused_linear_cross_entropy": False}')
        if settings.n_gpu > 1:
            raise FastpoError(f"n_gpu is {settings.n_gpu} (DataParallel); start one process per GPU with torchrun")
        add_fused_head(unwrapped(trainer.model))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if not return_outputs:
            inputs = {**inputs, "fused_lm_head": True}
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if prediction_loss_only and "labels" in inputs:
            inputs = {**inputs, "fused_lm_head": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]


def _check_call(labels: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuses what the model's own forward would honour or refuse, and the body by itself would not."""
    for name in ("input_ids", "inputs_embeds"):
        given = kwargs.get(name)
        if given is not None and labels.shape != given.shape[:2]:
            wanted = f"{list(given.shape[:2])}, as {name}"
            raise FastpoError(f"labels has shape {list(labels.shape)}; it should be {wanted}")
    if kwargs.get("logits_to_keep"):
        raise FastpoError("logits_to_keep is given; the fused head makes no logits: mask labels with -100 instead")
    if kwargs.get("return_dict") is False:
        raise FastpoError("return_dict is False; it should be True: the fused head returns a FusedOutput")


def _token_values(
    head: Head, hidden: Tensor, labels: Tensor, rows: Tensor, outputs: Sequence[str]
) -> dict[str, Tensor]:
    """The outputs asked for, [R] each, of labels [R] that are predicted by rows [R] of hidden [N, H]."""
    names = tuple(_STATS[name] for name in outputs if name in _STATS)
    found = head.logps(hidden, labels, rows, stats=names, topk=1)
    logps, stats = found if names else (found, {})
    values: dict[str, Tensor] = {"log_probs": logps}
    if "entropy" in outputs:
        values["entropy"] = stats["entropy"]
    if "log_sum_sq_probs" in outputs:
        values["log_sum_sq_probs"] = stats["sum_p2"].detach().log()
    if "is_top1" in outputs:
        values["is_top1"] = logps.detach().exp() >= stats["topk_mass"] * (1 - 1e-6)
    if "mean_logits" in outputs:
        values["mean_logits"] = head.mean_logits(hidden[rows.to(hidden.device)])
    return values


def _packed(kwargs: dict[str, Any], mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The body's arguments for the packed row, and where the tokens [B, L] went; ``mask`` [B, L-1] of labels."""
    given = {name for name, value in kwargs.items() if value is not None}
    if "input_ids" not in given or not given <= _PACKABLE:
        names = ", ".join(sorted(given - _PACKABLE)) or "no input_ids"
        raise FastpoError(f"padding_free is True, but the model is called with {names}; it packs input_ids alone")
    attention = kwargs.get("attention_mask")
    if attention is not None and bool((mask & (attention[:, :-1] == 0)).any()):
        raise FastpoError("attention_mask is 0 before a token that counts; with padding_free a prompt cannot be empty")
    packed = pack(kwargs["input_ids"], attention)
    rest = {name: value for name, value in kwargs.items() if name not in ("input_ids", "attention_mask")}
    return {**rest, "input_ids": packed.input_ids, "position_ids": packed.position_ids}, packed.places


def _balancing_loss(body: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The MoE load-balancing loss [] over tokens that are no padding, as the models compute it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = (config.num_experts, config.num_experts_per_tok)
    return load_balancing_loss_func(body.router_logits, *experts, kwargs.get("attention_mask"))


def _call(model: Any, batch: Mapping[str, Any], padding_free: bool, **settings: Any) -> FusedOutput:
    if not isinstance(model, PreTrainedModel | PeftModel) or isinstance(model, FSDPModule):
        raise FastpoError(
            f"model is {type(model).__name__}; it should be a transformers or peft model without a wrapper "
            "(FusedLossMixin works with DDP and FSDP)"
        )
    if "labels" not in batch:
        raise FastpoError("batch has no labels; it should have input_ids and labels [B, L]")
    if next(model.parameters()).is_meta:
        raise FastpoError("model is on the meta device; it should hold its weights")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise FastpoError("model learns a prompt (peft); the fused loss honours adapters in layers only")
    model = unwrapped(model)
    _check_once(model, padding_free)
    return fused_forward(model, padding_free=padding_free, **settings, **batch)


def _check_once(model: PreTrainedModel, padding_free: bool) -> None:
    for known, check, wanted in zip(_checked, (check_head, check_packing), (True, padding_free), strict=True):
        if wanted and model not in known:
            check(model)
            known.add(model)


@contextmanager
def _reference_adapter(model: PeftModel) -> Iterator[None]:
    """Adapters off, or "ref" in place of the active one, inside the block."""
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)
