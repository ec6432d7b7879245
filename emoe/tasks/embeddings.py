"""Tasks by the model's own input embeddings: a text is the mean of its tokens' rows, weighed by how rare they are.

No extra model runs; what is learned is a few axes, and a mean of each task along them (shrunken linear discriminant).
Knows of the model only its input embeddings and its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.tasks.classifier import TaskClassifier
from emoe.tasks.keywords import clipped

if TYPE_CHECKING:
    from torch import nn

AXES = 96  # principal axes kept, at most
OPENING = 16  # tokens at the beginning, which often say what is asked, have a mean of their own

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DiscriminantHead:
    """Gaussian tasks of one covariance.

    Attributes:
        means: [N, R] of each task.
        whiten: [R, R] into coordinates in which the spread within tasks is a unit sphere.
    """

    means: Floats
    whiten: Floats

    def evidence(self, features: Sequence[Floats]) -> tuple[Floats, Floats]:
        """Log-likelihood of each task but for a constant, and how far a text goes from the middle toward each task.

        The latter is about 1 for the task's own texts and 0 for text that has nothing to do with it, which may lie on
        one side of a border between tasks all the same.
        """
        x = np.stack(features)  # [n, R]
        white, means = x @ self.whiten, self.means @ self.whiten
        likelihood = -((white[:, None] - means[None]) ** 2).sum(axis=2) / 2  # [n, N]
        middle = self.means.mean(axis=0)
        toward = self.means - middle
        return likelihood, (x - middle) @ toward.T / ((toward**2).sum(axis=1) + 1e-12)


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
        self._rarity = np.log((len(texts) + 1) / (prompts + 1)).astype(np.float32)
        means = [self._mean(each) for each in ids]
        found = [mean for mean in means if mean is not None]
        if not found:
            return [None] * len(texts)
        stacked = np.stack(found)
        self._center = stacked.mean(axis=0)
        _, _, axes = np.linalg.svd(stacked - self._center, full_matrices=False)
        self._axes = np.ascontiguousarray(axes[: min(AXES, len(stacked) - 1)].T)
        return [self._project(mean) for mean in means]

    def _features(self, texts: Sequence[str]) -> list[Any]:
        return [self._project(self._mean(each)) for each in self._encode(texts)]

    def _project(self, mean: NDArray[np.float32] | None) -> Floats | None:
        return None if mean is None else ((mean - self._center) @ self._axes).astype(np.float64)

    def _encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        if not texts:
            return []
        # verbose: a text longer than the model's context is no reason for a warning, no model reads it.
        clips = [clipped(text) for text in texts]
        encoded = self._tokenizer(clips, add_special_tokens=False, verbose=False)["input_ids"]
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
        x = np.stack(features)
        counts = np.bincount(labels, minlength=tasks)
        means = np.stack([x[labels == task].mean(axis=0) for task in range(tasks)])
        inner = x - means[labels]
        # Every task weighs the same, however many prompts it has.
        weight = 1 / counts[labels] / tasks
        within = (inner * weight[:, None]).T @ inner
        # Toward a sphere, the more the fewer texts there are for each axis.
        drawn = len(within) / (len(within) + len(x))
        within = (1 - drawn) * within + (drawn * np.trace(within) / len(within) + 1e-9) * np.eye(len(within))
        values, vectors = np.linalg.eigh(within)
        return DiscriminantHead(means, vectors / np.sqrt(values))

    def _state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        assert isinstance(self._head, DiscriminantHead)
        tensors = {"rarity": self._rarity, "center": self._center, "axes": self._axes}
        tensors |= {name: getattr(self._head, name) for name in ("means", "whiten")}
        return tensors, {"embeddings": list(self._embedding.weight.shape)}

    @classmethod
    def _restore(
        cls, tensors: dict[str, NDArray[Any]], settings: dict[str, Any], model: Any, tokenizer: Any
    ) -> EmbeddingClassifier:
        restored = cls(model, tokenizer)
        shape, wanted = list(restored._embedding.weight.shape), list(settings["embeddings"])
        if shape != wanted:
            raise ConfigError(f"the classifier was made for embeddings of shape {wanted}, this model's are {shape}")
        (V, D), N, R = shape, len(settings["names"]), len(tensors["whiten"])
        shapes = {"rarity": (V,), "center": (2 * D,), "axes": (2 * D, R), "means": (N, R), "whiten": (R, R)}
        for name, expected in shapes.items():
            if tensors[name].shape != expected:
                raise ValueError(f"{name!r} has shape {list(tensors[name].shape)}, expected {list(expected)}")
        restored._rarity, restored._center, restored._axes = (tensors[name] for name in ("rarity", "center", "axes"))
        restored._head = DiscriminantHead(*(tensors[name] for name in ("means", "whiten")))
        return restored


def _embedding(model: Any) -> nn.Embedding:
    from torch import nn

    found = model if isinstance(model, nn.Embedding) else model.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise ConfigError(
            f"the input embeddings of {type(model).__name__} are no table of rows but {type(found).__name__}"
        )
    return found
