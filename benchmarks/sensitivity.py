"""Sensitivity of tasks on the demo model: the offline profile, the online estimate, and whether they rank tasks alike.

    python benchmarks/sensitivity.py --prompts PATH [--profile FILE] [--json FILE]

The profile is made from prompts of the train split, the estimate from probes of the dev split, both along reference
answers. Spearman's rank correlation of the two is given with its spread when both are drawn again within their errors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import emoe
import emoe.demo
from emoe import generate, native, sensitivity
from emoe.cli import common
from emoe.sensitivity.online import spearman
from emoe.tasks import load_prompts

TARGET = 0.8


def samples(tokenizer: Any, path: Path, split: str, most: int) -> list[sensitivity.Sample]:
    """The first `most` prompts of each task that have an answer, with it."""
    counts: dict[str, int] = {}
    found = []
    for prompt in load_prompts(path, split):
        answer = tokenizer(prompt.reference, add_special_tokens=False)["input_ids"]
        counts[prompt.task] = counts.get(prompt.task, 0) + bool(answer)
        if answer and counts[prompt.task] <= most:
            ids = generate.encode(tokenizer, prompt.prompt)[0].tolist()
            found.append(sensitivity.Sample(prompt.task, tuple(ids), tuple(answer)))
    return found


def offline(model: Any, chosen: list[sensitivity.Sample], args: argparse.Namespace) -> sensitivity.SensitivityProfile:
    with tqdm(desc="offline profile", unit="forward", disable=None) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return sensitivity.measure(
            model, chosen, new_tokens=args.new_tokens, stride=args.stride, seed=args.seed, on_step=on_step
        )


def online(
    model: Any, chosen: list[sensitivity.Sample], args: argparse.Namespace
) -> tuple[sensitivity.OnlineSensitivity, list[sensitivity.Probe]]:
    """Probes each prompt with its answer, as serving would a share of the finished requests."""
    estimate = sensitivity.OnlineSensitivity()
    prober = sensitivity.Prober(model, share=args.resident, seed=args.seed)
    probes = []
    for sample in tqdm(chosen, desc="online probes", unit="probe", disable=None):
        tokens = [*sample.input_ids, *sample.answer_ids[: args.new_tokens]]
        probes.append(prober(tokens, sample.task, prompt_tokens=len(sample.input_ids)))
        estimate.observe(sample.task, probes[-1].substituted_mass, probes[-1].logit_change)
    return estimate, probes


def spread(profile: sensitivity.SensitivityProfile, estimate: sensitivity.OnlineSensitivity) -> dict[str, list[float]]:
    """5, 50 and 95 % of Spearman when both are drawn anew, and of the profile with itself: the best there could be."""
    generator = np.random.default_rng(0)
    first = np.array([profile.sensitivity(task) for task in profile.tasks])
    first_error = profile.error[:, 1:].mean(axis=1)  # as if a prompt's errors at all depths were one: an upper bound
    found = [estimate.sensitivity(task) for task in profile.tasks]
    second, second_error = np.array([each.value for each in found]), np.array([each.error for each in found])
    both, own = [], []
    for _ in range(2000):
        drawn = generator.normal(first, first_error)
        both.append(spearman(drawn, generator.normal(second, second_error)))
        own.append(spearman(drawn, generator.normal(first, first_error)))
    return {
        "both": np.quantile(both, [0.05, 0.5, 0.95]).round(3).tolist(),
        "profile with itself": np.quantile(own, [0.05, 0.5, 0.95]).round(3).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, metavar="PATH", help="JSON lines of labelled prompts")
    parser.add_argument("--model", metavar="PATH", help="default: the demo model, built where it is not there")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="read from there, or written there")
    parser.add_argument("--profiled", type=int, default=24, metavar="N", help="prompts of each task for the profile")
    parser.add_argument("--probed", type=int, default=24, metavar="N", help="prompts of each task for the estimate")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="of an answer, at most")
    parser.add_argument("--stride", type=int, default=10, metavar="N")
    parser.add_argument("--resident", type=float, default=0.5, metavar="SHARE", help="of the experts, in probes")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    native.load().set_threads(1)
    common.quiet_transformers()
    folder = args.model or str(emoe.demo.build())
    tokenizer = generate.load_tokenizer(folder)
    model = emoe.from_pretrained(folder, memory_budget=1.0)
    started = time.process_time()
    if args.profile is not None and args.profile.exists():
        profile = sensitivity.SensitivityProfile.load(args.profile)
    else:
        profile = offline(model, samples(tokenizer, args.prompts, "train", args.profiled), args)
        if args.profile is not None:
            profile.save(args.profile)
    offline_seconds = time.process_time() - started
    started = time.process_time()
    estimate, probes = online(model, samples(tokenizer, args.prompts, "dev", args.probed), args)
    online_seconds = time.process_time() - started
    report(args, profile, estimate, probes, (offline_seconds, online_seconds))
    model.emoe.close(restore=False)


def report(
    args: argparse.Namespace,
    profile: sensitivity.SensitivityProfile,
    estimate: sensitivity.OnlineSensitivity,
    probes: list[sensitivity.Probe],
    seconds: tuple[float, float],
) -> None:
    L = profile.layers
    table = Table(
        "task", f"{L // 6} random", f"{L // 2} random", f"{L} random", "sensitivity", "insensitive", "online", "mass",
        "change", title=f"{sum(profile.prompts)} prompts profiled, {len(probes)} probed", title_justify="left",
    )  # fmt: skip
    for row, task in sorted(enumerate(profile.tasks), key=lambda pair: -profile.sensitivity(pair[1])):
        found = estimate.sensitivity(task)
        mine = [probe for probe in probes if probe.task == task]
        table.add_row(
            task,
            *(f"{profile.similarity[row, depth]:.3f}" for depth in (L // 6, L // 2, L)),
            f"{profile.sensitivity(task):.3f} ± {profile.error[row, 1:].mean():.3f}",
            f"{int(profile.insensitive(task).sum())} of {L}",
            f"{found.value:.3f} ± {found.error:.3f}",
            f"{np.mean([probe.substituted_mass for probe in mine]):.3f}",
            f"{np.mean([probe.logit_change for probe in mine]):.3f}",
        )
    Console(width=130).print(table)
    offline_values = [profile.sensitivity(task) for task in profile.tasks]
    agreement = spearman(offline_values, [estimate.sensitivity(task).value for task in profile.tasks])
    within = spread(profile, estimate)
    verdict = "met" if agreement >= TARGET else "missed"
    print(f"Spearman {agreement:.3f} (target {TARGET}: {verdict}); drawn anew, 5/50/95 %: {within['both']}")
    print(f"the profile with itself, drawn anew: {within['profile with itself']}")
    print(f"processor time: profile {seconds[0]:.0f} s, probes {seconds[1]:.0f} s", file=sys.stderr)
    if args.json:
        values = {
            "profile": profile.to_dict(), "online": estimate.to_dict(), "spearman": agreement, "spread": within,
            "cpu_seconds": seconds, "probe_seconds": sum(probe.seconds for probe in probes),
        }  # fmt: skip
        args.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
