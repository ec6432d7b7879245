"""What the server does with a request, without HTTP: tokens, limits, jobs for the engine, and what is running."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from emoe.engine import prompts
from emoe.engine.generation import Event
from emoe.engine.sampling import ends_of
from emoe.errors import ConfigError, EmoeError
from emoe.serve.engine_thread import EngineThread
from emoe.serve.grammar import Grammars
from emoe.serve.inbox import Backend, Inbox, Job, Record
from emoe.serve.limits import Limits
from emoe.serve.metrics import Metrics, TaskCounts
from emoe.serve.protocol import ChatRequest, CompletionRequest
from emoe.serve.refusals import Refusal
from emoe.serve.sampling import sampling_of
from emoe.serve.shapes import ChatShape, CompletionShape, Shape
from emoe.serve.tasks import UNKNOWN, TaskNames

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FRESH_SECONDS = 0.5  # a snapshot is asked of the engine at most this often
_PATIENCE_SECONDS = 2.0  # a step may take longer; then the last snapshot does
_SHOWN = 64  # requests on the status page


class Begun(NamedTuple):
    """A request that the engine has.

    Attributes:
        inbox: its events.
        shape: of what the client gets.
        per_prompt: answers to each prompt.
    """

    inbox: Inbox
    shape: Shape
    per_prompt: int


@dataclass(frozen=True)
class About:
    """What the server knows of the model that answers.

    Attributes:
        context: tokens of a request at most, prompt and output.
        vocabulary: token ids are below it.
        config: its `generation_config`.
    """

    context: int
    vocabulary: int
    config: Any

    @classmethod
    def of(cls, engine: Any) -> About:
        """Of the model of an `emoe.Engine`."""
        model = engine.model
        return cls(engine.context, model.config.get_text_config(decoder=True).vocab_size, model.generation_config)


class Classifier(Protocol):
    """What of `emoe.TaskClassifier` is used; in a thread of its own."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def classify(self, text: str) -> Any:
        """Something with a `task`, None where it is not known."""


class Service:
    """Args:
    runs: makes what runs jobs; gets what it tells of each that ends.
    tokenizer: of the model.
    about: the model.
    name: of the model, for clients.
    limits: what is bounded.
    classifier: tells the task of requests that do not say theirs.
    """

    def __init__(
        self,
        runs: Callable[[Callable[[Record, Event], None]], Backend],
        tokenizer: Any,
        *,
        about: About,
        name: str,
        limits: Limits | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        self.name, self.limits, self.about = name, limits or Limits(), about
        self._classifier = classifier
        # An engine decodes with its own while prompts are encoded with this one.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._grammars = Grammars(self._tokenizer, about.vocabulary, list(ends_of(about.config)))
        self._tasks = TaskNames(() if classifier is None else classifier.names, self.limits.tasks)
        self.metrics = Metrics()
        self._backend = runs(self.metrics.ended)
        self._front = ThreadPoolExecutor(1, "emoe-prompts")
        self._compiler = ThreadPoolExecutor(1, "emoe-grammars")  # a large schema takes seconds
        self.began = int(time.time())
        self._seen: dict[str, Any] = {}
        self._seen_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self.draining = False

    @classmethod
    def of(cls, engine: Any, tokenizer: Any, **given: Any) -> Service:
        """Of an `emoe.Engine` without a classifier, which is the service's from now on."""
        return cls(lambda ended: EngineThread(engine, ended), tokenizer, about=About.of(engine), **given)

    def start(self) -> None:
        """From a coroutine."""
        self._backend.start()

    def stop(self, seconds: float = 5.0) -> bool:
        """Cancels what runs and closes the engine; whether that was done in time."""
        self._front.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)
        return self._backend.stop(seconds)

    def cut(self) -> int:
        """Ends what still runs with an error that says so; how many. On the event loop."""
        left = list(self.records)
        self._backend.end(left, Refusal(503, "the server has ended before this answer has", "unavailable"))
        return len(left)

    @property
    def records(self) -> dict[Hashable, Record]:
        """Of answers that wait or run."""
        return self._backend.records

    @property
    def fault(self) -> BaseException | None:
        """Why the engine was given up."""
        return self._backend.fault

    # Requests

    async def chat(self, body: ChatRequest, given: Mapping[str, Any]) -> Begun:
        """Begins the answers to a conversation.

        Args:
            given: task and targets that headers named.

        Raises:
            Refusal, EmoeError: it is not served.
        """
        messages = [each.to_template() for each in body.messages]
        tokens = await self._ahead(lambda: self._encode(messages, "messages"))
        return await self._begin(body, [tokens], body.classified_text, given)

    async def complete(self, body: CompletionRequest, given: Mapping[str, Any]) -> Begun:
        """Begins the continuations of texts or tokens; as `chat`."""
        self._require_choices(len(body.prompts) * body.count)
        encoded = await self._ahead(lambda: [self._encode(each, "prompt") for each in body.prompts])
        first = body.prompts[0]
        return await self._begin(body, encoded, first if isinstance(first, str) else "", given)

    async def _begin(
        self,
        body: ChatRequest | CompletionRequest,
        encoded: Sequence[list[int]],
        text: str,
        given: Mapping[str, Any],
    ) -> Begun:
        self._require_choices(len(encoded) * body.count)
        targets = {name: self._said(body, f"{name}_slo_ms", given) for name in ("ttft", "tpot", "ttlt")}
        slo_ms = {name: float(value) for name, value in targets.items() if value is not None}
        task = self._tasks.name(self._said(body, "task", given))
        classifier = self._classifier
        if task is None and classifier is not None and text:
            task = self._tasks.name(await self._ahead(lambda: classifier.classify(text).task))
        chat = isinstance(body, ChatRequest)
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        jobs = await self._ahead(
            lambda: [
                self._job(body, f"{id}-{number * body.count + choice}", tokens, choice, task, slo_ms)
                for number, tokens in enumerate(encoded)
                for choice in range(body.count)
            ],
            self._front if body.form is None else self._compiler,
        )
        inbox = await self._backend.submit(jobs)
        shape = (ChatShape if chat else CompletionShape)(id, self.name, self._tokenizer, body.alternatives)
        return Begun(inbox, shape, body.count)

    def _encode(self, prompt: Any, field: str) -> list[int]:
        tokens = prompts.read(prompt, self._tokenizer, self.about.vocabulary).tokens
        most = min(self.about.context - 1, self.limits.prompt_tokens or self.about.context)
        if len(tokens) > most:
            raise Refusal(
                400, f"{field} has {len(tokens)} tokens; this server takes at most {most}, of a context of "
                f"{self.about.context}", "context_length_exceeded", param=field,
            )  # fmt: skip
        return tokens

    def _job(
        self,
        body: ChatRequest | CompletionRequest,
        id: str,
        tokens: list[int],
        choice: int,
        task: str | None,
        slo_ms: dict[str, float],
    ) -> Job:
        first = [] if body.form is None else [self._grammars.processor(body.form, len(tokens))]
        sampling = sampling_of(body, self.about.config, len(tokens), choice, first)
        return Job(id, tokens, self._output(body, len(tokens)), sampling, task, slo_ms)

    def _output(self, body: ChatRequest | CompletionRequest, prompt: int) -> int:
        """Tokens that the answer may have."""
        room = self.about.context - prompt
        most = min(room, self.limits.output_tokens or room)
        if body.tokens_asked is None:
            return min(most, self.about.config.max_new_tokens or self.limits.output_default)
        if body.tokens_asked > most:
            raise Refusal(
                400, f"{body.tokens_asked} new tokens after a prompt of {prompt}: at most {most} are possible, of a "
                f"context of {self.about.context}", "context_length_exceeded", param="max_tokens",
            )  # fmt: skip
        return body.tokens_asked

    def _require_choices(self, count: int) -> None:
        if count > self.limits.choices:
            raise Refusal(
                400, f"{count} answers are asked for (prompts times n); at most {self.limits.choices} are possible",
                "too_many_choices", param="n",
            )  # fmt: skip

    def _said(self, body: Any, name: str, given: Mapping[str, Any]) -> Any:
        """What the body or a header says; not two different things."""
        inside, outside = getattr(body, name), given.get(name)
        if inside is not None and outside is not None and inside != outside:
            raise Refusal(
                400, f"{name} is {inside!r} in the body and {outside!r} in a header; say one", "invalid_value",
                param=name,
            )  # fmt: skip
        return outside if inside is None else inside

    async def _ahead(self, function: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        """Work on prompts, in a thread of its own: the engine does not wait for it. What a client that has left asked
        for is not begun."""
        return await asyncio.get_running_loop().run_in_executor(thread or self._front, function)

    # What may be seen

    async def snapshot(self) -> dict[str, Any]:
        """running, `engine` (`Engine.stats`), `model` (`Runtime.stats`), `layers` (experts in memory); a moment old.

        Where a step takes long, or the engine was given up, it is the last that there was.
        """
        if time.monotonic() - self._seen_at > _FRESH_SECONDS and self.fault is None:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            await asyncio.wait([self._looking], timeout=_PATIENCE_SECONDS)
        return {**self._seen, "running": self.fault is None}

    async def _look(self) -> None:
        try:
            self._seen = await self._backend.look()
            self._seen_at = time.monotonic()
        except EmoeError as error:
            logger.debug("emoe: no statistics: %s", error)

    async def status(self) -> dict[str, Any]:
        """What the status page shows."""
        seen = await self.snapshot()
        now = time.monotonic()
        engine, model = seen.get("engine") or {}, seen.get("model") or {}
        records = list(self.records.values())
        tasks: dict[str, dict[str, Any]] = {name: asdict(counts) for name, counts in self.metrics.tasks.items()}
        for record in records:
            row = tasks.setdefault(record.job.task or UNKNOWN, asdict(TaskCounts()))
            way = "running" if record.first is not None else "waiting"
            row[way] = row.get(way, 0) + 1
        for task, tally in (model.get("routing") or {}).get("tasks", {}).items():
            row = tasks.setdefault(task or UNKNOWN, asdict(TaskCounts()))
            row["picks"], row["absent"] = tally["picks"], tally["absent"]
        return {
            "model": self.name,
            "state": "failed" if self.fault is not None else "draining" if self.draining else "running",
            "seconds": round(time.time() - self.began, 1),
            "context": self.about.context,
            "way": engine.get("way"),
            "steps": engine.get("steps", 0),
            "prompt_tokens": engine.get("prompt_tokens", 0),
            "output_tokens": engine.get("output_tokens", 0),
            "scheduler": engine.get("scheduler", {}),
            "kv": engine.get("kv", {}),
            "experts": {
                name: model.get(name)
                for name in ("hits", "misses", "stall_ms", "demand_bytes", "prefetch_bytes", "budget_bytes", "slots")
            },
            "substituted_mass": (model.get("routing") or {}).get("substituted_mass"),
            "tasks": tasks,
            "requests": [_shown(record, now) for record in records[:_SHOWN]],
            "more_requests": max(0, len(records) - _SHOWN),
            "replicas": seen.get("replicas", []),
            "layers": [{"experts": count, "resident": resident} for count, resident in seen.get("layers") or ()],
        }


def _shown(record: Record, now: float) -> dict[str, Any]:
    return {
        "id": record.job.id,
        "task": record.job.task,
        "prompt_tokens": len(record.job.tokens),
        "output_tokens": record.output_tokens,
        "most": record.job.max_new_tokens,
        "seconds": round(now - record.arrived, 2),
        "first_seconds": None if record.first is None else round(record.first - record.arrived, 3),
        "slo_ms": record.job.slo_ms,
    }


def failure(event: Event) -> BaseException:
    """What an event with "error" failed with."""
    return event.error or ConfigError("the request failed")
