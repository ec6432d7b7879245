"""Public routing traces, no part of the project: EMOE_TRACES names their folder (default: ../shared/traces)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emoe.trace.trace import Trace, join, load_trace

FOLDER = Path(os.environ.get("EMOE_TRACES", Path(__file__).parent.parent.parent / "shared" / "traces"))
DOMAINS = ("code", "general", "math")


def need(name: str) -> Path:
    """Path of a trace; skips the test where it is not there."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"needs the public trace {name} in {FOLDER} (EMOE_TRACES)")
    return path


def domains() -> Trace:
    """The three domains of Qwen3-30B-A3B, one after the other."""
    return join([load_trace(need(f"{name}.npz")) for name in DOMAINS])
