"""emoe against Transformers, family by family: the contract of exact mode."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

import emoe

NAMES = sorted(families.FAMILIES)
PROMPT_TOKENS = 21


def _prompt(model, batch=1):
    generator = torch.Generator().manual_seed(7)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (batch, PROMPT_TOKENS), generator=generator)


def _reference(path, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()
    for parameter in model.parameters():  # out of the file's mapping: the bits of a product depend on the alignment
        parameter.data = parameter.data.clone()
    return model


def _steps(model, ids, steps=6):
    """Logits of a prefill and of greedy decode steps, and the tokens chosen."""
    logits, tokens = [], []
    with torch.no_grad():
        out = model(ids, use_cache=True)
        for _ in range(steps):
            last = out.logits[:, -1]
            logits.append(last)
            token = last.argmax(-1, keepdim=True)
            tokens.append(token)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits), torch.cat(tokens, dim=1)


def _relative_error(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_native_logits_are_within_1e_5_of_transformers_eager_and_greedy_tokens_are_equal(name, checkpoint):
    path = checkpoint(name)
    reference = _reference(path)
    ids = _prompt(reference, batch=2)
    with torch.no_grad():
        expected = reference(ids).logits
    expected_steps, expected_tokens = _steps(reference, ids[:1])
    model = emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    steps, tokens = _steps(model, ids[:1])
    model.emoe.check_integrity()
    model.emoe.close(restore=False)
    assert _relative_error(logits, expected) < 1e-5
    assert _relative_error(steps, expected_steps) < 1e-5
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [1e-6, 1.0], ids=["one-slot-a-layer", "all-resident"])
def test_stock_kernels_on_slots_give_the_bits_of_transformers_eager(name, budget, checkpoint):
    path = checkpoint(name)
    reference = _reference(path)
    ids = _prompt(reference, batch=2)
    with torch.no_grad():
        expected = reference(ids).logits
    model = emoe.from_pretrained(path, memory_budget=budget, dtype=torch.float32, kernels="stock")
    with torch.no_grad():
        logits = model(ids).logits
    assert model.emoe.stats()["kernels"].keys() == {"stock"}
    model.emoe.close(restore=False)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_decode_is_bit_identical_whatever_the_budget(name, dtype, checkpoint):
    path = checkpoint(name, dtype)
    results = []
    for budget in _budgets(path, dtype):
        model = emoe.from_pretrained(path, memory_budget=budget, dtype=dtype)
        results.append(_steps(model, _prompt(model)))
        model.emoe.check_integrity()
        model.emoe.close(restore=False)
    for logits, tokens in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(tokens, results[0][1])


def _budgets(path, dtype):
    """Shares for one slot a layer, top_k slots, half and all."""
    plan = emoe.plan(path, 1.0, dtype=dtype, calibrate=False)
    return [1e-6, plan.top_k / max(plan.experts_per_layer), 0.5, 1.0]


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_a_prefill_that_needs_more_experts_than_slots_is_right(name, checkpoint):
    path = checkpoint(name)
    reference = _reference(path)
    ids = _prompt(reference, batch=4)
    with torch.no_grad():
        expected = reference(ids).logits
    model = emoe.from_pretrained(path, memory_budget=1e-6, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    stats = model.emoe.stats()
    model.emoe.close(restore=False)
    assert stats["evictions"] > 0
    assert _relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_a_long_prefill_without_pair_buffer_stays_close(name, checkpoint, monkeypatch):
    path = checkpoint(name)
    reference = _reference(path)
    ids = _prompt(reference, batch=4)
    with torch.no_grad():
        expected = reference(ids).logits
    model = emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32)
    for layer in model.emoe.layers:
        layer.compute.pair_bytes = 0
    with torch.no_grad():
        logits = model(ids).logits
    model.emoe.close(restore=False)
    assert _relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bf16_logits_are_as_close_to_float32_as_those_of_transformers(name, checkpoint):
    """Rounding may route a token elsewhere, in any implementation: the same weights in float32 judge both."""
    path = checkpoint(name, torch.bfloat16)
    ids = _prompt(_reference(path))
    errors = []
    with torch.no_grad():
        exact = _reference(path, torch.float32)(ids).logits
        model = emoe.from_pretrained(path, memory_budget=0.5)
        for logits in (model(ids).logits, _reference(path, torch.bfloat16)(ids).logits):
            errors.append(((logits.float() - exact).abs().mean() / exact.abs().mean()).item())
    model.emoe.close(restore=False)
    ours, stock = errors
    assert ours < max(1.5 * stock, 1e-2)


def test_generate_gives_the_tokens_of_transformers(checkpoint):
    path = checkpoint("qwen3_moe")
    reference = _reference(path)
    ids = _prompt(reference, batch=2)
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False)
    model = emoe.from_pretrained(path, memory_budget=0.25, dtype=torch.float32)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(generated, expected)


def test_at_least_sixteen_families_are_compared_and_the_named_ones_are_among_them():
    named = [
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "deepseek_v3",
        "gpt_oss",
        "granitemoe",
        "phimoe",
        "jamba",
        "glm4_moe",
        "ernie4_5_moe",
        "lfm2_moe",
        "minimax_m2",
        "nemotron_h",
        "aria",
    ]
    assert set(named) <= {name.removesuffix("_text") for name in NAMES}
    assert len(NAMES) >= 16
