"""The fake CUDA runtime of the tests as a device: tensors stay on the CPU, copies of them go to emulated memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from emoe.compute.cuda import dtype_name, expert_ids
from emoe.compute.device import Gpu
from emoe.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from emoe.compute.slot_tables import Settled

_Slots = npt.NDArray[np.int32]


class Emulated(Gpu):
    """The fake CUDA runtime (emoe._C_emulated)."""

    name = "emulated"
    tensors = torch.device("cpu")

    def stream(self) -> int:
        return 0

    def free_bytes(self) -> int:
        return 4 << 30

    def place(self, model: Any) -> None:
        if any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters()):
            raise ConfigError("device='emulated' takes a model on the CPU")

    def call(
        self, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> EmulatedCall:
        return EmulatedCall(self, layout, slab, hidden, index, weights)

    def table(self, experts: int) -> EmulatedTable:
        return EmulatedTable(self, experts)


class EmulatedTable:
    """A `slot_tables.DeviceTable` twice: where torch computes, and in emulated device memory."""

    def __init__(self, device: Emulated, experts: int) -> None:
        self._device = device
        self.slot_of = torch.full((experts,), -1, dtype=torch.int32)
        self.address = int(device.native.allocate(self.slot_of.nbytes))
        self.write(self.slot_of.numpy())

    def write(self, values: _Slots) -> None:
        self.slot_of.copy_(torch.from_numpy(values))
        self._device.native.write_table(self.address, values, 0)

    def close(self) -> None:
        self._device.native.free(self.address)


class EmulatedCall:
    """As `CudaCall`; tensors are copied to emulated device memory and back."""

    def __init__(
        self, device: Emulated, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if hidden.device.type != "cpu":
            raise UnsupportedModelError(
                f"device='emulated' takes tensors on the CPU; hidden states are on {hidden.device}"
            )
        self.device, self.layout, self.slab = device, layout, slab
        self.T, self.K = index.shape
        self._memory: list[int] = []
        self._here = hidden.contiguous(), weights.contiguous()
        self._dtypes = dtype_name(hidden.dtype), dtype_name(weights.dtype)
        self._pairs = torch.zeros((self.T, self.K, layout.hidden_out), dtype=torch.float32)
        self._inputs = [self._put(tensor) for tensor in (hidden, expert_ids(index), weights)]
        self._out = self._put(self._pairs)

    def __enter__(self) -> EmulatedCall:
        return self

    def __exit__(self, *exc: object) -> None:
        for address in self._memory:
            self.device.native.free(address)

    def fetch(self) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return lambda: self._here

    def gather(self, slot_of: _Slots) -> None:
        hidden, index, weights = self._inputs
        self.device.native.gather_mlp(
            self.layout, self.slab, slot_of, hidden, self._dtypes[0], self.T, index, weights, self._dtypes[1], self.K,
            self._out, 0,
        )  # fmt: skip

    def gather_settled(self, settled: Settled) -> None:
        hidden, index, weights = self._inputs
        native, E = self.device.native, len(settled.table.slot_of)
        nbytes = native.workspace_bytes(self.layout, self.slab, E, self._dtypes[0], self.T, self._dtypes[1], self.K)
        workspace = self._allocate(nbytes)
        native.gather_mlp_resident(
            self.layout, self.slab, settled.slots, settled.table.address, E, hidden, self._dtypes[0], self.T, index,
            weights, self._dtypes[1], self.K, self._out, workspace, nbytes, 0,
        )  # fmt: skip

    def add_pairs(self, pairs: torch.Tensor) -> None:
        self._get(self._out, self._pairs)
        self._pairs += pairs
        self._out = self._put(self._pairs)

    def combine(self, dtype: torch.dtype) -> torch.Tensor:
        result = torch.zeros((self.T, self.layout.hidden_out), dtype=dtype)
        target = self._put(result)
        self.device.native.combine(self._out, self.T, self.K, self.layout.hidden_out, target, dtype_name(dtype), 0)
        self._get(target, result)
        return result

    def _allocate(self, nbytes: int) -> int:
        address = int(self.device.native.allocate(max(1, nbytes)))
        self._memory.append(address)
        return address

    def _put(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        address = self._allocate(tensor.nbytes)
        self.device.native.upload(address, tensor.data_ptr(), tensor.nbytes, 0)
        return address

    def _get(self, address: int, tensor: torch.Tensor) -> None:
        self.device.native.download(tensor.data_ptr(), address, tensor.nbytes, 0)
