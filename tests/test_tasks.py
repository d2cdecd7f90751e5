"""What the loop feeds to objectives beyond pairs: its loss against formulas of whole-sequence log-probs, by hand.

Three tuples over two prompts on a tiny random model; the reference is another one. Each formula is written from the
paper's equation with log-softmax of full logits in fp64.
"""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny_models import build, random_tokens

from fastpo import objectives, stages
from fastpo.config import Config
from fastpo.errors import FastpoError
from fastpo.models import ResponseScorer, response_logps
from fastpo.pairs import PairRecord
from fastpo.references import Reference, responses_of, uncertainty_masks
from fastpo.sharing import tree_response_logps
from fastpo.tasks import PreferenceTask
from fastpo.tree_task import TreePreferenceTask

POLICY, REFERENCE = build(seed=1), build(seed=2)
PROMPTS = random_tokens(5, 7, seed=0)
RESPONSES = random_tokens(4, 6, 3, 5, 4, 2, seed=1)  # 0..2 to the first prompt, 3..5 to the second


def record(*members, **columns):
    """Members by number; None: absent. All of a tuple answer one prompt."""
    prompt = 0 if next(m for m in members if m is not None) < 3 else 1
    chosen, rejected, *others = [("", []) if m is None else (f"{prompt}/{m}", RESPONSES[m]) for m in members]
    return PairRecord(
        PROMPTS[prompt],
        chosen[1],
        rejected[1],
        chosen_key=chosen[0],
        rejected_key=rejected[0],
        others=tuple((key, PROMPTS[prompt], ids) for key, ids in others),
        **columns,
    )


def distributions(model, prompt, ids):
    """[n, V] fp64 log-probs of the whole vocabulary at the response's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def logps(model, prompt, ids):
    return distributions(model, prompt, ids).gather(1, torch.tensor(ids)[:, None])[:, 0]


def ratio(prompt, ids):
    return (logps(POLICY, prompt, ids) - logps(REFERENCE, prompt, ids)).sum()


def of(member):
    """(prompt, response) of a member by number."""
    return PROMPTS[int(member >= 3)], RESPONSES[member]


def reference_of(records, columns=None, model=None):
    responses = responses_of(records)
    found, cu_seqlens = response_logps(REFERENCE, list(responses.values()), accelerator=Accelerator(cpu=True))
    parts = found.split(cu_seqlens.diff().tolist())
    return Reference(dict(zip(responses, parts, strict=True)), columns or {}, model)


def loss(task_type, records, objective, reference):
    """The summed loss of all records in one share, and its record."""
    task = task_type(records, reference, objective)
    everything = list(range(len(records)))
    scorer = task.scorer(POLICY)
    device = torch.device("cpu")
    shares = [share for shares in task.rounds(scorer, everything, 10**6, 1, device) for share in shares]
    found = [task.loss(scorer, share, everything, device) for share in shares]
    sums = torch.stack([values for _, values in found]).sum(0)
    return task.record(sums.tolist())["loss"] * len(records), task.record(sums.tolist())


TASKS = pytest.mark.parametrize("task_type", [PreferenceTask, TreePreferenceTask])


@TASKS
def test_kto_takes_its_kl_from_mismatched_responses(task_type):
    records = stages.with_mismatches([record(0, None), record(None, 1), record(None, 4)])
    assert [r.others[0][2] for r in records] == [RESPONSES[4], RESPONSES[4], RESPONSES[0]]
    kl = torch.stack([ratio(PROMPTS[0], RESPONSES[4])] * 2 + [ratio(PROMPTS[1], RESPONSES[0])]).mean().clamp(min=0)
    d = 0.1 * kl
    right, wrong = 0.1 * ratio(*of(0)), [0.1 * ratio(*of(m)) for m in (1, 4)]
    expected = (1 - torch.sigmoid(right - d)) + sum(1 - torch.sigmoid(d - r) for r in wrong)
    found, row = loss(task_type, records, objectives.kto_batch(), reference_of(records))
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert row["rewards_chosen"] == pytest.approx(right.item(), rel=1e-4), "a mean over those that there are"
    assert row["rewards_rejected"] == pytest.approx(sum(wrong).item() / 2, rel=1e-4)
    assert "ranking_accuracy" not in row, "no pair is ranked"


@TASKS
def test_lists(task_type):
    """LiPO-lambda of a list of three and one of two; the shorter one is filled up."""
    records = [record(1, 0, 2, gains=(1.0, 0.5, 0.0)), record(3, 5, gains=(1.0, 0.0))]
    expected = 0.0
    for members, gains in (((1, 0, 2), (1.0, 0.5, 0.0)), ((3, 5), (1.0, 0.0))):
        scores = [0.05 * ratio(*of(m)) for m in members]
        ranks = [1 + sum(other > s for other in scores) for s in scores]
        for i in range(len(members)):
            for j in range(i + 1, len(members)):
                discounts = [1 / math.log(1 + int(ranks[k])) for k in (i, j)]
                weight = (2 ** gains[i] - 2 ** gains[j]) * abs(discounts[0] - discounts[1])
                expected += weight * torch.nn.functional.softplus(scores[j] - scores[i])
    found, row = loss(task_type, records, objectives.lipo(), reference_of(records))
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert row["rewards_chosen"] == pytest.approx(0.05 * (ratio(*of(1)) + ratio(*of(3))).item() / 2, rel=1e-4)


@TASKS
def test_a_batch_without_chosen_responses(task_type):
    """Of the chosen alone there is nothing to learn then: a loss of 0, not 0 / 0."""
    found, row = loss(task_type, [record(None, 1), record(None, 4)], objectives.sft(), None)
    assert found == 0 and row["nll"] == 0


@TASKS
def test_third_and_fourth_members(task_type):
    """SELM's third response lowers the loss by its log-ratio; RISE's (None, None, w, l) is a step pair alone."""
    records = [record(0, 1, 2), record(3, 4, None)]
    found, _ = loss(task_type, records, objectives.selm(beta=0.1, alpha=0.5), reference_of(records))
    z = [0.1 * (ratio(*of(0)) - ratio(*of(1))), 0.1 * (ratio(*of(3)) - ratio(*of(4)))]
    softplus = torch.nn.functional.softplus
    assert found == pytest.approx((softplus(-z[0]) + softplus(-z[1]) + 0.05 * ratio(*of(2))).item(), rel=1e-5)

    records = [record(0, 1, 0, 2), record(None, None, 3, 4)]
    found, row = loss(task_type, records, objectives.rise(beta=0.1, alpha=0.0), reference_of(records))
    step = 0.1 * (ratio(*of(0)) - ratio(*of(2)))
    assert found == pytest.approx((softplus(-z[0]) + softplus(-step) + softplus(-z[1])).item(), rel=1e-5)
    assert row["logps_chosen"] == pytest.approx(logps(POLICY, *of(0)).sum().item(), rel=1e-5)


@TASKS
def test_soft_labels_margins_and_targets_reach_the_objective_that_asks(task_type):
    columns = {"soft_label": 0.7, "margin": 0.3, "targets": (0.2, -0.1)}
    records = [record(0, 1, **columns), record(3, 5, **columns)]
    reference, softplus = reference_of(records), torch.nn.functional.softplus
    ratios = [(ratio(*of(w)), ratio(*of(r))) for w, r in ((0, 1), (3, 5))]
    for objective, formula in (
        (objectives.dpo(), lambda w, r: softplus(-0.1 * (w - r))),
        (objectives.cream(), lambda w, r: 0.7 * softplus(-0.1 * (w - r)) + 0.3 * softplus(0.1 * (w - r))),
        (objectives.step_apo(beta=0.1), lambda w, r: softplus(-(0.1 * (w - r) - 0.3))),
        (objectives.sppo(beta=0.5), lambda w, r: ((w - 0.4) ** 2 + (r + 0.2) ** 2) / 2),
    ):
        found, _ = loss(task_type, records, objective, reference)
        assert found == pytest.approx(sum(formula(w, r) for w, r in ratios).item(), rel=1e-5), objective.name


@TASKS
def test_token_rewards_and_masks(task_type):
    """T-REG's and SparsePO's columns go with their responses, in whatever order those stand in a batch."""
    records = [record(3, 4), record(0, 1)]
    columns = {key: torch.linspace(-0.4, 0.5, len(ids)) for key, (_, ids) in responses_of(records).items()}
    z, rewarded = [], []
    for w, r in ((3, 4), (0, 1)):
        z.append(0.1 * (ratio(*of(w)) - ratio(*of(r))))
        own = [(columns[f"{int(m >= 3)}/{m}"].double() * logps(POLICY, *of(m))).sum() for m in (w, r)]
        rewarded.append(-0.25 * torch.sigmoid(-z[-1]) * 0.1 * sum(own))
    expected = sum(torch.nn.functional.softplus(-v) for v in z).item()
    reference = reference_of(records, {"token_coefs": columns})
    task = task_type(records, reference, objectives.t_reg())
    found, _ = loss(task_type, records, objectives.t_reg(), reference)
    assert found == pytest.approx(expected, rel=1e-5), "the records hold the tuples' losses"
    device, scorer = torch.device("cpu"), task.scorer(POLICY)
    if task_type is PreferenceTask:
        (share,) = task.rounds(scorer, [0, 1], 10**6, 1, device)[0]
        total, _ = task.loss(scorer, share, [0, 1], device)
        assert total.item() == pytest.approx(expected + sum(rewarded).item(), rel=1e-5)


@TASKS
def test_tdpo_and_sparse_po_see_the_whole_distribution(task_type):
    records = [record(0, 1), record(3, 5)]
    reference = reference_of(records, model=REFERENCE)
    masks = {key: torch.linspace(0.0, 1.0, len(ids)) for key, (_, ids) in responses_of(records).items()}

    def kl(member):
        p, q = distributions(POLICY, *of(member)), distributions(REFERENCE, *of(member))
        return (q.exp() * (q - p)).sum(-1)

    tdpo, sparse = 0.0, 0.0
    softplus = torch.nn.functional.softplus
    for w, r in ((0, 1), (3, 5)):
        tdpo += softplus(-0.1 * (ratio(*of(w)) - ratio(*of(r)) - 0.5 * (kl(r).sum() - kl(w).sum())))
        both = [
            (masks[f"{int(m >= 3)}/{m}"].double() * (logps(POLICY, *of(m)) - logps(REFERENCE, *of(m)) + kl(m))).sum()
            for m in (w, r)
        ]
        sparse += softplus(-0.1 * (both[0] - both[1]))
    assert loss(task_type, records, objectives.tdpo2(), reference)[0] == pytest.approx(tdpo.item(), rel=1e-5)
    masked = replace(reference, columns={"weights": masks})
    assert loss(task_type, records, objectives.sparse_po(), masked)[0] == pytest.approx(sparse.item(), rel=1e-5)
    with pytest.raises(FastpoError, match="reference has no model; objective tdpo2 needs its whole distribution"):
        task_type(records, reference_of(records), objectives.tdpo2())


@TASKS
def test_a_response_counts_in_each_pair_as_that_pair_says(task_type):
    """LD-DPO cuts response 1, of six tokens, at four in one pair and at three in the other."""
    records, softplus = [record(1, 0), record(1, 2)], torch.nn.functional.softplus

    def score(member, shared):
        values = logps(POLICY, *of(member)) - logps(REFERENCE, *of(member))
        return values[:shared].sum() + 0.5 * values[shared:].sum()

    expected = [softplus(-0.1 * (score(1, n) - score(r, n))).item() for r, n in ((0, 4), (2, 3))]
    found, _ = loss(task_type, records, objectives.ld_dpo(), reference_of(records))
    assert found == pytest.approx(sum(expected), rel=1e-5)


@TASKS
def test_tdpo2_detaches_the_chosen_in_their_place_alone(task_type):
    """Response 1 is chosen in one pair and rejected in the other; the KL has its gradient there."""
    records = [record(1, 0), record(2, 1)]
    everything = reference_of(records, model=REFERENCE)
    both = gradients(task_type, records, objectives.tdpo2(), everything)
    apart = [gradients(task_type, [one], objectives.tdpo2(), everything) for one in records]
    assert (both - sum(apart)).norm() <= 1e-5 * both.norm()


@TASKS
def test_the_kl_refuses_a_head_with_lora(task_type):
    records = [record(0, 1)]
    model = get_peft_model(build(seed=1), LoraConfig(target_modules=["lm_head"], r=2))
    task = task_type(records, reference_of(records, model=REFERENCE), objectives.tdpo2())
    scorer, device = task.scorer(model), torch.device("cpu")
    ((share,),) = task.rounds(scorer, [0], 10**6, 1, device)
    with pytest.raises(FastpoError, match="lm_head has LoRA or is sharded; the KL needs a whole, plain head"):
        task.loss(scorer, share, [0], device)


def gradients(task_type, records, objective, reference):
    model = build(seed=1)
    task = task_type(records, reference, objective)
    scorer, device, everything = task.scorer(model), torch.device("cpu"), list(range(len(records)))
    for shares in task.rounds(scorer, everything, 10**6, 1, device):
        for share in shares:
            task.loss(scorer, share, everything, device)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["kto_batch", "lipo", "selm", "rise", "t_reg", "cream"])
def test_trees_give_the_same_gradients(name):
    records = {
        "kto_batch": stages.with_mismatches([record(0, None), record(None, 4), record(None, 1)]),
        "lipo": [record(1, 0, 2, gains=(1.0, 0.5, 0.0)), record(3, 5, gains=(1.0, 0.0))],
        "selm": [record(0, 1, 2), record(3, 4, None)],
        "rise": [record(0, 1, 0, 2), record(None, None, 3, 4)],
    }.get(name, [record(3, 4, soft_label=0.7), record(0, 1, soft_label=0.6), record(0, 2, soft_label=0.9)])
    columns = {key: torch.linspace(-0.4, 0.5, len(ids)) for key, (_, ids) in responses_of(records).items()}
    reference = reference_of(records, {"token_coefs": columns} if name == "t_reg" else {})
    objective = objectives.by_name(name)
    found, expected = (gradients(t, records, objective, reference) for t in (TreePreferenceTask, PreferenceTask))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("logps_of", [response_logps, tree_response_logps])
def test_uncertainty_masks(logps_of):
    """Of the entropies that the forward of the reference gives besides."""
    responses = [of(0), of(4), of(2)]
    arguments = {"micro_batch_tokens": 20, "accelerator": Accelerator(cpu=True)}
    (logps, entropy), cu_seqlens = logps_of(REFERENCE, responses, stats=("entropy",), **arguments)
    assert torch.equal(logps, logps_of(REFERENCE, responses, **arguments)[0])
    found = uncertainty_masks(entropy, cu_seqlens).split([len(r) for _, r in responses])
    for mask, response in zip(found, responses, strict=True):
        p = distributions(REFERENCE, *response)
        entropy = -(p.exp() * p).sum(-1)
        assert torch.allclose(mask.double(), entropy / entropy.max(), atol=1e-5)


def test_given_preferences_have_no_third_response():
    """KTO would train on without its KL, SELM without what it explores, and never say so."""
    for objective, rule in (("kto_batch", "unpaired"), ("selm", "third")):
        config = Config(preferences="pairs.jsonl", objective=objective, pair_rule=rule, alpha=None)
        with pytest.raises(FastpoError, match=f"objective {objective} compares 3 responses, preferences files hold tw"):
            stages.build_objective(config)


def test_gaps_of_scores_do_not_stand_in_for_margins_of_the_reference():
    for objective, instead in (("kto", "kto_batch"), ("aot", "aot_unpaired")):
        with pytest.raises(FastpoError, match=f"objective {objective} needs margins of the reference.*{instead} makes"):
            stages.build_objective(Config(objective=objective, pair_rule="max_min", alpha=None))


def test_scorer_is_the_plain_one_without_trees():
    assert type(PreferenceTask([record(0, 1)], None, objectives.simpo()).scorer(POLICY)) is ResponseScorer
