"""TRL's DPOTrainer with fastpo's fused head and packing: same losses, gradients and metrics, one line changed.

    trainer = FastDPOTrainer(model, args=DPOConfig(padding_free=True), train_dataset=data)   # for DPOTrainer(...)

or, around a trainer of your own that derives from DPOTrainer::

    with fused_head(padding_free=True):
        trainer = MyDPOTrainer(model, args=..., train_dataset=...)

Since 1.16 TRL asks the model for per-token log-probs (``fused_lm_head=True``) and computes its losses from them.
fastpo answers that call; every loss, weight, f-divergence, LD-DPO, WPO, reference and metric stays TRL's own code, so
it cannot drift. What changes is the cost, in F = 2 N H V operations of N completion tokens: 2F with a frozen head and
3F with a trained one, where TRL takes 3F and 4F; with ``padding_free`` the layers see no padding. Losses that couple a
batch need nothing special: the sequence sums are TRL's.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from fastpo.errors import FastpoError
from fastpo.integrations.transformers import add_fused_head

_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # the losses of TRL 1.16 that read label_smoothing

if not hasattr(dpo_trainer, "add_fused_lm_head") or not hasattr(dpo_trainer, "BaseTunerLayer"):
    raise ImportError("trl has no fused LM head to stand in for; fastpo.integrations.trl needs trl 1.16")


@contextmanager
def fused_head(padding_free: bool = False) -> Iterator[None]:
    """DPO trainers that are constructed inside the block get fastpo's head, and train with it ever after.

    LoRA on ``lm_head``, which TRL's own head would ignore and TRL hence refuses, is honoured.

    ``padding_free``: the layers see each batch as one row without padding. flash-attn's varlen kernels keep sequences
    apart (install it and load the model with ``attn_implementation="flash_attention_2"``); with SDPA or eager attention
    transformers' exact block-diagonal mask does, at a cost in the square of the batch's tokens.

    Raises FastpoError, while the trainer is constructed, for a model whose logits or packing would come out different.
    """
    ours = {
        "add_fused_lm_head": functools.partial(add_fused_head, padding_free=padding_free),
        "BaseTunerLayer": (),  # what TRL refuses a head for being an instance of
    }
    originals = {name: getattr(dpo_trainer, name) for name in ours}
    _exchange(ours)
    try:
        yield
    finally:
        _exchange(originals)


def _exchange(names: dict[str, Any]) -> None:
    for name, value in names.items():
        setattr(dpo_trainer, name, value)


class FastDPOTrainer(DPOTrainer):
    """``trl.DPOTrainer`` with fastpo's head; ``DPOConfig(padding_free=True)``, which TRL 1.16 does not honour, packs.

    Takes and logs what ``DPOTrainer`` does. Refuses, with the setting's name: ``label_smoothing`` where TRL would
    ignore it, ``label_smoothing_factor``, tensor, context and sequence parallelism, DeepSpeed ZeRO-3, ``padding_free``
    with images, prompt learning, or a model whose layers do not keep packed sequences apart. Of adapters on ``lm_head``
    LoRA and ``modules_to_save`` are honoured, others refused (``head.Head.of``).
    """

    def __init__(self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, *rest: Any, **kwargs: Any):
        if args is not None:
            _check_settings(args)
        padding_free = args is not None and args.padding_free
        with fused_head(padding_free), _unset_padding_free(args):
            super().__init__(model, ref_model, args, *rest, **kwargs)
        self.padding_free = padding_free
        _refuse_parallelism(self.accelerator.parallelism_config)


def _check_settings(args: DPOConfig) -> None:
    if not isinstance(args, DPOConfig):
        raise FastpoError(f"args is a {type(args).__name__}; it should be a trl.DPOConfig")
    if args.label_smoothing_factor:
        raise FastpoError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, of Trainer's cross-entropy, which no DPO loss "
            "reads; set it to 0, and label_smoothing for the losses that have one"
        )
    if args.label_smoothing and not _SMOOTHED & set(args.loss_type):
        raise FastpoError(
            f"label_smoothing is {args.label_smoothing}, which TRL ignores with loss_type {args.loss_type}; "
            f"set it to 0, or take {', '.join(sorted(_SMOOTHED))}"
        )


def _refuse_parallelism(config: Any) -> None:
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(config, name, 1) or 1
        if size > 1:
            raise FastpoError(
                f"parallelism_config.{name} is {size}; it should be 1: the fused head needs whole sequences"
            )


@contextmanager
def _unset_padding_free(args: DPOConfig | None) -> Iterator[None]:
    """TRL warns that it falls back to padding: here it does not."""
    before = args is not None and args.padding_free
    if before:
        args.padding_free = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before:
            args.padding_free = True  # type: ignore[union-attr]
