"""What the training stages minimise: the loss of some items of a batch, supervised or preference, and its records."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fastpo.errors import FastpoError
from fastpo.integrations.head import Head
from fastpo.models import PromptResponse, collate
from fastpo.objectives import Objective
from fastpo.pairs import PairRecord
from fastpo.types import Pairs, Segments

Record = dict[str, float]  # what one step measured
_STATS = ("entropy", "topk_mass")
_PER_PAIR = (
    *("loss", "nll", "rewards_chosen", "rewards_rejected", "accuracy"),
    *("logps_chosen", "logps_rejected", "logps_per_token_chosen", "logps_per_token_rejected"),
)


class Task(Protocol):
    """What the optimizer loop needs to know of a stage. Items are indices into its data."""

    lengths: list[int]  # of each item: the tokens that go through the model, with its own padding

    def normalizer(self, batch: Sequence[int]) -> float:
        """What the summed loss of a batch is divided by."""

    def loss(
        self, scorer: nn.Module, items: Sequence[int], batch: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The summed loss [] of some items of a batch, with gradient; and the sums [K] that ``record`` divides."""

    def record(self, sums: list[float]) -> Record:
        """Means over a batch, from the sums of all its items."""


class SupervisedTask:
    """NLL per response token."""

    def __init__(self, examples: Sequence[PromptResponse]):
        self.examples = examples
        self.lengths = [len(prompt) + len(response) - 1 for prompt, response in examples]

    def normalizer(self, batch: Sequence[int]) -> float:
        return sum(len(self.examples[i][1]) for i in batch)

    def loss(
        self, scorer: nn.Module, items: Sequence[int], batch: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        packed = collate([self.examples[i] for i in items]).to(device)

        def of(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor]:
            logps, stats = head.logps(hidden, packed.labels, stats=_STATS)  # [R]
            loss = -logps.sum()
            return loss, torch.stack([loss.detach(), *_token_sums(stats)])

        return scorer(packed, of)

    def record(self, sums: list[float]) -> Record:
        loss, *token_sums = sums
        return {"loss": loss / token_sums[-1], **_token_means(token_sums)}


class PreferenceTask:
    """An objective of ``fastpo.objectives`` over pairs. Equal keys stand for one response to one prompt."""

    def __init__(self, pairs: Sequence[PairRecord], ref_logps: Mapping[str, Tensor] | None, objective: Objective):
        self.pairs = pairs
        self.ref_logps = ref_logps
        self.objective = objective
        self.lengths = [2 * (len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) - 1) for p in pairs]
        _check_reference(pairs, ref_logps, objective)

    def normalizer(self, batch: Sequence[int]) -> float:
        return len(batch)

    def loss(
        self, scorer: nn.Module, items: Sequence[int], batch: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        pairs = [self.pairs[i] for i in items]
        responses: dict[str, PromptResponse] = {}  # each distinct one goes through the model once
        for pair in pairs:
            responses[pair.chosen_key] = pair.prompt_ids, pair.chosen_ids
            responses[pair.rejected_key] = pair.prompt_ids, pair.rejected_ids
        ids = {key: i for i, key in enumerate(responses)}
        index = torch.tensor([[ids[p.chosen_key], ids[p.rejected_key]] for p in pairs], device=device)  # [P, 2]
        weights = torch.tensor([p.weight for p in pairs], device=device)  # [P]
        packed = collate(list(responses.values())).to(device)
        ref_logps = None
        if self.ref_logps is not None:
            ref_logps = torch.cat([self.ref_logps[key] for key in responses]).to(device)  # [R]

        segments, lengths = Segments(packed.cu_seqlens), packed.cu_seqlens.diff()[index]  # [P, 2]
        tuples, objective = Pairs(index, weights=weights), self._summed(batch)

        def of(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor]:
            given = (hidden, packed.labels, ref_logps, segments, tuples, objective)
            out, stats = head.preference_loss(*given, stats=_STATS)
            sums = [
                out.losses.sum(),
                out.nll[:, 0].sum(),
                *out.rewards.sum(0),
                (out.margins > 0).sum(),
                *out.logps[index].sum(0),
                *(out.logps[index] / lengths).sum(0),
                torch.tensor(len(pairs), device=device),
                *_token_sums(stats),
            ]
            return out.loss, torch.stack([s.detach().float() for s in sums])

        return scorer(packed, of)

    def record(self, sums: list[float]) -> Record:
        *per_pair, num_pairs = sums[: len(_PER_PAIR) + 1]
        record = {name: value / num_pairs for name, value in zip(_PER_PAIR, per_pair, strict=True)}
        record["margin"] = record["rewards_chosen"] - record["rewards_rejected"]
        return {**record, **_token_means(sums[len(_PER_PAIR) + 1 :])}

    def _summed(self, batch: Sequence[int]) -> Objective:
        """Summed over pairs. An NLL per token of the batch counts the tokens of the whole batch, not of the items."""
        objective = replace(self.objective, reduction="sum")
        if objective.nll_normalizer != "batch" or not objective.nll_coefs:
            return objective
        pairs = [self.pairs[i] for i in batch]
        counts = (sum(len(p.chosen_ids) for p in pairs), sum(len(p.rejected_ids) for p in pairs))
        per_pair = sum(n for n, a in zip(counts, objective.nll_coefs, strict=True) if a) / len(pairs)
        return replace(objective, nll=tuple(a / per_pair for a in objective.nll_coefs), nll_normalizer="none")


def _check_reference(pairs: Sequence[PairRecord], ref_logps: Mapping[str, Tensor] | None, objective: Objective) -> None:
    if ref_logps is None:
        if objective.needs_reference:
            raise FastpoError(f"ref_logps is None; objective {objective.name} compares with a reference")
        return
    if not objective.needs_reference:
        raise FastpoError(f"ref_logps is given; objective {objective.name} has no reference: it should be None")
    for i, pair in enumerate(pairs):
        for key, response in ((pair.chosen_key, pair.chosen_ids), (pair.rejected_key, pair.rejected_ids)):
            if key not in ref_logps:
                raise FastpoError(f"ref_logps has no {key!r}, a response of pairs[{i}]")
            if ref_logps[key].shape != (len(response),):
                shape = tuple(ref_logps[key].shape)
                raise FastpoError(f"ref_logps[{key!r}] has shape {shape}; it should be ({len(response)},)")


def _token_sums(stats: Mapping[str, Tensor]) -> list[Tensor]:
    """Of the response tokens [R]: each statistic, and their number, summed."""
    values = [stats[name].detach() for name in _STATS]
    return [*(value.sum() for value in values), values[0].new_tensor(values[0].shape[0])]


def _token_means(sums: Sequence[float]) -> Record:
    *values, tokens = sums
    return {**{name: value / tokens for name, value in zip(_STATS, values, strict=True)}, "tokens": tokens}
