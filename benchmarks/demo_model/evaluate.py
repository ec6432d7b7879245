"""Perplexity of the demo model, of the dense model it comes from, and of the demo model with experts drawn at random.

python benchmarks/demo_model/evaluate.py --dense DIR --demo DIR --prompts PATH [--split test] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import text
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emoe.demo import quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense checkpoint")
    parser.add_argument("--demo", type=Path, required=True, help="folder that `emoe demo` built")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with prompt, reference, split")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=64, help="windows of 256 tokens, drawn with seed 0")
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.demo)
    rows = quality.windows(tokenizer, text.load_pairs(args.prompts, args.split))
    rows = rows[random.Random(0).sample(range(len(rows)), min(args.rows, len(rows)))]
    dtype = getattr(torch, args.dtype)
    dense = quality.perplexity(AutoModelForCausalLM.from_pretrained(args.dense, dtype=dtype).eval(), rows)
    model = AutoModelForCausalLM.from_pretrained(args.demo, dtype=dtype).eval()
    demo = quality.perplexity(model, rows)
    with quality.random_routing(model):
        drawn = quality.perplexity(model, rows)
    figures = {
        "split": args.split,
        "windows": len(rows),
        "tokens": rows.numel(),
        "dense_perplexity": round(dense, 3),
        "demo_perplexity": round(demo, 3),
        "random_routing_perplexity": round(drawn, 3),
        "ratio_to_dense": round(demo / dense, 3),
        "ratio_of_random_routing": round(drawn / demo, 3),
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
