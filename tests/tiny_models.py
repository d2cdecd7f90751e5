"""Tiny random causal LMs that differ in what matters here: positions, caches, what happens to the logits."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY, EOS, PAD, CONTEXT = 40, 1, 0, 64
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
_SIZES = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
_BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    # absolute positions: left padding must shift them
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=0.3)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZES)),  # its LM head has a bias
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_SIZES, logits_scaling=3.0)),
    # a window shorter than the prompts; softcapped logits and windows in every other layer. transformers 5.17 would
    # take sdpa for Gemma2, which leaves out the softcap of its attention.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SIZES, head_dim=16, sliding_window=6, final_logit_softcapping=5.0, attn_implementation="eager")
    ),
}
NAMES = tuple(_BUILDERS)


def build(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[name]().eval()


def random_tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Lists of token ids of the given lengths, without padding and end of sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
