"""The published methods that fastpo expresses: method -> paper -> objective -> recipe -> what was checked.

``python -m fastpo.methods`` writes docs/methods.md from this table; a test holds the file against it. Rewards, pair
rules and searches are in ``OTHER``, recipes in ``RECIPES``: a method's row gathers what is there under its name.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpo import objectives
from fastpo.errors import FastpoError

# What stands behind a formula, the strongest that was read.
SOURCES = {
    "code": "the authors' code",
    "paper": "the paper's text",
    "trl": "TRL 1.16's code",
    "notes": "third-party notes or code",
    "memory": "memory, not confirmed",
    "derived": "memory, derived in kernels/preference_loss/README.md, not confirmed",
}
CHECKS = {
    "formula": "value and gradients equal an fp64 formula written in the tests",
    "trl": "value and gradients equal TRL 1.16's own code",
    "limit": "a limit or special case that ties it to another row",
    "rule": "known values of the function that fills its columns",
}


@dataclass(frozen=True)
class Method:
    """One row. ``presets`` are keys of ``objectives.PRESETS``; ``columns`` functions that fill their inputs."""

    name: str
    paper: str
    presets: tuple[str, ...]
    source: str  # a key of SOURCES
    checked: tuple[str, ...] = ("formula",)  # keys of CHECKS
    columns: tuple[str, ...] = ()  # of fastpo.objectives
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """A reward, pair rule or search: ``where`` is the dotted name of the function in fastpo."""

    name: str
    paper: str
    where: tuple[str, ...]
    source: str
    note: str = ""


METHODS: tuple[Method, ...] = (
    Method("DPO", "Rafailov et al. 2023", ("dpo",), "paper", ("formula", "trl", "limit")),
    Method("Self-Rewarding", "Yuan et al. 2024", ("dpo",), "paper", note="differs in its pairs"),
    Method("Meta-Rewarding", "Wu et al. 2024", ("dpo",), "paper", note="differs in its pairs"),
    Method("TPO (thought)", "Wu et al. 2024", ("dpo",), "paper", note="differs in its pairs"),
    Method("LIFT-DPO", "Yuan et al. 2024", ("dpo",), "paper", note="differs in its data"),
    Method("UPO", "Wang et al. 2024", ("dpo",), "code", note="differs in its pairs"),
    Method("SPIN", "Chen et al. 2024", ("dpo",), "paper", note="the reference is the previous iterate"),
    Method("cDPO", "Mitchell 2023", ("cdpo",), "paper"),
    Method("robust DPO", "Chowdhury et al. 2024", ("robust",), "trl", ("formula", "trl", "limit")),
    Method("IRPO", "Pang et al. 2024", ("irpo",), "paper", ("formula", "limit")),
    Method("ScPO", "Prasad et al. 2024", ("scpo",), "notes", ("formula", "limit", "rule"), ("vote_weights",)),
    Method("RPO", "Liu et al. 2024", ("rpo",), "notes"),
    Method("CODPO (CGPO)", "Xu et al. 2024", ("codpo",), "paper", ("formula", "limit")),
    Method("MCTS-DPO", "Xie et al. 2024", ("mcts_dpo",), "code", ("formula", "limit", "rule"), ("visit_soft_labels",)),
    Method("CREAM", "Wang et al. 2024", ("cream",), "code", ("formula", "limit", "rule"), ("rank_soft_labels",)),
    Method("OSP", "Zhai et al. 2024", ("osp",), "derived", ("formula", "limit", "rule"), ("strength_soft_labels",)),
    Method("DNO", "Rosset et al. 2024", ("dno",), "derived", ("formula", "limit", "rule"), ("strength_soft_labels",)),
    Method("Step-APO (CPL)", "Wang et al. 2024", ("step_apo",), "code", ("formula", "limit")),
    Method("IPO", "Azar et al. 2023", ("ipo",), "trl", ("formula", "trl")),
    Method("SPPO", "Wu et al. 2024", ("sppo", "sppo_hard"), "code", ("formula", "trl", "limit")),
    Method("INPO", "Zhang et al. 2024", ("inpo",), "notes", ("formula", "limit"), ("mixed_reference",)),
    Method("SRPO", "Choi et al. 2024", ("srpo",), "derived"),
    Method("Sharpening", "Huang et al. 2024", ("sharpening",), "derived"),
    Method("SELM", "Zhang et al. 2024", ("selm",), "code", ("formula", "limit")),
    Method("VPO", "Cen et al. 2024", ("vpo",), "derived", ("formula", "limit")),
    Method("LiPO-lambda", "Liu et al. 2024", ("lipo",), "paper", ("formula", "limit")),
    Method("list-MLE, DPO of rankings", "Rafailov et al. 2023", ("list_mle",), "paper", ("formula", "limit")),
    Method("list softmax", "Liu et al. 2024", ("list_softmax",), "derived", ("formula", "limit")),
    Method("RRHF", "Yuan et al. 2023", ("rrhf",), "derived"),
    Method("TDPO-1, TDPO-2", "Zeng et al. 2024", ("tdpo1", "tdpo2", "tdpo"), "code", ("formula", "limit")),
    Method("SparsePO, MAPO", "Christopoulou et al. 2024", ("sparse_po",), "code", ("formula", "limit")),
    Method("T-REG", "Zhou et al. 2024", ("t_reg",), "notes", ("formula", "limit", "rule"), ("contrast_token_rewards",)),
    Method("RISE (error-injected)", "Xu et al. 2024", ("rise",), "notes", ("formula", "limit")),
    Method("MM-RLHF", "Zhang et al. 2025", ("mm_rlhf",), "notes", ("formula", "rule"), ("gap_beta_scales",)),
    Method(
        "rationale DPO", "Just et al. 2024", ("rationale_dpo",), "code", ("formula", "limit"), ("without_reference",)
    ),
    Method(
        "PRefLexOR",
        "Buehler 2024",
        ("orpo", "exo_pair"),
        "code",
        ("formula", "rule"),
        ("outside_spans",),
        "ORPO first, then EXO with the thinking tokens masked",
    ),
    Method("ReMax", "Li et al. 2023", ("remax",), "code", ("formula", "rule"), ("remax_advantages",)),
    Method("RLSP", "Ye et al. 2025", ("rlsp",), "notes", note="the loss at the sampling policy; their PPO is outside"),
    Method("TRICE", "Phan et al. 2023", ("trice",), "derived", ("formula", "rule"), ("trice_weights",)),
    Method("CRPG (CGPO)", "Xu et al. 2024", ("crpg",), "paper", ("formula", "rule"), ("calibrated_rewards",)),
    Method("CRRAFT (CGPO)", "Xu et al. 2024", ("crraft",), "paper", ("formula", "rule"), ("calibrated_rewards",)),
    Method("Tree-PLV", "He et al. 2024", ("tree_plv",), "notes", note="scores of a reward head"),
    Method("SLiC, RSO", "Zhao et al. 2023, Liu et al. 2023", ("hinge",), "trl", ("formula", "trl")),
    Method("f-DPO", "Wang et al. 2023", ("f_dpo",), "trl", ("formula", "trl", "limit")),
    Method("length-normalised DPO", "TRL 1.16", ("sigmoid_norm",), "trl", ("formula", "trl")),
    Method("NCA", "Chen et al. 2024", ("nca_pair",), "trl", ("formula", "trl")),
    Method("EXO", "Ji et al. 2024", ("exo_pair",), "trl", ("formula", "trl")),
    Method("BCO", "Jung et al. 2024", ("bco_pair", "bco"), "trl", ("formula", "trl", "limit")),
    Method("APO", "D'Oosterlinck et al. 2024", ("apo_zero", "apo_down"), "trl", ("formula", "trl")),
    Method("AOT", "Melnyk et al. 2024", ("aot", "aot_unpaired"), "trl", ("formula", "trl"), ("reference_margins",)),
    Method("DiscoPOP", "Lu et al. 2024", ("discopop",), "trl", ("formula", "trl")),
    Method("SFT on the chosen", "TRL 1.16", ("sft",), "trl", ("formula", "trl")),
    Method("SimPO", "Meng et al. 2024", ("simpo",), "trl", ("formula", "trl", "limit")),
    Method("CPO", "Xu et al. 2024", ("cpo",), "trl", ("formula", "trl")),
    Method("ORPO", "Hong et al. 2024", ("orpo",), "trl", ("formula", "trl")),
    Method("AlphaPO", "Gupta et al. 2025", ("alphapo",), "trl", ("formula", "trl", "limit")),
    Method("KTO", "Ethayarajh et al. 2024", ("kto", "kto_batch"), "trl", ("formula", "trl", "limit")),
    Method("LD-DPO", "Liu et al. 2024", ("ld_dpo",), "trl", ("formula", "trl", "limit")),
    Method("WPO", "Zhou et al. 2024", ("wpo",), "trl", ("formula", "trl", "rule"), ("wpo_weights",)),
    Method("beta-DPO", "Wu et al. 2024", ("beta_dpo",), "notes", ("formula", "limit")),
    Method("soft DPO", "-", ("soft_dpo",), "derived", ("formula", "limit"), note="what CREAM, OSP and DNO share"),
)

# Rewards, pair rules and searches (where they are not an objective), by dotted name.
OTHER: tuple[Rule, ...] = (
    Rule("IRPO pairs", "Pang et al. 2024", ("fastpo.pair_rules.irpo_pairs", "fastpo.rewards.math_reward"), "paper"),
    Rule("ScPO votes", "Prasad et al. 2024", ("fastpo.pair_rules.scpo_pair", "fastpo.statistics.votes"), "notes"),
    Rule(
        "Self-Rewarding judge", "Yuan et al. 2024", ("fastpo.signals.graded", "fastpo.pair_rules.best_worst"), "notes"
    ),
    Rule(
        "Meta-Rewarding judge",
        "Wu et al. 2024",
        ("fastpo.signals.meta_judged", "fastpo.pair_rules.tier_pair", "fastpo.statistics.elo"),
        "memory",
        "one Elo fit of all games",
    ),
    Rule("TPO scores", "Wu et al. 2024", ("fastpo.reward_rules.length_penalised", "fastpo.signals.visible"), "notes"),
    Rule(
        "Self-Taught Evaluator",
        "Wang et al. 2024",
        ("fastpo.signals.verdicts", "fastpo.pair_rules.verdict_pairs"),
        "code",
        "also against wrong judgements; theirs is fine-tuning on right ones (`--objective sft`)",
    ),
    Rule(
        "CREAM consistency",
        "Wang et al. 2024",
        ("fastpo.signals.implicit", "fastpo.statistics.kendall_tau"),
        "code",
        "tau-b, averaged over the prompts",
    ),
    Rule(
        "B-STaR",
        "Zeng et al. 2024",
        ("fastpo.statistics.balance_scores", "fastpo.reward_rules.outcome_and_process"),
        "code",
    ),
    Rule("Auto-CEI", "Zhao et al. 2024", ("fastpo.reward_rules.refusal_reward",), "code"),
    Rule("UPO pairs", "Wang et al. 2024", ("fastpo.statistics.bald", "fastpo.statistics.draw_certain"), "code"),
    Rule(
        "RPC",
        "Zhou et al. 2025",
        ("fastpo.pair_rules.rpc_pair", "fastpo.statistics.path_votes", "fastpo.statistics.low_mode"),
        "notes",
        "modes split by least variance, not by a Weibull mixture",
    ),
    Rule("CDR", "-", ("fastpo.reward_rules.contrast",), "memory"),
    Rule(
        "RLHF Workflow",
        "Dong et al. 2024",
        (
            "fastpo.pair_rules.best_worst",
            "fastpo.pair_rules.best_random",
            "fastpo.pair_rules.best_two",
            "fastpo.reward_rules.minus_length",
        ),
        "code",
        "ties make no pair",
    ),
    Rule(
        "win rates (SPPO, DNO, INPO)",
        "Wu et al. 2024",
        ("fastpo.pair_rules.win_rate_choice", "fastpo.statistics.win_rates", "fastpo.signals.duelled"),
        "code",
    ),
    Rule("SPIN pairs", "Chen et al. 2024", ("fastpo.pair_rules.gold_pairs",), "paper"),
    Rule("RISE edits", "Xu et al. 2024", ("fastpo.pair_rules.with_edits", "fastpo.pair_rules.edit_number"), "notes"),
    Rule("ranked lists", "Liu et al. 2024", ("fastpo.pair_rules.ranked_list",), "paper"),
    Rule("combined rewards", "Wang et al. 2024", ("fastpo.reward_rules.log_sigmoid_gap",), "memory"),
    Rule(
        "reward ensembles",
        "Coste et al. 2023",
        ("fastpo.reward_rules.ensemble_min", "fastpo.reward_rules.ensemble_cautious"),
        "memory",
    ),
    Rule("progress rewards", "Setlur et al. 2024", ("fastpo.reward_rules.with_progress",), "memory"),
    # searches: rows of fastpo.search.METHODS, formulas in kernels/tree_search; golden trees in tests/data/
    Rule(
        "MCTS-DPO search",
        "Xie et al. 2024",
        ("fastpo.search.Search", "fastpo.kernels.tree_search.select", "fastpo.search.values.SelfEvaluation"),
        "code",
        "one expansion per simulation; theirs goes on to an end",
    ),
    Rule("CPL search", "Wang et al. 2024", ("fastpo.kernels.tree_search.backup", "fastpo.search.search_pairs"), "code"),
    Rule(
        "ReST-MCTS* search",
        "Zhang et al. 2024",
        ("fastpo.kernels.tree_search.process_values", "fastpo.search.process_targets"),
        "code",
    ),
    Rule(
        "AlphaLLM search", "Tian et al. 2024", ("fastpo.search.Search",), "code", "children without visits come first"
    ),
    Rule("MuZero form of search", "-", ("fastpo.kernels.tree_search.select",), "code"),
    Rule("Tree-PLV search", "He et al. 2024", ("fastpo.kernels.tree_search.sibling_pairs",), "notes"),
    Rule("REBASE", "Wu et al. 2024", ("fastpo.search.plans.rebase_widths", "fastpo.search.weighted_vote"), "memory"),
    Rule("MC-NEST, MCTSr", "Rabby et al. 2024", ("fastpo.kernels.tree_search.backup",), "memory"),
    Rule("From r to Q*", "Rafailov et al. 2024", ("fastpo.search.values.Likelihood",), "paper"),
    Rule("RAIN, RethinkMCTS", "Li et al. 2023", ("fastpo.kernels.tree_search.select",), "memory", "settings of PUCT"),
)

# Name of a row above -> recipes/<recipe>.yaml.
RECIPES: dict[str, tuple[str, ...]] = {
    "IRPO": ("irpo",),
    "ScPO": ("scpo", "scpo_embedded"),
    "Self-Rewarding": ("self_rewarding",),
    "Meta-Rewarding": ("meta_rewarding",),
    "TPO (thought)": ("tpo",),
    "Self-Taught Evaluator": ("self_taught_evaluator",),
    "CREAM": ("cream",),
    "SPIN": ("spin",),
    "SPPO": ("sppo",),
    "DNO": ("dno",),
    "INPO": ("inpo",),
    "RPO": ("rpo",),
    "SimPO": ("simpo",),
    "KTO": ("kto",),
    "LiPO-lambda": ("lipo",),
    "TDPO-1, TDPO-2": ("tdpo",),
    "SparsePO, MAPO": ("sparse_po",),
    "T-REG": ("t_reg",),
    "RISE (error-injected)": ("rise_edit",),
    "B-STaR": ("b_star",),
    "SELM": ("selm",),
    "RLHF Workflow": ("rlhf_workflow",),
    "MCTS-DPO": ("mcts_dpo",),
    "Step-APO (CPL)": ("cpl",),
    "ReST-MCTS* search": ("rest_mcts",),
    "AlphaLLM search": ("alphallm",),
    "Tree-PLV search": ("tree_plv",),
    "REBASE": ("rebase",),
    "MC-NEST, MCTSr": ("mc_nest",),
    "From r to Q*": ("beam_q",),
}

DOCS = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
_HEADER = """# Methods

Made from `fastpo/methods.py` by `python -m fastpo.methods`; do not edit. An objective is a function of
`fastpo.objectives`; its docstring has the formula, the defaults, and each difference in convention.
"""


def table() -> str:
    """docs/methods.md."""
    rows = [_row(m) for m in METHODS]
    parts = [_HEADER, _table(("method", "paper", "objective", "path", "recipe", "formula from", "checked"), rows)]
    if OTHER:
        rules = [(r.name, r.paper, _codes(r.where), _recipes(r.name), SOURCES[r.source], r.note) for r in OTHER]
        head = ("method", "paper", "function", "recipe", "rule from", "note")
        parts += ["## Rewards, pairs, searches\n", _table(head, rules)]
    legend = [f"- **{name}**: {text}." for name, text in CHECKS.items()]
    paths = "`fused`: one read of the log-probs. `two-phase`: one more, for the scores that couple the batch."
    return "\n".join([*parts, "What was checked:\n", *legend, "", paths, ""])


def _row(method: Method) -> tuple[str, ...]:
    paths = {objectives.by_name(name).path: None for name in method.presets}
    presets = _codes(method.presets) + (f" with {_codes(method.columns)}" if method.columns else "")
    note = f"; {method.note}" if method.note else ""
    checked = ", ".join(method.checked)
    return (
        *(method.name, method.paper, presets, ", ".join(paths)),
        *(_recipes(method.name), SOURCES[method.source], checked + note),
    )


def _recipes(name: str) -> str:
    return _codes(RECIPES.get(name, ()))


def _codes(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Writes the table; ``--check``: only says whether it is current."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments not in ([], ["--check"]):
        raise FastpoError(f"arguments are {arguments}; they should be none, or --check")
    current = DOCS.is_file() and DOCS.read_text() == table()
    if arguments:
        print(f"{DOCS.name} is {'current' if current else 'out of date: python -m fastpo.methods'}")
        return 0 if current else 1
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
