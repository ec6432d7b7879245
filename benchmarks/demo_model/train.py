"""Distils the carved model from the dense one; writes the small tensors that turn the one into the other.

    python benchmarks/demo_model/train.py --dense DIR --prompts PATH --out FOLDER --minutes 50

Trained are routers, norms and low-rank corrections, on the train split alone: Kullback-Leibler divergence to the dense
model's 64 likeliest tokens and the rest, plus the distance of a few layers' hidden states. The dense model runs once
per row, its answers are kept. FOLDER gets the deltas of the lowest divergence on the dev split (`best.safetensors`)
and a log; a SIGTERM ends the training with one more evaluation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import carve
import text
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from emoe.demo import quality

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
WATCHED_LAYERS = (5, 10, 15, 20, 25, 29)  # hidden states before these layers are matched
KEPT_TOKENS = 64


class Teacher:
    """The dense model's answers, computed once per row and kept in half precision."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def answers(self, numbers: list[int], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities [B, T, 64], their token ids, and hidden states [B, layers, T, H] of rows [B, T]."""
        if any(number not in self.kept for number in numbers):
            out = self.model(rows, output_hidden_states=True)
            best = out.logits.log_softmax(-1).topk(KEPT_TOKENS, dim=-1)
            hidden = torch.stack([out.hidden_states[i] for i in WATCHED_LAYERS], 1)
            for i, number in enumerate(numbers):
                self.kept[number] = (best.values[i].half(), best.indices[i].int(), hidden[i].bfloat16())
        values, ids, hidden = zip(*(self.kept[number] for number in numbers), strict=True)
        return torch.stack(values).float(), torch.stack(ids).long(), torch.stack(hidden).float()


def make_student(
    dense: nn.Module, rows: Tensor, shape: carve.Shape, router_scale: float, trained: Path | None = None
) -> nn.Module:
    """The carved copy of the dense model, or that of an earlier training; only what is trained requires gradients."""
    torch.manual_seed(0)
    student = copy.deepcopy(dense).eval()
    tensors = load_file(trained) if trained else {}
    if not trained:
        carve.carve(student, rows, shape, router_scale=router_scale)
    for number, layer in enumerate(student.model.layers):
        if trained:
            order, router = (tensors[f"model.layers.{number}.mlp.{name}"] for name in ("order", "router"))
            layer.mlp = carve.CarvedMLP(layer.mlp, order.long(), router, shape)
        for name in ATTENTION:
            linear = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, carve.LowRank(linear.weight, shape.rank_attention))
    for name, parameter in student.named_parameters():
        learns = name.endswith((".a", ".b", ".router")) or "norm" in name
        parameter.requires_grad_(learns)
        if trained and learns:
            parameter.data.copy_(tensors[name])
    return student


def deltas(student: nn.Module) -> dict[str, Tensor]:
    """The trained parameters and the order of the neurons, by name."""
    tensors = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    return tensors | {name: b.int() for name, b in student.named_buffers() if name.endswith(".order")}


def divergence(logits: Tensor, log_probs: Tensor, ids: Tensor) -> Tensor:
    """Mean over tokens of KL(dense || student) over the kept tokens and the rest as one."""
    # Beyond the kept tokens only their common mass is known.
    student = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    rest = (1 - log_probs.exp().sum(-1)).clamp_min(1e-4)
    student_rest = (1 - student.exp().sum(-1)).clamp_min(1e-4)
    return ((log_probs.exp() * (log_probs - student)).sum(-1) + rest * (rest.log() - student_rest.log())).mean()


def loss_of(student: nn.Module, rows: Tensor, answers: tuple[Tensor, Tensor, Tensor], hidden_weight: float) -> Any:
    """Loss, and its divergence part as a float."""
    log_probs, ids, hidden = answers
    out = student(rows, output_hidden_states=True)
    kl = divergence(out.logits.float(), log_probs, ids)
    mine = torch.stack([out.hidden_states[i] for i in WATCHED_LAYERS], 1)
    apart = (mine - hidden).square().sum(-1) / hidden.square().sum(-1)
    return kl + hidden_weight * apart.mean(), kl.item()


def contrast_of(student: nn.Module, rows: Tensor, answers: tuple[Tensor, Tensor, Tensor], wanted: float) -> Tensor:
    """How much the divergence with experts drawn at random falls short of `wanted`; 0 where it does not.

    The routed neurons are a small part of a layer, and distilled alone the corrections learn to do without them.
    """
    log_probs, ids, _ = answers
    drawn = torch.Generator().manual_seed(int(torch.randint(1 << 30, ()).item()))
    for layer in student.model.layers:
        layer.mlp.random = drawn
    try:
        return (wanted - divergence(student(rows).logits.float(), log_probs, ids)).clamp_min(0)
    finally:
        for layer in student.model.layers:
            layer.mlp.random = None


@torch.no_grad()
def evaluate(student: nn.Module, teacher: Teacher, rows: Tensor) -> dict[str, float]:
    """Divergence and perplexities on dev rows."""
    kl = nll = dense_nll = 0.0
    for i, part in enumerate(rows.split(2)):
        numbers = [-1 - 2 * i - j for j in range(len(part))]
        log_probs, ids, _ = teacher.answers(numbers, part)
        logits = student(part).logits
        kl += divergence(logits, log_probs, ids).item() * len(part) / len(rows)
        nll += F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()).item() * len(part) / len(rows)
        found = ids[:, :-1] == part[:, 1:, None]
        known = (log_probs[:, :-1] * found).sum(-1)
        dense_nll += -torch.where(found.any(-1), known, torch.tensor(-9.0)).mean().item() * len(part) / len(rows)
    return {"kl": kl, "perplexity": math.exp(nll), "dense_perplexity_about": math.exp(dense_nll)}


def groups(student: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Routers learn in proportion to their size; everything else at `rate`."""
    out = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            scale = 10 * parameter.detach().square().mean().sqrt().item() if name.endswith(".router") else 1.0
            out.append({"params": [parameter], "rate": rate * scale})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with prompt, reference, split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--shape", type=int, nargs=4, default=(672, 36, 24, 9), metavar=("SHARED", "E", "WIDTH", "K"))
    parser.add_argument("--resume", type=Path, help="deltas to go on from; --shape may have another K")
    parser.add_argument("--batch", type=int, default=1, help="rows of 256 tokens")
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--hidden-weight", type=float, default=0.5)
    parser.add_argument("--router-scale", type=float, default=0.1)
    parser.add_argument("--calibration-rows", type=int, default=32)
    parser.add_argument("--dev-rows", type=int, default=12)
    parser.add_argument("--every", type=float, default=5, help="minutes between evaluations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contrast", type=float, default=0, help="nats by which experts drawn at random are to be worse")
    parser.add_argument("--autocast", action="store_true", help="the student's products in bfloat16")
    args = parser.parse_args()

    started = time.monotonic()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pid").write_text(f"{os.getpid()}\n")
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32).eval().requires_grad_(False)
    train, dev = (quality.windows(tokenizer, text.load_pairs(args.prompts, split)) for split in ("train", "dev"))
    rng = random.Random(0)
    order = rng.sample(range(len(train)), len(train))
    dev = dev[rng.sample(range(len(dev)), args.dev_rows)]
    shape = carve.Shape(*args.shape)
    student = make_student(dense, train[order[: args.calibration_rows]], shape, args.router_scale, args.resume)
    teacher = Teacher(dense)
    optimizer = torch.optim.AdamW(groups(student, args.rate), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)

    stop = False

    def on_terminate(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_terminate)
    best, next_check, step, recent = math.inf, 0.0, 0, 0.0
    bar = tqdm(unit="tok", mininterval=30)
    while not stop:
        for start in range(0, len(order) - args.batch + 1, args.batch):
            minutes = (time.monotonic() - started) / 60
            stop = stop or minutes >= args.minutes
            if stop or minutes >= next_check:
                row = {"step": step, "minutes": minutes, "tokens": step * args.batch * 256, "train_kl": recent}
                row |= evaluate(student, teacher, dev)
                with (args.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                if row["kl"] < best:
                    best = row["kl"]
                    meta = {"shape": json.dumps(shape.to_dict()), "log": json.dumps(row)}
                    save_file(deltas(student), args.out / "best.tmp", metadata=meta)
                    (args.out / "best.tmp").replace(args.out / "best.safetensors")
                next_check = minutes + args.every
            if stop:
                break
            done = min(1.0, minutes / args.minutes)
            warm = min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * warm
            numbers = order[start : start + args.batch]
            rows = train[numbers]
            answers = teacher.answers(numbers, rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
                loss, kl = loss_of(student, rows, answers, args.hidden_weight)
                if args.contrast:
                    first = tuple(each[:1] for each in answers)
                    loss = loss + contrast_of(student, rows[:1], first, kl + args.contrast)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            recent = kl if step == 0 else 0.95 * recent + 0.05 * kl
            step += 1
            bar.update(rows.numel())
            bar.set_postfix(kl=f"{recent:.3f}")
        rng.shuffle(order)


if __name__ == "__main__":
    main()
