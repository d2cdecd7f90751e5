"""The embedded default: a task, a tokenizer and a model that need no download.

Word arithmetic in GSM8K's format: a short story of sums and differences, an answer worked step by step, the result
behind ``####``. A model warm-started on demonstrations of which only some are worked (all are right) has seen good and
bad habits, as a pretrained model has; verified samples tell them apart, more of the same supervision does not.
"""

import random
import re
import zlib
from collections.abc import Iterator

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpo.errors import FastpoError

PROMPT_TEMPLATE = "{prompt}\n"
ATTENTION = "eager"  # faster than flash attention on the CPU at 80 tokens
SPLITS = ("warm_start", "train", "test")
JUDGE_TEMPLATES = {  # answered by a grade from 0 to 5, or by A or B
    "grade": "{prompt}\n{response}\nGrade?",
    "duel": "{prompt}\nA: {first}\nB: {second}\nBetter?",
    "meta": "{prompt}\n{response}\nGrade A: {first}, B: {second}. Better?",
}
_TEST_SHARE = 8  # one question in so many belongs to the test split, by its checksum: the splits can never overlap

_NAMES = ("Ann", "Ben", "Eva", "Ian", "Leo", "Mia", "Sam", "Zoe")
_ITEMS = ("pens", "cups", "nuts", "figs", "keys", "eggs", "hats", "toys")
_GAINS = ("gets", "buys", "wins")
_LOSSES = ("eats", "loses", "sells")
_START, _STEP = 20, 12  # largest number to start from, largest one added or taken away
_TERMS = (3, 4)


def problems(seed: int, n: int, split: str = "train") -> list[dict[str, str]]:
    """``n`` rows ``{"question", "answer"}``, every answer worked, in GSM8K's format; a pure function of the arguments.

    ``test`` never shares a question with the other splits, whatever the seeds; ``warm_start`` and ``train`` are
    different streams.
    """
    if split not in SPLITS:
        raise FastpoError(f"split is {split!r}; it should be one of {', '.join(SPLITS)}")
    if n < 0:
        raise FastpoError(f"n is {n}; it should be 0 or more")
    stream = _stream(random.Random(f"{split}/{seed}"), test=split == "test")
    return [next(stream) for _ in range(n)]


def demonstrations(seed: int, n: int, worked_share: float = 0.4) -> list[dict[str, str]]:
    """``n`` rows of the warm start: right answers, about ``worked_share`` of them worked, the others bare."""
    if not 0 <= worked_share <= 1:
        raise FastpoError(f"worked_share is {worked_share}; it should be between 0 and 1")
    rng = random.Random(f"quality/{seed}")
    rows = problems(seed, n, "warm_start")
    return [row if rng.random() < worked_share else {**row, "answer": bare(row["answer"])} for row in rows]


def judgements(seed: int, n: int) -> list[dict[str, str]]:
    """``n`` rows ``{"question", "answer"}`` that teach to judge: grades of right (5) and wrong (0) answers, duels of an
    answer with a wrong one, and duels of two grades. Answers are worked or bare; wrong ones have an error put in.
    """
    rng = random.Random(f"judgements/{seed}")
    return [_judgement(row, rng) for row in problems(seed + 1, n, "warm_start")]


def _judgement(row: dict[str, str], rng: random.Random) -> dict[str, str]:
    right, wrong = (a if rng.random() < 0.6 else bare(a) for a in (row["answer"], _with_error(row["answer"], rng)))
    kind, good = rng.choice(tuple(JUDGE_TEMPLATES)), rng.random() < 0.5
    response = right if good else wrong
    parts = {"grade": {"response": response}, "duel": {"first": right, "second": wrong}}
    parts["meta"] = {"response": response, "first": "5" if good else "0", "second": "0" if good else "5"}
    answer = "5" if good else "0"
    if kind != "grade":
        swap = rng.random() < 0.5
        if swap:
            parts[kind] |= {"first": parts[kind]["second"], "second": parts[kind]["first"]}
        answer = "B" if swap else "A"
    return {"question": JUDGE_TEMPLATES[kind].format(prompt=row["question"], **parts[kind]), "answer": answer}


def _with_error(answer: str, rng: random.Random) -> str:
    """A worked answer with one result off, and with it all that follows."""
    *steps, final = answer.split("\n")
    at, off = rng.randrange(len(steps)), rng.choice([-3, -2, -1, 1, 2, 3, 10])
    for i in range(at, len(steps)):
        start, operation, amount, result = re.fullmatch(r"(-?\d+)([-+])(\d+)=(\d+)", steps[i]).groups()  # type: ignore[union-attr]
        steps[i] = f"{int(start) + off * (i > at)}{operation}{amount}={int(result) + off}"
    return "\n".join([*steps, f"#### {int(final.removeprefix('#### ')) + off}"])


def perturbed(question: str, seed: int) -> str:
    """A question of the same story with its first number changed: the right answer to it is wrong for ``question``."""
    rng = random.Random(f"perturbed/{seed}/{question}")
    digits = question.split(" has ")[1].split(" ")[0]
    other = rng.choice([n for n in range(1, _START + 1) if str(n) != digits])
    return question.replace(f" has {digits} ", f" has {other} ", 1)


def bare(answer: str) -> str:
    """The last line of a worked answer: ``#### N``."""
    return answer[answer.index("#### ") :]


def is_worked(response: str) -> bool:
    """Whether a response shows at least one step before its ``####``."""
    return "=" in response.split("####")[0]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0..255), then ``<pad>`` 256 and ``<eos>`` 257. Every text survives the round trip."""
    alphabet = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def build_model(seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> LlamaForCausalLM:
    """A Llama of 0.36 million parameters (fp32, CPU) for ``tokenizer``, initialised from ``seed`` alone."""
    tokenizer = tokenizer or build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    return model


def _stream(rng: random.Random, test: bool) -> Iterator[dict[str, str]]:
    while True:
        row = _problem(rng)
        if (zlib.crc32(row["question"].encode()) % _TEST_SHARE == 0) == test:
            yield row


def _problem(rng: random.Random) -> dict[str, str]:
    name, item = rng.choice(_NAMES), rng.choice(_ITEMS)
    total = rng.randint(1, _START)
    story, steps = [f"{name} has {total} {item}"], []
    for _ in range(rng.choice(_TERMS) - 1):
        amount = rng.randint(1, _STEP)
        gains = amount > total or rng.random() < 0.5
        after = total + amount if gains else total - amount
        story.append(f"{rng.choice(_GAINS if gains else _LOSSES)} {amount}")
        steps.append(f"{total}{'+' if gains else '-'}{amount}={after}\n")
        total = after
    question = f"{', '.join(story[:-1])} and {story[-1]}. How many?"
    return {"question": question, "answer": "".join(steps) + f"#### {total}"}


def _byte_symbols() -> list[str]:
    """The printable character that the byte-level pre-tokenizer writes for each byte 0..255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]
