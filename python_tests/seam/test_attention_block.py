"""Decode steps of attention blocks in one call: the bits of Transformers' own code, and its code for all else."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io

import families
import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

import emoe
from emoe.errors import EmoeError
from emoe.seam import attention_block
from emoe.seam.attention_block import AttentionBlocks, names_no_more

PLAIN = (
    "aria_text", "dots1", "glm4_moe", "granitemoe", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_moe", "solar_open",
)  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    """Sequences of each step that emoe computed, of models that are wrapped in the test."""
    taken = []
    run = attention_block._Known.run

    def counted(self, *args):
        y = run(self, *args)
        if y is not None:
            taken.append(len(y))
        return y

    monkeypatch.setattr(attention_block._Known, "run", counted)
    return taken


def wrapped(family="olmoe", dtype=torch.float32, **options):
    return emoe.wrap(families.build(family).to(dtype), memory_budget=0.5, **options)


def ids(rows=1, length=12):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model, given, without=False):
    """Of the prompt's last token and of three tokens after it."""
    blocks = [vars(module) for module in model.modules() if "_emoe_step" in vars(module)]
    kept = [each.pop("_emoe_step") for each in blocks] if without else []
    out = model(**given)
    found = [out.logits[:, -1]]
    mask = given.get("attention_mask")
    for token in (5, 6, 7):
        batch = len(found[0])
        if mask is not None:
            mask = torch.cat((mask, torch.ones(batch, 1, dtype=mask.dtype)), 1)
        out = model(torch.full((batch, 1), token), past_key_values=out.past_key_values, attention_mask=mask)
        found.append(out.logits[:, -1])
    for each, step in zip(blocks, kept, strict=False):
        each["_emoe_step"] = step
    return torch.stack(found)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in PLAIN), ("olmoe", torch.float32), ("qwen3_moe", torch.float16)],
)
@torch.no_grad()
def test_decode_steps_have_the_bits_of_transformers_own_code(family, dtype, steps):
    model = wrapped(family, dtype)
    layers = model.config.num_hidden_layers
    assert model.emoe.stats()["attention_blocks"] == layers
    padded = torch.ones(3, 12, dtype=torch.long)
    padded[0, :5] = padded[2, :1] = 0
    for given in ({"input_ids": ids()}, {"input_ids": ids(3), "attention_mask": padded}):
        steps.clear()
        found = logits(model, dict(given))
        assert steps == [len(given["input_ids"])] * (3 * layers)
        assert torch.equal(found, logits(model, dict(given), without=True))
        assert len(steps) == 3 * layers
    model.emoe.close()


@torch.no_grad()
def test_generate_gives_the_tokens_that_transformers_gives(steps):
    truth, model = families.build("qwen3_moe"), wrapped("qwen3_moe")
    for given in ({"num_beams": 3}, {"do_sample": False}, {"prompt_lookup_num_tokens": 2, "do_sample": False}):
        given |= {"max_new_tokens": 20, "input_ids": ids()}
        assert torch.equal(model.generate(**given), truth.generate(**given))
    assert steps
    model.emoe.close()


@torch.no_grad()
def test_encoded_projections_of_several_kinds_are_one_step_too(tmp_path, steps):
    folder = families.save("olmoe", tmp_path / "model")
    model = emoe.from_pretrained(folder, memory_budget=1.0, dense_encoding="q8_0", dtype=torch.bfloat16)
    assert model.emoe.stats()["attention_blocks"] == model.config.num_hidden_layers
    assert torch.equal(logits(model, {"input_ids": ids()}), logits(model, {"input_ids": ids()}, without=True))
    assert steps
    model.emoe.close(restore=False)


def step_of(model, cache=None, **given):
    """A decode step after a prompt."""
    cache = model(ids(2), past_key_values=cache).past_key_values
    return model(ids(2, 1), past_key_values=cache, **given).logits


def block_of(model):
    return model.model.layers[0].self_attn


def with_hook(model):
    block_of(model).q_proj.register_forward_hook(lambda module, args, result: 2 * result)


def with_pre_hook(model):
    block_of(model).o_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_a_forward_of_its_own(model):
    norm = block_of(model).k_norm
    norm.forward = lambda x: x / 3


def with_another_layer(model):
    other = nn.Linear(64, 64, bias=False).requires_grad_(False)
    nn.init.normal_(other.weight, generator=torch.Generator().manual_seed(1))
    block_of(model).v_proj = other


def with_another_weight(model):
    block_of(model).v_proj.weight = nn.Parameter(torch.ones(64, 64), requires_grad=False)


def with_other_data(model):
    block_of(model).v_proj.weight.data = torch.ones(64, 64)


def with_other_data_of_a_norm(model):
    weight = block_of(model).k_norm.weight
    weight.data = torch.full(weight.shape, 0.3)


def with_other_data_of_a_bias(model):
    bias = block_of(model).q_proj.bias
    bias.data = torch.full(bias.shape, 0.3)


def with_transposed_data(model):
    weight = block_of(model).q_proj.weight
    weight.data = weight.data.t()


def with_another_epsilon(model):
    block_of(model).k_norm.variance_epsilon = 100.0


def with_a_norm_that_is_gone(model):
    block_of(model).k_norm = nn.Identity()


def with_a_bias(model):
    block_of(model).o_proj.bias = nn.Parameter(torch.ones(64), requires_grad=False)


CHANGES = (
    with_hook, with_pre_hook, with_a_forward_of_its_own, with_another_layer, with_another_weight, with_other_data,
    with_other_data_of_a_norm, with_transposed_data, with_another_epsilon, with_a_norm_that_is_gone, with_a_bias,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_block_that_is_changed_runs_its_own_code(change, steps):
    truth, model = families.build("olmoe"), wrapped()
    change(truth)
    change(model)
    torch.testing.assert_close(step_of(model), step_of(truth), rtol=1e-3, atol=1e-4)
    assert len(steps) == model.config.num_hidden_layers - 1  # of those that were not changed


@torch.no_grad()
def test_a_bias_that_moves_is_noticed(steps):
    truth, model = families.build("qwen2_moe"), wrapped("qwen2_moe")
    for each in (truth, model):
        with_other_data_of_a_bias(each)
    torch.testing.assert_close(step_of(model), step_of(truth), rtol=1e-3, atol=1e-4)
    assert len(steps) == model.config.num_hidden_layers - 1


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@torch.no_grad()
def test_a_norm_of_another_dtype_is_not_read(name):
    model = families.build("qwen3_moe").bfloat16()
    getattr(block_of(model), name).float()
    model = emoe.wrap(model, memory_budget=0.5)
    assert model.emoe.stats()["attention_blocks"] == model.config.num_hidden_layers - 1
    model.emoe.close()


@torch.no_grad()
def test_values_that_are_changed_in_place_are_the_ones_that_count(steps):
    model, truth = wrapped(), families.build("olmoe")
    before = step_of(model)
    for each in (model, truth):
        block_of(each).o_proj.weight.mul_(3)
        block_of(each).q_norm.weight.fill_(0.2)
    assert not torch.allclose(step_of(model), before)
    torch.testing.assert_close(step_of(model), step_of(truth), rtol=1e-3, atol=1e-4)
    assert len(steps) == 3 * model.config.num_hidden_layers


OTHERS = {
    "a prompt": lambda model: model(ids(2)).logits,
    "no cache": lambda model: model(ids(2, 1), use_cache=False).logits,
    "an empty cache": lambda model: model(ids(2, 1)).logits,
    "a static cache": lambda model: step_of(model, StaticCache(config=model.config, max_cache_len=20)),
    "a cache of a class of its own": lambda model: step_of(model, type("Own", (DynamicCache,), {})()),
    "nine sequences": lambda model: model(ids(9, 1), past_key_values=model(ids(9)).past_key_values).logits,
    "two tokens": lambda model: model(ids(1, 2), past_key_values=model(ids()).past_key_values).logits,
    "a float mask": lambda model: step_of(model, attention_mask=torch.zeros(2, 1, 1, 13)),
    "a cache whose update is another": lambda model: with_another_update(model),
    "global hooks": lambda model: with_global_hook(model),
    "a config that clips": lambda model: with_clipping(model),
    "a function mode": lambda model: with_function_mode(model),
    "autocast": lambda model: with_autocast(model),
}


def with_global_hook(model):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        logits = step_of(model)
    finally:
        handle.remove()
    assert block_of(model).q_proj in seen
    return logits


def with_another_update(model):
    cache = DynamicCache(config=model.config)
    calls, update = [], cache.update
    cache.update = lambda *args, **given: calls.append(1) or update(*args, **given)
    logits = step_of(model, cache)
    assert len(calls) == 2 * model.config.num_hidden_layers
    return logits


def with_clipping(model):
    model.config.clip_qkv = 0.05
    return step_of(model)


def with_function_mode(model):
    class Counted(torch.overrides.TorchFunctionMode):
        linear = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.linear += func is nn.functional.linear
            return func(*args, **(kwargs or {}))

    cache = model(ids(2)).past_key_values
    with Counted() as counted:
        logits = model(ids(2, 1), past_key_values=cache).logits
    assert counted.linear >= 5 * model.config.num_hidden_layers + 1  # a router among them
    return logits


def with_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return step_of(model).float()


@pytest.mark.parametrize("use", OTHERS)
@torch.no_grad()
def test_transformers_own_code_runs_for_all_else(use, steps):
    truth, model = families.build("olmoe"), wrapped()
    most = 0.1 if use == "autocast" else 1e-3
    torch.testing.assert_close(OTHERS[use](model), OTHERS[use](truth), rtol=most, atol=most)
    assert not steps
    model.emoe.close()


@torch.no_grad()
def test_a_trace_a_mode_and_a_transform_see_the_operations(steps):
    model = wrapped()
    cache = model(ids()).past_key_values

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        names = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        model(ids(1, 1), past_key_values=cache)
    assert not steps
    assert any("mm" in name for name in Seen.names)
    model.emoe.close()


@torch.no_grad()
def test_a_step_that_fails_leaves_the_cache_as_it_was(steps):
    model = wrapped()
    want = logits(model, {"input_ids": ids()})
    out = model(ids())
    known = vars(block_of(model))["_emoe_step"]

    def broken(*args):
        args[3][:, :, -1:] = torch.nan
        raise KeyboardInterrupt

    block = vars(block_of(model))
    block["_emoe_step"] = dataclasses.replace(known, step=broken)
    with pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[5]]), past_key_values=out.past_key_values)
    assert out.past_key_values.get_seq_length() == 12
    block["_emoe_step"] = known
    found = model(torch.tensor([[5]]), past_key_values=out.past_key_values)
    assert torch.equal(found.logits[:, -1], want[1])
    model.emoe.close()


@torch.no_grad()
def test_an_input_of_another_width_is_the_error_that_it_is_without_emoe(steps):
    model = wrapped()
    cache = model(ids()).past_key_values
    block_of(model).register_forward_pre_hook(
        lambda block, args, given: (args, given | {"hidden_states": given["hidden_states"][..., :32]}), with_kwargs=True
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(ids(1, 1), past_key_values=cache)
    assert not steps


def test_a_cache_that_wants_gradients_is_refused_as_ever(steps):
    model = wrapped()
    with torch.no_grad():
        cache = model(ids()).past_key_values
    for layer in cache.layers:
        layer.keys.requires_grad_()
    with pytest.raises(EmoeError, match="inference only"):
        model(ids(1, 1), past_key_values=cache)
    assert not steps


@torch.no_grad()
def test_a_cache_is_not_copied_where_a_step_is_not_emoe_s():
    model = wrapped()
    cache = model(ids(length=11)).past_key_values
    model(ids(1, 1), past_key_values=cache)  # which gives it room
    for token in range(3):
        before = cache.layers[0]._rows[0]._buffer.data_ptr()
        model(ids(1, 1), past_key_values=cache, attention_mask=torch.zeros(1, 1, 1, 13 + token))
        assert cache.layers[0]._rows[0]._buffer.data_ptr() == before


# --- which blocks are plain ------------------------------------------------------------------------------------------


def test_a_class_is_known_by_what_its_code_names():
    assert names_no_more(OlmoeAttention)
    assert not names_no_more(GptOssAttention)  # sinks
    assert not names_no_more(Qwen3NextAttention)  # a gate
    assert not names_no_more(DeepseekV3Attention)  # latent keys and values

    class Softcapped(OlmoeAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None):
            return self.config.update(hidden_states, softcap=3.0)

    class Another(OlmoeAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None):
            return getattr(self, "another")(hidden_states)  # noqa: B009

    class Nested(OlmoeAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None):
            return [each.secret() for each in (hidden_states,)]

    assert not names_no_more(Nested)
    assert not names_no_more(Softcapped)
    assert not names_no_more(Another)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "jamba", "gpt_oss", "deepseek_v3", "afmoe"])
def test_other_families_keep_their_code(family):
    model = wrapped(family)
    assert model.emoe.stats()["attention_blocks"] == 0
    model.emoe.close()


@torch.no_grad()
def test_a_block_that_clamps_is_found_by_its_trial(steps):
    truth, model = families.build("olmoe"), families.build("olmoe")
    truth.config.clip_qkv = model.config.clip_qkv = 0.5
    model = emoe.wrap(model, memory_budget=0.5)
    assert model.emoe.stats()["attention_blocks"] == 0
    torch.testing.assert_close(step_of(model), step_of(truth), rtol=1e-3, atol=1e-4)
    model.emoe.close()


def test_blocks_whose_norms_are_transformers_own_keep_their_code():
    assert wrapped("olmoe", norms="torch").emoe.stats()["attention_blocks"] == 0
    assert wrapped("mixtral", norms="torch").emoe.stats()["attention_blocks"] == 3  # it has none within


def test_a_hook_that_is_there_already_sees_no_trial_and_keeps_the_block(steps):
    model, seen = families.build("olmoe"), []
    block_of(model).q_proj.register_forward_hook(lambda *_: seen.append(1))
    model = emoe.wrap(model, memory_budget=0.5)
    assert not seen
    assert model.emoe.stats()["attention_blocks"] == model.config.num_hidden_layers - 1


def strided(values):
    return nn.Parameter(torch.stack((values, values), 1)[:, 0], requires_grad=False)


@pytest.mark.parametrize(
    "bias", [strided(torch.zeros(64)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(64).double())]
)
def test_a_bias_that_the_kernels_do_not_read_as_it_lies_keeps_the_block(bias):
    model = families.build("olmoe")
    block_of(model).q_proj.bias = bias
    model = emoe.wrap(model, memory_budget=0.5)
    assert model.emoe.stats()["attention_blocks"] == model.config.num_hidden_layers - 1


@pytest.mark.parametrize("options", [{"attention": "torch"}, {"kernels": "stock"}, {"dense": "torch"}])
def test_a_model_keeps_its_own_where_it_is_asked_to(options):
    model = wrapped(**options)
    assert model.emoe.stats()["attention_blocks"] == 0
    assert type(block_of(model)) is OlmoeAttention
    model.emoe.close()


def test_a_trial_leaves_the_model_as_it_was():
    model = families.build("olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    AttentionBlocks(model, lambda form: pytest.fail("its layers are not emoe's"))
    wrapping = emoe.wrap(model, memory_budget=0.5)
    assert model.config._attn_implementation == "sdpa"
    wrapping.emoe.close()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@torch.no_grad()
def test_copies_and_pickles_are_blocks_of_transformers_and_closing_gives_their_class_back(steps):
    model = wrapped()
    block = block_of(model)
    assert isinstance(block, OlmoeAttention)
    assert type(block).__name__ == "OlmoeAttention"
    assert inspect.signature(block.forward) == inspect.signature(OlmoeAttention(model.config, 0).forward)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for twin in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert type(twin) is OlmoeAttention
        assert "_emoe_step" not in vars(twin)
    model.emoe.close()
    assert type(block) is OlmoeAttention
    assert "_emoe_step" not in vars(block)
    steps.clear()
    step_of(model)
    assert not steps
