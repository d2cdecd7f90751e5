"""What a search says of itself while it runs and afterwards."""

from dataclasses import dataclass


@dataclass
class Counts:
    """What a search did, and what it met on the way."""

    waves: int = 0
    expansions: int = 0  # simulations, over all trees
    tokens: int = 0  # proposed, merged ones included
    rollout_tokens: int = 0  # sampled by values, kept by whoever has them
    duplicates: int = 0  # proposed steps merged into an equal sibling
    empty: int = 0  # nodes below which nothing was proposed: dead ends
    full: int = 0  # trees that stopped because their room was used up

    def notes(self) -> list[str]:
        """What a user should know of."""
        found = []
        if self.empty:
            found.append(f"{self.empty} nodes got no step (propose returned none): they are dead ends")
        if self.full:
            found.append(f"{self.full} trees stopped with all their room in use; when_full='grow' gives them more")
        return found


@dataclass(frozen=True)
class Progress:
    done: int  # expansions
    total: int
    waves: int
    nodes: int
    depth: int  # of the deepest node
    nodes_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        visits = f"{self.done:,} of {self.total:,} visits"
        rate = f"{self.nodes_per_second:,.0f} nodes/s, {self.seconds_left:,.0f} s left"
        return f"{visits}, {self.nodes:,} nodes, depth {self.depth}, {rate}"


@dataclass
class Timer:
    """Seconds of a search by part."""

    propose: float = 0.0
    evaluate: float = 0.0
    total: float = 0.0
