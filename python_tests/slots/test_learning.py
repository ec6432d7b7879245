"""An eviction policy that learns: in a running model it sees what replay sees, and loads what replay counts."""

from __future__ import annotations

import families
import pytest
import torch

import emoe
from emoe.replay import replay
from emoe.trace.trace import load_trace


def _record(model, path, tokens):
    with model.emoe.record(path), torch.no_grad():
        cache = None
        for token in tokens:
            cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
    return load_trace(path)


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "classlru", "next-use"])
def test_a_running_model_loads_what_replay_of_its_trace_loads(policy, tmp_path):
    model = families.build("qwen3_moe")
    emoe.wrap(model, memory_budget=0.5, policy=policy)
    text = torch.randint(3, 100, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    trace = _record(model, tmp_path / "trace.npz", text)
    stats = model.emoe.stats()
    (counted,) = replay(trace, policy, [model.emoe.plan.resident_share])
    assert stats["misses"] == counted.loads
    assert stats["hits"] == counted.hits
    assert stats["evictions"] == counted.evictions
    model.emoe.close()


def test_a_policy_that_is_a_function_is_told_of_picks_where_it_wants_them():
    told = []

    class Listening(emoe.slots.policy.LRU):
        def saw(self, picks):
            told.append(picks.shape)

    model = families.build("qwen3_moe")
    emoe.wrap(model, memory_budget=0.5, policy=lambda layer: Listening())
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    top_k = model.config.num_experts_per_tok
    assert told == [(3, top_k)] * len(model.emoe.layers)
    model.emoe.close()


def test_trying_the_model_out_teaches_nothing(tmp_path):
    model = families.build("qwen3_moe")
    emoe.wrap(model, memory_budget=0.5, policy="next-use")
    learned = [each.learned for each in model.emoe.cache._policies]
    with model.emoe.aside(), torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    before = [each.bytes for each in learned]
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert all(count < each.bytes for count, each in zip(before, learned, strict=True))
    model.emoe.close()
