"""``enable``: on a tree every path is what it is alone; without one nothing is changed; what cannot is refused.

Each architecture is judged against its own forward in fp64, one sequence at a time: the packed fp32 log-probs and
gradients may be off by 1e-5, or by twice what fp32 without packing is off by. For mixtures of experts that is the
honest measure: which tokens an expert sums over in one product changes with packing, the routing does not.
"""

import copy

import pytest
import torch
from tree_cases import NAMES, alone, build, error, sequences, tree, with_gradients

import fastpo
from fastpo.attention import is_enabled
from fastpo.errors import FastpoError
from fastpo.integrations import head
from fastpo.scoring import TreeScorer


def packed(model, seed=0):
    """[T] log-probs through the tree."""
    t = tree(seed)
    nodes, _ = fastpo.sequence_nodes(t)
    places = torch.searchsorted(fastpo.trained_nodes(t), nodes)
    return TreeScorer(model)(t)[places]


@pytest.mark.parametrize("name", NAMES)
def test_tree_equals_each_path_alone(name):
    model, wide = build(name), build(name).double()
    wide.config._experts_implementation = "eager"  # torch's grouped products have no fp64
    truth = with_gradients(wide, alone(wide, *sequences()))
    separate = error(with_gradients(model, alone(model, *sequences())), truth)
    ours = error(with_gradients(model, packed(model)), truth)
    worst = {n: (e, separate[n]) for n, e in ours.items() if e > max(1e-5, 2 * separate[n])}
    assert not worst


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_the_self_check_in_bf16(name):
    """Its tolerance is that of the type."""
    assert is_enabled(fastpo.enable(build(name).bfloat16()))


def test_own_logits_of_an_enabled_model_on_a_tree():
    model, t = fastpo.enable(build("gemma2")), tree()
    logits = model(**fastpo.tree_inputs(t)).logits[0]
    nodes, _ = fastpo.sequence_nodes(t)
    found = logits.log_softmax(-1)[t.parent[nodes], t.tokens[nodes]]
    torch.testing.assert_close(found, alone(model, *sequences()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gpt_oss"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_tree_nothing_is_changed(name, attention):
    model = build(name)
    if name != "gpt_oss" or attention == "eager":  # it has no sdpa
        model.set_attn_implementation(attention)
    ids = torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def outputs():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return logits, model.generate(ids, **settings), model.config.to_dict()

    before = outputs()
    fastpo.enable(model)
    after = outputs()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_enabling_twice_and_taking_it_back():
    model = build()
    forwards = [m.forward for m in model.modules()]
    assert fastpo.enable(model) is model and fastpo.enable(model) is model and is_enabled(model)
    assert fastpo.disable(model) is model and not is_enabled(model)
    assert [m.forward for m in model.modules()] == forwards
    fastpo.disable(model)


def test_a_copy_of_an_enabled_model_is_on_its_own():
    model = fastpo.enable(build())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(packed(other), alone(build(), *sequences()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "0 of its 2 layers attend through"),
        ("mpt", "0 of its 2 layers attend through"),
        ("mamba", "0 of its 2 layers attend through"),
        ("qwen3_next", "1 of its 2 layers attend through"),
        ("stablelm", "the keyword tree does not reach"),
    ],
)
def test_refusals(name, reason):
    model = build(name)
    with pytest.raises(FastpoError, match=reason):
        fastpo.enable(model)
    assert not is_enabled(model)


def test_layers_that_look_at_positions_in_a_way_of_their_own_are_refused():
    """A Llama that numbers its tokens by itself: the tree reaches every layer and the depths do not."""
    model = build()
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    with pytest.raises(FastpoError, match="differ by up to"):
        fastpo.enable(model)


def test_windows_that_are_in_the_mask_alone_are_refused():
    model = build("mistral")
    forwards = [type(layer.self_attn).forward for layer in model.model.layers]

    class Windowless(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            window, self.config.sliding_window = self.config.sliding_window, None
            try:
                return forwards[0](self, *args, **kwargs)
            finally:
                self.config.sliding_window = window

    for layer in model.model.layers:
        layer.self_attn.__class__ = Windowless
    with pytest.raises(FastpoError, match="in the mask alone"):
        fastpo.enable(model)


def test_a_softcap_that_the_models_own_attention_leaves_out_is_refused():
    """As of Gemma2 in transformers 5.17, whose default is sdpa; newer ones do not let it."""
    model = build("gemma2")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(FastpoError, match='sdpa, leaves out its softcap; load it with attn_implementation="eager"'):
        fastpo.enable(model)
    assert not is_enabled(model)


def test_the_own_precision_of_a_model_is_tf32s_where_that_is_on():
    products = torch.backends.cuda.matmul
    before, fp32 = products.fp32_precision, torch.finfo(torch.float32).eps
    assert head._epsilon(torch.float32, "cuda") == fp32
    try:
        products.fp32_precision = "tf32"
        assert head._epsilon(torch.float32, "cuda") == 2.0**-10
        assert head._epsilon(torch.float32, "cpu") == fp32
        assert head._epsilon(torch.bfloat16, "cuda") == torch.finfo(torch.bfloat16).eps
    finally:
        products.fp32_precision = before


def test_something_that_is_no_model_is_refused():
    with pytest.raises(FastpoError, match="model is Linear; it should be a transformers or peft model"):
        fastpo.enable(torch.nn.Linear(2, 2))


def test_a_tree_never_goes_through_a_model_that_is_not_enabled():
    with pytest.raises(RuntimeError):
        build()(**fastpo.tree_inputs(tree()))


def test_calls_that_are_refused():
    model, inputs = fastpo.enable(build()), fastpo.tree_inputs(tree())
    short = {**inputs, "input_ids": inputs["input_ids"][:, 1:], "position_ids": inputs["position_ids"][:, 1:]}
    with pytest.raises(FastpoError, match="one row, no cache"):
        model(**short)
    for layer in model.train().model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(FastpoError, match=r"attention dropout of LlamaAttention is 0\.1 in training"):
        model(**inputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_sees_the_tree_again(name, reentrant):
    model = build(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    wanted = with_gradients(model.train(), packed(model))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    found = with_gradients(model, packed(model))
    assert max(error(found, wanted).values()) < 1e-6


def test_lora():
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(0)
        targets = ["q_proj", "v_proj", "lm_head"]
        model = get_peft_model(build(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        return model.eval()

    plain, model = adapted(), adapted()
    truth = with_gradients(plain, alone(plain, *sequences()))
    ours = with_gradients(model, packed(model))
    assert len(ours[1]) == 2 * (2 * 2 + 1)  # A and B of two projections in two layers, and of the head
    assert max(error(ours, truth).values()) < 1e-5


def test_accelerate_wraps_the_scorer():
    from accelerate import Accelerator

    model = build()
    truth = with_gradients(model, alone(model, *sequences()))
    accelerator = Accelerator(cpu=True)
    scorer, _ = accelerator.prepare(TreeScorer(model), torch.optim.SGD(model.parameters(), lr=0.1))
    t = tree()
    places = torch.searchsorted(fastpo.trained_nodes(t), fastpo.sequence_nodes(t)[0])
    assert max(error(with_gradients(model, scorer(t)[places]), truth).values()) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break():
    torch._dynamo.reset()
    model, inputs = fastpo.enable(build()), fastpo.tree_inputs(tree())
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs).last_hidden_state
    torch.testing.assert_close(found, model.model(**inputs).last_hidden_state)
