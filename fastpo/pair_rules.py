"""Pair rules: which responses to one prompt a loss compares, and with what weights. Small functions over plain lists.

``keep`` are the indices of the responses that may stand in pairs (pairs.candidates), ``scores`` one number or None per
response. Rules know nothing of files or settings; pairs.py applies them to all prompts of an iteration.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np

from fastpo.statistics import elo, low_mode, path_votes, preference_matrix, win_rates

GOLD = -1  # stands for the data's own solution
Member = int | str | None  # a sample's index or GOLD; a text that was not sampled; None: the tuple has no such member
Scores = Sequence[float | None]


@dataclass(frozen=True)
class Choice:
    """One tuple for the loss: chosen, rejected, further members; and the columns that an objective may require."""

    members: tuple[Member, ...]
    weight: float = 1.0
    soft_label: float | None = None  # probability that chosen is better
    margin: float | None = None  # by how much chosen scores higher
    targets: tuple[float, ...] | None = None  # per link term
    gains: tuple[float, ...] | None = None  # per member of a list: how good it is
    prompt: str | None = None  # text in place of the sample's prompt


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


def sides(rewards: Scores, keep: Sequence[int], threshold: float) -> tuple[list[int], list[int]]:
    """(winners, losers): a reward of at least ``threshold`` wins; None stands on no side."""
    scored = _scored(rewards, keep)
    return [i for i, r in scored if r >= threshold], [i for i, r in scored if r < threshold]


def _scored(scores: Scores, keep: Sequence[int]) -> list[tuple[int, float]]:
    return [(i, s) for i in keep if (s := scores[i]) is not None]


def irpo_pairs(
    rewards: Scores, keep: Sequence[int], *, limit: int, win_threshold: float = 1.0, gold: bool = False
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """(pairs, winners, losers) of one prompt: winners x losers zipped cyclically. IRPO, Pang et al. 2024, section 2.

    ``gold`` puts ``GOLD`` behind the winners. No pairs where a side is empty.
    """
    winners, losers = sides(rewards, keep, win_threshold)
    if gold:
        winners.append(GOLD)
    return zip_cyclic(winners, losers, limit), winners, losers


def scpo_pair(answers: Sequence[str | None], keep: Sequence[int], *, threshold: float) -> tuple[int, int, float] | str:
    """(chosen, rejected, weight) of one prompt from votes alone, or why there is none. ScPO, Prasad et al. 2024.

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


def rpc_pair(
    answers: Sequence[str | None], paths: Sequence[str], logps: Sequence[float], keep: Sequence[int]
) -> tuple[int, int] | None:
    """The kept responses with the most and the least probable answers, by ``path_votes``; None where those are equal.

    Responses in the lower mode of the log-probabilities neither vote nor win. RPC, Zhou et al. 2025 (from notes).
    """
    pruned = low_mode(logps)
    voting = [None if low else answer for answer, low in zip(answers, pruned, strict=True)]
    shares = path_votes(voting, logps, paths)
    voters = [i for i in keep if answers[i] is not None]
    if not voters:
        return None
    best, worst = max(voters, key=lambda i: shares[i]), min(voters, key=lambda i: shares[i])
    return (best, worst) if shares[best] > shares[worst] else None


def best_worst(scores: Scores, keep: Sequence[int]) -> tuple[int, int] | None:
    """The first best and the first worst response; None where all tie. Self-Rewarding; RLHF workflow's max_min."""
    scored = _scored(scores, keep)
    if not scored:
        return None
    best, worst = max(scored, key=lambda item: item[1]), min(scored, key=lambda item: item[1])
    return (best[0], worst[0]) if best[1] > worst[1] else None


def best_random(scores: Scores, keep: Sequence[int]) -> tuple[int, int] | None:
    """The best response and the first sampled one that scores lower: samples come in no order. max_random of RLHF
    workflow, Dong et al. 2024 (which takes the first other one, tied or not)."""
    pair = best_worst(scores, keep)
    if pair is None:
        return None
    top = scores[pair[0]]
    return pair[0], next(i for i, s in _scored(scores, keep) if top is not None and s < top)


def best_two(scores: Scores, keep: Sequence[int]) -> tuple[int, int] | None:
    """The best response and the best of those that score lower. max_max of RLHF workflow (which allows ties)."""
    scored = _scored(scores, keep)
    top = max((s for _, s in scored), default=0.0)
    below = [(i, s) for i, s in scored if s < top]
    if not below:
        return None
    return next(i for i, s in scored if s == top), max(below, key=lambda item: item[1])[0]


def tier_pair(scores: Scores, lengths: Sequence[int], keep: Sequence[int], *, rho: float) -> tuple[int, int] | None:
    """The shortest response of the top tier against the longest of the bottom tier. Meta-Rewarding, Wu et al. 2024.

    Tiers: scores in ``[(1 - rho) best + rho worst, best]`` and ``[worst, (1 - rho) worst + rho best]``; rho < 1/2 keeps
    them apart. None where all scores tie.
    """
    scored = _scored(scores, keep)
    if not scored:
        return None
    best, worst = max(s for _, s in scored), min(s for _, s in scored)
    if best == worst:
        return None
    top = [i for i, s in scored if s >= (1 - rho) * best + rho * worst]
    bottom = [i for i, s in scored if s <= (1 - rho) * worst + rho * best]
    return min(top, key=lambda i: lengths[i]), max(bottom, key=lambda i: lengths[i])


def win_rate_choice(preferences: np.ndarray, keep: Sequence[int]) -> Choice | None:
    """Best against worst by mean win rate over the other responses [N, N]. SPPO (targets), DNO and INPO.

    targets: mean win rate - 1/2 of each; soft_label: probability that the one beats the other. None where all tie.
    """
    kept = np.asarray(keep, dtype=np.int64)
    rates = win_rates(preferences[np.ix_(kept, kept)])  # [len(keep)]
    if not len(kept) or rates.max() - rates.min() < 1e-9:
        return None
    best, worst = int(rates.argmax()), int(rates.argmin())
    targets = float(rates[best]) - 0.5, float(rates[worst]) - 0.5
    chosen, rejected = int(kept[best]), int(kept[worst])
    beats = float(preferences[chosen, rejected])
    return Choice((chosen, rejected), soft_label=beats, margin=targets[0] - targets[1], targets=targets)


def score_preferences(scores: Scores, scale: float | None = None) -> np.ndarray:
    """[N, N] ``preference_matrix`` of scores, None being as good as the worst."""
    known = [s for s in scores if s is not None]
    lowest = min(known, default=0.0)
    return preference_matrix([lowest if s is None else s for s in scores], scale)


def gold_pairs(keep: Sequence[int], *, limit: int) -> list[tuple[int, int]]:
    """The data's own response against the model's. SPIN, Chen et al. 2024."""
    return [(GOLD, i) for i in keep[:limit]]


def unpaired(rewards: Scores, keep: Sequence[int], *, threshold: float, limit: int) -> list[Choice]:
    """Winners as chosen and losers as rejected of tuples of one, at most ``limit`` of each. KTO."""
    winners, losers = sides(rewards, keep, threshold)
    return [Choice((i, None)) for i in winners[:limit]] + [Choice((None, i)) for i in losers[:limit]]


def ranked_list(scores: Scores, keep: Sequence[int], *, limit: int) -> Choice | None:
    """At most ``limit`` responses from best to worst, with gains from 1 to 0. LiPO. None where all scores tie.

    Where there are more, they are taken evenly from the whole ranking.
    """
    ranked = sorted(_scored(scores, keep), key=lambda item: -item[1])
    if len(ranked) > limit:
        ranked = [ranked[round(t * (len(ranked) - 1) / (limit - 1))] for t in range(limit)]
    if len(ranked) < 2 or ranked[0][1] == ranked[-1][1]:
        return None
    best, worst = ranked[0][1], ranked[-1][1]
    return Choice(tuple(i for i, _ in ranked), gains=tuple((s - worst) / (best - worst) for _, s in ranked))


def with_third(pair: tuple[int, int], keep: Sequence[int]) -> Choice:
    """A pair and the next other response of the same (reference) model. SELM, VPO."""
    others = [i for i in keep if i not in pair]
    later = [i for i in others if i > max(pair)]
    candidates: list[int | None] = [*later, *others, None]
    return Choice((*pair, candidates[0]))


def with_edits(pairs: Sequence[tuple[Member, ...]], texts: Sequence[str], gold: str | None = None) -> list[Choice]:
    """Each (winner, loser) and the winner against itself with an error put in: (w, l, w, edited w). RISE.

    ``(None, None, w)`` gives the second half alone. A winner without a number has no edit and keeps its pair. The part
    before the error is the same on both sides and cancels; RISE cuts its step pairs off behind the error.
    """
    choices = []
    for n, pair in enumerate(pairs):
        winner = pair[-1] if pair[0] is None else pair[0]
        text = gold if winner == GOLD else texts[winner] if isinstance(winner, int) else None
        edited = None if text is None else edit_number(text, n)
        if edited is not None:
            choices.append(Choice((*pair[:2], winner, edited)))
        elif pair[0] is not None:
            choices.append(Choice((*pair[:2], None, None)))
    return choices


def edit_number(text: str, seed: int) -> str | None:
    """``text`` with one of its numbers off by 1 to 9, what stands behind it unchanged; None where it has none.

    RISE (Xu et al. 2024) has a model inject subtle errors, most of them in numbers; this one does without a model.
    """
    rng = random.Random(f"edit/{seed}/{text}")
    spans = _number_spans(text)
    if not spans:
        return None
    start, end = rng.choice(spans)
    value = int(text[start:end])
    off = rng.choice([d for d in range(-9, 10) if d and value + d >= 0])
    return f"{text[:start]}{value + off}{text[end:]}"


def _number_spans(text: str) -> list[tuple[int, int]]:
    spans, start = [], None
    for at, character in enumerate(text + " "):
        if character in "0123456789":
            start = at if start is None else start
        elif start is not None:
            spans.append((start, at))
            start = None
    return spans


def judgement_pair(wins: np.ndarray) -> tuple[int, int] | None:
    """The judgements with the highest and the lowest Elo of a meta-judge's wins [N, N]; None where all tie."""
    ratings = elo(wins)
    best, worst = int(ratings.argmax()), int(ratings.argmin())
    return (best, worst) if ratings[best] - ratings[worst] > 1e-6 else None


def most_varied(judgements: Sequence[Sequence[float | None]], number: int) -> list[int]:
    """The ``number`` responses whose judgements vary most, without those that do not vary. Meta-Rewarding."""
    known = [[s for s in scores if s is not None] for scores in judgements]
    variance = [float(np.var(scores)) if scores else 0.0 for scores in known]
    ranked = sorted(range(len(known)), key=lambda i: -variance[i])
    return [i for i in ranked[:number] if variance[i] > 0]


def verdict_pairs(verdicts: Sequence[str | None], right: str, *, limit: int) -> list[tuple[int, int | None]]:
    """(right judgement, wrong one or None) by rejection sampling: judgements whose verdict is known to be right.

    Where no judgement is wrong the right ones stand alone. Self-Taught Evaluator, Wang et al. 2024.
    """
    winners = [i for i, v in enumerate(verdicts) if v == right]
    losers = [i for i, v in enumerate(verdicts) if v is not None and v != right]
    if winners and not losers:
        return [(i, None) for i in winners[:limit]]
    return [*zip_cyclic(winners, losers, limit)]
