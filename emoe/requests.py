"""A request from its first token to its last: who runs one, whose a forward is, and who is told of begin and end.

Knows no runtime. Forwards are told apart by their thread, tokens of a batch by their rows.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from threading import RLock, get_ident, local
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from emoe.errors import ClosedError, ConfigError

if TYPE_CHECKING:
    import torch

LOST = "this process was forked while another thread ran the model; load it in this process"
FORK_SECONDS = 10.0  # a fork waits so long for a layer that runs in another thread


class Kind(Enum):
    """Whose a request is, and with it what its forwards are good for.

    ASKED: a user's, a block of `request`. Routed, counted, learned from.
    IMPLIED: a user's without such a block: a forward that begins a text began it. Counted with all that is nobody's.
    PROBE: emoe's own. Routed and counted as one request; nothing is learned from it.
    EXACT: as PROBE, with the router's own picks; not counted either.
    """

    ASKED = "asked"
    IMPLIED = "implied"
    PROBE = "probe"
    EXACT = "exact"


@dataclass(slots=True)
class Tally:
    """Sums over (token, layer) pairs of what routing modes changed.

    Attributes:
        rows: (token, layer) pairs routed.
        picks: experts that routers picked for them, top_k a row.
        absent: of these, picks whose expert was not resident.
        substituted: picks that another expert took the place of.
        misses: picks used in the end whose expert was not resident and had to be loaded.
        mass: sum over rows of the substituted share of the row's router mass.
    """

    rows: int = 0
    picks: int = 0
    absent: int = 0
    substituted: int = 0
    misses: int = 0
    mass: float = 0.0

    def add(
        self, rows: int, picks: int, absent: int = 0, substituted: int = 0, misses: int = 0, mass: float = 0.0
    ) -> None:
        """Adds one call."""
        self.rows += rows
        self.picks += picks
        self.absent += absent
        self.substituted += substituted
        self.misses += misses
        self.mass += mass

    @property
    def substituted_mass(self) -> float:
        """Mean share of router mass that was substituted, in [0, 1]."""
        return self.mass / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The sums, with `substituted_mass` in the place of `mass`."""
        values = asdict(self)
        del values["mass"]
        return {**values, "substituted_mass": self.substituted_mass}


@dataclass(slots=True)
class Request:
    """One request, from its first token to its last.

    Attributes:
        task: name of its task, None where unknown.
        name: its own name, for reports.
        tally: what was counted so far.
        tokens: input and expected output, None where unknown.
        others: task and tokens of requests that run beside it or follow before the next choice of a base set.
        kind: whose it is.
        within: the request of its thread that it is a part of.
        failed: its block raised.
    """

    task: str | None = None
    name: str | None = None
    tally: Tally = field(default_factory=Tally)
    tokens: float | None = field(default=None, repr=False)
    others: Sequence[tuple[str | None, float]] = field(default=(), repr=False)
    kind: Kind = field(default=Kind.ASKED, repr=False)
    within: Request | None = field(default=None, repr=False, compare=False)
    failed: bool = field(default=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "name": self.name, **self.tally.to_dict()}


Span = tuple[Request, slice]


class RequestObserver(Protocol):
    """Told of requests, under the runtime's lock."""

    def begin(self, request: Request, first: bool) -> None:
        """A request begins; `first`: no other of a user runs."""

    def end(self, request: Request, last: bool) -> None:
        """A request is over; `last`: no other of a user runs. Those that began before the observer came end too."""


class _Open(NamedTuple):
    thread: int
    requests: tuple[Request, ...]
    rows: tuple[int, ...] | None  # of each request in a batch; None: all are the one request's


class Requests:
    """The requests of one model: one, several in threads, several in the rows of a batch.

    Args:
        observers: told of a begin in this order, and of an end in the other; may change between two requests.
        everybodys: False: a forward in a thread without a request of its own is none of this object's business.
        on_lost: called in the child of a fork where the lock could not be had before it.

    Attributes:
        lock: held while they are told, and whenever a layer computes.
    """

    def __init__(
        self,
        observers: list[RequestObserver],
        *,
        everybodys: bool = True,
        on_lost: Callable[[], object] = lambda: None,
    ) -> None:
        self._observers, self._on_lost = observers, on_lost
        self.lock = RLock()
        self._everybodys = everybodys
        self._nobodys = Request()
        self._open: tuple[_Open, ...] = ()  # in the order of opening; replaced, never changed, as forwards look at it
        self._kinds: dict[int, Kind] = {}  # of threads whose forwards are not users'
        self._implied: Request | None = None
        self._starts = RequestStart()
        self._closed = ""  # why no request begins any more
        _all[:] = [*(each for each in _all if each() is not None), weakref.ref(self)]

    def __getstate__(self) -> dict[str, Any]:
        """Modes are copied with their routers, and this with them; nobody holds the copy's lock."""
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = RLock()

    # Whose a forward is

    @property
    def current(self) -> Request:
        """The request of a forward in this thread: the innermost open in it, else the one that was opened last.

        Of a batch the first; a request that counts what is nobody's where none is open.
        """
        entry = self._entry()
        return self._nobodys if entry is None else entry.requests[0]

    @property
    def batched(self) -> bool:
        """Whether rows of a forward in this thread belong to several requests."""
        entry = self._entry()
        return entry is not None and entry.rows is not None

    def spans(self, rows: int) -> list[Span]:
        """Which rows of a forward in this thread are whose.

        Raises:
            ConfigError: a batch was announced with another number of rows.
        """
        entry = self._entry()
        if entry is None:
            return [(self._nobodys, slice(0, rows))]
        if entry.rows is None:
            return [(entry.requests[0], slice(0, rows))]
        spans, start = [], 0
        for request, count in zip(entry.requests, entry.rows, strict=True):
            spans.append((request, slice(start, start + count)))
            start += count
        if start != rows:
            raise ConfigError(f"rows of {start} tokens were announced to routing, {rows} arrived")
        return spans

    @property
    def kind(self) -> Kind:
        """What forwards of this thread are good for: ASKED where they are users'."""
        return self._kinds.get(get_ident(), Kind.ASKED) if self._kinds else Kind.ASKED

    @property
    def routed(self) -> bool:
        """Whether forwards of this thread are changed and counted by routing modes."""
        if self.kind is Kind.EXACT:
            return False
        return self._everybodys or self._own() is not None

    @property
    def running(self) -> bool:
        """Whether a user's request has begun and not ended."""
        return bool(self._asked) or self._implied is not None

    @property
    def _asked(self) -> int:
        """Users' requests that have begun and not ended."""
        return sum(entry.rows is None and entry.requests[0].kind is Kind.ASKED for entry in self._open)

    def _entry(self) -> _Open | None:
        entries = self._open
        if not entries:
            return None
        return self._own() or entries[-1]

    def _own(self) -> _Open | None:
        here = get_ident()
        return next((entry for entry in reversed(self._open) if entry.thread == here), None)

    # A request's life

    @contextmanager
    def request(self, request: Request) -> Iterator[Request]:
        """What runs in the block is this request.

        That is what its own thread runs, and threads without a request of their own while it was opened last.

        Raises:
            ClosedError: the runtime was closed.
        """
        entry = self._begin(request)
        try:
            yield request
        except BaseException:
            request.failed = True
            raise
        finally:
            self._end(request, entry)

    @contextmanager
    def rows(self, requests: Sequence[tuple[Request, int]]) -> Iterator[None]:
        """In the block, rows of each forward belong to several requests: (request, number of rows), in row order."""
        entry = _Open(get_ident(), tuple(each for each, _ in requests), tuple(count for _, count in requests))
        with self.lock:
            self._open = (*self._open, entry)
        try:
            yield
        finally:
            self._forget(entry)

    @contextmanager
    def of_kind(self, kind: Kind) -> Iterator[None]:
        """In the block, forwards of this thread are of this kind."""
        here = get_ident()
        before = self._kinds.get(here)
        self._kinds[here] = kind
        try:
            yield
        finally:
            if before is None:
                del self._kinds[here]
            else:
                self._kinds[here] = before

    def forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A forward of the model is about to run; outside blocks of `request` it may begin one.

        One that goes on with what ran in such a block does as well.
        """
        if self.kind is not Kind.ASKED:
            return
        with self.lock:
            if self._asked or self._closed:
                return
            if self._starts(args, kwargs) or self._implied is None:
                self._end_implied()
                request = Request(kind=Kind.IMPLIED)
                for observer in self._observers:
                    observer.begin(request, True)
                self._implied = request

    def close(self) -> None:
        """No request begins any more; those that run may end."""
        self._closed = "the runtime is closed"

    def forked(self, held: bool) -> None:
        """In the child of a fork there is one thread: the requests of others are not in it, nor what they held."""
        if held or self.lock.acquire(blocking=False):
            self.lock.release()
        else:  # its owner is not in this process, and what it was at stays half done
            self.lock._at_fork_reinit()  # type: ignore[attr-defined]
            self._closed = LOST
            self._on_lost()
        here = get_ident()
        self._open = tuple(entry for entry in self._open if entry.thread == here)
        self._kinds = {thread: kind for thread, kind in self._kinds.items() if thread == here}

    def _begin(self, request: Request) -> _Open:
        if self.kind is not Kind.ASKED:
            request.kind = Kind.PROBE
        with self.lock:
            if self._closed:
                raise ClosedError(self._closed)
            asked = request.kind is Kind.ASKED
            first = asked and not self._asked
            if first:
                self._end_implied()
            own = self._own()
            request.within = None if own is None else own.requests[0]
            entry = _Open(get_ident(), (request,), None)
            self._open = (*self._open, entry)
            told: list[RequestObserver] = []
            try:
                for observer in self._observers:
                    observer.begin(request, first)
                    told.append(observer)
            except BaseException:
                request.failed = True
                self._end(request, entry, told)
                raise
        return entry

    def _end(self, request: Request, entry: _Open, told: Sequence[RequestObserver] | None = None) -> None:
        with self.lock, ExitStack() as stack:
            last = request.kind is Kind.ASKED and self._asked == 1
            self._forget(entry)
            for observer in self._observers if told is None else told:
                stack.callback(observer.end, request, last)

    def _forget(self, entry: _Open) -> None:
        with self.lock:
            self._open = tuple(each for each in self._open if each is not entry)

    def _end_implied(self) -> None:
        request, self._implied = self._implied, None
        if request is not None:
            for observer in reversed(self._observers):
                observer.end(request, True)


class RequestStart:
    """Looks at one forward after the other."""

    def __init__(self) -> None:
        self._text: torch.Tensor | None = None  # [B, T] of the last forward without a KV cache

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the forward with these arguments begins a request."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            self._text = None
            return not cached_tokens(cache)
        text = kwargs.get("input_ids", args[0] if args else None)
        before, self._text = self._text, text
        return before is None or text is None or not continues(text, before)


def cached_tokens(cache: Any) -> int:
    """How many tokens a KV cache has seen."""
    # The first layer may be one that keeps no tokens, and says 0 for ever.
    layers = getattr(cache, "layers", None) or [cache]
    counts = (int(getattr(layer, "get_seq_length", int)()) for layer in layers)
    return next((count for count in counts if count), 0)


def continues(text: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether each row of `text` [B, T + 1] is a row of `before` [B, T] and a token more; a beam may change its row."""
    if text.shape != (before.shape[0], before.shape[1] + 1):
        return False
    return bool((text[:, None, :-1] == before).all(-1).any(-1).all())


_all: list[weakref.ref[Requests]] = []
_at_fork = local()


def _before_fork() -> None:
    """Waits for the layer that runs, as what it is at would stay half done in the child."""
    until = time.monotonic() + FORK_SECONDS
    alive = [each for ref in list(_all) if (each := ref()) is not None]
    _at_fork.held = [each for each in alive if each.lock.acquire(timeout=max(0.0, until - time.monotonic()))]


def _after_in_parent() -> None:
    for each in _at_fork.held:
        each.lock.release()
    del _at_fork.held


def _after_in_child() -> None:
    held = _at_fork.held
    for ref in _all:
        each = ref()
        if each is not None:
            each.forked(any(each is other for other in held))
    del _at_fork.held


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
