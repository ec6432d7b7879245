"""Runs the rows of a step on a model in one of three ways. Knows pieces of requests; chooses no rows and samples none.

packed: all rows are one sequence, attention runs for each request (attention.py).
forked: all rows are one sequence, token mixers run for each request (forks.py).
alone: a forward for each request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from emoe.engine.attention import AttentionName, Batch, Span, WrongWayError, rest, running
from emoe.engine.forks import Forks, decoder_layers
from emoe.engine.state import OwnCache, State, is_plain, new_state
from emoe.errors import ConfigError
from emoe.runtime import Runtime

Way = Literal["packed", "forked", "alone"]
WAYS: tuple[Way, ...] = ("packed", "forked", "alone")  # the fastest first


@dataclass(frozen=True)
class Piece:
    """Tokens of one request that a step runs.

    Attributes:
        state: of the request, which has all tokens before them.
        tokens: their ids.
        position: of the first in the request.
        offset: what is added to positions where images before them count as fewer or more.
        inputs: further arguments of the model for a prompt with images; such a piece is whole and runs alone.
    """

    state: State
    tokens: Sequence[int]
    position: int
    offset: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)


class Runner:
    """Runs steps on one model; between them the model is as it was.

    Args:
        model: a Transformers model that generates.
        way: how `run` does it; `use` changes it at any time.

    Raises:
        WrongWayError: the model cannot run so; the reason.
    """

    def __init__(self, model: Any, way: Way) -> None:
        self.model = model
        runtime = getattr(model, "emoe", None)
        self._attend = runtime.attend if isinstance(runtime, Runtime) else None
        self._direct: dict[int, bool] = {}
        self._name: AttentionName | None = None
        self._forks: Forks | None = None
        self.use(way)

    def use(self, way: Way) -> None:
        """From the next step on.

        Raises:
            ConfigError: no such way.
            WrongWayError: as the constructor.
        """
        if way not in WAYS:
            raise ConfigError(f"way={way!r} is not one of: {', '.join(WAYS)}")
        self.close()
        self.way = way
        if way == "packed" and not is_plain(new_state(self.model, 1)):
            raise WrongWayError("it has layers whose state is not keys and values")
        if way != "alone" and self._name is None:
            config = self.model.config.get_text_config(decoder=True)
            modules = decoder_layers(self.model).modules()
            self._name = AttentionName([config, *(getattr(module, "config", config) for module in modules)])
        if way == "forked":
            assert self._name is not None
            self._forks = Forks(self.model, self._name)

    def close(self) -> None:
        """Removes the hooks; calling it again does nothing."""
        self.rest()
        if self._forks is not None:
            self._forks.close()
        self._forks = None

    def rest(self) -> None:
        """After an interrupt in `run`: the model is as it was."""
        if self._name is not None:
            rest(self._name)

    def together(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Which pieces share a forward, by their numbers."""
        alone = [[number] for number, piece in enumerate(pieces) if self.way == "alone" or piece.inputs]
        batch = [number for number, piece in enumerate(pieces) if self.way != "alone" and not piece.inputs]
        return [batch, *alone] if batch else alone

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """One forward; afterwards the states have the pieces' tokens.

        Args:
            pieces: of different requests, such as `together` puts together.

        Returns:
            Logits [pieces, V] after the last token of each.
        """
        if self.way == "alone" or pieces[0].inputs:
            (piece,) = pieces
            return self._forward(piece.state, pieces)
        stops = torch.tensor([len(piece.tokens) for piece in pieces]).cumsum(0).tolist()
        spans = [
            Span(piece.state, stop - len(piece.tokens), stop, piece.position)
            for piece, stop in zip(pieces, stops, strict=True)
        ]
        batch = Batch(spans, self._direct, forked=self.way == "forked", attend=self._attend)
        assert self._name is not None
        with running(batch, self._name):
            logits = self._forward(batch, pieces)
        batch.check_closed()
        return logits

    def _forward(self, cache: Any, pieces: Sequence[Piece]) -> torch.Tensor:
        device = self.model.device
        tokens = torch.tensor([[token for piece in pieces for token in piece.tokens]], device=device)
        starts = [(piece.position + piece.offset, len(piece.tokens)) for piece in pieces]
        positions = torch.tensor([[at for start, count in starts for at in range(start, start + count)]], device=device)
        last = torch.tensor([len(piece.tokens) for piece in pieces], device=device).cumsum(0) - 1
        own = isinstance(cache, OwnCache)
        output = self.model(
            **{
                "input_ids": tokens,
                "position_ids": positions,
                "past_key_values": cache.value if own else cache,
                "use_cache": True,
                # A number lets some models drop rows on the way, which a batch must not.
                "logits_to_keep": last if isinstance(cache, Batch) else 1,
                **pieces[0].inputs,
            }
        )
        if own:
            cache.value = output.past_key_values
        logits: torch.Tensor = output.logits[0]
        return logits if len(logits) == len(pieces) else logits[last]  # a model without logits_to_keep gives all
