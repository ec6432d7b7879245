"""Sensitivity: the profile's arithmetic, progressive random routing on tiny models, probes, and the online estimate."""

from __future__ import annotations

import json
import math
from pathlib import Path

import families
import numpy as np
import pytest
import torch

import emoe
from emoe import cli, sensitivity
from emoe.errors import CheckpointError, ConfigError
from emoe.routing import find_routers
from emoe.sensitivity import OnlineSensitivity, Sample, SensitivityProfile, measure, progressive
from emoe.sensitivity.online import spearman

PROMPTS = Path(__file__).parents[1] / "data" / "tasks.jsonl"
FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "phimoe")


def profile_of(*rows, threshold=0.85):
    tasks = tuple("abcdef"[: len(rows)])
    return SensitivityProfile(tasks, len(rows[0]) - 1, np.array(rows, dtype=float), threshold)


@pytest.fixture(scope="module")
def model():
    return families.build("olmoe").eval()


def samples(lengths=(5, 9, 7, 5), tasks=("a", "b")):
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(
            tasks[number % len(tasks)], tuple(torch.randint(3, families.VOCAB, (length,), generator=generator).tolist())
        )
        for number, length in enumerate(lengths)
    ]


# The profile


def test_layers_are_insensitive_up_to_the_first_one_that_falls_below_the_threshold():
    profile = profile_of([1, 0.9, 0.8, 0.9, 0.9], [1, 1, 1, 0.9, 0.85], [1, 0.5, 1, 1, 1])
    assert profile.insensitive("a").tolist() == [True, False, False, False]
    assert profile.insensitive("b").tolist() == [True, True, True, True]
    assert profile.insensitive("c").tolist() == [False] * 4
    assert profile.at(0.95).insensitive("b").tolist() == [True, True, False, False]


def test_a_task_that_was_not_profiled_has_no_insensitive_layers():
    profile = profile_of([1, 1, 1])
    assert not profile.insensitive("z").any()
    assert not profile.insensitive(None).any()
    with pytest.raises(ConfigError, match="profiled were: a"):
        profile.sensitivity("z")


def test_sensitivity_is_the_mean_loss_and_ranks_tasks():
    profile = profile_of([1, 0.9, 0.7], [1, 1, 1], [1, 0.5, 0.5])
    assert profile.sensitivity("a") == pytest.approx(0.2)
    assert profile.sensitivity("b") == 0
    assert profile.rank() == ["c", "a", "b"]


def test_a_suggested_bias_falls_as_sensitivity_rises_and_unknown_tasks_get_the_least():
    profile = profile_of([1, 0.9, 0.9], [1, 0.8, 0.8], [1, 0.6, 0.6])
    assert profile.bias("a", 0.8) == pytest.approx(0.8)
    assert profile.bias("b", 0.8) == pytest.approx(0.4)
    assert profile.bias("c", 0.8) == pytest.approx(0.2)
    assert profile.bias(None, 0.8) == profile.bias("c", 0.8)
    assert profile_of([1, 1]).bias("a", 0.5) == 0.5
    for most in (-1, math.inf, math.nan):
        with pytest.raises(ConfigError, match="most="):
            profile.bias("a", most)


def test_a_saved_profile_loads_as_it_was(tmp_path):
    profile = SensitivityProfile(
        ("x", "y"), 2, np.array([[1, 0.9, 0.8], [1, 0.7, 0.6]]), 0.8, np.full((2, 3), 0.01), (3, 4), {"seed": 5}
    )
    loaded = emoe.SensitivityProfile.load(profile.save(tmp_path / "s.json"))
    assert loaded.to_dict() == profile.to_dict()
    assert (loaded.similarity == profile.similarity).all()
    assert list(tmp_path.iterdir()) == [tmp_path / "s.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "emoe-sensitivity", "version": 99}', '{"format": "other", "version": 1}']
)
def test_a_file_that_is_no_profile_is_refused_by_name(text, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"bad\.json"):
        SensitivityProfile.load(tmp_path / "bad.json")


def test_a_profile_of_the_wrong_shape_or_threshold_is_refused():
    with pytest.raises(ConfigError, match=r"\[1, 3\]"):
        SensitivityProfile(("a",), 3, np.ones((1, 3)))
    with pytest.raises(ConfigError, match="not a number"):
        profile_of([1, math.nan])
    with pytest.raises(ConfigError, match="threshold=2"):
        profile_of([1, 1], threshold=2)


# Measuring it


@pytest.mark.parametrize("family", FAMILIES)
def test_untouched_outputs_are_wholly_similar_and_random_routing_lowers_similarity(family):
    profile = measure(families.build(family).eval(), samples(), new_tokens=6)
    assert profile.similarity[:, 0] == pytest.approx(1, abs=1e-5)
    assert (profile.similarity[:, -1] < 0.999).all()
    assert ((profile.similarity > 0) & (profile.similarity <= 1)).all()
    assert profile.tasks == ("a", "b")
    assert profile.prompts == (2, 2)


def test_measuring_is_deterministic_and_leaves_no_hooks(model):
    first, second = (measure(model, samples(), new_tokens=4) for _ in range(2))
    assert (first.similarity == second.similarity).all()
    assert not any(site.module._forward_hooks for site in find_routers(model))


def test_similarity_along_a_given_answer_needs_no_generation(model, monkeypatch):
    own = measure(model, samples(), new_tokens=4)
    answered = [
        Sample(sample.task, sample.input_ids, tuple(row[len(sample.input_ids) :]))
        for sample in samples()
        for row, _ in [progressive._answered(model, sample, 4)]
    ]
    monkeypatch.setattr(model, "generate", None)
    given = measure(model, answered, new_tokens=4)
    assert (given.similarity == own.similarity).all()
    assert given.prompts == own.prompts


def test_batches_and_padding_change_nothing_but_rounding_where_nothing_is_random(model):
    rows = [list(sample.input_ids) for sample in samples()]
    together = progressive.next_token_probabilities(model, rows, [2, 3, 4, 1])
    for row, start, found in zip(rows, [2, 3, 4, 1], together, strict=True):
        alone = progressive.next_token_probabilities(model, [row], [start])[0]
        assert alone.shape == found.shape == (len(row) - 1 - start, families.VOCAB)
        assert torch.allclose(alone, found, atol=1e-5)


def test_a_stride_measures_some_depths_and_draws_lines_between(model):
    every = measure(model, samples(), new_tokens=4)
    some = measure(model, samples(), new_tokens=4, stride=2)
    L = every.layers
    assert some.meta["depths"] == sorted({*range(0, L, 2), L})
    assert some.similarity[:, some.meta["depths"]] == pytest.approx(every.similarity[:, some.meta["depths"]])
    assert some.similarity[:, 1] == pytest.approx((some.similarity[:, 0] + some.similarity[:, 2]) / 2)


def test_random_layers_draw_distinct_experts_in_the_first_layers_only(model):
    sites = find_routers(model)
    seen = {}
    handles = []
    with progressive.random_layers(sites, 2, seed=3):
        for site in sites:
            handles.append(
                site.module.register_forward_hook(
                    lambda _, __, output, layer=site.layer: seen.__setitem__(layer, output[2].clone())
                )
            )
        model(torch.arange(3, 43).unsqueeze(0))
    for handle in handles:
        handle.remove()
    own = {}
    for site in sites:
        handles.append(
            site.module.register_forward_hook(lambda _, __, output, layer=site.layer: own.__setitem__(layer, output[2]))
        )
    model(torch.arange(3, 43).unsqueeze(0))
    for handle in handles:
        handle.remove()
    assert (seen[0] != own[0]).any()
    for layer in (0, 1):
        assert all(len(set(row)) == len(row) for row in seen[layer].tolist())
    assert len(seen[0].unique()) == families.EXPERTS


def test_options_out_of_range_and_empty_samples_are_refused(model):
    for wrong in ({"new_tokens": 0}, {"stride": 0}, {"batch": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            measure(model, samples(), **wrong)
    for none in ([], [Sample("a", ())]):
        with pytest.raises(ConfigError, match="at least one token"):
            measure(model, none)


def test_a_model_in_a_budget_has_the_profile_of_the_whole_model(checkpoint):
    whole = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0)
    small = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.4)
    first, second = (measure(each, samples(), new_tokens=4) for each in (whole, small))
    assert first.similarity == pytest.approx(second.similarity, abs=1e-4)
    for each in (whole, small):
        each.emoe.check_integrity()
        each.emoe.close(restore=False)


# Probes


def test_a_probe_of_a_plain_model_sees_mass_and_change_and_leaves_no_hooks(model):
    seen = sensitivity.probe(model, list(range(3, 23)), "a", prompt_tokens=8)
    assert 0 < seen.substituted_mass < 1
    assert 0 < seen.logit_change < 1
    assert seen.tokens == 12
    assert seen.task == "a"
    assert not any(site.module._forward_hooks for site in find_routers(model))


def test_more_resident_experts_mean_less_mass_and_less_change(model):
    ids = list(range(3, 43))
    few, many = (sensitivity.probe(model, ids, share=share) for share in (0.4, 0.9))
    assert many.substituted_mass < few.substituted_mass
    assert many.logit_change < few.logit_change


def test_the_nth_probe_of_every_task_draws_the_same_residency(model):
    prober = sensitivity.Prober(model)
    ids = list(range(3, 33))
    first = [prober(ids, task).substituted_mass for task in ("a", "a", "b", "b")]
    assert first[:2] == first[2:]
    assert first[0] != first[1]


@pytest.mark.parametrize("mode", ["resident", "biased"])
def test_a_probe_of_a_model_in_a_mode_uses_that_mode_and_puts_it_back(checkpoint, mode):
    options = {"bias": 0.5} if mode == "biased" else {}
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, routing=mode, **options)
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        model(ids)
        hooks = [len(site.module._forward_hooks) for site in model.emoe.routing.sites]
        seen = sensitivity.probe(model, ids, "a", prompt_tokens=20)
        after = [len(site.module._forward_hooks) for site in model.emoe.routing.sites]
    assert hooks == after
    assert seen.substituted_mass > 0
    assert seen.logit_change > 0
    assert model.emoe.stats()["routing"]["tasks"]["a"]["rows"] == 40 * len(hooks)
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


def test_a_probe_of_an_exact_model_draws_a_residency_and_leaves_the_mode_exact(checkpoint):
    small = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    ids = list(range(3, 33))
    found, whole = (
        sensitivity.probe(each, ids, "a", prompt_tokens=10) for each in (small, families.build("olmoe").eval())
    )
    assert found.substituted_mass == pytest.approx(whole.substituted_mass, abs=1e-3)
    assert found.logit_change == pytest.approx(whole.logit_change, abs=1e-3)
    assert small.emoe.stats()["routing"]["mode"] == "exact"
    small.emoe.check_integrity()
    small.emoe.close(restore=False)


def test_a_probe_without_tokens_after_the_prompt_is_refused(model):
    for ids, prompt in (([3, 4, 5], 3), ([3], 1), ([3, 4], 0)):
        with pytest.raises(ConfigError, match="prompt_tokens"):
            sensitivity.probe(model, ids, prompt_tokens=prompt)
    with pytest.raises(ConfigError, match="share=1"):
        sensitivity.probe(model, [3, 4], share=1.0)


# The online estimate


def observed(slopes, per_task=30, noise=0.02, seed=0):
    """Requests of tasks whose output changes in proportion to the mass, each by its own slope, with noise."""
    generator = np.random.default_rng(seed)
    online = OnlineSensitivity()
    for _ in range(per_task):
        for task, slope in slopes.items():
            mass = generator.uniform(0.05, 0.5)
            online.observe(task, mass, max(0.0, slope * mass + generator.normal(0, noise)))
    return online


def test_the_estimate_finds_each_tasks_slope_within_a_few_standard_errors():
    slopes = {"a": 0.2, "b": 0.5, "c": 0.8}
    online = observed(slopes)
    for task, slope in slopes.items():
        value, error, n = online.sensitivity(task)
        assert abs(value - slope) < 4 * error
        assert 0 < error < 0.05
        assert n == 30
    assert online.rank() == ["c", "b", "a"]


def test_the_stated_error_is_that_of_repeated_estimates():
    estimates = [observed({"a": 0.3, "b": 0.6}, per_task=8, seed=seed).sensitivity("a") for seed in range(200)]
    spread = np.std([each.value for each in estimates])
    stated = np.mean([each.error for each in estimates])
    assert 0.6 * spread < stated < 1.6 * spread


def test_a_task_seen_once_is_drawn_toward_the_others_more_than_one_seen_often():
    online = observed({"a": 0.3, "b": 0.4, "c": 0.35}, noise=0.05)
    online.observe("new", 0.3, 0.3 * 0.9)
    new = online.sensitivity("new")
    assert 0.3 < new.value < 0.9
    assert new.error > online.sensitivity("a").error
    assert new.observed == 1


def test_an_unseen_task_has_the_mean_of_all_and_nothing_seen_has_no_value():
    online = observed({"a": 0.2, "b": 0.6})
    value, error, n = online.sensitivity("z")
    assert 0.2 < value < 0.6
    assert error > online.sensitivity("a").error
    assert n == 0
    nothing = OnlineSensitivity().sensitivity("a")
    assert math.isnan(nothing.value)
    assert nothing.error == math.inf
    with pytest.raises(ConfigError, match="no task's sensitivity"):
        OnlineSensitivity().bias("a", 0.5)


def test_one_observation_of_one_task_is_taken_as_it_is():
    online = OnlineSensitivity()
    online.observe("a", 0.5, 0.2)
    value, error, n = online.sensitivity("a")
    assert value == pytest.approx(0.4)
    assert 0 < error < math.inf
    assert n == 1


def test_requests_without_substitution_say_nothing_and_impossible_values_are_refused():
    online = OnlineSensitivity()
    online.observe("a", 0.0, 0.0)
    assert online.tasks == []
    for mass, change in ((-0.1, 0), (1.1, 0), (0.5, -1), (0.5, math.nan), (math.nan, 0)):
        with pytest.raises(ConfigError):
            online.observe("a", mass, change)


def test_the_stated_share_of_each_tasks_requests_is_probed_beginning_with_the_first():
    online = OnlineSensitivity(share=0.25)
    assert [online.due("a") for _ in range(9)] == [True, False, False, False, True, False, False, False, True]
    assert online.due("b")
    assert all(OnlineSensitivity(share=1.0).due("a") for _ in range(3))
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match="share="):
            OnlineSensitivity(share=share)


def test_a_bias_from_the_online_estimate_is_least_for_the_most_sensitive_task():
    online = observed({"a": 0.2, "b": 0.8})
    assert online.bias("a", 0.6) == pytest.approx(0.6)
    assert online.bias("b", 0.6) < 0.2
    assert json.loads(json.dumps(online.to_dict()))["a"]["observed"] == 30


def test_spearman_is_one_for_the_same_order_and_shares_ranks_of_ties():
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(spearman([1, 1], [1, 2]))


# The command


def test_the_command_profiles_the_tasks_asked_for_and_writes_what_it_prints(model_folder, tmp_path, capsys):
    out = tmp_path / "s.json"
    words = [
        "profile", "sensitivity", "--model", model_folder, "--memory-budget", "1.0", "--prompts", PROMPTS, "--out", out,
        "--tasks", "math,code", "--prompts-per-task", 2, "--new-tokens", 3, "--stride", 2, "--threshold", 0.9,
    ]  # fmt: skip
    assert cli.main([*map(str, words), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    profile = SensitivityProfile.load(out)
    assert profile.tasks == ("code", "math")
    assert profile.prompts == (2, 2)
    assert profile.threshold == 0.9
    assert printed["tasks"] == profile.to_dict()["tasks"]
    assert cli.main([*map(str, words)]) == 0
    assert "insensitive" in capsys.readouterr().out
