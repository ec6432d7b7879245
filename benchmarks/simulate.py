"""Serving on paper: thousands of requests, policies side by side, from routing traces; no model runs.

python benchmarks/simulate.py --traces FOLDER [--rate R] [--kind poisson] [--replicas 6] [--json FILE]

Requests are stretches of the second half of each trace; what the scheduler and the base set know of a task is counted
in the first half. docs/serving.md has figures.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common import write_result
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from emoe.engine.costs import Costs
from emoe.engine.expert_sets import ExpertSets
from emoe.engine.placement import CHOICES
from emoe.engine.scheduler import POLICIES, Expert, Scheduler, Ticket
from emoe.engine.simulator import NEVER, Arrival, BaseSet, Replica, Report, flat_picks, predicted_experts, simulate
from emoe.trace.trace import Trace, load_trace


@dataclass(frozen=True)
class Machine:
    """What steps cost in truth and as the scheduler is told at first, and what an expert takes there."""

    costs: Costs
    believed: Costs
    expert_bytes: int


EXPERT = 2_650_000  # bytes: Qwen3-30B-A3B in 4.5 bits
KV_BYTES = 98_304  # of a token: 48 layers, keys and values of 4 heads of 128, 16 bits
MACHINES = {
    # Experts in host memory, 20 GB/s to a device that reads its own at 660 GB/s. The scheduler is told half the speed.
    "gpu": Machine(Costs(0.025, 2e-4, 1 / 20e9, 4e-6), Costs(0.05, 4e-4, 1 / 10e9, 8e-6), EXPERT),
    # From an NVMe drive of 3 GB/s to a processor that reads its memory at 40 GB/s.
    "cpu": Machine(Costs(0.02, 4e-3, 1 / 3e9, EXPERT / 40e9), Costs(0.04, 8e-3, 1 / 1.5e9, EXPERT / 20e9), EXPERT),
}
# Outputs are twice as long as prompts, as in ShareGPT (161 and 338 tokens in the vLLM paper), both shorter: the traces
# have 4,000 tokens a domain to draw from.
MEAN_PROMPT = {"code": 160, "general": 60, "math": 100}
MEAN_OUTPUT = {"code": 240, "general": 120, "math": 320}
MOST_NEW = 800  # what every request asks for
OVERLOAD_RATE = 1.0  # requests a second and replica, some four times what it can serve
OVERLOAD_QUEUE = 2  # times the places of a replica, that wait there at most


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

    def sets(self, slots: int) -> dict[str, frozenset[Expert]]:
        """Predicted sets by task: the experts that it uses most, as many as there are slots."""
        return {name: predicted_experts(self.frequency[name], slots) for name in self.names}


def workload(
    domains: Domains,
    *,
    requests: int,
    rate: float,
    kind: str,
    seed: int,
    slots: int,
    misclassified: float,
    ttft: float | None,
    tpot: float | None,
) -> list[Arrival]:
    """Requests of a task mix: `poisson` and `bursty` uniform over tasks, `drifting` with a mix that turns."""
    random = np.random.default_rng(seed)
    experts = domains.sets(slots)
    at = np.cumsum(gaps(kind, requests, rate, random))
    arrivals = []
    for number in range(requests):
        mix = mix_at(kind, number / requests, len(domains.names))
        task = domains.names[int(random.choice(len(mix), p=mix))]
        prompt = int(np.clip(random.gamma(4.0, MEAN_PROMPT.get(task, 100) / 4.0), 8, 500))
        output = int(np.clip(random.gamma(2.0, MEAN_OUTPUT.get(task, 100) / 2.0), 2, MOST_NEW))
        span = domains.places[task]
        first = int(random.integers(span.start, span.stop - prompt - output))
        told = task
        if random.random() < misclassified:
            told = str(random.choice([name for name in domains.names if name != task]))
        ticket = Ticket(
            number, prompt, MOST_NEW, KV_BYTES * (prompt + MOST_NEW), told, experts[told], ttft=ttft, tpot=tpot
        )
        arrivals.append(Arrival(float(at[number]), ticket, first, output, task))
    return arrivals


def gaps(kind: str, requests: int, rate: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Seconds between arrivals, `rate` a second in the mean: exponential, or for `bursty` gamma."""
    if kind == "bursty":  # gamma with a coefficient of variation of 2.5
        return random.gamma(0.16, 1 / (0.16 * rate), requests)
    return random.exponential(1 / rate, requests)


def mix_at(kind: str, progress: float, tasks: int) -> NDArray[np.float64]:
    """Shares of tasks when this part of a run (0 to 1) is over: even, or for `drifting` each in turn above others."""
    if kind != "drifting":
        return np.full(tasks, 1 / tasks)
    weights = 1 + 0.9 * np.cos(2 * np.pi * (2 * progress - np.arange(tasks) / tasks))
    return weights / weights.sum()


def run(policy: str, domains: Domains, rate: float, seed: int, args: argparse.Namespace, *, overload: bool) -> Report:
    """One policy on one workload; in overload until the last arrival, so that no tail of half-empty batches counts."""
    machine, slots = MACHINES[args.machine], round(args.resident * domains.shape[1])
    arrivals = workload(
        domains,
        requests=args.requests,
        rate=rate,
        kind="poisson" if overload else args.kind,
        seed=seed,
        slots=slots,
        misclassified=args.misclassified,
        ttft=None if overload else args.ttft,
        tpot=None if overload else args.tpot,
    )

    def scheduler(resident: Any) -> Scheduler:
        return Scheduler(
            policy,
            costs=machine.believed,
            kv_bytes=args.kv_tokens * KV_BYTES,
            chunk_rows=args.chunk_rows,
            most_running=args.most_running,
            queue_limit=OVERLOAD_QUEUE * args.most_running if overload else args.queue_limit,
            resident=resident,
            expert_bytes=machine.expert_bytes,
        )

    affine, sets = policy == "slo+affinity", ExpertSets()
    predicts = args.base == "all" or (args.base == "affinity" and affine)
    replicas = [
        Replica(
            scheduler,
            domains.picks,
            domains.shape,
            slots,
            machine.costs,
            machine.expert_bytes,
            sets,
            BaseSet(domains.frequency, slots - domains.top_k) if predicts else None,
            args.noise,
            1000 * seed + number,
            args.probe if affine and args.moves else None,
        )
        for number in range(args.replicas)
    ]
    name = f"{policy}, {'overload' if overload else f'{rate:.3g}/s'}, seed {seed}"
    with tqdm(total=len(arrivals), desc=name, unit="request", leave=False, disable=None) as bar:
        return simulate(
            arrivals,
            replicas,
            sets=sets,
            route=args.route if affine else "least",
            until=arrivals[-1].at if overload else NEVER,
            experts=domains.sets(slots) if affine and args.moves else None,
            told=bar.update,
        )


def rate_for(share: tuple[float, float], domains: Domains, args: argparse.Namespace) -> float:
    """Requests a second at which `fcfs` attains a share within bounds, by bisection."""
    low, high = 0.0, 0.0
    # From what an overloaded one gives: fcfs loses its targets soon after.
    full = run("fcfs", domains, OVERLOAD_RATE * args.replicas, args.seed, args, overload=True).to_dict()
    rate = full["tokens_per_second"] / np.mean([*MEAN_OUTPUT.values()])
    for _ in range(12):
        attained = run("fcfs", domains, rate, args.seed, args, overload=False).to_dict()["attained"]
        print(f"fcfs at {rate:.3g} requests/s attains {attained:.1%}", file=sys.stderr)
        if share[0] <= attained <= share[1]:
            return rate
        low, high = (rate, high) if attained > share[1] else (low, rate)
        rate = (low + high) / 2 if low and high else (1.1 * low if low else 0.9 * high)
    raise SystemExit(f"no rate found at which fcfs attains {share[0]:.0%} to {share[1]:.0%}; the last was {rate:.3g}")


def figures(policy: str, domains: Domains, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Means over seeds, at this rate and in overload."""
    runs, full = [], []
    for seed in range(args.seed, args.seed + args.seeds):
        runs.append(run(policy, domains, rate, seed, args, overload=False).to_dict())
        full.append(run(policy, domains, OVERLOAD_RATE * args.replicas, seed, args, overload=True).to_dict())
    return {
        "attained": [each["attained"] for each in runs],
        "refused": mean(each["refused"] for each in runs),
        "goodput": mean(each["goodput"] for each in runs),
        "loaded_bytes_per_token": mean(each["loaded_bytes_per_token"] for each in runs),
        "hit_rate": mean(each["hit_rate"] for each in runs),
        "ttft": {at: mean(each["ttft"][at] for each in runs) for at in runs[0]["ttft"]},
        "tpot": {at: mean(each["tpot"][at] for each in runs) for at in runs[0]["tpot"]},
        "ttlt": {at: mean(each["ttlt"][at] for each in runs) for at in runs[0]["ttlt"]},
        "cost_error": mean(each["cost_error"] for one in runs for each in one["scheduler"]),
        "overload_tokens_per_second": mean(each["tokens_per_second"] for each in full),
        "overload_bytes_per_token": mean(each["loaded_bytes_per_token"] for each in full),
    }


def show(results: dict[str, dict[str, Any]], rate: float, args: argparse.Namespace) -> None:
    ttft, tpot = f"TTFT p50/p90/p99, s (target {args.ttft:g})", f"TPOT p50/p90, s ({args.tpot:g})"
    table = Table("policy", "attained", "goodput, req/s", ttft, tpot, "hits", "MB/token", "overload: tok/s", "MB/token")
    table.title = (
        f"{args.kind}, {rate:.3g} requests/s, {args.requests} requests, {args.replicas} x {args.most_running} places, "
        f"{args.resident:.0%} resident, {args.misclassified:.0%} misclassified, {args.machine}"
    )
    for policy, each in results.items():
        attained = each["attained"]
        spread = f" ({min(attained):.1%} to {max(attained):.1%})" if len(attained) > 1 else ""
        table.add_row(
            policy,
            f"{mean(attained):.1%}{spread}",
            f"{each['goodput']:.2f}",
            "/".join(f"{each['ttft'][at]:.1f}" for at in ("p50", "p90", "p99")),
            "/".join(f"{each['tpot'][at]:.2f}" for at in ("p50", "p90")),
            f"{each['hit_rate']:.1%}",
            f"{each['loaded_bytes_per_token'] / 1e6:.0f}",
            f"{each['overload_tokens_per_second']:.1f}",
            f"{each['overload_bytes_per_token'] / 1e6:.0f}",
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER", help="with NAME.npz of each domain")
    parser.add_argument("--domains", default="code,general,math", help="names of traces (default: %(default)s)")
    parser.add_argument("--policies", default=",".join(POLICIES), help="default: %(default)s")
    parser.add_argument("--machine", choices=MACHINES, default="gpu", help="default: %(default)s")
    parser.add_argument("--kind", choices=("poisson", "bursty", "drifting"), default="poisson", help="of arrivals")
    parser.add_argument("--requests", type=int, default=1500, help="of a run (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="requests a second; default: one at which fcfs attains 60 to 80 %%")
    parser.add_argument("--resident", type=float, default=0.3, help="share of experts in slots (default: %(default)s)")
    parser.add_argument("--misclassified", type=float, default=0.0, help="share of requests told as another task")
    parser.add_argument("--ttft", type=float, default=60.0, help="target, seconds (default: %(default)s)")
    parser.add_argument("--tpot", type=float, default=0.5, help="target, seconds (default: %(default)s)")
    parser.add_argument("--chunk-rows", type=int, default=128, help="rows of a step (default: %(default)s)")
    parser.add_argument("--most-running", type=int, default=16, help="of a replica (default: %(default)s)")
    parser.add_argument("--kv-tokens", type=int, default=100_000, help="of a replica (default: %(default)s)")
    parser.add_argument("--queue-limit", type=int, default=100_000, help="of a replica (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--route", choices=CHOICES, default="affinity", help="of slo+affinity; the others take `least`")
    parser.add_argument(
        "--base",
        choices=("affinity", "all", "none"),
        default="affinity",
        help="which policies have a predicted base set; the others an LRU alone (default: %(default)s)",
    )
    parser.add_argument(
        "--moves",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="slo+affinity: a request whose first rows show another task goes on at a replica of its kin",
    )
    parser.add_argument("--probe", type=int, default=2, help="rows that show it, with --moves (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.1, help="of steps' seconds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from --seed on (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    domains = Domains({name: load_trace(args.traces / f"{name}.npz") for name in args.domains.split(",")})
    rate = args.rate or rate_for((0.6, 0.8), domains, args)
    results = {policy: figures(policy, domains, rate, args) for policy in args.policies.split(",")}
    show(results, rate, args)
    if args.json:
        write_result(args.json, {"rate": rate, "options": {k: str(v) for k, v in vars(args).items()}, **results})


if __name__ == "__main__":
    main()
