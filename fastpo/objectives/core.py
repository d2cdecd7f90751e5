"""``Objective``: the settings of the one engine that every method is a row of. Presets are in the package's modules.

A tuple p = (chosen, rejected, ...) of sequences costs

    omega_p * [ sum_j weight_j * psi_j(z_pj)  +  sum_k nll_k * NLL(sequence k) ]
    z_pj = scale_j * beta_scales_p * sum_k coefs_jk * f(S_k)  -  margin_j  -  margin_coef_j * m_p
    S_i  = n_i^-length_power * sum_t [ w_t (phi(l_t) - ref_coef r_t) + k_t K_t ]

over terms j and members k; the loss is the mean of that over tuples (or the sum), plus ``sum_t v_t l_t``. omega, m,
beta_scales come with the ``Pairs``; w, k, K, v, u (weights of the NLL) with the ``Segments``.

Two fields make a method that the terms alone cannot: ``couple`` rewrites the columns of the batch, from the scores S
where it asks for them; ``list_loss`` is a loss of whole lists of scores. ``path`` says what that costs.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from fastpo.types import Pairs, Segments

# Link psi -> its parameter's default. The order is the code that the kernels know a link by.
LINKS: dict[str, float] = {
    "logistic": 1.0,  # -q log s(z) - (1-q) log s(-z); parameter: the soft label q
    "squared": 0.0,  # (z - tau)^2; parameter: the target tau
    "hinge": 0.0,  # max(0, 1 - z); no parameter
    "sigmoid": 0.0,  # s(-z); no parameter
    "exo": 1e-3,  # KL((s(z), s(-z)) || (1-e, e)); parameter: e
    "discopop": 0.05,  # (1-g) softplus(-z) + g exp(-z), g = s(z/tau); parameter: tau
    "linear": 0.0,  # z; no parameter
}
TOKEN_MAPS = ("identity", "log1mexp")  # phi(l): l, log(1 - e^l)
SCORE_MAPS = ("identity", "power", "js", "log_odds")  # f(S): S, (e^{cS} - 1)/c, log 2 + log s(S), S - log(1 - e^S)
NLL_NORMALIZERS = ("sequence", "batch", "none")
PATHS = ("fused", "two-phase")

# (scores [G, K] times beta, present [G, K] bool, relevance [G, K] or None) -> losses [G]. Differentiable by the scores;
# absent members have score 0 and must not enter. Without relevance, members are listed best first.
ListLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Batch(NamedTuple):
    """What a batch function sees."""

    scores: Tensor | None  # [S] the S_i, detached; None unless it uses them
    segments: Segments
    pairs: Pairs
    objective: "Objective"
    num_tokens: int  # T


class Coupling(Protocol):
    """A batch function: the segments and pairs of the second phase from those given and the scores of the first."""

    @property
    def uses_scores(self) -> bool:
        """False: it reads the records only, and costs no phase."""

    # by_tuple = True, where it is so: a tuple costs by the scores of its own members alone. The sum over tuples is then
    # that of any parts of the batch, and training takes each part as it comes.

    @property
    def makes(self) -> tuple[str, ...]:
        """Columns like "pairs.margins" that it fills by itself: they should not be given."""

    def __call__(self, batch: Batch) -> tuple[Segments, Pairs]: ...


@dataclass(frozen=True)
class Term:
    """One link term ``weight * psi(z)`` of a tuple. It is left out of tuples that have none of its members."""

    coefs: tuple[float, ...] = (1.0, -1.0)  # over the members of the tuple
    link: str = "logistic"  # a key of LINKS
    scale: float = 0.1  # beta, where it multiplies the scores
    margin: float = 0.0
    margin_coef: float = 1.0  # what Pairs.margins is multiplied with
    param: float | None = None  # the link's parameter (see LINKS); None: its default
    weight: float = 1.0

    def __post_init__(self) -> None:
        one_of("link", self.link, LINKS)

    @property
    def takes_soft_label(self) -> bool:
        """Pairs.soft_labels replaces the parameter of logistic terms that compare members."""
        return self.link == "logistic" and min(self.coefs) < 0 < max(self.coefs)


@dataclass(frozen=True)
class Objective:
    """The settings of the engine for one method. Immutable; cheap to build; build it once."""

    name: str
    terms: tuple[Term, ...]
    beta: float = 0.1  # what a score is multiplied with to be reported as a reward
    phi: str = "identity"  # token map, one of TOKEN_MAPS
    ref_coef: float = 1.0  # rho: 0 makes the objective reference-free
    length_power: float = 0.0  # lambda: 1 averages over the sequence's tokens
    score_map: str = "identity"  # f, one of SCORE_MAPS
    score_map_coef: float = 0.0  # c of the power map
    nll: tuple[float, ...] = ()  # weight of the NLL of each member; () for none
    nll_normalizer: str = "sequence"  # by n_i, by the "batch"'s mean number of NLL tokens per tuple, or "none"
    reduction: str = "mean"  # over tuples: "mean" or "sum"
    requires: tuple[str, ...] = ()  # like "pairs.margins": fields without which it would silently be another method
    couple: Coupling | None = None  # columns of the batch that the method computes by itself
    list_loss: ListLoss | None = None  # of the scores of each tuple, which is then a list of any number of members

    # What the kernels take, derived from the terms.
    links: tuple[int, ...] = field(init=False, repr=False, compare=False)  # [J] codes
    table: tuple[float, ...] = field(init=False, repr=False, compare=False)  # [J, K+5] see `_row`, row by row
    num_members: int = field(init=False, repr=False, compare=False)  # K

    def __post_init__(self) -> None:
        one_of("phi", self.phi, TOKEN_MAPS)
        one_of("score_map", self.score_map, SCORE_MAPS)
        one_of("nll_normalizer", self.nll_normalizer, NLL_NORMALIZERS)
        one_of("reduction", self.reduction, ("mean", "sum"))
        if self.score_map == "power" and self.score_map_coef == 0:
            raise ValueError(f"objective {self.name}: score_map_coef is 0; the power map needs another (0 is identity)")
        members = max(len(c) for c in (self.nll, *(t.coefs for t in self.terms)))
        if members == 0 and self.list_loss is None:
            raise ValueError(f"objective {self.name}: terms and nll are empty; it needs at least one of them")
        if members and self.list_loss is not None:
            raise ValueError(f"objective {self.name}: list_loss stands alone; terms and nll should be empty")
        object.__setattr__(self, "num_members", members)
        object.__setattr__(self, "links", tuple(list(LINKS).index(t.link) for t in self.terms))
        object.__setattr__(self, "table", tuple(x for t in self.terms for x in _row(t, members)))

    @property
    def needs_reference(self) -> bool:
        """Whether ``preference_loss`` needs ``ref_logps`` for it."""
        return self.ref_coef != 0

    @property
    def path(self) -> str:
        """One of PATHS: "fused" reads the log-probs once; "two-phase" reads them once more, to couple their scores."""
        scored_first = self.couple is not None and self.couple.uses_scores
        return "two-phase" if self.list_loss is not None or scored_first else "fused"

    @property
    def couples_scores(self) -> bool:
        """Whether what a tuple costs may depend on the scores of others in its batch."""
        return self.couple is not None and self.couple.uses_scores and not getattr(self.couple, "by_tuple", False)

    @property
    def nll_coefs(self) -> tuple[float, ...]:
        """[K] ``nll``, zeros appended; () where there is no NLL."""
        return self.nll + (0.0,) * (self.num_members - len(self.nll)) if any(self.nll) else ()


def _row(term: Term, members: int) -> tuple[float, ...]:
    """What a term is for the kernels: coefs [K], scale, margin, margin_coef, link parameter, weight."""
    param = LINKS[term.link] if term.param is None else term.param
    coefs = term.coefs + (0.0,) * (members - len(term.coefs))
    return (*coefs, term.scale, term.margin, term.margin_coef, param, term.weight)


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(known)}{_nearest(value, known)}")


def _nearest(value: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(str(value), list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
