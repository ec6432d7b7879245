"""Files that emoe writes: whole or not at all, and nothing is left of a process that was killed.

What is half-written has a name of its own, `.NAME.emoe-XXXXXXXX`, and its writer holds a lock on it, which the system
frees however the process ends. So whoever writes into the folder next can tell what is left over from what is in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from emoe.errors import EmoeError, WriteError

_MARK = ".emoe-"
_GET_VERSION = 0x80087601  # FS_IOC_GETVERSION of linux/fs.h
_OURS = re.compile(r"\..*\.emoe-[a-z0-9_]{8}")


@contextlib.contextmanager
def whole(path: Path, reserve: int = 0) -> Iterator[IO[bytes]]:
    """A file to write to; it takes the place of `path` when the block ends well, else nothing is left of it.

    Args:
        reserve: bytes that are taken on the disk at once, so that a full one is known before the block runs.

    Raises:
        WriteError: the folder is not there or cannot be written, the disk is full, or `path` is a folder or a device.
    """
    try:
        path = Path(path)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):  # to take the place of /dev/null is not what was asked for
                raise WriteError(f"{path} cannot be written: it is there and is no regular file")
        if path.is_symlink():  # what it leads to is written
            path = path.resolve()
        sweep(path.parent)
        handle, temporary = _locked(path.parent, path.name, _make_file)
    except OSError as error:
        raise _unwritten(path, error) from error
    except (TypeError, ValueError) as error:
        raise WriteError(f"{path!r} cannot be written: it is no path ({error})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            if reserve:
                _reserve(handle, reserve)
            yield file
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(path)  # while the lock is held: nobody takes it for a leftover
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _unwritten(path, error) from error
        raise


def _reserve(handle: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot reserve
            raise
    os.ftruncate(handle, 0)


def _unwritten(path: Path, error: OSError) -> EmoeError:
    if isinstance(error, EmoeError):
        return error
    if isinstance(error, FileNotFoundError):
        why = f"there is no folder {str(path.parent)!r}"
    else:
        why = error.strerror or str(error)
    failure = WriteError(f"{path} cannot be written: {why}")
    failure.errno = error.errno
    return failure


class OwnFolder:
    """A folder beside the files it is to become; `remove` takes it away, and so does whoever finds it left over.

    Args:
        parent: where it lies; leftovers there are removed first.
        name: what it is for.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path, name: str) -> None:
        sweep(parent)
        self._handle, self.path = _locked(parent, name, _make_folder)

    def remove(self) -> None:
        """Takes folder and content away; calling it again does nothing."""
        if self._handle >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._handle)
            self._handle = -1


class OwnNames:
    """Remembers, in a file of the folder, which files there were made by this process under names that others may use.

    Where the process is killed, the next one to make files in the folder removes those, and no others.

    Args:
        folder: where the files lie.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        sweep(folder)
        self._handle, self.path = _locked(folder, "names", _make_file)

    def announce(self, name: str) -> None:
        """Called before the file is made, and empty."""
        os.write(self._handle, f"0 {name}\n".encode())

    def made(self, name: str, handle: int) -> None:
        """Called after it is made."""
        os.write(self._handle, f"{_which(handle)} {name}\n".encode())

    def remove(self) -> None:
        """Forgets the names; the files stay. Calling it again does nothing."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._handle)
            self._handle = -1


def nameless(folder: Path) -> int:
    """Descriptor of a file without a name in a folder, to write and read.

    Raises:
        OSError: it cannot be made.
    """
    sweep(folder)
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
    handle, path = _locked(folder, "nameless", _make_file)  # a file system that cannot make one without
    path.unlink()
    return handle


def _make_file(folder: Path, prefix: str) -> tuple[int, Path]:
    handle, path = tempfile.mkstemp(dir=folder, prefix=prefix)
    return handle, Path(path)


def _make_folder(folder: Path, prefix: str) -> tuple[int, Path]:
    path = Path(tempfile.mkdtemp(dir=folder, prefix=prefix))
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path


def _locked(folder: Path, name: str, make: object) -> tuple[int, Path]:
    """A new file or folder with its lock held."""
    while True:
        handle, path = make(folder, f".{name}{_MARK}")  # type: ignore[operator]
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: nobody gets one there, so leftovers stay
            return handle, path
        if _is_at(path, handle):
            return handle, path
        os.close(handle)  # swept away between the two calls


def sweep(folder: Path) -> None:
    """Removes what killed processes left in a folder; what is in use and what others named stays."""
    try:
        found = [entry.name for entry in os.scandir(folder) if _OURS.fullmatch(entry.name)]
    except OSError:
        return
    for name in found:
        with contextlib.suppress(OSError):
            _remove_left(folder / name)


def _remove_left(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if found.st_uid != os.geteuid():
            return
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
        if not _is_at(path, handle):
            return
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISREG(found.st_mode):
            if path.name.startswith(f".names{_MARK}"):
                _remove_named(path, handle)
            path.unlink()
    finally:
        os.close(handle)


def _remove_named(path: Path, handle: int) -> None:
    """The files that `OwnNames` wrote down, where they still are those."""
    for line in os.read(handle, 1 << 20).decode("utf-8", "replace").splitlines():
        which, _, name = line.partition(" ")
        if not name or Path(name).name != name:
            continue
        with contextlib.suppress(OSError):
            there = os.open(path.parent / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(there)
                # Announced and not yet made for certain: what is empty then is no loss.
                ours = _which(there) == which or (which == "0" and not found.st_size)
                if stat.S_ISREG(found.st_mode) and ours and _is_at(path.parent / name, there):
                    (path.parent / name).unlink()
            finally:
                os.close(there)


def _which(handle: int) -> str:
    """Tells a file from every other, also from a later one that the file system gave the same inode."""
    generation = bytearray(8)
    try:
        fcntl.ioctl(handle, _GET_VERSION, generation)
    except OSError:  # a file system that counts no generations, such as tmpfs, whose inodes do not come back
        return str(os.fstat(handle).st_ino)
    return f"{os.fstat(handle).st_ino}:{generation.hex()}"


def _is_at(path: Path, handle: int) -> bool:
    """Whether the path still leads to what the handle is of."""
    try:
        there, here = os.lstat(path), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
