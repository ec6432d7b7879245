"""Long load on `emoe serve`, with clients that leave, bodies that make no sense, and reads that fail.

    python benchmarks/soak.py --minutes 30 --check

Every whole answer must have the text that its prompt had before the load, every request an outcome, and the server's
memory must not grow: its slope after the first fifth, against what the samples scatter by. The model is the demo's, or
--model; its reads fail once in --fail-every rounds of the loader.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

TOPICS = ("the sea", "a clock", "primes", "bread", "rain", "a volcano", "whales", "sleep", "an old bridge", "chess")
BAD_BODIES = (
    b"{",
    b'{"prompt": "\xff"}',
    b'{"prompt": 3}',
    b'{"prompt": "x", "max_tokns": 1}',
    b'{"prompt": "\\ud800"}',
)


def serve(words: list[str], fail_every: int) -> int:
    """The server, in a process of its own, with a loader that fails now and then."""
    import emoe
    from emoe import cli, entry, errors

    def loaded(*args: Any, **given: Any) -> Any:
        model = entry.from_pretrained(*args, **given)
        rounds, chance = model.emoe.loader.rounds, random.Random(0)

        def failing(*args: Any) -> Any:
            if chance.random() < 1 / fail_every:
                raise errors.ReadError("this read was made to fail")
            return rounds(*args)

        model.emoe.loader.rounds = failing
        return model

    emoe.from_pretrained = loaded  # type: ignore[assignment]
    return cli.main(["serve", *words])


class Load:
    """What clients do, and what came of it."""

    def __init__(self, url: str, tokens: int, workers: int) -> None:
        self._url, self._tokens, self._workers = url, tokens, workers
        self._expected: dict[str, str] = {}
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def learn(self, client: httpx.AsyncClient) -> None:
        """Each prompt alone."""
        for topic in TOPICS:
            prompt = f"Tell me about {topic}."
            for _ in range(20):  # a read may fail here as well
                answer = await client.post("/v1/completions", json=self._body(prompt))
                if answer.status_code == 200:
                    self._expected[prompt] = answer.json()["choices"][0]["text"]
                    break
            else:
                raise SystemExit(f"no answer to {prompt!r}: {answer.text}")

    def _body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": self._tokens, "temperature": 0, **more}

    async def run(self, client: httpx.AsyncClient, until: float) -> None:
        await asyncio.gather(*(self._work(client, until, random.Random(seed)) for seed in range(self._workers)))

    async def _work(self, client: httpx.AsyncClient, until: float, chance: random.Random) -> None:
        kinds = [self._whole] * 10 + [self._stream] * 3 + [self._leave] * 3 + [self._malformed, self._oversize]
        while time.monotonic() < until:
            kind = chance.choice([*kinds, self._half])
            try:
                outcome = await kind(client, chance)
            except httpx.HTTPError as error:
                outcome = f"lost: {type(error).__name__}"
            self.outcomes[f"{kind.__name__.strip('_')}: {outcome}"] += 1

    def _told(self, text: str, prompt: str) -> str:
        if text != self._expected[prompt]:
            self.wrong.append(f"{prompt}: {text!r}, not {self._expected[prompt]!r}")
            return "wrong"
        return "right"

    async def _whole(self, client: httpx.AsyncClient, chance: random.Random) -> str:
        prompt = chance.choice(list(self._expected))
        answer = await client.post("/v1/completions", json=self._body(prompt, task=chance.choice(TOPICS)))
        if answer.status_code == 200:
            return self._told(answer.json()["choices"][0]["text"], prompt)
        return f"{answer.status_code} {answer.json()['error']['code']}"

    async def _stream(self, client: httpx.AsyncClient, chance: random.Random) -> str:
        prompt, text = chance.choice(list(self._expected)), ""
        async with client.stream("POST", "/v1/completions", json=self._body(prompt, stream=True)) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return self._told(text, prompt)
                if line.startswith("data: "):
                    piece = json.loads(line[6:])
                    if "error" in piece:
                        return str(piece["error"]["code"])
                    text += piece["choices"][0]["text"]
        return f"{answer.status_code} and no end"

    async def _leave(self, client: httpx.AsyncClient, chance: random.Random) -> str:
        prompt, stay = chance.choice(list(self._expected)), chance.randrange(6)
        async with client.stream("POST", "/v1/completions", json=self._body(prompt, stream=True)) as answer:
            lines = answer.aiter_lines()
            for _ in range(stay):
                await anext(lines, None)
        return "left"

    async def _malformed(self, client: httpx.AsyncClient, chance: random.Random) -> str:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/completions", content=chance.choice(BAD_BODIES), headers=headers)
        return str(answer.status_code)

    async def _oversize(self, client: httpx.AsyncClient, chance: random.Random) -> str:
        try:
            answer = await client.post("/v1/completions", content=b" " * (2 << 20))
        except (httpx.WriteError, httpx.ReadError):
            return "413"  # the server closes while the rest of the body is on its way
        return str(answer.status_code)

    async def _half(self, client: httpx.AsyncClient, chance: random.Random) -> str:
        host = httpx.URL(self._url)
        with socket.create_connection((host.host, host.port or 80)) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
            await asyncio.sleep(0.05)
        return "left"


async def watch(pid: int, until: float, every: float) -> tuple[list[float], list[float]]:
    """Seconds, and MiB of the server's memory."""
    began, times, sizes = time.monotonic(), [], []
    while (now := time.monotonic()) < until:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        times.append(now - began)
        sizes.append(pages * 4096 / (1 << 20))
        await asyncio.sleep(every)
    return times, sizes


def slope(times: list[float], sizes: list[float]) -> tuple[float, float]:
    """MiB an hour after the first fifth, and twice its standard error over blocks of samples, which are not alone."""
    first = len(times) // 5
    blocks = np.array_split(np.arange(first, len(times)), 12)
    x = np.array([np.mean(np.array(times)[block]) for block in blocks]) / 3600
    y = np.array([np.mean(np.array(sizes)[block]) for block in blocks])
    (gain, _), spread = np.polyfit(x, y, 1, cov=True)
    return float(gain), 2 * float(np.sqrt(spread[0, 0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", help="a folder; default: the demo's model")
    parser.add_argument("--memory-budget", default="50%")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--fail-every", type=int, default=20_000)
    parser.add_argument("--check", action="store_true", help="exit status 1 where something is lost, wrong, or grows")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        return serve(args.serve, args.fail_every)
    model = args.model
    if model is None:
        from emoe import demo

        model = str(demo.build())
    words = ["--model", model, "--memory-budget", args.memory_budget, "--context", "256", "--batch", "8"]
    process = subprocess.Popen(
        [sys.executable, __file__, "--fail-every", str(args.fail_every), "--serve", *words, "--port", "0", "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while lines[-1] not in ("}\n", ""):
        lines.append(process.stdout.readline())
    url = json.loads("".join(lines))["url"]
    load = Load(url, args.tokens, args.workers)

    async def go() -> tuple[list[float], list[float]]:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            await load.learn(client)
            until = time.monotonic() + 60 * args.minutes
            watching = asyncio.create_task(watch(process.pid, until, min(2.0, args.minutes / 4)))
            await load.run(client, until)
            return await watching

    times, sizes = asyncio.run(go())
    process.send_signal(signal.SIGTERM)
    status = process.wait(120)
    gain, noise = slope(times, sizes)
    for outcome, count in sorted(load.outcomes.items()):
        print(f"{count:8d}  {outcome}")
    for each in load.wrong[:10]:
        print("wrong:", each)
    grows = gain > noise and gain * args.minutes / 60 > 0.01 * sizes[-1]
    print(f"memory {sizes[len(sizes) // 5]:.0f} to {sizes[-1]:.0f} MiB; {gain:+.1f} MiB an hour, +- {noise:.1f}")
    print(f"the server ended with {status} after its last signal")
    lost = [each for each in load.outcomes if "lost" in each or "no end" in each or "503" in each]
    bad = bool(load.wrong or lost or grows or status)
    print("not as it should be" if bad else "nothing lost, nothing wrong, memory level")
    return int(bad and args.check)


if __name__ == "__main__":
    sys.exit(main())
