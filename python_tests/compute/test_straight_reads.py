"""Large arrays start in a slot where in a page they start in their files, so that direct reads need no copy."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import emoe
from emoe.compute.cpu import CpuDevice
from emoe.compute.device import Device
from emoe.compute.records import as_in_files
from emoe.model import spec
from emoe.model.layout import SlotLayout
from emoe.model.spec import PAGE, ExpertForm, ParamSpec, slot_bytes, slot_offsets
from emoe.store import Piece, StoreLayer

SIZES = st.lists(st.integers(1, 3 * spec.LARGE_ARRAY), min_size=1, max_size=5)


@given(SIZES, st.data())
def test_a_slot_holds_its_arrays_wherever_in_a_page_the_large_ones_start(sizes, data):
    stored = [ParamSpec(str(number), (size,), "uint8") for number, size in enumerate(sizes)]
    places = {each.name: data.draw(st.integers(0, PAGE - 1)) for each in stored if each.large}
    offsets, end = slot_offsets(stored, places)
    assert all(offsets[name] % PAGE == place for name, place in places.items())
    assert all(offsets[each.name] % 64 == 0 for each in stored if not each.large)
    ends = [0, *(offsets[each.name] + each.nbytes for each in stored)]
    assert all(before <= offsets[each.name] for before, each in zip(ends, stored, strict=False))
    assert ends[-1] <= end <= slot_bytes(stored) <= slot_offsets(stored)[1] + len(places) * (PAGE + 64)


def _layer(*offsets: int) -> StoreLayer:
    """Experts of one large array each, that start at these bytes of a file."""
    array = ParamSpec("codes", (spec.LARGE_ARRAY,), "uint8")
    pieces = [(Piece("file", at, array.nbytes, "t", "uint8", "codes", 1, array.nbytes, 0, 1, 1),) for at in offsets]
    return StoreLayer("experts", ExpertForm((), (array,)), tuple(pieces))


def _planned(layer: StoreLayer) -> SlotLayout:
    return SlotLayout(slot_bytes(layer.form.stored), slot_offsets(layer.form.stored)[0], None, "")


@pytest.fixture
def described(monkeypatch):
    """Where in a page layouts that are made anew have their arrays."""
    found = []
    monkeypatch.setattr(
        "emoe.model.layout.describe", lambda module, form, places: found.append(places) or SimpleNamespace()
    )
    return found


def test_the_place_is_that_of_most_experts(described):
    layer = _layer(4096 + 96, 10 * 4096 + 8, 700 * 4096 + 8)
    as_in_files({"experts": None}, [layer], [_planned(layer)], CpuDevice.slot_alignment)
    assert described == [{"codes": 8}]


@pytest.mark.parametrize(
    ("offset", "alignment"), [(8 * 4096, CpuDevice.slot_alignment), (100, CpuDevice.slot_alignment), (32, 64)]
)
def test_a_layout_stays_where_nothing_is_gained_or_the_device_could_not_compute(offset, alignment, described):
    layer = _layer(offset)
    planned = _planned(layer)
    (placed,) = as_in_files({"experts": None}, [layer], [planned], alignment)
    assert placed is planned and not described


def test_a_layer_that_is_not_what_was_planned_stays_for_the_refusal_that_follows(described):
    layer = _layer(8)
    other = dataclasses.replace(_planned(layer), nbytes=spec.LARGE_ARRAY // 2)
    assert as_in_files({"experts": None}, [layer], [other], 8) == [other] and not described


def test_an_array_that_is_converted_on_arrival_has_no_place_of_its_own(described):
    layer = _layer(8)
    converted = [tuple(dataclasses.replace(piece, src_dtype="int8") for piece in each) for each in layer.pieces]
    layer = dataclasses.replace(layer, pieces=tuple(converted))
    planned = _planned(layer)
    assert as_in_files({"experts": None}, [layer], [planned], 8) == [planned] and not described


def test_kernels_of_a_gpu_find_arrays_at_multiples_of_64():
    assert Device.slot_alignment == 64


@pytest.mark.parametrize("kernels", ["native", "stock"])
def test_a_model_whose_arrays_lie_as_in_its_files_computes_the_same_bits(kernels, checkpoint, monkeypatch):
    prompts = [torch.tensor([[5, 9, 77]]), torch.tensor([[3]]), torch.tensor([[100, 4]])]
    folder = checkpoint("olmoe")

    def logits(budget):
        model = emoe.from_pretrained(folder, memory_budget=budget, kernels=kernels)
        with torch.no_grad():
            result = [model(ids).logits for ids in prompts]
        store, layers = model.emoe.store, [layer.layout for layer in model.emoe.layers]
        model.emoe.close(restore=False)
        return result, store, layers

    expected, _, before = logits(1.0)
    monkeypatch.setattr(spec, "LARGE_ARRAY", 1)
    for budget in (1.0, 0.5):
        found, store, placed = logits(budget)
        assert placed != before
        for layer, where in zip(store.layers, placed, strict=True):
            for name, offset in where.offsets.items():
                pieces = [piece for expert in layer.pieces for piece in expert if piece.stored == name]
                starts = [piece.offset - 4 * piece.dst_offset for piece in pieces]  # float32
                assert any((start - offset) % PAGE == 0 for start in starts)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
