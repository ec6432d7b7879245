"""`emoe calibrate`: what steps of a model cost on this machine, for the scheduler."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from emoe import options
from emoe.cli import common

if TYPE_CHECKING:
    from emoe.engine.calibrate import Calibration

_EPILOG = """\
examples:
  emoe calibrate --model ./Qwen3-30B-A3B --memory-budget 8GiB
  emoe calibrate --model ./OLMoE-1B-7B --memory-budget 25% --refresh --json | jq .costs

A step of the server costs: a forward, plus a row for each token in it, plus the experts that its rows use, plus the
bytes of those that have to be loaded. The scheduler admits a request only where these costs, charged to everybody,
keep all within their targets (docs/serving.md). This loads the model as `emoe run` would, times a hundred short
forwards and fits the four constants. They are kept for a week, by model, budget, device and threads, in the folder
that EMOE_CACHE names. While a server runs, they are corrected by every step.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    common.add_model_arguments(parser)
    shown = ("memory_budget", "dtype")
    options.add_arguments(parser, (name for name in options.rows("load") if name not in shown))
    common.add_trust_argument(parser)
    parser.add_argument("--refresh", action="store_true", help="measure again, whatever was kept")


def run(args: argparse.Namespace) -> int:
    with common.stage(f"loading {args.model}; nothing was measured"):
        import emoe
        from emoe import generate

        generate.quiet_transformers()
        with common.checkpoint_errors(args.model):
            model = emoe.from_pretrained(
                args.model,
                **{name: getattr(args, name) for name in options.rows("load")},
                trust_remote_code=args.trust_remote_code,
            )
    with common.closing(model), common.stage("measuring"):
        from tqdm import tqdm

        from emoe.engine import calibrate

        key = calibrate.key_of(model, args.model)
        found = None if args.refresh else calibrate.kept(key)
        if found is None:
            forward, vocabulary = calibrate.forward_of(model)
            total = 2 * calibrate.ROUNDS * len(calibrate.ROWS)
            with tqdm(total=total, desc="timing forwards", unit="forward", leave=False, disable=None) as bar:
                found = calibrate.measure(forward, vocabulary, told=bar.update)
            calibrate.keep(key, found)
    if args.json:
        common.print_json({"costs": asdict(found.costs), "error": found.error, "forwards": found.forwards})
    else:
        _print(found)
    return 0


def _print(found: Calibration) -> None:
    from rich.table import Table

    out = common.console()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    costs = found.costs
    for name, value in (
        ("a forward", f"{1e3 * costs.forward:.3g} ms"),
        ("a row", f"{1e3 * costs.row:.3g} ms"),
        ("an expert of a layer in use", f"{1e6 * costs.expert:.3g} us"),
        ("loading a MiB of experts", f"{1e3 * costs.byte * (1 << 20):.3g} ms"),
        ("median error of a forecast", common.percent(found.error)),
    ):
        table.add_row(name, value)
    out.print(table)
    source = (
        f"from {found.forwards} forwards" if found.forwards else "kept from an earlier run; --refresh measures anew"
    )
    out.print(source, style="dim", markup=False)
