"""The server as a Ray Serve application: one front, which is the server's own app, and replicas with an engine each.

Ray starts, watches and replaces replicas and has the HTTP socket; who gets a request is `ray_router`'s affair, and what
becomes of those of a lost replica is `fleet`'s. Needs emoe[ray].
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError

from emoe.engine.placement import CHOICES
from emoe.engine.sampling import ends_of
from emoe.errors import ConfigError, EmoeError, one_line
from emoe.serve.app import make_app
from emoe.serve.engine_thread import EngineThread
from emoe.serve.fleet import Call, Desk, Fleet, Item, answer
from emoe.serve.grammar import Grammars
from emoe.serve.limits import Limits
from emoe.serve.listen import EXIT_FORCED
from emoe.serve.routes import UNKNOWN, Published, number_of
from emoe.serve.service import About, Service
from emoe.serve.setup import Setup

APP = "emoe"
STATS_SECONDS = 1.0  # between two publications of a replica
LOOK_SECONDS = 60.0  # for all replicas to say what they count
STATS_PATIENCE = 2.0  # a step may take longer; then what was published last is published again
HEALTH_SECONDS = 5.0
REACH_SECONDS = 10.0  # for a cluster to take a connection
_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
OBJECT_STORE_BYTES = 80 << 20  # of a local cluster: what crosses it is small


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The application; can be pickled.

    Attributes:
        setup: of each replica.
        name: of the model, for clients.
        replicas: how many.
        router: a name in `emoe.engine.placement.CHOICES`.
        cpus, gpus: of each replica.
        limits, key, local: as `make_app`; the front has them.
    """

    setup: Setup
    name: str
    replicas: int = 2
    router: str = "affinity"
    cpus: float = 1.0
    gpus: float = 0.0
    limits: Limits = field(default_factory=Limits)
    key: str | None = None
    local: bool = False

    def __post_init__(self) -> None:
        if self.router not in CHOICES:
            raise ConfigError(f"router={self.router!r} is not one of: {', '.join(CHOICES)}")
        if self.replicas < 1:
            raise ConfigError(f"replicas={self.replicas} is not a number of at least 1")


class Replica:
    """One engine, in a process of its own."""

    async def __init__(self, setup: Setup) -> None:  # type: ignore[misc] # Ray awaits it
        self._tokenizer = setup.tokenizer()
        self._model = setup.loaded()
        self._classifier = setup.classifier(self._model, self._tokenizer)
        self._engine = setup.engine(self._model, self._tokenizer)
        self._about = About.of(self._engine)
        self._grammars = Grammars(setup.tokenizer(), self._about.vocabulary, list(ends_of(self._about.config)))
        self._desk = Desk()
        self._says: dict[str, Any] = {}
        self._thread = EngineThread(self._engine)
        self._thread.start()

    async def answer(self, call: Call) -> AsyncIterator[Item]:
        def ready(jobs: Any) -> None:
            for job in jobs:
                self._grammars.bind(job.sampling.processors)

        self._desk.came(call.hint)
        try:
            async for item in answer(self._thread, call, ready):
                yield item
        finally:
            self._desk.left(call.hint)

    async def about(self) -> tuple[About, str, tuple[str, ...] | None]:
        """The model, the way its rows run, and the names that its classifier knows; None without one."""
        return self._about, self._engine.choice.way, None if self._classifier is None else self._classifier.names

    async def classify(self, text: str) -> str | None:
        task: str | None = (await asyncio.to_thread(self._classifier.classify, text)).task
        return task

    async def look(self) -> tuple[str, dict[str, Any]]:
        """Its name and `EngineThread.look`, with `served`: requests so far, by task."""
        name = serve.get_replica_context().replica_id.unique_id
        return name, {**await self._thread.look(), "served": dict(self._desk.served)}

    async def record_routing_stats(self) -> dict[str, Any]:
        """`routes.Published`, at most a step old."""
        asking = asyncio.ensure_future(self._thread.call(self._published))
        done, _ = await asyncio.wait([asking], timeout=STATS_PATIENCE)
        if done and asking.exception() is None:
            self._says = asking.result()
        return self._says

    def _published(self) -> dict[str, Any]:
        """In the engine's thread."""
        runtime, resident, expected = getattr(self._model, "emoe", None) or None, None, {}
        if runtime is not None:
            layers = runtime.residents()
            width = max((count for count, _ in layers), default=0)
            resident = number_of(
                ((layer, expert) for layer, (_, experts) in enumerate(layers) for expert in experts), width
            )
            if runtime.base.names:  # else all tasks are alike, and the fuller replica would seem the better one
                tasks = (UNKNOWN, *runtime.base.names)
                expected = {task: number_of(runtime.base.expected(task or None), width) for task in tasks}
        desk = self._desk
        return Published(
            self._engine.scheduler.most_running, resident, expected, dict(desk.served), desk.requests
        ).to_dict()

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self._thread.fault is not None:
            raise RuntimeError(f"the engine was given up: {one_line(self._thread.fault)}")

    async def __del__(self) -> None:
        if hasattr(self, "_thread"):
            await asyncio.to_thread(self._thread.stop)


class _FarClassifier:
    """A replica's classifier; for a thread that may wait."""

    def __init__(self, replicas: Any, names: tuple[str, ...]) -> None:
        self._replicas, self.names = replicas, names

    def classify(self, text: str) -> _Classified:
        try:
            return _Classified(self._replicas.classify.remote(text).result())
        except RayActorError:  # the replica that was asked ended; unknown is an answer
            return _Classified(None)


@dataclass(frozen=True)
class _Classified:
    task: str | None


class Front:
    """The server's app, over replicas. Has a tokenizer and no model."""

    async def __init__(self, replicas: Any, spec: Spec) -> None:  # type: ignore[misc] # Ray awaits it
        self._spec = spec
        about, self._way, names = await replicas.about.remote()
        answers = replicas.options(stream=True).answer

        async def look() -> Mapping[str, Mapping[str, Any]]:
            try:
                found = await replicas.broadcast("look").results_async(timeout_s=LOOK_SECONDS, return_exceptions=True)
            except (TimeoutError, DeploymentUnavailableError) as error:
                raise EmoeError(f"no replica says anything of itself: {one_line(error)}") from error
            return {each[0]: each[1] for each in found if not isinstance(each, BaseException)}

        def fleet(ended: Callable[..., None]) -> Fleet:
            return Fleet(answers.remote, look, ended, (RayActorError,), spec.limits.request_seconds)

        self._replicas = replicas
        self.service = Service(
            fleet, spec.setup.tokenizer(), about=about, name=spec.name, limits=spec.limits,
            classifier=None if names is None else _FarClassifier(replicas, names),
        )  # fmt: skip

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.service, key=self._spec.key, local=self._spec.local)

    async def way(self) -> str:
        """How rows run on the replicas."""
        return self._way

    async def drain(self) -> bool:
        """Takes no more requests; whether those that were taken ended in `limits.drain_seconds`."""
        self.service.draining = True
        until = time.monotonic() + self._spec.limits.drain_seconds
        while self.service.records and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self.service.records


def application(spec: Spec) -> Any:
    """The Ray Serve application, for `serve.run`; also on a cluster that is not started here."""
    limits = spec.limits
    replicas = serve.deployment(
        Replica, name="Replica", num_replicas=spec.replicas, max_ongoing_requests=limits.requests + limits.queue,
        max_constructor_retry_count=1, health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=limits.drain_seconds, graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": spec.cpus, "num_gpus": spec.gpus}, logging_config=_LOGGING,
        request_router_config=RequestRouterConfig(
            request_router_class="emoe.serve.ray_router.PlacementRouter", request_router_kwargs={"router": spec.router},
            request_routing_stats_period_s=STATS_SECONDS,
        ),
    )  # fmt: skip
    front = serve.deployment(
        serve.ingress()(Front), name="Front", max_ongoing_requests=2 * limits.requests,
        graceful_shutdown_timeout_s=limits.drain_seconds, graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0}, max_constructor_retry_count=1, logging_config=_LOGGING,
    )  # fmt: skip
    return front.bind(replicas.bind(spec.setup), spec)


def run(spec: Spec, host: str, port: int, ready: Callable[[str], None]) -> int:
    """Serves until a signal, on the cluster of RAY_ADDRESS or one of its own; the exit status. In the main thread.

    Args:
        ready: gets the way in which rows run, once requests are accepted.

    Raises:
        ConfigError: Ray cannot run the application; has Ray's reason.
    """
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what replicas log

        def told(way: str) -> None:
            with contextlib.redirect_stdout(stdout):
                ready(way)

        return _run(spec, host, port, told)


def _run(spec: Spec, host: str, port: int, ready: Callable[[str], None]) -> int:
    mine = _connect(spec)
    began = mine
    try:
        if running := serve.status().applications:
            raise ConfigError(
                f"the cluster of RAY_ADDRESS serves already: {', '.join(running)}; end that, or take another cluster"
            )
        serve.shutdown()  # one that serves nothing would keep the port that it was given
        began = True
        idle = max(1, int(spec.limits.keep_alive_seconds))
        options = HTTPOptions(host=host, port=port, keep_alive_timeout_s=idle)
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=_LOGGING)
        try:
            handle = serve.run(application(spec), name=APP, route_prefix="/")
        except RuntimeError as error:
            raise ConfigError(f"Ray does not run the replicas: {_reason() or one_line(error)}") from error
        with _Signals() as signals:  # until here an interrupt ends what was begun
            ready(handle.way.remote().result())
            signals.told.wait()
            print("emoe: finishing what runs; another Ctrl-C ends at once", file=sys.stderr, flush=True)
            draining = handle.drain.remote()
            while not signals.twice.is_set():
                try:
                    draining.result(timeout_s=0.2)
                    return 0
                except TimeoutError:
                    continue
            return EXIT_FORCED
    finally:
        if began and not mine:
            serve.delete(APP)
            if not serve.status().applications:
                serve.shutdown()
        ray.shutdown()  # a cluster of this process's own ends with it: nothing is left that could be lost


def _connect(spec: Spec) -> bool:
    """Connects to Ray; whether the cluster is this process's own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine that nobody asked for
    if address := os.environ.get("RAY_ADDRESS"):
        host, _, port = address.rpartition(":")
        try:
            if host and port.isdigit() and "//" not in host:  # Ray itself tries for many minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
            ray.init(log_to_driver=True)
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            raise ConfigError(f"RAY_ADDRESS={address!r}: no cluster is reached there: {one_line(error)}") from error
        return False
    # Ray's own is 15, with which replicas get next to no CPU beside any busy process.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(  # "local": else Ray joins a cluster that somebody else started on this machine
        address="local", num_cpus=max(1, int(spec.replicas * spec.cpus + 0.999)),
        object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, logging_level="warning",
    )  # fmt: skip
    return True


def _reason() -> str:
    """What Ray says of the application that failed."""
    found = serve.status().applications.get(APP)
    if found is None:
        return ""
    messages = [each.message for each in found.deployments.values() if each.message] or [found.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [""])[-1][:400]


class _Signals:
    """Hears of SIGINT and SIGTERM, once and twice."""

    def __init__(self) -> None:
        self.told, self.twice = threading.Event(), threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for each in (signal.SIGINT, signal.SIGTERM):
            self._before[each] = signal.signal(each, self._hear)
        return self

    def _hear(self, *_: object) -> None:
        (self.twice if self.told.is_set() else self.told).set()

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
