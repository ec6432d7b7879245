"""Arrays of a NumPy .npz archive, read by name. Sizes are checked before anything is unpacked; nothing is executed.

NumPy's own reader takes what a member says of itself: 2 MB can unpack to many GiB.
"""

from __future__ import annotations

import ast
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from emoe.files.content import Fail, opened

# Bytes of all arrays asked for: what any file may unpack to, and how often its own size. Traces shrink to a third.
FLOOR = 32 << 20
RATIO = 64

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 4096
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|U[1-9]\d{0,8})")
_MOST_MEMBERS = 1000
_BLOCK = 1 << 20
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError, KeyError, IndexError,
    ValueError, OverflowError,
)  # fmt: skip


def read(path: str | Path, what: str, fail: Fail, names: Sequence[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Those arrays of these names that are there, and the names of all.

    Raises: as `emoe.files.opened`; also where the archive or an array's header is damaged, an array is neither numbers
        nor text, or the arrays would take more than 32 MiB and 64 times the file's size.
    """

    def damaged(why: object) -> Exception:
        return fail(f"{path}: not a readable .npz file: {why}")

    with opened(path, what, fail) as file:
        left = FLOOR + RATIO * os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                if len(members) > _MOST_MEMBERS or len(members) != len(archive.infolist()):
                    raise ValueError(f"{len(archive.infolist())} members, of {len(members)} names")
                arrays = {}
                for name in names:
                    if name in members:
                        arrays[name] = _member(archive, members[name], name, left)
                        left -= arrays[name].nbytes
        except _DAMAGED as error:
            raise damaged(error) from error
        return arrays, sorted(members)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, left: int) -> NDArray[Any]:
    """One array; ValueError where its header, its size and the bytes that are left do not agree."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise ValueError(f"array {name!r} is encrypted, or compressed in another way than deflate")
    with archive.open(info) as member:
        header, start = _header(member, name)
        dtype, shape, fortran = _described(header, name)
        nbytes = math.prod(shape) * dtype.itemsize
        if start + nbytes != info.file_size:
            raise ValueError(f"array {name!r} {list(shape)} of {dtype} does not fit the {info.file_size} bytes it has")
        if nbytes > left:
            raise ValueError(
                f"array {name!r} {list(shape)} of {dtype} would take {nbytes} bytes; a file of this size may unpack to "
                f"{left} more"
            )
        flat = np.empty(math.prod(shape), dtype=dtype)
        _fill(member, flat.view(np.uint8).data if nbytes else memoryview(b""), name)
    return flat.reshape(shape, order="F" if fortran else "C")


def _fill(member: IO[bytes], into: memoryview, name: str) -> None:
    done = 0
    while done < len(into):
        block = member.read(min(_BLOCK, len(into) - done))
        if not block:
            raise ValueError(f"array {name!r} ends after {done} of {len(into)} bytes")
        into[done : done + len(block)] = block
        done += len(block)
    if member.read(1):  # which also compares the checksum
        raise ValueError(f"array {name!r} has more bytes than its header says")


def _header(member: IO[bytes], name: str) -> tuple[str, int]:
    """The text of an array's header, and where its bytes begin."""
    magic = member.read(8)
    wide = magic[6:7] in (b"\x02", b"\x03")
    if magic[:6] != _MAGIC or not (wide or magic[6:7] == b"\x01"):
        raise ValueError(f"array {name!r} is no .npy array")
    length = int.from_bytes(member.read(4 if wide else 2), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"array {name!r} has a header of {length} bytes")
    raw = member.read(length)
    if len(raw) != length:
        raise ValueError(f"array {name!r} ends within its header")
    return raw.decode("latin-1"), (12 if wide else 10) + length


def _described(header: str, name: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    try:
        said = ast.literal_eval(header.strip())
        descr, shape, fortran = said["descr"], said["shape"], said["fortran_order"]
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError, KeyError) as error:
        raise ValueError(f"array {name!r} has a damaged header") from error
    if not isinstance(descr, str) or not _DTYPE.fullmatch(descr):
        raise ValueError(f"array {name!r} is of type {repr(descr)[:80]}, expected numbers or text")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(each) is int and each >= 0 for each in shape):
        raise ValueError(f"array {name!r} has shape {repr(shape)[:80]}")
    if any(each > 1 << 48 for each in shape):  # a zero beside it would let any number pass
        raise ValueError(f"array {name!r} has shape {repr(shape)[:80]}")
    return np.dtype(descr), shape, fortran is True
