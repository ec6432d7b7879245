"""A process that forks after a model was loaded: the child computes, closes or just ends; nothing hangs in either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import families
import psutil
import pytest
import torch

import emoe
from emoe import native
from emoe.errors import BackendUnavailable

C = native.load()


def _in_child(body, seconds=300):
    """What `body` returns in a forked child, as text; the child ends by itself within the time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(body())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    with os.fdopen(read) as stream:
        return stream.read()


def _model(tmp_path, **options):
    path = families.save("olmoe", tmp_path / "model")
    return emoe.from_pretrained(path, **{"memory_budget": 1e-6, "dtype": torch.float32, **options})


def _logits(model, seed=0, tokens=12):
    ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


class Records:
    """A queue over a file whose record r is byte r + 1, `size` times."""

    size = 8192

    def __init__(self, tmp_path, reader, records=6, **options):
        file = tmp_path / "records"
        file.write_bytes(b"".join(bytes([r + 1]) * self.size for r in range(records)))
        self.table = C.RecordTable()
        number = self.table.add_file(str(file))
        for r in range(records):
            piece = (number, r * self.size, self.size, f"t{r}", "uint8", 0, "uint8", 1, self.size, self.size, 1)
            self.table.add_record([piece])
        self.slab = C.Slab(records, self.size)
        self.queue = C.TransferQueue(self.slab, self.table, reader, **options)

    def holds(self, slot, record):
        import ctypes

        return ctypes.string_at(self.slab.address + slot * self.size, self.size) == bytes([record + 1]) * self.size


@pytest.fixture(params=["pread", "uring"])
def reader(request):
    try:
        return C.make_reader(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_a_queue_that_was_used_goes_on_in_the_child_and_in_the_parent(tmp_path, reader):
    records = Records(tmp_path, reader)
    records.queue.wait(records.queue.submit(0, 0))

    def child():
        for record in range(1, 6):
            records.queue.wait(records.queue.submit(record, record))
        grandchild = _in_child(lambda: records.queue.wait(records.queue.submit(5, 0)) or records.holds(0, 5))
        right = all(records.holds(record, record) for record in range(6))
        records.queue.close()
        return right, grandchild

    assert _in_child(child) == "(True, 'True')"
    records.queue.wait(records.queue.submit(3, 2))
    assert records.holds(2, 3)


def test_jobs_that_were_queued_or_running_at_the_fork_are_read_again_under_their_tickets(tmp_path, reader):
    records = Records(tmp_path, C.FaultyReader(reader, delay_ms=50), workers=1)
    tickets = [records.queue.submit(record, record, record % 2 == 1) for record in range(5)]
    last = records.queue.submit(5, 5, True)
    cancelled = records.queue.cancel(last)  # not where a worker that woke up late has taken all of them at once
    wanted = range(5 if cancelled else 6)

    def wait():
        for ticket in tickets if cancelled else [*tickets, last]:
            records.queue.wait(ticket)
        return all(records.holds(record, record) for record in wanted)

    def child():
        assert [records.queue.ticket_of(slot) for slot in range(5)] == tickets
        assert not cancelled or records.queue.done(last)
        records.queue.promote(tickets[3])
        right, stats = wait(), records.queue.stats()
        # In which lane number 3 ended depends on whether the child's worker was there before it was promoted.
        return right, stats["demand_jobs"] + stats["prefetch_jobs"] - len(wanted), stats["queued"]

    assert _in_child(child) == "(True, 0, 0)"
    assert wait()


def test_a_ticket_that_another_thread_waits_for_at_the_fork_can_be_waited_for_in_the_child(tmp_path, reader):
    records = Records(tmp_path, C.FaultyReader(reader, delay_ms=300), workers=1)
    ticket = records.queue.submit(2, 1)
    waiting = threading.Thread(target=records.queue.wait, args=(ticket,))
    waiting.start()
    time.sleep(0.05)
    assert _in_child(lambda: (records.queue.wait(ticket), records.holds(1, 2))) == "(None, True)"
    waiting.join()


@pytest.mark.parametrize("used", [False, True])
def test_a_child_may_close_a_queue_or_leave_it(tmp_path, reader, used):
    records = Records(tmp_path, reader)
    if used:
        records.queue.submit(0, 0)
    assert _in_child(records.queue.close) == "None"
    assert _in_child(lambda: records.__dict__.pop("queue") and None) == "None"  # its destructor runs
    records.queue.wait(records.queue.submit(1, 1))
    assert records.holds(1, 1)


def test_forks_at_any_moment_of_a_busy_queue_hang_nobody(tmp_path, reader):
    records = Records(tmp_path, reader, workers=2)
    stop = threading.Event()
    failures = []

    def work():
        try:
            while not stop.is_set():
                for slot in range(3):
                    records.queue.wait(records.queue.submit(slot + 1, slot))
        except BaseException as error:
            failures.append(error)

    busy = threading.Thread(target=work)
    busy.start()
    try:
        for _ in range(20):
            assert _in_child(lambda: (records.queue.wait(records.queue.submit(5, 5)), records.holds(5, 5))) == (
                "(None, True)"
            )
    finally:
        stop.set()
        busy.join()
    assert not failures


@pytest.mark.parametrize("used", [False, True])
def test_a_model_computes_the_same_in_a_child(tmp_path, used):
    model = _model(tmp_path)
    if used:
        _logits(model, 1)
    child = _in_child(lambda: _logits(model).double().sum().item())
    assert child == str(_logits(model).double().sum().item())
    assert _in_child(lambda: model.emoe.close() or "closed") == "closed"


def test_kernels_with_several_threads_compute_the_same_in_a_child_with_threads_of_its_own(tmp_path):
    before = C.threads()
    model = _model(tmp_path)

    def child():
        threads = psutil.Process().num_threads()
        found = _logits(model, 3, tokens=64).double().sum().item()
        return found, psutil.Process().num_threads() - threads >= 2

    try:
        C.set_threads(3)
        expected = _logits(model, 3, tokens=64).double().sum().item()  # there are workers now
        assert _in_child(child) == str((expected, True))
    finally:
        C.set_threads(before)


def test_a_child_that_ends_like_any_program_ends(tmp_path):
    model = _model(tmp_path)
    _logits(model)
    child = os.fork()
    if child == 0:
        import contextlib
        import sys

        with contextlib.suppress(SystemExit):
            sys.exit(0)
        del model
        import gc

        gc.collect()
        os._exit(0)
    deadline = time.monotonic() + 300
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert done[1] == 0


def test_a_device_is_refused_at_once_in_a_child_and_left_alone_at_its_end(tmp_path):
    try:
        model = _model(tmp_path, device="emulated")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    expected = _logits(model)
    assert "CUDA does not survive" in _in_child(lambda: _logits(model, 5))
    assert _in_child(lambda: model.emoe.close(restore=False) or "closed") == "closed"
    assert torch.equal(_logits(model), expected)


THREADS = """
import logging, os, sys, torch
logging.basicConfig()
torch.set_num_threads(2)
import emoe
model = emoe.from_pretrained(sys.argv[1], memory_budget=0.5)
ids = torch.arange(3, 15).unsqueeze(0)
before = model.generate(ids, max_new_tokens=3, do_sample=False).tolist()
x = torch.randn(512, 512)
x @ x  # in several threads, whatever the model needed
child = os.fork()
if child == 0:
    same = model.generate(ids, max_new_tokens=3, do_sample=False).tolist() == before
    x @ x
    os._exit(0 if same and torch.get_num_threads() == 1 else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.get_num_threads() == 2
assert model.generate(ids, max_new_tokens=3, do_sample=False).tolist() == before
"""


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_a_child_of_a_process_in_which_torch_had_several_threads_computes_with_one_and_says_so(name, tmp_path):
    path = families.save(name, tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", THREADS, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.set_num_threads(1)") == 1
