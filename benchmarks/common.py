"""What the benchmarks share: checkpoints with random weights, memory cgroups, child processes, cold page caches.

Not a benchmark itself. Checkpoints are written shard by shard, so that a machine can make one that it could not load.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

MIB, GIB = 1 << 20, 1 << 30
RESULTS = Path(__file__).parent / "results"
SHARD_BYTES = GIB
# Both sides without AVX-512: emoe's kernels, oneDNN, torch's own.
AVX2 = {"EMOE_FORCE_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def olmoe_config(*, layers: int, hidden: int, intermediate: int, vocab: int) -> Any:
    """OLMoE with 64 experts, 8 of them per token."""
    from transformers import OlmoeConfig

    return OlmoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def small_config() -> Any:
    """0.86 billion parameters, 285 MB of weights a token in bfloat16."""
    return olmoe_config(layers=8, hidden=1024, intermediate=512, vocab=8192)


def half_olmoe_config() -> Any:
    """The geometry of OLMoE-1B-7B with 8 of its 16 layers: 7 GB in bfloat16."""
    return olmoe_config(layers=8, hidden=2048, intermediate=1024, vocab=50304)


def write_checkpoint(config: Any, folder: Path) -> Path:
    """A checkpoint of `config` with random weights, as `save_pretrained` lays it out; one that is complete is kept."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = dict(_disk_shapes(model))
    generator = torch.Generator().manual_seed(0)
    total = 2 * sum(shape.numel() for shape in shapes.values())
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    held, number = 0, 0
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}") as bar:
        for name, shape in shapes.items():
            tensor = torch.ones(shape) if name.endswith("norm.weight") else _random(shape, generator)
            shard[name] = tensor.to(torch.bfloat16)
            held += 2 * shape.numel()
            bar.update(2 * shape.numel())
            if held >= SHARD_BYTES or len(weight_map) + len(shard) == len(shapes):
                number += 1
                file = f"model-{number:05d}.safetensors"
                save_file(shard, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(shard, file)
                shard, held = {}, 0
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    temporary = index.with_suffix(".tmp")
    temporary.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    temporary.replace(index)
    return folder


def _disk_shapes(model: Any) -> Iterator[tuple[str, torch.Size]]:
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            E, I2, H = tensor.shape
            for expert in range(E):
                yield f"{prefix}{expert}.gate_proj.weight", torch.Size((I2 // 2, H))
                yield f"{prefix}{expert}.up_proj.weight", torch.Size((I2 // 2, H))
                yield f"{prefix}{expert}.down_proj.weight", torch.Size((H, I2 // 2))
        elif not name.endswith("experts.down_proj"):
            yield name, tensor.shape


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape).normal_(std=0.02, generator=generator)


def forget_pages(folder: Path) -> None:
    """Drops the files of a folder from the page cache, so that the next read goes to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def direct_read_rate(path: Path, block: int, seconds: float = 3.0, threads: int = 4) -> float:
    """Bytes per second of direct reads of `block` bytes at random places of a file, or of the files of a folder."""
    files = [file for file in path.iterdir() if file.stat().st_size > block] if path.is_dir() else [path]
    ends = time.perf_counter() + seconds

    def read(seed: int) -> int:
        random, buffer, total = Random(seed), mmap.mmap(-1, block), 0
        handles = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
        try:
            while time.perf_counter() < ends:
                handle = random.choice(handles)
                places = (os.fstat(handle).st_size - block) // mmap.PAGESIZE
                total += os.preadv(handle, [buffer], random.randrange(places) * mmap.PAGESIZE)
        finally:
            for handle in handles:
                os.close(handle)
        return total

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(threads)))
    return total / (time.perf_counter() - started)


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup of `limit` bytes, page cache included, removed afterwards.

    Raises:
        PermissionError: this user may not make one.
    """
    v1 = Path("/sys/fs/cgroup/memory")
    root, file = (v1, "memory.limit_in_bytes") if v1.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"emoe-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError as error:
        raise PermissionError(f"a memory cgroup cannot be made under {root}: {error}") from error
    try:
        yield group
    finally:
        group.rmdir()


class ChildFailedError(RuntimeError):
    """A child process ended with an error; `returncode` is negative for a signal (-9: killed, for memory as a rule)."""

    def __init__(self, command: Sequence[str], returncode: int, tail: str) -> None:
        super().__init__(f"{' '.join(command)} ended with {returncode}: {tail}")
        self.returncode = returncode


def run_child(
    command: Sequence[str], *, cgroup: Path | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs a command, in a cgroup where one is given, and returns the JSON object of its last line."""
    words = list(command)
    if cgroup is not None:
        words = ["sh", "-c", f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"', "sh", *words]
    done = subprocess.run(words, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode:
        raise ChildFailedError(command, done.returncode, done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def this_script(file: str, *arguments: str) -> list[str]:
    return [sys.executable, file, *arguments]


@contextlib.contextmanager
def scratch_folder(keep: Path | None) -> Iterator[Path]:
    """`keep`, or a temporary folder on the disk this file lies on (a RAM disk would not do)."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    RESULTS.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=RESULTS))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write_result(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))
