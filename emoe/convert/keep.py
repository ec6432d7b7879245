"""Which layers' experts keep more bits for the sake of tasks: those whose own experts the tasks' answers depend on.

The measure is that of `emoe profile sensitivity`: how similar next-token distributions stay while the experts of the
first 1, 2, ... layers are drawn at random. What a task loses with a layer more is its need of that layer. A layer is
the unit since all experts of one lie in slots alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import emoe
from emoe import generate
from emoe.errors import ConfigError
from emoe.sensitivity import Sample, measure
from emoe.tasks import load_prompts

SHARE = 0.5  # of what a task loses in all that the layers it keeps account for
PROMPTS, TOKENS, DEPTHS = 4, 32, 12  # of a task; of an answer; measurements along the layers, about


def needed(loss: NDArray[np.float64], share: float = SHARE) -> frozenset[int]:
    """The fewest layers that account for a share of every task's loss.

    Args:
        loss: [tasks, L] of each layer; what is below zero counts as none.
    """
    found: set[int] = set()
    for row in np.maximum(loss, 0):
        order = np.argsort(-row, kind="stable")
        sums = np.cumsum(row[order])
        if sums[-1] > 0:
            found.update(order[: int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-9))) + 1].tolist())
    return frozenset(found)


def layers_to_keep(
    folder: Path, prompts: str | Path, memory: int, on_step: Callable[[int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Measures a checkpoint on labelled prompts.

    Args:
        prompts: JSON lines as `emoe profile` takes them; the train split counts, the first prompts of each task.
        memory: bytes of the model, as `memory_budget` of `emoe.from_pretrained`.
        on_step: told (forwards done, forwards in all).

    Returns:
        "layers": those to keep, ascending; "tasks": names; "loss": by task, of each layer.

    Raises:
        ConfigError: the prompts cannot be read, or there are none.
        BudgetError, UnsupportedModelError: as `emoe.from_pretrained` and `emoe.sensitivity.measure`.
    """
    samples = _samples(generate.load_tokenizer(str(folder)), load_prompts(prompts, "train"))
    longest = max(len(sample.input_ids) for sample in samples) + TOKENS
    model = emoe.from_pretrained(folder, memory_budget=memory, context=longest)
    try:
        layers = len(model.emoe.plan.experts_per_layer)
        stride = max(1, layers // DEPTHS)
        profile = measure(model, samples, new_tokens=TOKENS, stride=stride, on_step=on_step)
    finally:
        model.emoe.close(restore=False)
    loss = -np.diff(profile.similarity, axis=1)
    return {
        "layers": sorted(needed(loss)),
        "tasks": list(profile.tasks),
        "loss": {task: row.round(5).tolist() for task, row in zip(profile.tasks, loss, strict=True)},
    }


def _samples(tokenizer: Any, prompts: list[Any]) -> list[Sample]:
    counts: dict[str, int] = {}
    found = []
    for prompt in prompts:
        counts[prompt.task] = counts.get(prompt.task, 0) + 1
        if counts[prompt.task] <= PROMPTS:
            answer = tokenizer(prompt.reference, add_special_tokens=False)["input_ids"] if prompt.reference else ()
            ids = generate.encode(tokenizer, prompt.prompt)
            found.append(Sample(prompt.task, tuple(ids[0].tolist()), tuple(answer)))
    if not found:
        raise ConfigError("there are no prompts to measure on")
    return found
