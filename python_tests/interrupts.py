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
    inside = tuple(str(ROOT / room) for room in rooms)
    event = "opcode" if opcodes else "line"
    left, where = at, ""

    def local(frame: FrameType, what: str, arg: Any) -> Any:
        nonlocal left, where
        if what == event:
            left -= 1
            if left < 0 and (opcodes or not _leaves_with(frame)):
                where = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
                sys.settrace(None)
                raise error
        return local

    def every(frame: FrameType, what: str, arg: Any) -> Any:
        if where or not frame.f_code.co_filename.startswith(inside):
            return None
        frame.f_trace_opcodes = opcodes
        return local

    before = sys.gettrace()
    sys.settrace(every)
    try:
        run()
    except error:
        assert where, "an interrupt that was not raised here"
    finally:
        sys.settrace(before)
    return where


def _leaves_with(frame: FrameType) -> bool:
    """Whether a `with` block has just ended: Python takes no signal between its last line and `__exit__`."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
    return line.startswith("with ") and dis.opname[frame.f_code.co_code[frame.f_lasti]] == "LOAD_CONST"
