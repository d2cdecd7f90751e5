"""A search as a file: whole or absent (fastpo.artifacts), and going on from it gives what never stopping would have."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from fastpo.artifacts import read_tensors, write_tensors
from fastpo.errors import FastpoError
from fastpo.kernels.tree_search import SearchTrees

from .engine import Search
from .nodes import Step
from .progress import Counts


def save_search(search: Search, path: str | Path) -> None:
    """Writes everything that the next wave depends on. What ``propose`` keeps is emptied (its ``forget``, where it has
    one): the search that goes on and the one that is continued from the file see the same from here on, to the bit."""
    forget = getattr(search.propose, "forget", None)
    if forget is not None:
        forget()
    flat = [step for steps in search.steps for step in steps[1:]]
    wanted = [(*at, number) for at, number in search.wanted.items()]
    tensors = {f"trees.{f.name}": getattr(search.trees, f.name) for f in fields(SearchTrees)} | {
        "steps.ids": torch.tensor([token for step in flat for token in step.ids], dtype=torch.int64),
        "steps.lengths": torch.tensor([len(step.ids) for step in flat], dtype=torch.int64),
        "steps.logps": torch.tensor([step.logp for step in flat], dtype=torch.float64),
        "steps.finished": torch.tensor([step.finished for step in flat], dtype=torch.bool),
        "terminal": torch.tensor([end for ends in search.terminal for end in ends], dtype=torch.bool),
        "values": torch.tensor([value for values in search.values for value in values], dtype=torch.float64),
        "expansions": torch.tensor(search.expansions, dtype=torch.int64),
        "finished": torch.tensor(search.finished, dtype=torch.bool),
        "wanted": torch.tensor(wanted, dtype=torch.int64).view(len(wanted), 3),
        "about": _text({"identity": _identity(search), "counts": asdict(search.counts)}),
    }
    write_tensors(path, tensors)


def load_search(search: Search, path: str | Path) -> Search:
    """Brings a new ``search`` of the same prompts and method to the state in the file; returns it.

    Raises FastpoError, before anything is changed, where the file is of other prompts or another method.
    """
    tensors = read_tensors(path)
    about = json.loads(bytes(tensors["about"].tolist()))
    if about["identity"] != _identity(search):
        raise FastpoError(f"{path} holds a search of other prompts or another method; give it its own")
    search.trees = SearchTrees(**{f.name: tensors[f"trees.{f.name}"] for f in fields(SearchTrees)})
    sizes = search.trees.size.tolist()
    steps = iter(_steps(tensors))
    search.steps = [
        [Step(prompt), *(next(steps) for _ in range(size - 1))]
        for prompt, size in zip(search.prompts, sizes, strict=True)
    ]
    search.terminal = _split(tensors["terminal"].tolist(), sizes)
    search.values = _split(tensors["values"].tolist(), sizes)
    search.parents = [row[:size] for row, size in zip(search.trees.parent.tolist(), sizes, strict=True)]
    search.children = [_children(parents) for parents in search.parents]
    search.expansions = tensors["expansions"].tolist()
    search.finished = tensors["finished"].tolist()
    search.wanted = {(tree, node): number for tree, node, number in tensors["wanted"].tolist()}
    search.counts = Counts(**about["counts"])
    return search


def _identity(search: Search) -> str:
    return json.dumps([repr(search.method), search.when_full, search.prompts])


def _text(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _steps(tensors: dict[str, Tensor]) -> list[Step]:
    ids = tensors["steps.ids"].split(tensors["steps.lengths"].tolist())
    columns = (tensors["steps.logps"].tolist(), tensors["steps.finished"].tolist())
    return [Step(tuple(i.tolist()), logp, end) for i, logp, end in zip(ids, *columns, strict=True)]


def _split(values: Sequence, sizes: Sequence[int]) -> list[list]:
    found, first = [], 0
    for size in sizes:
        found.append(list(values[first : first + size]))
        first += size
    return found


def _children(parents: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            found[parent].append(node)
    return found
