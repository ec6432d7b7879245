"""What the rules of the contract on substituted mass are worth in decode: the top pick kept, layers weighed.

python benchmarks/contract_rules.py --prompts PROMPTS.jsonl [--shares 0.4] [--bounds 0.06,0.1,0.15,0.2] [--json FILE]

Mode `biased` on the model in float32 (benchmarks/quality.py says how a text is scored), by rules: "replace" lets any
pick be substituted, "keep" never the one with most mass of a row of decode (the default), "keep, layers" weighs the
first third of the layers four times as heavily as the others too, as `sensitivity=` does with a profile. A rule is to
be read at equal loads: one that reads more at the same bound is not better for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import quality
from common import write_result
from numpy.typing import NDArray
from quality import Bench, arguments, numbers, whole
from rich.console import Console
from rich.table import Table

from emoe import demo
from emoe.routing import attach

BOUNDS = [0.06, 0.1, 0.15, 0.2]
COLUMNS = ("resident", "rules", "bound", "prompts", "loads a prompt", "decode", "loads a token")


def first_third(layers: int) -> NDArray[np.float64]:
    """Weights as `emoe.routing.contract.Contract` takes them."""
    weights = np.where(np.arange(layers) < layers // 3, 2.0, 0.5)
    return np.asarray(weights * (1 / weights).mean())


def rules(layers: int) -> dict[str, dict[str, Any]]:
    """By name, what `attach` is given."""
    weights: Callable[[str | None], NDArray[np.float64]] = lambda task: first_third(layers)  # noqa: E731
    return {"replace": {"top_pick": "replace"}, "keep": {}, "keep, layers": {"weights": weights}}


def measure(args: argparse.Namespace, path: str) -> list[dict[str, Any]]:
    """A row for each share, rule and bound."""
    texts, table, _, full, _ = whole(args, path, args.split, args.answers, dtype="float32")
    rows = []
    for share in args.shares:
        bench = Bench(path, share, table, args.new_tokens, dtype="float32")
        for name, given in rules(len(bench.experts)).items():
            quality.attach = partial(attach, **given)
            for bound in args.bounds:
                row = bench.run("biased", texts, full, bound, own_answers=False)
                rows.append({
                    "share": share, "rules": name, "bound": bound, "prompt": row.ratio, "prompt_error": row.ratio_error,
                    "loads_per_prompt": row.loads_per_prompt, "decode": row.decode_ratio,
                    "decode_error": row.decode_error, "loads_per_token": row.decode_loads,
                })  # fmt: skip
                print(f"{share:.0%} {name} {bound}: decode {row.decode_ratio:.3f}, {row.decode_loads:.1f}", flush=True)
        quality.attach = attach
        bench.close()
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        f"{row['share']:.0%}", row["rules"], f"{row['bound']}", f"{row['prompt']:.3f} ± {row['prompt_error']:.3f}",
        f"{row['loads_per_prompt']:.0f}", f"{row['decode']:.3f} ± {row['decode_error']:.3f}",
        f"{row['loads_per_token']:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, shares=[0.4], answers=3)
    parser.add_argument("--bounds", type=numbers, default=BOUNDS, help="contracts")
    args = parser.parse_args()
    rows = measure(args, args.model or str(demo.build()))
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=140).print(table)
    if args.json:
        write_result(args.json, rows)


if __name__ == "__main__":
    main()
