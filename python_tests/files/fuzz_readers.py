"""Damages files that users give, by bytes and by meaning, and reads them: nothing but `emoe.errors` may come of it.

    .venv/bin/python python_tests/files/fuzz_readers.py --minutes 5        every reader in turn, with seeds that go on
    .venv/bin/python python_tests/files/fuzz_readers.py --reader trace-csv --seed 7 --cases 1     one case again

A case may take 10 s of the processor and 300 MiB; one that stands still ends the run after 100 s. A finding names
reader and seed, and its file is kept in --keep.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import io
import itertools
import json
import logging
import random
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import torch
from made_traces import task_trace

from emoe import files
from emoe.demo.delta import Delta, load_delta, save_delta
from emoe.demo.delta import Shape as DeltaShape
from emoe.engine import calibrate
from emoe.engine.costs import Costs
from emoe.errors import EmoeError
from emoe.model.gguf_files import gguf_config
from emoe.planning import bandwidth
from emoe.predictor import KINDS, load
from emoe.predictor import files as predictor_files
from emoe.predictor.fitting import TRAINED, fit
from emoe.sensitivity import SensitivityProfile
from emoe.store import headers
from emoe.tasks import KINDS as CLASSIFIERS
from emoe.tasks import TaskClassifier, load_prompts, make
from emoe.tasks.classifier import FORMAT
from emoe.trace.trace import load_trace

SECONDS, BYTES = 10.0, 300 << 20  # that a case may take
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -0.0, 2, 255, 256, 32767, 32768, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1,
    2**63, 2**64, -(2**63) - 1, 10**40, 10**400, 1e308, float("nan"), float("inf"), -float("inf"), "", "a", "\0",
    "\ud800", "x" * 5000, "NaN", "1", [], {}, [[]], [1, 2, 3], ["a"], {"a": 1}, [None], [2**32] * 40,
    [0] * 100_000, "[" * 3000,
]  # fmt: skip
TEXTS = [
    "", "nan", "inf", "-inf", "1e999", "-1", "1.5", "1e400", "4294967296", "9223372036854775808", "1" * 5000, "0x10",
    "a",
    "\"", "#", ",", " ", "\0", "\u2028", "1_0", "٣", "1e18", "-0", "65536", "32768", "2147483648", "true",
    "layer=3 expert_bytes=-1",
]  # fmt: skip


@dataclass
class Reader:
    """A loader, a whole file for it, and what damages its meaning; `load` gets the path of the damaged one."""

    name: str
    file: str
    whole: bytes
    load: Callable[[Path], Any]
    damage: Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 4, 30, 500]))
    return data[:end] + data[start:end] * rng.choice([1, 2, 100]) + data[rng.choice([start, end]) :]


def put(rng: random.Random, data: bytes) -> bytes:
    start, length = rng.randrange(len(data) + 1), rng.choice([0, 1, 2, 4, 8])
    number = rng.choice([0, 1, 2**7, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
    return data[:start] + struct.pack("<Q", number)[: rng.choice([1, 2, 4, 8])] + data[start + length :]


BY_BYTES = [flip, cut, repeat, put]


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*before, key)
        yield from places(each, (*before, key))


def damage_value(rng: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        found = list(places(value))
        if not found or rng.random() < 0.05:
            return rng.choice(VALUES)
        *way, last = rng.choice(found)
        inside = value
        for key in way:
            inside = inside[key]
        what = rng.random()
        if what < 0.1:
            del inside[last]
        elif what < 0.2 and isinstance(inside, dict):
            inside[rng.choice(["other", "__metadata__", "\0", "x" * 300])] = inside[last]
        elif what < 0.25 and isinstance(inside, list):
            inside.extend(inside[last : last + 1] * rng.choice([1, 70, 20_000]))
        else:
            inside[last] = copy.deepcopy(rng.choice(VALUES))
    return value


def damage_text(rng: random.Random, text: str) -> str:
    """Of JSON: what `json` does not write."""
    what = rng.randrange(8)
    if what == 0:
        depth = rng.choice([50, 100, 900, 100_000])
        return "[" * depth + text + "]" * depth
    if what == 1:
        return '{"a":' * 5000 + text + "}" * 5000
    if what == 2:
        return text.replace("1", "1" * rng.choice([70, 5000, 200_000]), 1)
    if what == 3:
        return text.replace(":", ': "\\ud800", "b":', 1)
    if what == 4:
        return text.replace("[", "[1e999,", 1)
    return text


def as_json(rng: random.Random, value: Any) -> str:
    return damage_text(rng, json.dumps(damage_value(rng, value), ensure_ascii=rng.random() < 0.5))


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def damage_json(rng: random.Random, data: bytes) -> bytes:
    return encoded(as_json(rng, json.loads(data)))


def damage_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = as_json(rng, json.loads(lines[place]))
    return encoded(rng.choice(["\n", "\n", "\r\n", "\u2028", "\n\n", "\r"]).join(lines))


def damage_csv(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.1:  # each row a layer and a step of its own
        rows = "\n".join(f"{n},{n},{n % 3}" for n in range(rng.choice([10, 1000, 30_000])))
        return f"step,layer,expert\n{rows}\n".encode()
    lines = data.decode().splitlines()
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(len(lines))
        cells = lines[place].split(",")
        what = rng.random()
        if what < 0.7:
            cells[rng.randrange(len(cells))] = rng.choice(TEXTS)
        elif what < 0.8:
            cells *= rng.choice([2, 2000])
        elif what < 0.9:
            del cells[rng.randrange(len(cells))]
        lines[place] = ",".join(cells)
        if what > 0.9:
            lines[place] = f"# layer={rng.choice(TEXTS)} expert_bytes={rng.choice(TEXTS)} n_expert={rng.choice(TEXTS)}"
    return encoded("\n".join(lines) + "\n")


def damage_npz(rng: random.Random, data: bytes) -> bytes:
    with np.load(io.BytesIO(data)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = rng.choice(sorted(arrays))
    what = rng.randrange(5)
    if what == 0:
        arrays["meta"] = np.array(as_json(rng, json.loads(str(arrays["meta"]))).replace("\ud800", "x"))
    elif what == 1:
        dtype = rng.choice(["<i8", "<u8", "|i1", "<f8", "<f2", "<c16", "|b1", "|u1", "<U3", "|S3", "<M8[s]", "<i4"])
        with np.errstate(all="ignore"):
            arrays[name] = np.resize(np.array([rng.choice([0, 1, 2**33, -1, 300])]), arrays[name].shape).astype(dtype)
    elif what == 2:
        shape = list(arrays[name].shape) or [1]
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 7])
        arrays[name] = np.resize(arrays[name], shape)
    elif what == 3:
        most = rng.choice([1 << 20, 1 << 24, 1 << 27])
        arrays[name] = np.zeros((1, most, 1), dtype=rng.choice(["<i2", "|i1"]))
    headers_of = {name: _npy(rng, array, damaged=what == 4 and each == name) for each, (name, array) in
                  zip(arrays, arrays.items(), strict=True)}  # fmt: skip
    return _zipped(rng, headers_of)


def _npy(rng: random.Random, array: Any, *, damaged: bool) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), allow_pickle=False)
    whole = out.getvalue()
    if not damaged:
        return whole
    length = int.from_bytes(whole[8:10], "little")
    header, body = whole[10 : 10 + length].decode(), whole[10 + length :]
    shape = rng.choice([
        "()", "(1,)", "(-1, 2, 3)", "(2, 10000000000, 2)", "(0, 10000000000000000000000)", "(1e3, 2)", "(True, 2, 2)",
        f"({'1, ' * 1200})", f"({'1, ' * 160_000})", "(((((" * 300, "x", "(2**31, 2, 2)", "(1000000, 1000000, 1000000)",
        f"({'9' * 4000},)", "__import__('os')", "None", "[2, 2, 2]",
    ])  # fmt: skip
    descr = rng.choice([
        "'<i2'", "'|O'", "'<i2, (1000000,)i2'", "[('a', '<i2')]", "'<U2000000000'", "'<U0'", "'V9'", "'<f16'", "'>i2'",
        "('<i2', (1000000000,))", "'i3'", "5", "'|b1'", "'<m8'",
    ])  # fmt: skip
    header = rng.choice([
        f"{{'descr': {descr}, 'fortran_order': False, 'shape': {array.shape}, }}",
        f"{{'descr': '<i2', 'fortran_order': {rng.choice(['True', '5', 'x'])}, 'shape': {shape}, }}",
        header[: rng.randrange(len(header))],
    ])  # fmt: skip
    text = header.encode("latin-1")
    size = rng.choice([len(text), len(text), len(text), 0, 65535, 2**31])
    version = rng.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    if version == b"\x01\x00" and size < 65536:
        return whole[:6] + version + struct.pack("<H", size) + text + body
    return whole[:6] + version + struct.pack("<I", size) + text + body


def _zipped(rng: random.Random, members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    usual = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED] * 8
    kind = rng.choice([*usual, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    if sum(map(len, members.values())) > 16 << 20:  # a bomb is a small file
        kind = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
        for number in range(rng.choice([0] * 18 + [5, 3000])):
            archive.writestr(f"other{number}", b"")
    data = bytearray(out.getvalue())
    if rng.random() < 0.15:  # sizes, methods and flags of the directory
        entry = data.find(b"PK\x01\x02")
        place, width = rng.choice([(8, 2), (10, 2), (20, 4), (24, 4), (42, 4), (28, 2), (16, 4)])
        number = rng.choice([0, 1, 8, 99, 2**16 - 1, 2**31, 2**32 - 1]) & (256**width - 1)
        data[entry + place : entry + place + width] = number.to_bytes(width, "little")
    return bytes(data)


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.2:
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name]["shape"] = rng.choice([[1] * 70, [2**62] * 160_000, [2**32, 2**32], [0, 2**63], [-1], [1.0], []])
        text = json.dumps(header)
    else:
        text = as_json(rng, header)
    raw = encoded(text)
    size = len(raw) if rng.random() < 0.8 else rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(raw) + 8, len(raw) - 1])
    return struct.pack("<Q", size) + raw + body


def damage_settings(read: Callable[[bytes], tuple[str, str, Any, Any]]) -> Callable[[random.Random, bytes], bytes]:
    """Settings or arrays of a file with a digest, and the digest that belongs to them."""

    def damage(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.3:
            return damage_safetensors(rng, data)
        format, kind, tensors, settings = read(data)
        if settings and rng.random() < 0.6:
            settings = damage_value(rng, settings)
        else:
            name = rng.choice(sorted(tensors))
            shape = [rng.choice([size, 0, 1, 3]) for size in tensors[name].shape] + [1] * rng.choice([0, 0, 1])
            with np.errstate(all="ignore"):
                value = np.full(shape, rng.choice([0.0, -1.0, 1e30, np.nan, np.inf]))
                tensors[name] = value.astype(rng.choice(["<f4", "<f4", "<f8", "<i4", "|b1"]))
            if rng.random() < 0.2:
                del tensors[name]
            if rng.random() < 0.1:
                extra = {f"model.layer.{n}.rel_attn.q": np.ones((1, 1, 1), "<f4") for n in range(1, 3000)}
                tensors.update(extra)
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = files.write(Path(folder) / "f", format, kind, tensors, settings if settings is not None else {})
            except (TypeError, ValueError, UnicodeError):
                return data
            return path.read_bytes()

    return damage


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) % 40 for letter in text] for text in texts]}


def damage_gguf(rng: random.Random, data: bytes) -> bytes:
    """A key's type or value, or what follows the name of a tensor, is something else."""
    at = data.index(rng.choice(GGUF_NAMES))
    at = data.index(b"\0" if rng.random() < 0.1 else data[at : at + 1], at) + rng.choice([0, 20, 30, 34, 40, 44])
    number = rng.choice([0, 1, 4, 6, 8, 9, 12, 13, 39, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
    return data[:at] + struct.pack("<Q", number)[: rng.choice([1, 4, 8])] + data[at + rng.choice([1, 4, 8]) :]


GGUF_NAMES = (
    b"general.architecture",
    b"qwen3moe.",
    b"tokenizer.ggml.tokens",
    b"token_embd.weight",
    b"blk.0.ffn_up_exps",
)


def whole_gguf(folder: Path) -> bytes:
    sizes = {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "attention.head_count": 2,
        "attention.key_length": 16, "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": 4,
        "expert_used_count": 2, "feed_forward_length": 32,
    }  # fmt: skip
    tensors = {
        "token_embd.weight": torch.zeros(8, 32),
        **{f"blk.0.ffn_{kind}_exps.weight": torch.zeros(4, 32, 32) for kind in ("gate", "up", "down")},
    }
    path = folder / "whole.gguf"
    gguf_models.write(path, "qwen3moe", tensors, sizes, kinds=lambda name: "Q8_0")
    data = path.read_bytes()
    path.unlink()
    return data


def readers(folder: Path) -> list[Reader]:
    """Every loader of files that users give, with a whole file."""
    rng = np.random.default_rng(0)
    meta = {"num_experts": 8, "task_names": ["a", "b"], "expert_bytes": [1, 2], "format": "emoe-trace", "version": 1}
    experts = np.argsort(rng.random((2, 20, 8)), axis=2)[:, :, :2].astype(np.int16)
    per_token = {"task": np.arange(20, dtype=np.int32) % 2, "prompt": np.arange(20, dtype=np.int32) // 5}
    np.savez_compressed(
        folder / "t.npz", experts=experts, weights=rng.random(experts.shape).astype(np.float16), **per_token,
        phase=np.ones(20, np.uint8), meta=np.array(json.dumps(meta)),
    )  # fmt: skip
    rows = [f"{t % 2},1,{t},{layer},0,{(t * 3 + layer) % 8},0.5,{100 + layer}" for t in range(8) for layer in range(2)]
    csv = "# n_expert=8\n# layer=0 expert_bytes=100\nturn,phase,step,layer,slot,expert,weight,expert_bytes\n"
    prompts = [{"task": "a", "prompt": "one", "split": "train", "reference": "x"}, {"task": "b", "prompt": "two"}]
    SensitivityProfile(("a", "b"), 2, np.array([[1, 0.9, 0.5], [1, 0.8, 0.7]]), prompts=(3, 4)).save(folder / "s.json")
    costs = {"a": {"costs": asdict(Costs()), "error": 0.1, "time": time.time()}}
    rates = {"none": {"memory": 1e9, "disk": 1e9, "note": "x", "time": time.time()}}
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}
    (folder / "m.safetensors").touch()
    shape = DeltaShape(shared=2, experts=2, width=3, top_k=1)
    tensors = {"order": torch.arange(8)[None], "router": torch.ones(1, 2, 4), "q.a": torch.ones(1, 2, 4)}
    save_delta(Delta(shape, tensors), folder / "d.safetensors")
    delta = (folder / "d.safetensors").read_bytes()
    found = [
        Reader("trace-npz", "t.npz", (folder / "t.npz").read_bytes(), load_trace, damage_npz),
        Reader("trace-csv", "t.csv", (csv + "\n".join(rows) + "\n").encode(), load_trace, damage_csv),
        Reader("prompts", "p.jsonl", "\n".join(map(json.dumps, prompts)).encode(), load_prompts, damage_lines),
        Reader("sensitivity", "s.json", (folder / "s.json").read_bytes(), SensitivityProfile.load, damage_json),
        Reader("bandwidth", "bandwidth.json", json.dumps(rates).encode(), bandwidth.KEPT.read, damage_json),
        Reader("costs", "costs.json", json.dumps(costs).encode(), calibrate.KEPT.read, damage_json),
        Reader(
            "index", headers.INDEX_NAME, json.dumps(index).encode(), lambda path: headers.checkpoint_files(path.parent),
            damage_json,
        ),
        Reader("delta", "d.safetensors", delta, load_delta, damage_safetensors),
        Reader("header", "m2.safetensors", delta, headers.read_header, damage_safetensors),
        Reader("gguf", "g.gguf", whole_gguf(folder), lambda path: gguf_config([path], {}), damage_gguf),
    ]  # fmt: skip
    embedding = torch.nn.Embedding(40, 6), Letters()

    def content(format: str) -> Callable[[bytes], tuple[str, str, Any, Any]]:
        def read(data: bytes) -> tuple[str, str, Any, Any]:
            path = folder / "whole"
            path.write_bytes(data)
            return (format, *files.read(path, format, "file"))

        return read

    for kind in KINDS:
        _predictor(kind).save(folder / kind)
        damage = damage_settings(content(predictor_files.FORMAT))
        found.append(Reader(f"predictor-{kind}", kind, (folder / kind).read_bytes(), load, damage))
    texts = ["add the numbers", "add two numbers", "add it all up", "sort the list", "sort a list", "sort it all"] * 4
    for kind in CLASSIFIERS:
        make(kind, *embedding).fit(texts, (["math"] * 3 + ["code"] * 3) * 4).save(folder / kind)
        found.append(
            Reader(
                f"tasks-{kind}", kind, (folder / kind).read_bytes(), lambda path: TaskClassifier.load(path, *embedding),
                damage_settings(content(FORMAT)),
            )
        )  # fmt: skip
    return found


def _predictor(kind: str) -> Any:
    if kind != TRAINED:
        return fit(kind, task_trace(1, prompts=12, num_experts=4))
    from emoe.predictor.sequence import SequenceModel, Shape, Size, build

    shape = Shape(2, 2, 4, 3, Size(8, 1, 2, 8))
    return SequenceModel(build(shape, np.ones((2, 4), dtype=np.float32), 0), shape, ("task 0", "task 1"))


def damaged(reader: Reader, seed: int) -> bytes:
    """The file of one case."""
    rng = random.Random(f"{reader.name} {seed}")
    if rng.random() < 0.7:
        data = reader.damage(rng, reader.whole)
        if rng.random() > 0.15:
            return data
    else:
        data = reader.whole
    for _ in range(rng.choice([1, 1, 2])):
        data = rng.choice(BY_BYTES)(rng, data)
    return data


def case(reader: Reader, seed: int, path: Path) -> str | None:
    """Reads one damaged file; what was wrong, or None. Memory is what Python and NumPy took at once."""
    path.write_bytes(damaged(reader, seed))
    tracemalloc.reset_peak()
    before, start, wrong = tracemalloc.get_traced_memory()[0], time.process_time(), None
    try:
        reader.load(path)
    except EmoeError as error:
        if not str(error):
            wrong = f"{type(error).__name__} that says nothing"
    except Exception as error:
        wrong = f"{type(error).__module__}.{type(error).__qualname__}: {str(error)[:200]!r}"
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    if seconds > SECONDS:
        wrong = f"{seconds:.1f} s"
    if peak > BYTES:
        wrong = f"{peak >> 20} MiB"
    return wrong


def fuzz(
    folder: Path, numbers: Iterator[int], only: str | None = None, until: float = float("inf")
) -> tuple[int, list[tuple[str, int, str, bytes]]]:
    """Cases that ran, and findings: reader, seed, what was wrong, and the file."""
    made = folder / "made"
    made.mkdir(parents=True)
    every = [reader for reader in readers(made) if only in (None, reader.name)]
    if not every:
        raise SystemExit(f"--reader {only} is not one of: {', '.join(reader.name for reader in readers(made))}")
    findings, count = [], 0
    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        for seed in numbers:
            for reader in every:
                (folder / reader.name).mkdir(exist_ok=True)
                path = folder / reader.name / reader.file
                faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
                wrong = case(reader, seed, path)
                count += 1
                if wrong:
                    findings.append((reader.name, seed, wrong, path.read_bytes()))
            if time.monotonic() > until:
                break
    finally:
        faulthandler.cancel_dump_traceback_later()
        if not tracing:
            tracemalloc.stop()
    return count, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, help="of each reader, in place of --minutes")
    parser.add_argument("--reader", help="this one alone")
    parser.add_argument("--keep", type=Path, help="folder for the files of findings")
    args = parser.parse_args()
    logging.getLogger("emoe").setLevel(logging.ERROR)
    numbers = itertools.count(args.seed) if args.cases is None else iter(range(args.seed, args.seed + args.cases))
    until = time.monotonic() + 60 * args.minutes if args.cases is None else float("inf")
    with tempfile.TemporaryDirectory() as folder:
        count, findings = fuzz(Path(folder) / "fuzz", numbers, args.reader, until)
    for name, seed, wrong, data in findings:
        print(f"{name} --seed {seed}: {wrong} ({len(data)} bytes)")
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            (args.keep / f"{name}-{seed}").write_bytes(data)
    print(f"{count} cases, {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
