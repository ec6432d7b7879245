"""`emoe train-predictor`: fits a predictor of experts to recorded routing, and says how good it is on the rest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.cli import common
from emoe.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from emoe.predictor import ExpertPredictor
    from emoe.predictor.report import Report
    from emoe.trace.trace import Trace

KINDS = ("task-table", "global-table", "across-layers", "across-requests", "next-use", "linear", "xlnet")
SIZES = ("small", "medium", "base")
EXIT_INTERRUPTED = 130

_EPILOG = """\
examples:
  emoe train-predictor --traces code.npz math.npz --kind linear --mix --out linear.safetensors
  emoe train-predictor --traces code.npz math.npz --kind xlnet --minutes 10 --mix --out xlnet.safetensors
  emoe train-predictor --traces trace.npz --kind linear --held-out-task math --out linear.safetensors --json
  emoe replay --trace code.npz math.npz --policy predictor:linear.safetensors --mix --profile 0.5
  emoe run --model ./Qwen3-30B-A3B --memory-budget 8GiB --predictor linear.safetensors --prompt "Why is the sky blue?"

Learns from the first half of each trace's prompts (--profile), in their order or mixed (--mix), and is evaluated on the
second. xlnet is trained in epochs and stops early; an interrupt keeps the best weights so far. The others are fitted in
seconds. docs/predictors.md compares them. 'emoe run --trace FILE.npz' records a trace.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "--traces", required=True, nargs="+", type=Path, metavar="FILE", help=".npz or .csv, of one model"
    )
    parser.add_argument(
        "--kind", required=True, choices=KINDS, help="of predictor (choices: %(choices)s)", metavar="KIND"
    )
    parser.add_argument(
        "--out", required=True, type=common.output_file, metavar="FILE", help="the predictor, .safetensors"
    )
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--profile",
        type=common.share,
        default=0.5,
        metavar="SHARE",
        help="of each trace's prompts to learn from; the rest is for evaluation (default: 0.5)",
    )
    prompts.add_argument(
        "--mix", nargs="?", type=int, const=0, metavar="SEED", help="the prompts of all traces in random order"
    )
    prompts.add_argument(
        "--prompt-tokens",
        type=common.positive,
        default=100,
        metavar="N",
        help="length of a prompt where a trace names none (default: 100)",
    )
    prompts.add_argument(
        "--held-out-task",
        action="append",
        default=[],
        metavar="NAME",
        help="learn nothing from this task and evaluate on it; may be repeated",
    )
    training = parser.add_argument_group("training of xlnet")
    training.add_argument("--size", choices=SIZES, default="small", help="of the network (default: small)")
    training.add_argument(
        "--epochs", type=common.positive, metavar="N", help="at most; each shows every prompt twice (default: 200)"
    )
    training.add_argument("--minutes", type=_minutes, metavar="N", help="at most (default: 10)")
    training.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes over 0")
    return value


def run(args: argparse.Namespace) -> int:
    from emoe.predictor import fitting
    from emoe.predictor.across import AcrossLayers
    from emoe.predictor.report import evaluate, evaluate_next_layer

    with common.stage("training; nothing was written"):
        profile, rest = _prompts(args)
        shown = fitting.without_tasks(profile, args.held_out_task) if args.held_out_task else profile
        predictor, facts = _fit(args, shown)
        predictor.save(args.out)  # type: ignore[attr-defined]
    result: dict[str, Any] = {
        "kind": args.kind,
        "out": str(args.out),
        "traces": [str(path) for path in args.traces],
        "learned": _facts(shown),
        "training": facts,
        "evaluation": [],
    }
    interrupted = facts.get("stopped") == "interrupted"
    with common.stage(f"evaluating; {args.out} was written"):
        reports: list[tuple[str, Report]] = []
        if rest is not None and not interrupted:
            for name, part in _parts(rest, args.held_out_task):
                reports.append((name, evaluate(predictor, part)))
                result["evaluation"].append({"on": name, **reports[-1][1].to_dict()})
                if isinstance(predictor, AcrossLayers):
                    by_layer = evaluate_next_layer(predictor, part)
                    result["evaluation"][-1]["next_layer_recall"] = by_layer.round(4).tolist()
    if args.json:
        common.print_json(result)
    else:
        _print(result, reports)
    return EXIT_INTERRUPTED if interrupted else 0


def _prompts(args: argparse.Namespace) -> tuple[Trace, Trace | None]:
    """What to learn from, and what is left to evaluate on."""
    from emoe.replay import mix
    from emoe.trace.trace import load_trace

    traces = [load_trace(path) for path in args.traces]
    options: dict[str, Any] = {"mix": args.mix, "prompt_tokens": args.prompt_tokens}
    if args.profile == 1.0:
        return mix.prepare(traces, **options)[1], None
    profile, rest = mix.prepare(traces, profile=args.profile, **options)
    assert profile is not None
    return profile, rest


def _parts(rest: Trace, held_out: list[str]) -> list[tuple[str, Trace]]:
    from emoe.predictor import fitting

    if not held_out:
        return [("held-out prompts", rest)]
    known = ("held-out prompts", fitting.without_tasks(rest, held_out))
    return [known, *((f"held-out task {name}", fitting.of_tasks(rest, [name])) for name in held_out)]


def _fit(args: argparse.Namespace, trace: Trace) -> tuple[ExpertPredictor, dict[str, Any]]:
    import time

    from emoe.predictor import fitting

    if args.kind != fitting.TRAINED:
        if args.epochs or args.minutes:
            raise ConfigError(f"--kind {args.kind} is not trained in epochs; --epochs and --minutes are for xlnet")
        started = time.monotonic()
        return fitting.fit(args.kind, trace), {"seconds": round(time.monotonic() - started, 2)}
    from tqdm import tqdm

    from emoe import generate
    from emoe.predictor.training import EPOCHS, MINUTES, train_sequence

    generate.quiet_transformers()
    epochs, minutes = args.epochs or EPOCHS, args.minutes or MINUTES
    with tqdm(total=epochs, desc="training", unit="epoch", disable=None, file=sys.stderr) as bar:

        def progress(epoch: int, loss: float, best: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", best=f"{best:.4f}")

        trained = train_sequence(
            trace, size=args.size, epochs=epochs, minutes=minutes, seed=args.seed, progress=progress
        )
    return trained.predictor, {
        "size": args.size,
        "parameters": trained.predictor.parameters,
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "loss": round(trained.loss, 5),
        "seconds": round(trained.seconds, 2),
        "stopped": trained.stopped,
    }


def _facts(trace: Trace) -> dict[str, Any]:
    return {
        "tokens": trace.tokens,
        "prompts": len(set(trace.prompt.tolist())),
        "tasks": list(trace.task_names),
        "layers": trace.layers,
        "num_experts": trace.num_experts,
    }


def _print(result: dict[str, Any], reports: list[tuple[str, Report]]) -> None:
    learned, training = result["learned"], result["training"]
    how = f"{training['epochs']} epochs in " if "epochs" in training else ""
    stopped = f", stopped: {training['stopped']}" if "stopped" in training else ""
    console = common.console()
    console.print(
        f"{result['kind']}: {learned['prompts']} prompts of {learned['tokens']} tokens, "
        f"{how}{training['seconds']:.1f} s{stopped}; written to {result['out']}",
        markup=False,
        soft_wrap=True,
    )
    if reports:
        console.print(_table(reports))
    for each in result["evaluation"]:
        for budget, layers in zip(each["budgets"], each.get("next_layer_recall", ()), strict=False):
            low, mean, high = (common.percent(share) for share in (min(layers), sum(layers) / len(layers), max(layers)))
            console.print(
                f"{each['on']}: {common.percent(budget)} of the next layer hold {mean} of its picks ({low} to {high})",
                soft_wrap=True,
            )


def _table(reports: list[tuple[str, Report]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="share of a prompt's picks among the experts chosen", title_justify="left")
    for name in ("on", "chosen", "before it ran", "after a quarter", "calibration", "rank, ms", "token, ms"):
        table.add_column(name, justify="left" if name == "on" else "right", no_wrap=name == "on")
    for name, report in reports:
        table.add_section()
        for budget, recall, later in zip(report.budgets, report.recall, report.recall_seen, strict=True):
            cells = [
                f"{name} ({report.prompts})",
                common.percent(budget),
                common.percent(recall),
                common.percent(later),
                common.percent(report.calibration),
                f"{report.rank_ms:.3f}",
                f"{report.observe_ms:.3f}",
            ]
            table.add_row(*(Text(cell) for cell in cells))
    return table
