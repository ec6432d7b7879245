"""Probes of requests while they are served: their texts as the model is given them, and an estimate from some of them.

Looks on through a hook on the model. What a request is and when it ends is told to it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from emoe.errors import EmoeError
from emoe.requests import Kind, Request, Requests, RequestStart, cached_tokens
from emoe.sensitivity.online import OnlineSensitivity
from emoe.sensitivity.probe import ANSWER_TOKENS, Prober

logger = logging.getLogger(__name__)


class RequestProbes:
    """Probes a share of each task's requests as they end (docs/tasks.md), once `start` has been called.

    Args:
        model: as `Prober` takes it.
        requests: tells of requests, and whose a forward is.
    """

    def __init__(self, model: nn.Module, requests: Requests) -> None:
        self._model, self._requests = model, requests
        self._online: OnlineSensitivity | None = None  # None: probes nothing
        self._hook: Any = None

    def start(self, share: float) -> OnlineSensitivity:
        """From now on requests are probed; another call begins another estimate.

        Args:
            share: of each task's requests, over 0 and up to 1.

        Raises:
            ConfigError: a share out of its range.
            UnsupportedModelError: a router whose rule is not known.
        """
        online, prober = OnlineSensitivity(share), Prober(self._model)
        self.close()
        self._online, self._prober = online, prober
        self._texts: dict[int, _Text] = {}  # by id(request)
        self._probes = self._unusable = self._failed = 0
        self._seconds = 0.0
        self._hook = self._model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        return online

    def close(self) -> None:
        """Removes the hook; the estimate stays."""
        if self._hook is not None:
            self._hook.remove()

    def begin(self, request: Request, first: bool) -> None:
        # A request within one is part of it.
        if self._online is not None and request.kind is Kind.ASKED and request.within is None:
            self._texts[id(request)] = _Text()

    def end(self, request: Request, last: bool) -> None:
        """The last text in the request may be probed."""
        if self._online is None:
            return
        text = self._texts.pop(id(request), None)
        if text is None or request.failed:
            return
        found = text.found()
        if found is None:
            self._unusable += 1
        elif self._online.due(request.task or ""):
            ids, prompt_tokens = found
            try:
                seen = self._prober(ids[: prompt_tokens + ANSWER_TOKENS], request.task, prompt_tokens=prompt_tokens)
            except EmoeError as error:  # the request itself is answered
                self._failed += 1
                logger.warning("emoe: a probe failed: %s", error)
                return
            self._probes += 1
            self._seconds += seen.seconds
            self._online.observe(request.task or "", seen.substituted_mass, seen.logit_change)

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._requests.kind is not Kind.ASKED:
            return
        if self._requests.batched:
            self._on_rows(kwargs.get("input_ids"), kwargs.get("position_ids"))
            return
        request = self._requests.current
        while request.within is not None:
            request = request.within
        text = self._texts.get(id(request))
        if text is not None:
            text.add(args, kwargs)

    def _on_rows(self, ids: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        """Rows of several requests in one sequence: ids and positions [1, T]."""
        known = ids is not None and positions is not None and ids.shape == positions.shape and len(ids) == 1
        for request, rows in self._requests.spans(0 if ids is None else ids.shape[1]):
            text = self._texts.get(id(request))
            if text is not None and rows.stop > rows.start:
                if known:
                    text.go_on(ids[:, rows], int(positions[0, rows.start]))  # type: ignore[index]
                else:
                    text.lose()

    def stats(self) -> dict[str, Any] | None:
        """None before `start`.

        Else probes, their seconds, unusable (requests without one text and an answer), failed, the estimate by task.
        """
        if self._online is None:
            return None
        return {
            "probes": self._probes,
            "seconds": self._seconds,
            "unusable": self._unusable,
            "failed": self._failed,
            "tasks": self._online.to_dict(),
        }


class _Text:
    """The token ids of one text, put together from the forwards that it is given in."""

    def __init__(self) -> None:
        self._starts = RequestStart()
        self._pieces: list[torch.Tensor] = []  # [1, T] each
        self._prompt_tokens = 0
        self._lost = False  # several sequences at once, or tokens that were taken back

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """One forward's arguments."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        starts = self._starts(args, kwargs)
        if starts:
            self._pieces, self._prompt_tokens, self._lost = [], 0, False
        if ids is None or len(ids) != 1:
            self._lost = True
            return
        ids = ids.clone()  # the caller may write the next token into the same tensor
        cache = kwargs.get("past_key_values")
        if cache is None:
            self._pieces = [ids]
        else:
            self._lost |= cached_tokens(cache) != sum(piece.shape[1] for piece in self._pieces)
            self._pieces.append(ids)
        if starts or (cache is not None and ids.shape[1] > 1):  # a prompt may come in parts
            self._prompt_tokens = sum(piece.shape[1] for piece in self._pieces)

    def go_on(self, ids: torch.Tensor, position: int) -> None:
        """The next tokens [1, T] of the text, the first of them at this position."""
        # Others: its prefix was copied from another text, or it runs again from its start.
        self._lost |= position != sum(piece.shape[1] for piece in self._pieces)
        self._pieces.append(ids.clone())
        if ids.shape[1] > 1 or not self._prompt_tokens:
            self._prompt_tokens = sum(piece.shape[1] for piece in self._pieces)

    def lose(self) -> None:
        """Some of its tokens are not known."""
        self._lost = True

    def found(self) -> tuple[torch.Tensor, int] | None:
        """[T] ids and how many of them are the prompt; None where they are not known, or nothing follows the prompt."""
        if self._lost or not self._pieces:
            return None
        ids = torch.cat(self._pieces, dim=1)[0]
        return (ids, self._prompt_tokens) if self._prompt_tokens < len(ids) else None
