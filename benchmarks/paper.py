"""The paper's headline table: what a memory gives with all experts in it, and what with a part of them.

    python benchmarks/paper.py             # all of it: some 20 minutes on two cores that nobody else uses
    python benchmarks/paper.py --quick     # a few minutes: one share, fewer requests
    python benchmarks/paper.py --check     # exit status 1 where the paper's figures are not reached

Two parts, each in one memory cgroup (page cache included), or in the same budget within the process where cgroups
cannot be made; a cell is what was measured, or what was said when it was refused.

memory: a model of random weights with many heads of keys, so that a few thousand tokens of state are as dear as experts
    (1.5 GB, of which 1.2 are experts; 128 KiB of keys and values a token). The memory is what Transformers with
    everything in it takes of its own to answer a prompt of 64 tokens with 16 more, so what is left for keys and values
    is little, and that is what the ratios stand on. The cgroup has 96 MiB more, for pages of files. In it,
    Transformers, accelerate's disk offload, and emoe with 100, 80, 60, 40 and 20 % of experts:
    the longest prompt, the most requests of 64 and 16 tokens that run at once, tokens/s of those together, and the
    time of a token of one alone. emoe's lengths come from its plan, and then they run, in the cgroup; one token more is
    tried, too. Routing is random, so no prediction can help: experts are loaded on demand.
serving: the demo model, in what it takes with all experts and the state of two requests. 28 real requests of seven
    tasks at once: `on demand` is an LRU and first come, first served; `emoe` has base sets and `slo+affinity`. Both
    keep the same contract in each mode: `exact`; `biased` with what docs/quality.md found for the share; `resident`.
    Perplexity is over the full model's, on chats whose tasks' experts were counted on other chats.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from common import MIB
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

PROMPT, NEW = 64, 16  # tokens of a request in part memory
HOT = 100.0  # temperature: a model of random weights left alone repeats one token, whose experts stay in memory
CHUNK = 128  # rows of a step, and tokens of a prompt's chunk
STOCK_SECONDS = 90.0  # of trying longer prompts, and more requests
EMOE_SECONDS = 420.0  # of a share
GROWTH = 1.15  # from one prompt that is tried to the next, where only trying tells
ACCELERATE_SHARES = (0.6, 0.45, 0.3)  # of the memory, that accelerate may fill; the first that runs counts
FILES = 96 * MIB  # of the cgroup, beside memory of its own: pages of files in use, and what the kernel keeps
NOISE = 2 * MIB  # by which one run of Transformers takes more than another
SHARES = (0.8, 0.6, 0.4, 0.2)
SERVED_CONTEXT = 160  # tokens of a request in part serving, at most
WIDEST = 64  # requests at once in part serving
SAVED, LONGER, LARGER, FASTER, LATENCY = 0.8, 40.0, 4.5, 1.5, -0.17  # the paper's figures


def geometry() -> Any:
    """8 layers, 96 experts of 256, 8 of them a token; 16 heads of 256 of queries and of keys."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, moe_intermediate_size=256, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=16, head_dim=256, num_experts=96, num_experts_per_tok=8,
        max_position_embeddings=32768, dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


# Children: each prints lines of JSON as it gets on, so that one that is killed has told what it could do.


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def own_bytes() -> int:
    """Memory of this process that no file backs, now."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


@contextlib.contextmanager
def own_memory() -> Iterator[list[int]]:
    """The most of `own_bytes` meanwhile, looked at 50 times a second; in a list of one."""
    most, over = [own_bytes()], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], own_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def random_ids(count: int, seed: int) -> list[int]:
    import numpy as np

    found: list[int] = np.random.default_rng(seed).integers(3, 8000, count).tolist()
    return found


def stock_child(args: argparse.Namespace) -> None:
    """Transformers, or accelerate's offload with --setting bytes to fill: one request, longer ones, more of them."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    with own_memory() as most, tempfile.TemporaryDirectory(dir=args.model) as folder:
        if args.setting:
            memory = {"cpu": int(args.setting)}
            options = {"device_map": "auto", "max_memory": memory, "offload_folder": folder}
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, **options).eval()

        def run(batch: int, prompt: int, new: int) -> float:
            ids = torch.tensor([random_ids(prompt, seed) for seed in range(batch)])
            started = time.perf_counter()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True,
                temperature=HOT, top_k=0,
            )  # fmt: skip
            return time.perf_counter() - started

        def fits() -> bool:
            return not args.most_bytes or most[0] <= args.most_bytes

        if args.do == "fit":
            run(1, PROMPT, NEW)
            tell(own_bytes=most[0])
        elif args.do == "prompts":
            length, growth = float(PROMPT), 2.0 if args.setting else GROWTH
            while True:
                seconds = run(1, int(length), 1)
                if not fits():
                    tell(refusal=f"a prompt of {int(length)} takes {most[0]} bytes")
                    break
                tell(prompt=int(length), seconds=seconds)
                length *= growth
        else:
            first, whole = run(1, PROMPT, 1), run(1, PROMPT, NEW)
            if fits():
                tell(batch=1, tokens_per_second=NEW / whole, token_seconds=(whole - first) / (NEW - 1))
            batch = 2
            while fits():
                seconds = run(batch, PROMPT, NEW)
                if not fits():
                    tell(refusal=f"{batch} requests take {most[0]} bytes")
                    break
                tell(batch=batch, tokens_per_second=batch * NEW / seconds)
                batch += max(1, batch // 4)


def emoe_child(args: argparse.Namespace) -> None:
    """One share of experts: the longest prompt that was planned, or the most requests and one alone.

    Not one after the other: the C library keeps some of the memory that many requests gave back.
    """
    with own_memory() as most:
        run_emoe(args)
        tell(own_bytes=most[0])


def run_emoe(args: argparse.Namespace) -> None:
    import emoe
    from emoe.engine.sampling import Sampling
    from emoe.errors import EmoeError

    model = emoe.from_pretrained(args.model, memory_budget=args.share, context=args.context, prefill_chunk=CHUNK)
    plan = model.emoe.plan
    with emoe.Engine(model, scheduler="fcfs", kv_budget=plan.kv_bytes, chunk_rows=CHUNK) as engine:

        def run(count: int, prompt: int, new: int) -> tuple[int, float, float]:
            """Most that ran at once, seconds of all, seconds from the first token to the last."""
            for seed in range(count):
                hot = Sampling(temperature=HOT, seed=seed, eos=())
                engine.submit(random_ids(prompt, seed), max_new_tokens=new, sampling=hot)
            started, first, most = time.perf_counter(), 0.0, 0
            while engine.busy:
                failed = [event.error for event in engine.step() if event.finish_reason == "error"]
                if failed:
                    raise RuntimeError(failed[0])
                now = time.perf_counter()
                first = first or (now if engine.stats()["output_tokens"] else 0.0)
                most = max(most, len(engine.scheduler.running))
            return most, now - started, now - first

        tell(resident_share=plan.resident_share, budget_bytes=plan.budget_bytes)
        if args.do == "prompts":
            try:
                engine.submit(random_ids(args.context, 0), max_new_tokens=1)
                raise RuntimeError(f"a prompt of {args.context} tokens and one more were not refused")
            except EmoeError as error:
                tell(refusal=str(error))
            tell(prompt=args.context - 1, seconds=run(1, args.context - 1, 1)[1])
        else:
            tell(token_seconds=run(1, PROMPT, NEW)[2] / (NEW - 1))
            fit = min(plan.kv_bytes // engine.footprint.nbytes(PROMPT + NEW, CHUNK), CHUNK)
            most, seconds, _ = run(fit + 1, PROMPT, NEW)
            if most != fit:
                raise RuntimeError(f"{most} requests ran at once, of {fit} that {plan.kv_bytes} bytes have room for")
            tell(batch=most, tokens_per_second=(fit + 1) * NEW / seconds)
    model.emoe.close(restore=False)


def served_child(args: argparse.Namespace) -> None:
    """Real requests at once on the demo model in one mode; `--do` on-demand or emoe."""
    import numpy as np
    import torch
    from quality import CONTRACTS

    import emoe
    from emoe.analysis.recording import PROMPTS, encode
    from emoe.engine.sampling import Sampling
    from emoe.errors import EmoeError
    from emoe.generate import load_tokenizer
    from emoe.tasks import load_prompts

    tokenizer, found = load_tokenizer(args.model), load_prompts(PROMPTS)
    order = np.random.default_rng(0).permutation(len(found))[: args.requests]
    asked = [(found[each].task, encode(tokenizer, found[each], answered=False)[0].tolist()) for each in order]
    ours = args.do == "emoe"
    mode, options = args.mode, dict[str, Any]()
    if ours:
        options = {"predictor": "recent", "period": 8}
    if mode == "biased":
        options["max_substituted_mass"] = CONTRACTS[args.share]
    try:
        model = emoe.from_pretrained(
            args.model, memory_budget=args.share, context=args.context, prefill_chunk=CHUNK, routing=mode, **options
        )
    except EmoeError as error:
        tell(refusal=str(error))
        return
    plan = model.emoe.plan
    policy = "slo+affinity" if ours else "fcfs"
    with emoe.Engine(
        model, scheduler=policy, kv_budget=plan.kv_bytes, chunk_rows=CHUNK, most_running=WIDEST
    ) as engine, torch.no_grad():  # fmt: skip
        for _ in range(2):  # the first fills slots and base sets
            before, started = model.emoe.loaded_bytes, time.perf_counter()
            for task, ids in asked:
                engine.submit(ids, max_new_tokens=NEW, sampling=Sampling(eos=()), task=task)
            ends, most = [], 0
            while engine.busy:
                events = engine.step()
                now = time.perf_counter() - started
                ends += [now for event in events if event.finish_reason == "length"]
                most = max(most, len(engine.scheduler.running))
            if len(ends) != len(asked):
                raise RuntimeError(f"{len(ends)} of {len(asked)} requests gave all their tokens")
        tokens = NEW * len(asked)
        tell(
            resident_share=plan.resident_share, tokens_per_second=tokens / ends[-1], latency=float(np.mean(ends)),
            most=most, bytes_per_token=(model.emoe.loaded_bytes - before) / tokens,
        )  # fmt: skip
    model.emoe.close(restore=False)


def quality_child(args: argparse.Namespace) -> None:
    """Perplexity of each mode over the full model's, on chats of the second half of the prompts."""
    import quality

    from emoe.analysis.recording import PROMPTS, encode
    from emoe.generate import load_tokenizer
    from emoe.tasks import load_prompts

    tokenizer = load_tokenizer(args.model)
    by_task: dict[str, list[Any]] = {}
    for each in load_prompts(PROMPTS):
        by_task.setdefault(each.task, []).append(encode(tokenizer, each)[:, : quality.LONGEST])
    counted = quality.Texts({task: ids[0::2] for task, ids in by_task.items()}, {})
    scored = quality.Texts({task: ids[1::2] for task, ids in by_task.items()}, {task: [] for task in by_task})
    bench = quality.Bench(args.model, 1.0, None, 0)
    table = quality.profile(bench.model, counted)
    bench.run("exact", scored, None)
    full = bench.last
    bench.close()
    for share in map(float, args.only.split(",")):
        bench = quality.Bench(args.model, share, table, 0)
        for mode in args.modes.split(","):
            row = bench.run(mode, scored, full, quality.CONTRACTS[share] if mode == "biased" else None)
            tell(share=share, mode=mode, ratio=row.ratio, error=row.ratio_error)
        bench.close()


CHILDREN: dict[str, Callable[[argparse.Namespace], None]] = {
    "stock": stock_child, "emoe": emoe_child, "served": served_child, "quality": quality_child,
}  # fmt: skip


class Told(list[dict[str, Any]]):
    """What a child told, and how it ended: "" where it ended by itself."""

    end = ""

    def last(self, key: str) -> dict[str, Any]:
        """The last that has this key; empty where none has."""
        return next((each for each in reversed(self) if key in each), {})


def ask(words: list[str], group: Path | None, seconds: float) -> Told:
    """Runs this file as a child, in a cgroup where one is given, for so long at most."""
    command = common.this_script(__file__, *words)
    if group is not None:
        command = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
    told = Told()
    late, whole = threading.Event(), {**os.environ, "TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=whole) as child:

            def stop() -> None:
                late.set()
                child.kill()

            timer = threading.Timer(seconds, stop)
            timer.start()
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    with contextlib.suppress(json.JSONDecodeError):
                        told.append(json.loads(line))
                code = child.wait()
            except BaseException:
                child.kill()
                raise
            finally:
                timer.cancel()
        if late.is_set():
            told.end = f"stopped after {seconds:.0f} s"
        elif code in (-9, 137):
            told.end = "killed, out of memory"
        elif code:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"ended with {code}"]
            told.end = lines[-1][:300]
    return told


@contextlib.contextmanager
def bounded(limit: int) -> Iterator[Path | None]:
    """A cgroup of so many bytes; None where none can be made."""
    with contextlib.ExitStack() as stack:
        try:
            group: Path | None = stack.enter_context(common.memory_cgroup(limit))
        except PermissionError:
            group = None
        yield group


def in_memory_of(limit: int, words: list[str], model: Path, seconds: float) -> Told:
    """A child in a cgroup of its own, with the checkpoint's pages forgotten."""
    common.forget_pages(model)
    with bounded(limit) as group:
        return ask(words, group, seconds)


def most_context(needed: Callable[[int], int], budget: int, least: int, most: int) -> int:
    """Tokens of the longest context whose plan needs at most `budget` bytes; 0 where not even `least` fits."""
    low, high = least, most
    small, large = needed(low), needed(high)
    if small > budget:
        return 0
    if large <= budget:
        return high
    while high - low > 1:
        # What a plan needs is all but straight in the context, so the place is guessed; never an end, so it gets on.
        guess = low + int((high - low) * (budget - small) / (large - small))
        guess = min(max(guess, low + 1), high - 1)
        value = needed(guess)
        if value <= budget:
            low, small = guess, value
            if guess + 1 < high and (after := needed(guess + 1)) > budget:
                high, large = guess + 1, after
        else:
            high, large = guess, value
    return low


def needed_bytes(model: str, share: float) -> Callable[[int], int]:
    """Budget that a plan with this share of experts needs, by context."""
    import emoe

    def needed(context: int) -> int:
        plan = emoe.plan(model, share, context=context, prefill_chunk=CHUNK, calibrate=False)
        return int(plan.budget_bytes)

    return needed


def import_bytes() -> int:
    """Memory of its own that a process has which imported what all of them import."""
    code = "import torch, transformers, emoe; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def said(bar: Any, *rows: dict[str, Any]) -> None:
    """A step is over; what it came to goes to stderr, since all of them take long."""
    for row in rows:
        bar.write(", ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)
    bar.update()


# Part memory


def memory_part(args: argparse.Namespace, bar: Any) -> dict[str, Any]:
    with common.scratch_folder(args.checkpoint) as folder:
        bar.set_description("writing a checkpoint of 1.1 GB")
        place = common.write_checkpoint(geometry(), folder / "paper-geometry")
        return in_one_cgroup(args, place, bar)


def in_one_cgroup(args: argparse.Namespace, place: Path, bar: Any) -> dict[str, Any]:
    """All rows in the smallest cgroup in which everything just fits."""
    import emoe
    from emoe.options import parse_budget

    whole = emoe.plan(str(place), 1.0, context=PROMPT + NEW, prefill_chunk=CHUNK, calibrate=False)
    own = import_bytes()
    stock = ["--child", "stock", "--model", str(place), "--do"]
    with bounded(1 << 40) as group:
        caged = group is not None
    bar.set_description("what everything takes")
    if args.memory:
        most = parse_budget(args.memory).nbytes
    else:
        told = ask([*stock, "fit"], None, 300.0)
        if told.end:
            raise SystemExit(f"Transformers with everything in memory: {told.end}")
        most = int(told.last("own_bytes")["own_bytes"]) + NOISE
    limit = most + FILES
    bar.update()
    found: dict[str, Any] = {
        "memory_bytes": most, "limit_bytes": limit, "cgroup": caged, "import_bytes": own,
        "expert_bytes": whole.expert_bytes,
        "kv_token_bytes": whole.kv_bytes // (PROMPT + NEW), "rows": [],
    }  # fmt: skip
    for who, shares in {"Transformers, all in memory": (), "accelerate, disk offload": ACCELERATE_SHARES}.items():
        bar.set_description(who)
        row: dict[str, Any] = {"who": who}
        for setting in [str(int(share * most)) for share in shares] or [""]:
            if "batch" not in row:
                row = stock_row(who, stock, setting, most, limit, place)
        found["rows"].append(row)
        said(bar, row)
    # What is left beside an import, less what a trial takes of memory of its own beyond its budget: a budget counts
    # the pages of files too, and a cgroup drops those where it has to.
    trial = [
        "--child",
        "emoe",
        "--model",
        str(place),
        "--share",
        str(min(args.shares)),
        "--context",
        "512",
        "--do",
        "prompts",
    ]
    told = ask(trial, None, 300.0)
    if told.end:
        raise SystemExit(f"a trial of emoe {told.end}")
    spare = own + told.last("budget_bytes")["budget_bytes"] - told.last("own_bytes")["own_bytes"]
    found["spare_bytes"] = spare
    budget = most - own + spare
    for share in (1.0, *args.shares):
        bar.set_description(f"emoe, {share:.0%} of experts in memory")
        row = emoe_row(share, budget, limit, place)
        if row.get("own_bytes", 0) > most:
            row["refusal"] = f"took {row['own_bytes'] - most} bytes more than it may; {row.get('refusal', '')}"
        found["rows"].append(row)
        said(bar, found["rows"][-1])
    return found


def stock_row(who: str, words: list[str], setting: str, most: int, limit: int, place: Path) -> dict[str, Any]:
    more = ["--most-bytes", str(most), *(["--setting", setting] if setting else [])]
    batches = in_memory_of(limit, [*words, "batches", *more], place, STOCK_SECONDS)
    prompts = in_memory_of(limit, [*words, "prompts", *more], place, STOCK_SECONDS) if batches else Told()
    return {
        "who": who, "saved": 0.0, "setting": setting,
        **batches.last("token_seconds"), **batches.last("batch"), **prompts.last("prompt"),
        "refusal": "; ".join(each.end or each.last("refusal").get("refusal", "") for each in (prompts, batches)),
    }  # fmt: skip


def emoe_row(share: float, budget: int, limit: int, place: Path) -> dict[str, Any]:
    who = f"emoe, {share:.0%}"
    needed = needed_bytes(str(place), share)
    context = most_context(needed, budget, PROMPT + NEW, 32768)
    if not context:
        return {"who": who, "refusal": f"needs {needed(PROMPT + NEW) // MIB} MiB of {budget // MIB}"}
    words = ["--child", "emoe", "--model", str(place), "--share", str(share), "--context", str(context), "--do"]
    row: dict[str, Any] = {"who": who, "planned_context": context}
    ends, own = [], []
    for do in ("batches", "prompts"):
        told = in_memory_of(limit, [*words, do], place, EMOE_SECONDS)
        for each in told:
            row |= each
        ends += [f"{do}: {told.end}"] if told.end else []
        own.append(told.last("own_bytes").get("own_bytes", 0))
    row["own_bytes"] = max(own)
    if "resident_share" in row:
        row["saved"] = 1 - row["resident_share"]
    if ends:
        row["refusal"] = "; ".join(ends)
    return row


# Part serving


def serving_part(args: argparse.Namespace, bar: Any) -> dict[str, Any]:
    """The demo model, in what it takes with all experts and two requests."""
    from emoe import demo

    place = demo.build()
    own = import_bytes()
    budget = needed_bytes(str(place), 1.0)(2 * SERVED_CONTEXT)
    limit = budget + own + FILES
    found: dict[str, Any] = {"budget_bytes": budget, "limit_bytes": limit, "rows": [], "quality": []}
    modes = "exact,biased,resident"
    requests = str(12 if args.quick else 28)
    settings = [(1.0, ["on-demand"], ["exact"])]
    settings += [(share, ["on-demand", "emoe"], modes.split(",")) for share in args.shares]
    for share, sides, which in settings:
        context = most_context(needed_bytes(str(place), share), budget, SERVED_CONTEXT, 8192)
        words = ["--child", "served", "--model", str(place), "--share", str(share), "--context", str(context)]
        for mode, do in [(mode, do) for mode in which for do in sides]:  # next to each other: other load meets both
            bar.set_description(f"demo model, {share:.0%} of experts, {mode}, {do}")
            more = ["--do", do, "--mode", mode, "--requests", requests]
            told = in_memory_of(limit, [*words, *more], place, 420.0)
            row: dict[str, Any] = {"share": share, "mode": mode, "do": do, "context": context}
            for each in told:
                row |= each
            if told.end:
                row["refusal"] = told.end
            found["rows"].append(row)
            said(bar, row)
    bar.set_description("demo model, quality")
    shares = ",".join(map(str, args.shares))
    told = ask(["--child", "quality", "--model", str(place), "--only", shares, "--modes", modes], None, 600.0)
    found["quality"] = list(told)
    found["quality_end"] = told.end
    bar.update()
    return found


# What came out


def figures(found: dict[str, Any]) -> list[tuple[str, bool]]:
    """Against the paper's, as (sentence, reached); what was not measured is not reached."""
    said: list[tuple[str, bool]] = []
    rows = {row["who"]: row for row in found.get("memory", {}).get("rows", [])}
    parts = [row for who, row in rows.items() if who.startswith("emoe") and who != "emoe, 100%"]
    if parts:
        full = [rows[who] for who in ("Transformers, all in memory", "emoe, 100%") if who in rows]
        saved = max((row.get("saved", 0.0) for row in parts), default=0.0)
        said.append((f"expert bytes in memory: -{saved:.0%}; the paper -{SAVED:.0%}", saved >= SAVED - 0.005))
        for key, what, target in (
            ("prompt", "times longer prompts", LONGER),
            ("batch", "times larger batches", LARGER),
        ):
            before, after = (max((row.get(key, 0.0) for row in each), default=0.0) for each in (full, parts))
            ratio = after / before if before else float("nan")
            said.append((f"{ratio:.1f} {what}; the paper {target:g}", ratio >= target))
    served = found.get("serving", {}).get("rows", [])
    by = {(row["share"], row["mode"], row["do"]): row for row in served if "latency" in row}
    for mode in dict.fromkeys(mode for _, mode, do in by if do == "emoe"):
        pairs = [
            (share, by[share, mode, "on-demand"], row)
            for (share, which, do), row in by.items()
            if do == "emoe" and which == mode and (share, mode, "on-demand") in by
        ]
        if not pairs:
            continue
        at = "/".join(f"{100 * share:.0f}" for share, *_ in pairs)
        faster = [ours["tokens_per_second"] / theirs["tokens_per_second"] for _, theirs, ours in pairs]
        later = [ours["latency"] / theirs["latency"] - 1 for _, theirs, ours in pairs]
        each, every = "/".join(f"{ratio:.2f}" for ratio in faster), "/".join(f"{gain:+.0%}" for gain in later)
        said.append((f"{mode} at {at} %: {each} times the tokens/s of on demand; {FASTER}", max(faster) >= FASTER))
        said.append((f"{mode} at {at} %: {every} latency; {LATENCY:.0%}", min(later) <= LATENCY))
    return said


def show(found: dict[str, Any]) -> None:
    from emoe.memory import format_bytes

    console = Console(width=max(150, Console().width))
    if memory := found.get("memory"):
        where = "a cgroup" if memory["cgroup"] else "processes that no cgroup bounds,"
        table = Table(
            "", "expert bytes saved", "longest prompt", "requests at once", "tokens/s of those", "one: ms a token",
            "beyond that",
            title=f"{format_bytes(memory['memory_bytes'])} in {where} of {format_bytes(memory['limit_bytes'])}; "
            f"state of a token: {memory['kv_token_bytes']} bytes",
        )  # fmt: skip
        for row in memory["rows"]:
            table.add_row(
                row["who"], f"{row['saved']:.0%}" if "saved" in row else "-", str(row.get("prompt", "-")),
                str(row.get("batch", "-")), _number(row, "tokens_per_second", "{:.1f}"),
                _number(row, "token_seconds", "{:.0f}", 1000), row.get("refusal", ""),
            )  # fmt: skip
        console.print(table)
    if serving := found.get("serving"):
        table = Table(
            "resident", "mode", "", "requests at once", "tokens/s", "latency, s", "MB/token", "perplexity",
            title=f"demo model in {format_bytes(serving['budget_bytes'])}",
        )  # fmt: skip
        ratios = {(each["share"], each["mode"]): each for each in serving["quality"]}
        for row in serving["rows"]:
            each = ratios.get((row["share"], row["mode"]))
            table.add_row(
                f"{row['share']:.0%}", row["mode"], row["do"], str(row.get("most", "-")),
                _number(row, "tokens_per_second", "{:.1f}"), _number(row, "latency", "{:.1f}"),
                _number(row, "bytes_per_token", "{:.2f}", 1e-6),
                row.get("refusal") or ("-" if each is None else f"{each['ratio']:.3f} ± {each['error']:.3f}"),
            )  # fmt: skip
        console.print(table)


def _number(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    return form.format(scale * row[key]) if key in row else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("memory", "serving", "all"), default="all", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="20 %% of experts only, fewer requests")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="part memory: where its model is kept")
    parser.add_argument("--memory", metavar="SIZE", help="part memory: what each may take, in place of the least")
    parser.add_argument("--check", action="store_true", help="exit status 1 where one of the paper's figures is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    for name in ("--child", "--model", "--do", "--setting", "--mode", "--modes", "--only"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--most-bytes", type=int, default=0, help=argparse.SUPPRESS)
    for name in ("--context", "--requests"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        CHILDREN[args.child](args)
        return 0
    args.shares = SHARES[-1:] if args.quick else SHARES
    memory, serving = args.part in ("memory", "all"), args.part in ("serving", "all")
    steps = memory * (3 + 1 + len(args.shares)) + serving * (2 + 6 * len(args.shares))
    found: dict[str, Any] = {}
    started = time.perf_counter()
    with tqdm(total=steps, unit="row", disable=None) as bar:
        if memory:
            found["memory"] = memory_part(args, bar)
        if serving:
            found["serving"] = serving_part(args, bar)
    found["seconds"] = time.perf_counter() - started
    show(found)
    missed = False
    for text, good in figures(found):
        missed |= not good
        print("yes" if good else "NO ", text)
    print(f"{found['seconds'] / 60:.1f} minutes")
    if args.json:
        common.write_result(args.json, found)
    return int(args.check and missed)


if __name__ == "__main__":
    sys.exit(main())
