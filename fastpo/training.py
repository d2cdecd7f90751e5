"""The two training stages: supervised (warm start) and preference. One optimizer loop serves both.

A stage is a function of its inputs and ``config``: data order comes from the seed and the step, the learning rate from
the step. Checkpoints (model, optimizer, random states, history) let a killed stage go on where it was, with the same
result to the bit.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastpo.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from fastpo.errors import FastpoError
from fastpo.models import PromptResponse, check_sequences, context_length
from fastpo.objectives import Objective
from fastpo.pairs import PairRecord
from fastpo.references import Reference
from fastpo.tasks import PreferenceTask, Record, SupervisedTask, Task
from fastpo.tree_task import TreePreferenceTask

Log = Callable[[Record], None]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training stage. A batch counts examples (or pairs) over all processes and micro-batches."""

    learning_rate: float
    batch_size: int = 64
    num_epochs: float | None = 1.0  # passes over the data; the stage ends here or at max_steps, whichever is first
    max_steps: int | None = None  # optimizer steps
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # towards 0 behind the last step
    warmup_steps: int = 0
    weight_decay: float = 0.0  # on matrices; norms and biases have none
    max_grad_norm: float = 1.0  # 0: off
    micro_batch_tokens: int = 16384  # tokens, padding included, in one forward of one process
    gradient_checkpointing: bool = False
    sharing: bool = True  # preference pairs: a token that several responses share goes through the model once
    batch_by: Literal["prompt", "pair"] = "prompt"  # what is shuffled: prompts with all their pairs, or pairs
    checkpoint_steps: int = 100
    seed: int = 0

    def num_steps(self, num_items: int) -> int:
        """Optimizer steps over ``num_items`` examples."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.num_epochs is not None:
            limits.append(math.ceil(self._num_draws(num_items) / self.batch_size))
        if not limits:
            raise FastpoError("num_epochs and max_steps are both none; one of them should say when training ends")
        return min(limits)

    def _num_draws(self, num_items: int) -> int:
        return round(self.num_epochs * num_items) if self.num_epochs is not None else 0

    def batches(self, num_items: int, prompts: Sequence[int] = ()) -> list[list[int]]:
        """The items of each step: one permutation per epoch, drawn from ``seed``, cut into batches across epochs.

        ``prompts`` [num_items]: the items of one prompt stand side by side in each permutation.
        """
        steps = self.num_steps(num_items)
        draws = steps * self.batch_size
        if self.num_epochs is not None:
            draws = min(draws, self._num_draws(num_items))
        generator = torch.Generator().manual_seed(self.seed)
        epochs = [_permutation(num_items, prompts, generator) for _ in range(math.ceil(draws / num_items))]
        order = torch.cat(epochs)[:draws].tolist()
        return [order[start : start + self.batch_size] for start in range(0, draws, self.batch_size)]

    def lr(self, step: int, num_steps: int) -> float:
        """The learning rate of ``step`` (from 0)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        factors = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.learning_rate * factors[self.lr_schedule]


def train_sft(
    model: PreTrainedModel,
    examples: Sequence[PromptResponse],
    *,
    config: TrainConfig,
    output_dir: str | Path,
    accelerator: Accelerator,
    log: Log,
) -> list[Record]:
    """Trains ``model`` in place on ``examples``, (prompt, response) token ids: mean NLL per response token of a batch.

    Returns a record per step: loss, entropy and top-10 mass per token, gradient norm, learning rate. ``log`` (main
    process) gets the same with ``tokens_per_second``. Resumes from ``output_dir/checkpoints`` where a killed run left
    some; the caller removes that directory once the model is saved.

    Raises FastpoError for no examples and for an empty or too long one, before any work.
    """
    check_sequences(examples, context_length(model), "examples")
    return _fit(model, SupervisedTask(examples), config, Path(output_dir), accelerator, log)


def train_preference(
    model: PreTrainedModel,
    pairs: Sequence[PairRecord],
    reference: Reference | Mapping[str, Tensor] | None,
    *,
    objective: Objective,
    config: TrainConfig,
    output_dir: str | Path,
    accelerator: Accelerator,
    log: Log,
) -> list[Record]:
    """Trains ``model`` in place on preference ``pairs``: the mean of ``objective`` over the pairs of a batch.

    ``reference``: of each response's key the reference log-probs, [n] fp32 on the CPU, as a mapping or as a Reference
    with more; None for an objective with ``ref_coef=0``. The gradient is that of the whole batch's mean, however it is
    split into micro-batches and processes.

    With ``config.sharing`` the responses of a batch make trees (fastpo/tree_task.py): each distinct token goes through
    the model once. Without, a response goes through once for all its pairs of a micro-batch. An objective that couples
    its batch (``Objective.couples_scores``) couples all of it either way: a batch that does not fit one forward is
    scored first, a forward more. Objectives of the KL over the vocabulary (TDPO, SparsePO) run ``reference.model`` too.

    Returns a record per step: loss; NLL of the chosen; rewards (beta times log-ratio), their margin and ranking
    accuracy; log-probs per response (``logps_*``) and per token (``logps_per_token_*``); entropy and top-10 mass per
    token; gradient norm; learning rate. ``log``, resuming and ``output_dir`` are as in ``train_sft``.

    Raises FastpoError before any work for no pairs, for an empty or too long response, and for reference log-probs that
    are missing, of the wrong shape, or not wanted, and with ``config.sharing`` for a model that cannot take trees.
    """
    task = (TreePreferenceTask if config.sharing else PreferenceTask)(pairs, reference, objective)
    for at, name in enumerate(("chosen", "rejected")):
        sequences = [p.members[at][1:] for p in pairs if p.members[at][0] or not p.present]
        check_sequences(sequences, context_length(model), f"{name} of pairs")
    others = [(prompt, ids) for p in pairs for key, prompt, ids in p.others if key]
    check_sequences(others, context_length(model), "others of pairs")
    return _fit(model, task, config, Path(output_dir), accelerator, log)


def _fit(
    model: PreTrainedModel, task: Task, config: TrainConfig, output_dir: Path, accelerator: Accelerator, log: Log
) -> list[Record]:
    """Minimises the task's mean loss over the batches of ``config``. Returns the record of each step."""
    if not task.lengths:
        raise FastpoError("there is nothing to train on: no examples, or no pairs")
    batches = config.batches(len(task.lengths), task.prompts if config.batch_by == "prompt" else ())
    model.eval()  # no dropout
    if config.gradient_checkpointing:  # works in train mode only
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        _disable_dropout(model.train())
    scorer, optimizer = accelerator.prepare(task.scorer(model), _optimizer(model, config))
    parameters = [p for p in scorer.parameters() if p.requires_grad]
    checkpoints = output_dir / "checkpoints"
    try:
        checkpoint = latest_checkpoint(checkpoints)
        history: list[Record] = load_checkpoint(checkpoint, accelerator) if checkpoint is not None else []
        for step in range(len(history), len(batches)):
            started = time.perf_counter()
            sums = _accumulate_gradients(scorer, task, batches[step], config, accelerator)
            grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            if isinstance(grad_norm, DTensor):  # FSDP2
                grad_norm = grad_norm.full_tensor()
            lr = config.lr(step, len(batches))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            record = {"step": step + 1, "num_steps": len(batches), **task.record(sums), "grad_norm": float(grad_norm)}
            record["learning_rate"] = lr
            history.append(record)
            if accelerator.is_main_process:
                log({**record, "tokens_per_second": record["tokens"] / (time.perf_counter() - started)})
            if (step + 1) % config.checkpoint_steps == 0 and step + 1 < len(batches):
                save_checkpoint(checkpoints, history, accelerator)
    finally:
        accelerator.free_memory(scorer, optimizer)
        model.eval()
    return history


def _accumulate_gradients(
    scorer: nn.Module, task: Task, items: list[int], config: TrainConfig, accelerator: Accelerator
) -> list[float]:
    """Gradients of the batch's mean loss, and its summed values over all processes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    rounds = task.rounds(scorer, items, config.micro_batch_tokens, world, accelerator.device)
    scale = world / task.normalizer(items)  # gradients are averaged over processes
    total: Any = 0
    for number, shares in enumerate(rounds, start=1):
        mine = rank < len(shares)
        with nullcontext() if number == len(rounds) else accelerator.no_sync(scorer):
            # a process without a share still takes part in the collectives of the forward and backward
            loss, values = task.loss(scorer, shares[rank if mine else 0], items, accelerator.device)
            accelerator.backward(loss * (scale if mine else 0.0))
        total = total + (values if mine else torch.zeros_like(values))
    return accelerator.reduce(total).tolist()


def _permutation(num_items: int, prompts: Sequence[int], generator: torch.Generator) -> Tensor:
    """[num_items]; with ``prompts`` the items of one side by side, prompts and items within each in random order."""
    order = torch.randperm(num_items, generator=generator)
    if not prompts:
        return order
    place = torch.randperm(max(prompts) + 1, generator=generator)  # of each prompt
    return order[place[torch.tensor(prompts)[order]].argsort(stable=True)]


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
