"""The bytes of a file that a user gave: a regular file, and no more of it than the caller expects."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from emoe.errors import EmoeError, MissingFileError

Fail = Callable[[str], Exception]  # what a reader raises, from what is wrong

LONGEST_LINE = 16 << 20  # bytes; a prompt of several million words
_BOM = b"\xef\xbb\xbf"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextlib.contextmanager
def opened(path: str | Path, what: str, fail: Fail) -> Iterator[IO[bytes]]:
    """A regular file to read from; errors of the system in the block are those of the file.

    Args:
        what: the file is, for errors: "trace".
        fail: makes the error.

    Raises:
        MissingFileError: there is no such file.
        EmoeError: that of `fail`, where the path is none, is a folder, a pipe or a device, or cannot be read.
    """
    path = place(path, what, fail)
    try:
        # A device may do something when it is opened, and a pipe waits for its other end: so looked at first, and
        # opened without waiting in case that it was exchanged since.
        _require_regular(path.stat().st_mode, path, what, fail)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            _require_regular(os.fstat(handle).st_mode, path, what, fail)
            yield file
    except EmoeError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no {what} {str(path)!r}") from error
    except MemoryError as error:
        raise fail(f"{path}: the {what} does not fit into memory") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte, or with what is no text
        raise fail(f"{path}: the {what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def place(path: str | Path, what: str, fail: Fail) -> Path:
    """The path with a leading ~ resolved."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise fail(f"{path}: the {what} cannot be found: {error}") from error


def _require_regular(mode: int, path: Path, what: str, fail: Fail) -> None:
    if not stat.S_ISREG(mode):
        raise fail(f"{path}: the {what} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; give a regular file")


def content(path: str | Path, what: str, fail: Fail, *, most: int) -> bytearray:
    """All bytes of a file.

    Args:
        most: bytes it may have.

    Raises: as `opened`.
    """
    with opened(path, what, fail) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise fail(f"{path}: the {what} has {size} bytes, more than the {most} that are read")
        data = bytearray(size)
        if file.readinto(data) != size or file.read(1):  # type: ignore[attr-defined]
            raise fail(f"{path}: the {what} changed while it was read")
        return data


def lines(path: str | Path, what: str, fail: Fail) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty, without its end; lines end at a line feed and nowhere else.

    Raises: as `opened`; also where a line is no UTF-8 or has over 16 MiB.
    """
    with opened(path, what, fail) as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise fail(f"{path}:{number}: a line of over {LONGEST_LINE} bytes")
            if number == 1:
                raw = raw.removeprefix(_BOM)
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise fail(f"{path}:{number}: not a text file: {error}") from error
            if text.strip():
                yield number, text
