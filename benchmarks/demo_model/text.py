"""Text for the demo model's scripts: chat formatting, packing into rows, the held-out rows that perplexity is measured on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]  # prompt, answer


def load_pairs(path: Path, split: str) -> list[Pair]:
    """Prompts and references of one split of a prompts file: a JSON object a line with `prompt`, `reference`, `split`."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [(row["prompt"], str(row.get("reference") or "")) for row in rows if row["split"] == split]


def load_texts(paths: Iterable[Path]) -> list[str]:
    """Chat texts written by generate_text.py: a JSON object a line with `text`."""
    return [json.loads(line)["text"] for path in paths for line in path.read_text("utf-8").splitlines() if line.strip()]


def chat(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Pair]) -> list[str]:
    """Pairs as whole chats in the model's own template."""
    return [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False
            )
        )
        for prompt, answer in pairs
    ]


def pack(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, *, seed: int = 0) -> torch.Tensor:
    """Whole texts laid into rows [N, length], -1 where a row has nothing left; a longer text is cut.

    Every row begins with the beginning of a text, as every request of a chat does.
    """
    encoded = [ids[:length] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    random.Random(seed).shuffle(encoded)
    rows: list[list[int]] = []
    open_rows: list[int] = []
    for ids in encoded:
        place = next((i for i in open_rows if len(rows[i]) + len(ids) <= length), None)
        if place is None:
            place = len(rows)
            rows.append([])
            open_rows = [*open_rows[-32:], place]
        rows[place].extend(ids)
    out = torch.full((len(rows), length), -1, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> torch.Tensor:
    """All texts in one stream cut into windows [N, length]; the rest that fills no window is left out."""
    stream = [i for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in ids]
    whole = len(stream) // length * length
    return torch.tensor(stream[:whole]).view(-1, length)
