"""What the training stages minimise: the loss of some items of a batch, supervised or preference, and its records."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastpo.errors import FastpoError
from fastpo.integrations.head import Head
from fastpo.kernels.preference_loss import preference_loss
from fastpo.models import Batch, PromptResponse, ResponseScorer, collate, split_by_tokens
from fastpo.objectives import Objective
from fastpo.objectives.coupling import SharedLengths, TokenKl
from fastpo.pairs import PairRecord
from fastpo.references import Reference, needs_kl, responses_of
from fastpo.types import Pairs, PreferenceOutput, Segments

Record = dict[str, float]  # what one step measured
STATS = ("entropy", "topk_mass", "topk_entropy")
NUM_PAIR_SUMS = 15  # of ``PreferenceTask.sums``; the others are ``token_sums``
# Columns of Pairs: where they are in a PairRecord.
_COLUMNS = {"soft_labels": "soft_label", "margins": "margin", "targets": "targets", "relevance": "gains"}


class Task(Protocol):
    """What the optimizer loop needs to know of a stage. Items are indices into its data."""

    lengths: list[int]  # of each item: the tokens that go through the model, with its own padding
    prompts: list[int]  # of each item: a number that items with its prompt share; none where that saves nothing

    def scorer(self, model: Any) -> nn.Module:
        """The module whose forward and backward train ``model``."""

    def rounds(
        self, scorer: nn.Module, batch: Sequence[int], budget: int, processes: int, device: torch.device
    ) -> list[list[Any]]:
        """The shares of a batch, each one forward and backward of ``budget`` tokens. Processes take those of a round at
        the same time; a round has at most one for each."""

    def normalizer(self, batch: Sequence[int]) -> float:
        """What the summed loss of a batch is divided by."""

    def loss(self, scorer: nn.Module, share: Any, batch: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The summed loss [] of a share, with gradient; and the sums [K] that ``record`` divides."""

    def record(self, sums: list[float]) -> Record:
        """Means over a batch, from the sums of all its items."""


class ItemTask:
    """Items padded to one width in each share."""

    lengths: list[int]

    def scorer(self, model: Any) -> nn.Module:
        return ResponseScorer(model)

    def rounds(
        self, scorer: nn.Module, batch: Sequence[int], budget: int, processes: int, device: torch.device
    ) -> list[list[Any]]:
        dealt = _dealt([self.lengths[i] for i in batch], budget, processes)
        return [[[batch[i] for i in share] for share in shares] for shares in dealt]


class SupervisedTask(ItemTask):
    """NLL per response token."""

    def __init__(self, examples: Sequence[PromptResponse]):
        self.examples = examples
        self.lengths = [len(prompt) + len(response) - 1 for prompt, response in examples]
        self.prompts: list[int] = []  # they share nothing

    def normalizer(self, batch: Sequence[int]) -> float:
        return sum(len(self.examples[i][1]) for i in batch)

    def loss(
        self, scorer: nn.Module, share: Sequence[int], batch: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        packed = collate([self.examples[i] for i in share]).to(device)

        def of(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor]:
            logps, stats = head.logps(hidden, packed.labels, stats=STATS)  # [R]
            loss = -logps.sum()
            return loss, torch.stack([loss.detach(), *token_sums(stats)])

        return scorer(packed, of)

    def record(self, sums: list[float]) -> Record:
        loss, *token_sums = sums
        return {"loss": loss / token_sums[-1], **_token_means(token_sums)}


@dataclass(frozen=True)
class ScoredShare:
    """A share of a batch whose loss is known already, by its slopes."""

    responses: Mapping[str, PromptResponse]  # by key
    slopes: Mapping[str, Tensor]  # key -> [1, n], of the batch's loss, by its log-probs
    values: Tensor | None = None  # [NUM_PAIR_SUMS] of the batch, in one of its shares


class PreferenceTask(ItemTask):
    """An objective of ``fastpo.objectives`` over pairs. Equal keys stand for one response to one prompt.

    Where the objective couples the scores of the batch and that is several shares, all of it is scored first, without
    gradient; the slopes of the loss are then the coefficients of each share's log-probs.
    """

    def __init__(
        self,
        pairs: Sequence[PairRecord],
        reference: Reference | Mapping[str, Tensor] | None,
        objective: Objective,
    ):
        reference = Reference(reference) if isinstance(reference, Mapping) else reference
        _check_reference(pairs, None if reference is None else reference.logps, objective)
        self.pairs, self.reference = _separated(pairs, reference, objective)
        self.objective = objective
        self.ref_scorer: Any = None
        if needs_kl(objective):
            if self.reference is None or self.reference.model is None:
                raise FastpoError(f"reference has no model; objective {objective.name} needs its whole distribution")
            self.ref_scorer = self.scorer(self.reference.model)
        self.lengths = [len(p.present) * (p.longest - 1) for p in pairs]
        self.has_weights = "pairs.weights" not in (() if objective.couple is None else objective.couple.makes)
        if not self.has_weights and any(p.weight != 1 for p in pairs):
            raise FastpoError(f"weights of pairs are not all 1; objective {objective.name} makes pairs of its own")
        numbers: dict[Hashable, int] = {}
        self.prompts = [numbers.setdefault(p.group or tuple(p.prompt_ids), len(numbers)) for p in pairs]

    def normalizer(self, batch: Sequence[int]) -> float:
        return len(batch)

    def rounds(
        self, scorer: nn.Module, batch: Sequence[int], budget: int, processes: int, device: torch.device
    ) -> list[list[Any]]:
        rounds = super().rounds(scorer, batch, budget, processes, device)
        if not self.objective.couples_scores or sum(map(len, rounds)) == 1:
            return rounds
        return self._scored_rounds(scorer, batch, budget, processes, device)

    def _scored_rounds(
        self, scorer: nn.Module, batch: Sequence[int], budget: int, processes: int, device: torch.device
    ) -> list[list[ScoredShare]]:
        """The distinct responses of the batch with the slopes of its loss. Every process scores all of them."""
        pairs = [self.pairs[i] for i in batch]
        responses = responses_of(pairs)
        keys = list(responses)
        dealt = _dealt([len(prompt) + len(ids) - 1 for prompt, ids in responses.values()], budget, processes)
        rounds = [[[keys[i] for i in share] for share in shares] for shares in dealt]
        scored: dict[str, Tensor] = {}
        for share in (share for shares in rounds for share in shares):
            packed = collate([responses[key] for key in share]).to(device)
            with torch.no_grad():
                logps = scorer(packed, packed.logps)  # [R]
            scored |= zip(share, logps[None].split(packed.cu_seqlens.diff().tolist(), dim=1), strict=True)
        slopes, values = self.slopes(pairs, scored, batch)
        shares = [[ScoredShare({key: responses[key] for key in share}, slopes) for share in each] for each in rounds]
        shares[0][0] = replace(shares[0][0], values=values)
        return shares

    def slopes(
        self, pairs: Sequence[PairRecord], scored: Mapping[str, Tensor], batch: Sequence[int]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(key -> [C, n] d loss / d ``scored``, sums [NUM_PAIR_SUMS]) of ``pairs``.

        ``scored``: key -> [C, n], a response's log-probs and, where the objective takes it, its KL.
        """
        lengths = [part.shape[1] for part in scored.values()]
        columns = torch.cat(list(scored.values()), dim=1).requires_grad_()  # [C, T]
        logps, *kl = columns
        cu_seqlens = torch.tensor([0, *lengths], device=logps.device).cumsum(0)
        ref_logps, segments, table = self.arguments(pairs, list(scored), cu_seqlens)
        out = preference_loss(logps, ref_logps, with_kl(segments, *kl), table, self.summed(batch))
        (gradient,) = torch.autograd.grad(out.loss, columns)
        values = self.sums(out, table, cu_seqlens, {name: logps.new_zeros(0) for name in STATS})
        return dict(zip(scored, gradient.split(lengths, dim=1), strict=True)), values[:NUM_PAIR_SUMS]

    def loss(self, scorer: nn.Module, share: Any, batch: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        if isinstance(share, ScoredShare):
            return self._loss_by_slopes(scorer, share, device)
        pairs = [self.pairs[i] for i in share]
        responses = responses_of(pairs)  # each distinct one goes through the model once
        packed = collate(list(responses.values())).to(device)
        ref_logps, given_segments, table = self.arguments(pairs, list(responses), packed.cu_seqlens)
        objective = self.summed(batch)

        def of(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor]:
            segments, known = given_segments, self._reference_states(packed)  # here: under the policy's autocast
            if known is not None:
                segments = with_kl(segments, head.token_kl(hidden, *known))
            given = (hidden, packed.labels, ref_logps, segments, table, objective)
            out, stats = head.preference_loss(*given, stats=STATS)
            return out.loss, self.sums(out, table, packed.cu_seqlens, stats)

        return scorer(packed, of)

    def _loss_by_slopes(self, scorer: nn.Module, share: ScoredShare, device: torch.device) -> tuple[Tensor, Tensor]:
        packed = collate(list(share.responses.values())).to(device)
        slopes = torch.cat([share.slopes[key][0] for key in share.responses]).to(device)  # [R]

        def of(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor]:
            logps, stats = head.logps(hidden, packed.labels, stats=STATS)  # [R]
            values = logps.new_zeros(NUM_PAIR_SUMS) if share.values is None else share.values
            return (logps * slopes).sum(), torch.cat((values, torch.stack(token_sums(stats)).float()))

        return scorer(packed, of)

    def arguments(
        self, pairs: Sequence[PairRecord], keys: Sequence[str], cu_seqlens: Tensor
    ) -> tuple[Tensor | None, Segments, Pairs]:
        """What ``preference_loss`` takes beside log-probs: reference, segments and tuples of the sequences ``keys``."""
        device, ref_logps, columns = cu_seqlens.device, None, {}
        if self.reference is not None:
            ref_logps = _packed(self.reference.logps, keys, device)
            columns = {name: _packed(values, keys, device) for name, values in self.reference.columns.items()}
        return ref_logps, Segments(cu_seqlens, **columns), self._table(pairs, keys).to(device)

    def sums(self, out: PreferenceOutput, table: Pairs, cu_seqlens: Tensor, stats: Mapping[str, Tensor]) -> Tensor:
        """[K] what ``record`` divides: of the pairs of ``table`` and of the tokens [R] that ``stats`` speak of."""
        index = table.index[:, :2]  # [P, 2]
        here = index >= 0
        total = torch.where(here, out.logps[index], 0.0)  # [P, 2]
        mean = total / cu_seqlens.diff()[index]  # [P, 2]
        both = here.all(1)
        right = [both & (values[:, 0] > values[:, 1]) for values in (total, mean)]
        rewards, nll = out.rewards[:, :2], out.nll[:, 0]
        if self.objective.couple is not None or self.objective.list_loss is not None:  # whose tuples may be others
            rewards, nll = self.objective.beta * torch.where(here, out.scores[index], 0.0), -mean[:, 0]
        sums = [
            *(values.sum() for values in (out.losses, rewards[:, 0] > rewards[:, 1], *right)),
            torch.tensor(len(index), device=index.device),
            both.sum(),
            nll.sum(),
            *rewards.sum(0),
            *total.sum(0),
            *mean.sum(0),
            *here.sum(0),
            *token_sums(stats),
        ]
        return torch.stack([s.detach().float() for s in sums])

    @torch.no_grad()
    def _reference_states(self, packed: Batch) -> tuple[Head, Tensor] | None:
        """The reference's head and hidden states [R, H'], where the objective needs its whole distribution."""
        return None if self.ref_scorer is None else self.ref_scorer(packed, lambda head, hidden: (head, hidden))

    def _table(self, pairs: Sequence[PairRecord], keys: Sequence[str]) -> Pairs:
        """The tuples over the sequences named by ``keys``, with the columns that the objective asks for."""
        ids = {key: i for i, key in enumerate(keys)} | {"": -1}
        width = max(self.objective.num_members, *(len(p.members) for p in pairs))
        index = [[ids[key] for key, *_ in p.members] + [-1] * (width - len(p.members)) for p in pairs]
        columns = {name: at for name, at in _COLUMNS.items() if f"pairs.{name}" in self.objective.requires}
        return Pairs(
            torch.tensor(index),  # [P, K]
            weights=torch.tensor([p.weight for p in pairs]) if self.has_weights else None,  # [P]
            **{name: _column([getattr(p, at) for p in pairs], width) for name, at in columns.items()},
        )

    def record(self, sums: list[float]) -> Record:
        loss, accuracy, ranking, ranking_per_token, pairs, both, nll, *members = sums[:NUM_PAIR_SUMS]
        chosen, rejected = members[6:]
        record = {"loss": loss / pairs, "nll": _ratio(nll, chosen)}
        for at, name in enumerate(("rewards", "logps", "logps_per_token")):
            record[f"{name}_chosen"] = _ratio(members[2 * at], chosen)
            record[f"{name}_rejected"] = _ratio(members[2 * at + 1], rejected)
        record["margin"] = record["rewards_chosen"] - record["rewards_rejected"]
        record["accuracy"] = accuracy / pairs
        if both:
            record |= {"ranking_accuracy": ranking / both, "ranking_accuracy_per_token": ranking_per_token / both}
        return {**record, **_token_means(sums[NUM_PAIR_SUMS:])}

    def summed(self, batch: Sequence[int]) -> Objective:
        """Summed over pairs. An NLL per token of the batch counts the tokens of the whole batch, not of the items."""
        objective = replace(self.objective, reduction="sum")
        if objective.nll_normalizer != "batch" or not objective.nll_coefs:
            return objective
        pairs = [self.pairs[i] for i in batch]
        counts = (sum(len(p.chosen_ids) for p in pairs), sum(len(p.rejected_ids) for p in pairs))
        per_pair = sum(n for n, a in zip(counts, objective.nll_coefs, strict=True) if a) / len(pairs) or 1.0
        return replace(objective, nll=tuple(a / per_pair for a in objective.nll_coefs), nll_normalizer="none")


def with_kl(segments: Segments, kl: Tensor | None = None) -> Segments:
    """``segments`` with the KL [T] of their tokens, if any, masked as their log-ratios are (SparsePO)."""
    return segments if kl is None else replace(segments, kl=kl, kl_weights=segments.weights)


def _dealt(lengths: Sequence[int], budget: int, processes: int) -> list[list[list[int]]]:
    """Indices into ``lengths`` in rounds of shares, at most one for each process; see ``split_by_tokens``."""
    groups = split_by_tokens(lengths, budget, processes)
    dealt = [[group[rank::processes] for rank in range(processes)] for group in groups]
    return [[share for share in shares if share] for shares in dealt]


def _separated(
    pairs: Sequence[PairRecord], reference: Reference | None, objective: Objective
) -> tuple[Sequence[PairRecord], Reference | None]:
    """Keys of their own for responses whose tokens count differently from pair to pair (LD-DPO), or as the chosen and
    as the rejected one (TDPO-2): as one sequence they would take what is right for one of its pairs."""
    by_pair = isinstance(objective.couple, SharedLengths)
    if not by_pair and not (isinstance(objective.couple, TokenKl) and objective.couple.detach_chosen):
        return pairs, reference
    olds: dict[str, str] = {"": ""}

    def named(key: str, pair: int, place: int) -> str:
        name = f"{key}#{pair if by_pair else place}" if key else ""
        olds[name] = key
        return name

    def renamed(i: int, pair: PairRecord) -> PairRecord:
        others = tuple((named(key, i, at), ask, ids) for at, (key, ask, ids) in enumerate(pair.others, start=2))
        chosen, rejected = (named(key, i, at) for at, (key, *_) in enumerate(pair.members[:2]))
        return replace(pair, chosen_key=chosen, rejected_key=rejected, others=others)

    separate = [renamed(i, pair) for i, pair in enumerate(pairs)]
    if reference is None:
        return separate, None

    def by_name(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[key] for name, key in olds.items() if key in values}

    columns = {field: by_name(values) for field, values in reference.columns.items()}
    return separate, replace(reference, logps=by_name(reference.logps), columns=columns)


def _check_reference(pairs: Sequence[PairRecord], ref_logps: Mapping[str, Tensor] | None, objective: Objective) -> None:
    if ref_logps is None:
        if objective.needs_reference:
            raise FastpoError(f"ref_logps is None; objective {objective.name} compares with a reference")
        return
    if not objective.needs_reference:
        raise FastpoError(f"ref_logps is given; objective {objective.name} has no reference: it should be None")
    for i, pair in enumerate(pairs):
        for key, _, response in pair.present:
            if key not in ref_logps:
                raise FastpoError(f"ref_logps has no {key!r}, a response of pairs[{i}]")
            if ref_logps[key].shape != (len(response),):
                shape = tuple(ref_logps[key].shape)
                raise FastpoError(f"ref_logps[{key!r}] has shape {shape}; it should be ({len(response)},)")


def _packed(values: Mapping[str, Tensor], keys: Iterable[str], device: torch.device) -> Tensor:
    """[R] values by token of the responses named by ``keys``, one behind the other."""
    return torch.cat([values[key] for key in keys]).to(device)


def _column(values: Sequence[Any], width: int) -> Tensor:
    """[P] of numbers, [P, ...] of tuples; lists that are shorter than others are filled up with zeros."""
    if isinstance(values[0], tuple) and len({len(v) for v in values}) > 1:
        values = [(*v, *(0.0,) * (width - len(v))) for v in values]
    return torch.tensor(values)


def _ratio(total: float, number: float) -> float:
    return total / number if number else 0.0


def token_sums(stats: Mapping[str, Tensor]) -> list[Tensor]:
    """Of the response tokens [R]: each statistic, and their number, summed."""
    values = [stats[name].detach() for name in STATS]
    return [*(value.sum() for value in values), values[0].new_tensor(values[0].shape[0])]


def _token_means(sums: Sequence[float]) -> Record:
    *values, tokens = sums
    return {**{name: value / tokens for name, value in zip(STATS, values, strict=True)}, "tokens": tokens}
