"""Experiment 2 of arXiv 2503.06823: one base set serves p requests, then it is chosen again from recent routing.

A workload is an order of requests. `cover` counts on recorded routing what base sets cover; `serve` runs a model with
them in mode `resident` and has quality and latency as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emoe.predictor.table import Recent
from emoe.routing import attach
from emoe.runtime import runtime_of
from emoe.slots.resident import CacheResidency
from emoe.trace.trace import Trace

Mask = NDArray[np.bool_]

PERIODS = (10, 20, 40, 60)
STRETCH = (8, 24)  # requests of one task in a row


@dataclass(frozen=True)
class Period:
    """What base sets refreshed every `period` requests did. Rates are means over requests.

    Attributes:
        coverage: share of the router's picks that the base set has.
        moves: experts brought into slots by refreshes, per request.
        perplexity: of the requests' texts in mode `resident`; None without a model, as all below.
        exact_perplexity: the same with every expert.
        substituted_mass: mean share of router mass that was substituted.
        forward_ms: time of one request's forward, of its whole text; of a text's forwards under all base sets the
            shortest counts, since it has the least of what else the machine did.
        refresh_ms: time of the refreshes, per request.
    """

    period: int
    coverage: float
    moves: float
    perplexity: float | None = None
    exact_perplexity: float | None = None
    substituted_mass: float | None = None
    forward_ms: float | None = None
    refresh_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def draw(tasks: Sequence[int], requests: int, seed: int = 0) -> list[int]:
    """An order of requests: stretches of STRETCH requests of one task, tasks and prompts drawn at random.

    Args:
        tasks: the task of each prompt.

    Returns:
        Numbers of prompts; one is drawn again only when its task has no other left.
    """
    rng = np.random.default_rng(seed)
    by_task = {task: [number for number, each in enumerate(tasks) if each == task] for task in dict.fromkeys(tasks)}
    left: dict[int, list[int]] = {task: [] for task in by_task}
    order: list[int] = []
    last = -1
    while len(order) < requests:
        others = [task for task in by_task if task != last] or list(by_task)
        last = int(rng.choice(others))
        for _ in range(int(rng.integers(STRETCH[0], STRETCH[1] + 1))):
            if not left[last]:
                left[last] = rng.permutation(by_task[last]).tolist()
            order.append(left[last].pop())
    return order[:requests]


def segments(
    picks: Sequence[NDArray[Any]], order: Sequence[int], period: int, sizes: Any, experts: int
) -> Iterator[tuple[Mask, Sequence[int]]]:
    """The base sets, each with the requests that it serves.

    The first request runs before any base set and serves to choose the first.

    Args:
        picks: of each prompt, [L, T, K] as the full model routes it.
        order: prompts' numbers; the first is not in any segment.
        sizes: [L] experts in the base set of each layer.
        experts: of a layer.

    Yields:
        mask [L, E], prompts' numbers.
    """
    recent = Recent(len(sizes), experts)

    def observe(prompts: Sequence[int]) -> None:
        for prompt in prompts:
            recent.begin(0)
            recent.observe(picks[prompt])

    observe(order[:1])
    for start in range(1, len(order), period):
        ranks = np.argsort(np.argsort(-recent.rank(), axis=1, kind="stable"), axis=1)
        served = order[start : start + period]
        yield ranks < np.asarray(sizes)[:, None], served
        observe(served)


def cover(picks: Sequence[NDArray[Any]], order: Sequence[int], period: int, sizes: Any, experts: int) -> Period:
    """Coverage and moves, from recorded routing alone. Arguments as of `segments`."""
    rows = np.arange(len(sizes))[:, None, None]
    covered, total, moves = 0.0, 0, 0
    before: Mask | None = None
    for base, served in segments(picks, order, period, sizes, experts):
        moves += int((base if before is None else base & ~before).sum())
        before = base
        for prompt in served:
            each = picks[prompt]
            valid = each >= 0
            covered += (base[rows, np.where(valid, each, 0)] & valid).sum() / valid.sum()
            total += 1
    return Period(period, float(covered / max(1, total)), moves / max(1, total))


def serve(
    model: Any,
    texts: Sequence[torch.Tensor],
    picks: Sequence[NDArray[Any]],
    order: Sequence[int],
    period: int,
    exact_loss: Sequence[float],
    seconds: list[float],
    on_step: Callable[[], None] = lambda: None,
) -> Period:
    """Runs a workload on a model under emoe in mode `exact`, which gets `resident` for as long as this runs.

    A text that comes twice under one base set is computed once and counted twice.

    Args:
        texts: of each prompt, token ids [1, S].
        picks: of each prompt, as of `segments`.
        exact_loss: of each prompt, the sum of the negative log likelihoods of all tokens but the first.
        seconds: of each prompt, the shortest forward so far; updated.
        on_step: called after each request.
    """
    runtime = runtime_of(model)
    experts = [layer.num_experts for layer in runtime.layers]
    sizes = [runtime.loader.capacity(layer) for layer in range(len(experts))]
    counted = cover(picks, order, period, sizes, max(experts))
    loss = exact = refresh = 0.0
    tokens = requests = 0
    with attach(model, CacheResidency(runtime.cache, experts), routing="resident") as routing:
        for base, served in segments(picks, order, period, sizes, max(experts)):
            started = time.perf_counter()
            place(model, base)
            refresh += time.perf_counter() - started
            known: dict[int, float] = {}
            for prompt in served:
                if prompt not in known:
                    started = time.perf_counter()
                    known[prompt] = text_loss(model, texts[prompt])
                    seconds[prompt] = min(seconds[prompt], time.perf_counter() - started)
                loss += known[prompt]
                exact += exact_loss[prompt]
                tokens += texts[prompt].shape[1] - 1
                requests += 1
                on_step()
        mass = routing.stats()["substituted_mass"]
    return Period(
        period=period,
        coverage=counted.coverage,
        moves=counted.moves,
        perplexity=math.exp(loss / tokens),
        exact_perplexity=math.exp(exact / tokens),
        substituted_mass=mass,
        forward_ms=mean_ms(seconds, order),
        refresh_ms=1e3 * refresh / requests,
    )


def mean_ms(seconds: Sequence[float], order: Sequence[int]) -> float:
    """Mean milliseconds of the requests that a workload serves, from those of each prompt."""
    return 1e3 * float(np.mean([seconds[prompt] for prompt in order[1:]]))


def place(model: Any, base: Mask) -> None:
    """Makes a base set [L, E] resident, and returns when it is: at most as many experts a layer as it has slots."""
    loader = runtime_of(model).loader
    for layer, row in enumerate(base):
        for _ in loader.rounds(layer, np.flatnonzero(row).tolist(), together=True):
            pass


@torch.no_grad()
def text_loss(model: Any, ids: torch.Tensor) -> float:
    """Sum of the negative log likelihoods of every token but the first of a text [1, S]."""
    logits = model(ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def picks_of(trace: Trace) -> list[NDArray[np.int16]]:
    """[L, T, K] of each prompt, in ascending order of their numbers."""
    return [trace.experts[:, trace.prompt == prompt] for prompt in np.unique(trace.prompt)]
