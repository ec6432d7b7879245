"""What goes wrong silently when rows of several requests share a forward; each was seen once."""

from __future__ import annotations

import re
from pathlib import Path

import engine_families
import families
import pytest
import torch
import transformers as tf
from engines import GREEDY, PROMPTS, Answers, alone, together
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import emoe
from emoe.engine import attention, trial
from emoe.engine.attention import AttentionName, PackedMask, current
from emoe.engine.engine import Engine
from emoe.engine.runner import Piece, Runner
from emoe.engine.sampling import Sampling
from emoe.engine.state import held_bytes, new_state
from emoe.errors import ConfigError
from emoe.seam.kv_room import RoomyLayer, WindowLayer


def build(make):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(make()).eval()
    families.randomize(model)
    return model


# Attention names

# Families whose code compares the name of the attention; emoe's own is not in the config while such code runs. What is
# new here has to be looked at: packed attention may switch something off in it.
COMPARED = {
    "axk2", "deepseek_v32", "diffusion_gemma", "dots3_note", "gemma4", "glm5_next", "glm_moe_dsa", "hy_v4",
    "minimax_m3_vl", "mistral_large4",
}  # fmt: skip


def test_no_other_family_with_experts_compares_the_name_of_its_attention():
    pattern = re.compile(r"_attn_implementation\s*(==|!=|in |not in )")
    found = set()
    for source in Path(tf.__file__).parent.glob("models/*/modeling_*.py"):
        text = source.read_text()
        if "xperts" in text and pattern.search(text):
            found.add(source.parent.name)
    assert found == COMPARED


@pytest.mark.parametrize("family", ["hy_v4", "qwen3_next"])
def test_within_a_forked_mixer_and_between_steps_attention_has_its_own_name(family):
    model, names = families.build(family), set()
    own = model.config._attn_implementation
    mixer = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    with Engine(model) as engine:
        handle = mixer.register_forward_pre_hook(lambda *_: names.add(model.config._attn_implementation))
        engine.submit(PROMPTS[0], max_new_tokens=2, sampling=GREEDY)
        engine.submit(PROMPTS[1], max_new_tokens=2, sampling=GREEDY)
        while engine.busy:
            engine.step()
            assert model.config._attn_implementation == own and current() is None
        handle.remove()
    assert names == {own}


def test_a_forward_that_fails_leaves_the_name_as_it_was():
    model = families.build("olmoe")
    runner = Runner(model, "packed")
    states = [new_state(model, 8) for _ in range(2)]
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.run([Piece(state, [3, 4], 0) for state in states])
    handle.remove()
    assert model.config._attn_implementation == "sdpa" and current() is None


def test_eager_attention_is_the_familys_own():
    """gpt_oss has sinks in it."""
    model = families.build("gpt_oss")
    model.set_attn_implementation("eager")
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with Engine(model, chunk_rows=11) as engine:
        assert engine.choice.way == "packed"
        assert together(engine, PROMPTS) == expected


# Masks


def test_decode_rows_have_a_mask_so_that_sdpa_groups_heads_itself(monkeypatch):
    model, masks = families.build("olmoe"), []
    stock = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, mask, *args, **kwargs):
        masks.append((query.shape[-2], mask))
        return stock(module, query, key, value, mask, *args, **kwargs)

    with Engine(model) as engine:
        monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
        engine.submit(PROMPTS[0], max_new_tokens=3, sampling=GREEDY)
        list(engine.run())
    decode = [mask for rows, mask in masks if rows == 1]
    assert decode and all(isinstance(mask, torch.Tensor) and bool(mask.all()) for mask in decode)


def test_a_mask_that_the_model_adds_to_is_refused():
    with pytest.raises(attention.WrongWayError, match="mask function"):
        PackedMask(None, None, {"use_vmap": True})


# Rotations that depend on the batch

ROPES = {
    "dynamic": families._config(
        tf.OlmoeConfig, intermediate_size=48, num_experts=8, max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
    "longrope": families._config(
        tf.PhimoeConfig, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8,
            "long_mscale": 1.2, "short_mscale": 1.1, "original_max_position_embeddings": 32,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_requests_past_the_length_at_which_rotations_change_are_refused(kind):
    model = build(ROPES[kind])
    expected = [alone(model, prompt, 5) for prompt in PROMPTS]
    with Engine(model, chunk_rows=11) as engine:
        assert engine.context == 32
        with pytest.raises(ConfigError, match=r"(?s)33|rotary"):
            engine.submit(PROMPTS[2], max_new_tokens=7)
        assert together(engine, PROMPTS, count=5) == expected


# The trial


def test_a_step_of_the_trial_has_more_rows_than_any_tensor_has_heads_and_a_prime_number():
    for heads in (4, 8, 16, 128):
        config = tf.OlmoeConfig(num_attention_heads=heads, num_key_value_heads=2, hidden_size=64)
        rows = trial._prime_above(max(trial._sizes(config)))
        assert rows > heads and all(rows % each for each in range(2, rows))


@pytest.mark.parametrize("routing", ["exact", "biased", "resident"])
def test_the_trial_leaves_counts_slots_and_recency_as_they_were(checkpoint, routing):
    options = {"bias": 0.3} if routing == "biased" else {}
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, routing=routing, **options)
    alone(model, PROMPTS[0], 3)
    runtime = model.emoe
    policies = runtime.cache._policies
    before = runtime.stats(per_layer=True), [list(each.known()) for each in policies]
    with runtime.request("chat") as request:
        tally = request.to_dict()
        Engine(model).close()
        assert request.to_dict() == tally
    after = runtime.stats(per_layer=True), [list(each.known()) for each in policies]
    for stats in (before[0], after[0]):
        stats["prediction"].pop("requests")
        stats["routing"].pop("requests")
    assert after == before
    runtime.close(restore=False)


def test_the_trial_is_not_recorded_in_a_trace(checkpoint, tmp_path):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5)
    with model.emoe.record(tmp_path / "trace.npz"):
        Engine(model).close()
        alone(model, PROMPTS[1], 2)
    assert emoe.load_trace(tmp_path / "trace.npz").experts.shape[1] == len(PROMPTS[1]) + 1
    model.emoe.close(restore=False)


def test_a_way_that_gives_something_else_is_not_taken(monkeypatch):
    """Rows without the mask of their request, which is what a model gets that builds masks by itself."""
    model = families.build("olmoe")
    monkeypatch.setattr(trial, "KNOWN", {})
    monkeypatch.setattr(PackedMask, "of", lambda self, index, length: None)
    choice = trial.choose(model)
    assert (choice.way, choice.whole) != ("packed", False)
    assert "differ by" in choice.reasons["packed, chunks"]


# Sampling


def test_all_tokens_are_kept_where_top_k_is_not_given():
    """`generate` keeps 50."""
    assert not Sampling(temperature=1.0).made()
    assert [type(each).__name__ for each in Sampling(temperature=1.0, top_k=50).made()] == ["TopKLogitsWarper"]


# State


def test_windows_move_and_buffers_grow_as_transformers_own():
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in (
        (RoomyLayer(DynamicLayer(), 400), DynamicLayer()),
        (WindowLayer(DynamicSlidingWindowLayer(7), 400), DynamicSlidingWindowLayer(7)),
        (WindowLayer(DynamicSlidingWindowLayer(7), 4), DynamicSlidingWindowLayer(7)),
    ):
        for count in [3, 1, 90, *[1] * 200, 5, 80]:
            key = torch.randn(1, 2, count, 4, generator=generator)
            value = torch.randn(1, 2, count, 6, generator=generator)
            for mine, reference in zip(ours.update(key, value), theirs.update(key, value), strict=True):
                assert torch.equal(mine[..., -reference.shape[-2] :, :], reference[..., -mine.shape[-2] :, :])
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(4) == theirs.get_mask_sizes(4)


def test_a_window_takes_no_more_than_its_request():
    layer = WindowLayer(DynamicSlidingWindowLayer(1000), 20)
    layer.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
    assert layer.keys.untyped_storage().nbytes() == 20 * 2 * 4 * 4


def test_our_layers_are_not_those_that_other_caches_get():
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    assert WindowLayer not in DYNAMIC_LAYER_TYPE_MAPPING.values()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "exaone_moe", "gemma4_text"])
def test_bytes_of_plain_states_are_known_beforehand(family):
    model = families.build(family)
    footprint = trial.choose(model).footprint
    runner = Runner(model, "alone")
    for tokens, chunk in ((100, 19), (30, 19), (19, 19)):
        state = new_state(model, tokens)
        runner.run([Piece(state, PROMPTS[0], 0)])
        assert held_bytes(state) == footprint.nbytes(tokens, chunk)


@pytest.mark.parametrize("family", ["deepseek_v32", "zaya", "deepseek_v4_compressed", "inkling2_text", "jamba"])
def test_what_states_took_more_than_expected_is_expected_of_the_next(family):
    model = engine_families.build(family)
    with Engine(model, chunk_rows=16) as engine:
        for _ in range(2):
            engine.submit(PROMPTS[2], max_new_tokens=100, sampling=GREEDY)
            list(engine.run())
        generation_bytes = engine.footprint.nbytes(126, 126 if engine.choice.whole else 16)
        state = new_state(model, 126)
        tokens, rows = (PROMPTS[2] * 5)[:126], 126 if engine.choice.whole else 16
        runner = Runner(model, "alone")
        for start in range(0, 126, rows):
            runner.run([Piece(state, tokens[start : start + rows], start)])
        assert held_bytes(state) <= generation_bytes * 1.5


def test_a_request_may_change_between_the_ways_of_running():
    model = families.build("olmoe")
    tokens = alone(model, PROMPTS[0], 6)
    runner = Runner(model, "alone")
    state, done, output = new_state(model, 40), 0, []
    pieces = [PROMPTS[0][:7], PROMPTS[0][7:], *[None] * 5]
    for way, piece in zip(["alone", "packed", "forked"] * 3, pieces, strict=False):
        runner.use(way)
        piece = piece or [output[-1]]
        logits = runner.run([Piece(state, piece, done)])[0]
        done += len(piece)
        if done >= len(PROMPTS[0]):
            output.append(int(logits.argmax()))
    runner.close()
    assert output == tokens


def test_a_model_without_hooks_left_runs_as_before():
    model = families.build("qwen3_next")
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    Engine(model).close()
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# What emoe counts


@pytest.mark.parametrize("way", ["packed", "forked", "alone"])
def test_requests_of_one_batch_have_counts_and_contracts_of_their_own(checkpoint, way):
    model = emoe.from_pretrained(
        checkpoint("qwen3_moe"), memory_budget=0.6, routing="biased", bias=0.3, max_substituted_mass=0.2
    )
    with Engine(model, chunk_rows=12, way=way) as engine:
        options = {"max_new_tokens": 8, "sampling": GREEDY}
        ids = [engine.submit(p, task=task, **options) for p, task in zip(PROMPTS, "abab", strict=True)]
        answers = Answers(engine).run()
        assert all(answers.reason(id) == "length" for id in ids)
    routing = model.emoe.stats()["routing"]
    assert {"a", "b"} <= set(routing["tasks"])
    by_name = {each["name"]: each for each in routing["requests"]}
    for id, prompt in zip(ids, PROMPTS, strict=True):
        assert by_name[id]["rows"] == 2 * (len(prompt) + 8 - 1)  # the first of three layers is dense
        assert by_name[id]["substituted_mass"] <= 0.2
    model.emoe.close(restore=False)


def test_prefixes_are_shared_in_exact_mode_only(checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.6, routing="biased", bias=0.3)
    with Engine(model) as engine:
        for _ in range(2):
            engine.submit(PROMPTS[0], max_new_tokens=2, sampling=GREEDY)
            list(engine.run())
        assert engine.stats()["shared_tokens"] == 0
    model.emoe.close(restore=False)


def test_the_name_is_set_in_the_configs_of_all_layers():
    model = families.build("olmoe")
    name = AttentionName([model.config, model.model.layers[0].self_attn.config])
    name.set(ours=True)
    assert model.model.layers[0].self_attn.config._attn_implementation == "emoe_sdpa"
    name.set(ours=False)
    assert model.config._attn_implementation == "sdpa"
