"""One request's text as its tokens come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 8  # tokens decoded again with the next: spaces depend on neighbours


class Text:
    """`peek` gives what is safe to send: it ends neither within a character nor in what may become a stop string.

    Args:
        tokenizer: with `decode`.
        stop: the text ends before the first of these that comes.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._settled = "", 0  # text, and of how many tokens: they are not decoded again
        self._ready = ""
        self._sent = 0
        self._stopped = False

    def add(self, token: int, number: int) -> bool:
        """Whether a stop string has come; the text then ends before it.

        Args:
            number: of the token, from 0; one that was added before an interrupt is not added twice.
        """
        if number == len(self._tokens):
            self._tokens.append(token)
        return self._look(last=False)

    def _look(self, *, last: bool) -> bool:
        """`last`: no token comes any more, so that half a character is all that there will be of it."""
        settled, first = self._settled
        window = self._tokens[first:]
        piece = self._decode(window)
        if piece.endswith("\ufffd") and not last:  # the rest of a character is still to come
            return False
        text = settled + piece
        if len(window) > 2 * _CONTEXT:
            head = self._decode(window[:-_CONTEXT])
            if piece.startswith(head) and not head.endswith("\ufffd"):
                self._settled = settled + head, first + len(window) - _CONTEXT
        # What is ready is followed by no part of a stop string.
        found = [at for stop in self._stop if (at := text.find(stop, len(self._ready))) >= 0]
        if found:
            self._stopped, self._ready = True, text[: min(found)]
            return True
        held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._ready = text if last else text[: len(text) - held]
        return False

    def finish(self) -> bool:
        """No token comes any more: all of the text is ready, up to a stop string; whether one has come."""
        return self._stopped or self._look(last=True)

    @property
    def upto(self) -> int:
        """Characters that are ready, for `mark`."""
        return len(self._ready)

    def peek(self) -> str:
        """What became ready since the last `mark`."""
        return self._ready[self._sent :]

    def mark(self, upto: int) -> None:
        """So many characters were handed on."""
        self._sent = upto

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
