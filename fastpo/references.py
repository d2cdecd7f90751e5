"""The reference stage: what of an iteration's start model the training needs, once for each distinct response.

``logps`` always; the token columns of ``Segments`` where the objective asks for them: token rewards of T-REG from the
same model under opposite prompts, the masks of SparsePO from its uncertainty.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from fastpo.config import Config
from fastpo.data import Codec, inside
from fastpo.models import PromptResponse, response_logps
from fastpo.objectives import Objective, contrast_token_rewards, mixed_reference
from fastpo.pairs import PairRecord
from fastpo.sharing import tree_response_logps

Progress = Callable[[int], None]
TOKEN_COLUMNS = ("token_coefs", "weights")  # of Segments, those that `reference_tensors` can fill


@dataclass(frozen=True)
class Reference:
    """What training needs of the reference, of the responses of an iteration's pairs, by key."""

    logps: Mapping[str, Tensor]  # key -> [n] fp32
    columns: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # field of Segments -> key -> [n]
    model: PreTrainedModel | None = None  # for the KL over the vocabulary, which moves with the policy


def needs_kl(objective: Objective) -> bool:
    """Whether each step needs the reference's whole distribution, not its log-probs alone: TDPO, SparsePO."""
    return "segments.kl" in objective.requires or objective.name == "sparse_po"


def responses_of(pairs: Sequence[PairRecord]) -> dict[str, PromptResponse]:
    """Each distinct response of the pairs once, by key, in order of first appearance."""
    found: dict[str, PromptResponse] = {}
    for pair in pairs:
        for key, prompt, ids in pair.present:
            found.setdefault(key, (prompt, ids))
    return found


def contrast_texts(config: Config) -> list[str]:
    """What the reference puts prompts into besides, two texts with {prompt}: T-REG's. Empty for other objectives."""
    return config.contrast_prompts if config.objective == "t_reg" else []


def num_passes(objective: Objective, config: Config, iteration: int) -> int:
    """Forwards over each response in ``reference_tensors``: two more for T-REG, and one for a mixed reference behind
    iteration 1."""
    return 1 + 2 * ("segments.token_coefs" in objective.requires) + bool(config.reference_mix and iteration > 1)


def reference_tensors(
    pairs: Sequence[PairRecord],
    objective: Objective,
    load: Callable[[int], PreTrainedModel],
    iteration: int,
    codec: Codec,
    accelerator: Accelerator,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """``logps`` [T] fp32 and ``cu_seqlens`` [S+1] int64 of the pairs' responses, and the token columns [T] asked for.

    Args:
        load: j -> M_j. The reference is M_(k-1); with reference_mix the weighted mean of its log-probs and M_0's.

    Cost: ``num_passes`` forwards over each response; ``progress`` is told of each.
    """
    config = codec.config
    responses = list(responses_of(pairs).values())
    score = functools.partial(_values, config=config, accelerator=accelerator, progress=progress)
    model = load(iteration - 1)
    masked = "segments.weights" in objective.requires
    values, cu_seqlens = score(model, responses, stats=("entropy",) if masked else ())
    found = {"logps": values[0], "cu_seqlens": cu_seqlens}
    if "segments.token_coefs" in objective.requires:
        better, worse = (score(model, _contrasted(pairs, text, codec))[0][0] for text in contrast_texts(config))
        found["token_coefs"] = contrast_token_rewards(better, worse)
    if masked:
        found["weights"] = uncertainty_masks(values[1], cu_seqlens)
    if config.reference_mix and iteration > 1:
        (start,), _ = score(load(0), responses)
        found["logps"] = mixed_reference(start, values[0], config.reference_mix)
    return found


def _values(
    model: PreTrainedModel,
    responses: Sequence[PromptResponse],
    config: Config,
    accelerator: Accelerator,
    progress: Progress | None,
    stats: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor]:
    """([1 + stats, T] log-probs and statistics, cu_seqlens [S+1])."""
    settings: dict[str, Any] = {"micro_batch_tokens": config.micro_batch_tokens, "progress": progress}
    logps_of = tree_response_logps if config.sharing else response_logps
    values, cu_seqlens = logps_of(model, responses, stats=stats, accelerator=accelerator, **settings)
    return torch.atleast_2d(values), cu_seqlens


def _contrasted(pairs: Sequence[PairRecord], text: str, codec: Codec) -> list[PromptResponse]:
    """The responses behind another prompt: ``text`` with the pair's own in it."""
    found: dict[str, PromptResponse] = {}
    for pair in pairs:
        prompt = codec.prompt_ids(inside(text, pair.meta["prompt"]))
        for key, _, ids in pair.present:
            found.setdefault(key, (prompt, ids))
    return list(found.values())


def fitting_contrasts(pairs: Sequence[PairRecord], codec: Codec) -> list[PairRecord]:
    """Those of ``pairs`` that fit the context behind every prompt that the reference puts theirs into."""
    kept = list(pairs)
    for number, text in enumerate(contrast_texts(codec.config)):
        where = f"inside contrast_prompts[{number}]"
        prompts = [codec.prompt_ids(inside(text, pair.meta["prompt"])) for pair in kept]
        lengths = [len(p) + max(len(ids) for _, _, ids in pair.present) for p, pair in zip(prompts, kept, strict=True)]
        named = [(f"pair {pair.chosen_key} {where}", pair) for pair in kept]
        kept = [pair for _, pair in codec.fitting(named, lengths, lambda item: item[0])]
    return kept


def uncertainty_masks(entropy: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T] weights in [0, 1]: the entropy [T] of the reference at each token, over the largest one of its response.

    What is certain is left out of the log-ratio: a sparse mask. SparsePO (Christopoulou et al. 2024) derives its masks
    from the reference's activations (MAPO) or trains them; those are the caller's, this one needs neither.
    """
    parts = entropy.split(cu_seqlens.diff().tolist())
    return torch.cat([part / part.max().clamp(min=1e-6) for part in parts])


def split_by_key(
    responses: Mapping[str, PromptResponse], packed: Mapping[str, Tensor], name: str = "logps"
) -> dict[str, Tensor]:
    """Key -> values [n] of that response, views of the packed ones."""
    offsets = packed["cu_seqlens"].tolist()
    return {key: packed[name][offsets[i] : offsets[i + 1]] for i, key in enumerate(responses)}
