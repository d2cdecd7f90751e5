"""The fused causal-LM loss beside the models' own, over architectures that differ in what their heads do."""

import pytest
import tiny_models
import torch
from datasets import Dataset
from integration_cases import NAMES, assert_same_gradients, build, gradients
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from fastpo.errors import FastpoError
from fastpo.integrations.head import Head
from fastpo.integrations.transformers import (
    FusedLossMixin,
    add_fused_head,
    causal_lm_logps,
    fused_causal_lm_loss,
    reference_logps,
)


class FusedTrainer(FusedLossMixin, Trainer):
    pass


def batch_of(*lengths, masked=2):
    """Right-padded sequences; the first ``masked`` labels of each, and the padding's, do not count."""
    rows = tiny_models.random_tokens(*lengths)
    width = max(lengths)
    ids = torch.tensor([row + [tiny_models.PAD] * (width - len(row)) for row in rows])
    attention = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :masked] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


BATCH = batch_of(9, 4, 12, 2)


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return gradients(model)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_the_models(name, padding_free):
    model = build(name)
    for number in (None, 7, torch.tensor(7)):
        theirs = model(**BATCH, num_items_in_batch=number).loss
        ours = fused_causal_lm_loss(model, BATCH, num_items_in_batch=number, padding_free=padding_free)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = loss_and_gradients(model, lambda: model(**BATCH).loss)
    found = loss_and_gradients(model, lambda: fused_causal_lm_loss(model, BATCH, padding_free=padding_free))
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
def test_log_probs(padding_free):
    model = build("gemma2")
    labels = BATCH["labels"][:, 1:]
    logps = torch.log_softmax(model(**BATCH).logits[:, :-1], -1)
    expected = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
    torch.testing.assert_close(causal_lm_logps(model, BATCH, padding_free=padding_free), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi"])  # softcap, scale, bias
def test_statistics(name):
    model = build(name)
    add_fused_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    labels, logits = BATCH["labels"][:, 1:], model(**BATCH).logits[:, :-1]
    logp = torch.log_softmax(logits, -1)
    expected = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": logp.exp().square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
    }
    found = model(**BATCH, fused_lm_head=True)
    for field, values in expected.items():
        torch.testing.assert_close(found[field], values.masked_fill(labels == -100, 0), rtol=1e-4, atol=1e-5)


def test_mean_logits_of_an_adapted_head():
    head = Head.of(adapted(LoraConfig(**LORA, target_modules=["lm_head"])).get_base_model())
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(head.mean_logits(hidden), head.logits(hidden).mean(-1), rtol=1e-4, atol=1e-6)


def adapted(config, seed=3):
    """A model with adapters that do something."""
    model = get_peft_model(build("granite"), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


LORA = {"r": 2, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA, target_modules=["q_proj"]),
        LoraConfig(**LORA, target_modules=["q_proj", "lm_head"], lora_alpha=7, use_rslora=True),
        LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["frozen head", "LoRA on the head", "trained copy of the head"],
)
def test_peft_and_its_reference(config):
    model = adapted(config)
    expected = loss_and_gradients(model, lambda: model(**BATCH).loss)
    assert_same_gradients(loss_and_gradients(model, lambda: fused_causal_lm_loss(model, BATCH)), expected)
    with model.disable_adapter():
        without = causal_lm_logps(model, BATCH).detach()
    torch.testing.assert_close(without, causal_lm_logps(build("granite"), BATCH))
    assert not torch.allclose(without, causal_lm_logps(model, BATCH))
    reference = reference_logps(model, BATCH)
    assert torch.equal(reference, without) and not reference.requires_grad


def test_merged_and_several_adapters_on_the_head():
    model = adapted(LoraConfig(**LORA, target_modules=["lm_head"]))
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected = model(**BATCH).loss
    torch.testing.assert_close(fused_causal_lm_loss(model, BATCH), expected)
    model.merge_adapter()
    torch.testing.assert_close(fused_causal_lm_loss(model, BATCH), expected)


def test_references():
    model, policy = build(seed=1), build(seed=2)
    stored = reference_logps(model, BATCH)
    assert torch.equal(stored, causal_lm_logps(model, BATCH)) and not stored.requires_grad
    assert reference_logps(stored, BATCH) is not None and torch.equal(reference_logps(stored, BATCH), stored)
    assert not torch.allclose(reference_logps(policy, BATCH), stored)
    model.train()
    reference_logps(model, BATCH)
    assert all(module.training for module in model.modules())
    with pytest.raises(FastpoError, match=r"reference has shape \[4, 12\]; it should be \[4, 11\]"):
        reference_logps(torch.zeros(4, 12), BATCH)


def test_named_reference_adapter():
    model = adapted(LoraConfig(**LORA, target_modules=["q_proj"]))
    model.add_adapter("ref", LoraConfig(**LORA, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("ref")
    expected = causal_lm_logps(model, BATCH).detach()
    model.set_adapter("default")
    assert torch.equal(reference_logps(model, BATCH), expected)
    assert model.active_adapter == "default"


def test_a_batch_without_labels_gives_zero_gradients():
    model = build()
    empty = {**BATCH, "labels": torch.full_like(BATCH["labels"], -100)}
    grads = loss_and_gradients(model, lambda: fused_causal_lm_loss(model, empty))
    assert grads and all((grad == 0).all() for grad in grads.values())


def test_autocast():
    model = build("granite")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused_causal_lm_loss(model, BATCH), model(**BATCH).loss
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)


SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "disable_tqdm": True,
}


def trainer_of(cls, tmp_path, model=None, **settings):
    compute_loss_func = settings.pop("compute_loss_func", None)
    rows = batch_of(9, 4, 12, 2, 5, 5, 7, 3)
    data = Dataset.from_list([{k: v[i].tolist() for k, v in rows.items()} for i in range(8)])
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, **settings})
    own = {"train_dataset": data, "eval_dataset": data, "compute_loss_func": compute_loss_func}
    return cls(model or build(seed=1), arguments, **own)


@pytest.mark.parametrize("peft", [False, True])
def test_training_logs_and_evaluates_as_trainer_does(tmp_path, peft):
    logs, predictions = [], []
    for cls in (Trainer, FusedTrainer):
        model = adapted(LoraConfig(**LORA, target_modules=["q_proj", "lm_head"])) if peft else None
        trainer = trainer_of(cls, tmp_path, model)
        trainer.train()
        logs.append(
            [{k: v for k, v in entry.items() if "loss" in k or k == "grad_norm"} for entry in trainer.state.log_history]
        )
        predictions.append(trainer.predict(trainer.eval_dataset).predictions)
    assert any("eval_loss" in entry for entry in logs[0])
    for theirs, ours in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(*(torch.tensor(p) for p in reversed(predictions)), rtol=1e-3, atol=1e-4)


def test_training_makes_no_logits(tmp_path, monkeypatch):
    trainer = trainer_of(FusedTrainer, tmp_path)
    monkeypatch.setattr(trainer.model.lm_head, "forward", lambda _: pytest.fail("logits"))
    trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss_func is given"),
        ({"use_liger_kernel": True}, "use_liger_kernel is True"),
    ],
)
def test_trainer_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(FastpoError, match=message):
        trainer_of(FusedTrainer, tmp_path, **settings)


def test_heads_that_are_refused():
    odd = build()
    own = odd.forward
    odd.forward = lambda *args, **kwargs: _scaled(own(*args, **kwargs))
    with pytest.raises(FastpoError, match="does more to its logits"):
        add_fused_head(odd)
    for settings, message in (
        ({"use_dora": True}, "variant of LoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout of adapter"),
    ):
        model = adapted(LoraConfig(**LORA, target_modules=["lm_head"], **settings))
        with pytest.raises(FastpoError, match=message):
            fused_causal_lm_loss(model.train(), BATCH)


class PackedLinear(torch.nn.Module):
    """As GPTQ's and AWQ's layers: no weight of its own."""


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda head: torch.ao.nn.quantized.dynamic.Linear(*head.weight.shape[::-1]), "dynamic.* with no plain weight"),
        (lambda head: PackedLinear(), "PackedLinear with no plain weight"),
        (lambda head: with_weight(head, torch.int8), "Linear with a weight of torch.int8"),
        (lambda head: with_weight(head, torch.float8_e4m3fn), "Linear with a weight of torch.float8_e4m3fn"),
    ],
)
def test_quantised_heads_are_refused(layer, message):
    model = build()
    model.lm_head = layer(model.lm_head)
    with pytest.raises(FastpoError, match=f"lm_head is a .*{message}; quantised heads are not supported") as refused:
        fused_causal_lm_loss(model, BATCH)
    assert "\n" not in str(refused.value)


def with_weight(head, dtype):
    head.weight = torch.nn.Parameter(head.weight.data.to(dtype), requires_grad=False)
    return head


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": BATCH["labels"][:, :5]}, r"labels has shape \[4, 5\]; it should be \[4, 12\], as input_ids"),
        ({"logits_to_keep": 1}, "logits_to_keep is given; the fused head makes no logits"),
        ({"return_dict": False}, "return_dict is False; it should be True"),
    ],
)
def test_calls_that_are_refused(change, message, padding_free):
    with pytest.raises(FastpoError, match=message):
        fused_causal_lm_loss(build(), {**BATCH, **change}, padding_free=padding_free)


def test_models_and_references_that_are_refused():
    with pytest.raises(FastpoError, match="batch has no labels"):
        fused_causal_lm_loss(build(), {"input_ids": BATCH["input_ids"]})
    with pytest.raises(FastpoError, match="model is on the meta device"):
        fused_causal_lm_loss(build().to("meta"), BATCH)
    with pytest.raises(FastpoError, match="reference is a str; it should be log-probs"):
        reference_logps("gpt2", BATCH)


def _scaled(outputs):
    outputs.logits = outputs.logits * 1.01
    return outputs


def test_wrapped_models_and_sharded_labels_are_refused():
    with pytest.raises(FastpoError, match="model is Sequential; it should be a transformers or peft model"):
        fused_causal_lm_loss(torch.nn.Sequential(build()), BATCH)
    with pytest.raises(FastpoError, match="shift_labels is given"):
        fused_causal_lm_loss(build(), {**BATCH, "shift_labels": BATCH["labels"]})
