"""``path_sum`` and ``subtree_sum``: schemas, backends, autograd, public functions. README.md derives them.

Shapes: N nodes of a forest in preorder, K values to each.
"""

from typing import Any

import torch
from torch import Tensor

from fastpo.dispatch import Backend, Extension, Op, always, triton_missing
from fastpo.kernels.tree_scan import reference
from fastpo.types import TokenTree

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCHEMA = "(Tensor values, Tensor parent, Tensor depth, Tensor subtree_end) -> Tensor"

# C++ and CUDA implement these for their devices.
_compiled = torch.library.Library("fastpo_c", "FRAGMENT")
_OPS = ("tree_path_sum", "tree_subtree_sum")
for _name in _OPS:
    _compiled.define(f"{_name}{_SCHEMA}")


class _Compiled:
    path_sum = torch.ops.fastpo_c.tree_path_sum
    subtree_sum = torch.ops.fastpo_c.tree_subtree_sum


class _Triton:
    """Imports the kernels when they first run: triton is not installed everywhere."""

    def __getattr__(self, name: str) -> Any:
        from fastpo.kernels.tree_scan import triton_kernels

        return getattr(triton_kernels, name)


# Every backend has path_sum and subtree_sum with the signatures of reference.py.
OP = Op(
    "tree_scan",
    [
        Backend("cuda", "cuda", Extension("_cuda", _OPS), always, _Compiled),
        Backend("triton", "cuda", triton_missing, always, _Triton()),
        Backend("cpu", "cpu", Extension("_C", _OPS), always, _Compiled),
        Backend("torch", "any", always, always, reference),
    ],
)


@torch.library.custom_op("fastpo::path_sum", mutates_args=())
def _path_sum_op(
    values: Tensor,  # [N, K]
    parent: Tensor,  # [N] int64, -1 at a root
    depth: Tensor,  # [N] int64
    subtree_end: Tensor,  # [N] int64
) -> Tensor:
    return OP.pick(values.device).impl.path_sum(values, parent, depth, subtree_end)


@torch.library.custom_op("fastpo::subtree_sum", mutates_args=())
def _subtree_sum_op(
    values: Tensor,  # [N, K]
    parent: Tensor,  # [N] int64, -1 at a root
    depth: Tensor,  # [N] int64
    subtree_end: Tensor,  # [N] int64
) -> Tensor:
    return OP.pick(values.device).impl.subtree_sum(values, parent, depth, subtree_end)


def _fake(values: Tensor, parent: Tensor, depth: Tensor, subtree_end: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _save_tree(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


for _op, _transpose in ((_path_sum_op, _subtree_sum_op), (_subtree_sum_op, _path_sum_op)):
    _op.register_fake(_fake)
    _op.register_autograd(
        lambda ctx, grad, transpose=_transpose: (transpose(grad, *ctx.saved_tensors), None, None, None),
        setup_context=_save_tree,
    )


def path_sum(values: Tensor, tree: TokenTree) -> Tensor:
    """Sums from the root down to every node: ``out[i] = sum of values[j] over the ancestors j of i, i included``.

    ::

        visible = (j <= i) & (i < tree.subtree_end[j])     # [N, N]
        out = visible.to(values.dtype) @ values            # [N, ...]

    With log-probs of nodes these are log-probs of prefixes: ``path_sum(logps, tree)[tree.leaves]``, of whole sequences.

    Args:
        values: [N, ...] float32, bfloat16, float16 or float64, any strides.
        tree: only its shape is read: ``parent``, ``depth`` and ``subtree_end``.

    Returns:
        What ``values`` is in shape and type, contiguous. Differentiable, any number of times; the gradient is
        ``subtree_sum`` of the upstream one.

    Raises:
        TypeError, ValueError: one line, before any work. A tree whose depths are of no preorder raises RuntimeError on
        the CPU; on a GPU, which is never waited for, ``fastpo.check_tree`` has to say so before.

    Cost: O(N) operations and bytes, no N x N object (O(N log N) in plain PyTorch). Deterministic. Sums are accumulated
    in fp64, in CUDA C++ in pairs of fp64 numbers: what cancels on the way costs nothing, but in Triton what fp64 rounds
    off the largest sum of the forest. On GPUs an infinite value makes the sums behind it NaN; the CPU never subtracts.

    Source: derived in this folder's README.
    """
    return _run(_path_sum_op, values, tree)


def subtree_sum(values: Tensor, tree: TokenTree) -> Tensor:
    """Sums over every node's subtree: ``out[i] = values[i:tree.subtree_end[i]].sum(0)``.

    The transpose of ``path_sum``, with its arguments, errors, cost and precision; the gradient is ``path_sum`` of the
    upstream one. With the weights of sequences at their leaves, it says what each node's token counts in all.
    """
    return _run(_subtree_sum_op, values, tree)


def _run(op: Any, values: Tensor, tree: TokenTree) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"values is a {type(values).__name__}; it should be a tensor")
    if values.dtype not in _DTYPES:
        raise TypeError(f"values is {values.dtype}; it should be float32, bfloat16, float16 or float64")
    if not isinstance(tree, TokenTree):
        raise TypeError(f"tree is a {type(tree).__name__}; it should be a TokenTree")
    if values.dim() == 0 or values.shape[0] != tree.num_nodes:
        raise ValueError(
            f"values has shape {list(values.shape)}; it should have {tree.num_nodes} rows, the nodes of tree"
        )
    if tree.depth.device != values.device:
        raise ValueError(f"tree is on {tree.depth.device}; it should be on {values.device}, where values is")
    columns = values.shape[1:].numel()
    return op(values.reshape(len(values), columns), tree.parent, tree.depth, tree.subtree_end).view(values.shape)
