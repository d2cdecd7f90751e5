"""Run by test_training.py under torch.distributed.run: preference training on two CPU processes.

    python -m torch.distributed.run --nproc_per_node 2 tests/two_processes.py DIR

Trains with DDP (micro-batches of one or two pairs, a last batch that is smaller than the others), leaves the model in
DIR/ddp and the gradients of one batch sharded by FSDP2 in DIR/fsdp2.pt.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from test_training import pairs, reference, settings
from tiny_models import build
from torch.distributed.fsdp import fully_shard

from fastpo import objectives
from fastpo.models import ResponseScorer, response_logps, save_model
from fastpo.tasks import PreferenceTask
from fastpo.training import train_preference

directory = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2

model = build()
train_preference(
    model,
    pairs(9),
    reference(pairs(9)),
    objective=objectives.irpo(),
    config=settings(micro_batch_tokens=60),
    output_dir=directory,
    accelerator=accelerator,
    log=lambda record: None,
)
save_model(model, directory / "ddp", accelerator)

responses = [(p.prompt_ids, p.chosen_ids) for p in pairs(9)]
shared_out, _ = response_logps(build(), responses, accelerator=accelerator)

sharded = build()
scorer = ResponseScorer(sharded)
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(scorer)
task = PreferenceTask(pairs(10), reference(pairs(10)), objectives.irpo())
mine = list(range(10))[accelerator.process_index :: 2]
loss, _ = task.loss(scorer, mine, list(range(10)), accelerator.device)
(loss * 2 / 10).backward()
gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
if accelerator.is_main_process:
    torch.save({"gradients": gradients, "logps": shared_out}, directory / "fsdp2.pt")
accelerator.end_training()
