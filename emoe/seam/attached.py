"""A model whose experts are computed elsewhere: what is changed on it, and how it gets back."""

from __future__ import annotations

from typing import Any

from emoe.seam import load
from emoe.store import ExpertStore


class Attached:
    """Makes a model without experts dispatch to `implementation`, in evaluation mode and without gradients.

    Args:
        model: its experts' parameters are detached.
        store: where the experts are.
        implementation: the name of an experts function that is registered with Transformers.
    """

    def __init__(self, model: Any, store: ExpertStore, implementation: str) -> None:
        self._model, self._store = model, store
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._training = model.training
        model.requires_grad_(False)
        model.eval()
        self._guard = load.guard_saving(model, store)
        self._packing = load.pack_last_rows(model)
        self._answers = load.guard_model(model, store, implementation)

    def read(self) -> load.ExpertValues:
        """All experts, for `restore`; the model is not touched.

        Raises:
            ReadError: an expert cannot be read.
        """
        return load.read_experts(self._model, self._store)

    def detach(self) -> None:
        """Takes the hooks of a running model away; saving is refused from now on, as it has no experts."""
        if self._packing is not None:
            self._packing.remove()

    def restore(self, experts: load.ExpertValues) -> None:
        """Gives the model its experts and its own ways back. Cannot fail, and may be called again."""
        # In this order: a forward in another thread finds experts whenever it is not sent to emoe.
        load.put_experts(experts)
        self._guard.remove()
        self._answers.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._model.train(self._training)
