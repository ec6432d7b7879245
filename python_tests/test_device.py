"""Models on the emulated device, end to end: the tokens of the CPU path, failures, misses left to the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import emoe
from emoe.cli.generate import load_tokenizer
from emoe.device import open_device
from emoe.errors import BackendUnavailable, BudgetError, ConfigError, ReadError, UnsupportedModelError

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, found_device):
    """Names of devices; on a machine with a GPU the same tests run there."""
    return found_device(request.param)


@pytest.fixture
def emulated(found_device):
    """The native module of the emulation."""
    return open_device(found_device("emulated")).module


@pytest.fixture
def prompt():
    return torch.arange(3, 15).view(1, -1)


def generate(model, prompt, n=4):
    return model.generate(prompt.to(model.device), max_new_tokens=n, do_sample=False, pad_token_id=0)[0].tolist()


@pytest.mark.parametrize("budget", [0.25, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_decode_on_the_device_gives_the_tokens_of_the_cpu(device, checkpoint, prompt, family, budget):
    folder = checkpoint(family)
    on_cpu = emoe.from_pretrained(folder, memory_budget=budget)
    expected, reference = generate(on_cpu, prompt), on_cpu(prompt).logits
    on_cpu.emoe.close(restore=False)
    model = emoe.from_pretrained(folder, memory_budget=budget, device=device)
    assert generate(model, prompt) == expected
    torch.testing.assert_close(model(prompt.to(model.device)).logits.cpu(), reference, rtol=1e-4, atol=1e-5)
    stats = model.emoe.stats()
    assert stats["device"].startswith(device)
    assert stats["kernels"] == {stats["device"]: len(model.emoe.layers)}
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


def test_resident_routing_on_the_device_gives_the_tokens_of_the_cpu(device, checkpoint, prompt):
    results = []
    for where in ("cpu", device):
        model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, routing="resident", device=where)
        results.append(generate(model, prompt))
        assert model.emoe.stats()["evictions"] == 0
        model.emoe.close(restore=False)
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["exact", "resident"])
def test_the_demo_model_with_a_quarter_of_its_experts_answers_on_the_device_as_on_the_cpu(device, demo_folder, routing):
    # Tokens that lead by more than 1 in the logits; other orders of summing move these by 0.3 in bfloat16.
    # 11 tokens go through the tiles kernels, those that follow through rows.
    tokenizer = load_tokenizer(str(demo_folder))
    prompt = tokenizer("1, 2, 3, 4,", return_tensors="pt").input_ids
    assert prompt.shape == (1, 11)
    answers = []
    for where in ("cpu", device):
        model = emoe.from_pretrained(demo_folder, memory_budget=0.25, routing=routing, device=where, context=64)
        assert model.emoe.plan.to_dict()["resident_share"] <= 0.25
        answers.append(tokenizer.decode(generate(model, prompt, 3)))
        assert model.emoe.stats()["kernels"].keys() == (
            {model.emoe.stats()["device"]} if where == device else {"native"}
        )
        model.emoe.close(restore=False)
    assert answers[0] == answers[1] == "1, 2, 3, 4, 5,"


def test_decode_on_the_device_is_bit_identical_between_budgets(device, checkpoint, prompt):
    results = []
    for budget in (0.01, 0.5, 1.0):
        model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=budget, device=device)
        results.append(model(prompt[:, :1].to(model.device)).logits)
        model.emoe.close(restore=False)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_small_pinned_store_reads_experts_again_and_a_large_one_does_not(device, checkpoint, prompt):
    reads = {}
    for pinned in ("tiny", None):
        options = {}
        if pinned:
            plan = emoe.plan(checkpoint("qwen3_moe"), 0.25, calibrate=False)
            options["pinned_memory"] = 3 * plan.slot_bytes
        model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.25, device=device, **options)
        generate(model, prompt)
        stats = model.emoe.stats()
        reads[pinned] = stats["host_misses"]
        experts = sum(model.emoe.plan.experts_per_layer)
        model.emoe.close(restore=False)
    assert reads[None] <= experts < reads["tiny"]


@pytest.mark.parametrize("miss", ["cpu", "auto"])
def test_misses_left_to_the_cpu_give_the_same_tokens(device, checkpoint, prompt, miss):
    folder = checkpoint("qwen3_moe")
    reference = emoe.from_pretrained(folder, memory_budget=0.25)
    expected = generate(reference, prompt)
    reference.emoe.close(restore=False)
    model = emoe.from_pretrained(folder, memory_budget=0.25, device=device, miss=miss)
    assert generate(model, prompt) == expected
    stats = model.emoe.stats()
    if miss == "cpu":
        assert stats["on_cpu"] > 0
        assert stats["evictions"] == 0
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


def test_wrap_on_the_device_and_back_restores_the_model(device, checkpoint, prompt):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"))
    expected = generate(model, prompt)
    emoe.wrap(model, memory_budget=0.5, device=device)
    assert generate(model, prompt) == expected
    model.emoe.close(restore=True)
    assert generate(model, prompt) == expected


def test_prefetched_experts_are_hits_on_the_device(device, checkpoint, prompt):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=1.0, device=device)
    loader = model.emoe.loader
    for layer in range(len(model.emoe.layers)):
        loader.prefetch(layer, list(range(model.emoe.layers[layer].num_experts)))
    expected = generate(model, prompt)
    stats = model.emoe.stats()
    assert stats["prefetch_hits"] > 0
    assert expected
    model.emoe.close(restore=False)


def test_long_prompts_run_in_parts(device, checkpoint):
    prompt = torch.arange(3, 43).view(1, -1)
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, device=device)
    whole = model(prompt.to(model.device)).logits
    for layer in model.emoe.layers:
        layer._on_device._pair_bytes = 1
    torch.testing.assert_close(model(prompt.to(model.device)).logits, whole, rtol=1e-4, atol=1e-5)
    model.emoe.close(restore=False)


def test_a_read_that_fails_raises_and_the_next_attempt_works(emulated, checkpoint, prompt, monkeypatch):
    make = emulated.make_reader
    model = None
    monkeypatch.setattr(emulated, "make_reader", lambda kind: emulated.FaultyReader(make(kind), fail_at=3))
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.25, device="emulated")
    with pytest.raises(ReadError):
        generate(model, prompt)
    model.emoe.check_integrity()
    assert len(generate(model, prompt)) == 16
    model.emoe.close(restore=False)


def test_device_memory_that_is_too_small_is_a_budget_error_and_everything_is_given_back(emulated, monkeypatch):
    monkeypatch.setenv("EMU_DEVICE_MIB", "1")
    device = emulated.CudaDevice(0)
    with pytest.raises(BudgetError, match="bytes on device 0, which has"):
        device.slab(1000, 1 << 20)


def test_stock_kernels_are_refused_on_a_device(device, checkpoint):
    with pytest.raises(ConfigError, match="runs on the CPU only"):
        emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, device=device, kernels="stock")


def test_a_family_without_native_kernels_is_refused_by_layer_and_reason(device, checkpoint):
    with pytest.raises(UnsupportedModelError, match="cannot be computed on "):
        emoe.from_pretrained(checkpoint("inkling2_text"), memory_budget=0.5, device=device)


def test_a_slot_table_that_names_a_slot_too_many_is_refused(emulated):
    device = open_device("emulated")
    layout = emulated.MlpLayout(8, 8, 8, "float32", True, False, False, "silu", gate_up_offset=0, down_offset=1024)
    slab = device.native.slab(2, 4096)
    memory = device.native.allocate(4096)
    with pytest.raises(ConfigError, match="slot 2 is not one of"):
        device.native.gather_mlp(
            layout, slab, np.array([2], dtype=np.int32), memory, "float32", 1, memory, memory, "float32", 1, memory, 0
        )
    device.native.free(memory)


def test_expert_ids_of_another_width_are_refused_before_their_address_is_passed_on(emulated):
    device = open_device("emulated")
    layout = emulated.MlpLayout(8, 8, 8, "float32", True, False, False, "silu", gate_up_offset=0, down_offset=1024)
    hidden, weights = torch.zeros(1, 8), torch.ones(1, 1)
    with pytest.raises(ConfigError, match="expert ids are"):
        device.call(layout, device.native.slab(2, 4096), hidden, torch.zeros(1, 1, dtype=torch.int32), weights)


def test_an_unknown_device_is_refused_with_the_choices():
    for name in ("gpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ConfigError, match="is not one of: cpu, cuda"):
            open_device(name)
    assert open_device("cpu") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named_by_what_is_missing(checkpoint):
    with pytest.raises(BackendUnavailable, match=r"no CUDA|built without CUDA"):
        open_device("cuda:0")
