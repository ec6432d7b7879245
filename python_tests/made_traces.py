"""Small traces for the tests of replay, predictors and analysis."""

from __future__ import annotations

import numpy as np

from emoe.trace.trace import DECODE, UNKNOWN, Trace


def make_trace(experts, num_experts, **fields):
    """A trace of [L, T, K] ids, one task, one prompt."""
    experts = np.asarray(experts, dtype=np.int16)
    tokens = np.zeros(experts.shape[1], dtype=np.int32)
    fields = {"task": tokens, "prompt": tokens, "phase": np.full(len(tokens), UNKNOWN, dtype=np.uint8), **fields}
    return Trace(experts=experts, num_experts=num_experts, **fields)


def random_trace(seed, *, layers=3, tokens=300, top_k=3, num_experts=12, holes=0.0):
    """Skewed and drifting, so that policies differ; `holes` is the share of picks left out."""
    rng = np.random.default_rng(seed)
    experts = np.empty((layers, tokens, top_k), dtype=np.int16)
    for layer in range(layers):
        liking = rng.gumbel(size=num_experts)
        for token in range(tokens):
            liking += 0.3 * rng.normal(size=num_experts)
            experts[layer, token] = np.argsort(liking + rng.gumbel(size=num_experts))[-top_k:]
    experts[rng.random(experts.shape) < holes] = -1
    return make_trace(experts, num_experts)


def task_trace(seed, *, prompts=24, prompt_tokens=15, layers=2, num_experts=16, top_k=2, tasks=2):
    """Each task has its own hot experts, each prompt its favourites among them; tasks in random order."""
    rng = np.random.default_rng(seed)
    hot = np.random.default_rng(99).gumbel(size=(tasks, layers, num_experts)) * 1.5
    task = rng.integers(tasks, size=prompts)
    task[:tasks] = np.arange(tasks)
    experts = np.empty((layers, prompts * prompt_tokens, top_k), dtype=np.int16)
    for prompt in range(prompts):
        liking = hot[task[prompt]] + rng.normal(size=(layers, num_experts))
        for token in range(prompt * prompt_tokens, (prompt + 1) * prompt_tokens):
            experts[:, token] = np.argsort(liking + rng.gumbel(size=liking.shape), axis=1)[:, -top_k:]
    return make_trace(
        experts,
        num_experts,
        task=np.repeat(task, prompt_tokens).astype(np.int32),
        prompt=np.repeat(np.arange(prompts), prompt_tokens).astype(np.int32),
        task_names=tuple(f"task {number}" for number in range(tasks)),
    )


def cut_trace(experts: np.ndarray, num_experts: int, prompt_tokens: int, tasks: int = 1) -> Trace:
    """Prompts of equal length, whose tasks take turns."""
    T = experts.shape[1]
    prompt = np.arange(T) // prompt_tokens
    return Trace(
        experts.astype(np.int16), num_experts, (prompt % tasks).astype(np.int32), prompt.astype(np.int32),
        np.full(T, DECODE, dtype=np.uint8), task_names=tuple(f"task{n}" for n in range(tasks)),
    )  # fmt: skip


def unrelated_trace(L: int = 3, E: int = 12, K: int = 2, prompts: int = 24, tasks: int = 1, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    picks = np.argsort(rng.random((L, prompts * 20, E)), axis=2)[:, :, :K]
    return cut_trace(picks, E, 20, tasks)
