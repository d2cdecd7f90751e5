"""Search as the first stage of an iteration: prompts -> search.jsonl -> pairs. Takes the place of samples and rewards.

A row of search.jsonl is a tree: ``{"id", "prompt", "row", "prompt_ids", "parent", "ids", "visits", "q", "value",
"prior", "terminal", "right", "process", "pairs", ...}``, the columns by node. A chunk of prompts is searched at once;
its search is saved every ``search_checkpoint_waves`` waves, and one that was killed goes on there with the same result
to the bit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpo import stages
from fastpo.artifacts import read_jsonl, write_jsonl
from fastpo.config import Config
from fastpo.console import Bar
from fastpo.data import Codec, Prompt
from fastpo.errors import RunError
from fastpo.pairs import PairRecord
from fastpo.rewards import RewardFn, Scorer
from fastpo.run import Run, parts_folder

from .engine import Search
from .nodes import Evaluate, Node, Step
from .pairs import SearchPair, process_targets, search_pairs
from .progress import Progress
from .sampler import StepSampler
from .settings import method_of
from .store import load_search, save_search
from .values import Likelihood, Outcome, Rollouts, SelfEvaluation, is_end

Row = dict[str, Any]


class SearchStage:
    """Makes the pairs of an iteration by tree search."""

    def __init__(self, run: Run, codec: Codec, reward: RewardFn):
        self.run, self.codec, self.reward = run, codec, reward
        self.config: Config = run.config
        self.method = method_of(self.config)

    def pairs(self, iteration: int, prompts: Sequence[Prompt]) -> tuple[list[PairRecord], Row]:
        """The pairs of an iteration, tokenised, and what is to be said of them."""
        rows = self.rows(iteration, prompts)
        pairs = [pair for row in rows for pair in row["pairs"]]
        summary = _summary(rows, len(pairs))
        if not pairs:
            raise RunError(
                f"iteration {iteration} has no pairs: {summary['search_solved']:.0%} of {len(rows)} trees hold a right "
                f"response, {summary['sample_accuracy']:.0%} of all responses are right; take prompts whose trees have "
                "both, or more search_simulations or search_width"
            )
        path = self.run.folder(iteration) / "pairs.jsonl"
        if not self.run.has(path):
            with self.run.on_main() as main:
                if main:
                    write_jsonl(path, pairs)
        records = [_record(pair) for pair in pairs]
        return self.codec.fitting(records, [r.longest for r in records], lambda r: f"pair {r.chosen_key}"), summary

    def rows(self, iteration: int, prompts: Sequence[Prompt]) -> list[Row]:
        path = self.run.folder(iteration) / "search.jsonl"
        if not self.run.has(path):
            model = self.run.model(iteration - 1)
            name = f"iteration {iteration}: search"
            with self.run.timed(f"iteration_{iteration}/search"), self.run.display.progress(name, len(prompts)) as bar:

                def compute(chunk: int, part: Sequence[Prompt]) -> list[Row]:
                    saved = parts_folder(path) / f"{chunk:05d}.safetensors"
                    return self._search_chunk(model, part, saved, iteration, chunk, bar)

                self.run.parts(path, prompts, self.config.sample_chunk, compute)
        return read_jsonl(path)

    def _search_chunk(
        self, model: PreTrainedModel, prompts: Sequence[Prompt], saved: Path, iteration: int, chunk: int, bar: Bar
    ) -> list[Row]:
        seed = stages.derive_seed(self.config.seed, "search", iteration, chunk)
        searcher = _Searcher(self, model, prompts, seed, self.config.at("temperature", iteration))
        search = searcher.search
        if saved.exists():
            load_search(search, saved)
            searcher.restore()
        every, last = self.config.search_checkpoint_waves, [0]

        def show(progress: Progress) -> None:
            done = len(prompts) * progress.done // progress.total
            bar.advance(done - last[0], str(progress))
            last[0] = done

        def save(search: Search) -> None:
            searcher.count()
            if search.counts.waves % every == 0:
                save_search(search, saved)

        with self.run.accelerator.autocast():
            search.run(progress=show, after_wave=save)
        for note in search.counts.notes():
            self.run.display.line(f"search: {note}")
        bar.advance(len(prompts) - last[0])
        return searcher.rows()


class _Searcher:
    """The search of one chunk with the callables that the config asks for."""

    def __init__(
        self, stage: SearchStage, model: PreTrainedModel, prompts: Sequence[Prompt], seed: int, temperature: float
    ):
        config, codec, method = stage.config, stage.codec, stage.method
        self.codec, self.prompts, self.config, self.method = codec, prompts, config, method
        self.scorer = Scorer(stage.reward, config.on_reward_error)
        tokenizer = codec.tokenizer
        steps = method.unit == "step"
        self.sampler = StepSampler(
            model,
            step_tokens=config.search_step_tokens if steps else config.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stop_ids=step_ends(tokenizer, config.search_step) if steps and config.search_step else (),
            temperature=temperature,
            top_p=config.top_p if temperature else 1.0,
            top_k=config.top_k if temperature else 0,
            seed=seed,
            batch_size=config.sample_batch_size,
            context=codec.context,
            cache_tokens=config.search_cache_tokens,
        )
        self.outcome = Outcome(method, self._reward, config.win_threshold)
        self.rollouts = Rollouts(self.outcome, self._complete, config.search_rollouts)
        once = Rollouts(self.outcome, self._complete, 1)
        self.search = Search(
            [codec.prompt_ids(p.text) for p in prompts],
            method,
            self.sampler if steps else _Refinements(self.sampler, codec, config.search_refine),
            self._evaluate(),
            is_terminal=lambda node: node.finished or len(node.response_ids) >= config.max_new_tokens,
            rollout=once if method.backup.rollout_mix else None,
            capacity=config.search_nodes,
            when_full=config.search_full,
        )
        self.once = once

    def _evaluate(self) -> Evaluate:
        name = self.method.value
        if name == "self":
            return SelfEvaluation(self.outcome, self._confidence, flat=self.method.name != "mcts_dpo")
        known: dict[str, Evaluate] = {"outcome": self.outcome, "rollout": self.rollouts, "likelihood": Likelihood()}
        return known[name]

    def _reward(self, prompt: int, response: Sequence[int]) -> float | None:
        row = self.prompts[prompt]
        text: Any = row.text
        return self.scorer(row.id, text, self.codec.text(response), row.row)

    def _complete(self, nodes: Sequence[Node], number: int) -> list[list[list[int]]]:
        return self.sampler.complete(nodes, number, self.config.max_new_tokens)

    def _confidence(self, nodes: Sequence[Node]) -> list[float]:
        tokenizer = self.codec.tokenizer
        question = tokenizer(self.config.search_question, add_special_tokens=False)["input_ids"]
        labels = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in self.config.search_labels]
        return self.sampler.label_set_prob(nodes, question, labels)

    def count(self) -> None:
        """Brings the search's counts up to date with what its values cost."""
        self.search.counts.rollout_tokens = self.rollouts.tokens + self.once.tokens

    def restore(self) -> None:
        self.rollouts.tokens = self.search.counts.rollout_tokens

    def rows(self) -> list[Row]:
        """The trees, with their pairs."""
        search, counts = self.search, self.search.counts
        pairs: list[list[SearchPair]] = [[] for _ in self.prompts]
        for pair in search_pairs(search, self.config.pairs_per_prompt, self.outcome.is_right):
            pairs[pair.tree].append(pair)
        columns = {name: search.column(name) for name in ("visits", "q", "value", "prior")}
        process = process_targets(search, self.outcome.is_right).tolist()
        rows = []
        for b, prompt in enumerate(self.prompts):
            nodes = [search.node(b, i) for i in range(len(search.steps[b]))]
            row = {
                "id": prompt.id,
                "prompt": prompt.text,
                "row": prompt.row,
                "prompt_ids": list(search.prompts[b]),
                "parent": search.parents[b],
                "ids": [[], *(list(step.ids) for step in search.steps[b][1:])],
                **{name: column[b] for name, column in columns.items()},
                "terminal": search.terminal[b],
                "right": [self.outcome.is_right(n) if is_end(n, self.method) else None for n in nodes],
                "process": process[b][: len(nodes)],
                "pairs": [_pair_row(prompt.id, pair) for pair in pairs[b]],
            }
            rows.append(row)
        if rows:  # of the whole chunk
            rows[0]["tokens"] = counts.tokens + counts.rollout_tokens
            rows[0]["waves"] = counts.waves
        return rows


class _Refinements:
    """Proposes whole answers: to the prompt, or with a template to the prompt and the parent's answer."""

    def __init__(self, sampler: StepSampler, codec: Codec, template: str | None):
        self.sampler, self.codec, self.template = sampler, codec, template
        self.forget = sampler.forget

    def __call__(self, nodes: Sequence[Node], widths: Sequence[int]) -> list[list[Step]]:
        contexts = [Node(n.prompt, n.node, self._context(n), n.children) for n in nodes]
        return self.sampler(contexts, widths)

    def _context(self, node: Node) -> tuple[Step, ...]:
        if self.template is None or node.depth == 0:
            return node.steps[:1]
        text = self.template.replace("{answer}", self.codec.text(node.steps[-1].ids))
        ids = self.codec.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (node.steps[0], Step(tuple(ids)))


def step_ends(tokenizer: PreTrainedTokenizerBase, delimiter: str) -> list[int]:
    """Ids of all tokens whose text holds ``delimiter``."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if delimiter in text]


def _pair_row(prompt_id: str, pair: SearchPair) -> Row:
    start = len(pair.prompt_ids)  # of the span: a node that stands in pairs of different contexts has a key in each
    return {
        "prompt": prompt_id,
        "chosen": f"{prompt_id}/{pair.chosen}@{start}",
        "rejected": f"{prompt_id}/{pair.rejected}@{start}",
        "weight": pair.weight,
        "soft_label": pair.soft_label,
        "margin": pair.margin,
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
    }


def _record(pair: Row) -> PairRecord:
    return PairRecord(
        prompt_ids=pair["prompt_ids"],
        chosen_ids=pair["chosen_ids"],
        rejected_ids=pair["rejected_ids"],
        weight=pair["weight"],
        chosen_key=pair["chosen"],
        rejected_key=pair["rejected"],
        soft_label=pair["soft_label"],
        margin=pair["margin"],
        group=pair["prompt"],
    )


def _summary(rows: Sequence[Row], pairs: int) -> Row:
    ends = [[right for right in row["right"] if right is not None] for row in rows]
    every = [right for tree in ends for right in tree]
    return {
        "prompts": len(rows),
        "pairs": pairs,
        "paired_prompts": sum(bool(row["pairs"]) for row in rows),
        "search_nodes": sum(len(row["parent"]) for row in rows),
        "search_tokens": sum(row.get("tokens", 0) for row in rows),
        "search_solved": sum(map(any, ends)) / max(1, len(rows)),
        "sample_accuracy": sum(every) / max(1, len(every)),
    }
