"""``enable(model)``: a transformers model whose attention also takes a tree.

    model = fastpo.enable(model)                        # once; checked on a tiny tree, refused with the reason
    logits = model(**fastpo.tree_inputs(tree)).logits   # [1, N, V]; row i is what the path root..i alone would give

How the tree travels. Attention modules hand every keyword that they do not know to the function that transformers'
``AttentionInterface`` names, so ``tree=`` is passed through the model's call down to that function. A keyword is in the
arguments that gradient checkpointing keeps, so the recomputation in the backward (on another thread on CUDA) sees the
same tree; a context variable would be gone by then. DDP, FSDP2, accelerate and peft hand keywords on.

What is changed. Each attention module gets a ``forward`` around the one it had: with ``tree=`` that runs under a config
that names fastpo's function; without, it runs and nothing else. So masks, caches, generation and the config that is
saved are those of the model as it was. ``disable`` takes the attribute away.

Masks. transformers' masks know documents, not branches. ``tree_inputs`` passes an ``attention_mask`` of four
dimensions, which transformers hands on as it is (no N x N mask is made), and of no elements, so that an attention
that would use it fails instead of attending to other branches.
"""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from fastpo.errors import FastpoError
from fastpo.integrations.head import hidden_states, trial
from fastpo.kernels.tree_attention import AttentionBlocks, attention_blocks, tree_attention
from fastpo.types import TokenTree

IMPLEMENTATION = "fastpo"
_TREE_CONFIG = "_fastpo_config"  # of an attention module: its config, but with fastpo's attention
# Keywords that reach attention functions and change nothing that is computed there.
_IDLE = {
    *("position_ids", "cache_position", "use_cache", "return_dict", "is_causal", "output_hidden_states"),
    *("output_router_logits", "num_items_in_batch", "logits_to_keep"),
}


def enable(model: Any) -> Any:
    """Makes ``model(**tree_inputs(tree))`` compute each node of ``tree`` as its path alone would; returns ``model``.

    ``model``: a transformers causal LM, plain or wrapped by peft; enable it before DDP or FSDP wraps it. Without a tree
    it computes what it did before, to the bit. Calling again does nothing; ``disable(model)`` takes it back.

    Costs seven forwards, of 2 to 11 tokens, for the self-check: every layer must attend through ``AttentionInterface``
    and be handed the tree, and on a small tree with branches the hidden states must be those of each path alone.

    Raises FastpoError, with the model left as it was, for a model that cannot: layers that do not attend through the
    interface (bloom, mpt) or are recurrent (mamba, qwen3_next), a tree that is dropped on the way (stablelm), windows
    that are in the mask alone, biases in the attention, and whatever else shows as a difference.
    """
    base = transformers_model(model)
    if _attention_modules(base):
        return model
    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    candidates = [m for m in base.modules() if _has_attention_config(m)]
    for module in candidates:
        _install(module)
    try:
        reached = _check(base, candidates)
    except BaseException:
        disable(model)
        raise
    for module in candidates:
        if module not in reached:
            _remove(module)
    return model


def disable(model: Any) -> Any:
    """Takes ``enable`` back; returns ``model``. Does nothing to a model that is not enabled."""
    for module in _attention_modules(transformers_model(model)):
        _remove(module)
    return model


def is_enabled(model: Any) -> bool:
    """Whether ``model`` takes a tree."""
    return bool(_attention_modules(transformers_model(model)))


def tree_inputs(tree: TokenTree) -> dict[str, Any]:
    """The arguments with which an enabled model, or its body, computes all N nodes of ``tree`` in one call.

    ``tree`` on the model's device. The metadata of the attention is made here, O(N), for all layers and the backward.
    """
    return {
        "input_ids": tree.tokens[None],  # [1, N]
        "position_ids": tree.depth[None],  # [1, N]
        "attention_mask": torch.empty(1, 1, 0, 0, device=tree.tokens.device),  # see the module's docstring
        "use_cache": False,
        "tree": attention_blocks(tree),
    }


def _attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, Hq, N, D]
    key: Tensor,  # [1, Hkv, N, D]
    value: Tensor,  # [1, Hkv, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [Hq], attention sinks
    tree: AttentionBlocks | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What ``AttentionInterface`` calls: ``tree_attention`` on [N, H, D] views. Returns [1, N, Hq, D], no weights."""
    if _probe is not None:
        _probe.modules.append(module)
        _probe.windows.append(sliding_window)
        _probe.softcaps.append(softcap)
        if tree is None:  # the trial that counts calls
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    name = type(module).__name__
    if tree is None:
        raise FastpoError(f"{name} dropped the tree on the way to its attention")
    if dropout:
        raise FastpoError(f"attention dropout of {name} is {dropout} in training; it should be 0 with a tree")
    unknown = sorted(k for k, v in others.items() if v is not None and v is not False and k not in _IDLE)
    if unknown:
        raise FastpoError(f"{name} attends with {', '.join(unknown)}, which tree attention does not have")
    if query.shape[0] != 1 or query.shape[2] != tree.num_nodes or key.shape[2] != tree.num_nodes:
        raise FastpoError(
            f"query has shape {list(query.shape)} and key {list(key.shape)}; with a tree of {tree.num_nodes} nodes "
            f"they should be [1, heads, {tree.num_nodes}, size]: one row, no cache"
        )
    size = value.shape[-1]
    if size < query.shape[-1]:  # multi-head latent attention
        value = nn.functional.pad(value, (0, query.shape[-1] - size))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    settings = {"scale": scaling, "softcap": softcap, "window": sliding_window, "sinks": s_aux}
    return tree_attention(q, k, v, tree, **settings)[None, ..., :size], None


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an enabled attention module: its own, under fastpo's attention where there is a tree."""
    if kwargs.get("tree") is None:
        return _own_forward(self, *args, **kwargs)
    own = self.config
    self.config = self._fastpo_config
    try:
        return _own_forward(self, *args, **kwargs)
    finally:
        self.config = own


def _own_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    replaced = module._fastpo_replaced
    return type(module).forward(module, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)


def _install(module: Any) -> None:
    config = copy.copy(module.config)
    config._attn_implementation_internal = IMPLEMENTATION  # not the property: it would set shared sub-configs too
    module._fastpo_config = config
    module._fastpo_replaced = vars(module).get("forward")  # one that accelerate's hooks, say, have set on the module
    module.forward = types.MethodType(_forward, module)


def _remove(module: Any) -> None:
    replaced = module._fastpo_replaced
    del module._fastpo_config, module._fastpo_replaced, module.forward
    if replaced is not None:
        module.forward = replaced


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if _TREE_CONFIG in vars(m)]


def _has_attention_config(module: nn.Module) -> bool:
    """Modules of a model that hold its config: its attention among them."""
    return isinstance(getattr(module, "config", None), PreTrainedConfig) and not isinstance(module, PreTrainedModel)


def transformers_model(model: Any) -> PreTrainedModel:
    """``model``, or the transformers model inside a peft one (whose adapters live in its layers)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise FastpoError(
            f"model is {type(model).__name__}; it should be a transformers or peft model (enable it, then wrap it)"
        )
    return base


@dataclass
class _Probe:
    """The calls of fastpo's function during a trial: the modules, and the windows and softcaps that they asked for."""

    modules: list[nn.Module] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    softcaps: list[float | None] = field(default_factory=list)


_probe: _Probe | None = None


@contextmanager
def _probing() -> Iterator[_Probe]:
    global _probe
    _probe = _Probe()
    try:
        yield _probe
    finally:
        _probe = None


def _check(model: Any, candidates: list[nn.Module]) -> list[nn.Module]:
    """The attention modules among ``candidates``; FastpoError with the reason for a model that trees cannot go through.

    A model on the meta device (what FSDP's other ranks hold while rank 0 loads) is left to the rank that has it.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if next(model.parameters()).is_meta:
        return candidates
    with trial(model) as eps:
        modules = _interface_calls(model, candidates)
        if len(modules) != config.num_hidden_layers:
            raise FastpoError(
                f"{name} cannot take trees: {len(modules)} of its {config.num_hidden_layers} layers attend through "
                "transformers' AttentionInterface; the others are recurrent or attend by themselves"
            )
        tree, changed = (_trial_tree(model, shift) for shift in (0, 1))
        with _refusing(model, "the keyword tree does not reach all of its attention layers"):
            with _probing() as probe:
                hidden = hidden_states(model, **tree_inputs(tree))[0]  # [11, H]
            moved = hidden_states(model, **tree_inputs(changed))[0]  # [11, H]
        if probe.modules != modules:
            raise FastpoError(
                f"{name} cannot take trees: {len(probe.modules)} of its {len(modules)} attention layers were handed "
                "the keyword tree; the others drop it"
            )
        _check_windows(name, config, probe)
        _check_softcaps(name, model, probe)
        _check_hidden(model, tree, hidden, moved, eps)
    return modules


def _interface_calls(model: Any, candidates: list[nn.Module]) -> list[nn.Module]:
    """The modules that reach ``AttentionInterface`` in an ordinary forward, one for each call."""
    own = [module.config for module in candidates]
    try:
        for module in candidates:
            module.config = module._fastpo_config
        input_ids = torch.arange(1, 5, device=model.device)[None]  # [1, 4]
        with _probing() as probe, _refusing(model, "its body cannot be called alone"):
            hidden_states(model, input_ids=input_ids, use_cache=False)
    finally:
        for module, config in zip(candidates, own, strict=True):
            module.config = config
    return probe.modules


def _trial_tree(model: Any, shift: int) -> TokenTree:
    """Two trees, the first with branches 3-4, 3-5-6 and 7-8 behind a prompt of 3; ``shift`` changes the tokens 3-6."""
    tokens = torch.arange(1, 12)
    tokens[3:7] += 9 * shift
    columns = {
        "tokens": tokens % model.config.get_text_config().vocab_size,
        "parent": torch.tensor([-1, 0, 1, 2, 3, 3, 5, 2, 7, -1, 9]),
        "depth": torch.tensor([0, 1, 2, 3, 4, 4, 5, 3, 4, 0, 1]),
        "subtree_end": torch.tensor([9, 9, 9, 7, 5, 7, 7, 9, 9, 11, 11]),
        "leaves": torch.tensor([4, 6, 8, 10]),
        "starts": torch.tensor([3, 3, 3, 1]),
    }
    return TokenTree(**{name: column.to(model.device) for name, column in columns.items()})


_TRIAL_PATHS = ([0, 1, 2, 3, 4], [0, 1, 2, 3, 5, 6], [0, 1, 2, 7, 8], [9, 10])


@contextmanager
def _refusing(model: Any, reason: str) -> Iterator[None]:
    """What a model raises that does not expect a tree becomes a refusal with ``reason``."""
    try:
        yield
    except FastpoError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        detail = str(error).strip().partition("\n")[0]
        raise FastpoError(f"{type(model).__name__} cannot take trees: {reason} ({detail})") from error


def _check_windows(name: str, config: Any, probe: _Probe) -> None:
    """Windows must come as a keyword: the masks that also hold them are not made for trees."""
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [default] * len(probe.windows)
    for kind, found in zip(kinds, probe.windows, strict=True):
        if kind not in ("sliding_attention", "full_attention"):
            raise FastpoError(f"{name} cannot take trees: it has layers of type {kind}")
        if kind == "sliding_attention" and found is None:
            raise FastpoError(f"{name} cannot take trees: the window of its layers is in the mask alone")


def _check_softcaps(name: str, model: Any, probe: _Probe) -> None:
    """torch's attention has no softcap, and older transformers leave it out without a word: nothing to compare with."""
    if any(cap is not None for cap in probe.softcaps) and model.config._attn_implementation == "sdpa":
        raise FastpoError(
            f"{name} cannot take trees: its own attention, sdpa, leaves out its softcap; "
            'load it with attn_implementation="eager"'
        )


def _check_hidden(model: Any, tree: TokenTree, hidden: Tensor, changed: Tensor, eps: float) -> None:
    """``hidden`` [11, H] of the trial tree against each path alone; ``changed`` [11, H] has other tokens at 3-6."""
    largest = hidden.abs().max().float()
    apart = [0, 1, 2, *range(7, 11)]
    moved = (hidden[apart] - changed[apart]).abs().max().float() > max(4 * eps, 1e-5) * largest
    worst = max(
        (hidden_states(model, input_ids=tree.tokens[path][None], use_cache=False)[0] - hidden[path]).abs().max()
        for path in _TRIAL_PATHS
    )
    if moved or not bool(worst.float() <= 64 * eps * largest):
        raise FastpoError(
            f"{type(model).__name__} cannot take trees: its hidden states on a small tree differ by up to "
            f"{float(worst):.2g} (of {float(largest):.2g}) from those of each path alone; it looks at positions or "
            "other tokens in a way of its own"
        )
