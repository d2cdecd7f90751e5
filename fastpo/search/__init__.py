"""Tree search over many prompts at once: ``simulate -> expand -> backup``, one model call per wave.

``Search`` runs over typed callables; ``StepSampler`` proposes steps with a language model, computing every token once;
``values`` has what scores them; ``METHODS`` names the published searches as rows of settings.
"""

from .engine import Search
from .methods import METHODS, Method, method_by_name
from .nodes import Evaluate, IsTerminal, Node, Propose, Step
from .pairs import SearchPair, process_targets, search_pairs, training_tree, weighted_vote
from .progress import Counts, Progress
from .sampler import StepSampler
from .store import load_search, save_search
from .values import Sampled

__all__ = [
    "METHODS",
    "Counts",
    "Evaluate",
    "IsTerminal",
    "Method",
    "Node",
    "Progress",
    "Propose",
    "Sampled",
    "Search",
    "SearchPair",
    "Step",
    "StepSampler",
    "load_search",
    "method_by_name",
    "process_targets",
    "save_search",
    "search_pairs",
    "training_tree",
    "weighted_vote",
]
