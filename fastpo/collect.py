"""From prompts to pairs: the first stages of an iteration, each an artefact. sample -> reward (and judge) -> pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from fastpo import signals, stages
from fastpo.artifacts import read_json, read_jsonl, write_json, write_jsonl
from fastpo.config import Config
from fastpo.data import Codec, Prompt, training_prompts
from fastpo.errors import RunError
from fastpo.judges import Judge
from fastpo.models import load_tokenizer
from fastpo.pairs import PairRecord, build_pairs, candidates, explain_no_pairs
from fastpo.references import contrast_texts, fitting_contrasts
from fastpo.rewards import RewardFn, Scorer
from fastpo.run import Run, model_context
from fastpo.search.stage import SearchStage
from fastpo.statistics import balance_scores

Row = dict[str, Any]
REWARD_CHUNK = 256  # prompts per part file of rewards: what a reward that raises costs at most


class Collector:
    """Makes the pairs of each iteration of a run."""

    def __init__(self, run: Run, codec: Codec, reward: RewardFn):
        self.run, self.codec, self.reward = run, codec, reward
        self.config: Config = run.config

    @cached_property
    def judge_codec(self) -> Codec:
        """The codec of who judges: judge_model's own tokenizer, where that is given."""
        name = self.config.judge_model
        return self.codec if name is None else Codec(load_tokenizer(name), self.config, model_context(name))

    def pairs(self, iteration: int) -> tuple[list[PairRecord], Row]:
        """The pairs of an iteration, tokenised, and what is to be said of them."""
        if self.config.search != "none":
            prompts = self.prompts(iteration)
            return SearchStage(self.run, self.codec, self.reward).pairs(iteration, prompts)
        samples = self.samples(iteration)
        rewards = self.rewards(iteration, samples)
        path = self.run.folder(iteration) / "pairs.jsonl"
        scan = self.scan(iteration)
        config = replace(self.config, win_threshold=scan["threshold"]) if scan else self.config
        rows, counts = build_pairs(samples, rewards, config, iteration)
        if not rows:
            raise RunError(explain_no_pairs(counts, self.config, iteration))
        if not self.run.has(path):
            with self.run.on_main() as main:
                if main:
                    write_jsonl(path, rows)
        found = {
            **{f"scan_{name}": value for name, value in scan.items() if name != "rows"},
            "sample_accuracy": stages.sample_accuracy(rewards, self.config),
            "majority_accuracy": stages.majority_accuracy(samples, rewards),
        }
        records = stages.pair_records(rows, samples, self.codec)
        if self.config.objective == "kto_batch":
            records = stages.with_mismatches(records)
        found |= stages.score_summary(rewards, self.config)
        records = self.codec.fitting(records, [r.longest for r in records], lambda r: f"pair {r.chosen_key}")
        return fitting_contrasts(records, self.codec), {**counts.to_dict(), **found}

    def samples(self, iteration: int) -> list[Row]:
        path = self.run.folder(iteration) / "samples.jsonl"
        if not self.run.has(path):
            prompts = self.prompts(iteration)
            model = self.run.model(iteration - 1)
            temperature = self.scan(iteration).get("temperature", self.config.at("temperature", iteration))
            name = f"iteration {iteration}: sampling"
            with self.run.timed(f"iteration_{iteration}/samples"), self.run.display.progress(name, len(prompts)) as bar:

                def compute(chunk: int, part: Sequence[Prompt]) -> list[Row]:
                    return stages.sample(
                        model,
                        part,
                        self.codec,
                        num_samples=self.config.num_samples,
                        temperature=temperature,
                        seed=stages.derive_seed(self.config.seed, "sample", iteration, chunk),
                        accelerator=self.run.accelerator,
                        progress=bar.advance,
                    )

                self.run.parts(path, prompts, self.config.sample_chunk, compute)
        return read_jsonl(path)

    def scan(self, iteration: int) -> Row:
        """The temperature and threshold with the best balance score on the first prompts (B-STaR); {} without a scan.

        ``rows``: the score of each temperature at each threshold. Kept as scan.json.
        """
        config = self.config
        if not config.temperature_scan:
            return {}
        path = self.run.folder(iteration) / "scan.json"
        if not self.run.has(path):
            prompts = self.prompts(iteration)[: config.scan_prompts]
            model = self.run.model(iteration - 1)
            thresholds = config.threshold_scan or [config.win_threshold]
            with self.run.timed(f"iteration_{iteration}/scan"), self.run.on_main() as main:
                if main:
                    rows = [self._balance(model, prompts, t, thresholds, iteration) for t in config.temperature_scan]
                    best = max(range(len(rows)), key=lambda i: max(rows[i]))
                    chosen = rows[best].index(max(rows[best]))
                    write_json(
                        path,
                        {
                            "temperature": config.temperature_scan[best],
                            "threshold": thresholds[chosen],
                            "balance": rows[best][chosen],
                            "rows": rows,
                        },
                    )
        return read_json(path)

    def _balance(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        temperature: float,
        thresholds: Sequence[float],
        iteration: int,
    ) -> list[float]:
        """Balance scores at the thresholds of samples at a temperature; repeated responses count once."""
        samples = stages.sample(
            model,
            prompts,
            self.codec,
            num_samples=self.config.num_samples,
            temperature=temperature,
            seed=stages.derive_seed(self.config.seed, "scan", iteration, str(temperature)),
            accelerator=self.run.accelerator,
        )
        rewards = np.full((len(samples), self.config.num_samples), -np.inf)
        scored = stages.score(samples, self.scorer(samples, optional=False))
        for p, (sample, row) in enumerate(zip(samples, scored, strict=True)):
            kept = candidates([r["text"] for r in sample["responses"]], [r["tokens"] for r in sample["responses"]]).keep
            known = [i for i in kept if row["rewards"][i] is not None]
            rewards[p, known] = [row["rewards"][i] for i in known]
        right = rewards >= self.config.win_threshold
        return balance_scores(rewards, right, thresholds).tolist()

    def prompts(self, iteration: int) -> list[Prompt]:
        """Those of an iteration that fit the context, whatever the reference puts them into."""
        prompts = self.codec.fitting_prompts(training_prompts(self.config, iteration))
        for number, text in enumerate(contrast_texts(self.config)):
            prompts = self.codec.fitting_prompts(prompts, text, f" inside contrast_prompts[{number}]")
        return prompts

    def rewards(self, iteration: int, samples: Sequence[Row]) -> list[Row]:
        path = self.run.folder(iteration) / "rewards.jsonl"
        if not self.run.has(path):
            scorer = self.scorer(samples, optional=not pairs_need_rewards(self.config))
            name = f"iteration {iteration}: rewards"
            with self.run.timed(f"iteration_{iteration}/rewards"), self.run.display.progress(name, len(samples)) as bar:

                def compute(chunk: int, part: Sequence[Row]) -> list[Row]:
                    rows = stages.score(part, scorer, progress=bar.advance)
                    for columns in self.signals(iteration, chunk, part):
                        rows = [{**row, **more} for row, more in zip(rows, columns, strict=True)]
                    return rows

                self.run.parts(path, samples, REWARD_CHUNK, compute)
            if scorer is not None and scorer.failures:
                self.run.display.line(
                    f"the reward raised on {scorer.failures} samples, the first: {scorer.first_failure}"
                )
        return read_jsonl(path)

    def signals(self, iteration: int, chunk: int, samples: Sequence[Row]) -> Iterator[list[Row]]:
        """Columns that models add to the rewards of some samples, as the config asks."""
        config = self.config
        if config.answer_marker is not None:
            yield [signals.visible_lengths(row, self.codec) for row in samples]
        if config.score_by == "implicit":
            yield signals.implicit(samples, self.run.model, self.codec, iteration, self.run.accelerator.autocast)
        if config.score_by in ("reward", "implicit") and config.pair_rule != "judgements":
            return
        judge = Judge(self.run.judge(iteration), self.judge_codec, self.run.accelerator.autocast)
        seed = stages.derive_seed(config.seed, "judge", iteration, chunk)
        if config.pair_rule == "judgements":
            yield signals.verdicts(samples, judge, config.pairs_per_prompt, seed)
        elif config.score_by == "duels":
            yield signals.duelled(samples, judge, seed)
        else:
            yield (columns := signals.graded(samples, judge, seed))
            if config.judge_pairs:
                yield signals.meta_judged(samples, columns, judge, seed)

    def scorer(self, samples: Sequence[Row], *, optional: bool) -> Scorer | None:
        """None where a reward is ``optional`` (votes, evaluation) and ``math`` has no answers to compare with."""
        unlabelled = self.config.reward == "math" and all(row["row"].get("answer") is None for row in samples)
        return None if optional and unlabelled else Scorer(self.reward, self.config.on_reward_error)


def pairs_need_rewards(config: Config) -> bool:
    """Whether the pair rule looks at the reward: not at votes, judgements or the data's own solutions."""
    return config.score_by == "reward" and config.pair_rule not in ("scpo", "spin", "judgements")
