"""tree_search on a GPU against the C++ backend: the same leaves, no host sync; a search whose model is on the GPU."""

from dataclasses import fields, replace

import pytest
import torch

from fastpo import embedded
from fastpo.dispatch import triton_missing
from fastpo.kernels.tree_search import (
    UNVISITED,
    BackupRule,
    SearchTrees,
    SelectRule,
    backup,
    process_values,
    select,
)
from fastpo.search import Search, StepSampler, method_by_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: make gpu-check runs this on one"),
    pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing())),
]
TREES, NODES, WIDTH = 300, 120, 3
# constants that float32 holds exactly: they go to the kernels in it
RULES = [
    (SelectRule("puct", c=1.5, prior=True, virtual_loss=1.0), BackupRule("children", min_visits=1, rewards=True)),
    (SelectRule("ucb1", c=0.75, unvisited="bonus"), BackupRule("mean", close=True)),
    (SelectRule("uct", unvisited="first"), BackupRule("max_mix")),
    (SelectRule("muzero", c=1.25), BackupRule("children")),
    (SelectRule("mc_nest", c=1.5, scope="frontier"), BackupRule("mean")),
]


def clone(trees):
    return replace(trees, **{f.name: getattr(trees, f.name).clone() for f in fields(trees)})


def grown(rule, backup_rule):
    """Trees on the CPU with room for a few nodes more, some ends closed."""
    generator = torch.Generator().manual_seed(0)
    trees = SearchTrees.empty(TREES, NODES)
    for _ in range((NODES - 10) // WIDTH):
        leaf = select(trees, rule)[:, 0]
        tree = (leaf != UNVISITED).nonzero()[:, 0]
        trees.expandable[tree, leaf[tree]] = False
        new = WIDTH * tree.shape[0]
        columns = {name: torch.rand(new, generator=generator) for name in ("q", "value", "reward", "prior")}
        end = torch.rand(new, generator=generator) < 0.1
        trees.add(
            tree.repeat_interleave(WIDTH), leaf[tree].repeat_interleave(WIDTH), **columns, expandable=~end, closed=end
        )
        backup(trees, leaf[:, None], torch.rand(TREES, 1, generator=generator), backup_rule)
    return trees


@pytest.mark.parametrize("number", range(len(RULES)))
def test_waves_small(number):
    rule, backup_rule = RULES[number]
    trees = grown(rule, backup_rule)
    on_gpu, values = clone(trees).to("cuda"), torch.rand(TREES, 2, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        leaves = select(trees, rule, 2)
        found = select(on_gpu, rule, 2)
        assert torch.equal(found.cpu(), leaves)
        backup(trees, leaves, values, backup_rule)
        backup(on_gpu, found, values.cuda(), backup_rule)
        for field in fields(trees):
            torch.testing.assert_close(
                getattr(on_gpu, field.name).cpu(), getattr(trees, field.name), rtol=1e-6, atol=1e-6
            )
    signs = torch.rand(TREES, NODES, generator=torch.Generator().manual_seed(2)).round() * 2 - 1
    distances = torch.full((TREES, NODES), 3.0)
    expected = process_values(trees, signs, distances)
    torch.testing.assert_close(process_values(on_gpu, signs.cuda(), distances.cuda()).cpu(), expected)


def test_no_host_sync():
    rule, backup_rule = RULES[0]
    trees, values = grown(rule, backup_rule).to("cuda"), torch.rand(TREES, 2, device="cuda")
    backup(trees, select(trees, rule, 2), values, backup_rule)  # compiled, where that takes a while
    torch.cuda.set_sync_debug_mode("error")
    try:
        backup(trees, select(trees, rule, 2), values, backup_rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_search_with_its_model_on_the_gpu():
    """Greedy steps, on the GPU and on the CPU."""
    tokenizer = embedded.build_tokenizer()
    prompts = [tokenizer(row["question"] + "\n")["input_ids"] for row in embedded.problems(0, 8)]
    found = []
    for device in ("cpu", "cuda"):
        propose = StepSampler(
            embedded.build_model(0, tokenizer).to(device),
            step_tokens=8,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stop_ids=[10],
            temperature=0.0,
        )
        method = method_by_name("cpl", simulations=5, width=1)
        search = Search(prompts, method, propose, lambda nodes: [len(n.ids) % 3 - 1 for n in nodes]).run()
        found.append([[step.ids for step in steps] for steps in search.steps])
        assert all(0 <= p <= 1 for p in propose.label_set_prob([search.node(0, 1)], [63], [65, 66]))
    assert found[0] == found[1]
