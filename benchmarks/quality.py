"""The paper's table: what a model loses when only a part of its experts is resident, by mode and budget.

python benchmarks/quality.py --prompts PROMPTS.jsonl [--model DIR] [--shares 0.2,0.4,0.6,0.8] [--json FILE]
python benchmarks/quality.py --prompts PROMPTS.jsonl --tune       # the contract of each budget, on the dev split
python benchmarks/quality.py --prompts PROMPTS.jsonl --copies     # routing coarse beside exact, in float32

Base sets are task tables of the train split, placed when the task changes; figures are of the test split. All modes run
in emoe itself, with as many slots as the share gives, so loads are real. docs/quality.md has the results.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoConfig

import emoe
from emoe import demo
from emoe.analysis.recording import encode
from emoe.analysis.workload import place
from emoe.generate import load_tokenizer
from emoe.predictor import top
from emoe.predictor.table import TaskTable
from emoe.requests import Kind
from emoe.routing import attach, random_residency
from emoe.slots.resident import CacheResidency
from emoe.tasks import Prompt, load_prompts

TARGETS = {0.8: 0.01, 0.6: 0.02, 0.4: 0.05, 0.2: 0.10}  # perplexity that biased may cost, by share
# max_substituted_mass that reaches them, found by --tune on the dev split.
CONTRACTS = {0.8: 0.05, 0.6: 0.125, 0.4: 0.15, 0.2: 0.175}
GRID = (0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3)
# Encoding and exact_mass, for --copies. Those of 2 and 3 bits are for models with rows of whole blocks of 256.
COPIES = (("q4_k", 1.0), ("q4_k", 0.25), ("q5_k", 1.0), ("q8_0", 1.0))
SMALL_COPIES = (("q2_k", 1.0), ("q3_k", 1.0))
FEW = 3  # texts a task that exact is run on at each budget
LONGEST = 160  # tokens of a text


@dataclass
class Texts:
    """Of one split: token ids [1, S] of whole chats to be scored, and of prompts to be answered."""

    scored: dict[str, list[torch.Tensor]]
    asked: dict[str, list[torch.Tensor]]


@dataclass
class Row:
    """One mode at one budget; rates are over all texts of all tasks."""

    mode: str
    share: float
    bound: float | None = None
    bytes: float = 0.0  # of slots and copies, over those of all experts
    perplexity: float = 0.0
    ratio: float = 0.0
    ratio_error: float = 0.0
    task_ratio: dict[str, float] = field(default_factory=dict)
    mass: float = 0.0
    loads_per_prompt: float = 0.0
    moves_per_task: float = 0.0
    same_token: float | None = None
    alone: tuple[float, float, float] | None = None  # decode after exact prompts: ratio, its error, loads a token
    decode_ratio: float | None = None
    decode_error: float | None = None
    rouge: float | None = None
    cosine: float | None = None
    decode_loads: float | None = None
    seconds: float = 0.0


def read(path: Path, split: str, tokenizer: Any, per_task: int, asked: int, seed: int = 0) -> Texts:
    """Chats of a split, drawn at random, cut at LONGEST tokens; prompts longer than that are not drawn."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in load_prompts(path, split):
        by_task.setdefault(prompt.task, []).append(prompt)
    scored, questions = {}, {}
    for task, mine in sorted(by_task.items()):
        order = np.random.default_rng(seed).permutation(len(mine))
        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number in order:
            asking = encode(tokenizer, mine[number], answered=False)
            if asking.shape[1] <= 0.8 * LONGEST and len(chosen) < per_task:
                chosen.append((encode(tokenizer, mine[number])[:, :LONGEST], asking))
        scored[task] = [text for text, _ in chosen]
        questions[task] = [asking for _, asking in chosen[:asked]]
    return Texts(scored, questions)


def profile(model: Any, texts: Texts) -> TaskTable:
    """Uses by task of the full model."""
    with tempfile.TemporaryDirectory() as folder, model.emoe.record(Path(folder) / "trace.npz") as recorder:
        for task, ids in texts.scored.items():
            for number, each in enumerate(tqdm(ids, desc=f"profile: {task}")):
                recorder.mark(task=task, prompt=f"{task} {number}")
                with torch.no_grad():
                    model(each)
        return TaskTable.profile(recorder.trace())


class Followed(NamedTuple):
    """Decode along a given answer: likeliest token at each place [S], loss summed over its tokens, experts loaded."""

    chosen: torch.Tensor
    loss: float
    loads: int


class Bench:
    """One model at one budget; `full` is what the full model did: losses, answers, and decode along its answers."""

    def __init__(self, path: str, share: float, table: TaskTable | None, new_tokens: int, **options: Any) -> None:
        self.model = emoe.from_pretrained(path, memory_budget=share, context=LONGEST + new_tokens, **options)
        self.table, self.new_tokens = table, new_tokens
        runtime = self.model.emoe
        self.experts = [layer.num_experts for layer in runtime.layers]
        self.sizes = [runtime.loader.capacity(layer) for layer in range(len(self.experts))]
        self.share = share

    def base(self, task: str, mode: str) -> np.ndarray:
        """[L, E] mask: of the task's own table, of all others' ("untrained"), or at random."""
        if mode == "random":
            drawn = random_residency(self.experts, self.sizes, seed=sum(map(ord, task)))
            return np.stack([drawn.mask(layer).numpy() for layer in range(len(self.experts))])
        assert self.table is not None
        names = self.table.names
        which = [name for name in names if name != task] if mode == "untrained" else [task]
        return top(sum(self.table.of(names.index(name)) for name in which), self.sizes[0])

    def run(
        self,
        mode: str,
        texts: Texts,
        full: dict[str, Any] | None,
        bound: float | None = None,
        *,
        own_answers: bool = True,
    ) -> Row:
        """Scores and answers; `mode` may be "random" or "untrained": resident with other sets.

        "coarse" is how the model was loaded.

        Without `own_answers` it only decodes along the full model's.
        """
        row = Row(mode, self.share, bound)
        started = time.perf_counter()
        loss: dict[str, list[float]] = {}
        answers: dict[str, list[list[int]]] = {}
        followed: dict[str, list[Followed]] = {}
        tokens = {task: [ids.shape[1] - 1 for ids in scored] for task, scored in texts.scored.items()}
        prompts = 0
        runtime = self.model.emoe
        plain = mode in ("exact", "coarse")  # no base sets are placed
        routing = {"random": "resident", "untrained": "resident", "coarse": "exact"}.get(mode, mode)
        residency = CacheResidency(runtime.cache, self.experts)
        with ExitStack() as stack:
            attached = runtime.routing
            if mode != "coarse":
                attached = stack.enter_context(
                    attach(self.model, residency, routing=routing, max_substituted_mass=bound)
                )
            for task, scored in texts.scored.items():
                before = runtime.stats()["loads"]
                if not plain:
                    place(self.model, self.base(task, mode))
                row.moves_per_task += (runtime.stats()["loads"] - before) / len(texts.scored)
                before = runtime.stats()["loads"]
                loss[task] = []
                for ids in scored:
                    with attached.request(task):
                        loss[task].append(_loss(self._logits(ids), ids))
                    prompts += 1
                row.loads_per_prompt += runtime.stats()["loads"] - before
            tally = attached.stats()
            row.mass = tally.get("substituted_mass", 0.0) + tally.get("coarse_mass", 0.0)
            for task, asked in texts.asked.items():
                if not plain:
                    place(self.model, self.base(task, mode))
                answers[task] = []
                for number, ids in enumerate(asked):
                    if own_answers:
                        with attached.request(task):
                            answers[task].append(self._answer(ids))
                    with attached.request(task):
                        step = self._follow(ids, (answers if full is None else full["answers"])[task][number])
                    followed.setdefault(task, []).append(step)
        row.perplexity = math.exp(sum(map(sum, loss.values())) / max(1, sum(map(sum, tokens.values()))))
        row.loads_per_prompt /= max(1, prompts)
        gaps: dict[str, np.ndarray] = {}
        if full is not None and any(map(len, loss.values())):
            gaps = {task: np.subtract(loss[task], full["loss"][task]) for task in loss}
            row.task_ratio = {task: math.exp(gap.sum() / sum(tokens[task])) for task, gap in gaps.items()}
            row.ratio, row.ratio_error = ratio_of(
                np.concatenate(list(gaps.values())), [count for each in tokens.values() for count in each]
            )
        if full is not None and followed:
            steps = [pair for task in followed for pair in zip(followed[task], full["followed"][task], strict=True)]
            row.same_token = float(np.mean([(mine.chosen == theirs.chosen).float().mean() for mine, theirs in steps]))
            row.decode_ratio, row.decode_error = ratio_of(
                np.array([mine.loss - theirs.loss for mine, theirs in steps]), [len(mine.chosen) for mine, _ in steps]
            )
            row.decode_loads = sum(mine.loads for mine, _ in steps) / sum(len(mine.chosen) - 1 for mine, _ in steps)
        if full is not None and own_answers and answers:
            pairs = [pair for task in answers for pair in zip(answers[task], full["answers"][task], strict=True)]
            row.rouge = float(np.mean([rouge_l(mine, theirs) for mine, theirs in pairs]))
            row.cosine = float(np.mean([self._cosine(mine, theirs) for mine, theirs in pairs]))
        row.seconds = time.perf_counter() - started
        self.last = {
            "perplexity": row.perplexity, "loss": loss, "answers": answers, "followed": followed, "gaps": gaps,
        }  # fmt: skip
        return row

    def after_exact_prompts(self, texts: Texts, full: dict[str, Any]) -> tuple[float, float, float]:
        """What decode alone costs: perplexity ratio, its error, and loads a token."""
        mine, gaps = [], []
        for task, asked in texts.asked.items():
            for ids, answer, theirs in zip(asked, full["answers"][task], full["followed"][task], strict=True):
                with self.model.emoe.request(task):
                    mine.append(self._follow(ids, answer, exact_prompt=True))
                gaps.append(mine[-1].loss - theirs.loss)
        ratio, error = ratio_of(np.array(gaps), [len(each.chosen) for each in mine])
        return ratio, error, sum(each.loads for each in mine) / sum(len(each.chosen) - 1 for each in mine)

    def close(self) -> None:
        self.model.emoe.close(restore=False)

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits.float()

    @torch.no_grad()
    def _follow(self, ids: torch.Tensor, answer: list[int], *, exact_prompt: bool = False) -> Followed:
        """Decodes along an answer, token by token, whatever the mode would have said."""
        with self.model.emoe.requests.of_kind(Kind.EXACT) if exact_prompt else nullcontext():
            out = self.model(ids, use_cache=True)
        logits, before = [out.logits[0, -1].float()], self.model.emoe.stats()["loads"]
        for token in answer[:-1]:
            out = self.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1].float())
        rows, loads = torch.stack(logits), self.model.emoe.stats()["loads"] - before
        loss = torch.nn.functional.cross_entropy(rows, torch.tensor(answer), reduction="sum")
        return Followed(rows.argmax(-1), float(loss), loads)

    def _answer(self, ids: torch.Tensor) -> list[int]:
        """Greedy answer."""
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, ids.shape[1] :].tolist()

    def _cosine(self, first: list[int], second: list[int]) -> float:
        table = self.model.get_input_embeddings().weight.float()
        mean = table.mean(0)
        one, two = (table[torch.tensor(ids)].mean(0) - mean for ids in (first, second))
        return float(torch.nn.functional.cosine_similarity(one, two, dim=0))


def rouge_l(first: Sequence[int], second: Sequence[int]) -> float:
    """F1 of the longest common subsequence of two token sequences."""
    length = [0] * (len(second) + 1)
    for a in first:
        previous = 0
        for place_, b in enumerate(second, start=1):
            previous, length[place_] = (
                length[place_],
                previous + 1 if a == b else max(length[place_], length[place_ - 1]),
            )
    return 2 * length[-1] / (len(first) + len(second))


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))


def ratio_of(gaps: np.ndarray, tokens: Sequence[int], draws: int = 500) -> tuple[float, float]:
    """Perplexity over the full model's on the same texts, and its standard error by drawing texts again."""
    counts = np.asarray(tokens)
    chosen = np.random.default_rng(0).integers(0, len(gaps), (draws, len(gaps)))
    drawn = np.exp(gaps[chosen].sum(1) / counts[chosen].sum(1))
    return math.exp(gaps.sum() / counts.sum()), float(drawn.std())


class Whole(NamedTuple):
    """What runs of a part of the experts are held against: the texts, and the full model on them.

    Attributes:
        table: uses by task, profiled on the train split.
        row: its figures.
        last: losses, answers, and decode along them, as `Bench.run` takes them.
        plan: as `Plan.to_dict` gives it.
    """

    texts: Texts
    table: TaskTable
    row: Row
    last: dict[str, Any]
    plan: dict[str, Any]


def whole(args: argparse.Namespace, path: str, split: str, answers: int, **options: Any) -> Whole:
    """Runs the full model on a split; `answers` prompts of each task are answered."""
    tokenizer = load_tokenizer(path)
    texts = read(args.prompts, split, tokenizer, args.per_task, answers)
    bench = Bench(path, 1.0, None, args.new_tokens, **options)
    table = profile(bench.model, read(args.prompts, "train", tokenizer, args.profile, 0))
    row = bench.run("exact", texts, None)
    plan = bench.model.emoe.plan.to_dict()
    bench.close()
    return Whole(texts, table, row, bench.last, plan)


def measure(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """All rows of the table, the full model's first."""
    texts, table, first, full, plan = whole(args, path, args.split, args.answers)
    first.ratio, first.same_token, first.rouge, first.cosine = 1.0, 1.0, 1.0, 1.0
    rows = [first]
    for share in args.shares:
        bench = Bench(path, share, table, args.new_tokens)
        bound = args.contract if args.contract is not None else CONTRACTS[min(CONTRACTS, key=lambda s: abs(s - share))]
        few = Texts({task: ids[:FEW] for task, ids in texts.scored.items()}, texts.asked)
        for mode, limit, which in (
            ("resident", None, texts),
            ("untrained", None, texts),
            ("random", None, texts),
            ("resident", bound, texts),
            ("biased", bound, texts),
            ("exact", None, few),  # for its loads; the result is the full model's
        ):
            if args.modes and mode not in args.modes:
                continue
            row = bench.run(mode, which, full if which is texts else full | {"loss": _first(full["loss"])}, limit)
            rows.append(row)
            print(f"{share:.0%} {mode} {limit}: {row.ratio:.4f} in {row.seconds:.0f} s", flush=True)
        bench.close()
    return {
        "model": path, "split": args.split, "rows": [asdict(row) for row in rows],
        "expert_bytes": plan["expert_bytes"], "model_bytes": plan["model_bytes"],
        "scored_tokens": sum(ids.shape[1] - 1 for each in texts.scored.values() for ids in each),
        "prompts": sum(map(len, texts.scored.values())), "answers": sum(map(len, texts.asked.values())),
    }  # fmt: skip


def _first(loss: dict[str, list[float]]) -> dict[str, list[float]]:
    return {task: each[:FEW] for task, each in loss.items()}


def with_copies(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Routing coarse at each share of full experts, exact at as many slots, and exact at as many bytes.

    In float32: rounding to bfloat16 moves the perplexity of an answer by about as much as reads do.
    """
    args.profile = 1  # no base sets are placed
    texts, _, first, full, _ = whole(args, path, args.split, args.answers, dtype="float32")
    stored = emoe.plan(path, 1.0, calibrate=False)
    few = Texts({task: [] for task in texts.scored}, texts.asked)
    unscored = full | {"loss": {task: [] for task in texts.scored}}
    first.ratio, first.decode_ratio, first.bytes, first.decode_loads, first.same_token = 1.0, 1.0, 1.0, 0.0, 1.0
    rows = [first]

    def run(mode: str, share: float, which: Texts, **options: Any) -> None:
        bench = Bench(path, share, None, args.new_tokens, dtype="float32", **options)
        row = bench.run(mode, which, full if which is texts else unscored, own_answers=False)
        row.alone = bench.after_exact_prompts(texts, full) if mode == "coarse" else None
        row.bytes = sum(bench.sizes) / sum(bench.experts) + bench.model.emoe.plan.copy_bytes / stored.expert_bytes
        if mode == "coarse":
            row.mode, row.bound = f"coarse, {options['coarse']}", options["exact_mass"]
        bench.close()
        rows.append(row)
        print(f"{share:.0%} {row.mode} {row.bound}: {row.ratio:.4f}, decode {row.decode_ratio:.4f}", flush=True)

    config = AutoConfig.from_pretrained(path)
    blocks = config.hidden_size % 256 == config.moe_intermediate_size % 256 == 0
    for share in args.shares:
        run("exact", share, few)
        for name, mass in (SMALL_COPIES if blocks else ()) + COPIES:
            run("coarse", share, texts, routing="coarse", coarse=name, exact_mass=mass)
    for equal in sorted({round(row.bytes, 2) for row in rows if row.mode.startswith("coarse")}):
        run("exact", equal, few)
    return {
        "model": path, "split": args.split, "rows": [asdict(row) for row in rows],
        "scored_tokens": sum(ids.shape[1] - 1 for each in texts.scored.values() for ids in each),
        "prompts": sum(map(len, texts.scored.values())), "answers": sum(map(len, texts.asked.values())),
    }  # fmt: skip


def tune(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Perplexity ratio of biased for every contract of GRID, on the dev split, and the largest that costs, with its
    standard error, half of its share's target: few texts do not show everything."""
    texts, table, _, full, _ = whole(args, path, "dev", 0)
    found: dict[str, Any] = {}
    for share in args.shares:
        bench = Bench(path, share, table, args.new_tokens)
        target = TARGETS[min(TARGETS, key=lambda s: abs(s - share))]
        rows, best = [], 0.0
        for bound in GRID:
            row = bench.run("biased", texts, full, bound)
            rows.append({"bound": bound, "ratio": row.ratio, "mass": row.mass, "loads": row.loads_per_prompt})
            rows[-1]["error"] = row.ratio_error
            print(f"{share:.0%} bound {bound}: {rows[-1]}", flush=True)
            if row.ratio + row.ratio_error <= 1 + target / 2:
                best = bound
            if row.mass < 0.8 * bound or row.ratio > 1 + 1.5 * target:
                break
        found[f"{share:g}"] = {"target": target, "best": best, "rows": rows}
        bench.close()
    return {"model": path, "tuned": found}


COLUMNS = (
    "resident", "mode", "contract", "perplexity ratio", "mass", "loads a prompt", "decode ratio", "loads a token",
    "same token", "ROUGE-L", "cosine", "experts saved",
)  # fmt: skip


def cells(row: dict[str, Any], expert_bytes: int) -> list[str]:
    """One line of the table."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    return [
        f"{row['share']:.0%}",
        row["mode"],
        "-" if row["bound"] is None else f"{row['bound']:g}",
        f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}",
        percent(row["mass"]),
        f"{row['loads_per_prompt']:.0f}",
        "-" if row["decode_ratio"] is None else f"{row['decode_ratio']:.3f} ± {row['decode_error']:.3f}",
        "-" if row["decode_loads"] is None else f"{row['decode_loads']:.1f}",
        *(percent(row[name]) for name in ("same_token", "rouge", "cosine")),
        f"{(1 - row['share']) * expert_bytes / 2**20:.0f} MiB",
    ]


COPIES_COLUMNS = (
    "full slots", "mode", "exact_mass", "bytes", "prefill ratio", "loads a prompt", "decode ratio", "loads a token",
    "same token", "after exact prompts", "loads a token",
)  # fmt: skip


def copies_cells(row: dict[str, Any]) -> list[str]:
    """One line of the table of --copies."""
    scored = row["mode"] != "exact"
    return [
        f"{row['share']:.0%}",
        row["mode"],
        "-" if row["bound"] is None else f"{row['bound']:g}",
        f"{row['bytes']:.0%}",
        f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}" if scored else "1",
        f"{row['loads_per_prompt']:.0f}" if scored else "-",
        f"{row['decode_ratio']:.3f} ± {row['decode_error'] or 0:.3f}" if scored else "1",
        f"{row['decode_loads']:.1f}",
        f"{100 * row['same_token']:.1f} %",
        *((f"{row['alone'][0]:.3f} ± {row['alone'][1]:.3f}", f"{row['alone'][2]:.1f}") if row["alone"] else ("-", "-")),
    ]


def lines(result: dict[str, Any]) -> list[Sequence[str]]:
    """The heads of the columns, then each row."""
    if "expert_bytes" in result:
        return [COLUMNS, *(cells(row, result["expert_bytes"]) for row in result["rows"])]
    return [COPIES_COLUMNS, *map(copies_cells, result["rows"])]


def show(result: dict[str, Any]) -> Table:
    """For a terminal."""
    head, *rows = lines(result)
    table = Table(*head, title=_title(result))
    for row in rows:
        table.add_row(*row)
    return table


def markdown(result: dict[str, Any]) -> str:
    """One table; docs/quality.md has that of the modes in two."""
    head, *rows = lines(result)
    lined = [head, ["---"] * len(head), *rows]
    return f"{_title(result)}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lined)


def _title(result: dict[str, Any]) -> str:
    texts = f"{result['prompts']} texts, {result['scored_tokens']} tokens scored"
    return f"{texts}, {result['answers']} answers, {result['split']} split"


def arguments(description: str | None, *, shares: list[float], answers: int) -> argparse.ArgumentParser:
    """What texts and which model; for this and `equal_loads.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=Path("../shared/prompts/prompts.jsonl"))
    parser.add_argument("--model", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--shares", type=numbers, default=shares)
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--per-task", type=int, default=6, help="texts scored")
    parser.add_argument("--profile", type=int, default=10, help="texts profiled, of the train split")
    parser.add_argument("--answers", type=int, default=answers, help="prompts answered")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--json", type=Path)
    return parser


def numbers(text: str) -> list[float]:
    """Of an option: numbers with commas between."""
    return [float(each) for each in text.split(",")]


def main() -> None:
    parser = arguments(__doc__, shares=[0.2, 0.4, 0.6, 0.8], answers=2)
    parser.add_argument("--contract", type=float, help="max_substituted_mass in place of each share's own")
    parser.add_argument(
        "--modes", type=lambda text: text.split(","), help="only these rows, such as resident,untrained"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--copies", action="store_true", help="the table of routing coarse")
    parser.add_argument("--markdown", action="store_true", help="a table, which docs/quality.md has in two")
    args = parser.parse_args()
    path = args.model or str(demo.build())
    result = (tune if args.tune else with_copies if args.copies else measure)(args, path)
    if not args.tune:
        if args.markdown:
            print(markdown(result))
        else:
            Console(width=160).print(show(result))
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
