"""What the tests of models on trees share: models of many architectures, and the same log-probs without any tree."""

import integration_cases
import torch
import transformers
from tiny_models import CONTEXT, random_tokens

from fastpo import build_tree

_SIZES = {
    **integration_cases._SIZES,
    "max_position_embeddings": CONTEXT,
}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def _llm(name, **settings):
    """``NAMEForCausalLM(NAMEConfig(...))``."""
    model = getattr(transformers, f"{name}ForCausalLM")
    return lambda: model(model.config_class(**{**_SIZES, **settings}))


_BUILDERS = {
    "qwen3": _llm("Qwen3", head_dim=16),  # norms of queries and keys
    "qwen3_moe": _llm("Qwen3Moe", head_dim=16, moe_intermediate_size=24, **_EXPERTS),
    "gemma3": _llm("Gemma3", head_dim=16, query_pre_attn_scalar=8, **_WINDOWS),  # two rotary bases
    "phi3": _llm("Phi3"),  # one projection of queries, keys and values
    "olmo2": _llm("Olmo2"),
    "olmo3": _llm("Olmo3", **_WINDOWS),
    "gpt_oss": _llm("GptOss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, **_WINDOWS),  # sinks
    "cohere2": _llm("Cohere2", **_WINDOWS),  # layers without positions
    "starcoder2": _llm("Starcoder2", sliding_window=4),
    "gpt_neox": _llm("GPTNeoX"),
    "deepseek_v3": _llm(  # values narrower than keys
        "DeepseekV3",
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        moe_intermediate_size=16,
    ),
}
_REFUSED_BUILDERS = {
    "bloom": _llm("Bloom", n_layer=2, n_head=2),
    "mpt": _llm("Mpt", d_model=32, n_layers=2, n_heads=2),
    "stablelm": _llm("StableLm"),
    "mamba": _llm("Mamba", state_size=4),
    "qwen3_next": _llm(
        "Qwen3Next",
        head_dim=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        **_EXPERTS,
    ),
}
NAMES = (*integration_cases.NAMES, *_BUILDERS)
EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"}


def build(name="llama", seed=0):
    builder = _BUILDERS.get(name) or _REFUSED_BUILDERS.get(name)
    if builder is None:
        return integration_cases.build(name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builder().eval()
        for parameter in model.parameters():  # some are made by torch.empty, some start at zero
            if not parameter.isfinite().all() or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def sequences(seed=0):
    """Two prompts; answers that share steps, one that is a prefix of another, one twice, one of one token."""
    first, a, b, c, d, second, e, f = random_tokens(7, 5, 4, 6, 3, 3, 8, 1, seed=seed)
    tokens = [first + a, first + a + b, first + a + c, first + d, first + a + b, second + e, second + f]
    return tokens, [7, 7, 9, 7, 7, 3, 3]


def tree(seed=0):
    return build_tree(*sequences(seed))


def alone(model, tokens, starts):
    """[T] log-probs of the counted tokens of each of ``tokens``, one forward each, by the model's own forward."""
    found = []
    for ids, start in zip(tokens, starts, strict=True):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]  # [n, V]
        wide = logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        found.append(wide.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0])
    return torch.cat(found)


def with_gradients(model, logps):
    """logps [T] and the gradients of a fixed random combination of them, as copies."""
    model.zero_grad()
    coefs = torch.randn(len(logps), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logps * coefs.to(logps.dtype)).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logps.detach().double(), found


def error(found, truth):
    """Largest error of logps and of each gradient, relative to the norm: of a tensor, if it is not next to nothing."""
    (logps, grads), (true_logps, true_grads) = found, truth
    assert grads.keys() == true_grads.keys()
    floor = 1e-2 * max(float(g.norm()) for g in true_grads.values())
    errors = {n: float((grads[n] - g).norm()) / max(floor, float(g.norm())) for n, g in true_grads.items()}
    errors["logps"] = float((logps - true_logps).norm() / true_logps.norm())
    return errors
