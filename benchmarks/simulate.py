"""Serving on paper: thousands of requests, policies side by side, from routing traces; no model runs.

python benchmarks/simulate.py --traces FOLDER [--policies fcfs,sjf,slo,slo+affinity] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from emoe.engine.costs import Costs
from emoe.engine.expert_sets import ExpertSets
from emoe.engine.placement import CHOICES
from emoe.engine.scheduler import POLICIES, Scheduler, Ticket
from emoe.engine.simulator import Arrival, BaseSet, Replica, Report, flat_picks, predicted_experts, simulate
from emoe.trace.trace import Trace, load_trace


@dataclass(frozen=True)
class Machine:
    """What steps cost in truth, and what a model is there."""

    costs: Costs
    expert_bytes: int


MACHINES = {
    # Qwen3-30B-A3B in 4 bits, experts in host memory, 20 GB/s to the device.
    "gpu": Machine(Costs(forward=0.025, row=0.0002, byte=1 / 20e9, expert=4e-6), 2_650_000),
    # The same from an NVMe drive of 3 GB/s to a processor that reads its memory at 40 GB/s.
    "cpu": Machine(Costs(forward=0.02, row=0.004, byte=1 / 3e9, expert=2_650_000 / 40e9), 2_650_000),
}
MEAN_PROMPT = {"code": 160, "general": 60, "math": 100}
MEAN_OUTPUT = {"code": 240, "general": 120, "math": 320}


class Domains:
    """Traces of several domains: the first half of each is what a predictor learned from, the rest is replayed."""

    def __init__(self, traces: dict[str, Trace]) -> None:
        self.names = tuple(traces)
        first = next(iter(traces.values()))
        self.shape = (first.layers, first.num_experts)
        self.frequency: dict[str | None, NDArray[np.float64]] = {}
        self.places: dict[str, range] = {}
        rest, start = [], 0
        for name, trace in traces.items():
            half = trace.tokens // 2
            counts = np.zeros(self.shape)
            for layer in range(trace.layers):
                counts[layer] = np.bincount(trace.experts[layer, :half].ravel(), minlength=trace.num_experts)
            self.frequency[name] = counts / half
            self.top_k = trace.top_k
            rest.append(flat_picks(trace.take(slice(half, None))))
            self.places[name] = range(start, start + len(rest[-1]))
            start += len(rest[-1])
        self.frequency[None] = sum(self.frequency.values()) / len(traces)
        self.picks = np.concatenate(rest)


def workload(
    domains: Domains,
    *,
    requests: int,
    rate: float,
    kind: str,
    seed: int,
    slots: int,
    misclassified: float,
    kv_bytes_per_token: int,
    ttft: float | None,
    tpot: float | None,
) -> list[Arrival]:
    """Requests of a task mix: `poisson` and `bursty` uniform over tasks, `drifting` with a mix that turns."""
    random = np.random.default_rng(seed)
    experts = {name: predicted_experts(domains.frequency[name], slots) for name in domains.names}
    at = np.cumsum(_gaps(kind, requests, rate, random))
    arrivals = []
    for number in range(requests):
        mix = _mix(kind, number / requests, len(domains.names))
        task = domains.names[int(random.choice(len(mix), p=mix))]
        prompt = int(np.clip(random.gamma(4.0, MEAN_PROMPT.get(task, 100) / 4.0), 8, 500))
        output = int(np.clip(random.gamma(2.0, MEAN_OUTPUT.get(task, 100) / 2.0), 2, 800))
        span = domains.places[task]
        first = int(random.integers(span.start, span.stop - prompt - output))
        told = task
        if random.random() < misclassified:
            told = str(random.choice([name for name in domains.names if name != task]))
        ticket = Ticket(
            number, prompt, 800, kv_bytes_per_token * (prompt + 800), told, experts[told], ttft=ttft, tpot=tpot
        )
        arrivals.append(Arrival(float(at[number]), ticket, first, output, task))
    return arrivals


def _gaps(kind: str, requests: int, rate: float, random: np.random.Generator) -> NDArray[np.float64]:
    if kind == "bursty":  # gamma with a coefficient of variation of 2.5
        return random.gamma(0.16, 1 / (0.16 * rate), requests)
    return random.exponential(1 / rate, requests)


def _mix(kind: str, progress: float, tasks: int) -> NDArray[np.float64]:
    if kind != "drifting":
        return np.full(tasks, 1 / tasks)
    weights = 1 + 0.9 * np.cos(2 * np.pi * (2 * progress - np.arange(tasks) / tasks))
    return weights / weights.sum()


def run(
    policy: str, arrivals: Sequence[Arrival], domains: Domains, machine: Machine, args: argparse.Namespace, label: str
) -> Report:
    """One policy on one workload."""
    slots = round(args.resident * domains.shape[1])

    def made(resident: Any) -> Scheduler:
        return Scheduler(
            policy,
            costs=machine.costs,
            kv_bytes=args.kv_tokens * KV_BYTES,
            chunk_rows=args.chunk_rows,
            most_running=args.most_running,
            queue_limit=args.queue_limit,
            resident=resident,
            expert_bytes=machine.expert_bytes,
        )

    affine = policy == "slo+affinity"
    sets = ExpertSets()
    size = slots - domains.top_k
    replicas = [
        Replica(
            made,
            domains.picks,
            domains.shape,
            slots,
            machine.costs,
            machine.expert_bytes,
            sets,
            BaseSet(domains.frequency, size) if args.base == "all" or (args.base == "affinity" and affine) else None,
            args.noise,
            args.seed + number,
        )
        for number in range(args.replicas)
    ]
    with tqdm(total=len(arrivals), desc=label, unit="req", leave=False, disable=args.quiet) as bar:
        return simulate(arrivals, replicas, sets=sets, route=args.route if affine else "least", told=bar.update)


KV_BYTES = 98_304  # of a token: 48 layers, keys and values of 4 heads of 128, 16 bits


def short(f): return " ".join(f"{k} {v:.2f}" for k,v in f.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--machine", choices=MACHINES, default="gpu")
    parser.add_argument("--kind", choices=("poisson", "bursty", "drifting"), default="poisson")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rate", type=float, help="requests a second")
    parser.add_argument("--resident", type=float, default=0.3)
    parser.add_argument("--base", choices=("affinity", "all", "none"), default="affinity")
    parser.add_argument("--route", choices=CHOICES, default="affinity")
    parser.add_argument("--misclassified", type=float, default=0.0)
    parser.add_argument("--ttft", type=float, default=10.0)
    parser.add_argument("--tpot", type=float, default=0.6)
    parser.add_argument("--chunk-rows", type=int, default=128)
    parser.add_argument("--most-running", type=int, default=16)
    parser.add_argument("--kv-tokens", type=int, default=100_000)
    parser.add_argument("--queue-limit", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    domains = Domains({name: load_trace(args.traces / f"{name}.npz") for name in ("code", "general", "math")})
    machine = MACHINES[args.machine]
    results = {}
    for policy in args.policies.split(","):
        arrivals = workload(
            domains, requests=args.requests, rate=args.rate, kind=args.kind, seed=args.seed,
            slots=round(args.resident * domains.shape[1]), misclassified=args.misclassified,
            kv_bytes_per_token=KV_BYTES, ttft=args.ttft, tpot=args.tpot,
        )  # fmt: skip
        report = run(policy, arrivals, domains, machine, args, policy)
        results[policy] = figures = report.to_dict()
        print(
            f"{policy:14} attained {figures['attained']:.3f} tok/s {figures['tokens_per_second']:.1f} "
            f"MB/token {figures['loaded_bytes_per_token'] / 1e6:.0f} busy {figures['busy']:.2f} "
            f"ttft {short(figures['ttft'])} tpot {short(figures['tpot'])}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
