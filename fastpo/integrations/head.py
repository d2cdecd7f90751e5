"""The LM head of a transformers model as arguments of the fused ops, or a refusal that says what is odd about it.

    head = Head.of(model)                                      # in the forward that uses it: FSDP exchanges weights
    logps = head.logps(hidden, labels, rows)                   # linear_token_logprobs
    out = head.preference_loss(hidden, labels, ref_logps, segments, pairs, objective)    # linear_preference_loss

H hidden size, V vocabulary entries, N rows of hidden, R labels, r LoRA's rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpo.errors import FastpoError
from fastpo.kernels.common.checks import FLOATS
from fastpo.kernels.linear_preference_loss import linear_preference_loss
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.token_kl import linear_token_kl
from fastpo.objectives import Objective
from fastpo.types import Pairs, Segments

_MEAN_CHUNK = 2**25  # logits of a chunk where their mean needs them


@dataclass(frozen=True)
class Head:
    """What a model does to its last hidden states: ``softcap(logit_scale * (x W^T + bias + LoRA))``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora: tuple[Tensor, Tensor, float] | None  # A [r, H], B [V, r], scale
    logit_scale: float
    logit_softcap: float | None

    @staticmethod
    def of(model: Any) -> "Head":
        """The head of a causal LM, peft's wrapper around it or not, as it is now: FSDP and peft exchange it.

        Honours a bias, LoRA on the head (several active adapters too), a fully trained copy (``modules_to_save``), the
        softcap of Gemma and the scales of Granite, Cohere, Falcon-H1, MiniCPM3, HyperCLOVA X. Refuses quantised heads,
        DeepSpeed's ZeRO-3 and adapters that are not a plain sum of low-rank products (DoRA, dropout in training, ...).
        """
        model = unwrapped(model)
        layer = model.get_output_embeddings()
        if layer is None:
            raise FastpoError(f"model {type(model).__name__} has no output embeddings; the fused head needs an LM head")
        layer = _trained_copy(layer)
        base, lora = (layer.get_base_layer(), _lora_of(layer)) if hasattr(layer, "get_base_layer") else (layer, None)
        weight, bias = _weight_of(base), getattr(base, "bias", None)
        if hasattr(weight, "ds_id"):
            raise FastpoError("lm_head is sharded by DeepSpeed ZeRO-3; the fused head works with ZeRO-2 or FSDP2")
        if isinstance(bias, DTensor):
            raise FastpoError("lm_head has a sharded bias; the fused head takes sharded weights only")
        if lora is not None:
            lora = (lora[0].to(weight.dtype), lora[1].to(weight.dtype), lora[2])
        config = model.config.get_text_config()
        return Head(weight, bias, lora, _logit_scale(config), getattr(config, "final_logit_softcapping", None))

    @property
    def settings(self) -> dict[str, Any]:
        """All but the weight, as keywords of ``linear_token_logprobs`` and ``linear_preference_loss``."""
        scales = {"logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}
        return {"bias": self.bias, "lora": self.lora, **scales}

    def logps(self, hidden: Tensor, labels: Tensor, rows: Tensor | None = None, **settings: Any) -> Any:
        """``linear_token_logprobs`` of hidden [N, H] and labels [R], which rows [R] predict (else row i label i).

        Every label counts. ``settings``: stats, topk, temperature, ...
        """
        hidden, labels = hidden.to(self.weight.device), labels.to(self.weight.device)
        rows = None if rows is None else rows.to(hidden.device)
        given = {"rows": rows, "ignore_index": None, **self.settings, **settings}
        return linear_token_logprobs(hidden, self.weight, labels, **given)

    def preference_loss(
        self,
        hidden: Tensor,  # [N, H]
        labels: Tensor,  # [T]
        ref_logps: Tensor | None,  # [T]
        segments: Segments,
        pairs: Pairs,
        objective: Objective,
        **settings: Any,  # rows [T], stats, memory_budget, ...
    ) -> Any:
        """``linear_preference_loss`` with this head, on the device of its weight."""
        of = (labels, ref_logps, segments, pairs, objective)
        return linear_preference_loss(hidden, self.weight, *of, **self.settings, **settings)

    def token_kl(self, hidden: Tensor, ref_head: "Head", ref_hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """[R] KL(reference || policy) at ``rows`` [R] (else at all N) of hidden [N, H] and the reference's [N, H'].

        ``linear_token_kl`` of the distinct rows.
        """
        heads = {"lm_head": self, "the reference's lm_head": ref_head}
        for name, head in heads.items():
            if head.lora is not None or isinstance(head.weight, DTensor):
                raise FastpoError(f"{name} has LoRA or is sharded; the KL needs a whole, plain head")
        same = {"logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}
        shifts = {"bias": self.bias, "ref_bias": ref_head.bias}
        mask = None
        if rows is not None:
            mask = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device).index_fill_(0, rows, True)
        kl = linear_token_kl(hidden, self.weight, ref_hidden, ref_head.weight, mask=mask, **shifts, **same)
        return kl if rows is None else take(kl, rows)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] fp32 logits of hidden [R, H]."""
        weight = _whole(self.weight)
        hidden = hidden.to(weight.device, weight.dtype)
        z = torch.nn.functional.linear(hidden, weight, self.bias).float()
        if self.lora is not None:
            a, b, scale = self.lora
            z = z + scale * (hidden @ a.t() @ b.t()).float()
        z = z * self.logit_scale
        return z if self.logit_softcap is None else self.logit_softcap * torch.tanh(z / self.logit_softcap)

    @torch.no_grad()
    def mean_logits(self, hidden: Tensor) -> Tensor:
        """[R] fp32 means over the vocabulary of the logits of hidden [R, H].

        Cost: one read of the weight, for a mean of products is a product with the mean. Softcapped logits have to be
        made, chunk by chunk: 2 R H V operations.
        """
        if self.logit_softcap is not None:
            rows = max(1, _MEAN_CHUNK // self.weight.shape[0])
            return torch.cat([self.logits(part).mean(-1) for part in hidden.split(rows)])
        x = hidden.to(self.weight.device).float()
        mean = x @ _whole(self.weight.sum(0, dtype=torch.float32)) / self.weight.shape[0]
        if self.bias is not None:
            mean = mean + self.bias.mean(dtype=torch.float32)
        if self.lora is not None:
            a, b, scale = self.lora
            mean = mean + scale * (x @ a.float().t() @ b.mean(0, dtype=torch.float32))
        return self.logit_scale * mean


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` whose gradient is summed in a fixed order."""
    return values.index_select(0, index) if values.device.type == "cpu" else values[index]


def check_head(model: Any) -> None:
    """Refuses a model whose logits are not what ``Head`` says, found out on four tokens.

    A model on the meta device (what FSDP's other ranks hold while rank 0 loads) is left to the rank that has it.
    """
    Head.of(model)
    model = unwrapped(model)
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    vocabulary = model.config.get_text_config().vocab_size
    input_ids = torch.arange(1, 5, device=parameter.device)[None] % vocabulary  # [1, 4]
    with trial(model) as eps:
        hidden = hidden_states(model, input_ids=input_ids, use_cache=False)[0]  # [4, H]
        wanted = model(input_ids=input_ids, use_cache=False).logits[0].float()  # [4, V]
        found = Head.of(model).logits(hidden)
    tolerance = max(4 * eps, 1e-5) * wanted.abs().max()
    if found.shape != wanted.shape or not bool(((found - wanted).abs() <= tolerance).all()):
        raise FastpoError(
            f"model {type(model).__name__} does more to its logits than its LM head and config say (scale, softcap); "
            "the fused head would be wrong"
        )


def unwrapped(model: Any) -> Any:
    """The transformers model inside a peft one (whose adapters live in its layers), else the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, **kwargs: Any) -> Tensor:
    """[B, L, H] what the model's body hands to its head."""
    return unwrapped(model).base_model(**kwargs).last_hidden_state


@contextmanager
def trial(model: Any) -> Iterator[float]:
    """``evaluating``, in the model's own precision, whatever autocast is outside; gives that precision's epsilon.

    flash-attn takes no fp32: there bf16 autocast, under which such a model is trained.
    """
    parameter = next(model.parameters())
    half = parameter.dtype == torch.float32 and "flash" in (model.config._attn_implementation or "")
    with evaluating(model), torch.autocast(parameter.device.type, torch.bfloat16, enabled=half):
        yield _epsilon(torch.bfloat16 if half else parameter.dtype, parameter.device.type)


def _epsilon(dtype: torch.dtype, device: str) -> float:
    """Of products of this type: on a GPU those of fp32 are of TF32 where it is switched on."""
    tf32 = dtype == torch.float32 and device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return 2.0**-10 if tf32 else torch.finfo(dtype).eps


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _logit_scale(config: Any) -> float:
    """What the config says the logits are multiplied with; 1 where it says nothing."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def _weight_of(layer: Any) -> Tensor:
    """[V, H]; refuses layers that keep it in another form than a floating-point tensor."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in FLOATS and type(weight).__module__.split(".")[0] == "torch":
        return weight
    kind = f"a weight of {weight.dtype}" if isinstance(weight, Tensor) else "no plain weight"
    raise FastpoError(
        f"lm_head is a {type(layer).__module__}.{type(layer).__name__} with {kind}; quantised heads are not supported: "
        "leave lm_head out of the quantisation"
    )


def _trained_copy(layer: Any) -> Any:
    """The copy that peft trains of a head in ``modules_to_save``, the original while adapters are off."""
    if not hasattr(layer, "modules_to_save"):
        return layer
    active = [name for name in layer.active_adapters if name in layer.modules_to_save]
    return layer.original_module if layer.disable_adapters or not active else layer.modules_to_save[active[0]]


def _lora_of(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A [r, H], B [V, r], 1 of all active adapters of a peft layer; None where they are off or merged."""
    if layer.disable_adapters or layer.merged:
        return None
    if not hasattr(layer, "lora_A"):
        raise FastpoError(f"lm_head has a peft {type(layer).__name__}; the fused head honours LoRA, nothing else")
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        _refuse_variants(layer, name)
    if not names:
        return None
    a = torch.cat([layer.lora_A[name].weight for name in names])
    b = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
    return a, b, 1.0


def _refuse_variants(layer: Any, name: str) -> None:
    dropout = layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0) > 0:
        raise FastpoError(f"lora_dropout of adapter {name!r} on lm_head is {dropout.p}; it should be 0 there")
    if getattr(layer, "lora_variant", {}).get(name) is not None or layer.lora_B[name].bias is not None:
        raise FastpoError(
            f"adapter {name!r} on lm_head is a variant of LoRA (DoRA, lora_bias, ...); use plain LoRA there"
        )
