"""One analysis from end to end: of recorded traces, or of a model that is run for it. `emoe analyze` calls it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emoe.analysis import correlation, recording, sets, workload
from emoe.analysis.timeline import Timeline
from emoe.errors import ConfigError, TraceError
from emoe.replay import slots_of
from emoe.replay.mix import PROMPT_TOKENS, into_prompts
from emoe.sensitivity import SensitivityProfile
from emoe.tasks import Prompt, load_prompts
from emoe.trace.trace import Trace, join, load_trace

LEAST_PROMPTS = 4  # of some task
REQUESTS = 121  # the first serves to choose the first base set, the others are two periods of 60
REQUESTS_QUICK = 31
NEW_TOKENS = 24
PROFILED = 2  # prompts of each task whose sensitivity is measured
STRIDE = 5  # layers between two measurements
ANSWERS = 4  # prompts that the timeline answers


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows; what was not measured is None.

    Attributes:
        facts: what was analysed: model, tokens, prompts, layers and so on.
    """

    facts: dict[str, Any]
    correlations: correlation.Correlations
    hit_rates: sets.HitRates
    overlap: sets.Overlap
    periods: list[workload.Period]
    sensitivity: SensitivityProfile | None
    timeline: Timeline | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "facts": self.facts,
            "correlations": self.correlations.to_dict(),
            "sensitivity": self.sensitivity.to_dict() if self.sensitivity else None,
            "periods": [period.to_dict() for period in self.periods],
            "hit_rates": self.hit_rates.to_dict(),
            "overlap": self.overlap.to_dict(),
            "timeline": self.timeline.summary() if self.timeline else None,
        }


def of_traces(
    paths: Sequence[Path], *, resident: float = 0.3, prompt_tokens: int = PROMPT_TOKENS, quick: bool = False
) -> Analysis:
    """Analyses recorded routing; quality and time need a model and are left out.

    Args:
        paths: traces of one model (docs/traces.md).
        resident: share of the experts in base sets and hot sets.
        prompt_tokens: length of a prompt where a trace names none.
        quick: fewer budgets and requests.

    Raises:
        TraceError, ConfigError: a trace cannot be read, or is too short for the experiments.
    """
    trace = join([into_prompts(load_trace(path), prompt_tokens) for path in paths])
    facts = {"traces": [str(path) for path in paths], "model": trace.meta.get("model", "")}
    return _of_trace(trace, facts, resident, quick)


def of_model(
    path: str,
    tokenizer: Any,
    prompts_file: Path,
    folder: Path,
    *,
    resident: float = 0.3,
    dtype: str = "auto",
    quick: bool = False,
) -> Analysis:
    """Runs a model over prompts and analyses that; writes `trace.npz` and `timeline.json` into `folder`.

    Args:
        path: a checkpoint, as for `emoe.from_pretrained`.
        tokenizer: its own.
        prompts_file: JSON lines (`emoe.tasks.load_prompts`).
        folder: exists.
        resident: share of the experts in memory.
        quick: two tasks, fewer budgets, requests and tokens.

    Raises:
        EmoeError: the model, the prompts or the folder will not do; says why.
    """
    import emoe

    prompts = load_prompts(prompts_file)
    if not _of_each_task(prompts, LEAST_PROMPTS - 1):
        raise ConfigError(
            f"{prompts_file} has no task with at least {LEAST_PROMPTS} prompts; policies learn from half of them"
        )
    if quick:
        first = list(dict.fromkeys(prompt.task for prompt in prompts))[:2]
        some = [prompt for number in range(LEAST_PROMPTS) for prompt in _of_each_task(prompts, number)]
        prompts = [prompt for prompt in some if prompt.task in first]
    longest = max(recording.encode(tokenizer, prompt).shape[1] for prompt in prompts)
    model = emoe.from_pretrained(path, memory_budget=resident, dtype=dtype, context=longest + NEW_TOKENS)
    try:
        with _bar("recording routing", len(prompts)) as step:
            recorded = recording.record(model, tokenizer, prompts, folder / "trace.npz", step)
        some = _of_each_task(prompts, 0)[: 1 if quick else ANSWERS]
        with _bar("timeline of answers", len(some)) as step:
            timeline = recording.answer(model, tokenizer, some, 4 if quick else NEW_TOKENS, step)
        timeline.save(folder / "timeline.json")
        trace = recorded.trace
        order = _order(trace, quick)
        periods = (10,) if quick else workload.PERIODS
        picks = workload.picks_of(trace)
        seconds = [math.inf] * len(recorded.texts)
        found = []
        with _bar("periods of refresh", len(periods) * (len(order) - 1)) as step:
            for period in periods:
                found.append(
                    workload.serve(model, recorded.texts, picks, order, period, recorded.losses, seconds, step)
                )
        found = [replace(each, forward_ms=workload.mean_ms(seconds, order)) for each in found]
        few = [prompt for each in range(1 if quick else PROFILED) for prompt in _of_each_task(prompts, each)]
        with _bar("sensitivity", 1) as step:
            profile = recording.profile_sensitivity(model, tokenizer, few, 100 if quick else STRIDE)
            step()
        tokens = sum(text.shape[1] - 1 for text in recorded.texts)
        facts = {
            "model": path,
            "prompts_file": str(prompts_file),
            "kind": type(model).__name__,
            "perplexity": math.exp(sum(recorded.losses) / tokens),
            "isa": model.emoe.stats()["isa"],
            "slot_bytes": model.emoe.stats()["slot_bytes"],
        }
    finally:
        model.emoe.close(restore=False)
    return _of_trace(trace, facts, resident, quick, found, profile, timeline)


def _of_trace(
    trace: Trace,
    facts: dict[str, Any],
    resident: float,
    quick: bool,
    periods: list[workload.Period] | None = None,
    sensitivity: SensitivityProfile | None = None,
    timeline: Timeline | None = None,
) -> Analysis:
    tasks = [trace.task_names[task] for task in np.unique(trace.task)]
    order = _order(trace, quick)
    if periods is None:
        sizes = [slots_of(resident, trace.num_experts)] * trace.layers
        picks = workload.picks_of(trace)
        periods = [workload.cover(picks, order, period, sizes, trace.num_experts) for period in workload.PERIODS]
    shares = sets.SHARES[2::3] if quick else sets.SHARES
    with _bar("correlations", 1) as step:
        correlations = correlation.correlate(trace)
        step()
    with _bar("policies", len(sets.LOADING) + len(sets.GOING_WITHOUT)) as step:
        rates = sets.hit_rates(trace, shares, on_step=lambda name: step())
    facts = {
        **facts,
        "tokens": trace.tokens,
        "prompts": len(np.unique(trace.prompt)),
        "tasks": tasks,
        "layers": trace.layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "resident": resident,
        "requests": len(order),
        "quick": quick,
    }
    return Analysis(facts, correlations, rates, sets.overlap(trace, resident), periods, sensitivity, timeline)


def _order(trace: Trace, quick: bool) -> list[int]:
    """The workload of experiment 2, as places in the ascending numbers of the prompts."""
    _, first = np.unique(trace.prompt, return_index=True)
    if not len(first):
        raise TraceError("the trace has no tokens to analyse")
    return workload.draw(trace.task[first].tolist(), REQUESTS_QUICK if quick else REQUESTS)


def _of_each_task(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """The prompt of this number of each task that has so many."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    return [each[number] for each in by_task.values() if number < len(each)]


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[], None]]:
    with tqdm(total=total, desc=name, file=sys.stderr, unit="step") as bar:
        yield lambda: bar.update() and None
