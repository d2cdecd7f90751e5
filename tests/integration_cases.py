"""What the tests of the integrations share: more tiny models, how gradients are compared."""

import tiny_models
import torch
from transformers import CohereConfig, CohereForCausalLM, MixtralConfig, MixtralForCausalLM

_SIZES = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": tiny_models.EOS,
    "pad_token_id": tiny_models.PAD,
}
_BUILDERS = {
    # experts: a balancing loss over the tokens that are no padding
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.3)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=0.25)),
}
NAMES = (*tiny_models.NAMES, *_BUILDERS)


def build(name="llama", seed=0):
    if name not in _BUILDERS:
        return tiny_models.build(name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name]().eval()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    """Within 1e-4 of each element, or 1e-5 of the largest gradient: layers round differently when packed."""
    assert ours.keys() == theirs.keys()
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad, theirs[name], rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
