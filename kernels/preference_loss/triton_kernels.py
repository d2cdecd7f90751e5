"""preference_loss in Triton: ``forward``, ``scores`` and ``backward`` with the signatures of reference.py.

Three launches forward, one backward, whatever the tuples share, and never a host sync:

1. ``sums_kernel``: a program per sequence reads its tokens once. Where there are few long sequences, several programs
   share one, and ``join_kernel`` adds their parts up.
2. ``tuples_kernel``: a lane per tuple: terms, losses, and the slope in each member. It also notes, per sequence, the
   first and the last place where ``index`` names it: integer minima and maxima, which do not depend on their order.
   (``count_kernel`` before it, where the batch normalizes the NLL.)
3. ``sequences_kernel``: a program per sequence adds up its slopes in the order of the tuples. It looks for them between
   those two places only: tuples of one sequence stand near each other, and mostly there is one. An index too large for
   that to be cheap in the worst case is sorted instead. One program more adds up the losses.
4. ``backward_kernel``: a program per sequence writes its tokens' gradients once.

Floor: 9 bytes a token forward (log-prob, reference, mask), 5 backward (mask, gradient).

A pointer that is None in a kernel is an output that nobody asked for, or an input that is not there.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastpo.aot import AotConfig
from fastpo.objectives import LINKS

from .records import (
    Outputs,
    TokenGrads,
    Tokens,
    TokenSettings,
    Tuples,
    TupleSettings,
    empty_grads,
    empty_outputs,
    empty_scores,
)
from .triton_tokens import SUMS, backward_kernel, join_kernel, sums_kernel
from .triton_tuples import BATCH, count_kernel, sequences_kernel, tuples_kernel

SCAN = 16384  # elements of ``index`` up to which it is searched, not sorted
TUPLES = 128  # of one program
ENTRIES = 64  # of ``index`` that a program of a sequence looks at at once
REGISTERS = 128  # of a thread of the sums at most: left to itself, ptxas trades a few spills for occupancy
OPTIONS = {"enable_fp_fusion": True}


class Scratch(NamedTuple):
    """What the kernels of ``forward`` hand to each other."""

    nll: Tensor  # [S] fp64, sum u l
    linear: Tensor | None  # [S] fp64, sum v l
    order: Tensor | None  # [P K] int64, as ``_places``
    first: Tensor  # [S] int64
    last: Tensor  # [S] int64
    score_slopes: Tensor  # [P, K] fp64, d loss / d f(S) of each member by its tuple
    nll_slopes: Tensor | None  # [P, K] fp64, d loss / d (sum u l)
    partials: Tensor  # [programs of tuples] fp64, sums of their losses

    @property
    def searched(self) -> tuple[Tensor | None, Tensor | None]:
        """``first`` and ``last`` where the kernels are to find them."""
        return (self.first, self.last) if self.order is None else (None, None)


def forward(
    tokens: Tokens, scores: Tensor | None, tuples: Tuples, token_set: TokenSettings, tuple_set: TupleSettings
) -> Outputs:
    out = empty_outputs(tokens, scores, tuples)
    if scores is not None:
        out = out._replace(scores=scores.clone())
    num_sequences, (num_tuples, num_members) = len(out.scores), tuples.index.shape
    num_entries, programs = tuples.index.numel(), triton.cdiv(num_tuples, TUPLES)
    own_scores = out.scores if scores is None else None
    shared = {"SCORE_MAP": tuple_set.score_map, "GIVEN": scores is not None, **OPTIONS}
    with torch.cuda.device_of(out.scores):
        s = _scratch(out.scores, tokens, tuples, bool(tuple_set.nll))
        sums = (own_scores, out.logps, s.nll, s.linear, out.lengths)
        _sums(tokens, token_set, num_sequences, sums, s.searched, num_entries)
        counts = None
        if num_tuples and s.nll_slopes is not None and tuple_set.nll_normalizer == BATCH.value:
            counts = out.lengths.new_empty(programs)
            count_kernel[(programs,)](
                tuples.index, out.lengths, tuple(tuple_set.nll), num_sequences, num_tuples, counts, LANES=TUPLES,
                num_warps=4, **OPTIONS,
            )  # fmt: skip
        if num_tuples:
            factor = 1 / num_tuples if tuple_set.mean else 1.0
            tuples_kernel[(programs,)](
                *tuples, _rows(tuple_set.table, num_members + 5), tuple(tuple_set.nll), tuple_set.score_map_coef,
                factor, tuple_set.beta, num_sequences, num_tuples, out.scores, out.lengths, s.nll, counts, programs,
                out.losses, out.rewards, out.nll, s.score_slopes, s.nll_slopes, s.partials, *s.searched,
                LINKS=tuple(tuple_set.links), K=num_members, NORMALIZER=tuple_set.nll_normalizer, LANES=TUPLES,
                num_warps=4, **shared,
            )  # fmt: skip
        sequences_kernel[(num_sequences + 1,)](
            tuples.index, s.order, s.first, s.last, num_sequences, num_tuples, s.score_slopes, s.nll_slopes, out.scores,
            out.lengths, tuple_set.score_map_coef, s.partials, programs, s.linear, out.score_grads, out.nll_grads,
            out.loss, MEAN=tuple_set.mean, ENTRIES=ENTRIES, num_warps=1, **shared,
        )  # fmt: skip
    return out


def scores(tokens: Tokens, setting: TokenSettings) -> tuple[Tensor, Tensor]:
    out, lengths = empty_scores(tokens)
    with torch.cuda.device_of(out):
        _sums(tokens, setting, len(out), (out, None, None, None, lengths), (None, None), 0)
    return out, lengths


def _sums(
    tokens: Tokens,
    setting: TokenSettings,
    num_sequences: int,
    outputs: tuple[Tensor | None, ...],  # [S] each: scores, logps, NLL (fp64), linear (fp64), lengths (int64)
    places: tuple[Tensor | None, Tensor | None],  # [S] each: Scratch.first and last, to be set to an empty range
    num_entries: int,
) -> None:
    """Sums over the tokens of each sequence."""
    if num_sequences == 0:
        return
    num_tokens = 0 if tokens.logps is None else len(tokens.logps)
    device = outputs[-1].device
    block, num_warps, splits = _tiles(num_tokens, num_sequences, device)
    parts = None
    if splits > 1:
        parts = torch.empty(num_sequences, splits, SUMS.value, dtype=torch.float64, device=device)
    sums_kernel[(num_sequences * splits,)](
        *tokens, setting.ref_coef, setting.length_power, num_tokens, splits, parts, *outputs, *places, num_entries,
        PHI=setting.phi, BLOCK=block, num_warps=num_warps, maxnreg=REGISTERS, **OPTIONS,
    )  # fmt: skip
    if parts is not None:
        lanes = triton.next_power_of_2(splits)
        join_kernel[(num_sequences,)](
            parts, splits, setting.length_power, *outputs, LANES=lanes, num_warps=1, **OPTIONS
        )


def _scratch(scores: Tensor, tokens: Tokens, tuples: Tuples, has_nll: bool) -> Scratch:
    def empty(*shape: int) -> Tensor:
        return scores.new_empty(shape, dtype=torch.float64)

    num_sequences, num_tuples = len(scores), len(tuples.index)
    return Scratch(
        empty(num_sequences),
        None if tokens.token_coefs is None else empty(num_sequences),
        *_places(tuples.index, num_sequences),
        empty(tuples.index.numel()),
        empty(tuples.index.numel()) if has_nll else None,
        empty(triton.cdiv(num_tuples, TUPLES)),
    )


def _rows(table: list[float], width: int) -> tuple[tuple[float, ...], ...]:
    """TupleSettings.table as one tuple per term."""
    return tuple(tuple(table[i : i + width]) for i in range(0, len(table), width))


def _places(index: Tensor, num_sequences: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Where the entries of each sequence are: the order that sorts ``index``, and [S] first and last place therein.

    For an index that is small enough to be searched: None, and [S] uninitialised, for kernels to fill.
    """
    if index.numel() <= SCAN:
        return None, index.new_empty(num_sequences), index.new_empty(num_sequences)
    ids, order = index.flatten().sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(num_sequences + 1, device=index.device))
    return order, bounds[:-1], bounds[1:] - 1


def backward(
    grad: Tensor | None,  # []
    score_grads: Tensor | None,  # [S]
    nll_grads: Tensor | None,  # [S]
    tokens: Tokens,
    lengths: Tensor,  # [S]
    setting: TokenSettings,
    needs: list[bool],
) -> TokenGrads:
    grads = empty_grads(tokens, needs)
    num_sequences, num_tokens = len(lengths), len(tokens.logps)
    if num_sequences == 0:
        return TokenGrads(*(g.zero_() for g in grads))
    block, num_warps, splits = _tiles(num_tokens, num_sequences, lengths.device)
    wanted = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    with torch.cuda.device_of(lengths):
        backward_kernel[(num_sequences * splits,)](
            grad, score_grads, nll_grads, *tokens, lengths, setting.ref_coef, setting.length_power, num_tokens,
            num_sequences, splits, *wanted, PHI=setting.phi, BLOCK=block, num_warps=num_warps, **OPTIONS,
        )  # fmt: skip
    return grads


def _tiles(num_tokens: int, num_sequences: int, device: torch.device) -> tuple[int, int, int]:
    """BLOCK and num_warps for sequences of the mean length, and how many programs share one: eight per processor."""
    mean = triton.cdiv(num_tokens, num_sequences)
    block = min(1024, max(128, triton.next_power_of_2(mean)))
    splits = triton.cdiv(8 * _processors(device), num_sequences)
    return block, block // 128, max(1, min(splits, mean // (2 * block), 1024))


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; in the interpreter, where only the splitting itself is of interest, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_TYPES = {
    **dict.fromkeys(("cu_seqlens_ptr", "lengths_ptr", "index_ptr", "first_ptr", "last_ptr", "order_ptr"), "*i64:16"),
    **dict.fromkeys(("nll_sums_ptr", "linear_ptr", "parts_ptr", "partials_ptr"), "*fp64:16"),
    **dict.fromkeys(("score_slopes_ptr", "nll_slopes_ptr"), "*fp64:16"),
    **dict.fromkeys(("ref_coef", "length_power", "score_map_coef", "factor", "beta"), "fp32"),
    **dict.fromkeys(("num_tokens", "num_sequences", "num_tuples", "num_entries", "num_counts", "num_partials"), "i32"),
    "mask_ptr": "*i1:16",
    "counts_ptr": "*i64:16",
    "splits": "i32",
}
_PLAIN = {"weights_ptr", "kl_ptr", "kl_weights_ptr", "nll_weights_ptr", "token_coefs_ptr"}
_PLAIN_SUMS = _PLAIN | {"linear_ptr", "parts_ptr"}
_PLAIN_GRADS = _PLAIN | {"ref_ptr"} | {name for name in backward_kernel.arg_names if name.startswith("grad_")}
_PLAIN_GRADS -= {"grad_ptr", "grad_logps_ptr"}
_PLAIN_TUPLES = {"omegas_ptr", "margins_ptr", "params_ptr", "beta_scales_ptr", "counts_ptr"}
_ALL_LINKS = tuple(range(len(LINKS)))


def _aot(kernel: Any, label: str, num_warps: int, absent: set[str], **constexprs: Any) -> AotConfig:
    """How the launchers above compile ``kernel``, with the arguments in ``absent`` None. Floats are fp32 pointers."""
    members, terms = constexprs.get("K", 2), len(constexprs.get("LINKS", ()))
    types = _TYPES | {"table": (("fp32",) * (members + 5),) * terms, "nll_coefs": ("fp32",) * members}
    constexprs |= dict.fromkeys(absent)
    signature = {name: types.get(name, "*fp32:16") for name in kernel.arg_names if name not in constexprs}
    limit = REGISTERS if kernel is sums_kernel else None
    return AotConfig(label, kernel, signature, constexprs, num_warps, maxnreg=limit)


def _aot_tuples(label: str, absent: set[str], links: tuple[int, ...], members: int, score_map: int) -> AotConfig:
    settings = {"LINKS": links, "K": members, "SCORE_MAP": score_map, "GIVEN": False}
    return _aot(tuples_kernel, label, 4, absent, NORMALIZER=BATCH.value, LANES=TUPLES, **settings)


AOT = [
    *(_aot(sums_kernel, f"plain, {b}", b // 128, _PLAIN_SUMS, splits=1, PHI=0, BLOCK=b) for b in (128, 256, 512, 1024)),
    _aot(sums_kernel, "everything", 8, set(), PHI=1, BLOCK=1024),
    _aot(sums_kernel, "everything, short", 2, {"parts_ptr"}, splits=1, PHI=1, BLOCK=256),
    _aot(join_kernel, "", 1, set(), LANES=1024),
    _aot(count_kernel, "", 4, set(), LANES=TUPLES),
    _aot_tuples("dpo", _PLAIN_TUPLES | {"nll_slopes_ptr"}, (0,), 2, 0),
    _aot_tuples("orpo", _PLAIN_TUPLES - {"counts_ptr"}, (0,), 2, 3),
    _aot_tuples("every link, three members", set(), _ALL_LINKS, 3, 1),
    *(
        _aot(sequences_kernel, label, 1, absent, SCORE_MAP=score_map, GIVEN=False, MEAN=True, ENTRIES=ENTRIES)
        for label, absent, score_map in (
            ("plain", {"order_ptr", "nll_slopes_ptr", "linear_ptr"}, 0),
            ("everything", set(), 3),
        )
    ),
    *(
        _aot(backward_kernel, f"plain, {b}", b // 128, _PLAIN_GRADS, splits=1, PHI=0, BLOCK=b)
        for b in (128, 256, 512, 1024)
    ),
    _aot(backward_kernel, "everything", 8, set(), PHI=1, BLOCK=1024),
]
