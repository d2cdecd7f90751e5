"""What the formulas of presets are computed on: ``Data``, in fp64."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels.preference_loss import preference_loss
from fastpo.objectives import Objective
from fastpo.types import Pairs, Segments

P, LENGTH = 6, 12


class Data:
    """Packed sequences of mixed lengths, chosen, rejected and a third of each tuple one behind the other; fp64."""

    def __init__(self, members: int = 2):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, LENGTH + 1, (P * members,), generator=generator)
        self.ids = torch.arange(P * members).repeat_interleave(lengths)  # [T] sequence of each token
        self.cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        size, self.members = len(self.ids), members

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        self.mask = rand(size) > 0.2
        self.mask[self.cu[:-1]] = True  # no sequence is empty
        self.logps, self.ref = -2 * rand(size) - 0.1, -2 * rand(size) - 0.1
        self.weights, self.kl, self.nll_weights = rand(size), rand(size), rand(size)
        self.omega, self.margins, self.labels = rand(P), rand(P), rand(P)
        self.targets = rand(P, 2) - 0.5
        self.relevance = rand(P, members)

    def sum(self, x: Tensor) -> list[Tensor]:
        """Sums over masked-in tokens [T] of the chosen, rejected, ... sequences: [P] each."""
        sums = torch.zeros(P * self.members, dtype=x.dtype).index_add(0, self.ids, torch.where(self.mask, x, 0.0))
        return list(sums.view(P, self.members).T)

    def n(self) -> list[Tensor]:
        return self.sum(torch.ones_like(self.logps))

    def ratios(self) -> list[Tensor]:
        """The D_i of each member, [P] each."""
        return self.sum(self.logps - self.ref)

    def sums(self) -> list[Tensor]:
        return self.sum(self.logps)

    def means(self) -> list[Tensor]:
        return [s / n for s, n in zip(self.sums(), self.n(), strict=True)]

    def loss(
        self, objective: Objective, segments: dict | None = None, *, index: Tensor | None = None, **columns: Tensor
    ) -> Tensor:
        index = torch.arange(P * self.members).view(P, self.members) if index is None else index
        records = Segments(self.cu, self.mask, **(segments or {})), Pairs(index, **columns)
        return preference_loss(self.logps, self.ref if objective.needs_reference else None, *records, objective).loss


def s(z: Tensor) -> Tensor:
    return torch.sigmoid(z)


def logs(z: Tensor) -> Tensor:
    return F.logsigmoid(z)


MEMBERS = {"selm": 3, "kto_batch": 3, "vpo": 3, "rationale_dpo": 3, "rise": 4, "srpo": 6}
MEMBERS |= dict.fromkeys(("lipo", "rrhf", "list_mle", "list_softmax"), 4)
MEMBERS |= dict.fromkeys(("remax", "rlsp", "trice", "crpg", "crraft"), 1)


def data_of(name: str) -> Data:
    """Data with as many sequences a tuple as the preset of the formula compares."""
    return Data(MEMBERS.get(name.partition("__")[0], 2))


def formulas(names: dict[str, Any]) -> dict[str, Callable[[Data], tuple[Tensor, Tensor]]]:
    """``_name`` or ``_name__variant`` of a module -> under ``name``."""
    return {name[1:]: value for name, value in names.items() if name[0] == "_" and name[1] != "_"}
