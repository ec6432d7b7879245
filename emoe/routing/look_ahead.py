"""The next layer's router, applied to the hidden states that enter the present layer's experts: no training, no file.

For prefetch within a forward. It reads routers' weights and changes nothing in the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from emoe.errors import ConfigError
from emoe.model.structure import find_experts
from emoe.routing.recognise import find_routers
from emoe.routing.rules import Rule


class Router:
    """A router called outside its layer's forward.

    Args:
        module: the router; the first of its outputs are its logits.
        rule: how it selects; None where experts follow from the token's id, of which hidden states say nothing.
        parent: what holds the tensors that the module's forward takes beside hidden states.
        experts: how many it chooses from.
    """

    def __init__(self, module: nn.Module, rule: Rule | None, parent: nn.Module, experts: int) -> None:
        self._module, self._rule, self._parent, self._experts = module, rule, parent, experts
        self._arguments = list(inspect.signature(type(module).forward).parameters)[2:]
        self._batched = False  # whether it wants [1, T, H]

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[E] float32: of one token in the router's own order, of more the sum of their selection scores."""
        if self._rule is None:
            return torch.zeros(self._experts)
        weight = next(tensor for tensor in self._module.parameters() if tensor.is_floating_point())
        rows = hidden.reshape(-1, hidden.shape[-1]).to(weight)
        logits = self._rule.logits(self._logits(rows).reshape(len(rows), -1))
        if len(rows) == 1:
            return self._rule.key(logits)[0][0]
        choice = self._rule.choice(logits)
        choice = choice - choice.amin(dim=-1, keepdim=True)
        allowed = self._rule.allowed(choice)
        return (choice if allowed is None else choice * allowed).sum(0)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        beside = [getattr(self._parent, name, None) for name in self._arguments]
        given = [tensor for tensor in beside if isinstance(tensor, torch.Tensor)]
        # Not called as a module: hooks on it belong to its layer's own forward.
        forward: Any = type(self._module).forward
        try:
            return cast(torch.Tensor, forward(self._module, rows[None] if self._batched else rows, *given)[0])
        except (ValueError, IndexError):
            if self._batched:
                raise
            self._batched = True
            return self._logits(rows)


class LookAhead:
    """Scores the experts of the layer after the present one.

    Args:
        routers: of each layer.
    """

    reads_hidden = True  # `next_layer` takes hidden states in the place of picks

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = tuple(routers)

    @classmethod
    def of(cls, model: nn.Module) -> LookAhead:
        """Finds the routers of a model.

        Raises:
            UnsupportedModelError: a router follows no rule that emoe knows.
        """
        counts = [int(cast(int, experts.num_experts)) for _, experts in find_experts(model)]
        return cls(
            [
                Router(site.module, site.rule, model.get_submodule(site.path.rpartition(".")[0]), count)
                for site, count in zip(find_routers(model), counts, strict=True)
            ]
        )

    @torch.no_grad()
    def next_layer(self, layer: int, hidden: torch.Tensor) -> NDArray[np.float32]:
        """[E] scores of layer + 1; higher is likelier.

        Args:
            layer: number of the present experts module, not the last.
            hidden: [T, H] or [..., H], what enters it.

        Raises:
            ConfigError: there is no layer after this one.
        """
        if not 0 <= layer < len(self._routers) - 1:
            raise ConfigError(f"layer={layer} has no next layer; the model has layers 0 to {len(self._routers) - 1}")
        return cast(NDArray[np.float32], self._routers[layer + 1].scores(hidden).float().cpu().numpy())
