"""`emoe analyze`: what a model's routing, or recorded traces, say about residency, as a report with pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from emoe import options
from emoe.cli import common

_EPILOG = """\
examples:
  emoe analyze
  emoe analyze --model ./Qwen3-30B-A3B --prompts prompts.jsonl --resident 0.4 --out report
  emoe analyze --trace code.npz general.npz math.npz

Without --model and --trace it builds the demo model and runs that. Writes report.html (open it in a browser),
report.json and, where a model ran, trace.npz and timeline.json (open it at https://ui.perfetto.dev). The report has:
correlation of expert use between layers, tokens and prompts; quality and time with a base set refreshed every p
requests; hit rate of each policy against the budget; overlap of the tasks' hot sets. docs/traces.md defines all
measures. Prompts are JSON lines: {"task": "math", "prompt": "...", "reference": "an answer to be scored"}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model", metavar="PATH", type=common.model_path, help="checkpoint to run (default: the demo model)"
    )
    source.add_argument(
        "--trace", nargs="+", type=Path, metavar="FILE", help="recorded routing in place of a model; .npz or .csv"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSON lines with task, prompt, reference (default: 28 of seven tasks)",
    )
    parser.add_argument(
        "--resident",
        type=common.share,
        default=0.3,
        metavar="SHARE",
        help="of the routed experts in memory, such as 0.3 or 30%% (default: 0.3)",
    )
    parser.add_argument(
        "--out",
        type=common.output_folder,
        default="emoe-report",
        metavar="FOLDER",
        help="made if missing (default: emoe-report)",
    )
    options.add_arguments(parser, ("dtype",))
    parser.add_argument("--quick", action="store_true", help="fewer prompts, budgets and periods: a trial")


def run(args: argparse.Namespace) -> int:
    from emoe.errors import ConfigError

    if args.trace and args.prompts:
        raise ConfigError("--prompts are run through a model; with --trace there is none")
    if args.prompts and (not args.prompts.exists() or args.prompts.is_dir()):
        raise ConfigError(f"--prompts {str(args.prompts)!r} is no file")
    args.out.mkdir(parents=True, exist_ok=True)
    from emoe import generate

    generate.quiet_transformers()
    with common.stage("analysing"):
        from emoe.analysis import recording, report
        from emoe.analysis.run import of_model, of_traces

        if args.trace:
            analysis = of_traces(args.trace, resident=args.resident, quick=args.quick)
        else:
            model = args.model
            if model is None:
                from emoe import demo

                model = str(demo.build())
            analysis = of_model(
                model,
                generate.load_tokenizer(model),
                args.prompts or recording.PROMPTS,
                args.out,
                resident=args.resident,
                dtype=args.dtype,
                quick=args.quick,
            )
        paths = report.write(analysis, args.out)
    if args.json:
        common.print_json({"files": paths, **analysis.to_dict()})
        return 0
    for kind, path in paths.items():
        print(f"{kind}: {path}")
    return 0
