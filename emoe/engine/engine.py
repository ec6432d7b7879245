"""Many requests on one model: schedule, one forward over the rows of all, sample, commit. docs/serving.md.

Who runs is the scheduler's affair (scheduler.py), how rows meet the model the runner's (runner.py).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from emoe.engine import calibrate, prefixes, prompts, trial
from emoe.engine.costs import Costs, Step
from emoe.engine.exclusive import Exclusive
from emoe.engine.generation import Event, FinishReason, Generation, Taken
from emoe.engine.kv_budget import KvBudget
from emoe.engine.runner import Runner, Way
from emoe.engine.sampling import Sampler, Sampling, ends_of
from emoe.engine.scheduler import Expert, Scheduler, Ticket
from emoe.engine.split import Observed, Split
from emoe.engine.state import held_bytes, is_plain, keeps_all, new_state, rows_of
from emoe.engine.text import Text
from emoe.errors import ClosedError, ConfigError, EmoeError, one_line
from emoe.planning.plan import recurrent_hit_rate
from emoe.requests import Request
from emoe.runtime import Runtime
from emoe.tasks import TaskClassifier

logger = logging.getLogger(__name__)

# Each chunk of a prompt reads nearly every expert that has no slot; between chunks the requests that decode wait.
CHUNK_ROWS = 256

Batch = list[tuple[Generation, int]]  # and how many of its rows run


class Engine:
    """Runs many requests at once on one model. One thread at a time uses it; `model.generate` works between steps.

    Args:
        model: of `emoe.from_pretrained` or `emoe.wrap`, or a plain Transformers model that generates.
        tokenizer: for text, chats, stop strings and the text of events; without one requests are token ids.
        scheduler: who runs; an `emoe.Scheduler`, or the name of a policy.
        way: "packed", "forked" or "alone"; None: the fastest that a trial finds right (docs/serving.md).
        context: tokens of a request at most, prompt and output; None: those of the model's plan or config.
        kv_budget: bytes for the state of all requests. "auto": what the plan reserved for the KV cache, and from there
            bytes move between it and expert slots as requests need them; without a plan, half of what memory is free.
        chunk_rows: rows of a step at most; None: CHUNK_ROWS, or the plan's `prefill_chunk` where that is less.
        most_running: requests that run at once.
        classifier: tells the task of requests that do not say theirs.
        clock: seconds.

    Raises:
        UnsupportedModelError: no way of running it gives a request its own results, or it is no decoder.
        ConfigError: an option is not one of its choices, or another engine runs this model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        scheduler: Scheduler | str | None = None,
        way: Way | None = None,
        context: int | None = None,
        kv_budget: int | str = "auto",
        chunk_rows: int | None = None,
        most_running: int | None = None,
        classifier: TaskClassifier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.tokenizer, self.classifier, self._clock = model, tokenizer, classifier, clock
        runtime = getattr(model, "emoe", None)
        self._runtime = runtime if isinstance(runtime, Runtime) else None
        self._config = model.config.get_text_config(decoder=True)
        self._use = Exclusive(model)
        self._lock = self._use.lock
        try:
            with nullcontext() if self._runtime is None else self._runtime.aside():
                self.choice = trial.choose(model, way)
            self._runner = Runner(model, self.choice.way)
            self.footprint, self._plain = self.choice.footprint, is_plain(new_state(model, 1))
            self.context = self._longest(context)
            rows = chunk_rows or CHUNK_ROWS
            if self._runtime is not None and self._runtime.plan.prefill_chunk is not None:
                rows = min(rows, self._runtime.plan.prefill_chunk)  # what activations were planned for
            self._kv = KvBudget(self._runtime, kv_budget)
            self._split = None if self._runtime is None else self._splitting(self._runtime)
            if isinstance(scheduler, Scheduler):
                self.scheduler = scheduler
                self.scheduler.kv_bytes = self._kv.nbytes
            else:
                self.scheduler = Scheduler(
                    "slo+affinity" if scheduler is None else scheduler, kv_bytes=self._kv.nbytes, chunk_rows=rows,
                    most_running=most_running, resident=None if self._runtime is None else self._resident,
                    expert_bytes=0 if self._runtime is None else self._runtime.plan.bytes_per_expert,
                    costs=self._costs(),
                )  # fmt: skip
        except BaseException:
            if hasattr(self, "_kv"):
                self._kv.close()
            self._use.close()
            raise
        self._live: dict[Hashable, Generation] = {}  # that wait or run
        self._kept: list[Generation] = []  # that ended, for their prefixes; the oldest first
        self._ended: list[Hashable] = []  # that the scheduler is to hear of
        self._flying: Batch = []  # of a forward, until it is known what became of it
        self._taken: list[Taken] = []  # what ran and is not told yet: an interrupt leaves some to the next step
        self._unwanted: list[Hashable] = []  # cancelled in the middle of a step
        self._events: list[Event] = []
        self._shares = keeps_all(new_state(model, 1)) and (
            self._runtime is None or self._runtime.routing.options.mode == "exact"
        )  # in other modes a token's keys depend on what was resident when it ran, and on whose contract paid for it
        self._ids = itertools.count()
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "output_tokens", "shared_tokens", "restarts"), 0)
        self._closed = False

    # Requests

    def submit(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        task: str | None = None,
        id: Hashable | None = None,
        ttft_slo_ms: float | None = None,
        tpot_slo_ms: float | None = None,
        ttlt_slo_ms: float | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Hashable:
        """A request arrives; `step` gives its events.

        Args:
            prompt: text, messages of a chat, token ids, or a processor's output with images (`emoe.engine.prompts`).
            max_new_tokens: None: as the model's generation config says, or as many as the context has room for.
            sampling: None: as the model's generation config says.
            task: None: as the classifier says; without one it is unknown.
            id: its name, unless one is to be made up.
            ttft_slo_ms, tpot_slo_ms, ttlt_slo_ms: targets for the first token, for each further one, for the last.
            template: further arguments of the chat template (tools, ...).

        Returns:
            The id.

        Raises:
            ConfigError: something about it cannot be served; says what.
            BudgetError: its state can never fit.
            OverloadedError: too much waits; `retry_after` seconds later there may be room.
            ClosedError: the engine was closed.
            EmoeError: it is called in the middle of a step.
        """
        with self._lock:
            self._use.require_between("a request comes")
            self._require_open()
            self._resume()
            given = prompts.read(prompt, self.tokenizer, self._config.vocab_size, template)
            inputs, offset = prompts.positions(self.model, given)
            config = self.model.generation_config
            sampling = Sampling.of(config) if sampling is None else sampling
            if sampling.stop and self.tokenizer is None:
                raise ConfigError(f"stop={list(sampling.stop)!r} needs Engine(tokenizer=...)")
            limit = self._limit(len(given.tokens), max_new_tokens)
            id = f"request-{next(self._ids)}" if id is None else id
            if task is None and self.classifier is not None and given.text:
                task = self.classifier.classify(given.text).task
            whole = self.choice.whole or bool(given.inputs)
            length = len(given.tokens) + limit
            nbytes = self.footprint.nbytes(length, length if whole else self.scheduler.chunk_rows)
            self._kv.require(nbytes, id, length)
            request = Request(task, str(id), tokens=length)
            ends = ends_of(config) if sampling.eos is None else sampling.eos
            generation = Generation(
                id, given.tokens, limit, Sampler(sampling, ends, self.model.device),
                Text(self.tokenizer, sampling.stop) if self.tokenizer is not None else None,
                frozenset(ends), request, nbytes,
                inputs, whole, offset, logged=None if sampling.logprobs is None else [],
            )  # fmt: skip
            experts = frozenset[Expert]() if self._runtime is None else self._runtime.base.expected(task)
            ticket = Ticket(
                id, len(given.tokens), limit, nbytes, task, experts, whole=whole,
                ttft=_seconds(ttft_slo_ms), tpot=_seconds(tpot_slo_ms), ttlt=_seconds(ttlt_slo_ms),
            )  # fmt: skip
            if self._kv.grow(nbytes):
                self.scheduler.kv_bytes = self._kv.nbytes
            self.scheduler.submit(ticket, self._clock())
            self._live[id] = generation
            return id

    def cancel(self, id: Hashable) -> None:
        """The request ends with what it has; its last event comes with the next step. Ids that ended are ignored.

        In the middle of a step (a signal handler, a processor) it ends with that step.
        """
        with self._lock:
            if self._use.in_turn:
                self._unwanted.append(id)
                return
            self._resume()
            generation = self._live.get(id)
            if generation is not None:
                self._finish(generation, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether a step would have something to do or to tell."""
        return bool(self._live or self._events)

    # Steps

    def step(self) -> list[Event]:
        """Runs one step of the requests that the scheduler names; what happened since the last, by request.

        Raises:
            ClosedError: the engine was closed.
            EmoeError: a signal handler calls it in the middle of a step.
        """
        with self._use.turn():
            self._require_open()
            started = self._clock()
            self._resume()
            self._land()
            batch: Batch = [] if self._taken else self._again() or self._next(started)
            with self._reported(bool(batch or self._taken), started) as (rows, tokens):
                self._take(rows, tokens)
                for group in self._groups(batch):
                    self._flying = group
                    try:
                        with self._accounted(group):
                            logits = self._runner.run([generation.piece(count) for generation, count in group])
                        self._taken = [Taken.of(*each, row) for each, row in zip(group, logits, strict=True)]
                    except BaseException as error:
                        self._taken = []
                        self._runner.rest()
                        self._failed(error)
                        continue
                    self._flying = []
                    self._take(rows, tokens)
                self._drop_unwanted()
        events, self._events = self._events, []  # last: whoever interrupts before it finds them in the next step
        return events

    def run(self) -> Iterator[Event]:
        """Steps until no request is left."""
        while self.busy:
            yield from self.step()

    def _next(self, now: float) -> Batch:
        """What the scheduler chose; requests that it admitted get their state."""
        self._resplit()
        batch: Batch = []
        for id, rows in self.scheduler.next(now):
            generation = self._live[id]
            if generation.state is None and not self._admit(generation):
                continue
            if not generation.done and self._shares and not generation.inputs:
                if prefixes.comes(generation, [other for other, _ in batch]):
                    continue
                self._share(generation)
            batch.append((generation, max(1, min(rows, len(generation.tokens) - generation.done))))
        return batch

    def _admit(self, generation: Generation) -> bool:
        """Gives a request its state; False where it ended at that."""
        try:
            generation.state = new_state(self.model, len(generation.prompt) + generation.limit)
            self._kept = prefixes.trimmed(self._kept, self._kv.nbytes - self.scheduler.kv_used)
            if self._runtime is not None:
                waiting = (self._live[id] for id in self.scheduler.waiting)
                generation.account.others = [(each.account.task, each.account.tokens or 1.0) for each in waiting]
                self._runtime.requests.begin(generation.account)
        except Exception as error:
            self._finish(generation, "error", error)
            return False
        return True

    def _share(self, generation: Generation) -> None:
        """Copies what others have run of its prompt."""
        rows = prefixes.share(generation, [*self._live.values(), *self._kept])
        if rows:
            generation.done = generation.shared = rows
            self._counts["shared_tokens"] += rows
            self.scheduler.computed(generation.id, rows)

    def _resplit(self) -> None:
        """Bytes go from slots to the state of the request that waits longest, where that raises tokens a second, and
        back where nobody waits for them."""
        if self._split is None or self._kv.least == self._kv.most:
            return
        used, now = self.scheduler.kv_used, self._kv.nbytes
        waiting = [used + self._live[id].kv_bytes for id in self.scheduler.waiting]
        blocked = [needed for needed in waiting if needed > now]
        if blocked and len(self.scheduler.running) < self.scheduler.most_running:
            if self._split.worth(self._kv.slots, self._kv.slots_for(blocked[0])):
                self._kv.grow(blocked[0])
        elif self._split.idle(bool(blocked)):
            self._kv.shrink(max(used, self.scheduler.least_kv_bytes))
            self._kept = prefixes.trimmed(self._kept, self._kv.nbytes - used)
        self.scheduler.kv_bytes = self._kv.nbytes

    def _again(self) -> Batch:
        """A request of a step that failed: it runs alone until it is where it would have been."""
        for generation in list(self._live.values()):
            left = generation.again - generation.done
            if left > 0:
                if generation.inputs and generation.done == 0:
                    left = len(generation.prompt)
                elif not generation.whole:
                    left = min(left, self.scheduler.chunk_rows)
                return [(generation, left)]
        return []

    def _groups(self, batch: Batch) -> Iterator[Batch]:
        """Requests of one forward; of those whose forward failed before, what is left of the step is not run."""
        pieces = [generation.piece(count) for generation, count in batch]
        for group in self._runner.together(pieces):
            yield [batch[number] for number in group]

    def _take(self, rows: dict[Hashable, int], tokens: dict[Hashable, int]) -> None:
        """The next token of each request whose tokens so far have run; all that is done twice gives the same."""
        while self._taken:
            taken = self._taken[0]
            generation = taken.generation
            if self._live.get(generation.id) is generation and generation.ending is None:
                ran = min(taken.done, len(generation.prompt)) - generation.done  # none where it was counted before
                self._counts["prompt_tokens"] += max(0, ran)
                generation.done, generation.again, generation.owed = taken.done, taken.again, taken.owed
                # Told once, and rather not at all than twice: whom the scheduler thinks behind is given rows enough.
                told, taken.rows = taken.rows, 0
                rows[generation.id] = told
                tokens[generation.id] = 0
                if generation.done >= taken.length:
                    self._commit(taken)
                    tokens[generation.id] = 1
            self._taken = self._taken[1:]

    def _commit(self, taken: Taken) -> None:
        generation, choice = taken.generation, taken.choose()
        if isinstance(choice, Exception):
            self._finish(generation, "error", choice)
            return
        token, logged = choice
        number = taken.length - len(generation.prompt)
        if len(generation.tokens) == taken.length:
            generation.tokens.append(token)
            self._counts["output_tokens"] += 1
        if generation.logged is not None and len(generation.logged) == number:
            generation.logged.append(logged or {})
        try:
            stopped = generation.text is not None and generation.text.add(token, number)
        except Exception as error:  # a tokenizer that cannot decode its own ids
            self._finish(generation, "error", error)
            return
        if stopped or token in generation.ends:
            self._finish(generation, "stop")
        elif generation.given >= generation.limit:
            self._finish(generation, "length")
        else:
            taken.news = taken.news or generation.news()
            generation.tell(taken.news, self._events)

    # Ends

    def _finish(self, generation: Generation, reason: FinishReason, error: BaseException | None = None) -> None:
        """The request's last event; the scheduler hears of it when the step is over."""
        generation.ending = generation.ending or (reason, error)
        self._end(generation)

    def _resume(self) -> None:
        """Goes on with ends that were interrupted."""
        for generation in list(self._live.values()):
            if generation.ending is not None:
                self._end(generation)
        self._forget(self._clock())

    def _drop_unwanted(self) -> None:
        while self._unwanted:
            generation = self._live.get(self._unwanted[-1])
            if generation is not None:
                self._finish(generation, "cancelled")
            self._unwanted.pop()

    def _end(self, generation: Generation) -> None:
        """All that is done twice gives the same; the request is live until all is done."""
        assert generation.ending is not None
        reason, error = generation.ending
        if generation.last is None:
            if generation.text is not None and error is None and generation.text.finish() and reason == "length":
                reason = "stop"
            generation.last = generation.news(reason, error)
        generation.tell(generation.last, self._events)
        if reason == "cancelled":
            self.scheduler.cancel(generation.id, self._clock())
        elif generation.id not in self._ended:
            self._ended.append(generation.id)
        if generation.state is not None and not self._plain:
            more = held_bytes(generation.state) - generation.kv_bytes
            self.footprint = self.footprint.more(max(0, more))  # of states that grow by steps the trial saw a few
        if self._runtime is not None:
            self._runtime.requests.end(generation.account, failed=reason == "error")
        keep = reason != "error" and self._shares and generation.done and not generation.inputs
        if keep and not any(each is generation for each in self._kept):
            self._kept.append(generation)
        self._live.pop(generation.id, None)

    def _failed(self, error: BaseException) -> None:
        """A forward failed, and states may be half written. A request that was alone in it ends; of several, each runs
        alone from its first token to where it would be, and ends if that fails."""
        group = self._flying
        if len(group) == 1 and isinstance(error, Exception):
            self._finish(group[0][0], "error", error)
            self._flying = []
            return
        logger.warning("emoe: a step of %d requests failed, they run again one by one: %s", len(group), one_line(error))
        self._land()
        if not isinstance(error, Exception):
            raise error

    def _land(self) -> None:
        """Requests of a forward of which nothing was taken run again; all that is done twice gives the same."""
        for generation, count in [] if self._taken else self._flying:
            if self._live.get(generation.id) is not generation:
                continue
            if not generation.again:
                generation.again, generation.owed = generation.done + count, count
            generation.state = new_state(self.model, len(generation.prompt) + generation.limit)
            generation.done = 0
            self._counts["restarts"] += 1
        self._flying = []

    @contextmanager
    def _reported(self, ran: bool, started: float) -> Iterator[tuple[dict[Hashable, int], dict[Hashable, int]]]:
        """The scheduler hears of what ran in the block, rows and tokens by request, however the block ends.

        Args:
            ran: whether anything does.
        """
        loaded, before = self._loaded()
        rows, tokens = dict[Hashable, int](), dict[Hashable, int]()
        try:
            yield rows, tokens
        finally:
            now = self._clock()
            if ran:
                nbytes, after = self._loaded()
                hits, misses = (new - old for new, old in zip(after, before, strict=True))
                used = None if self._runtime is None else hits + misses
                self.scheduler.ran(Step(now - started, rows, tokens, nbytes - loaded, used), now)
                if self._split is not None:
                    self._split.saw(Observed(now - started, sum(tokens.values()), hits + misses, misses))
                self._counts["steps"] += 1
            self._forget(now)

    def _forget(self, now: float) -> None:
        """The scheduler hears of those that ended."""
        while self._ended:
            self.scheduler.finished(self._ended[-1], now)
            self._ended.pop()

    def close(self) -> None:
        """Ends all requests and gives the model back as it was; their last events are lost. May be called again.

        Raises:
            EmoeError: it is called in the middle of a step.
        """
        with self._lock:
            self._use.require_between("it is closed")
            for generation in list(self._live.values()):
                self._finish(generation, "cancelled")
            self._closed = True
            self._flying, self._taken = [], []
            self._kept.clear()
            self._kv.close()
            self._events.clear()
            self._runner.close()
            self._use.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # What may be seen

    def stats(self) -> dict[str, Any]:
        """way, whole_prompts, reasons (why faster ways were not taken), steps, prompt_tokens (computed),
        shared_tokens (copied), output_tokens, restarts, kv (bytes: now, least, most, used by running requests, kept for
        prefixes), scheduler (`Scheduler.to_dict`)."""
        with self._lock:
            return {
                "way": self.choice.way,
                "whole_prompts": self.choice.whole,
                "reasons": dict(self.choice.reasons),
                **self._counts,
                "kv": {
                    **self._kv.to_dict(),
                    "used": self.scheduler.kv_used,
                    "kept": sum(each.kv_bytes for each in self._kept),
                },
                "scheduler": self.scheduler.to_dict(),
            }

    def check_integrity(self) -> None:
        """Raises EmoeError unless states hold what requests ran, within the bytes that were given to them, and slots
        are whole (`Runtime.check_integrity`)."""
        with self._lock:
            used = 0
            for generation in [*self._live.values(), *self._kept]:
                if generation.state is None:
                    continue
                rows, held = rows_of(generation.state), held_bytes(generation.state, all_layers=False)
                if rows is not None and rows != generation.done:
                    raise EmoeError(f"the state of {generation.id!r} has {rows} tokens; it ran {generation.done}")
                if held > generation.kv_bytes:
                    raise EmoeError(f"the state of {generation.id!r} holds {held} of {generation.kv_bytes} bytes")
                used += generation.kv_bytes
            if used > self._kv.nbytes:
                raise EmoeError(f"states take {used} of {self._kv.nbytes} bytes")
            if self._runtime is not None:
                self._runtime.check_integrity()

    # The model

    def _longest(self, context: int | None) -> int:
        """Tokens of a request, of what was asked for, planned and possible."""
        planned = self._runtime.plan.context if self._runtime is not None else None
        if context is not None and context < 2:
            raise ConfigError(f"context={context} is not a number of tokens of at least 2")
        if context is not None and planned is not None and context > planned:
            raise ConfigError(
                f"context={context} is over the {planned} tokens that the model was planned for; "
                f"load it with context={context}"
            )
        limits = (context, planned, getattr(self._config, "max_position_embeddings", None), self.choice.longest)
        return min(limit for limit in limits if limit is not None)

    def _limit(self, length: int, asked: int | None) -> int:
        """Tokens that a request may give."""
        room = self.context - length
        if asked is None:
            asked = self.model.generation_config.max_new_tokens or max(1, room)
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            raise ConfigError(f"max_new_tokens={asked!r} is not a whole number of at least 1")
        if asked > room:
            why = ""
            if self.context == self.choice.longest:
                why = ": beyond them rotary positions of this model depend on the other requests of a batch"
            raise ConfigError(
                f"{length} tokens and {asked} new ones are over the {self.context} that a request may have{why}"
            )
        return asked

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed")

    def _accounted(self, batch: Batch) -> AbstractContextManager[None]:
        """In the block emoe knows whose rows come."""
        if self._runtime is None:
            return nullcontext()
        return self._runtime.routing.rows([(generation.account, count) for generation, count in batch])

    def _loaded(self) -> tuple[int, tuple[int, int]]:
        """Bytes of experts read so far; hits and misses."""
        return (0, (0, 0)) if self._runtime is None else (self._runtime.loaded_bytes, self._runtime.loader.counts())

    def _resident(self) -> Container[Expert]:
        assert self._runtime is not None
        cache = self._runtime.cache
        return {(layer, expert) for layer in range(cache.layers) for expert in cache.resident(layer)}

    def _costs(self) -> Costs | None:
        """What `emoe calibrate` measured; None where it did not run: costs then follow from what steps take."""
        if self._runtime is None:
            return None
        found = calibrate.kept(calibrate.key_of(self.model, str(self._config._name_or_path)))
        return None if found is None else found.costs

    def _splitting(self, runtime: Runtime) -> Split:
        nbytes = runtime.plan.bytes_per_expert
        return Split(
            sum(runtime.plan.experts_per_layer), recurrent_hit_rate,
            lambda: self.scheduler.costs.byte * nbytes, lambda: self.scheduler.costs.row,
        )  # fmt: skip


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
