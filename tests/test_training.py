"""The training stages: the gradient of the whole batch's mean however it is split; exact resume of a killed stage."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import EOS, build, random_tokens

from fastpo import objectives
from fastpo.errors import FastpoError
from fastpo.models import ResponseScorer, load_model, response_logps
from fastpo.pairs import PairRecord
from fastpo.references import Reference
from fastpo.tasks import PreferenceTask
from fastpo.training import TrainConfig, _accumulate_gradients, train_preference, train_sft


class Killed(Exception):
    pass


def examples(number: int = 24) -> list[tuple[list[int], list[int]]]:
    lengths = [3 + i * 5 % 11 for i in range(number)]
    responses = random_tokens(*(1 + i * 7 % 13 for i in range(number)), seed=2)
    return [(p, [*r, EOS]) for p, r in zip(random_tokens(*lengths, seed=1), responses, strict=True)]


def pairs(number: int = 10) -> list[PairRecord]:
    """Two pairs per prompt that share their chosen response; the weights differ."""
    data = examples(3 * number)
    return [
        PairRecord(
            prompt_ids=data[i // 2][0],
            chosen_ids=data[i // 2][1],
            rejected_ids=data[number + i][1],
            weight=0.5 + i / number,
            chosen_key=f"{i // 2}/chosen",
            rejected_key=f"{i}/rejected",
        )
        for i in range(number)
    ]


def reference(records: list[PairRecord]) -> dict[str, torch.Tensor]:
    """Log-probs under another model than the policy, so that no log-ratio is 0."""
    responses = {p.chosen_key: (p.prompt_ids, p.chosen_ids) for p in records}
    responses |= {p.rejected_key: (p.prompt_ids, p.rejected_ids) for p in records}
    logps, cu_seqlens = response_logps(build(seed=5), list(responses.values()))
    return {key: logps[cu_seqlens[i] : cu_seqlens[i + 1]] for i, key in enumerate(responses)}


def settings(**changes) -> TrainConfig:
    """Batches that mix the prompts."""
    given = {"learning_rate": 1e-3, "batch_size": 4, "num_epochs": 2, "checkpoint_steps": 5, "batch_by": "pair"}
    return TrainConfig(**{**given, **changes})


def run_sft(path, log=lambda record: None, **changes):
    model = build()
    history = train_sft(
        model, examples(), config=settings(**changes), output_dir=path, accelerator=Accelerator(cpu=True), log=log
    )
    return model, history


def run_preference(path, log=lambda record: None, **changes):
    model = build()
    history = train_preference(
        model,
        pairs(),
        reference(pairs()),
        objective=objectives.irpo(),
        config=settings(**changes),
        output_dir=path,
        accelerator=Accelerator(cpu=True),
        log=log,
    )
    return model, history


def run_unshared(path, log=lambda record: None, **changes):
    return run_preference(path, log, sharing=False, **changes)


def sequence_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)


def irpo_by_definition(model, records, ref_logps, beta: float, alpha: float) -> torch.Tensor:
    losses = []
    for p in records:
        chosen, rejected = (sequence_logps(model, p.prompt_ids, ids) for ids in (p.chosen_ids, p.rejected_ids))
        ratio = (chosen - ref_logps[p.chosen_key]).sum() - (rejected - ref_logps[p.rejected_key]).sum()
        losses.append(p.weight * (-F.logsigmoid(beta * ratio) - alpha * chosen.mean()))
    return torch.stack(losses).mean()


def largest_difference(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_one_preference_step_is_adamw_on_the_loss_by_definition(tmp_path):
    trained, (record,) = run_preference(tmp_path, batch_size=10, num_epochs=1, max_grad_norm=0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    loss = irpo_by_definition(model, pairs(), reference(pairs()), beta=0.1, alpha=1.0)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    optimizer.step()
    # Adam's first step is the sign of the gradient: where that is almost 0 the last bits decide, so compare the bulk
    different = torch.cat(
        [((a - b).abs() > 1e-5).flatten() for a, b in zip(trained.parameters(), model.parameters(), strict=True)]
    )
    assert different.float().mean() < 0.01


def test_records_are_means_over_the_batch(tmp_path):
    _, (record,) = run_preference(tmp_path, batch_size=10, num_epochs=1)
    model, ref_logps = build(), reference(pairs())
    chosen = [sequence_logps(model, p.prompt_ids, p.chosen_ids).detach() for p in pairs()]
    rejected = [sequence_logps(model, p.prompt_ids, p.rejected_ids).detach() for p in pairs()]
    rewards = [
        (0.1 * (c - ref_logps[p.chosen_key]).sum().item(), 0.1 * (r - ref_logps[p.rejected_key]).sum().item())
        for p, c, r in zip(pairs(), chosen, rejected, strict=True)
    ]
    expected = {
        "logps_chosen": sum(c.sum().item() for c in chosen) / 10,
        "logps_rejected": sum(r.sum().item() for r in rejected) / 10,
        "logps_per_token_chosen": sum(c.mean().item() for c in chosen) / 10,
        "logps_per_token_rejected": sum(r.mean().item() for r in rejected) / 10,
        "nll": -sum(c.mean().item() for c in chosen) / 10,
        "rewards_chosen": sum(c for c, _ in rewards) / 10,
        "rewards_rejected": sum(r for _, r in rewards) / 10,
        "margin": sum(c - r for c, r in rewards) / 10,
        "accuracy": sum(c > r for c, r in rewards) / 10,
    }
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", [objectives.irpo(), objectives.cpo(), objectives.dpo(), objectives.orpo()])
def test_micro_batches_do_not_change_the_gradient(objective):
    """cpo and orpo divide their NLL by the tokens of the batch, which no micro-batch knows. 60 tokens: 1 or 2 pairs."""
    found = []
    for micro_batch_tokens in (10_000, 60):
        model = build()
        task = PreferenceTask(pairs(), reference(pairs()) if objective.needs_reference else None, objective)
        config = settings(micro_batch_tokens=micro_batch_tokens)
        sums = _accumulate_gradients(ResponseScorer(model), task, list(range(10)), config, Accelerator(cpu=True))
        found.append(([p.grad for p in model.parameters()], task.record(sums)))
    (whole, record), (split, split_record) = found
    scale = max(g.abs().max() for g in whole)
    assert all((a - b).abs().max() < 1e-5 * scale for a, b in zip(whole, split, strict=True))
    # the sum of the parts' losses is the loss of the whole; the statistics are means over distinct tokens, not pairs
    for name in ("loss", "nll", "rewards_chosen", "margin", "accuracy", "logps_per_token_rejected"):
        assert split_record[name] == pytest.approx(record[name], rel=1e-4)


def test_lora_on_the_head_gets_the_gradient_of_the_definition():
    """peft's adapters on body and head, their B not zero; the weights under them get none."""
    peft = pytest.importorskip("peft")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    torch.manual_seed(0)
    model = peft.get_peft_model(build(), peft.LoraConfig(**settings)).eval()
    task, found = PreferenceTask(pairs(), reference(pairs()), objectives.irpo()), []
    loss, _ = task.loss(ResponseScorer(model), range(10), range(10), torch.device("cpu"))
    for value in (loss / 10, irpo_by_definition(model, pairs(), reference(pairs()), beta=0.1, alpha=1.0)):
        model.zero_grad()
        value.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert {name.split(".")[-3] for name in found[0]} == {"lora_A", "lora_B"} and any("lm_head" in n for n in found[0])
    scale = max(grad.abs().max() for grad in found[1].values())
    assert found[0].keys() == found[1].keys()
    assert all((found[0][name] - grad).abs().max() < 1e-5 * scale for name, grad in found[1].items())


def test_supervised_loss_is_the_mean_over_response_tokens(tmp_path):
    _, history = run_sft(tmp_path, batch_size=24, num_epochs=1, micro_batch_tokens=60)
    logps = torch.cat([sequence_logps(build(), p, r).detach() for p, r in examples()])
    assert history[0]["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)
    assert history[0]["tokens"] == len(logps)


@pytest.mark.parametrize("run", [run_sft, run_preference, run_unshared])
def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path, run):
    """Killed before the first checkpoint (steps 1 and 2), right after it (3) and before the next one (4)."""
    expected, history = run(tmp_path / "whole", checkpoint_steps=2)
    for step in (1, 2, 3, 4):

        def kill(record, step=step):
            if record["step"] == step:
                raise Killed

        with pytest.raises(Killed):
            run(tmp_path / "killed", log=kill, checkpoint_steps=2)
        (tmp_path / "killed" / "checkpoints" / ".step_00000099.tmp").mkdir(parents=True, exist_ok=True)
    steps = []
    found, resumed = run(tmp_path / "killed", log=lambda record: steps.append(record["step"]), checkpoint_steps=2)
    assert steps[0] > 1, "it should go on from a checkpoint"
    assert resumed == history
    assert largest_difference(found, expected) == 0.0


@pytest.mark.parametrize("run", [run_preference, run_unshared])
def test_training_twice_gives_the_same_bits(tmp_path, run):
    one, two = run(tmp_path / "a"), run(tmp_path / "b")
    assert one[1] == two[1] and largest_difference(one[0], two[0]) == 0.0


def test_two_processes_train_what_one_does(tmp_path):
    """DDP, FSDP2 and FSDP2 resumed: the weights of one process. Responses scored in shares: its log-probs."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder.parent), str(folder)]),
        "OMP_NUM_THREADS": "1",
    }
    command += [str(folder / "two_processes.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr

    given = Reference(reference(pairs(9)), model=build(seed=5))
    arguments = {"accelerator": Accelerator(cpu=True), "log": lambda record: None}
    for objective, tolerance, sharing, names in (
        (objectives.irpo(), 1e-5, True, ("ddp", "cut", "fsdp2", "fsdp2_resumed")),
        (objectives.irpo(), 1e-5, False, ("unshared", "fsdp2unshared")),
        # smaller gradients, whose rounding Adam makes more of: micro-batches of one process differ by 2e-5 too
        (objectives.tdpo2(), 1e-4, False, ("fsdp2kl",)),
    ):
        model, output = build(), tmp_path / f"one_{names[0]}"
        arguments |= {"objective": objective, "config": settings(sharing=sharing)}
        train_preference(model, pairs(9), given, output_dir=output, **arguments)
        for name in names:
            assert largest_difference(load_model(tmp_path / name), model) < tolerance, name
    expected, _ = response_logps(build(), [(p.prompt_ids, p.chosen_ids) for p in pairs(9)])
    torch.testing.assert_close(torch.load(tmp_path / "logps.pt"), expected, rtol=1e-5, atol=1e-5)


def test_under_mixed_precision_the_reference_is_the_policy_at_the_start(tmp_path):
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        responses = {p.chosen_key: (p.prompt_ids, p.chosen_ids) for p in pairs()}
        responses |= {p.rejected_key: (p.prompt_ids, p.rejected_ids) for p in pairs()}
        logps, offsets = response_logps(build(), list(responses.values()), accelerator=accelerator)
        ref_logps = {key: logps[offsets[i] : offsets[i + 1]] for i, key in enumerate(responses)}
        arguments = {"objective": objectives.irpo(), "accelerator": accelerator, "log": lambda record: None}
        model = build()
        records = train_preference(
            model, pairs(), ref_logps, config=settings(num_epochs=4, sharing=False), output_dir=tmp_path, **arguments
        )
    finally:
        AcceleratorState._reset_state()
    assert abs(records[0]["rewards_chosen"]) < 1e-3 and abs(records[0]["rewards_rejected"]) < 1e-3
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropout_is_off(tmp_path, gradient_checkpointing):
    """GPT-2 has dropout in its embeddings, its attention and its blocks."""
    histories = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        history = train_sft(
            build("gpt2"),
            examples(),
            config=settings(num_epochs=1, gradient_checkpointing=gradient_checkpointing),
            output_dir=tmp_path / str(seed),
            accelerator=Accelerator(cpu=True),
            log=lambda record: None,
        )
        histories.append(history)
    assert histories[0] == histories[1]


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain, checkpointed = run_sft(tmp_path / "a"), run_sft(tmp_path / "b", gradient_checkpointing=True)
    assert largest_difference(plain[0], checkpointed[0]) < 1e-6
    assert not checkpointed[0].training


def test_batches_are_permutations_cut_across_epochs():
    config = TrainConfig(learning_rate=1.0, batch_size=4, num_epochs=1.5)
    batches = config.batches(10)
    assert [len(b) for b in batches] == [4, 4, 4, 3]
    drawn = [i for batch in batches for i in batch]
    assert sorted(drawn[:10]) == list(range(10)) and len(set(drawn[10:])) == 5
    assert config.batches(10) == batches
    assert TrainConfig(learning_rate=1.0, batch_size=4, num_epochs=None, max_steps=7).num_steps(10) == 7
    assert TrainConfig(learning_rate=1.0, batch_size=4, num_epochs=3, max_steps=2).num_steps(10) == 2


def test_batches_of_whole_prompts():
    """Prompts and the pairs of each in random order, side by side; another order in each epoch; every item once."""
    prompts = [0, 1, 2, 0, 1, 2, 0, 3]
    config = TrainConfig(learning_rate=1.0, batch_size=4, num_epochs=2)
    drawn = [i for batch in config.batches(8, prompts) for i in batch]
    for epoch in (drawn[:8], drawn[8:]):
        assert sorted(epoch) == list(range(8))
        order = [prompts[i] for i in epoch]
        assert all(order[a : order.index(p) + order.count(p)] == [p] * order.count(p) for a, p in first_of_each(order))
    assert drawn[:8] != drawn[8:]
    assert [prompts[i] for i in drawn] != [prompts[i] for batch in config.batches(8) for i in batch]


def first_of_each(order: list[int]) -> list[tuple[int, int]]:
    return [(order.index(p), p) for p in dict.fromkeys(order)]


@pytest.mark.parametrize("schedule, last", [("constant", 1.0), ("linear", 1 / 8), ("cosine", None)])
def test_learning_rate(schedule, last):
    config = TrainConfig(learning_rate=1.0, lr_schedule=schedule, warmup_steps=2)
    rates = [config.lr(step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[-1] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2 if last is None else last)


def test_nothing_to_train_on_is_said(tmp_path):
    with pytest.raises(FastpoError, match="there is nothing to train on: no examples, or no pairs"):
        train_sft(build(), [], config=settings(), output_dir=tmp_path, accelerator=Accelerator(cpu=True), log=print)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ref_logps": None}, "ref_logps is None; objective irpo compares with a reference"),
        ({"missing": "0/chosen"}, "ref_logps has no '0/chosen', a response of pairs[0]"),
        ({"short": "0/chosen"}, "ref_logps['0/chosen'] has shape (1,); it should be ("),
        ({"response": []}, "chosen of pairs[0] has an empty response; it should hold at least one token"),
        ({"response": [2] * 70}, "70 tokens (prompt + response); it should have at most 64, the model's context"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, change, message):
    records = pairs()
    ref_logps = reference(records) if "ref_logps" not in change else None
    if "missing" in change:
        del ref_logps[change["missing"]]
    if "short" in change:
        ref_logps[change["short"]] = ref_logps[change["short"]][:1]
    if "response" in change:
        response = change["response"]
        records[0] = PairRecord(records[0].prompt_ids, response, [2], 1.0, "new", "other")
        ref_logps |= {"new": torch.zeros(len(response)), "other": torch.zeros(1)}
    with pytest.raises(FastpoError, match=re.escape(message)):
        train_preference(
            build(),
            records,
            ref_logps,
            objective=objectives.irpo(),
            config=settings(),
            output_dir=tmp_path,
            accelerator=Accelerator(cpu=True),
            log=lambda record: None,
        )
