"""One engine a model, one thread in a step: what else would run on the model then is refused."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from types import FrameType
from typing import Any

from emoe.errors import ConfigError, EmoeError

_users: weakref.WeakKeyDictionary[Any, weakref.ref[Exclusive]] = weakref.WeakKeyDictionary()


class Exclusive:
    """The use of a model, until `close` or until nobody has this object.

    Attributes:
        lock: held in a turn; others take it to change what a turn looks at.

    Raises:
        ConfigError: another has it.
    """

    def __init__(self, model: Any) -> None:
        other = _users.get(model)
        if other is not None and other() is not None:
            raise ConfigError("another engine runs this model; close() it first")
        _users[model] = weakref.ref(self)
        self.lock, self._stepping = RLock(), 0  # thread of the turn, or of one whose end was interrupted
        self._frame: FrameType | None = None  # that has the turn
        self._model = model
        refuse = weakref.WeakMethod(self._refuse_others)  # a model keeps no engine that its user has dropped
        self._guard = model.register_forward_pre_hook(lambda *_: method() if (method := refuse()) else None)
        weakref.finalize(self, self._guard.remove)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """In the block, forwards of other threads are refused.

        Raises:
            EmoeError: a signal handler or a hook calls it in the middle of a turn.
        """
        with self.lock:
            self.require_between("this runs")
            self._frame = sys._getframe(2)  # of the `with`, above contextlib's
            self._stepping = get_ident()
            try:
                yield
            finally:
                self._stepping = 0
                self._frame = None

    @property
    def in_turn(self) -> bool:
        """Whether this thread is in the middle of a turn."""
        return self._stepping == get_ident() and self._has_turn(sys._getframe())

    def require_between(self, what: str) -> None:
        """Raises EmoeError in the middle of a turn."""
        if self.in_turn:
            raise EmoeError(
                f"{what} in the middle of a step of the same engine (a signal handler, a hook, a processor)"
            )

    def _has_turn(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def _refuse_others(self) -> None:
        if self._stepping not in (0, get_ident()) and self._has_turn(sys._current_frames().get(self._stepping)):
            raise EmoeError(
                "an engine runs a step of this model in another thread; use the model between steps, in that thread"
            )

    def close(self) -> None:
        """Others may use it; calling it again does nothing."""
        self._guard.remove()
        mine = _users.get(self._model)
        if mine is not None and mine() is self:
            del _users[self._model]
