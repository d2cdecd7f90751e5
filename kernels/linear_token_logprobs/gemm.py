"""The matrix products of a fused LM head, on one tile of R rows x v vocabulary entries, always with an fp32 result.

    logits   z  = x w^T               [R, v]
    times    u  = decay u + e w       [R, H]
    outer    dw = dw + d^T x          [v, H]

- CUDA: cuBLAS. bf16 and fp16 operands give fp32 results (``out_dtype``): rounding logits before the logsumexp is where
  fused losses drift from the trainer's.
- CPU: csrc/gemm.cpp, which adds to its result in place, takes operands of 16 bits as they are and needs some 10 MiB of
  memory, where libraries return new tensors, copy and widen. It runs at 95-103% of oneDNN's rate on an AMD processor,
  with AVX-512 and with AVX2, and so at 2.7 and 1.5 times MKL's there (benchmarks/products.py); on Intel's it has not
  been measured. Where it is not built, and in fp64: what torch takes.
"""

import platform
import threading

import torch
from torch import Tensor

from fastpo.dispatch import Extension


class Tally(threading.local):
    """Operations of the GEMMs that this thread has run, for FlopCounterMode, which does not see into custom ops."""

    operations = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """One product of a [M, K] and b [K, N]."""
        self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]


tally = Tally()


_library = torch.library.Library("fastpo_c", "FRAGMENT")
_library.define("gemm(Tensor a, Tensor b, Tensor(a!) out, Tensor? decay, bool add, bool past_cache) -> ()")
_multiply = torch.ops.fastpo_c.gemm
_MISSING = Extension("_C", ("gemm",))


def _ours(x: Tensor) -> bool:
    """Whether csrc/gemm.cpp multiplies x: on processors that it has fast kernels for."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and _X86 and _MISSING() is None


_X86 = platform.machine().lower() in ("x86_64", "amd64")


def logits(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x [R, H], w [v, H] -> [R, v], in ``out`` if it is given."""
    return _product(x, w.t(), out)


def times(e: Tensor, w: Tensor, out: Tensor | None = None, decay: Tensor | None = None) -> Tensor:
    """e [R, v], w [v, H] -> [R, H]; with decay [R] added to what is in ``out`` times that."""
    return _product(e, w, out, decay)


def outer(d: Tensor, x: Tensor, out: Tensor | None = None, add: bool = False, past_cache: bool = False) -> Tensor:
    """d [R, v], x [R, H] -> d^T x [v, H]; or added to what is in ``out``. ``past_cache``: no one reads it soon."""
    return _product(d.t(), x, out, add=add, past_cache=past_cache)


def _product(
    a: Tensor,  # [M, K]
    b: Tensor,  # [K, N]
    out: Tensor | None,  # [M, N], of the wide type and with contiguous rows; apart from a and b in memory
    decay: Tensor | None = None,  # [M]
    add: bool = False,
    past_cache: bool = False,
) -> Tensor:
    """ab, out + ab or decay out + ab, in ``out``; None: a new tensor."""
    if _ours(a):
        if out is None:
            out = a.new_empty(a.shape[0], b.shape[1], dtype=wide(a.dtype))
        tally.add(a, b)
        _multiply(_dense(a), _dense(b), out, decay, add, past_cache)
        return out
    product = _mm(operand(a), operand(b))
    if out is None:
        return product
    if decay is not None:
        return torch.addcmul(product, out, decay[:, None], out=out)
    return out.add_(product) if add else out.copy_(product)


def _dense(x: Tensor) -> Tensor:
    """x [M, N], with a stride of 1."""
    return x if 1 in x.stride() else x.contiguous()


def operand(x: Tensor) -> Tensor:
    """x, in the type that torch's products take on its device."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def spare(x: Tensor, elements: int) -> Tensor | None:
    """[elements] of memory for tiles, one after another, of the wide type; None on a GPU, whose allocator keeps it."""
    return x.new_empty(elements, dtype=wide(x.dtype)) if x.device.type == "cpu" else None


def tile_for_product(z: Tensor, w: Tensor, kept: Tensor | None = None) -> Tensor:
    """Where a tile goes that logits z [R, v] become, to be multiplied with w.

    On a CPU over the logits; on a GPU where it is kept, if it is, or in w's type.
    """
    if z.device.type == "cpu":
        return z
    if kept is not None:
        return kept
    return z if z.dtype == w.dtype else torch.empty_like(z, dtype=w.dtype)


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
    with torch.autocast(a.device.type, enabled=False):  # which would round the result
        if a.dtype in (torch.float32, torch.float64):
            return torch.mm(a, b)
        return torch.mm(a, b, out_dtype=torch.float32)
