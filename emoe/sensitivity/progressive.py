"""The offline profile of arXiv 2503.06823: outputs with the first 1, 2, ... L layers at random against the untouched.

Similarity is the overlap of next-token distributions along an answer, by default the untouched model's own greedy one:
the sum of min(p, q), which is one less their total variation distance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from emoe.errors import ConfigError
from emoe.routing import find_routers
from emoe.routing.recognise import Site
from emoe.sensitivity.profile import SensitivityProfile


@dataclass(frozen=True)
class Sample:
    """One prompt to profile with.

    Attributes:
        task: its task.
        input_ids: [T] its tokens, as the model is asked it.
        answer_ids: tokens of a good answer; () where the model's own greedy answer is to be taken, which costs a
            generation.
    """

    task: str
    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()


@torch.no_grad()
def measure(
    model: Any,
    samples: Sequence[Sample],
    *,
    threshold: float = 0.85,
    new_tokens: int = 32,
    stride: int = 1,
    batch: int = 4,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> SensitivityProfile:
    """Profiles a model: each sample is read with its answer, again and again with ever more layers at random.

    Costs a generation where a sample has no answer, and about L / stride + 1 forwards of prompt and answer. All experts
    are used, so a model inside a small budget reads nearly all of them at every forward.

    Args:
        model: a Transformers model whose routers emoe recognises, with or without a budget; in mode `exact` if with.
        samples: at least one of each task.
        threshold: of the profile.
        new_tokens: tokens of an answer, at most; it ends before where the model ends it.
        stride: every how many layers the similarity is measured; linear in between.
        batch: samples that run together.
        seed: of the random experts. A layer draws the same for a token whatever the number of random layers, so that
            curves differ by what the layers do and not by luck.
        on_step: told (forwards done, forwards in all).

    Raises:
        ConfigError: no samples, a sample without tokens, or an option out of its range.
        UnsupportedModelError: a router whose rule is not known; names family and module.
    """
    for name, value in (("new_tokens", new_tokens), ("stride", stride), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name}={value} is not at least 1")
    if not samples or not all(sample.input_ids for sample in samples):
        raise ConfigError("profiling needs samples, each of at least one token")
    sites = find_routers(model)
    depths = sorted({*range(0, len(sites), stride), len(sites)})
    # Of like length, so that little of a batch is padding.
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].input_ids))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    similar = np.zeros((len(samples), len(depths)))
    total, done = len(groups) * (len(depths) + 1), 0
    for group in groups:
        rows = [_answered(model, samples[number], new_tokens) for number in group]
        done += 1
        on_step(done, total)
        reference = None
        for column, depth in enumerate(depths):
            with random_layers(sites, depth, seed):
                found = next_token_probabilities(model, [ids for ids, _ in rows], [start for _, start in rows])
            reference = found if reference is None else reference
            for number, mine, theirs in zip(group, found, reference, strict=True):
                similar[number, column] = min(1.0, torch.minimum(mine, theirs).sum(-1).mean().item())
            done += 1
            on_step(done, total)
    return _profile(samples, similar, depths, len(sites), threshold, {"seed": seed, "new_tokens": new_tokens})


def _answered(model: Any, sample: Sample, new_tokens: int) -> tuple[list[int], int]:
    """Prompt and answer, and the position of the first token whose output counts (the prompt's last)."""
    prompt = list(sample.input_ids)
    if sample.answer_ids:
        return [*prompt, *sample.answer_ids[:new_tokens]], len(prompt) - 1
    ids = torch.tensor([prompt], device=_device(model))
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    return answer[0].tolist(), len(prompt) - 1


def next_token_probabilities(model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """[N, V] float32 of each row: after each of its tokens but the last, from position `start` on.

    Rows are padded on the right, which no causal model sees.
    """
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=_device(model))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=ids.device)
    options: dict[str, Any] = {"use_cache": False}
    first = 0
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        first = min(starts)
        options["logits_to_keep"] = longest - first
    logits = model(input_ids=ids, attention_mask=mask, **options).logits
    return [
        logits[number, start - first : len(row) - 1 - first].float().softmax(-1)
        for number, (row, start) in enumerate(zip(rows, starts, strict=True))
    ]


@contextmanager
def random_layers(sites: Sequence[Site], depth: int, seed: int = 0) -> Iterator[None]:
    """In the block, tokens of the first `depth` layers go to experts drawn at random, with the router's own weights."""
    handles = [site.module.register_forward_hook(_draw(seed * 1_000_003 + site.layer)) for site in sites[:depth]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _draw(seed: int) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = output
        drawn = torch.rand(logits.shape, generator=generator).topk(index.shape[-1], dim=-1).indices
        return logits, weights, drawn.to(device=index.device, dtype=index.dtype)

    return hook


def _profile(
    samples: Sequence[Sample],
    similar: np.ndarray[Any, np.dtype[np.float64]],
    depths: list[int],
    layers: int,
    threshold: float,
    meta: dict[str, Any],
) -> SensitivityProfile:
    tasks = sorted({sample.task for sample in samples})
    means, errors, counts = [], [], []
    for task in tasks:
        mine = similar[[number for number, sample in enumerate(samples) if sample.task == task]]
        spread = mine.std(axis=0, ddof=1) if len(mine) > 1 else np.zeros(len(depths))
        means.append(np.interp(range(layers + 1), depths, mine.mean(axis=0)))
        errors.append(np.interp(range(layers + 1), depths, spread / np.sqrt(len(mine))))
        counts.append(len(mine))
    return SensitivityProfile(
        tuple(tasks), layers, np.array(means), threshold, np.array(errors), tuple(counts), {**meta, "depths": depths}
    )


def _device(model: Any) -> torch.device:
    return cast(torch.device, model.get_input_embeddings().weight.device)
