"""Routing modes on a model: forward hooks on its routers that exchange picks, and the counts of what they changed.

Nothing is patched: `close()` removes the hooks. Which experts are resident is asked of a `Residency`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from threading import RLock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from emoe.errors import ConfigError, UnsupportedModelError
from emoe.model.structure import find_experts
from emoe.options import Bias
from emoe.requests import Kind, Request, Requests, Span, Tally
from emoe.routing.coarse import CoarseRouting
from emoe.routing.contract import Contract
from emoe.routing.host import exchange, shares_of
from emoe.routing.options import RoutingOptions, parse_options
from emoe.routing.phases import Phases
from emoe.routing.recognise import Site, find_routers
from emoe.routing.resident import Residency
from emoe.routing.rules import Rule
from emoe.routing.select import Choice, choose, to_fill
from emoe.routing.settled import SettledRouting, Tables

KEPT_REQUESTS = 256  # finished requests that `stats()` still lists
# Forwards may run in several threads, and in a signal handler that comes in the middle of a count, which then waits for
# nobody (and may lose its own counts). No mode's own, as modes are copied with their routers.
_COUNTING = RLock()
os.register_at_fork(after_in_child=_COUNTING._at_fork_reinit)  # type: ignore[attr-defined]


class Routing:
    """A routing mode on one model, at work from `start()` to `close()`.

    Args:
        model: a Transformers model whose experts go through the experts interface.
        residency: which experts are in memory; not asked in mode `exact`.
        options: the mode.
        requests: whose each forward is; it tells this object of them. None: nobody's, but for `request` and `rows`.
        weights: of layers, as `Contract` takes them.

    Raises:
        UnsupportedModelError: a router's rule is not known (modes other than `exact`); names family and module.
    """

    def __init__(
        self,
        model: nn.Module,
        residency: Residency | None,
        options: RoutingOptions,
        requests: Requests | None = None,
        weights: Callable[[str | None], NDArray[np.float64]] | None = None,
    ) -> None:
        self.options, self._model = options, model
        self.sites: list[Site] = []
        self._layers: list[Tally] = []
        self._tasks: dict[str | None, Tally] = {}
        self._requests = Requests([self]) if requests is None else requests
        self._finished: deque[Request] = deque(maxlen=KEPT_REQUESTS)
        self._contract: Contract | None = None
        if options.bound is not None:
            self._contract = Contract(options.bound, adapt=options.mode == "biased", weights=weights)
        self.phases = Phases(self._requests)
        self._handles: list[RemovableHandle] = []
        self._settled: SettledRouting | None = None
        self.coarse: CoarseRouting | None = None  # in that mode, which looks at no router
        self.observer: Callable[[int, torch.Tensor], None] | None = None  # told layer and the router's own picks [T, K]
        if options.mode == "exact":
            return
        if residency is None:
            raise ConfigError(f"routing={options.mode!r} needs to know which experts are resident")
        self._residency = residency
        if options.mode == "coarse":
            self.coarse = CoarseRouting(residency, options, self._requests, self.phases, self._take)
            self._layers = [Tally() for _ in find_experts(model)]
            return
        self.sites = find_routers(model)
        self._layers = [Tally() for _ in self.sites]

    def use(self, tables: Tables | None) -> None:
        """Routes by these slot tables of a device where a layer is settled: the host then reads no value.

        Only a mode that reads nothing can: in the others the host has to know what is missing. `exact` has no hooks.
        """
        if tables is None or self.options.mode == "exact":
            return
        assert not self.options.loads_misses
        self._settled = SettledRouting(tables, len(self.sites), self._take)
        self._settled.current([self._requests.current], batch=False)

    def start(self) -> None:
        """Puts the hooks on the routers, and on the model where it matters what a forward is of."""
        self.close()  # hooks that an interrupt left there
        for site in self.sites:
            if site.rule is not None:
                self._handles.append(site.module.register_forward_hook(_Hook(self, site, site.rule)))
        if self.phased:
            self._handles += self.phases.watch(self._model)

    @property
    def phased(self) -> bool:
        """Whether prompts and decode are not treated alike: `phases` is to watch the model's forwards."""
        return self._contract is not None or self.coarse is not None

    def close(self) -> None:
        """Removes the hooks; counts stay readable. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def concerned(self) -> bool:
        """Whether forwards of this thread are changed and counted."""
        return self._requests.routed

    def __enter__(self) -> Routing:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Who a token belongs to

    def request(self, task: str | None = None, name: str | None = None) -> AbstractContextManager[Request]:
        """What runs in the block belongs to one request of this task: its bias, its contract, its counts.

        That is what its own thread runs, and threads without a request of their own while it was opened last.
        """
        return self._requests.request(Request(task, name))

    def rows(self, requests: Sequence[tuple[Request, int]]) -> AbstractContextManager[None]:
        """In the block, rows of each forward belong to several requests: (request, number of rows), in row order."""
        if self._settled is not None:
            self._settled.current([request for request, _ in requests], batch=True)
        return self._requests.rows(requests)

    def begin(self, request: Request, first: bool) -> None:
        self._tell_settled()

    def end(self, request: Request, last: bool) -> None:
        self._tell_settled()
        if request.kind is not Kind.IMPLIED:
            self._finished.append(request)

    def finish(self, request: Request) -> None:
        """A request made by hand for `rows` is over: `stats()` lists it from now on."""
        if self._settled is not None:
            self._settled.read(request)
        self._finished.append(request)

    def _tell_settled(self) -> None:
        if self._settled is not None:
            self._settled.current([self._requests.current], batch=False)

    # The hook

    def observe(self, layer: int, index: torch.Tensor) -> None:
        """Tells the observer of the router's own picks [T, K]."""
        # Nothing runs in a capture: its tensors have no values that anybody could look at later.
        if self.observer is not None and not (self._settled is not None and self._settled.capturing()):
            self.observer(layer, index)

    def route(
        self, site: Site, rule: Rule, logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The mode's weights and picks in the place of the router's; None where the router's stand.

        Args:
            logits, weights, index: [T, E], [T, K], [T, K] as the router module gave them.
        """
        if self._settled is not None:
            routed = self._settled.route(site, rule, logits, weights, index)
            if routed is not None:
                choice, weights, index = routed
                spans = self._requests.spans(len(index))
                self._settled.count(site.layer, choice, spans, batch=self._requests.batched)
                return weights, index
        resident = self._residency.mask(site.layer)
        if len(index) == 1 and index.device.type == "cpu":
            return self._route_one(site, rule, logits, weights, index, resident)
        if resident.device != index.device:
            resident = resident.to(index.device)
        return self._route_many(site, rule, logits, weights, index, resident, resident[index])

    def _route_one(
        self,
        site: Site,
        rule: Rule,
        logits: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        resident: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        picks = resident.numpy()[index.numpy()]
        present: list[bool] = picks[0].tolist()
        absent = present.count(False)
        if absent and self._residency.room(site.layer):
            return self._route_many(site, rule, logits, weights, index, resident, torch.from_numpy(picks))
        spans = [span for span in self._requests.spans(1) if span[1].stop]
        request, (decode,) = spans[0][0], self.phases.decode(spans)
        bias = self._bias_of(request.task) if absent else 0.0
        if bias == 0.0:
            self._add(site, request, decode, 1, len(present), absent, 0, absent, 0.0, wanted=0.0)
            return None
        logits = rule.logits(logits)
        if self.options.keep_top[decode]:
            shares = shares_of(rule, logits, weights, index)
            present[shares.index(max(shares))] = True  # it is read
        swap = exchange(rule, logits, weights, index, resident, present, bias)
        wanted = sum(swap.shares)
        if self._contract is not None:
            swap = swap.affordable(self._contract.allowance(request, site.layer, 1, decode=decode))
        count = len(swap.positions)
        mass = sum(swap.shares)
        self._add(site, request, decode, 1, len(present), absent, count, absent - count, mass, wanted=wanted)
        if not count:
            return None
        final = index.clone()
        final.numpy()[0, swap.positions] = swap.substitutes
        return rule.weights(logits, final).to(weights.dtype), final

    def _route_many(
        self,
        site: Site,
        rule: Rule,
        logits: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        resident: torch.Tensor,
        present: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        spans = self._requests.spans(len(index))
        decode = self.phases.decode(spans)
        if present.all():
            self._count_untouched(site, spans, decode, present, all_present=True)
            return None
        bias = self._bias(spans, decode, index)
        room = self._residency.room(site.layer)
        if (isinstance(bias, float) and bias == 0.0) or (room and index[~present].unique().numel() <= room):
            self._count_untouched(site, spans, decode, present, all_present=False)
            return None
        logits = rule.logits(logits)
        usable = resident
        if room:
            filled = to_fill(rule.share(logits, index), index, present, len(resident), room)
            usable = resident.index_fill(0, filled, True)
        return self._substitute(site, rule, logits, weights, index, resident, usable, present, bias, spans, decode)

    def _substitute(
        self,
        site: Site,
        rule: Rule,
        logits: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        resident: torch.Tensor,
        usable: torch.Tensor,
        present: torch.Tensor,
        bias: float | torch.Tensor,
        spans: list[Span],
        decode: list[bool],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        kept = [span for (_, span), phase in zip(spans, decode, strict=True) if self.options.keep_top[phase]]
        if kept:
            tops = index.gather(1, rule.share(logits, index).argmax(1, keepdim=True))
            # Read where they are not in memory, and there for all rows.
            usable = usable.index_fill(0, torch.cat([tops[span] for span in kept]).flatten(), True)
        stay = present if usable is resident else usable[index]
        if isinstance(bias, torch.Tensor):
            stay = stay | (bias == 0)
        choice = choose(rule, logits, index, usable, stay, bias)
        wanted = [0.0] * len(spans)
        if self._contract is not None:
            read, wanted = self._contract.to_read(site.layer, rule, logits, index, usable, choice, spans, decode)
            if read:
                # What is read for some rows is there for all.
                usable = usable.index_fill(0, torch.tensor(read, device=usable.device), True)
                choice = choose(rule, logits, index, usable, stay | usable[index], bias)
        changed = choice.replaced.any(-1, keepdim=True)  # [T, 1]
        final = torch.where(changed, choice.index, index)
        self._count(site, spans, decode, present, choice, None if usable is resident else resident[final], wanted)
        if not changed.any():
            return None
        # Rows that keep their picks keep their weights to the bit.
        own = rule.weights(logits, final).to(weights.dtype)
        return torch.where(changed, own, weights), final

    def _bias(self, spans: list[Span], decode: list[bool], index: torch.Tensor) -> float | torch.Tensor:
        rows = [span.stop - span.start for _, span in spans]
        # A prompt's whole allowance is at hand, and the contract ranks its exchanges; in decode the bias does.
        values = [
            self._bias_of(request.task) if phase else self.options.bias_of(request.task)
            for (request, _), phase in zip(spans, decode, strict=True)
        ]
        if all(value == values[0] for value in values):
            return values[0]
        return torch.tensor(values).repeat_interleave(torch.tensor(rows)).unsqueeze(1).to(index.device)

    def _bias_of(self, task: str | None) -> float:
        asked = self.options.bias_of(task)
        return asked if self._contract is None else self._contract.bias(task, asked)

    def _in_force(self, task: str | None) -> dict[str, Any]:
        if self.coarse is not None:
            return {"exact_mass": self.options.exact_mass_of(task)}
        return {"bias": _for_json(self._bias_of(task))}

    # Counting

    def _count_untouched(
        self, site: Site, spans: list[Span], decode: list[bool], present: torch.Tensor, *, all_present: bool
    ) -> None:
        for (request, span), phase in zip(spans, decode, strict=True):
            rows = span.stop - span.start
            absent = 0 if all_present else int((~present[span]).sum())
            self._add(site, request, phase, rows, rows * present.shape[1], absent, 0, absent, 0.0, wanted=0.0)

    def _count(
        self,
        site: Site,
        spans: list[Span],
        decode: list[bool],
        present: torch.Tensor,
        choice: Choice,
        found: torch.Tensor | None,
        wanted: list[float],
    ) -> None:
        """`found` [T, K]: whether the final picks are resident, None where every substitute is."""
        masses = choice.mass
        for (request, span), phase, want in zip(spans, decode, wanted, strict=True):
            rows = span.stop - span.start
            absent = int((~present[span]).sum())
            substituted = int(choice.replaced[span].sum())
            misses = absent - substituted if found is None else int((~found[span]).sum())
            mass = masses[span].sum(dtype=torch.float64).item()
            picks = rows * present.shape[1]
            self._add(site, request, phase, rows, picks, absent, substituted, misses, mass, wanted=want)

    def _add(
        self,
        site: Site,
        request: Request,
        decode: bool,
        rows: int,
        picks: int,
        absent: int,
        substituted: int,
        misses: int,
        mass: float,
        *,
        wanted: float,
    ) -> None:
        """Counts one call for one request; `wanted` is the mass it would have substituted without the contract."""
        self._take(request, site.layer, rows, picks, absent, substituted, mass, misses)
        if self._contract is not None:
            with _COUNTING:
                self._contract.spend(request, site.layer, rows, mass, decode=decode)
            if decode:
                self._contract.observe(request.task, self.options.bias_of(request.task), rows, wanted)

    def _take(
        self,
        request: Request,
        layer: int,
        rows: int,
        picks: int,
        absent: int,
        substituted: int,
        mass: float,
        misses: int = 0,
        coarse: int = 0,
        coarse_mass: float = 0.0,
    ) -> None:
        with _COUNTING:
            task = self._tasks.get(request.task)
            if task is None:
                task = self._tasks[request.task] = Tally()
            for tally in (request.tally, task, self._layers[layer]):
                tally.add(rows, picks, absent, substituted, misses, mass, coarse, coarse_mass)

    def stats(self, *, per_layer: bool = False) -> dict[str, Any]:
        """Counts since the start; docs/routing.md says what each means.

        Args:
            per_layer: adds a list `layers`, one dict a layer.

        Returns:
            mode, max_substituted_mass, exact_layers (layers whose picks no mode can change), rows, picks, absent,
            substituted, misses, substituted_mass, coarse, coarse_mass, `tasks` (the same by task, with the bias or
            exact_mass in force; those without a name under ""), and `requests` (the same for the last finished ones).
        """
        if self._settled is not None:
            self._settled.read()
        total = Tally()
        tasks = dict(self._tasks)  # forwards go on
        for tally in tasks.values():
            total.add(*astuple(tally))
        result = {
            "mode": self.options.mode,
            "max_substituted_mass": self.options.bound,
            "exact_layers": sum(site.rule is None for site in self.sites),
            **total.to_dict(),
            "tasks": {task or "": {**tally.to_dict(), **self._in_force(task)} for task, tally in tasks.items()},
            "requests": [request.to_dict() for request in self._finished],
        }
        if per_layer and self.coarse is not None:
            result["layers"] = [tally.to_dict() for tally in self._layers]
        elif per_layer:
            result["layers"] = [
                {"router": site.path, "rule": str(site.rule or "token table"), **tally.to_dict()}
                for site, tally in zip(self.sites, self._layers, strict=True)
            ]
        return result


def _for_json(bias: float) -> float | str:
    return "inf" if bias == float("inf") else bias  # JSON has no infinity


class _Hook:
    """The forward hook of one router."""

    def __init__(self, routing: Routing, site: Site, rule: Rule) -> None:
        self._routing = routing
        self._site = site
        self._rule = rule

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._routing.concerned:
            return None
        try:
            logits, weights, index = output
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"router {self._site.path} did not return (logits, weights, indices) as it did on probes"
            ) from error
        self._routing.observe(self._site.layer, index)
        routed = self._routing.route(self._site, self._rule, logits, weights, index)
        return None if routed is None else (logits, *routed)


def attach(
    model: nn.Module,
    residency: Residency | None,
    *,
    routing: str,
    bias: Bias | None = None,
    max_substituted_mass: float | None = None,
    top_pick: str = "auto",
    weights: Callable[[str | None], NDArray[np.float64]] | None = None,
) -> Routing:
    """Puts a routing mode on a model, with or without an emoe runtime: experiments need only a residency.

    Args:
        model: a Transformers model whose experts go through the experts interface.
        residency: which experts count as resident, e.g. a `FixedResidency`.
        routing: "exact", "resident" or "biased"; "coarse" needs a runtime.
        bias: for "biased": bonus of resident experts, in ranges of the selection key; a number, or one per task.
        max_substituted_mass: largest mean share of router mass that may be substituted in a request's prompt, and in
            its answer.
        top_pick: "keep": the pick of a row with the most mass is never substituted, "replace": it may be; "auto": kept
            under max_substituted_mass in decode.
        weights: [L] of a task, how bad substitution is in each layer, as `emoe.routing.contract.Contract` takes them.

    Returns:
        The mode at work; `close()` takes it off.

    Raises:
        ConfigError: an option is not one of its choices, or the model runs under emoe in another mode than `exact`.
        UnsupportedModelError: a router's rule is not known.
    """
    own = getattr(getattr(model, "emoe", None) or None, "routing", None)
    if own is not None and own.options.mode != "exact":
        raise ConfigError(f"this model runs with routing='{own.options.mode}' already; load it with routing='exact'")
    if routing == "coarse":
        raise ConfigError("routing='coarse' needs copies of experts: load or wrap the model with it")
    options = parse_options(routing, bias, max_substituted_mass, top_pick)
    attached = Routing(model, residency, options, weights=weights)
    attached.start()
    return attached
