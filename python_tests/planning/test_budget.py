"""The budget against what the operating system counts, on a checkpoint of 220 MB (7 GB: benchmarks/budget.py)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

MIB = 1 << 20

# A tiny model runs first: pages of libraries that are touched then count as resident, more of them where they were
# installed a moment ago, and are not the budget's.
CHILD = """
import json, sys
import torch, emoe
from emoe.memory import process_memory
from transformers import OlmoeConfig, OlmoeForCausalLM
tiny = OlmoeConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                   num_key_value_heads=1, num_experts=2, num_experts_per_tok=1,
                   pad_token_id=0, bos_token_id=1, eos_token_id=2)
OlmoeForCausalLM(tiny).generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False)
before = process_memory()["peak"]
model = emoe.from_pretrained(sys.argv[1], memory_budget=sys.argv[2], context=64)
model.generate(torch.arange(3, 35).unsqueeze(0), max_new_tokens=8, do_sample=False)
print(json.dumps({"before": before, "peak": process_memory()["peak"], "plan": model.emoe.plan.to_dict()}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512, hidden_size=512, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, num_experts=64, num_experts_per_tok=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("budget")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("budget", ["60MiB", "120MiB"])
def test_the_peak_memory_of_the_process_stays_within_the_budget(budget, folder):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), budget], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    plan = result["plan"]
    assert plan["model_bytes"] > 200 * MIB
    assert plan["planned_bytes"] <= plan["budget_bytes"] == int(budget.removesuffix("MiB")) * MIB
    # 16 MiB for what else imports on first use and for activations; a second copy of the experts would be 190 MiB more.
    assert result["peak"] <= result["before"] + plan["budget_bytes"] + 16 * MIB
