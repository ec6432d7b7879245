"""Ctrl-C while a model runs, at any line and at random moments: the same model then gives the right tokens."""

from __future__ import annotations

import ctypes
import random
import signal

import pytest
import torch
from interrupts import interrupted

import emoe
from emoe import native, runtime
from emoe.compute import records
from emoe.requests import Kind

ROOMS = ("slots", "compute", "routing")
MOMENTS = 60
CASES = {
    "plain": {},
    "a slot a layer": {"memory_budget": 0.1},
    "predictor": {"predictor": "recent"},
    "prefetch": {"prefetch": "look-ahead"},
    "stock": {"kernels": "stock"},
    "stock in turn": {"kernels": "stock", "memory_budget": 0.1},
    "resident": {"routing": "resident"},
    "resident, predictor": {"routing": "resident", "predictor": "recent"},
    "biased": {"routing": "biased", "bias": 1.0},
    "contract": {"routing": "biased", "bias": 1.0, "max_substituted_mass": 0.1},
    "all": {
        "routing": "resident", "max_substituted_mass": 0.1, "predictor": "recent", "prefetch": "look-ahead",
    },
}  # fmt: skip


def _load(path, **options):
    return emoe.from_pretrained(path, **{"memory_budget": 0.5, "dtype": torch.float32, **options})


def _logits(model, seed, tokens=3):
    ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


def _bytes(model):
    """What is in the slot of each resident expert."""
    slab, cache = model.emoe._bank.slab, model.emoe.cache
    return {
        (number, expert): ctypes.string_at(
            slab.address + cache.lookup(number, expert) * slab.slot_bytes, layer.layout.nbytes
        )
        for number, layer in enumerate(model.emoe.layers)
        for expert in cache.resident(number)
    }


def _own(model, logits):
    """The model's logits before anything happens to it; kernels differ from each other in the last bits."""
    own = {seed: _logits(model, seed) for seed in logits}
    if model.emoe.stats()["routing"]["mode"] == "exact":
        assert all(torch.allclose(own[seed], logits[seed], atol=1e-4) for seed in logits)
    return own


def _assert_idle(model):
    model.emoe.check_integrity()
    cache, loader = model.emoe.cache, model.emoe.loader
    for layer in range(cache.layers):
        states = [cache.state(slot) for slot in cache.slots(layer)]
        assert "held" not in states
        loader.finish_prefetch(layer)
        assert all(cache.state(slot) in ("free", "ready") for slot in cache.slots(layer))


@pytest.fixture(scope="module")
def truth(checkpoint):
    """Logits of six texts, and the bytes of every expert."""
    model = _load(checkpoint("qwen3_moe"), memory_budget=1.0)
    logits = {seed: _logits(model, seed) for seed in range(6)}
    for seed in range(6, 40):
        _logits(model, seed)
    return logits, _bytes(model)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_after_an_interrupt_at_any_line_slots_have_their_experts_bytes_and_tokens_are_right(options, checkpoint, truth):
    logits, expected = truth
    model = _load(checkpoint("qwen3_moe"), **options)
    own = _own(model, logits)
    rnd = random.Random(1)
    reach, seen = 500, set()
    while len(seen) < MOMENTS:
        where = interrupted(lambda: _logits(model, rnd.randrange(6)), rnd.randrange(reach), ROOMS)
        if not where:
            reach = max(100, reach * 9 // 10)
            continue
        seen.add((where, len(seen)))
        _assert_idle(model)
        assert all(expected[key] == value for key, value in _bytes(model).items()), where
        seed = rnd.randrange(6)
        again = _logits(model, seed)
        if "routing" not in options:
            assert torch.equal(again, own[seed]), where
        assert model.emoe.requests.kind is Kind.ASKED
    model.emoe.close()


@pytest.mark.parametrize("options", [{}, {"predictor": "recent", "prefetch": "look-ahead"}, {"kernels": "stock"}])
def test_after_signals_at_random_moments_tokens_are_right(options, checkpoint, truth):
    model = _load(checkpoint("qwen3_moe"), **options)
    own = _own(model, truth[0])

    def interrupt(*_):
        raise KeyboardInterrupt

    rnd = random.Random(2)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, rnd.uniform(1e-4, 8e-3))
                try:
                    for seed in range(6):
                        _logits(model, seed)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            _assert_idle(model)
            seed = rnd.randrange(6)
            assert torch.equal(_logits(model, seed), own[seed])
    finally:
        signal.signal(signal.SIGALRM, before)


class _Losing:
    """A queue whose caller is interrupted when a native call has returned."""

    def __init__(self, queue):
        self.queue, self.lose = queue, None

    def __getattr__(self, name):
        return getattr(self.queue, name)

    def submit(self, record, slot, prefetch=False):
        ticket = self.queue.submit(record, slot, prefetch)
        return self._return("prefetch" if prefetch else "demand", ticket)

    def wait(self, ticket):
        return self._return("wait", self.queue.wait(ticket))

    def promote(self, ticket):
        return self._return("promote", self.queue.promote(ticket))

    def cancel(self, ticket):
        return self._return("cancel", self.queue.cancel(ticket))

    def _return(self, call, value):
        if call == self.lose:
            self.lose = None
            raise KeyboardInterrupt
        return value


@pytest.mark.parametrize("call", ["demand", "prefetch", "wait", "promote", "cancel"])
def test_an_interrupt_inside_a_native_call_never_gives_a_slot_away_that_is_written_later(
    call, checkpoint, truth, monkeypatch
):
    logits, expected = truth
    module, make = native.load(), runtime.make_reader
    monkeypatch.setattr(runtime, "make_reader", lambda kind: module.FaultyReader(make(kind), delay_ms=2))
    options = {"memory_budget": 0.1} if call == "demand" else {"prefetch": "look-ahead"}
    model = _load(checkpoint("qwen3_moe"), **options)
    losing = model.emoe.loader._queue = _Losing(model.emoe.loader._queue)
    lost = 0
    for seed in range(12):
        losing.lose = call
        try:
            _logits(model, 100 + seed, tokens=1)
        except KeyboardInterrupt:
            lost += 1
        losing.lose = None
        assert torch.equal(_logits(model, seed % 6), logits[seed % 6])
        _assert_idle(model)
        assert all(expected[key] == value for key, value in _bytes(model).items())
    assert lost or call in ("promote", "cancel")


@pytest.mark.parametrize("options", [{}, {"kernels": "stock"}])
def test_experts_larger_than_the_bound_of_prefetch_are_prefetched(options, checkpoint, monkeypatch):
    monkeypatch.setattr(records, "PREFETCH_BYTES", 1)
    model = _load(checkpoint("qwen3_moe"), prefetch="look-ahead", **options)
    for seed in range(4):
        _logits(model, seed)
    assert model.emoe.stats()["prefetch_hits"] > 0


def test_the_bound_of_prefetch_follows_the_size_of_an_expert():
    assert records.prefetch_bytes(1 << 20) == 64 << 20
    assert records.prefetch_bytes(84 << 20) == 8 * (84 << 20)
