"""Predictors that count: how often each task used an expert in a profile, and what recent prompts used.

The first is the frequency profile by task of arXiv 2503.06823; the second its request-to-request reuse (eMoE-A)
without a model: the mean of the last prompts stands for the next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emoe.errors import TraceError
from emoe.files import texts
from emoe.predictor import UNKNOWN_TASK, files
from emoe.trace.trace import Trace


class TaskTable:
    """Uses of each expert per token, by task.

    Args:
        frequency: [N, L, E] uses per token of each task.
        names: the N tasks' names.
    """

    def __init__(self, frequency: NDArray[np.float32], names: tuple[str, ...]) -> None:
        if frequency.ndim != 3 or len(frequency) != len(names):
            raise TraceError(f"a task table of shape {frequency.shape} does not fit {len(names)} task names")
        self.frequency = frequency.astype(np.float32, copy=False)
        self.names = names
        self._mean = self.frequency.mean(axis=0)
        self._task = UNKNOWN_TASK

    @classmethod
    def profile(cls, trace: Trace) -> TaskTable:
        """Counts a trace; tasks of which it has no token get the mean of the others."""
        N, L, E = len(trace.task_names), trace.layers, trace.num_experts
        frequency = np.zeros((N, L, E), dtype=np.float32)
        seen = np.bincount(trace.task, minlength=N) > 0
        for task in np.flatnonzero(seen):
            mine = trace.experts[:, trace.task == task]
            for layer in range(L):
                picks = mine[layer]
                frequency[task, layer] = np.bincount(picks[picks >= 0], minlength=E) / mine.shape[1]
        if not seen.any():
            raise TraceError("a trace without tokens gives no task table")
        frequency[~seen] = frequency[seen].mean(axis=0)
        return cls(frequency, trace.task_names)

    def of(self, task: int) -> NDArray[np.float32]:
        """[L, E] of one task; the mean of all for UNKNOWN_TASK."""
        return self._mean if task == UNKNOWN_TASK else self.frequency[task]

    def begin(self, task: int) -> None:
        self._task = task

    def observe(self, picks: NDArray[np.integer]) -> None:
        """A table does not learn."""

    def rank(self) -> NDArray[np.float32]:
        return self.of(self._task)

    def anew(self) -> TaskTable:
        return TaskTable(self.frequency, self.names)

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file."""
        files.write(path, "task-table", {"frequency": self.frequency}, {"names": self.names})

    @classmethod
    def load(cls, path: str | Path) -> TaskTable:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        tensors, settings = files.read(path, "task-table", {"frequency": 3})
        try:
            return cls(tensors["frequency"], texts(settings, "names"))
        except (ValueError, TraceError) as error:
            raise files.fail(path, error) from error


class GlobalTable:
    """Uses of each expert per token, whatever the task.

    Args:
        frequency: [L, E] uses per token.
    """

    names: tuple[str, ...] = ()

    def __init__(self, frequency: NDArray[np.float32]) -> None:
        self.frequency = frequency

    @classmethod
    def profile(cls, trace: Trace) -> GlobalTable:
        """Counts a trace.

        Raises:
            TraceError: it has no tokens.
        """
        if not trace.tokens:
            raise TraceError("a trace without tokens gives no table")
        return cls((count(trace.experts, trace.num_experts) / trace.tokens).astype(np.float32))

    def begin(self, task: int) -> None:
        """A table does not learn."""

    def observe(self, picks: NDArray[np.integer]) -> None:
        """A table does not learn."""

    def rank(self) -> NDArray[np.float32]:
        return self.frequency

    def anew(self) -> GlobalTable:
        return GlobalTable(self.frequency)

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file."""
        files.write(path, "global-table", {"frequency": self.frequency}, {})

    @classmethod
    def load(cls, path: str | Path) -> GlobalTable:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        return cls(files.read(path, "global-table", {"frequency": 2})[0]["frequency"])


class Recent:
    """Uses in the last prompts, whatever their task; older prompts fade.

    Args:
        layers, experts: shape of the scores.
        prompts: after this many prompts a prompt's weight has fallen to 1/e. Of the public traces' domains some like 3
            best, some 12; the difference is below one point.
    """

    names: tuple[str, ...] = ()

    def __init__(self, layers: int, experts: int, prompts: float = 6.0) -> None:
        self._prompts = prompts
        self._keep = float(np.exp(-1.0 / prompts))
        self._uses = np.zeros((layers, experts), dtype=np.float64)
        self._observed = False

    def begin(self, task: int) -> None:
        if self._observed:  # a beginning that no token followed was no prompt
            self._uses *= self._keep
        self._observed = False

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._observed = True
        self._uses += count(picks, self._uses.shape[1])

    def rank(self) -> NDArray[np.float64]:
        return self._uses

    def anew(self) -> Recent:
        return Recent(*self._uses.shape, self._prompts)


def count(picks: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """[L, E] uses in [L, T, K] picks; -1 is none."""
    L = len(picks)
    places = picks.reshape(L, -1) + (np.arange(L) * (experts + 1) + 1)[:, None]  # the first place takes "no pick"
    return np.bincount(places.reshape(-1), minlength=L * (experts + 1)).reshape(L, experts + 1)[:, 1:]
