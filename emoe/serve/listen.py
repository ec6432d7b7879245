"""The socket: uvicorn with bounded connections, timeouts for headers, and signals that drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from emoe.errors import ConfigError
from emoe.serve.limits import Limits
from emoe.serve.service import Service

_uvicorns = logging.getLogger("uvicorn.error")

EXIT_FORCED = 130
_BACKLOG = 512
_AT_ONCE_SECONDS = 2.0  # for a step in progress, after the second signal
_CUT_SECONDS = 5  # for clients to get the end of an answer that was cut off


def listen(host: str, port: int, limits: Limits) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client that takes nothing loses its connection, even where everything was handed to the system.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * limits.send_seconds))
        made.bind((host, port))
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error
    return made


def _protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's connections, fewer than `limits.connections`, each with a time for headers."""

    class Connection(H11Protocol):
        _waits: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                transport.close()
            else:
                self._await_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._headers_came()
            elif self._waits is None:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_came()
            super().connection_lost(exc)

        def _await_headers(self) -> None:
            self._waits = self.loop.call_later(limits.header_seconds, self._no_headers)

        def _headers_came(self) -> None:
            if self._waits is not None:
                self._waits.cancel()
                self._waits = None

        def _no_headers(self) -> None:
            self._waits = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Connection


class Server(uvicorn.Server):
    """The first signal drains, the second ends at once.

    Args:
        app: of `make_app`.
        service: its.
        ready: called when connections are accepted.
    """

    def __init__(self, app: FastAPI, service: Service, ready: Callable[[], None] = lambda: None) -> None:
        limits = service.limits
        _uvicorns.setLevel(logging.ERROR)  # a line for each client that sends no HTTP helps nobody
        super().__init__(
            uvicorn.Config(
                app, http=_protocol(limits), ws="none", lifespan="on", loop="asyncio", log_config=None,
                access_log=False, server_header=False, proxy_headers=False,
                timeout_keep_alive=max(1, int(limits.keep_alive_seconds)),
                timeout_graceful_shutdown=max(1, int(limits.drain_seconds)) + _CUT_SECONDS,
            )
        )  # fmt: skip
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            _uvicorns.setLevel(logging.CRITICAL)  # it would show where each request was when it was cancelled
            self.force_exit = True
            # From Python 3.12 on asyncio waits for connections of a server that is closed.
            self._loop.call_soon_threadsafe(self._drop)
            return
        self.should_exit = self._service.draining = True
        self._loop.call_soon_threadsafe(self._loop.call_later, self._service.limits.drain_seconds, self._cut)
        print("emoe: finishing what runs; another Ctrl-C ends at once", file=sys.stderr, flush=True)

    def _cut(self) -> None:
        """The time to drain is over."""
        if count := self._service.cut():
            print(f"emoe: {count} answers were not finished in time", file=sys.stderr, flush=True)

    def _drop(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without uvicorn's second raising of them: after a drain the process ends as it should.

        Only the main thread hears of signals; in another the caller sets `should_exit`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def serve(app: FastAPI, service: Service, sock: socket.socket, ready: Callable[[], None]) -> int:
    """Serves until a signal; the exit status. In the main thread.

    A second signal does not wait for a step in progress: the process ends where that takes longer than a moment.
    """
    server = Server(app, service, ready)
    server.run(sockets=[sock])
    if not server.force_exit:
        return 0
    if not service.stop(_AT_ONCE_SECONDS):
        print("emoe: ended in the middle of a step", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_FORCED)  # the step's thread cannot be ended otherwise
    return EXIT_FORCED
