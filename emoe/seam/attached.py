"""A model whose experts are computed elsewhere: what is changed on it, and how it gets back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from emoe.errors import BudgetError, ClosedError
from emoe.memory import available_memory, format_bytes
from emoe.seam import linear, load
from emoe.seam.attention_block import AttentionBlocks, Make
from emoe.seam.norms import Norm, Norms
from emoe.seam.one_row import STOCK, OneRowAttention, compares_names
from emoe.seam.plain_linear import Plain, PlainWeights
from emoe.seam.prefill import ChunkedPrefill
from emoe.store import ExpertStore

logger = logging.getLogger(__name__)


class Gone:
    """What a model names in the place of the runtime that ran it, once it has its experts back: closed, and false.

    A copy of the model, or a pickle, has None.
    """

    closed = True

    def close(self, *, restore: bool | None = None) -> None:
        """It is closed."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ClosedError(
            f"the runtime is closed and has no {name}; the model has its experts back, and emoe.wrap(model) makes it "
            "another runtime"
        )

    def __reduce__(self) -> Any:
        return type(None), ()

    def __repr__(self) -> str:
        return "<closed runtime of emoe: the model has its experts>"


class Attached:
    """Makes a model without experts dispatch to `implementation`, in evaluation mode and without gradients.

    Args:
        model: its experts' parameters are detached.
        store: where the experts are.
        implementation: the name of an experts function that is registered with Transformers.
        layers: what that function finds as `_emoe` on each experts module.
    """

    def __init__(self, model: Any, store: ExpertStore, implementation: str, layers: Mapping[nn.Module, Any]) -> None:
        self._model, self._store = model, store
        self._modules = list(layers)
        self._restored = False
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._training = model.training
        model.requires_grad_(False)
        model.eval()
        for module, layer in layers.items():
            vars(module)["_emoe"] = layer
        self._guard = load.guard_saving(model, store)
        self._hooks: list[Any] = [hook for hook in (load.pack_last_rows(model),) if hook is not None]
        self._process = os.getpid()
        self._hooks.append(model.register_forward_pre_hook(self._after_fork, prepend=True))
        self._answers = load.guard_model(model, store, implementation)

    def _after_fork(self, *_: Any) -> None:
        """In the child of a fork torch computes with one thread: OpenMP's other threads are not in it, and it waits."""
        if torch.compiler.is_compiling() or os.getpid() == self._process:
            return
        self._process = os.getpid()
        if torch.get_num_threads() > 1:
            logger.warning(
                "emoe: this process was forked from one that ran the model; torch's threads are not in it, so it "
                "computes with one (torch.set_num_threads(1))"
            )
            torch.set_num_threads(1)

    def read(self, restore: bool | None) -> load.ExpertValues | None:
        """All weights that are elsewhere or encoded, for `leave`; None where they are given up. The model stays whole.

        Args:
            restore: None: where they fit into the memory that is free beside everything else.

        Raises:
            BudgetError: `restore` and they do not fit.
            ReadError: an expert cannot be read.
        """
        free = available_memory()
        needed = load.decoded_bytes(self._model, self._store) + linear.decoded_bytes(self._model)
        if restore and needed > free:
            raise BudgetError(
                f"restoring the experts needs {format_bytes(needed)} beside the slots, {format_bytes(free)} are free; "
                "close(restore=False) gives them up",
                needed=needed,
            )
        if restore or (restore is None and needed <= free):
            return [*load.read_experts(self._model, self._store), *linear.decoded_weights(self._model, self._frozen)]
        return None

    def before_forward(self, told: Callable[[tuple[Any, ...], dict[str, Any]], object]) -> None:
        """From now on `told` gets the arguments of each forward of the model before it runs."""
        hook = self._model.register_forward_pre_hook(lambda _, args, kwargs: told(args, kwargs), with_kwargs=True)
        self._hooks.append(hook)

    def in_chunks(self, tokens: int | None, room: int) -> None:
        """From now on prompts are computed in chunks (`emoe.seam.prefill.ChunkedPrefill`)."""
        self._hooks.append(ChunkedPrefill(self._model, tokens, room))

    def plain_linear(self, plain: Plain) -> int:
        """From now on plain linear layers are computed as `plain` says; returns how many weights that may be."""
        weights = PlainWeights(self._model, plain)
        self._hooks.append(weights)
        return len(weights.weights)

    def norms(self, norm: Norm) -> int:
        """From now on `norm` computes the model's plain RMSNorms; returns how many there are."""
        norms = Norms(self._model, norm)
        self._hooks.append(norms)
        return len(norms.modules)

    def one_row(self, attend: Callable[..., Any]) -> bool:
        """From now on `attend` computes the attention of decode steps; whether the model's code lets it."""
        config = self._model.config.get_text_config(decoder=True)
        if config._attn_implementation != STOCK:
            return False
        if other := compares_names(self._model):
            logger.info("emoe: attention is Transformers' own: the code of %s asks for its name", other)
            return False
        self._hooks.append(OneRowAttention(self._model, attend))
        return True

    def attention_blocks(self, make: Make) -> int:
        """From now on decode steps of plain attention blocks are computed by what `make` gives; returns how many."""
        blocks = AttentionBlocks(self._model, make)
        self._hooks.append(blocks)
        return len(blocks.modules)

    def close(self) -> None:
        """Takes the hooks of a running model away."""
        for hook in self._hooks:
            hook.remove()

    def leave(self, experts: load.ExpertValues | None) -> None:
        """Gives the model its experts and its own ways back; may be called again.

        Without experts the guard stays, and refuses to save a model that has none.
        """
        if experts is None:
            self._answers.give_up()
            logger.warning("emoe: closed without restoring; the model has no experts and refuses to run")
            return
        # In this order: a forward in another thread finds experts whenever it is not sent to emoe.
        load.put_experts(experts)
        self._model.to("cpu")  # where its experts are now
        self._guard.remove()
        self._answers.remove()
        for module in self._modules:
            vars(module).pop("_emoe", None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._model.train(self._training)
        self._restored = True

    def let_go(self, runtime: object) -> None:
        """A model that is whole again no longer names the runtime that ran it."""
        if self._restored and self._model.emoe is runtime:
            self._model.emoe = Gone()
