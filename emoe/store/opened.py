"""A file that a store reads from: open from when its header was read until the store closes, and known by its identity.

Whatever happens to its path, its bytes stay readable; whoever writes to it is found out at the next read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
import weakref
from pathlib import Path
from typing import NamedTuple

from emoe.errors import CheckpointError, ReadError

_PLACES, _SAMPLE = 32, 256  # how many, and bytes of each; csrc/core/source_file.cpp has the same


class Identity(NamedTuple):
    """What tells a file from any other, and from itself once written to. Links and permissions alter no byte."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class OpenFile:
    """A regular file, open for reading.

    Args:
        path: for messages, and where a repaired file is looked for.
        fd: a descriptor of the file, which this object closes from now on; None opens the path, and never blocks.

    Attributes:
        path, fd, identity: as `_C.RecordTable.add_file` takes them.

    Raises:
        ReadError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        self.fd, self.identity = _open(path) if fd is None else (fd, _identity(path, fd))
        self._sample: bytes | None = None
        self._finalizer = weakref.finalize(self, os.close, self.fd)

    def read(self, into: memoryview, offset: int) -> int:
        """Fills `into` with the bytes at `offset`; returns how many there were before the end of the file.

        Raises:
            OSError: what the system says.
        """
        done = 0
        while done < len(into):
            count = os.preadv(self.fd, [into[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def sample(self) -> bytes:
        """A digest of bytes of many places, which tells files apart that have the same identity."""
        return _sample(self.fd, self.identity.size)

    def keep_sample(self) -> None:
        """Remembers its sample, by which `renew` knows another file to be the same."""
        self._sample = self.sample()

    def change(self) -> str:
        """ "" while the file is what it was, else "changed since the model was loaded (...)". Ask after reading."""
        info = os.fstat(self.fd)
        if (info.st_size, info.st_mtime_ns) == (self.identity.size, self.identity.mtime_ns):
            return ""
        return _changed(self.identity, _of(info))

    def renew(self) -> None:
        """Goes over to the path's file of now, where it has the size, the time and the sample of this one.

        So it is where a damaged file was replaced by a copy with its time (`cp -p`, `rsync -t`). Any other may hold
        anything.
        """
        try:
            fd, now = _open(self.path)
        except ReadError:
            return
        if now[2:] == self.identity[2:] and _sample(fd, now.size) == self._sample:
            os.dup2(fd, self.fd, inheritable=False)
            self.identity = now
        os.close(fd)

    def require_in_place(self) -> None:
        """For what was read through the path meanwhile.

        Raises:
            CheckpointError: the path leads to another file, or the file was written to.
        """
        try:
            now = _of(Path(self.path).stat())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} went away while the model was loaded: {error.strerror or error}", file=self.path
            ) from error
        if now != self.identity or self.change():
            raise CheckpointError(f"{self.path} changed while the model was loaded; load it again", file=self.path)

    def close(self) -> None:
        """Calling it again does nothing."""
        self._finalizer()


def read_error(file: str, tensor: str, offset: int, nbytes: int, why: str) -> ReadError:
    """A ReadError about a range of a file."""
    return ReadError(
        f"{file}: {nbytes} bytes of {tensor} at byte {offset} cannot be read: {why}",
        file=file,
        tensor=tensor,
        offset=offset,
        nbytes=nbytes,
    )


def _open(path: str) -> tuple[int, Identity]:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE or not _more_descriptors():
            raise ReadError(f"{path} cannot be read: {error.strerror or error}", file=path) from error
        return _open(path)
    try:
        return fd, _identity(path, fd)
    except BaseException:
        os.close(fd)
        raise


def _more_descriptors() -> bool:
    """A checkpoint of hundreds of shards: the soft limit is often 1024, the hard one higher."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def _identity(path: str, fd: int) -> Identity:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise ReadError(f"{path} cannot be read: it is no regular file", file=path)
    return _of(info)


def _sample(fd: int, size: int) -> bytes:
    """Of places all over a file; those that cannot be read count as empty."""
    found = []
    for place in range(_PLACES):
        try:
            found.append(os.pread(fd, _SAMPLE, max(0, size - _SAMPLE) * place // (_PLACES - 1)))
        except OSError:
            found.append(b"")
    return hashlib.sha256(b"".join(found)).digest()


def _of(info: os.stat_result) -> Identity:
    return Identity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def _changed(then: Identity, now: Identity) -> str:
    what = "it was written to" if now.size == then.size else f"it had {then.size} bytes, now {now.size}"
    return f"changed since the model was loaded ({what}); load the model again"


def spare_descriptor() -> None:
    """Sees to it that a library can open a few files more, raising the soft limit where it has to."""
    spare: list[int] = []
    try:
        while len(spare) < 8:
            spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EMFILE:
            _more_descriptors()
    finally:
        for fd in spare:
            os.close(fd)
