"""What a predictor decides in a running model: the base set, its refreshes, prefetch, and giving way to LRU."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from fake_queue import FakeQueue

import emoe
from emoe import errors
from emoe.errors import ConfigError
from emoe.options import Options
from emoe.predictor import UNKNOWN_TASK
from emoe.predictor.across import AcrossLayers
from emoe.predictor.table import TaskTable
from emoe.requests import Request
from emoe.slots.base_set import BaseSet
from emoe.slots.cache import CacheManager
from emoe.slots.load_score import Expected, load_score
from emoe.slots.loader import Loader
from emoe.slots.resident import CacheResidency
from emoe.slots.shadow import PATIENCE


class Favourites:
    """Scores that a test sets; remembers what it was told."""

    def __init__(self, scores, names=()):
        self.scores, self.names = np.asarray(scores, dtype=np.float64), names
        self.begun, self.blocks = [], []

    def begin(self, task):
        self.begun.append(task)

    def observe(self, picks):
        self.blocks.append(picks.copy())

    def rank(self):
        return self.scores

    def anew(self):
        return Favourites(self.scores, self.names)


def _scores(model, favourites):
    layers, experts = _shape(model)
    scores = np.zeros((layers, experts))
    scores[:, list(favourites)] = 1.0
    return scores


def _shape(model):
    found = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    return len(found), found[0].num_experts


def _ids(seed, length=12):
    return torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(seed))


def _run(model, seed=0, **request):
    with torch.no_grad(), model.emoe.request(**request):
        return model(_ids(seed)).logits


def _run_token_by_token(model, seed=0, length=6):
    with torch.no_grad(), model.emoe.request():
        for token in _ids(seed, length)[0]:
            model(token.reshape(1, 1))


@pytest.fixture
def model():
    built = families.build("qwen3_moe")
    yield built
    if getattr(built, "emoe", None):
        built.emoe.close()


def _slots(model):
    return [len(model.emoe.cache.slots(layer)) for layer in range(model.emoe.cache.layers)]


@pytest.mark.parametrize("routing", ["exact", "biased"])
def test_experts_of_the_base_set_stay_once_a_miss_has_loaded_them_and_none_is_loaded_ahead(model, routing):
    predictor = Favourites(_scores(model, [1, 4, 5]))
    bias = 0.0 if routing == "biased" else None
    emoe.wrap(model, memory_budget=0.75, predictor=predictor, slack=0.5, routing=routing, bias=bias)
    assert model.emoe.base.sizes == [3] * model.emoe.cache.layers
    arrived = [set() for _ in range(model.emoe.cache.layers)]
    for seed in range(4):
        _run_token_by_token(model, seed)
        for layer, seen in enumerate(arrived):
            resident = set(model.emoe.cache.resident(layer))
            seen |= resident & {1, 4, 5}
            assert seen <= resident
    assert sum(map(len, arrived)) > 3
    model.emoe.check_integrity()
    stats = model.emoe.stats()
    assert stats["loads"] == stats["misses"]
    assert stats["prediction"]["loads"] == 0
    assert stats["prediction"]["refreshes"] == 1
    assert stats["prediction"]["requests"] == 4


@pytest.mark.parametrize(
    "options", [{}, {"routing": "biased", "bias": 0.1}, {"routing": "resident", "max_substituted_mass": 0.05}]
)
def test_a_long_prompt_needs_more_slots_than_the_slack_and_the_base_set_stays(model, options):
    predictor = Favourites(_scores(model, [1, 5]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, slack=0.25, **options)
    assert 0 < model.emoe.base.sizes[0] <= 2
    for seed in range(5):
        with torch.no_grad(), model.emoe.request():
            model(_ids(seed, 40))
        for layer, size in enumerate(model.emoe.base.sizes):
            model.emoe.loader.finish_prefetch(layer)
            assert len({1, 5} & set(model.emoe.cache.resident(layer))) >= size
    model.emoe.check_integrity()


def test_in_exact_mode_a_predictor_changes_no_bit_of_a_decode(model):
    emoe.wrap(model, memory_budget=0.5)
    plain = model.generate(_ids(1), max_new_tokens=8, do_sample=False)
    model.emoe.close()
    emoe.wrap(model, memory_budget=0.5, predictor=Favourites(_scores(model, [0, 3])), period=1)
    with model.emoe.request():
        assert torch.equal(model.generate(_ids(1), max_new_tokens=8, do_sample=False), plain)


def test_resident_mode_waits_for_the_whole_base_set(model):
    favourites = [0, 2, 4, 6]
    emoe.wrap(model, memory_budget=0.5, predictor=Favourites(_scores(model, favourites)), routing="resident")
    with model.emoe.request():
        for layer in range(model.emoe.cache.layers):
            assert model.emoe.cache.resident(layer) == favourites
        with torch.no_grad():
            model(_ids(0))
    assert all(model.emoe.cache.resident(layer) == favourites for layer in range(model.emoe.cache.layers))
    assert model.emoe.stats()["misses"] == 0


def test_the_predictor_sees_the_picks_of_the_router_not_their_substitutes(model):
    """Else what a budget left out could never be asked for again."""
    emoe.wrap(model, memory_budget=1.0)
    wanted = _picks(model, _ids(0))[0]
    model.emoe.close()
    predictor = Favourites(_scores(model, [0, 1, 2, 3]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, routing="resident")
    _run(model, 0)
    assert model.emoe.stats()["routing"]["substituted"] > 0
    seen = predictor.blocks[0][0]
    assert np.array_equal(np.sort(seen, axis=1), np.sort(wanted, axis=1))


def test_a_period_counts_requests(model):
    emoe.wrap(model, memory_budget=0.5, predictor=Favourites(_scores(model, [1])), period=2)
    for _ in range(5):
        _run(model, 0)
    assert model.emoe.stats()["prediction"]["refreshes"] == 3


def test_a_task_that_the_base_set_is_not_for_does_not_wait_for_the_period(model):
    predictor = Favourites(_scores(model, [1]), names=("code", "talk"))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, period=40)
    for task, refreshes in (("talk", 1), ("talk", 1), ("code", 2), ("poem", 2), (None, 2), ("code", 2), ("talk", 3)):
        _run(model, 0, task=task)
        assert model.emoe.stats()["prediction"]["refreshes"] == refreshes
    assert predictor.begun == [1, 1, 0, UNKNOWN_TASK, UNKNOWN_TASK, 0, 1]


def test_a_base_set_for_several_requests_is_for_all_their_tasks(model):
    predictor = Favourites(_scores(model, [1]), names=("code", "talk"))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, period=40)
    _run(model, 0, task="talk", others=[("code", 200)])
    assert predictor.begun == [0, 1]
    _run(model, 0, task="code")
    assert model.emoe.stats()["prediction"]["refreshes"] == 1
    with pytest.raises(ConfigError, match="tokens=0"):
        _run(model, 0, task="code", tokens=0)


def test_what_the_queue_refuses_is_tried_again_after_the_next_forward(model, monkeypatch):
    options = {"routing": "resident", "max_substituted_mass": 0.5, "slack": 0.5}
    emoe.wrap(model, memory_budget=0.75, predictor=Favourites(_scores(model, [1, 4, 5])), **options)
    loader = model.emoe.loader
    monkeypatch.setattr(loader, "prefetch", lambda layer, experts: 0)
    with torch.no_grad(), model.emoe.request():
        assert model.emoe.stats()["prediction"]["loads"] == 0
        monkeypatch.undo()
        model(_ids(0)[:, :1])
    for layer in range(model.emoe.cache.layers):
        loader.finish_prefetch(layer)
        assert {1, 4, 5} <= set(model.emoe.cache.resident(layer))


def test_loads_for_a_base_set_that_is_no_longer_wanted_are_cancelled():
    queue, cache = FakeQueue(), CacheManager([6, 6])
    loader = Loader(cache, queue, [list(range(8)), list(range(8, 16))])
    scores = np.zeros((2, 8))
    scores[:, [1, 2, 3]] = 1.0
    predictor = Favourites(scores, names=("code", "talk"))
    options = Options(predictor=predictor, slack=0.5)
    base = BaseSet(
        loader, CacheResidency(cache, [8, 8]), [8, 8], 2, options, loads_misses=True, ahead=True, waits=False
    )
    base.begin(Request("code"))
    assert [job.state for job in queue.jobs] == ["queued"] * 6
    predictor.scores = scores[:, ::-1]
    base.begin(Request("talk"))
    assert [job.state for job in queue.jobs] == ["cancelled"] * 6 + ["queued"] * 6
    assert [job.record for job in queue.jobs[6:]] == [4, 5, 6, 12, 13, 14]
    assert cache.protected(0) == {4, 5, 6}
    cache.check_integrity()


def test_requests_within_a_request_are_part_of_it(model):
    predictor = Favourites(_scores(model, [1]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor)
    with model.emoe.request():
        _run(model, 0)
        with torch.no_grad():
            model(_ids(1))
    assert model.emoe.stats()["prediction"]["requests"] == 1
    assert predictor.blocks[0].shape[1] == 24
    with torch.no_grad():
        model(_ids(2))
    assert model.emoe.stats()["prediction"]["requests"] == 2


def test_a_probe_teaches_the_predictor_nothing(model):
    from emoe.sensitivity import probe

    predictor = Favourites(_scores(model, [1]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor)
    _run(model, 0)
    probe(model, _ids(1))
    _run(model, 0)
    assert model.emoe.stats()["prediction"]["requests"] == 2
    assert sum(block.shape[1] for block in predictor.blocks) == 24


class Careless:
    """A sensitivity profile in which one task does not mind layer 0."""

    def __init__(self, layers):
        self._layers = layers

    def insensitive(self, task):
        if task != "talk":
            raise KeyError(task)
        return np.arange(self._layers) == 0


def test_nothing_is_moved_into_layers_that_do_not_count_for_the_task(model):
    layers, _ = _shape(model)
    predictor = Favourites(_scores(model, [1, 2, 3]), names=("code", "talk"))
    emoe.wrap(model, memory_budget=0.75, predictor=predictor, sensitivity=Careless(layers))
    _run(model, 0, task="talk")
    assert not model.emoe.cache.protected(0)
    assert all(model.emoe.cache.protected(layer) == {1, 2, 3} for layer in range(1, layers))
    _run(model, 0, task="code")
    assert model.emoe.cache.protected(0) == {1, 2, 3}


def test_a_sensitivity_profile_of_another_model_is_refused(model):
    predictor = Favourites(_scores(model, [1]), names=("talk",))
    with pytest.raises(ConfigError, match="9 layers"):
        emoe.wrap(model, memory_budget=0.5, predictor=predictor, sensitivity=Careless(9))


def test_generate_without_request_is_one_request_per_prompt(model):
    predictor = Favourites(_scores(model, [1]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor)
    for seed in range(3):
        model.generate(_ids(seed), max_new_tokens=4, do_sample=False)
    assert model.emoe.stats()["prediction"]["requests"] == 3
    # 12 tokens of the prompt and three of the four new ones: the last is never routed.
    assert predictor.blocks[0].shape[1] == 15


@pytest.mark.parametrize("family", ["minimax", "jamba", "nemotron_h", "lfm2_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_a_prompt_is_one_request_in_families_with_caches_of_their_own(family):
    model = families.build(family)
    emoe.wrap(model, memory_budget=0.5, predictor="recent")
    for prompts, length in enumerate((12, 1, 1), start=1):
        model.generate(_ids(prompts, length), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert model.emoe.stats()["prediction"]["requests"] == prompts
    model.emoe.close()


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"use_cache": False, "num_beams": 3}, {"num_beams": 3}, {"prefill_chunk_size": 4}]
)
def test_a_prompt_is_one_request_however_it_is_generated(model, options):
    emoe.wrap(model, memory_budget=0.5, predictor="recent")
    for prompts, length in enumerate((12, 1, 1), start=1):
        model.generate(_ids(prompts, length), max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
        assert model.emoe.stats()["prediction"]["requests"] == prompts


def test_a_text_that_is_decoded_by_hand_is_one_request_until_another_begins(model):
    emoe.wrap(model, memory_budget=0.5, predictor="recent")
    with torch.no_grad():
        for requests in (1, 2):
            cache = model(_ids(0)).past_key_values
            for _ in range(3):
                model(_ids(1, 1), past_key_values=cache)
            assert model.emoe.stats()["prediction"]["requests"] == requests
        model(_ids(1, 9))  # one token less than the next text, and no part of it
        model(_ids(2, 10))
    assert model.emoe.stats()["prediction"]["requests"] == 4


def test_a_text_that_goes_on_after_its_request_ended_is_a_request_of_its_own(model):
    predictor = Favourites(_scores(model, [1]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor)
    with torch.no_grad():
        with model.emoe.request():
            cache = model(_ids(0)).past_key_values
        for _ in range(3):
            model(_ids(1, 1), past_key_values=cache)
    assert model.emoe.stats()["prediction"]["requests"] == 2
    _run(model, 2)
    assert [block.shape[1] for block in predictor.blocks] == [12, 3, 12]


def test_a_base_set_that_cannot_be_read_leaves_the_slots_free_and_the_request_says_so(model, caplog):
    predictor = Favourites(_scores(model, [0, 1, 2, 3]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, routing="resident")
    for layer in range(model.emoe.cache.layers):
        for path in {piece.file for pieces in model.emoe.store.layers[layer].pieces for piece in pieces}:
            os.truncate(path, 0)
    with pytest.raises(errors.EmoeError):
        _run(model, 0)
    assert any("failed" in record.message for record in caplog.records)
    model.emoe.check_integrity()
    model.emoe.close(restore=False)  # there is nothing to restore from


def test_recent_learns_its_first_base_set_from_the_first_request(model):
    emoe.wrap(model, memory_budget=0.5, predictor="recent", period=40, slack=0.5)
    _run(model, 0)
    assert model.emoe.stats()["prediction"]["refreshes"] == 0
    _run(model, 0)
    stats = model.emoe.stats()["prediction"]
    assert stats["refreshes"] == 1
    assert stats["recall"] > 0


def test_an_adaptive_period_follows_a_change_of_routing(model):
    """The tests of the rule itself are with the replay; here: that the runtime feeds it."""
    predictor = Favourites(_scores(model, [0, 1]))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, period="adaptive", slack=0.5)
    for _ in range(3):
        _run(model, 0)
    settled = model.emoe.stats()["prediction"]["refreshes"]
    _run(model, 0)
    assert model.emoe.stats()["prediction"]["refreshes"] == settled
    used = np.bincount(predictor.blocks[-1].ravel(), minlength=predictor.scores.shape[1])
    predictor.scores[:] = used
    for _ in range(4):
        _run(model, 0)
    assert model.emoe.stats()["prediction"]["refreshes"] > settled


def _run_with_the_worst(model, predictor, requests):
    """Requests of one text for which the predictor always names what they do not ask for."""
    for _ in range(requests):
        _run_token_by_token(model)
        picks = predictor.blocks[-1]
        predictor.scores = -np.array([np.bincount(each[each >= 0], minlength=_shape(model)[1]) for each in picks])
    return int((picks >= 0).sum())


@pytest.mark.parametrize("routing", ["exact", "resident"])
def test_a_bad_predictor_gives_way_to_the_policy_within_its_patience(model, routing, caplog):
    layers, experts = _shape(model)
    unused = Favourites(np.zeros((layers, experts)))
    emoe.wrap(model, memory_budget=0.5, predictor=unused, period=1, routing=routing, slack=0.3)
    with caplog.at_level(logging.WARNING, logger="emoe"):
        picks = _run_with_the_worst(model, unused, PATIENCE + 1)
    assert "over the last 20 requests" in model.emoe.stats()["prediction"]["tasks"]["any"]["off"]
    assert any("no base set is kept for task 'any'" in record.message for record in caplog.records)
    before = model.emoe.stats()["routing"]["absent"]
    _run_with_the_worst(model, unused, 1)
    if routing == "exact":
        assert not any(model.emoe.cache.protected(layer) for layer in range(layers))
        return
    first = model.emoe.stats()["routing"]["absent"] - before
    last_used = [np.flatnonzero(held).tolist() for held in model.emoe.base._between.held()]
    _run_token_by_token(model)
    assert [model.emoe.cache.resident(layer) for layer in range(layers)] == last_used
    assert model.emoe.stats()["routing"]["absent"] - before - first < 0.7 * picks


def test_a_predictor_that_has_become_good_is_used_again(model, caplog):
    layers, experts = _shape(model)
    predictor = Favourites(np.zeros((layers, experts)))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, period=1, slack=0.3, policy="lru")
    _run_with_the_worst(model, predictor, PATIENCE + 1)
    predictor.scores = -predictor.scores
    assert model.emoe.stats()["prediction"]["tasks"]["any"]["off"]
    with caplog.at_level(logging.INFO, logger="emoe"):
        for _ in range(2 * PATIENCE):
            _run_token_by_token(model)
    assert model.emoe.stats()["prediction"]["tasks"]["any"]["off"] == ""
    assert any("a base set is kept for task 'any' again" in record.message for record in caplog.records)
    _run(model, 0)
    assert all(model.emoe.cache.protected(layer) for layer in range(layers))


def test_a_task_that_the_predictor_does_not_know_is_left_to_the_policy(model):
    predictor = Favourites(_scores(model, [1]), names=("code",))
    emoe.wrap(model, memory_budget=0.5, predictor=predictor, slack=0.3)
    _run(model, 0, task="code")
    assert model.emoe.cache.protected(0) == {1}
    _run(model, 0, task="poem")
    assert not model.emoe.cache.protected(0)
    assert model.emoe.stats()["prediction"]["tasks"]["unknown"]["off"] == "the predictor does not know the task"
    _run(model, 0, task="code")
    assert model.emoe.cache.protected(0) == {1}


def test_a_layer_with_no_more_slots_than_slack_has_no_base_set(model, caplog):
    with caplog.at_level(logging.WARNING, logger="emoe"):
        emoe.wrap(model, memory_budget=0.25, predictor="recent")
    assert model.emoe.stats()["prediction"]["base"] == 0
    assert any("slack" in record.message for record in caplog.records)
    for seed in range(3):
        _run(model, seed)
    model.emoe.check_integrity()


class Prophet:
    """Names, for the layer after, what the test says."""

    def __init__(self, scores):
        self.scores = scores

    def next_layer(self, layer, given):
        return self.scores[layer + 1]


def test_prefetch_for_the_next_layer_is_counted_as_used(model):
    emoe.wrap(model, memory_budget=0.5, prefetch=Prophet(_scores(model, [0, 1, 2, 3])))
    for seed in range(3):
        _run(model, seed)
    stats = model.emoe.stats()
    assert stats["prefetch_hits"] > 0
    assert stats["prediction"]["next_layer"] == "on"


def test_prefetch_that_is_not_used_switches_itself_off(model, caplog, monkeypatch):
    from emoe.slots import next_layer

    monkeypatch.setattr(next_layer, "WINDOW", 16)
    layers, experts = _shape(model)
    emoe.wrap(model, memory_budget=0.5, prefetch=Prophet(np.zeros((layers, experts))))
    ahead = model.emoe.base._next_layer
    ahead._judged = type(ahead._judged)(maxlen=16)
    with caplog.at_level(logging.WARNING, logger="emoe"):
        for seed in range(40):
            ids = _ids(seed, 1)
            ahead._predictor.scores = -np.tile(_used(model, ids), (layers, 1))
            with torch.no_grad():
                model(ids)
            if model.emoe.stats()["prediction"]["next_layer"] == "off":
                break
    assert model.emoe.stats()["prediction"]["next_layer"] == "off"
    assert any("prefetch" in record.message for record in caplog.records)


def _picks(model, ids):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with model.emoe.record(Path(folder) / "picks.npz") as recorder:
            model(ids)
        return recorder.trace().experts


def _used(model, ids):
    picks = _picks(model, ids)
    return np.bincount(picks[picks >= 0].ravel(), minlength=model.emoe.layers[0].num_experts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"predictor": "psychic"}, "recent"),
        ({"predictor": object()}, "rank"),
        ({"predictor": "recent", "period": 0}, "adaptive"),
        ({"predictor": "recent", "slack": 0.0}, "slack"),
        ({"predictor": "recent", "period": True}, "period=True"),
        ({"predictor": "recent", "slack": "half"}, "slack='half'"),
        ({"prefetch": "everything"}, "look-ahead"),
        ({"prefetch": object()}, "next_layer"),
        ({"sensitivity": 3}, "insensitive"),
        ({"sensitivity": "nowhere.json"}, "emoe profile sensitivity"),
    ],
)
def test_wrong_options_name_the_value_and_the_choices(model, options, words):
    with pytest.raises(ConfigError, match=words):
        emoe.wrap(model, memory_budget=0.5, **options)
    assert not getattr(model, "emoe", None)
    with torch.no_grad():
        model(_ids(0))


def test_a_file_that_predicts_no_next_layer_is_named_with_its_kind_and_the_kinds_that_do(model, tmp_path):
    path = tmp_path / "table.safetensors"
    TaskTable(np.ones((1, 2, 4), dtype=np.float32), ("code",)).save(path)
    with pytest.raises(ConfigError, match=r"table\.safetensors'.* 'task-table'.*: across-layers; 'look-ahead'"):
        emoe.wrap(model, memory_budget=0.5, prefetch=str(path))
    path = tmp_path / "across.safetensors"
    AcrossLayers(np.ones((1, 4, 4), dtype=np.float32), np.ones((2, 4), dtype=np.float32)).save(path)
    with pytest.raises(ConfigError, match=r"across\.safetensors' scores \[2, 4\].*this model has \[2, 8\]"):
        emoe.wrap(model, memory_budget=0.5, prefetch=path)


def test_a_predictor_of_another_shape_is_refused(model):
    with pytest.raises(ConfigError, match="scores"):
        emoe.wrap(model, memory_budget=0.5, predictor=Favourites(np.ones((3, 5))))


def test_a_protected_expert_leaves_only_where_nothing_else_can():
    cache = CacheManager([3])
    for expert in (0, 1, 2):
        cache.admit(0, expert)
        cache.ready(0, expert)
    cache.protect(0, [0, 1])
    assert cache.admit(0, 3).evicted == 2
    cache.ready(0, 3)
    cache.hold(0, 3)
    assert cache.admit(0, 4).evicted == 0


class TestLoadScore:
    table = TaskTable(np.array([[[3.0, 1.0]], [[0.0, 2.0]]]), ("code", "talk"))

    def test_it_sums_frequency_times_tokens(self):
        score = load_score(self.table, [Expected(0, 10), Expected(1, 100), Expected(0, 5)])
        assert score.tolist() == [[45.0, 215.0]]

    def test_a_task_counts_nothing_where_it_is_insensitive(self):
        score = load_score(self.table, [Expected(1, 100), Expected(0, 1)], {1: np.array([True])})
        assert score.tolist() == [[3.0, 1.0]]

    def test_a_layer_in_which_nobody_counts_is_zero(self):
        score = load_score(self.table, [Expected(0, 1)], {0: np.array([True])})
        assert score.tolist() == [[0.0, 0.0]]

    def test_the_predictor_stands_at_the_last_request_afterwards(self):
        load_score(self.table, [Expected(0, 1), Expected(1, 1), Expected(0, 1)])
        assert self.table.rank().tolist() == [[3.0, 1.0]]
