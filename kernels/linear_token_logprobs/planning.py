"""What a fused head will cost, decided before it runs: tile shape, what is kept, how many GEMMs (F) and bytes."""

from dataclasses import dataclass
from functools import partial

import torch

DEFAULT_BUDGET = 2**30  # bytes, besides the state that grows with the rows
# Rows x vocabulary entries of a tile: large enough for the full rate of the products; on a CPU the tile also stays in
# the last-level cache between them, is twice as wide where there are half the rows or fewer, and no power of two: lines
# of its rows in the same place of their pages would compete for few places of the cache.
_LARGEST_TILE = {"cpu": (2048, 992), "cuda": (8192, 8192)}
_SMALLEST_VOCAB = 128
# What a CPU's process holds besides: packed operands of the products, 8 MiB and half a MiB a thread. Small problems
# have small ones, so that budgets below 64 MiB need not count them.
_OVERHEAD, _OVERHEAD_FROM = 12 * 2**20, 2**26


@dataclass(frozen=True)
class Plan:
    """How a fused head runs on at most N rows of size H and V vocabulary entries."""

    hidden_grad: bool
    head_grad: bool
    row_chunk: int  # rows of a tile
    vocab_tile: int  # vocabulary entries of a tile
    elements: int  # N * V
    kept_elements: int  # how many of them are kept for the backward, as exp(logits - max)
    state_bytes: int  # what grows with N: results, dhidden in the making, copies of rows
    tile_bytes: int  # workspace of one tile
    kept_bytes: int
    lent_elements: int = 0  # how many more are kept in memory that the caller lends

    @property
    def mode(self) -> str:
        if self.head_grad:
            return "trained head"
        return "frozen head" if self.hidden_grad else "no gradient"

    @property
    def gemms(self) -> float:
        """GEMM work in units of F = 2 N H V operations, forward and backward together."""
        return 1 + self.hidden_grad + (1 + self._share_again if self.head_grad else 0)

    @property
    def reason(self) -> str:
        """Why the mode costs that."""
        parts = ["1F for the logits"]
        if self.hidden_grad:
            parts.append("1F for dhidden, made in the forward")
        if self.head_grad:
            parts.append("1F for dweight")
        if self.head_grad and self._share_again > 0:
            parts.append(f"{self._share_again:.2f}F for logits again that memory_budget does not hold")
        return ", ".join(parts)

    @property
    def whole(self) -> bool:
        """Whether no logits are to be computed again."""
        return not self.head_grad or self.kept_elements + self.lent_elements >= self.elements

    @property
    def bytes(self) -> int:
        """Extra memory at the peak, the gradients themselves not counted."""
        return self.state_bytes + self.tile_bytes + self.kept_bytes

    @property
    def _share_again(self) -> float:
        return 1 - (self.kept_elements + self.lent_elements) / self.elements if self.elements else 0.0

    def __str__(self) -> str:
        tiles = f"tiles of {self.row_chunk} x {self.vocab_tile}"
        return f"{self.mode}, {self.gemms:.2f}F, {self.bytes / 2**20:.0f} MiB, {tiles}: {self.reason}"


def plan(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    hidden_grad: bool = True,
    head_grad: bool = True,
    memory_budget: int | None = None,
    wide_tiles: bool | None = None,
) -> Plan:
    """How ``linear_token_logprobs`` runs and what it costs; the op itself follows it.

    Args:
        num_rows: rows of ``hidden``. Masked ones cost neither GEMMs nor kept elements when it comes to running.
        hidden_grad: the hidden states need a gradient.
        head_grad: the weight, the bias or LoRA's B need one.
        memory_budget: bytes of extra memory at the peak, gradients not counted. None: 1 GiB besides the state.
        wide_tiles: on a CPU, twice as wide for up to three quarters of the largest tile's rows: up to 5% faster where
            few rows bear the cost of a product. None: where the budget holds all logits even so.

    Raises ValueError where the budget does not hold the state of the rows and the smallest tile, of one row.
    """
    if wide_tiles is None:
        sizes = (num_rows, vocab_size, hidden_size)
        grads = {"hidden_grad": hidden_grad, "head_grad": head_grad}
        given = partial(plan, *sizes, dtype=dtype, device=device, memory_budget=memory_budget, **grads)
        wide_plan = given(wide_tiles=True)
        return wide_plan if wide_plan.whole else given(wide_tiles=False)
    wide = max(4, dtype.itemsize)  # of logits, and of everything accumulated
    state = num_rows * wide * (16 + hidden_size * (3 if hidden_grad else 1))
    if device == "cpu" and memory_budget is not None and memory_budget >= _OVERHEAD_FROM:
        state += _OVERHEAD
    room = DEFAULT_BUDGET if memory_budget is None else memory_budget - state
    rows, vocab = _tile_shape(room, vocab_size, hidden_size, wide, device, num_rows, wide_tiles)
    rows = _equal_chunk(num_rows, rows)
    tile = _tile_memory(rows, vocab, hidden_size, wide, device)
    if tile > room:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes; it should be at least {state + tile}: {state} for the state of "
            f"{num_rows} rows and {tile} for a tile of one row"
        )
    references = num_rows * wide * -(-vocab_size // vocab)  # the maximum that each kept tile is relative to
    elements = num_rows * vocab_size
    kept = min(max(room - tile - references, 0) // dtype.itemsize, elements) if head_grad else 0
    state += references if kept else 0
    return Plan(hidden_grad, head_grad, rows, vocab, elements, kept, state, tile, kept * dtype.itemsize)


def largest_chunk(device: str) -> int:
    """Rows of the largest tile."""
    return _LARGEST_TILE["cpu" if device == "cpu" else "cuda"][0]


def _tile_memory(rows: int, vocab: int, hidden_size: int, wide: int, device: str) -> int:
    """Logits and what becomes of them, the gradient of the weight's tile; on a GPU a product [rows, H] too.

    On a CPU what becomes of the logits takes their place, and products are added where they belong.
    """
    if device == "cpu":
        return wide * vocab * (rows + hidden_size)
    return wide * (2 * rows * vocab + 2 * vocab * hidden_size + rows * hidden_size)


def _equal_chunk(num_rows: int, most: int) -> int:
    """Rows of as few chunks of at most ``most`` rows as there can be, about equal, and a multiple of 64 if possible."""
    equal = -(-num_rows // max(1, -(-num_rows // most)))
    return min(most, -(-equal // 64) * 64)


def _tile_shape(
    room: int, vocab_size: int, hidden_size: int, wide: int, device: str, num_rows: int, wide_tiles: bool
) -> tuple[int, int]:
    """The largest tile (rows, vocab) that takes at most half the room, or the smallest there is."""
    rows, vocab = _LARGEST_TILE["cpu" if device == "cpu" else "cuda"]
    if device == "cpu" and (2 * num_rows <= rows or (wide_tiles and 4 * num_rows <= 3 * rows)):
        vocab *= 2
    rows, vocab = min(rows, max(num_rows, 1)), min(vocab, vocab_size)
    while _tile_memory(rows, vocab, hidden_size, wide, device) > room // 2 and (rows > 1 or vocab > _SMALLEST_VOCAB):
        if vocab > _SMALLEST_VOCAB and vocab * hidden_size > rows * (vocab + hidden_size):
            vocab = max(vocab // 2, _SMALLEST_VOCAB)
        elif rows > 1:
            rows //= 2
        else:
            vocab = max(vocab // 2, _SMALLEST_VOCAB)
    return rows, vocab
