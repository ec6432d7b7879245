"""When bytes move: rounds over the experts of one forward, and prefetch. The cache says where to, the queue reads.

docs/slots.md tells the story. Not thread-safe: callers share the runtime's lock.

An interrupt may come between any two lines. What it leaves half done is found again by `recover`: `_open` counts up
before a call changes anything, and down only after it has undone or finished all of it. Who runs the model in a signal
handler is told from it by the stack: the call that was left half done is still on it (`begin`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from types import FrameType
from typing import Any, NamedTuple, Protocol

from emoe.errors import CacheFullError, ClosedError, ConfigError, EmoeError, QueueFullError, TransferError
from emoe.slots.cache import Admission, CacheManager
from emoe.slots.watched import WatchedQueue, Watcher

logger = logging.getLogger(__name__)

Group = list[tuple[int, int]]  # (expert, slot), all held

# Where experts wait for slots, a group holds at most this part of a layer's: the disk reads into the others meanwhile.
GROUPS = 4


class Queue(Protocol):
    """What the loader uses of `emoe._C.TransferQueue`."""

    def submit(self, record: int, slot: int, prefetch: bool = False) -> int: ...
    def promote(self, ticket: int) -> None: ...
    def cancel(self, ticket: int) -> bool: ...
    def done(self, ticket: int) -> bool: ...
    def wait(self, ticket: int) -> None: ...
    def ticket_of(self, slot: int) -> int | None:
        """The newest ticket of this slot that was not waited for; None: nothing will write to the slot any more."""


class _Load(NamedTuple):
    expert: int
    ticket: int


@dataclass(slots=True)
class _Counters:
    """Of one layer; docs/slots.md says what each counts."""

    hits: int = 0
    misses: int = 0
    prefetch_hits: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    unused_failed: int = 0
    evictions: int = 0
    loads: int = 0
    stall_seconds: float = 0.0


class Loader:
    """Brings routed experts into slots.

    Args:
        cache: which expert is in which slot; only this loader changes it from now on.
        queue: an `emoe._C.TransferQueue`; it stays the caller's to close, after the loader.
        records: the queue's record of each expert, `records[layer][expert]`.

    Raises:
        ConfigError: cache and records disagree about the number of layers.
    """

    def __init__(self, cache: CacheManager, queue: Queue, records: Sequence[Sequence[int]]) -> None:
        if cache.layers != len(records):
            raise ConfigError(f"the cache has {cache.layers} layers, the records have {len(records)}")
        self.cache = cache
        self._queue = queue
        self._records = records
        self._counters = [_Counters() for _ in records]
        self._prefetching: list[dict[int, int]] = [{} for _ in records]  # expert -> ticket, nobody waits for it yet
        self._prefetched: list[set[int]] = [set() for _ in records]  # in a slot by prefetch and not used yet
        self._prefetch_full = False
        self._promoted = False  # a prefetch that became a demand may still count as one in the queue
        self._too_large: set[int] = set()  # layers whose experts the queue refused though it had no other prefetch
        self._behind: tuple[int, Sequence[int], list[int]] | None = None
        self._open = 0  # calls that have begun and not ended
        self._turn: FrameType | None = None  # of the caller that began and is not over, or was cut off
        self._epoch = 0  # counts `recover`: what began before it owns nothing any more
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def counts(self) -> tuple[int, int]:
        """Hits and misses of all layers since the start."""
        return sum(each.hits for each in self._counters), sum(each.misses for each in self._counters)

    def capacity(self, layer: int) -> int:
        """The most experts that one group of this layer can hold: its slots that are in use."""
        return self.cache.capacity(layer)

    def rounds(self, layer: int, experts: Sequence[int], together: bool = False) -> Generator[Group, None, None]:
        """Groups of held experts as they become ready, those already in slots first.

        Each group is released when the next is asked for, or when the generator is closed. Close it where the loop
        may be left early: `with contextlib.closing(...)`.

        Args:
            layer: number of the experts module.
            experts: distinct expert ids; together the groups are exactly these.
            together: one group, yielded when all are ready; at most `capacity(layer)` experts.

        Raises:
            ReadError: an expert's bytes could not be read; its slot is free.
            CacheFullError: other holders keep every slot of the layer, or `together` asks for more than there are.
            ConfigError: no such expert.
            ClosedError: the loader was closed.
        """
        if self._closed:
            raise ClosedError("the loader is closed")
        cache, counters = self.cache, self._counters[layer]
        epoch = self._epoch
        self._open += 1
        if self._prefetching[layer]:
            self._collect_prefetches(layer)
        group, missing = cache.hold_resident(layer, experts)
        try:
            counters.hits += len(group)
            if self._prefetched[layer]:
                self._count_prefetch_hits(layer, group)
            if not missing:
                if self._behind is not None:
                    self._prefetch_behind()
                if group:
                    yield group
            elif together and len(experts) > self.capacity(layer):
                raise CacheFullError(
                    f"{len(experts)} experts of layer {layer} cannot be held together in {self.capacity(layer)} slots"
                )
            else:
                yield from self._load(layer, group, missing, together)
        except GeneratorExit:
            pass  # the caller left early
        except BaseException:
            # Whether this was cut off inside an update is not known: `_open` stays, so that `recover` looks.
            if self._epoch == epoch:
                self._release(layer, group)
            raise
        if self._epoch == epoch:
            cache.release_all(layer, group)
            self._open -= 1

    def _load(self, layer: int, group: Group, missing: list[int], together: bool) -> Generator[Group, None, None]:
        """The rounds of a call with misses; `group` is what the caller releases at the end, whatever it holds then."""
        running: deque[_Load] = deque()
        epoch = self._epoch
        try:
            pending = self._promote(layer, missing, running)
            self._submit(layer, pending, running)
            if pending:
                # Those that may leave are computed first: their slots are the next to be read into.
                protected = self.cache.protected(layer)
                group.sort(key=lambda held: held[0] not in protected)
            elif group and not together:
                yield list(group)
                self._release(layer, group)
            while pending or running or (group and not together):
                self._submit(layer, pending, running)
                if not running and (together or not group):
                    self._make_room(layer, pending[0])
                    continue
                self._collect(layer, group, running)
                if running and (together or not group):
                    self._await(layer, group, running)
                    self._collect(layer, group, running)
                if together and (pending or running):
                    continue
                stay = max(0, len(group) - max(1, self.capacity(layer) // GROUPS)) if pending else 0
                yield group[stay:]
                self._release(layer, group, stay)
        finally:
            if self._epoch == epoch:
                self._abandon(layer, running)
                self._promoted = False

    def prefetch(self, layer: int, experts: Sequence[int]) -> int:
        """Starts reading experts that are in no slot, behind all demand.

        It never blocks, and where there is no room it starts fewer reads and raises nothing.

        Args:
            layer: number of the experts module.
            experts: distinct expert ids, likeliest first; those in slots stay there.

        Returns:
            How many reads were started.

        Raises:
            ConfigError: no such expert.
            ClosedError: the loader was closed.
        """
        return len(self._prefetch(layer, experts))

    def prefetch_behind(self, layer: int, experts: Sequence[int]) -> list[int]:
        """As `prefetch`, but not before the next call of `rounds` has submitted all reads of its own.

        Replaces what this was told before and has not begun.

        Returns:
            A list that will have the experts whose reads were started.
        """
        started: list[int] = []
        self._behind = layer, experts, started
        return started

    def begin_behind(self) -> None:
        """Begins what `prefetch_behind` was told, where no call of `rounds` did."""
        if self._behind is not None:
            self._prefetch_behind()

    def cancel_prefetch(self, layer: int | None = None, experts: Collection[int] | None = None) -> int:
        """Takes back prefetches that have not started reading. Returns how many.

        Args:
            layer: of this layer alone; None for all.
            experts: of these alone; None for all.
        """
        layers = range(len(self._records)) if layer is None else (layer,)
        self._open += 1
        cancelled = sum(self._cancel_queued(each, experts) for each in layers)
        self._open -= 1
        return cancelled

    def finish_prefetch(self, layer: int) -> None:
        """Waits for a layer's prefetches; a failed one frees its slot and is logged."""
        prefetching = self._prefetching[layer]
        self._open += 1
        for expert in list(prefetching):
            self._end_prefetch(layer, expert, prefetching[expert])
        self._open -= 1

    def close_slot(self, layer: int) -> int | None:
        """Takes a slot out of use (`CacheManager.close`); a prefetch gives way where there is no other.

        Returns the slot, which nobody writes to any more; None where a forward holds all there are.
        """
        if self._closed:
            raise ClosedError("the loader is closed")
        self._open += 1
        closed = self.cache.close(layer)
        prefetching = self._prefetching[layer]
        while closed is None and prefetching:
            self._cancel_queued(layer)
            if prefetching:
                oldest = next(iter(prefetching))
                self._end_prefetch(layer, oldest, prefetching[oldest])
            closed = self.cache.close(layer)
        if closed is not None and closed.evicted is not None:
            self._counters[layer].evictions += 1
            self._prefetched[layer].discard(closed.evicted)
        self._open -= 1
        return None if closed is None else closed.slot

    def prefetching(self, layer: int) -> bool:
        """Whether a prefetch of the layer is under way, or done and not noted in the cache."""
        return bool(self._prefetching[layer])

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Tells `watcher` of every transfer that is asked for in the block; transfers go as they do without."""
        expert_of = {record: (layer, e) for layer, each in enumerate(self._records) for e, record in enumerate(each)}
        before, self._queue = self._queue, WatchedQueue(self._queue, expert_of, watcher)
        try:
            yield
        finally:
            self._queue = before

    def begin(self) -> None:
        """The caller's turn begins, and is over when it calls `over` or was cut off; `recover` comes first.

        Raises:
            EmoeError: as `recover`.
        """
        caller = sys._getframe(1)
        self._require_idle(caller)
        self._turn = caller
        self._recover_all()

    def over(self) -> None:
        """The caller's turn is over."""
        self._turn = None

    def recover(self) -> None:
        """Ends what an interrupt left half done; cheap where there was none.

        Callers say by it that no call of this loader is under way: those that seem to be will never go on, and where
        their generators are closed later nothing happens. Prefetches under way stay. A slot that may still be written
        is free only when its read is over, whether or not its ticket was ever seen.

        Raises:
            EmoeError: another's turn is not over: this runs in the middle of it.
        """
        caller = sys._getframe(1)
        self._require_idle(caller)
        before, self._turn = self._turn, caller
        try:
            self._recover_all()
        finally:
            self._turn = caller if before is caller else None

    def require_idle(self) -> None:
        """Raises EmoeError where this runs in the middle of somebody's turn, and changes nothing."""
        self._require_idle(sys._getframe(1))

    def _require_idle(self, caller: FrameType) -> None:
        # Callers have the runtime's lock, so a turn that goes on is one of this thread: its frame is on the stack. A
        # turn that was cut off is in no more than a traceback.
        if self._turn is None:
            return
        frame = caller.f_back
        while frame is not None:
            if frame is self._turn:
                raise EmoeError(
                    "this model is in the middle of a forward in this very thread: what interrupted it there (a signal "
                    "handler) cannot use the model; have it set a flag, and use the model when the forward is over"
                )
            frame = frame.f_back

    def _recover_all(self) -> None:
        if not self._open:
            return
        self._epoch += 1
        self._behind = None
        for layer in range(len(self._records)):
            self._recover(layer)
        self._prefetch_full = self._promoted = False
        self._open = 0  # last: an interrupt in here leaves the rest to the next

    def snapshot(self) -> dict[str, Any]:
        """Counters since the start (docs/slots.md), summed, and per layer in the list `layers`."""
        layers = [asdict(counters) for counters in self._counters]
        total: dict[str, Any] = {field.name: sum(each[field.name] for each in layers) for field in fields(_Counters)}
        total["layers"] = layers
        return total

    def close(self) -> None:
        """Ends all prefetches; afterwards no slot is loading. Calling it again does nothing."""
        self._closed = True
        for layer, prefetching in enumerate(self._prefetching):
            self._cancel_queued(layer)
            for expert, ticket in list(prefetching.items()):
                self._end_prefetch(layer, expert, ticket)

    # Demand

    def _promote(self, layer: int, missing: list[int], running: deque[_Load]) -> deque[int]:
        """Moves prefetches of missing experts to the demand lane; returns the experts that have no slot."""
        prefetching, prefetched, counters = self._prefetching[layer], self._prefetched[layer], self._counters[layer]
        pending: deque[int] = deque()
        for expert in dict.fromkeys(missing):
            ticket = prefetching.pop(expert, None)
            if ticket is None:
                self._record(layer, expert)  # an id that does not exist is refused before anything is read
                pending.append(expert)
                continue
            running.append(_Load(expert, ticket))
            prefetched.discard(expert)
            self._prefetch_full = False
            self._promoted = True
            self.cache.touch(layer, expert)
            self._queue.promote(ticket)
            counters.hits += 1
            counters.prefetch_hits += 1
            counters.prefetch_late += 1
        counters.misses += len(pending)
        return pending

    def _submit(self, layer: int, pending: deque[int], running: deque[_Load]) -> None:
        """Gives slots to pending experts, as many as there are, and submits their reads."""
        while pending:
            expert = pending[0]
            # While a load of this call is under way its slot will be free in a moment, and protected experts stay.
            keep = self.cache.protected(layer) if running else frozenset()
            try:
                slot = self._admit(layer, expert, keep)
            except CacheFullError:
                if self._cancel_queued(layer):
                    continue
                return
            try:
                ticket = self._queue.submit(self._records[layer][expert], slot, False)
            except BaseException:
                # Python raises an interrupt when the native call has returned: the read may be queued all the same.
                lost = self._queue.ticket_of(slot)
                if lost is None:
                    self.cache.fail(layer, expert)
                else:
                    running.append(_Load(expert, lost))
                raise
            self._counters[layer].loads += 1
            running.append(_Load(expert, ticket))
            pending.popleft()
        if self._behind is not None:
            self._prefetch_behind()

    def _collect(self, layer: int, group: Group, running: deque[_Load]) -> None:
        """Adds every load that is done to the group."""
        for _ in range(len(running)):
            if self._queue.done(running[0].ticket):
                self._finish(layer, group, running)
            else:
                running.rotate(-1)

    def _await(self, layer: int, group: Group, running: deque[_Load]) -> None:
        """Waits for the oldest load: nothing can be computed meanwhile."""
        started = time.perf_counter()
        try:
            self._finish(layer, group, running)
        finally:
            self._counters[layer].stall_seconds += time.perf_counter() - started

    def _finish(self, layer: int, group: Group, running: deque[_Load]) -> None:
        expert, ticket = running[0]
        try:
            self._queue.wait(ticket)
        except EmoeError:
            running.popleft()
            self.cache.fail(layer, expert)
            raise
        # Anything else leaves the load in `running`: its bytes may still be on their way into the slot.
        running.popleft()
        self.cache.ready(layer, expert)
        group.append((expert, self.cache.hold(layer, expert)))

    def _abandon(self, layer: int, running: deque[_Load]) -> None:
        """Ends loads that nobody will use: cancelled where they have not started, waited for where they have."""
        for load in running:
            self._queue.cancel(load.ticket)
        for expert, ticket in running:
            self._end(layer, expert, ticket)

    def _release(self, layer: int, group: Group, stay: int = 0) -> None:
        """Releases all of the group but its first `stay`."""
        while len(group) > stay:
            expert, _ = group.pop()
            self.cache.release(layer, expert)

    def _make_room(self, layer: int, expert: int) -> None:
        """Waits for a running prefetch of this layer, whose slot can then be taken.

        Raises:
            CacheFullError: there is none; other holders keep the layer's slots.
        """
        prefetching = self._prefetching[layer]
        if not prefetching:
            raise CacheFullError(
                f"expert ({layer}, {expert}) finds no slot: other calls hold all {self.capacity(layer)} of its layer"
            )
        started = time.perf_counter()
        oldest = next(iter(prefetching))
        self._end_prefetch(layer, oldest, prefetching[oldest])
        self._counters[layer].stall_seconds += time.perf_counter() - started

    # Prefetch

    def _prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        if self._closed:
            raise ClosedError("the loader is closed")
        self._open += 1
        self._collect_prefetches(layer)
        keep = frozenset(experts)
        started: list[int] = []
        for expert in experts:
            if self.cache.lookup(layer, expert) is not None:
                continue
            if self._prefetch_full:
                break
            record = self._record(layer, expert)
            # The queue is asked first: until it has taken the read, nobody has lost a slot.
            try:
                admission = self.cache.reserve(layer, expert, keep)
            except CacheFullError:
                break
            try:
                ticket = self._queue.submit(record, admission.slot, True)
            except QueueFullError as error:
                self.cache.give_back(layer, admission)
                self._refused(layer, error)
                break
            except BaseException:
                lost = self._queue.ticket_of(admission.slot)
                if lost is None:
                    self.cache.give_back(layer, admission)
                else:
                    self._assign(layer, expert, admission)
                    self._prefetching[layer][expert] = lost
                raise
            self._assign(layer, expert, admission)
            self._counters[layer].loads += 1
            self._prefetching[layer][expert] = ticket
            self._prefetched[layer].add(expert)
            started.append(expert)
        self._open -= 1
        return started

    def _prefetch_behind(self) -> None:
        assert self._behind is not None
        layer, experts, started = self._behind
        self._behind = None
        started += self._prefetch(layer, experts)

    def _refused(self, layer: int, error: QueueFullError) -> None:
        """No other try before a prefetch ends, where one is under way; without one this record fits at no time."""
        if self._promoted or any(self._prefetching):
            self._prefetch_full = any(self._prefetching)
        elif layer not in self._too_large:
            self._too_large.add(layer)
            logger.warning("emoe: experts of layer %d are never prefetched: %s", layer, error)

    def _collect_prefetches(self, layer: int) -> None:
        """Makes prefetched experts ready whose bytes have arrived."""
        for expert, ticket in list(self._prefetching[layer].items()):
            if self._queue.done(ticket):
                self._end_prefetch(layer, expert, ticket)

    def _cancel_queued(self, layer: int, experts: Collection[int] | None = None) -> int:
        cancelled = 0
        for expert, ticket in list(self._prefetching[layer].items()):
            if (experts is None or expert in experts) and self._queue.cancel(ticket):
                self._end_prefetch(layer, expert, ticket)
                cancelled += 1
        return cancelled

    def _end_prefetch(self, layer: int, expert: int, ticket: int) -> None:
        del self._prefetching[layer][expert]
        self._prefetch_full = False
        if not self._end(layer, expert, ticket):
            self._prefetched[layer].discard(expert)

    def _count_prefetch_hits(self, layer: int, group: Group) -> None:
        prefetched = self._prefetched[layer]
        for expert, _ in group:
            if expert in prefetched:
                prefetched.discard(expert)
                self._counters[layer].prefetch_hits += 1

    # Both

    def _record(self, layer: int, expert: int) -> int:
        records = self._records[layer]
        if not 0 <= expert < len(records):
            raise ConfigError(f"layer {layer} has experts 0 to {len(records) - 1}, not {expert}")
        return records[expert]

    def _admit(self, layer: int, expert: int, keep: frozenset[int] = frozenset()) -> int:
        admission = self.cache.reserve(layer, expert, keep)
        self._assign(layer, expert, admission)
        return admission.slot

    def _assign(self, layer: int, expert: int, admission: Admission) -> None:
        self.cache.assign(layer, expert, admission)
        if admission.evicted is not None:
            self._counters[layer].evictions += 1
            if admission.evicted in self._prefetched[layer]:
                self._prefetched[layer].discard(admission.evicted)
                self._counters[layer].prefetch_wasted += 1

    def _recover(self, layer: int) -> None:
        prefetching: dict[int, int] = {}
        kept = set()
        for expert, slot in self.cache.loading(layer):
            ticket = self._queue.ticket_of(slot)
            if ticket is None:
                continue
            if self._prefetching[layer].get(expert) == ticket:
                prefetching[expert] = ticket
                kept.add(slot)
                continue
            self._queue.cancel(ticket)
            try:
                self._queue.wait(ticket)
            except EmoeError as error:  # whose read it was has failed already, by the interrupt
                logger.debug("emoe: a read of layer %d that nobody waits for: %s", layer, error)
        self.cache.repair(layer, kept)
        self._prefetching[layer] = prefetching
        self._prefetched[layer] &= prefetching.keys() | set(self.cache.resident(layer))

    def _end(self, layer: int, expert: int, ticket: int) -> bool:
        """Ends a load without using it. Returns whether its expert is now ready."""
        try:
            self._queue.wait(ticket)  # the queue forgets a ticket only when it was waited for
        except TransferError:  # cancelled
            self.cache.fail(layer, expert)
            return False
        except EmoeError as error:
            self.cache.fail(layer, expert)
            self._counters[layer].unused_failed += 1
            logger.warning("emoe: reading expert (%d, %d), which nobody waits for, failed: %s", layer, expert, error)
            return False
        self.cache.ready(layer, expert)
        return True
