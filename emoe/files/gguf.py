"""What a GGUF file says before its weights: metadata, and where each tensor lies. Of any origin, within bounds.

Names of types and sizes of blocks are the `gguf` library's. Its reader is not used: it maps the file, so that a file
that gets shorter kills the process, and it walks counts of damaged headers to their end. Format: ggml `docs/gguf.md`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError
from emoe.files.content import opened

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LARGEST_HEADER = 256 << 20  # bytes; a vocabulary of 260,000 words with its merges takes 15 MiB
_CHUNK = 1 << 20
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # ggml's own bound
_LARGEST_SIZE = 1 << 62
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `nbytes` at byte `offset`; `kind` is ggml's name of its type, `shape` in torch's order."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` is key to value, arrays as lists; `tensors` by name, in the order of the file."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def error(self, why: str, **where: Any) -> CheckpointError:
        """A CheckpointError about this file."""
        return CheckpointError(f"{self.path}: {why}", file=self.path, **where)


def read_header(fd: int, path: str) -> GgufHeader:
    """Reads the header of an open file.

    Args:
        path: for messages.

    Raises:
        CheckpointError: it is no GGUF file, truncated or damaged; names the tensor and its bytes where it is known.
        OSError: what the system says.
    """
    head = _Cursor(fd, path)
    if (magic := bytes(head.take(4))) != MAGIC:
        raise head.error(f"is no GGUF file: it begins with {magic!r}")
    version = head.number("I")
    if version not in _VERSIONS:
        swapped = " (its numbers are big-endian)" if version & 0xFFFF == 0 and version else ""
        known = " and ".join(map(str, _VERSIONS))
        raise head.error(f"is GGUF of version {version}{swapped}; emoe reads {known}, little-endian")
    tensors, keys = head.number("Q"), head.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = head.string("a key")
        if key in metadata:
            raise head.error(f"has the key {key!r} twice")
        metadata[key] = head.value(head.number("I"), key)
    entries = [head.tensor() for _ in range(tensors)]
    return GgufHeader(path, metadata, _placed(head, entries, metadata.get("general.alignment", 32)))


def open_header(path: str | Path) -> GgufHeader:
    """`read_header` of a path.

    Raises:
        CheckpointError: as `read_header`, and where the file cannot be read.
    """
    fail = _fail(str(path))
    with opened(path, "GGUF file", fail) as file:
        return read_header(file.fileno(), str(path))


def parts(path: Path) -> list[Path]:
    """The files of a checkpoint one of whose files is `path`, in order; itself alone where it is no part of several."""
    if not (found := _SPLIT.fullmatch(path.name)):
        return [path]
    return [path.with_name(f"{found[1]}-{number:05}-of-{found[3]}.gguf") for number in range(1, int(found[3]) + 1)]


def checkpoints(names: Iterable[str]) -> list[str]:
    """Of the names of files, the first of each GGUF checkpoint."""
    found = sorted(name for name in names if name.endswith(".gguf"))
    return list(dict.fromkeys(parts(Path(name))[0].name for name in found))


def require_parts(headers: list[GgufHeader]) -> None:
    """Whether files are all the parts of one checkpoint, in order.

    Raises:
        CheckpointError: a part is another's, or tensors are missing.
    """
    first = headers[0]
    count = first.metadata.get("split.count", 0)
    if count > 1 and count != len(headers):
        raise first.error(
            f"is part {first.metadata.get('split.no', 0) + 1} of {count} by its header, but its name ends in no "
            "-00001-of-0000N.gguf that leads to the others; give all parts their names back"
        )
    for number, header in enumerate(headers if len(headers) > 1 else []):
        said = header.metadata.get("split.no"), header.metadata.get("split.count")
        if said != (number, len(headers)):
            raise header.error(
                f"should be part {number + 1} of {len(headers)}, as its name says; its header says split.no={said[0]} "
                f"(from 0), split.count={said[1]}"
            )
    wanted, found = first.metadata.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
    if len(headers) > 1 and wanted != found:
        raise first.error(f"says that its {len(headers)} parts hold {wanted} tensors; they hold {found}")


def _fail(path: str) -> Callable[[str], CheckpointError]:
    return lambda why: CheckpointError(why, file=path)


class _Cursor:
    """Takes values one after another, reading ahead in chunks that double."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._path = fd, path
        self.size = os.fstat(fd).st_size
        self._data, self.at = bytearray(), 0

    def error(self, why: str, **where: Any) -> CheckpointError:
        return CheckpointError(f"{self._path}: {why}", file=self._path, **where)

    def take(self, count: int) -> memoryview:
        end = self.at + count
        if end > min(self.size, _LARGEST_HEADER):
            raise self.error(
                f"is truncated or damaged: its header reaches beyond byte {min(self.size, _LARGEST_HEADER)}, the file "
                f"has {self.size}",
                offset=self.at,
                nbytes=count,
            )
        while end > len(self._data):
            more = os.pread(self._fd, max(_CHUNK, len(self._data), end - len(self._data)), len(self._data))
            if not more:
                raise self.error(f"ended at byte {len(self._data)} while it was read", offset=self.at, nbytes=count)
            self._data += more
        self.at = end
        return memoryview(self._data)[end - count : end]

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def string(self, what: str) -> str:
        start = self.at
        try:
            return bytes(self.take(self.number("Q"))).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"is damaged: {what} at byte {start} is no UTF-8 ({error})", offset=start) from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self.error(f"is damaged: {key!r} has a value of type {kind}", offset=self.at)
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self._strings(self._bounded(count, 8), key)
        if kind not in _NUMBERS:
            raise self.error(f"is damaged: {key!r} is an array of type {kind}", offset=self.at)
        code = f"<{self._bounded(count, 1)}{_NUMBERS[kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def _strings(self, count: int, key: str) -> list[str]:
        """As `string`, for hundreds of thousands."""
        found: list[str] = []
        at = self.at
        for _ in range(count):
            end = at + 8 + int.from_bytes(self._data[at : at + 8], "little")
            if at + 8 > len(self._data) or end > len(self._data):  # to be read first
                self.at = at
                found.append(self.string(f"an element of {key!r}"))
                at = self.at
                continue
            try:
                found.append(self._data[at + 8 : end].decode("utf-8"))
            except UnicodeDecodeError:
                self.at = at
                self.string(f"an element of {key!r}")  # raises
            at = end
        self.at = at
        return found

    def _bounded(self, count: int, least: int) -> int:
        """A count of elements of at least `least` bytes each, which the rest of the file has room for."""
        if count * least > self.size - self.at:
            raise self.error(f"is truncated or damaged: an array of {count} elements at byte {self.at}", offset=self.at)
        return count

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor's name")
        count = self.number("I")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self.error(f"is damaged: tensor {name} has {count} dimensions", tensor=name)
        shape = tuple(self.number("Q") for _ in range(count))[::-1]
        return name, shape, self.number("I"), self.number("Q")


def _placed(
    head: _Cursor, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: Any
) -> dict[str, GgufTensor]:
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise head.error(f"is damaged: general.alignment is {alignment!r}")
    start = -(-head.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, code, offset in entries:
        kind, nbytes = _stored(head, name, shape, code)
        tensor = GgufTensor(name, kind, shape, start + offset, nbytes)
        why = ""
        if name in found:
            why = "is there twice"
        elif offset % alignment:
            why = f"does not start at a multiple of {alignment} bytes: the file is damaged"
        elif start + offset + nbytes > head.size:
            why = f"reaches beyond the end of the file, which has {head.size} bytes: the file is truncated or damaged"
        if why:
            raise _about(head, tensor, why)
        found[name] = tensor
    end, before = start, ""
    for tensor in sorted(found.values(), key=lambda each: each.offset):
        if tensor.offset < end:
            raise _about(head, tensor, f"overlaps {before}: the file is damaged")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    return found


def _about(head: _Cursor, tensor: GgufTensor, why: str) -> CheckpointError:
    what = f"{tensor.kind}{list(tensor.shape)}, {tensor.nbytes} bytes at byte {tensor.offset}"
    return head.error(
        f"tensor {tensor.name} ({what}) {why}",
        tensor=tensor.name,
        offset=tensor.offset,
        nbytes=tensor.nbytes,
    )


def _stored(head: _Cursor, name: str, shape: tuple[int, ...], code: int) -> tuple[str, int]:
    """ggml's name of a tensor's type, and its bytes."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(code)
        values, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise head.error(
            f"tensor {name} is of ggml type {code}, which the gguf library does not know", tensor=name
        ) from error
    if any(not 0 < each < _LARGEST_SIZE for each in shape):
        raise head.error(f"is damaged: tensor {name} has the shape {list(shape)}", tensor=name)
    if shape[-1] % values:
        raise head.error(
            f"is damaged: rows of {shape[-1]} values of tensor {name} are no whole number of {kind.name} blocks of "
            f"{values}",
            tensor=name,
        )
    return kind.name, math.prod(shape) // values * size
