"""`emoe serve`: a model behind an HTTP server like OpenAI's."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from emoe import options
from emoe.cli import common
from emoe.engine.placement import CHOICES
from emoe.errors import ConfigError, one_line
from emoe.files import content
from emoe.serve.limits import Limits
from emoe.serve.setup import Setup

KEY_VARIABLE = "EMOE_API_KEY"
_LONGEST_KEY = 4096
_LOCAL = ("127.0.0.1", "localhost", "::1")
_OF_SOCKETS = ("connections", "header_seconds", "send_seconds")  # limits that the server's own sockets keep
_EPILOG = """\
examples:
  emoe serve --model ./Qwen3-30B-A3B --memory-budget 8GiB --port 8000
  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d '{
    "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
  EMOE_API_KEY=$(cat key) emoe serve --model ./Qwen3-30B-A3B --memory-budget 8GiB --host 0.0.0.0

  emoe serve --ray --replicas 4 --model ./Qwen3-30B-A3B --memory-budget 8GiB --predictor linear.safetensors

Clients of OpenAI work with base_url http://localhost:8000/v1; a status page is at http://localhost:8000/. The first
Ctrl-C or SIGTERM finishes what runs, the second ends at once. docs/serving.md has the rest. It needs emoe[serve], or
emoe[ray] with --ray.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    common.add_model_arguments(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    where.add_argument("--port", type=_port, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    where.add_argument("--name", metavar="NAME", help="of the model, for clients (default: the last part of --model)")
    where.add_argument(
        "--api-key-file", metavar="FILE", help=f"its first line is the key that clients must bear; so is {KEY_VARIABLE}"
    )

    how = parser.add_argument_group("how it runs")
    shown = ("memory_budget", "dtype")
    options.add_arguments(how, (name for name in options.rows("load") if name not in shown))
    how.add_argument("--scheduler", metavar="POLICY", help="which requests run first: fcfs, ... (docs/serving.md)")
    how.add_argument("--kv-budget", default="auto", metavar="BYTES", help="for the state of requests (default: auto)")
    how.add_argument("--most-running", type=common.positive, metavar="N", help="requests that run at once")
    how.add_argument("--tasks", metavar="FILE", help="of 'emoe profile tasks': names the task of requests that do not")
    common.add_trust_argument(how)

    ray = parser.add_argument_group("with Ray")
    ray.add_argument("--ray", action="store_true", help="replicas on the cluster of RAY_ADDRESS, or on this machine")
    ray.add_argument("--replicas", type=common.positive, metavar="N", help="engines, each with its budget (default: 2)")
    ray.add_argument(
        "--router", choices=tuple(CHOICES), help="who gets a request (default: affinity, by predicted experts and load)"
    )
    ray.add_argument(
        "--replica-cpus", type=common.positive, metavar="N", help="of each (default: those of this machine, shared)"
    )

    limits = parser.add_argument_group("limits")
    for each in fields(Limits):
        seconds = each.name.endswith("_seconds")
        limits.add_argument(
            f"--limit-{each.name.replace('_', '-')}", type=_seconds if seconds else common.positive,
            default=each.default, metavar="N",
            help=f"{each.metadata['help']} (default: {'the context' if each.default is None else each.default})",
        )  # fmt: skip


def _port(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds over 0")
    return value


def run(args: argparse.Namespace) -> int:
    key = _key(args.api_key_file)
    if args.context == 1:
        raise ConfigError("--context 1 leaves no room for an answer: a token of the prompt and one of the answer are 2")
    if not args.ray:
        for name in ("replicas", "router", "replica_cpus"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for --ray alone")
    else:
        for name in _OF_SOCKETS:
            if getattr(args, f"limit_{name}") != getattr(Limits, name):
                raise ConfigError(f"--limit-{name.replace('_', '-')} is not for --ray: Ray's proxy has the sockets")
    try:
        from emoe.serve.listen import listen
    except ModuleNotFoundError as missing:
        raise ConfigError(f"emoe serve needs {missing.name}: pip install 'emoe[serve]'") from missing

    limits = Limits(**{each.name: getattr(args, f"limit_{each.name}") for each in fields(Limits)})
    sock = listen(args.host, args.port, limits)  # before the model: what is wrong is said at once
    if key is None and args.host not in _LOCAL:
        print(
            f"emoe: {args.host} is open to other machines, and no key is asked for; set {KEY_VARIABLE}", file=sys.stderr
        )
    port = sock.getsockname()[1]
    setup = Setup(
        model=args.model, options={name: getattr(args, name) for name in options.rows("load")},
        trust_remote_code=args.trust_remote_code, scheduler=args.scheduler, kv_budget=args.kv_budget,
        most_running=args.most_running, queue=limits.queue, tasks=args.tasks,
    )  # fmt: skip
    local = key is None and args.host in _LOCAL

    def ready(way: str) -> None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{port}"
        name = args.name or setup.name
        if args.json:
            common.print_json({"url": url, "model": name, "way": way})
        else:
            print(f"{name} at {url}/v1, its status at {url}/", flush=True)
        sys.stdout.flush()

    if args.ray:
        sock.close()  # Ray listens there
        return _serve_on_ray(args, setup, limits, key, local, port, ready)
    with sock:
        return _serve(args, setup, limits, key, local, sock, ready)


def _serve(
    args: argparse.Namespace, setup: Setup, limits: Limits, key: str | None, local: bool, sock: Any,
    ready: Callable[[str], None],
) -> int:  # fmt: skip
    from emoe.serve.app import make_app
    from emoe.serve.listen import EXIT_FORCED, serve
    from emoe.serve.service import Service

    with common.stage(f"loading {args.model}; nothing was served"):
        tokenizer = setup.tokenizer()
        with common.checkpoint_errors(args.model):
            model = setup.loaded()
    with common.closing(model):
        classifier = setup.classifier(model, tokenizer)
        engine = setup.engine(model, tokenizer)
        service = Service.of(engine, tokenizer, name=args.name or setup.name, limits=limits, classifier=classifier)
        status = serve(make_app(service, key=key, local=local), service, sock, lambda: ready(engine.choice.way))
    if status == EXIT_FORCED:
        sys.stdout.flush()
        os._exit(status)  # Python takes seconds to take torch down, and who asked twice wants it over
    return status


def _serve_on_ray(
    args: argparse.Namespace, setup: Setup, limits: Limits, key: str | None, local: bool, port: int,
    ready: Callable[[str], None],
) -> int:  # fmt: skip
    try:
        from emoe.serve.on_ray import Spec, run
    except ModuleNotFoundError as missing:
        raise ConfigError(f"emoe serve --ray needs {missing.name}: pip install 'emoe[ray]'") from missing

    replicas = args.replicas or 2
    spec = Spec(
        setup=setup, name=args.name or setup.name, replicas=replicas, router=args.router or "affinity",
        cpus=args.replica_cpus or max(1, (os.cpu_count() or 1) // replicas), gpus=float(args.device != "cpu"),
        limits=limits, key=key, local=local,
    )  # fmt: skip
    with common.stage(f"loading {args.model}; nothing was served"):
        return run(spec, args.host, port, ready)


def _key(file: str | None) -> str | None:
    """The API key; None: none is asked for."""
    key = os.environ.get(KEY_VARIABLE)
    if file is not None:
        if key is not None:
            raise ConfigError(f"{KEY_VARIABLE} and --api-key-file both give a key; use one of them")
        try:
            key = content(file, "API key", ConfigError, most=_LONGEST_KEY, piped=True).decode().strip().split("\n")[0]
        except (ConfigError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file!r} cannot be read: {one_line(error)}") from error
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError("the API key is no word of at least 8 printable ASCII characters")
    return key
