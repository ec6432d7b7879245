"""Is `biased` ever worse than `resident` at equal loads? Both with contracts of many sizes, at each budget.

python benchmarks/equal_loads.py --prompts PROMPTS.jsonl [--shares 0.2,0.4,0.6] [--bounds 0.05,0.1,0.2] [--json FILE]

More loads buy quality in either mode, so the modes are compared at the loads that `biased` makes: what `resident` has
there is interpolated, text by text, between its runs with the next more and the next fewer loads. Prompts (perplexity,
loads a prompt) and decode along the full model's answers (perplexity of these, loads a token) are compared apart.
docs/quality.md has the results; benchmarks/quality.py says how a text is scored.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from common import write_result
from quality import Bench, arguments, numbers, ratio_of, whole
from rich.console import Console
from rich.table import Table

from emoe import demo

BOUNDS = [0.03, 0.06, 0.1, 0.15, 0.2, 0.3]


@dataclass
class Run:
    """One mode with one contract, on prompts or in decode.

    Attributes:
        bound: the contract, None where there is none.
        loads: experts read, a prompt or a token.
        gaps: [texts] loss less the full model's, summed over a text.
    """

    bound: float | None
    loads: float
    gaps: np.ndarray


def measure(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Every run of both modes, compared."""
    texts, table, _, full, _ = whole(args, path, args.split, args.answers)
    counts = {
        "prompt": [ids.shape[1] - 1 for scored in texts.scored.values() for ids in scored],
        "decode": [len(each.chosen) for followed in full["followed"].values() for each in followed],
    }
    rows = []
    for share in args.shares:
        bench = Bench(path, share, table, args.new_tokens)
        runs: dict[tuple[str, str], list[Run]] = {}
        for mode in ("resident", "biased"):
            # Without a contract both are the same: nothing is read.
            for bound in [*args.bounds, None] if mode == "resident" else args.bounds:
                row = bench.run(mode, texts, full, bound, own_answers=False)
                prompt = np.concatenate(list(bench.last["gaps"].values()))
                pairs = zip(chain(*bench.last["followed"].values()), chain(*full["followed"].values()), strict=True)
                decode = np.array([mine.loss - theirs.loss for mine, theirs in pairs])
                runs.setdefault((mode, "prompt"), []).append(Run(bound, row.loads_per_prompt, prompt))
                runs.setdefault((mode, "decode"), []).append(Run(bound, row.decode_loads or 0.0, decode))
                print(f"{share:.0%} {mode} {bound}: {row.ratio:.3f}, {row.decode_ratio:.3f}", flush=True)
        bench.close()
        for part, tokens in counts.items():
            for run in runs["biased", part]:
                rows.append({"share": share, "part": part, **compare(run, runs["resident", part], tokens)})
    return {"model": path, "split": args.split, "rows": rows, "texts": {part: len(n) for part, n in counts.items()}}


def compare(run: Run, others: list[Run], tokens: list[int]) -> dict[str, Any]:
    """A run against what the others have at its loads; of more loads than any of them, against the one with most."""
    gaps = at_loads(others, run.loads)
    ours, ours_error = ratio_of(run.gaps, tokens)
    theirs, theirs_error = ratio_of(gaps, tokens)
    change, change_error = ratio_of(run.gaps - gaps, tokens)
    return {
        "bound": run.bound, "loads": run.loads, "biased": ours, "biased_error": ours_error, "resident": theirs,
        "resident_error": theirs_error, "change": change, "change_error": change_error,
    }  # fmt: skip


def at_loads(runs: list[Run], loads: float) -> np.ndarray:
    """[texts] gaps between the two runs around these loads."""
    ordered = sorted(runs, key=lambda run: run.loads)
    above = next((number for number, run in enumerate(ordered) if run.loads >= loads), len(ordered) - 1)
    low, high = ordered[max(0, above - 1)], ordered[above]
    weight = 1.0 if high.loads == low.loads else min(1.0, (loads - low.loads) / (high.loads - low.loads))
    return (1 - weight) * low.gaps + weight * high.gaps


COLUMNS = ("resident", "part", "contract", "loads", "`biased`", "`resident` at these loads", "`biased` / `resident`")


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        f"{row['share']:.0%}",
        row["part"],
        f"{row['bound']:.2f}",
        f"{row['loads']:.1f}",
        *(f"{row[name]:.3f} ± {row[name + '_error']:.3f}" for name in ("biased", "resident", "change")),
    ]


def main() -> None:
    parser = arguments(__doc__, shares=[0.2, 0.4, 0.6], answers=3)
    parser.add_argument("--bounds", type=numbers, default=BOUNDS, help="contracts")
    args = parser.parse_args()
    path = args.model or str(demo.build())
    result = measure(args, path)
    table = Table(*COLUMNS, title=f"{result['texts']} texts, {result['split']} split")
    for row in result["rows"]:
        table.add_row(*cells(row))
    Console(width=140).print(table)
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
