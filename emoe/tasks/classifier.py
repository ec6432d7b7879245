"""What every task classifier does: fit with held-out calibration, classify with "unknown", confusion, save and load.

A subclass turns texts into features and features into evidence for each task; this file decides what that is worth.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoe import files
from emoe.errors import CheckpointError, ConfigError
from emoe.files import jsontext
from emoe.tasks.calibration import Confidence, fit_temperature, signals, softmax
from emoe.tasks.confusion import ConfusionMatrix

KINDS = {
    "keywords": ("emoe.tasks.keywords", "KeywordClassifier"),
    "embeddings": ("emoe.tasks.embeddings", "EmbeddingClassifier"),
}
FORMAT = "emoe-tasks"
FOLDS = 4
SEED = 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Classification:
    """What a text was taken for.

    Attributes:
        task: the task, or None: unknown.
        confidence: 0 to 1, that the likeliest task is right and not that the text is of no known task.
        probabilities: of each known task, if it is one of them; they sum to 1.
        milliseconds: what it took.
    """

    task: str | None
    confidence: float
    probabilities: dict[str, float]
    milliseconds: float


class Head(Protocol):
    """Evidence for tasks, from features: what is refitted for each held-out part."""

    def evidence(self, features: Sequence[Any]) -> tuple[Floats, Floats]:
        """Of n texts: [n, N] log-likelihood of each task but for a constant, and [n, N] likeness to its texts."""


class TaskClassifier(ABC):
    """Tells the task of a text. `make(kind)` gives one to `fit`, `TaskClassifier.load(path)` one that was saved.

    Args:
        threshold: of confidence; below it the answer is None.
    """

    kind: str

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold={threshold} is not between 0 and 1")
        self.threshold = threshold
        self.names: tuple[str, ...] = ()
        self._head: Head | None = None
        self._confidence = Confidence.never()
        self._temperature = 1.0

    # What a kind of classifier adds

    @abstractmethod
    def _learn(self, texts: Sequence[str]) -> list[Any]:
        """Features of the training texts, after learning from them what features are (a vocabulary, axes)."""

    @abstractmethod
    def _features(self, texts: Sequence[str]) -> list[Any]:
        """Features of each text; None for a text that has nothing to go by."""

    @abstractmethod
    def _fit_head(self, features: list[Any], labels: NDArray[np.int64], tasks: int) -> Head:
        """Evidence from labelled features; each of the tasks has at least one."""

    @abstractmethod
    def _state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Tensors and settings to save."""

    @classmethod
    @abstractmethod
    def _restore(
        cls, tensors: dict[str, NDArray[Any]], settings: dict[str, Any], model: Any, tokenizer: Any
    ) -> TaskClassifier:
        """The inverse of `_state`; KeyError, TypeError or ValueError where they do not fit."""

    # What they share

    def fit(self, prompts: Sequence[str], tasks: Sequence[str]) -> TaskClassifier:
        """Learns from labelled prompts, and calibrates confidence on parts of them held out in turn.

        Two things are held out: a quarter of the prompts, whose task the rest knows; and of that quarter one task,
        which the rest then does not know. So unknown text has been seen before the first unknown prompt arrives.

        Args:
            prompts: texts; at least two of each task.
            tasks: the task of each.

        Raises:
            ConfigError: fewer than two tasks, a task with a single prompt, or not one task for each prompt.
        """
        if len(prompts) != len(tasks):
            raise ConfigError(f"{len(prompts)} prompts and {len(tasks)} tasks")
        self._head = None  # whatever fails below, this is no longer the old classifier
        self.names = tuple(sorted(set(tasks)))
        if len(self.names) < 2:
            raise ConfigError(f"a classifier needs prompts of two tasks or more, not of {list(self.names)}")
        labels = np.array([self.names.index(task) for task in tasks], dtype=np.int64)
        few = [name for name, count in zip(self.names, np.bincount(labels), strict=True) if count < 2]
        if few:
            raise ConfigError(f"task {few[0]!r} has one prompt; at least two are needed")
        features = self._learn(prompts)
        usable = np.array([feature is not None for feature in features])
        features = [feature for feature in features if feature is not None]
        labels = labels[usable]
        counts = np.bincount(labels, minlength=len(self.names))
        if counts.min() < 2:
            raise ConfigError(
                f"task {self.names[int(counts.argmin())]!r} has fewer than two prompts with words in them"
            )
        self._calibrate(features, labels)
        self._head = self._fit_head(features, labels, len(self.names))
        return self

    def classify(self, text: str) -> Classification:
        """The task of one text, in any language, empty or not.

        Raises:
            ConfigError: not fitted.
        """
        return self.classify_all([text])[0]

    def classify_all(self, texts: Sequence[str]) -> list[Classification]:
        """The task of each text."""
        if self._head is None:
            raise ConfigError("the classifier knows no tasks yet: fit it or load one")
        started = time.perf_counter()
        features = self._features(texts)
        kept = [number for number, feature in enumerate(features) if feature is not None]
        N = len(self.names)
        probabilities = np.full((len(texts), N), 1 / N)
        confidence = np.zeros(len(texts))
        if kept:
            evidence, familiarity = self._head.evidence([features[number] for number in kept])
            probabilities[kept] = softmax(evidence / self._temperature)
            inputs = signals(evidence, familiarity)
            # Where two tasks lead alike there is no answer, whatever was learned of confidence.
            confidence[kept] = np.where((inputs[:, 0] > 0) | (N == 1), self._confidence(inputs), 0.0)
        best = probabilities.argmax(axis=1)
        milliseconds = 1e3 * (time.perf_counter() - started) / max(1, len(texts))
        return [
            Classification(
                self.names[best[number]] if confidence[number] >= max(self.threshold, 1e-12) else None,
                float(confidence[number]),
                {name: float(value) for name, value in zip(self.names, probabilities[number], strict=True)},
                milliseconds,
            )
            for number in range(len(texts))
        ]

    def confusion(self, prompts: Sequence[str], tasks: Sequence[str]) -> ConfusionMatrix:
        """What labelled prompts are taken for; tasks that were not learned are rows of their own."""
        found = [answer.task for answer in self.classify_all(prompts)]
        return ConfusionMatrix.of(self.names, zip(tasks, found, strict=True))

    def save(self, path: str | Path) -> Path:
        """Writes a .safetensors file.

        Raises:
            ConfigError: not fitted.
            WriteError: the folder cannot be written.
        """
        if self._head is None:
            raise ConfigError("the classifier knows no tasks yet: fit it before saving")
        tensors, settings = self._state()
        shared = {
            "names": list(self.names),
            "threshold": self.threshold,
            "temperature": self._temperature,
            "confidence": self._confidence.to_dict(),
        }
        return files.write(path, FORMAT, self.kind, tensors, {**settings, **shared})

    @staticmethod
    def load(path: str | Path, model: Any = None, tokenizer: Any = None) -> TaskClassifier:
        """Reads what `save` wrote.

        Args:
            model, tokenizer: those of the embeddings; only the kind "embeddings" needs them.

        Raises:
            CheckpointError: the file is something else, or of a kind that this version does not know.
            ConfigError: an embedding classifier without its model, or with another one.
            MissingFileError: there is no such file.
        """
        kind, tensors, settings = files.read(path, FORMAT, "task classifier")
        if kind not in KINDS:
            raise CheckpointError(
                f"{path}: classifier of kind {kind!r}, not one of: {', '.join(KINDS)}", file=str(path)
            )
        try:
            for name, tensor in tensors.items():
                if not np.isfinite(tensor).all():
                    raise ValueError(f"{name!r} holds what is no number")
            loaded: TaskClassifier = _class(kind)._restore(tensors, settings, model, tokenizer)
            loaded.names = files.texts(settings, "names")
            loaded.threshold = _number(settings, "threshold", 0, 1)
            loaded._temperature = _number(settings, "temperature", 1e-9, 1e300)
            loaded._confidence = Confidence.from_dict(settings["confidence"])
        except ConfigError:  # which is a ValueError: not the file is wrong, but what it is to be used with
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: not a whole classifier: {error!r}", file=str(path)) from error
        return loaded

    def _calibrate(self, features: list[Any], labels: NDArray[np.int64]) -> None:
        """Sets temperature and confidence from held-out prompts."""
        N = len(self.names)
        fold = _folds(labels, min(FOLDS, int(np.bincount(labels).min())))
        known: list[tuple[Floats, Floats, NDArray[np.int64]]] = []
        strange: list[tuple[Floats, Floats]] = []
        for number in range(int(fold.max()) + 1):
            inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
            head = self._fit_head(_rows(features, inside), labels[inside], N)
            known.append((*head.evidence(_rows(features, outside)), labels[outside]))
            if N == 2:  # one task left out leaves one, and nothing to tell apart: see below
                continue
            for task in range(N):
                others = inside[labels[inside] != task]
                mine = outside[labels[outside] == task]
                renamed = labels[others] - (labels[others] > task)
                head = self._fit_head(_rows(features, others), renamed, N - 1)
                strange.append(head.evidence(_rows(features, mine)))
        evidence = np.concatenate([part[0] for part in known])
        truth = np.concatenate([part[2] for part in known])
        self._temperature = fit_temperature(evidence, truth)
        right = evidence.argmax(axis=1) == truth
        unknown = [signals(*part) for part in strange]
        if N == 2:  # unknown text is then taken to be text that speaks for neither task
            unknown = [np.zeros((len(truth), 2))]
        inputs = [signals(part[0], part[1]) for part in known] + unknown
        answers = np.concatenate([right, np.zeros(sum(map(len, unknown)), dtype=bool)])
        self._confidence = Confidence.fit(np.concatenate(inputs), answers)


def _number(settings: dict[str, Any], name: str, low: float, high: float) -> float:
    return jsontext.number(settings[name], repr(name), low, high)


def _rows(features: list[Any], numbers: NDArray[np.intp]) -> list[Any]:
    return [features[number] for number in numbers.tolist()]


def _folds(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """[n] a number below `count` for each prompt, each task spread evenly."""
    generator = np.random.default_rng(SEED)
    fold = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        mine = generator.permutation(np.flatnonzero(labels == label))
        fold[mine] = np.arange(len(mine)) % count
    return fold


def make(kind: str, model: Any = None, tokenizer: Any = None, **options: Any) -> TaskClassifier:
    """A classifier to fit: `make("keywords")`, or `make("embeddings", model, tokenizer)`.

    Raises:
        ConfigError: an unknown kind, or embeddings without a model.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not one of: {', '.join(KINDS)}")
    if kind == "embeddings":
        options |= {"model": model, "tokenizer": tokenizer}
    made: TaskClassifier = _class(kind)(**options)
    return made


def _class(kind: str) -> Any:
    module, name = KINDS[kind]
    return getattr(import_module(module), name)
