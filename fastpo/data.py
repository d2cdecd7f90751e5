"""Reading what a user gives: prompts, demonstrations and preferences in JSONL, checked row by row, and their tokens.

Every complaint names file and line. With ``skip_bad`` such rows are left out and counted instead.
"""

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from fastpo import embedded
from fastpo.artifacts import StrPath, iter_jsonl
from fastpo.config import Config
from fastpo.errors import FastpoError, suggestion

log = logging.getLogger("fastpo")
Text = str | list[dict[str, str]]  # plain text, or messages {"role", "content"} for a chat template


@dataclass(frozen=True)
class Prompt:
    id: str  # the row's "id", else its line number
    text: Text
    answer: str | None  # the data's own solution
    row: dict[str, Any]  # the JSON object, handed to the reward


@dataclass(frozen=True)
class Demonstration:
    prompt: Text
    response: str


@dataclass(frozen=True)
class Preference:
    id: str
    prompt: Text
    chosen: str
    rejected: str
    weight: float = 1.0


Row = TypeVar("Row")
Item = TypeVar("Item")


def read_rows(
    path: StrPath, parse: Callable[[dict[str, Any], int], Row], *, skip_bad: bool = False
) -> tuple[list[Row], list[str]]:
    """(``parse(object, line)`` of every line, "file:line: why" of the skipped ones).

    Raises FastpoError at the first bad line unless ``skip_bad``, and for a file without a good one. ``parse`` raises
    ValueError with the reason for a row that does not fit.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    for number, value in iter_jsonl(path):
        try:
            if isinstance(value, str):
                raise ValueError(value)
            rows.append(parse(value, number))
        except ValueError as error:
            problem = f"{path}:{number}: {error}"
            if not skip_bad:
                raise FastpoError(f"{problem} (--skip_bad leaves such lines out and counts them)") from error
            skipped.append(problem)
    if skipped:
        log.warning("%s: skipped %d bad lines, the first: %s", path, len(skipped), skipped[0])
    if not rows:
        raise FastpoError(f"{path} holds no usable rows ({len(skipped)} bad lines)")
    return rows, skipped


def parse_prompt(row: dict[str, Any], line: int) -> Prompt:
    """``{"question" or "prompt", optional "answer", optional "id"}``; further keys go to the reward as they are."""
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise ValueError(f"'answer' is a {type(answer).__name__}, it should be text")
    answer = None if answer is None else str(answer)
    return Prompt(str(row.get("id", line)), _prompt(row), answer, row)


def parse_demonstration(row: dict[str, Any], line: int) -> Demonstration:
    """``{"question" or "prompt", "response" or "answer"}``."""
    return Demonstration(_prompt(row), _response(row, ("response", "answer")))


def parse_preference(row: dict[str, Any], line: int) -> Preference:
    """``{"prompt" or "question", "chosen", "rejected", optional "weight"}``; responses are text or one message."""
    chosen, rejected = _response(row, ("chosen",)), _response(row, ("rejected",))
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        raise ValueError(f"'weight' is {weight!r}, it should be a number >= 0")
    return Preference(str(row.get("id", line)), _prompt(row), chosen, rejected, float(weight))


def _pick(row: dict[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    wanted = " or ".join(map(repr, names))
    near = next((s for key in row if (s := suggestion(str(key), list(names)))), "")
    raise ValueError(f"no {wanted} (keys: {', '.join(map(str, row)) or 'none'}{near})")


def _prompt(row: dict[str, Any]) -> Text:
    value = _pick(row, ("prompt", "question"))
    if isinstance(value, list):
        return [_message(m, "prompt") for m in value] or _fail("'prompt' is empty")
    if not isinstance(value, str):
        raise ValueError(f"'prompt' is a {type(value).__name__}, it should be text or a list of messages")
    return value if value.strip() else _fail("'prompt' is empty")


def _response(row: dict[str, Any], names: Sequence[str]) -> str:
    value = _pick(row, names)
    if isinstance(value, list) and len(value) == 1:
        value = _message(value[0], names[0])["content"]
    if not isinstance(value, str):
        kind = f"list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise ValueError(f"{names[0]!r} is a {kind}, it should be text or a list of one message")
    return value if value.strip() else _fail(f"{names[0]!r} is an empty response")


def _message(value: Any, name: str) -> dict[str, str]:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f'{name!r} holds {value!r}, a message should be {{"role": text, "content": text}}')
    return {"role": role, "content": content}


def _fail(message: str) -> Any:
    raise ValueError(message)


def inside(text: str, prompt: Text) -> Text:
    """``text`` with ``prompt`` (of messages, the last one) in place of its {prompt}."""
    if isinstance(prompt, str):
        return text.replace("{prompt}", prompt)
    return [*prompt[:-1], {**prompt[-1], "content": text.replace("{prompt}", prompt[-1]["content"])}]


@dataclass(frozen=True)
class Codec:
    """Text to token ids and back, the same way everywhere: prompt ids + response ids + end of sequence."""

    tokenizer: PreTrainedTokenizerBase
    config: Config
    context: int | None  # longest prompt + response in tokens

    def prompt_text(self, prompt: Text) -> Text:
        if isinstance(prompt, list):
            return prompt
        return self.config.prompt_template.replace("{prompt}", prompt)

    def prompt_ids(self, prompt: Text) -> list[int]:
        """Tokens of a prompt in its template. Raises FastpoError for messages without a chat template."""
        text = self.prompt_text(prompt)
        if self.config.chat_template:
            if not self.tokenizer.chat_template:
                raise FastpoError("chat_template is set, but the model's tokenizer has none; leave it out")
            messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if isinstance(text, list):
            raise FastpoError("the prompts are lists of messages; they need --chat_template")
        return list(self.tokenizer(text)["input_ids"])

    def response_ids(self, response: str) -> list[int]:
        """Tokens of a response and the end of sequence."""
        return [*self.tokenizer(response, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def fitting_prompts(self, prompts: Sequence[Prompt], text: str = "{prompt}", where: str = "") -> list[Prompt]:
        """``prompts`` that fit with max_new_tokens behind them, each put into ``text``, which ``where`` names."""
        lengths = [len(self.prompt_ids(inside(text, p.text))) for p in prompts]
        return self.fitting(prompts, lengths, lambda p: f"prompt {p.id}{where}", room=self.config.max_new_tokens)

    def fitting(
        self, items: Sequence[Item], lengths: Sequence[int], name: Callable[[Item], str], room: int = 0
    ) -> list[Item]:
        """``items`` whose ``lengths`` + ``room`` tokens fit the context; others raise, with skip_bad they go."""
        if self.context is None:
            return list(items)
        if room >= self.context:
            raise FastpoError(f"max_new_tokens is {room}; it should be below {self.context}, the context")
        fits: list[tuple[Item, int]] = []
        too_long: list[tuple[Item, int]] = []
        for item, length in zip(items, lengths, strict=True):
            (fits if length + room <= self.context else too_long).append((item, length))
        problem = ""
        if too_long:
            item, length = too_long[0]
            extra = f" with max_new_tokens {room}" if room else ""
            problem = (
                f"{name(item)} has {length} tokens{extra}; "
                f"the context is {self.context}, so it should have at most {self.context - room}"
            )
            if not self.config.skip_bad:
                raise FastpoError(f"{problem} (--skip_bad leaves such rows out and counts them)")
            log.warning("skipped %d of %d that are too long, the first: %s", len(too_long), len(items), problem)
        if items and not fits:
            raise FastpoError(f"nothing fits the context of {self.context} tokens: {problem}")
        return [item for item, _ in fits]


def load_prompts(config: Config) -> list[Prompt]:
    """All of ``data`` from a file (the embedded task makes its prompts per iteration)."""
    if config.data is None:
        raise FastpoError("data is missing; it should be a JSONL file of prompts, or 'embedded'")
    return _unique(read_rows(config.data, parse_prompt, skip_bad=config.skip_bad)[0], config.data)


def _unique(prompts: list[Prompt], path: str) -> list[Prompt]:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise FastpoError(f"{path}: two rows have the id {prompt.id!r}; ids should differ")
        seen.add(prompt.id)
    return prompts


def training_prompts(config: Config, iteration: int) -> list[Prompt]:
    """The prompts of ``iteration`` (from 1): fresh ones each time while data lasts, in an order drawn from the seed."""
    if config.data == "embedded":
        count = config.prompts_per_iteration or 600
        rows = embedded.problems(config.seed, count * iteration, "train")[-count:]
        return _embedded_prompts(rows, first=count * (iteration - 1))
    pool = _shuffled(load_prompts(config), config.seed)
    if config.eval_data is None:
        pool = pool[_held_out(config, len(pool)) :]
    count = config.prompts_per_iteration or len(pool)
    start = count * (iteration - 1)
    return [pool[(start + i) % len(pool)] for i in range(min(count, len(pool)))]


def evaluation_prompts(config: Config) -> list[Prompt]:
    """Held-out problems: ``eval_data``, else rows of ``data`` that training never sees; empty without data."""
    if config.eval_data and config.eval_data != "embedded":
        rows, _ = read_rows(config.eval_data, parse_prompt, skip_bad=config.skip_bad)
        return _unique(rows, config.eval_data)[: config.eval_prompts]
    if "embedded" in (config.eval_data, config.data):
        return _embedded_prompts(embedded.problems(0, config.eval_prompts, "test"), first=0)
    if config.data is None:
        return []
    pool = _shuffled(load_prompts(config), config.seed)
    return pool[: _held_out(config, len(pool))]


def _held_out(config: Config, rows: int) -> int:
    """How many rows of data are kept from training: eval_prompts, but never more than a fifth."""
    return min(config.eval_prompts, rows // 5)


def _shuffled(rows: list[Prompt], seed: int) -> list[Prompt]:
    rows = list(rows)
    random.Random(f"prompts/{seed}").shuffle(rows)
    return rows


def _embedded_prompts(rows: list[dict[str, str]], first: int) -> list[Prompt]:
    return [Prompt(str(first + i), row["question"], row["answer"], row) for i, row in enumerate(rows)]


def load_demonstrations(config: Config) -> list[Demonstration]:
    if config.warm_start == "embedded":
        judging = round(config.warm_start_examples * config.warm_start_judgements)
        generated = embedded.demonstrations(config.seed, config.warm_start_examples - judging)
        generated += embedded.judgements(config.seed, judging)
        return [Demonstration(row["question"], row["answer"]) for row in generated]
    if config.warm_start is None:
        return []
    return read_rows(config.warm_start, parse_demonstration, skip_bad=config.skip_bad)[0]


def load_preferences(path: str, config: Config) -> list[Preference]:
    return read_rows(path, parse_preference, skip_bad=config.skip_bad)[0]
