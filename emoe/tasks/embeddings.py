"""Tasks by the model's own input embeddings: a text is the mean of its tokens' rows, weighed by how rare they are.

No extra model runs; what is learned is a few axes, and a mean of each task along them (shrunken linear discriminant).
Knows of the model only its input embeddings and its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.tasks.classifier import TaskClassifier
from emoe.tasks.keywords import clipped

if TYPE_CHECKING:
    from torch import nn

AXES = 96  # principal axes kept, at most
SHRINKAGE = 0.2  # of the covariance within tasks, toward a sphere
FEW = 4.0  # prompts that the tasks' mean spread is worth in the spread of one
OPENING = 16  # tokens at the beginning, which often say what is asked, have a mean of their own

Floats = NDArray[np.float64]


class Mean(NamedTuple):
    """One text: coordinates along the axes [R], and the squared length of what they leave out."""

    along: Floats
    rest: float


@dataclass(frozen=True)
class DiscriminantHead:
    """Gaussian tasks of one covariance.

    Attributes:
        means: [N, R] of each task.
        whiten: [R, R] into coordinates in which the spread within tasks is a unit sphere.
        spread: [N] mean squared distance of each task's texts from their mean, in all directions.
    """

    means: Floats
    whiten: Floats
    spread: Floats

    def evidence(self, features: Sequence[Mean]) -> tuple[Floats, Floats]:
        """Log-likelihood of each task but for a constant, and the negative squared distance to each, in its spreads.

        The latter is over all directions alike: in those that tell the known tasks apart, text of another looks known.
        """
        x = np.stack([each.along for each in features])  # [n, R]
        rest = np.array([[each.rest] for each in features])
        white, means = x @ self.whiten, self.means @ self.whiten
        likelihood = -((white[:, None] - means[None]) ** 2).sum(axis=2) / 2  # [n, N]
        distance = ((x[:, None] - self.means[None]) ** 2).sum(axis=2) + rest
        return likelihood, -np.sqrt(distance / self.spread)


class EmbeddingClassifier(TaskClassifier):
    """Means of the model's input embeddings, told apart by a linear discriminant.

    Args:
        model: a Transformers model, with or without its experts in memory, or its embedding module.
        tokenizer: the model's.
        threshold: of confidence; below it the answer is None.

    Raises:
        ConfigError: no model, or no tokenizer.
    """

    kind = "embeddings"

    def __init__(self, model: Any = None, tokenizer: Any = None, threshold: float = 0.5) -> None:
        super().__init__(threshold)
        if model is None or tokenizer is None:
            raise ConfigError("a classifier of kind 'embeddings' needs the model and its tokenizer")
        self._embedding = _embedding(model)
        self._tokenizer = tokenizer
        self._rarity = np.zeros(0, dtype=np.float32)  # [V]
        self._center = np.zeros(0, dtype=np.float32)  # [2D]
        self._axes = np.zeros((0, 0), dtype=np.float32)  # [2D, R]

    def _learn(self, texts: Sequence[str]) -> list[Any]:
        ids = self._encode(texts)
        V = self._embedding.weight.shape[0]
        prompts = np.zeros(V)
        for each in ids:
            prompts[np.unique(each)] += 1
        self._rarity = np.log((len(texts) + 1) / (prompts + 0.5)).astype(np.float32)
        means = [self._mean(each) for each in ids]
        stacked = np.stack([mean for mean in means if mean is not None])
        self._center = stacked.mean(axis=0)
        _, _, axes = np.linalg.svd(stacked - self._center, full_matrices=False)
        self._axes = np.ascontiguousarray(axes[: min(AXES, len(stacked) - 1)].T)
        return [self._project(mean) for mean in means]

    def _features(self, texts: Sequence[str]) -> list[Any]:
        return [self._project(self._mean(each)) for each in self._encode(texts)]

    def _project(self, mean: NDArray[np.float32] | None) -> Mean | None:
        if mean is None:
            return None
        centered = mean - self._center
        along = (centered @ self._axes).astype(np.float64)
        return Mean(along, max(0.0, float(centered @ centered) - float(along @ along)))

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        if not texts:
            return []
        encoded = self._tokenizer([clipped(text) for text in texts], add_special_tokens=False)["input_ids"]
        return [np.array(ids if text.strip() else [], dtype=np.int64) for ids, text in zip(encoded, texts, strict=True)]

    def _mean(self, ids: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """[2D]: of all tokens and of the first ones, each of length 1; None for no tokens."""
        if not len(ids):
            return None
        import torch

        with torch.no_grad():
            # Not a call of the module: hooks of others must not see it.
            where = self._embedding.weight.device
            rows = self._embedding.weight[torch.from_numpy(ids).to(where)].float().cpu().numpy()
        weights = self._rarity[ids][:, None]
        parts = [(weights[:count] * rows[:count]).sum(axis=0) for count in (len(ids), OPENING)]
        whole: NDArray[np.float32] = np.concatenate([part / (np.linalg.norm(part) + 1e-12) for part in parts])
        return whole

    def _fit_head(self, features: list[Any], labels: NDArray[np.int64], tasks: int) -> DiscriminantHead:
        x = np.stack([each.along for each in features])
        rest = np.array([each.rest for each in features])
        counts = np.bincount(labels, minlength=tasks)
        means = np.stack([x[labels == task].mean(axis=0) for task in range(tasks)])
        inner = x - means[labels]
        # Every task weighs the same, however many prompts it has.
        weight = 1 / counts[labels] / tasks
        within = (inner * weight[:, None]).T @ inner
        within = (1 - SHRINKAGE) * within + (SHRINKAGE * np.trace(within) / len(within) + 1e-9) * np.eye(len(within))
        values, vectors = np.linalg.eigh(within)
        distance = (inner**2).sum(axis=1) + rest
        mean = float((distance * weight).sum())
        own = np.bincount(labels, weights=distance, minlength=tasks)
        # A mean has been drawn toward its own texts, the more the fewer they are.
        spread = (own + FEW * mean) / (counts + FEW) * (counts + 1) / np.maximum(counts - 1, 1)
        return DiscriminantHead(means, vectors / np.sqrt(values), spread)

    def _state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        assert isinstance(self._head, DiscriminantHead)
        tensors = {"rarity": self._rarity, "center": self._center, "axes": self._axes}
        tensors |= {name: getattr(self._head, name) for name in ("means", "whiten", "spread")}
        return tensors, {"embeddings": list(self._embedding.weight.shape)}

    @classmethod
    def _restore(
        cls, tensors: dict[str, NDArray[Any]], settings: dict[str, Any], model: Any, tokenizer: Any
    ) -> EmbeddingClassifier:
        restored = cls(model, tokenizer)
        shape, wanted = list(restored._embedding.weight.shape), list(settings["embeddings"])
        if shape != wanted:
            raise ConfigError(f"the classifier was made for embeddings of shape {wanted}, this model's are {shape}")
        restored._rarity, restored._center, restored._axes = (tensors[name] for name in ("rarity", "center", "axes"))
        restored._head = DiscriminantHead(*(tensors[name] for name in ("means", "whiten", "spread")))
        return restored


def _embedding(model: Any) -> nn.Embedding:
    from torch import nn

    found = model if isinstance(model, nn.Embedding) else model.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise ConfigError(
            f"the input embeddings of {type(model).__name__} are no table of rows but {type(found).__name__}"
        )
    return found
