"""Ray Serve's request router of ours, on stand-ins for replicas: no cluster runs."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve", reason="needs emoe[ray]")

from ray.serve.request_router import RequestRouter

from emoe.errors import ConfigError
from emoe.serve.fleet import Call
from emoe.serve.on_ray import Spec, run
from emoe.serve.ray_router import PlacementRouter
from emoe.serve.routes import Hint, Published
from emoe.serve.setup import Setup


def replica(name, **says):
    stats = Published(4, expected={"a": 0b0011, "b": 0b1100}, **says).to_dict()
    return SimpleNamespace(replica_id=name, routing_stats=stats)


def pending(id, task=None):
    args = [] if task is None else [Call([], Hint("front", task))]
    return SimpleNamespace(args=args, metadata=SimpleNamespace(internal_request_id=id), future=Future())


@pytest.fixture
def router(monkeypatch):
    monkeypatch.setattr(RequestRouter, "__init__", lambda self: None)
    made = PlacementRouter()
    made.initialize_state(router="affinity")
    return made


def chosen(router, replicas, request):
    ranks = asyncio.run(router.choose_replicas(replicas, request))
    assert sorted(each.replica_id for rank in ranks for each in rank) == sorted(each.replica_id for each in replicas)
    assert all(len(rank) == 1 for rank in ranks)  # or Ray would choose within it, by its own queue lengths
    return ranks[0][0].replica_id


def test_it_has_every_method_that_ray_calls(router):
    assert not PlacementRouter.__abstractmethods__
    for name in ("initialize_state", "choose_replicas", "on_request_routed", "on_request_completed"):
        assert getattr(PlacementRouter, name) is not getattr(RequestRouter, name)
        assert callable(getattr(RequestRouter, name))
    assert callable(RequestRouter.on_replica_actor_died)


def test_a_call_goes_to_the_replica_whose_memory_has_its_experts(router):
    replicas = [replica("r0", resident=0b1100), replica("r1", resident=0b0011)]
    assert chosen(router, replicas, pending("1", "a")) == "r1"
    assert chosen(router, replicas, pending("2", "b")) == "r0"


def test_what_was_routed_counts_until_ray_says_that_it_is_over(router):
    replicas = [replica("r0"), replica("r1")]
    assert chosen(router, replicas, pending("1", "a")) == "r0"
    router.on_request_routed(pending("1", "a"), "r0", None)
    assert chosen(router, replicas, pending("2", "b")) == "r1"
    router.on_request_completed("r0", "1")
    router.on_request_completed("r1", "2")
    assert chosen(router, replicas, pending("3", "b")) == "r0"


def test_a_request_that_is_given_up_on_its_way_is_nobodys_load(router):
    replicas = [replica("r0"), replica("r1")]
    given_up = pending("1", "a")
    assert chosen(router, replicas, given_up) == "r0"
    given_up.future.cancel()
    assert chosen(router, replicas, pending("2", "b")) == "r0"
    router.on_request_completed("r1", "2")  # r0 took no more, and the client left before r1 had answered
    assert chosen(router, replicas, pending("3", "a")) == "r0"


def test_other_calls_and_replicas_that_published_nothing_are_no_matter(router):
    replicas = [SimpleNamespace(replica_id="r0", routing_stats={}), replica("r1")]
    assert chosen(router, replicas, pending("1")) == "r0"
    assert chosen(router, replicas, pending("2")) == "r0"  # a call that is no request is no load
    assert asyncio.run(router.choose_replicas(replicas, None)) == [replicas]
    assert asyncio.run(router.choose_replicas([], pending("4", "a"))) == []


def test_a_router_without_its_argument_or_with_a_wrong_one_is_refused(router):
    with pytest.raises(ConfigError, match="'sideways' is not one of"):
        router.initialize_state(router="sideways")
    with pytest.raises(KeyError):
        router.initialize_state()


def test_a_cluster_that_nobody_answers_for_is_refused_at_once(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        spec = Spec(setup=Setup(model="none", options={}, queue=1), name="none")
        with pytest.raises(ConfigError, match=r"RAY_ADDRESS='127\.0\.0\.1:\d+': no cluster is reached there"):
            run(spec, "127.0.0.1", 0, lambda way: None)
