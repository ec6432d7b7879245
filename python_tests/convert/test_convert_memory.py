"""A conversion takes the memory that it says, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_convert import wide

MEASURED = """
import json, sys
from emoe.convert.run import convert
from emoe.errors import BudgetError
from emoe.memory import process_memory, reset_peak_memory
import torch, transformers, gguf
from emoe.planning.meta import meta_model
meta_model(sys.argv[1])  # what has to be imported is there
resident = process_memory()["resident"]
try:
    convert(sys.argv[1], sys.argv[2], sys.argv[3], memory=1 << 20)
except BudgetError as error:
    needed = error.needed
assert reset_peak_memory()
convert(sys.argv[1], sys.argv[2], sys.argv[3], memory=needed + (4 << 20), progress=False)
print(json.dumps({"resident": resident, "needed": needed, "peak": process_memory()["peak"]}))
"""


@pytest.mark.parametrize(("family", "experts"), [("qwen3_moe", "q8_0"), ("gpt_oss", "fp8")])
def test_peak_memory_is_within_what_was_given_and_far_below_the_experts(family, experts, tmp_path):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512}
    count = {"num_experts": 32} if family == "qwen3_moe" else {"num_local_experts": 32}
    source = wide(tmp_path / "source", family, num_hidden_layers=3, **sizes, **count)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, source, tmp_path / "out", experts],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    experts_bytes = json.loads((tmp_path / "out/emoe-convert.json").read_text())["report"]["bytes_before"]["experts"]
    assert found["peak"] <= found["needed"] + (4 << 20)
    assert found["peak"] - found["resident"] < experts_bytes
