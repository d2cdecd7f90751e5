"""Preference pairs from scored samples: the rules of IRPO and ScPO as small functions over plain lists.

IRPO: Pang et al. 2024, "Iterative Reasoning Preference Optimization", section 2. ScPO: Prasad et al. 2024,
"Self-Consistency Preference Optimization", section 2. A rule sees one prompt and returns index pairs; ``build_pairs``
applies it to all prompts and counts what it dropped, so that an empty result can say why.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import lcm
from typing import Any

from fastpo.config import Config
from fastpo.errors import RunError

GOLD = -1  # stands for the data's own solution among the winners


@dataclass(frozen=True)
class PairRecord:
    """One preference pair, tokenised.

    The keys identify the responses: one that stands in ten pairs has one key, and its reference log-probs are computed
    once.
    """

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
    period = lcm(len(winners), len(losers))
    steps = range(min(limit, total))
    return [(winners[t % len(winners)], losers[(t + t // period) % len(losers)]) for t in steps]


def irpo_pairs(
    rewards: Sequence[float | None], keep: Sequence[int], *, limit: int, win_threshold: float = 1.0, gold: bool = False
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """(pairs, winners, losers) of one prompt. A reward of at least ``win_threshold`` wins; None stands on no side.

    ``gold`` puts ``GOLD`` behind the winners. No pairs where a side is empty.
    """
    scored = [(i, r) for i in keep if (r := rewards[i]) is not None]
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
    counts = [votes[answer] for i in voters if (answer := answers[i]) is not None]
    most, least = max(counts), min(counts)
    if most < threshold * len(answers):
        return "below_threshold"
    if most == least:
        return "unanimous" if len(votes) == 1 else "below_threshold"
    return voters[counts.index(most)], voters[counts.index(least)], (most - least) / len(answers)


def build_pairs(
    samples: Sequence[dict[str, Any]], rewards: Sequence[dict[str, Any]], config: Config, iteration: int = 1
) -> tuple[list[dict[str, Any]], PairCounts]:
    """Rows ``{"prompt", "chosen", "rejected", "weight"}``, naming responses ``<prompt id>/<sample>`` or ``.../gold``.

    ``samples``: rows of samples.jsonl; ``rewards``: the rows of rewards.jsonl in the same order. A pure function of its
    arguments: prompts in their order, samples in theirs.
    """
    counts = PairCounts(prompts=len(samples))
    pairs = []
    for sample, scored in zip(samples, rewards, strict=True):
        texts = [response["text"] for response in sample["responses"]]
        kept = candidates(texts, [response["tokens"] for response in sample["responses"]])
        counts.duplicates += kept.duplicates
        counts.empty += kept.empty
        counts.unscored += sum(reward is None for reward in scored["rewards"])
        if config.pair_rule == "irpo":
            chosen = _irpo(sample, scored, texts, kept.keep, config, counts)
        else:
            chosen = _scpo(scored, kept.keep, config.at("vote_threshold", iteration), counts)
        counts.paired_prompts += bool(chosen)
        for winner, loser, weight in chosen:
            pairs.append(
                {
                    "prompt": sample["id"],
                    "chosen": response_key(sample["id"], winner),
                    "rejected": response_key(sample["id"], loser),
                    "weight": weight,
                }
            )
    counts.pairs = len(pairs)
    return pairs, counts


def response_key(prompt_id: str, sample: int) -> str:
    return f"{prompt_id}/{'gold' if sample == GOLD else sample}"


def _irpo(
    sample: dict[str, Any],
    scored: dict[str, Any],
    texts: list[str],
    keep: list[int],
    config: Config,
    counts: PairCounts,
) -> list[tuple[int, int, float]]:
    solution = sample["row"].get("answer")
    gold = config.gold_wins and bool(solution) and solution not in texts
    pairs, winners, losers = irpo_pairs(
        scored["rewards"], keep, limit=config.pairs_per_prompt, win_threshold=config.win_threshold, gold=gold
    )
    counts.all_right += bool(winners) and not losers
    counts.all_wrong += bool(losers) and not winners
    return [(winner, loser, 1.0) for winner, loser in pairs]


def _scpo(
    scored: dict[str, Any], keep: list[int], threshold: float, counts: PairCounts
) -> list[tuple[int, int, float]]:
    pair = scpo_pair(scored["answers"], keep, threshold=threshold)
    if isinstance(pair, tuple):
        return [pair]
    setattr(counts, pair, getattr(counts, pair) + 1)
    return []


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


def require_pairs(pairs: Sequence[Any], counts: PairCounts, config: Config, iteration: int) -> None:
    if not pairs:
        raise RunError(explain_no_pairs(counts, config, iteration))
