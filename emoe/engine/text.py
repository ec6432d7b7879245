"""One request's text as its tokens come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 8  # tokens decoded again with the next: spaces depend on neighbours


class Text:
    """`take` gives what is safe to send: it ends neither within a character nor in what may become a stop string.

    Args:
        tokenizer: with `decode`.
        stop: the text ends before the first of these that comes.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._from = 0  # tokens before it are in `_settled`
        self._settled = self._text = self._ready = ""
        self._sent = 0
        self._stopped = False

    def add(self, token: int) -> bool:
        """Whether a stop string has come; the text then ends before it."""
        self._tokens.append(token)
        window = self._tokens[self._from :]
        piece = self._decode(window)
        if piece.endswith("\ufffd"):  # the rest of a character is still to come
            return False
        before, self._text = len(self._text), self._settled + piece
        if len(window) > 2 * _CONTEXT:
            head = self._decode(window[:-_CONTEXT])
            if piece.startswith(head) and not head.endswith("\ufffd"):
                self._settled, self._from = self._settled + head, self._from + len(window) - _CONTEXT
        longest = max(map(len, self._stop), default=1)
        found = [at for stop in self._stop if (at := self._text.find(stop, max(0, before - longest))) >= 0]
        if found:
            self._text = self._ready = self._text[: min(found)]
            self._stopped = True
            return True
        held = max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)
        self._ready = self._text[: len(self._text) - held]
        return False

    def finish(self) -> None:
        """No token comes any more: all of the text is ready."""
        if not self._stopped:
            self._ready = self._settled + self._decode(self._tokens[self._from :])

    def take(self) -> str:
        """What became ready since the last call."""
        ready = self._ready[self._sent :]
        self._sent = max(self._sent, len(self._ready))
        return ready

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
