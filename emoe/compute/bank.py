"""The experts of one model on one device: slots, what fills them, what computes them. Wired once, taken down once."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from emoe.compute.coarse import Choose, Coarse, Copies
from emoe.compute.device import Device
from emoe.compute.experts import CLOSED, ExpertLayer, Observer, Part, Recording, StandIn
from emoe.compute.records import as_in_files, register_records
from emoe.errors import ConfigError, ReadError
from emoe.memory import format_bytes
from emoe.model import summary
from emoe.model.layout import SlotLayout
from emoe.options import Options
from emoe.requests import Block, RequestObserver
from emoe.slots.cache import CacheManager
from emoe.slots.lending import Lending
from emoe.slots.loader import Loader
from emoe.slots.resident import CacheResidency
from emoe.store import ExpertStore, StoreLayer
from emoe.trace.trace import TraceRecorder

logger = logging.getLogger(__name__)


class _Learning:
    """Tells the eviction policy what each step picks."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache

    def before(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        self._cache.saw(layer, index.cpu().numpy())

    def after(self, layer: int) -> None:
        """What it learns from was said before."""


class Bank:
    """Attributes:
        cache, loader: which expert is in which slot, and what brings it there.
        residency: the cache as routing sees it.
        tables: slot tables of a device, None where steps need the host.
        layers: what Transformers calls, one for each experts module.
        observers: told of every forward of a layer in this order.
        device: where it computes.
        lock: held while any of it is used.

    Args:
        model: its experts' parameters are detached.
        layouts: where an expert of each layer lies in a slot, as planned.
        slots_per_layer: how many slots each layer has.
        options: policy of the cache, kernels, miss, pinned_memory.
        reader: of the device's native module.
        hostless: every pick is resident in the end, so that a device may do without the host.
        lock: held while any of it is used.
        coarse: encoding of the copies that all experts have; None: they have none.
    """

    def __init__(
        self,
        model: nn.Module,
        store: ExpertStore,
        device: Device,
        layouts: Sequence[SlotLayout],
        slots_per_layer: Sequence[int],
        options: Options,
        reader: Any,
        *,
        hostless: bool,
        lock: RLock,
        coarse: str | None = None,
    ) -> None:
        self._store, self.device, self.lock = store, device, lock
        self.experts_per_layer = [len(layer.pieces) for layer in store.layers]
        self.cache = CacheManager(slots_per_layer, policy=options.policy)
        self.residency = CacheResidency(self.cache, self.experts_per_layer, lock)
        self.slab = device.slab(sum(slots_per_layer), max(each.nbytes for each in layouts))
        modules = dict(model.named_modules())
        self.copies = None if coarse is None else Copies(device.module, modules, store, coarse)
        layouts = as_in_files(modules, store.layers, layouts, device.slot_alignment)
        self._table, records = register_records(device.module, store, layouts)
        count = sum(self.experts_per_layer)
        self._queue = device.queue(self.slab, self._table, reader, records=count, pinned_memory=options.pinned_memory)
        self.loader = Loader(self.cache, self._queue, records)
        self.tables = device.tables(self.loader, self.experts_per_layer, lock) if hostless else None
        # On a device whose steps may do without the host nothing leaves for a miss, and nothing is asked of it.
        learns = self.cache.learns and self.tables is None
        self.observers: list[Observer] = [_Learning(self.cache)] if learns else []
        parts = [
            Part(number, modules[layer.path], layer.form, where, self.loader, self.slab, self._queue, device.tensors,
                 ids, self.tables)
            for number, (layer, where, ids) in enumerate(zip(store.layers, layouts, records, strict=True))
        ]  # fmt: skip
        self._parts = parts
        self.layers = [
            ExpertLayer(part, compute, lock, self.observers)
            for part, compute in zip(
                parts, device.computes(parts, kernels=options.kernels, miss=options.miss), strict=True
            )
        ]

    def choose(self, full: Choose) -> None:
        """From now on a layer computes what `full` names in slots, and the rest with copies, where there are any."""
        if self.copies is not None:
            for layer, part, copies in zip(self.layers, self._parts, self.copies.layers, strict=True):
                layer.compute = Coarse(part, copies, full)

    def _summary(self) -> list[dict[str, Any]]:
        """How experts are stored, for `stats`: what of them is read as it lies, and what computes them."""
        return summary.alike(
            {
                "encodings": summary.encodings_of(layer.form),
                "bytes_per_expert": layer.form.nbytes,
                "kernels": each.kernels,
                "read": _read(layer),
            }
            for layer, each in zip(self._store.layers, self.layers, strict=True)
        )

    def residents(self) -> list[tuple[int, list[int]]]:
        """Of each layer how many experts it has, and the numbers of those in memory, ascending."""
        return [(count, self.cache.resident(layer)) for layer, count in enumerate(self.experts_per_layer)]

    def log_start(self, resident_share: float, kernels: str, warnings: Sequence[str]) -> None:
        """Says what runs, why some of it does not run natively, and the plan's warnings."""
        logger.info(
            "emoe: %s of experts in %d slots, %.0f%% resident, store %s",
            format_bytes(self.slab.slots * self.slab.slot_bytes),
            self.slab.slots,
            100 * resident_share,
            self._store.description,
        )
        if self.copies is not None:
            logger.info(
                "emoe: %s of copies in %s, %s", format_bytes(self.copies.nbytes), self.copies.name, self.copies.source
            )
        if kernels == "native":
            reasons = Counter(layer.layout.reason for layer in self.layers if layer.kernels == "stock")
            for reason, count in reasons.items():
                logger.warning(
                    "emoe: %d of %d layers run Transformers' own kernels: %s", count, len(self.layers), reason
                )
        for warning in warnings:
            logger.warning("emoe: %s", warning)

    def recorded(
        self, path: str | Path, model: str, top_k: int, told: list[RequestObserver], check: Callable[[], None]
    ) -> AbstractContextManager[TraceRecorder]:
        """In the block, layers and requests tell a recorder what they do; where it ends well, the trace is written.

        Args:
            path, model, top_k: of the trace.
            told: of requests; the recorder is second in it.
            check: raises where none of it runs any more.

        Raises:
            WriteError: the trace cannot be written there.
            ConfigError: another recorder is open that writes to its path.
        """
        nbytes = [layer.form.nbytes for layer in self._store.layers]
        experts = self.layers[0].num_experts
        recorder = TraceRecorder(len(self.layers), top_k, experts, path=path, model=model, expert_bytes=nbytes)
        return Block(Recording(recorder), partial(self._record, told, check), partial(self._recorded, told))

    def _record(self, told: list[RequestObserver], check: Callable[[], None], recording: Recording) -> TraceRecorder:
        recorder = recording.recorder
        try:
            recording.file = recorder.saving()
            recording.file.__enter__()
            with self.lock:
                check()
                for each in self._recordings():
                    if each.over:  # an interrupt came before its end
                        self._recorded(told, each, KeyboardInterrupt, KeyboardInterrupt(), None)
                    elif each.recorder.path.resolve() == recorder.path.resolve():
                        raise ConfigError(
                            f"another recorder that is open writes to {recorder.path}; give each a file of its own"
                        )
                self.observers.insert(0, recording)
                told.insert(1, recording)
        except BaseException:
            self._recorded(told, recording, *sys.exc_info())
            raise
        return recorder

    def _recordings(self) -> list[Recording]:
        return [each for each in self.observers if isinstance(each, Recording)]

    def _recorded(self, told: list[RequestObserver], recording: Recording, *raised: Any) -> None:
        with self.lock:
            told[:] = [each for each in told if each is not recording]
            # Last, as `_recordings` looks here for what was cut off.
            self.observers[:] = [each for each in self.observers if each is not recording]
        if recording.file is not None:
            recording.file.__exit__(*raised)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """In the block layers compute stand-ins, which take no slot, and nobody is told."""
        computes, observers = [layer.compute for layer in self.layers], list(self.observers)
        try:
            self.observers.clear()
            for layer in self.layers:
                layer.compute = StandIn(layer.layout)
            yield
        finally:
            self.observers.extend(observers)
            for layer, compute in zip(self.layers, computes, strict=True):
                layer.compute = compute

    @property
    def loaded_bytes(self) -> int:
        """Bytes that transfers have asked for."""
        transfer = self._queue.stats()
        return int(transfer["demand_bytes"] + transfer["prefetch_bytes"])

    def lending(self, least: int, resized: Callable[[], object]) -> Lending | None:
        """What takes slots out of use, at least so many in each layer staying; None where their memory stays taken."""
        if not self.device.lends:
            return None
        slots = (len(self.cache.slots(layer)) for layer in range(self.cache.layers))
        return Lending(
            self.loader, [min(least, count) for count in slots], lock=self.lock,
            give_back=lambda slot: self.device.give_back(self.slab, slot), resized=resized,
        )  # fmt: skip

    def preload(self, progress: bool) -> int:
        """Fills free slots with the experts of the lowest ids, and what the device has in front of the disk."""
        read = 0
        free = [self.cache.free(layer) for layer in range(len(self.layers))]
        with tqdm(total=sum(free), desc="Loading experts", unit="expert", disable=None if progress else True) as bar:
            for layer, experts in enumerate(self.experts_per_layer):
                while True:
                    with self.lock:
                        before = self.cache.free(layer)
                        absent = [each for each in range(experts) if self.cache.lookup(layer, each) is None]
                        started = self.loader.prefetch(layer, absent[:before])
                        self.loader.finish_prefetch(layer)
                        arrived = before - self.cache.free(layer)
                    if arrived < started:
                        raise ReadError(f"{started - arrived} experts of layer {layer} could not be read; see the log")
                    if not started:
                        break
                    read += started
                    bar.update(started)
        with self.lock:
            return read + self.device.preload(self._queue, sum(self.experts_per_layer), progress)

    def stats(self, *, per_layer: bool) -> dict[str, Any]:
        """Its part of `Runtime.stats`."""
        counters, transfer = self.loader.snapshot(), self._queue.stats()
        layers = counters.pop("layers")
        routed = counters["hits"] + counters["misses"]
        result = {
            "stall_ms": 1e3 * counters.pop("stall_seconds"),
            **counters,
            "hit_rate": counters["hits"] / routed if routed else 0.0,
            "demand_bytes": transfer["demand_bytes"],
            "prefetch_bytes": transfer["prefetch_bytes"],
            "read_ms": 1e3 * transfer["read_seconds"],
            "reader": transfer["reader"],
            "kernels": dict(Counter(layer.kernels for layer in self.layers)),
            "device": self.device.name,
            "isa": self.device.module.isa(),
            "threads": self.device.module.threads(),
            "slots": self.slab.slots,
            "slot_bytes": self.slab.slot_bytes,
            "experts": self._summary(),
            "copies": None if self.copies is None else self.copies.stats(),
            **self.device.counts(transfer, [layer.compute for layer in self.layers]),
        }
        if per_layer:
            result["layers"] = [
                {"path": layer.path, "kernels": each.kernels, **count}
                for layer, each, count in zip(self._store.layers, self.layers, layers, strict=True)
            ]
        return result

    def close(self) -> None:
        """Ends transfers and gives the slots up; a forward then raises ClosedError. May be called again."""
        self.give_up()
        self.loader.recover()
        self.loader.close()
        self._queue.close()
        if self.tables is not None:
            self.tables.close()
        self.slab = self.copies = None
        self._parts = []

    def give_up(self, reason: str = CLOSED) -> None:
        """A forward of a layer raises ClosedError from now on."""
        for layer in self.layers:
            layer.close(reason)


def _read(layer: StoreLayer) -> str:
    """ "in place", or what an expert's bytes are converted from on arrival."""
    stored = {each.name: each.dtype for each in layer.form.stored}
    others = {piece.src_dtype for piece in layer.pieces[0] if piece.src_dtype != stored[piece.stored]}
    return f"converted from {' and '.join(sorted(others))}" if others else "in place"


def take_down(steps: list[Callable[[], object]]) -> None:
    """Runs steps and takes each that is done from the list, up to the last, which is run and stays.

    A step that an interrupt ended is done again, so steps have to bear that; what was raised is raised when all but the
    last are done. Where even that is cut off, another call goes on with what is left.
    """
    raised: list[BaseException] = []
    while len(steps) > 1:
        try:
            steps[0]()
            del steps[0]
        except BaseException as error:
            raised.append(error)
            if isinstance(error, Exception) and len(raised) > 1:
                del steps[0]  # not an interrupt: it would fail for ever
    if raised:
        raise raised[0]
    steps[0]()
