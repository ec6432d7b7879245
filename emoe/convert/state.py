"""What a conversion has done so far, in a folder beside the target that outlives a killed process.

It holds finished shards and a small file that says which they are, with their checksums, and what they were made of.
Whoever goes on checks both. At the end the folder takes the target's place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError, ConfigError, WriteError
from emoe.files import jsontext, sweep, whole

RECORD = "emoe-convert.json"
_FORMAT = 1
_READ = 4 << 20  # bytes

logger = logging.getLogger(__name__)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ):
            found.update(data)
    return found.hexdigest()


class Unfinished:
    """The folder of a conversion under way; make it with `claim`.

    Attributes:
        path: of the folder.
        shards: those that are finished, by name: bytes, sha256, and what `record` was told.
    """

    def __init__(self, out: Path, path: Path, key: Mapping[str, Any], shards: dict[str, dict[str, Any]]) -> None:
        self._out, self.path, self._key, self.shards = out, path, dict(key), shards

    def record(self, name: str, facts: Mapping[str, Any]) -> None:
        """Notes a shard that lies whole in the folder, on the disk and not in a cache alone."""
        path = self.path / name
        self.shards[name] = {"bytes": path.stat().st_size, "sha256": checksum(path), **facts}
        self._write()

    def _write(self) -> None:
        _save(self.path / RECORD, {"format": _FORMAT, "finished": False, "key": self._key, "shards": self.shards})

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Puts the folder in the target's place, with the checksum of every file in it."""
        files = {
            path.name: self.shards[path.name]
            if path.name in self.shards
            else {"bytes": path.stat().st_size, "sha256": checksum(path)}
            for path in sorted(self.path.iterdir())
            if path.name != RECORD
        }
        files = {name: {"bytes": each["bytes"], "sha256": each["sha256"]} for name, each in files.items()}
        _save(self.path / RECORD, {"format": _FORMAT, "finished": True, "key": self._key, "files": files, **facts})
        _sync(self.path)
        self.path.rename(self._out)  # over an empty folder, too
        _sync(self._out.parent)


@contextlib.contextmanager
def claim(out: Path, key: Mapping[str, Any], names: Mapping[str, int]) -> Iterator[Unfinished]:
    """The unfinished conversion into `out`: what an earlier run left, where it was the same one, else a new one.

    Where the block fails, what is finished stays for the next run; where nothing is, nothing stays.

    Args:
        key: what the result depends on.
        names: shards that there will be, and their bytes.

    Raises:
        ConfigError: something is in the way that no conversion wrote; it is not touched.
        WriteError: the folder cannot be written, or another process converts into it.
    """
    require_free(out)
    path = unfinished(out)
    try:
        path.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WriteError(f"another process converts into {out} already") from error
        except OSError:  # a file system without locks
            pass
        own = Unfinished(out, path, key, _left(out, path, key, names))
        try:
            own._write()
            yield own
        except BaseException:
            if not own.shards:
                shutil.rmtree(path, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def require_free(out: Path) -> None:
    """ConfigError where something lies at the target's path, an empty folder excepted."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        what = "holds a finished conversion" if (out / RECORD).is_file() else "is there already"
        raise ConfigError(f"{str(out)!r} {what}, and nothing is written over: give another folder, or remove it")


def unfinished(out: Path) -> Path:
    """Where a conversion into `out` lies until it is finished."""
    return out.parent / f".{out.name}.emoe-unfinished"


def _left(out: Path, path: Path, key: Mapping[str, Any], names: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Finished shards of an earlier run; everything else in the folder is removed."""
    sweep(path)
    found = sorted(path.iterdir())
    if not found:
        return {}
    if not (path / RECORD).is_file():
        raise ConfigError(f"{path} is in the way and was not written by emoe convert: remove it")
    shards: dict[str, dict[str, Any]] = {}
    try:
        record = _load(path / RECORD)
        different = [name for name in key if record["key"].get(name) != key[name]]
        shards = {} if different else dict(record["shards"])
        why = f"of another {' and '.join(different)}"
    except (CheckpointError, KeyError, AttributeError, TypeError, ValueError):
        different, why = ["record"], "whose record is damaged"
    if different:
        logger.warning("%s: an unfinished conversion %s is there; it starts anew", out, why)
    shards = {name: facts for name, facts in shards.items() if name in names and _is_whole(path / name, facts)}
    for each in found:
        if each.name != RECORD and each.name not in shards:
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
    if shards:
        logger.warning("%s: goes on after %d of %d files that an earlier run finished", out, len(shards), len(names))
    return shards


def _is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    try:
        return path.stat().st_size == facts["bytes"] and checksum(path) == facts["sha256"]
    except (OSError, KeyError, TypeError):
        return False


def verify(out: Path) -> dict[str, Any]:
    """Checks every file of a finished conversion against its checksum.

    Returns:
        Its record: key, files, report.

    Raises:
        CheckpointError: there is no record, or a file is missing or differs; names it.
    """
    record = _load(out / RECORD)
    if record.get("finished") is not True or not isinstance(record.get("files"), dict):
        raise CheckpointError(f"{out / RECORD} is no record of a finished conversion", file=str(out / RECORD))
    from tqdm import tqdm

    files = record["files"]
    for name, facts in files.items():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or "sha256" not in facts:
            raise CheckpointError(
                f"{out / RECORD} is damaged: its entry of {name} is {facts!r:.100}", file=str(out / RECORD)
            )
    total = sum(facts["bytes"] for facts in files.values())
    with tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=None) as bar:
        for name, facts in files.items():
            path = out / Path(name).name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing", file=str(path))
            if path.stat().st_size != facts["bytes"]:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes, not the {facts['bytes']} that were written",
                    file=str(path),
                )
            if checksum(path) != facts["sha256"]:
                raise CheckpointError(f"{path} is not what was written: its SHA-256 is another", file=str(path))
            bar.update(facts["bytes"])
    return dict(record)


def _load(path: Path) -> dict[str, Any]:
    fail = partial(CheckpointError, file=str(path))
    record = jsontext.read(path, "record of emoe convert", fail) if path.is_file() else None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no record that this emoe convert wrote", file=str(path))
    return record


def _save(path: Path, record: Mapping[str, Any]) -> None:
    with whole(path) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
