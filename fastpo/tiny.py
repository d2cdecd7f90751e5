"""A small Llama and a BPE tokenizer made on the spot: ``model: tiny-llama``, for real text without a download."""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastpo.config import Config
from fastpo.errors import FastpoError

DEFAULT_CONTEXT = 1024
_SPECIAL = ["<pad>", "<eos>"]
_SMALLEST_VOCAB = 256 + len(_SPECIAL)


def build_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``texts``; every digit is a token of its own, so that sums can be learnt.

    Ids 0 and 1 are ``<pad>`` and ``<eos>``. The same texts in the same order give the same tokenizer.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise FastpoError(
            f"vocab_size is {vocab_size}; it should be at least {_SMALLEST_VOCAB}: all bytes and two specials"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def build_llama(config: Config, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained Llama of the config's sizes (fp32, CPU, tied embeddings), initialised from the seed alone."""
    sizes = llama_config(config, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(sizes)


def llama_config(config: Config, vocab_size: int, eos_token_id: int, pad_token_id: int) -> LlamaConfig:
    """The sizes of tiny-llama."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=_round_up(8 * config.hidden_size // 3, 32),
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.context_length or DEFAULT_CONTEXT,
        initializer_range=config.hidden_size**-0.5 / 2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
