"""What the commands do: thin, over the loop and its stages."""

import argparse
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from fastpo import convert, info, stages
from fastpo.artifacts import read_jsonl, write_json, write_jsonl
from fastpo.checks import check_given, check_keys, iterations_of
from fastpo.cli import Command
from fastpo.config import Config, key_types
from fastpo.console import Display, results_table
from fastpo.data import Codec, evaluation_prompts, read_rows, training_prompts
from fastpo.errors import FastpoError, RunError
from fastpo.estimate import describe
from fastpo.loop import Loop, train
from fastpo.models import PromptResponse, load_model, load_tokenizer, vocabulary
from fastpo.pairs import build_pairs, explain_no_pairs
from fastpo.report import write_report
from fastpo.rewards import Scorer, load_reward
from fastpo.run import BUILT_MODELS, context_of, make_accelerator
from fastpo.score_files import Parts, check_known, parse_scored, score_rows, settings_of, write_scores


def run_train(config: Config, arguments: argparse.Namespace) -> None:
    """Iterations of sample -> reward -> pairs -> reference log-probs -> train -> evaluate.

    reads:  --data, prompts, and/or --preferences, pairs; --warm_start, demonstrations; --model
    writes: output_dir/iteration_k/{samples,rewards,pairs}.jsonl, reference.safetensors, model/, metrics.json,
            evaluation.json; output_dir/report.html, tensorboard/

    Stopped anywhere, the same command goes on from there and ends with the same weights.

    examples:
      fastpo train irpo --model PATH --data prompts.jsonl --output_dir runs/irpo --beta 0.2 --iterations 3
      fastpo train gsm8k --preferences pairs.jsonl --warm_start demonstrations.jsonl --output_dir runs/gsm8k
      accelerate launch --num_processes 4 -m fastpo train irpo --model PATH --data prompts.jsonl
    """
    check_given(config, arguments.given)
    if arguments.dry_run:
        print(plan(config))
        return
    accelerator = make_accelerator(config)
    with Display(accelerator.is_main_process) as display:
        train(config, display)
    display.final_table()
    if accelerator.is_main_process:
        print(f"report: {write_report(config.output_dir)}")


def run_demo(config: Config, arguments: argparse.Namespace) -> None:
    """The embedded task from nothing to a better model.

    A tiny Llama is warm-started on word arithmetic of mixed quality and improved by iterations of IRPO. No downloads,
    minutes on a CPU. It is `fastpo train demo`: every key can be changed.

    writes: output_dir, as fastpo train does

    example:
      fastpo demo --output_dir runs/demo --seed 1
    """
    run_train(config, arguments)


def plan(config: Config) -> str:
    """What ``train`` would do: everything is read and checked, nothing is written or trained."""
    loop = Loop(config, Display(enabled=False))
    lines = [f"output_dir {config.output_dir}, model {config.model}, context {loop.context or 'unlimited'} tokens"]
    if config.model != "tiny-llama" or loop.run.has(loop.folder(0) / "tokenizer"):
        loop.check_data()
    if config.warm_start:
        done = "done" if loop.run.has(loop.folder(0) / "model") else f"{config.warm_start_steps} steps"
        lines.append(f"warm start on {config.warm_start}: {done}")
    for k in range(1, iterations_of(config) + 1):
        state = "done" if loop.run.has(loop.folder(k) / "evaluation.json") else _plan_of(config, k)
        lines.append(f"iteration {k}: {state}")
    lines += _estimate(loop)
    lines.append(f"objective: {loop.objective}")
    lines.append(f"LM head: {info.LOOP[config.sharing]}")
    lines.append(f"config:\n{config.to_yaml()}dry run: nothing was written")
    return "\n".join(lines)


def _estimate(loop: Loop) -> list[str]:
    """Sizes and costs of the first iteration; of given preferences, without sampling, nothing is estimated."""
    config = loop.config
    if config.data is None or not iterations_of(config):
        return []
    prompts = training_prompts(config, 1)
    if config.model == "tiny-llama" and not loop.run.has(loop.folder(0) / "tokenizer"):
        lengths = [len(str(p.text)) / 3 for p in prompts]  # no tokenizer yet: three characters a token
    else:
        lengths = [len(loop.codec.prompt_ids(p.text)) for p in prompts]
    device = loop.run.accelerator.device.type
    return describe(config, loop.objective, len(prompts), sum(lengths) / len(lengths), device)


def _plan_of(config: Config, iteration: int) -> str:
    if config.preferences and iteration == 1:
        return f"train on the pairs of {config.preferences}"
    number = len(training_prompts(config, iteration))
    if config.search != "none":
        return f"{number} prompts searched by {config.search}, train in batches of {config.batch_size}"
    return (
        f"{number} prompts x {config.num_samples} samples at temperature {config.at('temperature', iteration)}, "
        f"{config.pair_rule} pairs, train in batches of {config.batch_size}"
    )


def run_sample(config: Config, arguments: argparse.Namespace) -> None:
    """Responses to prompts.

    reads:  --data, JSONL of {"question" or "prompt", optional "answer"}
    writes: --out, a row per prompt with its responses [{"text", "ids", "tokens", "finished"}]

    example:
      fastpo sample --model PATH --data prompts.jsonl --num_samples 8 --temperature 0.8 --out samples.jsonl
    """
    model, codec, accelerator = _model_and_codec(config)
    prompts = training_prompts(config, 1) if config.data else evaluation_prompts(config)
    if not prompts:
        raise FastpoError("data is missing; it should be a JSONL file of prompts, or 'embedded'")
    prompts = codec.fitting_prompts(prompts)
    with Display() as display, display.progress("sampling", len(prompts)) as bar:
        rows = stages.sample(
            model,
            prompts,
            codec,
            num_samples=config.num_samples,
            temperature=config.at("temperature", 1),
            seed=stages.derive_seed(config.seed, "sample"),
            accelerator=accelerator,
            progress=bar.advance,
        )
    write_jsonl(arguments.out, rows)
    print(f"{len(rows)} prompts x {config.num_samples} samples -> {arguments.out}")


def run_pairs(config: Config, arguments: argparse.Namespace) -> None:
    """Rewards samples and pairs them.

    reads:  --input, what fastpo sample writes
    writes: --out, JSONL of {"id", "prompt", "chosen", "rejected", "weight"}: what --preferences reads

    example:
      fastpo pairs --input samples.jsonl --reward math --pairs_per_prompt 10 --out preferences.jsonl
    """
    check_keys(config)
    check_given(config, arguments.given)
    if config.pair_rule == "judgements" or config.score_by != "reward":
        name = "pair_rule" if config.pair_rule == "judgements" else "score_by"
        raise FastpoError(f"{name} {getattr(config, name)} needs a model that judges: fastpo train has one")
    samples = read_jsonl(_needed(arguments.input, "input"))
    for number, row in enumerate(samples, start=1):
        if not {"id", "prompt", "row", "responses"} <= row.keys():
            raise FastpoError(f"{arguments.input}:{number}: not a row of samples (fastpo sample writes them)")
    scorer = Scorer(load_reward(config.reward), config.on_reward_error)
    rewards = stages.score(samples, scorer)
    rows, counts = build_pairs(samples, rewards, config)
    if not rows:
        raise RunError(explain_no_pairs(counts, config, 1))
    by_id = {row["id"]: row for row in samples}
    write_jsonl(arguments.out, (_preference(row, by_id[row["prompt"]]) for row in rows))
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.to_dict().items() if value)
    print(f"{shown}; reward failures {scorer.failures} -> {arguments.out}")


def _preference(pair: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    if pair["chosen"] is None or pair["rejected"] is None:
        raise FastpoError(f"prompt {pair['prompt']} has single responses; a preferences file holds pairs only")

    def text(key: str) -> str:
        if key in pair.get("texts", {}):
            return pair["texts"][key]
        name = key.rpartition("/")[2]
        return sample["row"]["answer"] if name == "gold" else sample["responses"][int(name)]["text"]

    return {
        "id": f"{pair['chosen']}-{pair['rejected'].rpartition('/')[2]}",
        "prompt": pair.get("prompt_text", sample["prompt"]),
        "chosen": text(pair["chosen"]),
        "rejected": text(pair["rejected"]),
        "weight": pair["weight"],
    }


def run_score(config: Config, arguments: argparse.Namespace) -> None:
    """Log-probs of responses under a model. What responses to a prompt share is computed once.

    reads:  FILE or --input, JSONL of {"prompt", "response"}, of {"prompt", "responses": [...]}, or of token ids:
            {"tokens": [...] or [[...], ...], "start": length of the prompt}
    writes: --out, the same with "logp" (summed over the response's tokens, end of sequence included), "logp_per_token"
            and "tokens"; of several responses, a list of these, "scores". *.safetensors: "logps" of every token and
            "cu_seqlens", where each response's begin

    Stopped anywhere, the same command goes on from there.

    examples:
      fastpo score responses.jsonl --model PATH --out scores.jsonl
      fastpo score responses.jsonl --model PATH --out scores.safetensors
    """
    path = _needed(arguments.file or arguments.input, "input")
    model, codec, accelerator = _model_and_codec(config)
    if accelerator.num_processes > 1:
        raise FastpoError(f"score runs in one process, not {accelerator.num_processes}; split the file, one each")
    rows, _ = read_rows(path, parse_scored, skip_bad=config.skip_bad)
    numbered = [(row, row.sequences(codec)) for row in rows]
    lengths = [max(len(prompt) + len(response) for prompt, response in own) for _, own in numbered]
    kept = codec.fitting(numbered, lengths, lambda n: f"{path}, line {n[0].line}")
    rows, sequences = [row for row, _ in kept], [own for _, own in kept]
    check_known(rows, sequences, vocabulary(model), path)
    settings = {name: value for name, value in vars(config).items() if name in _SCORE}
    out, counts = Path(arguments.out), [len(own) for own in sequences]
    parts = Parts(out, settings_of(path, config.model, settings))

    def score(part: list[PromptResponse], progress: stages.Progress) -> tuple[Tensor, Tensor]:
        packed = stages.packed_logps(model, {str(i): s for i, s in enumerate(part)}, config, accelerator, progress)
        return packed["logps"], packed["cu_seqlens"]

    with Display() as display, display.progress("scoring", sum(counts)) as bar:
        logps, cu_seqlens = score_rows(sequences, score, parts, config.micro_batch_tokens, bar.advance)
    write_scores(out, rows, counts, logps, cu_seqlens)
    parts.remove()
    print(f"{sum(counts)} responses, mean log-prob {float(logps.double().sum()) / sum(counts):.3f} -> {out}")


def run_evaluate(config: Config, arguments: argparse.Namespace) -> None:
    """Greedy accuracy on held-out problems.

    reads:  --eval_data, JSONL of {"question" or "prompt", "answer"}, or embedded
    writes: a table; with --out the numbers and some answers as JSON

    example:
      fastpo evaluate demo --model runs/demo/iteration_3/model --eval_prompts 500
    """
    model, codec, accelerator = _model_and_codec(config)
    prompts = evaluation_prompts(config)
    if not prompts:
        raise FastpoError("eval_data is missing; it should be a JSONL file of problems, or 'embedded'")
    prompts = codec.fitting_prompts(prompts)
    with Display() as display, display.progress("evaluation", len(prompts)) as bar:
        samples = stages.sample(
            model,
            prompts,
            codec,
            num_samples=1,
            temperature=0.0,
            seed=0,
            accelerator=accelerator,
            progress=bar.advance,
        )
    scorer = Scorer(load_reward(config.reward), config.on_reward_error)
    summary = stages.evaluation_summary(samples, stages.score(samples, scorer), config)
    greedy = [(row["prompt_ids"], row["responses"][0]["ids"]) for row in samples]
    summary |= stages.token_statistics(model, greedy, config, accelerator)
    Display().console.print(results_table([{**summary, "name": Path(config.model).name}]))
    if arguments.out:
        write_json(arguments.out, summary)


def run_report(config: Config, arguments: argparse.Namespace) -> None:
    """report.html of a run, finished or not: accuracy, margins, log-probs, top-k mass, pairs, times, answers.

    reads:  the artefacts in DIRECTORY
    writes: DIRECTORY/report.html, self-contained

    example:
      fastpo report runs/demo
    """
    print(f"report: {write_report(arguments.directory)}")


def run_convert(config: Config, arguments: argparse.Namespace) -> None:
    if arguments.format != "gsm8k":
        raise FastpoError(f"convert knows the format gsm8k, not {arguments.format!r}")
    made = convert.convert_gsm8k(
        _needed(arguments.input, "input"),
        arguments.out,
        keep_calculator=arguments.keep_calculator,
        holdout=arguments.holdout,
        limit=arguments.limit,
    )
    held = f", {made.held_out} of them held out" if made.held_out else ""
    print(f"{made.rows} {made.kind} of {made.problems} problems{held} -> {', '.join(map(str, made.paths))}")


def _needed(value: str | None, name: str) -> str:
    if value is None:
        raise FastpoError(f"--{name} is missing; it should be a JSONL file")
    return value


def _model_and_codec(config: Config) -> tuple[Any, Codec, Accelerator]:
    if config.model in BUILT_MODELS:
        raise FastpoError(
            f"model {config.model} is untrained; give a directory or Hub name, such as runs/demo/iteration_3/model"
        )
    accelerator = make_accelerator(config)
    codec = Codec(load_tokenizer(config.model), config, context_of(config))
    return load_model(config.model, config.dtype).to(accelerator.device), codec, accelerator


def _out(default: str | None, help: str = "the file to write") -> tuple[str, dict[str, Any]]:
    return "--out", {"default": default, "help": help}


def _input(help: str) -> tuple[str, dict[str, Any]]:
    return "--input", {"default": None, "help": help}


_DRY_RUN = ("--dry_run", {"action": "store_true", "help": "check everything and say what would run; write nothing"})
_CONVERT = (
    _input("one of GSM8K's files"),
    _out("converted.jsonl"),
    ("--holdout", {"type": float, "default": 0.0, "help": "share of the problems that goes to OUT.heldout.jsonl"}),
    ("--limit", {"type": int, "default": 16, "help": "most pairs per problem"}),
    ("--keep_calculator", {"action": "store_true", "help": "keep annotations such as <<48/2=24>>"}),
)
# The keys that each command uses: those of its recipe count, others do nothing, and on the command line are refused.
_MODEL = ("model", "dtype", "context_length", "mixed_precision")
_TEXT = ("prompt_template", "chat_template", "skip_bad")
_PROMPTS = (*_TEXT, "data", "eval_data", "eval_prompts", "seed", "max_new_tokens", "sample_batch_size")
_REWARD = ("reward", "on_reward_error", "win_threshold")
_SAMPLE = (*_MODEL, *_PROMPTS, "prompts_per_iteration", "num_samples", "temperature", "top_p", "top_k")
_PAIRS = (*_REWARD, "pair_rule", "pairs_per_prompt", "gold_wins", "vote_threshold", "length_rho", "length_penalty")
_SCORE = (*_MODEL, *_TEXT, "micro_batch_tokens", "sharing")
_EVALUATE = (*_MODEL, *_PROMPTS, *_REWARD, "micro_batch_tokens", "report_samples")

run_convert.__doc__ = convert.__doc__
COMMANDS = {
    command.name: command
    for command in (
        Command("demo", run_demo, tuple(key_types()), (_DRY_RUN,), recipe="demo"),
        Command("train", run_train, tuple(key_types()), (_DRY_RUN,)),
        Command("sample", run_sample, _SAMPLE, (_out("samples.jsonl"),)),
        Command("pairs", run_pairs, _PAIRS, (_input("what fastpo sample wrote"), _out("preferences.jsonl"))),
        Command(
            "score",
            run_score,
            _SCORE,
            (_input("responses to score, where no FILE is given"), _out("scores.jsonl")),
            subject=("file", "responses to score"),
            subject_optional=True,
        ),
        Command("evaluate", run_evaluate, _EVALUATE, (_out(None, "JSON file for the numbers and some answers"),)),
        Command("report", run_report, (), subject=("directory", "a run's output_dir")),
        Command("convert", run_convert, (), _CONVERT, subject=("format", "gsm8k")),
    )
}
