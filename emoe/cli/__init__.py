"""The command line: picks the command, sets up logging, and turns errors into one line and an exit status.

Nothing here imports torch: a command's own module does so when it runs, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from emoe import __version__
from emoe.cli import common
from emoe.errors import EmoeError, one_line

COMMANDS = {
    "run": "answer a prompt with a model held inside a byte budget",
    "plan": "say what fits into a budget, before anything is loaded",
    "serve": "answer many clients at once, over HTTP like OpenAI's",
    "calibrate": "measure what steps of a model cost on this machine, for the scheduler",
    "convert": "write a checkpoint anew with its experts in fewer bits",
    "demo": "build a small model and run it with a quarter of its experts in memory",
    "doctor": "say what was built, what this machine offers, and what is missing",
    "analyze": "report on routing: correlations, periods, hit rates, overlap of tasks, a timeline",
    "replay": "score eviction policies on a recorded routing trace",
    "train-predictor": "learn from recorded routing which experts prompts will use",
    "profile": "learn to tell tasks apart, or measure how much each needs its own experts",
}
EXIT_MISSING = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # what a shell reports for a program that ended by SIGPIPE

_EPILOG = """\
examples:
  emoe demo
  emoe doctor
  emoe plan --model ./Qwen3-30B-A3B --memory-budget 8GiB
  emoe run --model ./Qwen3-30B-A3B --memory-budget 8GiB --prompt "Why is the sky blue?"
  emoe serve --model ./Qwen3-30B-A3B --memory-budget 8GiB

Every command takes --json: one JSON object on stdout, everything else on stderr.
exit status: 0 done, 1 a check failed, 2 an error that the message explains, 130 interrupted
"""


class _UsageError(Exception):
    """What argparse would end the process for."""

    def __init__(self, prog: str, message: str) -> None:
        super().__init__(message)
        self.prog = prog


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(self.prog, message)


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only `command` gets its arguments, so that other commands' modules stay unloaded."""
    parser = _Parser(
        prog="emoe",
        description="Runs Mixture-of-Experts language models inside a byte budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"emoe {__version__}")
    children = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        child = children.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == command:
            _module(name).add_arguments(child)
            common.add_shared_arguments(child)
    return parser


def _module(command: str) -> Any:
    return import_module(f"emoe.cli.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; only --help and --version end the process themselves."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Options before the command take no value, so the first other word is the command.
    parser = _parser(next((word for word in words if not word.startswith("-")), None))
    json = "--json" in words
    try:
        args = parser.parse_args(words)
    except _UsageError as error:
        return _fail(error, json=json, prefix=f"{error.prog}: ", hint=f"see '{error.prog} --help'")
    if args.command is None:
        parser.print_help()
        return 0
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    common.set_up_output(args)
    try:
        code = int(_module(args.command).run(args) or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        detail = f" {interrupt}" if interrupt.args else ""
        print(f"emoe: interrupted{detail}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (EmoeError, OSError) as error:
        if args.debug:
            raise
        return _fail(error, json=args.json)


def _fail(error: Exception, *, json: bool, prefix: str = "emoe: ", hint: str = "") -> int:
    message = one_line(error)
    print(f"{prefix}{message}" + (f" ({hint})" if hint else ""), file=sys.stderr)
    if json:
        common.print_json(common.error_fields(error, message))
    return EXIT_ERROR
