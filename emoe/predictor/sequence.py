"""A sequence model over expert ids, as in arXiv 2503.06823: an XLNetModel of Transformers, trained by `training`.

An element of the sequence is one layer of one prompt: the ids it used most. First the task, then all layers of the
prompt before, then all layers of the running prompt as far as it was seen; these say what those layers will use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from emoe.errors import ConfigError
from emoe.files import texts
from emoe.predictor import UNKNOWN_TASK, files
from emoe.predictor.table import count

Floats = NDArray[np.float32]

WIDTH = 16  # ids of a layer
_MOST_LAYERS = 64  # of a file's network; the largest size has far fewer


@dataclass(frozen=True)
class Size:
    """Of the XLNet: width of the model, layers, heads, width of the feed-forward part."""

    d_model: int
    n_layer: int
    n_head: int
    d_inner: int


# small trains on two cores in minutes; base has the paper's 0.1 billion parameters.
SIZES = {
    "small": Size(128, 2, 4, 512),
    "medium": Size(256, 4, 8, 1024),
    "base": Size(768, 12, 12, 3072),
}


@dataclass(frozen=True)
class Shape:
    """What a network is built for: tasks, layers and experts of the model it predicts, ids of a layer, and its size."""

    tasks: int
    layers: int
    experts: int
    width: int
    size: Size


class Network(nn.Module):
    """Ids in, logits out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers import XLNetConfig, XLNetModel

        L, E, d = shape.layers, shape.experts, shape.size.d_model
        # One row for each (before or running, layer, expert); the last is no id.
        self.ids = nn.Embedding(2 * L * E + 1, d, padding_idx=2 * L * E)
        self.places = nn.Embedding(2 * L, d)
        self.tasks = nn.Embedding(shape.tasks + 1, d)
        # Elements are embedded above, so the model's own table of words stays at one row.
        words = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        self.model = XLNetModel(XLNetConfig(**words, **asdict(shape.size), dropout=0.1, mem_len=None))
        self.head = nn.Parameter(torch.zeros(L, d, E))
        self.bias = nn.Parameter(torch.zeros(L, E))

    def forward(self, tasks: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, E] from tasks [B], ids [B, 2 L, M] and weights [B, 2 L, M]."""
        bags = torch.einsum("bsmd,bsm->bsd", self.ids(ids), weights)
        elements = torch.cat([self.tasks(tasks)[:, None], bags + self.places.weight], dim=1)  # [B, 1 + 2 L, d]
        states = self.model(inputs_embeds=elements, use_mems=False).last_hidden_state
        L = self.bias.shape[0]
        return torch.einsum("bld,lde->ble", states[:, -L:], self.head) + self.bias


class Sample:
    """One row of a batch: what is known of a prompt.

    Args:
        task: its number, or UNKNOWN_TASK.
        before: [L, E] uses per token of the prompt before; zeros for none.
        present: [L, E] uses per token of the running one; zeros before its first token.
        width: ids of a layer.
    """

    def __init__(self, task: int, before: Floats, present: Floats, width: int) -> None:
        L, E = before.shape
        rates = np.concatenate([before, present])  # [2 L, E]
        width = min(width, E)
        top = np.argsort(-rates, axis=1, kind="stable")[:, :width]
        weights = np.take_along_axis(rates, top, axis=1)
        total = weights.sum(axis=1, keepdims=True)
        self.task = task + 1
        self.weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0).astype(np.float32)
        self.ids = np.where(weights > 0, top + (np.arange(2 * L) * E)[:, None], 2 * L * E)


def logits(network: Network, samples: Sequence[Sample]) -> torch.Tensor:
    """[B, L, E]."""
    device = network.bias.device
    return cast(
        torch.Tensor,
        network(
            torch.tensor([sample.task for sample in samples], device=device),
            torch.from_numpy(np.stack([sample.ids for sample in samples])).to(device),
            torch.from_numpy(np.stack([sample.weights for sample in samples])).to(device),
        ),
    )


class SequenceModel:
    """The predictor.

    Args:
        network: trained for `shape`.
        shape: what it was built for.
        names: of the tasks.
    """

    def __init__(self, network: Network, shape: Shape, names: tuple[str, ...]) -> None:
        if len(names) != shape.tasks:
            raise ConfigError(f"{len(names)} task names for a network of {shape.tasks} tasks")
        self.names = names
        self._network, self._shape = network.eval(), shape
        nothing = np.zeros((shape.layers, shape.experts), dtype=np.float32)
        self._before = self._present = nothing
        self._uses = np.zeros((shape.layers, shape.experts), dtype=np.int64)
        self._task, self._tokens = UNKNOWN_TASK, 0
        self._scores: Floats | None = None

    def begin(self, task: int) -> None:
        if self._tokens:
            self._before = self._rates()
            self._uses[:] = 0
        self._task, self._tokens = task, 0
        self._scores = None

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._uses += count(picks, self._shape.experts)
        self._tokens += picks.shape[1]
        self._scores = None

    @torch.no_grad()
    def rank(self) -> Floats:
        """Probabilities of a pick: each layer adds up to 1."""
        if self._scores is None:
            sample = Sample(self._task, self._before, self._rates(), self._shape.width)
            self._scores = logits(self._network, [sample])[0].softmax(-1).cpu().numpy()
        return self._scores

    def _rates(self) -> Floats:
        return (self._uses / max(self._tokens, 1)).astype(np.float32)

    def anew(self) -> SequenceModel:
        return SequenceModel(self._network, self._shape, self.names)

    @property
    def parameters(self) -> int:
        """Numbers that were trained."""
        return sum(tensor.numel() for tensor in self._network.parameters())

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file."""
        tensors = {name: tensor.detach().cpu().numpy() for name, tensor in self._network.state_dict().items()}
        files.write(path, "xlnet", tensors, {"names": self.names, "width": self._shape.width})

    @classmethod
    def load(cls, path: str | Path) -> SequenceModel:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        tensors, settings = files.read(path, "xlnet", {"head": 3, "tasks.weight": 2})
        width = settings.get("width")
        try:
            if type(width) is not int or width < 1:
                raise ValueError(f"'width' is {width!r}, expected a number of ids of at least 1")
            shape = _shape(tensors, width)
            with torch.device("meta"):  # takes no memory until it is known to be as large as the file
                network = Network(shape)
            network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, assign=True)
            return cls(network, shape, texts(settings, "names"))
        except (ValueError, RuntimeError) as error:
            raise files.fail(path, error) from error


def _shape(tensors: dict[str, NDArray[Any]], width: int) -> Shape:
    """What a network was built for, read off its tensors, so that a file cannot ask for more than it holds.

    Raises:
        ValueError: they do not belong to one network.
    """
    L, d_model, E = tensors["head"].shape
    n_layer = sum(name.endswith(".rel_attn.q") for name in tensors)
    if n_layer > _MOST_LAYERS:  # names cost a file little, and a network much
        raise ValueError(f"a network of {n_layer} layers, over {_MOST_LAYERS}")
    sizes = {"model.layer.0.rel_attn.q": (1, 3), "model.layer.0.ff.layer_1.weight": (0, 2)}
    found = []
    for name, (axis, dimensions) in sizes.items():
        if name not in tensors or tensors[name].ndim != dimensions:
            raise ValueError(f"no tensor {name!r} of {dimensions} dimensions")
        found.append(tensors[name].shape[axis])
    n_head, d_inner = found
    if d_model % n_head:
        raise ValueError(f"{n_head} heads do not divide a width of {d_model}")
    return Shape(len(tensors["tasks.weight"]) - 1, L, E, width, Size(d_model, n_layer, n_head, d_inner))


def parse_size(size: str | Size) -> Size:
    """A size by name, or as it is.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(size, Size):
        return size
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is not one of: {', '.join(SIZES)}")
    return SIZES[size]


def build(shape: Shape, rates: Floats, seed: int) -> Network:
    """An untrained network that answers with the mean rates [L, E] of a profile, whatever it is shown."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(shape)
    shares: Any = rates / np.maximum(rates.sum(axis=1, keepdims=True), 1e-9)
    network.bias.data.copy_(torch.from_numpy(np.log(shares + 1e-4).astype(np.float32)))
    return network
