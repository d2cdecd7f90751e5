"""TensorBoard: a curve per training stage (``tensorboard/iteration_k``), a point per iteration (``tensorboard``)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NOT_CURVES = ("step", "num_steps")


class Tracker:
    """Writers made when first needed; none at all unless ``enabled`` (main process, tensorboard: true)."""

    def __init__(self, directory: Path, enabled: bool):
        self.directory = directory / "tensorboard"
        self.enabled = enabled
        self._writers: dict[str, Any] = {}

    def step(self, stage: str, record: Mapping[str, float]) -> None:
        """A record of one optimizer step."""
        if self.enabled:
            self._write(stage, "train", record, int(record["step"]))

    def iteration(self, iteration: int, row: Mapping[str, Any]) -> None:
        """A row of the results table."""
        if self.enabled:
            self._write("", "iteration", row, iteration)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _write(self, stage: str, group: str, values: Mapping[str, Any], step: int) -> None:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            # a resumed stage starts at a checkpoint: what an earlier process wrote from there on is hidden
            self._writers[stage] = SummaryWriter(str(self.directory / stage), purge_step=step)
        for name, value in values.items():
            if name not in _NOT_CURVES and isinstance(value, (int, float)) and math.isfinite(value):
                self._writers[stage].add_scalar(f"{group}/{name}", value, step)
