"""The HTTP side: paths, headers, streams, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from emoe import __version__
from emoe.errors import EmoeError
from emoe.serve.guards import Guards
from emoe.serve.protocol import ChatRequest, CompletionRequest, Milliseconds, TaskName
from emoe.serve.refusals import Refusal, refusal
from emoe.serve.service import Begun, Service, failure
from emoe.serve.shapes import Choice

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ALIVE_SECONDS = 10.0  # of silence, after which a stream says that it lives
_PIECE = 16384  # bytes given to the connection at once
_HEADERS: dict[str, tuple[str, TypeAdapter[Any]]] = {
    "x-emoe-task": ("task", TypeAdapter(TaskName)),
    "x-slo-ttft-ms": ("ttft_slo_ms", TypeAdapter(Milliseconds)),
    "x-slo-tpot-ms": ("tpot_slo_ms", TypeAdapter(Milliseconds)),
    "x-slo-ttlt-ms": ("ttlt_slo_ms", TypeAdapter(Milliseconds)),
}
_ERRORS = {
    400: "something about the request cannot be served; `error.message` says what",
    401: "the API key is missing or wrong",
    403: "the server is for its own machine alone",
    404: "there is no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too much is asked for now; Retry-After says when to come again",
    500: "the server failed",
    503: "the server ends, or its engine was given up",
    504: "the answer took too long",
}


def make_app(service: Service, *, key: str | None = None, local: bool = False) -> FastAPI:
    """Args:
    service: is started and stopped with the app.
    key: that clients must bear; None: none.
    local: only requests that call this machine by its own names are served.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="emoe", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_middleware(Guards, limits=service.limits, key=key, refused=service.metrics.refused, local=local)
    app.state.service = service
    _answer_errors(app, service)
    _add_answers(app, service)
    _add_reports(app, service)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


# Answers


def _add_answers(app: FastAPI, service: Service) -> None:
    def takes(model: type[BaseModel]) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        header = {name: each.json_schema() for name, (_, each) in _HEADERS.items()}
        return {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "parameters": [{"in": "header", "name": name, "schema": form} for name, form in header.items()],
        }

    def post(path: str, model: type[BaseModel]) -> Callable[..., Any]:
        errors: dict[int | str, dict[str, Any]] = {status: {"description": what} for status, what in _ERRORS.items()}
        content = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
        errors[200] = {"description": "the answer; with stream=true, server-sent events", "content": content}
        return app.post(path, responses=errors, openapi_extra=takes(model), response_class=Response)

    @post("/v1/chat/completions", ChatRequest)
    async def chat(request: Request) -> Response:
        body = await _body(request, ChatRequest)
        return await _answer(request, service, body, lambda given: service.chat(body, given))

    @post("/v1/completions", CompletionRequest)
    async def complete(request: Request) -> Response:
        body = await _body(request, CompletionRequest)
        return await _answer(request, service, body, lambda given: service.complete(body, given))


B = TypeVar("B", bound=BaseModel)


async def _body(request: Request, model: type[B]) -> B:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other kinds can be sent by a page of any site that the user has open
        raise Refusal(415, f"content-type is {kind[:80]!r}; send application/json", "invalid_content_type")
    return model.model_validate_json(await request.body())


async def _answer(
    request: Request,
    service: Service,
    body: ChatRequest | CompletionRequest,
    begin: Callable[[Mapping[str, Any]], Coroutine[Any, Any, Begun]],
) -> Response:
    if service.draining:
        raise Refusal(503, "the server ends and takes no more requests", "draining", retry_after=10)
    if body.model not in (None, service.name):
        raise Refusal(
            404, f"there is no model {body.model!r}; this server has {service.name!r}", "model_not_found", param="model"
        )
    until = time.monotonic() + service.limits.request_seconds
    begun = await _unless_gone(request.receive, begin(_from_headers(request)))
    if begun is None:
        return Response(status_code=499)
    answer = _Answer(begun, until, service)
    if body.stream:
        counted = body.stream_options is not None and body.stream_options.include_usage
        return _Stream(answer, counted)
    try:
        whole = await _unless_gone(request.receive, answer.whole())
    finally:
        begun.inbox.close()
    return Response(status_code=499) if whole is None else JSONResponse(whole, headers={"cache-control": "no-store"})


def _from_headers(request: Request) -> dict[str, Any]:
    given = {}
    for header, (name, form) in _HEADERS.items():
        value = request.headers.get(header)
        if value is None:
            continue
        try:
            given[name] = form.validate_strings(value)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise Refusal(400, f"header {header}: {message}", "invalid_header", param=header) from None
    return given


class _Answer:
    """The answers of one request, as they come."""

    def __init__(self, begun: Begun, until: float, service: Service) -> None:
        self.inbox, self.shape, self._per_prompt = begun
        self._until, self._service = until, service
        self.choices = [Choice(number) for number in range(len(self.inbox.jobs))]
        self._of = {job.id: choice for job, choice in zip(self.inbox.jobs, self.choices, strict=True)}

    async def whole(self) -> dict[str, Any]:
        while not self.ended:
            await self._take(None)
        return self.shape.whole(self.choices, self._per_prompt)

    async def pieces(self, counted: bool) -> AsyncIterator[str]:
        """JSON of a stream's pieces; "" where nothing came for a while."""
        begun: set[int] = set()
        while not self.ended:
            new = await self._take(_ALIVE_SECONDS)
            if not new:
                yield ""
            for choice in new:
                yield json.dumps(self.shape.piece(choice, choice.index not in begun, counted), ensure_ascii=False)
                begun.add(choice.index)
                choice.clear()
        if counted:
            yield json.dumps(self.shape.last_piece(self.choices, self._per_prompt))

    @property
    def ended(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    async def _take(self, patience: float | None) -> list[Choice]:
        """Takes events in; the choices that have something new, none where nothing came."""
        left = self._until - time.monotonic()
        if left <= 0:
            seconds = self._service.limits.request_seconds
            raise Refusal(504, f"the answer took longer than {seconds:g} seconds", "timeout")
        events = await self.inbox.take(left if patience is None else min(left, patience))
        new: dict[int, Choice] = {}
        for event in events:
            if event.finish_reason == "error":
                raise failure(event)
            if event.finish_reason == "cancelled" and event.error is not None:
                raise event.error  # the server ends
            choice = self._of[str(event.id)]
            choice.add(event)
            new[choice.index] = choice
        # Tokens whose text is still to come make no piece of their own, unless log-probabilities were asked for.
        return [each for each in new.values() if each.text or each.finish_reason or each.logprobs]


class _Stream(Response):
    """Server-sent events; a client that leaves, or takes nothing, cancels its request."""

    def __init__(self, answer: _Answer, counted: bool) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._answer, self._counted = answer, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send(send))
        finally:
            self._answer.inbox.close()

    async def _send(self, send: Send) -> bool:
        seconds = self._answer._service.limits.send_seconds

        async def write(text: str, more: bool = True) -> None:
            data = text.encode("utf-8", "replace")
            for at in range(0, len(data), _PIECE) if data else (0,):
                last = not more and at + _PIECE >= len(data)
                part = {"type": "http.response.body", "body": data[at : at + _PIECE], "more_body": not last}
                with anyio.fail_after(seconds):
                    await send(part)

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for piece in self._answer.pieces(self._counted):
                await write(f"data: {piece}\n\n" if piece else ": waiting\n\n")
            end = "data: [DONE]\n\n"
        except TimeoutError:
            logger.warning("emoe: a client took nothing for %g seconds; its request is cancelled", seconds)
            return False
        except Exception as error:
            told = refusal(error)
            if told.status >= 500:
                logger.error("emoe: the stream of %s failed", self._answer.shape.id, exc_info=error)
            end = f"data: {json.dumps(told.to_dict())}\n\n"
        try:
            await write(end, more=False)
        except TimeoutError:
            logger.warning("emoe: a client took nothing for %g seconds", seconds)
        return True


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None where the client left first, and `work` was cancelled for it."""
    doing = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait([doing, leaving], return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Reports


def _add_reports(app: FastAPI, service: Service) -> None:
    page = (Path(__file__).parent / "page.html").read_text("utf-8")
    policy = _content_policy(page)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        headers = {"content-security-policy": policy, "cache-control": "no-cache", "x-content-type-options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    @app.get("/status")
    async def status() -> Response:
        return JSONResponse(await service.status(), headers={"cache-control": "no-store"})

    @app.get("/health", responses={503: {"description": "draining, or the engine was given up"}})
    async def health() -> Response:
        state = "failed" if service.fault is not None else "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        text = service.metrics.text(await service.snapshot())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", responses={404: {"description": _ERRORS[404]}})
    async def model(name: str) -> Response:
        if name != service.name:
            raise Refusal(
                404, f"there is no model {name!r}; this server has {service.name!r}", "model_not_found", param="model"
            )
        return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.began, "owned_by": "emoe"}


def _content_policy(page: str) -> str:
    """Only this page's own script and style run in it."""
    sources = {"script": "script-src", "style": "style-src"}
    parts = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    parts.append("frame-ancestors 'none'")
    for tag, source in sources.items():
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        parts.append(" ".join([source, *(f"'sha256-{digest}'" for digest in digests)]))
    return "; ".join(parts)


# Errors and the schema


def _answer_errors(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        told = refusal(error)
        if told.status >= 500:
            logger.error("emoe: %s failed", request.url.path, exc_info=error)
        service.metrics.refused(told.status)
        return told.response()

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: "method_not_allowed"}
        told = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}",
                       codes.get(error.status_code, "invalid_request"))  # fmt: skip
        service.metrics.refused(told.status)
        response = told.response()
        response.headers.update(error.headers or {})
        return response

    handler: Callable[[Request, Exception], Awaitable[Response]] = answer
    for kind in (EmoeError, ValidationError):
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(HTTPException, answer_http)


def _schema(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        forms = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
        _, found = models_json_schema(forms, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        made.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
        app.openapi_schema = made
    return app.openapi_schema
