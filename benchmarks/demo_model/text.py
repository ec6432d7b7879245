"""Text for the demo model's scripts: prompts and answers of a prompts file, by split."""

from __future__ import annotations

import json
from pathlib import Path


def load_pairs(path: Path, split: str) -> list[tuple[str, str]]:
    """(prompt, answer) of one split: the file has a JSON object a line with `prompt`, `reference`, `split`."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [(row["prompt"], str(row.get("reference") or "")) for row in rows if row["split"] == split]
