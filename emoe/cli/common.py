"""What the commands share: arguments, output, and wording."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe import options
from emoe.errors import CheckpointError, ConfigError, EmoeError, one_line
from emoe.files import content
from emoe.model.config import require_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONTROL = dict.fromkeys((*range(9), *range(11, 32), 127))
_LARGEST_PROMPT = 64 << 20  # bytes


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, --verbose and --debug, where the command has not defined them itself."""
    group = parser.add_argument_group("output")
    for names, action in (
        (("--json",), {"action": "store_true", "help": "one JSON object on stdout; everything else goes to stderr"}),
        (("-v", "--verbose"), {"action": "store_true", "help": "log what emoe decides to stderr"}),
        (("--debug",), {"action": "store_true", "help": "log everything, and show tracebacks of errors"}),
    ):
        with contextlib.suppress(argparse.ArgumentError):
            group.add_argument(*names, **action)  # type: ignore[arg-type]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, and the options of what is in memory that do not depend on how it runs."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        type=model_path,
        help="checkpoint folder, GGUF file, or a hub id such as Qwen/Qwen3-30B-A3B",
    )
    options.add_arguments(parser, ("memory_budget", "dtype"))


def add_trust_argument(parser: Any) -> None:
    """--trust-remote-code."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the checkpoint brings; read it first",
    )


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def share(text: str) -> float:
    """An argparse type: 0.25 or 25%, over 0 and up to 1."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share over 0 and up to 1, such as 0.25 or 25%")
    return value


def nbytes(text: str) -> int:
    """An argparse type: 2GiB, 1500M."""
    with contextlib.suppress(ConfigError):
        budget = options.parse_budget(text, "bytes")
        if budget.kind == "bytes":
            return budget.nbytes
    raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 2GiB or 1500M")


def model_path(text: str) -> str:
    """An argparse type: an existing checkpoint folder, or what may be a hub id."""
    path = Path(text).expanduser()
    here = path.exists() or text[:1] in ("~", "/")
    try:
        require_checkpoint(path if here else text)
    except EmoeError as error:
        raise argparse.ArgumentTypeError(one_line(error)) from None
    if here:
        return str(path)
    if not _HUB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder here, and no hub id such as Qwen/Qwen3-30B-A3B")
    return text


def output_file(text: str) -> Path:
    """An argparse type: where a file can be written, in a folder that is there."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file")
    if not path.parent.is_dir():
        what = "is no folder" if path.parent.exists() else "is not there"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {str(path.parent)!r} {what}")
    _try_writing(text, path.parent)
    return path


def output_folder(text: str) -> Path:
    """An argparse type: a folder that files can be written to, or that can be made."""
    path = Path(text).expanduser()
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        what = "is a file; give a folder" if there == path else f"cannot be made: {str(there)!r} is a file"
        raise argparse.ArgumentTypeError(f"{text!r} {what}")
    _try_writing(text, there)
    return path


def _try_writing(text: str, folder: Path) -> None:
    """Permissions alone do not say it: the file system may be read-only, or the user root."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None


def set_up_output(args: argparse.Namespace) -> None:
    """Logging to stderr; text that the terminal cannot show is replaced rather than fatal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    level = logging.DEBUG if args.debug else logging.INFO if args.verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("emoe")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level)


def print_json(value: dict[str, Any]) -> None:
    """The one object on stdout."""
    print(json.dumps(value, indent=2, default=str))


def error_fields(error: Exception, message: str) -> dict[str, Any]:
    """An error for JSON: its message, its class, and the values it carries (BudgetError: needed, budget)."""
    fields: dict[str, Any] = {"error": message, "kind": type(error).__name__.lstrip("_")}
    for name in ("needed", "budget", "file", "tensor", "offset", "nbytes", "retry_after"):
        if isinstance(error, EmoeError) and hasattr(error, name):
            fields[name] = getattr(error, name)
    return fields


def console(*, stderr: bool = False) -> Console:
    """A rich console that marks nothing up on its own."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def printable(text: str) -> str:
    """Without control characters, so that a model cannot drive the terminal."""
    return text.translate(_CONTROL)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Lets an interrupt say what it interrupted: "while <what>"."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            raise
        raise KeyboardInterrupt(f"while {what}") from None


@contextlib.contextmanager
def checkpoint_errors(model: str) -> Iterator[None]:
    """Transformers' complaints about a checkpoint become CheckpointError, with the model's name."""
    try:
        yield
    except EmoeError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: {one_line(error)[:400]}", file=model) from error


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt of --prompt or --prompt-file, which may be a pipe; "-" is standard input.

    Raises:
        ConfigError: it is empty, or the file is not there or not UTF-8.
    """
    if prompt == "-" or file == "-":
        text, source = sys.stdin.read(), "standard input"
    elif file is not None:
        try:
            data = content(file, "prompt", ConfigError, most=_LARGEST_PROMPT, piped=True)
            text, source = data.decode("utf-8"), file
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {file!r} cannot be read: {error}") from error
    else:
        text, source = prompt or "", "--prompt"
    if not text.strip():
        raise ConfigError(f"the prompt of {source} is empty")
    return text.rstrip("\n")


@contextlib.contextmanager
def closing(model: Any) -> Iterator[None]:
    """The process ends after this, so the experts are given up; that needs no warning."""
    try:
        yield
    finally:
        logger = logging.getLogger("emoe.seam.attached")
        logger.setLevel(logging.ERROR)
        model.emoe.close(restore=False)
        logger.setLevel(logging.NOTSET)
