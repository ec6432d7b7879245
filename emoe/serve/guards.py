"""What a request passes before the server reads it: the key, how many there are, and how large and slow its body is."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Callable

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emoe.serve.limits import Limits
from emoe.serve.refusals import Refusal, refusal

logger = logging.getLogger(__name__)

LOCAL = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/", "/health")  # without a key: a page without data, and what a load balancer asks


class Guards:
    """ASGI middleware.

    Args:
        app: gets requests that passed; their bodies are here whole.
        limits: of bodies and counts.
        key: that clients must bear; None: none.
        refused: told of the status of each request that did not pass.
        local: only requests to this machine by its own names pass. A page of any site can otherwise give its own name
            this machine's address, and is then of the same origin.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, key: str | None, refused: Callable[[int], None], local: bool = False
    ) -> None:
        self._app, self._limits, self._refused, self._local = app, limits, refused, local
        self._key = None if key is None else f"Bearer {key}".encode()
        self._requests = self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = 0
        looks = scope["method"] in ("GET", "HEAD")  # reports are there however much is asked for
        self._requests += not looks
        try:
            try:
                self._require_name(scope)
                self._require_key(scope)
                if not looks and self._requests > self._limits.requests:
                    raise Refusal(
                        429, f"{self._limits.requests} requests are being served, the most that may be; come again "
                        "later", "overloaded", retry_after=1,
                    )  # fmt: skip
                body = b""
                if not looks:
                    body = await self._read(scope, receive)
                    held = len(body)
                    self._bytes += held
            except Refusal as refusal:
                self._refused(refusal.status)
                response = refusal.response()
                response.headers["connection"] = "close"  # the rest of a body is not waited for
                await response(scope, receive, send)
                return
            if scope["method"] == "HEAD":  # as GET; the server leaves the body out
                scope = {**scope, "method": "GET"}
            await self._answered(scope, _replaying(body, receive), send)
        finally:
            self._requests -= not looks
            self._bytes -= held

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's answer, or what is told of an error that nothing in it expected.

        Starlette would raise it once more after its answer, and uvicorn then close the connection under the client.
        """
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if begun:
                raise
            logger.exception("emoe: %s failed", scope["path"])
            told = refusal(error)
            self._refused(told.status)
            await told.response()(scope, receive, send)

    def _require_name(self, scope: Scope) -> None:
        host = _header(scope, b"host").decode("latin-1")
        if self._local and re.sub(r":[0-9]{1,5}\Z", "", host.lower()) not in LOCAL:
            raise Refusal(
                403, f"this server is for its own machine, not for {host[:80]!r}; call it localhost, or give it a key",
                "forbidden_host",
            )  # fmt: skip

    def _require_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN:
            return
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        given = scheme.title() + b" " + key  # schemes are the same in small letters
        if not hmac.compare_digest(given, self._key):
            raise Refusal(401, "this server wants its API key: Authorization: Bearer KEY", "invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, or a refusal, before more of it than is allowed is in memory."""
        most = self._limits.body_bytes
        too_large = Refusal(413, f"the body is over {most} bytes, the most that is read", "body_too_large")
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        until = time.monotonic() + self._limits.body_seconds
        while True:
            try:
                with anyio.fail_after(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise Refusal(
                    408, f"the body did not come within {self._limits.body_seconds:g} seconds", "timeout"
                ) from None
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the body ended before its end", "incomplete_body")
            size += len(message.get("body", b""))
            if size > most:
                raise too_large
            if self._bytes + size > self._limits.all_body_bytes:
                raise Refusal(
                    429, f"bodies of requests hold {self._limits.all_body_bytes} bytes, the most that they may; come "
                    "again later", "overloaded", retry_after=1,
                )  # fmt: skip
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)


def _header(scope: Scope, wanted: bytes) -> bytes:
    """The first of this name; empty where there is none."""
    return next((bytes(value) for name, value in scope["headers"] if name == wanted), b"")


def _replaying(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
