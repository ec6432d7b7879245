"""The experts function that Transformers calls, and the state each experts module keeps for it.

Transformers dispatches `module(hidden_states, top_k_index, top_k_weights)` to the function registered as "emoe"
(transformers.integrations.moe). It finds its `ExpertLayer` on the module; nothing is patched. What computes a layer is
its `compute`: `cpu.Native`, `stock.Stock` or `gpu_experts.OnDevice`, chosen once by the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from emoe.errors import ClosedError, ConfigError, EmoeError, UnsupportedModelError
from emoe.model.layout import SlotLayout
from emoe.model.spec import ExpertForm
from emoe.requests import Kind, OfBlock, Request
from emoe.slots.loader import Loader

if TYPE_CHECKING:
    from emoe.compute.slot_tables import SlotTables
    from emoe.trace.trace import TraceRecorder

IMPLEMENTATION = "emoe"
CLOSED = "this model's emoe runtime was closed and its experts were not restored"


class Part(NamedTuple):
    """What a device is told of one layer.

    Attributes:
        number: counted over experts modules.
        module: Transformers' experts module; its expert parameters are detached.
        form: of one expert.
        layout: where each lies in a slot, and the native layout where there is one.
        loader, slab, queue: of the runtime.
        place: where tensors have to be.
        records: the queue's record of each expert.
        tables: slot tables of a GPU, where routing may choose by them.
    """

    number: int
    module: nn.Module
    form: ExpertForm
    layout: SlotLayout
    loader: Loader
    slab: Any
    queue: Any
    place: torch.device
    records: Sequence[int]
    tables: SlotTables | None = None


class Compute(Protocol):
    """Computes the experts of one layer. Callers hold the runtime's lock."""

    @property
    def name(self) -> str:
        """ "native", "stock", or the name of the device."""
        ...

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `ExpertLayer.forward`."""
        ...


class Observer(Protocol):
    """Told of every forward of a layer, under the runtime's lock."""

    def before(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """A layer is about to compute: its inputs [T, H], the experts it uses [T, K] and their weights [T, K]."""

    def after(self, layer: int) -> None:
        """It has computed, and holds no slot any more."""


@dataclass(eq=False, slots=True)
class Recording(OfBlock):
    """Hands what layers compute to a trace while its block runs, under the task of the request that begins.

    Attributes:
        file: writes the trace where the block ends well.
    """

    recorder: TraceRecorder
    file: AbstractContextManager[Any] | None = None

    def before(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        if not self.over:
            self.recorder.record(layer, index.cpu().numpy(), weights.float().cpu().numpy())

    def after(self, layer: int) -> None:
        """A trace holds what was routed."""

    def begin(self, request: Request, first: bool) -> None:
        if request.kind is Kind.ASKED and request.task is not None and not self.over:
            self.recorder.mark(task=request.task)

    def end(self, request: Request, last: bool) -> None:
        """A mark stays until the next."""


class ExpertLayer:
    """One experts module bound to its slots.

    Args:
        part: the layer.
        compute: what its experts are computed with.
        lock: held during each forward.
        observers: told of each forward in this order; the list is shared by all layers and may change between two.
    """

    def __init__(self, part: Part, compute: Compute, lock: RLock, observers: list[Observer]) -> None:
        self.index, self.module, self.layout = part.number, part.module, part.layout
        self.num_experts = cast(int, part.module.num_experts)
        self.compute = compute
        self._lock, self._observers, self._loader = lock, observers, part.loader
        self._place, self._width = part.place, _width(part)
        # Native kernels know what it computes, and do not ask again.
        self._act = None if part.layout.native is None else getattr(part.module, "act_fn", None)
        # Of a module whose parameters stand for what is in the store.
        self._check_values = getattr(part.module, "_emoe_check_values", None)

    @property
    def kernels(self) -> str:
        """Which implementation serves this layer: "native", "stock", or the name of the device."""
        return self.compute.name

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Routed experts' weighted output.

        Args:
            hidden: [T, H] token states, on the CPU or on the GPU that has the slots.
            index: [T, K] int64 expert ids; ids outside [0, E) add nothing.
            weights: [T, K] router weights.

        Returns:
            [T, H] in the dtype of `hidden`.

        Raises:
            ReadError: the bytes of an expert could not be read; no output is produced.
            ClosedError: the runtime was closed.
            ConfigError: a shape or dtype does not fit.
            UnsupportedModelError: tensors are on another device.
            ExpertsElsewhereError: somebody put values where the module's parameters stand.
            EmoeError: this runs in a signal handler, in the middle of a layer of the same model.
        """
        self._check(hidden, index, weights)
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise EmoeError("emoe runs inference only and computes no gradients; use torch.no_grad()")
        with self._lock, torch.no_grad():
            # Whoever has the lock is the only one in the loader, but for a signal handler in the middle of a forward,
            # which is refused: what is left of other calls was cut off.
            self._loader.begin()
            try:
                return self._observed(hidden, index, weights)
            except BaseException:
                self._loader.recover()
                raise
            finally:
                self._loader.over()

    def _observed(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self._check_values is not None:
            self._check_values()
        if self._act is not None and getattr(self.module, "act_fn", None) is not self._act and self.kernels != "stock":
            raise ConfigError(
                f"act_fn of experts {self.index} was replaced after the model was loaded, and the native kernels "
                "compute with the one before; set it before emoe.wrap, or load with kernels='stock'"
            )
        observers = self._observers
        for observer in observers:
            observer.before(self.index, hidden, index, weights)
        result = self.compute(hidden, index, weights)
        for observer in observers:
            observer.after(self.index)
        return result

    def _check(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        if not (hidden.device == index.device == weights.device == self._place):
            where = ", ".join(str(each.device) for each in (hidden, index, weights))
            raise UnsupportedModelError(
                f"emoe runs these experts on {self._place}; hidden states, expert ids and weights are on {where}"
            )
        if not index.layout == hidden.layout == weights.layout == torch.strided:
            raise ConfigError(
                f"hidden, index and weights are {hidden.layout}, {index.layout}, {weights.layout}; "
                "experts take dense tensors"
            )
        if index.dtype != torch.int64 or index.dim() != 2 or not index.shape[1]:
            raise ConfigError(f"index is {index.dtype} {list(index.shape)}; expert ids are int64 [T, K], K at least 1")
        if weights.shape != index.shape or not weights.is_floating_point():
            raise ConfigError(
                f"weights is {weights.dtype} {list(weights.shape)}, not floating-point {list(index.shape)} as index is"
            )
        width = hidden.shape[-1] if self._width is None else self._width
        if hidden.shape != (len(index), width) or not hidden.is_floating_point():
            raise ConfigError(
                f"hidden is {hidden.dtype} {list(hidden.shape)}, not floating-point {[len(index), width]}"
            )

    def close(self, reason: str = CLOSED) -> None:
        """Lets go of the slots; a later forward raises ClosedError. The module itself is not touched."""
        self.compute, self._check_values = Closed(reason), None


def _width(part: Part) -> int | None:
    """Channels of a token; None where a family's own code alone knows."""
    if part.layout.native is not None:
        return cast(int, part.layout.native["hidden"])
    for param in part.form.params:
        if param.name in ("gate_up_proj", "up_proj") and len(param.shape) == 2:
            return param.shape[0 if part.module.is_transposed else 1]
    return None


class StandIn:
    """In the place of what computes, while the model is tried out: each row depends on its input and picks alone."""

    name = "stand-in"

    def __init__(self, layout: SlotLayout) -> None:
        self._width = (layout.native or {}).get("hidden_out")

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        scale = (weights * torch.cos(index.to(weights.dtype))).sum(-1, keepdim=True)  # [T, 1]
        result = torch.tanh(hidden) * scale.to(hidden.dtype)
        width = hidden.shape[1] if self._width is None else self._width
        return result.repeat(1, -(-width // hidden.shape[1]))[:, :width]


class Closed:
    """In the place of what computed, when the runtime was closed."""

    name = "closed"

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise ClosedError(self._reason)


def emoe_experts(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function registered with Transformers; `self` is the experts module."""
    layer = getattr(self, "_emoe", None)
    if layer is None:
        raise ClosedError(
            f"experts implementation '{IMPLEMENTATION}' was chosen for {type(self).__name__}, but emoe holds none of "
            "its experts; use emoe.from_pretrained or emoe.wrap"
        )
    return cast(ExpertLayer, layer).forward(hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Makes "emoe" a choice of `model.set_experts_implementation`; harmless to call again."""
    from transformers.integrations.moe import ExpertsInterface

    # Which slots hold the experts changes from call to call: torch.compile breaks its graph here and traces no slot.
    ExpertsInterface.register(IMPLEMENTATION, torch.compiler.disable(emoe_experts))
