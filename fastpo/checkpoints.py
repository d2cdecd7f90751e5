"""Checkpoints inside a training stage: a directory per step, whole or absent, the last one kept."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fastpo.artifacts import atomic_directory, read_json, temporary, write_json

_HISTORY = "history.json"


def save_checkpoint(directory: Path, history: list[dict[str, Any]], accelerator: Accelerator) -> None:
    """Everything accelerate prepared, the random states and ``history`` (a record per step done) as ``step_<n>``.

    Called by every process. The checkpoint before it goes once this one is whole.
    """
    target = directory / f"step_{len(history):08d}"
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(atomic_directory(target))
        accelerator.wait_for_everyone()
        with _quiet():
            accelerator.save_state(str(temporary(target)))
        if accelerator.is_main_process:
            write_json(temporary(target) / _HISTORY, history)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for old in _checkpoints(directory)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def latest_checkpoint(directory: Path) -> Path | None:
    """The last whole checkpoint, or None."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def load_checkpoint(checkpoint: Path, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Restores what ``save_checkpoint`` saved; returns the history."""
    accelerator.load_state(str(checkpoint))
    return read_json(checkpoint / _HISTORY)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without accelerate's warning, at each checkpoint, that tied weights are stored once."""
    logger = logging.getLogger("accelerate.utils.other")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step_*"))
