"""The budget against what the operating system counts, on a checkpoint of 220 MB (7 GB: benchmarks/budget.py)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

MIB = 1 << 20

# A tiny model of the same kind runs in emoe first: what libraries import, compile and touch on first use depends on the
# CPU and on the installation, is the same for every model, and is not the budget's (benchmarks/budget.py counts it).
CHILD = """
import json, sys
import torch, emoe
from emoe.memory import process_memory

def run(folder, budget):
    model = emoe.from_pretrained(folder, memory_budget=budget, context=64)
    model.generate(torch.arange(3, 35).unsqueeze(0), max_new_tokens=8, do_sample=False)
    return model

run(sys.argv[1], "30MiB").emoe.close()
before = process_memory()["peak"]
model = run(sys.argv[2], sys.argv[3])
print(json.dumps({"before": before, "peak": process_memory()["peak"], "plan": model.emoe.plan.to_dict()}))
"""


def saved(path, **sizes):
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512, num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("budget")
    tiny = saved(root / "tiny", hidden_size=32, intermediate_size=16, num_hidden_layers=1)
    return tiny, saved(root / "whole", hidden_size=512, intermediate_size=256, num_hidden_layers=4)


@pytest.mark.parametrize("budget", ["60MiB", "120MiB"])
def test_the_peak_memory_of_the_process_stays_within_the_budget(budget, folders):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, folders), budget], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    plan = result["plan"]
    assert plan["model_bytes"] > 200 * MIB
    assert plan["planned_bytes"] <= plan["budget_bytes"] == int(budget.removesuffix("MiB")) * MIB
    # 16 MiB for what the heap keeps and for larger activations; a second copy of the experts would be 190 MiB more.
    assert result["peak"] <= result["before"] + plan["budget_bytes"] + 16 * MIB
