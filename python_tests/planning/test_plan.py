"""Plans: sums that hold, budgets that are kept, slots that are divided fairly."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, OlmoeConfig

import emoe
from emoe import errors
from emoe.errors import BudgetError
from emoe.options import parse_budget
from emoe.planning import bandwidth, kv_cache
from emoe.planning import plan as planning

MIB = 1 << 20


@given(
    experts=st.lists(st.integers(1, 64), min_size=1, max_size=12),
    extra=st.integers(0, 400),
)
def test_slots_are_divided_evenly_and_none_is_lost(experts, extra):
    total = len(experts) + extra
    slots = planning.divide_slots(total, tuple(experts))
    assert sum(slots) == min(total, sum(experts))
    assert all(1 <= have <= count for have, count in zip(slots, experts, strict=True))
    unfilled = [have for have, count in zip(slots, experts, strict=True) if have < count]
    assert not unfilled or max(unfilled) - min(unfilled) <= 1


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_bytes_of_a_plan_are_those_of_the_loaded_model(name, checkpoint):
    plan = emoe.plan(checkpoint(name), 0.5, dtype=torch.float32, calibrate=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    assert plan.model_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "jamba", "gpt_oss", "minimax"])
def test_the_kv_cache_of_a_plan_is_what_generation_keeps(name, checkpoint):
    plan = emoe.plan(checkpoint(name), 0.5, dtype=torch.float32, context=100, batch=2, calibrate=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(torch.zeros((2, 100), dtype=torch.long), use_cache=True).past_key_values
    assert plan.kv_bytes == sum(t.numel() * t.element_size() for t in kv_cache.tensors_of(cache))


def test_a_plan_never_exceeds_its_budget_and_uses_it_up(checkpoint):
    smallest = emoe.plan(checkpoint("olmoe"), 1.0, calibrate=False).smallest_budget
    full = emoe.plan(checkpoint("olmoe"), 1.0, calibrate=False).planned_bytes
    for budget in range(smallest, full, max(1, (full - smallest) // 7)):
        plan = emoe.plan(checkpoint("olmoe"), budget, calibrate=False)
        assert budget - plan.slot_bytes < plan.planned_bytes <= budget
        assert plan.budget_bytes == budget


def test_a_fraction_is_a_share_of_the_routed_experts(checkpoint):
    plan = emoe.plan(checkpoint("olmoe"), 0.25, calibrate=False)
    assert plan.resident_share == 0.25
    assert plan.budget_bytes == plan.planned_bytes


def test_fewer_slots_than_a_token_needs_are_warned_of_beforehand(checkpoint):
    plan = emoe.plan(checkpoint("olmoe"), 1e-6, calibrate=False)
    assert set(plan.slots_per_layer) == {1}
    assert any("every token reloads" in warning for warning in plan.warnings)


def test_the_forecast_grows_with_the_budget_and_with_recurring_routing(checkpoint):
    low = emoe.plan(checkpoint("olmoe"), 0.25)
    high = emoe.plan(checkpoint("olmoe"), 0.75)
    assert low.tokens_per_second and high.tokens_per_second
    assert low.tokens_per_second[0] < low.tokens_per_second[1]
    assert low.tokens_per_second[0] < high.tokens_per_second[0]
    json.dumps(low.to_dict())


def test_rates_are_kept_and_measured_again_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "_memory_rate", iter([1e9, 2e9]).__next__)
    assert bandwidth.measure(None).memory == 1e9
    assert bandwidth.measure(None).memory == 1e9
    assert bandwidth.measure(None, refresh=True).memory == 2e9


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.gguf"])
def test_a_rate_that_was_assumed_is_not_kept_for_a_folder_with_weights(tmp_path, monkeypatch, name):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config").mkdir()
    assert bandwidth.measure(tmp_path / "config").note.endswith("disk not measured: 1 GB/s assumed")
    monkeypatch.setattr(bandwidth, "_seconds", lambda action: (action(), 0.5)[1])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(bytes(4 * bandwidth._BLOCK))
    assert bandwidth.measure(tmp_path / "model").disk == 4 * bandwidth._BLOCK / 0.5


def test_a_damaged_cache_of_rates_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    (tmp_path / "bandwidth.json").write_text("{half")
    assert bandwidth.measure(None).memory > 0


def test_a_budget_below_the_smallest_is_refused_with_both_values(checkpoint):
    with pytest.raises(errors.BudgetError) as caught:
        emoe.plan(checkpoint("olmoe"), 1000, calibrate=False)
    assert caught.value.budget == 1000
    assert caught.value.needed and str(caught.value.needed) in str(caught.value)


def test_rates_are_measured_and_not_cached_where_the_cache_folder_cannot_be_written(
    checkpoint, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    read_only = tmp_path / "read-only"
    (read_only / "bandwidth.json").mkdir(parents=True)  # nobody, not even root, puts a file in a folder's place
    for folder in ("/proc/nowhere", tmp_path / "file", read_only):
        monkeypatch.setenv("EMOE_CACHE", str(folder))
        caplog.clear()
        assert emoe.plan(checkpoint("olmoe"), 0.5).tokens_per_second is not None
        (said,) = [record.message for record in caplog.records if "not kept" in record.message]
        assert str(folder) in said
    assert [path.name for path in read_only.iterdir()] == ["bandwidth.json"]


def test_auto_with_nothing_left_says_what_was_free_and_reserved_and_what_to_ask_for(checkpoint):
    with pytest.raises(errors.BudgetError, match=r"130\.0 MiB are free, 128\.0 MiB stay reserved") as caught:
        emoe.plan(checkpoint("olmoe"), free=lambda: 130 << 20)
    assert f"memory_budget={caught.value.needed} takes of the reserve" in str(caught.value)
    assert emoe.plan(checkpoint("olmoe"), caught.value.needed, calibrate=False).budget_bytes == caught.value.needed


@pytest.mark.parametrize(
    ("free", "reserved"),
    [("512.0 MiB", "128.0 MiB"), ("4.0 GiB", "512.0 MiB"), ("9.0 GiB", "1.0 GiB"), ("20.0 GiB", "2.0 GiB")],
)
def test_auto_reserves_a_tenth_of_what_is_free_or_1_gib_and_an_eighth_where_little_is(checkpoint, free, reserved):
    nbytes = parse_budget(free.replace(" ", "").replace(".0", ""), "free").nbytes
    plan = emoe.plan(checkpoint("olmoe"), calibrate=False, free=lambda: nbytes)
    assert any(note.endswith(f"{free} are free, {reserved} stay reserved") for note in plan.notes)


def large(tmp_path, **values):
    config = OlmoeConfig(
        vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_experts=64, num_experts_per_tok=2, dtype="bfloat16", **values,
    )  # fmt: skip
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("budget", "libraries"), [(100, 0), (128, 0), (129, 1), (200, 72), (256, 128), (257, 128), (2048, 128)]
)
def test_what_exceeds_128_mib_of_a_budget_goes_to_libraries_first(budget, libraries, tmp_path):
    plan = emoe.plan(large(tmp_path), f"{budget}MiB", calibrate=False)
    assert plan.library_bytes == libraries * MIB == plan.to_dict()["library_bytes"]
    assert plan.planned_bytes + plan.library_bytes <= plan.budget_bytes == budget * MIB
    assert plan.resident_share == 1 or plan.budget_bytes - plan.planned_bytes - plan.library_bytes < plan.slot_bytes


def test_more_budget_never_makes_fewer_slots(tmp_path):
    folder = large(tmp_path)
    shares = [emoe.plan(folder, f"{each}MiB", calibrate=False).resident_share for each in range(100, 500, 25)]
    assert shares == sorted(shares) and shares[-1] > shares[0]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_a_share_names_the_budget_that_gives_the_same_slots(share, tmp_path):
    folder = large(tmp_path)
    plan = emoe.plan(folder, share, calibrate=False)
    assert plan.budget_bytes == plan.planned_bytes + plan.library_bytes
    assert plan.library_bytes == (128 * MIB if plan.planned_bytes > 128 * MIB else 0)
    assert emoe.plan(folder, plan.budget_bytes, calibrate=False).slots_per_layer == plan.slots_per_layer


def test_the_smallest_budget_leaves_libraries_theirs(tmp_path):
    folder = large(tmp_path)
    with pytest.raises(BudgetError, match=r"beside 128\.0 MiB for torch and Transformers") as caught:
        emoe.plan(folder, "200MiB", context=16384, calibrate=False)
    plan = emoe.plan(folder, caught.value.needed, context=16384, calibrate=False)
    assert plan.library_bytes == 128 * MIB and set(plan.slots_per_layer) == {1}
    with pytest.raises(BudgetError):
        emoe.plan(folder, caught.value.needed - 1, context=16384, calibrate=False)


def test_auto_takes_no_more_than_is_free_with_libraries(tmp_path):
    plan = emoe.plan(large(tmp_path), "auto", calibrate=False, free=lambda: 428 * MIB)
    assert 256 * MIB < plan.planned_bytes + plan.library_bytes == plan.budget_bytes <= 300 * MIB


def test_libraries_are_not_in_the_memory_of_a_gpu(tmp_path):
    plan = emoe.plan(large(tmp_path), "1GiB", device="cuda", calibrate=False)
    assert plan.library_bytes == 0


@pytest.mark.parametrize("way", [emoe.plan, emoe.from_pretrained])
@pytest.mark.parametrize(
    ("name", "told"), [("nope", "only possible arguments"), ("flash_attention_2", "be installed|not available")]
)
def test_attention_that_cannot_run_is_refused_before_anything_is_loaded(way, name, told, checkpoint):
    with pytest.raises(errors.ConfigError, match=f"attn_implementation='{name}': .*({told})"):
        way(checkpoint("olmoe"), memory_budget="1GiB", context=64, attn_implementation=name)
