"""Tree search over many prompts at once against one prompt at a time, and the ops alone.

    python benchmarks/tree_search.py [--threads 4] [--only search ops] [--prompts 64] [--simulations 32] [--rounds 3]

search: CPL's search (PUCT, running mean, ends visited once; width 4, steps of at most 12 tokens) on the embedded model,
untrained: nodes per second of

- ``fastpo``: all prompts in one search, one generation call per wave, every token through the model once;
- ``one prompt``: the same library, a search per prompt, one after the other;
- ``published``: one prompt at a time as the published codes describe it, in plain Python objects: walk down by PUCT,
  one ``model.generate`` of the width's samples from the whole path, one forward for their log-probs, back up. Paths
  stay token ids (the published codes go through text), and the samples of an expansion are one batch, so this is its
  fast case.

The peers run on ``--peer_prompts`` prompts (a rate needs no more), all three in turn, ``--rounds`` times. ``host`` is
the share of a wave outside propose and evaluate: selecting, merging, adding nodes, backing up.

ops: select and backup for 4,096 trees of 512 nodes, caches emptied before each wave, by rule.

Takes some two minutes on 4 quiet cores. Appends to benchmarks/results/tree_search.csv as it goes.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import machine, percentile  # noqa: E402

from fastpo import embedded  # noqa: E402
from fastpo.kernels.tree_search import BackupRule, SearchTrees, SelectRule, backup, select  # noqa: E402
from fastpo.search import METHODS, Node, Search, StepSampler, method_by_name  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "tree_search.csv"
WIDTH, STEP_TOKENS, DEPTH, NEWLINE = 4, 12, 12, 10
COLUMNS = ("case", "implementation", "p20_ms", "p50_ms", "p80_ms", "nodes", "nodes_per_second", "host_share", "speedup")
TREES, NODES = 4096, 512


def evaluate(nodes: Sequence[Node]) -> list[float]:
    """A value in [-1, 1] that costs nothing: the search is timed, not a reward."""
    return [(sum(node.steps[-1].ids) % 21 - 10) / 10 for node in nodes]


def batched(model: PreTrainedModel, prompts: list[list[int]], simulations: int) -> Search:
    tokenizer = embedded.build_tokenizer()
    propose = StepSampler(
        model,
        step_tokens=STEP_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stop_ids=[NEWLINE],
    )
    method = method_by_name("cpl", simulations=simulations, width=WIDTH, depth=DEPTH)
    return Search(prompts, method, propose, evaluate).run()


class PublishedNode:
    """A node of the one-at-a-time search."""

    def __init__(self, ids: list[int], parent: "PublishedNode | None", prior: float, value: float, end: bool):
        self.ids, self.parent, self.prior, self.end = ids, parent, prior, end
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: list[PublishedNode] = []
        self.value, self.visits, self.q, self.closed = value, 0, value, False

    def score(self) -> float:
        assert self.parent is not None
        return self.q + 1.5 * self.prior * math.sqrt(self.parent.visits) / (1 + self.visits)

    def back_up(self) -> None:
        node: PublishedNode | None = self
        while node is not None:
            node.visits += 1
            node.q += (self.value - node.q) / node.visits
            node.closed = node.end or (bool(node.children) and all(child.closed for child in node.children))
            node = node.parent


@torch.inference_mode()
def published(model: PreTrainedModel, prompt: list[int], simulations: int, eos: int, pad: int) -> int:
    """Searches one prompt; returns the nodes made."""
    root, made = PublishedNode(prompt, None, 1.0, 0.0, False), 1
    for _ in range(simulations):
        node = root
        while node.children and not node.closed:
            node = max((child for child in node.children if not child.closed), key=PublishedNode.score)
        if root.closed:
            break
        made += _expand(model, node, eos, pad)
        for child in node.children:
            if child.end:
                child.back_up()
        node.back_up()
    return made


def _expand(model: PreTrainedModel, node: PublishedNode, eos: int, pad: int) -> int:
    context = torch.tensor([node.ids])
    found = model.generate(
        context,
        attention_mask=torch.ones_like(context),
        do_sample=True,
        num_return_sequences=WIDTH,
        max_new_tokens=STEP_TOKENS,
        eos_token_id=[eos, NEWLINE],
        pad_token_id=pad,
    )
    logps = model(found).logits[:, context.shape[1] - 1 : -1].log_softmax(-1)
    logps = logps.gather(2, found[:, context.shape[1] :, None])[..., 0]  # [WIDTH, T]
    for row, logp in zip(found[:, context.shape[1] :].tolist(), logps, strict=True):
        step = row[: row.index(pad)] if pad in row else row
        value = (sum(step) % 21 - 10) / 10
        prior = float(logp[: len(step)].mean().exp())
        end = step[-1] == eos or node.depth + 1 == DEPTH
        node.children.append(PublishedNode(node.ids + step, node, prior, value, end))
    return WIDTH


def search_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokenizer = embedded.build_tokenizer()
    model = embedded.build_model(0, tokenizer).eval()
    prompts = [tokenizer(row["question"] + "\n")["input_ids"] for row in embedded.problems(0, arguments.prompts)]
    few, simulations = prompts[: arguments.peer_prompts], arguments.simulations
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    searches: list[Search] = []

    def all_at_once() -> int:
        searches.append(batched(model, prompts, simulations))
        return searches[-1].num_nodes

    runs: dict[str, Callable[[], int]] = {
        "fastpo": all_at_once,
        "one prompt": lambda: sum(batched(model, [prompt], simulations).num_nodes for prompt in few),
        "published": lambda: sum(published(model, prompt, simulations, eos, pad) for prompt in few),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    nodes: dict[str, int] = {}
    batched(model, few, 2)  # warm
    for round_number in range(arguments.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            nodes[name] = run()
            times[name].append(time.perf_counter() - started)
            rate = nodes[name] / times[name][-1]
            print(f"  round {round_number + 1}: {name}: {nodes[name]} nodes, {rate:,.0f} nodes/s", flush=True)
    rates = {name: nodes[name] / percentile(times[name], 0.5) for name in runs}
    timers = [search.timer for search in searches]
    host = percentile([(t.total - t.propose - t.evaluate) / t.total for t in timers], 0.5)
    for name in runs:
        p20, p50, p80 = (round(1e3 * percentile(times[name], share), 1) for share in (0.2, 0.5, 0.8))
        yield {
            "case": f"search, {arguments.prompts} prompts, {simulations} simulations",
            "implementation": name,
            **{"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "nodes": nodes[name]},
            "nodes_per_second": round(rates[name], 1),
            "host_share": round(host, 4) if name == "fastpo" else "",
            "speedup": round(rates["fastpo"] / rates[name], 2),
        }


def grown_trees() -> SearchTrees:
    """TREES trees of 4 children a node, grown by UCB1 on random values until they are full."""
    rule, backup_rule = SelectRule("ucb1", c=1.4, unvisited="bonus"), BackupRule("mean")
    generator = torch.Generator().manual_seed(0)
    trees = SearchTrees.empty(TREES, NODES)
    everyone, new = torch.arange(TREES), TREES * WIDTH
    flags = {"expandable": torch.ones(new, dtype=torch.bool), "closed": torch.zeros(new, dtype=torch.bool)}
    for _ in range((NODES - 1) // WIDTH):
        leaf = select(trees, rule)[:, 0]
        trees.expandable[everyone, leaf] = False
        columns = {name: torch.rand(new, generator=generator) for name in ("q", "value", "reward", "prior")}
        trees.add(everyone.repeat_interleave(WIDTH), leaf.repeat_interleave(WIDTH), **columns, **flags)
        backup(trees, leaf[:, None], torch.rand(TREES, 1, generator=generator), backup_rule)
    return trees


def op_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    others = torch.zeros(64 << 20)  # 256 MB: what a model's forward does to the caches between two waves
    for name in ("mcts_dpo", "cpl", "rest_mcts", "muzero"):
        rule, backup_rule = METHODS[name].select, METHODS[name].backup
        backup_rule = BackupRule(backup_rule.kind, min_visits=backup_rule.min_visits, rewards=backup_rule.rewards)
        trees, times = grown_trees(), []
        values = torch.rand(TREES, 1)
        for _ in range(30):
            others.add_(1)
            started = time.perf_counter()
            leaves = select(trees, rule)
            backup(trees, leaves, values, backup_rule)
            times.append(time.perf_counter() - started)
        p20, p50, p80 = (round(1e3 * percentile(times, share), 3) for share in (0.2, 0.5, 0.8))
        yield {
            "case": f"select + backup, {TREES} trees of {NODES} nodes, depth {int(trees.depth.max())}",
            "implementation": name,
            **{"p20_ms": p20, "p50_ms": p50, "p80_ms": p80},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=("search", "ops"), default=["ops", "search"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--peer_prompts", type=int, default=4)
    parser.add_argument("--simulations", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the CSV alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = machine("cpu")
    parts = {"ops": op_rows, "search": search_rows}
    for part in arguments.only:
        for row in parts[part](arguments):
            print({key: value for key, value in row.items() if value != ""}, flush=True)
            if not arguments.dry_run:
                _append({**where, **dict.fromkeys(COLUMNS, ""), **row})


def _append(row: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
