"""The stages of an iteration as functions of models and rows, without files.

The loop gives them their inputs and writes what they return; the single commands (``fastpo sample`` ...) call the same.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from fastpo import embedded, objectives
from fastpo.config import Config
from fastpo.data import Codec, Preference, Prompt
from fastpo.errors import FastpoError
from fastpo.models import PromptResponse, ResponseScorer, collate, response_logps, split_by_tokens
from fastpo.objectives import Objective
from fastpo.pairs import COLUMNS, GOLD, RULES, SEARCHED, PairRecord, response_key
from fastpo.references import TOKEN_COLUMNS
from fastpo.rewards import Scorer, final_answer, gold_answer, same_answer, vote_key
from fastpo.sampling import generate
from fastpo.sharing import tree_response_logps

Row = dict[str, Any]
Progress = Callable[[int], None]
# What the loop can give an objective beyond log-probs, by the pair rule's column that it is made from.
SUPPLIED = {"weight": "pairs.weights", "soft_label": "pairs.soft_labels", "margin": "pairs.margins"}
SUPPLIED |= {"targets": "pairs.targets", "gains": "pairs.relevance"}
OTHER_MARGINS = {"kto": "kto_batch", "aot": "aot_unpaired"}  # what they take off is no gap of scores -> what to take


def derive_seed(seed: int, *names: str | int) -> int:
    """A 53-bit seed for one use, from the run's seed and the names of the use."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def build_objective(config: Config) -> Objective:
    """The preset with the config's settings. Raises where the pair rule does not make what it compares."""
    settings: Row = {key: value for key in ("beta", "alpha") if (value := getattr(config, key)) is not None}
    try:
        for setting in config.objective_settings:
            name, _, value = setting.partition("=")
            settings[name.strip()] = float(value)
        objective = objectives.by_name(config.objective, **settings)
    except ValueError as error:
        raise FastpoError(str(error)) from error
    rule = RULES[config.pair_rule] if config.search == "none" else SEARCHED
    columns = ("weight",) if config.preferences else ("weight", *rule.columns)
    supplied = {SUPPLIED[c] for c in columns} | {f"segments.{name}" for name in (*TOKEN_COLUMNS, "kl")}
    if config.search != "none":  # its pairs begin behind steps, which have no prompt to put another text into
        supplied.remove("segments.token_coefs")
    if config.reference_mix and not objective.needs_reference:
        raise FastpoError(
            f"reference_mix is {config.reference_mix}; it should be 0 with objective {config.objective}, which has no "
            "reference"
        )
    missing = sorted(set(objective.requires) - supplied)
    if missing:
        source = "preferences files" if config.preferences else f"pair_rule {config.pair_rule}"
        source = source if config.search == "none" else f"search {config.search}"
        raise FastpoError(f"objective {config.objective} needs {', '.join(missing)}, which {source} does not give")
    if objective.name in OTHER_MARGINS:
        raise FastpoError(
            f"objective {config.objective} needs margins of the reference, rules give those of scores; "
            f"{OTHER_MARGINS[objective.name]} makes its own"
        )
    if config.preferences and objective.num_members > 2:
        raise FastpoError(
            f"objective {config.objective} compares {objective.num_members} responses, preferences files hold two"
        )
    if rule.members and objective.num_members > rule.members:
        raise FastpoError(
            f"objective {config.objective} compares {objective.num_members} responses, pair_rule {config.pair_rule} "
            f"makes tuples of {rule.members}"
        )
    if rule.single and any(sum(c != 0 for c in term.coefs) != 1 for term in objective.terms):
        raise FastpoError(
            f"objective {config.objective} compares responses, pair_rule {config.pair_rule} makes single ones; "
            "kto_batch takes those"
        )
    return objective


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    codec: Codec,
    *,
    num_samples: int,
    temperature: float,
    seed: int,
    accelerator: Accelerator,
    progress: Progress | None = None,
) -> list[Row]:
    """Per prompt ``{"id", "prompt", "row", "prompt_ids", "responses": [{"text", "ids", "tokens", "finished"}]}``.

    ``ids`` end with the end of sequence where the response is finished; ``tokens`` does not count it.
    """
    config, tokenizer = codec.config, codec.tokenizer
    prompt_ids = [codec.prompt_ids(p.text) for p in prompts]
    with accelerator.autocast():
        responses = generate(
            model,
            prompt_ids,
            num_samples=num_samples,
            max_new_tokens=config.max_new_tokens,
            temperature=temperature,
            top_p=config.top_p if temperature else 1.0,
            top_k=config.top_k if temperature else 0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=seed,
            batch_size=config.sample_batch_size,
            progress=progress,
        )
    return [
        {
            "id": prompt.id,
            "prompt": prompt.text,
            "row": prompt.row,
            "prompt_ids": ids,
            "responses": [_response(r, codec) for r in samples],
        }
        for prompt, ids, samples in zip(prompts, prompt_ids, responses, strict=True)
    ]


def _response(ids: list[int], codec: Codec) -> Row:
    finished = bool(ids) and ids[-1] == codec.tokenizer.eos_token_id
    return {"text": codec.text(ids), "ids": ids, "tokens": len(ids) - finished, "finished": finished}


def score(samples: Iterable[Row], scorer: Scorer | None, progress: Progress | None = None) -> list[Row]:
    """``{"id", "rewards": [number or null], "answers": [vote or null]}`` per row of samples. No scorer, no rewards."""
    rows = []
    for sample_row in samples:
        texts = [response["text"] for response in sample_row["responses"]]
        prompt_id, prompt, data = sample_row["id"], sample_row["prompt"], sample_row["row"]
        rewards = [None if scorer is None else scorer(prompt_id, prompt, text, data) for text in texts]
        answers = [None if (a := final_answer(text)) is None else vote_key(a) for text in texts]
        rows.append({"id": prompt_id, "rewards": rewards, "answers": answers})
        if progress is not None:
            progress(1)
    return rows


def pair_records(pairs: Sequence[Row], samples: Sequence[Row], codec: Codec) -> list[PairRecord]:
    """Rows of pairs.jsonl with the tokens of the responses that their keys name."""
    by_id = {row["id"]: row for row in samples}
    return [_record(pair, by_id[pair["prompt"]], codec) for pair in pairs]


def with_mismatches(records: Sequence[PairRecord]) -> list[PairRecord]:
    """Each record with a third member: its prompt and the first response of the next record to another one. KTO."""
    result, number = [], len(records)
    for i, record in enumerate(records):
        order = (records[(i + step) % number] for step in range(1, number))
        other = next((r for r in order if r.prompt_ids != record.prompt_ids), None)
        third: tuple[str, list[int], list[int]] = ("", [], [])
        if other is not None:
            key, _, ids = other.present[0]
            third = (f"{record.present[0][0].rpartition('/')[0]}<{key}", record.prompt_ids, ids)
        result.append(replace(record, others=(third,)))
    return result


def _record(pair: Row, sample_row: Row, codec: Codec) -> PairRecord:
    texts = pair.get("texts", {})

    def ids(key: str | None) -> list[int]:
        if key is None:
            return []
        if key in texts:
            return codec.response_ids(texts[key])
        if key == response_key(sample_row["id"], GOLD):
            return codec.response_ids(sample_row["row"]["answer"])
        return sample_row["responses"][int(key.rpartition("/")[2])]["ids"]

    prompt = pair.get("prompt_text")
    prompt_ids = sample_row["prompt_ids"] if prompt is None else codec.prompt_ids(prompt)
    return PairRecord(
        prompt_ids=prompt_ids,
        chosen_ids=ids(pair["chosen"]),
        rejected_ids=ids(pair["rejected"]),
        weight=pair["weight"],
        chosen_key=pair["chosen"] or "",
        rejected_key=pair["rejected"] or "",
        others=tuple((key or "", prompt_ids, ids(key)) for key in pair.get("others", ())),
        meta={"prompt": sample_row["prompt"] if prompt is None else prompt},
        **{name: _as_tuple(pair[name]) for name in COLUMNS if name in pair},
    )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def preference_records(preferences: Sequence[Preference], codec: Codec) -> list[PairRecord]:
    """Given preferences, tokenised; equal responses to equal prompts share a key. too long ones raise or go."""
    keys: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    records = []
    for preference in preferences:
        prompt_ids = codec.prompt_ids(preference.prompt)
        chosen, rejected = codec.response_ids(preference.chosen), codec.response_ids(preference.rejected)
        prompt = tuple(prompt_ids)
        records.append(
            PairRecord(
                prompt_ids=prompt_ids,
                chosen_ids=chosen,
                rejected_ids=rejected,
                weight=preference.weight,
                chosen_key=keys.setdefault((prompt, tuple(chosen)), f"{preference.id}/chosen"),
                rejected_key=keys.setdefault((prompt, tuple(rejected)), f"{preference.id}/rejected"),
                meta={"id": preference.id, "prompt": preference.prompt},
            )
        )
    lengths = [len(r.prompt_ids) + max(len(r.chosen_ids), len(r.rejected_ids)) for r in records]
    return codec.fitting(records, lengths, lambda record: f"preference {record.meta['id']}")


def packed_logps(
    model: PreTrainedModel,
    responses: Mapping[str, PromptResponse],
    config: Config,
    accelerator: Accelerator,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """``{"logps": [T] fp32, "cu_seqlens": [S+1] int64}`` in the order of ``responses``, each scored once."""
    logps_of = tree_response_logps if config.sharing else response_logps
    logps, cu_seqlens = logps_of(
        model,
        list(responses.values()),
        micro_batch_tokens=config.micro_batch_tokens,
        accelerator=accelerator,
        progress=progress,
    )
    return {"logps": logps, "cu_seqlens": cu_seqlens}


def pair_summary(pairs: Sequence[PairRecord], logps: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over pairs of sequence and per-token log-probs, and the share ranked right, raw and per token.

    The ranking counts pairs with both members only.
    """
    chosen = {i: logps[p.chosen_key].sum() for i, p in enumerate(pairs) if p.chosen_ids}
    rejected = {i: logps[p.rejected_key].sum() for i, p in enumerate(pairs) if p.rejected_ids}
    chosen_mean = {i: value / len(pairs[i].chosen_ids) for i, value in chosen.items()}
    rejected_mean = {i: value / len(pairs[i].rejected_ids) for i, value in rejected.items()}
    both = [i for i in chosen if i in rejected]
    means = {
        "logps_chosen": list(chosen.values()),
        "logps_rejected": list(rejected.values()),
        "logps_per_token_chosen": list(chosen_mean.values()),
        "logps_per_token_rejected": list(rejected_mean.values()),
        "ranking_accuracy": [(chosen[i] > rejected[i]).float() for i in both],
        "ranking_accuracy_per_token": [(chosen_mean[i] > rejected_mean[i]).float() for i in both],
    }
    return {name: torch.stack(values).mean().item() for name, values in means.items() if values}


def evaluation_summary(samples: Sequence[Row], rewards: Sequence[Row], config: Config) -> dict[str, Any]:
    """What one greedy response per held-out problem shows; accuracy where it is rewarded; ``worked``: embedded task."""
    texts = [row["responses"][0] for row in samples]
    values = [row["rewards"][0] for row in rewards]
    summary: Row = {"problems": len(samples)}
    if any(v is not None for v in values):
        summary["accuracy"] = _mean([float(v is not None and v >= config.win_threshold) for v in values])
    summary |= {
        "answered": _mean([float(row["answers"][0] is not None) for row in rewards]),
        "finished": _mean([float(t["finished"]) for t in texts]),
        "tokens": _mean([t["tokens"] for t in texts]),
    }
    if "embedded" in (config.data, config.eval_data):
        summary["worked"] = _mean([float(embedded.is_worked(t["text"])) for t in texts])
    shown = zip(samples[: config.report_samples], values, strict=False)
    summary["examples"] = [
        {"prompt": row["prompt"], "response": row["responses"][0]["text"], "reward": value} for row, value in shown
    ]
    return summary


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@torch.no_grad()
def token_statistics(
    model: PreTrainedModel, sequences: Sequence[PromptResponse], config: Config, accelerator: Accelerator
) -> dict[str, float]:
    """Entropy, top-10 mass and top-10 entropy per response token, means over all tokens, under the accelerator's mixed
    precision. See fastpo.diagnostics."""
    sequences = [(prompt, response) for prompt, response in sequences if len(response)]
    if not sequences:
        return {}
    scorer = ResponseScorer(model)
    device = next(model.parameters()).device
    names = ("entropy", "topk_mass", "topk_entropy")
    sums, tokens = torch.zeros(len(names), dtype=torch.float64), 0
    lengths = [len(prompt) + len(response) - 1 for prompt, response in sequences]
    for group in split_by_tokens(lengths, config.micro_batch_tokens):
        batch = collate([sequences[i] for i in group]).to(device)
        with accelerator.autocast():
            _, stats = scorer(batch, functools.partial(batch.logps, stats=names))
        sums += torch.stack([stats[name].double().sum().cpu() for name in names])
        tokens += batch.labels.shape[0]
    return dict(zip(names, (sums / tokens).tolist(), strict=True))


def sample_accuracy(rewards: Sequence[Row], config: Config) -> float | None:
    """Share of all sampled responses that win; None where nothing was rewarded."""
    values = [v for row in rewards for v in row["rewards"] if v is not None]
    return _mean([float(v >= config.win_threshold) for v in values]) if values else None


def score_summary(rewards: Sequence[Row], config: Config) -> Row:
    """What is known of the scores that stand in for the reward: means, and how well they rank right above wrong.

    ``score_auc``: share of (winning, losing) responses to one prompt that they order as the reward does, ties half.
    """
    found: Row = {}
    for name in ("consistency", "judge_accuracy"):
        values = [row[name] for row in rewards if name in row]
        if values:
            found[name] = _mean(values)
    ordered = []
    for row in rewards:
        known = [
            (s, r >= config.win_threshold)
            for s, r in zip(row.get("scores", ()), row["rewards"], strict=False)
            if s is not None and r is not None
        ]
        right, wrong = ([s for s, won in known if won == side] for side in (True, False))
        ordered += [(a > b) + (a == b) / 2 for a in right for b in wrong]
    return found | ({"score_auc": _mean(ordered)} if ordered else {})


def majority_accuracy(samples: Sequence[Row], rewards: Sequence[Row]) -> float | None:
    """Share of prompts whose most voted answer is right (the first one where votes tie); None without gold answers."""
    hits = []
    for sample_row, row in zip(samples, rewards, strict=True):
        gold = gold_answer(sample_row["row"])
        votes = [a for a in row["answers"] if a is not None]
        if gold is None:
            return None
        hits.append(float(bool(votes) and same_answer(max(votes, key=votes.count), gold)))
    return _mean(hits)
