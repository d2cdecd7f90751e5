"""A language model as a judge: it grades a response, or says which of two is better.

Two ways to read its opinion. ``labels``: one forward per prompt; the probabilities of the possible answers give the
expected grade, exact and without sampling. ``text``: judgements are sampled, so that it may reason first, and parsed.

The judge is any causal LM: the model that is trained itself, another one, or no model at all: a callable goes in as an
ordinary reward (rewards.py). Templates are text; their prompt goes through the model's own prompt or chat template.
"""

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpo import embedded
from fastpo.config import Config
from fastpo.data import Codec
from fastpo.errors import FastpoError
from fastpo.integrations.head import Head
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.models import ResponseScorer, check_sequences, collate, context_length, split_by_tokens
from fastpo.sampling import generate

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked and how its answer is read."""

    template: str  # holds {prompt} and {response}, or {prompt}, {first} and {second}
    labels: tuple[str, ...]  # the answers it may give, one token each in labels mode
    values: tuple[float, ...]  # what each counts
    pattern: str  # the last match's first group in a sampled judgement is the label

    def ask(self, **parts: str) -> str:
        """The template with its parts filled in; braces in the parts stay what they are."""
        return re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), self.template)

    def read(self, judgement: str) -> float | None:
        """The value of the last label in a judgement; None where there is none."""
        found = re.findall(self.pattern, judgement)
        return dict(zip(self.labels, self.values, strict=True)).get(found[-1].strip()) if found else None


_GRADES = ("0", "1", "2", "3", "4", "5")
_GRADE = """\
Grade the response to the question below. Add up points: 1 if it is relevant, 1 if it addresses most of the question, \
1 if it answers the essential parts in a useful way, 1 if it is clear, complete and well organised, 1 if it is \
excellent and free of errors.

Question: {prompt}

Response: {response}

"""
_DUEL = """\
Which of the two responses to the question below answers it better? Judge correctness first, then helpfulness; neither \
the order nor the length counts.

Question: {prompt}

Response A: {first}

Response B: {second}

"""
_META = """\
Below are a question, a response to it, and two judgements that grade the response from 0 to 5. Which judgement is \
more accurate, A or B?

Question: {prompt}

Response: {response}

Judgement A: {first}

Judgement B: {second}

"""
_ENDINGS = {
    ("grade", "labels"): "Answer with the number of points only, 0 to 5.",
    ("grade", "text"): 'Explain briefly, then end with a line "Score: N".',
    ("duel", "labels"): "Answer with A or B only.",
    ("duel", "text"): 'Explain briefly, then end with a line "Verdict: A" or "Verdict: B".',
}


def rubric(kind: str, config: Config) -> Rubric:
    """The rubric of a ``grade``, a ``duel`` or a ``meta`` duel of judgements.

    ``judge_template`` replaces the template of grades, or that of duels where score_by or pair_rule asks for them.
    The embedded task has short ones of its own, which its warm start teaches.
    """
    short = config.data == "embedded"
    compares = config.score_by == "duels" or config.pair_rule == "judgements"
    given = config.judge_template if kind == ("duel" if compares else "grade") else None
    answer = "grade" if kind == "grade" else "duel"
    if short:
        template = embedded.JUDGE_TEMPLATES[kind]
    else:
        template = {"grade": _GRADE, "duel": _DUEL, "meta": _META}[kind] + _ENDINGS[answer, config.judge_mode]
    template = given or template
    for part in ("response",) if kind == "grade" else ("first", "second"):
        if f"{{{part}}}" not in template:
            raise FastpoError(f"judge_template is {template!r}; it should hold {{{part}}}")
    if answer == "grade":
        pattern = r"([0-5])" if short else r"[Ss]core:?\s*([0-5])"
        return Rubric(template, _GRADES, tuple(map(float, _GRADES)), pattern)
    return Rubric(template, ("A", "B"), (1.0, 0.0), r"([AB])" if short else r"[Vv]erdict:?\s*([AB])")


@dataclass(frozen=True)
class Judge:
    """A judging model with its tokens and settings."""

    model: PreTrainedModel
    codec: Codec  # of the model: its own tokenizer
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # what its forwards run under

    def expected(self, prompts: Sequence[str], rubric: Rubric, progress: Progress | None = None) -> list[float]:
        """Per prompt the mean value of the labels, by their probabilities as the first token of the answer."""
        probabilities, _ = self.label_probabilities(prompts, rubric.labels, progress)
        return (probabilities @ torch.tensor(rubric.values)).tolist()

    @torch.no_grad()
    def label_probabilities(
        self, prompts: Sequence[str], labels: Sequence[str], progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """([N, L] probabilities of the labels among themselves, [N] their share of the whole distribution), on the CPU.

        A small share says that the judge did not understand what it may answer.
        """
        label_ids = torch.tensor([label_id(label, self.codec) for label in labels])
        sequences = [(self.codec.prompt_ids(prompt), [int(label_ids[0])]) for prompt in prompts]
        check_sequences(sequences, context_length(self.model), "judge prompts")
        device = next(self.model.parameters()).device
        scorer = ResponseScorer(self.model)
        probabilities, shares = torch.zeros(len(prompts), len(labels)), torch.zeros(len(prompts))
        lengths = [len(prompt) for prompt, _ in sequences]
        for group in split_by_tokens(lengths, self.codec.config.micro_batch_tokens):
            batch = collate([sequences[i] for i in group]).to(device)
            with self.autocast():
                among, share = scorer(batch, functools.partial(_among, label_ids.to(device)))
            probabilities[group], shares[group] = among.cpu(), share.cpu()
            if progress is not None:
                progress(len(group))
        return probabilities, shares

    def sampled(
        self,
        prompts: Sequence[str],
        number: int,
        *,
        seed: int,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[list[str]]:
        """``number`` answers to each prompt as text, at the config's temperature of iteration 1 and top_p.

        ``max_new_tokens``: None for judge_max_new_tokens.
        """
        config, tokenizer = self.codec.config, self.codec.tokenizer
        with self.autocast():
            responses = generate(
                self.model,
                [self.codec.prompt_ids(prompt) for prompt in prompts],
                num_samples=number,
                max_new_tokens=max_new_tokens or config.judge_max_new_tokens,
                temperature=config.at("temperature", 1),
                top_p=config.top_p,
                top_k=config.top_k,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                seed=seed,
                batch_size=config.sample_batch_size,
                progress=progress,
            )
        return [[self.codec.text(ids) for ids in samples] for samples in responses]

    def opinions(
        self, prompts: Sequence[str], rubric: Rubric, *, seed: int, progress: Progress | None = None
    ) -> list[float | None]:
        """One number per prompt, in the config's judge_mode; None where no sampled judgement could be read."""
        if self.codec.config.judge_mode == "labels":
            return list(self.expected(prompts, rubric, progress))
        texts = self.sampled(prompts, self.codec.config.judge_samples, seed=seed, progress=progress)
        return [mean_known([rubric.read(text) for text in judgements]) for judgements in texts]


def check_judge(codec: Codec) -> None:
    """FastpoError for templates, or labels, that the judge of ``codec``'s config could not be asked with."""
    config = codec.config
    compares = config.score_by == "duels" or config.pair_rule == "judgements"
    for kind in ("duel",) if compares else ("grade", "meta") if config.judge_pairs else ("grade",):
        asked = rubric(kind, config)
        codec.prompt_ids(asked.template)
        for label in asked.labels if config.judge_mode == "labels" else ():
            label_id(label, codec)


def label_id(label: str, codec: Codec) -> int:
    """The token that ``label`` is; FastpoError where it is several."""
    ids = codec.tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise FastpoError(f"judge label {label!r} is {len(ids)} tokens; it should be one (judge_mode text reads text)")
    return ids[0]


def _among(label_ids: Tensor, head: Head, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of hidden [N, H]: [N, L] probabilities of the labels among themselves, [N] of all of them together."""
    logits = head.logits(hidden)  # [N, V]
    first = label_ids[:1].expand(len(hidden))
    _, stats = token_logprobs(logits, first, stats=("label_set_prob",), label_set=label_ids)
    return logits[:, label_ids].softmax(-1), stats["label_set_prob"]


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
