"""Errors as clients see them: a status and OpenAI's object. What only the operator should know stays in the log."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from emoe.errors import (
    BackendUnavailable,
    BudgetError,
    ClosedError,
    ConfigError,
    EmoeError,
    OverloadedError,
    one_line,
)
from emoe.serve.protocol import FIELDS

_LONGEST = 1000  # characters of a message: errors repeat what a client sent
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "overloaded_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class Refusal(EmoeError):
    """A request that is not served.

    Args:
        status: of HTTP.
        message: what is wrong and what to do, for the client.
        code: one word for programs.
        param: the field.
        retry_after: seconds.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def to_dict(self) -> dict[str, Any]:
        message = str(self).encode("utf-8", "replace").decode()
        return {
            "error": {
                "message": message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "...",
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {"cache-control": "no-store"}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.to_dict(), self.status, headers)


def refusal(error: BaseException) -> Refusal:
    """What a client is told of an error.

    Messages of errors that are a request's fault are handed on. Others may name files of the server: clients get the
    class alone.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValidationError):
        return _of_fields(error)
    if isinstance(error, OverloadedError):
        return Refusal(429, one_line(error), "overloaded", retry_after=error.retry_after)
    if isinstance(error, BudgetError):
        return Refusal(400, one_line(error), "request_too_large")
    if isinstance(error, FileNotFoundError):  # MissingFileError is a ConfigError, and names a file
        return _internal(error)
    if isinstance(error, ConfigError):
        return Refusal(400, one_line(error), "invalid_value")
    if isinstance(error, (ClosedError, BackendUnavailable)):
        return Refusal(
            503, f"the server cannot run its model now ({type(error).__name__})", "unavailable", retry_after=30
        )
    return _internal(error)


def _internal(error: BaseException) -> Refusal:
    return Refusal(
        500, f"the server failed at this request ({type(error).__name__}); its log says more", "internal_error"
    )


def _of_fields(error: ValidationError) -> Refusal:
    """What is wrong first, by the name of its field; of alternatives the one that fits best."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    same = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    # An alternative whose type is another was not meant; the one that got deepest was.
    first = min(same, key=lambda each: (each["type"].endswith("_type"), -len(_path(each["loc"]))))
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON in UTF-8: {first['msg']}", "invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    param = ".".join(_path(first["loc"]))
    if first["type"] == "extra_forbidden":
        param = ".".join([*_path(first["loc"][:-1]), str(first["loc"][-1])])
        return Refusal(400, f"there is no field {param!r}; leave it out", "unknown_field", param=param)
    named = message.split(" ", 1)[0]
    if not param and named in FIELDS:  # what fields say together begins with the name of one
        return Refusal(400, message, "invalid_value", param=named)
    return Refusal(400, f"{param}: {message}" if param else message, "invalid_value", param=param or None)


def _path(place: tuple[int | str, ...]) -> list[str]:
    """Fields and numbers on the way; without the names of a union's alternatives, which are no fields."""
    return [str(part) for part in place if isinstance(part, int) or part in FIELDS]
