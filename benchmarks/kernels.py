"""Speed of the native expert kernels against memory bandwidth (decode) and against torch (prefill).

python benchmarks/kernels.py [--rounds 15] [--threads 1 2] [--isa avx2] [--check] [--json FILE]

The sides of a case are timed in turn, in many short rounds: times are the best of all rounds, ratios the median.
Decode: one token, each call on experts that the last ones did not touch; the bound is a native read of as many bytes.
Encoded: the same for one token and experts in each encoding; one token and one expert that stays in cache; 16 and 256
rows of one expert.
Prefill: torch runs the same two linear layers and the gate in bfloat16; several experts: Transformers' eager loop.
Overhead: gather_mlp and combine from Python on experts of a few kilobytes.
Everything is measured in child processes: as the CPU is, and with both sides held to AVX2.
--check: exit 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from emoe import native
from emoe.compute import ops
from emoe.model.encoding import encoding
from emoe.model.held import Held
from emoe.model.spec import ParamSpec, slot_offsets

LONG = 0.3  # seconds; a side that takes longer runs once a round
AVX2 = {"EMOE_FORCE_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
# On a busy machine two threads may otherwise share a core, each spinning while it waits for the other.
PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
DECODE_TARGET = 0.60  # of the read bandwidth
OVERHEAD_TARGET = 30.0  # microseconds a layer
# Against torch's bfloat16 linear, where that has no instruction of its own. With AVX512-BF16 torch and these kernels
# multiply by the same instruction, both near its peak, and neither can be 2.5 times the other.
PREFILL_TARGETS = {"avx2": 2.5}


class Experts:
    """E random experts of one dtype and layout in a slab-like tensor, seen both as slots and as torch weights."""

    def __init__(self, E: int, H: int, I: int, dtype: torch.dtype, transposed: bool = False) -> None:
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

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Every row through expert 0, without gathering or scattering."""
        gate, up = F.linear(x, self.gate_up[0]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[0])

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


# Where blocks have float16 scales: random bytes there would be infinite.
HALVES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2),
    "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,), "gguf_mxfp4": (), "q2_k": (80, 82), "q3_k": (108,),
    "iq1_s": (0,), "iq1_m": (), "iq2_xxs": (0,), "iq2_xs": (0,),
    "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
}  # fmt: skip
ENCODED = (
    *HALVES, "mxfp4", "nvfp4", "e4m3-128x128-float32", "int8-row-float32", "int4-32-bfloat16", "int4-128-float16-zeros",
    "awq-128-float16", "gptq-128-float16",
)  # fmt: skip
IN_CACHE = "1 row of one expert in cache"
WITH_TARGET = [name for name in ENCODED if not name.startswith(("q2", "q3", "iq1", "iq2", "iq3"))]


class Encoded:
    """E experts of one encoding, alike: codes are random, scales about 0.01."""

    def __init__(self, name: str, E: int, H: int, I: int) -> None:
        self.H, self.slots, how = H, E, encoding(name)
        self.slot_of = np.arange(E, dtype=np.int32)
        shapes = {"up": (2 * I, H), "down": (H, I)}
        stored = [
            ParamSpec(f"{matrix}.{plane.name}", how.shapes(*shape)[plane.name], plane.dtype)
            for matrix, shape in shapes.items()
            for plane in how.planes
        ]
        offsets, self.slot_bytes = slot_offsets(stored)
        one = torch.randint(0, 256, (self.slot_bytes,), dtype=torch.uint8)
        for spec in stored:
            array = one[offsets[spec.name] :][: spec.nbytes]
            plane = spec.name.split(".")[1]
            if plane in ("scales", "factor"):
                dtype = getattr(torch, spec.dtype)
                array[:] = (
                    torch.full(spec.shape, 120 if spec.dtype == "uint8" else 0.01).to(dtype).view(-1).view(torch.uint8)
                )
            elif plane == "codes" and how.codes in ("e4m3", "e5m2"):
                array &= 0xBB  # neither NaN nor infinite
            elif plane == "blocks":
                blocks = array.view(-1, how.planes[0].count)
                for at in HALVES[name]:
                    blocks[:, at : at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
                if name == "iq1_m":  # its scale is 0x1...
                    blocks[:, 55] = blocks[:, 55] & 15 | 16
                if name == "gguf_mxfp4":
                    blocks[:, 0] = 120
        self.memory = one.repeat(E)
        self.address = self.memory.data_ptr()
        scales = how.plane("scales")

        def weights(matrix: str, first: int, count: int) -> dict[str, Any]:
            rows, depth = shapes[matrix]
            return {
                "codes": how.codes, "rows": rows, "depth": depth, "first": first, "step": 1, "count": count,
                "planes": {plane.name: offsets[f"{matrix}.{plane.name}"] for plane in how.planes},
                "scale": how.scale, "scale_block": scales.block if scales else (0, 0),
            }  # fmt: skip

        self.layout = ops.make_layout(
            {
                "hidden": H, "intermediate": I, "hidden_out": H, "has_gate": True, "interleaved": False,
                "activation": "silu", "gate": weights("up", 0, I), "up": weights("up", I, I),
                "down": weights("down", 0, H),
            }
        )  # fmt: skip

    def emoe(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((*index.shape, self.H))
        ops.gather_mlp(self.layout, self, self.slot_of, x, index, weights, out, "pairs")
        return ops.combine(out, x.dtype)


@dataclass
class Case:
    name: str
    sides: dict[str, Callable[[], Any]]
    work: float  # bytes (decode) or floating-point operations (prefill) of one call


def fresh_experts(experts: Experts, side: int) -> Callable[[], torch.Tensor]:
    """Routing of one token to 8 experts that move on with every call.

    The sides keep a third of the weights apart, so that none finds in a cache what another has just read.
    """
    turn = itertools.count(side * (experts.E // 8) // 3)
    return lambda: (torch.arange(8) + 8 * next(turn)).remainder(experts.E).view(1, 8)


def decode_cases(quick: bool) -> list[Case]:
    cases = []
    table = [
        ("H=2048 I=1024 bf16", 32, 2048, 1024, torch.bfloat16, False, 1),
        ("H=1024 I=512 bf16", 128, 1024, 512, torch.bfloat16, False, 1),
        ("H=2048 I=1024 bf16 transposed", 32, 2048, 1024, torch.bfloat16, True, 1),
        ("H=2048 I=1024 f16", 32, 2048, 1024, torch.float16, False, 1),
        ("H=2048 I=1024 fp32", 16, 2048, 1024, torch.float32, False, 1),
        ("H=2048 I=1024 bf16, 4 rows an expert", 32, 2048, 1024, torch.bfloat16, False, 4),
        ("H=2048 I=1024 bf16, 8 rows an expert", 32, 2048, 1024, torch.bfloat16, False, 8),
    ]
    for name, E, H, I, dtype, transposed, rows in table[: 2 if quick else None]:
        experts = Experts(E, H, I, dtype, transposed)
        x = torch.randn(rows, H, dtype=dtype)
        weights = torch.full((rows, 8), 0.125, dtype=dtype)
        ours, theirs, first = (fresh_experts(experts, side) for side in range(3))

        def read(experts: Experts = experts, first: Any = first) -> float:
            # E divides by 8, so the experts of one call lie together.
            start = experts.address + int(first()[0, 0]) * experts.slot_bytes
            return native.load().read_seconds(start, 8 * experts.slot_bytes)

        cases.append(
            Case(
                name,
                {
                    "emoe": lambda e=experts, x=x, w=weights, r=ours, n=rows: e.emoe(x, r().repeat(n, 1), w),
                    "read": read,
                    "torch": lambda e=experts, x=x, w=weights, r=theirs, n=rows: e.torch(x, r().repeat(n, 1), w),
                },
                8 * experts.slot_bytes,
            )
        )
    return cases


def encoded_cases(name: str, quick: bool) -> list[Case]:
    """One encoding at a time, since all together would not fit into memory."""
    cases = []
    for H, I in ((2048, 1024), (1024, 512)):
        one = Encoded(name, 1, H, I).slot_bytes
        experts = Encoded(name, max(24, min(256, (400 << 20) // one) // 8 * 8), H, I)
        turns = [itertools.count(side * (experts.slots // 8) // 2) for side in range(2)]

        def first(side: int, experts: Encoded = experts, turns: Any = turns) -> int:
            return int(8 * next(turns[side]) % experts.slots)

        def read(experts: Encoded = experts, first: Any = first) -> float:
            return native.load().read_seconds(experts.address + first(1) * experts.slot_bytes, 8 * experts.slot_bytes)

        x, weights = torch.randn(1, H, dtype=torch.bfloat16), torch.full((1, 8), 0.125)
        ids = torch.arange(experts.slots).view(-1, 1, 8)

        def call(experts: Any = experts, first: Any = first, x: Any = x, ids: Any = ids, w: Any = weights) -> Any:
            return experts.emoe(x, ids[first(0) // 8], w)

        cases.append(Case(f"{name} H={H} I={I}", {"emoe": call, "read": read}, 8 * experts.slot_bytes))
    if not quick:
        alone_cases = [(1, IN_CACHE, 1024, 512), *((n, f"{n} rows of one expert", 2048, 1024) for n in (16, 256))]
        for rows, what, H, I in alone_cases:
            many, index = torch.randn(rows, H, dtype=torch.bfloat16), torch.zeros((rows, 1), dtype=torch.int64)
            one_of = Encoded(name, 1, H, I)
            alone: dict[str, Callable[[], Any]] = {
                "emoe": lambda e=one_of, x=many, i=index, n=rows: e.emoe(x, i, torch.ones(n, 1))
            }
            work = float(one_of.slot_bytes) if what == IN_CACHE else 2.0 * rows * 3 * H * I
            cases.append(Case(f"{name}, {what}, H={H} I={I}", alone, work))
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
    for name, E, H, I, dtype, transposed, T, K in table[: 2 if quick else None]:
        experts = Experts(E, H, I, dtype, transposed)
        x = torch.randn(T, H, dtype=dtype)
        index = torch.rand(T, E).topk(K).indices
        weights = torch.full((T, K), 1.0 / K, dtype=dtype)
        sides: dict[str, Callable[[], Any]] = {
            "emoe": lambda e=experts, x=x, i=index, w=weights: e.emoe(x, i, w),
            "torch": (lambda e=experts, x=x: e.linear(x))
            if E == 1
            else (lambda e=experts, x=x, i=index, w=weights: e.torch(x, i, w)),
        }
        cases.append(Case(name, sides, 2.0 * T * K * 3 * H * I))
    return cases


def linear_cases(rows: int) -> list[Case]:
    """A linear layer of 2048 by 2048 as it lies in memory, moving on over 24 of them; torch has it in bfloat16."""
    cases = []
    for name in ("bfloat16", "q8_0", "q4_0", "q4_k", "q6_k", "e4m3-128x128-float32"):
        layers = [Held(encoding(name), 2048, 2048) for _ in range(24)]
        for layer in layers:  # any bytes will do, but for numbers that are not finite
            layer.buffer.zero_()
        weights = torch.empty((24, 2048, 2048), dtype=torch.bfloat16).normal_(std=0.02)
        x = torch.randn(rows, 2048, dtype=torch.bfloat16)
        ours, theirs, first = (itertools.count(8 * side) for side in range(3))
        sides: dict[str, Callable[[], Any]] = {
            "emoe": lambda layers=layers, x=x, turn=ours: ops.linear(layers[next(turn) % 24], x, None),
            "torch": lambda weights=weights, x=x, turn=theirs: F.linear(x, weights[next(turn) % 24]),
        }
        if rows == 1:
            sides["read"] = lambda layers=layers, turn=first: native.load().read_seconds(
                layers[next(turn) % 24].buffer.data_ptr(), layers[0].nbytes
            )
        work = layers[0].nbytes if rows == 1 else 2.0 * rows * 2048 * 2048
        cases.append(Case(f"linear 2048 x 2048 in {name}", sides, work))
    return cases


def overhead(rounds: int) -> float:
    """Microseconds of one layer's calls from Python with next to nothing to compute: one token, 8 of 64 experts."""
    experts = Experts(64, 64, 32, torch.bfloat16)
    x, weights = torch.randn(1, 64, dtype=torch.bfloat16), torch.full((1, 8), 0.125, dtype=torch.bfloat16)
    index, slot_of = torch.arange(8).view(1, 8), np.arange(64, dtype=np.int32)
    calls, best = 20, np.inf
    for _ in range(20 * rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = torch.zeros((1, 8, 64))
            ops.gather_mlp(experts.layout, experts, slot_of, x, index, weights, out, "pairs")
            ops.combine(out, x.dtype)
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * float(best)


def measure(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Best seconds of each side, and the ratios to emoe: the median over rounds of the best of a round.

    The memory bandwidth of a shared machine drifts by half within seconds: the best of one side and of another over the
    whole run need not come from the same time.
    """
    best: dict[tuple[str, str], list[float]] = {(case.name, side): [] for case in cases for side in case.sides}
    for _ in range(rounds):
        for case in cases:
            for side, call in case.sides.items():
                seen = best[case.name, side]
                times = [_seconds(side, call) for _ in range(4 if min(seen, default=0.0) < LONG else 1)]
                seen.append(min(times))
    results = []
    for case in cases:
        result: dict[str, Any] = {"name": case.name, "work": case.work}
        ours = best[case.name, "emoe"]
        for side in case.sides:
            theirs = best[case.name, side]
            result[side] = min(theirs)
            result[f"{side}_ratio"] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        results.append(result)
    return results


def _seconds(side: str, call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    own = call()
    return float(own) if side == "read" else time.perf_counter() - start


def child(args: argparse.Namespace) -> None:
    [threads] = args.threads
    torch.set_num_threads(threads)
    native.load().set_threads(threads)
    torch.manual_seed(0)
    result = {"isa": native.load().isa(), "threads": threads, "load_average": os.getloadavg()[0]}
    with torch.no_grad():
        result["decode"] = measure(decode_cases(args.quick) + ([] if args.quick else linear_cases(1)), args.rounds)
        result["prefill"] = measure(prefill_cases(args.quick) + ([] if args.quick else linear_cases(256)), args.rounds)
        result["overhead_us"] = overhead(args.rounds)
        result["encoded"] = [
            each for name in args.encodings for each in measure(encoded_cases(name, args.quick), args.rounds)
        ]
    print(json.dumps(result))


def in_child(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(
        command, env={**PINNED, **os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@dataclass
class Row:
    """One line of the table. `figure` is what the target bounds: from above where `most`, else from below."""

    cells: tuple[str, ...]
    figure: float
    target: float | None = None
    most: bool = False

    @property
    def missed(self) -> bool:
        if self.target is None:
            return False
        return self.figure > self.target if self.most else self.figure < self.target


def rows_of(result: dict[str, Any]) -> list[Row]:
    rows = []
    for case in result["decode"]:
        share = case["read_ratio"]
        rate = f"{case['work'] / case['emoe'] / 1e9:.1f} of {case['work'] / case['read'] / 1e9:.1f} GB/s"
        cells = (
            f"decode {case['name']}",
            *_milliseconds(case),
            rate,
            f"{share:.0%}, {case['torch_ratio']:.1f}x",
        )
        rows.append(Row(cells, share, DECODE_TARGET if case["name"].endswith(" bf16") else None))
    for case in result["prefill"]:
        ratio = case["torch_ratio"]
        rate = f"{case['work'] / case['emoe'] / 1e9:.0f} GFLOP/s"
        bounded = case["name"].endswith("bf16") and "one expert" in case["name"]
        target = PREFILL_TARGETS.get(result["isa"]) if bounded else None
        rows.append(Row((f"prefill {case['name']}", *_milliseconds(case), rate, f"{ratio:.2f}x"), ratio, target))
    for case in result["encoded"]:
        if "read" in case:
            share = case["read_ratio"]
            rate = f"{case['work'] / case['emoe'] / 1e9:.1f} of {case['work'] / case['read'] / 1e9:.1f} GB/s"
            bounded = case["name"].split()[0] in WITH_TARGET
            cells = (f"decode {case['name']}", f"{1e3 * case['emoe']:.2f}", "", rate, f"{share:.0%}")
            rows.append(Row(cells, share, DECODE_TARGET if bounded else None))
        else:
            rate = case["work"] / case["emoe"] / 1e9
            what, unit = ("decode", "GB/s") if IN_CACHE in case["name"] else ("prefill", "GFLOP/s")
            cells = (f"{what} {case['name']}", f"{1e3 * case['emoe']:.2f}", "", f"{rate:.0f} {unit}", "")
            rows.append(Row(cells, rate))
    spent = result["overhead_us"]
    cells = ("overhead of one layer from Python", f"{spent / 1e3:.3f}", "", "", f"{spent:.0f} us")
    rows.append(Row(cells, spent, OVERHEAD_TARGET, most=True))
    return rows


def _milliseconds(case: dict[str, Any]) -> tuple[str, str]:
    return f"{1e3 * case['emoe']:.2f}", f"{1e3 * case['torch']:.2f}"


def show(console: Console, what: str, result: dict[str, Any]) -> list[str]:
    """Prints the table and returns the targets that were missed, as sentences."""
    title = f"{what}: unit {result['isa']}, threads {result['threads']}, load average {result['load_average']:.1f}"
    table = Table(title=title)
    for column in ("case", "emoe ms", "torch ms", "emoe", "of read, x torch", "target"):
        table.add_column(column, justify="left" if column == "case" else "right")
    missed = []
    for row in rows_of(result):
        bound = "" if row.target is None else f"{'<=' if row.most else '>='} {row.target:g}"
        table.add_row(*row.cells, f"{bound} missed" if row.missed else bound)
        if row.missed:
            missed.append(f"{title}: {row.cells[0]}: {row.figure:.2f}, target {bound}")
    console.print(table)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--isa", choices=["native", "avx2", "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="only the cases that have a target")
    parser.add_argument("--encodings", nargs="*", default=ENCODED, help="of encoded experts, default: all")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--json", type=Path, default=common.RESULTS / "kernels.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    console = Console(width=150)
    results: list[dict[str, Any]] = []
    missed: list[str] = []
    for what, environment in {"native": {}, "avx2": AVX2}.items():
        for threads in args.threads if args.isa in (what, "both") else []:
            arguments = ["--rounds", str(args.rounds), "--threads", str(threads), *(["--quick"] if args.quick else [])]
            arguments += ["--encodings", *args.encodings]
            results.append({"held_to": what, **in_child(arguments, environment)})
            missed += show(console, "as the CPU is" if what == "native" else "both held to AVX2", results[-1])
    common.write_result(args.json, results)
    for sentence in missed:
        console.print(f"missed: {sentence}", markup=False)
    if args.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
