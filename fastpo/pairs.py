"""Preference pairs from scored samples: the rules of pair_rules.py applied to all prompts of an iteration.

``build_pairs`` is a pure function of the samples, their scores and the config; it counts what it dropped, so that an
empty result can say why. ``RULES`` is the table of rules: a function of one prompt, and the columns it can fill.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastpo import pair_rules
from fastpo.config import Config
from fastpo.pair_rules import GOLD, Choice, Member, irpo_pairs, scpo_pair
from fastpo.reward_rules import length_penalised, minus_length

Row = dict[str, Any]
COLUMNS = ("soft_label", "margin", "targets", "gains")  # of a pair, beside its weight


@dataclass(frozen=True)
class PairRecord:
    """One preference pair, or a tuple of more members, tokenised.

    The keys identify the responses: one that stands in ten pairs has one key, and its reference log-probs are computed
    once. An absent member (unpaired responses) has the key "" and no tokens.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    weight: float = 1.0  # omega of METHODS.md P2, on the preference and the NLL term
    chosen_key: str = ""
    rejected_key: str = ""
    others: tuple[tuple[str, list[int], list[int]], ...] = ()  # further members: key, their prompt, tokens
    soft_label: float | None = None  # probability that chosen is better
    margin: float | None = None  # what is taken from z
    targets: tuple[float, ...] | None = None  # [J] of the squared links
    gains: tuple[float, ...] | None = None  # [K] of a list
    group: str = ""  # pairs of one search tree, whose prompts hold steps of it; "": what has equal prompts
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def members(self) -> tuple[tuple[str, list[int], list[int]], ...]:
        """(key, prompt, tokens) of chosen, rejected and the others."""
        chosen = self.chosen_key, self.prompt_ids, self.chosen_ids
        return chosen, (self.rejected_key, self.prompt_ids, self.rejected_ids), *self.others

    @property
    def present(self) -> list[tuple[str, list[int], list[int]]]:
        """The members that there are."""
        return [member for member in self.members if member[2]]

    @property
    def longest(self) -> int:
        """Tokens of the longest member with its prompt."""
        return max(len(prompt) + len(ids) for _, prompt, ids in self.members)


@dataclass
class PairCounts:
    """What became of the prompts of an iteration."""

    prompts: int = 0
    pairs: int = 0
    paired_prompts: int = 0
    all_right: int = 0  # no losers
    all_wrong: int = 0  # no winners
    unanimous: int = 0  # scpo: one answer only
    below_threshold: int = 0  # scpo: the best answer has too few votes
    no_answer: int = 0  # scpo: no response holds a final answer
    tied: int = 0  # all scores are equal, or there are none
    unscored: int = 0  # samples whose reward raised or is NaN (on_reward_error: skip)
    duplicates: int = 0  # samples dropped because an identical text came before
    empty: int = 0  # samples dropped because they hold no token

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Candidates:
    """The responses to one prompt that may stand in pairs, in sample order."""

    keep: list[int]  # indices of responses that are neither empty nor repeat an earlier text
    duplicates: int
    empty: int


def candidates(texts: Sequence[str], lengths: Sequence[int]) -> Candidates:
    """First occurrence of each text that has tokens. ``lengths``: tokens of each response, its EOS not counted."""
    seen: set[str] = set()
    keep, empty = [], 0
    for i, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        if length == 0:
            empty += 1
        elif text not in seen:
            seen.add(text)
            keep.append(i)
    return Candidates(keep, duplicates=len(texts) - empty - len(keep), empty=empty)


@dataclass(frozen=True)
class Scored:
    """What a rule sees of one prompt."""

    sample: Row
    scored: Row
    keep: list[int]
    config: Config
    iteration: int
    counts: PairCounts
    consistency: float = 1.0  # mean Kendall tau over all prompts, between this ranking and the previous iteration's

    @property
    def texts(self) -> list[str]:
        return [response["text"] for response in self.sample["responses"]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response, or of what stands behind its thought."""
        return self.scored.get("lengths") or [response["tokens"] for response in self.sample["responses"]]

    @property
    def rewards(self) -> list[float | None]:
        return self.scored["rewards"]

    @property
    def scores(self) -> list[float | None]:
        """What pairs are chosen by: ``scores`` where something else than the reward made them, length counted in."""
        scores = self.scored.get("scores", self.rewards)
        known = [i for i in self.keep if scores[i] is not None]
        if not known or not (self.config.length_penalty or self._rho):
            return scores
        values, lengths = [scores[i] for i in known], [self.lengths[i] for i in known]
        changed: Any = minus_length(values, lengths, self.config.length_penalty)
        if self._rho:
            changed = length_penalised(changed, lengths, self._rho)
        by_index = dict(zip(known, changed.tolist(), strict=True))
        return [by_index.get(i) for i in range(len(scores))]

    @property
    def _rho(self) -> float:
        return 0.0 if self.config.pair_rule == "tiers" else self.config.length_rho

    def one(self, pair: tuple[int, int] | Choice | None) -> list[Choice]:
        """The pair as a list, or none and counted as a tie."""
        if pair is None:
            self.counts.tied += 1
            return []
        return [pair if isinstance(pair, Choice) else Choice(pair)]


def _irpo(prompt: Scored) -> list[Choice]:
    config, solution = prompt.config, prompt.sample["row"].get("answer")
    gold = config.gold_wins and bool(solution) and solution not in prompt.texts
    pairs, winners, losers = irpo_pairs(
        prompt.scores, prompt.keep, limit=config.pairs_per_prompt, win_threshold=config.win_threshold, gold=gold
    )
    prompt.counts.all_right += bool(winners) and not losers
    prompt.counts.all_wrong += bool(losers) and not winners
    return [Choice(pair) for pair in pairs]


def _scpo(prompt: Scored) -> list[Choice]:
    threshold = prompt.config.at("vote_threshold", prompt.iteration)
    pair = scpo_pair(prompt.scored["answers"], prompt.keep, threshold=threshold)
    if isinstance(pair, tuple):
        return [Choice(pair[:2], weight=pair[2])]
    setattr(prompt.counts, pair, getattr(prompt.counts, pair) + 1)
    return []


def _by_score(rule: Callable[..., tuple[int, int] | None]) -> Callable[[Scored], list[Choice]]:
    """A rule that needs the scores only; its pair has the gap in score for a margin."""

    def choose(prompt: Scored) -> list[Choice]:
        scores = prompt.scores
        pair = rule(scores, prompt.keep)
        if pair is None:
            return prompt.one(None)
        chosen, rejected = (scores[i] or 0.0 for i in pair)
        return [Choice(pair, margin=chosen - rejected)]

    return choose


def _tiers(prompt: Scored) -> list[Choice]:
    pair = pair_rules.tier_pair(prompt.scores, prompt.lengths, prompt.keep, rho=prompt.config.length_rho)
    return prompt.one(pair) + _judgements(prompt)


def _win_rate(prompt: Scored) -> list[Choice]:
    preferences = prompt.scored.get("preferences")
    matrix = pair_rules.score_preferences(prompt.scores) if preferences is None else np.asarray(preferences)
    return prompt.one(pair_rules.win_rate_choice(matrix, prompt.keep))


def _consistency(prompt: Scored) -> list[Choice]:
    pair = pair_rules.best_worst(prompt.scores, prompt.keep)
    return prompt.one(pair and Choice(pair, soft_label=(prompt.consistency + 1) / 2))


def _spin(prompt: Scored) -> list[Choice]:
    solution = prompt.sample["row"].get("answer")
    others = [i for i in prompt.keep if prompt.texts[i] != solution]
    prompt.counts.all_right += not others
    pairs = pair_rules.gold_pairs(others, limit=prompt.config.pairs_per_prompt) if solution else []
    return [Choice(pair) for pair in pairs]


def _unpaired(prompt: Scored) -> list[Choice]:
    config = prompt.config
    return pair_rules.unpaired(
        prompt.scores, prompt.keep, threshold=config.win_threshold, limit=config.pairs_per_prompt
    )


def _list(prompt: Scored) -> list[Choice]:
    return prompt.one(pair_rules.ranked_list(prompt.scores, prompt.keep, limit=prompt.config.pairs_per_prompt))


def _third(prompt: Scored) -> list[Choice]:
    return [pair_rules.with_third(choice.members, prompt.keep) for choice in _irpo(prompt)]  # type: ignore[arg-type]


def _edits(prompt: Scored) -> list[Choice]:
    """Winner, loser, winner, edited winner; where there are no losers the last two alone."""
    pairs: list[tuple[Member, ...]] = [choice.members for choice in _irpo(prompt)]
    winners, _ = pair_rules.sides(prompt.scores, prompt.keep, prompt.config.win_threshold)
    pairs = pairs or [(None, None, i) for i in winners[: prompt.config.pairs_per_prompt]]
    return pair_rules.with_edits(pairs, prompt.texts, prompt.sample["row"].get("answer"))


def _judgements(prompt: Scored) -> list[Choice]:
    """Pairs of judgements that the rewards stage has made; right ones without a wrong one are for fine-tuning only."""
    alone = prompt.config.objective == "sft"
    pairs = [p for p in prompt.scored.get("judgement_pairs", ()) if alone or p["rejected"] is not None]
    return [Choice((pair["chosen"], pair["rejected"]), prompt=pair["prompt"]) for pair in pairs]


class Rule(NamedTuple):
    choose: Callable[[Scored], list[Choice]]
    columns: tuple[str, ...] = ()  # of COLUMNS, those it fills; "weight" where it weighs
    members: int = 2  # the most that its tuples have; 0: any number
    single: bool = False  # whether its tuples have one member each


RULES = {
    "irpo": Rule(_irpo),
    "scpo": Rule(_scpo, ("weight",)),
    "max_min": Rule(_by_score(pair_rules.best_worst), ("margin",)),
    "max_random": Rule(_by_score(pair_rules.best_random), ("margin",)),
    "max_max": Rule(_by_score(pair_rules.best_two), ("margin",)),
    "tiers": Rule(_tiers),
    "win_rate": Rule(_win_rate, ("soft_label", "margin", "targets")),
    "consistency": Rule(_consistency, ("soft_label",)),
    "spin": Rule(_spin),
    "unpaired": Rule(_unpaired, members=3, single=True),  # the third: a response to another prompt
    "list": Rule(_list, ("gains",), members=0),
    "third": Rule(_third, members=3),
    "edits": Rule(_edits, members=4),
    "judgements": Rule(_judgements),
}
SEARCHED = Rule(lambda _: [], ("soft_label", "margin"))  # pairs of a search: fastpo.search chooses them


def build_pairs(
    samples: Sequence[Row], rewards: Sequence[Row], config: Config, iteration: int = 1
) -> tuple[list[Row], PairCounts]:
    """Rows ``{"prompt", "chosen", "rejected", "weight"}``, naming responses ``<prompt id>/<sample>`` or ``.../gold``.

    Where a rule has more to say: ``others``, further keys; COLUMNS; ``prompt_text`` in place of the sample's prompt;
    ``texts``, key -> text of responses that were not sampled.

    ``samples``: rows of samples.jsonl; ``rewards``: the rows of rewards.jsonl in the same order. A pure function of its
    arguments: prompts in their order, samples in theirs.
    """
    counts = PairCounts(prompts=len(samples))
    choose = RULES[config.pair_rule].choose
    taus = [row["consistency"] for row in rewards if "consistency" in row]
    consistency = sum(taus) / len(taus) if taus else 1.0
    pairs: list[Row] = []
    for sample, scored in zip(samples, rewards, strict=True):
        responses = sample["responses"]
        kept = candidates([r["text"] for r in responses], [r["tokens"] for r in responses])
        counts.duplicates += kept.duplicates
        counts.empty += kept.empty
        counts.unscored += sum(reward is None for reward in scored["rewards"])
        chosen = choose(Scored(sample, scored, kept.keep, config, iteration, counts, consistency))
        counts.paired_prompts += bool(chosen)
        pairs += _rows(sample["id"], chosen)
    counts.pairs = len(pairs)
    return pairs, counts


def _rows(prompt_id: str, choices: Sequence[Choice]) -> list[Row]:
    new: dict[tuple[str | None, str], str] = {}  # (prompt, text) -> key of responses that were not sampled
    rows = []
    for choice in choices:
        texts: dict[str, str] = {}

        def key(member: Member, choice: Choice = choice, texts: dict[str, str] = texts) -> str | None:
            if not isinstance(member, str):
                return None if member is None else response_key(prompt_id, member)
            name = new.setdefault((choice.prompt, member), f"{prompt_id}/new{len(new)}")
            texts[name] = member
            return name

        chosen, rejected, *others = map(key, choice.members)
        row = {"prompt": prompt_id, "chosen": chosen, "rejected": rejected, "weight": choice.weight}
        extra: Row = {"others": others, "prompt_text": choice.prompt, "texts": texts}
        extra |= {name: getattr(choice, name) for name in COLUMNS}
        rows.append(row | {name: value for name, value in extra.items() if value not in (None, [], {})})
    return rows


def response_key(prompt_id: str, sample: int) -> str:
    return f"{prompt_id}/{'gold' if sample == GOLD else sample}"


def explain_no_pairs(counts: PairCounts, config: Config, iteration: int) -> str:
    """Why an iteration has no pair at all, and which settings could change it."""
    start = f"iteration {iteration} has no pairs: of {counts.prompts} prompts "
    if config.pair_rule == "scpo":
        threshold = config.at("vote_threshold", iteration)
        return (
            f"{start}{counts.unanimous} have one answer only, {counts.below_threshold} no answer with {threshold:.0%} "
            f"of the votes and {counts.no_answer} no answer at all; lower vote_threshold, or change temperature or "
            "num_samples"
        )
    if counts.tied:
        return (
            f"{start}{counts.tied} have responses that all score the same, by {config.score_by}; raise temperature or "
            "num_samples, or look at rewards.jsonl"
        )
    if counts.all_wrong >= counts.all_right:
        change = "take easier prompts, a longer warm start, more num_samples or max_new_tokens, or gold_wins"
        if counts.all_wrong == counts.prompts:
            change += "; if even right-looking samples lose, check that reward and answer format fit"
    else:
        change = "take harder prompts, or raise temperature or num_samples"
    return (
        f"{start}{counts.all_right} are answered right by every sample and {counts.all_wrong} wrong by every sample "
        f"({counts.duplicates} repeated, {counts.empty} empty, {counts.unscored} unscored samples); {change}"
    )
