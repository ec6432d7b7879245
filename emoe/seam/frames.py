"""Which forwards still run in a thread, told by its stack: an interrupt may have cut some off without their end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import FrameType

Known = tuple[int, int]  # id of a frame and of its code


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame, what called it, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def known(frame: FrameType) -> Known:
    """What tells a frame from others that are on a stack."""
    return id(frame), id(frame.f_code)


def of_stack(frame: FrameType | None) -> set[Known]:
    """All that `stack` gives."""
    return {known(each) for each in stack(frame)}


def callers(frame: FrameType) -> frozenset[Known]:
    """Those of a hook that `frame` is: what calls one before a forward calls the one after it, or its caller does."""
    return frozenset(map(known, islice(stack(frame.f_back), 2)))
