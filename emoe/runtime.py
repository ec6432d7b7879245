"""The object behind `model.emoe`: it owns slab, cache, transfer queue and loader.

It wires the parts together and takes them down again; decisions are in cache.py and loader.py, bytes in `emoe._C`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from torch import nn

from emoe import native
from emoe.compute import experts
from emoe.compute.device import Device
from emoe.compute.records import register_records
from emoe.compute.slot_tables import SlotTables
from emoe.errors import BudgetError, ClosedError, ConfigError, SaveError
from emoe.memory import available_memory, format_bytes
from emoe.options import Options
from emoe.planning.plan import Plan
from emoe.requests import Request, RequestObserver, Requests
from emoe.routing import Routing, routing_of
from emoe.seam.attached import Attached
from emoe.sensitivity.online import SHARE, OnlineSensitivity
from emoe.sensitivity.serving import RequestProbes
from emoe.slots.base_set import BaseSet
from emoe.slots.cache import CacheManager
from emoe.slots.loader import Loader
from emoe.slots.options import opened
from emoe.slots.resident import CacheResidency
from emoe.store import ExpertStore
from emoe.trace.trace import TraceRecorder

logger = logging.getLogger(__name__)


def make_reader(kind: str) -> Any:
    """The native reader of that name; fault injection in tests puts its own in this place."""
    return native.load().make_reader(kind)


class Runtime:
    """Everything emoe holds for one model; reached as `model.emoe`.

    Attributes:
        plan: the `Plan` it was built from.
        cache: the `CacheManager` that says which expert is in which slot.
        routing: the `emoe.routing.Routing` that exchanges picks; in mode `exact` it does nothing.
        base: the `emoe.slots.base_set.BaseSet` that keeps the experts a predictor names.
    """

    def __init__(
        self,
        model: Any,
        store: ExpertStore,
        plan: Plan,
        options: Options,
        *,
        device: Device,
    ) -> None:
        self.plan, self.store = plan, store
        self._model, self._device = model, device
        self._lock = RLock()
        self._closed = False
        # Told of every request in this order, and of its end in the other: the base set, which has its experts brought,
        # traces that are being recorded, the probe, routing with its statistics.
        self._told: list[RequestObserver] = []
        self.requests = Requests(self._told, self._lock)
        self._probes: RequestProbes | None = None
        device.check(store.layers, plan.layouts, options.kernels)
        device.place(model)
        experts_per_layer = [len(layer.pieces) for layer in store.layers]
        self.cache = CacheManager(plan.slots_per_layer, policy=options.policy)
        residency = CacheResidency(self.cache, experts_per_layer, self._lock)
        routing = routing_of(options)
        self.routing = Routing(model, residency, routing, self.requests)
        predicting = opened(options, len(experts_per_layer), max(experts_per_layer), model)
        self._slab = device.slab(sum(plan.slots_per_layer), max(each.nbytes for each in plan.layouts))
        self._table, records = register_records(device.module, store, plan.layouts)
        # Those of the emulation are of a module of its own.
        on_host = device.module is native.load()
        reader = make_reader(options.reader) if on_host else device.module.make_reader(options.reader)
        self._queue = device.queue(
            self._slab, self._table, reader, records=sum(map(len, records)), pinned_memory=options.pinned_memory
        )
        self.loader = Loader(self.cache, self._queue, records)
        # Without the host picks are exchanged, but nothing is read.
        hostless = routing.mode == "resident" and routing.bound is None
        self._tables = device.tables(self.loader, experts_per_layer, self._lock) if hostless else None
        if self._tables is not None:
            self.routing.use(self._tables)
        self.base = BaseSet(
            self.loader,
            residency,
            experts_per_layer,
            plan.top_k,
            predicting,
            loads_misses=not hostless,
            waits=routing.mode == "resident",
            observed=[site.layer for site in self.routing.sites if site.rule is not None],
            requests=self.requests,
        )
        self._told += [self.base, self.routing]
        # Told of every forward of a layer in this order: traces that are being recorded, then the base set.
        self._observers: list[experts.Observer] = [self.base] if self.base.watches else []
        modules = dict(model.named_modules())
        parts = [
            experts.Part(number, modules[layer.path], layer.params, where, self.loader, self._slab, self._queue,
                         device.tensors, ids, self._tables)
            for number, (layer, where, ids) in enumerate(zip(store.layers, plan.layouts, records, strict=True))
        ]  # fmt: skip
        self.layers = [
            experts.ExpertLayer(part, compute, self._lock, self._observers)
            for part, compute in zip(
                parts, device.computes(parts, kernels=options.kernels, miss=options.miss), strict=True
            )
        ]
        self._attach()
        self._log_start(options.kernels)

    def _attach(self) -> None:
        experts.register()
        for layer in self.layers:
            vars(layer.module)["_emoe"] = layer
        self._attached = Attached(self._model, self.store, experts.IMPLEMENTATION)
        self._prompts = None
        if self.base.watches:
            self.routing.observer = self.base.picked
            self._prompts = self._model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        self.routing.start()

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.requests.forward(args, kwargs)

    def _log_start(self, kernels: str) -> None:
        logger.info(
            "emoe: %s of experts in %d slots, %.0f%% resident, store %s",
            format_bytes(self._slab.slots * self._slab.slot_bytes),
            self._slab.slots,
            100 * self.plan.resident_share,
            self.store.description,
        )
        if kernels == "native":
            reasons = Counter(layer.layout.reason for layer in self.layers if layer.kernels == "stock")
            for reason, count in reasons.items():
                logger.warning(
                    "emoe: %d of %d layers run Transformers' own kernels: %s", count, len(self.layers), reason
                )
        for warning in self.plan.warnings:
            logger.warning("emoe: %s", warning)

    def stats(self, *, per_layer: bool = False) -> dict[str, Any]:
        """Counters since the runtime started.

        Args:
            per_layer: adds a list `layers`, one dict a layer.

        Returns:
            hits, misses (routed experts found in a slot or not), hit_rate, prefetch_hits, evictions, loads,
            stall_ms (time the computation waited for bytes), bytes_read and its split `demand_bytes`,
            `prefetch_bytes`, reader, kernels (layers served by "native", "stock" or a device), device, slots,
            resident_share, `sensitivity`: what `probe` found, or None,
            budget_bytes, `routing`: what the routing mode changed (`emoe.routing.Routing.stats`), and `prediction`:
            what the predictor did (docs/residency.md). On a GPU also: host_hits and host_misses (records
            found in pinned memory or not), on_cpu (missing experts that the CPU computed), settled (forwards of layers
            that asked the device for no value; what they used is not in hits).
        """
        with self._lock:
            self._require_open()
            counters, transfer = self.loader.snapshot(), self._queue.stats()
            layers = counters.pop("layers")
            hits, misses = counters["hits"], counters["misses"]
            result: dict[str, Any] = {
                **counters,
                "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
                "stall_ms": 1e3 * counters.pop("stall_seconds"),
                "demand_bytes": transfer["demand_bytes"],
                "prefetch_bytes": transfer["prefetch_bytes"],
                "read_ms": 1e3 * transfer["read_seconds"],
                "reader": transfer["reader"],
                "kernels": dict(Counter(layer.kernels for layer in self.layers)),
                "device": self._device.name,
                "isa": self._device.module.isa(),
                "slots": self._slab.slots,
                "slot_bytes": self._slab.slot_bytes,
                "resident_share": self.plan.resident_share,
                "budget_bytes": self.plan.budget_bytes,
                "store": self.store.description,
                "routing": self.routing.stats(per_layer=per_layer),
                "prediction": self.base.stats(),
                "sensitivity": self._probes.stats() if self._probes is not None else None,
                **self._device.counts(transfer, [layer.compute for layer in self.layers]),
            }
            del result["stall_seconds"]
            if per_layer:
                result["layers"] = [
                    {"path": layer.path, "kernels": each.kernels, **count}
                    for layer, each, count in zip(self.store.layers, self.layers, layers, strict=True)
                ]
        return result

    def probe(self, share: float = SHARE) -> OnlineSensitivity:
        """From now on a share of each task's requests is probed as it ends: how far substitution moves its answer.

        A probe reads the request's text twice, with substitution and without (docs/sensitivity.md says what stands for
        substitution in each mode, and what it costs). Only blocks of `request` with a text of their own are probed.

        Args:
            share: of each task's requests, over 0 and up to 1; the first of each is probed.

        Returns:
            The estimate, which grows; `stats()["sensitivity"]` has it too. Calling this again begins another.

        Raises:
            ConfigError: a share out of its range.
            UnsupportedModelError: a router whose rule is not known.
        """
        with self._lock:
            self._require_open()
            probes = RequestProbes(self._model, self.requests, share)
            if self._probes is not None:
                self._probes.close()
                self._told.remove(self._probes)
            self._told.insert(-1, probes)
            self._probes = probes
        return probes.online

    def request(
        self,
        task: str | None = None,
        name: str | None = None,
        *,
        tokens: int | None = None,
        others: Sequence[tuple[str | None, float]] = (),
    ) -> AbstractContextManager[Request]:
        """What runs in the block is one request: its task's bias, its own `max_substituted_mass`, its own counts.

        The object has them (`request.tally.substituted_mass`), and `stats()["routing"]` lists them by task and request.
        With a predictor it is also what the base set is chosen for; requests within it, or beside it in other threads,
        are then part of it. Without this, a forward that begins a text is the start of a request of no task
        (`emoe.requests`).

        Args:
            task: name of its task.
            name: its own, for reports.
            tokens: input and expected output, for the load score; None: as many as its task's requests had so far.
            others: (task, tokens) of requests that run beside it or follow before the next choice, as a scheduler
                knows them: the base set is then chosen for all.

        Raises:
            ConfigError: tokens below 1.
        """
        for count in (tokens, *(each for _, each in others)):
            if count is not None and not count >= 1:
                raise ConfigError(f"tokens={count} of a request is not a number of at least 1")
        return self.requests.request(Request(task, name, tokens=tokens, others=others))

    def settle(self) -> None:
        """Fills free slots and writes the slot tables: until experts in memory change, steps do not need the host.

        For a CUDA graph of `routing="resident"` (docs/cuda.md): settle, run a step, capture one, and `replaying` it.
        Free slots get the experts with the lowest ids; a prompt that ran before has filled them with its own. Layers
        whose router is a token table (`stats()["routing"]["exact_layers"]`) need the host in each step all the same.

        Raises:
            ConfigError: the model is not on a device, or may load experts in any step; a layer has fewer slots than
                a token has experts.
            ReadError: the bytes of an expert could not be read; the others are loaded.
        """
        self._settling().settle(self.plan.top_k)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """In the block, graphs captured of this model are replayed on the current stream.

        Their slot tables are those of the experts in memory now, and no slot is filled before the replays have read it.
        Only replays belong in it: a load that the block itself begins does not wait for those before it.

        Raises:
            ConfigError: as `settle`; EmoeError: a layer has a free slot or a prefetch under way (`settle` ends both).
        """
        with self._settling().replaying(self._slab, self.plan.top_k):
            yield

    def _settling(self) -> SlotTables:
        self._require_open()
        if self._tables is None:
            contract = "" if self.routing.options.bound is None else " with max_substituted_mass"
            raise ConfigError(
                f"device='{self._device.name}' with routing='{self.routing.options.mode}'{contract} may need the "
                "host in any step; steps without it need a GPU and routing='resident' without a contract"
            )
        return self._tables

    @contextmanager
    def record(self, path: str | Path) -> Iterator[TraceRecorder]:
        """Records routing decisions while the block runs and writes them to `path` (.npz; see docs/traces.md).

        `recorder.mark(task=..., prompt=...)` names what follows in its thread. Recorders may be open at the same time,
        and each gets what every thread runs while it is. A block that ends in an exception leaves `path` as it was;
        `recorder.save()` writes what there is at any time.

        Raises:
            ClosedError: the runtime is closed.
            ConfigError: another recorder is open that writes to `path`.
            WriteError: the folder is not there or cannot be written, or the disk is full: before the block runs.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the runtime is closed")
            layers = list(self.layers)
        recorder = TraceRecorder(
            len(layers),
            self.plan.top_k,
            layers[0].num_experts,
            path=path,
            model=type(self._model).__name__,
            expert_bytes=[layer.layout.nbytes for layer in layers],
        )
        recording = experts.Recording(recorder)
        with recorder.saving():
            with self._lock:
                others = [each for each in self._observers if isinstance(each, experts.Recording)]
                if any(each.recorder.path.absolute() == recorder.path.absolute() for each in others):
                    raise ConfigError(f"another recorder that is open writes to {path}; give each a file of its own")
                self._observers.insert(0, recording)
                self._told.insert(1, recording)
            try:
                yield recorder
            finally:
                with self._lock:
                    self._observers.remove(recording)
                    self._told.remove(recording)

    def close(self, *, restore: bool | None = None) -> None:
        """Stops transfers, frees the slots and gives the model back; calling it again does nothing.

        Args:
            restore: True loads all experts back into ordinary parameters, False leaves the model without experts (it
                then refuses to run). None restores where the experts fit into the memory that is free.
                A model on a GPU is then on the CPU.

        Raises:
            BudgetError: restore=True and the experts do not fit; nothing was changed.
        """
        with self._lock:
            if self._closed:
                return
            needed = self.plan.expert_bytes
            free = available_memory() + self._slab.slots * self._slab.slot_bytes
            fits = needed <= free
            if restore and not fits:
                raise BudgetError(
                    f"restoring the experts needs {format_bytes(needed)}, {format_bytes(free)} are free; "
                    "close(restore=False) gives them up",
                    needed=needed,
                )
            self._closed = True
            self._attached.detach()
            if self._prompts is not None:
                self._prompts.remove()
            if self._probes is not None:
                self._probes.close()
            self.routing.close()
            self.loader.recover()
            self.loader.close()
            self._queue.close()
            for layer in self.layers:
                layer.close()
            if self._tables is not None:
                self._tables.close()
            del self._slab
            if fits if restore is None else restore:
                self._attached.restore(self._attached.read())
                self._model.to("cpu")  # where its experts are now
                for layer in self.layers:
                    vars(layer.module).pop("_emoe", None)
                self._model.emoe = None
            else:
                logger.warning("emoe: closed without restoring; the model has no experts and refuses to run")
            self.store.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the runtime is closed")

    @property
    def closed(self) -> bool:
        return self._closed

    def check_integrity(self) -> None:
        """Raises CacheError unless free + loading + ready + held == slots and the maps agree."""
        self._require_open()
        with self._lock:
            self.loader.recover()
            self.cache.check_integrity()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SaveError(
            f"{self!r} is neither copied nor pickled: model.save_pretrained(folder) writes the model whole, and "
            "emoe.from_pretrained(folder) makes another of it"
        )

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{sum(self.plan.slots_per_layer)} slots"
        return f"<emoe.Runtime of {type(self._model).__name__}: {state}, {self.plan.resident_share:.0%} resident>"


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a model, or ConfigError where it has none."""
    runtime = getattr(model, "emoe", None)
    if not isinstance(runtime, Runtime):
        raise ConfigError(f"{type(model).__name__} does not run under emoe; use emoe.from_pretrained or emoe.wrap")
    return runtime
