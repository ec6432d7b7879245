"""`close()` around everything else: errors and interrupts in it, threads beside it, calls after it, forks before it."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import signal
import threading
import time

import families
import pytest
import torch

import emoe
from emoe import memory, requests
from emoe.compute.bank import take_down
from emoe.errors import BudgetError, ClosedError, EmoeError, ReadError
from emoe.seam import attached, load

IDS = torch.randint(3, 100, (1, 8), generator=torch.Generator().manual_seed(3))


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=["olmoe", "deepseek_v3"])
def wrapped(request):
    model = families.build(request.param).eval()
    return emoe.wrap(model, memory_budget=0.5), _logits(model)


@pytest.mark.parametrize("error", [ReadError("expert (1, 0): EIO"), KeyboardInterrupt(), MemoryError()])
def test_a_close_whose_reading_back_fails_leaves_the_model_running_and_works_the_next_time(error, wrapped, monkeypatch):
    model, expected = wrapped
    read = load.read_layer

    def fails(store, layer):
        if layer == 1:
            raise error
        return read(store, layer)

    monkeypatch.setattr(load, "read_layer", fails)
    with pytest.raises(type(error)):
        model.emoe.close()
    assert not model.emoe.closed
    torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)
    with model.emoe.request("code"):
        assert model.emoe.stats()["slots"] > 0
    model.emoe.check_integrity()
    monkeypatch.setattr(load, "read_layer", read)
    model.emoe.close()
    assert not model.emoe
    torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)


def test_what_follows_a_close_that_restored_is_closed_and_the_model_is_like_any_other(wrapped, tmp_path):
    model, expected = wrapped
    model.emoe.close()
    model.emoe.close(restore=True)
    assert model.emoe.closed
    for use in (
        lambda: model.emoe.stats(),
        lambda: model.emoe.request("code"),
        lambda: model.emoe.record(tmp_path / "t.npz"),
        lambda: model.emoe.preload(),
        lambda: model.emoe.probe(),
        lambda: model.emoe.plan,
    ):
        with pytest.raises(ClosedError, match=r"emoe\.wrap\(model\)"):
            use()
    assert not list(tmp_path.iterdir())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.emoe is None
        assert torch.equal(_logits(other), _logits(model))
    emoe.wrap(model, memory_budget=0.5)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)
    assert model.emoe.stats()["slots"]
    model.emoe.close()


def test_experts_that_do_not_fit_are_said_before_anything_is_taken_down(wrapped, monkeypatch, caplog):
    model, expected = wrapped
    monkeypatch.setattr(attached, "available_memory", lambda: 1000)
    with pytest.raises(
        BudgetError, match=r"restoring the experts needs .* beside the slots, 1000 bytes are free"
    ) as said:
        model.emoe.close(restore=True)
    assert said.value.needed == model.emoe.plan.expert_bytes
    torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)
    model.emoe.close()
    assert "closed without restoring" in caplog.text
    monkeypatch.setattr(attached, "available_memory", memory.available_memory)
    with pytest.raises(ClosedError):
        _logits(model)


def test_a_step_that_was_interrupted_is_done_again_and_the_interrupt_arrives():
    done, interrupts = [], iter([KeyboardInterrupt(), None, KeyboardInterrupt(), None])

    def interrupted(name):
        error = next(interrupts)
        if error is not None:
            raise error
        done.append(name)

    steps = [lambda: interrupted("first"), lambda: interrupted("second"), lambda: done.append("last")]
    with pytest.raises(KeyboardInterrupt):
        take_down(steps)
    assert done == ["first", "second"]
    take_down(steps)
    assert done == ["first", "second", "last"]


def test_a_step_that_always_fails_is_left_out_and_said():
    done = []

    def fails():
        raise ReadError("no such file")

    with pytest.raises(ReadError):
        take_down([fails, lambda: done.append("second"), lambda: done.append("last")])
    assert done == ["second"]


def test_interrupts_at_any_moment_of_a_close_leave_a_model_that_runs_or_is_restored():
    """Asynchronous exceptions, as Ctrl-C is one, at random moments; the answers stay right."""
    expected = _logits(families.build("olmoe").eval())
    generator = torch.Generator().manual_seed(0)
    here = ctypes.c_ulong(threading.get_ident())
    for delay in (torch.rand(30, generator=generator) * 0.01).tolist():
        model = emoe.wrap(families.build("olmoe").eval(), memory_budget=0.5, prefetch="look-ahead")
        runtime, over = model.emoe, threading.Event()
        _logits(model)

        def interrupt(delay=delay, over=over):
            time.sleep(delay)
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(here, ctypes.py_object(KeyboardInterrupt))

        thread = threading.Thread(target=interrupt)
        try:
            thread.start()
            runtime.close()
            over.set()
            thread.join()
            for _ in range(100):  # one that was on its way arrives here
                time.sleep(0)
        except KeyboardInterrupt:
            over.set()
            thread.join()
        if not runtime.closed:
            torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)
        runtime.close()
        assert not model.emoe
        torch.testing.assert_close(_logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kernels": "stock"}, {"prefetch": "look-ahead"}, {"routing": "biased", "bias": 0.0}]
)
def test_forwards_beside_a_close_are_right_or_say_that_it_is_closed(restore, options, checkpoint):
    for delay in (0.0, 0.003, 0.01):
        model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0, dtype=torch.float32, **options)
        expected, found = _logits(model), []

        def run(model=model, found=found):
            try:
                for _ in range(20):
                    found.append(_logits(model))
            except BaseException as error:
                found.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(delay)
        model.emoe.close(restore=restore)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        for each in found:
            if isinstance(each, BaseException):
                assert isinstance(each, ClosedError), each
            else:
                torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)
        if restore:
            torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_waits_for_the_lock_while_a_close_has_it_says_that_it_is_closed(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    runtime, found = model.emoe, []

    def run():
        with pytest.raises(ClosedError) as said:
            _logits(model)
        found.append(said.value)

    with runtime._lock:
        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.05)
        runtime.close(restore=False)
    thread.join(30)
    assert len(found) == 1


def test_every_call_after_a_close_says_that_it_is_closed(checkpoint, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    runtime = model.emoe
    runtime.close(restore=False)

    def record():
        with runtime.record(tmp_path / "trace.npz"):
            raise AssertionError

    def request():
        with runtime.request("code"):
            raise AssertionError

    def replaying():
        with runtime.graphs.replaying():
            raise AssertionError

    calls = [runtime.stats, runtime.graphs.settle, replaying, runtime.probe, runtime.check_integrity, record, request]
    for call in [*calls, lambda: model.generate(IDS, max_new_tokens=2)]:
        with pytest.raises(ClosedError):
            call()
    runtime.close()
    assert "closed" in repr(runtime) and not (tmp_path / "trace.npz").exists()


def test_a_close_within_a_recording_and_a_request_ends_both_well(checkpoint, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, predictor="recent")
    runtime = model.emoe
    with runtime.record(tmp_path / "trace.npz"), runtime.request("code"):
        _logits(model)
        runtime.close()
    assert emoe.load_trace(tmp_path / "trace.npz").tokens == IDS.shape[1]
    assert not model.emoe


def _in_child(work):
    """What `work` returns in a fork, which is killed where it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    until = time.monotonic() + 20
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    with os.fdopen(reading) as file:
        return file.read()


def test_a_fork_waits_for_the_layer_that_runs_in_another_thread(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0)
    _logits(model)
    runtime, taken, over = model.emoe, threading.Event(), threading.Event()

    def hold():
        with runtime._lock:
            taken.set()
            over.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    assert _in_child(lambda: runtime.stats()["slots"]) == str(runtime.stats()["slots"])
    thread.join()
    _logits(model)
    runtime.close(restore=False)


def test_a_child_of_a_fork_that_could_not_wait_says_so_at_once(checkpoint, monkeypatch):
    monkeypatch.setattr(requests, "FORK_SECONDS", 0.01)
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0)
    expected = _logits(model)
    runtime, taken, over = model.emoe, threading.Event(), threading.Event()

    def hold():
        with runtime._lock, runtime.requests.request(requests.Request("code")):
            taken.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()

    def forward():
        try:
            return _logits(model)
        except EmoeError as error:
            return f"{type(error).__name__}: {error} {runtime.requests.running}"

    said = _in_child(forward)
    over.set()
    thread.join()
    assert (
        said == "ClosedError: this process was forked while another thread ran the model; load it in this process False"
    )
    assert torch.equal(_logits(model), expected)
    runtime.close(restore=False)
