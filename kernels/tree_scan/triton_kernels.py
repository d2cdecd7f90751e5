"""The Triton backend of ``path_sum`` and ``subtree_sum``: steps into place, their prefix sums, sums out of them.

A step is what a walk over the forest adds: one per node for subtrees, two per node for paths (added when it is entered,
taken off when it is left); README.md says which. Prefix sums of M steps are made in two launches: the sum of every
block of steps, then in every block what stands before it, added up again by each, and its own. All of it is fp64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.aot import AotConfig

BLOCK = 1024  # steps of a program
NODES = 256  # nodes of a program


@triton.jit(do_not_specialize=["num_nodes"])
def place_kernel(
    values_ptr,  # [N, K], any strides
    depth_ptr,  # [N] int64
    end_ptr,  # [N] int64
    steps_ptr,  # [K, M] fp64, M = 2 N for paths, N for subtrees
    num_nodes,
    num_columns,
    row_stride,
    column_stride,
    PATH: tl.constexpr,
    NODES: tl.constexpr,
):
    """The steps of NODES nodes of one column."""
    program = tl.program_id(0).to(tl.int64)
    column = program % num_columns
    node = program // num_columns * NODES + tl.arange(0, NODES)
    inside = node < num_nodes
    value = tl.load(values_ptr + node * row_stride + column * column_stride, mask=inside, other=0).to(tl.float64)
    if PATH:
        depth = tl.load(depth_ptr + node, mask=inside, other=0)
        end = tl.load(end_ptr + node, mask=inside, other=0)
        steps_ptr += column * num_nodes * 2
        tl.store(steps_ptr + 2 * node - depth, value, mask=inside)
        tl.store(steps_ptr + 2 * end - depth - 1, -value, mask=inside)
    else:
        tl.store(steps_ptr + column * num_nodes + node, value, mask=inside)


@triton.jit(do_not_specialize=["num_steps", "num_blocks"])
def blocks_kernel(
    steps_ptr,  # [K, M] fp64
    sums_ptr,  # [K, blocks] fp64
    num_steps,
    num_blocks,
    STEPS: tl.constexpr,
):
    """sums[k, b] = sum of the STEPS steps of a block."""
    program = tl.program_id(0).to(tl.int64)
    column, block = program // num_blocks, program % num_blocks
    at = block * STEPS + tl.arange(0, STEPS)
    step = tl.load(steps_ptr + column * num_steps + at, mask=at < num_steps, other=0.0)
    tl.store(sums_ptr + program, tl.sum(step, 0))


@triton.jit(do_not_specialize=["num_steps", "num_blocks"])
def prefix_kernel(
    steps_ptr,  # [K, M] fp64, becomes the sum of the steps up to each
    sums_ptr,  # [K, blocks] fp64
    num_steps,
    num_blocks,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column, block = program // num_blocks, program % num_blocks
    lanes = tl.arange(0, STEPS)
    before = tl.zeros([STEPS], tl.float64)
    for start in range(0, block, STEPS):
        before += tl.load(sums_ptr + column * num_blocks + start + lanes, mask=start + lanes < block, other=0.0)
    at = block * STEPS + lanes
    steps_ptr += column * num_steps
    step = tl.load(steps_ptr + at, mask=at < num_steps, other=0.0)
    tl.store(steps_ptr + at, tl.sum(before, 0) + tl.cumsum(step, 0), mask=at < num_steps)


@triton.jit(do_not_specialize=["num_nodes"])
def take_kernel(
    prefix_ptr,  # [K, M] fp64
    depth_ptr,  # [N] int64
    end_ptr,  # [N] int64
    out_ptr,  # [N, K] contiguous
    num_nodes,
    num_columns,
    PATH: tl.constexpr,
    NODES: tl.constexpr,
):
    """The sums of NODES nodes of one column."""
    program = tl.program_id(0).to(tl.int64)
    column = program % num_columns
    node = program // num_columns * NODES + tl.arange(0, NODES)
    inside = node < num_nodes
    if PATH:
        at = column * num_nodes * 2 + 2 * node - tl.load(depth_ptr + node, mask=inside, other=0)
    else:
        at = column * num_nodes + tl.load(end_ptr + node, mask=inside, other=1) - 1
    total = tl.load(prefix_ptr + at, mask=inside, other=0.0)
    if not PATH:
        total -= tl.load(prefix_ptr + column * num_nodes + node - 1, mask=inside & (node > 0), other=0.0)
    if out_ptr.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)  # triton rounds to the 16-bit types from here
    tl.store(out_ptr + node * num_columns + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def path_sum(values: Tensor, parent: Tensor, depth: Tensor, subtree_end: Tensor) -> Tensor:
    return _scan(values, depth, subtree_end, path=True)


def subtree_sum(values: Tensor, parent: Tensor, depth: Tensor, subtree_end: Tensor) -> Tensor:
    return _scan(values, depth, subtree_end, path=False)


def _scan(
    values: Tensor,  # [N, K]
    depth: Tensor,  # [N] int64
    subtree_end: Tensor,  # [N] int64
    path: bool,
) -> Tensor:
    nodes, columns = values.shape
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    num_steps = 2 * nodes if path else nodes
    num_blocks = triton.cdiv(num_steps, BLOCK)
    steps = torch.empty(columns, num_steps, dtype=torch.float64, device=values.device)
    sums = torch.empty(columns, num_blocks, dtype=torch.float64, device=values.device)
    by_node, by_step = (triton.cdiv(nodes, NODES) * columns,), (num_blocks * columns,)
    shape = {"PATH": path, "NODES": NODES}
    with torch.cuda.device_of(values):
        place_kernel[by_node](values, depth, subtree_end, steps, nodes, columns, *values.stride(), **shape)
        if num_blocks > 1:
            blocks_kernel[by_step](steps, sums, num_steps, num_blocks, STEPS=BLOCK)
        prefix_kernel[by_step](steps, sums, num_steps, num_blocks, STEPS=BLOCK)
        take_kernel[by_node](steps, depth, subtree_end, out, nodes, columns, **shape)
    return out


_DOUBLES = ("steps_ptr", "sums_ptr", "prefix_ptr")
_SCALARS = ("num_nodes", "num_columns", "row_stride", "column_stride", "num_steps", "num_blocks")
_TYPES = dict.fromkeys(_DOUBLES, "*fp64:16") | dict.fromkeys(_SCALARS, "i32")
_TYPES |= {"depth_ptr": "*i64:16", "end_ptr": "*i64:16"}


def _aot(kernel, label: str, element: str = "*fp32:16", **constexprs) -> AotConfig:
    """How ``_scan`` compiles ``kernel``."""
    types = _TYPES | {"values_ptr": element, "out_ptr": element}
    signature = {name: types[name] for name in kernel.arg_names if name not in constexprs}
    return AotConfig(label, kernel, signature, constexprs, num_warps=4)


AOT = [
    *(
        _aot(kernel, f"{'path' if path else 'subtree'} {element[1:5]}", element, PATH=path, NODES=NODES)
        for kernel in (place_kernel, take_kernel)
        for path in (True, False)
        for element in ("*fp32:16", "*bf16:16", "*fp64:16")
    ),
    _aot(blocks_kernel, "", STEPS=BLOCK),
    _aot(prefix_kernel, "", STEPS=BLOCK),
]
