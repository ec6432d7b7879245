"""Memory asked of the operating system against the budget, on a 7 GB checkpoint.

python benchmarks/budget.py [--budget 2GiB] [--limit 3GiB] [--tokens 24] [--checkpoint DIR] [--check] [--json FILE]

The checkpoint has OLMoE-1B-7B's geometry with 8 of its 16 layers and random bfloat16 weights; it is written once
into DIR (without --checkpoint into a temporary folder). Two children run it with the budget: one unlimited, whose
peak (VmHWM of /proc/self/status) must stay within budget + the peak of a bare import of torch and transformers +
100 MiB, and one inside a memory cgroup of --limit bytes, page cache included. Both must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import common
from rich.console import Console
from rich.table import Table

SLACK_BYTES = 100 * common.MIB
BARE_IMPORT = """
import torch, transformers
print(next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


def child(args: argparse.Namespace) -> None:
    import torch

    import emoe
    from emoe.memory import process_memory

    started = time.perf_counter()
    model = emoe.from_pretrained(args.checkpoint, memory_budget=args.budget)
    loaded = time.perf_counter()
    prompt = torch.arange(3, 3 + args.prompt).unsqueeze(0)
    tokens = model.generate(prompt, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
    seconds = time.perf_counter() - loaded
    stats, plan = model.emoe.stats(), model.emoe.plan
    peak = process_memory()["peak"]
    model.emoe.close(restore=False)
    print(
        json.dumps(
            {
                "peak_bytes": peak,
                "budget_bytes": plan.budget_bytes,
                "model_bytes": plan.model_bytes,
                "resident_share": plan.resident_share,
                "load_seconds": loaded - started,
                "generate_seconds": seconds,
                "hit_rate": stats["hit_rate"],
                "bytes_read": stats["bytes_read"],
                "tokens": tokens[0].tolist(),
            }
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="2GiB", help="memory_budget of emoe (default: 2GiB)")
    parser.add_argument("--limit", default="3GiB", help="of the memory cgroup (default: 3GiB)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens (default: 24)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default: 64)")
    parser.add_argument("--checkpoint", type=Path, help="folder that the checkpoint is written to and kept in")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is passed")
    parser.add_argument("--json", type=Path, default=common.RESULTS / "budget.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return 0

    from emoe.memory import format_bytes
    from emoe.options import parse_budget

    bare = int(subprocess.run([sys.executable, "-c", BARE_IMPORT], stdout=subprocess.PIPE, check=True).stdout)
    with common.scratch_folder(args.checkpoint) as folder:
        common.write_checkpoint(common.half_olmoe_config(), folder)
        command = common.this_script(
            __file__, "--child", "--budget", args.budget, "--tokens", str(args.tokens), "--prompt", str(args.prompt),
            "--checkpoint", str(folder),
        )  # fmt: skip
        common.forget_pages(folder)
        free = common.run_child(command)
        common.forget_pages(folder)
        try:
            with common.memory_cgroup(parse_budget(args.limit).nbytes) as group:
                capped = common.run_child(command, cgroup=group)
        except PermissionError as error:
            capped = {"error": str(error)}
        except common.ChildFailedError as error:
            capped = {"error": str(error)}

    bound = free["budget_bytes"] + bare + SLACK_BYTES
    same = capped.get("tokens") == free["tokens"]
    table = Table(title=f"{format_bytes(free['model_bytes'])} of weights in {format_bytes(free['budget_bytes'])}")
    table.add_column("")
    table.add_column("unlimited", justify="right")
    table.add_column(f"cgroup {args.limit}", justify="right")
    rows = {
        "peak memory": ("peak_bytes", format_bytes),
        "share resident": ("resident_share", "{:.1%}".format),
        "hit rate": ("hit_rate", "{:.1%}".format),
        "bytes read": ("bytes_read", format_bytes),
        "load, seconds": ("load_seconds", "{:.1f}".format),
        "generate, seconds": ("generate_seconds", "{:.1f}".format),
    }
    for name, (key, form) in rows.items():
        table.add_row(name, form(free[key]), form(capped[key]) if key in capped else "-")
    console = Console()
    console.print(table)
    console.print(
        f"bare import of torch and transformers {format_bytes(bare)}; bound {format_bytes(bound)}: "
        + ("kept" if free["peak_bytes"] <= bound else "PASSED"),
        f"\nsame tokens in the cgroup: {'yes' if same else 'NO'} {capped.get('error', '')}",
    )
    common.write_result(args.json, {"bare_import_bytes": bare, "bound_bytes": bound, "free": free, "capped": capped})
    return int(args.check and not (free["peak_bytes"] <= bound and same))


if __name__ == "__main__":
    sys.exit(main())
