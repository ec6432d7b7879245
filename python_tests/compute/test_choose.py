"""A device is chosen once: the CPU is one like any other, a budget follows one rule on all, a layer has one compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import emoe
from emoe.compute import records
from emoe.compute.choose import open_device
from emoe.compute.cpu import CpuDevice, Native
from emoe.compute.stock import Stock
from emoe.errors import CheckpointError
from emoe.model import layout
from emoe.planning import plan as planning

GIB = 1 << 30


def test_the_cpu_is_a_device_with_memory_a_slab_and_a_name():
    device = open_device("cpu")
    assert isinstance(device, CpuDevice)
    assert (device.name, device.tensors) == ("cpu", torch.device("cpu"))
    assert device.free_bytes() > 0
    assert device.slab(2, 4096).slots == 2


@pytest.mark.parametrize(
    ("free", "took"), [(8, "7.0 GiB: 8.0 GiB are free, 1.0"), (40, "36.0 GiB: 40.0 GiB are free, 4.0")]
)
def test_auto_leaves_a_gibibyte_or_a_tenth_of_what_is_free_wherever_the_slots_are(free, took, checkpoint):
    plan = emoe.plan(checkpoint("olmoe"), "auto", calibrate=False, free=lambda: free * GIB)
    assert f"auto took {took} GiB stay reserved" in plan.notes


def test_auto_on_a_device_asks_the_device_and_not_the_host(checkpoint, found_device, monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 0)
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget="auto", device=found_device("emulated"))
    assert "auto took 3.5 GiB: 4.0 GiB are free, 512.0 MiB stay reserved" in model.emoe.plan.notes
    model.emoe.close(restore=False)


@pytest.mark.parametrize(("family", "kernels", "kind"), [
    ("olmoe", "native", Native), ("olmoe", "stock", Stock), ("inkling2_text", "native", Stock),
])  # fmt: skip
def test_a_layer_is_computed_by_what_its_device_chose(family, kernels, kind, checkpoint):
    model = emoe.from_pretrained(checkpoint(family), memory_budget=0.5, kernels=kernels)
    assert {type(layer.compute) for layer in model.emoe.layers} == {kind}
    assert model.emoe.stats()["kernels"] == {kind.name: len(model.emoe.layers)}
    assert model.emoe.stats()["device"] == "cpu"
    model.emoe.close(restore=False)


def test_no_layer_is_described_twice(checkpoint, monkeypatch):
    described = []
    describe = layout.describe
    monkeypatch.setattr(layout, "describe", lambda *given: described.append(given) or describe(*given))
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    assert len(described) == len(model.emoe.layers)
    assert [layer.layout for layer in model.emoe.layers] == list(model.emoe.plan.layouts)
    model.emoe.close(restore=False)


def test_experts_of_another_dtype_than_the_plan_says_are_refused_before_a_byte_is_read(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, dtype=torch.float32)
    store, layouts = model.emoe.store, model.emoe.plan.layouts
    half = [dataclasses.replace(each, nbytes=each.nbytes // 2) for each in layouts]
    with pytest.raises(CheckpointError, match=r"gate_up_proj float32 .* not what the budget was planned for; dtype="):
        records.register_records(CpuDevice().module, store, half)
    model.emoe.close(restore=False)


def test_observers_of_a_layer_are_told_in_their_order_before_and_after_it_computes(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    told = []

    class Observer:
        def __init__(self, name):
            self.name = name

        def before(self, layer, hidden, index, weights):
            told.append((self.name, "before", layer, tuple(index.shape) == tuple(weights.shape)))

        def after(self, layer):
            told.append((self.name, "after", layer))

    model.emoe.layers[0]._observers[:] = [Observer("first"), Observer("second")]
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert told[:4] == [
        ("first", "before", 0, True), ("second", "before", 0, True), ("first", "after", 0), ("second", "after", 0)
    ]  # fmt: skip
    assert len(told) == 4 * len(model.emoe.layers)
    model.emoe.close(restore=False)
