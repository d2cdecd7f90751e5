"""The command line: ``fastpo COMMAND [RECIPE] [--key value ...]``. Errors become one line and an exit code."""

import argparse
import copy
import dataclasses
import inspect
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fastpo import config as keys
from fastpo.config import Config, read_recipe
from fastpo.errors import FastpoError, suggestion
from fastpo.memory import keep_freed_memory

OVERVIEW = """\
fastpo: iterative preference optimization of language models.

usage: fastpo COMMAND [RECIPE] [--key value ...]       fastpo COMMAND --help says more, with an example

a whole run
  demo       the embedded task from nothing to a better model, in minutes on a CPU, no downloads
  train      iterations of sample, reward, pairs, reference, train, evaluate; goes on where it was stopped
  report     report.html of a run: curves, tables, sample answers

its stages alone, on files
  sample     responses to prompts                       prompts.jsonl   -> samples.jsonl
  pairs      rewards and preference pairs               samples.jsonl   -> preferences.jsonl
  score      log-probs of responses under a model       responses.jsonl -> scores.jsonl
  evaluate   greedy accuracy on held-out problems       problems.jsonl  -> evaluation.json

around it
  convert    GSM8K's published files to fastpo's
  info       what this installation can run, and why the rest is off

settings: a flat set of keys. Defaults, then RECIPE (a YAML file, or a shipped one: irpo, scpo, spin, self_rewarding:
docs/methods.md has all), then the command line; --num_samples and --num-samples are the same.

exit codes
  0    done
  1    the run failed: no pairs, a reward that raised, a full disk, a crash. Finished stages are kept: run it again
  2    wrong usage or bad input, found before any work
  130  interrupted; finished stages are kept
"""


@dataclass(frozen=True)
class Command:
    """A subcommand. The docstring of ``run`` is its help."""

    name: str
    run: Callable[[Config, argparse.Namespace], None]
    keys: tuple[str, ...]  # of the config, those that it uses: it takes no others
    arguments: tuple[tuple[str, dict[str, Any]], ...] = ()  # of its own
    recipe: str | None = None  # the recipe where none is given
    subject: tuple[str, str] | None = None  # what stands in place of a recipe: name and help
    subject_optional: bool = False


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each option, and no default where there is none."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(120, max(80, _terminal_width())))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        flag = action.nargs in (0, "?")
        return action.option_strings[0] + ("" if flag else f" {self._format_args(action, self._metavar(action))}")

    def _metavar(self, action: argparse.Action) -> str:
        if action.choices is not None:
            return "{" + ",".join(map(str, action.choices)) + "}"
        return {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""), "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: {' '.join(map(str, _as_list(action.default)))})"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [repr(value) if isinstance(value, str) else value]


def _terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def parse(command: Command, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The config (defaults, recipe, command line) and the command's own arguments.

    A recipe holds keys of all stages, so that one file serves all commands, and each takes what it uses. On the command
    line a key that the command does not use is refused. ``given`` of the arguments: the keys on the command line.
    """
    parser = _parser(command)
    absent = object()
    unset = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    first, unknown = parser.parse_known_args(argv, unset)
    if unknown:
        raise FastpoError(_refusal(command, parser, unknown[0].split("=")[0]))
    words = {name: value for name, value in vars(first).items() if value is not absent}
    given = frozenset(name for name in words if name in command.keys)
    recipe = (None if command.subject else words.get("recipe")) or command.recipe
    values = read_recipe(recipe) if recipe else {}
    parser.set_defaults(**values)
    namespace = parser.parse_args(argv)
    parsed = {name: value for name, value in vars(namespace).items() if name in keys.key_types()}
    _drop_embedded_start(parsed, values, given)
    namespace.given = given
    return Config(**{**values, **parsed}), namespace


def _refusal(command: Command, parser: argparse.ArgumentParser, option: str) -> str:
    """Why ``command`` does not take ``option``: a key of other commands, a slip of the hand, or nothing known."""
    name = option.lstrip("-").replace("-", "_")
    if name.removeprefix("no_") in keys.key_types() or name in keys.key_types():
        taken = [*(own.lstrip("-") for own, _ in command.arguments), *command.keys]
        return f"{command.name} does not use {option}; it takes {', '.join(taken) or 'no keys'}"
    options = [o.lstrip("-") for action in parser._actions for o in action.option_strings]
    return f"{command.name} has no option {option}{suggestion(name, options)} (fastpo {command.name} --help)"


def _drop_embedded_start(parsed: dict[str, Any], recipe: dict[str, Any], given: frozenset[str]) -> None:
    """A model given in place of a recipe's embedded one comes without the embedded warm start, unless that is given."""
    embedded = "embedded" == recipe.get("model") == recipe.get("warm_start")
    if embedded and parsed.get("model") != "embedded" and not any(name.startswith("warm_start") for name in given):
        parsed["warm_start"] = None


def _parser(command: Command) -> argparse.ArgumentParser:
    from transformers.hf_argparser import HfArgumentParser

    subject, subject_help = command.subject or (
        "recipe",
        "YAML file of keys, or a shipped one: irpo, scpo, spin, self_rewarding, ...; docs/methods.md lists them",
    )

    optional = command.subject is None or command.subject_optional

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise FastpoError(f"{message} (fastpo {command.name} --help)")

    parser = Parser(
        [],
        prog=f"fastpo {command.name}",
        usage=f"fastpo {command.name} {f'[{subject.upper()}]' if optional else subject.upper()} [--key value ...]",
        description=inspect.getdoc(command.run),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument(subject, nargs="?" if optional else None, help=subject_help)
    for name, settings in command.arguments:
        parser.add_argument(name, *_dashed(name), **settings)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for group in keys.GROUPS:
        used = [field for field in dataclasses.fields(group) if field.name in command.keys]
        section = parser.add_argument_group(group._argument_group_name) if used else parser
        for field in used:
            parser._parse_dataclass_field(section, copy.copy(field))  # type: ignore[arg-type]
    for action in parser._actions:
        if action.type in (int, float, str) and action.default is None and action.option_strings:
            action.type = _optional(action.type)
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = f"not {action.option_strings[0].removeprefix('--no_')}"
    return parser


def _dashed(name: str) -> list[str]:
    dashed = "--" + name[2:].replace("_", "-")
    return [dashed] if dashed != name else []


def _optional(kind: type) -> Callable[[str], Any]:
    """``kind``, or None where the text is ``none``."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(OVERVIEW)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from fastpo import __version__

        print(f"fastpo {__version__}")
        return 0
    debug = "--debug" in argv
    try:
        return _run(argv[0], argv[1:])
    except FastpoError as error:
        return _fail(error, error.exit_code, debug)
    except ValueError as error:
        return _fail(error, 2, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(error, 1, debug)
    except KeyboardInterrupt:
        print("\ninterrupted; finished stages are kept: the same command goes on from there", file=sys.stderr)
        return 130


def entry() -> NoReturn:
    """The process of the command line. One of several leaves at once: gloo's threads may abort an orderly exit."""
    keep_freed_memory()
    code = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code == 0:
        distributed.barrier()  # no process leaves while another still talks to it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"fastpo: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _run(name: str, argv: list[str]) -> int:
    if name == "info":
        from fastpo import info

        if argv in (["--help"], ["-h"]):
            print(info.__doc__)
            return 0
        return info.main(argv)
    from fastpo import commands

    if name not in commands.COMMANDS:
        known = [*commands.COMMANDS, "info"]
        raise FastpoError(f"there is no command {name!r}{suggestion(name, known)} (one of {', '.join(known)})")
    _quiet_libraries()
    config, arguments = parse(commands.COMMANDS[name], argv)
    commands.COMMANDS[name].run(config, arguments)
    return 0


def _quiet_libraries() -> None:
    """Our own lines only: warnings of fastpo to stderr, no bars or notices of transformers."""
    logging.basicConfig(format="fastpo: %(message)s", level=logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
