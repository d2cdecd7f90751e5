"""The matrix products of a fused LM head, on one tile of R rows x v vocabulary entries, always with an fp32 result.

    logits   z  = x w^T      [R, v]
    times    u  = e w        [R, H]
    outer    dw = d^T x      [v, H]

- CUDA: cuBLAS. bf16 and fp16 operands give fp32 results (``out_dtype``): rounding logits before the logsumexp is where
  fused losses drift from the trainer's.
- CPU: oneDNN's fp32 kernels where this torch has them, which run at 2.5 times MKL's rate on AMD processors with AVX-512
  and at the same rate on Intel's; else MKL. No CPU library here takes bf16 operands to an fp32 result, so tiles of
  low-precision operands are widened first.

oneDNN multiplies by a matrix of any strides but copies its first operand unless that is contiguous, so
``logits_for_gradient`` and ``kept_tile`` give tiles in the layout that ``outer`` wants, as [R, v] views.
"""

import threading

import torch
from torch import Tensor


class Tally(threading.local):
    """Operations of the GEMMs that this thread has run, for FlopCounterMode, which does not see into custom ops."""

    operations = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """One product of a [M, K] and b [K, N]."""
        self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]


tally = Tally()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _onednn(x: Tensor) -> bool:
    return _has_onednn() and x.device.type == "cpu" and x.dtype == torch.float32


def _linear(x: Tensor, w: Tensor) -> Tensor:
    """oneDNN's x w^T: x [M, K] contiguous, w [N, K] of any strides -> [M, N]."""
    tally.add(x, w.t())
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def operand(x: Tensor) -> Tensor:
    """x, in the type that the products take on its device."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def logits(x: Tensor, w: Tensor) -> Tensor:
    """x [R, H], w [v, H] -> [R, v] fp32, contiguous; on a CPU the same bits as ``logits_for_gradient``."""
    # oneDNN sums over a tile of a transposed weight in another order; p of logits made again would not sum to 1.
    return _linear(x.contiguous(), w.contiguous()) if _onednn(x) else _mm(x, w.t())


def logits_for_gradient(x: Tensor, w: Tensor) -> Tensor:
    """``logits`` in the layout that ``outer`` wants."""
    return _linear(w.contiguous(), x).t() if _onednn(x) else _mm(x, w.t())


def tile_for_product(z: Tensor, w: Tensor, kept: Tensor | None = None) -> Tensor:
    """Where a tile goes that logits z [R, v] become, to be multiplied with w: on a GPU where it is kept, if it is."""
    if kept is not None and z.device.type != "cpu":
        return kept
    return z if z.dtype == w.dtype else torch.empty_like(z, dtype=w.dtype)


def kept_tile(memory: Tensor, rows: int, columns: int) -> Tensor:
    """A tile [rows, columns] in flat memory of that size, in the layout that ``outer`` wants."""
    if memory.device.type == "cpu" and _has_onednn():
        return memory.view(columns, rows).t()
    return memory.view(rows, columns)


def times(e: Tensor, w: Tensor) -> Tensor:
    """e [R, v], w [v, H] -> [R, H] fp32."""
    e = operand(e)
    return _linear(e.contiguous(), w.t()) if _onednn(e) else _mm(e, w)


def outer(d: Tensor, x: Tensor) -> Tensor:
    """d [R, v], x [R, H] -> d^T x [v, H] fp32."""
    d = operand(d)
    return _linear(d.t().contiguous(), x.t()) if _onednn(d) else _mm(d.t(), x)


def narrow_outer(d: Tensor, m: Tensor) -> Tensor:
    """``outer`` with a m [R, r] of few columns: LoRA's rank, or 1 for the sums of d's columns, which are no GEMM."""
    if m.shape[1] == 1 and m.dtype in (torch.float32, torch.float64):
        return torch.mv(operand(d).t(), m[:, 0])[:, None]
    return small(d.t(), m)


def small(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [K, N] -> [M, N] fp32, one of the sizes being small (LoRA's rank)."""
    return _mm(operand(a), operand(b))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of logits and of everything that is accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [K, N] of one type -> [M, N], float32 unless they are float64."""
    tally.add(a, b)
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32)
