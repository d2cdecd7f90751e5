"""What models say of samples, as columns of rewards.jsonl beside the reward: grades, win rates, implicit rewards.

Each function takes rows of samples.jsonl and returns a row of columns for each, in order: ``scores`` is what pairs are
chosen by in place of the reward.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import permutations
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from fastpo import embedded
from fastpo.config import Config
from fastpo.data import Codec
from fastpo.judges import Judge, Rubric, mean_known, rubric
from fastpo.models import PromptResponse, response_logps
from fastpo.pair_rules import judgement_pair, most_varied, verdict_pairs
from fastpo.reward_rules import implicit_rewards
from fastpo.sharing import tree_response_logps
from fastpo.statistics import kendall_tau, win_rates

Row = dict[str, Any]
Progress = Callable[[int], None]
_PERTURB = """\
Write a question that is similar to the one below but different enough that its answer would be wrong for it. Write \
the question only.

{prompt}"""


def visible(text: str, marker: str | None) -> str:
    """The part of a response that is judged: from the last ``marker`` on, behind its thought; all of it without one."""
    return text if marker is None or marker not in text else text[text.rindex(marker) :]


def visible_lengths(row: Row, codec: Codec) -> Row:
    """``lengths``: tokens of the part of each response that is judged."""
    marker = codec.config.answer_marker
    return {"lengths": [len(codec.response_ids(visible(r["text"], marker))) - 1 for r in row["responses"]]}


def graded(rows: Sequence[Row], judge: Judge, seed: int, progress: Progress | None = None) -> list[Row]:
    """``scores``: the judge's mean grade of each response, 0 to 5; in text mode ``judgements`` too, what it wrote.

    Self-Rewarding, Yuan et al. 2024: the model grades its own responses.
    """
    config, asked = judge.codec.config, rubric("grade", judge.codec.config)
    prompts = [
        asked.ask(prompt=_text(row), response=visible(r["text"], config.answer_marker))
        for row in rows
        for r in row["responses"]
    ]
    if config.judge_mode == "labels":
        found: list[Row] = [{"scores": value} for value in judge.expected(prompts, asked, progress)]
    else:
        texts = judge.sampled(prompts, config.judge_samples, seed=seed, progress=progress)
        found = [{"scores": mean_known([asked.read(t) for t in each]), "judgements": each} for each in texts]
    return _by_row(rows, found)


def duelled(rows: Sequence[Row], judge: Judge, seed: int, progress: Progress | None = None) -> list[Row]:
    """``preferences`` [N][N], how probable it is that i beats j, and ``scores``, the mean win rates.

    Every pair is judged in both orders, which takes the judge's bias for a place out. N (N - 1) judgements per prompt.
    """
    asked = rubric("duel", judge.codec.config)
    marker = judge.codec.config.answer_marker
    prompts, places = [], []
    for at, row in enumerate(rows):
        texts = [visible(r["text"], marker) for r in row["responses"]]
        for i, j in permutations(range(len(texts)), 2):
            prompts.append(asked.ask(prompt=_text(row), first=texts[i], second=texts[j]))
            places.append((at, i, j))
    matrices = [np.full((len(row["responses"]),) * 2, 0.5) for row in rows]
    for (at, i, j), value in zip(places, judge.opinions(prompts, asked, seed=seed, progress=progress), strict=True):
        matrices[at][i, j] = 0.5 if value is None else value
    even = [(m + 1 - m.T) / 2 for m in matrices]
    return [{"scores": win_rates(m).tolist(), "preferences": m.tolist()} for m in even]


def implicit(
    rows: Sequence[Row],
    load: Callable[[int], PreTrainedModel],
    codec: Codec,
    iteration: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Row]:
    """``scores``: the implicit reward of each response under M_(k-1), its log-ratio to M_0; ``consistency``: Kendall's
    tau between that ranking and the one of M_(k-2), where there is one. CREAM, Wang et al. 2024.

    M_0 has no log-ratio to itself: its ranking is by mean log-prob.

    Args:
        load: j -> M_j, asked for each needed j once.
        autocast: what their forwards run under.
    """
    wanted = {0, iteration - 1, max(iteration - 2, 0)}
    sequences = [(row["prompt_ids"], r["ids"]) for row in rows for r in row["responses"]]
    lengths = np.array([len(ids) for _, ids in sequences])
    sums = {}
    for j in sorted(wanted):
        with autocast():
            sums[j] = _summed_logps(load(j), sequences, codec.config)

    def ranking(j: int) -> np.ndarray:
        return implicit_rewards(sums[j], sums[0]) if j else sums[0] / lengths

    now, before = ranking(iteration - 1), ranking(max(iteration - 2, 0))
    found = []
    start = 0
    for row in rows:
        part = slice(start, start := start + len(row["responses"]))
        columns: Row = {"scores": now[part].tolist()}
        if iteration > 1:
            columns["consistency"] = float(kendall_tau(now[part], before[part]))
        found.append(columns)
    return found


def _summed_logps(model: PreTrainedModel, sequences: Sequence[PromptResponse], config: Config) -> np.ndarray:
    """[S] fp64 log-probs of whole responses. In this process alone: the others are at other samples."""
    logps_of = tree_response_logps if config.sharing else response_logps
    logps, cu_seqlens = logps_of(model, sequences, micro_batch_tokens=config.micro_batch_tokens)
    return np.add.reduceat(logps.double().numpy(), cu_seqlens[:-1].numpy())


def meta_judged(rows: Sequence[Row], columns: Sequence[Row], judge: Judge, seed: int) -> list[Row]:
    """``judgement_pairs``: of the most disputed responses the judgement that a meta-judge rates highest and lowest.

    Meta-Rewarding, Wu et al. 2024: every two judgements of a response are compared, in both orders; Elo ranks them.

    Args:
        columns: what ``graded`` returned. Without judgements (labels mode) judge_samples of each response are sampled.
    """
    asked, meta = rubric("grade", judge.codec.config), rubric("meta", judge.codec.config)
    battles = []  # (row, prompt of the judgements, texts)
    judgements = [c["judgements"] for c in columns if "judgements" in c] or _judgements(rows, judge, asked, seed)
    for at, (row, written) in enumerate(zip(rows, judgements, strict=True)):
        grades = [[asked.read(text) for text in texts] for texts in written]
        for i in most_varied(grades, judge.codec.config.judge_pairs):
            texts = list(dict.fromkeys(t for t in written[i] if asked.read(t) is not None))
            battles.append((at, _text(row), row["responses"][i]["text"], texts))
    prompts, places = [], []
    for number, (_, prompt, response, texts) in enumerate(battles):
        for i, j in permutations(range(len(texts)), 2):
            prompts.append(meta.ask(prompt=prompt, response=response, first=texts[i], second=texts[j]))
            places.append((number, i, j))
    wins = [np.zeros((len(texts),) * 2) for *_, texts in battles]
    for (number, i, j), value in zip(places, judge.opinions(prompts, meta, seed=seed), strict=True):
        wins[number][i, j] += 0.5 if value is None else value
        wins[number][j, i] += 0.5 if value is None else 1 - value
    found: list[Row] = [{"judgement_pairs": []} for _ in rows]
    for (at, prompt, response, texts), won in zip(battles, wins, strict=True):
        pair = judgement_pair(won)
        if pair is not None:
            question = asked.ask(prompt=prompt, response=response)
            found[at]["judgement_pairs"].append(_judgement(question, texts[pair[0]], texts[pair[1]]))
    return found


def _judgements(rows: Sequence[Row], judge: Judge, asked: Rubric, seed: int) -> list[list[list[str]]]:
    """[row][response] -> sampled judgements."""
    prompts = [asked.ask(prompt=_text(row), response=r["text"]) for row in rows for r in row["responses"]]
    found = [{"judgements": texts} for texts in judge.sampled(prompts, judge.codec.config.judge_samples, seed=seed)]
    return [columns.get("judgements", []) for columns in _by_row(rows, found)]


def verdicts(rows: Sequence[Row], judge: Judge, limit: int, seed: int) -> list[Row]:
    """``judgement_pairs``: sampled judgements of two responses, the better of which is known.

    The worse one answers a perturbed instruction, so that nobody needs to label it; judgements with the right verdict
    are kept, against wrong ones. Self-Taught Evaluator, Wang et al. 2024. ``worse``: the response; ``judge_accuracy``.
    """
    codec, asked = judge.codec, rubric("duel", judge.codec.config)
    worse = _perturbed_responses(rows, judge, seed)
    rng = random.Random(f"places/{seed}")
    places = [rng.random() < 0.5 for _ in rows]
    prompts = []
    for row, bad, good_first in zip(rows, worse, places, strict=True):
        good = visible(row["responses"][0]["text"], codec.config.answer_marker)
        first, second = (good, bad) if good_first else (bad, good)
        prompts.append(asked.ask(prompt=_text(row), first=first, second=second))
    judgements = judge.sampled(prompts, codec.config.judge_samples, seed=seed)
    found = []
    for row, prompt, texts, bad, good_first in zip(rows, prompts, judgements, worse, places, strict=True):
        distinct = list(dict.fromkeys(texts))
        right = 1.0 if good_first else 0.0
        read = [asked.read(text) for text in texts]
        shown = [None if value is None else str(value) for value in map(asked.read, distinct)]
        pairs = verdict_pairs(shown, str(right), limit=limit) if row["responses"][0]["text"] != bad else []
        found.append(
            {
                "worse": bad,
                "judge_accuracy": sum(value == right for value in read) / len(read),
                "judgement_pairs": [
                    _judgement(prompt, distinct[i], None if j is None else distinct[j]) for i, j in pairs
                ],
            }
        )
    return found


def _perturbed_responses(rows: Sequence[Row], judge: Judge, seed: int) -> list[str]:
    """One response of the model to a changed version of each prompt."""
    longest = judge.codec.config.max_new_tokens
    if judge.codec.config.data == "embedded":
        asked = [embedded.perturbed(_text(row), seed) for row in rows]
    else:
        written = judge.sampled(
            [_PERTURB.replace("{prompt}", _text(row)) for row in rows], 1, seed=seed, max_new_tokens=longest
        )
        asked = [texts[0] for texts in written]
    return [texts[0] for texts in judge.sampled(asked, 1, seed=seed + 1, max_new_tokens=longest)]


def _judgement(prompt: str, chosen: str, rejected: str | None) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _text(row: Mapping[str, Any]) -> str:
    """A prompt as text; of messages the last one."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _by_row(rows: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """Columns per response as columns per row, each a list."""
    result, start = [], 0
    for row in rows:
        part = found[start : start + len(row["responses"])]
        start += len(row["responses"])
        names = part[0] if part else {}
        result.append({name: [columns[name] for columns in part] for name in names})
    return result
