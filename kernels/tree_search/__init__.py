"""The ops ``tree_search``: select, back up and pair nodes of thousands of search trees at once."""

from .op import backup, process_values, select
from .pairs import PAIR_RULES, sibling_pairs
from .records import NO_PARENT, ROOT, UNVISITED, BackupRule, SearchTrees, SelectRule

__all__ = [
    "NO_PARENT",
    "PAIR_RULES",
    "ROOT",
    "UNVISITED",
    "BackupRule",
    "SearchTrees",
    "SelectRule",
    "backup",
    "process_values",
    "select",
    "sibling_pairs",
]
