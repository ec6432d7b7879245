"""What benchmarks/gpu_acceptance.py measures, step by step. Each takes a Bench and returns figures for a JSON.

Times are of work that was queued behind a sleep on the device, so that the host's launches are not in them; what is
timed was compared with a reference first. On the emulation the same code runs with small shapes, and its times mean
nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emoe
from emoe.compute.choose import open_device
from emoe.errors import EmoeError

# From the data sheets: bytes a second of device memory, bf16 FLOP a second of the tensor cores (dense).
PEAKS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "A100": (2.04e12, 312e12), "4090": (1.01e12, 165e12)}
SLEEP_CYCLES = 20_000_000  # about 10 ms: the host queues a round of calls in it
L2_BYTES = 64 << 20  # more than any of these GPUs has


class WrongValueError(RuntimeError):
    """What is to be timed is not right."""


@dataclass
class Bench:
    """Where a step runs.

    Attributes:
        name: "cuda:0", or "emulated" for a dry run.
        quick: small shapes.
        folder: for checkpoints; kept between steps.
    """

    name: str
    quick: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.name != "emulated"

    @property
    def place(self) -> torch.device:
        """Where torch's tensors have to be."""
        return torch.device(self.name if self.on_gpu else "cpu")

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, seed: int = 0) -> Any:
        values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return values.to(dtype).to(self.place)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.name)

    def seconds(self, calls: list[Callable[[], object]], rounds: int = 5) -> float:
        """Median time of a call, over rounds in which all are queued at once; two rounds warm up."""
        times = []
        for turn in range((rounds if self.on_gpu else 1) + 2):
            self.wait()
            if not self.on_gpu:
                started = time.perf_counter()
                for call in calls:
                    call()
                took = time.perf_counter() - started
            else:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(SLEEP_CYCLES)
                begin.record()
                for call in calls:
                    call()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end) / 1e3
            if turn >= 2:
                times.append(took / len(calls))
        return statistics.median(times)


def transfer(bench: Bench) -> dict[str, Any]:
    """Bytes a second to the device: emoe's demand lane by size of its pieces; torch's pinned and pageable copies."""
    rows = []
    for mib in (1,) if bench.quick else (1, 4, 16, 64, 256):
        nbytes = mib << 20
        row: dict[str, Any] = {"bytes": nbytes}
        for piece in (1, 4, 16):
            device = open_device(bench.name).module.CudaDevice(bench.place.index or 0, piece_bytes=piece << 20)
            row[f"emoe_pieces_{piece}_mib"] = device.copy_rate(nbytes, 2 if bench.quick else 32)
        if bench.on_gpu:
            on_gpu = torch.empty(nbytes, dtype=torch.uint8, device=bench.place)
            pinned, pageable = (
                torch.empty(nbytes, dtype=torch.uint8).pin_memory(),
                torch.zeros(nbytes, dtype=torch.uint8),
            )
            copies: dict[str, Callable[[], object]] = {
                "torch_pinned_to_device": lambda a=on_gpu, b=pinned: a.copy_(b, non_blocking=True),
                "torch_pinned_to_host": lambda a=on_gpu, b=pinned: b.copy_(a, non_blocking=True),
                "torch_pageable_to_device": lambda a=on_gpu, b=pageable: a.copy_(b),
            }
            row |= {name: nbytes / bench.seconds([copy] * 8) for name, copy in copies.items()}
        rows.append(row)
    return {"rows": rows}


def _layer(bench: Bench, H: int, I: int, experts: int) -> tuple[Any, Any, Any, np.ndarray]:
    """A device, a layout, and a slab that random weights were copied into; the weights as [E, 3, I, H] on the host."""
    device = open_device(bench.name)
    layout = device.module.MlpLayout(
        H, I, H, "bfloat16", True, False, False, "silu", gate_up_offset=0, down_offset=4 * I * H
    )
    slab = device.native.slab(experts, 6 * I * H)
    weights = (torch.randn(experts, 3, I, H, generator=torch.Generator().manual_seed(1)) / H**0.5).to(torch.bfloat16)
    # Expert by expert: gate and up [2I, H], then down [H, I].
    for expert in range(experts):
        gate, up, down = weights[expert]
        data = torch.cat([gate.flatten(), up.flatten(), down.T.contiguous().flatten()])
        target = slab.address + expert * slab.slot_bytes
        device.native.upload(target, data.data_ptr(), 2 * data.numel(), device.stream())
    bench.wait()
    return device, layout, slab, weights


def _reference(weights: Any, hidden: Any, index: Any, shares: Any) -> Any:
    """[T, H] float32 on the host."""
    hidden, index, shares = hidden.float().cpu(), index.cpu(), shares.float().cpu()
    out = torch.zeros_like(hidden)
    for t in range(len(hidden)):
        for expert, share in zip(index[t].tolist(), shares[t].tolist(), strict=True):
            gate, up, down = weights[expert].float()
            out[t] += share * (torch.nn.functional.silu(gate @ hidden[t]) * (up @ hidden[t])) @ down
    return out


def _close(ours: Any, expected: Any, what: str) -> None:
    error = float((ours.float().cpu() - expected).norm() / expected.norm())
    if not error < 0.02:
        raise WrongValueError(f"{what}: relative error {error:.3g} of what is to be timed")


def kernels(bench: Bench) -> dict[str, Any]:
    """gather_mlp against grouped products of torch, and against the roofline of bytes and FLOP."""
    H, I, E, K = (64, 32, 8, 2) if bench.quick else (2048, 1024, 64, 8)
    device, layout, slab, weights = _layer(bench, H, I, E)
    name = torch.cuda.get_device_name(bench.place) if bench.on_gpu else "emulated"
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    slot_of = np.arange(E, dtype=np.int32)
    rows = []
    for T in (1, 12) if bench.quick else (1, 4, 8, 32, 128, 512, 2048):
        hidden, shares = bench.random(T, H, seed=T), torch.full((T, K), 1 / K, device=bench.place)
        # Other experts in each call, until their weights are more than the L2 holds.
        turns = 2 if bench.quick else max(2, -(-2 * L2_BYTES // (K * 6 * I * H)))
        picks = [torch.stack([torch.randperm(E)[:K] for _ in range(T)]).to(bench.place) for _ in range(turns)]

        def ours(index: Any, hidden: Any = hidden, shares: Any = shares) -> Any:
            with device.call(layout, slab, hidden, index, shares) as call:
                call.gather(slot_of)
                return call.combine(torch.bfloat16)

        few = slice(0, min(T, 4))
        _close(ours(picks[0])[few], _reference(weights, hidden[few], picks[0][few], shares[few]), f"{T} tokens")
        used = statistics.mean(len(set(index.flatten().tolist())) for index in picks)
        nbytes, flop = used * 6 * I * H, 6 * T * K * I * H
        took = bench.seconds([lambda index=index: ours(index) for index in picks])
        row: dict[str, Any] = {"tokens": T, "experts": used, "seconds": took, "bytes": nbytes, "flop": flop}
        if bench.on_gpu:
            row["grouped_mm_seconds"] = _grouped_mm(bench, weights, hidden, picks, K)
        if peak:
            row["roofline_seconds"] = max(nbytes / peak[0], flop / peak[1])
            row["share_of_roofline"] = row["roofline_seconds"] / took
        rows.append(row)
    return {"gpu": name, "shape": {"H": H, "I": I, "E": E, "K": K}, "rows": rows}


def _grouped_mm(bench: Bench, weights: Any, hidden: Any, picks: list[Any], K: int) -> float:
    """The same products as Transformers' grouped_mm path makes them: sort, gather, two grouped products, scatter."""
    E, _, I, H = weights.shape
    gate_up = weights[:, :2].reshape(E, 2 * I, H).transpose(1, 2).contiguous().to(bench.place)
    down = weights[:, 2].contiguous().to(bench.place)
    grouped = torch.nn.functional.grouped_mm

    def call(index: Any) -> Any:
        flat = index.flatten()
        order = torch.argsort(flat)
        offsets = torch.cumsum(torch.bincount(flat, minlength=E), 0).to(torch.int32)
        gate, up = grouped(hidden[order // K], gate_up, offs=offsets).chunk(2, dim=-1)
        out = grouped(torch.nn.functional.silu(gate) * up, down, offs=offsets)
        return torch.zeros_like(hidden).index_add_(0, order // K, out / K)

    few = slice(0, min(len(hidden), 4))
    shares = torch.full((len(hidden), K), 1 / K)
    _close(call(picks[0])[few], _reference(weights, hidden[few], picks[0][few], shares[few]), "grouped_mm")
    return bench.seconds([lambda index=index: call(index) for index in picks])


def overlap(bench: Bench) -> dict[str, Any]:
    """Share of emoe's own copies that disappears behind its own kernels: records from pinned memory to other slots."""
    H, I, E = (64, 32, 8) if bench.quick else (2048, 1024, 64)
    device, layout, slab, _ = _layer(bench, H, I, E)
    with tempfile.NamedTemporaryFile(dir=bench.folder) as file:
        data = np.random.default_rng(0).integers(0, 256, (E // 2, slab.slot_bytes), dtype=np.uint8)
        data.tofile(file)
        file.flush()
        table = device.module.RecordTable()
        number = table.add_file(file.name)
        for record in range(E // 2):
            nbytes = slab.slot_bytes
            piece = (f"record {record}", "uint8", 0, "uint8", 1, nbytes, nbytes, 1)
            table.add_record([(number, record * nbytes, nbytes, *piece)])
        store = device.module.PinnedCache(E // 2, slab.slot_bytes, device.native.index)
        reader = device.module.make_reader("pread")
        queue = device.module.DeviceQueue(device.native, slab, table, reader, store, prefetch_bytes=1 << 40)
        try:
            return _overlap(bench, device, layout, slab, queue, data)
        finally:
            queue.close()


def _overlap(bench: Bench, device: Any, layout: Any, slab: Any, queue: Any, data: np.ndarray) -> dict[str, Any]:
    records, K = len(data), 4
    hidden = bench.random(1, layout.hidden)
    index, shares = torch.arange(K).view(1, K).to(bench.place), torch.full((1, K), 1 / K, device=bench.place)
    slot_of = np.full(2 * records, -1, dtype=np.int32)
    slot_of[:K] = np.arange(K)

    def copies(prefetch: bool) -> list[int]:
        return [queue.submit(record, records + record, prefetch) for record in range(records)]

    def compute(times: int) -> None:
        for _ in range(times):
            with device.call(layout, slab, hidden, index, shares) as call:
                call.gather(slot_of)
                call.combine(torch.bfloat16)

    def timed(work: Callable[[], list[int]]) -> float:
        bench.wait()
        started = time.perf_counter()
        for ticket in work():
            queue.wait(ticket)
        bench.wait()
        return time.perf_counter() - started

    timed(lambda: copies(False))  # into pinned memory
    back = np.empty(slab.slot_bytes, dtype=np.uint8)
    device.native.download(back.ctypes.data, slab.address + records * slab.slot_bytes, slab.slot_bytes, device.stream())
    if not (back == data[0]).all():
        raise WrongValueError("overlap: a record did not arrive as it is in its file")
    return {"rows": [_of_lane(bench, prefetch, copies, compute, timed) for prefetch in (False, True)]}


def _of_lane(
    bench: Bench,
    prefetch: bool,
    copies: Callable[[bool], list[int]],
    compute: Callable[[int], None],
    timed: Callable[[Callable[[], list[int]]], float],
) -> dict[str, Any]:
    """Copies alone, about as much computing alone, and both."""

    def computed(times: int) -> list[int]:
        compute(times)
        return []

    def median(work: Callable[[], list[int]]) -> float:
        return statistics.median(timed(work) for _ in range(1 if bench.quick else 5))

    copying = median(lambda: copies(prefetch))
    compute(2)
    times = max(1, round(copying / (timed(lambda: computed(8)) / 8))) if bench.on_gpu else 2
    computing = median(lambda: computed(times))
    together = median(lambda: copies(prefetch) + computed(times))
    share = max(0.0, min(1.0, (copying + computing - together) / min(copying, computing)))
    figures = {"copying": copying, "computing": computing, "together": together, "overlap": share}
    return {"lane": "prefetch" if prefetch else "demand", **figures}


def geometries(quick: bool) -> dict[str, dict[str, Any]]:
    """Configs of models with random weights, by name."""
    from transformers import OlmoeConfig, Qwen3MoeConfig

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if quick:
        tiny = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, **ids}  # fmt: skip
        return {
            "olmoe": {"config": OlmoeConfig(intermediate_size=32, **tiny)},
            "qwen3": {"config": Qwen3MoeConfig(moe_intermediate_size=32, intermediate_size=64, head_dim=16, **tiny)},
        }
    return {
        "olmoe": {"config": OlmoeConfig(
            vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, **ids)},
        "qwen3": {"config": Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, intermediate_size=6144,
            num_hidden_layers=12, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, **ids)},
    }  # fmt: skip


def checkpoint(bench: Bench, name: str) -> Path:
    """Random weights of a geometry; written once."""
    from common import write_checkpoint

    return write_checkpoint(geometries(bench.quick)[name]["config"], bench.folder / f"{name}{'-quick' * bench.quick}")


def _rate(bench: Bench, model: Any, tokens: int) -> tuple[float, list[int]]:
    """Tokens a second of greedy decode after a prompt of 32, and the tokens."""
    prompt = torch.arange(10, 42, device=bench.place).view(1, -1)
    options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(prompt, **options)
    bench.wait()
    started = time.perf_counter()
    answer = model.generate(prompt, **options)[0].tolist()
    bench.wait()
    return tokens / (time.perf_counter() - started), answer[32:]


def decode(bench: Bench, geometry: str) -> dict[str, Any]:
    """Tokens a second of a whole model with a share of its experts in device memory, and of Transformers with all."""
    folder, tokens = checkpoint(bench, geometry), 4 if bench.quick else 64
    ways: list[dict[str, Any]] = [
        {"memory_budget": 1.0},
        {"memory_budget": 0.5},
        {"memory_budget": 0.25},
        {"memory_budget": 0.25, "prefetch": "look-ahead"},
        {"memory_budget": 0.25, "miss": "auto"},
        {"memory_budget": 0.25, "routing": "resident"},
    ]
    rows: list[dict[str, Any]] = []
    answers = {}
    for number, way in enumerate(ways):
        model = emoe.from_pretrained(folder, device=bench.name, context=128, **way)
        rate, answer = _rate(bench, model, tokens)
        stats = model.emoe.stats()
        rows.append(
            {**way, "tokens_per_second": rate, **{key: stats[key] for key in ("hit_rate", "on_cpu", "settled")}}
        )
        if way.get("routing") is None and way.get("miss") is None:
            answers[number] = tuple(answer)
        model.emoe.close(restore=False)
        del model
        if bench.on_gpu:
            torch.cuda.empty_cache()
    if len(set(answers.values())) != 1:
        raise WrongValueError(f"{geometry}: tokens of exact runs differ between budgets: {rows}")
    if bench.on_gpu:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=bench.name)
        rows.append(
            {"rival": "Transformers, all experts on the GPU", "tokens_per_second": _rate(bench, model, tokens)[0]}
        )
        del model
        torch.cuda.empty_cache()
        rows.append({"rival": "accelerate, the same budget", **_accelerate(bench, folder, tokens)})
    return {"geometry": geometry, "rows": rows}


def _accelerate(bench: Bench, folder: Path, tokens: int) -> dict[str, Any]:
    """Layers that do not fit in a quarter of the bytes lie in host memory."""
    from transformers import AutoModelForCausalLM

    plan = emoe.plan(folder, memory_budget=0.25, context=128, calibrate=False)
    most = {bench.place.index or 0: plan.budget_bytes, "cpu": "200GiB"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto", max_memory=most)
    return {"tokens_per_second": _rate(bench, model, min(tokens, 16))[0]}


def graph(bench: Bench) -> dict[str, Any]:
    """A captured step of routing resident, replayed, against the same step that is not; the same logits."""
    from transformers import StaticCache

    model = emoe.from_pretrained(
        checkpoint(bench, "olmoe"), device=bench.name, context=128, memory_budget=0.5, routing="resident"
    )
    prompt = torch.arange(10, 42, device=bench.place).view(1, -1)
    cache = StaticCache(config=model.config, max_cache_len=64)
    token = torch.tensor([[7]], device=bench.place)
    step = {"input_ids": token, "past_key_values": cache, "cache_position": torch.tensor([32], device=bench.place)}

    def fill() -> None:
        cache.reset()
        model(prompt, past_key_values=cache, cache_position=torch.arange(32, device=bench.place))

    with torch.inference_mode():
        fill()
        model.emoe.graphs.settle()
        eager = model(**step).logits.clone()
        fill()
        if not bench.on_gpu:
            with model.emoe.graphs.replaying():
                replayed = None
            again = model(**step).logits
            _close(again, eager.float(), "a step after the block of replays")
            model.emoe.close(restore=False)
            return {"dry": "captured on a GPU only", "replayed": replayed}
        stream = torch.cuda.Stream(bench.name)
        stream.wait_stream(torch.cuda.current_stream(bench.name))
        with torch.cuda.stream(stream):
            model(**step)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            out = model(**step).logits
        fill()
        with model.emoe.graphs.replaying():
            captured.replay()
        bench.wait()
        _close(out, eager.float().cpu(), "a replay")
        plain = bench.seconds([lambda: model(**step)] * 4)
        with model.emoe.graphs.replaying():
            fast = bench.seconds([captured.replay] * 4)
    del captured
    model.emoe.close(restore=False)
    return {"eager_seconds": plain, "replay_seconds": fast}


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "transfer": transfer,
    "overlap": overlap,
    "kernels": kernels,
    "decode-olmoe": lambda bench: decode(bench, "olmoe"),
    "decode-qwen3": lambda bench: decode(bench, "qwen3"),
    "graph": graph,
}

__all__ = ["STEPS", "Bench", "EmoeError", "WrongValueError"]
