"""What only a GPU would run of emoe/compute/cuda.py, on CPU tensors, with doubles of torch.cuda and the native part."""

from __future__ import annotations

import ctypes
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emoe.compute import cuda
from emoe.compute.cuda import Cuda
from emoe.compute.device import SMALLEST_PINNED_SLOTS
from emoe.errors import BudgetError, ConfigError, UnsupportedModelError

T, K, H, E = 3, 2, 4, 5


def at(address, shape, ctype=ctypes.c_float):
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctype * count).from_address(address)).reshape(shape)


class Native:
    """Writes weight times hidden state for each pair whose expert has a slot, where the addresses say."""

    def __init__(self, index):
        self.index, self.calls, self.captured = index, [], set()

    def capturing(self, stream):
        return stream in self.captured

    def write_table(self, address, values, stream):
        at(address, values.shape, ctypes.c_int32)[:] = values
        self.calls.append(("write_table", stream))

    def gather_mlp(self, layout, slab, slot_of, hidden, dtype, tokens, index, weights, routing, top_k, out, stream):
        self.calls.append(("gather_mlp", stream))
        assert (dtype, routing) == ("float32", "float32")
        ids, shares = at(index, (tokens, top_k), ctypes.c_int64), at(weights, (tokens, top_k))
        pairs, states = at(out, (tokens, top_k, layout.hidden_out)), at(hidden, (tokens, layout.hidden_out))
        for t in range(tokens):
            for k in range(top_k):
                if slot_of[ids[t, k]] >= 0:
                    pairs[t, k] += shares[t, k] * states[t]

    def workspace_bytes(self, layout, slab, experts, dtype, tokens, routing, top_k):
        return 64 * experts + tokens

    def gather_mlp_resident(self, layout, slab, slots, table, experts, *rest):
        *call, workspace, nbytes, stream = rest
        assert workspace and nbytes == 64 * experts + call[2] and slots == "slots"
        self.gather_mlp(layout, slab, at(table, (experts,), ctypes.c_int32), *call, stream)

    def combine(self, pairs, tokens, top_k, hidden_out, out, dtype, stream):
        self.calls.append(("combine", stream, dtype))
        at(out, (tokens, hidden_out))[:] = at(pairs, (tokens, top_k, hidden_out)).sum(1)


class Stream:
    def __init__(self, number):
        self.cuda_stream, self.waited = number, []

    def wait_stream(self, other):
        self.waited.append(other.cuda_stream)


class Event:
    made: list = []  # noqa: RUF012

    def __init__(self):
        self.recorded, self.waited = None, 0
        Event.made.append(self)

    def record(self, stream):
        self.recorded = stream

    def synchronize(self):
        self.waited += 1


@pytest.fixture
def device(monkeypatch):
    now = SimpleNamespace(stream=Stream(7))
    asked = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda name: asked.append(name) or now.stream)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (123, 456))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda, "pinned", lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    Event.made.clear()
    found = Cuda(SimpleNamespace(CudaDevice=Native), 1)
    assert (found.name, found.tensors) == ("cuda:1", torch.device("cuda:1"))
    found.name = "cpu"  # where these tensors are
    found.now, found.asked = now, asked
    return found


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(H, T, generator=generator).T  # not contiguous
    index = torch.tensor([[0, 3], [4, 1], [3, 0]])
    return hidden, index, torch.rand(T, K, generator=generator)


LAYOUT = SimpleNamespace(hidden_out=H)


def expected(hidden, index, weights, experts):
    return (hidden[:, None] * weights[..., None] * torch.isin(index, torch.tensor(experts))[..., None]).sum(1)


def test_a_call_sums_what_the_device_and_the_host_computed_on_the_current_stream(device):
    hidden, index, weights = inputs()
    with device.call(LAYOUT, None, hidden, index, weights) as call:
        arrived = call.fetch()
        (event,) = Event.made
        assert event.recorded is device.now.stream and event.waited == 0
        states, shares = arrived()
        assert event.waited == 1 and torch.equal(states, hidden) and torch.equal(shares, weights)
        for slots in ({0: 2}, {3: 1, 4: 0}):
            slot_of = np.full(E, -1, dtype=np.int32)
            slot_of[list(slots)] = list(slots.values())
            call.gather(slot_of)
        pairs = torch.zeros(T, K, H)
        pairs[1, 1] = weights[1, 1] * hidden[1]  # expert 1
        call.add_pairs(pairs)
        result = call.combine(torch.float32)
    torch.testing.assert_close(result, expected(hidden, index, weights, [0, 1, 3, 4]))
    assert device.native.calls == [("gather_mlp", 7), ("gather_mlp", 7), ("combine", 7, "float32")]
    assert not hasattr(call, "out") and set(device.asked) == {"cpu"}


def test_a_settled_call_takes_its_slots_from_the_table_on_the_device(device):
    hidden, index, weights = inputs()
    table = device.table(E)
    assert table.slot_of.tolist() == [-1] * E and table.address == table.slot_of.data_ptr()
    table.write(np.array([1, -1, -1, 0, -1], dtype=np.int32))
    with device.call(LAYOUT, None, hidden, index, weights) as call:
        call.gather_settled(SimpleNamespace(table=table, slots="slots"))
        torch.testing.assert_close(call.combine(torch.float32), expected(hidden, index, weights, [0, 3]))
    assert device.native.calls[0] == ("write_table", 7)
    table.close()
    assert not hasattr(table, "slot_of")


def test_hidden_states_elsewhere_and_ids_of_another_width_are_refused(device):
    hidden, index, weights = inputs()
    with pytest.raises(UnsupportedModelError, match="on cpu; hidden states are on meta"):
        device.call(LAYOUT, None, hidden.to("meta"), index, weights)
    with pytest.raises(ConfigError, match=r"index is torch.int32; expert ids are torch.int64"):
        device.call(LAYOUT, None, hidden, index.int(), weights)


def test_streams_follow_each_other_except_in_a_capture(device):
    first, second, third = device.now.stream, Stream(8), Stream(9)
    device.table(E)  # made on the first: whoever comes next waits for that
    device.now.stream = second
    device.follow()
    device.follow()
    assert second.waited == [7]
    device.now.stream = third
    device.native.captured.add(9)
    device.follow()
    assert third.waited == []
    device.native.captured.clear()
    device.follow()
    device.now.stream = first
    device.follow()
    assert (third.waited, first.waited) == ([8], [9])


def test_streams_memory_and_place_are_torchs(device):
    assert device.stream() == 7 and device.free_bytes() == 123
    moved = []
    device.place(SimpleNamespace(to=moved.append))
    assert moved == ["cpu"]


@pytest.mark.parametrize(("most", "made"), [(100, 64), (40, 32), (9, 8), (3, 3)])
def test_fewer_slots_are_pinned_where_the_system_pins_no_more(device, most, made, caplog):
    def pin(slots, slot_bytes, index):
        if slots > most:
            raise BudgetError("cudaErrorMemoryAllocation while pinning", needed=slots * slot_bytes)
        return SimpleNamespace(slots=slots)

    device.module.PinnedCache = pin
    with caplog.at_level(logging.WARNING, "emoe"):
        assert device._pinned(64, 4096).slots == made
    assert len(caplog.records) == (made < 64) + (made < 32) + (made < 16) + (made < 8) + (made < 4)
    device.module.PinnedCache = lambda *args: pin(SMALLEST_PINNED_SLOTS + 10**6, 4096, 0)
    with pytest.raises(BudgetError, match="while pinning"):
        device._pinned(64, 4096)
