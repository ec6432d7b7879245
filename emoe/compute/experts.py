"""The experts function that Transformers calls, and the state each experts module keeps for it.

Transformers dispatches `module(hidden_states, top_k_index, top_k_weights)` to the function registered as "emoe"
(transformers.integrations.moe). It finds its `ExpertLayer` on the module; nothing is patched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from emoe.compute import ops
from emoe.errors import ClosedError, EmoeError, UnsupportedModelError
from emoe.model.layout import SlotLayout
from emoe.model.spec import ParamSpec
from emoe.slots.loader import Loader

if TYPE_CHECKING:
    from emoe.compute.gpu_experts import DeviceExperts
    from emoe.compute.slot_tables import SlotTables
    from emoe.trace.trace import TraceRecorder

IMPLEMENTATION = "emoe"

# Above this many bytes of fp32 pair outputs a prefill adds expert outputs as they come, in one [T, H] buffer: the order
# of the additions then follows residency and the result is close, not bit-identical, between budgets.
PAIR_BYTES = 32 << 20


class SlotPool:
    """The slab seen as torch tensors: `tensor(slot, name)` is the parameter of the expert in that slot."""

    def __init__(self, slab: Any, layout: SlotLayout, params: Sequence[ParamSpec]) -> None:
        buffer = (ctypes.c_char * (slab.slots * slab.slot_bytes)).from_address(slab.address)
        self._bytes = torch.frombuffer(buffer, dtype=torch.uint8)
        self._slab = slab  # keeps the memory alive
        self._params = {
            param.name: (layout.offsets[param.name], param.shape, getattr(torch, param.dtype)) for param in params
        }

    def tensor(self, slot: int, name: str) -> torch.Tensor:
        offset, shape, dtype = self._params[name]
        start = slot * self._slab.slot_bytes + offset
        count = int(np.prod(shape)) * dtype.itemsize
        return self._bytes[start : start + count].view(dtype).view(shape)

    def names(self) -> list[str]:
        return list(self._params)


class _SlotParameter:
    """Stands where the [E, ...] weight stands in Transformers' eager loop; indexing gives one expert's slot."""

    def __init__(self, pool: SlotPool, name: str, slot_of: Callable[[int], int]) -> None:
        self._pool, self._name, self._slot_of = pool, name, slot_of

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._pool.tensor(self._slot_of(int(expert)), self._name)


class _ModuleView:
    """The experts module with its weights taken from slots; everything else is the module's own."""

    def __init__(self, module: nn.Module, pool: SlotPool, slot_of: Callable[[int], int]) -> None:
        self.__dict__.update({name: _SlotParameter(pool, name, slot_of) for name in pool.names()})
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _OneAtATime:
    """Slots for an eager loop over more experts than there are slots: holds the expert that the loop is at."""

    def __init__(self, loader: Loader, layer: int) -> None:
        self._loader, self._layer = loader, layer
        self._expert, self._slot = -1, -1
        self._held: Generator[Any, None, None] | None = None

    def slot_of(self, expert: int) -> int:
        if expert != self._expert:
            self.close()
            self._held = self._loader.rounds(self._layer, [expert])
            ((_, self._slot),) = next(self._held)
            self._expert = expert
        return self._slot

    def close(self) -> None:
        self._expert = -1
        if self._held is not None:
            self._held.close()


class Watcher(Protocol):
    """Told of every forward of a layer, under the runtime's lock."""

    def before(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """A layer is about to compute: its inputs [T, H] and the experts it uses [T, K]."""

    def after(self, layer: int) -> None:
        """It has computed, and holds no slot any more."""


class ExpertLayer:
    """One experts module bound to its slots.

    Args:
        index: layer number, counted over experts modules.
        module: the Transformers experts module; its expert parameters are already detached.
        layout: where each parameter lies in a slot, and the native layout where there is one.
        kernels: "native" or "stock".
        on_device: computes on a GPU; the slots are then in its memory and `kernels` is "native".
        tables: slot tables of the GPU, where routing may choose by them.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        *,
        loader: Loader,
        slab: Any,
        layout: SlotLayout,
        params: Sequence[ParamSpec],
        kernels: str,
        lock: RLock,
        pair_bytes: int = PAIR_BYTES,
        on_device: DeviceExperts | None = None,
        tables: SlotTables | None = None,
    ) -> None:
        self.index = index
        self.module = module
        self.num_experts = cast(int, module.num_experts)
        self.loader = loader
        self.slab = slab
        self.layout = layout
        self.pool = None if on_device else SlotPool(slab, layout, params)
        self._on_device = on_device
        self._tables = tables
        self.lock = lock
        self.pair_bytes = pair_bytes
        self.recorder: TraceRecorder | None = None
        self.watcher: Watcher | None = None
        self.native = layout.native if kernels == "native" else None
        self.closed = False
        self._slot_of = np.full(self.num_experts, -1, dtype=np.int32)
        self._mlp = ops.make_layout(self.native) if self.native is not None and on_device is None else None
        self._eager: Callable[..., torch.Tensor] = type(module).forward.__wrapped__  # type: ignore[attr-defined]

    @property
    def kernels(self) -> str:
        """Which implementation serves this layer: "native", "stock", or the name of the device."""
        if self._on_device is not None:
            return self._on_device.name
        return "stock" if self._mlp is None else "native"

    @property
    def on_cpu(self) -> int:
        """Missing experts that the CPU computed in place of the device, so far."""
        return self._on_device.on_cpu if self._on_device is not None else 0

    @property
    def settled(self) -> int:
        """Forwards on a device that needed nothing of the host, so far."""
        return self._on_device.settled if self._on_device is not None else 0

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
        """
        if self.closed:
            raise ClosedError("this model's emoe runtime was closed and its experts were not restored")
        if self._on_device is None and hidden.device.type != "cpu":
            raise UnsupportedModelError(f"emoe runs experts on the CPU; hidden states are on {hidden.device}")
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise EmoeError("emoe runs inference only and computes no gradients; use torch.no_grad()")
        with self.lock, torch.no_grad():
            if self.recorder is not None:
                self.recorder.record(self.index, index.cpu().numpy(), weights.float().cpu().numpy())
            if self.watcher is None:
                return self._forward(hidden, index, weights)
            self.watcher.before(self.index, hidden, index)
            result = self._forward(hidden, index, weights)
            self.watcher.after(self.index)
            return result

    def _forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        settled = None if self._tables is None else self._tables.take(self.index, index)
        if self._on_device is not None and settled is not None:
            return self._on_device.forward_settled(hidden, index, weights, settled)
        wanted = sorted({e for e in index.flatten().tolist() if 0 <= e < self.num_experts})
        if self._on_device is not None:
            return self._on_device.forward(self.index, self.loader, hidden, index, weights, wanted)
        if self._mlp is None:
            return self._forward_stock(hidden, index, weights, wanted)
        return self._forward_native(hidden, index, weights, wanted)

    def close(self) -> None:
        """Lets go of the slots; a later forward raises ClosedError. The module itself is not touched."""
        self.closed = True
        self._on_device = self._tables = None
        del self.pool, self.slab

    def _forward_native(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, wanted: list[int]
    ) -> torch.Tensor:
        T, K = index.shape
        H = hidden.shape[1]
        pairs = self.pair_bytes >= T * K * H * 4
        out = torch.zeros((T, K, H) if pairs else (T, H), dtype=torch.float32)
        hidden, index, weights = hidden.contiguous(), index.contiguous(), weights.contiguous()
        slot_of = self._slot_of
        with closing(self.loader.rounds(self.index, wanted)) as rounds:
            for group in rounds:
                slot_of.fill(-1)
                for expert, slot in group:
                    slot_of[expert] = slot
                ops.gather_mlp(
                    self._mlp, self.slab, slot_of, hidden, index, weights, out, "pairs" if pairs else "accumulate"
                )
        return ops.combine(out, hidden.dtype) if pairs else out.to(hidden.dtype)

    def _forward_stock(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, wanted: list[int]
    ) -> torch.Tensor:
        if len(wanted) <= self.loader.capacity(self.index):
            with closing(self.loader.rounds(self.index, wanted, together=True)) as rounds:
                slot_of = dict(next(rounds, []))  # held until the generator is closed
                return self._eager(
                    _ModuleView(self.module, cast(SlotPool, self.pool), slot_of.__getitem__), hidden, index, weights
                )
        # The family's own loop goes through the experts one by one, in ascending order, whatever the slots.
        with closing(_OneAtATime(self.loader, self.index)) as held:
            return self._eager(
                _ModuleView(self.module, cast(SlotPool, self.pool), held.slot_of), hidden, index, weights
            )


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

    ExpertsInterface.register(IMPLEMENTATION, emoe_experts)
