"""What the experts of a quantized checkpoint are, from the headers of its files, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoe.model.config import without_quantization
from emoe.model.spec import ExpertForm
from emoe.store.checkpoint import encoded_forms
from emoe.store.headers import INDEX_NAME, SINGLE_NAME, checkpoint_files


def forms(folder: Path | None, model: Any, config: Any, places: Mapping[str, Any]) -> list[ExpertForm] | None:
    """Of each layer; None where every parameter is stored as it is, or there are no files to tell.

    Args:
        folder: of the checkpoint, None where it is elsewhere.
        model: on the meta device.
        config: of the checkpoint, with what it says of encodings.
        places: where Transformers looks for files (`subfolder`).

    Raises:
        CheckpointError, UnsupportedModelError: as `emoe.store.checkpoint.read_checkpoint`.
    """
    _, quantization = without_quantization(config)
    folder = None if folder is None else folder / (places.get("subfolder") or "")
    if folder is None or not any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return None
    return encoded_forms(checkpoint_files(folder), model, quantization)
