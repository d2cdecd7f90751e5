"""What this package has to show, and what the rows say: docs/claims.md, which ``plot.py --readme`` writes.

A claim is a figure with its bound and the command that measures it. Without a row there is no figure. All that is time
or memory on a CPU is in ``run.py --suite full``; another command repeats a measurement more often, or is of accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import figures
from figures import Found, Rows

FULL, GRID = "run.py --suite full", "run.py --suite grid"
ALONE = "run.py --suite grid --peers none --rounds 5"
GPU = "make gpu-check"


@dataclass(frozen=True)
class Claim:
    what: str
    find: Callable[["Rows"], Found | None]
    least: float | None = None
    most: float | None = None
    unit: str = "x"
    command: str = FULL

    @property
    def wanted(self) -> str:
        bounds = [f"at least {self.least:g}{self.unit}"] if self.least is not None else []
        bounds += [f"at most {self.most:g}{self.unit}"] if self.most is not None else []
        return " and ".join(bounds)

    def line(self, rows: "Rows") -> str:
        found = self.find(rows)
        if found is None:
            return f"| {self.what} | {self.wanted} | | no row | `{self.command}` |"
        met = (self.least is None or found.value >= self.least) and (self.most is None or found.value <= self.most)
        points = f" ({found.of} points)" if found.of > 1 else ""
        value = f"{found.value:.3g}{self.unit}{points}"
        return f"| {self.what} | {self.wanted} | {value} | {'met' if met else '**not met**'} | `{self.command}` |"


LOGPS, LOSS, FUSED, HEAD = "token_logprobs", "preference_loss", "linear_preference_loss", "linear_token_logprobs"
ANSWERS = "one prompt, 8 answers"
L3 = {"dtype": "float32"}
HEADLINE = "fp32, 512 x 128256"
DEMO, TASK, TASK_SEARCH = "demo.py", "embedded_task.py", "embedded_search.py"
on_gpu = partial(Claim, unit="%", command=GPU)
percent = partial(Claim, unit="%")
CLAIMS: dict[str, tuple[Claim, ...]] = {
    "Token log-probs and preference losses": (
        Claim(
            f"forward ({HEADLINE}) over eager's time",
            partial(figures.against, LOGPS, "llama3 forward", "torch eager", **L3),
            5,
        ),
        Claim(f"forward ({HEADLINE}) over TRL's", partial(figures.against, LOGPS, "llama3 forward", "trl", **L3), 3),
        Claim(
            "its share of the read rate of `logits.sum()`",
            partial(figures.share, LOGPS, "llama3 forward", **L3),
            60,
            unit="%",
        ),
        Claim(
            "forward + in-place backward over eager's",
            partial(figures.against, LOGPS, "llama3 forward_backward", "torch eager", **L3),
            8,
        ),
        Claim("bf16 over fp32, forward", partial(figures.narrow, "forward"), most=1),
        Claim("bf16 over fp32, forward + backward", partial(figures.narrow, "forward_backward"), most=1),
        Claim("IRPO, 4,096 pairs of 256 tokens, over TRL's", partial(figures.against, LOSS, "irpo masked", "trl"), 5),
        Claim(
            "DPO on log-probs that are 0 where masked, over TRL's two sums",
            partial(figures.against, LOSS, "dpo masked", "trl", mode="forward_backward"),
            5,
        ),
    ),
    "Fused head (DPO + NLL, fp32, H = 1024, 12 points a mode)": (
        Claim(
            "trained: share of the bare products' rate",
            partial(figures.share, FUSED, "cpu trained head, alone"),
            90,
            unit="%",
            command=ALONE,
        ),
        Claim(
            "frozen: share of the bare products' rate",
            partial(figures.share, FUSED, "cpu frozen head, alone"),
            90,
            unit="%",
            command=ALONE,
        ),
        Claim(
            "trained, one cold call: share of the bare products' rate",
            partial(figures.share, FUSED, "cpu trained head, oneDNN"),
            90,
            unit="%",
        ),
        Claim(
            "frozen, one cold call: share of the bare products' rate",
            partial(figures.share, FUSED, "cpu frozen head, oneDNN"),
            90,
            unit="%",
        ),
        Claim(
            "trained: over the best peer, torch as installed",
            partial(figures.against, FUSED, "cpu trained head", ""),
            1,
            command=GRID,
        ),
        Claim(
            "trained: over the best peer, every product on oneDNN",
            partial(figures.against, FUSED, "cpu trained head, oneDNN", ""),
            1,
        ),
        Claim(
            "frozen: over the best peer, torch as installed",
            partial(figures.against, FUSED, "cpu frozen head", ""),
            1.4,
            command=GRID,
        ),
        Claim(
            "frozen: over the best peer, every product on oneDNN",
            partial(figures.against, FUSED, "cpu frozen head, oneDNN", ""),
            1,  # both are 2F there
        ),
        Claim(
            "memory over the stated budget (12 MiB are malloc's)",
            figures.over_budget,
            most=12,
            unit=" MiB",
            command=ALONE,
        ),
        Claim("extra memory over eager's on all rows, V = 128256", figures.of_eager, most=10, unit="%", command=ALONE),
    ),
    "Trees (a step of a Llama of 50M, every product on oneDNN; a vocabulary of 8,192 where that was measured)": (
        *(
            percent(f"{name}: share of the token-sharing ceiling", partial(figures.of_ceiling, name), 85)
            for name in ("A", "B", "C 2-2-2", "C 5-3-3-2-2")
        ),
        *(
            percent(
                f"{name}, V = 32000: share of the token-sharing ceiling",
                partial(figures.of_ceiling, name, vocabulary=32000),
                85,
                command="tree_workloads.py",
            )
            for name in ("A", "B", "C 2-2-2", "C 5-3-3-2-2")
        ),
        Claim("dense mask's time, all workloads", lambda rows: figures.slower("dense", rows), 1),
        Claim("B: over TRL's padded batch", lambda rows: figures.slower("trl", rows, "B"), 8),
        Claim("C 5-3-3-2-2: over TRL's padded batch", lambda rows: figures.slower("trl", rows, "C 5-3-3-2-2"), 5),
        Claim("training A: over TRL's DPOTrainer", partial(figures.trained, "A"), 3),
        Claim("training B: over TRL's DPOTrainer", partial(figures.trained, "B"), 8),
        Claim("training: difference of the losses", figures.apart, most=1e-4, unit=""),
        Claim(
            "two epochs with and without sharing: difference of the losses",
            partial(figures.host, "loss curve", True),
            most=1e-4,
            unit="",
        ),
        Claim("trie of 16 x 5,120 tokens", partial(figures.host, "trie", True), most=10, unit=" ms"),
        Claim(
            "attention: pairs computed that are visible", partial(figures.host, "block efficiency", False), 90, unit="%"
        ),
        Claim(
            "attention: metadata, of one layer's time", partial(figures.host, "metadata share", True), most=1, unit="%"
        ),
    ),
    "Search": (
        Claim("select + backup, 4,096 trees of 512 nodes, a wave", figures.wave, most=5, unit=" ms"),
        Claim(
            "64 prompts, 32 simulations: nodes per second over the published way",
            partial(figures.searched, "speedup", "published"),
            8,
        ),
        Claim(
            "host's share of a wave", partial(figures.searched, "host_share", "fastpo", factor=100), most=5, unit="%"
        ),
    ),
    "Accuracy (the embedded task, three seeds)": (
        Claim("IRPO: last iteration", figures.irpo(lambda run: run[-1]), 90, unit="%", command=TASK),
        Claim("IRPO: rise", figures.irpo(lambda run: run[-1] - run[0]), 40, unit=" points", command=TASK),
        Claim("IRPO: largest fall between iterations", figures.fall, most=3, unit=" points", command=TASK),
        Claim("IRPO: over as much compute on supervision", figures.supervised, 0, unit=" points", command=TASK),
        Claim(
            "MCTS-DPO: seeds above IRPO on as many sampled tokens", figures.seeds_won, 2, unit="", command=TASK_SEARCH
        ),
    ),
    "The whole": (
        Claim(
            "`make demo` after set-up", lambda rows: rows.fact("demo.py", "seconds"), most=360, unit=" s", command=DEMO
        ),
        Claim("its last accuracy", lambda rows: rows.fact("demo.py", "accuracy 3"), 90, unit="%", command=DEMO),
        Claim(
            "SIGKILLs after which every artefact is identical",
            lambda rows: rows.fact("kill_resume.py", "kills"),
            20,
            unit="",
            command="kill_resume.py --kills 20",
        ),
        Claim(
            "`math` reward, agreement with labels of GSM8K solutions",
            lambda rows: rows.fact("reward_agreement.py", "agreement"),
            99,
            unit="%",
            command="reward_agreement.py",
        ),
    ),
    "On a GPU (bf16, shares of the measured ceilings)": (
        on_gpu("log-probs, 8192 x 128256, forward", partial(figures.share, LOGPS, "llama3 forward", gpu=True), 90),
        on_gpu(
            "the same and in-place backward", partial(figures.share, LOGPS, "llama3 forward_backward", gpu=True), 85
        ),
        on_gpu("fused loss, trained head", partial(figures.share, FUSED, "cuda trained head", gpu=True), 90),
        on_gpu("fused loss, frozen head", partial(figures.share, FUSED, "cuda frozen head", gpu=True), 90),
        on_gpu(
            "trained head over the best peer",
            partial(figures.against, HEAD, "cuda trained head, mean loss", "", gpu=True),
            1,
            unit="x",
        ),
        on_gpu(
            "frozen head over the best peer",
            partial(figures.against, HEAD, "cuda frozen head", "", gpu=True),
            1.4,
            unit="x",
        ),
        on_gpu("fused loss beyond gradients", partial(figures.gib_over, "cuda trained head"), most=2, unit=" GiB"),
        on_gpu("tree attention, forward", partial(figures.tflops, ANSWERS), 400, unit=" TFLOP/s"),
        on_gpu("tree attention, backward", partial(figures.tflops, ANSWERS, backward=True), 300, unit=" TFLOP/s"),
        on_gpu(
            "tree attention over FlexAttention",
            partial(figures.against, "tree_attention", ANSWERS, "flex_attention", gpu=True),
            1.3,
            unit="x",
        ),
        on_gpu(
            "a step of workload B over TRL's",
            partial(figures.against, "workload_step", "B", "trl", gpu=True),
            4,
            unit="x",
        ),
    ),
}


def page(rows: Rows) -> str:
    """docs/claims.md."""
    head = "| | wanted | measured | | `benchmarks/` |\n|---|---|---|---|---|\n"
    parts = [
        "# What is claimed, and what was measured\n\nWritten by `python benchmarks/plot.py --readme` from the rows of "
        "`benchmarks/results/`; of several points the worst counts, of seeds the mean."
    ]
    parts += [
        f"## {title}\n\n{head}" + "\n".join(claim.line(rows) for claim in claims) for title, claims in CLAIMS.items()
    ]
    return "\n\n".join(parts) + "\n"
