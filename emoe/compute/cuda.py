"""CUDA devices: one layer's forward and the slot tables it may read there, torch's tensors as the kernels see them.

Every tensor is made, used and freed on torch's current stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from emoe.compute.device import Gpu
from emoe.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from emoe.compute.slot_tables import Settled

_Slots = npt.NDArray[np.int32]


class Cuda(Gpu):
    """A CUDA device that torch uses too."""

    def __init__(self, module: Any, index: int) -> None:
        super().__init__(module, index)
        self.name = f"cuda:{index}"
        self.tensors = torch.device(self.name)
        self._followed: torch.cuda.Stream | None = None

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.name).cuda_stream)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.name)[0])

    def place(self, model: Any) -> None:
        model.to(self.name)

    def call(
        self, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> CudaCall:
        return CudaCall(self, layout, slab, hidden, index, weights)

    def table(self, experts: int) -> CudaTable:
        self.follow()  # who writes it first on another stream comes after what fills it here
        return CudaTable(self, experts)

    def follow(self) -> None:
        stream = torch.cuda.current_stream(self.name)
        # A capture starts on a stream that is in order already, and no wait may cross its border.
        if stream == self._followed or self.capturing():
            return
        if self._followed is not None:
            stream.wait_stream(self._followed)
        self._followed = stream


class CudaTable:
    """A `slot_tables.DeviceTable` in a GPU's memory."""

    def __init__(self, device: Cuda, experts: int) -> None:
        self._device = device
        self.slot_of = torch.full((experts,), -1, dtype=torch.int32, device=device.name)

    @property
    def address(self) -> int:
        return self.slot_of.data_ptr()

    def write(self, values: _Slots) -> None:
        self._device.native.write_table(self.address, values, self._device.stream())

    def close(self) -> None:
        del self.slot_of


class CudaCall:
    """One forward of one layer on torch's current stream.

    Every tensor is made, used and freed on that stream, so torch's caching allocator keeps their order by itself: no
    `record_stream` is needed. The other streams of emoe touch slots and pinned memory only, never torch's tensors.
    """

    def __init__(
        self, device: Cuda, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if str(hidden.device) != device.name:
            raise UnsupportedModelError(
                f"emoe runs these experts on {device.name}; hidden states are on {hidden.device}"
            )
        self.device, self.layout, self.slab = device, layout, slab
        self.hidden, self.weights = hidden.contiguous(), weights.contiguous()
        self.index = expert_ids(index).contiguous()
        self.T, self.K = index.shape
        self.stream = device.stream()
        self.out = torch.zeros((self.T, self.K, layout.hidden_out), dtype=torch.float32, device=hidden.device)

    def __enter__(self) -> CudaCall:
        return self

    def __exit__(self, *exc: object) -> None:
        del self.hidden, self.index, self.weights, self.out

    def fetch(self) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Sends hidden states and weights to the host; the result waits until they are there, in any thread."""
        here = [pinned(each).copy_(each, non_blocking=True) for each in (self.hidden, self.weights)]
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device.name))

        def fetched() -> tuple[torch.Tensor, torch.Tensor]:
            arrived.synchronize()
            return here[0], here[1]

        return fetched

    def gather(self, slot_of: _Slots) -> None:
        """Adds the pairs of every expert that has a slot."""
        self.device.native.gather_mlp(
            self.layout, self.slab, slot_of, self.hidden.data_ptr(), dtype_name(self.hidden.dtype), self.T,
            self.index.data_ptr(), self.weights.data_ptr(), dtype_name(self.weights.dtype), self.K, self.out.data_ptr(),
            self.stream,
        )  # fmt: skip

    def gather_settled(self, settled: Settled) -> None:
        """Adds all pairs: their experts are in the device's slot table. Needs nothing from the host."""
        native, dtypes = self.device.native, (dtype_name(self.hidden.dtype), dtype_name(self.weights.dtype))
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
        self.out += pinned(pairs).copy_(pairs).to(self.out.device, non_blocking=True)

    def combine(self, dtype: torch.dtype) -> torch.Tensor:
        """[T, Ho] of `dtype`: the sum over ranks."""
        result = torch.empty((self.T, self.layout.hidden_out), dtype=dtype, device=self.out.device)
        self.device.native.combine(
            self.out.data_ptr(),
            self.T,
            self.K,
            self.layout.hidden_out,
            result.data_ptr(),
            dtype_name(dtype),
            self.stream,
        )
        return result


def expert_ids(index: torch.Tensor) -> torch.Tensor:
    # The native side reads an address and cannot see another width.
    if index.dtype != torch.int64:
        raise ConfigError(f"index is {index.dtype}; expert ids are torch.int64")
    return index


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Pinned memory of the host for a tensor like this one; torch keeps it until copies on its streams are over."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
