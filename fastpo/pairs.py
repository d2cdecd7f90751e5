"""Preference pairs from scored samples: the rules of IRPO and ScPO as small functions over plain lists.

IRPO: Pang et al. 2024, "Iterative Reasoning Preference Optimization", section 2. ScPO: Prasad et al. 2024,
"Self-Consistency Preference Optimization", section 2. A rule sees one prompt and returns index pairs; ``build_pairs``
applies it to all prompts and counts what it dropped, so that an empty result can say why.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastpo.errors import FastpoError, RunError

GOLD = -1  # stands for the data's own solution among the winners


@dataclass(frozen=True)
class PairRecord:
    """One preference pair, tokenised. The keys identify the responses: one that stands in ten pairs has one key, and its
    reference log-probs are computed once."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    weight: float = 1.0  # omega of METHODS.md P2, on the preference and the NLL term
    chosen_key: str = ""
    rejected_key: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class PairCounts:
    """What became of the prompts of an iteration."""

    prompts: int = 0
    pairs: int = 0
    paired_prompts: int = 0
    all_right: int = 0  # irpo: no losers
    all_wrong: int = 0  # irpo: no winners
    unanimous: int = 0  # scpo: one answer only
    below_threshold: int = 0  # scpo: the best answer has too few votes
    no_answer: int = 0  # scpo: no response holds a final answer
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


def zip_cyclic(winners: Sequence[int], losers: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Distinct (winner, loser) pairs until ``limit``: (w0,l0), (w1,l1), ..., each list starting over at its end.

    After a whole common period of the two lists the losers shift by one, so that every combination comes once:
    ``zip_cyclic([0, 1], [2, 3], 4) == [(0, 2), (1, 3), (0, 3), (1, 2)]``. Empty if a side is empty.
    """
    total = len(winners) * len(losers)
    if total == 0:
        return []
    period = _lcm(len(winners), len(losers))
    steps = range(min(limit, total))
    return [(winners[t % len(winners)], losers[(t + t // period) % len(losers)]) for t in steps]


def _lcm(a: int, b: int) -> int:
    from math import lcm

    return lcm(a, b)


def irpo_pairs(
    rewards: Sequence[float | None], keep: Sequence[int], *, limit: int, win_threshold: float = 1.0, gold: bool = False
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """(pairs, winners, losers) of one prompt. A reward of at least ``win_threshold`` wins; None and NaN stand on no side.

    ``gold`` puts ``GOLD`` behind the winners. No pairs where a side is empty.
    """
    scored = [(i, r) for i in keep if (r := rewards[i]) is not None and r == r]
    winners = [i for i, r in scored if r >= win_threshold]
    losers = [i for i, r in scored if r < win_threshold]
    if gold:
        winners.append(GOLD)
    return zip_cyclic(winners, losers, limit), winners, losers


def scpo_pair(answers: Sequence[str | None], keep: Sequence[int], *, threshold: float) -> tuple[int, int, float] | str:
    """(chosen, rejected, weight) of one prompt from votes alone, or why there is none.

    Every one of the k responses votes for its answer (duplicates vote too; None is no vote). Chosen: the first kept
    response with the most votes V+; rejected: the first kept one with the fewest, V-. Kept if V+ >= threshold * k.
    weight = (V+ - V-) / k.
    """
    votes = Counter(a for a in answers if a is not None)
    voters = [i for i in keep if answers[i] is not None]
    if not voters:
        return "no_answer"
    counts = [votes[answers[i]] for i in voters]
    most, least = max(counts), min(counts)
    if most < threshold * len(answers):
        return "below_threshold"
    if most == least:
        return "unanimous" if len(votes) == 1 else "below_threshold"
    return voters[counts.index(most)], voters[counts.index(least)], (most - least) / len(answers)
