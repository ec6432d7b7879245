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
import torch

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
    """`generate` for each."""
    clocks = []
    begun, before = perf_counter(), model.emoe.loaded_bytes
    for ids in requests:
        clocks.append(_Clock(model.emoe))
        model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clocks[-1],
        )  # fmt: skip
    seconds, read = perf_counter() - begun, model.emoe.loaded_bytes - before
    decode = sum(len(each.times) - 1 for each in clocks)
    return {
        "decode": decode / sum(each.times[-1] - each.times[0] for each in clocks),
        "whole": len(requests) * tokens / seconds,
        "decode_bytes": sum(each.bytes[-1] - each.bytes[0] for each in clocks) / decode,
        "whole_bytes": read / (len(requests) * tokens),
    }


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
    """All in one engine; decode is from when the last prompt is done."""
    begun, before = perf_counter(), runtime.loaded_bytes
    for ids in requests:
        engine.submit(ids, max_new_tokens=tokens, sampling=Sampling(eos=()))
    seen: set[Any] = set()
    started, read, count = begun, before, 0
    while engine.busy:
        events = engine.step()
        if len(seen) == len(requests):
            count += sum(len(event.tokens) for event in events)
        else:
            seen |= {event.id for event in events}
            started, read = perf_counter(), runtime.loaded_bytes
    ended, total = perf_counter(), len(requests) * tokens
    return {
        "decode": count / (ended - started),
        "whole": total / (ended - begun),
        "decode_bytes": (runtime.loaded_bytes - read) / count,
        "whole_bytes": (runtime.loaded_bytes - before) / total,
    }


def measure(path: str, budget: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, in turns."""
    requests = prompts(generate.load_tokenizer(path), arguments.requests)
    longest = max(map(len, requests)) + arguments.tokens
    model = emoe.from_pretrained(
        path, memory_budget=budget, context=longest, batch=arguments.requests, predictor=arguments.predictor,
        policy=arguments.eviction,
    )  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {"alone": [], "together": []}
    options = {"scheduler": arguments.policy, "chunk_rows": arguments.chunk_rows}
    for _ in range(arguments.repeats):
        runs["alone"].append(one_after_another(model, requests, arguments.tokens))
        with emoe.Engine(model, **options) as engine:  # a new one each time, which has no prefixes to share
            runs["together"].append(together(engine, model.emoe, requests, arguments.tokens))
            way = engine.choice.way
    share = model.emoe.plan.resident_share
    model.emoe.close(restore=False)
    medians = {kind: {name: median(run[name] for run in each) for name in each[0]} for kind, each in runs.items()}
    return {"budget": budget, "resident_share": share, "way": way, **medians}


def report(found: dict[str, Any], requests: int) -> None:
    """Tokens/s and MiB of experts a token, of decode alone and of whole requests with their prompts."""
    print(f"memory_budget={found['budget']}, {found['resident_share']:.0%} resident, {found['way']}:")
    for kind, title in (("decode", "decode"), ("whole", "with prompts")):
        alone, both = (found[each][kind] for each in ("alone", "together"))
        less, more = (found[each][f"{kind}_bytes"] / common.MIB for each in ("alone", "together"))
        ratio = f"{more / less:.2f}" if less else "-"
        print(
            f"  {title:12}  one after another {alone:6.1f} tokens/s {less:6.2f} MiB; {requests} together {both:6.1f} "
            f"tokens/s {more:6.2f} MiB; {both / alone:5.2f} times the tokens/s, {ratio} of the bytes"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; the demo model unless given")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each")
    parser.add_argument("--budget", action="append", type=_text_number, help="1.0 and 0.3 unless given")
    parser.add_argument("--policy", default="fcfs", help="of the scheduler")
    parser.add_argument("--chunk-rows", type=int)
    parser.add_argument("--predictor", help="as in from_pretrained")
    parser.add_argument("--eviction", default="lru", help="policy= of from_pretrained")
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
        report(found, arguments.requests)


if __name__ == "__main__":
    main()
