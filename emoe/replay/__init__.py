"""Scores eviction and prediction on a recorded routing trace, without a model: `replay(trace, policy, resident)`.

Plain policies are those of `emoe.slots.policy`. `rows` runs them on all layers and budgets at once, `sequence` on one
set of slots for all layers, `reference` through `emoe.slots.cache` itself; the first two are tested against it.
`predicted` has the policies that predict, `mix` chooses profile and prompts. docs/traces.md explains all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emoe.errors import ConfigError, TraceError
from emoe.replay import predicted, reference, rows, sequence
from emoe.replay.counts import Counts
from emoe.replay.predicted import Options
from emoe.trace.trace import PREFILL, Trace

PLAIN = ("lru", "lfu", "lfru", "classlru", "next-use", "belady")
PREFILLS = ("tokens", "batch")
POLICIES = (*PLAIN, *predicted.POLICIES)

__all__ = ["PLAIN", "POLICIES", "Options", "Result", "check_policy", "replay", "slots_of"]


@dataclass(frozen=True)
class Result:
    """One policy at one budget.

    Attributes:
        policy: its name.
        resident: share of the routed experts that has a slot.
        slots: slots of one layer, or of all layers together where `per_layer` is false.
        picks: routed experts, summed over layers and tokens.
        hits: picks found in a slot; `misses` are the others.
        miss: what happened to those: "load" or "substitute".
        loads: experts read, `evictions` those that left for them.
        refreshes: times a base set was chosen; None where the policy has none.
        bytes_moved: bytes of the loads, None where the trace does not say how large an expert is.
        decode_hit_rate: hits over picks of the tokens that the trace calls decode; None: none, or not counted apart.
        layers: hit rate of each layer.
        seconds: what this replay took, shared between budgets that ran together.
    """

    policy: str
    resident: float
    slots: int
    per_layer: bool
    picks: int
    hits: int
    miss: str
    loads: int
    evictions: int
    refreshes: int | None
    bytes_moved: int | None
    decode_hit_rate: float | None
    layers: tuple[float, ...]
    seconds: float

    @property
    def misses(self) -> int:
        return self.picks - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits over picks, 0 to 1."""
        return self.hits / self.picks

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "misses": self.misses, "hit_rate": self.hit_rate}


def replay(
    trace: Trace,
    policy: str,
    resident: Sequence[float],
    *,
    per_layer: bool = True,
    profile: Trace | None = None,
    options: Options | None = None,
    prefill: str = "tokens",
) -> list[Result]:
    """Runs the tokens of a trace one by one through slots that start empty.

    Args:
        trace: what to run; `emoe.trace.trace.join` makes one of several.
        policy: one of POLICIES, or `predictor:PATH` of a file that `emoe train-predictor` wrote.
        resident: shares of the routed experts that have a slot, each over 0 and up to 1; one result each.
        per_layer: slots are divided between layers; False: one set of slots for all, which a token walks in a cycle.
        profile: what predicting policies learn from (`mix.prepare`).
        options: how they run.
        prefill: "tokens", or "batch": the prefill of each prompt is one step, in which each of its experts is picked
            once, as in a running model. For plain policies, on traces that tell prefill from decode.

    Raises:
        ConfigError: an unknown policy, a share that leaves a layer without a slot, or a predicting policy without a
            profile, without slots per layer, or with fewer slots than a token has picks.
        TraceError: the trace has no tokens.
    """
    check_policy(policy)
    if not (trace.experts >= 0).any():
        raise TraceError("the trace has no picks to replay")
    total = trace.num_experts * (1 if per_layer else trace.layers)
    slots = [slots_of(share, total) for share in resident]
    started = time.perf_counter()
    if prefill not in PREFILLS:
        raise ConfigError(f"prefill={prefill!r} is not one of: {', '.join(PREFILLS)}")
    batched = prefill == "batch"
    if batched and (policy not in PLAIN or not per_layer):
        raise ConfigError(f"prefill='batch' runs with slots in each layer and one of: {', '.join(PLAIN)}")
    if batched and not (trace.phase == PREFILL).any():
        raise TraceError("prefill='batch' needs a trace that says which tokens are prefill; this one has none")
    if policy in PLAIN:
        outcomes = [predicted.Outcome(each, "load", None) for each in _run(trace, policy, slots, per_layer, batched)]
    else:
        if not per_layer or min(slots) < trace.top_k:
            raise ConfigError(
                f"policy '{policy}' runs with at least {trace.top_k} slots in each layer (the picks of a token)"
            )
        outcomes = predicted.run(trace, profile, policy, slots, options or Options())
    seconds = (time.perf_counter() - started) / len(slots)
    return [
        _result(trace, policy, share, count, each, per_layer, seconds)
        for share, count, each in zip(resident, slots, outcomes, strict=True)
    ]


def check_policy(policy: str) -> None:
    """Raises ConfigError unless it is one of POLICIES or `predictor:PATH`."""
    if policy not in POLICIES and not policy.startswith(predicted.FROM_FILE):
        raise ConfigError(f"policy={policy!r} is not one of: {', '.join(POLICIES)}, {predicted.FROM_FILE}PATH")


def slots_of(share: float, experts: int) -> int:
    """Slots that a share of `experts` gives, to the nearest.

    Raises:
        ConfigError: it is not over 0 and up to 1, or gives no slot.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"resident={share} is not a share over 0 and up to 1")
    slots = int(share * experts + 0.5)
    if not slots:
        raise ConfigError(f"resident={share} of {experts} experts gives no slot; the least is {0.5 / experts:.4f}")
    return slots


def _run(trace: Trace, policy: str, slots: list[int], per_layer: bool, batched: bool) -> list[Counts]:
    if not per_layer and policy not in sequence.RUNNERS:
        raise ConfigError(f"policy '{policy}' runs with slots divided between layers, as in a running model")
    if batched or min(slots) < trace.top_k:  # a step may take several rounds, which only the cache itself tells apart
        return [reference.run(trace, policy, count, per_layer, batched=batched) for count in slots]
    if per_layer:
        return rows.run(trace, policy, slots)
    return [sequence.run(trace, policy, count) for count in slots]


def _result(
    trace: Trace, policy: str, share: float, slots: int, outcome: predicted.Outcome, per_layer: bool, seconds: float
) -> Result:
    counts = outcome.counts
    moved = None if trace.expert_bytes is None else int(counts.loads @ trace.expert_bytes)
    return Result(
        policy=policy,
        resident=share,
        slots=slots,
        per_layer=per_layer,
        picks=int(counts.picks.sum()),
        hits=int(counts.hits.sum()),
        miss=outcome.miss,
        loads=int(counts.loads.sum()),
        evictions=counts.evictions,
        refreshes=outcome.refreshes,
        bytes_moved=moved,
        decode_hit_rate=1 - (counts.decode_loads or 0) / counts.decode_picks if counts.decode_picks else None,
        layers=tuple((counts.hits / counts.picks.clip(1)).round(6).tolist()),
        seconds=seconds,
    )
