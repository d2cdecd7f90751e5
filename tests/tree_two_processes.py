"""Run by test_scoring.py under torch.distributed.run: trees on two CPU processes.

    python -m torch.distributed.run --nproc_per_node 2 tests/tree_two_processes.py DIR

Leaves in DIR/found.pt the mean gradient of two trees, one a process, under DDP and under FSDP2 with gradient
checkpointing, and the scores of five trees that the processes have shared out.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tree_cases import build, tree

import fastpo
from fastpo.scoring import TreeScorer

directory = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2


def gradients(scorer, model):
    scorer(tree(accelerator.process_index)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


model = build()
found = {"ddp": gradients(DistributedDataParallel(TreeScorer(model)), model)}

sharded = build().train()
getattr(sharded, "activation_checkpointing_enable", sharded.gradient_checkpointing_enable)()
scorer = TreeScorer(sharded)
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(scorer)
found["fsdp2"] = gradients(scorer, sharded)

trees = [tree(seed) for seed in range(5)]
found["scores"] = [s.sums for s in fastpo.score(build(), trees, token_budget=40, accelerator=accelerator)]

if accelerator.is_main_process:
    torch.save(found, directory / "found.pt")
accelerator.wait_for_everyone()
os._exit(0)  # gloo's threads and FSDP2's may abort at an orderly exit
