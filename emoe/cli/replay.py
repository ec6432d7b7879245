"""`emoe replay`: scores eviction and prediction on recorded routing traces."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.cli import common
from emoe.errors import ConfigError, one_line

if TYPE_CHECKING:
    from rich.table import Table

    from emoe.replay import Result
    from emoe.trace.trace import Trace

_EPILOG = """\
examples:
  emoe replay --trace trace.npz
  emoe replay --trace code.npz math.npz --policy lru,belady --resident 0.2,0.3,0.4
  emoe replay --trace trace.npz --policy lru --resident 30% --global --json

  emoe replay --trace code.npz math.npz --policy lru,next-use --mix 0
  emoe replay --trace code.npz math.npz --policy lru,task-table,trained-next-use --mix 0 --miss substitute
  emoe replay --trace code.npz math.npz --policy recent --period adaptive --burst 10
  emoe replay --trace code.npz math.npz --policy lru,predictor:linear.safetensors --mix 0 --profile 0.5

Slots start empty. Several traces of one model run one after the other. belady knows the future: no policy that loads
its misses hits more. task-table, base+slack and trained-next-use learn from the first half of each trace, and all
policies then run on the second; a predictor from a file wants --profile as it was trained with. Policies and options:
docs/traces.md. 'emoe run --trace FILE.npz' records a trace.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "--trace", required=True, nargs="+", type=Path, metavar="FILE", help=".npz or .csv; one or more"
    )
    parser.add_argument(
        "--policy",
        type=_policies,
        metavar="NAME[,NAME...]",
        help="lru, lfu, lfru, classlru, next-use, belady; predicting: task-table, recent, base+slack, "
        "trained-next-use, oracle, predictor:FILE (default: lru,next-use,belady, with --global lru,lfu,belady); a "
        "comma in FILE is part of it unless another policy follows",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--resident",
        type=_shares,
        default="0.3",
        metavar="SHARE[,SHARE...]",
        help="of the routed experts that has a slot, such as 0.3 or 30%% (default: 0.3)",
    )
    size.add_argument(
        "--budget",
        type=_budgets,
        metavar="BYTES[,BYTES...]",
        help="bytes that slots take at most, such as 8GiB, in the place of --resident; the trace says what an expert "
        "takes",
    )
    parser.add_argument(
        "--prefill",
        choices=("tokens", "batch"),
        default="tokens",
        help="a prompt's prefill token by token, or as one step, as a forward has it; the policies that do not "
        "predict (default: tokens)",
    )
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--per-layer", action="store_true", default=True, help="slots are divided between layers (default)"
    )
    scope.add_argument("--global", dest="per_layer", action="store_false", help="one set of slots for all layers")
    _add_prediction(parser.add_argument_group("prompts and prediction"))


def _add_prediction(group: argparse._ArgumentGroup) -> None:
    order = group.add_mutually_exclusive_group()
    order.add_argument(
        "--mix", nargs="?", type=int, const=0, metavar="SEED", help="the prompts of all traces in random order"
    )
    order.add_argument(
        "--burst", type=common.positive, metavar="N", help="N prompts of one task, then N of the next, round and round"
    )
    group.add_argument(
        "--prompt-tokens",
        type=common.positive,
        default=100,
        metavar="N",
        help="length of a prompt where a trace names none (default: 100)",
    )
    group.add_argument(
        "--profile",
        type=common.share,
        metavar="SHARE",
        help="of each trace's prompts to learn from, not replayed (default: 0.5 where a policy learns, else none)",
    )
    group.add_argument(
        "--held-out-task",
        metavar="NAME",
        help="replay this task alone, and learn from the others: what a policy does where a task is new",
    )
    group.add_argument(
        "--period",
        type=_period,
        default=1,
        metavar="PROMPTS",
        help="between two choices of the base set, or 'adaptive': when observed routing drifts (default: 1)",
    )
    group.add_argument(
        "--miss",
        choices=("load", "substitute"),
        default="load",
        help="what trained-next-use and predictor:FILE do with a pick that is in no slot (default: load)",
    )
    group.add_argument(
        "--slack",
        type=common.share,
        default=0.5,
        metavar="SHARE",
        help="of the slots, for LRU in base+slack and predictor:FILE (default: 0.5)",
    )
    group.add_argument(
        "--moves",
        type=common.share,
        default=0.3,
        metavar="SHARE",
        help="of LRU's loads that trained-next-use may move with --miss substitute (default: 0.3)",
    )


def _period(text: str) -> int | str:
    try:
        return text if text == "adaptive" else common.positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor 'adaptive'") from error


def _policies(text: str) -> list[str]:
    from emoe.replay import POLICIES, check_policy
    from emoe.replay.predicted import FROM_FILE

    names: list[str] = []
    for part in text.split(","):
        name = part.strip()
        if names and names[-1].startswith(FROM_FILE) and name not in POLICIES and not name.startswith(FROM_FILE):
            names[-1] += f",{part}"  # a comma in the file's path
        else:
            names.append(name)
    try:
        for name in names:
            check_policy(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(one_line(error)) from None
    return list(dict.fromkeys(names))


def _shares(text: str) -> list[float]:
    return [common.share(part.strip()) for part in text.split(",")]


def _budgets(text: str) -> list[int]:
    return [common.nbytes(part.strip()) for part in text.split(",")]


def _resident(args: argparse.Namespace, trace: Trace) -> list[float]:
    """The shares that were asked for, or those that budgets are."""
    from emoe.errors import TraceError
    from emoe.memory import format_bytes

    if args.budget is None:
        return list(args.resident)
    if trace.expert_bytes is None:
        raise TraceError("--budget needs a trace that says how many bytes an expert takes; give --resident")
    # Slots of a layer fit its experts; one set of slots for all fits the largest.
    one, many = int(trace.expert_bytes.sum()), trace.num_experts
    if not args.per_layer:
        one, many = int(trace.expert_bytes.max()), trace.num_experts * trace.layers
    if max(args.budget) > one * many:
        raise ConfigError(
            f"--budget of {format_bytes(max(args.budget))} is over all experts, {format_bytes(one * many)}"
        )
    if min(args.budget) < one:
        least = "one slot" if not args.per_layer else "one slot in each layer"
        raise ConfigError(f"--budget of {format_bytes(min(args.budget))} is under {least}, {format_bytes(one)}")
    return [(budget // one) / many for budget in args.budget]


def run(args: argparse.Namespace) -> int:
    from emoe import replay
    from emoe.replay.mix import prepare
    from emoe.replay.predicted import LEARNING, Options
    from emoe.trace.trace import load_trace

    with common.stage("replaying"):
        names = args.policy or (["lru", "next-use", "belady"] if args.per_layer else ["lru", "lfu", "belady"])
        learns = any(name in LEARNING for name in names)
        profile, trace = prepare(
            [load_trace(path) for path in args.trace],
            profile=args.profile or (0.5 if learns and args.held_out_task is None else 0.0),
            mix=args.mix,
            prompt_tokens=args.prompt_tokens,
            held_out=args.held_out_task,
            burst=args.burst,
        )
        resident = _resident(args, trace)
        options = Options(miss=args.miss, period=args.period, slack=args.slack, moves=args.moves)
        results: list[Result] = []
        with common.console(stderr=True).status("replaying") as status:
            for policy in names:
                status.update(f"replaying {policy}")
                results += replay.replay(
                    trace, policy, resident, per_layer=args.per_layer, profile=profile, options=options,
                    prefill=args.prefill,
                )  # fmt: skip
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
        "prompts": len(set(trace.prompt.tolist())),
    }


def _table(facts: dict[str, Any], results: list[Result]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from emoe.memory import format_bytes

    scope = "slots of a layer" if results[0].per_layer else "slots for all layers"
    experts = f"top {facts['top_k']} of {facts['num_experts']} experts"
    table = Table(
        title=Text(f"{facts['tokens']} tokens of {facts['prompts']} prompts, {facts['layers']} layers, {experts}"),
        title_justify="left",
    )
    bytes_known = all(result.bytes_moved is not None for result in results)
    decode_known = any(result.decode_hit_rate is not None for result in results)
    names = [
        "policy",
        "resident",
        scope,
        "hit rate",
        *(["in decode"] if decode_known else []),
        "misses a token",
        "are",
        "loads a token",
        *(["moved"] if bytes_known else []),
    ]
    for name in names:
        table.add_column(
            name, justify="left" if name in ("policy", "are") else "right", no_wrap=name in ("policy", "are")
        )
    for before, result in zip([None, *results], results, strict=False):
        if before is not None and before.policy != result.policy:
            table.add_section()
        kind, colon, path = result.policy.partition(":")
        cells = [
            kind + colon + Path(path).name,
            common.percent(result.resident),
            str(result.slots),
            common.percent(result.hit_rate),
            *([_or_dash(result.decode_hit_rate)] if decode_known else []),
            f"{result.misses / facts['tokens']:.1f}",
            "loaded" if result.miss == "load" else "substituted",
            f"{result.loads / facts['tokens']:.1f}",
        ]
        if result.bytes_moved is not None and bytes_known:
            cells.append(format_bytes(result.bytes_moved))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _or_dash(share: float | None) -> str:
    return "-" if share is None else common.percent(share)
