"""What a search exchanges with the callables that it runs over. All text is token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Step:
    """The tokens between a node and its parent; the root's are the prompt."""

    ids: tuple[int, ...]
    logp: float = 0.0  # summed log-prob of ``ids`` under the policy, before temperature
    finished: bool = False  # the response ends here
    cache: Any = field(default=None, repr=False, compare=False)  # whatever propose keeps for itself; never saved


@dataclass(frozen=True)
class Node:
    """A node as propose, evaluate and is_terminal see it."""

    prompt: int  # which of the search's prompts
    node: int  # its id in the tree
    steps: tuple[Step, ...]  # from the prompt down to the node
    children: int = 0  # how many it has already
    terminal: bool = False  # known when it is evaluated
    parent_value: float = 0.0  # what evaluate said of its parent

    @property
    def depth(self) -> int:
        """Steps below the prompt."""
        return len(self.steps) - 1

    @property
    def ids(self) -> list[int]:
        """Prompt and response so far."""
        return [token for step in self.steps for token in step.ids]

    @property
    def response_ids(self) -> list[int]:
        return [token for step in self.steps[1:] for token in step.ids]

    @property
    def finished(self) -> bool:
        return self.steps[-1].finished

    @property
    def logp(self) -> float:
        """Summed log-prob of the response so far."""
        return sum(step.logp for step in self.steps[1:])


# widths[i] steps below nodes[i]; fewer, none and equal ones are legal
Propose = Callable[[Sequence[Node], Sequence[int]], Sequence[Sequence[Step]]]
# a value per node, in the range of the method
Evaluate = Callable[[Sequence[Node]], Sequence[float]]
IsTerminal = Callable[[Node], bool]
