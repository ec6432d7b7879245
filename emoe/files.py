"""Files that emoe writes for itself: whole or not at all; arrays as safetensors with settings as JSON in the metadata.

Nothing in such a file is executed, and a digest tells whether it still is what was written. What is in it is for the
callers to say.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import CheckpointError, ConfigError

VERSION = 2  # 2: with a digest


def cache_folder() -> Path:
    """The folder for measurements and built models: EMOE_CACHE, else `emoe` in XDG_CACHE_HOME or ~/.cache.

    It is created where it is missing.

    Raises:
        ConfigError: the folder cannot be created; names it and the variable that moves it.
    """
    own = os.environ.get("EMOE_CACHE")
    folder = (
        Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache folder {folder} cannot be created ({error}); EMOE_CACHE names another") from error
    return folder


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; it takes the place of `path` when the block ends well, else nothing is left of it.

    Raises:
        OSError: the folder cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def write(
    path: str | Path, format: str, kind: str, tensors: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]
) -> Path:
    """Writes arrays and settings.

    Args:
        format: name of what the file is, which `read` asks for.
        kind: which of its kinds.

    Raises:
        OSError: the folder cannot be written.
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
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no {what} {str(path)!r}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise CheckpointError(f"{path}: not the file of a {what}", file=str(path))
            if int(metadata["version"]) != VERSION:
                version = metadata["version"]
                raise CheckpointError(
                    f"{path}: format version {version}; this emoe reads version {VERSION}", file=str(path)
                )
            kind = metadata["kind"]
            tensors = {name: file.get_tensor(name) for name in file.keys()} if arrays else {}  # noqa: SIM118
            if arrays and metadata["digest"] != _digest(metadata, tensors):
                raise CheckpointError(f"{path}: damaged: its digest is not that of its content", file=str(path))
            settings = json.loads(metadata["settings"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the file of a {what}: {error}", file=str(path)) from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: settings are {type(settings).__name__}, expected a JSON object", file=str(path))
    return kind, tensors, settings


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
        raise ValueError(f"{name!r} is {value!r}, expected a list of texts")
    return tuple(value)
