"""Policies of the scheduler side by side: open-loop load over HTTP on `emoe serve`, one server a policy.

    python benchmarks/serving.py --minutes 20 --check

Servers stay up and take turns on the same arrivals, round by round, so that other load on the machine meets all alike.
A round has two parts: at a rate at which `fcfs` attains 60 to 80 % of targets (set by a calibration run, or --rate,
--ttft, --tpot), and in overload, for throughput. Times are clients' own and begin when a request was due. As in
simulate.py, `slo+affinity` has base sets and the others load on demand into an LRU (--base). Prompts are numbered, so
that prefixes are not shared between requests. A step's experts serve the rows of several tasks, so bytes are told of
a policy and not of a task.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import write_result
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from simulate import gaps, mix_at
from tqdm import tqdm

from emoe import demo
from emoe.analysis.recording import PROMPTS
from emoe.engine.scheduler import POLICIES
from emoe.tasks import Prompt, load_prompts

ATTAINED = (0.6, 0.8)  # of `fcfs`: the load at which policies are compared
AFFINITY_POINTS, AFFINITY_BYTES, AFFINITY_SPEED = 0.15, 0.6, 1.5  # what `slo+affinity` must come to against `fcfs`
WARM_SHARE, CALIBRATION_SHARE = 0.1, 0.15  # of --minutes
OVERLOAD_SHARE = 0.3  # of a policy's turn
DRAIN_SHARE = 0.4  # of a stretch of load: nothing new comes, and it is over once all have ended
BURST = 8  # times the places, all at once: warms a server up, and tells what `fcfs` can do with all places taken
FRESH_SECONDS = 0.6  # a server's statistics are at most 0.5 seconds old
SETTLE_SECONDS = 60.0
ENDED_SECONDS = 120.0


class LoadError(Exception):
    """A server or its load is not what can be measured."""


@dataclass(frozen=True)
class Due:
    """A request to come: seconds from the start, its task, the one that the server is told, and the prompt."""

    at: float
    task: str
    told: str
    prompt: str


@dataclass(frozen=True)
class Targets:
    """Seconds to the first token and of each further one; None: no target."""

    ttft: float | None = None
    tpot: float | None = None

    def fields(self) -> dict[str, float]:
        """For a request's body."""
        seconds = {"ttft_slo_ms": self.ttft, "tpot_slo_ms": self.tpot}
        return {name: 1000 * value for name, value in seconds.items() if value is not None}


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        outcome: "answered", "refused" (429), "failed", or "cut": it had not ended when the run did.
        why: status and code of what was refused or failed.
        first, last: seconds from when it was due to the first and the last token.
        tokens: of output.
        lag: seconds that the client sent it late.
    """

    task: str
    outcome: str = "cut"
    why: str = ""
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    lag: float = 0.0

    @property
    def tpot(self) -> float | None:
        """Mean seconds of each token after the first; None where none came."""
        if self.outcome != "answered" or self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    def met(self, targets: Targets) -> bool:
        """Whole, and within every target; what failed, was refused or cut is not."""
        if self.outcome != "answered" or self.first is None:
            return False
        late = targets.ttft is not None and self.first > targets.ttft
        return not late and (targets.tpot is None or (self.tpot or 0.0) <= targets.tpot)


@dataclass
class Part:
    """Answers of one policy to one stretch of load, with what its server counted meanwhile.

    Attributes:
        seconds: from the start to the last end, or to the cut.
        counted: growth of counters of /metrics, by name.
    """

    answers: list[Answer]
    seconds: float
    counted: Counter[str] = field(default_factory=Counter)


def arrivals(
    prompts: Sequence[Prompt],
    *,
    rate: float,
    seconds: float,
    kind: str,
    seed: int,
    span: tuple[float, float] = (0.0, 1.0),
    misclassified: float = 0.0,
) -> list[Due]:
    """Requests that are due within `seconds`; the same for the same seed.

    Args:
        rate: requests a second.
        span: which part of the whole run these seconds are, for a mix that drifts.
        misclassified: share of requests that are told as another task.
    """
    random = np.random.default_rng(seed)
    by_task: dict[str, list[str]] = {}
    for each in prompts:
        by_task.setdefault(each.task, []).append(each.prompt)
    names = sorted(by_task)
    found: list[Due] = []
    at = 0.0
    while (at := at + float(gaps(kind, 1, rate, random)[0])) < seconds:
        mix = mix_at(kind, span[0] + (span[1] - span[0]) * at / seconds, len(names))
        task = told = str(random.choice(names, p=mix))
        if random.random() < misclassified and len(names) > 1:
            told = str(random.choice([name for name in names if name != task]))
        prompt = by_task[task][int(random.integers(len(by_task[task])))]
        found.append(Due(at, task, told, f"{1000 * seed + len(found)}. {prompt}"))
    return found


async def ask(client: httpx.AsyncClient, due: Due, body: dict[str, Any], clock: Callable[[], float]) -> Answer:
    """Streams one answer; `clock` gives seconds since the request was due."""
    answer = Answer(due.task, lag=clock())
    try:
        await _stream(client, due, body, clock, answer)
    except httpx.HTTPError as error:
        answer.outcome, answer.why = "failed", type(error).__name__
    except asyncio.CancelledError:
        answer.outcome = "cut"
    return answer


async def _stream(
    client: httpx.AsyncClient, due: Due, body: dict[str, Any], clock: Callable[[], float], answer: Answer
) -> None:
    whole = {
        **body, "messages": [{"role": "user", "content": due.prompt}], "task": due.told, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    async with client.stream("POST", "/v1/chat/completions", json=whole) as response:
        if response.status_code != 200:
            await response.aread()
            answer.outcome = "refused" if response.status_code == 429 else "failed"
            answer.why = f"{response.status_code} {response.json()['error']['code']}"
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.outcome = "answered"
                return
            if not line.startswith("data: "):
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                answer.outcome, answer.why = "failed", f"in a stream: {piece['error']['code']}"
                return
            if piece["choices"]:
                answer.last = clock()
                answer.first = answer.last if answer.first is None else answer.first
            elif piece.get("usage"):
                answer.tokens = piece["usage"]["completion_tokens"]
    answer.outcome, answer.why = "failed", "a stream without an end"


async def play(
    client: httpx.AsyncClient, dues: Sequence[Due], limit: float, body: dict[str, Any], bar: Any = None
) -> Part:
    """Sends each when it is due, whatever came of those before it, and cuts off what has not ended after `limit` s."""
    begun = time.monotonic()

    async def one(due: Due) -> Answer:
        try:
            await asyncio.sleep(begun + due.at - time.monotonic())
        except asyncio.CancelledError:
            return Answer(due.task)
        answer = await ask(client, due, body, lambda: time.monotonic() - begun - due.at)
        if bar is not None:
            bar.set_postfix_str(f"{answer.outcome} {answer.task}", refresh=False)
        return answer

    tasks = [asyncio.create_task(one(due)) for due in dues]
    ends, pending = begun + limit, set(tasks)
    while pending and (left := ends - time.monotonic()) > 0:
        before = time.monotonic()
        _, pending = await asyncio.wait(pending, timeout=min(left, 0.5))
        if bar is not None:
            bar.update(time.monotonic() - before)
    seconds = time.monotonic() - begun
    for task in pending:
        task.cancel()
    return Part(list(await asyncio.gather(*tasks)), seconds)


def counters(text: str) -> Counter[str]:
    """Counters and gauges of a /metrics page, summed over labels."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value  # type: ignore[assignment]
    return found


class Server:
    """`emoe serve` in a process of its own, and a client of it."""

    def __init__(self, policy: str, words: Sequence[str], log: Path) -> None:
        self.policy, self._log = policy, log
        command = [sys.executable, "-m", "emoe", "serve", *words, "--scheduler", policy, "--port", "0", "--json"]
        with log.open("w") as told:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline()]
        while lines[-1] not in ("}\n", ""):
            lines.append(self.process.stdout.readline())
        if not lines[-1]:
            self.process.wait()
            raise LoadError(f"{' '.join(command)} ended with {self.process.returncode}: {log.read_text()[-2000:]}")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx.AsyncClient(base_url=json.loads("".join(lines))["url"], timeout=None, limits=limits)

    async def settled(self) -> Counter[str]:
        """Counters once nothing runs or waits."""
        ends = time.monotonic() + SETTLE_SECONDS
        while (await self._status())["requests"]:  # live, while statistics of the engine may be a long step old
            if time.monotonic() > ends:
                raise LoadError(f"the server of {self.policy} still runs requests {SETTLE_SECONDS:g} s after the last")
            await asyncio.sleep(0.1)
        await asyncio.sleep(FRESH_SECONDS)
        return counters((await self.client.get("/metrics")).raise_for_status().text)

    async def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get("/status")).raise_for_status().json()
        return found

    async def play(self, dues: Sequence[Due], limit: float, body: dict[str, Any], bar: Any = None) -> Part:
        """`play`, with what this server counted."""
        if not dues:
            raise LoadError("no request is due in a part of the run: give it more --minutes or a higher --rate")
        before = await self.settled()
        part = await play(self.client, dues, limit, body, bar)
        after = await self.settled()
        part.counted = Counter({name: after[name] - before[name] for name in after})
        return part

    async def resident_share(self) -> float:
        """Experts in memory now, of all."""
        layers = (await self._status())["layers"]
        return float(sum(len(each["resident"]) for each in layers) / sum(each["experts"] for each in layers))

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(ENDED_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def requests_per_second(part: Part) -> float:
    """All tokens that came, of answers that were cut too, by what an answer has in the mean; 0 without an answer."""
    tokens = [each.tokens for each in part.answers if each.outcome == "answered"]
    if not any(tokens):
        return 0.0
    return float(part.counted["emoe_output_tokens_total"] / part.seconds / np.mean(tokens))


def targets_for(answers: Sequence[Answer], share: float, ttft: float | None, tpot: float | None) -> Targets:
    """Targets that this share of answers meets: given ones, and the others as multiples of the medians, alike for both.

    Raises:
        LoadError: fewer than `share` were answered at all, or meet what was given.
    """
    whole = [each for each in answers if each.outcome == "answered" and each.first is not None]
    if not whole:
        raise LoadError(f"none of {len(answers)} requests was answered: give it more --minutes or a lower --rate")
    medians = {
        "ttft": float(np.median([each.first for each in whole])),
        "tpot": float(np.median([each.tpot for each in whole if each.tpot is not None] or [0.0])),
    }
    given = Targets(ttft, tpot)
    factors = []
    for each in answers:
        if not each.met(given):
            factors.append(np.inf)
            continue
        parts = [(each.first or 0.0) / medians["ttft"]] if ttft is None else []
        parts += [(each.tpot or 0.0) / medians["tpot"]] if tpot is None and medians["tpot"] else []
        factors.append(max(parts, default=0.0))
    factor = sorted(factors)[max(0, round(share * len(factors)) - 1)]
    if not np.isfinite(factor):
        raise LoadError(
            f"less than {share:.0%} of requests were in time in the calibration: more --minutes, or less --rate"
        )
    return Targets(
        medians["ttft"] * factor if ttft is None else ttft,
        (medians["tpot"] * factor or None) if tpot is None else tpot,
    )


def percentiles(values: Sequence[float | None]) -> dict[str, float]:
    """p50, p95 and mean of those that are there; empty where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return {}
    return {f"p{at}": float(np.percentile(known, at)) for at in (50, 95)} | {"mean": float(np.mean(known))}


def summary(answers: Sequence[Answer], targets: Targets) -> dict[str, Any]:
    """Outcomes and latencies, in seconds; shares from 0 to 1, of all that were sent."""
    whole = [each for each in answers if each.outcome == "answered"]
    met = sum(each.met(targets) for each in answers)
    return {
        "requests": len(answers),
        "attained": met / len(answers),
        "met": met,
        "late": len(whole) - met,
        **{name: sum(each.outcome == name for each in answers) for name in ("refused", "failed", "cut")},
        "why": dict(Counter(each.why for each in answers if each.why)),
        "ttft": percentiles([each.first for each in whole]),
        "tpot": percentiles([each.tpot for each in whole]),
    }


def figures(parts: Sequence[Part], targets: Targets) -> dict[str, Any]:
    """All rounds of a policy together."""
    answers = [each for part in parts for each in part.answers]
    seconds = sum(part.seconds for part in parts)
    counted = sum((part.counted for part in parts), Counter())
    whole = summary(answers, targets)
    tokens = counted["emoe_output_tokens_total"]
    looked = counted["emoe_expert_hits_total"] + counted["emoe_expert_misses_total"]
    return {
        **whole,
        "attained_by_round": [sum(each.met(targets) for each in part.answers) / len(part.answers) for part in parts],
        "seconds": seconds,
        "goodput": whole["met"] / seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "read_bytes_per_token": counted["emoe_read_bytes_total"] / max(1.0, tokens),
        "hit_rate": counted["emoe_expert_hits_total"] / looked if looked else None,
        "shared_prompt_tokens": counted["emoe_shared_prompt_tokens_total"],
        "latest_send": max(each.lag for each in answers),
        "tasks": {
            task: summary([each for each in answers if each.task == task], targets)
            for task in sorted({each.task for each in answers})
        },
    }


def checks(results: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """What `slo+affinity` must come to against `fcfs`, with the figure and whether it does."""
    fcfs, affinity = results["fcfs"], results["slo+affinity"]
    attained = fcfs["load"]["attained"]
    points = affinity["load"]["attained"] - attained
    read = fcfs["load"]["read_bytes_per_token"]
    bytes_ratio = affinity["load"]["read_bytes_per_token"] / read if read else float("inf")
    base = fcfs["overload"]["tokens_per_second"]
    speed = affinity["overload"]["tokens_per_second"] / base if base else float("inf")
    failed = sum(part["failed"] for each in results.values() for part in each.values())
    low, high = ATTAINED
    return [
        (f"fcfs attains {attained:.1%}; between {low:.0%} and {high:.0%}", low <= attained <= high),
        (f"slo+affinity: {100 * points:+.1f} points; at least {100 * AFFINITY_POINTS:+.0f}", points >= AFFINITY_POINTS),
        (f"expert bytes a token: {bytes_ratio:.2f}; at most {AFFINITY_BYTES}", bytes_ratio <= AFFINITY_BYTES),
        (f"throughput in overload: {speed:.2f} times; at least {AFFINITY_SPEED}", speed >= AFFINITY_SPEED),
        (f"{failed} requests failed; none may", failed == 0),
    ]


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Policies, and their tasks below each."""
    targets = ", ".join(
        f"{name.upper()} {value:.3g} s" for name, value in found["targets"].items() if value is not None
    )
    table = Table(
        "policy, task", "requests", "attained", "goodput/s", "429/failed/cut", "TTFT p50/p95, s",
        "TPOT p50/p95, ms", "tok/s", "MB/token", "overload: tok/s", "MB/token",
        title=f"{args.kind}, {found['rate']:.3g} requests/s, targets {targets}, {found['resident_share']:.0%} resident",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    for policy, each in found["policies"].items():
        load, over = each["load"], each["overload"]
        table.add_row(
            policy, *_cells(load, f"{load['goodput']:.2f}"), f"{load['tokens_per_second']:.1f}",
            f"{load['read_bytes_per_token'] / 1e6:.2f}", f"{over['tokens_per_second']:.1f}",
            f"{over['read_bytes_per_token'] / 1e6:.2f}", style="bold",
        )  # fmt: skip
        for task, one in load["tasks"].items():
            table.add_row(f"  {task}", *_cells(one, ""))
    Console(width=max(150, Console().width)).print(table)


def _cells(one: dict[str, Any], goodput: str) -> list[str]:
    def pair(name: str, scale: float, digits: int) -> str:
        return "/".join(f"{scale * one[name][at]:.{digits}f}" for at in ("p50", "p95")) if one[name] else "-"

    ends = f"{one['refused']}/{one['failed']}/{one['cut']}"
    return [
        str(one["requests"]), f"{one['attained']:.1%}", goodput, ends, pair("ttft", 1, 2), pair("tpot", 1000, 0),
    ]  # fmt: skip


def server_words(model: str, policy: str, args: argparse.Namespace) -> list[str]:
    """Options of a policy's server."""
    words = [
        "--model", model, "--memory-budget", args.memory_budget, "--context", str(args.context),
        "--batch", str(args.most_running), "--most-running", str(args.most_running),
    ]  # fmt: skip
    if args.base == "all" or (args.base == "affinity" and policy == "slo+affinity"):
        words += ["--predictor", args.predictor, "--period", str(args.period)]
    return words


@contextlib.contextmanager
def started(policies: Sequence[str], model: str, args: argparse.Namespace) -> Iterator[list[Server]]:
    """A server for each policy."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = []
        for policy in tqdm(policies, desc="starting", unit="server", leave=False, disable=None):
            server = Server(policy, server_words(model, policy, args), Path(folder) / f"{policy}.log")
            stack.callback(server.end)
            servers.append(server)
        yield servers


async def measure(servers: Sequence[Server], prompts: Sequence[Prompt], args: argparse.Namespace) -> dict[str, Any]:
    """Warms up, calibrates, and runs the rounds."""
    whole = 60 * args.minutes
    turn = whole * (1 - WARM_SHARE - CALIBRATION_SHARE) / (args.rounds * len(servers))
    over = OVERLOAD_SHARE * turn
    window = (turn - over) * (1 - DRAIN_SHARE)
    body = {"max_tokens": args.tokens, "temperature": 0}
    with tqdm(
        total=whole, unit="s", bar_format="{desc}: {percentage:3.0f}% {bar} {elapsed} {postfix}", disable=None
    ) as bar:

        async def turn_of(server: Server, what: str, dues: Sequence[Due], limit: float, more: dict[str, float]) -> Part:
            bar.set_description(f"{server.policy}, {what}")
            start = bar.n
            part = await server.play(dues, limit, {**body, **more}, bar)
            bar.update(start + limit - bar.n)
            return part

        def dues(rate: float, seconds: float, seed: int, span: tuple[float, float], kind: str = args.kind) -> list[Due]:
            return arrivals(
                prompts, rate=rate, seconds=seconds, kind=kind, seed=args.seed * 1000 + seed, span=span,
                misclassified=args.misclassified,
            )  # fmt: skip

        limit = whole * WARM_SHARE / len(servers)
        burst = dues(BURST * args.most_running, 1.0, 0, (0.0, 1.0), "poisson")
        capacity = {}
        for server in servers:
            warm = await turn_of(server, "warming up", [Due(0.0, *_rest(due)) for due in burst], limit, {})
            capacity[server.policy] = requests_per_second(warm)
        first = servers[0]  # `fcfs` where it is measured
        rate = args.rate or args.load * capacity[first.policy]
        if not rate:
            raise LoadError(f"{first.policy} answered none of {len(burst)} requests in {limit:.1f} s: more --minutes")
        limit = whole * CALIBRATION_SHARE
        tried = await turn_of(first, "calibrating", dues(rate, limit * (1 - DRAIN_SHARE), 1, (0.0, 1.0)), limit, {})
        targets = targets_for(tried.answers, sum(ATTAINED) / 2, args.ttft, args.tpot)
        bar.write(f"{len(tried.answers)} requests at {rate:.3g}/s gave {targets}", file=sys.stderr)

        loads: dict[str, list[Part]] = {server.policy: [] for server in servers}
        overs: dict[str, list[Part]] = {server.policy: [] for server in servers}
        for number in range(args.rounds):
            span = (number / args.rounds, (number + 1) / args.rounds)
            usual = dues(rate, window, 2 + 2 * number, span)
            much = dues(rate * args.overload, over, 3 + 2 * number, span, "poisson")
            for place in range(len(servers)):
                server = servers[(number + place) % len(servers)]  # who comes first changes
                what = f"round {number + 1} of {args.rounds}"
                loads[server.policy].append(await turn_of(server, what, usual, turn - over, targets.fields()))
                overs[server.policy].append(await turn_of(server, f"{what}, overload", much, over, {}))
        share = await first.resident_share()
        for server in servers:
            await server.client.aclose()
    return {
        "rate": rate,
        "targets": {"ttft": targets.ttft, "tpot": targets.tpot},
        "burst_requests_per_second": capacity,
        "resident_share": share,
        "policies": {
            server.policy: {
                "load": figures(loads[server.policy], targets),
                "overload": figures(overs[server.policy], Targets()),
            }
            for server in servers
        },
    }


def _rest(due: Due) -> tuple[str, str, str]:
    return due.task, due.told, due.prompt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="of load, all policies (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each policy (default: %(default)s)")
    parser.add_argument("--policies", default=",".join(POLICIES), help="the first is calibrated on (%(default)s)")
    parser.add_argument("--kind", choices=("poisson", "bursty", "drifting"), default="poisson", help="of arrivals")
    parser.add_argument("--rate", type=float, help="requests a second; default: --load times what a burst comes to")
    parser.add_argument("--load", type=float, default=0.9, help="default: %(default)s")
    parser.add_argument("--overload", type=float, default=4.0, help="times the rate, for throughput (%(default)s)")
    parser.add_argument("--ttft", type=float, help="target, seconds; default: one that fcfs attains at times")
    parser.add_argument("--tpot", type=float, help="target, seconds; default: as --ttft")
    parser.add_argument("--misclassified", type=float, default=0.0, help="share of requests told as another task")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="JSON lines: task and prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder; default: the demo's model")
    parser.add_argument("--memory-budget", default="30%", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=512, help="tokens of a request at most (default: %(default)s)")
    parser.add_argument("--most-running", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--base", choices=("affinity", "all", "none"), default="affinity", help="who has base sets")
    parser.add_argument("--predictor", default="recent", help="of base sets (default: %(default)s)")
    parser.add_argument("--period", default="10", help="requests between two base sets (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 where slo+affinity is not as good as wanted"
    )
    args = parser.parse_args()
    policies = args.policies.split(",")
    if unknown := [each for each in policies if each not in POLICIES]:
        parser.error(f"--policies: {', '.join(unknown)}; choices are {', '.join(POLICIES)}")
    if args.check and not {"fcfs", "slo+affinity"} <= set(policies):
        parser.error("--check compares slo+affinity with fcfs; --policies lacks one of them")
    prompts = load_prompts(args.prompts)
    model = args.model or str(demo.build())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else servers would outlive it
    try:
        with started(policies, model, args) as servers:
            found = asyncio.run(measure(servers, prompts, args))
    except LoadError as error:
        parser.exit(2, f"{error}\n")
    show(found, args)
    missed = False
    if {"fcfs", "slo+affinity"} <= set(policies):
        for text, good in checks(found["policies"]):
            missed |= not good
            print("yes" if good else "NO ", text)
    if args.json:
        write_result(args.json, {"options": {name: str(value) for name, value in vars(args).items()}, **found})
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
