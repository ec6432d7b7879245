"""The object behind `model.emoe`: it owns slab, cache, transfer queue and loader.

It wires the parts together and takes them down again; decisions are in slots/, bytes in `emoe._C`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from emoe import native
from emoe.compute import attention, attention_block, experts, ops
from emoe.compute.bank import Bank, take_down
from emoe.compute.device import Device
from emoe.compute.graphs import Graphs
from emoe.errors import ClosedError, ConfigError, SaveError
from emoe.options import Options
from emoe.planning.plan import Plan
from emoe.requests import LOST, Kind, Request, RequestObserver, Requests
from emoe.routing import Routing, routing_of
from emoe.seam import linear
from emoe.seam.attached import Attached
from emoe.seam.plain_linear import Plain
from emoe.sensitivity.online import SHARE, OnlineSensitivity
from emoe.sensitivity.serving import RequestProbes
from emoe.slots.base_set import BaseSet
from emoe.slots.options import opened
from emoe.store import ExpertStore
from emoe.trace.trace import TraceRecorder


def make_reader(kind: str) -> Any:
    """The native reader of that name; fault injection in tests puts its own in this place."""
    return native.load().make_reader(kind)


class Runtime(AbstractContextManager["Runtime"]):
    """Everything emoe holds for one model; reached as `model.emoe`.

    Attributes:
        plan: the `Plan` it was built from.
        cache: the `CacheManager` that says which expert is in which slot.
        routing: the `emoe.routing.Routing` that exchanges picks; in mode `exact` it does nothing.
        base: the `emoe.slots.base_set.BaseSet` that keeps the experts a predictor names.
        attend: computes the attention of decode steps in the place of Transformers' own; None where that does.
        graphs: the `emoe.compute.graphs.Graphs` of steps that do not need the host.
        lending: the `emoe.slots.lending.Lending` that takes slots out of use; None on a GPU, whose slots stay.
    """

    def __init__(
        self, model: Any, store: ExpertStore, plan: Plan, options: Options, *, device: Device,
        plain: Plain, dense: linear.Dense | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.store = plan, store
        self._model, self._device, self._dense = model, device, dense
        # Told of every request in this order, of its end in the other; traces that are recorded come second.
        self._told: list[RequestObserver] = []
        self.requests = Requests(self._told, on_lost=lambda: self._bank.give_up(LOST))
        self._lock = self.requests.lock
        self._steps: list[Callable[[], object]] | None = None  # what is left to take down, once `close` has begun
        routing = routing_of(options)
        device.check(store.layers, plan.layouts, options.kernels)
        device.place(model)
        # Readers of the emulation are of a module of its own.
        make = make_reader if device.module is native.load() else device.module.make_reader
        self._bank = Bank(
            model, store, device, plan.layouts, plan.slots_per_layer, options, make(options.reader),
            hostless=routing.hostless(plan.resident_share), lock=self._lock, coarse=plan.coarse,
        )  # fmt: skip
        self.cache, self.loader, self.layers = self._bank.cache, self._bank.loader, self._bank.layers
        experts_per_layer = self._bank.experts_per_layer
        options = opened(options, len(experts_per_layer), max(experts_per_layer), model)
        weights = getattr(options.sensitivity, "layer_weights", None)
        self.routing = Routing(model, self._bank.residency, routing, self.requests, weights)
        self.routing.use(self._bank.tables)
        self.graphs = Graphs(self._bank, routing.mode, plan.top_k, self._require_open)
        self.base = BaseSet(
            self.loader, self._bank.residency, experts_per_layer, plan.top_k, options,
            loads_misses=routing.loads_misses, ahead=routing.mode in ("resident", "coarse"),
            waits=routing.mode == "resident", requests=self.requests,
            observed=[site.layer for site in self.routing.sites if site.rule is not None],
        )  # fmt: skip
        self.lending = self._bank.lending(plan.top_k, self.base.resized)
        self._probes = RequestProbes(model, self.requests)
        self._told += [self.base, self._probes, self.routing]
        experts.register()
        self._attached = Attached(model, store, experts.IMPLEMENTATION, {each.module: each for each in self.layers})
        self._attached.in_chunks(plan.prefill_chunk, plan.context)
        self._plain = self._attached.plain_linear(plain)
        self._norms = self._attached.norms(ops.rms_norm) if options.normalizes else 0
        self.attend = attention.attend if options.attends and self._attached.one_row(attention.attend) else None
        self._blocks = 0 if self.attend is None else self._attached.attention_blocks(attention_block.make_step)
        if self.base.watches:
            self._bank.observers.append(self.base)  # traces that are recorded come before it
            self.routing.observer = self.base.picked
            self._attached.before_forward(self.requests.forward)
        if self.routing.coarse is not None:
            self._bank.choose(self.routing.coarse.full)
        self.routing.start()
        self._bank.log_start(plan.resident_share, options.kernels, plan.warnings)

    def stats(self, *, per_layer: bool = False) -> dict[str, Any]:
        """Counters since the runtime started.

        Args:
            per_layer: adds a list `layers`, one dict a layer.

        Returns:
            Of experts: hits, misses (routed experts found in a slot or not), hit_rate, prefetch_hits, evictions, loads,
            stall_ms (time that computation waited for bytes), bytes_read with its split demand_bytes, prefetch_bytes;
            slots, resident_share, budget_bytes. How they run: reader, device, encodings, `kernels` (layers served by
            "native", "stock" or a device), `experts` (of layers that are alike: encodings, bytes_per_expert, read in
            place or not), `copies` (of all experts, in `coarse`). Outside experts: `decoded` (bytes as stored and in
            memory, why), `dense` (what stays encoded, how many `plain` ones kernels compute with), `attention` of a
            decode step, `attention_blocks` that are one call in it, `norms` that kernels compute. Of requests:
            `routing` (`emoe.routing.Routing.stats`), `prediction` (docs/slots.md), `sensitivity` (what `probe` found).
            None where there is none. On a GPU also host_hits and host_misses (records in pinned memory or not), on_cpu
            (missing experts that the CPU computed), settled (forwards of layers that asked the device for no value;
            what they used is not in hits).

        Raises:
            ClosedError: the runtime was closed; so does all that follows, but for `close`.
        """
        with self._lock:
            self._require_open()
            return {
                **self._bank.stats(per_layer=per_layer),
                **self.plan.stats(),
                "store": self.store.description,
                "dense": linear.stats(self._model, self._dense) | {"plain": self._plain},
                "norms": self._norms,
                "attention": "native" if self.attend is not None else "torch",
                "attention_blocks": self._blocks,
                "routing": self.routing.stats(per_layer=per_layer),
                "prediction": self.base.stats(),
                "sensitivity": self._probes.stats(),
            }

    def probe(self, share: float = SHARE) -> OnlineSensitivity:
        """From now on a share of each task's requests is probed as it ends: how far substitution moves its answer.

        A probe reads the request's text twice, with substitution and without (docs/tasks.md says what stands for
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
            return self._probes.start(share)

    def request(
        self,
        task: str | None = None, name: str | None = None, *,
        tokens: int | None = None, others: Sequence[tuple[str | None, float]] = (),
    ) -> AbstractContextManager[Request]:  # fmt: skip
        """What runs in the block is one request: its task's bias, its own `max_substituted_mass`, its own counts.

        The object has them (`request.tally.substituted_mass`), and `stats()["routing"]` lists them by task and request.
        With a predictor it is also what the base set is chosen for; requests within it, or beside it in other threads,
        are then part of it. Without this a forward that begins a text begins a request of no task (`emoe.requests`).

        Args:
            task: name of its task.
            name: its own, for reports.
            tokens: input and expected output, for the load score; None: as its task's requests had so far.
            others: (task, tokens) of requests beside it, or before the next choice: the base set is for all.

        Raises:
            ConfigError: tokens below 1.
        """
        return self.requests.request(Request(task, name, tokens=tokens, others=others))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """In the block forwards of this thread try the model out: neither slots nor counts nor observers know of them.

        Experts give numbers that depend on their input, their ids and weights row by row, and are no model's.
        """
        with self._lock, self.requests.of_kind(Kind.EXACT), self._bank.aside():
            yield

    @property
    def loaded_bytes(self) -> int:
        """Bytes of experts read so far, on demand and ahead."""
        return self._bank.loaded_bytes

    def residents(self) -> list[tuple[int, list[int]]]:
        """Of each layer how many experts it has, and the numbers of those in memory, ascending.

        Raises:
            ClosedError: the runtime was closed.
        """
        with self._lock:
            self._require_open()
            return self._bank.residents()

    def preload(self, *, progress: bool = True) -> int:
        """Reads experts into free slots, and with a GPU into pinned memory: those with the lowest ids.

        The first prompts then find slots full; what a predictor names comes with its first request all the same.

        Args:
            progress: a bar on standard error, where that is a terminal.

        Returns:
            How many experts were read.

        Raises:
            ClosedError: the runtime was closed; ReadError: an expert could not be read, the others are there.
        """
        self._require_open()
        return self._bank.preload(progress)

    def record(self, path: str | Path) -> AbstractContextManager[TraceRecorder]:
        """Records routing decisions while the block runs and writes them to `path` (.npz; see docs/traces.md).

        `recorder.mark(task=..., prompt=...)` names what follows in its thread; each of several recorders gets what all
        threads run. A block that ends in an exception leaves `path` as it was; `recorder.save()` writes at any time.

        Raises:
            ClosedError: the runtime is closed.
            ConfigError: another recorder is open that writes to `path`.
            WriteError: the folder is not there or cannot be written, or the disk is full: before the block runs.
        """
        self._require_open()
        model = type(self._model).__name__
        return self._bank.recorded(path, model, self.plan.top_k, self._told, self._require_open)

    def close(self, *, restore: bool | None = None) -> None:
        """Stops transfers, frees the slots and gives the model back; calling it again does nothing.

        It waits for the layer that runs in another thread; forwards there that go on to emoe raise ClosedError. What
        can fail comes before anything is taken down: after an error the model runs on, and this can be called again;
        after an interrupt it runs on too, or is closed as was asked for.

        Args:
            restore: True loads all experts back into ordinary parameters, on the CPU; False leaves the model without
                any, and it refuses to run; None restores where they fit into what is free beside the slots.

        Raises:
            BudgetError: restore=True and the experts do not fit.
            ReadError: an expert could not be read; `restore=False` gives them up.
            EmoeError: a signal handler calls it in the middle of a forward of the same thread.
        """
        with self._lock:
            self.loader.require_idle()
            if self._steps is None:
                read = self._attached.read(restore)
                self._steps = [
                    self.requests.close, self._attached.close, self._probes.close, self.routing.close,
                    self._bank.close, lambda: self._attached.leave(read), self.store.close,
                    lambda: self._attached.let_go(self),
                ]  # fmt: skip
            take_down(self._steps)

    @property
    def closed(self) -> bool:
        """Whether `close` has begun to take it down."""
        return self._steps is not None

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedError("the runtime is closed")

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

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{sum(self.plan.slots_per_layer)} slots"
        return f"<emoe.Runtime of {type(self._model).__name__}: {state}, {self.plan.resident_share:.0%} resident>"


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a model, or ConfigError where it has none."""
    runtime = getattr(model, "emoe", None)
    if not isinstance(runtime, Runtime):
        raise ConfigError(f"{type(model).__name__} does not run under emoe; use emoe.from_pretrained or emoe.wrap")
    return runtime
