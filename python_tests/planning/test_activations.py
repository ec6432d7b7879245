"""Activations in a plan: bytes of a chunk, which chunk fits, and that the budget has no say in it."""

from __future__ import annotations

import pytest
import torch
from transformers import OlmoeConfig

import emoe
from emoe.compute import cpu
from emoe.errors import BudgetError, ConfigError
from emoe.planning import activations

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config alone: plans need no weights."""
    config = OlmoeConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=512, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, num_experts=8, num_experts_per_tok=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        dtype="bfloat16", max_position_embeddings=8192,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("activations")
    config.save_pretrained(path)
    return path


def plan(folder, **options):
    return emoe.plan(folder, options.pop("budget", 0.5), calibrate=False, **options)


def test_auto_takes_the_longest_chunk_that_fits_its_allowance(folder):
    made = plan(folder, context=4096)
    assert made.model_bytes * activations.ALLOWANCE_SHARE < activations.ALLOWANCE_BYTES == 64 * MIB
    assert made.activation_bytes <= 64 * MIB
    longer = plan(folder, context=4096, prefill_chunk=2 * made.prefill_chunk)
    assert longer.activation_bytes > 64 * MIB
    assert made.prefill_chunk < 4096


def test_a_context_that_fits_is_one_chunk(folder):
    assert plan(folder, context=100).prefill_chunk == 100


def test_a_batch_is_computed_in_shorter_chunks(folder):
    one, eight = plan(folder, context=4096), plan(folder, context=4096, batch=8)
    assert eight.prefill_chunk < one.prefill_chunk


def test_the_chunk_is_the_same_in_every_budget(folder):
    chunks = {plan(folder, context=4096, budget=each).prefill_chunk for each in (0.1, 0.5, 1.0, "2GiB", "9GiB")}
    assert len(chunks) == 1


@pytest.mark.parametrize("chunk", [64, 256])
def test_activations_are_in_the_budget_and_grow_with_the_chunk(chunk, folder):
    small, large = (plan(folder, context=2048, prefill_chunk=each, budget="150MiB") for each in (chunk, 2 * chunk))
    assert small.activation_bytes < large.activation_bytes
    for each in (small, large):
        parts = each.non_expert_bytes + each.slab_bytes + each.staging_bytes + each.kv_bytes + each.activation_bytes
        assert parts == each.planned_bytes <= each.budget_bytes == 150 * MIB
        assert each.to_dict()["activation_bytes"] == each.activation_bytes


def test_no_chunk_counts_the_whole_context(folder):
    whole = plan(folder, context=4096, prefill_chunk=None)
    assert whole.prefill_chunk is None
    assert whole.activation_bytes == plan(folder, context=4096, prefill_chunk=4096).activation_bytes
    assert plan(folder, context=4096, prefill_chunk=0) == whole


def test_logits_of_one_row_are_counted_not_of_a_chunk(folder):
    small, large = (plan(folder, context=2048, prefill_chunk=1024, vocab_size=each) for each in (512, 100_512))
    assert large.activation_bytes - small.activation_bytes < 20 * 100_000


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "qwen3_next", "inkling2_text", "exaone_moe"])
def test_a_cache_that_is_made_longer_counts_as_one_that_has_seen_the_tokens(name, checkpoint, monkeypatch):
    made = [plan(checkpoint(name), context=300, prefill_chunk=40, batch=2)]
    monkeypatch.setattr(activations, "_SEED", 1 << 20)
    made.append(plan(checkpoint(name), context=300, prefill_chunk=40, batch=2))
    assert made[0].activation_bytes == made[1].activation_bytes


@pytest.mark.parametrize(("name", "steps", "chunk"), [("qwen3_next", "_LOOPED", 500), ("jamba", "_LOOPED_WHOLE", None)])
def test_what_loops_over_tokens_is_reckoned_from_shorter_runs(name, steps, chunk, checkpoint, monkeypatch):
    options = {"context": 600, "prefill_chunk": chunk, "batch": 2}
    monkeypatch.setattr(activations, steps, 64)
    reckoned = plan(checkpoint(name), **options).activation_bytes
    monkeypatch.setattr(activations, steps, 600)
    run = plan(checkpoint(name), **options).activation_bytes
    assert run * 0.95 < reckoned < run * 1.2


def test_a_budget_too_small_says_what_the_shortest_chunk_saves(folder):
    with pytest.raises(BudgetError, match=r"prefill_chunk=32 takes .* less") as caught:
        plan(folder, context=4096, budget="64MiB")
    assert plan(folder, context=4096, prefill_chunk=32).smallest_budget < caught.value.needed


def test_a_mask_of_a_batch_is_counted(folder):
    """[B, 1, T, T] of bools and of numbers is more than all else at 4096 tokens."""
    whole = plan(folder, context=4096, batch=8, prefill_chunk=None)
    assert whole.activation_bytes > 8 * 4096 * 4096 * (1 + 2)


@pytest.mark.parametrize("value", ["some", "8", -1, 1.5, True, [4], float("nan")])
def test_what_is_no_chunk_is_refused_with_the_choices(value, folder):
    with pytest.raises(ConfigError, match=r"prefill_chunk=.*'auto', a number of tokens"):
        plan(folder, prefill_chunk=value)


def test_numbers_of_other_libraries_are_chunks(folder):
    import numpy as np

    assert plan(folder, prefill_chunk=np.int64(64)).prefill_chunk == 64


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma4_text", "hy_v4"])
def test_activations_are_measured_on_the_structure_of_every_kind_of_attention(name, checkpoint):
    made = plan(checkpoint(name), context=64, dtype=torch.float32)
    assert made.activation_bytes > 0
    assert "activations estimated from the config" not in made.notes


def test_a_structure_that_does_not_run_on_the_meta_device_is_estimated_and_the_plan_says_so(checkpoint, monkeypatch):
    def fail(model):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(activations, "_structure", fail)
    made = plan(checkpoint("olmoe"), context=64)
    assert "activations estimated from the config" in made.notes
    assert made.activation_bytes > 0


def test_the_outputs_of_experts_are_counted_as_they_are_computed():
    assert activations._PAIR_BYTES == cpu.PAIR_BYTES
