"""What emoe adds on the host beside a model, with bounds that no caller should notice.

python benchmarks/overheads.py [--check] [--json FILE]

Rivals: the two simulations of slots beside a predictor, a token of 48 layers of 128 experts, 8 picks. Classifiers: a
prompt of 600,000 characters, of which they read the beginning and the end. The best of some rounds, one thread;
--check: exit 1 where a bound is passed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emoe import tasks
from emoe.slots.policy import make
from emoe.slots.shadow import Loading

RIVALS, CLASSIFIER = 2e-3, 0.05  # seconds at most
TEXTS = {
    "translation": "Translate to German: The cat sleeps on the roof.",
    "code": "Write a Python function that returns the largest number in a list.",
    "math": "A baker sells 24 rolls in the morning and 12 in the afternoon. How many is that?",
}


def best_of(rounds: int, call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def rivals(policy: str) -> float:
    """Seconds a token."""
    rng = np.random.default_rng(0)
    tokens = [np.sort(rng.permuted(np.tile(np.arange(128), (48, 1)), axis=1)[:, :8])[:, None] for _ in range(60)]
    both = Loading([128] * 48, [38] * 48, make(policy))
    return best_of(5, lambda: [both.observe(picks) for picks in tokens]) / len(tokens)


def classifier(kind: str) -> float:
    """Seconds for a long prompt."""
    words = sorted({word for text in TEXTS.values() for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fitted = tasks.make(kind, torch.nn.Embedding(len(words) + 1, 64), fast)
    fitted.fit([text for text in TEXTS.values() for _ in range(4)], [task for task in TEXTS for _ in range(4)])
    text = TEXTS["translation"] * 12_500
    return best_of(3, lambda: fitted.classify(text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is passed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [
        {"what": f"rivals of {policy}, a token", "seconds": rivals(policy), "bound": RIVALS}
        for policy in ("lru", "next-use")
    ]
    rows += [
        {"what": f"{kind} classifier, a long prompt", "seconds": classifier(kind), "bound": CLASSIFIER}
        for kind in tasks.KINDS
    ]
    table = Table("what", "milliseconds", "bound")
    for row in rows:
        table.add_row(row["what"], f"{1e3 * row['seconds']:.4g}", f"{1e3 * row['bound']:g}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(args.check and any(row["seconds"] > row["bound"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
