"""Run by test_training.py under torch.distributed.run: preference training on two CPU processes.

    python -m torch.distributed.run --nproc_per_node 2 tests/two_processes.py DIR

Trains with DDP and with FSDP2 (micro-batches of one or two pairs, a last batch that is smaller than the others), DDP
with trees that are cut as well, FSDP2 resumed as well, both without trees as well, FSDP2 with TDPO on trees that are
cut, and leaves each model in DIR/NAME, and log-probs that the two processes have shared out in DIR/logps.pt.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from test_training import pairs, reference, settings
from tiny_models import build
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastpo import objectives
from fastpo.models import response_logps, save_model
from fastpo.references import Reference
from fastpo.training import train_preference

directory = Path(sys.argv[1])


def train(name: str, accelerator: Accelerator, objective=None, **changes):
    """A model trained on nine pairs, left in DIR/name; its checkpoints go to the directory of the same stem."""
    model = build()
    train_preference(
        model,
        pairs(9),
        Reference(reference(pairs(9)), model=build(seed=5)),
        objective=objective or objectives.irpo(),
        config=settings(**{"micro_batch_tokens": 60, **changes}),
        output_dir=directory / name.split("_")[0],
        accelerator=accelerator,
        log=lambda record: None,
    )
    save_model(model, directory / name, accelerator)
    return model


def fsdp2_accelerator() -> Accelerator:
    """accelerate takes FSDP for accelerators only and ignores the plugin on a CPU: its state is told otherwise."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
train("ddp", accelerator)
train("cut", accelerator, micro_batch_tokens=25)
train("unshared", accelerator, sharing=False)
logps, _ = response_logps(build(), [(p.prompt_ids, p.chosen_ids) for p in pairs(9)], accelerator=accelerator)
if accelerator.is_main_process:
    torch.save(logps, directory / "logps.pt")

accelerator = fsdp2_accelerator()
sharded = train("fsdp2", accelerator, checkpoint_steps=4)
assert isinstance(sharded.model.layers[0], FSDPModule)
assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
train("fsdp2_resumed", accelerator)  # from the checkpoint that the run before has left
train("fsdp2unshared", fsdp2_accelerator(), sharing=False)
train("fsdp2kl", fsdp2_accelerator(), objectives.tdpo2(), micro_batch_tokens=25)
accelerator.wait_for_everyone()
os._exit(0)  # gloo's threads and FSDP2's may abort at an orderly exit
