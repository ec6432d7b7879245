"""`emoe run`: one prompt, answered as it is generated."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from emoe import options
from emoe.cli import common
from emoe.errors import ConfigError

if TYPE_CHECKING:
    from emoe.generate import Answer

_EPILOG = """\
examples:
  emoe run --model ./Qwen3-30B-A3B --memory-budget 8GiB --prompt "Why is the sky blue?"
  emoe run --model ./OLMoE-1B-7B --memory-budget 25% --prompt-file question.txt --max-new-tokens 400
  emoe run --model ./OLMoE-1B-7B --memory-budget 25% --predictor table.safetensors --task code --prompt "Sort a list."
  git diff | emoe run --model ./Qwen3-30B-A3B --memory-budget 8GiB --prompt-file - --json > answer.json

The text goes to stdout and one line of figures to stderr. With --temperature 0 (the default) and exact routing (the
default) the answer is the same whatever the budget. 'emoe plan' says which budgets work.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    common.add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to answer; '-' reads standard input")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file or a pipe with the prompt; '-' is standard input")

    text = parser.add_argument_group("generation")
    text.add_argument(
        "--max-new-tokens",
        type=common.positive,
        default=128,
        metavar="N",
        help="tokens to generate at most (default: 128)",
    )
    text.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put the prompt into the tokenizer's chat template (default: where it has one)",
    )
    text.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time, higher values vary more (default: 0)",
    )
    text.add_argument("--seed", type=int, metavar="N", help="of the random choices when the temperature is over 0")

    how = parser.add_argument_group("how it runs")
    shown = ("memory_budget", "dtype")
    options.add_arguments(how, (name for name in options.rows("load") if name not in shown), context=None)
    how.add_argument("--task", metavar="NAME", help="the prompt's task, for --bias, --predictor and --sensitivity")
    how.add_argument("--tasks", metavar="FILE", help="of 'emoe profile tasks': names the task from the prompt")
    common.add_trust_argument(how)

    report = parser.add_argument_group("figures")
    report.add_argument("--trace", metavar="FILE.npz", type=_trace_path, help="record which experts were routed to")
    report.add_argument(
        "--probe",
        action="store_true",
        help="read the answer twice more, with substitution and without, and say how far substitution moves the next "
        "tokens; in exact mode with half of the experts drawn at random",
    )
    report.add_argument("--per-layer", action="store_true", help="hits and misses of every layer, too")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _trace_path(text: str) -> Path:
    if not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .npz")
    return common.output_file(text)


def run(args: argparse.Namespace) -> int:
    prompt = common.read_prompt(args.prompt, args.prompt_file)
    with common.stage(f"loading {args.model}; nothing was generated"):
        import emoe
        from emoe import generate

        generate.quiet_transformers()
        tokenizer = generate.load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
        input_ids = generate.encode(tokenizer, prompt, chat=args.chat)
        context = _context(args.context, input_ids.shape[1], args.max_new_tokens)
        if args.seed is not None:
            from transformers import set_seed

            set_seed(args.seed)
        with common.checkpoint_errors(args.model):
            model = emoe.from_pretrained(
                args.model,
                **{name: getattr(args, name) for name in options.rows("load")} | {"context": context},
                trust_remote_code=args.trust_remote_code,
            )
        task = _task(args, prompt, model, tokenizer)
    tokens = input_ids.shape[1] + args.max_new_tokens
    with common.closing(model):
        with _recording(model, args.trace, prompt, task), model.emoe.request(task, tokens=tokens):
            answer = generate.answer(
                model,
                tokenizer,
                input_ids,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                write=_writer(to_stderr=args.json),
            )
            report = _report(args, prompt, task, answer, model)
        # The other figures are the answer's alone: a probe reads experts, too.
        report["probe"] = _probe(model, input_ids, answer, task) if args.probe and not answer.interrupted else None
    if args.json:
        common.print_json(report)
    else:
        print(flush=True)
    if args.per_layer and not args.json:
        _print_layers(report["stats"]["layers"])
    print(_stats_line(report), file=sys.stderr)
    if answer.interrupted:
        raise KeyboardInterrupt(f"after {len(answer.token_ids)} of at most {args.max_new_tokens} tokens")
    return 0


def _task(args: argparse.Namespace, prompt: str, model: Any, tokenizer: Any) -> str | None:
    if args.tasks is None:
        return cast("str | None", args.task)
    if args.task is not None:
        raise ConfigError("--task names the task, --tasks finds it; use one of them")
    from emoe.tasks import TaskClassifier

    return TaskClassifier.load(args.tasks, model, tokenizer).classify(prompt).task


def _context(asked: int | None, prompt_tokens: int, max_new_tokens: int) -> int:
    needed = prompt_tokens + max_new_tokens
    if asked is None:
        return max(options.Options.context, needed)
    if asked < needed:
        raise ConfigError(
            f"--context {asked} is less than the {prompt_tokens} tokens of the prompt and --max-new-tokens "
            f"{max_new_tokens}; use --context {needed}"
        )
    return asked


def _writer(*, to_stderr: bool) -> Any:
    out = sys.stderr if to_stderr else sys.stdout
    clean = common.printable if out.isatty() else str

    def write(text: str) -> None:
        out.write(clean(text))
        out.flush()

    return write


@contextlib.contextmanager
def _recording(model: Any, path: Path | None, prompt: str, task: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with model.emoe.record(path) as recorder:
        recorder.mark(prompt=prompt, task=task)
        yield


def _probe(model: Any, input_ids: Any, answer: Answer, task: str | None) -> dict[str, Any] | None:
    """What substitution does to the answer; None where it has no token that another follows."""
    from dataclasses import asdict

    from emoe.sensitivity import ANSWER_TOKENS, Prober

    new = answer.token_ids[:ANSWER_TOKENS]
    if not new:
        return None
    return asdict(Prober(model)([*input_ids[0].tolist(), *new], task, prompt_tokens=input_ids.shape[1]))


def _report(args: argparse.Namespace, prompt: str, task: str | None, answer: Answer, model: Any) -> dict[str, Any]:
    from emoe.memory import process_memory

    return {
        "model": args.model,
        "prompt": prompt,
        "task": task,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "interrupted": answer.interrupted,
        "first_token_seconds": answer.first_token_seconds,
        "tokens_per_second": answer.tokens_per_second,
        "peak_memory_bytes": process_memory()["peak"],
        "trace": str(args.trace) if args.trace else None,
        "stats": model.emoe.stats(per_layer=args.per_layer),
        "plan": model.emoe.plan.to_dict(),
    }


def _stats_line(report: dict[str, Any]) -> str:
    from emoe.memory import format_bytes

    stats = report["stats"]
    rate, first = report["tokens_per_second"], report["first_token_seconds"]
    parts = [f"{report['new_tokens']} tokens"]
    if first is not None:
        parts.append(f"first after {first:.2f} s")
    if rate is not None:
        parts.append(f"then {rate:.1f} tokens/s")
    parts += [
        f"hit rate {common.percent(stats['hit_rate'])}",
        f"read {format_bytes(stats['bytes_read'])}",
        f"stalled {stats['stall_ms']:.0f} ms",
        *_encodings_part(stats),
        *_routing_part(stats["routing"]),
        *_prediction_part(report["task"], stats["prediction"]),
        *_probe_part(report["probe"]),
        f"peak memory {format_bytes(report['peak_memory_bytes'])}",
    ]
    if report["trace"]:
        parts.append(f"trace in {report['trace']}")
    return "[" + ", ".join(parts) + "]"


def _encodings_part(stats: dict[str, Any]) -> list[str]:
    """How experts are stored, where any is encoded."""
    from emoe.memory import format_bytes
    from emoe.model.encoding import ITEMSIZE
    from emoe.model.summary import in_words

    names = [{*row["encodings"].values()} for row in stats["experts"]]
    parts = []
    if any(each - set(ITEMSIZE) for each in names):
        ways = [f"{in_words(row['encodings'])} by {row['kernels']} kernels" for row in stats["experts"]]
        parts.append(f"experts read in place: {' / '.join(dict.fromkeys(ways))}")
    if stats["decoded"]:
        stored, made = (format_bytes(stats["decoded"][name]) for name in ("stored_bytes", "bytes"))
        parts.append(f"{stored} outside them decoded to {made}")
    return parts


def _routing_part(routing: dict[str, Any]) -> list[str]:
    if routing["mode"] == "exact":
        return []
    if routing["mode"] == "coarse":
        return [f"copies computed {common.percent(routing['coarse_mass'])} of router mass"]
    return [f"{routing['mode']} routing substituted {common.percent(routing['substituted_mass'])} of router mass"]


def _prediction_part(task: str | None, prediction: dict[str, Any]) -> list[str]:
    parts = [] if task is None else [f"task {task}"]
    if prediction["predictor"]:
        parts.append(f"{prediction['base']} slots by {prediction['predictor']}, {prediction['loads']} experts moved")
    return parts


def _probe_part(probe: dict[str, Any] | None) -> list[str]:
    if probe is None:
        return []
    mass, moved = (common.percent(probe[name]) for name in ("substituted_mass", "logit_change"))
    return [f"probe of {probe['seconds']:.1f} s: substituting {mass} of router mass moves next tokens by {moved}"]


def _print_layers(layers: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("layer", *layers[0], title="per layer", title_justify="left")
    for number, layer in enumerate(layers):
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in layer.values())
        table.add_row(str(number), *cells)
    common.console(stderr=True).print(table)
