"""What a routing mode costs a layer: time of a router with the mode's hook less time without it.

python benchmarks/routing.py [--rounds 30] [--json FILE]

128 experts of which 8 are picked (softmax), 256 of which 8 (sigmoid, correction, 8 groups), 60 % resident. Tokens are
random, so that nearly every row has picks to exchange: the worst case. Processor time, best of all rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from rich.console import Console
from rich.table import Table

from emoe.routing import Routing, parse_options, random_residency

SHARE = 0.6
TARGET = 60.0  # microseconds a layer for one token
MODES: dict[str, dict[str, Any]] = {
    "all resident": {"routing": "resident"},
    "resident": {"routing": "resident"},
    "biased 0.3": {"routing": "biased", "bias": 0.3},
    "biased 0.3, mass 5 %": {"routing": "biased", "bias": 0.3, "max_substituted_mass": 0.05},
}
SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 8,
}


def models() -> dict[str, Any]:
    """One layer each, with experts as small as can be."""
    torch.manual_seed(0)
    softmax = tf.Qwen3MoeConfig(
        **SMALL, num_hidden_layers=1, num_experts=128, moe_intermediate_size=4, norm_topk_prob=True
    )
    grouped = tf.DeepseekV3Config(
        **SMALL,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        n_routed_experts=256,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        moe_intermediate_size=4,
        q_lora_rank=8,
        kv_lora_rank=8,
    )
    built = {
        "softmax, 8 of 128": tf.AutoModelForCausalLM.from_config(softmax).eval(),
        "groups, 8 of 256": tf.AutoModelForCausalLM.from_config(grouped).eval(),
    }
    for model in built.values():
        torch.nn.init.normal_(model.model.layers[0].mlp.gate.weight)
    built["groups, 8 of 256"].model.layers[0].mlp.gate.e_score_correction_bias.normal_(std=0.05)
    return built


def seconds(router: Any, inputs: list[torch.Tensor]) -> float:
    started = time.thread_time()
    for hidden in inputs:
        router(hidden)
    return (time.thread_time() - started) / len(inputs)


def measure(model: Any, options: dict[str, Any], share: float, tokens: int, rounds: int) -> float:
    """Microseconds that the hook adds to one call."""
    experts = model.model.layers[0].mlp.experts.num_experts
    inputs = [torch.randn(tokens, SMALL["hidden_size"]) for _ in range(50 if tokens == 1 else 5)]
    routing = Routing(model, random_residency([experts], int(experts * share)), parse_options(**options))
    router = routing.sites[0].module
    best = {False: float("inf"), True: float("inf")}
    for _ in range(rounds):
        best[False] = min(best[False], seconds(router, inputs))
        routing.start()
        best[True] = min(best[True], seconds(router, inputs))
        routing.close()
    return 1e6 * (best[True] - best[False])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("router", "mode", "1 token, us", f"target {TARGET:g}", "512 tokens, us a token")
    results = []
    for name, model in models().items():
        for mode, options in MODES.items():
            share = 1.0 if mode == "all resident" else SHARE
            one = measure(model, options, share, 1, args.rounds)
            many = measure(model, options, share, 512, args.rounds) / 512
            results.append({"router": name, "mode": mode, "one_token_us": one, "prefill_us_per_token": many})
            table.add_row(name, mode, f"{one:.0f}", "met" if one <= TARGET else "missed", f"{many:.1f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
