"""Writes the experts of a model in memory to a store: one file a layer, one aligned record an expert.

A record lies in the file exactly as in a slot, so that it is read in one piece. Nothing of the model is changed or
freed here.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from emoe.errors import StoreError, UnsupportedModelError
from emoe.files import OwnNames, cache_folder, nameless
from emoe.memory import format_bytes
from emoe.model.spec import ExpertForm, ParamSpec, slot_offsets
from emoe.model.structure import find_experts, num_experts, param_specs
from emoe.store import ExpertStore, Piece, StoreLayer
from emoe.store.opened import OpenFile

RECORD_ALIGNMENT = 4096  # bytes: what O_DIRECT asks of offsets and lengths


def write_store(model: nn.Module, folder: Path | None = None, ram: bool = False) -> ExpertStore:
    """Copies all experts of a model out of it, expert by expert.

    Args:
        model: a Transformers model with its experts in memory; it is not changed.
        folder: where the files go, created where missing; they are removed by the store's `close`, and those of a
            process that was killed by the next store there. None takes files without a name in the cache folder: the
            system frees them when the process ends, however it ends.
        ram: keep the experts in anonymous memory instead, read through the same interface.

    Raises:
        StoreError: no space, no permission, or a file is in the way; names file and bytes. Nothing is left behind.
        UnsupportedModelError: the model has no experts, or they are not in memory.
    """
    found = find_experts(model)
    specs = [param_specs(module) for _, module in found]
    for (path, module), params in zip(found, specs, strict=True):
        _require_weights(path, module, params)
    sizes = [_record_bytes(params) * num_experts(module) for (_, module), params in zip(found, specs, strict=True)]
    if ram:
        free = psutil.virtual_memory().available
        if sum(sizes) > free:
            raise StoreError(f"a store in memory needs {format_bytes(sum(sizes))}; {format_bytes(free)} are free")
    files = _MemoryFiles() if ram else _NamelessFiles() if folder is None else _FolderFiles(Path(folder))
    layers = []
    try:
        from tqdm import tqdm

        with tqdm(total=sum(sizes), desc="Writing experts", unit="B", unit_scale=True, disable=None) as progress:
            for number, ((path, module), params) in enumerate(zip(found, specs, strict=True)):
                layers.append(_write_layer(files, number, sizes[number], path, module, params, progress.update))
    except BaseException:
        files.remove()
        raise
    return ExpertStore(layers, files.description, opened=files.opened(), cleanup=files.remove)


def _require_weights(path: str, module: nn.Module, params: tuple[ParamSpec, ...]) -> None:
    if not params:
        raise UnsupportedModelError(f"{path} ({type(module).__name__}) has no expert weights in memory")
    for param in params:
        device = module.get_parameter(param.name).device
        if device.type == "meta":
            raise UnsupportedModelError(f"{path}.{param.name} is on the meta device: its weights are not in memory")


def _record_bytes(params: tuple[ParamSpec, ...]) -> int:
    return -(-slot_offsets(params)[1] // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def _write_layer(
    files: _Files,
    number: int,
    nbytes: int,
    path: str,
    module: nn.Module,
    params: tuple[ParamSpec, ...],
    progress: Callable[[int], Any],
) -> StoreLayer:
    offsets, _ = slot_offsets(params)
    record_bytes = _record_bytes(params)
    record = torch.zeros(record_bytes, dtype=torch.uint8)
    places = {
        param.name: record[offsets[param.name] :][: param.nbytes].view(getattr(torch, param.dtype)).view(param.shape)
        for param in params
    }
    pieces = []
    with files.writing(f"experts-{number:04}.bin", nbytes, path) as out:
        for expert in range(num_experts(module)):
            for name, place in places.items():
                place.copy_(module.get_parameter(name).detach()[expert])
            out.write(memoryview(record.numpy().data))
            start = expert * record_bytes
            pieces.append(tuple(_piece(out.path, start + offsets[param.name], path, expert, param) for param in params))
            progress(record_bytes)
    return StoreLayer(path, ExpertForm.plain(params), tuple(pieces))


def _piece(file: str, offset: int, path: str, expert: int, param: ParamSpec) -> Piece:
    cols = param.shape[-1]
    rows = math.prod(param.shape[:-1])
    return Piece(
        file=file,
        offset=offset,
        nbytes=param.nbytes,
        tensor=f"{path}.{param.name}[{expert}]",
        src_dtype=param.dtype,
        stored=param.name,
        rows=rows,
        cols=cols,
        dst_offset=0,
        dst_row_stride=cols,
        dst_col_stride=1,
    )


class _Output:
    """One open file of the store; a context that turns errors of the system into StoreError."""

    def __init__(self, handle: int, path: str, what: str) -> None:
        self.handle, self.path, self._what = handle, path, what
        self._written = 0

    def reserve(self, nbytes: int) -> None:
        """Takes the space before anything is written, so that a full disk is known at once."""
        try:
            os.posix_fallocate(self.handle, 0, nbytes)
        except OSError as error:
            raise _failure(self.path, nbytes, self._what, error) from error

    def write(self, data: memoryview) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self.handle, data[done:], self._written + done)
        except OSError as error:
            raise _failure(self.path, len(data), self._what, error) from error
        self._written += len(data)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            try:
                os.fdatasync(self.handle)  # reads past the page cache must find it, and written pages must not pile up
                os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise _failure(self.path, self._written, self._what, error) from error


def _failure(path: str, nbytes: int, what: str, error: OSError) -> StoreError:
    failure = StoreError(
        f"{path}: writing {nbytes} bytes of experts of {what} failed: {error.strerror or error}; the model is unchanged"
    )
    failure.errno = error.errno
    return failure


class _Files:
    """Where a store's files come from; `remove` takes them back, in the process that made them and no child of it."""

    description = ""

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}  # by path, while they are being written
        self._owner = os.getpid()

    def writing(self, name: str, nbytes: int, what: str) -> _Output:
        try:
            handle, path = self._open(name)
        except OSError as error:
            raise _failure(self._place(name), nbytes, what, error) from error
        self._handles[path] = handle
        out = _Output(handle, path, what)
        out.reserve(nbytes)
        return out

    def opened(self) -> list[OpenFile]:
        """The files, written whole, for whoever reads them from now on and closes them."""
        found = []
        while self._handles:
            found.append(OpenFile(*self._handles.popitem()))
        return found

    def _place(self, name: str) -> str:
        return name

    def _open(self, name: str) -> tuple[int, str]:
        raise NotImplementedError

    def remove(self) -> None:
        if os.getpid() == self._owner:
            while self._handles:
                os.close(self._handles.popitem()[1])


class _MemoryFiles(_Files):
    description = "memory"

    def _open(self, name: str) -> tuple[int, str]:
        handle = os.memfd_create(f"emoe-{name}", os.MFD_CLOEXEC)
        return handle, f"/proc/self/fd/{handle}"


class _NamelessFiles(_Files):
    """Files that have no name: nothing stays on the disk even after a crash."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = cache_folder()
        self.description = f"nameless files in {self._folder}"

    def _place(self, name: str) -> str:
        return str(self._folder)

    def _open(self, name: str) -> tuple[int, str]:
        handle = nameless(self._folder)
        return handle, f"/proc/self/fd/{handle}"


class _FolderFiles(_Files):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._made: list[Path] = []
        self._names: OwnNames | None = None
        self.description = f"folder {folder}"

    def _place(self, name: str) -> str:
        return str(self._folder / name)

    def _open(self, name: str) -> tuple[int, str]:
        missing = [each for each in (self._folder, *self._folder.parents) if not each.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._made.extend(reversed(missing))
        if self._names is None:
            self._names = OwnNames(self._folder)
        path = self._folder / name
        if not path.exists():
            self._names.announce(name)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._made.append(path)
        self._names.made(name, handle)
        return handle, str(path)

    def remove(self) -> None:
        super().remove()
        if os.getpid() != self._owner:
            return
        for path in [path for path in self._made if not path.is_dir()]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if self._names is not None:
            self._names.remove()
        while self._made:
            path = self._made.pop()
            with contextlib.suppress(OSError):  # somebody put a file of theirs into the folder: it stays
                path.rmdir()
