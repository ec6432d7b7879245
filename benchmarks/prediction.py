"""What policies and predictors do for a running model: hits, loads and speed against LRU in the same budget.

python benchmarks/prediction.py --prompts PATH [--model DIR] [--resident 0.3 0.5] [--per-task 4] [--json FILE]

Prompts of all tasks in random order, greedy answers, routing `exact` (so the text is the same) and `resident`. Each row
is one model in one budget; the predictor has seen a trace of other prompts. Time is wall clock, in one run, against the
first row of its budget.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import emoe
from emoe import generate, native
from emoe.predictor.linear import LowRankLinear
from emoe.predictor.table import TaskTable
from emoe.tasks import load_prompts
from emoe.trace.trace import Trace

Chats = list[tuple[str, str]]  # (task, prompt)


def load_chats(path: Path, split: str, per_task: int, seed: int) -> Chats:
    """Prompts of one split, `per_task` of each task, in random order."""
    by_task: dict[str, list[str]] = defaultdict(list)
    for prompt in load_prompts(path, split):
        by_task[prompt.task].append(prompt.prompt)
    rng = random.Random(seed)
    chats = [(task, text) for task, texts in by_task.items() for text in rng.sample(texts, min(per_task, len(texts)))]
    rng.shuffle(chats)
    return chats


def answer(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)


def record(model: Any, tokenizer: Any, chats: Chats, args: argparse.Namespace) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "profile.npz")
        with model.emoe.record(path) as recorder:
            for number, (task, prompt) in enumerate(tqdm(chats, desc="profile", unit="prompt")):
                recorder.mark(task=task, prompt=number)
                answer(model, generate.encode(tokenizer, prompt)[:, -args.longest :], args.new_tokens)
        return emoe.load_trace(path)


def measure(chats: Chats, tokenizer: Any, args: argparse.Namespace, share: float, **options: Any) -> dict[str, Any]:
    model = emoe.from_pretrained(args.model, memory_budget=share, context=1024, **options)
    seconds = 0.0
    tokens = 0
    for number, (task, prompt) in enumerate(tqdm(chats, desc=f"{share:.0%}", unit="prompt", leave=False)):
        ids = generate.encode(tokenizer, prompt)[:, -args.longest :]
        started = time.perf_counter()
        with model.emoe.request(task=task, tokens=ids.shape[1] + args.new_tokens):
            answer(model, ids, args.new_tokens)
        if number:  # the first fills empty slots
            seconds += time.perf_counter() - started
            tokens += args.new_tokens
    stats = model.emoe.stats()
    model.emoe.close(restore=False)
    routing, prediction = stats["routing"], stats["prediction"]
    return {
        "resident": share,
        "routing": routing["mode"],
        "hit_rate": stats["hit_rate"],
        "misses_per_request": stats["misses"] / len(chats),
        "loads_per_request": stats["loads"] / len(chats),
        "stall_ms_per_request": stats["stall_ms"] / len(chats),
        "substituted_mass": routing["substituted_mass"],
        "seconds_per_request": seconds / (len(chats) - 1),
        "refreshes": prediction["refreshes"],
        "recall": prediction["recall"],
        "milliseconds": prediction["milliseconds"],
        "off": {task: each["off"] for task, each in prediction["tasks"].items() if each["off"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with task, prompt, split")
    parser.add_argument("--model", type=Path, help="checkpoint; default: the demo model")
    parser.add_argument("--resident", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--per-task", type=int, default=4, help="prompts measured; twice as many are profiled")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt, the last ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native.load().set_threads(args.threads)
    if args.model is None:
        from emoe import demo

        args.model = demo.build()
    tokenizer = generate.load_tokenizer(args.model)
    model = emoe.from_pretrained(args.model, memory_budget=1.0, context=1024)
    profile = record(model, tokenizer, load_chats(args.prompts, "train", 2 * args.per_task, 0), args)
    model.emoe.close(restore=False)
    predictors = {
        "none": lambda: None,
        "recent": lambda: "recent",
        "task-table": lambda: TaskTable.profile(profile),
        "linear": lambda: LowRankLinear.fit(profile),
    }
    cases = [("exact", "lru", "none", 1), ("exact", "next-use", "none", 1)]
    cases += [("exact", policy, name, 1) for name in list(predictors)[1:] for policy in ("lru", "next-use")]
    cases += [("resident", "next-use", "none", 1)]
    cases += [("resident", "next-use", name, period) for name in list(predictors)[1:] for period in (1, "adaptive")]
    chats = load_chats(args.prompts, "test", args.per_task, 1)
    rows = []
    for share in args.resident:
        for routing, policy, name, period in cases:
            options = {"routing": routing, "policy": policy, "predictor": predictors[name](), "period": period}
            what = {"policy": policy, "predictor": name, "period": period}
            rows.append(what | measure(chats, tokenizer, args, share, **options))
    table = Table(title=f"{len(chats)} prompts, {args.new_tokens} new tokens each", title_justify="left")
    for name in (
        "routing",
        "resident",
        "policy",
        "predictor",
        "period",
        "hit rate",
        "misses",
        "loads",
        "stall ms",
        "mass",
        "time",
    ):
        table.add_column(name, justify="left" if name in ("routing", "policy", "predictor") else "right")
    for row in rows:
        first = next(each for each in rows if (each["resident"], each["routing"]) == (row["resident"], row["routing"]))
        table.add_row(
            row["routing"], f"{row['resident']:.0%}", row["policy"], row["predictor"], str(row["period"]),
            f"{row['hit_rate']:.1%}",
            f"{row['misses_per_request']:.0f}", f"{row['loads_per_request']:.0f}", f"{row['stall_ms_per_request']:.0f}",
            f"{row['substituted_mass']:.1%}", f"{row['seconds_per_request'] / first['seconds_per_request']:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if args.json:
        write_result(args.json, {"prompts": len(chats), "rows": rows})


if __name__ == "__main__":
    main()
