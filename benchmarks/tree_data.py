"""The workloads of the tree benchmarks: GSM8K solutions and seeded edits of their numbers, and random search trees."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpo.pairs import PairRecord
from fastpo.tiny import build_bpe_tokenizer

SOLUTIONS, PREFIX_TOKENS = 16, 1024
_SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
_BPE = 8192  # entries of the tokenizer; the model's vocabulary is larger, its cost is what is measured


@dataclass(frozen=True)
class Workload:
    """Sequences [prompt | response] of some prompts, and pairs of them. Equal sequences occur once."""

    name: str
    trees: list[list[list[int]]]  # of each prompt: its sequences of token ids
    starts: list[list[int]]  # of each prompt: the prompt's length, of each sequence
    pairs: list[list[tuple[int, int]]]  # of each prompt: (chosen, rejected), indices of its sequences

    @property
    def sequences(self) -> list[list[int]]:
        """All sequences, the prompts' one behind the other."""
        return [tokens for tree in self.trees for tokens in tree]

    @property
    def all_starts(self) -> list[int]:
        return [start for starts in self.starts for start in starts]

    @property
    def all_pairs(self) -> list[tuple[int, int]]:
        """Pairs that index ``sequences``."""
        offsets = [sum(map(len, self.trees[:k])) for k in range(len(self.trees))]
        return [(at + w, at + r) for at, pairs in zip(offsets, self.pairs, strict=True) for w, r in pairs]


def read_questions(path: Path | None, number: int) -> tuple[list[tuple[str, list[str]]], str]:
    """(question, its four solutions) of ``number`` problems, and where they are from."""
    if path is None:
        return [_synthetic(k) for k in range(number)], "synthetic text (no --data)"
    found = []
    with open(path / "model_solutions.jsonl", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found.append((row["question"], [row[name]["solution"] for name in _SOLVERS]))
            if len(found) == number:
                break
    return found, "GSM8K questions and model solutions"


def solutions_workload(
    questions: Sequence[tuple[str, list[str]]], prompts: int, pairs: int, few_shot: bool
) -> Workload:
    """16 solutions a prompt, the real ones and seeded edits of their numbers; which is better does not matter here."""
    tokenizer = build_bpe_tokenizer((text for q, answers in questions for text in (q, *answers)), _BPE)
    ids = [
        (tokenizer.encode(f"Question: {question}\nAnswer: "), [_response(tokenizer, t) for t in _sixteen(k, real)])
        for k, (question, real) in enumerate(questions[:prompts])
    ]
    prefix: list[int] = []
    for question, real in reversed(questions):
        prefix += tokenizer.encode(f"Question: {question}\nAnswer: {real[0]}\n\n")
    prefix = prefix[:PREFIX_TOKENS] if few_shot else []
    trees, starts, all_pairs = [], [], []
    for prompt, responses in ids:
        trees.append([prefix + prompt + response for response in responses])
        starts.append([len(prefix) + len(prompt)] * SOLUTIONS)
        half = SOLUTIONS // 2  # winners and losers, zipped cyclically
        all_pairs.append([(i % half, half + (i + i // half) % half) for i in range(pairs)])
    return Workload("B" if few_shot else "A", trees, starts, all_pairs)


def pair_records(workload: Workload) -> list[PairRecord]:
    """The pairs as the loop takes them."""
    tokens, starts = workload.sequences, workload.all_starts
    return [
        PairRecord(
            prompt_ids=tokens[w][: starts[w]],
            chosen_ids=tokens[w][starts[w] :],
            rejected_ids=tokens[r][starts[r] :],
            weight=1.0,
            chosen_key=str(w),
            rejected_key=str(r),
        )
        for w, r in workload.all_pairs
    ]


def search_workload(
    widths: Sequence[int], vocabulary: int, *, number: int = 1, prompt_tokens: int = 128, steps: bool = False
) -> Workload:
    """``number`` search trees with steps of 32-128 random tokens, and one pair of siblings below each node.

    A path counts from the prompt on, as an NLL on partial solutions has it; with ``steps`` its last step alone counts,
    as MCTS-DPO has it: then the LM head has nothing to share but branches.
    """
    draw = random.Random(0)
    made = [_search_tree(widths, vocabulary, prompt_tokens, steps, draw) for _ in range(number)]
    trees, starts, pairs = (list(parts) for parts in zip(*made, strict=True))
    return Workload("C " + "-".join(map(str, widths)) + " steps" * steps, trees, starts, pairs)


def _search_tree(
    widths: Sequence[int], vocabulary: int, prompt_tokens: int, steps: bool, draw: random.Random
) -> tuple[list[list[int]], list[int], list[tuple[int, int]]]:
    """Sequences, where they count from, and pairs of one tree."""
    sequences: list[list[int]] = []
    starts: list[int] = []
    pairs: list[tuple[int, int]] = []
    level = [[draw.randrange(2, vocabulary) for _ in range(prompt_tokens)]]
    for width in widths:
        below = []
        for parent in level:
            children = [
                parent + [draw.randrange(2, vocabulary) for _ in range(draw.randint(32, 128))] for _ in range(width)
            ]
            pairs.append((len(sequences), len(sequences) + 1))
            sequences += children[:2]
            starts += [len(parent) if steps else prompt_tokens] * 2
            below += children
        level = below
    return sequences, starts, pairs


def _response(tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def _sixteen(k: int, real: list[str]) -> list[str]:
    """The real solutions and edits of them, shuffled: one number of a solution becomes another."""
    draw = random.Random(k)
    texts = list(dict.fromkeys(real))
    while len(texts) < SOLUTIONS:
        text = draw.choice(real)
        numbers = list(re.finditer(r"\d+", text))
        if numbers:
            at = draw.choice(numbers)
            text = text[: at.start()] + str(draw.randint(1, 10 ** len(at[0]))) + text[at.end() :]
        else:
            text += f" {draw.randint(1, 999)}"
        if text not in texts:
            texts.append(text)
    draw.shuffle(texts)
    return texts


def _synthetic(k: int) -> tuple[str, list[str]]:
    """A question of some 50 words and four solutions of some 60, with sums like GSM8K's."""
    draw = random.Random(1000 + k)
    words = ["baker", "farmer", "box", "apple", "train", "day", "week", "shop", "price", "basket", "ticket", "garden"]
    question = " ".join(f"{draw.choice(words)} {draw.randint(2, 99)}" for _ in range(30)) + "?"

    def solution() -> str:
        lines = []
        for _ in range(draw.randint(3, 6)):
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            lines.append(f"the {draw.choice(words)} has {a} * {b} = <<{a}*{b}={a * b}>>{a * b} {draw.choice(words)}")
        return "\n".join(lines) + f"\nA: {draw.randint(1, 999)}"

    return question, [solution() for _ in range(4)]
