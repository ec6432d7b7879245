"""The timeline of a run: every transfer is in it once, rows nest, and nothing stays behind on the model."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

import emoe
from emoe.analysis import timeline
from emoe.errors import ConfigError, ReadError


@pytest.fixture
def model(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    yield model
    if model.emoe:
        model.emoe.close(restore=False)


def _hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _complete(trace):
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_every_load_is_a_transfer_and_every_layer_a_span(model, tmp_path):
    before = model.emoe.stats()["loads"]
    with timeline.watch(model) as found:
        model(torch.tensor([[5, 6, 7, 8, 9]]))
        model(torch.tensor([[11, 12]]))
    loads = model.emoe.stats()["loads"] - before
    trace = json.loads(found.save(tmp_path / "timeline.json").read_text())
    events = _complete(trace)
    transfers = [event for event in events if event["pid"] == timeline.TRANSFERS]
    assert loads > 0 and len(transfers) == loads
    assert sum(event["args"]["bytes"] for event in transfers) == loads * model.emoe.stats()["slot_bytes"]
    assert {event["cat"] for event in transfers} == {"demand"}
    layers = [event["args"]["layer"] for event in events if event["name"].startswith("experts")]
    assert layers == [0, 1, 2, 0, 1, 2]
    assert sum(event["name"] == "forward" for event in events) == 2
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)


def test_events_of_one_row_never_overlap_unless_one_holds_the_other(model):
    with timeline.watch(model) as found:
        model(torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(0)))
    rows = {}
    for event in _complete(found.to_chrome()):
        rows.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    slack = 0.2  # times are rounded to tenths of a microsecond
    for spans in rows.values():
        for (begin, end), (after, last) in pairwise(sorted(spans, key=lambda span: (span[0], -span[1]))):
            assert after >= end - slack or (begin <= after + slack and last <= end + slack)


def test_prefetches_are_in_a_lane_of_their_own(model):
    with timeline.watch(model) as found:
        started = model.emoe.loader.prefetch(0, [0, 1, 2])
        model.emoe.loader.finish_prefetch(0)  # else the forward takes back those that have not begun
        model(torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[5, 6, 7]]))
    lanes = [event["cat"] for event in _complete(found.to_chrome()) if event["pid"] == timeline.TRANSFERS]
    assert started and lanes.count("prefetch") == started


def test_a_model_is_left_as_it_was_and_still_answers(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    queue, hooks = model.emoe.loader._queue, _hooks(model)
    with timeline.watch(model) as found:
        watched = model(ids).logits
    assert torch.equal(expected, watched)
    assert model.emoe.loader._queue is queue
    spans = len(found.to_chrome()["traceEvents"])
    model(ids)
    assert len(found.to_chrome()["traceEvents"]) == spans
    assert _hooks(model) == hooks


def test_a_read_that_fails_ends_its_transfer_and_the_error_arrives(model, monkeypatch):
    with timeline.watch(model) as found, pytest.raises(ReadError):
        wait = model.emoe.loader._queue.queue.wait

        class Failing:
            def __getattr__(self, name):
                return getattr(queue, name)

            def wait(self, ticket):
                wait(ticket)
                raise ReadError("no such bytes")

        queue = model.emoe.loader._queue.queue
        model.emoe.loader._queue.queue = Failing()
        try:
            model(torch.tensor([[5, 6, 7]]))
        finally:
            model.emoe.loader._queue.queue = queue
    assert found.summary()["transfers"] >= 1
    model(torch.tensor([[5, 6, 7]]))


def test_the_hidden_share_is_the_transfer_time_in_which_nothing_waited():
    found = timeline.Timeline()
    found.transfer("demand", 0.0, 4.0, layer=0, expert=1, bytes=10)
    found.transfer("demand", 2.0, 6.0, layer=0, expert=2, bytes=10)
    found.transfer("demand", 7.0, 8.0, layer=1, expert=2, bytes=10)
    found.span("waiting", "wait", 3.0, 6.0)
    found.span("waiting", "wait", 8.0, 9.0)
    found.span("model", "layer 0", 0.0, 6.5)
    found.span("model", "layer 1", 6.5, 9.0)
    sums = found.summary()
    assert sums["transfer_seconds"] == 7.0 and sums["waited_seconds"] == 4.0 and sums["layer_seconds"] == 9.0
    assert sums["hidden_share"] == pytest.approx(1 - 3 / 7)
    assert sums["transferred_bytes"] == 30
    rows = {event["tid"] for event in _complete(found.to_chrome()) if event["pid"] == timeline.TRANSFERS}
    assert len(rows) == 2  # the third transfer fits behind the first


def test_the_step_is_the_last_forward_alone_from_its_start(model):
    with timeline.watch(model) as found:
        model(torch.tensor([[5, 6, 7, 8, 9]]))
        model(torch.tensor([[11, 12]]))
    rows = found.step()
    assert [row for row, _ in rows][:2] == ["experts", "waiting"]
    assert {row for row, _ in rows[2:]} <= {"demand"}
    assert [name for _, _, name in dict(rows)["experts"]] == ["experts 0", "experts 1", "experts 2"]
    assert all(0 <= begin <= end for _, bars in rows for begin, end, _ in bars)
    assert timeline.Timeline().step() == []


def test_a_plain_model_has_no_timeline(checkpoint):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"))
    with pytest.raises(ConfigError, match="does not run under emoe"), timeline.watch(plain):
        pass
