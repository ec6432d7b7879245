"""The tables of GGUF's IQ formats in C++ are those of the `gguf` library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_grids_in_cpp_are_those_of_the_gguf_library():
    command = [sys.executable, str(ROOT / "scripts/grids.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
