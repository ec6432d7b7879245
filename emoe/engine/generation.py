"""One request as the engine sees it, and what its caller gets of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from emoe.engine.runner import Piece
from emoe.engine.sampling import Sampler
from emoe.engine.state import State
from emoe.engine.text import Text
from emoe.requests import Request

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step; its last has a `finish_reason`.

    Attributes:
        id: of the request.
        tokens: ids that it gave since its last event.
        text: what can be sent since then; "" without a tokenizer. It may lag behind the tokens: a character may be half
            there, or a stop string may be on its way.
        logprobs: of each of the tokens, {id: natural log-probability} of it and its alternatives; None: not asked for.
        finish_reason: "stop" (an end token or a stop string), "length", "cancelled" or "error"; None: it goes on.
        error: what failed, with "error" alone.
        prompt_tokens: of its prompt.
        shared_tokens: of these, not computed but copied from another request's.
        output_tokens: all that it gave so far.
        task: that it said or was taken for; None: unknown.
    """

    id: Hashable
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[dict[int, float], ...] | None = None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    prompt_tokens: int = 0
    shared_tokens: int = 0
    output_tokens: int = 0
    task: str | None = None


class News(NamedTuple):
    """An event that is to be told.

    Attributes:
        event: it.
        told, upto: tokens and characters that events have with it.
    """

    event: Event
    told: int
    upto: int


@dataclass(eq=False, slots=True)
class Generation:
    """A request from `submit` to its last event.

    Attributes:
        id: its name.
        prompt: token ids.
        limit: tokens that it may give.
        sampler, text, ends: how tokens are chosen, its text where there is a tokenizer, the ids that end it.
        account: what emoe counts for it.
        kv_bytes: of its state at most.
        inputs: further arguments of the model for its prompt (images); such a prompt is whole.
        whole: so is this one, because chunks would give something else.
        offset: what images add to the positions after them.
        state: of its first `done` tokens; None before it runs.
        shared: tokens of these that were copied from another's.
        tokens: prompt and output.
        logged: log-probabilities of the output, where asked for.
        again: tokens that it runs alone before all else, since a step that it was in failed.
        owed: rows of that step, which the scheduler gave and which are still to run.
        told: tokens of the output that events have.
        ending: why it ends, once that is known; an interrupted end goes on from here.
        last: its last event, once it is made.
    """

    id: Hashable
    prompt: list[int]
    limit: int
    sampler: Sampler
    text: Text | None
    ends: frozenset[int]
    account: Request
    kv_bytes: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    offset: int = 0
    state: State | None = None
    done: int = 0
    shared: int = 0
    tokens: list[int] = field(default_factory=list)
    logged: list[dict[int, float]] | None = None
    again: int = 0
    owed: int = 0
    told: int = 0
    ending: tuple[FinishReason, BaseException | None] | None = None
    last: News | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def given(self) -> int:
        """Tokens of the output."""
        return len(self.tokens) - len(self.prompt)

    def piece(self, rows: int) -> Piece:
        """Its next tokens."""
        assert self.state is not None
        tokens = self.tokens[self.done : self.done + rows]
        if self.done < len(self.prompt):
            return Piece(self.state, tokens, self.done, inputs=self.inputs)
        return Piece(self.state, tokens, self.done, self.offset)

    def news(self, reason: FinishReason | None = None, error: BaseException | None = None) -> News:
        """What happened since `tell`."""
        event = Event(
            self.id,
            tuple(self.tokens[len(self.prompt) + self.told :]),
            self.text.peek() if self.text is not None else "",
            None if self.logged is None else tuple(self.logged[self.told :]),
            reason,
            error,
            len(self.prompt),
            self.shared,
            self.given,
            self.account.task,
        )
        return News(event, self.given, self.text.upto if self.text is not None else 0)

    def tell(self, news: News, events: list[Event]) -> None:
        """The caller gets it; the same once more changes nothing."""
        if not any(each is news.event for each in events):
            events.append(news.event)
        self.told = news.told
        if self.text is not None:
            self.text.mark(news.upto)


@dataclass(eq=False, slots=True)
class Taken:
    """Rows of a request that ran, and what is made of them; an interrupted making goes on from here.

    Attributes:
        generation: the request.
        logits: [V] after its last row.
        length: tokens that it had.
        done, again, owed: as the request's, with these rows.
        rows: that the scheduler is to hear of.
        began, drawn: whether the choice began, and the state of the sampler's generator before it.
        choice: token and log-probabilities, or what failed; None: not made.
        news: the event.
    """

    generation: Generation
    logits: torch.Tensor
    length: int
    done: int
    again: int
    owed: int
    rows: int
    began: bool = False
    drawn: torch.Tensor | None = None
    choice: tuple[int, dict[int, float] | None] | Exception | None = None
    news: News | None = None

    @classmethod
    def of(cls, generation: Generation, count: int, logits: torch.Tensor) -> Taken:
        """Of `count` rows that ran just now."""
        done, again, owed, rows = generation.done + count, generation.again, generation.owed, count
        if done < again:
            rows = 0
        elif again:
            again, owed, rows = 0, 0, owed
        return cls(generation, logits, len(generation.tokens), done, again, owed, rows)

    def choose(self) -> tuple[int, dict[int, float] | None] | Exception:
        """The next token; an interrupted choice is made again with the same numbers."""
        if self.choice is None:
            sampler = self.generation.sampler
            if self.began:
                sampler.draw_from(self.drawn)
            else:
                self.drawn = sampler.drawn()
                self.began = True
            try:
                self.choice = sampler(self.generation.tokens[: self.length], self.logits)
            except Exception as error:
                self.choice = error
        return self.choice
