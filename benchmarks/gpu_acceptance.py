"""Everything that only a GPU can show, in one command: builds for it, checks it, measures it.

python benchmarks/gpu_acceptance.py [--device 0] [--skip STEP ...] [--checkpoint DIR] [--json FILE]

Steps: build (for this GPU alone), tests (the native tests of the kernels, the Python tests marked gpu), sanitizer
(compute-sanitizer: memcheck, racecheck, synccheck over the native tests), transfer (pinned copies both ways against
torch's of the same sizes, pageable ones, share of a copy that disappears behind computing), kernels (against
torch.nn.functional.grouped_mm and the roofline), decode (25, 50 and 100 % of the experts in device memory). Prints a
table and writes one JSON. Without a GPU every step is "not measured" and the status is 0; with one, the status is 1
when a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
NATIVE_TESTS = ROOT / "build/gpu-tests"
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
# From the data sheets: bytes a second of device memory, bf16 FLOP a second of the tensor cores (dense).
PEAKS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "A100": (2.04e12, 312e12), "4090": (1.01e12, 165e12)}


class Skipped(Exception):  # noqa: N818  (no error: the reason why a step has no result)
    pass


def gpu_problem() -> str:
    """Why there is nothing to measure, or ""."""
    if torch.cuda.is_available():
        return ""
    if shutil.which("nvidia-smi") is None:
        return "no CUDA driver is installed on this machine"
    return f"this torch ({torch.__version__}) does not see a CUDA device"


def run(command: list[object], **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def build(args: argparse.Namespace) -> dict[str, Any]:
    """A module for this GPU's architecture in place of the one that is here, and the native tests of its kernels."""
    major, minor = torch.cuda.get_device_capability(args.device)
    started = time.perf_counter()
    arch = f"{major}{minor}-real"
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."],
        EMOE_CUDA="1",
        EMOE_CUDA_ARCHS=arch,
    )
    options = ["-DEMOE_TESTS=ON", "-DEMOE_CUDA=1", f"-DEMOE_CUDA_ARCHS={arch}", "-DCMAKE_BUILD_TYPE=Release"]
    run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", NATIVE_TESTS, *options])
    run(["cmake", "--build", NATIVE_TESTS, "--target", "test_cuda_kernels"])
    doctor = json.loads(
        subprocess.run(
            [sys.executable, "-m", "emoe", "doctor", "--json"], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT
        ).stdout
    )
    return {"seconds": time.perf_counter() - started, "doctor": doctor["native"]["cuda"]}


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """Kernels against the fp64 reference; models end to end against the CPU path."""
    native = run([NATIVE_TESTS / "test_cuda_kernels"], CUDA_VISIBLE_DEVICES=str(args.device))
    out = run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "python_tests"], EMOE_TEST_DEVICE=f"cuda:{args.device}"
    )
    return {"native": native.strip().splitlines()[-1], "python": out.strip().splitlines()[-1]}


def sanitizer(args: argparse.Namespace) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("compute-sanitizer is not on PATH")
    target = NATIVE_TESTS / "test_cuda_kernels"
    results = {}
    for check in ("memcheck", "racecheck", "synccheck"):
        run([tool, "--tool", check, "--error-exitcode", "9", target], CUDA_VISIBLE_DEVICES=str(args.device))
        results[check] = "no report"
    return results


def seconds(call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call on the current stream, after two to warm up."""
    times = []
    for turn in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def transfer(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second: emoe's demand lane and torch's pinned copies of the same sizes, both ways, and pageable ones."""
    from emoe.compute.choose import open_device

    device = open_device(f"cuda:{args.device}")
    assert device is not None
    rows = []
    for mib in (1, 4, 16, 64):
        nbytes = mib << 20
        on_gpu = torch.empty(nbytes, dtype=torch.uint8, device=device.name)
        pinned = torch.empty(nbytes, dtype=torch.uint8).pin_memory()
        pageable = torch.zeros(nbytes, dtype=torch.uint8)
        rows.append(
            {
                "bytes": nbytes,
                "emoe_to_device": device.native.copy_rate(nbytes, 32),
                "pinned_to_device": nbytes / seconds(lambda a=on_gpu, b=pinned: a.copy_(b, non_blocking=True)),
                "pinned_to_host": nbytes / seconds(lambda a=on_gpu, b=pinned: b.copy_(a, non_blocking=True)),
                "pageable_to_device": nbytes / seconds(lambda a=on_gpu, b=pageable: a.copy_(b)),
            }
        )
    return {"rows": rows, "overlap": overlap(device)}


def overlap(device: Any) -> float:
    """Share of a copy's time that disappears behind a matrix product of about the same length, 0 to 1."""
    nbytes = 64 << 20
    target = torch.empty(nbytes, dtype=torch.uint8, device=device.name)
    source = torch.empty(nbytes, dtype=torch.uint8).pin_memory()
    matrix = torch.randn(4096, 4096, device=device.name, dtype=torch.bfloat16)
    side = torch.cuda.Stream(device.name)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    copying, once = seconds(copy), seconds(lambda: matrix @ matrix)
    times = max(1, round(copying / once))

    def compute() -> None:
        for _ in range(times):
            matrix @ matrix

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy()
        compute()
        torch.cuda.current_stream().wait_stream(side)

    computing = seconds(compute)
    return max(0.0, min(1.0, (copying + computing - seconds(both)) / min(copying, computing)))


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """gather_mlp against three grouped products of torch, and against the roofline of bytes and FLOP."""
    import numpy as np

    from emoe.compute.choose import open_device

    device = open_device(f"cuda:{args.device}")
    assert device is not None
    name = torch.cuda.get_device_name(args.device)
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    H, I, E, K = (256, 128, 8, 2) if args.quick else (2048, 1024, 64, 8)
    layout = device.module.MlpLayout(
        H, I, H, "bfloat16", True, False, False, "silu", gate_up_offset=0, down_offset=4 * I * H
    )
    slab = device.native.slab(E, 6 * I * H)
    rows = []
    for T in (1, 8, 33) if args.quick else (1, 4, 8, 32, 128, 512, 2048):
        hidden = torch.randn(T, H, device=device.name, dtype=torch.bfloat16)
        index = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).to(device.name)
        weights = torch.full((T, K), 1 / K, device=device.name)
        slot_of = np.arange(E, dtype=np.int32)

        def ours(hidden: Any = hidden, index: Any = index, weights: Any = weights, slot_of: Any = slot_of) -> None:
            with device.call(layout, slab, hidden, index, weights) as call:
                call.gather(slot_of)
                call.combine(torch.bfloat16)

        used = len(set(index.flatten().tolist()))
        nbytes, flop = used * 6 * I * H, 6 * T * K * I * H
        row: dict[str, Any] = {"tokens": T, "experts": used, "seconds": seconds(ours), "bytes": nbytes, "flop": flop}
        row["grouped_mm_seconds"] = None if args.quick else grouped_mm_seconds(hidden, index, E, I)
        if peak:
            row["roofline_seconds"] = max(nbytes / peak[0], flop / peak[1])
            row["share_of_roofline"] = row["roofline_seconds"] / row["seconds"]
        rows.append(row)
    return {"gpu": name, "shape": {"H": H, "I": I, "E": E, "K": K}, "rows": rows}


def grouped_mm_seconds(hidden: torch.Tensor, index: torch.Tensor, experts: int, intermediate: int) -> float:
    """The same products as Transformers' grouped_mm path makes them: sort, gather, two grouped products, scatter."""
    K, H = index.shape[1], hidden.shape[1]
    grouped = torch.nn.functional.grouped_mm
    gate_up = torch.randn(experts, H, 2 * intermediate, device=hidden.device, dtype=hidden.dtype)
    down = torch.randn(experts, intermediate, H, device=hidden.device, dtype=hidden.dtype)

    def call() -> torch.Tensor:
        flat = index.flatten()
        order = torch.argsort(flat)
        offsets = torch.cumsum(torch.bincount(flat, minlength=experts), 0).to(torch.int32)
        both = grouped(hidden[order // K], gate_up, offs=offsets)
        gate, up = both.chunk(2, dim=-1)
        out = grouped(torch.nn.functional.silu(gate) * up, down, offs=offsets)
        return torch.zeros_like(hidden).index_add_(0, order // K, out / K)

    return seconds(call)


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a whole model with a share of its experts in device memory."""
    import common

    import emoe

    folder = args.checkpoint or common.write_checkpoint(
        common.small_config(), Path(tempfile.gettempdir()) / "emoe-gpu-acceptance"
    )
    rows, tokens = [], {}
    for share, routing in ((0.25, "exact"), (0.5, "exact"), (1.0, "exact"), (0.25, "resident"), (0.5, "resident")):
        model = emoe.from_pretrained(folder, memory_budget=share, device=f"cuda:{args.device}", routing=routing)
        prompt = torch.arange(10, 42, device=f"cuda:{args.device}").view(1, -1)
        options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 64, "max_new_tokens": 64}
        model.generate(prompt, **options)
        before = model.emoe.stats()["settled"]
        torch.cuda.synchronize()
        started = time.perf_counter()
        answer = model.generate(prompt, **options)[0].tolist()
        rate = 64 / (time.perf_counter() - started)
        stats = model.emoe.stats()
        rows.append({"resident": share, "routing": routing, "tokens_per_second": rate, "hit_rate": stats["hit_rate"]})
        if routing == "exact":
            tokens[share] = answer
        else:  # the share of forwards that asked the device for no value
            rows[-1]["settled"] = (stats["settled"] - before) / (64 * len(model.emoe.layers))
        model.emoe.close(restore=False)
        del model
        torch.cuda.empty_cache()
    return {"rows": rows, "identical_tokens_of_exact": len({tuple(each) for each in tokens.values()}) == 1}


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "transfer": transfer,
    "kernels": kernels,
    "decode": decode,
}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One step; the ones that use the new build run in a process of their own."""
    try:
        if name in ("transfer", "kernels", "decode"):
            options = [*(["--checkpoint", args.checkpoint] if args.checkpoint else []), *["--quick"] * args.quick]
            out = run([sys.executable, __file__, "--child", name, "--device", args.device, *options])
            return {"state": "ok", **json.loads(out.splitlines()[-1])}
        return {"state": "ok", **STEPS[name](args)}
    except Skipped as reason:
        return {"state": NOT_MEASURED, "why": str(reason)}
    except Exception as error:
        return {"state": "failed", "why": str(error)}


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"GPU acceptance: {report['gpu'] or report['problem']}")
    for column in ("step", "result", "figures"):
        table.add_column(column, overflow="fold")
    for name, result in report["steps"].items():
        figures = {key: value for key, value in result.items() if key not in ("state", "why")}
        text = result.get("why") or "\n".join(
            "\n".join(", ".join(f"{k} {_short(v)}" for k, v in row.items()) for row in value)
            if isinstance(value, list)
            else f"{key}: {_short(value)}"
            for key, value in figures.items()
        )
        table.add_row(name, result["state"], text)
    Console().print(table)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--skip", nargs="+", default=[], choices=list(STEPS))
    parser.add_argument("--checkpoint", type=Path, help="for decode; default: one with random weights is written")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu_acceptance.json")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--child", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(STEPS[args.child](args)))
        return 0
    problem = gpu_problem()
    report: dict[str, Any] = {
        "machine": platform.node(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "problem": problem,
        "gpu": "" if problem else torch.cuda.get_device_name(args.device),
        "steps": {},
    }
    for name in STEPS:
        if problem:
            report["steps"][name] = {"state": NOT_MEASURED, "why": problem}
        elif name in args.skip:
            report["steps"][name] = {"state": NOT_MEASURED, "why": "skipped"}
        else:
            report["steps"][name] = measure(name, args)
    show(report)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(step["state"] == "failed" for step in report["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
