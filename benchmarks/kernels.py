"""Speed of the native expert kernels against memory bandwidth (decode) and against torch (prefill).

python benchmarks/kernels.py [--rounds 7] [--threads 2] [--isa avx2] [--json FILE]

Every case is timed in turn within a round and the best of all rounds counts, so that a busy machine disturbs all sides alike.
Decode: one token, each iteration on experts that the last ones did not touch; the bound is a native read of the same weights.
Prefill: torch runs the same linear layers in bfloat16, expert by expert. Everything is measured twice, in two child processes:
as the CPU is, and with both sides held to AVX2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from emoe import native, ops

AVX2 = {"EMOE_FORCE_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
DECODE_TARGET, PREFILL_TARGET = 0.60, 2.5


class Experts:
    """E random experts of one dtype and layout in a slab-like tensor, seen both as slots and as torch weights."""

    def __init__(self, E: int, H: int, I: int, dtype: torch.dtype, transposed: bool = False) -> None:  # noqa: E741
        self.E, self.H, self.I, self.transposed = E, H, I, transposed
        self.memory = torch.empty((E, 3 * I * H), dtype=dtype).normal_(std=0.02)
        self.slots, self.address = E, self.memory.data_ptr()
        self.slot_bytes = self.memory.stride(0) * dtype.itemsize
        shapes = ((E, H, 2 * I), (E, I, H)) if transposed else ((E, 2 * I, H), (E, H, I))
        self.gate_up = self.memory[:, : 2 * I * H].unflatten(1, shapes[0][1:])
        self.down = self.memory[:, 2 * I * H :].unflatten(1, shapes[1][1:])
        self.layout = native.load().MlpLayout(
            H, I, H, str(dtype).removeprefix("torch."), True, False, transposed, "silu",
            gate_up_offset=0, down_offset=2 * I * H * dtype.itemsize,
        )  # fmt: skip

    def emoe(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((*index.shape, self.H))
        ops.gather_mlp(self.layout, self, np.arange(self.E, dtype=np.int32), x, index, weights, out, "pairs")
        return ops.combine(out, x.dtype)

    def torch(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Transformers' eager loop."""
        out = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, position = torch.where(index == e)
            rows = x[token]
            gate_up = rows @ self.gate_up[e] if self.transposed else F.linear(rows, self.gate_up[e])
            gate, up = gate_up.chunk(2, -1)
            h = F.silu(gate) * up
            y = h @ self.down[e] if self.transposed else F.linear(h, self.down[e])
            out.index_add_(0, token, y * weights[token, position, None])
        return out


@dataclass
class Case:
    name: str
    sides: dict[str, Callable[[], Any]]
    work: float  # bytes (decode) or floating-point operations (prefill) of one call


def fresh_experts(experts: Experts, tokens: int, top_k: int) -> Callable[[], torch.Tensor]:
    """Routing whose experts move on by tokens * top_k with every call."""
    state = {"next": 0}

    def routing() -> torch.Tensor:
        first = state["next"]
        state["next"] = first + tokens * top_k
        return (torch.arange(first, first + tokens * top_k) % experts.E).view(tokens, top_k)

    return routing


def decode_cases(quick: bool) -> list[Case]:
    cases = []
    table = [
        ("H=2048 I=1024 bf16", 64, 2048, 1024, torch.bfloat16, False, 1),
        ("H=1024 I=512 bf16", 128, 1024, 512, torch.bfloat16, False, 1),
        ("H=2048 I=1024 bf16 transposed", 64, 2048, 1024, torch.bfloat16, True, 1),
        ("H=2048 I=1024 f16", 64, 2048, 1024, torch.float16, False, 1),
        ("H=2048 I=1024 fp32", 32, 2048, 1024, torch.float32, False, 1),
        ("H=2048 I=1024 bf16, 4 rows an expert", 64, 2048, 1024, torch.bfloat16, False, 4),
        ("H=2048 I=1024 bf16, 8 rows an expert", 64, 2048, 1024, torch.bfloat16, False, 8),
    ]
    for name, E, H, I, dtype, transposed, rows in table[: 2 if quick else None]:  # noqa: E741
        experts = Experts(E, H, I, dtype, transposed)
        x = torch.randn(rows, H, dtype=dtype)
        weights = torch.full((rows, 8), 0.125, dtype=dtype)
        ours, theirs = fresh_experts(experts, 1, 8), fresh_experts(experts, 1, 8)
        nbytes = experts.memory.nbytes

        def read(experts: Experts = experts, nbytes: int = nbytes) -> float:
            return native.load().read_seconds(experts.address, nbytes) * 8 / experts.E

        cases.append(
            Case(
                name,
                {
                    "emoe": lambda e=experts, x=x, w=weights, r=ours, n=rows: e.emoe(x, r().repeat(n, 1), w),
                    "torch": lambda e=experts, x=x, w=weights, r=theirs, n=rows: e.torch(x, r().repeat(n, 1), w),
                    "read": read,
                },
                8 * experts.slot_bytes,
            )
        )
    return cases


def prefill_cases(quick: bool) -> list[Case]:
    cases = []
    table = [
        ("256 rows of one expert, H=2048 I=1024 bf16", 1, 2048, 1024, torch.bfloat16, False, 256, 1),
        ("256 rows of one expert, H=1024 I=512 bf16", 1, 1024, 512, torch.bfloat16, False, 256, 1),
        ("256 tokens, 8 of 64, H=1024 I=512 bf16", 64, 1024, 512, torch.bfloat16, False, 256, 8),
        ("256 tokens, 8 of 64, H=1024 I=512 bf16 transposed", 64, 1024, 512, torch.bfloat16, True, 256, 8),
        ("256 rows of one expert, H=2048 I=1024 fp32", 1, 2048, 1024, torch.float32, False, 256, 1),
    ]
    for name, E, H, I, dtype, transposed, T, K in table[: 2 if quick else None]:  # noqa: E741
        experts = Experts(E, H, I, dtype, transposed)
        x = torch.randn(T, H, dtype=dtype)
        index = torch.rand(T, E).topk(K).indices
        weights = torch.full((T, K), 1.0 / K, dtype=dtype)
        cases.append(
            Case(
                name,
                {
                    "emoe": lambda e=experts, x=x, i=index, w=weights: e.emoe(x, i, w),
                    "torch": lambda e=experts, x=x, i=index, w=weights: e.torch(x, i, w),
                },
                2.0 * T * K * 3 * H * I,
            )
        )
    return cases


def measure(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    best: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for case in cases:
            for side, call in case.sides.items():
                for _ in range(4):
                    start = time.perf_counter()
                    own = call()
                    seconds = own if side == "read" else time.perf_counter() - start
                    best[case.name, side] = min(best.get((case.name, side), np.inf), seconds)
    return [
        {"name": case.name, "work": case.work, **{side: best[case.name, side] for side in case.sides}} for case in cases
    ]


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    native.load().set_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        decode = measure(decode_cases(args.quick), args.rounds)
        prefill = measure(prefill_cases(args.quick), args.rounds)
    print(json.dumps({"isa": native.load().isa(), "threads": args.threads, "decode": decode, "prefill": prefill}))


def in_child(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(console: Console, what: str, result: dict[str, Any]) -> None:
    table = Table(title=f"{what}: unit {result['isa']}, {result['threads']} threads")
    for column in ("case", "emoe ms", "torch ms", "emoe", "of read" + " / x torch", "target"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in result["decode"]:
        share = row["read"] / row["emoe"]
        rate = f"{row['work'] / row['emoe'] / 1e9:.1f} of {row['work'] / row['read'] / 1e9:.1f} GB/s"
        target = f">= {DECODE_TARGET:.0%}" if "rows" not in row["name"] else ""
        ratio = f"{share:.0%}, {row['torch'] / row['emoe']:.1f}x"
        table.add_row(
            "decode " + row["name"], f"{1e3 * row['emoe']:.2f}", f"{1e3 * row['torch']:.2f}", rate, ratio, target
        )
    for row in result["prefill"]:
        rate = f"{row['work'] / row['emoe'] / 1e9:.0f} GFLOP/s"
        ratio = f"{row['torch'] / row['emoe']:.2f}x"
        target = f">= {PREFILL_TARGET}x" if "bf16" in row["name"] else ""
        table.add_row(
            "prefill " + row["name"], f"{1e3 * row['emoe']:.2f}", f"{1e3 * row['torch']:.2f}", rate, ratio, target
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=["native", "avx2", "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="the first two cases of each kind")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    arguments = ["--rounds", str(args.rounds), "--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    console = Console(width=150)
    results = {}
    for name, environment in {"native": {}, "avx2": AVX2}.items():
        if args.isa in (name, "both"):
            results[name] = in_child(arguments, environment)
            show(console, "as the CPU is" if name == "native" else "both held to AVX2", results[name])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
