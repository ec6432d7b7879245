"""`model.emoe.preload`: slots, and on a device pinned memory, are full before the first prompt."""

from __future__ import annotations

import pytest
import torch

import emoe
from emoe import native, runtime
from emoe.errors import ClosedError, ReadError


@pytest.fixture
def prompt():
    return torch.arange(3, 19).unsqueeze(0)


@pytest.mark.parametrize("budget", [0.3, 0.5, 1.0])
def test_free_slots_are_filled_once_with_the_experts_of_the_lowest_ids(budget, checkpoint, prompt, capsys):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=budget, context=64)
    with torch.no_grad():
        other = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=budget, context=64)
        expected = other(prompt).logits
    slots = model.emoe.plan.slots_per_layer
    capsys.readouterr()
    assert model.emoe.preload() == sum(slots)
    assert capsys.readouterr().err == "", "no bar where nobody watches"
    assert [ids for _, ids in model.emoe.residents()] == [list(range(count)) for count in slots]
    stats = model.emoe.stats()
    assert (stats["loads"], stats["hits"], stats["misses"]) == (sum(slots), 0, 0)
    assert model.emoe.preload() == 0
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, expected)
    if budget == 1.0:
        assert model.emoe.stats()["misses"] == 0
    model.emoe.check_integrity()
    model.emoe.close(restore=False)
    with pytest.raises(ClosedError):
        model.emoe.preload()


def test_what_a_prompt_brought_stays(checkpoint, prompt):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.75, context=64)
    with torch.no_grad():
        model(prompt[:, :2])
    before = [set(ids) for _, ids in model.emoe.residents()]
    model.emoe.preload()
    after = [set(ids) for _, ids in model.emoe.residents()]
    assert all(here <= there for here, there in zip(before, after, strict=True))
    assert [len(ids) for ids in after] == list(model.emoe.plan.slots_per_layer)
    model.emoe.close(restore=False)


def test_an_expert_that_cannot_be_read_is_an_error_and_the_next_call_goes_on(checkpoint, monkeypatch):
    module = native.load()
    monkeypatch.setattr(runtime, "make_reader", lambda kind: module.FaultyReader(module.make_reader(kind), fail_at=3))
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, context=64)
    with pytest.raises(ReadError, match="of layer 0 could not be read"):
        model.emoe.preload()
    model.emoe.check_integrity()
    model.emoe.preload()
    assert [len(ids) for _, ids in model.emoe.residents()] == list(model.emoe.plan.slots_per_layer)
    model.emoe.close(restore=False)


@pytest.mark.parametrize("pinned", [None, 5])
def test_on_a_device_pinned_memory_is_filled_as_far_as_it_reaches(pinned, checkpoint, prompt, found_device):
    folder, options = checkpoint("qwen3_moe"), {}
    if pinned is not None:
        options["pinned_memory"] = pinned * emoe.plan(folder, 0.5, calibrate=False).slot_bytes
    model = emoe.from_pretrained(folder, memory_budget=0.5, device=found_device("emulated"), **options)
    experts = sum(model.emoe.plan.experts_per_layer)
    read = model.emoe.preload(progress=False)
    store = model.emoe.loader._queue.store
    assert read >= sum(model.emoe.plan.slots_per_layer) and store.used == 0
    held = sum(store.holds(record) for record in range(experts))
    assert held == (experts if pinned is None else pinned)
    if pinned is None:
        before = model.emoe.stats()["bytes_read"]
        model(prompt)
        assert model.emoe.stats()["bytes_read"] == before, "nothing is read from files any more"
    model.emoe.close(restore=False)
