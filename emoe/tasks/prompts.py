"""Prompts with their task, from a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emoe.errors import ConfigError

SPLITS = ("train", "dev", "test")


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
        split: only this one.
        tasks: only these.

    Raises:
        ConfigError: the file cannot be read, a line is not such an object, a task is not in the file, or no prompt is
            left. Names file and line.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts {str(path)!r} cannot be read: {error}") from error
    found = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    known = sorted({prompt.task for prompt in found})
    for task in tasks or ():
        if task not in known:
            raise ConfigError(f"{path}: no prompts of task {task!r}; its tasks are: {', '.join(known)}")
    chosen = [
        prompt for prompt in found if (split is None or prompt.split == split) and (not tasks or prompt.task in tasks)
    ]
    if not chosen:
        raise ConfigError(f"{path}: no prompts" + (f" of split {split!r}" if split else ""))
    return chosen


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("task"), str) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f"{where}: expected an object with the texts 'task' and 'prompt'")
    split = row.get("split", "train")
    if split not in SPLITS:
        raise ConfigError(f"{where}: split {split!r} is not one of: {', '.join(SPLITS)}")
    return Prompt(row["task"], row["prompt"], str(row.get("reference") or ""), split)
