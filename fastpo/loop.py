"""The loop: sample -> reward -> pairs -> reference log-probs -> train -> evaluate, iteration after iteration.

Every stage is a function of the artefacts before it and of the config, writes its own artefact atomically and is
skipped where that is there. So a run killed anywhere and started again gives the same files, bit for bit, as one never
killed.

    DIR/config.yaml  inputs.json                   what is run, and digests of the files it reads
    DIR/warm_start/  {tokenizer/, training.jsonl, model/, evaluation.json}           M_0
    DIR/iteration_k/ {samples.jsonl, rewards.jsonl, pairs.jsonl, reference.safetensors, training.jsonl, metrics.json,
                      model/, evaluation.json}                                        M_k, from M_(k-1), its reference
    DIR/timings.jsonl  tensorboard/  report.html   what was watched: not part of the promise

Under ``accelerate launch`` sampling and scoring are shared out among the processes and the main one writes; all of
them need to see the same DIR.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastpo import stages
from fastpo.artifacts import read_jsonl, read_tensors, write_json, write_jsonl, write_tensors
from fastpo.checks import check, iterations_of, judges, read_inputs
from fastpo.collect import Collector
from fastpo.config import Config
from fastpo.console import Display
from fastpo.data import (
    Codec,
    Prompt,
    evaluation_prompts,
    load_demonstrations,
    load_preferences,
)
from fastpo.judges import check_judge
from fastpo.models import PromptResponse, onednn_matmul
from fastpo.pairs import PairRecord
from fastpo.references import (
    TOKEN_COLUMNS,
    Reference,
    fitting_contrasts,
    needs_kl,
    num_passes,
    reference_tensors,
    responses_of,
    split_by_key,
)
from fastpo.results import result_row
from fastpo.rewards import load_reward
from fastpo.run import Run, context_of
from fastpo.sharing import sharing_scorer
from fastpo.tracking import Tracker
from fastpo.training import Record, TrainConfig, train_preference, train_sft

Row = dict[str, Any]


class Loop:
    """A run, stage by stage. Built cheaply and checked: what is wrong with the config is said before any work."""

    def __init__(self, config: Config, display: Display):
        check(config)
        self.config = config
        self.display = display
        self.objective = stages.build_objective(config)
        self.reward = load_reward(config.reward)
        self.context = context_of(config)
        self.run = Run(config, display)
        self.tracker = Tracker(self.run.directory, enabled=config.tensorboard and self.run.main)

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.run.tokenizer(), self.config, self.context)

    @cached_property
    def collector(self) -> Collector:
        return Collector(self.run, self.codec, self.reward)

    @cached_property
    def given_pairs(self) -> list[PairRecord]:
        return fitting_contrasts(self._pairs_of(self.config.preferences), self.codec)

    @cached_property
    def heldout_pairs(self) -> list[PairRecord]:
        return self._pairs_of(self.config.eval_preferences)

    def _pairs_of(self, path: str | None) -> list[PairRecord]:
        return stages.preference_records(load_preferences(path, self.config), self.codec) if path else []

    def train(self) -> None:
        """Everything up to ``iterations``; finished stages are skipped."""
        read_inputs(self.config)
        self.run.open()
        self.check_data()
        self.warm_start()
        if self.config.sharing and iterations_of(self.config) > 0:
            sharing_scorer(self.run.model(0))  # refuses a model that cannot share before anything is sampled
        self.evaluate(0)
        self.show_results(0)
        for iteration in range(1, iterations_of(self.config) + 1):
            if not self.run.has(self.folder(iteration) / "evaluation.json"):
                self.iterate(iteration)
            self.show_results(iteration)

    def iterate(self, iteration: int) -> None:
        pairs, counts = self.pairs(iteration)
        reference = self.reference(iteration, pairs)
        self.train_on(iteration, pairs, reference, counts)
        self.evaluate(iteration, pairs, reference)

    def folder(self, iteration: int) -> Path:
        return self.run.folder(iteration)

    def check_data(self) -> None:
        """Tokenises the given pairs, the first prompts, what a judge is asked: what does not fit stops the run here."""
        _ = self.given_pairs, self.heldout_pairs
        if self.config.data:
            self.collector.prompts(1)
        self.codec.fitting_prompts(evaluation_prompts(self.config))
        if judges(self.config):
            check_judge(self.collector.judge_codec)

    def warm_start(self) -> None:
        """M_0: a built model or the given one after supervised steps. Nothing to do without either."""
        folder = self.folder(0)
        if self.run.model_path(0) != folder / "model":
            return
        if self.run.has(folder / "model"):
            self._drop_checkpoints(folder)
            return
        with self.run.timed("warm_start/model"):
            model = self.run.build_model(self.codec.tokenizer)
            examples = self.demonstrations()
            if examples and self.config.warm_start_steps:
                settings = TrainConfig(
                    learning_rate=self.config.warm_start_learning_rate,
                    batch_size=self.config.warm_start_batch_size,
                    max_steps=self.config.warm_start_steps,
                    num_epochs=None,
                    warmup_steps=self.config.warm_start_steps // 20,
                    **self._shared_settings("warm_start"),
                )
                with self.display.progress("warm start", self.config.warm_start_steps) as bar:
                    history = train_sft(
                        model,
                        examples,
                        config=settings,
                        output_dir=folder,
                        accelerator=self.run.accelerator,
                        log=lambda record: self._log_step(bar, "warm_start", record),
                    )
                self._write_history(folder, history)
            self.run.save_model(folder / "model", model, self.codec.tokenizer)
            self._drop_checkpoints(folder)

    def demonstrations(self) -> list[PromptResponse]:
        """Tokenised; those longer than the context are refused or skipped."""
        rows = load_demonstrations(self.config)
        examples = [(self.codec.prompt_ids(row.prompt), self.codec.response_ids(row.response)) for row in rows]
        numbered = list(enumerate(examples, start=1))
        lengths = [len(prompt) + len(response) for prompt, response in examples]
        return [e for _, e in self.codec.fitting(numbered, lengths, lambda n: f"demonstration {n[0]}")] if rows else []

    def pairs(self, iteration: int) -> tuple[list[PairRecord], Row]:
        """The pairs to train on, and what is to be said of them."""
        if self.config.preferences and iteration == 1:
            return self.given_pairs, {"pairs": len(self.given_pairs)}
        return self.collector.pairs(iteration)

    def reference(self, iteration: int, pairs: Sequence[PairRecord]) -> Reference | None:
        """What training needs of M_(k-1), of each distinct response of the pairs; None without reference."""
        if self.objective.ref_coef == 0:
            return None
        path = self.folder(iteration) / "reference.safetensors"
        responses = responses_of(pairs)
        if not self.run.has(path):
            name = f"iteration {iteration}: reference"
            total = len(responses) * num_passes(self.objective, self.config, iteration)
            with self.run.timed(f"iteration_{iteration}/reference"), self.display.progress(name, total) as bar:
                of = self.objective, self.run.model, iteration, self.codec, self.run.accelerator
                found = reference_tensors(pairs, *of, bar.advance)
                with self.run.on_main() as main:
                    if main:
                        write_tensors(path, found)
        packed = read_tensors(path)
        columns = {name: split_by_key(responses, packed, name) for name in TOKEN_COLUMNS if name in packed}
        return Reference(split_by_key(responses, packed), columns)

    def train_on(self, iteration: int, pairs: list[PairRecord], reference: Reference | None, counts: Row) -> None:
        folder = self.folder(iteration)
        if self.run.has(folder / "model"):
            self._drop_checkpoints(folder)
            return
        with self.run.timed(f"iteration_{iteration}/model"):
            settings = TrainConfig(
                learning_rate=self.config.learning_rate,
                batch_size=self.config.batch_size,
                max_steps=self.config.max_steps,
                num_epochs=self.config.num_epochs,
                lr_schedule=self.config.lr_schedule,
                warmup_steps=self.config.warmup_steps,
                weight_decay=self.config.weight_decay,
                **self._shared_settings(f"iteration_{iteration}"),
            )
            if reference is not None and needs_kl(self.objective):
                reference = replace(reference, model=self.run.reference_model(iteration - 1))
            model = self.run.take_model(iteration - 1)
            name = f"iteration {iteration}: training"
            with self.display.progress(name, settings.num_steps(len(pairs))) as bar:
                history = train_preference(
                    model,
                    pairs,
                    reference,
                    objective=self.objective,
                    config=settings,
                    output_dir=folder,
                    accelerator=self.run.accelerator,
                    log=lambda record: self._log_step(bar, f"iteration_{iteration}", record),
                )
            self._write_history(folder, history)
            with self.run.on_main() as main:
                if main:
                    write_json(folder / "metrics.json", {**counts, "training": last_steps(history)})
            self.run.save_model(folder / "model", model, self.codec.tokenizer)
            self._drop_checkpoints(folder)

    def evaluate(self, iteration: int, pairs: Sequence[PairRecord] = (), reference: Reference | None = None) -> None:
        """evaluation.json: greedy answers to held-out problems, held-out pairs, some training pairs scored again."""
        path = self.folder(iteration) / "evaluation.json"
        if self.run.has(path):
            return
        with self.run.timed(f"{path.parent.name}/evaluation"):
            found = {**self._held_out_problems(iteration), **self._held_out_pairs(iteration)}
            if pairs and self.config.eval_pairs:
                found |= self._training_pairs(iteration, pairs, reference)
            with self.run.on_main() as main:
                if main:
                    write_json(path, found)

    def _held_out_problems(self, iteration: int) -> Row:
        prompts = self.codec.fitting_prompts(evaluation_prompts(self.config))
        if not prompts:
            return {}
        model = self.run.model(iteration)
        path = self.folder(iteration) / "evaluation.jsonl"
        with self.display.progress(f"{path.parent.name.replace('_', ' ')}: evaluation", len(prompts)) as bar:

            def compute(_: int, part: Sequence[Prompt]) -> list[Row]:
                return stages.sample(
                    model,
                    part,
                    self.codec,
                    num_samples=1,
                    temperature=0.0,
                    seed=0,
                    accelerator=self.run.accelerator,
                    progress=bar.advance,
                )

            if not self.run.has(path):
                self.run.parts(path, prompts, max(self.config.sample_chunk, self.config.sample_batch_size), compute)
        samples = read_jsonl(path)
        rewards = stages.score(samples, self.collector.scorer(samples, optional=True))
        summary = stages.evaluation_summary(samples, rewards, self.config)
        greedy = [(row["prompt_ids"], row["responses"][0]["ids"]) for row in samples]
        return {**summary, **stages.token_statistics(model, greedy, self.config, self.run.accelerator)}

    def _held_out_pairs(self, iteration: int) -> Row:
        if not self.heldout_pairs:
            return {}
        responses = responses_of(self.heldout_pairs)
        packed = stages.packed_logps(self.run.model(iteration), responses, self.config, self.run.accelerator)
        summary = stages.pair_summary(self.heldout_pairs, split_by_key(responses, packed))
        return {f"heldout_{name}": value for name, value in summary.items()}

    def _training_pairs(self, iteration: int, pairs: Sequence[PairRecord], reference: Reference | None) -> Row:
        """The same pairs before (reference) and after training: does the chosen log-prob hold?"""
        some = [pairs[i * len(pairs) // n] for n in [min(len(pairs), self.config.eval_pairs)] for i in range(n)]
        responses = responses_of(some)
        packed = stages.packed_logps(self.run.model(iteration), responses, self.config, self.run.accelerator)
        found = stages.pair_summary(some, split_by_key(responses, packed))
        if reference is not None:
            found |= {f"{name}_before": value for name, value in stages.pair_summary(some, reference.logps).items()}
        return {f"pairs_{name}": value for name, value in found.items()}

    def _shared_settings(self, stage: str) -> Row:
        return {
            "max_grad_norm": self.config.max_grad_norm,
            "micro_batch_tokens": self.config.micro_batch_tokens,
            "gradient_checkpointing": self.config.gradient_checkpointing,
            "sharing": self.config.sharing,
            "batch_by": self.config.batch_by,
            "checkpoint_steps": self.config.checkpoint_steps,
            "seed": stages.derive_seed(self.config.seed, "train", stage),
        }

    def _log_step(self, bar: Any, stage: str, record: Record) -> None:
        bar.advance(int(record["step"]) - bar.done, f"loss {record['loss']:.3f}")
        self.tracker.step(stage, record)

    def _write_history(self, folder: Path, history: Sequence[Record]) -> None:
        with self.run.on_main() as main:
            if main:
                write_jsonl(folder / "training.jsonl", history)

    def _drop_checkpoints(self, folder: Path) -> None:
        with self.run.on_main() as main:
            if main:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def show_results(self, iteration: int) -> None:
        if self.run.main:
            rows = [result_row(self.run.directory, k) for k in range(iteration + 1)]
            self.display.results(rows)
            self.tracker.iteration(iteration, rows[-1])


def train(config: Config, display: Display) -> None:
    """The whole run into ``config.output_dir``."""
    loop = Loop(config, display)
    try:
        with onednn_matmul() if config.data == "embedded" else nullcontext():
            loop.train()
    finally:
        loop.tracker.close()


def last_steps(history: Sequence[Record]) -> Record:
    """Means over the last tenth of the steps."""
    tail = history[-max(1, len(history) // 10) :]
    names = [n for n in tail[0] if n not in ("step", "num_steps", "learning_rate")] if tail else []
    return {"steps": len(history), **{n: sum(r[n] for r in tail) / len(tail) for n in names}}
