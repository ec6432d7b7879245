"""Memory asked of the operating system against the budget: a 7 GB checkpoint, and long prompts on small ones.

python benchmarks/budget.py [--part large|prompts|all] [--budget 2GiB] [--limit 3GiB] [--tokens 24] [--checkpoint DIR]
    [--check] [--json FILE]

large: OLMoE-1B-7B's geometry with 8 of its 16 layers and random bfloat16 weights, written once into DIR (without
--checkpoint into a temporary folder). Two children run it with the budget: one unlimited, and one inside a memory
cgroup of --limit bytes, page cache included. Both must give the same tokens.

prompts: models of about 1 GB, with as many heads of keys as of queries and with an eighth of them; prompts of 4096
tokens, and batches of 8, one of them padded. Each is a child of its own.

The peak of an unlimited child (VmHWM of /proc/self/status) must stay within budget + bare import + 32 MiB. A bare
import is that of torch, Transformers and emoe in a process that does nothing else. What a process takes that then
generates with models of a few KB of the same two classes, without emoe, is printed beside it: the difference is what
plans leave to libraries (`library_bytes`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from rich.console import Console
from rich.table import Table

SLACK_BYTES = 32 * common.MIB
PEAK = """
def peak():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
"""
BARE = f"""import torch, transformers, emoe
{PEAK}
print(peak())
"""
TINY = f"""import torch, transformers
{PEAK}
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1, head_dim=16,
    num_attention_heads=2, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)
for config in (transformers.OlmoeConfig(**sizes), transformers.Qwen3MoeConfig(**sizes)):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generate(torch.ones(1, 16, dtype=torch.long), max_new_tokens=4, do_sample=False)
print(peak())
"""


@dataclass(frozen=True)
class Case:
    """A prompt on a model; `padded` rows have half of the tokens."""

    model: str
    budget: str
    batch: int
    prompt: int
    padded: int = 0


CASES = (
    Case("equal heads", "512MiB", 1, 4096),
    Case("equal heads", "512MiB", 8, 512),
    Case("equal heads", "1GiB", 8, 4096, padded=3),
    Case("grouped heads", "512MiB", 1, 4096),
    Case("grouped heads", "1GiB", 8, 1024, padded=3),
)


def small_models() -> dict[str, Any]:
    """Configs of 0.9 and 1.1 GB in bfloat16."""
    from transformers import Qwen3MoeConfig

    return {
        "equal heads": common.olmoe_config(layers=4, hidden=1024, intermediate=512, vocab=8192),
        "grouped heads": Qwen3MoeConfig(
            vocab_size=32768, hidden_size=1024, moe_intermediate_size=384, intermediate_size=2048, num_hidden_layers=6,
            num_attention_heads=16, num_key_value_heads=2, head_dim=128, num_experts=64, num_experts_per_tok=8,
            max_position_embeddings=8192, dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    }  # fmt: skip


def child(args: argparse.Namespace) -> None:
    import torch

    import emoe
    from emoe.memory import process_memory

    started = time.perf_counter()
    context = args.prompt + args.tokens if args.prompt > 256 else 2048
    model = emoe.from_pretrained(args.checkpoint, memory_budget=args.budget, context=context, batch=args.batch)
    loaded, load_peak = time.perf_counter(), process_memory()["peak"]
    prompt = 3 + torch.arange(args.batch * args.prompt).view(args.batch, -1) % 8000
    mask = torch.ones_like(prompt)
    mask[: args.padded, : args.prompt // 2] = 0
    tokens = model.generate(
        prompt, attention_mask=mask, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False
    )
    seconds = time.perf_counter() - loaded
    stats, plan = model.emoe.stats(), model.emoe.plan
    peak = process_memory()["peak"]
    model.emoe.close(restore=False)
    print(
        json.dumps(
            {
                "peak_bytes": peak,
                "load_peak_bytes": load_peak,
                "budget_bytes": plan.budget_bytes,
                "model_bytes": plan.model_bytes,
                "resident_share": plan.resident_share,
                "library_bytes": plan.library_bytes,
                "activation_bytes": plan.activation_bytes,
                "prefill_chunk": plan.prefill_chunk,
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
    parser.add_argument("--part", default="all", choices=("large", "prompts", "all"), help="default: all")
    parser.add_argument("--budget", default="2GiB", help="memory_budget of emoe in part large (default: 2GiB)")
    parser.add_argument("--limit", default="3GiB", help="of the memory cgroup (default: 3GiB)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens (default: 24)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt in part large (default: 64)")
    parser.add_argument("--checkpoint", type=Path, help="folder that the checkpoints are written to and kept in")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is passed")
    parser.add_argument("--json", type=Path, default=common.RESULTS / "budget.json")
    for name in ("--child", "--batch", "--padded"):
        kind: dict[str, Any] = {"action": "store_true"} if name == "--child" else {"type": int, "default": 0}
        parser.add_argument(name, help=argparse.SUPPRESS, **kind)
    args = parser.parse_args()
    if args.child:
        child(args)
        return 0

    from emoe.memory import format_bytes

    bare, tiny = (
        int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
        for code in (BARE, TINY)
    )
    print(f"bare import: {format_bytes(bare)}; with models of a few KB: {format_bytes(tiny - bare)} more")
    result: dict[str, Any] = {"bare_import_bytes": bare, "tiny_models_bytes": tiny, "slack_bytes": SLACK_BYTES}
    kept = True
    if args.part in ("large", "all"):
        kept &= large(args, bare, result)
    if args.part in ("prompts", "all"):
        kept &= prompts(args, bare, result)
    common.write_result(args.json, result)
    return int(args.check and not kept)


def command(folder: Path, budget: str, prompt: int, tokens: int, *, batch: int = 1, padded: int = 0) -> list[str]:
    return common.this_script(
        __file__, "--child", "--budget", budget, "--tokens", str(tokens), "--prompt", str(prompt),
        "--batch", str(batch), "--padded", str(padded), "--checkpoint", str(folder),
    )  # fmt: skip


def prompts(args: argparse.Namespace, bare: int, result: dict[str, Any]) -> bool:
    from emoe.memory import format_bytes

    table = Table(title=f"long prompts and batches, {args.tokens} new tokens")
    for name in ("model", "prompt", "budget", "activations", "chunk", "peak - bare", "over the budget", "seconds"):
        table.add_column(name, justify="left" if name == "model" else "right")
    result["prompts"] = []
    kept = True
    with common.scratch_folder(args.checkpoint) as folder:
        for case in CASES:
            place = common.write_checkpoint(small_models()[case.model], folder / case.model.replace(" ", "-"))
            got = common.run_child(
                command(place, case.budget, case.prompt, args.tokens, batch=case.batch, padded=case.padded)
            )
            over = got["peak_bytes"] - bare - got["budget_bytes"]
            kept &= over <= SLACK_BYTES
            result["prompts"].append({**vars(case), **got, "over_bytes": over})
            table.add_row(
                case.model, f"{case.batch} x {case.prompt}" + (f", {case.padded} padded" if case.padded else ""),
                case.budget, format_bytes(got["activation_bytes"]), str(got["prefill_chunk"]),
                format_bytes(got["peak_bytes"] - bare), format_bytes(over), f"{got['generate_seconds']:.1f}",
            )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"at most {format_bytes(SLACK_BYTES)} over the budget: {'kept' if kept else 'PASSED'}")
    return kept


def large(args: argparse.Namespace, bare: int, result: dict[str, Any]) -> bool:
    from emoe.memory import format_bytes
    from emoe.options import parse_budget

    with common.scratch_folder(args.checkpoint) as folder:
        common.write_checkpoint(common.half_olmoe_config(), folder)
        words = command(folder, args.budget, args.prompt, args.tokens)
        common.forget_pages(folder)
        free = common.run_child(words)
        common.forget_pages(folder)
        try:
            with common.memory_cgroup(parse_budget(args.limit).nbytes) as group:
                capped = common.run_child(words, cgroup=group)
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
        f"bare import {format_bytes(bare)}; bound {format_bytes(bound)}: "
        + ("kept" if free["peak_bytes"] <= bound else "PASSED"),
        f"\nsame tokens in the cgroup: {'yes' if same else 'NO'} {capped.get('error', '')}",
    )
    result |= {"bound_bytes": bound, "free": free, "capped": capped}
    return bool(free["peak_bytes"] <= bound and same)


if __name__ == "__main__":
    sys.exit(main())
