"""FastDPOTrainer beside trl.DPOTrainer: same model, batch and seed; padded, and packed compared with TRL's padded.

One pair of trainers serves all losses: TRL reads its settings from attributes at each step.
"""

import ast

import pytest
import tiny_models
import torch
from datasets import Dataset
from integration_cases import assert_same_gradients, gradients
from integration_cases import build as build_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from fastpo.errors import FastpoError
from fastpo.integrations.trl import FastDPOTrainer, fused_head

# prompt, chosen, rejected lengths: a prompt of one token, responses of one token, one much longer than the rest
LENGTHS = [(5, 4, 2), (1, 1, 7), (3, 12, 1), (2, 3, 3)]
LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
VARIANTS = {
    **{f"{d}": {"f_divergence_type": d} for d in ("forward_kl", "js_divergence", "alpha_divergence")},
    "ld": {"ld_alpha": 0.4},
    "wpo": {"use_weighting": True},
    "mixture": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
}
CASES = {**{name: {"loss_types": [name], **more} for name, more in LOSSES.items()}, **VARIANTS}


def build_tokenizer():
    """A token per word, "2" to "39"; TRL ends every response with <eos>."""
    words = {"<pad>": tiny_models.PAD, "<eos>": tiny_models.EOS}
    words |= {str(i): i for i in range(2, tiny_models.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def dataset():
    """Texts of LENGTHS tokens, the responses' <eos> counted; TRL tokenizes them."""
    rows = []
    for i, lengths in enumerate(LENGTHS):
        prompt, chosen, rejected = tiny_models.random_tokens(*lengths, seed=i)
        rows.append({"prompt": text(prompt), "chosen": text(chosen[1:]), "rejected": text(rejected[1:])})
    return Dataset.from_list(rows)


def text(ids):
    return "".join(f" {i}" for i in ids)


def policy_and_reference(name="llama"):
    """Two models that differ by noise: log-ratios of the size that training sees, so that no e^D explodes."""
    policy, reference = build_model(name, seed=1), build_model(name, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01
    return policy, reference


def build(cls, tmp_path, model, ref_model=None, arguments=None, **settings):
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": len(LENGTHS),
        "disable_tqdm": True,
        **settings,
    }
    arguments = {"train_dataset": dataset(), "processing_class": build_tokenizer(), **(arguments or {})}
    return cls(model, ref_model, DPOConfig(**settings), **arguments)


def step(trainer, batch, settings):
    """Loss, gradients and logged metrics of one batch under the attributes ``settings``."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(trainer, name, value)
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    return loss.detach(), gradients(trainer.model), metrics


def assert_same_step(ours, theirs):
    (loss, grads, metrics), (their_loss, their_grads, their_metrics) = ours, theirs
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    assert_same_gradients(grads, their_grads)
    assert metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-5)
    assert metrics.keys() == their_metrics.keys()


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's, ours, and ours with packing, of one model and one reference; use_weighting asks for all outputs."""
    made = {}
    for name, cls, padding_free in (
        ("trl", DPOTrainer, False),
        ("padded", FastDPOTrainer, False),
        ("packed", FastDPOTrainer, True),
    ):
        models = policy_and_reference()
        settings = {"padding_free": padding_free, "use_weighting": True, "beta": 0.3}
        made[name] = build(cls, tmp_path_factory.mktemp(name), *models, **settings)
        made[name].use_weighting = False
    return made


@pytest.fixture(scope="module")
def batch(trainers):
    return trainers["trl"].data_collator(list(trainers["trl"].train_dataset))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_are_trls(trainers, batch, case, layout):
    assert_same_step(step(trainers[layout], batch, CASES[case]), step(trainers["trl"], batch, CASES[case]))


def test_every_loss_type_of_trl_is_tested(trainers, batch):
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        step(trainers["trl"], batch, {"loss_types": ["?"]})
    assert ast.literal_eval(str(error.value).split("one of ")[1]) == list(LOSSES)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_token_logps(trainers, batch, layout):
    assert batch["attention_mask"].sum(1).tolist() == [9, 2, 15, 5, 7, 8, 4, 5]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs, ours = (
            trainers[name].model.eval()(**inputs, labels=labels, fused_lm_head=True) for name in ("trl", layout)
        )
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "loss"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_whose_completions_are_cut_off_counts_nothing(trainers, batch, layout):
    empty = {**batch, "completion_mask": torch.zeros_like(batch["completion_mask"])}
    loss, grads, _ = step(trainers[layout], empty, {})
    torch.testing.assert_close(loss, torch.tensor(2.0).log())
    assert all((grad == 0).all() for grad in grads.values())


RUNS = {
    "plain": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "weighted": {"use_weighting": True, "ld_alpha": 0.5, "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]},
}


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_two_training_steps_log_what_trl_logs(tmp_path, run, padding_free):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2, **RUNS[run]}
    settings |= {"logging_steps": 1, "learning_rate": 1e-2, "optim": "sgd", "eval_strategy": "steps", "eval_steps": 2}
    logs = []
    for cls in (DPOTrainer, FastDPOTrainer):
        models = policy_and_reference()
        own = {**settings, "padding_free": padding_free and cls is FastDPOTrainer}
        trainer = build(cls, tmp_path, *models, {"eval_dataset": dataset()}, **own)
        trainer.train()
        logs.append(trainer.state.log_history)
    ours, theirs = ([_without_timings(entry) for entry in log] for log in reversed(logs))
    assert len(ours) == len(theirs) >= 3
    for our_entry, their_entry in zip(ours, theirs, strict=True):
        assert our_entry.keys() == their_entry.keys()
        assert our_entry == pytest.approx(their_entry, rel=1e-4, abs=1e-5)


def _without_timings(entry):
    return {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("loaded", [False, True], ids=["adapters off", "ref adapter"])
def test_reference_of_a_peft_model(tmp_path, batch, loaded, padding_free):
    """New adapters: the reference is the model without them. Loaded ones: TRL keeps a copy, "ref"."""
    made = []
    for cls in (DPOTrainer, FastDPOTrainer):
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = build_model(seed=1)
        model = get_peft_model(model, config) if loaded else model
        own = {"padding_free": padding_free and cls is FastDPOTrainer}
        trainer = build(cls, tmp_path, model, None, {} if loaded else {"peft_config": config}, **own)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora" in name and ".default." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        made.append(step(trainer, batch, {}))
    assert_same_step(made[1], made[0])
    assert made[0][2]["rewards/margins"] != 0


@pytest.mark.parametrize("padding_free", [False, True])
def test_lora_on_the_head(tmp_path, batch, padding_free):
    """TRL refuses it, since its own head would ignore it; here the model's own logits are the truth."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", lora_dropout=0.1)
    with pytest.raises(ValueError, match="adapter to `lm_head`"):
        build(DPOTrainer, tmp_path, build_model(seed=1), None, {"peft_config": config})
    own = {"padding_free": padding_free, "beta": 0.3}
    trainer = build(FastDPOTrainer, tmp_path, build_model(seed=1), None, {"peft_config": config}, **own)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    loss, grads, _ = step(trainer, batch, {})
    policy = sequence_logps(trainer.model, batch)
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = sequence_logps(trainer.model, batch)
    chosen, rejected = (policy - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    trainer.model.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(grads, gradients(trainer.model))
    assert sum("lm_head.lora" in name and bool(grad.any()) for name, grad in grads.items()) == 2


def sequence_logps(model, batch):
    """[2B] from the model's logits."""
    ids, mask = batch["input_ids"], batch["completion_mask"]
    logps = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    return (logps.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)


def test_mixture_of_experts(tmp_path, batch):
    made = []
    for cls, padding_free in ((DPOTrainer, False), (FastDPOTrainer, False), (FastDPOTrainer, True)):
        models = policy_and_reference("mixtral")
        settings = {"padding_free": padding_free, "router_aux_loss_coef": 0.5}
        made.append(step(build(cls, tmp_path, *models, **settings), batch, {}))
    assert "aux_loss" in made[0][2]
    assert_same_step(made[1], made[0])
    assert_same_step(made[2], made[0])


def test_context_manager_serves_trainers_that_derive_from_trls(tmp_path, batch, trainers):
    class Own(DPOTrainer):
        pass

    patched = dpo_trainer.add_fused_lm_head
    with fused_head(padding_free=True):
        trainer = build(Own, tmp_path, *policy_and_reference(), beta=0.3)
    assert dpo_trainer.add_fused_lm_head is patched
    assert (
        trainer.model.forward.__func__.__closure__ and "fastpo" in trainer.model.forward.__func__.__code__.co_filename
    )
    assert_same_step(step(trainer, batch, {}), step(trainers["trl"], batch, {}))


def test_logits_are_never_made(trainers, batch, monkeypatch):
    """The LM head as a module is not called, neither the policy's nor the reference's."""
    trainer = trainers["packed"]
    for model in (trainer.model, trainer.ref_model):
        monkeypatch.setattr(model.lm_head, "forward", lambda _: pytest.fail("logits"))
    step(trainer, batch, {})


def refused(tmp_path, message, model=None, arguments=None, **settings):
    with pytest.raises(ValueError, match=message):
        build(FastDPOTrainer, tmp_path, model or build_model(), build_model(seed=2), arguments, **settings)


def test_refusals(tmp_path, batch, trainers):
    refused(tmp_path, "label_smoothing is 0.1, which TRL ignores with loss_type", label_smoothing=0.1)
    refused(tmp_path, "label_smoothing_factor is 0.1, of Trainer's cross-entropy", label_smoothing_factor=0.1)
    with pytest.raises(FastpoError, match=r"args is a TrainingArguments; it should be a trl.DPOConfig"):
        FastDPOTrainer(build_model(), None, TrainingArguments(str(tmp_path), use_cpu=True))
    dora = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    refused(tmp_path, "adapter 'default' on lm_head is a variant of LoRA", arguments={"peft_config": dora})
    sizes = {"vocab_size": tiny_models.VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    bloom = BloomForCausalLM(BloomConfig(**sizes, initializer_range=0.3))
    refused(tmp_path, "padding_free is True, but the layers of BloomForCausalLM", bloom, padding_free=True)
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    trainer = build(FastDPOTrainer, tmp_path, build_model(), None, {"peft_config": prompts}, padding_free=True)
    with pytest.raises(FastpoError, match=r"padding_free is True, but the model is called with .*inputs_embeds"):
        step(trainer, batch, {})
    left = {**batch, "attention_mask": batch["completion_mask"]}
    with pytest.raises(FastpoError, match="attention_mask is 0 before a token that counts"):
        step(trainers["packed"], left, {})


def test_prompt_learning_without_packing(tmp_path, batch):
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    made = [
        step(build(cls, tmp_path, build_model(), None, {"peft_config": prompts}), batch, {})
        for cls in (DPOTrainer, FastDPOTrainer)
    ]
    assert_same_step(made[1], made[0])
