"""Routing modes on every family of the parity list, against a slow router; the contract; the accounts."""

from __future__ import annotations

import contextlib
import functools
import math

import families
import pytest
import torch
from routing_reference import UNNORMALISED, SlowRouter
from torch import nn

from emoe.errors import UnsupportedModelError
from emoe.model.structure import find_experts
from emoe.routing import FixedResidency, attach, find_routers, random_residency

NAMES = sorted(families.FAMILIES)
TOKENS = 12
E = families.EXPERTS


@functools.cache
def _model(name):
    model = families.build(name)
    if name == "gemma4_text":  # ones by default, which would hide that it is forgotten
        for layer in model.model.layers:
            layer.router.per_expert_scale.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    return model


def _ids(model, tokens=TOKENS, batch=1):
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (batch, tokens), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def _run(model, steps=2):
    """Logits of a prefill and of decode steps with fixed tokens."""
    ids = _ids(model, TOKENS + steps)
    out = model(ids[:, :TOKENS], use_cache=True)
    logits = [out.logits[:, -1]]
    for step in range(steps):
        out = model(ids[:, TOKENS + step : TOKENS + step + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.cat(logits)


def _residency(model, count=4, seed=1):
    return random_residency([E] * len(find_experts(model)), count, seed)


class _Watch:
    """What routers said and what experts got, by layer: (router output, index, weights) of every call."""

    def __init__(self, model):
        self.said, self.got = {}, {}
        self.model = model

    @contextlib.contextmanager
    def before(self):
        """Registered before a mode is attached, so that it sees what routers said themselves."""
        handles = [
            site.module.register_forward_hook(
                lambda m, args, out, layer=site.layer: self.said.setdefault(layer, []).append(
                    [value.clone() for value in out]
                )
            )
            for site in find_routers(self.model)
        ]
        handles += [
            module.register_forward_pre_hook(
                lambda m, args, layer=layer: self.got.setdefault(layer, []).append((args[1].clone(), args[2].clone()))
            )
            for layer, (_, module) in enumerate(find_experts(self.model))
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, layer):
        """(router output row, routed ids, used ids, used weights) of every token that passed the layer."""
        for (output, _, routed), (used, weights) in zip(self.said[layer], self.got[layer], strict=True):
            yield from zip(output.tolist(), routed.tolist(), used.tolist(), weights.tolist(), strict=True)


def _slow_routers(name, model):
    return {
        site.layer: SlowRouter(name, site.module, model.get_submodule(site.path.rpartition(".")[0]))
        for site in find_routers(model)
        if site.rule is not None
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_router_is_found_beside_its_experts(name):
    model = _model(name)
    sites = find_routers(model)
    assert [site.layer for site in sites] == list(range(len(find_experts(model))))
    tables = [site.layer for site in sites if site.rule is None]
    assert tables == ([0] if name == "deepseek_v4" else [])


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_of_zero_is_exact_bit_for_bit(name):
    model = _model(name)
    expected = _run(model)
    with attach(model, _residency(model), routing="biased", bias=0.0) as routing:
        assert torch.equal(_run(model), expected)
        stats = routing.stats()
    assert stats["substituted_mass"] == stats["substituted"] == 0
    assert stats["misses"] == stats["absent"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_bias_is_resident_mode_bit_for_bit(name):
    model = _model(name)
    results, masses = [], []
    for options in ({"routing": "resident"}, {"routing": "biased", "bias": math.inf}):
        with attach(model, _residency(model), **options) as routing:
            results.append(_run(model))
            masses.append(routing.stats()["substituted_mass"])
    assert torch.equal(*results)
    assert masses[0] == masses[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_with_every_expert_resident_all_modes_are_exact(name):
    model = _model(name)
    expected = _run(model)
    for options in ({"routing": "resident"}, {"routing": "biased", "bias": 0.5}):
        with attach(model, _residency(model, E), **options) as routing:
            assert torch.equal(_run(model), expected)
            stats = routing.stats()
        assert stats["absent"] == stats["misses"] == stats["substituted"] == 0 < stats["rows"]


@pytest.mark.parametrize("bias", [0.15, 0.6, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_picks_weights_and_substituted_mass_are_those_of_a_slow_router(name, bias):
    model = _model(name)
    residency = _residency(model)
    slow = _slow_routers(name, model)
    with _Watch(model).before() as watch, attach(model, residency, routing="biased", bias=bias) as routing:
        _run(model)
        stats = routing.stats(per_layer=True)
    for layer, router in slow.items():
        resident = set(residency.mask(layer).nonzero().flatten().tolist())
        mass = substituted = misses = absent = rows = 0
        for output, routed, used, weights in watch.rows(layer):
            assert set(used) == router.picks(output, resident, bias, len(routed))
            expected = router.weights(output, used)
            assert weights == pytest.approx([expected[e] for e in used], rel=1e-4, abs=1e-6)
            rows += 1
            mass += router.mass(output, routed, used)
            substituted += len(set(routed) - set(used))
            misses += len(set(used) - resident)
            absent += len(set(routed) - resident)
        counted = stats["layers"][layer]
        assert counted["substituted_mass"] == pytest.approx(mass / rows, rel=1e-5, abs=1e-9)
        assert (counted["substituted"], counted["misses"], counted["absent"]) == (substituted, misses, absent)
        assert substituted > 0 or bias != math.inf


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_non_negative_and_normalised_as_the_family_does(name):
    model = _model(name)
    with _Watch(model).before() as watch, attach(model, _residency(model), routing="resident"):
        _run(model)
    for layer, router in _slow_routers(name, model).items():
        for (_, said, routed), (used, weights) in zip(watch.said[layer], watch.got[layer], strict=True):
            assert (weights >= 0).all()
            assert all(len(set(row)) == len(row) for row in used.tolist())
            assert weights.dtype == said.dtype
            if name in UNNORMALISED or name == "phimoe":
                continue
            if router.expert_scale is not None:
                said, weights = said / router.expert_scale[routed], weights / router.expert_scale[used]
            torch.testing.assert_close(weights.sum(-1), said.sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_with_fewer_residents_than_picks_the_routers_best_are_loaded(name):
    model = _model(name)
    top_k = 2 if name == "phimoe" else families.TOP_K
    residency = _residency(model, top_k - 1)
    with _Watch(model).before() as watch, attach(model, residency, routing="resident") as routing:
        _run(model)
        stats = routing.stats(per_layer=True)
    for layer, router in _slow_routers(name, model).items():
        resident = set(residency.mask(layer).nonzero().flatten().tolist())
        rows = list(watch.rows(layer))
        for output, routed, used, _ in rows:
            loaded = set(used) - resident
            assert resident < set(used)
            assert loaded == {
                max(set(routed) - resident, key=dict(enumerate(router.keys(router.logits(output))[0])).get)
            }
        assert stats["layers"][layer]["misses"] == len(rows)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "lfm2_moe", "phimoe"])
def test_bfloat16_routers_are_recognised_and_a_bias_of_zero_is_exact(name):
    model = families.build(name, torch.bfloat16)
    expected = _run(model)
    with attach(model, _residency(model), routing="biased", bias=0.0):
        assert torch.equal(_run(model), expected)
    with attach(model, _residency(model), routing="resident") as routing:
        _run(model)
        assert routing.stats()["misses"] == 0


def test_layers_that_look_experts_up_by_token_stay_exact_and_are_counted():
    model = _model("deepseek_v4")
    with _Watch(model).before() as watch, attach(model, _residency(model), routing="resident") as routing:
        _run(model)
        stats = routing.stats(per_layer=True)
    assert stats["exact_layers"] == 1
    assert stats["layers"][0]["rule"] == "token table"
    assert stats["layers"][0]["rows"] == 0
    for (_, weights, routed), got in zip(watch.said[0], watch.got[0], strict=True):
        assert torch.equal(routed, got[0])
        assert torch.equal(weights, got[1])


def test_close_leaves_the_model_as_it_was():
    model = _model("olmoe")
    expected = _run(model)
    routing = attach(model, _residency(model), routing="resident")
    assert not torch.equal(_run(model), expected)
    routing.close()
    routing.close()
    assert torch.equal(_run(model), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_exact_mode_needs_no_residency_and_no_hook():
    model = _model("olmoe")
    with attach(model, None, routing="exact") as routing, routing.request(task="code"):
        _run(model)
        assert not any(module._forward_hooks for module in model.modules())
    assert routing.stats()["substituted_mass"] == 0


class _Odd(nn.Module):
    """A router that no rule describes: it picks the worst experts."""

    def __init__(self, gate):
        super().__init__()
        self.weight = gate.weight
        self.top_k = gate.top_k

    def forward(self, hidden):
        logits = hidden @ self.weight.t()
        weights, index = (-logits).softmax(-1).topk(self.top_k, dim=-1)
        return logits, weights, index


@pytest.mark.parametrize("replace", [_Odd, lambda gate: nn.Linear(families.HIDDEN, E)], ids=["rule", "output"])
def test_a_router_that_is_not_understood_is_refused_by_name(replace):
    model = families.build("mixtral")
    block = model.model.layers[1].mlp
    block.gate = replace(block.gate)
    with pytest.raises(UnsupportedModelError, match=r"'mixtral'.*model\.layers\.1\.mlp\.gate"):
        attach(model, _residency(model), routing="resident")


def test_a_rule_follows_a_correction_that_changes_later():
    model = families.build("deepseek_v3")
    residency = _residency(model)
    with _Watch(model).before() as watch, attach(model, residency, routing="resident"):
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.mul_(-3)
        _run(model)
    for layer, router in _slow_routers("deepseek_v3", model).items():
        resident = set(residency.mask(layer).nonzero().flatten().tolist())
        for output, routed, used, _ in watch.rows(layer):
            assert set(used) == router.picks(output, resident, math.inf, len(routed))


def test_random_sets_have_the_size_asked_for_and_depend_on_the_seed():
    sets = random_residency([8, 16], [3, 5], seed=1)
    assert sets.sizes == [3, 5]
    assert torch.equal(sets.mask(1), random_residency([8, 16], [3, 5], seed=1).mask(1))
    assert any(not torch.equal(sets.mask(1), random_residency([8, 16], [3, 5], seed=s).mask(1)) for s in (2, 3))
    assert FixedResidency([4], [[0, 3]]).mask(0).tolist() == [True, False, False, True]
