"""Attention of a decode step by emoe's kernel: what Transformers' own gives, and only where it is asked for."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import families
import pytest
import torch
from engines import PROMPTS, alone, together
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import emoe
from emoe.compute import attention
from emoe.compute.attention import attend
from emoe.engine.engine import Engine
from emoe.seam import attention_block
from emoe.seam.one_row import NAME, OneRowAttention, compares_names

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "exaone_moe", "jamba")


class Module:
    num_key_value_groups = 1
    is_causal = True


def tensors(dtype=torch.float32, batch=2, heads=6, kv_heads=2, keys=300, depth=24, values=24, rows=1):
    """Query, key and value; those of the cache are views of a buffer with room."""
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.randn(batch, count, length, width, generator=generator).to(dtype)
        for count, length, width in ((heads, rows, depth), (kv_heads, keys + 9, depth), (kv_heads, keys + 9, values))
    ]
    return made[0], made[1][:, :, :keys], made[2][:, :, :keys]


def truth(query, key, value, mask=None, scaling=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(groups, dim=1) for each in (key, value))
    scores = query.double() @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def counted(monkeypatch):
    """How often the kernel ran, where blocks are not one call (test_attention_block.py)."""
    calls = []
    monkeypatch.setattr(attention_block, "names_no_more", lambda kind: False)
    loaded = attention.native.load()

    class Loaded:
        def attend(self, **given):
            calls.append(given["keys"])
            return loaded.attend(**given)

    monkeypatch.setattr(attention, "native", SimpleNamespace(load=Loaded))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", ["", "keys", "heads"])
def test_a_row_agrees_with_float64(dtype, masked, counted):
    for sizes in ({}, {"kv_heads": 6}, {"kv_heads": 1, "depth": 40, "values": 17}, {"batch": 1, "keys": 1}):
        query, key, value = tensors(dtype, **sizes)
        batch, keys = query.shape[0], key.shape[2]
        shape = {"": None, "keys": (batch, 1, 1, keys), "heads": (1, 6, 1, keys)}[masked]
        mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.7
        if mask is not None:
            mask[..., 0] = True
        out, weights = attend(Module(), query, key, value, mask, scaling=0.3)
        want = truth(query, key, value, mask, 0.3)
        assert weights is None
        assert out.dtype == dtype
        most = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
        torch.testing.assert_close(out.double(), want, rtol=most, atol=most)
    assert len(counted) == 4


def test_a_sequence_has_the_same_bits_alone_and_beside_seven_others():
    query, key, value = tensors(torch.bfloat16, batch=8)
    together, _ = attend(Module(), query, key, value, None)
    for row in range(8):
        alone, _ = attend(Module(), *(each[row : row + 1] for each in (query, key, value)), None)
        assert torch.equal(alone, together[row : row + 1])


OTHERS = {
    "several rows": ({"rows": 3}, None, {}),
    "numbers for a mask": ({}, torch.zeros(2, 1, 1, 300), {}),
    "float64": ({"dtype": torch.float64}, None, {}),
    "dropout": ({}, None, {"dropout": 1.0}),
    "a bias of positions": ({}, None, {"position_bias": torch.ones(1, 6, 1, 300)}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_transformers_own_function_computes_what_is_not_one_row_alone(name, counted):
    sizes, mask, given = OTHERS[name]
    own = tensors(**{"kv_heads": 6} | sizes)
    torch.testing.assert_close(
        attend(Module(), *own, mask, **given)[0], sdpa_attention_forward(Module(), *own, mask, **given)[0]
    )
    assert not counted


def test_gradients_softcaps_and_transforms_are_transformers_own(counted):
    query, key, value = tensors(kv_heads=6)
    assert attend(Module(), query.requires_grad_(), key, value, None)[0].requires_grad
    with torch.no_grad():
        torch.func.vmap(lambda q: attend(Module(), q, key, value, None)[0])(query.detach()[None])
    with pytest.raises(ValueError, match="softcap"):
        attend(Module(), query.detach(), key, value, None, softcap=3.0)
    assert not counted


# --- models ----------------------------------------------------------------------------------------------------------


def ids(rows=1, length=12):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_decodes_what_it_decodes_with_transformers_own(family, checkpoint, counted):
    truth = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    model = emoe.from_pretrained(checkpoint(family), memory_budget=0.5, dtype=torch.float32)
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[0, :5] = 0
    for given in (
        {"input_ids": ids()},
        {"input_ids": ids(2), "attention_mask": padded},
        {"input_ids": ids(), "num_beams": 2},
    ):
        counted.clear()
        given |= {"max_new_tokens": 24, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        found, wanted = model.generate(**given), truth.generate(**given)
        assert torch.equal(found.sequences, wanted.sequences)
        for one, other in zip(found.scores, wanted.scores, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert counted
    assert model.config._attn_implementation == "sdpa"
    model.emoe.close(restore=False)


def test_a_family_without_sdpa_or_that_compares_names_is_left_alone(checkpoint, counted):
    assert compares_names(families.build("gemma4_text"))
    assert not compares_names(families.build("qwen3_moe"))
    model = emoe.from_pretrained(checkpoint("gpt_oss"), memory_budget=0.5)
    model.generate(ids(), max_new_tokens=3)
    assert not counted
    model.emoe.close(restore=False)


@pytest.mark.parametrize("options", [{"attention": "torch"}, {"kernels": "stock"}])
def test_transformers_own_attention_runs_where_it_is_asked_for(options, checkpoint, counted):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0, **options)
    model.generate(ids(), max_new_tokens=3)
    assert not counted
    model.emoe.close(restore=False)


def test_the_name_is_emoe_s_only_while_a_step_of_one_token_runs():
    model = families.build("qwen3_moe")
    seen = []
    OneRowAttention(model, attend)
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    with torch.no_grad():
        cache = model(ids()).past_key_values
        model(ids(length=1), past_key_values=cache)
        model(ids(length=2), past_key_values=cache)
    assert seen == ["sdpa", NAME, "sdpa"]
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert model.config._attn_implementation == "sdpa"


def test_a_prompt_in_another_thread_does_not_take_the_name_from_a_step():
    model = families.build("qwen3_moe")
    OneRowAttention(model, attend)
    seen, told = [], False

    def beside(*_):
        nonlocal told
        seen.append(model.config._attn_implementation)
        if not told:
            told = True
            other = threading.Thread(target=lambda: model(ids()))
            other.start()
            other.join()

    model.model.layers[1].register_forward_pre_hook(beside)
    model(ids(length=1))
    assert seen == [NAME, NAME]
    assert model.config._attn_implementation == "sdpa"


def test_what_an_interrupt_left_is_gone_after_the_next_forward_or_on_closing():
    model = families.build("olmoe")
    hooks = OneRowAttention(model, attend)

    def interrupt(*_):
        raise KeyboardInterrupt

    for end in (lambda: model(ids()), hooks.remove):
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids(length=1))
        handle.remove()
        end()
        assert model.config._attn_implementation == "sdpa"


def test_an_engine_gives_each_request_what_it_has_alone(checkpoint, counted):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, dtype=torch.float32)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    counted.clear()
    with Engine(model, way="packed") as engine:
        counted.clear()
        assert together(engine, PROMPTS) == expected
    assert counted
    model.emoe.close(restore=False)


def test_a_cache_of_another_class_is_attended_to_as_well(checkpoint, counted):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0, dtype=torch.float32)
    given = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids(), past_key_values=DynamicCache(config=model.config), **given)
    assert torch.equal(model.generate(ids(), cache_implementation="static", disable_compile=True, **given), wanted)
    assert counted
    assert ALL_ATTENTION_FUNCTIONS[NAME] is attend
    model.emoe.close(restore=False)
