"""A predictor's file: safetensors, with its kind and settings as JSON in the metadata. Nothing in it is executed."""

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

FORMAT = "emoe-predictor"
VERSION = 1


def write(path: str | Path, kind: str, tensors: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Path:
    """Writes the file, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path)
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


def kind(path: str | Path) -> str:
    """The kind that the metadata name.

    Raises:
        CheckpointError: not a predictor's file.
        FileNotFoundError: there is no such file.
    """
    return _open(path, None)[0]


def read(path: str | Path, kind: str, shapes: Mapping[str, int]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Tensors and settings of a file of this kind.

    Args:
        shapes: names of the tensors that must be there, each with its number of dimensions.

    Raises:
        CheckpointError: another kind, a tensor is missing or has other dimensions, or the file cannot be read.
        FileNotFoundError: there is no such file.
    """
    _, settings, tensors = _open(path, kind)
    for name, dimensions in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: no tensor {name!r}", file=str(path), tensor=name)
        if tensors[name].ndim != dimensions:
            shape = list(tensors[name].shape)
            raise CheckpointError(
                f"{path}: {name!r} has shape {shape}, expected {dimensions} dimensions", file=str(path), tensor=name
            )
    return tensors, settings


def _open(path: str | Path, wanted: str | None) -> tuple[str, dict[str, Any], dict[str, NDArray[Any]]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(f"there is no predictor {str(path)!r}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not the file of a predictor", file=str(path))
            if int(metadata["version"]) > VERSION:
                version = metadata["version"]
                raise CheckpointError(f"{path}: format version {version}; this emoe reads up to {VERSION}")
            found = metadata["kind"]
            if wanted is not None and found != wanted:
                raise CheckpointError(f"{path}: predictor of kind {found!r}, expected {wanted!r}", file=str(path))
            settings = json.loads(metadata["settings"])
            tensors = {} if wanted is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not the file of a predictor: {error}", file=str(path)) from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: settings are {type(settings).__name__}, expected a JSON object", file=str(path))
    return found, settings, tensors
