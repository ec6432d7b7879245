"""Trains the sequence model on a trace: batches, early stopping, an interrupt that keeps the best so far."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from emoe.errors import ConfigError, TraceError
from emoe.predictor import UNKNOWN_TASK
from emoe.predictor.prompts import prompts
from emoe.predictor.sequence import WIDTH, Network, Sample, SequenceModel, Shape, Size, build, logits, parse_size
from emoe.predictor.table import count
from emoe.trace.trace import Trace

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]

EPOCHS = 200
MINUTES = 10.0
PATIENCE = 20  # epochs without a better loss on the prompts left out
LEFT_OUT = 5  # every fifth prompt of each task
BATCH = 16
RATE = 1e-3
_DECAY = 0.1
_UNKNOWN = 0.2  # of the samples are shown without their task
_UNSEEN = 0.5  # of the samples are shown before their first token


@dataclass(frozen=True)
class Trained:
    """A training's result.

    Attributes:
        predictor: with the weights that were best on the prompts left out.
        epochs, best_epoch: run, and the one that is kept, counted from 1; 0: no epoch was finished.
        loss: cross-entropy in nats of the prompts left out, of the epoch kept.
        seconds: of all.
        stopped: "early", "epochs", "minutes" or "interrupted".
    """

    predictor: SequenceModel
    epochs: int
    best_epoch: int
    loss: float
    seconds: float
    stopped: str


def train_sequence(
    trace: Trace,
    *,
    size: str | Size = "small",
    width: int = WIDTH,
    epochs: int = EPOCHS,
    minutes: float = MINUTES,
    seed: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
) -> Trained:
    """Cross-entropy of what a prompt goes on to use, given its task, the prompt before and what was seen of it.

    Every fifth prompt of a task is left out to stop by. KeyboardInterrupt ends the training with the best so far.

    Args:
        trace: prompts, in the order of the traffic.
        size: a name in `sequence.SIZES`, or a `Size`.
        epochs, minutes: at most so many.
        progress: called after each epoch with its number, its loss, and the best loss on the prompts left out.

    Raises:
        ConfigError: an option out of range.
        TraceError: fewer than ten prompts.
    """
    if epochs < 1 or minutes <= 0 or width < 1:
        raise ConfigError(f"epochs={epochs}, minutes={minutes}, width={width}: each has to be over 0")
    started = time.monotonic()
    data = _Data(trace, width)
    shape = Shape(len(trace.task_names), trace.layers, trace.num_experts, width, parse_size(size))
    network = build(shape, data.rates[data.shown].mean(axis=0), seed)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=_DECAY)
    test = data.fixed(data.left_out)
    best, best_loss, best_epoch, epoch = copy.deepcopy(network.state_dict()), _loss_of(network, test), 0, 0
    stopped = "epochs"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for epoch in range(1, epochs + 1):
                loss = _epoch(network, optimiser, data, rng)
                left_out = _loss_of(network, test)
                if left_out < best_loss:
                    best, best_loss, best_epoch = copy.deepcopy(network.state_dict()), left_out, epoch
                if progress is not None:
                    progress(epoch, loss, best_loss)
                if epoch - best_epoch >= PATIENCE:
                    stopped = "early"
                    break
                if time.monotonic() - started > 60 * minutes:
                    stopped = "minutes"
                    break
    except KeyboardInterrupt:
        stopped = "interrupted"
        epoch -= 1
    network.load_state_dict(best)
    predictor = SequenceModel(network, shape, trace.task_names)
    return Trained(predictor, epoch, best_epoch, best_loss, time.monotonic() - started, stopped)


class _Data:
    """Prompts of a trace as samples and targets."""

    def __init__(self, trace: Trace, width: int) -> None:
        every = list(prompts(trace, trace.task_names))
        if len(every) < 2 * LEFT_OUT:
            raise TraceError(f"training needs {2 * LEFT_OUT} prompts, the profile has {len(every)}")
        self._picks = [each.picks for each in every]
        self._experts, self._width = trace.num_experts, width
        self._task = np.array([each.task for each in every])
        self.rates: Floats = np.array([self._rate(picks) for picks in self._picks], dtype=np.float32)
        left_out = np.zeros(len(every), dtype=bool)
        for task in np.unique(self._task):
            left_out[np.flatnonzero(self._task == task)[LEFT_OUT - 1 :: LEFT_OUT]] = True
        if not left_out.any():  # many tasks with few prompts each
            left_out[LEFT_OUT - 1 :: LEFT_OUT] = True
        self.left_out, self.shown = np.flatnonzero(left_out), np.flatnonzero(~left_out)

    def sample(self, prompt: int, seen: int, known: bool) -> tuple[Sample, Floats]:
        """A prompt after `seen` tokens, and the shares [L, E] of the picks of the rest."""
        picks = self._picks[prompt]
        before = self.rates[prompt - 1] if prompt else np.zeros_like(self.rates[0])
        present = self._rate(picks[:, :seen]) if seen else np.zeros_like(self.rates[0])
        rest = self._rate(picks[:, seen:])
        task = int(self._task[prompt]) if known else UNKNOWN_TASK
        return Sample(task, before, present, self._width), rest / np.maximum(rest.sum(axis=1, keepdims=True), 1e-9)

    def drawn(self, prompt: int, rng: np.random.Generator) -> tuple[Sample, Floats]:
        tokens = self._picks[prompt].shape[1]
        unseen = rng.random() < _UNSEEN or tokens < 2
        return self.sample(prompt, 0 if unseen else int(rng.integers(1, tokens)), rng.random() >= _UNKNOWN)

    def fixed(self, chosen: NDArray[np.integer]) -> list[tuple[Sample, Floats]]:
        """Each before its first token and after a quarter of them."""
        quarter = [self._picks[prompt].shape[1] // 4 for prompt in chosen]
        return [self.sample(int(p), seen, True) for p, q in zip(chosen, quarter, strict=True) for seen in {0, q}]

    def _rate(self, picks: NDArray[np.integer]) -> Floats:
        return (count(picks, self._experts) / picks.shape[1]).astype(np.float32)


def _epoch(network: Network, optimiser: torch.optim.Optimizer, data: _Data, rng: np.random.Generator) -> float:
    """Every shown prompt twice, each time at another place. Mean loss."""
    network.train()
    order = rng.permutation(np.repeat(data.shown, 2))
    losses = []
    for batch in np.array_split(order, max(1, len(order) // BATCH)):
        loss = _loss(network, [data.drawn(int(prompt), rng) for prompt in batch])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def _loss_of(network: Network, samples: Sequence[tuple[Sample, Floats]]) -> float:
    network.eval()
    parts = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    return sum(_loss(network, part).item() * len(part) for part in parts) / len(samples)


def _loss(network: Network, samples: Sequence[tuple[Sample, Floats]]) -> torch.Tensor:
    targets = torch.from_numpy(np.stack([target for _, target in samples])).to(network.bias)
    shares = logits(network, [sample for sample, _ in samples]).log_softmax(-1)
    return -(targets * shares).sum(-1).mean()
