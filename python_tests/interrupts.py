"""Interrupts at chosen moments: KeyboardInterrupt at the n-th line, or bytecode, that runs in some rooms of emoe."""

from __future__ import annotations

import dis
import linecache
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import emoe

ROOT = Path(emoe.__file__).parent


def interrupted(
    run: Callable[[], Any], at: int, rooms: Sequence[str], *, opcodes: bool = False, error: type = KeyboardInterrupt
) -> str:
    """Runs `run` and raises before line number `at`, from 0; "" where so many did not run, else where it was.

    Args:
        run: what is interrupted; `error` does not come out of here.
        at: which line.
        rooms: paths below emoe/ whose lines count.
        opcodes: bytecodes count in the place of lines.
        error: what is raised.
    """

    def handler() -> None:
        raise error

    where = []
    try:
        where.append(handled(run, at, rooms, handler, opcodes=opcodes, where=where))
    except error:
        assert where, "an interrupt that was not raised here"
    return where[0]


def handled(
    run: Callable[[], Any],
    at: int,
    rooms: Sequence[str],
    handler: Callable[[], Any],
    *,
    opcodes: bool = False,
    where: list[str] | None = None,
) -> str:
    """As `interrupted`, with a handler that is called before that line, as Python calls one of a signal.

    Args:
        where: gets where it was before the handler is called.
    """
    inside = tuple(str(ROOT / room) for room in rooms)
    event = "opcode" if opcodes else "line"
    left, found = at, [] if where is None else where

    def local(frame: FrameType, what: str, arg: Any) -> Any:
        nonlocal left
        if what == event:
            left -= 1
            if left < 0 and not found and (opcodes or not _leaves_with(frame)):
                found.append(f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}")
                sys.settrace(None)
                handler()
        return local

    def every(frame: FrameType, what: str, arg: Any) -> Any:
        if found or not frame.f_code.co_filename.startswith(inside):
            return None
        frame.f_trace_opcodes = opcodes
        return local

    before = sys.gettrace()
    sys.settrace(every)
    try:
        run()
    finally:
        sys.settrace(before)
    return found[0] if found else ""


def _leaves_with(frame: FrameType) -> bool:
    """Whether a `with` block has just ended: Python takes no signal between its last line and `__exit__`."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
    # SWAP where the block returns a value, which waits on the stack.
    return line.startswith("with ") and dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("LOAD_CONST", "SWAP")
