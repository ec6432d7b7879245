"""Replicas in threads of this process behind the server's own app: what becomes of requests when one is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle

import openai
import pytest
import serving

from emoe.engine.sampling import Sampling
from emoe.errors import BudgetError, ClosedError, ConfigError, OverloadedError
from emoe.serve import fleet as fleets
from emoe.serve.app import make_app
from emoe.serve.engine_thread import EngineThread
from emoe.serve.fleet import Call, Desk, Fleet, answer
from emoe.serve.inbox import Job
from emoe.serve.limits import Limits
from emoe.serve.refusals import Refusal
from emoe.serve.routes import Hint
from emoe.serve.service import About, Service


class LostError(Exception):
    """A replica ended."""


class FarReply:
    """What a call to a replica gives; everything crosses as a pickle."""

    def __init__(self, replica, call):
        self._replica, self._call = replica, pickle.loads(pickle.dumps(call))
        self._items = answer(replica.thread, self._call)
        self.cancelled = False

    async def __aiter__(self):
        replica = self._replica
        while True:
            step = asyncio.ensure_future(anext(self._items, None))
            dying = asyncio.ensure_future(replica.dying.wait())
            try:
                await asyncio.wait([step, dying], return_when=asyncio.FIRST_COMPLETED)
                if replica.dying.is_set():
                    raise LostError("killed")
                item = step.result()
            finally:
                step.cancel()
                dying.cancel()
                await asyncio.gather(step, dying, return_exceptions=True)
            if item is None:
                return
            yield pickle.loads(pickle.dumps(item))

    def cancel(self):
        self.cancelled = True
        self._closing = asyncio.ensure_future(self._items.aclose())


class FarReplica:
    def __init__(self, engine):
        self.engine, self.thread, self.dying = engine, EngineThread(engine), asyncio.Event()
        self.calls, self.replies = [], []
        self.thread.start()


@contextlib.asynccontextmanager
async def fleet_of(*engines, ended=lambda record, event: None):
    """(fleet, replicas); a call goes to the first that is alive."""
    replicas = [FarReplica(engine) for engine in engines]

    def send(call):
        replica = next(each for each in replicas if not each.dying.is_set())
        replica.calls.append(call)
        replica.replies.append(FarReply(replica, call))
        return replica.replies[-1]

    async def look():
        return {f"r{n}": await each.thread.look() for n, each in enumerate(replicas) if not each.dying.is_set()}

    fleet = Fleet(send, look, ended, (LostError,))
    fleet.start()
    try:
        yield fleet, replicas
    finally:
        fleet.stop()
        for replica in replicas:
            await asyncio.to_thread(replica.thread.stop)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(fleets, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(fleets, "_MOST_WAIT_SECONDS", 0.01)


def job(id, tokens=3, text="ab"):
    return Job(id, [ord(each) - 30 for each in text], tokens, Sampling(), "t")


async def collected(inbox, count):
    """Events until so many jobs have ended."""
    events, ended = [], 0
    while ended < count:
        new = await inbox.take(30.0)
        assert new, "nothing came"
        events += new
        ended += sum(each.finish_reason is not None for each in new)
    return events


async def until(true):
    for _ in range(6000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to be")


@pytest.fixture
def engines(tiny):
    return [serving.FakeEngine(*tiny) for _ in range(3)]


def test_a_request_that_a_lost_replica_had_not_begun_runs_on_another(engines):
    async def main():
        engines[0].open.clear()  # it accepts, and begins nothing
        async with fleet_of(*engines) as (fleet, replicas):
            inbox = await fleet.submit([job("x"), job("y")])
            replicas[0].dying.set()
            events = await collected(inbox, 2)
            assert [each.finish_reason for each in events if each.finish_reason] == ["length", "length"]
            assert sum(len(each.tokens) for each in events) == 6
            assert fleet.retried == 2 and not fleet.records

    asyncio.run(main())


def test_one_that_had_begun_ends_with_an_error_that_says_so(engines):
    async def main():
        async with fleet_of(*engines) as (fleet, replicas):
            inbox = await fleet.submit([job("x", tokens=100_000)])
            while not any(each.tokens for each in await inbox.take(30.0)):
                pass
            replicas[0].dying.set()
            last = (await collected(inbox, 1))[-1]
            assert last.finish_reason == "error" and last.error.code == "replica_lost"
            assert "in the middle of the answer; send it again" in str(last.error)
            assert not replicas[1].calls and not fleet.records

    asyncio.run(main())


def test_of_several_answers_only_those_that_had_not_begun_run_again(engines):
    async def main():
        engines[0].failing = {}
        async with fleet_of(*engines) as (fleet, replicas):
            inbox = await fleet.submit([job("x", tokens=100_000)])
            while not any(each.tokens for each in await inbox.take(30.0)):
                pass
            engines[0].open.clear()
            other = await fleet.submit([job("y", tokens=2)])
            replicas[0].dying.set()
            assert (await collected(inbox, 1))[-1].finish_reason == "error"
            assert (await collected(other, 1))[-1].finish_reason == "length"
            assert [each.id for call in replicas[1].calls for each in call.jobs] == ["y"]

    asyncio.run(main())


def test_a_request_that_ends_its_replicas_is_given_up(tiny):
    async def main():
        engines = [serving.FakeEngine(*tiny) for _ in range(fleets.TRIES + 1)]
        for engine in engines:
            engine.open.clear()
        async with fleet_of(*engines) as (fleet, replicas):
            inbox = await fleet.submit([job("x")])
            for number in range(fleets.TRIES):
                await until(lambda n=number: engines[n].live)
                replicas[number].dying.set()
            last = (await collected(inbox, 1))[-1]
            assert last.error.code == "replica_lost" and "it is not tried again" in str(last.error)
            assert not replicas[-1].calls

    asyncio.run(main())


@pytest.mark.parametrize("error", [ConfigError("no"), BudgetError("too large"), OverloadedError("full", retry_after=3)])
def test_a_refusal_of_the_replica_reaches_the_caller_as_it_is(engines, error):
    async def main():
        engines[0].refusals.append(error)
        async with fleet_of(*engines) as (fleet, replicas):
            with pytest.raises(type(error), match=str(error)) as raised:
                await fleet.submit([job("x")])
            assert vars(raised.value) == vars(error)
            assert not fleet.records and not replicas[1].calls

    asyncio.run(main())


def test_what_was_accepted_waits_where_the_other_replicas_are_full(engines):
    async def main():
        engines[0].open.clear()
        engines[1].refusals = [OverloadedError("full", retry_after=100) for _ in range(2 * fleets.TRIES)]
        async with fleet_of(*engines) as (fleet, replicas):
            inbox = await fleet.submit([job("x")])
            replicas[0].dying.set()
            assert (await collected(inbox, 1))[-1].finish_reason == "length"
            assert not engines[1].refusals

    asyncio.run(main())


def test_a_replica_whose_engine_was_given_up_is_as_good_as_lost(engines):
    async def main():
        async with fleet_of(*engines) as (fleet, replicas):
            replicas[0].thread.fault = ClosedError("given up")
            sending = asyncio.ensure_future(fleet.submit([job("x")]))
            await until(lambda: replicas[0].calls)
            replicas[0].dying.set()  # replaced
            assert (await collected(await sending, 1))[-1].finish_reason == "length"

    asyncio.run(main())


def test_a_replica_that_is_taken_down_leaves_what_it_had_not_begun_to_others(engines):
    async def main():
        engines[0].open.clear()
        async with fleet_of(*engines) as (fleet, replicas):
            inbox = await fleet.submit([job("x")])
            stopping = asyncio.ensure_future(asyncio.to_thread(replicas[0].thread.stop))
            await until(lambda: replicas[0].thread._stopping)
            await until(lambda: replicas[0].calls)
            await stopping
            replicas[0].dying.set()
            assert (await collected(inbox, 1))[-1].finish_reason == "length"

    asyncio.run(main())


def test_nobody_waits_any_more_and_the_replica_stops(engines):
    told = []

    async def main():
        async with fleet_of(*engines, ended=lambda record, event: told.append(event.finish_reason)) as (
            fleet,
            replicas,
        ):
            inbox = await fleet.submit([job("x", tokens=100_000), job("y", tokens=100_000)])
            inbox.close()
            await until(lambda: set(engines[0].cancelled) == {"x", "y"})
            assert replicas[0].replies[0].cancelled and not fleet.records and not fleet._tasks

    asyncio.run(main())
    assert told == ["cancelled", "cancelled"]


def test_a_client_that_leaves_before_it_is_accepted_leaves_nothing(engines):
    async def main():
        async with fleet_of(*engines) as (fleet, _):
            sending = asyncio.ensure_future(fleet.submit([job("x", tokens=100_000)]))
            await asyncio.sleep(0)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await until(lambda: not fleet.records and not fleet._tasks)
            await until(lambda: not engines[0].live)

    asyncio.run(main())


def test_a_request_that_no_replica_takes_is_refused_and_leaves_nothing(engines):
    async def main():
        async with fleet_of(*engines) as (fleet, replicas):
            fleet._patience = 0.01
            replicas[0].thread.submit = lambda jobs: asyncio.Event().wait()
            with pytest.raises(Refusal, match=r"no replica took this request within 0\.01 seconds") as raised:
                await fleet.submit([job("x")])
            assert raised.value.status == 503
            await until(lambda: not fleet.records and not fleet._tasks)

    asyncio.run(main())


def test_a_stopped_fleet_ends_what_runs_and_takes_no_more(engines):
    async def main():
        engines[0].open.clear()
        async with fleet_of(*engines) as (fleet, _):
            inbox = await fleet.submit([job("x")])
            fleet.stop()
            last = (await collected(inbox, 1))[-1]
            assert last.finish_reason == "cancelled" and isinstance(last.error, ClosedError)
            with pytest.raises(ClosedError):
                await fleet.submit([job("y")])

    asyncio.run(main())


def test_an_error_that_no_pickle_carries_is_told_by_its_words(engines):
    class LocalError(Exception):
        pass

    async def main():
        engines[0].failing = {"ab": LocalError("a disk failed")}
        async with fleet_of(*engines) as (fleet, _):
            last = (await collected(await fleet.submit([job("x")]), 1))[-1]
            assert last.finish_reason == "error" and "a disk failed" in str(last.error)

    asyncio.run(main())


def test_counts_of_a_lost_replica_stay_in_what_is_seen(engines):
    async def main():
        async with fleet_of(*engines[:2]) as (fleet, replicas):
            for engine in engines[:2]:
                engine.stats = lambda: {"way": "fake", "steps": 5, "scheduler": {"running": 0}, "kv": {}}
                engine.model = None
            assert (await fleet.look())["engine"]["steps"] == 10
            replicas[0].dying.set()
            seen = await fleet.look()
            assert seen["engine"]["steps"] == 10 and len(seen["replicas"]) == 1 and seen["retried"] == 0

    asyncio.run(main())


def test_a_desk_knows_whose_requests_are_here():
    desk = Desk()
    one, other = Hint("f", "a", 2), Hint("g", "b")
    for hint in (one, other, one):
        desk.came(hint)
    desk.left(one)
    assert desk.requests == {"f": {"a": 2}, "g": {"b": 1}} and desk.served == {"a": 4, "b": 1}
    desk.left(one)
    desk.left(other)
    assert desk.requests == {}


def test_a_call_crosses_with_its_grammar_and_penalties(tiny):
    from emoe.serve.grammar import Grammars
    from emoe.serve.protocol import ResponseFormat
    from emoe.serve.sampling import Penalties

    model, tokenizer = tiny
    pytest.importorskip("llguidance", reason="response_format needs llguidance")
    grammars = Grammars(tokenizer, model.config.vocab_size, [2])
    processors = [grammars.processor(ResponseFormat(type="json_object"), 2), Penalties(2, 0.5, 0.0, {3: 1.0})]
    call = Call([Job("x", [5, 6], 3, Sampling(processors=processors))], Hint("f", "a"))
    crossed = pickle.loads(pickle.dumps(call))
    got = crossed.jobs[0].sampling.processors
    assert got[0].grammar == processors[0].grammar and got[0].matcher is None
    grammars.bind(got)
    assert got[0].matcher is not None and vars(got[1]) == vars(processors[1])


# Through HTTP


@contextlib.contextmanager
def served(*engines, **limits):
    """A `serving.Running` over a fleet of these, and its replicas by `running.replicas`."""
    bounds, replicas = Limits(**limits), []

    class Late(Fleet):
        def start(self):
            super().start()
            replicas.extend(FarReplica(engine) for engine in engines)

    def send(call):
        replica = next(each for each in replicas if not each.dying.is_set())
        replica.calls.append(call)
        return FarReply(replica, call)

    async def look():
        return {f"r{n}": await each.thread.look() for n, each in enumerate(replicas) if not each.dying.is_set()}

    service = Service(
        lambda ended: Late(send, look, ended, (LostError,)), engines[0].tokenizer, about=About.of(engines[0]),
        name=serving.NAME, limits=bounds,
    )  # fmt: skip
    with serving.served(make_app(service), service, bounds) as running:
        running.replicas = replicas
        running.kill = lambda number: running.server._loop.call_soon_threadsafe(replicas[number].dying.set)
        yield running
    for replica in replicas:
        replica.thread.stop()


def test_a_stream_that_had_begun_ends_with_an_error_event_and_is_not_cut_silently(engines):
    for engine in engines:
        engine.pace = 0.002
    with served(*engines) as running:
        stream = running.client.completions.create(model=serving.NAME, prompt="abc", max_tokens=200, stream=True)
        next(iter(stream))
        running.kill(0)
        with pytest.raises(openai.APIError, match="in the middle of the answer"):
            for _ in stream:
                pass


def test_an_answer_that_had_not_begun_comes_whole_from_another_replica_and_is_counted(engines):
    engines[0].open.clear()
    with served(*engines) as running:
        pending = []
        thread = serving.in_thread(lambda: pending.append(running.chat(n=2, temperature=1.0)))
        serving.until(lambda: engines[0].live)
        running.kill(0)
        thread.join(60)
        assert [each.finish_reason for each in pending[0].choices] == ["length", "length"]
        serving.until(lambda: "emoe_retried_answers_total 2.0" in running.http.get("/metrics").text)
        assert "emoe_replicas 2.0" in running.http.get("/metrics").text
        assert [each["name"] for each in running.http.get("/status").json()["replicas"]] == ["r1", "r2"]


def test_an_answer_in_one_piece_that_had_begun_is_a_503_that_says_when_to_come_again(engines):
    engines[0].pace = 0.002
    with served(*engines) as running:
        got = []
        body = {"prompt": "abc", "max_tokens": 200}
        thread = serving.in_thread(lambda: got.append(running.http.post("/v1/completions", json=body)))
        serving.until(lambda: any(each.first is not None for each in running.records()))
        running.kill(0)
        thread.join(60)
        assert got[0].status_code == 503 and got[0].headers["retry-after"] == "1"
        assert json.loads(got[0].text)["error"]["code"] == "replica_lost"
