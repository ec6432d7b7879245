"""How good every predictor of experts is on public routing traces: recall at a budget, calibration, time.

python benchmarks/predictors.py [--traces FOLDER] [--kinds linear,xlnet] [--parts held-out] [--hold-out all]
    [--minutes 6] [--model FOLDER] [--json FILE]

Part mixed: the first half of each domain's prompts (100 tokens each, all domains mixed) is learned from, the second
evaluated. Part held-out: each domain in turn is held out of learning and is all that is evaluated. Part alone: each
domain by itself, in order. With a model, the next layer's router on the present hidden states is measured as well. One
thread.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from emoe.predictor import KINDS, make
from emoe.predictor.across import AcrossLayers
from emoe.predictor.fitting import TRAINED, fit, of_tasks, without_tasks
from emoe.predictor.oracle import Oracle
from emoe.predictor.report import BUDGETS, Report, evaluate, evaluate_next_layer
from emoe.predictor.training import train_sequence
from emoe.replay import mix
from emoe.trace.trace import Trace, load_trace

DOMAINS = ("code", "general", "math")
FOLDER = Path(os.environ.get("EMOE_TRACES", Path(__file__).parent.parent.parent / "shared" / "traces"))
PARTS = ("mixed", "held-out", "alone")


def all_kinds(profile: Trace, rest: Trace, kinds: list[str], minutes: float, on: str) -> list[dict[str, Any]]:
    """One row a kind."""
    rows = []
    for kind in tqdm(kinds, desc=on, disable=None):
        started, facts = time.perf_counter(), {}
        if kind == "oracle":
            predictor: Any = Oracle(rest)
        elif kind == "recent":
            predictor = make("recent", layers=rest.layers, experts=rest.num_experts)
        elif kind == TRAINED:
            trained = train_sequence(profile, minutes=minutes)
            predictor, facts = trained.predictor, {"epochs": trained.epochs, "stopped": trained.stopped}
        else:
            predictor = fit(kind, profile)
        seconds = time.perf_counter() - started
        row = {"on": on, "kind": kind, "fit_s": round(seconds, 2), **facts, **evaluate(predictor, rest).to_dict()}
        rows.append(row)
    return rows


def next_layers(profile: Trace, rest: Trace, on: str) -> list[dict[str, Any]]:
    """eMoE-L for single tokens and for whole prompts."""
    predictor = AcrossLayers.fit(profile)
    budgets = (rest.top_k / rest.num_experts, *BUDGETS)
    rows = []
    for what, tokens, part in (("a token", 1, rest.take(slice(0, 1000))), ("a prompt", None, rest)):
        by_layer = evaluate_next_layer(predictor, part, budgets, tokens=tokens)
        started = time.perf_counter()
        for layer in range(rest.layers - 1):
            predictor.next_layer(layer, part.experts[layer, :1])
        each = (time.perf_counter() - started) / (rest.layers - 1)
        rows.append({"on": on, "of": what, "budgets": budgets, "recall": by_layer.tolist(), "ms": 1e3 * each})
    return rows


@torch.no_grad()
def look_ahead(folder: Path, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    """Look-ahead and eMoE-L on the routing of a model, each token by itself; eMoE-L learns from the first half."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emoe.routing import find_routers
    from emoe.routing.look_ahead import LookAhead

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sites = find_routers(model)
    hidden: list[list[torch.Tensor]] = [[] for _ in sites]
    picks: list[list[torch.Tensor]] = [[] for _ in sites]

    def watch(layer: int) -> Any:
        def hook(_module: Any, given: Any, output: Any) -> None:
            hidden[layer].append(given[0].reshape(-1, given[0].shape[-1]))
            picks[layer].append(output[2].reshape(-1, output[2].shape[-1]))

        return hook

    handles = [site.module.register_forward_hook(watch(site.layer)) for site in sites]
    prompt: list[int] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        model(ids)
        prompt += [number] * ids.shape[1]
    for handle in handles:
        handle.remove()
    experts = np.stack([torch.cat(each).numpy() for each in picks]).astype(np.int16)
    numbers = np.array(prompt, dtype=np.int32)
    zeros = np.zeros(len(prompt), dtype=np.int32)
    routed = Trace(experts, int(model.config.num_experts), zeros, numbers, zeros.astype(np.uint8))
    half = int(np.searchsorted(numbers, numbers[-1] // 2))
    ahead, states = LookAhead.of(model), [torch.cat(each) for each in hidden]
    K, E = routed.top_k, routed.num_experts
    budgets = (K / E, *BUDGETS)
    sizes = [max(1, int(share * E + 0.5)) for share in budgets]
    found = np.zeros((len(sizes), len(sites) - 1))
    chosen = range(half, len(prompt), 3)
    started = time.perf_counter()
    orders = [
        [np.argsort(-ahead.next_layer(layer, states[layer][token]), kind="stable") for layer in range(len(sites) - 1)]
        for token in chosen
    ]
    ms = 1e3 * (time.perf_counter() - started) / len(chosen) / (len(sites) - 1)
    for token, by_layer in zip(chosen, orders, strict=True):
        for layer, order in enumerate(by_layer):
            for number, size in enumerate(sizes):
                found[number, layer] += np.isin(experts[layer + 1, token], order[:size]).mean() / len(chosen)
    across = AcrossLayers.fit(routed.take(slice(0, half)))
    later = routed.take(np.array(chosen))
    name = f"{folder.name}, {len(chosen)} tokens"
    recall = evaluate_next_layer(across, later, budgets, tokens=1)
    return [
        {"on": name, "of": "a token, look-ahead", "budgets": budgets, "recall": found.tolist(), "ms": ms},
        {"on": name, "of": "a token", "budgets": budgets, "recall": recall.tolist(), "ms": None},
    ]


def recall_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "evaluated on",
        "kind",
        *(f"{share:.0%}" for share in BUDGETS),
        title="recall before a prompt runs / after a quarter",
    )
    for name in ("calibration", "rank, ms", "token, ms", "fit, s"):
        table.add_column(name, justify="right")
    before = None
    for row in rows:
        if before != row["on"]:
            table.add_section()
        report = Report(**{name: row[name] for name in Report.__dataclass_fields__})
        pairs = [f"{100 * a:.1f} / {100 * b:.1f}" for a, b in zip(report.recall, report.recall_seen, strict=True)]
        times = [
            f"{100 * report.calibration:.1f} %",
            f"{report.rank_ms:.3f}",
            f"{report.observe_ms:.3f}",
            f"{row['fit_s']:.1f}",
        ]
        if "epochs" in row:
            times[-1] += f" ({row['epochs']} epochs)"
        table.add_row(row["on"] if before != row["on"] else "", row["kind"], *pairs, *times)
        before = row["on"]
    return table


def next_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "evaluated on",
        "next layer of",
        "budget",
        "mean",
        "lowest layer",
        "highest",
        "ms",
        title="recall in the next layer",
    )
    for row in rows:
        table.add_section()
        for budget, layers in zip(row["budgets"], row["recall"], strict=True):
            figures = (f"{100 * share:.1f}" for share in (np.mean(layers), min(layers), max(layers)))
            table.add_row(
                row["on"], row["of"], f"{budget:.1%}", *figures, "" if row["ms"] is None else f"{row['ms']:.3f}"
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=FOLDER, metavar="FOLDER", help=f"of {', '.join(DOMAINS)} .npz")
    parser.add_argument("--kinds", default=",".join(["recent", *KINDS, "oracle"]), metavar="KIND[,KIND...]")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART[,PART...]", help="(default: all)")
    parser.add_argument(
        "--hold-out",
        default="math",
        metavar="DOMAIN[,DOMAIN...]",
        help="of xlnet, which takes minutes for each: held out in turn, or 'all' (default: math)",
    )
    parser.add_argument("--minutes", type=float, default=6.0, metavar="N", help="of each training of xlnet, at most")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint to look ahead in")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="lines of JSON with a field 'prompt', for --model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds, parts = args.kinds.split(","), args.parts.split(",")
    held_out = DOMAINS if args.hold_out == "all" else args.hold_out.split(",")
    for name, given, known in (("parts", parts, PARTS), ("hold-out", held_out, DOMAINS)):
        if not set(given) <= set(known):
            parser.error(f"--{name} {','.join(given)}: choose from {', '.join(known)}")
    traces = [load_trace(args.traces / f"{name}.npz") for name in DOMAINS]
    profile, rest = mix.prepare(traces, profile=0.5, mix=0)
    assert profile is not None
    rows, layers = [], []
    if "mixed" in parts:
        rows += all_kinds(profile, rest, kinds, args.minutes, "mixed prompts")
        layers += next_layers(profile, rest, "mixed prompts")
    for name in DOMAINS if "held-out" in parts else ():
        some = [kind for kind in kinds if kind != TRAINED or name in held_out]
        halves = without_tasks(profile, [name]), of_tasks(rest, [name])
        rows += all_kinds(*halves, some, args.minutes, f"held-out task {name}")
        layers += next_layers(*halves, f"held-out task {name}")
    # Consecutive prompts of one domain: what request-to-request prediction is for.
    for name, trace in zip(DOMAINS, traces, strict=True) if "alone" in parts else ():
        halves = mix.split(mix.into_prompts(trace), 0.5)
        some = [kind for kind in kinds if kind in ("recent", "global-table", "across-requests", "across-layers")]
        rows += all_kinds(*halves, some, args.minutes, f"{name} alone, in order")
    if args.model is not None:
        import json

        lines = args.texts.read_text(encoding="utf-8").splitlines()[::40]
        layers += look_ahead(args.model, [json.loads(line)["prompt"] for line in lines][:60], 100)
    console = Console(width=140)
    console.print(recall_table(rows))
    console.print(next_table(layers))
    if args.json:
        write_result(args.json, {"recall": rows, "next_layer": layers})


if __name__ == "__main__":
    main()
