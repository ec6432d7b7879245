"""How far the simulator of serving is from an engine that runs: the same arrivals, the same scheduler, the demo model.

    python benchmarks/simulator_error.py [--requests 60] [--memory-budget 30%] [--policies fcfs,slo] [--json FILE]

What every request routes to is recorded first, each alone. Costs are measured as `emoe calibrate` does, on this model
in this budget, and not corrected by what follows. Then requests come by a clock (Poisson, at --load times what the
simulator gives in overload), and the simulator gets the same times, prompts and routing. Targets are what --attained
of the first policy's requests keep. The first fifth of the requests, which find the engine empty, is in no figure but
bytes. `calibrated` has those costs; `as it ran` has the ones that the scheduler had corrected them to at the end of the
run, which says how much of the error is the machine's (others on it, warmer caches) and how much the simulator's.
docs/serving.md has figures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from simulate import gaps
from tqdm import tqdm

import emoe
from emoe import demo
from emoe.analysis.recording import PROMPTS, encode
from emoe.engine import calibrate
from emoe.engine.costs import Costs
from emoe.engine.expert_sets import ExpertSets
from emoe.engine.sampling import Sampling
from emoe.engine.scheduler import POLICIES, Scheduler, Ticket
from emoe.engine.simulator import NEVER, Arrival, Replica, flat_picks, simulate
from emoe.generate import load_tokenizer, quiet_transformers
from emoe.tasks import load_prompts
from emoe.trace.trace import Trace

CHUNK_ROWS = 128
COLD = 0.2  # of the requests, at the start, that count for bytes only
FIGURES = ("ttft", "tpot", "attained", "bytes_per_token")


def asked(tokenizer: Any, count: int, seed: int) -> list[tuple[str, list[int]]]:
    """(task, token ids) of requests; the first token is each one's own, or the engine would share prefixes."""
    found = load_prompts(PROMPTS)
    random = np.random.default_rng(seed)
    chosen = [found[int(each)] for each in random.integers(0, len(found), count)]
    return [
        (each.task, [1000 + number, *encode(tokenizer, each, answered=False)[0].tolist()])
        for number, each in enumerate(chosen)
    ]


def routing(path: str, requests: list[tuple[str, list[int]]], new: int) -> tuple[Trace, list[int]]:
    """The trace of all requests one after another, and where in it each begins."""
    model = emoe.from_pretrained(path, memory_budget=1.0, context=512)
    begins, at = [], 0
    with tempfile.TemporaryDirectory() as folder, model.emoe.record(Path(folder) / "trace.npz") as recorder:
        for number, (task, ids) in enumerate(
            tqdm(requests, desc="recording", unit="request", leave=False, disable=None)
        ):
            recorder.mark(task=task, prompt=str(number))
            model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=new,
                min_new_tokens=new, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            begins.append(at)
            at += len(ids) + new - 1
        trace = recorder.trace()
    model.emoe.close(restore=False)
    if trace.tokens != at:
        raise RuntimeError(f"{trace.tokens} tokens were recorded of {at} that ran")
    return trace, begins


def run(
    model: Any, requests: list[tuple[str, list[int]]], at: list[float], new: int, policy: str, args: argparse.Namespace,
    targets: dict[str, float],
) -> tuple[dict[str, Any], Costs]:  # fmt: skip
    """The engine, by the clock; figures, and the costs that its scheduler had at the end."""
    times: dict[Any, list[float]] = {number: [] for number in range(len(requests))}
    slo: dict[str, Any] = {f"{name}_slo_ms": 1000 * value for name, value in targets.items()}
    plan = model.emoe.plan
    policy_of = scheduler(policy, args.costs, plan.bytes_per_expert, args)
    with emoe.Engine(model, scheduler=policy_of, kv_budget=plan.kv_bytes) as engine:
        before, begun, sent = model.emoe.loaded_bytes, time.monotonic(), 0
        with tqdm(total=len(requests), desc=f"{policy}, engine", unit="request", leave=False, disable=None) as bar:
            while sent < len(requests) or engine.busy:
                now = time.monotonic() - begun
                while sent < len(requests) and at[sent] <= now:
                    task, ids = requests[sent]
                    engine.submit(ids, max_new_tokens=new, sampling=Sampling(eos=()), task=task, id=sent, **slo)
                    sent += 1
                if not engine.busy:
                    time.sleep(max(0.0, at[sent] - (time.monotonic() - begun)))
                    continue
                events = engine.step()
                now = time.monotonic() - begun
                for event in events:
                    times[event.id] += [now] * len(event.tokens)
                    bar.update(event.finish_reason is not None)
        costs, read = engine.scheduler.costs, model.emoe.loaded_bytes - before
    ttft = [each[0] - at[number] for number, each in times.items()]
    tpot = [(each[-1] - each[0]) / (new - 1) for each in times.values()]
    return {"ttft": ttft, "tpot": tpot, "bytes_per_token": read / (new * len(requests))}, costs


def scheduler(policy: str, costs: Costs, expert_bytes: int, args: argparse.Namespace) -> Scheduler:
    return Scheduler(
        policy, costs=costs, chunk_rows=CHUNK_ROWS, most_running=args.most_running, expert_bytes=expert_bytes
    )


def on_paper(
    picks: Any, shape: tuple[int, int], begins: list[int], requests: list[tuple[str, list[int]]], at: list[float],
    new: int, policy: str, costs: Costs, slots: int, expert_bytes: int, args: argparse.Namespace,
    targets: dict[str, float], until: float = NEVER,
) -> dict[str, Any]:  # fmt: skip
    """The same in the simulator."""
    sets = ExpertSets()
    replica = Replica(
        lambda resident: scheduler(policy, costs, expert_bytes, args), picks, shape, slots, costs, expert_bytes, sets
    )
    arrivals = [
        Arrival(at[n], Ticket(n, len(ids), new, 0, task, **targets), begins[n], new, task)
        for n, (task, ids) in enumerate(requests)
    ]
    report = simulate(arrivals, [replica], sets=sets, until=until)
    return {
        "ttft": [each.ttft for each in report.outcomes],
        "tpot": [each.tpot for each in report.outcomes],
        "bytes_per_token": report.loaded_bytes / max(1, report.tokens),
        "tokens_per_second": report.to_dict()["tokens_per_second"],
    }


def figures(found: dict[str, Any], targets: dict[str, float]) -> dict[str, float]:
    """Means of latencies in seconds, the share that keeps the targets, bytes; of the requests that are not cold."""
    first = int(COLD * len(found["ttft"]))
    ttft, tpot = (np.array(found[name][first:], dtype=float) for name in ("ttft", "tpot"))
    met = (ttft <= targets["ttft"]) & (tpot <= targets["tpot"])
    return {
        "ttft": float(ttft.mean()), "tpot": float(tpot.mean()), "attained": float(met.mean()),
        "bytes_per_token": found["bytes_per_token"],
    }  # fmt: skip


def targets_of(found: dict[str, Any], share: float) -> dict[str, float]:
    """Targets of both latencies that this share of requests keeps: multiples of the medians, alike for both."""
    first = int(COLD * len(found["ttft"]))
    both = [np.array(found[name][first:]) for name in ("ttft", "tpot")]
    medians = [float(np.median(each)) for each in both]
    factor = float(np.quantile(np.max([each / median for each, median in zip(both, medians, strict=True)], 0), share))
    return {name: factor * median for name, median in zip(("ttft", "tpot"), medians, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the demo's model")
    parser.add_argument("--requests", type=int, default=60, help="of a run (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    parser.add_argument("--memory-budget", default="30%", help="default: 30%%")
    parser.add_argument("--policies", default="fcfs,slo", help="default: %(default)s")
    parser.add_argument("--most-running", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.8, help="of what it gives at most (default: %(default)s)")
    parser.add_argument(
        "--attained", type=float, default=0.7, help="share that sets the targets (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    policies = args.policies.split(",")
    if unknown := [each for each in policies if each not in POLICIES]:
        parser.error(f"--policies: {', '.join(unknown)}; choices are {', '.join(POLICIES)}")
    quiet_transformers()
    path = args.model or str(demo.build())
    requests = asked(load_tokenizer(path), args.requests, args.seed)
    trace, begins = routing(path, requests, args.tokens)
    picks, shape = flat_picks(trace), (trace.layers, trace.num_experts)
    longest = max(len(ids) for _, ids in requests) + args.tokens
    model = emoe.from_pretrained(path, memory_budget=args.memory_budget, context=longest, batch=args.most_running)
    plan = model.emoe.plan
    forwards = 2 * calibrate.ROUNDS * len(calibrate.ROWS)
    with tqdm(total=forwards, desc="calibrating", unit="forward", leave=False, disable=None) as bar:
        measured = calibrate.measure(*calibrate.forward_of(model), told=bar.update)
    args.costs = measured.costs
    fixed = (picks, shape, begins, requests)
    rest = (plan.slots_per_layer[0], plan.bytes_per_expert, args)
    full = on_paper(*fixed, [0.0] * len(requests), args.tokens, "fcfs", measured.costs, *rest, {})
    rate = args.load * full["tokens_per_second"] / args.tokens
    at = np.cumsum(gaps("poisson", len(requests), rate, np.random.default_rng(args.seed))).tolist()
    table = Table(
        "policy", "", "TTFT, s", "TPOT, ms", "attained", "MB/token",
        title=f"{args.requests} requests, {rate:.3g}/s, {args.most_running} places, {plan.resident_share:.0%} resident",
    )  # fmt: skip
    results: dict[str, Any] = {"rate": rate, "calibration_error": measured.error}
    targets: dict[str, float] = {}
    for policy in policies:
        ran, corrected = run(model, requests, at, args.tokens, policy, args, targets)
        aims = targets or targets_of(ran, args.attained)
        sides = {"engine": figures(ran, aims)}
        for name, costs in {"calibrated": measured.costs, "as it ran": corrected}.items():
            sides[name] = figures(on_paper(*fixed, at, args.tokens, policy, costs, *rest, targets), aims)
        targets = aims  # of the policies after the first, which the scheduler is told
        results[policy] = sides
        for name, each in sides.items():
            cells = [f"{each['ttft']:.2f}", f"{1000 * each['tpot']:.0f}", f"{each['attained']:.1%}"]
            cells.append(f"{each['bytes_per_token'] / 1e6:.2f}")
            if name != "engine":
                for place, key in enumerate(FIGURES):
                    off = each[key] - sides["engine"][key]
                    said = f"{100 * off:+.0f} points" if key == "attained" else f"{off / sides['engine'][key]:+.0%}"
                    cells[place] += f" ({said})"
            table.add_row(policy if name == "engine" else "", name, *cells)
    model.emoe.close(restore=False)
    Console(width=max(120, Console().width)).print(table)
    print(f"calibrated costs foretell the forwards they are from with an error of {measured.error:.0%} (median)")
    if args.json:
        write_result(args.json, results)


if __name__ == "__main__":
    main()
