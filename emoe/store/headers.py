"""Which tensors a safetensors checkpoint holds, and at which bytes. Reads headers only.

The safetensors library validates every header; it does not tell offsets, so those are read here, beside it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError, one_line
from emoe.files import jsontext
from emoe.model.encoding import COMPUTED, encoding
from emoe.store.opened import OpenFile, spare_descriptor

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LARGEST_HEADER = 100_000_000  # bytes; the library's own bound
_MOST_DIMENSIONS = 64  # torch's own bound

# code in the file -> encoding by name
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
# What emoe has no encoding for; an element's bits, by code in the file, which stays the dtype's name.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint: `nbytes` at byte `offset` of `file`; `dtype` is torch's name for it."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether its elements are numbers of their own, not codes that need a scale."""
        return self.dtype in ("float64", *COMPUTED)

    def error(self, why: str) -> CheckpointError:
        """A CheckpointError about this tensor."""
        return CheckpointError(
            f"{self.file}: tensor {self.name} ({self.dtype}{list(self.shape)}, {self.nbytes} bytes at byte "
            f"{self.offset}) {why}",
            file=self.file,
            tensor=self.name,
            offset=self.offset,
            nbytes=self.nbytes,
        )


def checkpoint_files(folder: Path) -> list[str]:
    """The safetensors files of a checkpoint folder, in the order Transformers reads them.

    Raises:
        CheckpointError: there are none, or the index is damaged or names a file that is missing.
    """
    if (folder / SINGLE_NAME).is_file():
        return [str(folder / SINGLE_NAME)]
    index = folder / INDEX_NAME
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; emoe does not read {others[0]}: convert it with save_pretrained of Transformers" if others else ""
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}",
            file=str(folder / (others[0] if others else SINGLE_NAME)),
        )
    try:
        weight_map = jsontext.read(index, "index of shards", partial(CheckpointError, file=str(index)))["weight_map"]
        shards = {tensor: _text(shard) for tensor, shard in weight_map.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}", file=str(index)) from error
    for tensor, shard in shards.items():
        if Path(shard).name != shard or len(shard.encode()) > 255 or "\0" in shard:
            raise CheckpointError(
                f"{index} puts {tensor} into {shard!r}, which is no file name", file=str(index), tensor=tensor
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard} is missing; {index} says it holds {tensor}", file=str(folder / shard), tensor=tensor
            )
    if not shards:
        raise CheckpointError(f"{index} names no shards", file=str(index))
    return [str(folder / shard) for shard in sorted(set(shards.values()))]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{jsontext.shown(value)} is no text")
    return value


def read_headers(files: Iterable[str | Path | OpenFile]) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint by name.

    Raises:
        CheckpointError: a file is missing, unreadable, truncated or damaged, or two hold the same tensor.
    """
    found: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in found:
                raise entry.error(f"is in {found[name].file} as well")
            found[name] = entry
    return found


def remote_headers(repo: str, *, revision: str | None = None, token: Any = None) -> dict[str, TensorEntry] | None:
    """All tensors of a checkpoint on the hub, of which only headers are fetched; None where it cannot be asked."""
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(repo, revision=revision, token=token).files_metadata
    except Exception as error:  # offline, not there, no safetensors: each client of HTTP has classes of its own
        logger.info("emoe: the headers of %s were not fetched: %s", repo, one_line(error))
        return None
    return {
        name: TensorEntry(
            f"{repo}/{file}", name, DTYPES.get(info.dtype, info.dtype), tuple(info.shape), info.data_offsets[0],
            info.data_offsets[1] - info.data_offsets[0],
        )
        for file, header in files.items()
        for name, info in header.tensors.items()
    }  # fmt: skip


def read_header(file: str | Path | OpenFile) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; all is read through one descriptor, so that no two files can be mixed.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or damaged; names the tensor where it is known.
    """
    if not isinstance(file, OpenFile):
        _require_safetensors(str(file))
        opened = OpenFile(str(file))
        try:
            return read_header(opened)
        finally:
            opened.close()
    _require_safetensors(file.path)
    header, start = _load_header(file)
    size = file.identity.size
    entries = {
        name: _entry(file.path, name, raw, start, size) for name, raw in header.items() if name != "__metadata__"
    }
    _validate_with_library(file, set(entries))
    if file.change():
        raise CheckpointError(f"{file.path} changed while its header was read; load it again", file=file.path)
    return entries


def _require_safetensors(file: str) -> None:
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{file} is no safetensors file; emoe reads experts from safetensors only: convert the checkpoint with "
            "save_pretrained of Transformers",
            file=file,
        )


def _load_header(opened: OpenFile) -> tuple[dict[str, Any], int]:
    """The header, and the byte at which tensor data starts."""
    file, size = opened.path, opened.identity.size
    if size < 8:
        raise CheckpointError(f"{file} has {size} bytes, too few for a safetensors file", file=file)
    try:
        length = int.from_bytes(os.pread(opened.fd, 8, 0), "little")
        if length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: its header would take {length} bytes, "
                f"the file has {size}",
                file=file,
                offset=8,
                nbytes=length,
            )
        raw = bytearray(length)
        opened.read(memoryview(raw), 8)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}", file=file) from error
    fail = partial(CheckpointError, file=file, offset=8, nbytes=length)
    header = jsontext.parse(raw, lambda why: fail(f"{file} has a damaged safetensors header: {why}"))
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged safetensors header: no object", file=file, offset=8, nbytes=length)
    return header, 8 + length


def _entry(file: str, name: str, raw: Any, start: int, size: int) -> TensorEntry:
    try:
        shape = tuple(raw["shape"])
        begin, end = raw["data_offsets"]
        code = raw["dtype"]
        # Bounded before they are multiplied: the product of 100,000 large numbers takes minutes.
        known = len(shape) <= _MOST_DIMENSIONS and isinstance(code, str)
        known = known and all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise CheckpointError(
            f"{file}: the header's entry of tensor {name} is damaged: {raw!r:.200}", file=file, tensor=name
        )
    dtype = DTYPES.get(code, code)
    entry = TensorEntry(file, name, dtype, shape, start + begin, end - begin)
    if begin > end or start + end > size:
        raise entry.error(
            f"reaches beyond the end of the file, which has {size} bytes: the file is truncated or damaged"
        )
    if code in DTYPES:
        wanted = encoding(dtype).nbytes(shape)
    elif code in _BITS:
        wanted = -(-math.prod(shape) * _BITS[code] // 8)
    else:
        raise entry.error(f"is of a dtype that emoe does not know; it knows {', '.join((*DTYPES, *_BITS))}")
    if wanted != entry.nbytes:
        raise entry.error(f"should take {wanted} bytes")
    return entry


def _validate_with_library(opened: OpenFile, names: set[str]) -> None:
    from safetensors import SafetensorError, safe_open

    file, own = opened.path, Path(f"/proc/self/fd/{opened.fd}")
    spare_descriptor()  # the library's own complaint about too few names no class
    try:
        with safe_open(own if own.exists() else file, framework="pt") as tensors:
            same = set(tensors.keys()) == names
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no sound safetensors file: {error}", file=file) from error
    if not same:
        raise CheckpointError(f"{file} has a header that is read in two ways", file=file)
