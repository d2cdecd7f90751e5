"""Benchmark cases of ``tree_attention``: benchmarks/run.py finds and times them.

Forests, as preference data has them: a question and 16 solutions, four of them different from the start and three
edits of each, which part from it somewhere; the same after a few-shot prompt of 1,024 tokens; search trees of 24-token
steps. The peers: ``sdpa, dense mask`` is torch's attention on the packed forest with its N x N mask; ``sdpa, each
path`` is torch's causal attention on every sequence alone, on tensors in which shared tokens stand again for each of
them; ``flex_attention`` is compiled, forward alone on a CPU, its block mask made beforehand. The rate counts visible
pairs only; the floor is the rate of one large GEMM.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.dispatch import extension_missing
from fastpo.kernels.tree_attention import AttentionBlocks, attention_blocks, cpu_kernels, reference, tree_attention
from fastpo.trees import build_tree
from fastpo.types import TokenTree

_GEMM = 8192 if torch.cuda.is_available() else 1536


@dataclass(frozen=True)
class Case:
    name: str
    mode: str  # "forward" or "forward_backward"
    dtype: torch.dtype
    shape: dict[str, int]  # heads, kv_heads, size; what makes the forest; tokens

    @property
    def tree(self) -> TokenTree:
        return forest(self.name)


@dataclass
class Inputs:
    qkv: list[Tensor]  # q [N, Hq, D], k and v [N, Hkv, D]; leaves
    grad_out: Tensor  # [N, Hq, D]
    tree: TokenTree
    blocks: AttentionBlocks
    mask: Tensor  # [N, N] bool
    paths: list[Tensor]  # of the nodes of each sequence
    unshared: list[list[Tensor]]  # per sequence q, k, v [1, heads, length, D]; leaves
    unshared_grad_out: list[Tensor]  # per sequence [1, Hq, length, D]: a node's gradient, divided over its sequences
    flex_mask: Any = None


def solutions(prompt: int, seed: int = 0) -> TokenTree:
    """A question of 100 tokens after ``prompt`` others, 16 solutions of 90 to 150."""
    generator = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(10**6) for _ in range(count)]

    question, sequences = tokens(prompt + 100), []
    for _ in range(4):
        solution = tokens(generator.randrange(90, 151))
        edits = [generator.randrange(10, len(solution)) for _ in range(3)]
        sequences += [solution, *(solution[:at] + tokens(len(solution) - at) for at in edits)]
    return build_tree([question + sequence for sequence in sequences], len(question))


def search(widths: tuple[int, ...], step: int) -> TokenTree:
    """A step of ``step`` tokens, then so many below each, level by level."""
    sequences = [list(range(step))]
    for width in widths:
        sequences = [
            [*s, *range(10**6 * (len(s) + i), 10**6 * (len(s) + i) + step)] for s in sequences for i in range(width)
        ]
    return build_tree(sequences, step)


@cache
def forest(name: str) -> TokenTree:
    makers = {
        "solutions": lambda: solutions(0),
        "solutions, few-shot": lambda: solutions(1024),
        "search 2-2-2": lambda: search((2, 2, 2), 64),
        "search 5-3-3-2-2": lambda: search((5, 3, 3, 2, 2), 24),
        "one prompt, 8 answers": lambda: search((8,), 1820),
        "chain": lambda: build_tree([list(range(2048))], 1),
        "small": lambda: search((2, 2), 5),
    }
    return makers[name]()


def case(
    name: str, mode: str, dtype: torch.dtype = torch.float32, heads: int = 8, kv_heads: int = 8, size: int = 64
) -> Case:
    shape = {"tokens": forest(name).num_nodes, "heads": heads, "kv_heads": kv_heads, "size": size}
    return Case(name, mode, dtype, shape)


def cases(suite: str, device: str) -> list[Case]:
    if suite == "small":
        return [case("small", "forward_backward"), case("small", "forward")]
    if suite == "gpu":
        large = [
            case("one prompt, 8 answers", mode, torch.bfloat16, 32, 8, 128) for mode in ("forward", "forward_backward")
        ]
        names = ("solutions, few-shot", "search 5-3-3-2-2")
        return [*large, *(case(name, "forward_backward", torch.bfloat16, 32, 8, 128) for name in names)]
    names = ("solutions", "solutions, few-shot", "search 2-2-2")
    quick = [case(name, mode) for name in names for mode in ("forward_backward", "forward")]
    if suite == "quick":
        return quick
    if suite != "full":
        return []
    return [
        *quick,
        case("search 5-3-3-2-2", "forward_backward"),
        case("chain", "forward_backward"),
        case("solutions", "forward_backward", torch.bfloat16),
        case("solutions, few-shot", "forward_backward", heads=8, kv_heads=2),
    ]


def setup(case: Case, device: str) -> Inputs:
    tree, generator = case.tree, torch.Generator().manual_seed(0)
    heads = (case.shape["heads"], case.shape["kv_heads"], case.shape["kv_heads"])

    def normal(count: int) -> Tensor:
        x = torch.randn(tree.num_nodes, count, case.shape["size"], generator=generator)
        return x.to(device=device, dtype=case.dtype)

    qkv, grad_out = [normal(count) for count in heads], normal(heads[0])
    paths = [_path(tree, int(leaf)).to(device) for leaf in tree.leaves]
    times = torch.bincount(torch.cat(paths), minlength=tree.num_nodes)[:, None, None]
    tree = tree.to(device)
    return Inputs(
        [x.requires_grad_() for x in qkv],
        grad_out,
        tree,
        attention_blocks(tree),
        reference.visible(tree.subtree_end, tree.depth),
        paths,
        [[_by_head(x.detach()[path]).requires_grad_() for x in qkv] for path in paths],
        [_by_head((grad_out / times)[path]) for path in paths],
        _flex_mask(tree) if case.mode == "forward" or device == "cuda" else None,
    )


def implementations(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """name -> run(inputs) -> [out, gradients of q, k, v]; lists of them, one per sequence, from ``each path``."""
    backward, grouped = case.mode == "forward_backward", case.shape["heads"] != case.shape["kv_heads"]

    def of(attend: Callable[[Inputs], Tensor]) -> Callable[[Inputs], list[Tensor]]:
        def run(inputs: Inputs) -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                out = attend(inputs)
            grads = torch.autograd.grad(out, inputs.qkv, inputs.grad_out) if backward else ()
            return [out.detach(), *grads]

        return run

    def dense(inputs: Inputs) -> Tensor:
        heads = [_by_head(x) for x in inputs.qkv]
        return _by_token(F.scaled_dot_product_attention(*heads, attn_mask=inputs.mask, enable_gqa=grouped))

    def each_path(inputs: Inputs) -> list[list[Tensor]]:
        outputs = []
        for qkv, grad_out in zip(inputs.unshared, inputs.unshared_grad_out, strict=True):
            with torch.set_grad_enabled(backward):
                out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=grouped)
            outputs.append([out.detach(), *(torch.autograd.grad(out, qkv, grad_out) if backward else ())])
        return outputs

    runs: dict[str, Callable[[Inputs], Any]] = {
        "fastpo": of(lambda x: tree_attention(*x.qkv, x.blocks)),
        "fastpo, metadata each time": of(lambda x: tree_attention(*x.qkv, x.tree)),
        "sdpa, dense mask": of(dense),
        "sdpa, each path": each_path,
    }
    if (not backward or torch.cuda.is_available()) and case.name != "small":
        flex = _flex_attention()

        def attend(inputs: Inputs) -> Tensor:
            # on a CPU it refuses inputs that require grad, also where no gradient is recorded
            qkv = inputs.qkv if backward else [x.detach() for x in inputs.qkv]
            return _by_token(flex(*map(_by_head, qkv), block_mask=inputs.flex_mask, enable_gqa=grouped))

        runs["flex_attention"] = of(attend)
    return runs


def flops(case: Case) -> int:
    """Two products for a visible pair forward, five backward."""
    pairs = int((case.tree.depth + 1).sum())
    products = 2 if case.mode == "forward" else 7
    return products * 2 * pairs * case.shape["size"] * case.shape["heads"]


def ceiling(case: Case) -> tuple[Callable[[Inputs], Any], int]:
    """One GEMM of the type."""
    a = torch.randn(_GEMM, _GEMM, dtype=case.dtype)
    on: dict[torch.device, Tensor] = {}

    def run(inputs: Inputs) -> Tensor:
        x = on.setdefault(inputs.grad_out.device, a.to(inputs.grad_out.device))
        return x @ x

    return run, 2 * _GEMM**3


def check(case: Case, inputs: Inputs, outputs: dict[str, Any]) -> None:
    """Raises AssertionError where outputs are not fastpo's, or fastpo's not the spec's."""
    ours = outputs["fastpo"]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if case.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    scale = case.shape["size"] ** -0.5
    if len(outputs) == 1:
        some = torch.arange(0, len(inputs.mask), max(1, len(inputs.mask) // 256), device=inputs.mask.device)
        q, k, v = (x.detach().float() for x in inputs.qkv)
        exact = reference.spec(q[some], k, v, inputs.mask[some], scale)
        torch.testing.assert_close(ours[0][some].float(), exact, **tolerance)
    for name, theirs in outputs.items():
        if name == "sdpa, each path":
            theirs = _shared(inputs, theirs)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(y, x, **tolerance)


def summary(_rows: list[Any]) -> list[str]:
    """What tiles cost, as counted: pairs that some token sees, of those that are computed on this CPU."""
    if extension_missing("_C"):
        return []
    lines = []
    for name in ("solutions", "solutions, few-shot", "search 2-2-2", "search 5-3-3-2-2"):
        visible, computed = cpu_kernels.pairs(attention_blocks(forest(name)))
        lines.append(f"tree_attention, {name}: {visible / computed:.1%} of the pairs computed are visible")
    return lines


def _shared(inputs: Inputs, outputs: list[list[Tensor]]) -> list[Tensor]:
    """[out, gradients] of the nodes from those of the sequences: any one's output, the sum of the gradients."""
    found = []
    for at, like in enumerate([inputs.grad_out, *inputs.qkv][: len(outputs[0])]):
        of_nodes = torch.zeros_like(like)
        for path, output in zip(inputs.paths, outputs, strict=True):
            rows = _by_token(output[at])
            if at == 0:
                of_nodes[path] = rows
            else:
                of_nodes.index_add_(0, path, rows)
        found.append(of_nodes)
    return found


def _path(tree: TokenTree, node: int) -> Tensor:
    """The nodes from the root down to ``node``."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = int(tree.parent[node])
    return torch.tensor(nodes[::-1])


def _by_head(x: Tensor) -> Tensor:
    """[N, heads, D] -> [1, heads, N, D]"""
    return x.transpose(0, 1)[None]


def _by_token(x: Tensor) -> Tensor:
    """[1, heads, N, D] -> [N, heads, D]"""
    return x[0].transpose(0, 1)


@cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_mask(tree: TokenTree) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    ends, n = tree.subtree_end, tree.num_nodes
    return create_block_mask(lambda _b, _h, q, k: (k <= q) & (q < ends[k]), None, None, n, n, device=str(ends.device))
