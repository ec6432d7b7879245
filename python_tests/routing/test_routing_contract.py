"""The contract, the accounts by request and task, free slots, options: routing modes beside the families."""

from __future__ import annotations

import functools
import math
import threading

import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emoe.errors import ConfigError
from emoe.model.structure import experts_modules
from emoe.routing import FixedResidency, Request, Routing, attach, parse_options, random_residency
from emoe.routing.contract import WINDOW, Contract, avoidable
from emoe.routing.host import exchange
from emoe.routing.rules import Groups, Rule, Vector
from emoe.routing.select import choose
from emoe.seam.prefill import ChunkedPrefill
from emoe.slots.cache import CacheManager
from emoe.slots.resident import CacheResidency

E = families.EXPERTS
TOP_K = families.TOP_K


@functools.cache
def _model(name="olmoe"):
    return families.build(name)


def _residency(count=4, layers=3, seed=1):
    return random_residency([E] * layers, count, seed)


def _ids(rows, seed=0):
    return torch.randint(3, families.VOCAB, (1, rows), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _prefill(model, rows=16, seed=0):
    return model(_ids(rows, seed)).logits


@torch.no_grad()
def _decode(model, steps, seed=0):
    ids = _ids(steps, seed)
    cache, logits = None, []
    for step in range(steps):
        out = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1])
        yield torch.stack(logits)


class _Module(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.bias = nn.Buffer(torch.randn(experts, generator=torch.Generator().manual_seed(5)) * 0.1)


CORRECTION = Vector(_Module(16), "bias")
RULES = [
    Rule("softmax", True),
    Rule("softmax", False, 2.0),
    Rule("sigmoid", True, correction=CORRECTION),
    Rule("sqrt_softplus", True, correction=CORRECTION),
    Rule("sigmoid", True, correction=CORRECTION, groups=Groups(4, 2, "top2")),
    Rule("softmax", False, groups=Groups(4, 2, "max")),
]


@pytest.mark.parametrize("bias", [0.1, 0.7, math.inf])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_row_without_tensors_chooses_as_many_rows_with_tensors_do(rule, bias):
    generator = torch.Generator().manual_seed(11)
    for count in (0, 1, 3, 8, 15, 16):
        resident = torch.zeros(16, dtype=torch.bool)
        resident[torch.randperm(16, generator=generator)[:count]] = True
        for _ in range(20):
            logits = torch.randn(1, 16, generator=generator) * 2
            choice = rule.choice(logits)
            allowed = rule.allowed(choice)
            index = (choice if allowed is None else choice.masked_fill(~allowed, -math.inf)).topk(4).indices
            present = resident[index]
            many = choose(rule, logits, index, resident, present, bias)
            one = exchange(rule, logits, rule.weights(logits, index), index, resident, present[0].tolist(), bias)
            ids = index[0].tolist()
            for where, expert in zip(one.positions, one.substitutes, strict=True):
                ids[where] = expert
            assert set(ids) == set(many.index[0].tolist())
            assert sorted(one.positions) == many.replaced[0].nonzero().flatten().tolist()
            assert sum(one.shares) == pytest.approx((many.share * many.replaced).sum().item(), abs=1e-6)


@pytest.mark.parametrize("mode", ["resident", "biased"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("bound", [0.01, 0.1, 0.4])
def test_no_request_ever_passes_its_bound(mode, name, bound):
    model = _model(name)
    layers = 2 if name == "deepseek_v3" else 3
    with attach(model, _residency(layers=layers), routing=mode, max_substituted_mass=bound) as routing:
        for seed in range(3):
            with routing.request(task="code") as request:
                for _ in _decode(model, 8, seed):
                    assert request.tally.substituted_mass <= bound + 1e-12
            with routing.request(task="chat") as request:
                _prefill(model, 24, seed)
                assert request.tally.substituted_mass <= bound + 1e-12
        stats = routing.stats()
    assert stats["substituted_mass"] <= bound + 1e-12
    assert stats["misses"] > 0
    if bound >= 0.1:
        assert stats["substituted"] > 0


@pytest.mark.parametrize("mode", ["resident", "biased"])
def test_a_bound_of_zero_is_exact_bit_for_bit(mode):
    model = _model()
    expected = _prefill(model)
    with attach(model, _residency(), routing=mode, max_substituted_mass=0) as routing:
        assert torch.equal(_prefill(model), expected)
        assert routing.stats()["substituted"] == 0


def test_a_bound_that_is_never_reached_changes_nothing():
    model = _model()
    with attach(model, _residency(), routing="resident"):
        expected = _prefill(model)
    with attach(model, _residency(), routing="resident", max_substituted_mass=1.0, top_pick="replace"):
        assert torch.equal(_prefill(model), expected)


def test_the_bias_falls_until_the_wanted_mass_is_within_the_bound_and_rises_again():
    contract = Contract(0.05, adapt=True)
    assert contract.bias("code", math.inf) == math.inf

    def wanted(bias):  # a task that substitutes more the higher its bias
        return min(0.3, 0.2 * bias)

    for _ in range(30):
        contract.observe("code", math.inf, WINDOW, WINDOW * wanted(contract.bias("code", math.inf)))
    settled = contract.bias("code", math.inf)
    assert 0.04 <= wanted(settled) <= 0.056
    assert contract.bias("chat", 0.7) == 0.7
    for _ in range(60):
        contract.observe("code", math.inf, WINDOW, 0.0)
    assert contract.bias("code", math.inf) == math.inf


def test_the_bias_never_passes_the_one_asked_for_and_resident_mode_keeps_its_own():
    contract = Contract(0.05, adapt=True)
    contract.observe("code", 0.3, WINDOW, WINDOW * 0.2)
    assert contract.bias("code", 0.3) == pytest.approx(0.15)
    for _ in range(30):
        contract.observe("code", 0.3, WINDOW, 0.0)
    assert contract.bias("code", 0.3) == 0.3
    fixed = Contract(0.05, adapt=False)
    fixed.observe("code", math.inf, WINDOW, WINDOW * 0.9)
    assert fixed.bias("code", math.inf) == math.inf


def test_running_requests_lower_their_tasks_bias():
    model = _model()
    with attach(model, _residency(2), routing="biased", bias=1.0, max_substituted_mass=0.02) as routing:
        for seed in range(8):
            with routing.request(task="code"):
                _prefill(model, 64, seed)
        assert routing.stats()["tasks"]["code"]["bias"] == 1.0, "a prompt's exchanges are ranked, not biased"
        for seed in range(8):
            with routing.request(task="code"):
                for _ in _decode(model, 64, seed):
                    pass
        tasks = routing.stats()["tasks"]
    assert tasks["code"]["bias"] < 0.5
    assert tasks["code"]["substituted_mass"] <= 0.02 + 1e-12


def test_requests_and_tasks_add_up_to_the_total():
    model = _model()
    with attach(model, _residency(), routing="biased", bias={"code": 0.8, "default": 0.1}) as routing:
        _prefill(model, 8)
        for seed, task in enumerate(["code", "chat", "code", None]):
            with routing.request(task=task, name=f"r{seed}"):
                _prefill(model, 8, seed)
        stats = routing.stats(per_layer=True)
    assert [r["name"] for r in stats["requests"]] == ["r0", "r1", "r2", "r3"]
    assert stats["tasks"].keys() == {"", "code", "chat"}
    assert (stats["tasks"]["code"]["bias"], stats["tasks"]["chat"]["bias"]) == (0.8, 0.1)
    for field in ("rows", "picks", "absent", "substituted", "misses"):
        assert stats[field] == sum(task[field] for task in stats["tasks"].values())
        assert stats[field] == sum(layer[field] for layer in stats["layers"])
        by_task = sum(r[field] for r in stats["requests"] if r["task"] == "code")
        assert stats["tasks"]["code"][field] == by_task
    assert stats["rows"] == 5 * 8 * 3
    assert stats["absent"] == stats["substituted"] + stats["misses"]
    assert stats["tasks"]["code"]["substituted_mass"] > stats["tasks"]["chat"]["substituted_mass"]


def test_a_task_that_a_mapping_does_not_name_is_exact_unless_a_default_is_given():
    options = parse_options("biased", {"code": 0.5})
    assert (options.bias_of("code"), options.bias_of("chat"), options.bias_of(None)) == (0.5, 0.0, 0.0)


def test_rows_of_one_forward_may_belong_to_several_requests():
    model = _model()
    bias = {"code": math.inf, "chat": 0.0, "math": 0.4}
    layer = {"routing": "biased", "bias": bias}

    def alone(task, hidden):
        with attach(model, _residency(), **layer) as routing, routing.request(task=task) as request:
            out = model.model.layers[0].mlp.gate(hidden)
        return out, request.tally

    generator = torch.Generator().manual_seed(2)
    pieces = {task: torch.randn(rows, families.HIDDEN, generator=generator) for task, rows in
              (("code", 5), ("chat", 4), ("math", 6))}  # fmt: skip
    with torch.no_grad(), attach(model, _residency(), **layer) as routing:
        requests = {task: Request(task) for task in pieces}
        with routing.rows([(requests[task], len(piece)) for task, piece in pieces.items()]):
            _, weights, index = model.model.layers[0].mlp.gate(torch.cat(list(pieces.values())))
        start = 0
        for task, piece in pieces.items():
            (_, own_weights, own_index), tally = alone(task, piece)
            rows = slice(start, start + len(piece))
            start += len(piece)
            assert [set(row) for row in index[rows].tolist()] == [set(row) for row in own_index.tolist()]
            torch.testing.assert_close(weights[rows].sum(-1), own_weights.sum(-1))
            counted = requests[task].tally
            assert (counted.rows, counted.substituted, counted.misses) == (tally.rows, tally.substituted, tally.misses)
            assert counted.mass == pytest.approx(tally.mass, abs=1e-6)
        with (
            pytest.raises(ConfigError, match="rows of 3 tokens were announced to routing, 4 arrived"),
            routing.rows([(Request(), 3)]),
        ):
            model.model.layers[0].mlp.gate(torch.zeros(4, families.HIDDEN))


@pytest.mark.parametrize("mode", ["resident", "biased"])
@pytest.mark.parametrize("bound", [0.15, 0.3])
def test_an_expert_that_a_prompt_reads_keeps_all_its_picks(mode, bound):
    model = _model()
    residency = _residency()
    hidden = torch.randn(24, families.HIDDEN, generator=torch.Generator().manual_seed(4))
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        _, _, routed = gate(hidden)
        requests = [Request("code"), Request("chat")]
        with (
            attach(model, residency, routing=mode, max_substituted_mass=bound, top_pick="replace") as routing,
            routing.rows([(requests[0], 10), (requests[1], 14)]),
        ):
            _, _, used = gate(hidden)
    absent = set(range(E)) - set(residency.mask(1).nonzero().flatten().tolist())
    read = absent & set(used.flatten().tolist())
    avoided = absent & set(routed.flatten().tolist()) - read
    for before, after in zip(routed.tolist(), used.tolist(), strict=True):
        assert set(before) - set(after) == set(before) & avoided
    assert avoided
    for request in requests:
        assert 0 < request.tally.substituted_mass <= bound + 1e-12


def test_what_a_prompt_reads_for_one_row_is_a_substitute_for_the_others():
    rule = Rule("softmax", True)
    # 0 and 1 are resident. Row 0 needs 2 much; row 1 would rather have 2 than 0 in the place of 3.
    logits = torch.tensor([[0.5, 0.0, 9.0, *[-9.0] * 5], [0.0, 3.0, 2.9, 3.1, *[-9.0] * 4]])
    picks = logits.topk(2).indices
    routing = _routing("resident", [0, 1], 0.3)
    weights, index = routing.route(routing.sites[0], rule, logits, rule.weights(logits, picks), picks)
    assert set(index[0].tolist()) == {2, 0}
    assert set(index[1].tolist()) == {1, 2}
    assert routing.stats()["substituted_mass"] <= 0.3
    torch.testing.assert_close(weights, rule.weights(logits, index))


def _routing(mode, resident, bound, room=0, bias=None, top_pick="replace", weights=None):
    residency = FixedResidency([E] * 3, [resident] * 3)
    residency.room = lambda layer: room
    return Routing(_model(), residency, parse_options(mode, bias, bound, top_pick), weights=weights)


def _route(routing, rule, logits, requests, picks):
    with routing.rows(requests):
        routed = routing.route(routing.sites[0], rule, logits, rule.weights(logits, picks), picks)
    return (picks if routed is None else routed[1]).tolist()


def test_a_request_with_several_places_in_a_batch_has_one_allowance():
    rule, routing, request = Rule("softmax", True), _routing("resident", [0, 1], 0.3), Request()
    few = torch.full((2, E), -9.0)
    few[:, 0], few[:, 1] = 1.0, 0.0
    _route(routing, rule, few, [(request, 2)], few.topk(2).indices)
    few[:, 0], few[:, 1] = 0.0, -1.0
    few[0, 2] = few[1, 3] = math.log(4)  # 0.8 of their rows, where the request may substitute 1.2 in all
    picks = few.topk(2).indices
    places = [(request, 1), (Request(), 0), (request, 1)]
    assert _route(routing, rule, few, places, picks) == picks.tolist(), "what its prompt left is not for its answer"
    assert _route(routing, rule, few, places, picks) == [[0, 1], [3, 0]]
    assert request.tally.mass == pytest.approx(0.8)


@pytest.mark.parametrize("mode", ["resident", "biased"])
def test_what_is_no_number_is_neither_exchanged_nor_counted(mode):
    request = Request()
    rule, routing = Rule("softmax", True), _routing(mode, [0, 1], 0.3)
    logits = torch.randn(4, E, generator=torch.Generator().manual_seed(0))
    logits[1] = math.nan
    picks = logits.topk(2).indices
    assert _route(routing, rule, logits, [(request, 4)], picks)[1] == picks[1].tolist()
    assert 0 < request.tally.mass <= 1.2
    # All scores underflow: shares are 0 / 0.
    rule, routing, logits = Rule("sigmoid", True), _routing(mode, [0, 1], 0.3), torch.arange(E) - 150.0
    for rows in (1, 3):
        picks = logits.repeat(rows, 1).topk(2).indices
        assert _route(routing, rule, logits.repeat(rows, 1), [(request, rows)], picks) == picks.tolist()
    assert 0 < request.tally.mass <= 1.2


@pytest.mark.parametrize(("mode", "avoided"), [("resident", 2), ("biased", 3)])
def test_prompts_avoid_the_least_mass_and_biased_weighs_how_far_the_substitutes_are(mode, avoided):
    logits = torch.full((2, E), -10.0)
    logits[0, [0, 2, 1]] = torch.tensor([5.4, 5.0, -9.0])  # 2 has 0.4 of its row, and 1 is far below it
    logits[1, [0, 3, 1]] = torch.tensor([5.0, 4.99, 4.9])  # 3 has 0.5 of its row, and 1 is near
    picks = logits.topk(2).indices
    rule, routing = Rule("softmax", True), _routing(mode, [0, 1], 0.25)
    used = _route(routing, rule, logits, [(Request(), 2)], picks)
    assert [set(row) for row in used] == [{0, 1 if avoided == 2 else 2}, {0, 1 if avoided == 3 else 3}]


def test_an_expert_that_the_bias_leaves_one_row_is_there_for_all_rows():
    rule, routing = Rule("softmax", True), _routing("biased", [0, 1], 1.0, bias=0.3)
    logits = torch.full((2, E), -10.0)
    logits[0, [0, 2, 1]] = torch.tensor([5.0, 4.9, 4.8])  # the bias puts 1 in the place of 2
    logits[1, [0, 2, 1]] = torch.tensor([5.0, 4.9, -9.0])  # and not here
    picks = logits.topk(2).indices
    assert _route(routing, rule, logits[:1], [(Request(), 1)], picks[:1]) == [[0, 1]]
    assert _route(routing, rule, logits, [(Request(), 2)], picks) == [[0, 2], [0, 2]]


def test_decode_rows_of_a_batch_follow_their_tasks_bias_and_move_it():
    rule, routing = Rule("softmax", True), _routing("biased", [0, 1, 2, 3], 0.02)
    requests = [(Request("code"), 1) for _ in range(WINDOW // 4)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        logits = torch.randn(len(requests), E, generator=generator)
        _route(routing, rule, logits, requests, logits.topk(2).indices)
    # 25 halvings, had the rows not followed it.
    assert 1e-3 < routing.stats()["tasks"]["code"]["bias"] < 0.5


def test_one_row_makes_the_exchanges_with_the_least_mass_also_while_slots_are_free():
    owner = nn.Module()
    owner.bias = torch.tensor([0.6, 0.5, 0.9, 0.4, 0.0, 0.0, 0.0, 0.0])
    rule = Rule("sigmoid", True, correction=Vector(owner, "bias"))
    # Of the absent, 4 gets the free slot; 2 has less mass than 3 and is further above the residents.
    logits = torch.tensor([[1e-4, 1e-4, 0.2, 0.3, 0.9, *[1e-4] * 3]]).logit()
    picks = rule.choice(logits).topk(3).indices
    assert set(picks[0].tolist()) == {2, 3, 4}
    routing = _routing("biased", [0, 1], 0.3, room=1)
    assert set(_route(routing, rule, logits, [(Request(), 1)], picks)[0]) == {0, 3, 4}


def test_requests_in_threads_beside_each_other_have_their_own_counts():
    model, together, tallies = _model(), threading.Barrier(2), {}

    def serve(rows):
        with routing.request(task=str(rows)) as request:
            together.wait(200)
            _prefill(model, rows)
            together.wait(200)
        tallies[rows] = request.tally

    with attach(model, _residency(), routing="resident") as routing:
        threads = [threading.Thread(target=serve, args=(rows,)) for rows in (5, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {rows: tally.rows for rows, tally in tallies.items()} == {5: 15, 11: 33}
        _prefill(model, 2)  # in no request
        assert {task: count["rows"] for task, count in routing.stats()["tasks"].items()} == {"5": 15, "11": 33, "": 6}


def test_a_thread_without_a_request_works_for_the_one_that_was_opened_last():
    model = _model()
    with (
        attach(model, _residency(), routing="resident") as routing,
        routing.request("code") as outer,
        routing.request("chat") as inner,
    ):
        thread = threading.Thread(target=_prefill, args=(model, 5))
        thread.start()
        thread.join()
    assert (outer.tally.rows, inner.tally.rows) == (0, 15)


@given(
    st.integers(1, 3).flatmap(
        lambda requests: st.tuples(
            st.lists(st.lists(st.floats(0, 1), min_size=7, max_size=7), min_size=requests, max_size=requests),
            st.lists(st.floats(0, 2), min_size=requests, max_size=requests),
        )
    ),
    st.lists(st.floats(0, 1), min_size=7, max_size=7),
    st.sets(st.integers(0, 6)),
)
def test_avoided_experts_are_the_least_harmful_that_every_request_can_pay_for(mass_and_allowances, harm, candidates):
    masses, allowances = np.array(mass_and_allowances[0]), mass_and_allowances[1]
    avoided = avoidable(masses, np.array(harm), candidates, allowances)
    assert set(avoided) <= candidates
    for row, allowance in zip(masses, allowances, strict=True):
        assert row[avoided].sum() <= allowance + 1e-12
    for expert in candidates - set(avoided):
        before = [other for other in avoided if (harm[other], other) < (harm[expert], expert)]
        assert any(
            row[[*before, expert]].sum() > allowance - 1e-12 for row, allowance in zip(masses, allowances, strict=True)
        )


class _Filling:
    """A layer whose free slots take what was routed to and absent, as a cache does."""

    def __init__(self, layers, slots):
        self.sets = [set() for _ in range(layers)]
        self.slots = slots
        self.loads = 0

    def mask(self, layer):
        mask = torch.zeros(E, dtype=torch.bool)
        mask[list(self.sets[layer])] = True
        return mask

    def room(self, layer):
        return self.slots - len(self.sets[layer])

    def use(self, layer, experts):
        new = experts - self.sets[layer]
        self.loads += len(new)
        self.sets[layer] |= new
        assert len(self.sets[layer]) <= self.slots


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_free_slots_are_filled_first_and_then_nothing_is_loaded(rows):
    model = _model()
    residency = _Filling(3, slots=5)
    handles = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda m, args, n=n: residency.use(n, set(args[1].flatten().tolist()))
        )
        for n, layer in enumerate(model.model.layers)
    ]
    try:
        with attach(model, residency, routing="resident") as routing:
            for seed in range(12):
                _prefill(model, rows, seed)
            assert residency.loads == 3 * 5
            before = routing.stats()["misses"]
            _prefill(model, rows, 99)
            assert routing.stats()["misses"] == before
    finally:
        for handle in handles:
            handle.remove()


def test_a_prefill_gives_free_slots_to_the_experts_with_most_mass():
    model = _model()
    router = model.model.layers[0].mlp.gate
    hidden = torch.randn(40, families.HIDDEN, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits, _, index = router(hidden)
        mass = torch.zeros(E).scatter_add_(0, index.flatten(), logits.gather(1, index).softmax(-1).flatten())
        with attach(model, _Filling(3, slots=4), routing="resident"):
            used = set(router(hidden)[2].flatten().tolist())
    assert used == set(mass.topk(4).indices.tolist())


def test_a_cache_tells_its_residents_as_they_change():
    cache = CacheManager([2, 1])
    residency = CacheResidency(cache, [4, 4])
    assert (residency.mask(0).tolist(), residency.room(0)) == ([False] * 4, 2)
    cache.admit(0, 3)
    assert not residency.mask(0).any()  # loading
    cache.ready(0, 3)
    first = residency.mask(0)
    assert first.tolist() == [False, False, False, True]
    assert residency.mask(0) is first
    cache.admit(0, 1)
    cache.ready(0, 1)
    assert residency.mask(0).tolist() == [False, True, False, True]
    assert first.tolist() == [False, False, False, True]
    cache.admit(0, 0)  # evicts 3
    assert residency.mask(0).tolist() == [False, True, False, False]
    cache.fail(0, 0)
    cache.drop(0, 1)
    assert (residency.mask(0).any().item(), residency.room(0)) == (False, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "fast"}, "'fast' is not one of: exact, resident, biased"),
        ({"routing": "exact", "bias": 0.5}, "bias=0.5 goes with routing='biased', not 'exact'"),
        ({"routing": "resident", "bias": 0.5}, "goes with routing='biased', not 'resident'"),
        ({"routing": "exact", "max_substituted_mass": 0.1}, "'exact' substitutes nothing"),
        ({"routing": "biased"}, "needs bias="),
        ({"routing": "biased", "bias": -0.1}, "bias=-0.1 is not a number of at least 0"),
        ({"routing": "biased", "bias": math.nan}, "bias=nan is not"),
        ({"routing": "biased", "bias": "0.5"}, "bias='0.5' is not"),
        ({"routing": "biased", "bias": {"code": True}}, r"bias\['code'\]=True is not"),
        ({"routing": "biased", "bias": {3: 0.1}}, "has the key 3"),
        ({"routing": "resident", "max_substituted_mass": 1.5}, "max_substituted_mass=1.5 is not a share"),
    ],
)
def test_an_option_that_makes_no_sense_names_the_choices(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(**options)


def test_a_residency_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match="1 resident sets for 2 layers"):
        FixedResidency([4, 4], [[0]])
    with pytest.raises(ConfigError, match="layer 0 has experts 0 to 3, not 4"):
        FixedResidency([4], [[4]])
    with pytest.raises(ConfigError, match="layer 1 has 4 experts, of which 5"):
        random_residency([8, 4], 5)


@pytest.mark.parametrize("mode", ["resident", "biased"])
@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("rows", [1, 2, 12])
def test_the_pick_with_most_mass_is_never_replaced_where_it_is_kept(mode, room, rows):
    rule, request = Rule("softmax", True), Request()
    kept = _routing(mode, [0, 1, 2], 1.0, room=room, top_pick="auto" if rows == 1 else "keep")
    given = _routing(mode, [0, 1, 2], 1.0, room=room, top_pick="replace")
    generator = torch.Generator().manual_seed(7)
    replaced = 0
    for _ in range(40):
        logits = 2 * torch.randn(rows, E, generator=generator)
        picks = logits.topk(3).indices  # in the order of mass
        used = _route(kept, rule, logits, [(request, rows)], picks)
        for top, row in zip(picks[:, 0].tolist(), used, strict=True):
            assert top in row
        # What is read for one row is there for all: no other absent expert is used.
        assert set().union(*used) - {0, 1, 2} <= set(picks[:, 0].tolist()) | _filled(rule, logits, picks, room)
        other = _route(given, rule, logits, [(Request(), rows)], picks)
        replaced += sum(top not in row for top, row in zip(picks[:, 0].tolist(), other, strict=True))
    assert replaced > 0 or (rows, room) == (1, 1)  # there the free slot takes it
    assert request.tally.substituted > 0


def test_under_a_contract_it_is_kept_in_decode_and_not_in_prompts():
    rule, prompt, answer = Rule("softmax", True), Request(), Request()
    routing = _routing("resident", [0, 1], 1.0, top_pick="auto")
    logits = torch.full((3, E), -9.0)
    logits[:, 0] = 0.5
    logits[0, 2] = logits[1, 3] = logits[2, 4] = 2.0
    picks = logits.topk(2).indices
    used = _route(routing, rule, logits, [(prompt, 2), (answer, 1)], picks)
    assert [set(row) for row in used] == [{0, 1}, {0, 1}, {0, 4}]
    assert parse_options("resident", None, 0.1).keep_top == (False, True)
    assert parse_options("resident", None, 0.1, "keep").keep_top == (True, True)
    assert parse_options("resident", None, 0.1, "replace").keep_top == (False, False)
    assert parse_options("biased", 0.5).keep_top == (False, False)


def _filled(rule, logits, picks, room):
    absent = [expert for expert in range(3, E) if (picks == expert).any()]
    mass = {expert: float(rule.share(logits, picks)[picks == expert].sum()) for expert in absent}
    return set(sorted(absent, key=lambda expert: -mass[expert])[:room])


def test_resident_keeps_the_pick_with_most_mass_also_without_a_contract_and_says_that_it_reads():
    kept = _routing("resident", [0, 1], None, top_pick="keep")
    assert kept.options.loads_misses
    assert not parse_options("resident").loads_misses
    logits = torch.full((1, E), -9.0)
    logits[0, [4, 5]] = torch.tensor([2.0, 1.0])
    assert sorted(_route(kept, Rule("softmax", True), logits, [(Request(), 1)], logits.topk(2).indices)[0])[1] == 4
    with pytest.raises(ConfigError, match="top_pick='keep' goes with routing='resident' or 'biased', not 'exact'"):
        parse_options("exact", top_pick="keep")
    with pytest.raises(ConfigError, match="top_pick='kept' is not one of: auto, keep, replace; did you mean 'keep'"):
        parse_options("resident", top_pick="kept")


@pytest.mark.parametrize("mode", ["resident", "biased"])
def test_what_a_prompt_leaves_of_its_allowance_is_not_spent_in_its_answer(mode):
    model = _model()
    full = FixedResidency([E] * 3, [list(range(E))] * 3)
    bound = 0.05
    routing = attach(model, full, routing=mode, max_substituted_mass=bound, top_pick="replace")
    with routing, torch.no_grad(), routing.request() as request:
        out = model(_ids(64), use_cache=True)  # substitutes nothing
        assert request.prompt == (3 * 64, 0, 0)
        routing._residency = _residency()
        for step in range(8):
            before = request.tally.mass
            out = model(_ids(1, step), past_key_values=out.past_key_values, use_cache=True)
            assert request.tally.mass - before <= bound * 3 * (step + 1)
            assert request.decode.mass <= bound * request.decode.rows
    assert request.decode.rows == 3 * 8
    assert request.prompt.rows == 3 * 64
    assert 0 < request.decode.mass == pytest.approx(request.tally.mass)


def test_tokens_of_a_batch_are_decode_and_a_text_of_one_token_is_a_prompt():
    model = _model()
    routing = attach(model, _residency(), routing="resident", max_substituted_mass=0.1)
    with routing, torch.no_grad(), routing.request() as request:
        ids = _ids(12).reshape(4, 3)
        out = model(ids[:, :1], use_cache=True)
        assert (request.prompt.rows, request.decode.rows) == (12, 0)
        out = model(ids[:, 1:2], past_key_values=out.past_key_values, use_cache=True)
        assert (request.prompt.rows, request.decode.rows) == (12, 12)
        model(ids[:, 1:], past_key_values=out.past_key_values, use_cache=True)
        assert (request.prompt.rows, request.decode.rows) == (36, 12)
        model(ids[:, :1], use_cache=False)
        assert (request.prompt.rows, request.decode.rows) == (48, 12)


@pytest.mark.parametrize("name", ["olmoe", "granitemoe", "deepseek_v2"])
@pytest.mark.parametrize(
    "step",
    [
        lambda model, ids, cache: model(ids, None, None, cache),
        lambda model, ids, cache: model.model(ids, past_key_values=cache, use_cache=True),
        lambda model, ids, cache: model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache),
    ],
    ids=["cache by position", "the text model alone", "embeddings"],
)
def test_decode_is_told_however_the_model_is_called(step, name):
    model = _model(name)
    layers = len(experts_modules(model))
    routing = attach(model, _residency(layers=layers), routing="resident", max_substituted_mass=0.1)
    with routing, torch.no_grad(), routing.request() as request:
        cache = model(_ids(6), use_cache=True).past_key_values
        for token in range(3):
            step(model, _ids(1, token), cache)
    assert (request.prompt.rows, request.decode.rows) == (6 * layers, 3 * layers)


@pytest.mark.parametrize("chunk", [None, 4])
def test_tokens_that_an_assistant_guessed_are_decode_and_the_prompt_is_not(chunk):
    model = _model()
    chunked = ChunkedPrefill(model, chunk, 0)
    routing = attach(model, _residency(), routing="resident", max_substituted_mass=0.1)
    with routing, torch.no_grad(), routing.request() as request:
        model.generate(
            _ids(6).repeat(1, 2), max_new_tokens=10, min_new_tokens=10, prompt_lookup_num_tokens=3, do_sample=False
        )
    chunked.remove()
    assert request.prompt.rows == 3 * (12 + 3)  # the first forward has guesses behind the prompt
    assert request.decode.rows >= 3 * 6


def test_decode_is_told_where_the_forward_of_a_model_is_compiled():
    model = families.build("olmoe")
    routing = attach(model, _residency(), routing="resident", max_substituted_mass=0.1)
    ids = _ids(12).reshape(4, 3)
    with routing, torch.no_grad(), routing.request() as request:
        out = model(ids[:, :2], use_cache=True)
        model.forward = torch.compile(model.forward, backend="eager")
        model(ids[:, 2:], past_key_values=out.past_key_values, use_cache=True)
    assert (request.prompt.rows, request.decode.rows) == (3 * 8, 3 * 4)


@pytest.mark.parametrize("length", range(9, 17))
def test_a_prompt_in_chunks_is_all_prompt(length):
    model = _model()
    chunked = ChunkedPrefill(model, 4, 0)
    routing = attach(model, _residency(), routing="resident", max_substituted_mass=0.1)
    with routing, torch.no_grad(), routing.request() as request:
        model(_ids(length), use_cache=True)
    chunked.remove()
    assert (request.prompt.rows, request.decode.rows) == (3 * length, 0)


@pytest.mark.parametrize("rows", [1, 6])
def test_mass_is_spent_in_layers_where_it_harms_least(rows):
    weights = np.array([3.0, 0.75, 0.75])
    bound, rule, request = 0.1, Rule("softmax", True), Request("code")
    asked = []
    routing = _routing("resident", [0, 1, 2, 3], bound, weights=lambda task: asked.append(task) or weights)
    generator = torch.Generator().manual_seed(3)
    mass = np.zeros(3)
    for _ in range(200):
        logits = 0.3 * torch.randn(rows, E, generator=generator)
        picks = logits.topk(4).indices
        for layer in range(3):
            before = request.tally.mass
            with routing.rows([(request, rows)]):
                routing.route(routing.sites[layer], rule, logits, rule.weights(logits, picks), picks)
            mass[layer] += request.tally.mass - before
            spent = request.decode if rows == 1 else request.prompt
            assert spent.mass <= bound * spent.rows + 1e-9
            assert spent.harm <= bound * spent.rows + 1e-9
    assert set(asked) == {"code"}
    assert (mass @ weights) == pytest.approx(spent.harm)
    assert mass[0] < 0.4 * mass[1:].mean()
    assert mass.sum() > 0.9 * bound * spent.rows
