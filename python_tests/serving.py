"""What tests of the server share: a tiny model that chats, a server in a thread, clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import httpx
import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import emoe
from emoe.engine.generation import Event
from emoe.serve.app import make_app
from emoe.serve.limits import Limits
from emoe.serve.listen import Server, listen
from emoe.serve.service import Service

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no') }}"
    "{% endif %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


def save_model(folder: Path) -> Path:
    """An OLMoE whose tokens are characters of ASCII, pairs of them, and the two bytes of "é"; with a chat template."""
    families.save("olmoe", folder, torch.float32)
    pad, bos, eos = "<pad>", "<bos>", "<eos>"
    words = {pad: 0, bos: 1, eos: 2} | {chr(code): code - 30 for code in range(33, 127)} | {"Ġ": 97, "Ċ": 98}
    words |= {"Ã": 99, "©": 100} | {f"{chr(code)}{chr(code)}": code - 3 for code in range(104, 131 - 1)}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def loaded(folder: Path, **options: Any) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer), with half of its experts in memory."""
    model = emoe.from_pretrained(folder, **{"memory_budget": 0.5, "context": 256, "batch": 8} | options)
    try:
        yield model, PreTrainedTokenizerFast.from_pretrained(folder)
    finally:
        model.emoe.close(restore=False)


def engine_of(model: Any, tokenizer: Any, **options: Any) -> emoe.Engine:
    return emoe.Engine(model, tokenizer, **options)


class Running:
    """A server that runs in a thread.

    Attributes:
        url: of it.
        client: OpenAI's, without tries after the first.
        http: for what that one does not send.
    """

    def __init__(self, server: Server, service: Service, port: int, key: str | None) -> None:
        self.server, self.service, self.port = server, service, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=60)
        self.http = httpx.Client(
            base_url=self.url, timeout=60, headers={} if key is None else {"authorization": f"Bearer {key}"}
        )

    def chat(self, text: str = "hello", **given: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 8} | given)

    def connect(self, data: bytes = b"") -> socket.socket:
        """A plain connection, with something sent already."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        made.sendall(data)
        return made

    def records(self) -> list[Any]:
        return list(self.service.records.values())

    def until_idle(self) -> None:
        """Waits until the engine has nothing left."""
        until(lambda: not self.records())
        until(lambda: self.http.get("/status").json()["scheduler"].get("running", 0) == 0)


def until(true: Any, seconds: float = 30.0) -> None:
    """Waits for a condition, and fails where it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


@contextlib.contextmanager
def running(
    engine: Any, tokenizer: Any, *, key: str | None = None, local: bool = False, classifier: Any = None, **limits: Any
) -> Iterator[Running]:
    """A server of an engine, which is closed with it."""
    bounds = Limits(**limits)
    service = Service.of(engine, tokenizer, name=NAME, limits=bounds, classifier=classifier)
    with served(make_app(service, key=key, local=local), service, bounds, key) as found:
        yield found


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    """A thread that does it."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def served(app: Any, service: Service, bounds: Limits, key: str | None = None) -> Iterator[Running]:
    """An app on a port of its own."""
    sock = listen("127.0.0.1", 0, bounds)
    port = sock.getsockname()[1]
    ready = threading.Event()
    server = Server(app, service, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        found = Running(server, service, port, key)
        yield found
        found.client.close()
        found.http.close()
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


class FakeEngine:
    """The interface of `emoe.Engine` without a model: each request gives tokens 3, 4, 5, ... as text "x".

    Attributes:
        open: cleared, steps do nothing.
        faults: errors that the next steps raise, one a step.
        refusals: errors that the next submissions raise.
        failing: error with which the next token of a request with this text in its prompt ends it.
        text: of a token.
        pace: seconds of a step.
    """

    def __init__(self, model: Any, tokenizer: Any, text: str = "x", pace: float = 0.0) -> None:
        self.model, self.tokenizer, self.text, self.pace = model, tokenizer, text, pace
        self.context = 256
        self.open = threading.Event()
        self.open.set()
        self.faults: list[BaseException] = []
        self.refusals: list[BaseException] = []
        self.failing: dict[str, BaseException] = {}
        self.live: dict[Any, list[Any]] = {}
        self.given: dict[Any, dict[str, Any]] = {}
        self.most_live = 0
        self.cancelled: list[Any] = []
        self.closed = False
        self._events: list[Event] = []

    @property
    def busy(self) -> bool:
        return bool(self.live or self._events)

    def submit(self, prompt: Any, *, id: Any, max_new_tokens: int, **given: Any) -> Any:
        if self.refusals:
            raise self.refusals.pop(0)
        self.live[id] = [list(prompt), max_new_tokens, 0]
        self.given[id] = given
        self.most_live = max(self.most_live, len(self.live))
        return id

    def step(self) -> list[Event]:
        if self.faults:
            raise self.faults.pop(0)
        time.sleep(self.pace)
        events, self._events = self._events, []
        if not self.open.is_set():
            time.sleep(0.002)
            return events
        for id, row in list(self.live.items()):
            prompt = self.tokenizer.decode(row[0])
            error = next((error for text, error in self.failing.items() if text in prompt), None)
            if error is not None:
                del self.live[id]
                events.append(Event(id, finish_reason="error", error=error, prompt_tokens=len(row[0])))
                continue
            row[2] += 1
            reason = "length" if row[2] == row[1] else None
            if reason:
                del self.live[id]
            events.append(
                Event(id, (2 + row[2],), self.text, finish_reason=reason, prompt_tokens=len(row[0]),
                      output_tokens=row[2])
            )  # fmt: skip
        return events

    def cancel(self, id: Any) -> None:
        if self.live.pop(id, None) is not None:
            self.cancelled.append(id)
            self._events.append(Event(id, finish_reason="cancelled"))

    def stats(self) -> dict[str, Any]:
        return {"way": "fake", "steps": 0, "scheduler": {"running": len(self.live), "waiting": 0}, "kv": {}}

    def close(self) -> None:
        self.closed = True
