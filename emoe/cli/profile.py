"""`emoe profile`: fits a task classifier, or profiles how sensitive each task is to other experts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.cli import common
from emoe.errors import ConfigError
from emoe.options import Options

if TYPE_CHECKING:
    from rich.table import Table

    from emoe.sensitivity import Sample, SensitivityProfile
    from emoe.tasks import ConfusionMatrix, Prompt, TaskClassifier

KINDS = ("keywords", "embeddings")  # emoe.tasks.KINDS, without loading numpy

_EPILOG = """\
examples:
  emoe profile tasks --prompts prompts.jsonl --out tasks.safetensors
  emoe profile tasks --prompts prompts.jsonl --kind embeddings --model ./Qwen3-30B-A3B --out tasks.safetensors
  emoe profile sensitivity --prompts prompts.jsonl --model ./Qwen3-30B-A3B --out sensitivity.json
  emoe profile COMMAND --help

Prompts are JSON lines with the texts "task" and "prompt", and where they are there "reference" and "split" (train, dev
or test). Both commands take --json.
"""
_TASKS_EPILOG = """\
examples:
  emoe profile tasks --prompts prompts.jsonl --out tasks.safetensors
  emoe profile tasks --prompts prompts.jsonl --kind embeddings --model ./Qwen3-30B-A3B --out tasks.safetensors

Learns from the train split and prints the confusion matrix of the dev split (of the train split where there is no dev).
A prompt that looks like none of the tasks is unknown. In a program: emoe.TaskClassifier.load("tasks.safetensors").
"""
_SENSITIVITY_EPILOG = """\
examples:
  emoe profile sensitivity --prompts prompts.jsonl --model ./Qwen3-30B-A3B --out sensitivity.json
  emoe profile sensitivity --prompts prompts.jsonl --model MODEL --out s.json --stride 3 --prompts-per-task 4 --json

The model answers each prompt; then its first 1, 2, ... layers are routed at random and its next-token distributions
along the answer are compared. Layers up to which they stay --threshold similar are insensitive for the task. Every
expert is used, so give the model all the memory there is. Ctrl-C stops; nothing is written then.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    children = parser.add_subparsers(dest="what", metavar="COMMAND", title="commands", required=True)
    for name, summary, add, epilog in (
        ("tasks", "learn to tell the tasks of prompts apart", _add_tasks, _TASKS_EPILOG),
        ("sensitivity", "measure how much each task's answers change under random routing", _add_sensitivity,
         _SENSITIVITY_EPILOG),
    ):  # fmt: skip
        child = children.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        child.add_argument("--prompts", required=True, type=Path, metavar="FILE", help="labelled prompts, JSON lines")
        child.add_argument(
            "--out", required=True, type=common.output_file, metavar="FILE", help="what was learned is written there"
        )
        add(child)
        common.add_shared_arguments(child)
        for action in child._actions:  # `emoe profile --json tasks` holds, too
            if action.dest in ("json", "verbose", "debug"):
                action.default = argparse.SUPPRESS


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="keywords",
        help="what a prompt is judged by: its words, or the model's own input embeddings (default: keywords)",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        type=common.model_path,
        help="for --kind embeddings: whose embeddings; no expert is read",
    )
    parser.add_argument(
        "--threshold",
        type=common.share,
        default=0.5,
        metavar="SHARE",
        help="of confidence, under which a prompt is unknown (default: 0.5)",
    )


def _add_sensitivity(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    parser.add_argument(
        "--threshold",
        type=common.share,
        default=0.85,
        metavar="SHARE",
        help="similarity down to which layers are insensitive (default: 0.85)",
    )
    parser.add_argument("--tasks", type=_names, metavar="NAME[,NAME...]", help="only these (default: all in the file)")
    parser.add_argument("--split", default="train", metavar="NAME", help="of the prompts (default: train)")
    for name, default, help_ in (
        ("--prompts-per-task", 8, "profiled of each task"),
        ("--new-tokens", 32, "of the answers that are compared, at most"),
        ("--stride", 1, "layers between two measurements; interpolated between"),
        ("--batch", 4, "prompts that run together"),
    ):
        parser.add_argument(
            name, type=common.positive, default=default, metavar="N", help=f"{help_} (default: {default})"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random experts (default: 0)")
    parser.add_argument(
        "--answers",
        choices=("own", "reference"),
        default="own",
        help="outputs are compared along the model's own answers, or along the references of the file, which costs no "
        "generation (default: own)",
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    return _run_tasks(args) if args.what == "tasks" else _run_sensitivity(args)


def _run_tasks(args: argparse.Namespace) -> int:
    from emoe import tasks
    from emoe.tasks.prompts import choose

    if (args.kind == "embeddings") != (args.model is not None):
        raise ConfigError("--model goes with --kind embeddings, which needs it")
    prompts = tasks.load_prompts(args.prompts)
    train = choose(prompts, args.prompts, "train")
    held = [prompt for prompt in prompts if prompt.split == "dev"]
    with common.stage("fitting; nothing was written"), common.console(stderr=True).status("fitting"):
        model, tokenizer = _embeddings(args.model) if args.model else (None, None)
        classifier = tasks.make(args.kind, model, tokenizer, threshold=args.threshold)
        classifier.fit([prompt.prompt for prompt in train], [prompt.task for prompt in train])
        matrix, milliseconds = _confusion(classifier, held or train)
        classifier.save(args.out)
    report = {
        "kind": args.kind,
        "tasks": list(classifier.names),
        "trained_on": len(train),
        "split": "dev" if held else "train",
        "confusion": matrix.to_dict(),
        "milliseconds": round(milliseconds, 3),
        "out": str(args.out),
    }
    if args.json:
        common.print_json(report)
        return 0
    print(f"{args.kind}, learned from {len(train)} prompts; the {report['split']} split:\n\n{matrix}")
    print(f"{milliseconds:.2f} ms a prompt; written to {args.out}")
    return 0


def _embeddings(path: str) -> tuple[Any, Any]:
    """The model without its experts, and its tokenizer."""
    from emoe import generate
    from emoe.seam.load import load_without_experts

    generate.quiet_transformers()
    tokenizer = generate.load_tokenizer(path)
    with common.checkpoint_errors(path):
        model, store = load_without_experts(path)
    embedding = model.get_input_embeddings()
    store.close()
    return embedding, tokenizer


def _confusion(classifier: TaskClassifier, prompts: list[Prompt]) -> tuple[ConfusionMatrix, float]:
    """The matrix, and the median of milliseconds of prompts classified one by one."""
    from statistics import median

    from emoe.tasks import ConfusionMatrix

    answers = [classifier.classify(prompt.prompt) for prompt in prompts]
    pairs = [(prompt.task, answer.task) for prompt, answer in zip(prompts, answers, strict=True)]
    return ConfusionMatrix.of(classifier.names, pairs), median(answer.milliseconds for answer in answers)


def _run_sensitivity(args: argparse.Namespace) -> int:
    from emoe.tasks import load_prompts

    prompts = load_prompts(args.prompts, args.split, args.tasks)
    with common.stage("profiling; nothing was written"):
        import emoe
        from emoe import generate, sensitivity

        generate.quiet_transformers()
        tokenizer = generate.load_tokenizer(args.model)
        samples = _samples(tokenizer, prompts, args.prompts_per_task, references=args.answers == "reference")
        longest = max(len(sample.input_ids) for sample in samples) + args.new_tokens
        with common.checkpoint_errors(args.model):
            model = emoe.from_pretrained(
                args.model,
                memory_budget=args.memory_budget,
                dtype=args.dtype,
                context=max(Options.context, longest),
            )
        from tqdm import tqdm

        with common.closing(model), tqdm(desc="profiling", unit="forward", disable=None, file=sys.stderr) as bar:

            def on_step(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = sensitivity.measure(
                model,
                samples,
                threshold=args.threshold,
                new_tokens=args.new_tokens,
                stride=args.stride,
                batch=args.batch,
                seed=args.seed,
                on_step=on_step,
            )
    found.meta.update(model=args.model, prompts=str(args.prompts), split=args.split)
    found.save(args.out)
    if args.json:
        common.print_json({**found.to_dict(), "out": str(args.out)})
        return 0
    common.console().print(_table(found))
    print(f"written to {args.out}")
    return 0


def _samples(tokenizer: Any, prompts: list[Prompt], most: int, *, references: bool) -> list[Sample]:
    """The first `most` prompts of each task, as the model is asked them; with references, the first that have one."""
    from emoe import generate
    from emoe.sensitivity import Sample

    counts: dict[str, int] = {}
    samples = []
    for prompt in prompts:
        answer = tokenizer(prompt.reference, add_special_tokens=False)["input_ids"] if references else []
        if references and not answer:
            continue
        counts[prompt.task] = counts.get(prompt.task, 0) + 1
        if counts[prompt.task] <= most:
            ids = generate.encode(tokenizer, prompt.prompt)
            samples.append(Sample(prompt.task, tuple(ids[0].tolist()), tuple(answer)))
    if not samples:
        raise ConfigError("--answers reference: no prompt has a reference")
    return samples


def _table(profile: SensitivityProfile) -> Table:
    from rich.table import Table

    some = sorted({round(profile.layers * part / 4) for part in range(1, 5)})
    table = Table(
        "task", "prompts", *(f"{depth} random" for depth in some), "sensitivity", "insensitive layers",
        title="similarity to the untouched model, by layers routed at random", title_justify="left",
    )  # fmt: skip
    for task in profile.rank():
        row = profile.tasks.index(task)
        table.add_row(
            task,
            str(profile.prompts[row]),
            *(f"{profile.similarity[row, depth]:.3f}" for depth in some),
            f"{profile.sensitivity(task):.3f}",
            f"{int(profile.insensitive(task).sum())} of {profile.layers}",
        )
    return table
