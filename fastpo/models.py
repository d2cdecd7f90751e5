"""Loading and saving models; log-probs of responses: the body on whole sequences, the LM head on response rows only."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastpo.errors import FastpoError
from fastpo.integrations.head import Head, check_head, hidden_states

PromptResponse = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt, token ids of a response to it


def load_model(path: str | Path, dtype: str = "float32", attention: str | None = None) -> PreTrainedModel:
    """A causal LM of transformers from a directory or Hub name, in eval mode, on the CPU.

    ``attention`` is transformers' ``attn_implementation``; None: its default, SDPA where the model has it.
    """
    settings = {} if attention is None else {"attn_implementation": attention}
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **settings).eval()
    except (OSError, ValueError) as error:
        raise FastpoError(f"model {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. One without a padding token pads with its end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FastpoError(f"tokenizer {path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise FastpoError(f"tokenizer {path} has no end-of-sequence token; responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def onednn_matmul() -> Iterator[None]:
    """fp32 matrix products on the CPU go to oneDNN instead of MKL inside the block, where torch has both.

    MKL runs them 3 to 5 times slower on AMD processors (measured on Zen 5 with products of 2300 x 128 x 256). On
    processors with AMX, oneDNN may round the factors to bf16. Flash attention on the CPU makes many small products,
    which this slows down: load models with ``attention="eager"``.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def context_length(model: PreTrainedModel) -> int | None:
    """The longest prompt + response in tokens, where the model's config tells."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(model.config, name, None)
        if isinstance(length, int):
            return length
    return None


def vocabulary(model: Any) -> int:
    """How many tokens the model, plain or wrapped by peft, has embeddings of."""
    return model.get_input_embeddings().weight.shape[0]


def check_sequences(sequences: Sequence[PromptResponse], context: int | None, name: str) -> None:
    """One line for the first of ``sequences`` that cannot be scored: an empty part, or longer than the context."""
    for i, (prompt, response) in enumerate(sequences):
        if not len(prompt) or not len(response):
            part = "response" if len(prompt) else "prompt"
            raise FastpoError(f"{name}[{i}] has an empty {part}; it should hold at least one token")
        if context is not None and len(prompt) + len(response) > context:
            raise FastpoError(
                f"{name}[{i}] has {len(prompt)} + {len(response)} tokens (prompt + response); "
                f"it should have at most {context}, the model's context"
            )


@dataclass(frozen=True)
class Batch:
    """Sequences right-padded to one width. A causal model never looks right, so the padding needs no attention mask.

    B sequences of at most L + 1 tokens; R response tokens altogether, packed in the order of the sequences.
    """

    input_ids: Tensor  # [B, L] int64; each sequence without its last token, which predicts nothing
    rows: Tensor  # [R] int64, into B*L: the position that predicts each response token
    labels: Tensor  # [R] int64, the response tokens
    cu_seqlens: Tensor  # [B+1] int64; response i owns the R-range cu_seqlens[i]:cu_seqlens[i+1]

    def logps(self, head: Head, hidden: Tensor, **settings: Any) -> Any:
        """Log-probs [R] of the response tokens from the hidden states [R, H] that predict them (see ResponseScorer)."""
        return head.logps(hidden, self.labels, **settings)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


def collate(sequences: Sequence[PromptResponse]) -> Batch:
    """A batch of (prompt, response) pairs of token ids, neither of them empty."""
    width = max(len(prompt) + len(response) for prompt, response in sequences) - 1
    input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    rows, labels, lengths = [], [], [0]
    for i, (prompt, response) in enumerate(sequences):
        tokens = torch.tensor([*prompt, *response])
        input_ids[i, : len(tokens) - 1] = tokens[:-1]
        first = i * width + len(prompt) - 1
        rows.append(torch.arange(first, first + len(response)))
        labels.append(tokens[len(prompt) :])
        lengths.append(len(response))
    return Batch(input_ids, torch.cat(rows), torch.cat(labels), torch.tensor(lengths).cumsum(0))


def split_by_tokens(lengths: Sequence[int], budget: int, multiple: int = 1) -> Iterator[list[int]]:
    """Indices in groups whose padded size (longest x number) stays within ``budget`` tokens per process, longest first.

    With ``multiple`` processes a group is dealt out among them: it may hold ``multiple`` times as many sequences.
    A group holds at least ``multiple`` sequences, however long they are.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        number = multiple * max(1, budget // lengths[order[start]])
        yield order[start : start + number]
        start += number


class ResponseScorer(nn.Module):
    """What a training step computes of ``model``, as a module that accelerate can wrap (DDP, FSDP2).

    ``scorer(batch, of)`` is ``of(head, hidden)``: the LM head with its settings, and the hidden states [R, H] that
    predict the R response tokens, which alone go through the head; ``scorer(batch, batch.logps)`` their log-probs. No
    logits [R, V] are kept. ``of`` should return tensors, in tuples or dicts: it is called inside the forward, where
    the head's weight is whole, and the wrappers look for the tensors that they return gradients to.

    Raises FastpoError for a model that does more to its logits than its head and its config say.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        check_head(model)
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # where FSDP's wrapping policy looks

    def forward(self, batch: Batch, of: Callable[[Head, Tensor], Any]) -> Any:
        hidden = hidden_states(self.model, input_ids=batch.input_ids, use_cache=False)  # [B, L, H]
        return of(Head.of(self.model), hidden.flatten(0, 1).index_select(0, batch.rows))


def response_logps(
    model: PreTrainedModel,
    sequences: Sequence[PromptResponse],
    *,
    stats: tuple[str, ...] = (),
    micro_batch_tokens: int = 16384,
    accelerator: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the responses' tokens, without gradient: ``(logps [T] fp32, cu_seqlens [S+1] int64)``, on the CPU.

    With ``stats``, those of ``token_logprobs``, [1 + stats, T] in place of logps: they stand behind the log-probs.

    Packed in the order of ``sequences``. At most ``micro_batch_tokens`` tokens, padding included, go through the model
    at once. With an ``accelerator`` the sequences are shared out among its processes, each gets the whole result, and
    its mixed precision applies, so that a reference equals the policy at the start of training; without, this process
    scores all of them.

    Cost: one forward of the body over the sequences, and the LM head on the response tokens only.

    Raises FastpoError for an empty prompt or response and for a sequence longer than the context, before any work.
    """
    check_sequences(sequences, context_length(model), "sequences")
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    scorer = ResponseScorer(model)
    lengths = [len(prompt) + len(response) - 1 for prompt, response in sequences]
    cu_seqlens = torch.tensor([0, *(len(response) for _, response in sequences)]).cumsum(0)
    values = torch.zeros(1 + len(stats), int(cu_seqlens[-1]))  # [1 + stats, T]
    was_training = model.training
    model.eval()
    try:
        for group in split_by_tokens(lengths, micro_batch_tokens, world):
            mine = group[rank::world]
            if mine:
                batch = collate([sequences[i] for i in mine]).to(device)
                with torch.no_grad(), nullcontext() if accelerator is None else accelerator.autocast():
                    scored = scorer(batch, functools.partial(batch.logps, stats=stats))  # [R] each
                logps, found = scored if stats else (scored, {})
                targets = torch.cat([torch.arange(*cu_seqlens[i : i + 2].tolist()) for i in mine])  # [R]
                values[:, targets] = torch.stack([logps, *(found[name] for name in stats)]).float().cpu()
            if progress is not None:
                progress(len(group))
    finally:
        model.train(was_training)
    if accelerator is not None and world > 1:  # every process holds zeros where the others scored
        values = accelerator.reduce(values.to(accelerator.device)).cpu()
    return values if stats else values[0], cu_seqlens


def save_model(model: nn.Module, directory: str | Path, accelerator: Accelerator | None = None) -> None:
    """``save_pretrained`` of a model that may be sharded (FSDP2). Call it on every process; the main one writes."""
    accelerator = accelerator or Accelerator()
    state = accelerator.get_state_dict(model) if accelerator.num_processes > 1 else None
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(directory, state_dict=state)
    accelerator.wait_for_everyone()
