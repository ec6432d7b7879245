"""Speed on quantized checkpoints against llama.cpp, on the same bytes.

python benchmarks/peers.py --cache DIR [--env DIR] [--part kernels resident capped] [--isa native|avx2|both] [--check]

llama.cpp comes from llama-cpp-python, built from its sources by pip in an environment of its own (--env; made at the
first run, ten minutes and more), for this CPU as `GGML_NATIVE` does, and a second time without AVX-512, VNNI and AMX
for the comparison in which both sides are held to AVX2. Each side is a process of its own; they take turns, and ratios
are medians over rounds. Both get the same number of threads. The machine has to be quiet: llama.cpp's threads wait
for one another spinning, and with another busy process beside them it is many times slower than alone.

kernels: the experts of a layer alone (hidden 2048, intermediate 1024), the same random blocks on both sides. llama.cpp:
    the graph that it builds for such a layer (mul_mat_id for gate and up, swiglu, mul_mat_id for down, the product with
    the router's weights), computed through ggml's C interface, the weights in the buffer that llama.cpp chooses for
    them by default, which is the repacked one for Q4_0 and Q4_K; quantizing the activations is part of it. emoe:
    gather_mlp, which does the same. `256 rows`: 1024 tokens, two of eight experts each, so that every expert has 256;
    `1 row`: one token, eight experts which the last calls did not touch. Outputs are compared too.
resident: OLMoE-1B-7B's geometry with random weights as one GGUF file in DIR that both read, everything in memory:
    prefill of 64 and 512 tokens and decode of random tokens (a model of random weights left alone repeats one). As
    llama-bench does: default repacking, logits of the last token only.
    --model 0.86b is the model of decode.py in its place, as --formats bf16, with prefill of 256.
    MXFP4 and FP8 are safetensors, which only emoe reads, with the part outside experts in bfloat16; llama.cpp has a
    GGUF file of the same bytes beside it (experts in MXFP4, and in Q8_0 for FP8).
capped: the same file in memory cgroups of a half and a third of its size, page cache included and cold at the start.
    llama.cpp maps the file and does not repack (--repack 0; a repacked copy would not fit). `bound` is what emoe could
    do: the tokens that it computes with everything in memory, or those whose missed bytes the disk gives, if fewer (the
    disk by direct reads of 1 MiB in four threads, in the same run). `hidden` is the overlap: of a token's computing and
    its reads, each as long as it takes alone, the share of the shorter that is over when the longer one is. The same
    model in bfloat16 is in the same cgroups beside it.
--check: exit 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import quantized_models
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

PACKAGE = "llama-cpp-python>=0.3.30"
BUILDS = {
    "native": "-DGGML_NATIVE=ON",
    "avx2": "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON",
}
# GCC 12.2, and others of its time, tell the optimizer that this instruction reads 8 of its 64 bytes, so that
# llama.cpp's AMX configuration is lost and the first prefill ends in a segmentation fault.
AMX_HEADER = """#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
"""
SIDES = ("llama.cpp", "emoe")
HIDDEN, INTERMEDIATE = 2048, 1024
CONTEXT = 1024
MODELS = {
    "olmoe-1b-7b": (quantized_models.olmoe_1b_7b, (64, 512)),
    "0.86b": (common.small_config, (256,)),
}  # config, lengths of prefills
PROMPT = 8
WARM_PASSES = 20  # at most, of a long prompt, until every expert that prompts use is in memory
KERNEL_TARGET, DECODE_TARGET, PREFILL_TARGET, CAPPED_TARGET, BOUND_TARGET = 1.0, 0.7, 0.7, 5.0, 0.8
CAPPED_CONTEXT = 256
MATRIX_BYTES = 1 << 20  # of a direct read: about a matrix of an expert in 4 bits
FEWEST = 4  # tokens that a side decodes in a cgroup, however long they take
RIVALS = {
    "mxfp4": ("mxfp4", "bf16"),
    "fp8": ("q8_0", "bf16"),
}  # safetensors: the format of experts and of the rest in GGUF


def environment(folder: Path, isa: str) -> Path:
    """The Python of an environment with llama.cpp built for `isa`, which is made or completed where it is missing."""
    folder = folder if isa == "native" else folder.with_name(f"{folder.name}-{isa}")
    python = folder / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0:
        return python
    venv.create(folder, with_pip=True)
    log = folder / "build.log"
    header = folder / "amx.h"
    header.write_text(AMX_HEADER)
    own = os.environ.get("CMAKE_ARGS", "")
    flags = f"{BUILDS[isa]} -DCMAKE_CXX_FLAGS=-include{header.absolute()} -DLLAVA_BUILD=OFF {own}"
    pip = [str(python), "-m", "pip", "install"]
    # Built from sources: a wheel from an index would not be for this CPU.
    build = [*pip, "--verbose", "--no-cache-dir", "--no-binary", "llama-cpp-python", PACKAGE]
    with log.open("w") as kept, tqdm(desc=f"building llama.cpp ({isa}) in {folder}", unit="file") as bar:
        for command in ([*pip, "--upgrade", "pip", "cmake", "ninja"], build):
            child = subprocess.Popen(
                command, env={**os.environ, "CMAKE_ARGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
            assert child.stdout is not None
            for line in child.stdout:
                kept.write(line)
                if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):
                    bar.total = int(step[2])
                    bar.update(int(step[1]) - bar.n)
            if child.wait():
                raise SystemExit(f"{' '.join(command)} ended with {child.returncode}; see {log}")
    return python


class Side:
    """A process that answers requests, JSON objects, one a line: llama_cpp_side.py, or this file with --child."""

    def __init__(self, command: Sequence[str], variables: dict[str, str], cgroup: Path | None = None) -> None:
        words = list(command)
        if cgroup is not None:
            words = ["sh", "-c", f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"', "sh", *words]
        self.process = subprocess.Popen(
            words, env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise common.ChildFailedError(self.process.args, self.process.wait(), f"while asked to {do}")  # type: ignore[arg-type]
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def start(name: str, isa: str, args: argparse.Namespace, cgroup: Path | None = None) -> Side:
    if name == "llama.cpp":
        python = environment(args.env, isa)
        return Side([str(python), str(Path(__file__).with_name("llama_cpp_side.py"))], {}, cgroup)
    return Side(common.this_script(__file__, "--child"), common.AVX2 if isa == "avx2" else {}, cgroup)


def random_tokens(count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(300, 8000, count).tolist()  # every model has them
    return tokens


# ---- emoe's side, in a process of its own


class EmoeExperts:
    """The experts of one layer as they lie in slots."""

    def __init__(self, kind: str, H: int, I: int, E: int, K: int, T: int, files: Sequence[str]) -> None:
        import torch

        from emoe.compute import ops
        from emoe.model.encoding import encoding

        shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
        sizes = [encoding(kind).nbytes(shape) for shape in shapes.values()]
        parts = [
            np.fromfile(file, dtype=np.uint8, count=E * size).reshape(E, size)
            for file, size in zip(files, sizes, strict=True)
        ]
        self.memory = torch.from_numpy(np.concatenate(parts, axis=1))
        self.slots, self.slot_bytes, self.address = E, sum(sizes), self.memory.data_ptr()
        layout: dict[str, Any] = {
            "hidden": H, "intermediate": I, "hidden_out": H, "has_gate": True, "interleaved": False,
            "activation": "silu",
        }  # fmt: skip
        offset = 0
        for (name, (rows, cols)), size in zip(shapes.items(), sizes, strict=True):
            layout[name] = {
                "codes": kind, "rows": rows, "depth": cols, "first": 0, "step": 1, "count": rows,
                "planes": {"blocks": offset}, "scale": "", "scale_block": (0, 0),
            }  # fmt: skip
            offset += size
        self.layout = ops.make_layout(layout)
        self.slot_of = np.arange(E, dtype=np.int32)
        # As a model in bfloat16 has them; llama.cpp's are float32 and are rounded to 8 bits a value.
        self.x = torch.from_numpy(np.random.default_rng(0).standard_normal((T, H), dtype=np.float32)).bfloat16()
        self.weights = torch.full((T, K), 1 / K)
        self.out = torch.zeros((T, K, H))

    def compute(self, ids: list[list[int]]) -> float:
        """Seconds."""
        import torch

        from emoe.compute import ops

        index = torch.tensor(ids)
        self.out.zero_()
        started = time.perf_counter()
        ops.gather_mlp(self.layout, self, self.slot_of, self.x, index, self.weights, self.out, "pairs")
        return time.perf_counter() - started


class EmoeSide:
    """What llama_cpp_side.py's Side can be asked for, by emoe. Both have the same activations: seed 0."""

    def __init__(self) -> None:
        import torch

        torch.set_grad_enabled(False)
        self.model: Any = None
        self.experts: dict[str, EmoeExperts] = {}

    def describe(self) -> dict[str, Any]:
        import emoe
        from emoe import native

        found: dict[str, Any] = {"version": emoe.__version__, "features": native.load().isa()}
        if self.model is not None:
            stats = self.model.emoe.stats()
            found |= {key: stats[key] for key in ("hit_rate", "bytes_read", "resident_share", "budget_bytes")}
        return found

    def load(
        self, file: str, threads: int, context: int, repack: bool, budget: str | float | int = 1.0
    ) -> dict[str, Any]:
        import emoe

        self._threads(threads)
        started = time.perf_counter()
        self.model = emoe.from_pretrained(file, memory_budget=budget, context=context)
        return {"seconds": time.perf_counter() - started}

    def _threads(self, threads: int) -> None:
        import torch

        from emoe import native

        torch.set_num_threads(threads)
        native.load().set_threads(threads)

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        import torch

        ids = torch.tensor([tokens])
        read = self.model.emoe.stats()["bytes_read"]
        started = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "bytes_read": self.model.emoe.stats()["bytes_read"] - read}

    def decode(
        self, prompt: list[int], tokens: list[int], limit: float = float("inf"), fewest: int = 0
    ) -> dict[str, Any]:
        """Seconds of each token, and bytes that were read for all; no further token after `limit` seconds."""
        import torch

        out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        read = self.model.emoe.stats()["bytes_read"]
        seconds: list[float] = []
        for token in tokens:
            if sum(seconds) > limit and len(seconds) >= fewest:
                break
            started = time.perf_counter()
            out = self.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds, "bytes_read": self.model.emoe.stats()["bytes_read"] - read}

    def logits(self, tokens: list[int]) -> dict[str, Any]:
        import torch

        return {"logits": self.model(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].float().tolist()}

    def make_experts(
        self, name: str, kind: str, sizes: dict[str, int], threads: int, repack: bool, files: list[str]
    ) -> dict[str, Any]:
        self._threads(threads)
        experts = self.experts[name] = EmoeExperts(kind, **sizes, files=files)
        return {"bytes": experts.slots * experts.slot_bytes}

    def run_experts(self, name: str, ids: list[list[int]], times: int = 1) -> dict[str, Any]:
        return {"seconds": min(self.experts[name].compute(ids) for _ in range(times))}

    def output(self, name: str, token: int) -> dict[str, Any]:
        return {"out": self.experts[name].out[token].tolist()}

    def drop_experts(self, name: str) -> dict[str, Any]:
        del self.experts[name]
        return {}


def child() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = EmoeSide()
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(side, request.pop("do"))(**request)) + "\n")
        answers.flush()


# ---- the experts of a layer alone


def expert_files(cache: Path, kind: str, experts: int) -> list[str]:
    """Raw blocks of gate [E, I, H], up [E, I, H] and down [E, H, I]."""
    files = [cache / f"experts-{kind}-{name}.bin" for name in ("gate", "up", "down")]
    for seed, file in enumerate(files):
        if not file.exists():
            rows, cols = (HIDDEN, INTERMEDIATE) if file.stem.endswith("down") else (INTERMEDIATE, HIDDEN)
            quantized_models.Random(seed).blocks(kind, experts * rows, cols).tofile(file)
    return [str(file) for file in files]


def kernels(isa: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    sides = {name: start(name, isa, args) for name in args.sides}
    results = []
    prefill = {"H": HIDDEN, "I": INTERMEDIATE, "E": 8, "K": 2, "T": 1024}
    decode = {"H": HIDDEN, "I": INTERMEDIATE, "E": 64, "K": 8, "T": 1}
    balanced = [[t % 8, (t + 1 + t // 8 % 7) % 8] for t in range(1024)]
    for kind in args.kernel_formats:
        files = expert_files(args.cache, kind, 64)
        for name, sizes in {"256 rows": prefill, "1 row": decode}.items():
            made = {}
            for side in args.sides:
                common_arguments = {"kind": kind, "sizes": sizes, "threads": args.threads, "files": files}
                made[side] = sides[side].ask("make_experts", name=name, repack=True, **common_arguments)
            seconds: dict[str, list[float]] = {side: [] for side in args.sides}
            turn = itertools.count()
            for _ in range(args.rounds):
                for side in args.sides:
                    calls = []
                    for _ in range(2 if sizes is prefill else 16):
                        start_at = 8 * next(turn)
                        ids = balanced if sizes is prefill else [[(start_at + k) % 64 for k in range(8)]]
                        calls.append(sides[side].ask("run_experts", name=name, ids=ids)["seconds"])
                    seconds[side].append(min(calls))
            work = sizes["T"] * sizes["K"] * 3 * HIDDEN * INTERMEDIATE
            row: dict[str, Any] = {"format": kind, "case": name, "multiplications": work}
            row["bytes"] = made[args.sides[0]]["bytes"] * (8 / 64 if sizes is decode else 1)
            row["buffer"] = made.get("llama.cpp", {}).get("buffer")
            row["seconds"] = {side: min(each) for side, each in seconds.items()}
            row["medians"] = {side: statistics.median(each) for side, each in seconds.items()}
            if len(args.sides) == 2:
                pairs = zip(seconds["llama.cpp"], seconds["emoe"], strict=True)
                row["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
                ours, theirs = (np.array(sides[side].ask("output", name=name, token=0)["out"]) for side in args.sides)
                row["difference"] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            results.append(row)
            for side in args.sides:
                sides[side].ask("drop_experts", name=name)
    for side in sides.values():
        side.close()
    return results


def show_kernels(console: Console, title: str, results: list[dict[str, Any]]) -> list[str]:
    table = Table(title=title)
    for column in ("format", "case", "llama.cpp ms", "emoe ms", "llama.cpp", "emoe", "x llama.cpp", "buffer"):
        table.add_column(column, justify="left" if column in ("format", "case", "buffer") else "right")
    missed = []
    for row in results:
        times = row["seconds"]
        wide = row["case"] != "1 row"
        rates = {
            side: f"{2 * row['multiplications'] / t / 1e9:.0f} GFLOP/s"
            if wide
            else f"{row['bytes'] / t / 1e9:.1f} GB/s"
            for side, t in times.items()
        }
        cells = [f"{1e3 * times[side]:.2f}" if side in times else "-" for side in ("llama.cpp", "emoe")]
        cells += [rates.get(side, "-") for side in ("llama.cpp", "emoe")]
        ratio = row.get("ratio")
        table.add_row(row["format"], row["case"], *cells, "-" if ratio is None else f"{ratio:.2f}", row["buffer"])
        if wide and ratio is not None and ratio < KERNEL_TARGET:
            missed.append(f"{title}: {row['format']}, {row['case']}: {ratio:.2f}, target {KERNEL_TARGET}")
    console.print(table)
    return missed


# ---- a whole model, everything in memory


def resident(isa: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    files = model_files(kind, args)
    sides = {name: start(name, isa, args) for name in args.sides}
    loaded = {
        name: side.ask("load", file=str(files[name]), threads=args.threads, context=CONTEXT, repack=True)
        for name, side in sides.items()
    }
    described = {name: side.ask("describe") for name, side in sides.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    for side in sides.values():  # not counted: slots are filled until nothing is read, pages touched, buffers made
        for warm in range(WARM_PASSES):
            if not side.ask("prefill", tokens=random_tokens(512, 99 + warm)).get("bytes_read"):
                break
    for round_ in range(args.rounds):
        for name, side in sides.items():
            times = seconds.setdefault(name, {})
            steps = side.ask(
                "decode", prompt=random_tokens(PROMPT, 0), tokens=random_tokens(args.tokens, 1000 + round_)
            )["seconds"]
            times.setdefault("decode", []).append(statistics.median(steps))
            for count in MODELS[args.model][1]:
                took = side.ask("prefill", tokens=random_tokens(count, round_))["seconds"]
                times.setdefault(f"prefill {count}", []).append(took / count)
    result: dict[str, Any] = {"format": kind, "bytes": size(files["emoe"]), "loaded": loaded, "sides": described}
    result["tokens_per_second"] = {
        name: {what: {"best": 1 / min(each), "median": 1 / statistics.median(each)} for what, each in times.items()}
        for name, times in seconds.items()
    }
    if set(sides) == set(SIDES):
        ours, theirs = seconds["emoe"], seconds["llama.cpp"]
        result["ratios"] = {
            what: statistics.median(b / a for a, b in zip(ours[what], theirs[what], strict=True)) for what in ours
        }
    if set(sides) == set(SIDES) and kind not in RIVALS:
        logits = [np.array(side.ask("logits", tokens=random_tokens(64, 7))["logits"]) for side in sides.values()]
        first, second = (each[: min(map(len, logits))] for each in logits)
        result["logits_difference"] = float(np.linalg.norm(first - second) / np.linalg.norm(second))
    for side in sides.values():
        side.close()
    return result


def model_files(kind: str, args: argparse.Namespace) -> dict[str, Path]:
    """What each side reads: the same file where both can."""
    config = MODELS[args.model][0]()
    name = "olmoe" if args.model == "olmoe-1b-7b" else args.model
    if kind not in RIVALS:
        return dict.fromkeys(SIDES, quantized_models.write_gguf(config, kind, args.cache / f"{name}-{kind}.gguf"))
    experts, rest = RIVALS[kind]
    theirs = args.cache / f"{name}-{experts}-{rest}.gguf"
    return {
        "llama.cpp": quantized_models.write_gguf(config, experts, theirs, rest=rest),
        "emoe": quantized_models.write_safetensors(config, kind, args.cache / f"{name}-{kind}"),
    }


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def show_resident(console: Console, title: str, result: dict[str, Any]) -> list[str]:
    from emoe.memory import format_bytes

    title = f"{result['format']}, {format_bytes(result['bytes'])}, all in memory, tok/s: {title}"
    table = Table(title=title)
    table.add_column("")
    kinds = list(next(iter(result["tokens_per_second"].values())))
    for what in kinds:
        table.add_column(what, justify="right")
    for name, speeds in result["tokens_per_second"].items():
        table.add_row(name, *(f"{speeds[what]['best']:.1f} (median {speeds[what]['median']:.1f})" for what in kinds))
    missed = []
    if ratios := result.get("ratios"):
        table.add_row("emoe / llama.cpp", *(f"{ratios[what]:.2f}" for what in kinds))
        for what in kinds:
            target = DECODE_TARGET if what == "decode" else PREFILL_TARGET
            if ratios[what] < target:
                missed.append(f"{title}: {what}: {ratios[what]:.2f}, target {target}")
    console.print(table)
    if "logits_difference" in result:
        console.print(f"relative difference of the logits: {result['logits_difference']:.3f}")
    return missed


# ---- a whole model in less memory than it needs


def capped(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cold, each side in a cgroup of its own, in a half and a third of the bytes of `kind`, and `beside`."""
    rows = []
    limits = {share: int(size(model_files(kind, args)["emoe"]) * share) for share in (1 / 2, 1 / 3)}
    for each in dict.fromkeys((kind, *args.beside)):
        files = model_files(each, args)
        computed = decode_in_memory(files["emoe"], args) if each == kind and "emoe" in args.sides else None
        for share, limit in limits.items():
            row: dict[str, Any] = {"format": each, "share": share, "limit_bytes": limit, "of": kind, "sides": {}}
            for name in args.sides:
                row["sides"][name] = side = _in_cgroup(name, files[name], limit, args)
                if "bytes_read" in side and "error" not in side:
                    read = side["bytes_read"] / side["tokens"]
                    row["disk_rate"] = common.direct_read_rate(files[name], MATRIX_BYTES)
                    row["bound"] = min(row["disk_rate"] / read if read else float("inf"), computed or float("inf"))
                    row["bytes_read_per_token"] = read
                    if computed:
                        row["hidden"] = hidden(1 / computed, read / row["disk_rate"], 1 / side["tokens_per_second"])
            rows.append(row)
    return rows


def hidden(computing: float, reading: float, both: float) -> float:
    """Share of the shorter of two that is hidden behind the longer one: 1 where both take as long as the longer one
    alone, 0 where they take as long as one after the other, or longer. Seconds; 1 where one of them is 0.
    """
    shorter = min(computing, reading)
    return max(0.0, min(1.0, (computing + reading - both) / shorter)) if shorter else 1.0


def decode_in_memory(file: Path, args: argparse.Namespace) -> float:
    """Tokens per second of emoe without a limit."""
    side = start("emoe", "native", args)
    side.ask("load", file=str(file), threads=args.threads, context=CAPPED_CONTEXT, repack=False)
    for warm in range(WARM_PASSES):
        if not side.ask("prefill", tokens=random_tokens(CAPPED_CONTEXT, 99 + warm))["bytes_read"]:
            break
    steps = side.ask("decode", prompt=random_tokens(PROMPT, 0), tokens=random_tokens(args.capped_tokens, 1))["seconds"]
    side.close()
    return 1 / statistics.median(steps)


def _in_cgroup(name: str, file: Path, limit: int, args: argparse.Namespace) -> dict[str, Any]:
    common.forget_pages(args.cache)
    budget = {"budget": "auto"} if name == "emoe" else {}
    with common.memory_cgroup(limit) as group:
        side = start(name, "native", args, group)
        try:
            loaded = side.ask(
                "load", file=str(file), threads=args.threads, context=CAPPED_CONTEXT, repack=False, **budget
            )
            answer = side.ask(
                "decode", prompt=random_tokens(PROMPT, 0), tokens=random_tokens(args.capped_tokens, 1),
                limit=args.capped_seconds, fewest=FEWEST,
            )  # fmt: skip
            steps = answer.pop("seconds")
            row = {"tokens_per_second": len(steps) / sum(steps), "tokens": len(steps), "steps": steps, **answer}
            return row | {"load_seconds": loaded["seconds"], **side.ask("describe")}
        except (common.ChildFailedError, RuntimeError) as error:
            return {"tokens_per_second": 0.0, "error": str(error)}
        finally:
            side.close()


def show_capped(console: Console, title: str, results: list[dict[str, Any]]) -> list[str]:
    from emoe.memory import format_bytes

    table = Table(title=f"decode inside a memory cgroup, page cache cold, tok/s: {title}")
    table.add_column("format")
    for column in ("cgroup", "llama.cpp", "emoe", "x llama.cpp", "missed a token", "disk", "bound", "of it", "hidden"):
        table.add_column(column, justify="right")
    missed = []
    for row in results:
        speeds = {name: each["tokens_per_second"] for name, each in row["sides"].items()}
        where = f"{format_bytes(row['limit_bytes'])} ({row['share']:.0%} of {row['of']})"
        cells = [f"{speeds[side]:.2f}" if side in speeds else "-" for side in SIDES]
        ratio = reached = None
        if len(speeds) == len(SIDES):
            ratio = speeds["emoe"] / speeds["llama.cpp"] if speeds["llama.cpp"] else float("inf")
        cells.append("-" if ratio is None else f"{ratio:.1f}")
        if "bound" in row:
            reached = speeds["emoe"] / row["bound"]
            cells += [format_bytes(row["bytes_read_per_token"]), f"{row['disk_rate'] / 1e9:.2f} GB/s"]
            cells += [f"{row['bound']:.2f}", f"{reached:.0%}", f"{row['hidden']:.0%}" if "hidden" in row else "-"]
        table.add_row(row["format"], where, *cells)
        if row["format"] != row["of"]:
            continue
        if ratio is not None and ratio < CAPPED_TARGET:
            missed.append(f"{row['format']} in {where}: {ratio:.1f}, target {CAPPED_TARGET}")
        if reached is not None and reached < BOUND_TARGET:
            missed.append(f"{row['format']} in {where}: {reached:.0%} of the bound, target {BOUND_TARGET:.0%}")
    console.print(table)
    for row in results:
        for name, each in row["sides"].items():
            if "error" in each:
                console.print(f"{name}, {row['format']}, {row['share']:.0%}: {each['error']}", markup=False)
    return missed


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else "unknown CPU"


def main() -> int:
    if sys.argv[1:] == ["--child"]:
        child()
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the models, 4 to 7 GB each; kept")
    parser.add_argument("--env", type=Path, help="folder for llama.cpp's environment (default: CACHE/llama-env)")
    parser.add_argument("--part", nargs="+", choices=["kernels", "resident", "capped"])
    parser.add_argument(
        "--formats", nargs="+", default=["q4_0", "q4_k"], choices=[*quantized_models.GGUF_BLOCKS, "fp8", "bf16"]
    )
    parser.add_argument("--model", choices=MODELS, default="olmoe-1b-7b", help="its geometry (default: olmoe-1b-7b)")
    parser.add_argument("--kernel-formats", nargs="+", default=["q4_0", "q8_0", "q4_k"])
    parser.add_argument("--isa", choices=["native", "avx2", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round (default: 32)")
    parser.add_argument("--capped-tokens", type=int, default=32, help="decode steps in a cgroup (default: 32)")
    parser.add_argument(
        "--capped-seconds", type=float, default=60, help="no further step after that long (default: 60)"
    )
    parser.add_argument("--beside", nargs="*", default=["bf16"], help="formats in the same cgroups (default: bf16)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--json", type=Path, default=common.RESULTS / "peers.json")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    args.env = args.env or args.cache / "llama-env"
    parts = args.part or ["kernels", "resident", "capped"]

    console = Console(width=150)
    results: dict[str, Any] = {"cpu": cpu_name(), "threads": args.threads, "load_average": os.getloadavg()[0]}
    missed: list[str] = []
    for isa, what in {"native": "as the CPU is", "avx2": "both held to AVX2"}.items():
        if args.isa not in (isa, "both"):
            continue
        title = f"{cpu_name()}, {args.threads} threads, {what}"
        if "kernels" in parts:
            results[f"kernels {isa}"] = kernels(isa, args)
            missed += show_kernels(console, title, results[f"kernels {isa}"])
        if "resident" in parts:
            for kind in args.formats:
                result = results[f"resident {kind} {isa}"] = resident(isa, kind, args)
                missed += show_resident(console, title, result)
    if "capped" in parts:
        results["capped"] = [row for kind in args.formats for row in capped(kind, args)]
        missed += show_capped(console, cpu_name(), results["capped"])
    common.write_result(args.json, results)
    for sentence in missed:
        console.print(f"missed: {sentence}", markup=False)
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
