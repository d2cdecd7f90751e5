"""Padded batches as one row without padding, for models that keep packed sequences apart; that they do is checked."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpo.errors import FastpoError
from fastpo.integrations.head import hidden_states, trial


@dataclass(frozen=True)
class Packed:
    """The T tokens of a padded [B, L] batch that are no padding, one sequence behind the other."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sequence: by them attention keeps the sequences apart
    places: Tensor  # [B, L] int64, where a token went; anything at padding


def pack(input_ids: Tensor, attention_mask: Tensor | None) -> Packed:
    """``input_ids`` [B, L] without the tokens whose ``attention_mask`` [B, L] is 0."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    kept = mask.bool()
    places = (kept.flatten().cumsum(0) - 1).view(kept.shape)
    return Packed(input_ids[kept][None], (mask.long().cumsum(1) - 1)[kept][None], places)


def check_packing(model: Any) -> None:
    """Refuses a model whose hidden states of a sequence change with what it is packed with, found out on 11 tokens.

    flash-attn's varlen kernels keep sequences apart by ``position_ids``. For SDPA, eager and flex attention
    transformers makes an exact block-diagonal mask from them: right, but T^2 elements large and, in SDPA, T^2 work.
    Models that ignore positions, and most with recurrent layers, read across the boundary.
    """
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(1, 12, device=parameter.device) % vocabulary
    first, other, second = tokens[:3], tokens[3:6], tokens[6:]
    with trial(model) as eps:
        alone = hidden_states(model, input_ids=second[None], use_cache=False)[0]  # [5, H]
        after_first, after_other = (_second_of_two(model, ids, second) for ids in (first, other))
    largest = alone.abs().max().float()
    moved = (after_first - after_other).abs().max().float() > max(4 * eps, 1e-5) * largest  # experts regroup: not 0
    if moved or (after_first - alone).abs().max().float() > 64 * eps * largest:
        raise FastpoError(
            f"padding_free is True, but the layers of {type(model).__name__} with attention "
            f"{model.config._attn_implementation!r} do not keep packed sequences apart; set it to False"
        )


def _second_of_two(model: Any, first: Tensor, second: Tensor) -> Tensor:
    """Hidden states [n, H] of ``second`` [n], packed behind ``first`` [m]."""
    ids = torch.cat((first, second))[None]
    positions = torch.cat([torch.arange(len(part), device=ids.device) for part in (first, second)])[None]
    return hidden_states(model, input_ids=ids, position_ids=positions, use_cache=False)[0, len(first) :]
