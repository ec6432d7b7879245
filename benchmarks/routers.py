"""Routers of `emoe serve --ray` side by side: hit rates of two replicas on a mixed load.

    python benchmarks/routers.py [--routers round-robin,power-of-two,affinity] [--check]

Each router has a server of its own, one after the other, and answers the same requests in the same order from clients
that send the next when the last was answered: what is compared is hits, not times. Replicas have base sets by a task
table, counted here from every second prompt of a task; the load is made of the others.

The default model is made here: an OLMoE with random weights and 8 of 128 experts a token, and two tasks that write with
words of their own. The 30 % of experts that a task uses most serve 80 % of its picks and 31 % of the other's; in the
traces of Qwen3-30B-A3B 72 to 84 % and 16 to 32 %. Tasks of the demo model (--model demo) share most: 62 and 53 %.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from common import olmoe_config, write_result
from rich.console import Console
from rich.table import Table
from serving import Due, LoadError, Server, ask
from tqdm import tqdm

import emoe
from emoe import demo, generate
from emoe.analysis.recording import PROMPTS, record
from emoe.cli import common
from emoe.engine.placement import CHOICES
from emoe.predictor.table import TaskTable
from emoe.tasks import Prompt, load_prompts

POINTS = 10.0  # of hit rate, that affinity must be above round-robin
WORDS, LENGTH, TASKS = 96, 24, ("letters", "digits")  # of the made model's tasks, and of its prompts


def made_model(folder: Path) -> Path:
    """A checkpoint whose tokens are words of tasks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = ["<pad>", "<bos>", "<eos>"]
    words = special + [f"{task[0]}{number}" for task in TASKS for number in range(WORDS)]
    config = olmoe_config(layers=6, hidden=256, intermediate=128, vocab=len(words))
    config.num_experts = 128
    model = OlmoeForCausalLM(config)
    task_of = torch.tensor([-1] * len(special) + [task for task in range(len(TASKS)) for _ in range(WORDS)])
    # A direction of the embeddings is a task's, strong enough that no layer drowns it: routers, which are random, go by
    # it as much as by the word. It is in the head as well, so that an answer stays with the words of its task.
    axes = torch.linalg.qr(torch.randn(config.hidden_size, len(TASKS)))[0].T  # [tasks, hidden]
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.2)
        for task, axis in enumerate(axes):
            model.model.embed_tokens.weight[task_of == task] += 12 * axis
            model.lm_head.weight[task_of == task] += 4 * axis
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m.content }} {% endfor %}",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def made_prompts(count: int) -> list[Prompt]:
    """So many of each task."""
    random = np.random.default_rng(0)
    return [
        Prompt(task, " ".join(f"{task[0]}{word}" for word in random.integers(0, WORDS, LENGTH)))
        for task in TASKS
        for _ in range(count)
    ]


def table_of(model: str, prompts: Sequence[Prompt], path: Path) -> None:
    """Counts which experts each task's prompts use."""
    generate.quiet_transformers()
    loaded = emoe.from_pretrained(model, memory_budget=1.0)
    with common.closing(loaded):
        found = record(loaded, generate.load_tokenizer(model), prompts, path.with_suffix(".npz"))
    TaskTable.profile(found.trace).save(path)


def mixed(prompts: Sequence[Prompt], count: int, seed: int) -> list[Due]:
    """Requests of all tasks in random order, numbered so that no prefix is shared."""
    random = np.random.default_rng(seed)
    tasks: dict[str, list[Prompt]] = {}
    for each in prompts:
        tasks.setdefault(each.task, []).append(each)
    names = [str(name) for name in random.choice(sorted(tasks), count)]
    chosen = [tasks[name][int(random.integers(len(tasks[name])))] for name in names]
    return [Due(0.0, each.task, each.task, each.prompt) for each in chosen]


async def answered(client: httpx.AsyncClient, dues: Sequence[Due], clients: int, body: dict[str, Any]) -> None:
    """All of them, by so many clients.

    Raises:
        LoadError: one was not answered.
    """
    left = iter(tqdm(dues, unit="request", leave=False, disable=None))
    begun = time.monotonic()

    async def one() -> None:
        for due in left:
            answer = await ask(client, due, body, lambda: time.monotonic() - begun)
            if answer.outcome != "answered":
                raise LoadError(f"a request was not answered: {answer.outcome} {answer.why}")

    await asyncio.gather(*(one() for _ in range(clients)))


async def hits(router: str, words: Sequence[str], dues: Sequence[Due], args: argparse.Namespace) -> dict[str, Any]:
    """What one server comes to; the first fifth of the load warms it up."""
    log = Path(args.folder) / f"{router}.log"
    server = Server("slo+affinity", [*words, "--router", router], log)
    try:
        warm = len(dues) // 5
        body = {"max_tokens": args.tokens, "temperature": 1.0, "seed": args.seed, "ignore_eos": True}
        await answered(server.client, dues[:warm], args.clients, body)
        before, began = await server.settled(), time.monotonic()
        await answered(server.client, dues[warm:], args.clients, body)
        seconds = time.monotonic() - began
        after = await server.settled()
        counted = {name: after[name] - before[name] for name in after}
        served = [each["served"] for each in (await server._status())["replicas"]]
        await server.client.aclose()
    finally:
        server.end()
    hit, miss = counted["emoe_expert_hits_total"], counted["emoe_expert_misses_total"]
    return {
        "hit_rate": hit / (hit + miss),
        "read_bytes_per_token": counted["emoe_read_bytes_total"] / counted["emoe_output_tokens_total"],
        "tokens_per_second": counted["emoe_output_tokens_total"] / seconds,
        "served": served,
    }


def show(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    table = Table("router", "hit rate", "MB/token", "tok/s", "requests by replica and task")
    table.title = f"{args.model}, {args.replicas} replicas, {args.memory_budget} of experts, {args.clients} clients"
    for router, each in found.items():
        shares = "; ".join(
            ", ".join(f"{task} {n}" for task, n in sorted(one.items()) if task) for one in each["served"]
        )
        table.add_row(
            router, f"{each['hit_rate']:.1%}", f"{each['read_bytes_per_token'] / 1e6:.2f}",
            f"{each['tokens_per_second']:.1f}", shares,
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", default="round-robin,power-of-two,affinity", help="default: %(default)s")
    parser.add_argument("--model", default="made", help='"made", "demo" or a folder (default: %(default)s)')
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="of a model that is not made")
    parser.add_argument("--tasks", default="math,code", help="of --prompts (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=80, help="of each router (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="that ask at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--most-running", type=int, default=8, help="requests at once, a replica (default: %(default)s)"
    )
    parser.add_argument("--memory-budget", default="30%", help="of each replica (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--check", action="store_true", help=f"exit status 1 under {POINTS:g} points over round-robin")
    args = parser.parse_args()
    routers = args.routers.split(",")
    if unknown := [each for each in routers if each not in CHOICES]:
        parser.error(f"--routers: {', '.join(unknown)}; choices are {', '.join(CHOICES)}")
    if args.check and not {"round-robin", "affinity"} <= set(routers):
        parser.error("--check compares affinity with round-robin; --routers lacks one of them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else servers would outlive it
    with tempfile.TemporaryDirectory() as args.folder:
        if args.model == "made":
            model, prompts = str(made_model(Path(args.folder) / "made")), made_prompts(24)
        else:
            model = str(demo.build()) if args.model == "demo" else args.model
            prompts = [each for each in load_prompts(args.prompts) if each.task in args.tasks.split(",")]
        table = Path(args.folder) / "table.safetensors"
        table_of(model, prompts[::2], table)
        words = [
            "--ray", "--replicas", str(args.replicas), "--model", model, "--name", args.model, "--memory-budget",
            args.memory_budget, "--context", "512", "--batch", str(args.most_running), "--most-running",
            str(args.most_running), "--predictor", str(table), "--period", "1",
        ]  # fmt: skip
        dues = mixed(prompts[1::2], args.requests, args.seed)
        try:
            found = {router: asyncio.run(hits(router, words, dues, args)) for router in routers}
        except LoadError as error:
            parser.exit(2, f"{error}\n")
    show(found, args)
    missed = False
    if {"round-robin", "affinity"} <= set(routers):
        points = 100 * (found["affinity"]["hit_rate"] - found["round-robin"]["hit_rate"])
        missed = points < POINTS
        print("NO " if missed else "yes", f"affinity: {points:+.1f} points of hit rate; at least {POINTS:+g}")
    if args.json:
        write_result(args.json, {"options": {name: str(value) for name, value in vars(args).items()}, "routers": found})
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
