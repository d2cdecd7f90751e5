"""Training on trees against the same pairs response by response: the loss, its records and every gradient.

The pairs: random ones (hypothesis) from few tokens, so that responses share prefixes, are prefixes of each other and
stand in several pairs; and worked solutions in the manner of GSM8K, edited copies of each other. Budgets from one path
(trees are cut, the members of pairs stand in different rows) to everything in one row.
"""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_training import pairs, reference, sequence_logps
from test_training import settings as train_settings
from tiny_models import EOS, VOCABULARY, build, random_tokens
from transformers import BloomConfig, BloomForCausalLM

from fastpo import objectives
from fastpo.errors import FastpoError
from fastpo.integrations import head
from fastpo.models import response_logps
from fastpo.pairs import PairRecord
from fastpo.references import Reference
from fastpo.scoring import TreeScorer
from fastpo.sharing import tree_response_logps
from fastpo.tasks import PreferenceTask
from fastpo.training import _accumulate_gradients, train_preference
from fastpo.tree_task import TreePreferenceTask, groups, plan

ONE_ROW = 10_000
KL = ("tdpo1", "tdpo2", "sparse_po")


def records_of(prompts: list[list[int]], responses: list[list[list[int]]], chosen: list[tuple]) -> list[PairRecord]:
    """``chosen``: (prompt, chosen, rejected) by number; weights differ."""
    return [
        PairRecord(
            prompt_ids=prompts[p],
            chosen_ids=responses[p][w],
            rejected_ids=responses[p][r],
            weight=0.5 + i / len(chosen),
            chosen_key=f"{p}/{w}",
            rejected_key=f"{p}/{r}",
            margin=0.1 * i,
        )
        for i, (p, w, r) in enumerate(chosen)
    ]


@st.composite
def forests(draw) -> list[PairRecord]:
    prompts = draw(st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=5), min_size=1, max_size=3))
    response = st.lists(st.integers(2, 3), min_size=1, max_size=6)
    responses = [draw(st.lists(response, min_size=2, max_size=4, unique_by=tuple)) for _ in prompts]
    chosen = []
    for p, own in enumerate(responses):
        for _ in range(draw(st.integers(1, 4))):
            w = draw(st.integers(0, len(own) - 1))
            chosen.append((p, w, (w + draw(st.integers(1, len(own) - 1))) % len(own)))
    return records_of(prompts, responses, chosen)


def solutions() -> list[PairRecord]:
    """Four questions behind the same few-shot examples, six solutions to each: edits of one another."""
    few_shot, *questions = random_tokens(12, 7, 9, 6, 8, seed=3)
    generator = torch.Generator().manual_seed(4)
    responses, chosen = [], []
    for p in range(len(questions)):
        (solution,) = random_tokens(24, seed=10 + p)
        own = [[*solution, EOS]]
        for _ in range(5):
            edited = list(own[torch.randint(len(own), (1,), generator=generator)])
            at = int(torch.randint(len(edited) - 1, (1,), generator=generator))
            edited[at:-1] = random_tokens(len(edited) - 1 - at, seed=100 * p + len(own))[0]
            own.append(edited)
        responses.append(own)
        chosen += [(p, w, r) for w in (0, 1) for r in range(2, 6)]
    return records_of([few_shot + q for q in questions], responses, chosen)


def step(task_type, records, objective, budget, model=None, given=None):
    """(gradients, records) of one batch of all ``records``."""
    model = model or build()
    if given is None and objective.needs_reference:
        given = reference(records)
    task = task_type(records, given, objective)
    config = train_settings(micro_batch_tokens=budget)
    sums = _accumulate_gradients(task.scorer(model), task, list(range(len(records))), config, Accelerator(cpu=True))
    return [p.grad for p in model.parameters() if p.requires_grad], task.record(sums)


def assert_same_step(found, expected, rel: float = 1e-5) -> None:
    (grads, record), (expected_grads, expected_record) = found, expected
    assert record["loss"] == pytest.approx(expected_record["loss"], rel=rel)
    noise = 1e-6 * torch.stack([wanted.norm() for wanted in expected_grads]).norm()  # of gradients that are all but 0
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad - wanted).norm() <= rel * wanted.norm() + noise


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(forests(), st.sampled_from([1, 12, ONE_ROW]), st.sampled_from(["irpo", "tdpo2", "sparse_po"]))
def test_random_forests_give_the_gradients_of_their_paths(records, budget, name):
    objective, given = objectives.by_name(name), everything(records, name)
    found = step(TreePreferenceTask, records, objective, budget, given=given)
    assert_same_step(found, step(PreferenceTask, records, objective, ONE_ROW, given=given), rel=2e-5)


@pytest.mark.parametrize("budget", [1, 60, 150, ONE_ROW])
def test_solutions_give_the_gradients_of_their_paths(budget):
    """And the records; statistics of tokens are means over those of distinct responses, as without trees."""
    found = step(TreePreferenceTask, solutions(), objectives.irpo(), budget)
    expected = step(PreferenceTask, solutions(), objectives.irpo(), ONE_ROW)
    assert_same_step(found, expected)
    assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "simpo", "cpo", "ld_dpo", "bco", "beta_dpo", "aot_unpaired"])
@pytest.mark.parametrize(
    "task_type, budget", [(TreePreferenceTask, 1), (TreePreferenceTask, ONE_ROW), (PreferenceTask, 100)]
)
def test_objectives_do_not_depend_on_the_packing(name, task_type, budget):
    """cpo divides by the tokens of the batch; bco, beta_dpo and aot_unpaired couple the scores of all of it.

    100 tokens: two responses in a forward without trees, of the 24 of the batch.
    """
    objective, records = objectives.by_name(name), solutions()
    if name == "aot_unpaired":  # a pair's weight has no meaning for pairs of ranks
        with pytest.raises(FastpoError, match="weights of pairs are not all 1; objective aot_unpaired makes pairs of"):
            step(task_type, records, objective, budget)
        records = [replace(record, weight=1.0) for record in records]
    found = step(task_type, records, objective, budget)
    expected = step(PreferenceTask, records, objective, ONE_ROW)
    assert_same_step(found, expected)
    if task_type is TreePreferenceTask:  # else what stands in several forwards counts as often
        assert found[1]["tokens"] == expected[1]["tokens"]


def everything(records: list[PairRecord], name: str) -> Reference:
    """The reference's log-probs, and what TDPO and SparsePO need besides: its model, a mask in [0, 1] of each token."""
    ref_logps = reference(records)
    masks = {key: torch.sin(7 * logps).abs() for key, logps in ref_logps.items()}
    return Reference(ref_logps, {"weights": masks} if name == "sparse_po" else {}, build(seed=5))


def with_columns(name: str) -> tuple[list[PairRecord], Reference]:
    """What lipo and t_reg need besides: lists of a prompt's six solutions, or of three of them; rewards of tokens.

    And the objectives of the KL."""
    if name in KL:
        return solutions(), everything(solutions(), name)
    records = solutions()
    if name == "lipo":
        lists = {}
        for pair in records:
            for key, prompt, ids in pair.present:
                lists.setdefault(tuple(prompt), {})[key] = (key, prompt, ids)
        records = []
        for own in lists.values():
            for part in (list(own.values()), list(own.values())[1:4]):
                (first, prompt, chosen), (second, _, rejected), *others = part
                gains = tuple(float((5 * i + 2) % 7) for i in range(len(part)))
                ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
                keys = {"chosen_key": first, "rejected_key": second, "others": tuple(others)}
                records.append(PairRecord(**ids, **keys, gains=gains))
    ref_logps = reference(solutions())
    rewards = {key: torch.sin(7 * logps) for key, logps in ref_logps.items()}
    return records, Reference(ref_logps, {"token_coefs": rewards} if name == "t_reg" else {})


@pytest.mark.parametrize("name", ["lipo", "t_reg", *KL])
@pytest.mark.parametrize(
    "task_type, budget", [(TreePreferenceTask, 60), (TreePreferenceTask, 150), (PreferenceTask, 100)]
)
def test_objectives_of_each_tuple_alone_do_not_depend_on_the_packing(name, task_type, budget):
    """Their tuples cost by the scores of their own members: budgets in which trees are cut, and are not."""
    (records, given), objective = with_columns(name), objectives.by_name(name)
    found = step(task_type, records, objective, budget, given=given)
    assert_same_step(found, step(PreferenceTask, records, objective, ONE_ROW, given=given))


@pytest.mark.parametrize(
    ("name", "budget", "more"),
    [
        *[(name, 150, 0) for name in ("lipo", "t_reg", "tdpo2")],
        *[(name, 60, 1) for name in ("lipo", "irpo", "tdpo2")],
        ("bco", ONE_ROW, 0),
        ("bco", 150, 1),
    ],
)
def test_rows_are_scored_first_only_where_a_loss_needs_it(name, budget, more):
    """A forward per row; one more where a tuple's members lie in several rows, or the whole batch's scores do."""
    records, given = with_columns(name)
    model = build()
    task = TreePreferenceTask(records, given, objectives.by_name(name))
    scorer, calls = task.scorer(model), []
    scorer.register_forward_hook(lambda *_: calls.append(True))
    _accumulate_gradients(
        scorer, task, list(range(len(records))), train_settings(micro_batch_tokens=budget), Accelerator(cpu=True)
    )
    rows = len(plan(records, budget))
    assert (rows == 1) == (budget == ONE_ROW)
    assert len(calls) == rows if not more else rows < len(calls) <= 2 * rows


def policy(name: str) -> torch.nn.Module:
    """lora: peft's wrapper around a Llama, which trains adapters of its attention, their B not zero."""
    if name != "lora":
        return build(name)
    torch.manual_seed(0)
    adapters = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(build(), adapters).eval()


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral", "phi", "lora"])
def test_architectures(name):
    for objective in (objectives.irpo(), objectives.tdpo2()):
        given = Reference(reference(solutions()), model=build("llama" if name == "lora" else name, seed=5))
        found = step(TreePreferenceTask, solutions(), objective, 60, policy(name), given)
        expected = step(PreferenceTask, solutions(), objective, ONE_ROW, policy(name), given)
        assert_same_step(found, expected, rel=3e-5)


def test_every_distinct_token_goes_through_the_model_once():
    """The few-shot examples once for all prompts; the head sees distinct response tokens only."""
    records = solutions()
    (row,) = plan(records, ONE_ROW)
    sequences = {(*p.prompt_ids, *ids) for p in records for ids in (p.chosen_ids, p.rejected_ids)}
    assert row.tree.num_nodes == len({s[:n] for s in sequences for n in range(1, len(s) + 1)})
    assert row.tree.num_sequences == len(set(row.keys)) == len(sequences)


def test_the_kl_is_taken_once_per_distinct_predictor(monkeypatch):
    records, rows, op = solutions(), [], head.linear_token_kl

    def counted(*arguments, mask, **settings):
        rows.append(int(mask.sum()))
        return op(*arguments, mask=mask, **settings)

    monkeypatch.setattr(head, "linear_token_kl", counted)
    step(TreePreferenceTask, records, objectives.tdpo2(), ONE_ROW, given=everything(records, "tdpo2"))
    predictors = {
        (*p.prompt_ids, *ids[:n]) for p in records for ids in (p.chosen_ids, p.rejected_ids) for n in range(len(ids))
    }
    assert rows == [len(predictors)]


def test_a_row_has_room_by_distinct_tokens():
    """The few-shot examples are counted once for all questions of a row."""
    (whole,) = plan(solutions(), ONE_ROW)
    assert [len(plan(solutions(), whole.tree.num_nodes - missing)) for missing in (0, 1)] == [1, 2]


@pytest.mark.parametrize("budget", [1, 50, 60, 100, ONE_ROW])
def test_rows_keep_to_the_budget_and_hold_every_response_once(budget):
    records = solutions()
    rows = plan(records, budget)
    longest = max(p.longest for p in records)
    assert all(row.tree.num_nodes <= max(budget, longest) for row in rows)
    keys = [key for row in rows for key in row.keys]
    assert sorted(keys) == sorted({key for p in records for key, *_ in p.present})
    for row in rows:
        assert all({key for key, *_ in pair.present} <= set(row.keys) for pair in row.pairs)
    whole = sum(len(row.pairs) for row in rows)
    assert whole == len(records) if budget >= 150 else whole < len(records)  # else trees were cut


def test_pairs_that_share_a_response_or_a_prompt_stay_together():
    prompts, responses = [[2], [3], [4]], [[[5, 6], [7]], [[5], [8]], [[9], [9, 9]]]
    records = records_of(prompts, responses, [(0, 0, 1), (1, 0, 1), (2, 0, 1), (0, 1, 0)])
    assert groups(records) == [[records[0], records[3]], [records[1]], [records[2]]]
    mismatched = PairRecord(prompts[2], [9], [5], chosen_key="2/0", others=(("0/0", prompts[0], [5, 6]),))
    assert groups([*records, mismatched]) == [[records[0], records[2], records[3], mismatched], [records[1]]]


def searched() -> list[PairRecord]:
    """Pairs of two search trees: below the prompt, and below steps of the response."""
    first, second, *steps = random_tokens(6, 6, 5, 4, 3, 6, seed=8)
    a, b, c, d = steps
    pairs = [(first, a, b), (first + a, c, d), (second, b, c), (first + a + c, d, b), (second + b, a, d)]
    return [
        PairRecord(prompt, chosen, rejected, chosen_key=f"{i}w", rejected_key=f"{i}l", group=str(prompt[:6] == first))
        for i, (prompt, chosen, rejected) in enumerate(pairs)
    ]


def test_pairs_of_a_search_tree_stay_together():
    records = searched()
    assert [[records.index(pair) for pair in group] for group in groups(records)] == [[0, 1, 3], [2, 4]]
    task = TreePreferenceTask(records, None, objectives.simpo())
    assert task.prompts == [0, 0, 1, 0, 1]
    assert_same_step(
        step(TreePreferenceTask, records, objectives.simpo(), 40),
        step(PreferenceTask, records, objectives.simpo(), ONE_ROW),
    )


@pytest.mark.parametrize("records", [searched(), solutions()], ids=["search", "few-shot"])
def test_the_reference_scores_each_distinct_token_once(records, monkeypatch):
    """Steps of a search stand in the prompts of its pairs, few-shot examples before all questions."""
    sequences = [(prompt, ids) for pair in records for _, prompt, ids in pair.present]
    nodes, forward = [], TreeScorer.forward

    def counted(self, tree, *arguments):
        nodes.append(tree.num_nodes)
        return forward(self, tree, *arguments)

    monkeypatch.setattr(TreeScorer, "forward", counted)
    found, bounds = tree_response_logps(build(), sequences)
    paths = [(*prompt, *ids) for prompt, ids in sequences]
    assert nodes == [len({path[:n] for path in paths for n in range(1, len(path) + 1)})]
    torch.testing.assert_close(found, response_logps(build(), sequences)[0], rtol=1e-5, atol=1e-5)
    assert bounds.tolist() == response_logps(build(), sequences)[1].tolist()


def test_reference_log_probs_are_those_of_each_response():
    records = solutions()
    sequences = [(p.prompt_ids, ids) for p in records for ids in (p.chosen_ids, p.rejected_ids)]
    done = []
    found, cu_seqlens = tree_response_logps(build(), sequences, micro_batch_tokens=70, progress=done.append)
    expected, bounds = response_logps(build(), sequences)
    assert torch.equal(cu_seqlens, bounds) and sum(done) == len(sequences)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found[: bounds[1]], sequence_logps(build(), *sequences[0]).detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "budget", "gradient_checkpointing"),
    [("irpo", 16384, False), ("irpo", 60, True), ("tdpo2", 60, True), ("sparse_po", 150, False)],
)
def test_two_epochs_with_and_without_sharing_have_one_loss_curve(name, budget, gradient_checkpointing, tmp_path):
    """Rows that trees are cut across (60 tokens) or share (150): gradients accumulate over several of them."""
    curves, records = [], [replace(pair, weight=1.0) for pair in solutions()]
    for sharing in (True, False):
        history = train_preference(
            build(),
            records,
            everything(records, name),
            objective=objectives.by_name(name),
            config=train_settings(
                num_epochs=2,
                batch_size=8,
                batch_by="prompt",
                sharing=sharing,
                micro_batch_tokens=budget,
                gradient_checkpointing=gradient_checkpointing,
            ),
            output_dir=tmp_path / str(sharing),
            accelerator=Accelerator(cpu=True),
            log=lambda record: None,
        )
        curves.append([record["loss"] for record in history])
    assert len(curves[0]) == 8 and curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert min(curves[0]) < 0.9 * curves[0][0]


@pytest.mark.parametrize("name", ["irpo", "tdpo2"])
def test_under_mixed_precision_the_reference_is_the_policy_at_the_start(name, tmp_path):
    """Log-ratios of 0, and a KL of 0: the reference's whole distribution is rounded as the policy's."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        responses = {key: (prompt, ids) for p in pairs() for key, prompt, ids in p.present}
        logps, bounds = tree_response_logps(build(), list(responses.values()), accelerator=accelerator)
        ref_logps = dict(zip(responses, logps.split(bounds.diff().tolist()), strict=True))
        records = [replace(pair, weight=1.0) for pair in pairs()]
        (record, *_) = train_preference(
            build(),
            records,
            Reference(ref_logps, model=build()),
            objective=objectives.by_name(name),
            config=train_settings(),
            output_dir=tmp_path,
            accelerator=accelerator,
            log=lambda record: None,
        )
    finally:
        AcceleratorState._reset_state()
    assert abs(record["rewards_chosen"]) < 1e-3 and abs(record["rewards_rejected"]) < 1e-3
    if name == "tdpo2":
        assert record["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_model_that_cannot_share_is_refused_with_the_way_out(tmp_path):
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)).eval()
    arguments = {"objective": objectives.simpo(), "output_dir": tmp_path, "accelerator": Accelerator(cpu=True)}
    with pytest.raises(FastpoError, match=r"Bloom.*AttentionInterface.*; --no-sharing trains it without trees"):
        train_preference(model, pairs(), None, config=train_settings(), log=print, **arguments)
    with pytest.raises(FastpoError, match="--no-sharing trains it without trees"):
        tree_response_logps(model, [([2], [3])])
    history = train_preference(
        model, pairs(), None, config=train_settings(sharing=False, num_epochs=1), log=lambda record: None, **arguments
    )
    assert len(history) == 3
