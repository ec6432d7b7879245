"""The bytes of a file that a user gave: a regular file, and no more of it than the caller expects.

What a user may write by hand (a prompt) may come through a pipe as well, where the caller says so.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from emoe.errors import EmoeError, MissingFileError

Fail = Callable[[str], Exception]  # what a reader raises, from what is wrong

LONGEST_LINE = 16 << 20  # bytes; a prompt of several million words
WRITER_SECONDS = 5.0  # a pipe that nobody writes to is waited for so long: a shell may start its writer with its reader
_BOM = b"\xef\xbb\xbf"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextlib.contextmanager
def opened(path: str | Path, what: str, fail: Fail, *, piped: int = 0) -> Iterator[IO[bytes]]:
    """A regular file to read from; errors of the system in the block are those of the file.

    Args:
        what: the file is, for errors: "trace".
        fail: makes the error.
        piped: bytes that a pipe or standard input in its place may give, all of which are read first; 0: none is taken.

    Raises:
        MissingFileError: there is no such file.
        EmoeError: that of `fail`, where the path is none, is a folder, a pipe or a device, or cannot be read; of a
            pipe that is taken where nobody writes to it, or more comes than `piped`.
    """
    path = place(path, what, fail)
    try:
        # A device may do something when it is opened, and a pipe waits for its other end: so looked at first, and
        # opened without waiting in case that it was exchanged since.
        _require_kind(path.stat(), path, what, fail, piped)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            _require_kind(found, path, what, fail, piped)
            yield file if stat.S_ISREG(found.st_mode) else io.BytesIO(_all_of(handle, path, what, fail, piped))
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


def _require_kind(found: os.stat_result, path: Path, what: str, fail: Fail, piped: int) -> None:
    mode = found.st_mode
    if stat.S_ISREG(mode) or (piped and (stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and _is_standard_input(found)))):
        return
    raise fail(f"{path}: the {what} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; give a regular file")


def _is_standard_input(found: os.stat_result) -> bool:
    """A terminal, as /dev/stdin may be; other devices may do something when they are opened."""
    try:
        return os.path.samestat(found, os.fstat(0))
    except OSError:  # it is closed
        return False


def _all_of(handle: int, path: Path, what: str, fail: Fail, most: int) -> bytes:
    """What a pipe or a terminal that was opened without waiting gives until its end."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    writer = not stat.S_ISFIFO(os.fstat(handle).st_mode)  # one was seen
    waited = False
    data = bytearray()
    while True:
        try:
            read = os.read(handle, 1 << 20)
        except BlockingIOError:  # a writer has it open, and may take any time
            writer = True
            poll.poll()
            continue
        data += read
        if len(data) > most:
            raise fail(f"{path}: the {what} has more than the {most} bytes that are read")
        if read:
            writer = True
        elif writer:
            return bytes(data)
        elif waited:
            raise fail(f"{path}: the {what} is a pipe that nobody writes to")
        else:  # before its first writer a pipe reads as one that has ended
            waited = True
            writer = bool(poll.poll(1e3 * WRITER_SECONDS))  # nor does a writer wake this up who has written nothing


def content(path: str | Path, what: str, fail: Fail, *, most: int, piped: bool = False) -> bytearray:
    """All bytes of a file.

    Args:
        most: bytes it may have.
        piped: it may be a pipe or standard input.

    Raises: as `opened`.
    """
    with opened(path, what, fail, piped=most if piped else 0) as file:
        size = file.seek(0, os.SEEK_END)
        if size > most:
            raise fail(f"{path}: the {what} has {size} bytes, more than the {most} that are read")
        data = bytearray(size)
        file.seek(0)
        if file.readinto(data) != size or file.read(1):  # type: ignore[attr-defined]
            raise fail(f"{path}: the {what} changed while it was read")
        return data


def lines(path: str | Path, what: str, fail: Fail, *, piped: int = 0) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty, without its end; lines end at a line feed and nowhere else.

    Args and raises: as `opened`; raises also where a line is no UTF-8 or has over 16 MiB.
    """
    with opened(path, what, fail, piped=piped) as file:
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
