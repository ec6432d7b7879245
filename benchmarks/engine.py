"""Requests together in an engine against the same one after another with `generate`, on the demo model or another.

    python benchmarks/engine.py --requests 16 --tokens 32 --budget 1.0 --budget 0.3

Prints tokens/s of decode and bytes of experts read a token, of both, in turns so that other load meets both alike.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter
from typing import Any

import common

import emoe
from emoe import generate
from emoe.engine.sampling import Sampling
from emoe.options import _text_number

SUBJECTS = ("the sea", "a broken clock", "prime numbers", "the French revolution", "bread", "a python list", "rain",
            "gravity", "a lost letter", "the stock market", "chess", "a volcano", "whales", "an old bridge", "sleep",
            "the alphabet")  # fmt: skip
FORMS = (
    "Tell me about {}.",
    "Write a short story about {}.",
    "What should one know about {}?",
    "Explain {} to a child.",
)


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Chats of different subjects and forms."""
    texts = [FORMS[n % len(FORMS)].format(SUBJECTS[n % len(SUBJECTS)]) for n in range(count)]
    return [generate.encode(tokenizer, text)[0].tolist() for text in texts]


def one_after_another(model: Any, requests: list[list[int]], tokens: int) -> dict[str, float]:
    """`generate` for each; decode alone is timed."""
    import torch

    read, seconds, count = 0, 0.0, 0
    for ids in requests:
        stream = _Clock(model.emoe)
        model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=stream,
        )  # fmt: skip
        seconds += stream.times[-1] - stream.times[0]
        read += stream.bytes[-1] - stream.bytes[0]
        count += len(stream.times) - 1
    return {"tokens_per_second": count / seconds, "bytes_per_token": read / count}


class _Clock:
    """A streamer that notes when a token came, and what had been read then."""

    def __init__(self, runtime: Any) -> None:
        self._runtime, self._prompt = runtime, True
        self.times: list[float] = []
        self.bytes: list[int] = []

    def put(self, value: Any) -> None:
        if not self._prompt:
            self.times.append(perf_counter())
            self.bytes.append(self._runtime.loaded_bytes)
        self._prompt = False

    def end(self) -> None:
        """Nothing is left."""


def together(engine: Any, runtime: Any, requests: list[list[int]], tokens: int) -> dict[str, float]:
    """All in one engine; timed from when the last prompt is done."""
    for ids in requests:
        engine.submit(ids, max_new_tokens=tokens, sampling=Sampling(eos=()))
    begun: set[Any] = set()
    started, before, count = 0.0, 0, 0
    while engine.busy:
        events = engine.step()
        if len(begun) == len(requests):
            count += sum(len(event.tokens) for event in events)
        else:
            begun |= {event.id for event in events}
            started, before = perf_counter(), runtime.loaded_bytes
    return {
        "tokens_per_second": count / (perf_counter() - started),
        "bytes_per_token": (runtime.loaded_bytes - before) / count,
    }


def measure(path: str, budget: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, in turns."""
    tokenizer = generate.load_tokenizer(path)
    requests = prompts(tokenizer, arguments.requests)
    longest = max(map(len, requests)) + arguments.tokens
    model = emoe.from_pretrained(path, memory_budget=budget, context=longest, batch=arguments.requests)
    runs: dict[str, list[dict[str, float]]] = {"alone": [], "together": []}
    with emoe.Engine(model, scheduler=arguments.policy, chunk_rows=64) as engine:
        way = engine.choice.way
        for _ in range(arguments.repeats):
            runs["alone"].append(one_after_another(model, requests, arguments.tokens))
            runs["together"].append(together(engine, model.emoe, requests, arguments.tokens))
            engine._kept.clear()  # prompts of the next turn are computed again
    share = model.emoe.plan.resident_share
    model.emoe.close(restore=False)
    result = {kind: {name: median(run[name] for run in each) for name in each[0]} for kind, each in runs.items()}
    return {"budget": budget, "resident_share": share, "way": way, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; the demo model unless given")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each")
    parser.add_argument("--budget", action="append", type=_text_number, help="1.0 and 0.3 unless given")
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    generate.quiet_transformers()
    if arguments.model is None:
        from emoe.demo.builder import build

        arguments.model = str(build())
    for budget in arguments.budget or [1.0, 0.3]:
        found = measure(arguments.model, budget, arguments)
        if arguments.json:
            print(json.dumps(found))
            continue
        alone, both = found["alone"], found["together"]
        print(f"memory_budget={budget}, {found['resident_share']:.0%} resident, {found['way']}:")
        print(
            f"  one after another  {alone['tokens_per_second']:7.1f} tokens/s  "
            f"{alone['bytes_per_token'] / common.MIB:8.2f} MiB of experts a token"
        )
        print(
            f"  {arguments.requests} together        {both['tokens_per_second']:7.1f} tokens/s  "
            f"{both['bytes_per_token'] / common.MIB:8.2f} MiB of experts a token"
        )
        print(
            f"  together / alone   {both['tokens_per_second'] / alone['tokens_per_second']:7.2f} x         "
            f"{both['bytes_per_token'] / max(alone['bytes_per_token'], 1):8.2f} x"
        )


if __name__ == "__main__":
    main()
