"""What single keys may be: ``Config`` asks on construction. What keys say together is in ``fastpo.checks``."""

import math
from collections.abc import Callable, Iterator
from typing import Any

_AT_LEAST = {
    0: (
        *("iterations", "top_k", "alpha", "length_rho", "judge_pairs", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "warm_start_steps", "eval_prompts", "eval_pairs", "report_samples"),
    ),
    1: (
        *("num_samples", "max_new_tokens", "prompts_per_iteration", "sample_batch_size", "sample_chunk"),
        *("scan_prompts", "search_simulations", "search_width", "search_depth", "search_leaves", "search_rollouts"),
        *("search_step_tokens", "search_nodes", "search_cache_tokens", "search_checkpoint_waves", "pairs_per_prompt"),
        *("judge_samples", "judge_max_new_tokens", "batch_size", "max_steps", "micro_batch_tokens"),
        *("checkpoint_steps", "warm_start_examples", "warm_start_batch_size", "vocab_size", "hidden_size"),
        *("num_layers", "num_heads"),
    ),
    2: ("context_length",),
}
_ABOVE_0 = ("beta", "learning_rate", "num_epochs", "warm_start_learning_rate")
_SHARES = ("warm_start_judgements", "reference_mix")

# key -> (whether its value can be right, what it should be)
_OTHERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: bool(v) and min(v) >= 0, "one or more numbers >= 0"),
    "temperature_scan": (lambda v: min(v, default=0.0) >= 0, "numbers >= 0"),
    "top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "vote_threshold": (lambda v: bool(v) and 0 <= min(v) <= max(v) <= 1, "one or more shares in [0, 1]"),
    "search_labels": (lambda v: bool(v) and all(v), "one or more texts"),
    "search_refine": (lambda v: v is None or "{answer}" in v, "text that holds {answer}, or none"),
    "answer_marker": (lambda v: v != "", "text, or none"),
    "contrast_prompts": (lambda v: len(v) == 2 and all("{prompt}" in t for t in v), "two texts that hold {prompt}"),
    "objective_settings": (lambda v: all(map(_is_setting, v)), "a list of name=number"),
    "prompt_template": (lambda v: "{prompt}" in v, "text that holds {prompt}, where the question goes"),
}


def _is_setting(text: str) -> bool:
    try:
        return math.isfinite(float(text.partition("=")[2]))
    except ValueError:
        return False


def complaints(values: dict[str, Any]) -> Iterator[str]:
    """A line for each of ``values`` that cannot be right, by key; keys with the value None are not given."""
    wanted = {name: f"{least} or more" for least, names in _AT_LEAST.items() for name in names}
    wanted |= {name: "above 0" for name in _ABOVE_0} | {name: "a share in [0, 1]" for name in _SHARES}
    wanted |= {name: text for name, (_, text) in _OTHERS.items()}
    for name, value in values.items():
        if value is not None and not _can_be_right(name, value):
            yield f"{name} is {value!r}; it should be {wanted.get(name, 'finite')}"
    if not (values["hidden_size"] < 1 or values["num_heads"] < 1) and values["hidden_size"] % (2 * values["num_heads"]):
        yield (
            f"hidden_size is {values['hidden_size']}; it should be a multiple of twice num_heads "
            f"({values['num_heads']})"
        )


def _can_be_right(name: str, value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        return False
    least = next((least for least, names in _AT_LEAST.items() if name in names), -math.inf)
    if name in _OTHERS:
        return _OTHERS[name][0](value)
    if name in _ABOVE_0:
        return value > 0
    if name in _SHARES:
        return 0 <= value <= 1
    return isinstance(value, (str, list)) or value >= least
