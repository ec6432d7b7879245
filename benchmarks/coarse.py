"""Decode with copies beside exact decode, in a memory cgroup that holds a part of the model; the disk is cold.

python benchmarks/coarse.py [--checkpoint DIR] [--share 0.333] [--coarse q3_k] [--dense-encoding q8_0] [--layers 16]
                            [--rounds 3] [--check]

OLMoE-1B-7B's geometry with random weights in bfloat16 (13.8 GB with its 16 layers), copies made beforehand by `emoe
convert --coarse`. The cgroup is the share of the checkpoint's bytes, page cache included; the budget in it is what
emoe's own libraries leave. In a third of the bytes there is room for copies in 3 bits, beside layers outside experts
in 8, which both modes have. The modes take turns, each round in a process of its own whose pages were dropped. Tokens
are random, as a model of random weights left alone repeats one. How much of its routing recurs depends on what a
token's own vector is to its context: --embedding multiplies it. At 1 nearly all recurs (`exact` reads 6 of a token's
128 experts), at 25 84 % of picks are in slots (docs/quality.md). --check: exit 1 below three times the tokens/s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table

TARGET = 3.0
OWN = 700 << 20  # bytes of a process beside its budget: torch, libraries, pages of files
CONTEXT = 256
WARM = 4  # tokens before those that are timed


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One mode: seconds of each token, and what was read for it."""
    import emoe

    options = {"routing": "coarse", "coarse": args.coarse} if args.child == "coarse" else {}
    if args.dense_encoding != "keep":
        options["dense_encoding"] = args.dense_encoding
    started = time.perf_counter()
    model = emoe.from_pretrained(args.checkpoint, memory_budget=args.budget, context=CONTEXT, **options)
    loaded = time.perf_counter() - started
    model.get_input_embeddings().register_forward_hook(lambda module, given, found: args.embedding * found)
    ids = torch.randint(
        3, model.config.vocab_size, (1, 8 + WARM + args.tokens), generator=torch.Generator().manual_seed(0)
    )
    seconds = []
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        for place in range(8, ids.shape[1]):
            if place == 8 + WARM:
                before = model.emoe.stats()
            began = time.perf_counter()
            model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - began)
    stats = model.emoe.stats()
    return {
        "seconds": seconds[WARM:],
        "load_seconds": loaded,
        "bytes_a_token": (stats["bytes_read"] - before["bytes_read"]) / args.tokens,
        "resident_share": stats["resident_share"],
        "coarse_mass": stats["routing"]["coarse_mass"],
        "isa": stats["isa"],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    nbytes = sum(file.stat().st_size for file in args.checkpoint.glob("*.safetensors"))
    limit = int(args.share * nbytes)
    rows: dict[str, list[dict[str, Any]]] = {"exact": [], "coarse": []}
    for _ in range(args.rounds):
        for mode, found in rows.items():
            common.forget_pages(args.checkpoint)
            command = common.this_script(
                __file__, "--child", mode, "--checkpoint", str(args.checkpoint), "--coarse", args.coarse,
                "--dense-encoding", args.dense_encoding, "--embedding", str(args.embedding),
                "--tokens", str(args.tokens), "--budget", str(limit - OWN),
            )  # fmt: skip
            with common.memory_cgroup(limit) as group:
                found.append(common.run_child(command, cgroup=group, environment={"EMOE_CACHE": str(args.cache)}))
    return {
        "limit_bytes": limit, "model_bytes": nbytes, "coarse": args.coarse, "dense_encoding": args.dense_encoding,
        "embedding": args.embedding, "rows": rows,
    }  # fmt: skip


def speed(row: dict[str, Any]) -> float:
    return 1 / statistics.mean(row["seconds"])


def show(console: Console, result: dict[str, Any]) -> float:
    from emoe.memory import format_bytes

    limit, nbytes = (format_bytes(result[key]) for key in ("limit_bytes", "model_bytes"))
    table = Table(title=f"{nbytes} of model in a cgroup of {limit}, cold, {os.cpu_count()} cores")
    for column in ("mode", "in slots", "tokens/s, by round", "MiB a token", "mass with copies"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, rows in result["rows"].items():
        last = rows[-1]
        table.add_row(
            mode if mode == "exact" else f"coarse, {result['coarse']}", f"{last['resident_share']:.0%}",
            ", ".join(f"{speed(row):.2f}" for row in rows), f"{last['bytes_a_token'] / common.MIB:.0f}",
            f"{last['coarse_mass']:.0%}",
        )  # fmt: skip
    console.print(table)
    exact, coarse = (result["rows"][mode] for mode in ("exact", "coarse"))
    ratios = [speed(b) / speed(a) for a, b in zip(exact, coarse, strict=True)]
    console.print(f"coarse {statistics.median(ratios):.2f} times exact ({min(ratios):.2f} to {max(ratios):.2f})")
    return statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder that model and copies are written to and kept in")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the model's bytes that the cgroup has")
    parser.add_argument("--coarse", default="q3_k", help="encoding of the copies")
    parser.add_argument("--dense-encoding", default="q8_0", help="of what lies outside experts; keep: as in the file")
    parser.add_argument("--embedding", type=float, default=25.0, help="factor of tokens' vectors")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help=f"exit with 1 below {TARGET} times")
    parser.add_argument("--json", type=Path, default=common.RESULTS / "coarse.json")
    parser.add_argument("--child", choices=["exact", "coarse"], help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return 0
    with common.scratch_folder(args.checkpoint) as folder:
        config = common.olmoe_config(layers=args.layers, hidden=2048, intermediate=1024, vocab=50304)
        args.checkpoint = common.write_checkpoint(config, folder / f"olmoe-{args.layers}")
        args.cache = folder / "copies"
        os.environ["EMOE_CACHE"] = str(args.cache)
        from emoe.convert.coarse import keep_copies

        print(keep_copies(args.checkpoint, args.coarse))
        result = run(args)
    ratio = show(Console(width=120), result)
    common.write_result(args.json, result)
    return int(args.check and ratio < TARGET)


if __name__ == "__main__":
    sys.exit(main())
