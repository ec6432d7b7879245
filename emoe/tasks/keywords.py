"""Tasks by profiled keywords (arXiv 2503.06823, task extraction): words that a task's prompts have more than others'.

A word's weight is the log-odds of its rate in the task's prompts against that in the others, under a prior of its rate
in all; only words whose log-odds stand out from their own error count (Monroe and others, "Fightin' Words", 2008).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoe import files
from emoe.tasks.classifier import TaskClassifier

MOST_WORDS = 30_000  # of the vocabulary, the most frequent ones
MOST_CHARACTERS = 8_000  # of a text: its beginning and, of longer ones, its end
PRIOR = 0.4  # words that the prior is worth, for each word of the vocabulary
SIGNIFICANT = 2.0  # standard errors

Floats = NDArray[np.float64]

# A letter of scripts without spaces, a run of letters, a number, a run of other signs such as ">>>".
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\d+|[^\w\s]+|_+"
)


def clipped(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text, or of a long one the first three quarters of `most` characters and the last quarter."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]}\n{text[-(most // 4) :]}"


def words(text: str) -> list[str]:
    """Words, numbers (all as "0") and signs of a text, in order; case is dropped."""
    found = _WORD.findall(unicodedata.normalize("NFKC", clipped(text)).casefold())
    return ["0" if word[0].isdigit() else word for word in found]


class Words(NamedTuple):
    """Words of one text. A word that is there n times weighs the root of n: once said, it is likely said again.

    Attributes:
        known: numbers of those in the vocabulary.
        weights: theirs.
        size: the sum over all words, known or not.
    """

    known: NDArray[np.intp]
    weights: Floats
    size: float


@dataclass(frozen=True)
class KeywordHead:
    """weights [N, V]: log-odds of each word for each task, 0 where it is no keyword of the task."""

    weights: NDArray[np.float32]

    def evidence(self, features: Sequence[Words]) -> tuple[Floats, Floats]:
        """Summed log-odds of the text's keywords, and their mean over all its words."""
        total = np.stack([self.weights[:, each.known].astype(np.float64) @ each.weights for each in features])
        sizes: Floats = np.array([[each.size] for each in features])
        return total, total / sizes


class KeywordClassifier(TaskClassifier):
    """Keywords of each task, learned from labelled prompts. Needs no model.

    Args:
        threshold: of confidence; below it the answer is None.
    """

    kind = "keywords"

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__(threshold)
        self._numbers: dict[str, int] = {}

    def keywords(self, task: str, most: int = 20) -> list[tuple[str, float]]:
        """The task's strongest keywords with their log-odds, strongest first."""
        assert isinstance(self._head, KeywordHead)
        weights = self._head.weights[self.names.index(task)]
        vocabulary = list(self._numbers)
        order = np.argsort(-weights, kind="stable")[:most]
        return [(vocabulary[number], float(weights[number])) for number in order if weights[number] > 0]

    def _learn(self, texts: Sequence[str]) -> list[Any]:
        prompts = Counter(word for text in texts for word in set(words(text)))
        # A word of a single prompt says nothing about the next one.
        frequent = sorted(
            (word for word, count in prompts.items() if count > 1), key=lambda word: (-prompts[word], word)
        )
        self._numbers = {word: number for number, word in enumerate(frequent[:MOST_WORDS])}
        return self._features(texts)

    def _features(self, texts: Sequence[str]) -> list[Any]:
        return [self._of(text) for text in texts]

    def _of(self, text: str) -> Words | None:
        found = Counter(words(text))
        if not found:
            return None
        known = sorted((self._numbers[word], times) for word, times in found.items() if word in self._numbers)
        numbers = np.array([number for number, _ in known], dtype=np.intp)
        weights = np.sqrt(np.array([times for _, times in known], dtype=np.float64))
        return Words(numbers, weights, sum(math.sqrt(times) for times in found.values()))

    def _fit_head(self, features: list[Any], labels: NDArray[np.int64], tasks: int) -> KeywordHead:
        uses = np.zeros((tasks, len(self._numbers)))
        for feature, label in zip(features, labels, strict=True):
            uses[label, feature.known] += feature.weights
        return KeywordHead(_log_odds(uses))

    def _state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        assert isinstance(self._head, KeywordHead)
        used = np.flatnonzero((self._head.weights != 0).any(axis=0))
        vocabulary = list(self._numbers)
        return {"weights": self._head.weights[:, used]}, {"words": [vocabulary[number] for number in used]}

    @classmethod
    def _restore(
        cls, tensors: dict[str, NDArray[Any]], settings: dict[str, Any], model: Any, tokenizer: Any
    ) -> KeywordClassifier:
        restored = cls()
        restored._numbers = {word: number for number, word in enumerate(files.texts(settings, "words"))}
        weights = tensors["weights"]
        if weights.shape != (len(settings["names"]), len(restored._numbers)):
            raise ValueError(f"'weights' has shape {list(weights.shape)}")
        restored._head = KeywordHead(weights.astype(np.float32))
        return restored


def _log_odds(uses: Floats) -> NDArray[np.float32]:
    """[N, V] log-odds of a word among those of the task against its odds among the others'; 0 where not significant.

    Args:
        uses: [N, V] how often each task's prompts have the word.
    """
    # Every task's rates weigh the same in the prior, however much text it has.
    rates = (uses / np.maximum(uses.sum(axis=1, keepdims=True), 1.0)).mean(axis=0)
    prior = PRIOR * uses.shape[1] * rates + 0.01
    own = uses + prior
    others = uses.sum(axis=0) - uses + prior
    odds = _logit(own) - _logit(others)
    significant = np.abs(odds) > SIGNIFICANT * np.sqrt(1 / own + 1 / others)
    return np.where(significant, odds, 0.0).astype(np.float32)


def _logit(counts: Floats) -> Floats:
    """Of each column's share of its row."""
    logit: Floats = np.log(counts / (counts.sum(axis=1, keepdims=True) - counts))
    return logit
