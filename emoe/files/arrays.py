"""Arrays as safetensors with settings as JSON in the metadata: predictors, task classifiers, the demo's delta.

A digest tells whether a file still is what was written. Header and file have to agree before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import CheckpointError
from emoe.files import jsontext
from emoe.files.content import Fail, opened
from emoe.files.owned import whole

VERSION = 2  # 2: with a digest

_LARGEST = 4 << 30  # bytes; the largest predictor of a public model takes some hundred MB
_LARGEST_HEADER = 8 << 20
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


def write(
    path: str | Path, format: str, kind: str, tensors: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]
) -> Path:
    """Writes arrays and settings.

    Args:
        format: name of what the file is, which `read` asks for.
        kind: which of its kinds.

    Raises:
        WriteError: the folder cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path).expanduser()
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = {"format": format, "version": str(VERSION), "kind": kind, "settings": json.dumps(dict(settings))}
    metadata["digest"] = _digest(metadata, arrays)
    data = save(arrays, metadata=metadata)
    with whole(path) as file:
        file.write(data)
    return path


def read(
    path: str | Path, format: str, what: str, *, arrays: bool = True
) -> tuple[str, dict[str, NDArray[Any]], dict[str, Any]]:
    """Kind, arrays and settings of a file of this format.

    Args:
        what: the format in words, for errors: "predictor".
        arrays: False leaves the arrays unread.

    Raises:
        CheckpointError: the file is something else, of another version, damaged, or cannot be read.
        MissingFileError: there is no such file.
    """
    fail = partial(CheckpointError, file=str(path))
    metadata, tensors = load(path, what, fail, arrays=arrays)
    if metadata.get("format") != format:
        raise fail(f"{path}: not the file of a {what}")
    lacking = [name for name in ("version", "kind", "settings", "digest") if name not in metadata]
    if lacking and metadata.get("version") == str(VERSION):
        raise fail(f"{path}: not the file of a {what}: no {lacking[0]!r}")
    if metadata.get("version") != str(VERSION):
        raise fail(f"{path}: format version {metadata.get('version', '')[:20]}; this emoe reads version {VERSION}")
    if arrays and metadata["digest"] != _digest(metadata, tensors):
        raise fail(f"{path}: damaged: its digest is not that of its content")
    settings = jsontext.parse(metadata["settings"], lambda why: fail(f"{path}: not the file of a {what}: {why}"))
    if not isinstance(settings, dict):
        raise fail(f"{path}: settings are {type(settings).__name__}, expected a JSON object")
    return metadata["kind"], tensors, settings


def load(
    path: str | Path, what: str, fail: Fail, *, arrays: bool = True
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and arrays of a safetensors file of the types that NumPy has.

    Raises: as `emoe.files.opened`; also where the header is damaged, or does not describe the file's bytes.
    """
    with opened(path, what, fail) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            header, data_bytes = _header(file, size)
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata are no texts")
            places = _places(header, data_bytes)
            if not arrays:
                return metadata, {}
            data = bytearray(data_bytes)
            if file.readinto(data) != data_bytes:  # type: ignore[attr-defined]
                raise ValueError("it changed while it was read")
        except ValueError as error:
            raise fail(f"{path}: not the file of a {what}: {error}") from error
    return metadata, {
        name: np.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=begin).reshape(shape)
        if math.prod(shape)
        else np.empty(shape, dtype=dtype)
        for name, (dtype, shape, begin) in places.items()
    }


def _header(file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    """The header, and the number of bytes behind it."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header would take {length} bytes, the file has {size}")
    if length > _LARGEST_HEADER or size > _LARGEST:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = jsontext.parse(file.read(length), ValueError)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, size - 8 - length


def _places(header: Mapping[str, Any], data_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Type, shape and first byte of each array; together they take all bytes there are, each once."""
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    ranges = []
    for name, entry in header.items():
        wanted = {"dtype", "shape", "data_offsets"}
        if not isinstance(entry, dict) or set(entry) != wanted or entry["dtype"] not in tuple(_DTYPES):
            raise ValueError(f"{jsontext.shown(name)} is {jsontext.shown(entry)}")
        dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [shape, offsets]
        if not all(
            isinstance(each, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in each) for each in numbers
        ):
            raise ValueError(f"{jsontext.shown(name)} is {jsontext.shown(entry)}")
        if (
            len(shape) > 16
            or len(offsets) != 2
            or math.prod(shape) * np.dtype(dtype).itemsize != offsets[1] - offsets[0]
        ):
            raise ValueError(f"{jsontext.shown(name)} is {jsontext.shown(entry)}")
        found[name] = dtype, tuple(shape), offsets[0]
        ranges.append(tuple(offsets))
    end = 0
    for begin, after in sorted(ranges):
        if begin != end:
            raise ValueError(f"its arrays overlap or leave a gap at byte {end}")
        end = after
    if end != data_bytes:
        raise ValueError(f"its arrays take {end} bytes, {data_bytes} are there")
    return found


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of kind, settings and arrays."""
    found = hashlib.sha256(json.dumps([metadata["kind"], metadata["settings"]]).encode())
    for name, array in sorted(arrays.items()):
        found.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        found.update(array.tobytes())
    return found.hexdigest()


def texts(settings: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts in a file's settings.

    Raises:
        ValueError: it is something else.
    """
    value = settings.get(name)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name!r} is {jsontext.shown(value)}, expected a list of texts")
    return tuple(value)
