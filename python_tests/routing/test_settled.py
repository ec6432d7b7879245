"""Steps of `resident` routing on a device that read no value on the host: slot tables, exchange, counts, capture."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from fake_queue import FakeQueue
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.compute.cuda import Cuda
from emoe.compute.slot_tables import SlotTables
from emoe.errors import EmoeError
from emoe.model.structure import find_experts
from emoe.planning import kv_cache
from emoe.routing import Request, Routing, attach, parse_options, random_residency
from emoe.slots.cache import CacheManager
from emoe.slots.loader import Loader

E, TOP_K = families.EXPERTS, families.TOP_K
NAMES = sorted(families.FAMILIES)


@functools.cache
def _model(name="olmoe"):
    return families.build(name)


def _residency(model, count=4, seed=1):
    return random_residency([E] * len(find_experts(model)), count, seed)


class _Fixed:
    """Tables of a residency that does not change; what was routed by them."""

    def __init__(self, residency, device="cpu", capturing=False):
        self._tables = [
            SimpleNamespace(slot_of=torch.where(residency.mask(layer), 1, -1).int().to(device))
            for layer in range(len(residency.sizes))
        ]
        self.capture = capturing
        self.seen = []

    def settled(self, layer, top_k):
        return SimpleNamespace(table=self._tables[layer])

    def routed(self, layer, settled, picks):
        self.seen.append(layer)

    def capturing(self):
        return self.capture


@contextlib.contextmanager
def _by_tables(model, residency, tables=None):
    routing = Routing(model, residency, parse_options("resident"))
    routing.use(tables if tables is not None else _Fixed(residency))
    routing.start()
    with routing:
        yield routing


def _ids(model, rows=12, seed=7):
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (1, rows), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _run(model, steps=2, seed=7):
    ids = _ids(model, 12 + steps, seed)
    out = model(ids[:, :12], use_cache=True)
    logits = [out.logits[:, -1]]
    for step in range(12, 12 + steps):
        out = model(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.cat(logits)


@pytest.mark.parametrize("name", NAMES)
def test_tables_give_the_picks_and_the_counts_of_the_host(name):
    model = _model(name)
    residency = _residency(model)
    results = []
    for way in (functools.partial(attach, routing="resident"), _by_tables):
        with way(model, residency) as routing, routing.request("code", "first"):
            results.append((_run(model), routing))
    (expected, host), (logits, device) = results
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    expected_stats, stats = host.stats(per_layer=True), device.stats(per_layer=True)
    assert stats["substituted"] > 0
    for one, other in zip(
        [expected_stats, *expected_stats["layers"], *expected_stats["requests"]],
        [stats, *stats["layers"], *stats["requests"]],
        strict=True,
    ):
        mass, expected_mass = other.pop("substituted_mass"), one.pop("substituted_mass")
        assert mass == pytest.approx(expected_mass, abs=1e-6)
        for field in ("rows", "picks", "absent", "substituted", "misses"):
            assert other[field] == one[field], field


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_no_value_of_any_tensor(name):
    """On the meta device there are no values: whatever reads one raises."""
    model = copy.deepcopy(_model(name))
    kv_cache.register_shape_only()
    residency = _residency(model)
    with _by_tables(model, residency, _Fixed(residency, "meta")) as routing, torch.no_grad():
        model.set_experts_implementation(kv_cache.SHAPE_ONLY)
        model.to("meta")
        for rows in (1, 5):
            for site in routing.sites:
                if site.rule is not None:
                    logits = torch.empty(rows, E, device="meta")
                    weights = torch.empty(rows, TOP_K, device="meta")
                    index = torch.empty(rows, TOP_K, device="meta", dtype=torch.int64)
                    assert routing.route(site, site.rule, logits, weights, index)[1].shape == (rows, TOP_K)
        routing._settled._counts._sums.clear()  # nothing to be read at the end: there are no values
        routing._settled._counts._owners.clear()


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "phimoe", "gpt_oss"])
def test_every_pick_is_in_the_table_whatever_the_router_gives(name):
    model = _model(name)
    residency = _residency(model, count=TOP_K)
    with _by_tables(model, residency) as routing:
        site = next(site for site in routing.sites if site.rule is not None)
        resident = residency.mask(site.layer)
        rows = torch.randn(6, E, generator=torch.Generator().manual_seed(3))
        rows[1, resident] = float("-inf")
        rows[2, ~resident] = float("inf")
        rows[3] = float("nan")
        rows[4] = 3e8
        rows[5, 0] = float("nan")
        index = rows.masked_fill(resident, float("-inf")).topk(TOP_K).indices
        weights, picks = routing.route(site, site.rule, rows, torch.ones(6, TOP_K), index)
        assert resident[picks].all()
        assert weights[0].isfinite().all()
        stats = routing.stats()
        assert 0 < stats["substituted_mass"] <= 1
        assert stats["substituted"] == stats["absent"] == stats["picks"] == 6 * TOP_K


def test_the_host_path_reads_values_so_that_the_test_above_can_fail():
    model = copy.deepcopy(_model())
    residency = _residency(model)
    with attach(model, residency, routing="resident") as routing:
        site = routing.sites[0]
        empty = torch.empty(5, TOP_K, device="meta")
        with pytest.raises((RuntimeError, NotImplementedError)):
            routing.route(site, site.rule, torch.empty(5, E, device="meta"), empty, empty.long())


def test_rows_of_a_batch_are_counted_for_their_requests():
    model = _model()
    residency = _residency(model)
    tallies = []
    for way in (functools.partial(attach, routing="resident"), _by_tables):
        one, two = Request("code"), Request("chat")
        with way(model, residency) as routing, torch.no_grad():
            for rows in ((5, 7), (1, 1)):
                with routing.rows([(one, rows[0]), (two, rows[1])]):
                    model(_ids(model, sum(rows)))
            routing.finish(one)
            assert one.tally.rows == 6 * len(routing.sites), "counts are there when a request is finished"
            routing.finish(two)
        tallies.append([one.tally.to_dict(), two.tally.to_dict()])
    for expected, found in zip(*tallies, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def test_what_a_replay_adds_belongs_to_the_request_that_runs_then():
    model = _model()
    with _by_tables(model, _residency(model)) as routing, torch.no_grad():
        with routing.request("warm-up"):
            model(_ids(model))
        with routing.request("served") as served:
            routing._settled._counts._sums[0][1, 0] += 4  # as a graph does, without a call of ours
        assert served.tally.rows == 4


def test_what_is_added_while_counts_are_read_is_read_the_next_time():
    model = _model()
    with _by_tables(model, _residency(model)) as routing, torch.no_grad():
        model(_ids(model))
        sums, take, added = routing._settled._counts._sums[0], routing._settled._counts._take, []

        def step_of_another_thread(*counts):
            if not added:
                added.append(sums.add_(1))
            take(*counts)

        routing._settled._counts._take = step_of_another_thread
        rows = [routing.stats()["rows"] for _ in range(3)]
    assert rows[1:] == [rows[0] + len(routing.sites)] * 2


def test_what_a_replay_adds_to_a_batch_belongs_to_the_requests_of_its_rows():
    model = _model()
    one, two, three = Request("code"), Request("chat"), Request("code")
    with _by_tables(model, _residency(model)) as routing, torch.no_grad():
        with routing.rows([(one, 2), (two, 1)]):
            model(_ids(model, 3))
        assert routing._settled._counts._owners == [routing._requests.current, one, two]
        with routing.rows([(three, 2), (two, 1)]):
            routing._settled._counts._sums[1][0, 0] += 7  # as a graph does, without a call of ours
        for request in (one, two, three):
            routing.finish(request)
    layers = len(routing.sites)
    assert [one.tally.rows, two.tally.rows, three.tally.rows] == [2 * layers, layers, 7]


def test_steps_in_inference_mode_and_outside_it_take_turns():
    model = _model()
    with _by_tables(model, _residency(model)) as routing:
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                model(_ids(model, 2))
        assert routing.stats()["rows"] == 6 * len(routing.sites)


def test_picks_of_a_capture_are_told_to_nobody():
    model = _model()
    tables = _Fixed(_residency(model))
    told = []
    with _by_tables(model, _residency(model), tables) as routing, torch.no_grad():
        routing.observer = lambda layer, index: told.append(layer)
        model(_ids(model))
        assert told == [site.layer for site in routing.sites]
        tables.capture = True
        model(_ids(model))
        assert len(told) == len(routing.sites)
        tables.capture = False


def test_a_first_step_inside_a_capture_is_refused_and_so_is_reading_counts():
    model = _model()
    residency = _residency(model)
    tables = _Fixed(residency, capturing=True)
    with _by_tables(model, residency, tables) as routing, torch.no_grad():
        with pytest.raises(EmoeError, match="run one step first"):
            model(_ids(model))
        tables.capture = False
        model(_ids(model))
        tables.capture = True
        model(_ids(model))
        with pytest.raises(EmoeError, match="while a graph is captured"):
            routing.stats()
        tables.capture = False
        assert routing.stats()["rows"] == 2 * 12 * len(routing.sites)


class _Device:
    """Makes tables in the memory of the host."""

    def __init__(self):
        self.writes, self.followed, self.capture = 0, 0, False

    def table(self, count):
        device = self

        class Table:
            slot_of = torch.full((count,), -1, dtype=torch.int32)
            address = 0
            closed = False

            def write(self, values):
                device.writes += 1
                self.slot_of.copy_(torch.from_numpy(values))

            def close(self):
                self.closed = True

        return Table()

    def capturing(self):
        return self.capture

    def follow(self):
        self.followed += 1


def _tables(slots=3, count=6, layers=1, **queue):
    cache = CacheManager([slots] * layers)
    fake = FakeQueue(**{"eager": True, **queue})
    loader = Loader(cache, fake, [[layer * count + e for e in range(count)] for layer in range(layers)])
    device = _Device()
    return SlotTables(device, loader, [count] * layers, threading.RLock()), loader, device, fake


def _load(loader, *wanted, layer=0):
    for _ in loader.rounds(layer, wanted):
        pass


def test_a_layer_is_settled_when_no_slot_is_free_or_loading():
    tables, loader, device, queue = _tables(eager=False)
    assert tables.settled(0, 2) is None
    loader.prefetch(0, [1, 2, 4])
    assert tables.settled(0, 2) is None, "the slots are loading"
    queue.run_all()
    assert tables.settled(0, 2) is None, "nobody has noted that the bytes are there"
    loader.finish_prefetch(0)
    settled = tables.settled(0, 2)
    assert settled.table.slot_of.tolist() == [
        -1,
        *(loader.cache.lookup(0, e) if e in (1, 2, 4) else -1 for e in range(1, 6)),
    ]
    assert sorted(settled.slots) == [0, 1, 2]
    assert tables.settled(0, 2) is settled
    assert device.writes == 1, "an unchanged table is not written again"


def test_a_stream_that_looks_at_tables_runs_after_the_one_before_it(monkeypatch):
    class Stream:
        def __init__(self, name):
            self.name, self.after = name, []

        def wait_stream(self, other):
            self.after.append(other.name)

    one, two = Stream("one"), Stream("two")
    device = object.__new__(Cuda)
    device.name, device._followed = "cuda:0", None
    captures = False
    monkeypatch.setattr(device, "capturing", lambda: captures, raising=False)
    for current in (one, one, two, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda name, current=current: current)
        device.follow()
    assert (one.after, two.after) == (["two"], ["one"])
    captures = True
    monkeypatch.setattr(torch.cuda, "current_stream", lambda name: two)
    device.follow()
    assert two.after == ["one"], "no wait may cross the border of a capture"
    tables, _, seen, _ = _tables()
    tables.settled(0, 2)
    assert seen.followed == 1


def test_a_layer_with_fewer_experts_than_picks_is_not_settled():
    tables, loader, _, _ = _tables(slots=2)
    _load(loader, 0, 1)
    assert tables.settled(0, 3) is None
    assert tables.settled(0, 2) is not None
    assert tables.settled(0, 3) is None, "also when the table is written"


def test_picks_are_taken_once_and_only_while_the_experts_are_those_they_were_made_from():
    tables, loader, _, _ = _tables()
    _load(loader, 0, 1, 2)
    picks = torch.tensor([[0, 1]])
    tables.routed(0, tables.settled(0, 2), picks)
    assert tables.take(0, picks) is not None
    assert tables.take(0, picks) is None
    tables.routed(0, tables.settled(0, 2), picks)
    _load(loader, 5)
    assert tables.take(0, picks) is None, "an expert left after the router had looked"
    tables.routed(0, tables.settled(0, 2), picks)
    assert 5 in tables.take(0, picks).table.slot_of.ge(0).nonzero().flatten().tolist()


def test_picks_that_were_not_made_from_the_table_are_looked_at_by_the_host():
    """Those of another thread that the host routed, or of a router whose step broke off before its experts ran."""
    tables, loader, _, _ = _tables()
    _load(loader, 0, 1, 2)
    picks = torch.tensor([[0, 1]])
    tables.routed(0, tables.settled(0, 2), picks)
    assert tables.take(0, torch.tensor([[0, 5]])) is None
    assert tables.take(0, picks) is not None, "picks of others do not use it up"


def test_a_table_is_not_written_in_a_capture():
    tables, loader, device, _ = _tables()
    _load(loader, 0, 1, 2)
    device.capture = True
    with pytest.raises(EmoeError, match="run one step before a capture"):
        tables.settled(0, 2)
    device.capture = False
    settled = tables.settled(0, 2)
    device.capture = True
    assert tables.settled(0, 2) is settled


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["load", "prefetch", "drop", "finish", "fail"]), st.integers(0, 1), st.integers(0, 5)
        ),
        max_size=30,
    )
)
def test_a_settled_table_is_the_cache_whatever_happened_before(steps):
    tables, loader, _, queue = _tables(layers=2, eager=False, prefetch_bound=3)
    cache = loader.cache
    for what, layer, expert in steps:
        if what == "load":
            queue.eager = True
            with contextlib.suppress(EmoeError):
                _load(loader, expert, layer=layer)
            queue.eager = False
        elif what == "prefetch":
            loader.prefetch(layer, [expert])
        elif what == "fail":
            queue.failing.add(layer * 6 + expert)
        elif what == "finish":
            queue.run_all()
            loader.finish_prefetch(layer)
        elif cache.lookup(layer, expert) is not None and cache.state(cache.lookup(layer, expert)) == "ready":
            cache.drop(layer, expert)
        for each in range(2):
            settled = tables.settled(each, 2)
            states = [cache.state(slot) for slot in cache.slots(each)]
            if settled is None:
                assert "free" in states or "loading" in states or loader.prefetching(each)
                continue
            assert states == ["ready"] * 3
            expected = np.full(6, -1)
            for resident in cache.resident(each):
                expected[resident] = cache.lookup(each, resident)
            assert settled.table.slot_of.tolist() == expected.tolist()
            assert sorted(settled.slots) == list(cache.slots(each))
    queue.run_all()
    loader.close()
