"""The published searches as rows of settings (METHODS of the papers named; formulas in kernels/tree_search)."""

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from fastpo.errors import FastpoError, suggestion
from fastpo.kernels.tree_search import BackupRule, SelectRule

PLANS = ("select", "beam", "rebase")
UNITS = ("step", "answer")
PAIRS = ("last_first", "signs", "gaps", "largest_gap", "solutions")
FULL = ("grow", "stop")


@dataclass(frozen=True)
class Method:
    """A search. ``plan`` says which nodes a wave expands:

    - ``select``: ``leaves`` per tree, by the rule ``select``.
    - ``beam``: the ``leaves`` best open nodes by Q; all others are given up.
    - ``rebase``: every open node i, ``round(B softmax(Q / temperature)_i)`` children each, B = ``width`` less the
      solutions found so far; those that get none are given up.
    """

    name: str
    plan: str = "select"
    select: SelectRule = field(default_factory=SelectRule)
    backup: BackupRule = field(default_factory=BackupRule)
    unit: str = "step"  # what a node adds: a step below the path, or an answer of its own to the prompt
    simulations: int = 16  # expansions per tree
    width: int = 4  # children per expansion
    leaves: int = 1  # expansions per tree and wave
    depth: int = 8  # steps; deeper nodes are terminals
    low: float = -1.0  # of values: a wrong end
    high: float = 1.0  # a right one
    value: str = "outcome"  # which of fastpo.search.values scores nodes, where nothing else is given
    prior_power: float = 1.25  # p = exp(sum l / length^power)
    backup_children: bool = False  # pass up every new child's value, not the leaf's; terminals among them always
    close_terminals: bool = False  # terminals are visited once
    adaptive: float = 0.0  # s > 0: a node may get min(floor(s max|q - mean q|), 10) children, at least width
    refine: bool = False  # a node takes children until it has ``width`` or one better than itself; one at a time
    merge: float = 1.0  # siblings whose tokens are as similar as this are merged; 1: equal ones
    temperature: float = 0.1  # of rebase
    stop_value: float = inf  # a terminal of this value ends its tree
    pairs: str = "last_first"
    min_gap: float = 0.0  # of Q, between the members of a pair
    solution_scale: float = 1.0  # of the margins of pairs of ends (CPL)

    def __post_init__(self) -> None:
        known = {"plan": PLANS, "unit": UNITS, "pairs": PAIRS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise FastpoError(f"{name} is {getattr(self, name)!r}; it should be one of {', '.join(values)}")
        for name in ("simulations", "width", "leaves", "depth"):
            if getattr(self, name) < 1:
                raise FastpoError(f"{name} is {getattr(self, name)}; it should be 1 or more")
        if not self.low < self.high:
            raise FastpoError(f"low and high are {self.low} and {self.high}; low should be below high")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        # MCTS-DPO (Xie et al. 2024), their code: Q = r + V, r = v - v_parent, siblings sorted, soft labels from visits
        Method(
            "mcts_dpo",
            select=SelectRule("puct", c=1.0, prior=True),
            backup=BackupRule("children", min_visits=1, rewards=True),
        ),
        # CPL (Wang et al. 2024), their code: terminals once, running mean, Step-APO on Q > 0 against Q < 0
        Method(
            "cpl",
            select=SelectRule("puct", c=1.5, prior=True),
            backup=BackupRule("mean", close=True),
            prior_power=1.0,
            close_terminals=True,
            pairs="signs",
            solution_scale=0.3,
        ),
        # ReST-MCTS* (Zhang et al. 2024), their code
        Method(
            "rest_mcts",
            select=SelectRule("ucb1", c=0.7, unvisited="bonus"),
            backup=BackupRule("children", rollout_mix=0.5),
            low=0.0,
            stop_value=0.9,
            value="rollout",
            pairs="solutions",
        ),
        # AlphaLLM (Tian et al. 2024), their code; unvisited children first
        Method(
            "alphallm",
            select=SelectRule("uct", unvisited="first"),
            backup=BackupRule("mean"),
            adaptive=2.0,
            width=2,
            merge=0.9,
            value="rollout",
            pairs="largest_gap",
        ),
        # Tree-PLV (He et al. 2024): best first on the accuracy of 8 rollouts
        Method(
            "tree_plv",
            select=SelectRule("none", scope="frontier"),
            low=0.0,
            value="rollout",
            close_terminals=True,
            pairs="gaps",
            min_gap=0.375,
        ),
        # REBASE (Wu et al. 2024)
        Method("rebase", plan="rebase", low=0.0, value="rollout", width=16, close_terminals=True, pairs="solutions"),
        # From r to Q* (Rafailov et al. 2024): the policy's own log-probs are the values
        Method(
            "beam_q",
            plan="beam",
            leaves=4,
            low=-inf,
            high=0.0,
            value="likelihood",
            close_terminals=True,
            pairs="solutions",
        ),
        # MC-NEST, MCTSr (Zhang et al. 2024): nodes are whole answers, each a refinement of its parent
        Method(
            "mc_nest",
            select=SelectRule("mc_nest", c=1.4, scope="frontier"),
            backup=BackupRule("max_mix"),
            unit="answer",
            width=3,
            backup_children=True,
            refine=True,
            pairs="solutions",
        ),
        # the MuZero form of the benchmark of inference-time methods
        Method(
            "muzero",
            select=SelectRule("muzero", c=1.25),
            backup_children=True,
            pairs="last_first",
        ),
    )
}


def method_by_name(name: str, **settings: Any) -> Method:
    """The preset of that name with some settings changed; None keeps the preset's."""
    if name not in METHODS:
        near = suggestion(name, list(METHODS))
        raise FastpoError(f"search is {name!r}; it should be one of {', '.join(METHODS)}{near}")
    return replace(METHODS[name], **{key: value for key, value in settings.items() if value is not None})
