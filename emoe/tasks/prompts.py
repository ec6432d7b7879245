"""Prompts with their task, from a file of JSON lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emoe.errors import ConfigError
from emoe.files import jsontext, lines

SPLITS = ("train", "dev", "test")
_MOST_PIPED = 1 << 30  # bytes of prompts that come through a pipe


@dataclass(frozen=True)
class Prompt:
    """One labelled prompt.

    Attributes:
        task: its label.
        prompt: what a user writes.
        reference: a good answer, "" where there is none.
        split: "train", "dev" or "test".
    """

    task: str
    prompt: str
    reference: str = ""
    split: str = "train"


def load_prompts(path: str | Path, split: str | None = None, tasks: Sequence[str] | None = None) -> list[Prompt]:
    """Reads JSON lines with `task` and `prompt`, and where they are there `reference` and `split`.

    Args:
        path: a file or a pipe.
        split: only this one.
        tasks: only these.

    Raises:
        ConfigError: the file is not there (then a MissingFileError) or cannot be read, a line is not such an object, a
            task is not in the file, or no prompt is left. Names file and line.
    """
    numbered = lines(path, "file of prompts", ConfigError, piped=_MOST_PIPED)
    found = [_prompt(line, f"{path}:{number}") for number, line in numbered]
    return choose(found, path, split, tasks)


def choose(
    prompts: Sequence[Prompt], path: str | Path, split: str | None = None, tasks: Sequence[str] | None = None
) -> list[Prompt]:
    """Those of one split and of some tasks.

    Args:
        path: where they are from, for errors.

    Raises:
        ConfigError: a task is not among them, or no prompt is left; says what there is.
    """
    known = sorted({prompt.task for prompt in prompts})
    for task in tasks or ():
        if task not in known:
            raise ConfigError(f"{path}: no prompts of task {task!r}; its tasks are: {', '.join(known)}")
    mine = [prompt for prompt in prompts if not tasks or prompt.task in tasks]
    chosen = [prompt for prompt in mine if split is None or prompt.split == split]
    if mine and not chosen:
        counts = Counter(prompt.split for prompt in mine)
        there = ", ".join(f"{name} ({counts[name]})" for name in SPLITS if counts[name])
        raise ConfigError(f"{path}: no prompts of split {split!r}; its splits are: {there}")
    if not chosen:
        raise ConfigError(f"{path}: no prompts")
    return chosen


def _prompt(line: str, where: str) -> Prompt:
    row = jsontext.parse(line, lambda why: ConfigError(f"{where}: not a JSON object: {why}"))
    row = row if isinstance(row, dict) else {}
    task, prompt, reference = (row.get(name) or "" for name in ("task", "prompt", "reference"))
    if not all(isinstance(each, str) for each in (task, prompt, reference)) or not task or not prompt.strip():
        raise ConfigError(
            f"{where}: expected an object with the texts 'task' and 'prompt', neither empty, and maybe 'reference'"
        )
    split = row.get("split", "train")
    if split not in SPLITS:
        raise ConfigError(f"{where}: split {jsontext.shown(split)} is not one of: {', '.join(SPLITS)}")
    return Prompt(task, prompt, reference, split)
