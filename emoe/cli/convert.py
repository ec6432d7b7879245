"""`emoe convert`: a checkpoint with its experts in fewer bits, written beside the old one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.cli import common
from emoe.errors import ConfigError
from emoe.options import CONVERTED, CONVERTED_REST, COPIES

if TYPE_CHECKING:
    from rich.table import Table

    from emoe.convert.run import Report

_MEMORY = 2 << 30

_EPILOG = """\
examples:
  emoe convert ./Qwen3-30B-A3B ./Qwen3-30B-A3B-q4_k --experts q4_k
  emoe convert ./OLMoE ./OLMoE-fp8 --experts fp8 --memory 1500M --perplexity text.txt
  emoe convert --verify ./Qwen3-30B-A3B-q4_k
  emoe convert ./Qwen3-30B-A3B --coarse q4_k
  emoe run --model ./Qwen3-30B-A3B-q4_k --memory-budget 8GiB --prompt "Why is the sky blue?"

Only routed experts change, and with --rest q8_0 linear layers; everything else is copied byte by byte. Bits a weight,
and the share of the numbers' size that is lost where they are spread like a bell (relative RMS):
  q8_0 8.5, 0.5 %    q6_k 6.6, 1.8 %    q5_k 5.5, 3.6 %    q4_k 4.5, 7.1 %    q4_0 4.5, 8.6 %    mxfp4 4.25, 11 %
  q3_k 3.4, 15 %     q2_k 2.6, 27 %
  fp8  8 with a scale for each 128 x 128, 2.6 %; a tile's outliers cost it nothing
q2_k to q6_k take rows of a multiple of 256; others of q2_k to q4_k become q4_0 (in GGUF of q4_k q5_0, as in llama.cpp),
of q5_k q5_1 and of q6_k q8_0.
Rows of no multiple of 32 become int4 or int8 with a scale for 32 weights or fewer. The report says where.

--keep-tasks measures, as 'emoe profile sensitivity' does, what the tasks' answers lose with each layer, and gives more
bits to the fewest layers that account for half of every task's loss: q2_k becomes q4_k, q3_k q5_k, q4_k q6_k, mxfp4
fp8, q4_0, q5_k and q6_k q8_0; what is q8_0 or fp8 stays as it is there.

--coarse makes the copies of experts that 'emoe run --routing coarse' computes with, which it would else make when it
first loads the model; they lie in the cache folder (EMOE_CACHE), and the checkpoint stays as it is.

OUT appears when all is written. Until then files lie in a hidden folder beside it, and a run that was stopped goes on
where it was: give the same command. The memory is that of the whole process; it does not depend on the model's size but
on that of one expert. The result is a checkpoint folder for emoe; fp8, and mxfp4 of most families, are laid out and
named as in other tools too. docs/checkpoints.md says what is in it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.usage = "emoe convert MODEL OUT --experts ENCODING [options]\n       emoe convert --verify OUT\n"
    parser.usage += "       emoe convert MODEL --coarse ENCODING"
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", type=common.model_path, help="checkpoint folder, or a hub id"
    )
    parser.add_argument("out", nargs="?", metavar="OUT", type=Path, help="folder to write; not there yet, or empty")
    parser.add_argument(
        "--experts", choices=CONVERTED, metavar="ENCODING", help="what experts become: " + ", ".join(CONVERTED)
    )
    parser.add_argument(
        "--rest",
        choices=CONVERTED_REST,
        default=CONVERTED_REST[0],
        help="what becomes of the linear layers outside experts: keep (default), or q8_0",
    )
    parser.add_argument(
        "--memory",
        type=common.nbytes,
        default=_MEMORY,
        metavar="SIZE",
        help="that the process may take, Python and torch included (default: 2GiB)",
    )
    parser.add_argument(
        "--keep-tasks",
        type=Path,
        metavar="PROMPTS",
        help="labelled prompts, JSON lines: the layers that their tasks need most keep more bits",
    )
    parser.add_argument(
        "--perplexity",
        type=Path,
        metavar="TEXT",
        help="measure perplexity before and after on this file of text (both models run, in --memory)",
    )
    parser.add_argument(
        "--gguf", action="store_true", help="write GGUF for llama.cpp and emoe (families qwen3_moe, qwen2_moe, olmoe)"
    )
    parser.add_argument(
        "--coarse", choices=tuple(COPIES), metavar="ENCODING",
        help="make the copies for routing coarse, and nothing else: " + ", ".join(COPIES),
    )  # fmt: skip
    parser.add_argument("--verify", type=Path, metavar="OUT", help="check every file of a finished conversion")


def run(args: argparse.Namespace) -> int:
    if args.coarse is not None:
        if not args.model:
            raise ConfigError("--coarse ENCODING needs MODEL: emoe convert MODEL --coarse ENCODING")
        _refuse(args, "--coarse ENCODING", but="model")
        return _keep_copies(args)
    if args.verify is not None:
        _refuse(args, "--verify OUT")
        return _verify(args)
    lacking = [
        name for name, value in (("MODEL", args.model), ("OUT", args.out), ("--experts", args.experts)) if not value
    ]
    if lacking:
        raise ConfigError(f"{' and '.join(lacking)} must be given: emoe convert MODEL OUT --experts ENCODING")
    from emoe.convert.state import unfinished

    target = Path(args.out).expanduser().absolute()
    with common.stage(f"converting; what is finished lies in {unfinished(target)}, and the same command goes on"):
        report = _convert(args)
    if args.json:
        common.print_json(report.to_dict())
        return 0
    out = common.console()
    out.print(_summary(report))
    out.print(_layers(report))
    if report.kept:
        numbers = ", ".join(map(str, report.kept["layers"]))
        out.print(f"more bits for {', '.join(report.kept['tasks'])}: layers {numbers}", markup=False, soft_wrap=True)
    for each in report.fallbacks:
        out.print(
            f"note: {each.count} of {each.matrices} are {each.got}: rows of {each.cols} are no whole blocks of "
            f"{each.asked}",
            markup=False,
            soft_wrap=True,
        )
    out.print(f"written to {report.out}", markup=False, soft_wrap=True)
    return 0


_OF_CONVERSION = {
    "model": "MODEL", "out": "OUT", "experts": "--experts", "rest": "--rest", "memory": "--memory",
    "keep_tasks": "--keep-tasks", "perplexity": "--perplexity", "gguf": "--gguf", "verify": "--verify",
}  # fmt: skip


def _refuse(args: argparse.Namespace, alone: str, but: str = "verify") -> None:
    """ConfigError where an option is given that has nothing to do with `alone`."""
    usual = {"rest": CONVERTED_REST[0], "memory": _MEMORY}
    given = [
        said for name, said in _OF_CONVERSION.items()
        if name != but and getattr(args, name) not in (None, False, usual.get(name))
    ]  # fmt: skip
    if given:
        raise ConfigError(f"{alone} does not go with {', '.join(given)}")


def _keep_copies(args: argparse.Namespace) -> int:
    from emoe import generate
    from emoe.convert.coarse import keep_copies

    generate.quiet_transformers()
    with common.checkpoint_errors(args.model), common.stage("making copies; nothing half-made was left"):
        kept = keep_copies(args.model, args.coarse)
    if args.json:
        common.print_json(kept.to_dict())
    else:
        print(kept)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from emoe.convert.state import verify

    record = verify(args.verify.expanduser())
    if args.json:
        common.print_json({"out": str(args.verify), "files": record["files"], "report": record.get("report")})
    else:
        print(f"{args.verify}: {len(record['files'])} files are as they were written")
    return 0


def _convert(args: argparse.Namespace) -> Report:
    from emoe import generate
    from emoe.convert.run import convert

    generate.quiet_transformers()
    with common.checkpoint_errors(args.model):
        return convert(
            args.model, args.out, args.experts, rest=args.rest, memory=args.memory, text=args.perplexity,
            keep_tasks=args.keep_tasks, gguf=args.gguf,
        )  # fmt: skip


def _summary(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    from emoe.memory import format_bytes

    table = Table(title=Text(f"{report.model} -> {report.experts}"), title_justify="left")
    for name in ("", "before", "after", "share"):
        table.add_column(name, justify="left" if not name else "right")
    for name, label in (("experts", "routed experts"), ("rest", "outside experts"), ("all", "all")):
        before, after = report.bytes_before[name], report.bytes_after[name]
        table.add_row(label, format_bytes(before), format_bytes(after), common.percent(after / before if before else 1))
    if report.perplexity:
        old, new = report.perplexity["before"], report.perplexity["after"]
        table.add_row("perplexity", f"{old:.3f}", f"{new:.3f}", common.percent(new / old))
    table.caption = f"peak memory {format_bytes(report.peak_memory)}"
    return table


def _layers(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="relative RMS error of what was encoded", title_justify="left")
    for name in ("layer", "all", "matrices", "worst expert"):
        table.add_column(name, justify="left" if name in ("layer", "matrices") else "right", overflow="fold")
    for path, matrices in report.losses.items():
        if not matrices:
            continue
        worst = max(matrices.items(), key=lambda item: item[1].worst)
        cells: list[Any] = [
            path,
            common.percent(report.layer(path).relative),
            ", ".join(f"{name} {common.percent(loss.relative)}" for name, loss in matrices.items()),
            f"{worst[1].worst_expert}: {common.percent(worst[1].worst)}",
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table
