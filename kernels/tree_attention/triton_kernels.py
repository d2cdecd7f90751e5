"""Launchers of the Triton kernels of ``tree_attention``, and the configurations that are compiled ahead of time."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastpo.aot import AotConfig
from fastpo.kernels.tree_attention.blocks import BLOCK, AttentionBlocks
from fastpo.kernels.tree_attention.triton_backward import delta_kernel, keys_kernel, queries_kernel
from fastpo.kernels.tree_attention.triton_forward import forward_kernel

_SPLIT_BELOW = 4  # programs per multiprocessor; fewer are split along the queries
_MAX_SPLITS = 8


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time, and how."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_of(kernel: Any, size: int, element: int) -> Tile:
    """The shape of ``kernel`` for heads of ``size`` (a power of two) and ``element`` bytes a number."""
    size = max(64, size)
    return _FLOAT32[kernel][size] if element == 4 else _HALVES[kernel][size]


# Found by compiling for sm_80, sm_90 and sm_100: the largest that spill nothing (but for float32 at D = 256), with all
# options on. Not timed on a GPU yet.
_HALVES = {
    forward_kernel: {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    queries_kernel: {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    keys_kernel: {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
}
_FLOAT32 = {
    forward_kernel: {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    queries_kernel: {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    keys_kernel: {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 2)},
}
_REGISTERS = 255  # a thread may have: ptxas would spill to fit more programs on a multiprocessor


def forward(
    q: Tensor,  # [N, Hq, D]
    k: Tensor,  # [N, Hkv, D]
    v: Tensor,  # [N, Hkv, D]
    blocks: AttentionBlocks,
    sinks: Tensor | None,  # [Hq] fp32
    scale: float,
    softcap: float,  # 0: none
    window: int,  # 0: none
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] and logsumexp [Hq, N]."""
    out, logsumexp = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    if q.shape[0] == 0:
        return out, logsumexp
    shape = _shape(forward_kernel, q, k)
    with torch.cuda.device_of(q):
        forward_kernel[_query_grid(q, k, shape["BLOCK_M"])](
            q, k, v, _strides(q), _strides(k), _strides(v), sinks, blocks.subtree_end, blocks.depth, blocks.key_blocks,
            out, logsumexp, q.shape[0], blocks.key_blocks.shape[1], k.shape[1], scale, softcap or None, window or None,
            **shape,
        )  # fmt: skip
    return out, logsumexp


def backward(
    grad_out: Tensor,  # [N, Hq, D]
    q: Tensor,  # [N, Hq, D]
    k: Tensor,  # [N, Hkv, D]
    v: Tensor,  # [N, Hkv, D]
    out: Tensor,  # [N, Hq, D]
    logsumexp: Tensor,  # [Hq, N]
    blocks: AttentionBlocks,
    sinks: Tensor | None,  # [Hq] fp32
    scale: float,
    softcap: float,
    window: int,
) -> list[Tensor]:
    """Gradients of q, k, v and, where they are there, of sinks."""
    delta, grad_q = torch.empty_like(logsumexp), q.new_empty(q.shape)
    splits = _splits(q, k)
    kind = k.dtype if splits == 1 else torch.float32
    grad_k, grad_v = (x.new_empty((splits, *x.shape), dtype=kind) for x in (k, v))
    if q.shape[0]:
        _launch_backward(
            grad_out, q, k, v, out, logsumexp, delta, blocks, scale, softcap, window, grad_q, grad_k, grad_v
        )
    grads = [grad_q, *(x[0] if splits == 1 else x.sum(0).to(k.dtype) for x in (grad_k, grad_v))]
    if sinks is not None:
        grads.append(-(torch.exp(sinks[:, None] - logsumexp) * delta).sum(1))
    return grads


def _launch_backward(
    grad_out, q, k, v, out, logsumexp, delta, blocks, scale, softcap, window, grad_q, grad_k, grad_v
) -> None:
    tokens, heads, size = q.shape
    padded = _padded(size)
    of_all = (
        q, k, v, grad_out, _strides(q), _strides(k), _strides(v), _strides(grad_out), blocks.subtree_end, blocks.depth,
        blocks.key_blocks, logsumexp, delta,
    )  # fmt: skip
    scalars = (tokens, blocks.key_blocks.shape[1], k.shape[1], scale, softcap or None, window or None)
    by_query, by_key = _shape(queries_kernel, q, k), _shape(keys_kernel, q, k)
    with torch.cuda.device_of(q):
        delta_kernel[(triton.cdiv(tokens, 16), heads)](
            grad_out, _strides(grad_out), out, _strides(out), delta, tokens, D=size, BLOCK_D=padded, BLOCK_M=16,
            num_warps=4,
        )  # fmt: skip
        queries_kernel[_query_grid(q, k, by_query["BLOCK_M"])](*of_all, grad_q, *scalars, **by_query)
        keys_kernel[(triton.cdiv(tokens, by_key["BLOCK_N"]), k.shape[1], len(grad_k))](
            *of_all, grad_k, grad_v, *scalars, **by_key
        )


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _shape(kernel: Any, q: Tensor, k: Tensor) -> dict[str, int]:
    """The constants that ``kernel`` is compiled for."""
    tile = tile_of(kernel, _padded(q.shape[2]), q.element_size())
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "BLOCK_D": _padded(q.shape[2]),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": _REGISTERS,
    }


def _query_grid(q: Tensor, k: Tensor, rows: int) -> tuple[int, int]:
    return triton.cdiv(q.shape[0] * (q.shape[1] // k.shape[1]), rows), k.shape[1]


def _splits(q: Tensor, k: Tensor) -> int:
    """Parts of the queries of a block of keys: a root's are as many as there are tokens, and few programs have them."""
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    programs = max(1, triton.cdiv(q.shape[0], BLOCK) * k.shape[1])
    return max(1, min(_MAX_SPLITS, triton.cdiv(_SPLIT_BELOW * processors, programs)))


_TYPES = {
    "q_strides": ("i32:16", "i32:16"), "k_strides": ("i32:16", "i32:16"), "v_strides": ("i32:16", "i32:16"),
    "grad_out_strides": ("i32:16", "i32:16"), "out_strides": ("i32:16", "i32:16"), "sinks_ptr": "*fp32:16",
    "end_ptr": "*i32:16", "depth_ptr": "*i32:16", "blocks_ptr": "*i32:16", "logsumexp_ptr": "*fp32:16",
    "delta_ptr": "*fp32:16", "tokens": "i32", "num_blocks": "i32", "kv_heads": "i32", "scale": "fp32",
    "softcap": "fp32", "window": "i32",
}  # fmt: skip


def _aot(kernel: Any, size: int, dtype: str, label: str = "plain") -> AotConfig:
    """How the launchers compile ``kernel`` for four query heads to a key head. "split": dK and dV in parts, fp32."""
    padded, element = _padded(size), 4 if dtype == "fp32" else 2
    tile = Tile(16, 1, 4, 1) if kernel is delta_kernel else tile_of(kernel, padded, element)
    constants = {"GROUP": 4, "D": size, "BLOCK_D": padded, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    if label != "everything":
        constants |= {"softcap": None, "window": None, "sinks_ptr": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = _TYPES | (dict.fromkeys(("grad_k_ptr", "grad_v_ptr"), "*fp32:16") if label == "split" else {})
    signature = {n: types.get(n, f"*{dtype}:16") for n in kernel.arg_names if n not in constants}
    maxnreg = None if kernel is delta_kernel else _REGISTERS
    return AotConfig(f"{label} D={size} {dtype}", kernel, signature, constants, tile.warps, tile.stages, maxnreg)


_KERNELS = (forward_kernel, queries_kernel, keys_kernel)
_SHIPPED = {  # head sizes by type and label; float16 is compiled as bfloat16 is, 96 as 80 (both are padded to 128)
    ("bf16", "plain"): (32, 64, 80, 128),
    ("bf16", "everything"): (64, 128, 256),
    ("fp32", "plain"): (64, 128),
    ("fp32", "everything"): (128,),
}
AOT = [
    *(_aot(delta_kernel, 128, dtype) for dtype in ("bf16", "fp32")),
    *(
        _aot(kernel, size, dtype, label)
        for (dtype, label), sizes in _SHIPPED.items()
        for size in sizes
        for kernel in _KERNELS
    ),
    *(_aot(keys_kernel, size, "bf16", "split") for size in (64, 128)),
]
