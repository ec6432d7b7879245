"""Whether rows of a layer belong to a prompt or to decode, told by the forward that they are in."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from threading import local
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from emoe.requests import Requests, Span, cached_tokens


class _Forward(local):
    """Of a thread: rows of its forward where that is decode, else 0; 1 without forward."""

    rows = 1

    def __reduce__(self) -> tuple[type[_Forward], tuple[()]]:
        return _Forward, ()  # modes are copied with their routers


class Phases:
    """Args:
    requests: whose rows are, and whether a forward is a batch of several of them.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._forward = _Forward()

    def watch(self, model: Any) -> list[RemovableHandle]:
        """Looks at every forward of a model, also where its text model is called by itself; `remove` ends it.

        At both, as hooks of what is compiled see nothing.
        """
        text = model.get_decoder() if hasattr(model, "get_decoder") else None
        seen = [model, text] if isinstance(text, nn.Module) and text is not model else [model]
        return [each.register_forward_pre_hook(self._told(each), with_kwargs=True) for each in seen]

    def _told(self, model: nn.Module) -> Callable[..., None]:
        names = list(inspect.signature(type(model).forward).parameters)[1:]

        def told(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.forward({**dict(zip(names, args, strict=False)), **kwargs})

        return told

    def forward(self, given: Mapping[str, Any]) -> None:
        """A forward of a text model is about to run in this thread.

        It is decode where it goes on from a cache with a token more of each sequence, or with several that
        assisted generation guessed.

        Args:
            given: its arguments by name.
        """
        if torch.compiler.is_compiling():
            return
        text = given.get("input_ids")
        if text is None:
            text = given.get("inputs_embeds")
        cache = given.get("past_key_values")
        self._forward.rows = 0
        if isinstance(text, torch.Tensor) and text.dim() > 1 and cache is not None and cached_tokens(cache):
            batch, rows = text.shape[:2]
            if rows == 1 or _guessed(sys._getframe(1)):
                self._forward.rows = batch * rows

    def decode(self, spans: Sequence[Span]) -> list[bool]:
        """Of each span whether its rows are decode.

        In a batch of requests a span of one row is; without a forward of the model before it, one row alone.
        """
        rows = [span.stop - span.start for _, span in spans]
        if self._requests.batched:
            return [count == 1 for count in rows]
        return [count == self._forward.rows for count in rows]


def _guessed(frame: FrameType | None) -> bool:
    """Whether Transformers' generation with an assistant, or by looking up the prompt, calls a frame.

    Not in its first round, of the prompt with guesses behind it.
    """
    while frame is not None and frame.f_code.co_name != "_assisted_decoding":
        frame = frame.f_back
    return frame is not None and not frame.f_locals.get("is_first_iteration", False)
