"""What the server bounds, so that no client can make it grow or wait without end."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from emoe.errors import ConfigError


def _row(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Counts and bytes are at least 1, seconds over 0; the metadata of a field says what it bounds.

    Raises:
        ConfigError: a value is too small.
    """

    body_bytes: int = _row(1 << 20, "bytes of a request's body")
    all_body_bytes: int = _row(64 << 20, "bytes of the bodies of all requests that are being served")
    connections: int = _row(4096, "connections at once; further ones are closed with 503")
    requests: int = _row(2048, "requests being served at once, waiting ones included; further ones get 429")
    queue: int = _row(1024, "answers that wait for their first step; further ones get 429")
    choices: int = _row(16, "answers of one request: prompts times n")
    prompt_tokens: int | None = _row(None, "tokens of a prompt")
    output_tokens: int | None = _row(None, "tokens that a request may ask for")
    output_default: int = _row(512, "tokens for requests that do not say how many")
    tasks: int = _row(32, "names of tasks that requests may bring; those beyond are unknown tasks")
    header_seconds: float = _row(10.0, "seconds for the headers of a request")
    body_seconds: float = _row(30.0, "seconds for the body of a request")
    send_seconds: float = _row(30.0, "seconds in which a client takes nothing of its answer")
    request_seconds: float = _row(600.0, "seconds from a request to its last token")
    keep_alive_seconds: float = _row(15.0, "seconds that a connection may idle between requests")
    drain_seconds: float = _row(120.0, "seconds for what runs after the first signal")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not (value > 0 if each.name.endswith("_seconds") else value >= 1):
                raise ConfigError(f"{each.name}={value!r} is too small")
