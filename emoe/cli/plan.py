"""`emoe plan`: what fits into a budget, from the config and file headers alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from emoe import options
from emoe.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from emoe.planning.plan import Plan

_EPILOG = """\
examples:
  emoe plan --model ./Qwen3-30B-A3B --memory-budget 8GiB
  emoe plan --model ./Qwen3-30B-A3B --memory-budget 25% --context 8192 --batch 4
  emoe plan --model ./Qwen3-30B-A3B --memory-budget 1GiB --json | jq .needed

No weights are loaded: headers of the files say how they are encoded, and where there are none, the config does. The
forecast is a range: routing at random, to routing that recurs as in public traces. A budget
that is too small ends with status 2 and the smallest that works (in --json: error, needed, budget; in bytes).
"""

_LIBRARIES = "what torch and Transformers take for any model; none in budgets up to 128 MiB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    common.add_model_arguments(parser)
    shown = ("memory_budget", "dtype")
    options.add_arguments(parser, (name for name in options.rows("plan") if name not in shown))
    common.add_trust_argument(parser)
    parser.add_argument(
        "--no-forecast",
        action="store_true",
        help="leave the speed forecast out (it measures memory and disk for about a second, once a day)",
    )


def run(args: argparse.Namespace) -> int:
    with common.stage("planning"):
        import emoe
        from emoe import generate

        generate.quiet_transformers()
        with common.checkpoint_errors(args.model):
            plan = emoe.plan(
                args.model,
                **{name: getattr(args, name) for name in options.rows("plan")},
                trust_remote_code=args.trust_remote_code,
                calibrate=not args.no_forecast,
            )
    if args.json:
        common.print_json(plan.to_dict())
        return 0
    out = common.console()
    out.print(_table(plan))
    for warning in plan.warnings:
        out.print(f"warning: {warning}", style="yellow", markup=False)
    for note in plan.notes:
        out.print(f"note: {note}", style="dim", markup=False)
    return 0


def _table(plan: Plan) -> Table:
    from rich.table import Table
    from rich.text import Text

    from emoe.memory import format_bytes

    table = Table(
        title=Text(f"{plan.model} in {format_bytes(plan.budget_bytes)}"), title_justify="left", show_header=False
    )
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    table.add_column(style="dim", overflow="fold")
    tokens = f"{plan.context} tokens x {plan.batch}" if plan.batch > 1 else f"{plan.context} tokens"
    layers, taken = len(plan.slots_per_layer), plan.planned_bytes + plan.library_bytes
    rows = [
        *_on_disk(plan),
        ("routed experts", format_bytes(plan.expert_bytes), _experts(plan)),
        *(("an expert", format_bytes(row["bytes_per_expert"]), _stored(row, layers)) for row in plan.experts),
        None,
        ("outside experts", format_bytes(plan.non_expert_bytes), _outside(plan)),
        ("expert slots", format_bytes(plan.slab_bytes), f"{_range(plan.slots_per_layer)} in each of {layers} layers"),
        *([("copies", format_bytes(plan.copy_bytes), f"of all experts, {plan.coarse}")] if plan.coarse else []),
        ("staging", format_bytes(plan.staging_bytes), "for reads and kernels"),
        ("KV cache", format_bytes(plan.kv_bytes), tokens),
        ("activations", format_bytes(plan.activation_bytes), _chunk(plan)),
        ("libraries", format_bytes(plan.library_bytes), _LIBRARIES),
        ("taken", format_bytes(taken), f"of a budget of {format_bytes(plan.budget_bytes)}"),
        None,
        ("experts resident", common.percent(plan.resident_share), ""),
        ("smallest budget", format_bytes(plan.smallest_budget), "one slot in each layer"),
    ]
    if plan.tokens_per_second is not None:
        low, high = plan.tokens_per_second
        rows.append(("forecast", f"{low:.1f} to {high:.1f} tokens/s", "routing at random, to routing that recurs"))
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*(Text(cell) for cell in row))
    return table


def _on_disk(plan: Plan) -> list[tuple[str, str, str]]:
    from emoe.memory import format_bytes

    by_files = plan.source == "headers"
    told = "as the headers of its files say" if by_files else "as its config says: no weights are here"
    rows = [("checkpoint", format_bytes(plan.checkpoint_bytes or 0), told)]
    if plan.not_loaded_bytes:
        what = "tensors that the model has no use for" if by_files else "layers of multi-token prediction"
        rows.append(("not loaded", format_bytes(plan.not_loaded_bytes), what))
    return rows


def _outside(plan: Plan) -> str:
    from emoe.memory import format_bytes

    parts = []
    if plan.kept_bytes:
        parts.append(f"{format_bytes(plan.kept_bytes)} stay {', '.join(plan.kept_encodings)}")
    if plan.encoded_bytes:
        parts.append(
            f"{format_bytes(plan.encoded_bytes)} of weights are decoded to {plan.dtype}, "
            f"{format_bytes(plan.decoded_bytes)}"
        )
    return f"always in memory; {'; '.join(parts)}" if parts else f"always in memory, {plan.dtype}"


def _stored(row: dict[str, Any], layers: int) -> str:
    """ "gate and up q4_k, down q6_k in 24 of 48 layers, native kernels"."""
    from emoe.model.summary import in_words

    where = "" if len(row["layers"]) == layers else f" in {len(row['layers'])} of {layers} layers"
    return f"{in_words(row['encodings'])}{where}, {row['kernels']} kernels"


def _experts(plan: Plan) -> str:
    return f"{sum(plan.experts_per_layer)}, {plan.top_k} of {_range(plan.experts_per_layer)} per token and layer"


def _chunk(plan: Plan) -> str:
    if plan.prefill_chunk is None:
        return "prompts whole"
    return f"prompts in chunks of {plan.prefill_chunk} tokens" + (f" x {plan.batch}" if plan.batch > 1 else "")


def _range(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
