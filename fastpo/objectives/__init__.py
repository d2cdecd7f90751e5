"""Objectives: a method is a row of settings of one engine. Presets are functions: ``dpo()``, ``irpo()``, ...

core.py says what the engine computes; ``fastpo.methods`` which published method is which preset. ``columns`` has the
functions that fill the columns of ``Pairs`` and ``Segments``: votes, visits, reward gaps, win rates.
"""

import inspect
from collections.abc import Callable
from typing import Any

from .columns import (
    calibrated_rewards,
    contrast_token_rewards,
    gap_beta_scales,
    mixed_reference,
    outside_spans,
    rank_soft_labels,
    reference_margins,
    remax_advantages,
    strength_soft_labels,
    trice_weights,
    visit_soft_labels,
    vote_weights,
    without_reference,
    wpo_weights,
)
from .core import (
    LINKS,
    NLL_NORMALIZERS,
    PATHS,
    SCORE_MAPS,
    TOKEN_MAPS,
    Batch,
    Coupling,
    ListLoss,
    Objective,
    Term,
    one_of,
)
from .likelihood import alphapo, codpo, cpo, irpo, orpo, rpo, scpo, sft, simpo
from .lists import lipo, list_mle, list_softmax, rrhf
from .pairwise import (
    aot,
    aot_unpaired,
    beta_dpo,
    cdpo,
    cream,
    discopop,
    dno,
    dpo,
    exo_pair,
    f_dpo,
    hinge,
    inpo,
    ipo,
    ld_dpo,
    mcts_dpo,
    mm_rlhf,
    osp,
    robust,
    sharpening,
    sigmoid_norm,
    soft_dpo,
    sparse_po,
    step_apo,
    tdpo,
    tdpo1,
    tdpo2,
    wpo,
)
from .pointwise import apo_down, apo_zero, bco, bco_pair, kto, kto_batch, nca_pair, sppo, sppo_hard
from .policy import crpg, crraft, remax, rlsp, t_reg, tree_plv, trice
from .several import rationale_dpo, rise, selm, srpo, vpo

PRESETS: dict[str, Callable[..., Objective]] = {
    f.__name__: f
    for f in (
        *(dpo, cdpo, robust, soft_dpo, cream, dno, osp, mcts_dpo, step_apo, ipo, inpo, sharpening, hinge, f_dpo),
        *(
            exo_pair,
            discopop,
            sigmoid_norm,
            tdpo,
            tdpo1,
            tdpo2,
            sparse_po,
            mm_rlhf,
            wpo,
            ld_dpo,
            aot,
            aot_unpaired,
            beta_dpo,
        ),
        *(irpo, codpo, scpo, rpo, sft, simpo, alphapo, cpo, orpo),
        *(sppo, sppo_hard, nca_pair, bco_pair, bco, kto, kto_batch, apo_zero, apo_down),
        *(selm, vpo, srpo, rationale_dpo, rise),
        *(lipo, rrhf, list_mle, list_softmax),
        *(remax, rlsp, trice, crpg, crraft, tree_plv, t_reg),
    )
}

__all__ = [
    "LINKS",
    "NLL_NORMALIZERS",
    "PATHS",
    "PRESETS",
    "SCORE_MAPS",
    "TOKEN_MAPS",
    "Batch",
    "Coupling",
    "ListLoss",
    "Objective",
    "Term",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "bco_pair",
    "beta_dpo",
    "by_name",
    "calibrated_rewards",
    "cdpo",
    "codpo",
    "contrast_token_rewards",
    "cpo",
    "cream",
    "crpg",
    "crraft",
    "discopop",
    "dno",
    "dpo",
    "exo_pair",
    "f_dpo",
    "gap_beta_scales",
    "hinge",
    "inpo",
    "ipo",
    "irpo",
    "kto",
    "kto_batch",
    "ld_dpo",
    "lipo",
    "list_mle",
    "list_softmax",
    "mcts_dpo",
    "mixed_reference",
    "mm_rlhf",
    "nca_pair",
    "orpo",
    "osp",
    "outside_spans",
    "rank_soft_labels",
    "rationale_dpo",
    "reference_margins",
    "remax",
    "remax_advantages",
    "rise",
    "rlsp",
    "robust",
    "rpo",
    "rrhf",
    "scpo",
    "selm",
    "sft",
    "sharpening",
    "sigmoid_norm",
    "simpo",
    "soft_dpo",
    "sparse_po",
    "sppo",
    "sppo_hard",
    "srpo",
    "step_apo",
    "strength_soft_labels",
    "t_reg",
    "tdpo",
    "tdpo1",
    "tdpo2",
    "tree_plv",
    "trice",
    "trice_weights",
    "visit_soft_labels",
    "vote_weights",
    "vpo",
    "without_reference",
    "wpo",
    "wpo_weights",
]


def by_name(name: str, **settings: Any) -> Objective:
    """``by_name("irpo", beta=0.1, alpha=1.0)``: the preset of that name. Errors suggest the nearest name or key."""
    one_of("objective", name, PRESETS)
    keys = inspect.signature(PRESETS[name]).parameters
    for key in settings:
        one_of(f"setting of objective {name}", key, keys)
    return PRESETS[name](**settings)
