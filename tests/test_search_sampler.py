"""Steps sampled on the pool of keys and values against whole forwards, on models whose positions and caches differ.

llama, gpt2 (absolute positions) and granite (scaled logits) keep a pool; mistral and gemma2 have sliding windows, so
every path is computed again: the same steps must come of both.
"""

import pytest
import torch
from tiny_models import CONTEXT, EOS, PAD, build, random_tokens

from fastpo.errors import FastpoError, RunError
from fastpo.search import Node, Search, Step, StepSampler, load_search, method_by_name, save_search

STOP = 5
COMMON = {"eos_token_id": EOS, "pad_token_id": PAD, "stop_ids": [STOP], "seed": 3}
POOLED, UNPOOLED = ("llama", "gpt2", "granite"), ("mistral", "gemma2")


def sampler(model, **settings):
    return StepSampler(model, **{"step_tokens": 6, **COMMON, **settings})


def evaluate(nodes):
    return [(sum(n.ids) % 21 - 10) / 10 for n in nodes]


def run(propose, prompts, name="cpl", **settings):
    return Search(prompts, method_by_name(name, **settings), propose, evaluate).run()


def logps_of(model, context, ids):
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *ids]])).logits[0].double()
    return logits.log_softmax(-1)[len(context) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", [*POOLED, *UNPOOLED])
def test_steps_are_the_models_own(name):
    """Greedy, three levels deep: every token is the argmax behind its whole path, and logps are those of a whole
    forward.
    """
    model, prompts = build(name), random_tokens(5, 1, 9)
    propose = sampler(model, temperature=0.0)
    assert (propose.why_no_pool is None) == (name in POOLED)
    search = run(propose, prompts, width=1, simulations=4, depth=4)
    assert search.num_nodes > 3 * 3
    for tree in range(3):
        for i in range(1, len(search.steps[tree])):
            node, step = search.node(tree, i), search.steps[tree][i]
            context = node.ids[: -len(step.ids)]
            logps = logps_of(model, context, list(step.ids))
            assert step.logp == pytest.approx(logps.sum().item(), abs=2e-5)
            with torch.no_grad():
                logits = model(torch.tensor([[*context, *step.ids]])).logits[0]
            assert logits[len(context) - 1 : -1].argmax(-1).tolist() == list(step.ids)
            assert STOP not in step.ids[:-1] and EOS not in step.ids[:-1]
            assert step.finished == (step.ids[-1] == EOS)
            assert step.finished or step.ids[-1] == STOP or len(step.ids) == 6


@pytest.mark.parametrize("name", POOLED)
def test_the_pool_changes_nothing(name):
    """The same search with every path computed again: the same trees, log-probs to rounding."""
    model, prompts = build(name), random_tokens(4, 7, 5)
    pooled, again = sampler(model), sampler(model)
    again.why_no_pool = "a test"
    found, expected = run(pooled, prompts), run(again, prompts)
    assert found.steps == [
        [Step(s.ids, pytest.approx(s.logp, abs=2e-4), s.finished) for s in steps] for steps in expected.steps
    ]
    assert pooled.forward_tokens < again.forward_tokens


def test_every_token_goes_through_the_model_once():
    """Counted: a prompt's tokens once, of a step each token once where it is continued, all but the last where not."""
    model, prompts = build(), random_tokens(6, 6, 6)
    propose, seen = sampler(model), []
    forward = model.forward

    def counted(**kwargs):
        width = kwargs["input_ids"].shape[1]
        seen.append(int(kwargs["attention_mask"][:, -width:].sum()))
        return forward(**kwargs)

    counted.__signature__ = None
    model.forward = counted
    search = run(propose, prompts, simulations=6)
    expected = 0
    for tree in range(3):
        for i, step in enumerate(search.steps[tree]):
            expected += len(step.ids) - (not search.children[tree][i])
    # merged siblings were sampled too; rows that ended wait for a compaction: both go through the model besides
    assert expected <= sum(seen) < 1.5 * expected


def test_steps_do_not_depend_on_batches_or_neighbours():
    model, prompts = build(), random_tokens(5, 8, 3)
    whole = run(sampler(model), prompts)
    split = run(sampler(model, batch_size=1), prompts)
    assert [[s.ids for s in steps] for steps in split.steps] == [[s.ids for s in steps] for steps in whole.steps]
    alone = run(sampler(model), prompts[:1])
    assert [s.ids for s in alone.steps[0]] == [s.ids for s in whole.steps[0]]
    other = run(sampler(model, seed=4), prompts)
    assert other.steps != whole.steps


def test_widths_differ_and_fill_their_places():
    model, prompts = build(), random_tokens(4, 6)
    nodes = [Node(i, 0, (Step(tuple(p)),)) for i, p in enumerate(prompts)]
    wide = sampler(model)(nodes, [5, 5])
    found = sampler(model)(nodes, [2, 5])
    assert [len(steps) for steps in found] == [2, 5]
    assert found[1] == [Step(s.ids, pytest.approx(s.logp, abs=1e-5), s.finished) for s in wide[1]]
    assert [s.ids for s in found[0]] == [s.ids for s in wide[0][:2]]


def test_a_small_pool_is_emptied_and_filled_again():
    model, prompts = build(), random_tokens(5, 8, 3)
    propose = sampler(model, cache_tokens=60)
    found, whole = run(propose, prompts), run(sampler(model), prompts)
    assert propose.pool.cleared > 0
    assert [[s.ids for s in steps] for steps in found.steps] == [[s.ids for s in steps] for steps in whole.steps]


def test_a_saved_search_goes_on_to_the_bit(tmp_path):
    """Continued in a new process's place: a new sampler, an empty pool. The one that saved goes on from an empty pool
    too.
    """
    model, prompts = build(), random_tokens(5, 8, 3)
    begun = Search(prompts, method_by_name("cpl"), sampler(model), evaluate)
    begun.run(stop=lambda s: s.counts.waves == 4)
    save_search(begun, tmp_path / "s")
    continued = load_search(Search(prompts, method_by_name("cpl"), sampler(model), evaluate), tmp_path / "s").run()
    begun.run()
    assert continued.steps == begun.steps and torch.equal(continued.trees.q, begun.trees.q)
    assert [[s.logp for s in steps] for steps in continued.steps] == [[s.logp for s in steps] for steps in begun.steps]


def test_paths_end_at_the_context():
    model = build()
    (long, short) = random_tokens(CONTEXT - 3, 4)
    nodes = [Node(i, 0, (Step(tuple(p)),)) for i, p in enumerate((long, short, (*long, 7, 7, 7)))]
    found = sampler(model, temperature=5.0)(nodes, [4, 4, 4])
    assert max(len(s.ids) for s in found[0]) == 3 and max(len(s.ids) for s in found[1]) == 6
    assert found[2] == []


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_self_evaluation(name):
    """P(label set) behind path and question, on the pool and without it, against whole forwards."""
    model, prompts = build(name), random_tokens(5, 8)
    propose = sampler(model)
    search = run(propose, prompts, simulations=3)
    nodes = [search.node(t, i) for t in range(2) for i in range(len(search.steps[t]))]
    question, labels = [7, 9, 11], [3, 20, 21]
    found = propose.label_set_prob(nodes, question, labels)
    for node, probability in zip(nodes, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*node.ids, *question]])).logits[0, -1].double()
        assert probability == pytest.approx(logits.softmax(-1)[labels].sum().item(), abs=1e-5)
    assert propose.label_set_prob([], question, labels) == []
    propose.forget()
    assert propose.label_set_prob(nodes, question, labels) == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step_tokens": 0}, "step_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": -2}, "top_k is -2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(FastpoError, match=message):
        sampler(build(), **settings)


def test_nan_logits_are_an_error():
    model = build()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="logits are NaN"):
        run(sampler(model), random_tokens(4))
