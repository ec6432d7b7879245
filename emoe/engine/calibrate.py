"""What steps of a model cost on this machine: short forwards, timed, and kept in the user's cache folder for a week."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoe.engine.costs import CostFit, Costs
from emoe.files import jsontext
from emoe.files.kept import Kept

ROWS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 8  # of all of ROWS, each once with tokens of its own and once with the same again, which loads little
_PASSES = 20  # of the fit over what was measured


@dataclass(frozen=True)
class Calibration:
    """Costs, and how well they foretell the forwards that they are from.

    Attributes:
        costs: seconds of the parts of a step.
        error: median of |forecast - seconds| / seconds.
        forwards: how many were timed; 0 where they came from the file.
    """

    costs: Costs
    error: float
    forwards: int


Forward = Callable[[Sequence[int]], tuple[float, int, int]]  # token ids -> seconds, loaded bytes, experts used


def measure(forward: Forward, vocabulary: int, *, told: Callable[[int], None] = lambda done: None) -> Calibration:
    """Times forwards of several lengths, with loads and without, and fits costs to them.

    Args:
        forward: runs one forward of these tokens and says what it took.
        vocabulary: token ids are below it.
        told: how many forwards were made since it was told last, of 2 * ROUNDS * len(ROWS), for a progress bar.
    """
    seen: list[tuple[int, int, int, float]] = []
    chance = random.Random(0)
    forward([0])  # the first one makes buffers
    for _ in range(ROUNDS):
        for rows in ROWS:
            ids = [chance.randrange(vocabulary) for _ in range(rows)]
            for _ in range(2):
                seconds, loaded, experts = forward(ids)
                seen.append((rows, loaded, experts, seconds))
                told(1)
    return fitted(seen, chance)


def fitted(seen: Sequence[tuple[int, int, int, float]], chance: random.Random) -> Calibration:
    """Costs that foretell (rows, loaded bytes, experts used, seconds) best, outliers aside."""
    least, most = min(seen), max(seen)
    quick = min(seconds for *_, seconds in seen)
    row = max(most[3] - least[3], 0.1 * quick) / max(1, most[0] - least[0])
    first = Costs(0.5 * quick, 0.5 * row, 1e-9, 0.1 * quick / max(1, least[2]))
    order = list(seen)
    fit = CostFit(first)
    for _ in range(_PASSES):
        chance.shuffle(order)
        for rows, loaded, experts, seconds in order:
            fit.saw(rows, loaded, experts, seconds)
    errors = sorted(abs(fit.costs.step(*each[:3]) - each[3]) / each[3] for each in seen)
    return Calibration(fit.costs, errors[len(errors) // 2], len(seen))


def forward_of(model: Any) -> tuple[Forward, int]:
    """A model's forward as `measure` wants it, and the size of its vocabulary."""
    import torch

    def counters() -> tuple[int, int]:
        stats = model.emoe.stats()
        return stats["demand_bytes"] + stats["prefetch_bytes"], stats["hits"] + stats["misses"]

    def forward(ids: Sequence[int]) -> tuple[float, int, int]:
        loaded, used = counters()
        with torch.inference_mode():
            started = time.perf_counter()
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
            seconds = time.perf_counter() - started
        loaded_now, used_now = counters()
        return seconds, loaded_now - loaded, used_now - used

    return forward, int(model.config.get_text_config(decoder=True).vocab_size)


def key_of(model: Any, path: str) -> str:
    """What costs depend on: the checkpoint, its budget and device, and how many threads compute."""
    import torch

    stats = model.emoe.stats()
    where = Path(path).resolve() if Path(path).exists() else path
    kernels = f"{stats['device']}|{stats['isa']}|{stats['threads']}"
    return f"{where}|{stats['budget_bytes']}|{kernels}|{torch.get_num_threads()}"


def kept(key: str) -> Calibration | None:
    """What was measured for this key within a week; None where nothing was."""
    entry = KEPT.get(key)
    return None if entry is None else Calibration(Costs(**entry["costs"]), entry["error"], 0)


def keep(key: str, calibration: Calibration) -> None:
    """Writes it to the file; where that cannot be done, a line in the log says so."""
    KEPT.put(key, {"costs": asdict(calibration.costs), "error": calibration.error})


def _check(entry: dict[str, Any]) -> None:
    costs = entry.get("costs")
    if not isinstance(costs, dict) or costs.keys() != asdict(Costs()).keys():
        raise ValueError(f"costs are {jsontext.shown(costs)}")
    for name, value in costs.items():
        jsontext.number(value, name, 0, 1e9)
    Costs(**costs)
    jsontext.number(entry.get("error"), "error", 0, 1e18)


KEPT = Kept("costs.json", "costs of steps", _check, seconds=7 * 24 * 3600)
