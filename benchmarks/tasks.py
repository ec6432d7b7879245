"""Task classifiers on labelled prompts, and what wrong tasks cost: confusion, unseen tasks, replays with other tasks.

    python benchmarks/tasks.py --prompts PATH [--model PATH] [--traces FOLDER] [--json FILE]

Classifiers learn the train split and are shown the test split. The replay runs public traces (docs/traces.md) with the
task of a share of the prompts exchanged at random; the profile keeps its true tasks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import emoe
from emoe import tasks
from emoe.replay import Options, mix, replay
from emoe.trace.trace import Trace

SHARES = (0.1, 0.2, 0.4)
LIMIT = 3.0  # points of coverage that a fifth of wrong tasks may cost
RUNS = {  # policy and options of the replay
    "task-table": ("task-table", Options()),
    "base+slack, slack 0.4": ("base+slack", Options(slack=0.4)),
    "base+slack, slack 0.5": ("base+slack", Options(slack=0.5)),
    "base+slack, slack 0.6": ("base+slack", Options(slack=0.6)),
    "trained-next-use, misses loaded": ("trained-next-use", Options(miss="load")),
    "trained-next-use, misses substituted": ("trained-next-use", Options(miss="substitute")),
}


def embeddings(model: str | None) -> tuple[Any, Any]:
    """Input embeddings and tokenizer of a checkpoint."""
    import emoe.demo
    from emoe import generate
    from emoe.cli import common
    from emoe.seam.load import load_without_experts

    common.quiet_transformers()
    folder = model or str(emoe.demo.build())
    loaded, store = load_without_experts(folder)
    store.close()
    return loaded.get_input_embeddings(), generate.load_tokenizer(folder)


def classifiers(path: Path, model: str | None) -> dict[str, Any]:
    table, tokenizer = embeddings(model)
    train, test = (tasks.load_prompts(path, split) for split in ("train", "test"))
    report: dict[str, Any] = {}
    for kind in tasks.KINDS:
        fitted = _fit(kind, table, tokenizer, train)
        answers = [fitted.classify(prompt.prompt) for prompt in test]
        pairs = ((prompt.task, answer.task) for prompt, answer in zip(test, answers, strict=True))
        matrix = tasks.ConfusionMatrix.of(fitted.names, pairs)
        milliseconds = median(answer.milliseconds for answer in answers)
        print(f"\n{kind}: {milliseconds:.2f} ms a prompt\n{matrix}")
        unseen = {}
        for task in fitted.names:
            less = _fit(kind, table, tokenizer, (prompt for prompt in train if prompt.task != task))
            mine = [prompt.prompt for prompt in test if prompt.task == task]
            unseen[task] = less.confusion(mine, [task] * len(mine)).unknown
        print("unknown where the task was not learned: " + ", ".join(f"{t} {s:.0%}" for t, s in unseen.items()))
        report[kind] = {**matrix.to_dict(), "milliseconds": milliseconds, "unseen": unseen}
    return report


def _fit(kind: str, table: Any, tokenizer: Any, prompts: Iterable[tasks.Prompt]) -> tasks.TaskClassifier:
    chosen = list(prompts)
    classifier = tasks.make(kind, table, tokenizer)
    return classifier.fit([prompt.prompt for prompt in chosen], [prompt.task for prompt in chosen])


def flipped(trace: Trace, share: float, seed: int) -> Trace:
    """The trace with a share of its prompts given another task, drawn at random from the others."""
    generator = np.random.default_rng(seed)
    prompts = np.unique(trace.prompt)
    wrong = generator.permutation(prompts)[: round(share * len(prompts))]
    task = trace.task.copy()
    N = len(trace.task_names)
    for prompt in wrong:
        mine = trace.prompt == prompt
        task[mine] = (task[mine][0] + generator.integers(1, N)) % N
    return replace(trace, task=task)


def misclassified(folder: Path, resident: float, seeds: int) -> list[dict[str, Any]]:
    """Hit rate (coverage) of each policy with a share of the tasks wrong, and points lost against none."""
    names = ("code", "general", "math")
    profile, rest = mix.prepare([emoe.load_trace(folder / f"{name}.npz") for name in names], profile=0.5, mix=0)
    jobs = [(name, share, seed) for name in RUNS for share in (0.0, *SHARES) for seed in range(seeds if share else 1)]
    rates: dict[tuple[str, float], list[float]] = {}
    for name, share, seed in tqdm(jobs, desc="replays", unit="replay", disable=None):
        policy, options = RUNS[name]
        [result] = replay(flipped(rest, share, seed), policy, [resident], profile=profile, options=options)
        rates.setdefault((name, share), []).append(100 * result.hit_rate)
    rows = []
    for name in RUNS:
        right = rates[name, 0.0][0]
        lost = {share: right - float(np.mean(rates[name, share])) for share in SHARES}
        rows.append({"policy": name, "resident": resident, "right": right, "lost": lost})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "policy", "tasks right", *(f"{share:.0%} wrong" for share in SHARES), f"limit {LIMIT:g} at 20 %",
        title="percent of picks resident, and points lost", title_justify="left",
    )  # fmt: skip
    for row in rows:
        verdict = "met" if row["lost"][0.2] <= LIMIT else "missed"
        table.add_row(row["policy"], f"{row['right']:.1f}", *(f"-{row['lost'][s]:.2f}" for s in SHARES), verdict)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, metavar="PATH", help="JSON lines of labelled prompts")
    parser.add_argument("--model", metavar="PATH", help="whose embeddings; default: the demo model")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="of code.npz, general.npz and math.npz")
    parser.add_argument("--resident", type=float, default=0.3, metavar="SHARE")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="of the exchanged tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    values: dict[str, Any] = {}
    if args.prompts is not None:
        values["classifiers"] = classifiers(args.prompts, args.model)
    if args.traces is not None:
        values["misclassified"] = misclassified(args.traces, args.resident, args.seeds)
        show(values["misclassified"])
    if args.json:
        args.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
