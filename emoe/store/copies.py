"""Copies of all experts in few bits: made once for a checkpoint, kept in the cache folder, brought into memory.

A file of copies holds, after its first bytes, what their memory holds, so that it is read straight into it. It is of
one checkpoint as it was and one encoding, and each layer has a checksum: one that is damaged, or of another, is made
anew. Nothing of it is a user's to write.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from emoe import files
from emoe.errors import CheckpointError, ConfigError, EmoeError, MissingFileError, WriteError
from emoe.files import cache_folder
from emoe.memory import LargeBlocks, format_bytes
from emoe.model.copies import CopyLayout, encode_copy, put
from emoe.store import ExpertStore, read_expert

logger = logging.getLogger(__name__)

_MAGIC = b"emoecopy1"  # a number more wherever an encoder gives other bytes, or they lie elsewhere
_DIGEST = 32
# Experts that are encoded at once: each takes 40 MiB and what it is in float32, of memory that slots will have.
_MOST_THREADS = 4


def bring(store: ExpertStore, layers: Sequence[CopyLayout], memory: torch.Tensor, name: str) -> str:
    """Fills memory with the copies of all experts, layer by layer in ascending order.

    Args:
        store: where the experts are.
        layers: how the copies of each layer lie.
        memory: uint8, of exactly as many bytes as they take.
        name: of their encoding, for the file.

    Returns:
        Where they came from, for logs: "read from FILE" or "made".

    Raises:
        ReadError: an expert cannot be read.
        CheckpointError: an expert holds a number that is not finite.
    """
    parts = memory.split([len(layer.pieces) * copy.nbytes for layer, copy in zip(store.layers, layers, strict=True)])
    if store.owned:  # nobody will ask for these again
        _make(store, layers, parts)
        return "made"
    key = _key(store, layers, name)
    try:
        path = cache_folder() / _file_name(store, name)
        if _read(path, key, parts):
            return f"read from {path}"
        _write(path, key, store, layers, parts)
        return f"made, and kept in {path}"
    except (ConfigError, WriteError) as error:
        logger.warning("emoe: copies of experts are not kept, the next start makes them anew: %s", error)
    _make(store, layers, parts)
    return "made"


def keep(store: ExpertStore, layers: Sequence[CopyLayout], name: str) -> tuple[Path, bool]:
    """Makes the file that `bring` reads, where there is none of this checkpoint as it is, in memory of one layer.

    Args:
        store, layers, name: as `bring` takes them.

    Returns:
        The file, and whether it was made.

    Raises:
        ReadError, CheckpointError: as `bring`; ConfigError, WriteError: there is no place for it.
    """
    sizes = [len(layer.pieces) * copy.nbytes for layer, copy in zip(store.layers, layers, strict=True)]
    memory = torch.empty(max(sizes), dtype=torch.uint8)
    parts = [memory[:size] for size in sizes]  # one after the other
    key, path = _key(store, layers, name), cache_folder() / _file_name(store, name)
    if _read(path, key, parts):
        return path, False
    _write(path, key, store, layers, parts)
    return path, True


def _write(
    path: Path, key: bytes, store: ExpertStore, layers: Sequence[CopyLayout], parts: Sequence[torch.Tensor]
) -> None:
    start = _start(parts)
    with files.whole(path, reserve=start + sum(map(len, parts))) as file:
        file.seek(start)
        digests = b"".join(_make(store, layers, parts, file))
        file.seek(0)
        file.write(_MAGIC + key + digests)


def _start(parts: Sequence[torch.Tensor]) -> int:
    """Byte of the file at which the copies start."""
    return -(-(len(_MAGIC) + _DIGEST * (1 + len(parts))) // 4096) * 4096


def _file_name(store: ExpertStore, name: str) -> str:
    """One for each checkpoint and encoding, whatever the checkpoint's files hold now."""
    paths = sorted(map(os.path.realpath, store.files()))
    return f"copies-{name}-{hashlib.sha256(repr(paths).encode()).hexdigest()[:20]}.bin"


def _key(store: ExpertStore, layers: Sequence[CopyLayout], name: str) -> bytes:
    """Tells what the copies are made of, and how they lie, from anything else."""
    found = hashlib.sha256(name.encode())
    paths = {file: os.path.realpath(file) for file in sorted(store.files())}  # a link leads to the same copies
    for file, path in paths.items():
        opened = store.opened(file)
        _, *identity = opened.identity
        found.update(repr((path, identity)).encode() + opened.sample())
    for layer, where in zip(store.layers, layers, strict=True):
        lies = repr((layer, where.form, where.offsets, where.nbytes))
        for file in {piece.file for pieces in layer.pieces for piece in pieces}:
            lies = lies.replace(repr(file), repr(paths[file]))
        found.update(lies.encode())
    return found.digest()


def _read(path: Path, key: bytes, parts: Sequence[torch.Tensor]) -> bool:
    """Whether the file holds these copies, which are then in memory."""
    try:
        with files.opened(path, "file of copies", CheckpointError) as file:
            head = file.read(_start(parts))
            if not head.startswith(_MAGIC) or head[len(_MAGIC) :][:_DIGEST] != key:
                logger.info("emoe: %s holds copies of a checkpoint as it was; they are made anew", path)
                return False
            for number, part in enumerate(parts):
                data = part.numpy().data
                at = len(_MAGIC) + _DIGEST * (1 + number)
                if file.readinto(data) != len(data) or hashlib.sha256(data).digest() != head[at : at + _DIGEST]:  # type: ignore[attr-defined]
                    raise CheckpointError(f"{path}: the copies of layer {number} are not what was written")
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except MissingFileError:
        return False
    except EmoeError as error:
        logger.warning("emoe: copies of experts are made anew: %s", error)
        return False
    return True


def _make(
    store: ExpertStore, layers: Sequence[CopyLayout], parts: Sequence[torch.Tensor], file: IO[bytes] | None = None
) -> list[bytes]:
    """Encodes every expert; the checksum of each layer."""
    from tqdm import tqdm

    experts = sum(len(layer.pieces) for layer in store.layers)
    digests = []
    with (
        tqdm(total=experts, desc="Making copies of experts", unit="expert", disable=None) as progress,
        _workers() as each,
    ):
        for number, (layer, where, part) in enumerate(zip(store.layers, layers, parts, strict=True)):

            def one(expert: int, number: int = number, where: CopyLayout = where, part: torch.Tensor = part) -> None:
                try:
                    arrays = encode_copy(where, read_expert(store, number, expert))
                except ConfigError as error:
                    raise CheckpointError(
                        f"expert {expert} of {store.layers[number].path} has no copy: {error}",
                        tensor=store.layers[number].path,
                    ) from error
                put(where, arrays, part[expert * where.nbytes :][: where.nbytes])

            for _ in each(one, range(len(layer.pieces))):
                progress.update()
            data = part.numpy().data
            digests.append(hashlib.sha256(data).digest())
            if file is not None:
                file.write(data)
    logger.info("emoe: made copies of %d experts, %s", experts, format_bytes(sum(map(len, parts))))
    return digests


@contextmanager
def _workers() -> Iterator[Callable[..., Iterator[None]]]:
    """`map` over threads; an interrupt waits for the experts that are under way, and for no others.

    What they free is given back at once: slots are filled next, of the same budget.
    """
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_THREADS))
    LargeBlocks.hold()
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        LargeBlocks.release()
