"""``fastpo score``: log-probs of a file of responses, in parts that are kept, so that a stopped run goes on."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.artifacts import file_digest, read_json, read_tensors, write_json, write_jsonl, write_tensors
from fastpo.data import Codec, parse_demonstration
from fastpo.errors import FastpoError
from fastpo.models import PromptResponse

_PART = 8  # micro-batches that make a part: what a kill costs at most
Progress = Callable[[int], None]  # is told how many more responses are done
Score = Callable[[list[PromptResponse], Progress], tuple[Tensor, Tensor]]  # logps [T], cu_seqlens [S+1]


@dataclass(frozen=True)
class ScoredRow:
    """A line of the input: what it holds, and whether its responses are one, as text; many, as text; or tokens."""

    line: int
    row: dict[str, Any]
    kind: str  # response, responses, tokens

    def sequences(self, codec: Codec) -> list[PromptResponse]:
        """(prompt, response) token ids of each response."""
        if self.kind == "tokens":
            start = self.row["start"]
            return [(tokens[:start], tokens[start:]) for tokens in _nested(self.row["tokens"])]
        prompt = codec.prompt_ids(self.row["prompt"])
        texts = self.row["responses"] if self.kind == "responses" else [self.row["response"]]
        return [(prompt, codec.response_ids(text)) for text in texts]

    def result(self, sums: Sequence[float], lengths: Sequence[int]) -> dict[str, Any]:
        """The line of the output."""
        scores = [{"logp": s, "logp_per_token": s / n, "tokens": n} for s, n in zip(sums, lengths, strict=True)]
        return {**self.row, **scores[0]} if self.kind == "response" else {**self.row, "scores": scores}


def parse_scored(row: dict[str, Any], line: int) -> ScoredRow:
    """``{"prompt", "response"}``, ``{"prompt", "responses": [...]}``, ``{"tokens": [...] or [[...]], "start": n}``."""
    if "tokens" in row:
        _check_tokens(row)
        return ScoredRow(line, row, "tokens")
    if "responses" not in row:
        one = parse_demonstration(row, line)
        return ScoredRow(line, {"prompt": one.prompt, "response": one.response}, "response")
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise ValueError(f"'responses' is {responses!r}, it should be a list of at least one text")
    found = [parse_demonstration({**row, "response": text}, line) for text in responses]
    return ScoredRow(line, {"prompt": found[0].prompt, "responses": [one.response for one in found]}, "responses")


def check_known(
    rows: Sequence[ScoredRow], sequences: Sequence[list[PromptResponse]], vocabulary: int, path: str
) -> None:
    """FastpoError for the first row of token ids that a model with so many tokens does not know."""
    for row, own in zip(rows, sequences, strict=True):
        largest = max(max(*prompt, *response) for prompt, response in own)
        if largest >= vocabulary:
            raise FastpoError(
                f"{path}:{row.line}: 'tokens' holds {largest}; it should hold ids below {vocabulary}, the model's"
            )


class Parts:
    """Log-probs of rows in files of a directory beside the output, each whole or absent; gone once the output is there.

    Parts of other settings, or of another input, are thrown away: ``settings`` is everything that they depend on.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.folder = out.with_name(f".{out.name}.parts")
        note = self.folder / "settings.json"
        wanted = {"digest": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()}
        if note.exists() and read_json(note) != wanted:
            shutil.rmtree(self.folder)
        write_json(note, wanted)

    def get(
        self, number: int, sequences: list[PromptResponse], score: Score, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """(logps [T], cu_seqlens [S+1]) of part ``number``, scored where it is not there."""
        path = self.folder / f"{number:06d}.safetensors"
        if path.exists():
            found = read_tensors(path)
            progress(len(sequences))
            return found["logps"], found["cu_seqlens"]
        logps, cu_seqlens = score(sequences, progress)
        write_tensors(path, {"logps": logps, "cu_seqlens": cu_seqlens})
        return logps, cu_seqlens

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def settings_of(path: str, model: str, keys: dict[str, Any]) -> dict[str, Any]:
    """What the log-probs of a file depend on. A model in a directory counts with the time of its files."""
    folder = Path(model)
    files = [(p.name, p.stat().st_mtime_ns) for p in sorted(folder.glob("*"))] if folder.is_dir() else []
    return {"input": file_digest(path), "files": files, "keys": keys}


def score_rows(
    sequences: Sequence[list[PromptResponse]],
    score: Score,
    parts: Parts,
    micro_batch_tokens: int,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """``(logps [T], cu_seqlens [S+1])`` of all responses, ``sequences`` [rows] of each row."""
    chunks = enumerate(_chunks(sequences, _PART * micro_batch_tokens))
    found = [parts.get(number, chunk, score, progress) for number, chunk in chunks]
    lengths = torch.cat([cu_seqlens.diff() for _, cu_seqlens in found])
    return torch.cat([logps for logps, _ in found]), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def write_scores(
    out: Path, rows: Sequence[ScoredRow], counts: Sequence[int], logps: Tensor, cu_seqlens: Tensor
) -> None:
    """``out``: JSONL, a line per row; or ``*.safetensors``, with the log-probs of every token: logps, cu_seqlens.

    ``counts`` [rows] are numbers of responses.
    """
    if out.suffix == ".safetensors":
        write_tensors(out, {"logps": logps, "cu_seqlens": cu_seqlens})
        return
    bounds = cu_seqlens.tolist()
    sums = [logps[a:b].double().sum().item() for a, b in pairwise(bounds)]
    lengths = [b - a for a, b in pairwise(bounds)]

    def lines() -> Iterator[dict[str, Any]]:
        at = 0
        for row, number in zip(rows, counts, strict=True):
            yield row.result(sums[at : at + number], lengths[at : at + number])
            at += number

    write_jsonl(out, lines())


def _chunks(sequences: Sequence[list[PromptResponse]], least: int) -> Iterator[list[PromptResponse]]:
    """Responses of rows behind one another, of at least ``least`` tokens together but for the last."""
    chunk: list[PromptResponse] = []
    size = 0
    for own in sequences:
        chunk += own
        size += sum(len(prompt) + len(response) for prompt, response in own)
        if size >= least:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _nested(tokens: list[Any]) -> list[list[int]]:
    return tokens if isinstance(tokens[0], list) else [tokens]


def _check_tokens(row: dict[str, Any]) -> None:
    tokens, start = row["tokens"], row.get("start")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("'tokens' is empty or no list; it should be token ids, or lists of them")
    for ids in _nested(tokens):
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError("'tokens' holds something else than token ids (integers of at least 0)")
        if type(start) is not int or not 1 <= start < len(ids):
            raise ValueError(
                f"'start' is {start!r}; it should be the length of the prompt, at least 1 and below {len(ids)}"
            )
