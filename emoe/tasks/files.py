"""A classifier's file: safetensors, with its kind and settings as JSON in the metadata. Nothing in it is executed."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import CheckpointError

FORMAT = "emoe-tasks"
VERSION = 1


def write(path: str | Path, kind: str, tensors: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Path:
    """Writes the file, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path).expanduser()
    metadata = {"format": FORMAT, "version": str(VERSION), "kind": kind, "settings": json.dumps(dict(settings))}
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata=metadata)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return path


def read(path: str | Path) -> tuple[str, dict[str, NDArray[Any]], dict[str, Any]]:
    """Kind, tensors and settings.

    Raises:
        CheckpointError: not a classifier's file, or one of a later version.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no task classifier {str(path)!r}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not the file of a task classifier", file=str(path))
            if int(metadata["version"]) > VERSION:
                found = metadata["version"]
                raise CheckpointError(
                    f"{path}: format version {found}; this emoe reads up to {VERSION}", file=str(path)
                )
            settings = json.loads(metadata["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kind = metadata["kind"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not the file of a task classifier: {error}", file=str(path)) from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: settings are not a JSON object", file=str(path))
    return kind, tensors, settings
