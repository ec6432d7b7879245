"""Whole-model speed against Transformers' own implementations, and against accelerate's disk offload at equal memory.

python benchmarks/decode.py [--part resident|rest|busy|context|capped|all] [--rounds 5] [--limit 1GiB] \
    [--checkpoint DIR] [--check]

An OLMoE-like model of 0.86 billion parameters (8 layers, hidden 1024, 64 experts of 512, top 8, bfloat16, random
weights). Decode is fed random tokens: a model of random weights left alone repeats one token, whose experts stay hot.
resident: everything in memory; emoe, grouped_mm, eager and batched_mm take turns in one process, the best round of each
counts; once as the CPU is, and once with both sides held to AVX2. busy: the same with emoe (--dense) and grouped_mm,
quiet and beside one process that computes without end, in turn. capped: emoe and accelerate's disk offload, each in
its own process inside a memory cgroup of --limit bytes, page cache included and cold at the start; accelerate gets the
best of several memory settings. context: everything in memory, a token after 1024 and after 8192 others; the cache that
emoe writes in place and one that Transformers joins take turns in one process. rest: everything in
memory, what a step does outside experts by torch and by emoe's kernels, one after the other, in turn in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table

PREFILL_TOKENS = 256
DECODE_TARGET, PREFILL_TARGET, CAPPED_TARGET, BUSY_TARGET = 2.0, 2.0, 5.0, 2.5
CONTEXTS = (1024, 8192)
STOCK = ("grouped_mm", "eager", "batched_mm")
# What accelerate may put into memory; it keeps room for its largest layer inside this and needs more while loading.
ACCELERATE_SETTINGS = ("0.3GiB", "0.45GiB", "0.6GiB")


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 8000, (1, tokens), generator=generator)


@torch.no_grad()
def prefill_seconds(model: Any, tokens: int) -> float:
    ids = prompt(tokens)
    started = time.perf_counter()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - started


@torch.no_grad()
def decode_seconds(model: Any, tokens: int, warm: int = 2) -> float:
    """Seconds for one token: the median of `tokens` steps after `warm`."""
    out = model(prompt(8), use_cache=True, logits_to_keep=1)
    forced = prompt(warm + tokens, seed=1)
    times = []
    for step in range(warm + tokens):
        started = time.perf_counter()
        out = model(forced[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        if step >= warm:
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def resident(args: argparse.Namespace) -> dict[str, Any]:
    """One process, everything in memory, implementations in turn."""
    from transformers import AutoModelForCausalLM

    import emoe

    stock = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).eval()
    ours = emoe.from_pretrained(args.checkpoint, memory_budget=1.0)
    best: dict[str, dict[str, float]] = {}
    prefill_seconds(ours, PREFILL_TOKENS)  # fills the slots
    for round_ in range(args.rounds):
        for name in ("emoe", *STOCK):
            if name == "batched_mm" and round_:
                continue  # several seconds a token; one round shows it
            model = ours if name == "emoe" else stock
            if name != "emoe":
                stock.set_experts_implementation(name)
            short = name == "batched_mm"
            decode = decode_seconds(model, 4 if short else args.tokens)
            prefill = float("inf") if short else prefill_seconds(model, PREFILL_TOKENS)
            row = best.setdefault(name, {"decode": float("inf"), "prefill": float("inf")})
            row["decode"] = min(row["decode"], decode)
            row["prefill"] = min(row["prefill"], prefill)
    result = {
        name: {
            "decode_tokens_per_second": 1 / row["decode"],
            "prefill_tokens_per_second": PREFILL_TOKENS / row["prefill"],
        }
        for name, row in best.items()
    }
    return {"speeds": result, "hit_rate": ours.emoe.stats()["hit_rate"], "isa": ours.emoe.stats()["isa"]}


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """One that computes without end, in a session of its own, as from another terminal."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        time.sleep(0.3)
        yield
    finally:
        busy.kill()
        busy.wait()


def busy(args: argparse.Namespace) -> dict[str, Any]:
    """One process, everything in memory, quiet and beside a busy process in turn: milliseconds a token, by round."""
    from transformers import AutoModelForCausalLM

    import emoe

    stock = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16).eval()
    stock.set_experts_implementation("grouped_mm")
    models = {"emoe": emoe.from_pretrained(args.checkpoint, memory_budget=1.0, dense=args.dense), "grouped_mm": stock}
    times: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in models}
    for _ in range(2):
        prefill_seconds(models["emoe"], PREFILL_TOKENS)  # fills the slots
    for _ in range(args.rounds):
        for when, beside in {"quiet": contextlib.nullcontext, "busy": busy_process}.items():
            with beside():
                for name, model in models.items():
                    tokens = args.tokens if name == "emoe" else min(args.tokens, 8)  # it may take seconds a token
                    times[name][when].append(1e3 * decode_seconds(model, tokens))
    stats = models["emoe"].emoe.stats()
    return {"ms_a_token": times, "isa": stats["isa"], "threads": stats["threads"], "load_average": os.getloadavg()[0]}


@torch.no_grad()
def steps_in_turn(runs: dict[str, tuple[Any, Any]], tokens: int, seed: int) -> dict[str, float]:
    """Milliseconds of a token by name of a model and its cache: the least of `tokens` steps, taken in turn."""
    forced, warm = prompt(2 + tokens, seed), 2
    best = dict.fromkeys(runs, float("inf"))
    for step in range(warm + tokens):
        for name, (model, cache) in runs.items():
            started = time.perf_counter()
            model(forced[:, step : step + 1], past_key_values=cache, use_cache=True)
            if step >= warm:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
    return best


def context_child(args: argparse.Namespace) -> dict[str, Any]:
    """One process, everything in memory: the least milliseconds of a token over all rounds."""
    from transformers import DynamicCache

    import emoe

    class Joined(DynamicCache):
        """emoe leaves caches of other classes as they are."""

    model = emoe.from_pretrained(args.checkpoint, memory_budget=1.0, context=max(CONTEXTS))
    prefill_seconds(model, PREFILL_TOKENS)  # fills the slots
    best: dict[str, float] = {}
    for round_ in range(args.rounds):
        for context in CONTEXTS:
            runs = {
                f"{context} {name}": (model, filled(model.config, kind(config=model.config), context))
                for name, kind in (("joined", Joined), ("in place", DynamicCache))
            }
            for name, each in steps_in_turn(runs, args.tokens, round_).items():
                best[name] = min(best.get(name, each), each)
    return best


REST: dict[str, dict[str, Any]] = {
    "nothing": {"dense": "torch", "attention": "torch", "norms": "torch"},
    "linear layers": {"attention": "torch", "norms": "torch"},
    "and attention": {"norms": "torch"},
    "and norms": {},
}


def rest_child(args: argparse.Namespace) -> dict[str, Any]:
    """One process, everything in memory: the least milliseconds of a token and of a prompt over all rounds."""
    from transformers import DynamicCache

    import emoe

    models = {
        name: emoe.from_pretrained(args.checkpoint, memory_budget=1.0, context=max(CONTEXTS), **options)
        for name, options in REST.items()
    }
    best: dict[str, dict[str, float]] = {name: {} for name in models}
    for model in models.values():
        prefill_seconds(model, PREFILL_TOKENS)  # fills the slots
    for round_ in range(args.rounds):
        found = {"prompt": {name: 1e3 * prefill_seconds(model, PREFILL_TOKENS) for name, model in models.items()}}
        for context in (0, *CONTEXTS):
            runs = {
                name: (model, filled(model.config, DynamicCache(config=model.config), context))
                for name, model in models.items()
            }
            found[f"after {context}"] = steps_in_turn(runs, args.tokens, round_)
        for what, times in found.items():
            for name, each in times.items():
                best[name][what] = min(best[name].get(what, each), each)
    return {"milliseconds": best, "isa": next(iter(models.values())).emoe.stats()["isa"]}


def show_rest(console: Console, what: str, result: dict[str, Any]) -> None:
    rows = result["milliseconds"]
    table = Table(title=f"outside experts, ms (times faster), {what}: kernels {result['isa']}")
    columns = list(rows["nothing"])
    for column in ("computed by emoe", *columns):
        table.add_column(column, justify="left" if column == "computed by emoe" else "right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[each]:.1f} ({rows['nothing'][each] / row[each]:.2f})" for each in columns))
    console.print(table)


def filled(config: Any, cache: Any, tokens: int) -> Any:
    """A cache of so many random keys and values."""
    if not tokens:
        return cache
    shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)
    return cache


def capped_child(args: argparse.Namespace) -> dict[str, Any]:
    """One side inside the cgroup it was started in."""
    load: Callable[[], Any] = {"emoe": load_emoe, "accelerate": load_accelerate}[args.child](args)
    started = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - started
    gc.collect()
    seconds = decode_seconds(model, args.tokens, warm=4)
    result: dict[str, Any] = {
        "tokens_per_second": 1 / seconds,
        "load_seconds": loaded,
        "setting": args.setting,
    }
    if args.child == "emoe":
        stats = model.emoe.stats()
        result |= {key: stats[key] for key in ("hit_rate", "bytes_read", "resident_share", "budget_bytes")}
    return result


def load_emoe(args: argparse.Namespace) -> Callable[[], Any]:
    import emoe

    return lambda: emoe.from_pretrained(args.checkpoint, memory_budget=args.setting, context=256)


def load_accelerate(args: argparse.Namespace) -> Callable[[], Any]:
    from transformers import AutoModelForCausalLM

    folder = tempfile.mkdtemp(dir=args.checkpoint)
    return lambda: AutoModelForCausalLM.from_pretrained(
        args.checkpoint,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": args.setting},
        offload_folder=folder,
    ).eval()


def capped(args: argparse.Namespace) -> dict[str, Any]:
    from emoe.options import parse_budget

    limit = parse_budget(args.limit).nbytes
    sides: dict[str, Any] = {}
    for side, settings in {"emoe": [args.budget], "accelerate": list(ACCELERATE_SETTINGS)}.items():
        tried = []
        for setting in settings:
            common.forget_pages(args.checkpoint)
            command = common.this_script(
                __file__, "--child", side, "--setting", setting, "--checkpoint", str(args.checkpoint),
                "--tokens", str(args.tokens),
            )  # fmt: skip
            try:
                with common.memory_cgroup(limit) as group:
                    tried.append(common.run_child(command, cgroup=group))
            except common.ChildFailedError as error:
                why = "killed, for memory as a rule" if error.returncode in (-9, 137) else str(error)[-300:]
                tried.append({"setting": setting, "tokens_per_second": 0.0, "error": why})
            for folder in args.checkpoint.glob("tmp*"):
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        sides[side] = {"best": max(tried, key=lambda each: each["tokens_per_second"]), "tried": tried}
    return {"limit_bytes": limit, **sides}


def show_resident(console: Console, what: str, result: dict[str, Any]) -> tuple[float, float]:
    speeds = result["speeds"]
    best = {
        kind: max(speeds[name][kind] for name in STOCK)
        for kind in ("decode_tokens_per_second", "prefill_tokens_per_second")
    }
    table = Table(title=f"fully resident, 0.86B bfloat16, {what}: kernels {result['isa']}")
    for column in ("", "decode tok/s", "x best stock", f"prefill of {PREFILL_TOKENS} tok/s", "x best stock"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in speeds.items():
        cells = [f"{row[kind]:.1f}" for kind in best]
        ratios = [f"{row[kind] / best[kind]:.2f}" for kind in best]
        table.add_row(name, cells[0], ratios[0], cells[1] if row["prefill_tokens_per_second"] else "-", ratios[1])
    console.print(table)
    ours = speeds["emoe"]
    decode, prefill = (ours[kind] / best[kind] for kind in best)
    return decode, prefill


def show_busy(console: Console, result: dict[str, Any], dense: str) -> float:
    title = f"fully resident, kernels {result['isa']}, threads {result['threads']}, dense={dense}"
    table = Table(title=f"{title}, load average {result['load_average']:.1f}: ms a token, median (lowest to highest)")
    for column in ("", "quiet", "beside a busy process", "times"):
        table.add_column(column, justify="left" if not column else "right")
    ratios = {}
    for name, row in result["ms_a_token"].items():
        middle = {when: statistics.median(each) for when, each in row.items()}
        ratios[name] = middle["busy"] / middle["quiet"]
        cells = [f"{middle[when]:.1f} ({min(each):.1f} to {max(each):.1f})" for when, each in row.items()]
        table.add_row(name, *cells, f"{ratios[name]:.2f}")
    console.print(table)
    return ratios["emoe"]


def show_capped(console: Console, result: dict[str, Any]) -> float:
    from emoe.memory import format_bytes

    table = Table(title=f"inside a cgroup of {format_bytes(result['limit_bytes'])}, page cache cold")
    for column in ("", "setting", "decode tok/s", "load s", "remark"):
        table.add_column(column, justify="right" if "s" in column[-3:] else "left")
    for side in ("emoe", "accelerate"):
        for row in result[side]["tried"]:
            remark = row.get("error") or (f"hit rate {row['hit_rate']:.1%}" if "hit_rate" in row else "")
            load = f"{row['load_seconds']:.1f}" if "load_seconds" in row else "-"
            table.add_row(side, row["setting"], f"{row['tokens_per_second']:.2f}", load, remark)
    console.print(table)
    theirs = result["accelerate"]["best"]["tokens_per_second"]
    ours = result["emoe"]["best"]["tokens_per_second"]
    return ours / theirs if theirs else float("inf") if ours else 0.0


def child_command(args: argparse.Namespace, part: str, *more: str) -> list[str]:
    """This script, for one part in a process of its own."""
    given = ("--checkpoint", str(args.checkpoint), "--rounds", str(args.rounds), "--tokens", str(args.tokens))
    return common.this_script(__file__, "--child", part, *given, *more)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["resident", "rest", "busy", "context", "capped", "all"], default="all")
    parser.add_argument("--dense", choices=["auto", "native"], default="auto", help="of emoe, beside a busy process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="decode steps that are timed (default: 24)")
    parser.add_argument("--limit", default="1GiB", help="of the memory cgroup (default: 1GiB)")
    parser.add_argument("--budget", default="728MiB", help="memory_budget of emoe inside it (default: 728MiB)")
    parser.add_argument("--checkpoint", type=Path, help="folder that the checkpoint is written to and kept in")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--json", type=Path, default=common.RESULTS / "decode.json")
    parser.add_argument(
        "--child", choices=["resident", "rest", "busy", "context", "emoe", "accelerate"], help=argparse.SUPPRESS
    )
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        children = {"resident": resident, "rest": rest_child, "busy": busy, "context": context_child}
        child = children.get(args.child, capped_child)
        print(json.dumps(child(args)))
        return 0

    console = Console(width=140)
    results: dict[str, Any] = {}
    missed = []
    with common.scratch_folder(args.checkpoint) as folder:
        args.checkpoint = common.write_checkpoint(common.small_config(), folder)
        if args.part in ("resident", "all"):
            command = child_command(args, "resident")
            for name, environment in {"as the CPU is": {}, "both held to AVX2": common.AVX2}.items():
                results[name] = common.run_child(command, environment=environment)
                decode, prefill = show_resident(console, name, results[name])
                console.print(
                    f"decode {decode:.2f} x (target {DECODE_TARGET}), prefill {prefill:.2f} x ({PREFILL_TARGET})"
                )
                missed += [decode < DECODE_TARGET, prefill < PREFILL_TARGET]
        if args.part in ("busy", "all"):
            command = child_command(args, "busy", "--dense", args.dense)
            results["busy"] = common.run_child(command)
            ratio = show_busy(console, results["busy"], args.dense)
            console.print(f"emoe beside a busy process {ratio:.2f} x its quiet time (target at most {BUSY_TARGET})")
            missed.append(ratio > BUSY_TARGET)
        if args.part in ("context", "all"):
            command = child_command(args, "context")
            results["context"] = common.run_child(command)
            for name, milliseconds in results["context"].items():
                console.print(f"a token after {name}: {milliseconds:.1f} ms")
        if args.part in ("rest", "all"):
            command = child_command(args, "rest")
            for name, environment in {"as the CPU is": {}, "both held to AVX2": common.AVX2}.items():
                results[f"rest, {name}"] = common.run_child(command, environment=environment)
                show_rest(console, name, results[f"rest, {name}"])
        if args.part in ("capped", "all"):
            results["capped"] = capped(args)
            ratio = show_capped(console, results["capped"])
            console.print(f"emoe {ratio:.1f} x accelerate (target {CAPPED_TARGET})")
            missed.append(ratio < CAPPED_TARGET)
    common.write_result(args.json, results)
    return int(args.check and any(missed))


if __name__ == "__main__":
    sys.exit(main())
