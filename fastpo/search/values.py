"""What scores nodes: outcomes, rollouts, the model's own opinion, its log-probs. Each is an ``Evaluate`` of the
engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .methods import Method
from .nodes import Node

# The reward of a finished response to a prompt, given its tokens; None: no opinion.
Reward = Callable[[int, Sequence[int]], float | None]
# Responses completed from each node, n of each: token ids behind the node's.
Complete = Callable[[Sequence[Node], int], Sequence[Sequence[Sequence[int]]]]
# Probability that the model gives to the labels that stand for "right", at each node.
Confidence = Callable[[Sequence[Node]], Sequence[float]]


@dataclass
class Outcome:
    """Ends by their reward: ``method.high`` where it is at least ``threshold``, ``low`` below it or unfinished.

    Inner nodes are in the middle: they have no value yet. ``known`` keeps what was asked, (prompt, tokens) -> reward.
    """

    method: Method
    reward: Reward
    threshold: float = 1.0
    known: dict[tuple[int, tuple[int, ...]], float | None] = field(default_factory=dict)

    def __call__(self, nodes: Sequence[Node]) -> list[float]:
        middle = (self.method.low + self.method.high) / 2
        return [self.value(node) if is_end(node, self.method) else middle for node in nodes]

    def value(self, node: Node) -> float:
        return self.method.high if self.is_right(node) else self.method.low

    def is_right(self, node: Node) -> bool:
        return node.finished and self.right(node.prompt, answer_ids(node, self.method))

    def right(self, prompt: int, response: Sequence[int]) -> bool:
        key = prompt, tuple(response)
        if key not in self.known:
            self.known[key] = self.reward(prompt, response)
        reward = self.known[key]
        return reward is not None and reward >= self.threshold


def is_end(node: Node, method: Method) -> bool:
    """Whether a node holds a whole response."""
    return node.terminal or (method.unit == "answer" and node.depth > 0)


def answer_ids(node: Node, method: Method) -> list[int]:
    """The response that a node stands for: all steps, or the last one where nodes are whole answers."""
    return list(node.steps[-1].ids) if method.unit == "answer" and node.depth else node.response_ids


@dataclass
class Rollouts:
    """Inner nodes by the share of ``number`` completions that are right, from ``low`` to ``high``; ends by their
    outcome."""

    outcome: Outcome
    complete: Complete
    number: int = 4
    tokens: int = 0  # sampled so far

    def __call__(self, nodes: Sequence[Node]) -> list[float]:
        method = self.outcome.method
        inner = [node for node in nodes if not is_end(node, method)]
        shares = {}
        for node, completions in zip(inner, self.complete(inner, self.number) if inner else [], strict=True):
            self.tokens += sum(map(len, completions))
            hits = [self.outcome.right(node.prompt, [*node.response_ids, *ids]) for ids in completions]
            shares[node.prompt, node.node] = sum(hits) / max(1, len(hits))
        return [
            method.low + (method.high - method.low) * shares[node.prompt, node.node]
            if (node.prompt, node.node) in shares
            else self.outcome.value(node)
            for node in nodes
        ]


@dataclass
class SelfEvaluation:
    """MCTS-DPO's value: the model's confidence over max(depth - 3, 1), the parent's value where it is 0; ends by
    outcome.

    ``flat``: the confidence itself, whatever the depth, scaled to the method's range.
    """

    outcome: Outcome
    confidence: Confidence
    flat: bool = False

    def __call__(self, nodes: Sequence[Node]) -> list[float]:
        method = self.outcome.method
        inner = [node for node in nodes if not is_end(node, method)]
        found = self.confidence(inner) if inner else []
        known = {(n.prompt, n.node): float(c) for n, c in zip(inner, found, strict=True)}
        return [
            self._value(node, known[node.prompt, node.node])
            if (node.prompt, node.node) in known
            else self.outcome.value(node)
            for node in nodes
        ]

    def _value(self, node: Node, confidence: float) -> float:
        if self.flat:
            return self.outcome.method.low + (self.outcome.method.high - self.outcome.method.low) * confidence
        return node.parent_value if confidence == 0 else confidence / max(node.depth - 3, 1)


@dataclass
class Sampled:
    """The value of MCTSr and MC-NEST where a score is itself sampled (a judge at a temperature): half way between the
    least and the mean of ``number`` calls of ``score``, ``(min R + mean R) / 2``.

    The rewards of the loop are deterministic, where this is the reward itself; it is for searches of your own.
    """

    score: Callable[[Sequence[Node]], Sequence[float]]  # a value of each node, another at each call
    number: int = 3

    def __call__(self, nodes: Sequence[Node]) -> list[float]:
        draws = zip(*(self.score(nodes) for _ in range(self.number)), strict=True)
        return [(min(values) + sum(values) / self.number) / 2 for values in draws]


class Likelihood:
    """The summed log-prob of the response so far: the Q of a policy trained by DPO (From r to Q*, Rafailov et al.
    2024)."""

    def __call__(self, nodes: Sequence[Node]) -> list[float]:
        return [node.logp for node in nodes]
