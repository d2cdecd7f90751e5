"""Figures of trees that no step of tree_workloads.py shows: what they cost besides the model, and that nothing changes.

    python benchmarks/tree_host.py --data DIR     # model_solutions.jsonl of GSM8K; without it, text is made up

- ``trie``: ms of ``build_tree`` on 16 sequences of 5,120 tokens, given as lists, of which none or 4,096 are shared;
  ``trie in plain Python``: of what takes its place where the C++ is not built, without the lists;
- ``packing``: ms of ``pack`` on the trees of workload A;
- ``metadata``: microseconds of ``attention_blocks``, made once per batch; ``metadata share``: that in percent of the
  attention of one layer, forward and backward, by which a model of L layers divides it again;
- ``block efficiency``: visible pairs in percent of those that the CPU's tiles compute, counted;
- ``loss curve``: two epochs of the loop's training stage (IRPO, a Llama of two layers) with and without sharing: the
  largest difference of their losses, step by step, relative to the loss.

Rows go to results/tree_host.csv. Takes some ten seconds on 4 quiet cores.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from measure import Measured, append, machine, percentile  # noqa: E402
from tree_data import Workload, pair_records, read_questions, search_workload, solutions_workload  # noqa: E402
from tree_steps import VOCABULARY, build_model  # noqa: E402

from fastpo import TokenTree, build_tree, host_python, objectives, pack  # noqa: E402
from fastpo.kernels.tree_attention import attention_blocks, cpu_kernels, tree_attention  # noqa: E402
from fastpo.memory import keep_freed_memory  # noqa: E402
from fastpo.models import response_logps  # noqa: E402
from fastpo.training import TrainConfig, train_preference  # noqa: E402
from fastpo.trees import join  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "tree_host.csv"
HEADS, HEAD_SIZE = 8, 64  # of the attention that metadata is compared with: those of the model of tree_workloads.py


@dataclass(frozen=True)
class Row(Measured):
    figure: str
    case: str
    runs: int
    p20: float
    p50: float
    p80: float
    unit: str


Found = tuple[str, str, list[float], str]  # figure, case, readings, unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with model_solutions.jsonl")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    questions, data = read_questions(arguments.data, 12)
    print(f"data: {data}; {arguments.threads} threads", flush=True)
    workloads = [
        solutions_workload(questions, 6, 10, False),
        solutions_workload(questions, 1, 15, True),
        search_workload((2, 2, 2), VOCABULARY),
        search_workload((5, 3, 3, 2, 2), VOCABULARY),
    ]
    where = machine("cpu")
    for part in (
        tries(),
        packing(workloads[0]),
        metadata(workloads),
        curve(solutions_workload(questions, 3, 10, False)),
    ):
        for figure, case, readings, unit in part:
            p20, p50, p80 = (float(f"{percentile(readings, share):.4g}") for share in (0.2, 0.5, 0.8))
            print(f"{figure}: {case}: {p50:g} {unit}", flush=True)
            row = Row(**where, figure=figure, case=case, runs=len(readings), p20=p20, p50=p50, p80=p80, unit=unit)
            append([row], arguments.out)


def seconds(run: Callable[[], object], times: int = 15) -> list[float]:
    """Of so many calls, after one to warm up."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def tries() -> Iterator[Found]:
    draw = np.random.default_rng(0)
    for shared in (0, 4096):
        prompt = draw.integers(0, VOCABULARY, shared)
        own = draw.integers(0, VOCABULARY, (16, 5120 - shared))
        sequences = [[*prompt.tolist(), *row.tolist()] for row in own]
        start = max(shared, 1)
        times = seconds(lambda s=sequences, start=start: build_tree(s, start))
        case = f"16 x 5120 tokens, {shared} of them shared"
        yield "trie", case, [1e3 * t for t in times], "ms"
        tokens, cu_seqlens = np.concatenate([np.array(s) for s in sequences]), np.arange(17) * 5120
        plain = seconds(lambda tokens=tokens, cu=cu_seqlens: plain_trie(tokens, cu), 3)
        yield "trie in plain Python", case, [1e3 * t for t in plain], "ms"


def plain_trie(tokens: np.ndarray, cu_seqlens: np.ndarray) -> object:
    """What stands in for the compiled trie where that is not built."""
    trie = host_python.Trie()
    return trie.insert_all(tokens, cu_seqlens), trie.preorder()


def packing(workload: Workload) -> Iterator[Found]:
    trees = trees_of(workload)
    yield "packing", f"{workload.name}: {len(trees)} trees", [1e3 * t for t in seconds(lambda: pack(trees, 8192))], "ms"


def trees_of(workload: Workload) -> list[TokenTree]:
    return [build_tree(tokens, starts) for tokens, starts in zip(workload.trees, workload.starts, strict=True)]


def metadata(workloads: list[Workload]) -> Iterator[Found]:
    for workload in workloads:
        tree = join(trees_of(workload))
        case = f"{workload.name}: {tree.num_nodes} tokens"
        made = seconds(lambda tree=tree: attention_blocks(tree), 50)
        yield "metadata", case, [1e6 * t for t in made], "us"
        blocks = attention_blocks(tree)
        qkv = [torch.randn(tree.num_nodes, HEADS, HEAD_SIZE, requires_grad=True) for _ in range(3)]
        upstream = torch.randn(tree.num_nodes, HEADS, HEAD_SIZE)
        layer = seconds(lambda b=blocks, x=qkv, u=upstream: torch.autograd.grad(tree_attention(*x, b), x, u), 3)
        share = 100 * percentile(made, 0.5) / percentile(layer, 0.5)
        yield "metadata share", case, [share], "% of the attention of one layer"
        visible, computed = cpu_kernels.pairs(blocks)
        yield "block efficiency", case, [100 * visible / computed], "% of the pairs computed"


def curve(workload: Workload) -> Iterator[Found]:
    shared, alone = (losses(workload, sharing) for sharing in (True, False))
    apart = [abs(a - b) / b for a, b in zip(shared, alone, strict=True)]
    case = f"{len(shared)} steps in two epochs, loss {alone[0]:.3f} to {alone[-1]:.3f}"
    yield "loss curve", case, [max(apart)], "of the loss, largest difference with and without sharing"


def losses(workload: Workload, sharing: bool) -> list[float]:
    """Of each step of two epochs."""
    model, records = build_model(2, 128), pair_records(workload)
    responses = {p.chosen_key: (p.prompt_ids, p.chosen_ids) for p in records}
    responses |= {p.rejected_key: (p.prompt_ids, p.rejected_ids) for p in records}
    logps, cu_seqlens = response_logps(model, list(responses.values()), micro_batch_tokens=8192)
    with tempfile.TemporaryDirectory() as folder:
        history = train_preference(
            model,
            records,
            dict(zip(responses, logps.tensor_split(cu_seqlens[1:-1]), strict=True)),
            objective=objectives.irpo(),
            config=TrainConfig(learning_rate=1e-3, batch_size=10, num_epochs=2, sharing=sharing),
            output_dir=folder,
            accelerator=Accelerator(cpu=True),
            log=lambda record: None,
        )
    return [record["loss"] for record in history]


if __name__ == "__main__":
    main()
