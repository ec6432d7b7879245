"""`emoe replay`: scores eviction policies on recorded routing traces."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from emoe.replay import Result
    from emoe.trace import Trace

_EPILOG = """\
examples:
  emoe replay --trace trace.npz
  emoe replay --trace code.npz math.npz --policy lru,belady --resident 0.2,0.3,0.4
  emoe replay --trace trace.npz --policy lru --resident 30% --global --json

Slots start empty. Several traces of one model run one after the other. belady knows the future: no policy hits more.
Formats: docs/traces.md; a trace is recorded with 'emoe run --trace FILE.npz'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "--trace", required=True, nargs="+", type=Path, metavar="FILE", help=".npz or .csv; one or more"
    )
    parser.add_argument(
        "--policy",
        type=_policies,
        default="lru,lfu,belady",
        metavar="NAME[,NAME...]",
        help="which expert leaves when a slot is needed: lru, lfu, belady (default: all three)",
    )
    parser.add_argument(
        "--resident",
        type=_shares,
        default="0.3",
        metavar="SHARE[,SHARE...]",
        help="of the routed experts that has a slot, such as 0.3 or 30%% (default: 0.3)",
    )
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--per-layer", action="store_true", default=True, help="slots are divided between layers (default)"
    )
    scope.add_argument("--global", dest="per_layer", action="store_false", help="one set of slots for all layers")


def _policies(text: str) -> list[str]:
    from emoe.replay import POLICIES

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of: {', '.join(POLICIES)}")
    return list(dict.fromkeys(names))


def _shares(text: str) -> list[float]:
    return [common.share(part.strip()) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    from emoe import replay
    from emoe.trace import join, load_trace

    with common.stage("replaying"):
        trace = join([load_trace(path) for path in args.trace])
        results: list[Result] = []
        with common.console(stderr=True).status("replaying") as status:
            for policy in args.policy:
                status.update(f"replaying {policy}")
                results += replay.replay(trace, policy, args.resident, per_layer=args.per_layer)
    if args.json:
        common.print_json({**_facts(args, trace), "results": [result.to_dict() for result in results]})
        return 0
    common.console().print(_table(_facts(args, trace), results))
    return 0


def _facts(args: argparse.Namespace, trace: Trace) -> dict[str, Any]:
    return {
        "traces": [str(path) for path in args.trace],
        "tokens": trace.tokens,
        "layers": trace.layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "tasks": list(trace.task_names),
    }


def _table(facts: dict[str, Any], results: list[Result]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from emoe.config import format_bytes

    scope = "slots per layer" if results[0].per_layer else "slots for all layers"
    experts = f"top {facts['top_k']} of {facts['num_experts']} experts"
    table = Table(title=Text(f"{facts['tokens']} tokens, {facts['layers']} layers, {experts}"), title_justify="left")
    bytes_known = all(result.bytes_moved is not None for result in results)
    names = ["policy", "resident", scope, "hit rate", "misses", "loads a token", *(["moved"] if bytes_known else [])]
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for before, result in zip([None, *results], results, strict=False):
        if before is not None and before.policy != result.policy:
            table.add_section()
        cells = [
            result.policy,
            common.percent(result.resident),
            str(result.slots),
            common.percent(result.hit_rate),
            f"{result.misses:,}",
            f"{result.loads / facts['tokens']:.1f}",
        ]
        if result.bytes_moved is not None and bytes_known:
            cells.append(format_bytes(result.bytes_moved))
        table.add_row(*(Text(cell) for cell in cells))
    return table
