"""The loop's training stage against TRL's DPOTrainer, end to end on the CPU: pairs per second on workloads A and B.

    python benchmarks/tree_training.py --data DIR       # model_solutions.jsonl of GSM8K; without it, text is made up
    python benchmarks/tree_training.py --quick          # a small model and few pairs: does it run?

Both train the same random Llama of 50M parameters on the same pairs by DPO, with AdamW and clipping, some steps of the
whole workload each; log-probs of the reference, another random Llama, are there before the clock starts, so that the
first loss is a sum over all tokens and not log 2. TRL runs as fast as its settings
allow on a CPU: no recomputation of activations, no truncation, a prompt's pairs side by side, so that a batch pads
little (in the trainer's random order it pads half as much again). The losses of all steps must agree to 1e-4.

On oneDNN for both, which is what the ratio is to be read from, and on A with what torch takes by itself. Rows go to
results/tree_training.csv as each run ends. Takes some 6 minutes on 4 quiet cores.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from datasets import Dataset  # noqa: E402
from datasets.utils import disable_progress_bars  # noqa: E402
from measure import Measured, append, machine  # noqa: E402
from transformers import PreTrainedModel, TrainerCallback  # noqa: E402
from tree_data import Workload, pair_records, read_questions, solutions_workload  # noqa: E402
from tree_steps import BETA, TRL_BUDGET, build_model, trl_batches  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from fastpo import objectives  # noqa: E402
from fastpo.models import onednn_matmul, response_logps  # noqa: E402
from fastpo.tiny import build_bpe_tokenizer  # noqa: E402
from fastpo.training import TrainConfig, train_preference  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "tree_training.csv"
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Row(Measured):
    workload: str
    data: str
    gemm: str  # oneDNN or default
    implementation: str
    pairs: int  # of each step
    steps: int
    step_s: float  # median
    pairs_per_s: float
    last_loss: float
    ratio: float  # fastpo's pairs per second over this one's


@dataclass(frozen=True)
class Run:
    losses: list[float]  # of each step
    seconds: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with model_solutions.jsonl")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=int, default=8192, help="most tokens of a forward, padding included")
    parser.add_argument("--trl-budget", type=int, default=TRL_BUDGET, help="the same of TRL, which is fastest so")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=["A", "B"], choices=["A", "B"])
    parser.add_argument("--gemm", nargs="+", default=["oneDNN", "default"], choices=["oneDNN", "default"])
    parser.add_argument("--no-unshared", action="store_true", help="fastpo's shared run and TRL's alone")
    parser.add_argument("--no-peer", action="store_true", help="fastpo's shared and unshared runs alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="small model, rows to no file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    if arguments.quick:
        arguments.out, arguments.steps, arguments.workloads = Path(os.devnull), 2, ["A"]
    questions, data = read_questions(arguments.data, 12)
    print(f"data: {data}; {arguments.threads} threads", flush=True)
    prompts = 1 if arguments.quick else 6
    made = {
        "A": lambda: solutions_workload(questions, prompts, 10, False),
        "B": lambda: solutions_workload(questions, 1, 15, True),
    }
    for name in arguments.workloads:
        workload = made[name]()
        for gemm in (gemm for gemm in arguments.gemm if name == "A" or gemm == "oneDNN"):
            with onednn_matmul() if gemm == "oneDNN" else nullcontext():
                compare(workload, gemm, arguments, {**machine("cpu"), "data": data})


def compare(workload: Workload, gemm: str, arguments: argparse.Namespace, where: dict) -> None:
    """Runs one way after the other; the losses of each step must be fastpo's."""
    number = len(workload.all_pairs)
    ways = {"fastpo": partial(run_fastpo, workload, arguments, sharing=True)}
    if gemm == "oneDNN" and not arguments.no_unshared:
        ways["fastpo, no sharing"] = partial(run_fastpo, workload, arguments, sharing=False)
    if not arguments.no_peer:
        ways["trl"] = partial(run_trl, workload, arguments)
    ours = None
    for name, way in ways.items():
        run = way()
        ours = ours or run
        apart = max(abs(a - b) for a, b in zip(run.losses, ours.losses, strict=True))
        if apart > 1e-4:
            sys.exit(f"{name} trains something else: losses {run.losses} for {ours.losses}")
        step = median(run.seconds)
        row = Row(
            **where,
            workload=workload.name,
            gemm=gemm,
            implementation=name,
            pairs=number,
            steps=len(run.losses),
            step_s=round(step, 3),
            pairs_per_s=round(number / step, 3),
            last_loss=round(run.losses[-1], 6),
            ratio=round(step / median(ours.seconds), 3),
        )
        took = f"{row.step_s} s a step, {row.pairs_per_s} pairs/s; fastpo is {row.ratio} times as fast"
        print(f"{workload.name} {gemm} {name}: {took}; losses differ by {apart:.1e}", flush=True)
        append([row], arguments.out)


def models(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The policy, always the same, and its reference."""
    size = (2, 128) if arguments.quick else ()
    return build_model(*size), build_model(*size, seed=1)


def run_fastpo(workload: Workload, arguments: argparse.Namespace, sharing: bool) -> Run:
    """``fastpo.training.train_preference``, what the loop's training stage is."""
    model, reference, records = *models(arguments), pair_records(workload)
    responses = {p.chosen_key: (p.prompt_ids, p.chosen_ids) for p in records}
    responses |= {p.rejected_key: (p.prompt_ids, p.rejected_ids) for p in records}
    logps, cu_seqlens = response_logps(reference, list(responses.values()), micro_batch_tokens=arguments.budget)
    ref_logps = dict(zip(responses, logps.tensor_split(cu_seqlens[1:-1]), strict=True))
    config = TrainConfig(
        learning_rate=LEARNING_RATE,
        batch_size=len(records),
        num_epochs=arguments.steps,
        lr_schedule="constant",
        micro_batch_tokens=arguments.budget,
        sharing=sharing,
    )
    stamps = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        history = train_preference(
            model,
            records,
            ref_logps,
            objective=objectives.dpo(beta=BETA),
            config=config,
            output_dir=folder,
            accelerator=Accelerator(cpu=True),
            log=lambda record: stamps.append(time.perf_counter()),
        )
    return Run([record["loss"] for record in history], _gaps(stamps))


class _Trainer(DPOTrainer):
    """DPOTrainer on tokens that are there already, which keeps the loss of each micro-batch."""

    def _prepare_dataset(self, dataset, *_):
        self.micro_losses = []
        return dataset

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.micro_losses.append(loss.item())  # over the number of micro-batches
        return loss


class _Stopwatch(TrainerCallback):
    def __init__(self):
        self.stamps = []

    def on_train_begin(self, *args, **kwargs):
        self.stamps.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.stamps.append(time.perf_counter())


def run_trl(workload: Workload, arguments: argparse.Namespace) -> Run:
    model, reference, records = *models(arguments), pair_records(workload)
    size = len(trl_batches(workload, arguments.trl_budget)[0])  # as many as the budget takes, and divide the pairs
    size = max(k for k in range(1, size + 1) if len(records) % k == 0)
    texts = ("the tokens are there already",)
    rows = [{f"{name}_ids": getattr(p, f"{name}_ids") for name in ("prompt", "chosen", "rejected")} for p in records]
    accumulation, stopwatch = len(records) // size, _Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            num_train_epochs=arguments.steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            max_length=None,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = _Trainer(
            model,
            reference,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=build_bpe_tokenizer(texts, 300),
            callbacks=[stopwatch],
        )
        model.eval()  # dropout there is none
        trainer.train()
    per_step = [
        sum(trainer.micro_losses[k : k + accumulation]) for k in range(0, len(trainer.micro_losses), accumulation)
    ]
    return Run(per_step, _gaps(stopwatch.stamps))


def _gaps(stamps: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(stamps)]


if __name__ == "__main__":
    main()
