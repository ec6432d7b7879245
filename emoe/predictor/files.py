"""A predictor's file: its arrays and settings, by kind (emoe/files.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe import files
from emoe.errors import CheckpointError

FORMAT = "emoe-predictor"


def write(path: str | Path, kind: str, tensors: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Path:
    """Writes the file, whole or not at all.

    Raises:
        WriteError: the folder cannot be written.
    """
    return files.write(path, FORMAT, kind, tensors, settings)


def kind(path: str | Path) -> str:
    """The kind that the metadata name.

    Raises:
        CheckpointError: not a predictor's file.
        MissingFileError: there is no such file.
    """
    return files.read(path, FORMAT, "predictor", arrays=False)[0]


def read(path: str | Path, kind: str, shapes: Mapping[str, int]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Tensors and settings of a file of this kind.

    Args:
        shapes: names of the tensors that must be there, each with its number of dimensions.

    Raises:
        CheckpointError: another kind, the file cannot be read, or a tensor is missing, has other dimensions, is empty
            or holds what is no number.
        MissingFileError: there is no such file.
    """
    found, tensors, settings = files.read(path, FORMAT, "predictor")
    if found != kind:
        raise CheckpointError(f"{path}: predictor of kind {found!r}, expected {kind!r}", file=str(path))
    for name, dimensions in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: no tensor {name!r}", file=str(path), tensor=name)
        if tensors[name].ndim != dimensions:
            shape = list(tensors[name].shape)
            raise CheckpointError(
                f"{path}: {name!r} has shape {shape}, expected {dimensions} dimensions", file=str(path), tensor=name
            )
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not tensor.size or not np.isfinite(tensor).all():
            what = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"{path}: {name!r} is not finite float32: {what}", file=str(path), tensor=name)
    return tensors, settings


def fail(path: str | Path, error: Exception) -> CheckpointError:
    """What to raise where a file's content does not fit together."""
    return CheckpointError(f"{path}: {error}", file=str(path))
