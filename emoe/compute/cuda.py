"""One layer's forward on a device, and the slot tables it may read there: torch's tensors as the kernels see them.

On a GPU every tensor is made, used and freed on torch's current stream; the emulation of the tests copies them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from emoe.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from emoe.compute.device import Device
    from emoe.compute.slot_tables import Settled

_Slots = npt.NDArray[np.int32]


class CudaTable:
    """A `slot_tables.DeviceTable` in a GPU's memory."""

    def __init__(self, device: Device, experts: int) -> None:
        self._device = device
        self.slot_of = torch.full((experts,), -1, dtype=torch.int32, device=device.name)

    @property
    def address(self) -> int:
        return self.slot_of.data_ptr()

    def write(self, values: _Slots) -> None:
        self._device.native.upload(self.address, values.ctypes.data, values.nbytes, self._device.stream())

    def close(self) -> None:
        del self.slot_of


class CudaCall:
    """One forward of one layer on torch's current stream.

    Every tensor is made, used and freed on that stream, so torch's caching allocator keeps their order by itself: no
    `record_stream` is needed. The other streams of emoe touch slots and pinned memory only, never torch's tensors.
    """

    def __init__(
        self, device: Device, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if str(hidden.device) != device.name:
            raise UnsupportedModelError(
                f"emoe runs these experts on {device.name}; hidden states are on {hidden.device}"
            )
        self.device, self.layout, self.slab = device, layout, slab
        self.hidden, self.index, self.weights = hidden.contiguous(), _ids(index).contiguous(), weights.contiguous()
        self.T, self.K = index.shape
        self.stream = device.stream()
        self.out = torch.zeros((self.T, self.K, layout.hidden_out), dtype=torch.float32, device=hidden.device)

    def __enter__(self) -> CudaCall:
        return self

    def __exit__(self, *exc: object) -> None:
        del self.hidden, self.index, self.weights, self.out

    def gather(self, slot_of: _Slots) -> None:
        """Adds the pairs of every expert that has a slot."""
        self.device.native.gather_mlp(
            self.layout, self.slab, slot_of, self.hidden.data_ptr(), _name(self.hidden.dtype), self.T,
            self.index.data_ptr(), self.weights.data_ptr(), _name(self.weights.dtype), self.K, self.out.data_ptr(),
            self.stream,
        )  # fmt: skip

    def gather_settled(self, settled: Settled) -> None:
        """Adds all pairs: their experts are in the device's slot table. Needs nothing from the host."""
        native, dtypes = self.device.native, (_name(self.hidden.dtype), _name(self.weights.dtype))
        E = len(settled.table.slot_of)
        nbytes = native.workspace_bytes(self.layout, self.slab, E, dtypes[0], self.T, dtypes[1], self.K)
        # Torch's allocator, so that a captured graph keeps the memory it was captured with.
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=self.hidden.device)
        native.gather_mlp_resident(
            self.layout, self.slab, settled.slots, settled.table.address, E, self.hidden.data_ptr(), dtypes[0], self.T,
            self.index.data_ptr(), self.weights.data_ptr(), dtypes[1], self.K, self.out.data_ptr(),
            workspace.data_ptr(), nbytes, self.stream,
        )  # fmt: skip

    def add_pairs(self, pairs: torch.Tensor) -> None:
        """Adds pairs that the CPU computed: [T, K, Ho] float32, zero where the device computes."""
        self.out += pairs.to(self.out.device)

    def combine(self, dtype: torch.dtype) -> torch.Tensor:
        """[T, Ho] of `dtype`: the sum over ranks."""
        result = torch.empty((self.T, self.layout.hidden_out), dtype=dtype, device=self.out.device)
        self.device.native.combine(
            self.out.data_ptr(), self.T, self.K, self.layout.hidden_out, result.data_ptr(), _name(dtype), self.stream
        )
        return result


class EmulatedTable:
    """A `slot_tables.DeviceTable` twice: where torch computes, and in emulated device memory."""

    def __init__(self, device: Device, experts: int) -> None:
        self._device = device
        self.slot_of = torch.full((experts,), -1, dtype=torch.int32)
        self.address = int(device.native.allocate(self.slot_of.nbytes))
        self.write(self.slot_of.numpy())

    def write(self, values: _Slots) -> None:
        self.slot_of.copy_(torch.from_numpy(values))
        self._device.native.upload(self.address, values.ctypes.data, values.nbytes, 0)

    def close(self) -> None:
        self._device.native.free(self.address)


class EmulatedCall:
    """As `CudaCall`; tensors are copied to emulated device memory and back."""

    def __init__(
        self, device: Device, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if hidden.device.type != "cpu":
            raise UnsupportedModelError(
                f"device='emulated' takes tensors on the CPU; hidden states are on {hidden.device}"
            )
        self.device, self.layout, self.slab = device, layout, slab
        self.T, self.K = index.shape
        self._memory: list[int] = []
        self._dtypes = _name(hidden.dtype), _name(weights.dtype)
        self._pairs = torch.zeros((self.T, self.K, layout.hidden_out), dtype=torch.float32)
        self._inputs = [self._put(tensor) for tensor in (hidden, _ids(index), weights)]
        self._out = self._put(self._pairs)

    def __enter__(self) -> EmulatedCall:
        return self

    def __exit__(self, *exc: object) -> None:
        for address in self._memory:
            self.device.native.free(address)

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
        self.device.native.combine(self._out, self.T, self.K, self.layout.hidden_out, target, _name(dtype), 0)
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


def _ids(index: torch.Tensor) -> torch.Tensor:
    # The native side reads an address and cannot see another width.
    if index.dtype != torch.int64:
        raise ConfigError(f"index is {index.dtype}; expert ids are torch.int64")
    return index


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
