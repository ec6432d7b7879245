"""Answers prompts in a process of its own, so that the peak memory is that of one run and no other.

`run` starts it and relays the text; the child (`python -m emoe.demo.session`) reads a job from standard input and
writes JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from emoe import errors


@dataclass(frozen=True)
class Job:
    """What one process answers.

    Attributes:
        memory_budget: as in `emoe.from_pretrained`.
        context: tokens of KV cache the plan leaves room for.
        repetition_penalty: as in `generate.answer`.
        routing: as in `emoe.from_pretrained`.
        along: of each prompt the answer to give in the place of its own; none: its own.
    """

    model: str
    memory_budget: int | str | float
    prompts: tuple[str, ...]
    max_new_tokens: int
    context: int = 512
    repetition_penalty: float = 1.0
    routing: str = "exact"
    along: tuple[tuple[int, ...], ...] = ()


def run(job: Job, on_event: Callable[[str, Any], None]) -> dict[str, Any]:
    """Runs a job in a child process.

    Args:
        on_event: called with ("prompt", index) as an answer begins and ("text", piece) as it grows.

    Returns:
        answers (per prompt: text, token_ids, prompt_tokens, first_token_seconds, hit_rate), tokens_per_second of
        decode, same_tokens (share of `along` that is the model's own, None without), peak_bytes (VmHWM), start_bytes
        (resident before loading), stats and plan of `model.emoe`.

    Raises:
        EmoeError: what the child raised, by its class and message; or the child ended otherwise.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "emoe.demo.session"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    report: dict[str, Any] | None = None
    with child:
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:  # a child that died is reported below
                stdin.write(json.dumps(asdict(job)))
            for line in child.stdout:
                kind, value = json.loads(line)
                if kind == "report":
                    report = value
                elif kind == "error":
                    raise _rebuilt(value)
                else:
                    on_event(kind, value)
        except BaseException:
            child.terminate()
            raise
    if report is None:
        raise errors.EmoeError(f"the process that ran {job.model} ended with status {child.returncode}")
    return report


def _rebuilt(value: dict[str, str]) -> errors.EmoeError:
    found = getattr(errors, value["kind"], errors.EmoeError)
    error: errors.EmoeError = found(value["message"])
    return error


def _answer_all(job: Job, emit: Callable[[str, Any], None]) -> dict[str, Any]:
    import emoe
    from emoe import generate
    from emoe.memory import process_memory

    generate.quiet_transformers()
    tokenizer = generate.load_tokenizer(job.model)
    start_bytes = process_memory()["resident"]
    model = emoe.from_pretrained(job.model, memory_budget=job.memory_budget, context=job.context, routing=job.routing)
    along = [generate.Along(answer) for answer in job.along]
    answers, tokens, seconds = [], 0, 0.0
    before = model.emoe.stats()
    for number, prompt in enumerate(job.prompts):
        emit("prompt", number)
        answer = generate.answer(
            model,
            tokenizer,
            generate.encode(tokenizer, prompt),
            max_new_tokens=job.max_new_tokens,
            write=lambda piece: emit("text", piece),
            repetition_penalty=job.repetition_penalty,
            along=along[number] if along else None,
        )
        if answer.interrupted:
            raise KeyboardInterrupt
        tokens += max(0, len(answer.times) - 1)
        seconds += answer.times[-1] - answer.times[0] if answer.times else 0.0
        after = model.emoe.stats()
        hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
        before = after
        answers.append(
            {
                "text": answer.text,
                "token_ids": answer.token_ids,
                "prompt_tokens": answer.prompt_tokens,
                "first_token_seconds": answer.first_token_seconds,
                "hit_rate": hits / max(1, hits + misses),
            }
        )
    return {
        "answers": answers,
        "tokens_per_second": tokens / seconds if seconds else None,
        "same_tokens": sum(each.same for each in along) / sum(len(each.answer) for each in along) if along else None,
        "peak_bytes": process_memory()["peak"],
        "start_bytes": start_bytes,
        "stats": model.emoe.stats(),
        "plan": model.emoe.plan.to_dict(),
    }


def main() -> int:
    """The child: one job in, JSON lines [kind, value] out."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever else prints must not get between the lines

    def emit(kind: str, value: Any) -> None:
        print(json.dumps([kind, value], default=str), file=out, flush=True)

    values = json.loads(sys.stdin.read())
    job = Job(**values | {"prompts": tuple(values["prompts"]), "along": tuple(map(tuple, values["along"]))})
    try:
        emit("report", _answer_all(job, emit))
    except errors.EmoeError as error:
        emit("error", {"kind": type(error).__name__, "message": str(error)})
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
