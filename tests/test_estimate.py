"""The costs that --dry_run prints, against counts done by hand and the models' own parameters; no weights are read."""

from dataclasses import replace

import pytest
import torch

from fastpo import cli, embedded, estimate
from fastpo.config import Config
from fastpo.estimate import Sizes, costs, pairs_at_most, sizes_of
from fastpo.pairs import RULES
from fastpo.stages import build_objective

SIZES = Sizes(parameters=1300, embedding=100, vocab=20, hidden=10, layers=2, cache=40, itemsize=4)  # body: 1000


def test_sizes_of_the_embedded_model():
    model = embedded.build_model(0)
    sizes = sizes_of(Config())
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert (sizes.vocab, sizes.hidden, sizes.layers, sizes.embedding) == (258, 128, 2, 0), "tied: nothing is looked up"
    assert sizes.cache == 2 * 2 * 128 and sizes.itemsize == 4
    assert sizes.body == sizes.parameters - 258 * 128


def test_tiny_llama_and_types():
    config = Config(model="tiny-llama", vocab_size=300, hidden_size=64, num_layers=3, num_heads=2, dtype="bfloat16")
    sizes = sizes_of(config)
    assert (sizes.vocab, sizes.hidden, sizes.layers, sizes.itemsize) == (300, 64, 3, 2)


@pytest.mark.parametrize("sharing", [True, False])
def test_costs_by_hand(sharing):
    """10 prompts of 5 tokens, 4 samples of 3, one pair each of IRPO at most: two sequences of 8 tokens a pair, whose
    prompt is shared."""
    config = Config(num_samples=4, max_new_tokens=3, pairs_per_prompt=1, num_epochs=1.0, sharing=sharing)
    found = {c.stage: c for c in costs(config, build_objective(config), SIZES, 10, 5.0)}
    assert list(found) == ["samples", "reference", "training"]
    samples, reference, training = found.values()
    assert (samples.sequences, samples.tokens) == (40, 10 * (5 + 4 * 3)), "a prompt goes through once"
    assert samples.flops == 2 * 1000 * 170 + 2 * 120 * 10 * 20
    tokens = 10 * 5 + 20 * 3 if sharing else 20 * 8
    assert (training.sequences, training.tokens) == (reference.sequences, reference.tokens) == (20, tokens)
    assert training.flops == 3 * 2 * 1000 * tokens + 3 * 2 * (20 * 3) * 10 * 20


def test_a_response_of_several_pairs_is_trained_on_once_in_a_batch():
    """10 prompts of 5 tokens, 4 samples of 3 and the data's solution, 20 pairs each; 2 epochs in 400 / 50 batches."""

    def training(**settings):
        common = {"num_samples": 4, "max_new_tokens": 3, "pairs_per_prompt": 20, "num_epochs": 2.0, "batch_size": 50}
        config = Config(**{**common, **settings})
        found = {c.stage: c for c in costs(config, build_objective(config), SIZES, 10, 5.0)}
        return found["training"].sequences, found["training"].tokens

    asked = 2 * 10 + 8  # the prompts of two epochs, some of them in two batches
    assert training() == (asked * 5, asked * (5 + 5 * 3))
    assert training(batch_by="pair") == (800, 400 * 5 + 800 * 3), "two responses and one prompt a pair"
    assert training(objective="tdpo1", alpha=None) == training()
    assert training(sharing=False) == (800, 800 * 8)
    assert training(batch_size=1) == (800, 400 * 5 + 800 * 3)


@pytest.mark.parametrize(
    ("settings", "stage", "sequences"),
    [
        ({"score_by": "judge"}, "grades", 40),
        ({"score_by": "duels"}, "grades", 10 * 4 * 3),
        ({"score_by": "judge", "judge_mode": "text", "judge_samples": 7}, "judgements", 280),
        ({"score_by": "implicit"}, "implicit rewards, two or three models", 120),
        ({"temperature_scan": [0.5, 1.0], "scan_prompts": 3}, "scan", 3 * 2 * 4),
    ],
)
def test_judges_and_scans_are_counted(settings, stage, sequences):
    config = Config(num_samples=4, pair_rule="max_min", objective="dpo", **settings)
    found = {c.stage: c for c in costs(config, build_objective(config), SIZES, 10, 5.0)}
    assert found[stage].sequences == sequences and found[stage].flops > 0


@pytest.mark.parametrize(("sharing", "prompts"), [(True, 10), (False, 40)])
def test_implicit_rewards_by_hand(sharing, prompts):
    """Three models on 40 responses of 3 tokens to 10 prompts of 5."""
    config = Config(num_samples=4, max_new_tokens=3, score_by="implicit", pair_rule="max_min", sharing=sharing)
    (found,) = (c for c in costs(config, build_objective(config), SIZES, 10, 5.0) if "implicit" in c.stage)
    assert found.tokens == 3 * (prompts * 5 + 40 * 3)
    assert found.flops == 2 * 1000 * found.tokens + 2 * (3 * 40 * 3) * 10 * 20


def test_searches_by_hand():
    """10 prompts of 5 tokens; 16 expansions of 3 children, steps of 4 tokens; each node is completed twice and once."""
    settings = {"search_width": 3, "search_simulations": 16, "search_step_tokens": 4, "search_rollouts": 2}
    config = Config(search="rest_mcts", objective="sft", alpha=None, beta=None, max_new_tokens=30, **settings)
    found = {c.stage: c for c in costs(config, build_objective(config), SIZES, 10, 5.0)}
    assert list(found) == ["search, 48 nodes a tree", "rollouts", "training"]
    search, rollouts, _ = found.values()
    assert (search.sequences, search.tokens) == (480, 10 * 5 + 480 * 4), "a prompt goes through once"
    assert (rollouts.sequences, rollouts.tokens) == (480 * 3, 480 * 3 * 30)
    beam = replace(config, search="beam_q", search_leaves=2, search_depth=5, search_value="self")
    stages = [c.stage for c in costs(beam, build_objective(beam), SIZES, 10, 5.0)]
    assert stages == ["search, 30 nodes a tree", "self-evaluations", "training"]


@pytest.mark.parametrize(
    ("objective", "extra", "training"),
    [("dpo", 0, 0), ("t_reg", 2, 0), ("sparse_po", 0, 1), ("tdpo2", 0, 1), ("bco", 0, 1)],
)
def test_forwards_that_objectives_ask_for(objective, extra, training):
    """Beside one of the reference and three passes of training: T-REG's contrast, BCO's two phases, the KL."""

    def tokens_and_body(name):
        config = Config(objective=name, alpha=None)
        sizes = replace(SIZES, vocab=0)
        found = {c.stage: c for c in costs(config, build_objective(config), sizes, 10, 5.0)}
        return [found[stage].flops / found[stage].tokens / (2 * sizes.body) for stage in ("reference", "training")]

    assert tokens_and_body(objective) == pytest.approx([1 + extra, 3 + training])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_bounded(rule):
    """Rules of one tuple per prompt are known as such: all others go by pairs_per_prompt."""
    few, many = (pairs_at_most(Config(pair_rule=rule, pairs_per_prompt=k), 10) for k in (2, 5))
    assert few >= 10 and (many == few) == (rule in (*estimate._ONCE, "tiers"))


def test_dry_run_needs_no_weights(capsys, tmp_path):
    """A directory with a config and a tokenizer only, of a size that would not fit here."""
    model = embedded.build_model(0)
    model.config.hidden_size = 8192
    model.config.head_dim = 2048
    model.config.num_hidden_layers = 80
    model.config.save_pretrained(tmp_path / "model")
    embedded.build_tokenizer().save_pretrained(tmp_path / "model")
    argv = (
        f"train irpo --model {tmp_path}/model --data embedded --output_dir {tmp_path}/run --max_new_tokens 40 --dry-run"
    )
    assert cli.main(argv.split()) == 0
    out = capsys.readouterr().out
    for text in (
        "80 layers, hidden 8192",
        "samples",
        "reference",
        "training",
        "3.00F in GEMMs",
        "memory of one process",
    ):
        assert text in out
    assert not (tmp_path / "run").exists() and torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    ("options", "gemms", "head"),
    [("", "3.", "linear_token_logprobs; on trees"), ("--no_sharing", "3.00F", "linear_preference_loss for preference")],
)
def test_a_dry_run_says_what_the_head_will_be_run_by(capsys, tmp_path, options, gemms, head):
    """Groups of whole pairs keep their logits where a tree's rows outgrow the budget and make some again."""
    model = embedded.build_model(0)
    model.config.vocab_size, model.config.hidden_size, model.config.head_dim = 128256, 4096, 1024
    model.config.save_pretrained(tmp_path / "model")
    embedded.build_tokenizer().save_pretrained(tmp_path / "model")
    argv = f"train irpo --model {tmp_path}/model --data embedded --max_new_tokens 40 --dry_run {options}"
    assert cli.main(argv.split()) == 0
    out = capsys.readouterr().out
    assert f"LM head: {head}" in out and f"trained head, {gemms}" in out
    assert ("logits again that memory_budget does not hold" in out) == (not options)
