"""token_logprobs in Triton: ``forward`` and ``backward`` with the signatures of reference.py, and what is compiled.

Forward: a program reads one row, or one of ``splits`` parts of it where there are too few rows to fill the GPU; a
second kernel then joins the parts in a fixed order. Backward: a program reads and writes one tile, in place if asked.
Floor: the bytes of the logits over the memory bandwidth, once forward, twice backward.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastpo.aot import AotConfig
from fastpo.kernels.token_logprobs.triton_backward import backward_kernel
from fastpo.kernels.token_logprobs.triton_forward import SLOTS, STATE, forward_kernel, join_kernel


def forward(
    logits: Tensor,  # [B, T, V] float32, bfloat16 or float16, unit last stride; the rest as in reference.forward
    labels: Tensor,
    temperatures: Tensor | None,
    label_set: Tensor | None,
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    topk: int,
    logps: Tensor,
    normalizer: Tensor,
    *stats: Tensor,  # logsumexp, entropy, sum_p2, topk_mass, topk_entropy, label_set_prob: [N], or [0] if not asked for
) -> None:
    num_rows, vocab = labels.shape[0], logits.shape[2]
    if num_rows == 0:
        return
    wanted = [out if out.numel() else None for out in stats]
    top = wanted[3] is not None or wanted[4] is not None
    lanes, vec, num_warps = tile_shape(logits.dtype, vocab, top)
    splits, part_size = split_row(num_rows, vocab, lanes * vec, multiprocessors(logits.device))
    fields = STATE.value + (SLOTS.value if top else 0)
    parts = logps.new_empty(num_rows, splits, fields) if splits > 1 else None
    row_args = (
        logits, logits.stride(0), logits.stride(1), logits.shape[1], labels, temperatures, label_set,
        0 if label_set is None else label_set.shape[0], temperature, logit_softcap or None, ignore_index,
        min(topk, vocab), num_rows, vocab,
    )  # fmt: skip
    outputs = (parts, logps, normalizer, *wanted)
    with torch.cuda.device_of(logits):
        forward_kernel[(num_rows, splits)](
            *row_args, part_size, *outputs,
            LANES=lanes, VEC=vec, ALIGNED=_aligned(logits), num_warps=num_warps, maxnreg=_registers(top),
            enable_fp_fusion=True,
        )  # fmt: skip
        if parts is not None:
            joined = triton.next_power_of_2(splits)
            join_kernel[(num_rows,)](*row_args, splits, *outputs, LANES=joined, num_warps=1, enable_fp_fusion=True)


def backward(
    logits: Tensor,  # [B, T, V], as in forward; the rest as in reference.backward
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    ignore_index: int,
    normalizer: Tensor,
    grad_logps: Tensor,
    coefs: Tensor | None,
    grad_logits: Tensor,
) -> None:
    num_rows, vocab = labels.shape[0], logits.shape[2]
    if num_rows == 0:
        return
    lanes, vec, num_warps = tile_shape(logits.dtype, vocab)
    tiles = triton.cdiv(vocab, lanes * vec)
    with torch.cuda.device_of(logits):
        backward_kernel[(num_rows * tiles,)](
            logits, logits.stride(0), logits.stride(1), grad_logits, grad_logits.stride(0), grad_logits.stride(1),
            logits.shape[1], labels, temperatures, temperature, logit_softcap or None, ignore_index, num_rows, vocab,
            tiles, normalizer, grad_logps, coefs, TILE=lanes * vec, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip


def _registers(top: bool) -> int | None:
    """A limit that nothing reaches: left to itself, ptxas trades a few spills for occupancy here."""
    return 64 if top else None


def _aligned(logits: Tensor) -> bool:
    return all(x * logits.itemsize % 16 == 0 for x in logits.stride()[:2]) and logits.data_ptr() % 16 == 0


def tile_shape(dtype: torch.dtype, vocab: int, top: bool = False) -> tuple[int, int, int]:
    """LANES, VEC (16 bytes) and num_warps: 4096 elements over 256 threads, less for a small vocabulary.

    Half as many with the top k, whose search holds the tile in registers.
    """
    vec = 16 // dtype.itemsize
    tile = min(2048 if top else 4096, max(256, triton.next_power_of_2(vocab)))
    return tile // vec, vec, 8 if tile >= 2048 else 4


def split_row(num_rows: int, vocab: int, tile: int, processors: int) -> tuple[int, int]:
    """How many programs share a row, and how many elements each reads: eight programs per multiprocessor in all."""
    tiles = triton.cdiv(vocab, tile)
    splits = max(1, min(triton.cdiv(8 * processors, num_rows), tiles // 2))
    tiles_each = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, tiles_each), tiles_each * tile


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; in the interpreter, where only the splitting itself is of interest, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_SCALARS = {
    "temperature": "fp32", "softcap": "fp32", "ignore_index": "i32", "topk": "i32", "num_rows": "i32", "inner": "i32",
    "label_set_size": "i32", "splits": "i32", "tiles": "i32", "vocab": "i32:16", "part_size": "i32:16",
}  # fmt: skip
_POINTERS = dict.fromkeys(
    (
        "temperatures_ptr", "parts_ptr", "logps_ptr", "normalizer_ptr", "logsumexp_ptr", "entropy_ptr", "sum_p2_ptr",
        "topk_mass_ptr", "topk_entropy_ptr", "label_set_prob_ptr", "grad_logps_ptr", "coefs_ptr",
    ), "*fp32:16",
)  # fmt: skip
_EXTRAS = {"temperatures_ptr", "label_set_ptr", "softcap", "coefs_ptr"}
_STATS = {"logsumexp_ptr", "entropy_ptr", "sum_p2_ptr", "topk_mass_ptr", "topk_entropy_ptr", "label_set_prob_ptr"}


def _aot(kernel: Any, label: str, dtype: torch.dtype, absent: set[str], aligned: bool = True) -> AotConfig:
    """How the launchers above compile ``kernel`` for a large vocabulary, with the arguments in ``absent`` None."""
    top = kernel is forward_kernel and "topk_mass_ptr" not in absent
    lanes, vec, num_warps = tile_shape(dtype, 128256, top)
    if kernel is join_kernel:
        num_warps = 1
    shape = {
        forward_kernel: {"LANES": lanes, "VEC": vec, "ALIGNED": aligned},
        join_kernel: {"LANES": 16},
        backward_kernel: {"TILE": lanes * vec},
    }[kernel]
    element = {torch.float32: "*fp32:16", torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16"}[dtype]
    types = _SCALARS | _POINTERS | {"labels_ptr": "*i64:16", "label_set_ptr": "*i64:16"}
    types |= {"logits_ptr": element, "grad_ptr": element}
    types |= {name: "i64:16" for name in kernel.arg_names if "stride" in name}
    if not aligned:
        types = {name: kind.removesuffix(":16") if kind[0] == "i" else kind for name, kind in types.items()}
    signature = {name: types[name] for name in kernel.arg_names if name not in absent | shape.keys()}
    constexprs = shape | {name: None for name in kernel.arg_names if name in absent}
    name = f"{label} {dtype}".replace("torch.", "")
    return AotConfig(name, kernel, signature, constexprs, num_warps, maxnreg=_registers(top))


AOT = [
    *(
        _aot(kernel, label, dtype, absent)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for kernel, label, absent in (
            (forward_kernel, "plain", _STATS | _EXTRAS | {"parts_ptr"}),
            (forward_kernel, "entropy", _STATS - {"entropy_ptr"} | _EXTRAS | {"parts_ptr"}),
            (forward_kernel, "everything", {"parts_ptr"}),
            (forward_kernel, "split", _STATS | _EXTRAS),
            (forward_kernel, "split, everything", set()),
            (join_kernel, "plain", _STATS | _EXTRAS),
            (join_kernel, "everything", set()),
            (backward_kernel, "plain", _EXTRAS),
            (backward_kernel, "everything", set()),
        )
    ),
    _aot(forward_kernel, "plain, odd vocabulary,", torch.bfloat16, _STATS | _EXTRAS | {"parts_ptr"}, aligned=False),
    _aot(backward_kernel, "plain, odd vocabulary,", torch.bfloat16, _EXTRAS, aligned=False),
]
