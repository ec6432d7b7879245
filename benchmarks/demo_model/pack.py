"""Turns the deltas that train.py wrote into the file that emoe ships.

python benchmarks/demo_model/pack.py --trained FOLDER/best.safetensors --out emoe/demo/smollm2_135m_moe.safetensors
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from emoe.demo.delta import ATTENTION, FEED_FORWARD, NORMS, Delta, Shape, load_delta, save_delta


def pack(path: Path) -> Delta:
    with safe_open(path, framework="pt") as file:
        trained = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        values = json.loads(file.metadata()["shape"])
    shape = Shape(*(values[name] for name in ("shared", "experts", "width", "top_k")))
    layers = sum(name.endswith(".order") for name in trained)

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([trained[f"model.layers.{layer}.{name}"] for layer in range(layers)])

    tensors = {
        "order": stacked("mlp.order"),
        "router": stacked("mlp.router"),
        "norm.final": trained["model.norm.weight"],
    }
    for key, name in NORMS.items():
        tensors[f"norm.{key}"] = stacked(f"{name}.weight")
    sources = {name: f"mlp.{name}" for name in FEED_FORWARD} | {name: f"self_attn.{name}_proj" for name in ATTENTION}
    for key, name in sources.items():
        # Both factors get the same norm per rank, so that neither loses more to int8.
        a, b = stacked(f"{name}.a"), stacked(f"{name}.b").transpose(1, 2)  # [L, r, in], [L, r, out]
        balance = (b.norm(dim=-1, keepdim=True).clamp_min(1e-8) / a.norm(dim=-1, keepdim=True).clamp_min(1e-8)).sqrt()
        tensors[f"{key}.a"], tensors[f"{key}.b"] = a * balance, b / balance
    return Delta(shape, tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--top-k", type=int, help="active experts per token, where other than in training")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    delta = pack(args.trained)
    if args.top_k:
        delta = replace(delta, shape=replace(delta.shape, top_k=args.top_k))
    save_delta(delta, args.out)
    again = load_delta(args.out)
    for name in delta.tensors:
        if name.endswith(".a"):
            base = name[:-2]
            wanted, got = delta.correction(base, 0), again.correction(base, 0)
            print(
                f"{base}: relative error of int8 {((got - wanted).norm() / wanted.norm().clamp_min(1e-9)).item():.4f}"
            )
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
