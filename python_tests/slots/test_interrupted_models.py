"""Ctrl-C while a model runs, at any line and at random moments: the same model then gives the right tokens."""

from __future__ import annotations

import contextlib
import ctypes
import random
import signal

import pytest
import torch
from interrupts import handled, interrupted

import emoe
from emoe import native, runtime
from emoe.compute import records
from emoe.errors import EmoeError
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
    "coarse": {"routing": "coarse", "exact_mass": 0.3},
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
    reach, seen = 1500, set()
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
                torch.set_grad_enabled(True)  # torch's own `no_grad` may have been cut off in its `__exit__`
            _assert_idle(model)
            seed = rnd.randrange(6)
            assert torch.equal(_logits(model, seed), own[seed])
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_signal_handler_that_runs_the_model_gets_right_tokens_or_an_error_and_so_does_the_forward(
    options, checkpoint, truth
):
    logits, expected = truth
    model = _load(checkpoint("qwen3_moe"), **options)
    own = _own(model, logits)
    exact = "routing" not in options
    rnd = random.Random(3)
    reach, right, refused = 1500, 0, 0

    def handler():
        nonlocal right, refused
        seed = rnd.randrange(6)
        try:
            with model.emoe.request("handler") if rnd.random() < 0.5 else contextlib.nullcontext():
                found = _logits(model, seed)
        except EmoeError as error:
            assert "in the middle of a forward in this very thread" in str(error)
            refused += 1
            if rnd.random() < 0.3:
                raise
            return
        right += 1
        assert not exact or torch.equal(found, own[seed])

    for _ in range(MOMENTS):
        seed = rnd.randrange(6)
        try:
            found = []
            where = handled(lambda: found.append(_logits(model, seed)), rnd.randrange(reach), ROOMS, handler)  # noqa: B023
        except EmoeError:
            where, found = "raised", [own[seed]]
        if not where:
            reach = max(100, reach * 9 // 10)
        assert not exact or torch.equal(found[0], own[seed]), where
        assert torch.isfinite(found[0]).all()
        _assert_idle(model)
        assert all(expected[key] == value for key, value in _bytes(model).items()), where
        assert model.emoe.requests.kind is Kind.ASKED and not model.emoe.requests._asked
    assert refused and right + refused > MOMENTS // 3
    model.emoe.close()


@pytest.mark.parametrize("options", [{}, {"predictor": "recent", "prefetch": "look-ahead"}, {"kernels": "stock"}])
def test_handlers_of_real_signals_that_run_the_model_never_make_a_wrong_token(options, checkpoint, truth):
    model = _load(checkpoint("qwen3_moe"), **options)
    own = _own(model, truth[0])
    seen = []

    def handler(*_):
        try:
            seen.append(torch.equal(_logits(model, 5), own[5]))
        except EmoeError:
            seen.append(None)

    rnd = random.Random(4)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(60):
            signal.setitimer(signal.ITIMER_REAL, rnd.uniform(1e-4, 8e-3))
            for seed in range(4):
                assert torch.equal(_logits(model, seed), own[seed])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    _assert_idle(model)
    assert False not in seen and True in seen


@pytest.mark.parametrize("room", ["routing/control.py", "requests.py", "trace/trace.py"])
def test_a_signal_handler_in_the_middle_of_a_count_waits_for_nobody(room, checkpoint, tmp_path):
    model = _load(checkpoint("qwen3_moe"), routing="biased", bias=1.0, max_substituted_mass=0.1)
    with model.emoe.record(tmp_path / "trace.npz"):
        _logits(model, 0, tokens=1)

        def handler():
            with contextlib.suppress(EmoeError), model.emoe.request("handler"):
                _logits(model, 1, tokens=1)
            model.emoe.stats()

        at, where, seen = 0, "first", set()
        while where:
            with model.emoe.request("code"):
                where = handled(lambda: _logits(model, 0, tokens=1), at, [room], handler)
            seen.add(where)
            at += 5
    assert len(seen) > 5
    assert not model.emoe.requests.running
    _assert_idle(model)
    tasks = model.emoe.stats()["routing"]["tasks"]
    assert tasks["code"]["rows"] >= len(seen) and tasks["handler"]["rows"] > 0


@pytest.mark.parametrize("call", ["close", "check_integrity", "stats"])
def test_what_a_signal_handler_asks_of_a_runtime_in_the_middle_of_a_layer_is_answered_or_refused(
    call, checkpoint, truth
):
    model = _load(checkpoint("qwen3_moe"))
    own = _own(model, truth[0])
    answered = []

    def handler():
        try:
            answered.append(getattr(model.emoe, call)())
        except EmoeError as error:
            assert "in the middle of a forward" in str(error)

    for at in range(0, 50, 3):
        assert handled(lambda: answered.append(_logits(model, 1)), at, ["compute/cpu.py"], handler)
        assert torch.equal(answered.pop(), own[1])
    assert bool(answered) == (call == "stats")
    _assert_idle(model)


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
