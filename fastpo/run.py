"""A run's directory and processes: which artefacts are there, who writes them, how long it took, what is loaded."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastpo import embedded
from fastpo.artifacts import (
    atomic_directory,
    file_digest,
    read_json,
    read_jsonl,
    temporary,
    write_json,
    write_jsonl,
    write_text,
)
from fastpo.config import Config, changed_keys
from fastpo.console import Display
from fastpo.data import load_demonstrations, load_preferences, load_prompts
from fastpo.errors import FastpoError
from fastpo.models import load_model, load_tokenizer, save_model
from fastpo.results import stage_folder
from fastpo.tiny import DEFAULT_CONTEXT, build_bpe_tokenizer, build_llama

Row = dict[str, Any]
Item = TypeVar("Item")
BUILT_MODELS = ("embedded", "tiny-llama")  # made here, untrained: they need a warm start
INPUT_KEYS = ("data", "eval_data", "preferences", "eval_preferences", "warm_start")


class Run:
    """Everything the stages of one run share."""

    def __init__(self, config: Config, display: Display):
        self.config = config
        self.display = display
        self.directory = Path(config.output_dir)
        self.accelerator = make_accelerator(config)
        self.main = self.accelerator.is_main_process
        self._loaded: tuple[Path | str, PreTrainedModel] | None = None
        self._judge: PreTrainedModel | None = None

    def open(self) -> None:
        """Makes the directory, or checks that it holds a run of the same config on the same input files.

        A directory without results yet takes any config: a run refused at its start can be given again, mended.
        """
        with self.on_main() as main:
            if not main:
                return
            digests = input_digests(self.config)
            if self._has_results():
                self._check_config()
                self._check_inputs(digests)
            else:
                shutil.rmtree(self.directory / "warm_start", ignore_errors=True)
            write_text(self.directory / "config.yaml", self.config.to_yaml())
            write_json(self.directory / "inputs.json", digests)

    def _has_results(self) -> bool:
        """Whether anything was computed that depends on the config: all but a tokenizer, which is made in a second."""
        folders = [self.directory / "warm_start", *self.directory.glob("iteration_*")]
        return any(p.name != "tokenizer" for folder in folders if folder.is_dir() for p in folder.iterdir())

    def _check_config(self) -> None:
        path = self.directory / "config.yaml"
        old = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        changes = changed_keys({**Config().to_dict(), **old}, self.config.to_dict())  # keys that it was without
        if changes:
            raise FastpoError(
                f"{self.directory} holds a run of another config ({'; '.join(changes)}): give the old values, or "
                "another output_dir"
            )

    def _check_inputs(self, digests: dict[str, str]) -> None:
        path = self.directory / "inputs.json"
        old = read_json(path) if path.is_file() else {}
        changed = [f"{key} ({getattr(self.config, key)})" for key in digests if old.get(key) != digests[key]]
        if changed:
            raise FastpoError(
                f"{', '.join(changed)} changed since the run in {self.directory} began: restore it, or give another "
                "output_dir"
            )

    def folder(self, iteration: int) -> Path:
        return self.directory / stage_folder(iteration)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    @contextmanager
    def on_main(self) -> Iterator[bool]:
        """The body's work is the main process's; the others wait. An error there stops all of them.

        Yields whether this process is the main one; the body of the others runs with nothing to do.
        """
        if self.accelerator.num_processes == 1:
            yield True
            return
        failure: list[BaseException | None] = [None]
        try:
            yield self.main
        except Exception as error:
            failure = [error]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]

    def has(self, path: Path) -> bool:
        """Whether an artefact is there: the same answer in every process. Parts that a kill left beside it go."""
        answer = [path.exists()]
        if self.main and answer[0]:
            shutil.rmtree(parts_folder(path), ignore_errors=True)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        return answer[0]

    def parts(
        self, path: Path, items: Sequence[Item], chunk: int, compute: Callable[[int, Sequence[Item]], list[Row]]
    ) -> None:
        """``path`` as the rows of ``compute(c, items of chunk c)`` for all chunks, each first kept in a part file.

        The chunks are dealt out among the processes. What is there of a killed run is not computed again.
        """
        folder = parts_folder(path)
        files = [folder / f"{c:05d}.jsonl" for c in range(-(-len(items) // chunk))]
        for c in range(self.accelerator.process_index, len(files), self.accelerator.num_processes):
            if not files[c].exists():
                write_jsonl(files[c], compute(c, items[c * chunk : (c + 1) * chunk]))
        self.barrier()
        with self.on_main() as main:
            if main:
                write_jsonl(path, (row for file in files for row in read_jsonl(file)))
                shutil.rmtree(folder, ignore_errors=True)

    def save_model(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Model and tokenizer as a directory that transformers loads."""
        with ExitStack() as stack:
            if self.main:
                stack.enter_context(atomic_directory(path))
            self.barrier()
            save_model(model, temporary(path), self.accelerator)
            if self.main:
                tokenizer.save_pretrained(temporary(path))
        self._loaded = None
        self.barrier()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Appends the seconds of a stage to timings.jsonl (main process)."""
        start = time.perf_counter()
        yield
        if self.main:
            with open(self.directory / "timings.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "seconds": round(time.perf_counter() - start, 3)}) + "\n")

    def model_path(self, iteration: int) -> Path | str:
        """Where M_k is; M_0 is the warm start's, or the given model itself."""
        if iteration > 0:
            return self.directory / f"iteration_{iteration}" / "model"
        return self.directory / "warm_start" / "model" if starts_here(self.config) else self.config.model

    def model(self, iteration: int) -> PreTrainedModel:
        """M_k on this process's device: what the files hold, also right after training, so resuming changes nothing."""
        path = self.model_path(iteration)
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None  # frees the old one before the new one is loaded
            attention = embedded.ATTENTION if self.config.data == "embedded" else None
            model = load_model(path, self.config.dtype, attention)
            self._loaded = (path, model.to(self.accelerator.device))
        return self._loaded[1]

    def judge(self, iteration: int) -> PreTrainedModel:
        """The model that judges the samples of ``iteration``: judge_model, or the one that wrote them."""
        if self.config.judge_model is None:
            return self.model(iteration - 1)
        if self._judge is None:
            self._judge = load_model(self.config.judge_model, self.config.dtype).to(self.accelerator.device)
        return self._judge

    def take_model(self, iteration: int) -> PreTrainedModel:
        """M_k to be trained: the next ``model`` call loads again."""
        model = self.model(iteration)
        self._loaded = None
        return model

    def reference_model(self, iteration: int) -> PreTrainedModel:
        """M_k once more, beside the one that is trained."""
        attention = embedded.ATTENTION if self.config.data == "embedded" else None
        model = load_model(self.model_path(iteration), self.config.dtype, attention)
        return model.to(self.accelerator.device).requires_grad_(False)

    def build_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model that the warm start trains: a built one, or the given one."""
        return self._new_model(tokenizer).to(self.accelerator.device)

    def _new_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if self.config.model == "embedded":
            return embedded.build_model(self.config.seed)
        if self.config.model == "tiny-llama":
            return build_llama(self.config, tokenizer)
        return load_model(self.config.model, self.config.dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's; for tiny-llama one trained on all given text, kept under warm_start/tokenizer."""
        if self.config.model == "embedded":
            return embedded.build_tokenizer()
        if self.config.model != "tiny-llama":
            return load_tokenizer(self.config.model)
        path = self.directory / "warm_start" / "tokenizer"
        if not self.has(path):
            with self.on_main() as main:
                if main:
                    trained = build_bpe_tokenizer(training_texts(self.config), self.config.vocab_size)
                    with atomic_directory(path) as folder:
                        trained.save_pretrained(folder)
        return load_tokenizer(path)


def input_digests(config: Config) -> dict[str, str]:
    """Key -> SHA-256 of each file that the config names."""
    files = {key: getattr(config, key) for key in INPUT_KEYS}
    return {key: file_digest(name) for key, name in files.items() if name not in (None, "embedded")}


def parts_folder(path: Path) -> Path:
    """Where the parts of ``path`` lie until they are all there."""
    return path.with_suffix(".parts")


def make_accelerator(config: Config) -> Accelerator:
    """Raises where ``accelerate launch`` was told another precision than the config has."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", config.mixed_precision)
    if launched not in ("no", config.mixed_precision):
        raise FastpoError(
            f"accelerate launch has mixed_precision {launched}, the config {config.mixed_precision}; give both the same"
        )
    return Accelerator(mixed_precision=config.mixed_precision)


def starts_here(config: Config) -> bool:
    """Whether the run makes its own M_0: a built model, or a warm start of the given one."""
    return config.model in BUILT_MODELS or config.warm_start is not None


def context_of(config: Config) -> int | None:
    """Longest prompt + response in tokens: the config's, capped by the model's."""
    if config.model == "tiny-llama":
        return config.context_length or DEFAULT_CONTEXT
    limit = model_context(config.model)
    if config.context_length and limit and config.context_length > limit:
        raise FastpoError(f"context_length is {config.context_length}; the model allows at most {limit}")
    return config.context_length or limit


def model_context(model: str) -> int | None:
    """Longest sequence that a model takes, from its config alone; FastpoError for a model that is not there."""
    if model == "embedded":
        return embedded.build_model(0).config.max_position_embeddings
    try:
        return getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise FastpoError(f"model {model} cannot be loaded: {str(error).splitlines()[0]}") from error


def training_texts(config: Config) -> list[str]:
    """All text that a run is given, for a tokenizer: demonstrations, preferences, prompts with their answers."""
    texts = [f"{d.prompt}\n{d.response}" for d in load_demonstrations(config)]
    if config.preferences:
        for preference in load_preferences(config.preferences, config):
            texts += [str(preference.prompt), preference.chosen, preference.rejected]
    if config.data not in (None, "embedded"):
        texts += [f"{p.text}\n{p.answer or ''}" for p in load_prompts(config)]
    if config.data == "embedded":
        texts += [f"{row['question']}\n{row['answer']}" for row in embedded.problems(config.seed, 1000, "train")]
    return texts
