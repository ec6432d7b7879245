"""Requests: whose a forward is, in threads and batches, and who is told of a begin and an end, in which order."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from collections import Counter

import pytest
import torch
from interrupts import interrupted

import emoe
from emoe.errors import ClosedError, ConfigError
from emoe.requests import Kind, Request, Requests
from emoe.trace.trace import load_trace


class Observer:
    def __init__(self, name, told, fails=()):
        self.name, self.told, self.fails = name, told, fails

    def begin(self, request, first):
        self._note("begin", request, first)

    def end(self, request, last):
        self._note("end", request, last)

    def _note(self, what, request, alone):
        self.told.append((self.name, what, request.task, alone))
        if what in self.fails:
            raise ValueError(what)


def _in_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_a_begin_is_told_in_the_stated_order_and_an_end_in_the_other():
    told = []
    requests = Requests([Observer("one", told), Observer("two", told)])
    with requests.request(Request("code")) as request:
        assert requests.current is request
        told.append("forward")
    assert told == [
        ("one", "begin", "code", True), ("two", "begin", "code", True), "forward",
        ("two", "end", "code", True), ("one", "end", "code", True),
    ]  # fmt: skip
    assert not requests.running


def test_the_first_begins_and_the_last_ends_what_is_for_all_that_run():
    told = []
    requests = Requests([Observer("", told)])
    with requests.request(Request("a")) as outer:
        with requests.request(Request("b")) as inner:
            assert inner.within is outer and outer.within is None
            assert requests.current is inner
        assert requests.current is outer
    assert [(what, task, alone) for _, what, task, alone in told] == [
        ("begin", "a", True), ("begin", "b", False), ("end", "b", False), ("end", "a", True)
    ]  # fmt: skip


def test_requests_that_interleave_begin_and_end_in_any_order():
    told = []
    requests = Requests([Observer("one", told), Observer("two", told)])
    a, b = Request("a"), Request("b")
    requests.begin(a)
    requests.begin(b)
    assert a.joined and b.joined and a.within is b.within is None
    with requests.rows([(b, 2), (a, 1)]):
        assert requests.batched and requests.spans(3) == [(b, slice(0, 2)), (a, slice(2, 3))]
    requests.end(a, failed=True)
    assert requests.running and a.failed and not b.failed
    requests.end(b)
    requests.end(b)
    assert not requests.running
    assert [each for each in told if each[0] == "one"] == [
        ("one", "begin", "a", True), ("one", "begin", "b", False),
        ("one", "end", "a", False), ("one", "end", "b", True),
    ]  # fmt: skip
    assert told[4:6] == [("two", "end", "a", False), ("one", "end", "a", False)]


def test_a_forward_beside_requests_that_interleave_is_nobodys_and_begins_none():
    told = []
    requests = Requests([Observer("", told)])
    nobodys = requests.current
    request = Request("a")
    requests.begin(request)
    requests.forward((torch.zeros(1, 4, dtype=torch.long),), {})
    assert requests.current is nobodys and len(told) == 1
    with requests.request(Request("block")) as block:
        assert requests.current is block and block.within is None
    requests.end(request)
    assert [what for _, what, _, _ in told] == ["begin", "begin", "end", "end"]


@pytest.mark.parametrize("fails", ["begin", "end"])
def test_an_observer_that_fails_leaves_no_interleaving_request_and_the_others_are_told(fails):
    told = []
    requests = Requests([Observer("one", told), Observer("two", told, fails), Observer("three", told)])
    request = Request("a")
    with pytest.raises(ValueError, match=fails):
        requests.begin(request)
        requests.end(request)
    assert not requests.running and request.failed == (fails == "begin")
    ended = [name for name, what, _, _ in told if what == "end"]
    assert ended == (["one"] if fails == "begin" else ["three", "two", "one"])


def test_a_closed_object_begins_no_interleaving_request_and_ends_those_that_run():
    requests = Requests([])
    request = Request()
    requests.begin(request)
    requests.close()
    with pytest.raises(ClosedError):
        requests.begin(Request())
    requests.end(request)
    assert not requests.running


def test_a_forward_belongs_to_its_threads_request_and_else_to_the_one_opened_last():
    requests = Requests([])
    nobodys = requests.current
    with requests.request(Request("mine")) as mine:
        assert _in_thread(lambda: requests.current) is mine

        def other():
            with requests.request(Request("theirs")) as theirs:
                return theirs, requests.current, theirs.within

        theirs, found, within = _in_thread(other)
        assert found is theirs and within is None
        assert requests.current is mine
    assert requests.current is nobodys
    alone = Requests([], everybodys=False)
    with alone.request(Request()):
        assert alone.routed
        assert not _in_thread(lambda: alone.routed)


def test_rows_of_a_batch_are_as_many_as_were_announced():
    requests = Requests([])
    one, two = Request("one"), Request("two")
    with requests.rows([(one, 2), (two, 3)]):
        assert requests.batched
        assert requests.spans(5) == [(one, slice(0, 2)), (two, slice(2, 5))]
        with pytest.raises(ConfigError, match="rows of 5 tokens were announced to routing, 4 arrived"):
            requests.spans(4)
    assert not requests.batched and len(requests.spans(4)) == 1


@pytest.mark.parametrize("fails", ["begin", "end"])
def test_an_observer_that_fails_leaves_no_request_open_and_the_others_are_told(fails):
    told = []
    requests = Requests([Observer("one", told), Observer("two", told, [fails])])
    with pytest.raises(ValueError, match=fails), requests.request(Request()):
        pass
    assert not requests.running and requests.current.task is None
    assert [each[:2] for each in told][-1] == ("one", "end")
    requests._observers.pop()
    with requests.request(Request("next")) as request:
        assert requests.current is request


def test_a_block_that_raises_marks_its_request():
    requests = Requests([])
    with pytest.raises(KeyError), requests.request(Request()) as request:
        raise KeyError
    assert request.failed


def test_probes_are_no_users_requests_and_their_kind_is_their_threads_alone():
    told = []
    requests = Requests([Observer("", told)])
    with requests.of_kind(Kind.PROBE):
        assert _in_thread(lambda: requests.kind) is Kind.ASKED
        with requests.request(Request("code", "probe")) as probe:
            assert probe.kind is Kind.PROBE and not requests.running and requests.routed
        with requests.of_kind(Kind.EXACT):
            assert not requests.routed
            assert _in_thread(lambda: requests.routed)
        assert requests.kind is Kind.PROBE
        requests.forward((torch.tensor([[5]]),), {})
    assert told == [("", "begin", "code", False), ("", "end", "code", False)]
    assert requests.kind is Kind.ASKED


def test_a_forward_outside_blocks_begins_a_request_that_ends_where_the_next_begins():
    told = []
    requests = Requests([Observer("", told)])
    requests.forward((torch.tensor([[5, 6]]),), {})
    assert requests.running
    requests.forward((torch.tensor([[5, 6, 7]]),), {})  # goes on
    assert [each[1] for each in told] == ["begin"]
    requests.forward((torch.tensor([[9, 9]]),), {})
    with requests.request(Request("code")):
        requests.forward((torch.tensor([[1]]),), {})
    assert [each[1] for each in told] == ["begin", "end", "begin", "end", "begin", "end"]


def test_a_copy_has_requests_of_its_own():
    requests = Requests([])
    with requests.request(Request("code")):
        copied = copy.deepcopy(requests)
        with copied.request(Request("chat")):
            assert (requests.current.task, copied.current.task) == ("code", "chat")
            assert copied.current.within.task == "code" and copied.current.within is not requests.current


def test_a_closed_object_begins_no_request_and_ends_those_that_run():
    told = []
    requests = Requests([Observer("", told)])
    with requests.request(Request()):
        requests.close()
        with pytest.raises(ClosedError), requests.request(Request()):
            pass
        requests.forward((torch.tensor([[1]]),), {})
    assert [each[1] for each in told] == ["begin", "end"]


def test_a_trace_names_tokens_by_the_task_of_their_request(checkpoint, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    with torch.no_grad(), model.emoe.record(tmp_path / "trace.npz"):
        for task in ("code", "chat"):
            with model.emoe.request(task):
                model(torch.tensor([[5, 6, 7]]))
    trace = load_trace(tmp_path / "trace.npz")
    assert [trace.task_names[task] for task in trace.task] == ["code"] * 3 + ["chat"] * 3
    model.emoe.close(restore=False)


def test_requests_in_threads_are_probed_each_with_its_own_text():
    import families

    model = emoe.wrap(families.build("olmoe").eval(), memory_budget=0.5)
    online = model.emoe.probe(share=1.0)
    begun = threading.Barrier(2)

    def serve(task, first):
        ids = torch.arange(first, first + 8).view(1, -1)
        with model.emoe.request(task):
            begun.wait()
            model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            begun.wait()

    threads = [threading.Thread(target=serve, args=each) for each in (("code", 5), ("chat", 40))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = model.emoe.stats()["sensitivity"]
    assert (stats["probes"], stats["unusable"]) == (2, 0)
    assert sorted(online.tasks) == ["chat", "code"]
    model.emoe.close(restore=False)


def _steps(requests):
    with requests.request(Request("generator")):
        yield requests.current.task
        yield requests.current.task


def _blocks(requests):
    with requests.request(Request("outer")):
        requests.forward((torch.tensor([[5, 6]]),), {})
        with requests.request(Request("inner")):
            requests.spans(3)
        with requests.rows([(Request("row"), 1), (Request("other"), 2)]):
            requests.spans(3)
    with requests.of_kind(Kind.EXACT), requests.of_kind(Kind.PROBE), requests.request(Request("probe")):
        requests.forward((torch.tensor([[5, 6]]),), {})
    steps = _steps(requests)
    assert next(steps) == next(steps) == "generator"
    steps.close()


def _stacked_blocks(requests):
    with contextlib.ExitStack() as stack:
        stack.enter_context(requests.request(Request("outer")))
        stack.enter_context(requests.rows([(Request("row"), 1), (Request("other"), 2)]))
        stack.enter_context(requests.of_kind(Kind.PROBE))
        assert requests.kind is Kind.PROBE and requests.batched
        stack.enter_context(requests.request(Request("probe")))


def _assert_over(requests, told):
    """However the blocks ended: no request is open, and the next is the first."""
    assert requests.kind is Kind.ASKED and not requests._asked
    assert requests.current is _in_thread(lambda: requests.current) is requests._nobodys and not requests.batched
    with requests.request(Request("next")) as request:
        assert requests.current is request and request.within is None
    assert told[-4:] == [
        ("one", "begin", "next", True), ("two", "begin", "next", True),
        ("two", "end", "next", True), ("one", "end", "next", True),
    ]  # fmt: skip
    assert requests._open == requests._kinds == ()
    times = Counter(each[:3] for each in told)
    assert max(times.values()) == 1
    begun, ended = ({(name, task) for name, what, task in times if what == each} for each in ("begin", "end"))
    # One observer at most was being told at that moment.
    assert len(begun - ended) <= 1 and len(ended - begun) <= 1


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize(("blocks", "keeps"), [(_blocks, True), (_blocks, False), (_stacked_blocks, False)])
def test_an_interrupt_at_any_moment_leaves_no_request_open(blocks, keeps, opcodes):
    at = 0
    while True:
        told, kept = [], []
        requests = Requests([Observer("one", told), Observer("two", told)])

        def run(requests=requests, kept=kept):
            try:
                blocks(requests)
            except KeyboardInterrupt as interrupt:
                if keeps:
                    kept.append(interrupt)  # as sys.last_traceback does, with all frames
                raise

        where = interrupted(run, at, ["requests.py"], opcodes=opcodes)
        if blocks is _stacked_blocks:
            gc.collect(1)  # its frames are in a circle with the interrupt
        _assert_over(requests, told)
        assert bool(kept) == bool(where and keeps)
        if not where:
            break
        at += 1 if keeps else 3
    assert at > (1000 if opcodes else 100)


def test_a_request_that_was_cut_off_ends_as_failed_before_the_next_begins():
    told = []
    requests = Requests([Observer("one", told)])
    request = Request("cut off")
    block = requests.request(request)
    assert block.__enter__() is request and requests.current is request
    del block
    assert requests.current is not request and not requests.running
    with requests.request(Request("next")):
        assert request.failed
    assert [each[1:] for each in told] == [
        ("begin", "cut off", True), ("end", "cut off", True), ("begin", "next", True), ("end", "next", True)
    ]  # fmt: skip


def test_what_a_copy_has_of_a_block_is_over_with_the_block():
    requests = Requests([])
    with requests.request(Request("code")), requests.of_kind(Kind.PROBE):
        other = copy.deepcopy(requests)
        assert other.kind is Kind.PROBE and other.current.task == "code"
    assert other.kind is Kind.ASKED and not other.running and other.current.task is None
    with other.request(Request("chat")) as request:
        assert request.within is None and other.running
    assert other._open == ()
