"""Replay agrees with the cache it stands for, with figures published for public traces, and with small sums."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from fake_queue import FakeQueue
from made_traces import make_trace, random_trace, task_trace
from public_traces import DOMAINS, domains, need

from emoe.cli import main
from emoe.errors import ConfigError, TraceError
from emoe.replay import PLAIN, reference, replay, rows, sequence, slots_of
from emoe.slots.cache import CacheManager
from emoe.slots.loader import Loader
from emoe.trace.trace import DECODE, PREFILL, load_trace, save_trace


def _equal(ours, theirs):
    assert ours.loads.tolist() == theirs.loads.tolist()
    assert ours.hits.tolist() == theirs.hits.tolist()
    assert ours.evictions == theirs.evictions


@pytest.mark.parametrize("policy", PLAIN)
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_rows_of_layers_count_what_the_cache_counts(policy, holes):
    trace = random_trace(1, holes=holes)
    slots = [3, 5, 8, 12]
    for count, ours in zip(slots, rows.run(trace, policy, slots), strict=True):
        _equal(ours, reference.run(trace, policy, count, per_layer=True))


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_one_set_of_slots_counts_what_the_cache_counts(policy, holes):
    trace = random_trace(2, holes=holes)
    for count in (3, 5, 14, 30, 36):
        _equal(sequence.run(trace, policy, count), reference.run(trace, policy, count, per_layer=False))


@pytest.mark.parametrize("per_layer", [True, False])
def test_fewer_slots_than_picks_run_in_rounds(per_layer):
    trace = random_trace(3, top_k=4, num_experts=8, layers=2)
    (result,) = replay(trace, "lru", [0.125], per_layer=per_layer)
    assert result.slots == (1 if per_layer else 2)
    assert result.picks == 2 * 300 * 4
    assert result.hits < result.picks / 2


def _two_prompts():
    """Two prompts of two tokens and two tokens of answer each, one layer of six experts."""
    experts = [[[0, 1], [1, 2], [0, 1], [3, 0], [4, 5], [0, 1], [4, 0], [4, 1]]]
    return make_trace(
        experts, 6,
        prompt=np.repeat([0, 1], 4).astype(np.int32),
        phase=np.tile([PREFILL, PREFILL, DECODE, DECODE], 2).astype(np.uint8),
    )  # fmt: skip


def test_a_prefill_as_one_step_picks_each_expert_once():
    (batch,) = replay(_two_prompts(), "lru", [0.5], prefill="batch")
    # {0, 1, 2}; 0 1 hit; 3 is loaded for 2, 0 hits; {0, 1, 4, 5} has 0 and 1; then 4 and 0, 4 and 1 by what is left.
    assert batch.picks == 3 + 2 + 2 + 4 + 2 + 2
    assert batch.loads == 3 + 0 + 1 + 2 + 1 + 1
    (tokens,) = replay(_two_prompts(), "lru", [0.5])
    assert tokens.picks == 16


@pytest.mark.parametrize("policy", PLAIN)
def test_hits_of_decode_are_counted_apart_in_any_way_of_counting(policy):
    trace = random_trace(4)
    trace = replace(trace, phase=(np.arange(300) % 10 >= 4).astype(np.uint8))
    (ours,) = replay(trace, policy, [0.5])
    theirs = reference.run(trace, policy, ours.slots, per_layer=True)
    assert ours.decode_hit_rate == 1 - theirs.decode_loads / theirs.decode_picks
    assert replay(random_trace(4), policy, [0.5])[0].decode_hit_rate is None


@pytest.mark.parametrize(("arguments", "words"), [
    ({"prefill": "all"}, "prefill='all' is not one of: tokens, batch"),
    ({"prefill": "batch", "per_layer": False}, "in each layer and one of: lru, lfu, lfru, classlru, next-use, belady"),
    ({"prefill": "batch", "policy": "recent"}, "in each layer and one of: lru, lfu, lfru, classlru, next-use, belady"),
    ({"policy": "next-use", "per_layer": False}, "'next-use' runs with slots divided between layers"),
])  # fmt: skip
def test_a_replay_that_cannot_be_says_why(arguments, words):
    with pytest.raises(ConfigError, match=words):
        replay(_two_prompts(), **{"policy": "lru", "resident": [0.5], **arguments})


@pytest.mark.parametrize("slots", [3, 5, 8])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "classlru", "next-use"])
def test_a_prefill_in_rounds_loads_what_a_loader_loads_whose_reads_are_there_at_once(policy, slots):
    trace = random_trace(7, layers=2, tokens=240, num_experts=16)
    prompt = np.arange(240, dtype=np.int32) // 20
    phase = np.where(np.arange(240) % 20 < 12, PREFILL, DECODE).astype(np.uint8)
    trace = replace(trace, prompt=prompt, phase=phase)
    (counted,) = replay(trace, policy, [slots / 16], prefill="batch")
    loader = Loader(
        CacheManager([slots] * 2, policy=policy),
        FakeQueue(eager=True),
        [[16 * layer + expert for expert in range(16)] for layer in range(2)],
    )
    steps = [slice(first, first + 12) for first in range(0, 240, 20)]
    steps += [slice(t, t + 1) for t in range(240) if phase[t] == DECODE]
    for step in sorted(steps, key=lambda each: each.start):
        for layer in range(2):
            loader.cache.saw(layer, trace.experts[layer, step])
            experts = np.unique(trace.experts[layer, step]).tolist()
            assert sorted(each for group in loader.rounds(layer, experts) for each, _ in group) == experts
    found = loader.snapshot()
    assert [found[name] for name in ("hits", "misses", "evictions")] == [counted.hits, counted.loads, counted.evictions]


def test_a_prefill_as_one_step_needs_a_trace_that_has_prefill():
    with pytest.raises(TraceError, match="says which tokens are prefill"):
        replay(random_trace(4), "lru", [0.5], prefill="batch")


def test_next_use_keeps_what_follows_where_lru_forgets_it():
    # A cycle of six experts, one slot too few for LRU, which then never hits.
    trace = make_trace(np.tile(np.arange(6), 60)[None, :, None], 6)
    (lru,), (ours,) = replay(trace, "lru", [5 / 6]), replay(trace, "next-use", [5 / 6])
    assert lru.hits == 0
    assert ours.hits > 150


def test_a_global_lru_smaller_than_one_token_cycle_never_hits():
    # Every token uses the same two experts in each of 10 layers: a cycle of 20.
    trace = make_trace(np.tile([[[0, 1]]], (10, 50, 1)), 4)
    for slots in (2, 10, 18):
        assert replay(trace, "lru", [slots / 40], per_layer=False)[0].hits == 0
    # One slot fewer than the cycle: one of a layer's two experts is still there, and held before the other is loaded.
    assert replay(trace, "lru", [19 / 40], per_layer=False)[0].hits == 49 * 10
    assert replay(trace, "lru", [20 / 40], per_layer=False)[0].hits == 49 * 20
    assert replay(trace, "lru", [0.5], per_layer=True)[0].hits == 49 * 20


def test_a_fully_resident_trace_loads_each_expert_once():
    trace = random_trace(4)
    for policy in PLAIN:
        (result,) = replay(trace, policy, [1.0])
        assert result.loads == sum(len(np.unique(layer)) for layer in trace.experts)
        assert result.evictions == 0


def test_no_policy_beats_belady_on_any_budget():
    trace = random_trace(5)
    best = replay(trace, "belady", [0.25, 0.5, 0.75])
    for policy in ("lru", "lfu"):
        for ours, optimum in zip(replay(trace, policy, [0.25, 0.5, 0.75]), best, strict=True):
            assert ours.hits <= optimum.hits


def test_bytes_moved_are_the_loads_of_each_layer_times_its_experts():
    trace = random_trace(6, layers=2)
    trace = make_trace(trace.experts, 12, expert_bytes=np.array([10, 1000]))
    (result,) = replay(trace, "lru", [0.5])
    picks = [(1 - rate) * 900 for rate in result.layers]
    assert result.bytes_moved == pytest.approx(10 * picks[0] + 1000 * picks[1], rel=1e-4)
    assert replay(random_trace(6), "lru", [0.5])[0].bytes_moved is None


def test_shares_are_rounded_to_slots_and_refused_out_of_range():
    assert [slots_of(share, 128) for share in (0.2, 0.3, 0.5, 1)] == [26, 38, 64, 128]
    for share in (0, -0.1, 1.1):
        with pytest.raises(ConfigError, match="over 0 and up to 1"):
            slots_of(share, 128)
    with pytest.raises(ConfigError, match="gives no slot"):
        slots_of(0.001, 128)


def test_an_unknown_policy_and_an_empty_trace_are_refused():
    with pytest.raises(ConfigError, match=r"'fifo' is not one of: lru"):
        replay(random_trace(7), "fifo", [0.5])
    with pytest.raises(TraceError, match="no picks"):
        replay(make_trace(np.zeros((2, 0, 2)), 4), "lru", [0.5])


@pytest.fixture
def trace_file(tmp_path):
    return str(save_trace(random_trace(8), tmp_path / "trace.npz"))


def test_the_command_prints_one_json_object(trace_file, capsys):
    assert main(["replay", "--trace", trace_file, "--policy", "lru,belady", "--resident", "0.25,50%", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(r["policy"], r["resident"], r["slots"]) for r in report["results"]] == [
        ("lru", 0.25, 3), ("lru", 0.5, 6), ("belady", 0.25, 3), ("belady", 0.5, 6),
    ]  # fmt: skip
    first = report["results"][0]
    assert first["hits"] + first["misses"] == first["picks"] == 3 * 300 * 3
    assert (report["tokens"], report["layers"], report["num_experts"]) == (300, 3, 12)


def test_the_command_takes_budgets_in_bytes_and_a_held_out_task(tmp_path, capsys):
    trace = replace(task_trace(1), expert_bytes=np.array([100, 300]))
    file = str(tmp_path / "tasks.npz")
    save_trace(trace, file)
    assert main(["replay", "--trace", file, "--policy", "lru", "--budget", "3200B", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["resident"], result["slots"]) == (0.5, 8)  # of 16 * (100 + 300)
    arguments = ["--policy", "lru,trained-next-use", "--held-out-task", "task 1", "--resident", "0.5", "--json"]
    assert main(["replay", "--trace", file, *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens"] == int((trace.task == 1).sum())
    assert main(["replay", "--trace", file, "--held-out-task", "poems"]) == 2
    assert "held_out='poems' is not one of the traces' tasks: task 0, task 1" in capsys.readouterr().err
    assert main(["replay", "--trace", file, "--budget", "1GiB"]) == 2
    assert "over all experts" in capsys.readouterr().err
    assert main(["replay", "--trace", file, "--budget", "half"]) == 2
    assert "half" in capsys.readouterr().err
    assert main(["replay", "--trace", file, "--budget", "399B"]) == 2
    assert "under one slot in each layer, 400 bytes" in capsys.readouterr().err
    assert main(["replay", "--trace", file, "--budget", "3200B", "--resident", "0.5"]) == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(("scope", "slots"), [("--per-layer", 7), ("--global", 10)])
def test_slots_of_a_budget_never_take_more_than_it(scope, slots, tmp_path, capsys):
    file = str(tmp_path / "tasks.npz")
    save_trace(replace(task_trace(1), expert_bytes=np.array([100, 300])), file)
    assert main(["replay", "--trace", file, "--policy", "lru", "--budget", "3199B", scope, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["slots"] == slots  # of 100 and 300 bytes; of 300 bytes


def test_the_command_prints_a_table(trace_file, capsys):
    assert main(["replay", "--trace", trace_file, trace_file, "--global"]) == 0
    out = capsys.readouterr().out
    assert "600 tokens of 6 prompts, 3 layers" in out
    assert "belady" in out


@pytest.mark.parametrize(("arguments", "words"), [
    (["--policy", "fifo"], "'fifo' is not one of: lru, lfu, lfru, classlru, next-use, belady, task-table"),
    (["--resident", "2"], "'2' is not a share"),
    (["--trace", "absent.npz"], "no trace 'absent.npz'"),
])  # fmt: skip
def test_the_command_refuses_with_a_reason(arguments, words, trace_file, capsys):
    assert main(["replay", "--trace", trace_file, *arguments]) == 2
    assert words in capsys.readouterr().err


# Per-layer hit rates in percent over domains of Qwen3-30B-A3B at 20, 30, 40, 50 % resident, as published.
PUBLISHED = {
    "lru": ((70, 80), (80, 88), (87, 93), (93, 96)),
    "lfu": ((70, 80), (80, 88), (87, 93), (93, 96)),  # "about LRU"
    "belady": ((84, 89), (90, 94), (94, 96), (97, 98)),
}
# Ours may differ by this: a token's experts are held together, which the published replay did not do (20 % most).
TOLERANCE = 2.1


@pytest.mark.slow
@pytest.mark.parametrize("policy", sorted(PUBLISHED))
def test_hit_rates_agree_with_published_ranges(policy):
    for name in DOMAINS:
        results = replay(load_trace(need(f"{name}.npz")), policy, [0.2, 0.3, 0.4, 0.5])
        for result, (low, high) in zip(results, PUBLISHED[policy], strict=True):
            rate = 100 * result.hit_rate
            assert low - TOLERANCE <= rate <= high + TOLERANCE, f"{name} {policy} {result.resident}: {rate:.1f} %"


@pytest.mark.slow
def test_learning_online_beats_lru_on_every_public_domain():
    for name in DOMAINS:
        trace = load_trace(need(f"{name}.npz"))
        trace = trace.take(np.arange(2000))
        for lru, ours in zip(replay(trace, "lru", [0.2, 0.3]), replay(trace, "next-use", [0.2, 0.3]), strict=True):
            assert ours.hit_rate > lru.hit_rate + 0.015


def test_layers_apart_keep_the_optimum_above_lru_over_joined_domains():
    trace = domains()
    (lru,), (best,) = (replay(trace, policy, [0.3]) for policy in ("lru", "belady"))
    assert best.hit_rate > lru.hit_rate + 0.05
