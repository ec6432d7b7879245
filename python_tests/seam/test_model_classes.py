"""Checkpoints that are no plain causal language models: their class is found, their text model's cache is planned."""

from __future__ import annotations

import json
from typing import Any

import families
import pytest
import quantized
import torch
import transformers as tf

import emoe
from emoe.errors import ConfigError, UnsupportedModelError
from emoe.model import auto
from emoe.planning import kv_cache

TEXT: dict[str, Any] = {
    "vocab_size": families.VOCAB,
    "hidden_size": families.HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": families.INTERMEDIATE,
    "num_experts": families.EXPERTS,
    "num_experts_per_tok": families.TOP_K,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
IMAGE, START, END = 5, 6, 7  # tokens of an image


def _rope(*sections: int, **own: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **own}


def _qwen3_vl_moe():
    return tf.Qwen3VLMoeConfig(
        text_config={**TEXT, "rope_parameters": _rope(4, 2, 2)},
        vision_config={**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=8,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _gemma4():
    return tf.Gemma4Config(
        text_config={
            **TEXT,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "global_head_dim": 16,
            "enable_moe_block": True,
            "top_k_experts": families.TOP_K,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": families.VOCAB,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        audio_config=None,
    )


def _glm4v_moe():
    return tf.Glm4vMoeConfig(
        text_config={
            **TEXT,
            "n_routed_experts": families.EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "rope_parameters": _rope(2, 1, 1, partial_rotary_factor=0.5),
        },
        vision_config={**VISION, "image_size": 56},
    )


def _qwen3_5_moe():
    return tf.Qwen3_5MoeConfig(
        text_config={
            **TEXT,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": _rope(1, 1, 0, partial_rotary_factor=0.25),
        },
        vision_config={**VISION, "num_position_embeddings": 64},
    )


def _qwen3_omni_moe_thinker():
    return tf.Qwen3OmniMoeThinkerConfig(
        text_config={**TEXT, "rope_parameters": _rope(4, 2, 2)},
        vision_config={**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        audio_config={
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": families.HIDDEN,
            "downsample_hidden_size": 16,
            "num_mel_bins": 16,
        },
    )


MODELS = {
    "qwen3_omni_moe": (tf.Qwen3OmniMoeThinkerForConditionalGeneration, _qwen3_omni_moe_thinker),
    "qwen3_vl_moe": (tf.Qwen3VLMoeForConditionalGeneration, _qwen3_vl_moe),
    "gemma4": (tf.Gemma4ForConditionalGeneration, _gemma4),
    "glm4v_moe": (tf.Glm4vMoeForConditionalGeneration, _glm4v_moe),
    "qwen3_5_moe": (tf.Qwen3_5MoeForConditionalGeneration, _qwen3_5_moe),
    "classifier": (tf.Qwen3MoeForSequenceClassification, families.FAMILIES["qwen3_moe"]),
    "token classifier": (tf.MixtralForTokenClassification, families.FAMILIES["mixtral"]),
    "question answering": (tf.MixtralForQuestionAnswering, families.FAMILIES["mixtral"]),
    "without a head": (tf.MixtralModel, families.FAMILIES["mixtral"]),
    "causal": (tf.GptOssForCausalLM, families.FAMILIES["gpt_oss"]),
}
IDS = torch.randint(10, families.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name) -> the folder of a tiny random checkpoint, written once."""
    root = tmp_path_factory.mktemp("classes")

    def get(name):
        folder = root / name.replace(" ", "_")
        if not folder.exists():
            cls, config = MODELS[name]
            torch.manual_seed(0)
            model = cls(config())
            families.randomize(model)
            model.save_pretrained(folder)
        return folder

    return get


@torch.no_grad()
def _output(model, **inputs):
    return model(**({"input_ids": IDS} | inputs))[0].float()


@pytest.mark.parametrize("name", MODELS)
def test_the_class_in_the_config_is_loaded_planned_and_computes_the_same(name, saved):
    cls, _ = MODELS[name]
    plain = cls.from_pretrained(saved(name)).eval()
    expected = _output(plain)
    model = emoe.from_pretrained(saved(name), memory_budget=0.5)
    assert type(model) is cls
    assert (_output(model) - expected).abs().max() < 1e-4
    assert emoe.plan(saved(name), 0.5, calibrate=False).slots_per_layer == model.emoe.plan.slots_per_layer
    model.emoe.close()
    own, restored = plain.state_dict(), model.state_dict()
    assert own.keys() == restored.keys() and all(torch.equal(own[key], restored[key]) for key in own)
    # Not to the bit: torch's products go by where in memory weights lie, on some CPUs.
    assert (_output(model) - expected).abs().max() < 1e-5
    assert (_output(emoe.wrap(plain, memory_budget=0.5)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_checkpoint_of_the_class_computes_what_its_numbers_say(name, saved, tmp_path):
    form = quantized.Format(quantized.either(quantized.byte("_scale_inv", 32, 32)), "e4m3-32x32-float32")
    path = quantized.write(tmp_path, form, source=saved(name))
    config = json.loads((path / "config.json").read_text())
    config.get("text_config", config)["quantization_config"] = quantized.fp8(32, 32)
    (path / "config.json").write_text(json.dumps(config))
    cls, _ = MODELS[name]
    model = emoe.from_pretrained(path, memory_budget=0.5, kernels="stock", dtype=torch.float32)
    assert type(model) is cls and form.encoding in model.emoe.plan.encodings
    expected = _output(cls.from_pretrained(tmp_path / "plain").eval())
    assert (_output(model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert "quantization_config" not in json.dumps(model.config.to_dict())


@pytest.mark.parametrize(
    "name", ["qwen3_vl_moe", "gemma4", "glm4v_moe", "qwen3_5_moe", "qwen3_omni_moe", "classifier", "causal"]
)
def test_the_cache_of_the_text_model_is_in_the_plan(name, saved):
    model = MODELS[name][0].from_pretrained(saved(name)).eval()
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    measured = sum(tensor.numel() * tensor.element_size() for tensor in kv_cache.tensors_of(cache))
    batch, context = IDS.shape
    assert kv_cache.measure(model, context=context, batch=batch) == (measured, "")
    plan = emoe.plan(saved(name), 0.5, calibrate=False, context=context, batch=batch)
    assert plan.kv_bytes == measured
    assert not plan.notes


def test_a_picture_gives_what_it_gives_the_plain_model(saved):
    generator = torch.Generator().manual_seed(1)
    row = [11, 12, START, *[IMAGE] * 4, END, 13, 14]
    inputs = {
        "input_ids": torch.tensor([row]),
        "pixel_values": torch.randn(16, 3 * 2 * 16 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[int(token == IMAGE) for token in row]]),
    }
    plain = tf.Qwen3VLMoeForConditionalGeneration.from_pretrained(saved("qwen3_vl_moe")).eval()
    expected = _output(plain, **inputs)
    other = _output(plain, **(inputs | {"pixel_values": -inputs["pixel_values"]}))
    assert (expected - other).abs().max() > 1e-2
    model = emoe.from_pretrained(saved("qwen3_vl_moe"), memory_budget=0.5)
    assert (_output(model, **inputs) - expected).abs().max() < 1e-4
    settings = tf.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    tokens = plain.generate(**inputs, generation_config=settings)
    assert torch.equal(model.generate(**inputs, generation_config=settings), tokens)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma4"])
def test_a_composite_config_and_its_parts_stay_free_of_emoe(name, saved):
    cls, _ = MODELS[name]
    plain = cls.from_pretrained(saved(name)).eval()
    expected = _output(plain)
    model = emoe.from_pretrained(saved(name), memory_budget=0.5)
    assert model.config.to_dict() == plain.config.to_dict()
    assert vars(model.config.text_config) == vars(plain.config.text_config)
    assert set(model.get_experts_implementation().values()) == {"emoe"}
    for module in (model, model.model, model.model.language_model):
        with pytest.raises(ConfigError, match="stock"):
            module.set_experts_implementation("eager")
    assert torch.equal(_output(cls.from_pretrained(saved(name), config=model.config).eval()), expected)
    model.emoe.close()
    assert vars(model.config.text_config) == vars(plain.config.text_config)


def test_what_a_composite_model_saves_is_whole(saved, tmp_path):
    model = emoe.from_pretrained(saved("qwen3_vl_moe"), memory_budget=0.5)
    model.save_pretrained(tmp_path)
    plain = tf.Qwen3VLMoeForConditionalGeneration.from_pretrained(saved("qwen3_vl_moe")).state_dict()
    again = tf.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert plain.keys() == again.keys() == model.state_dict().keys()
    assert all(torch.equal(value, again[key]) for key, value in plain.items())


@pytest.mark.parametrize(
    "auto_class",
    ["AutoModelForImageTextToText", "Qwen3VLMoeForConditionalGeneration", tf.AutoModelForMultimodalLM],
)
def test_auto_class_names_the_class_or_is_it(auto_class, saved):
    path = saved("qwen3_vl_moe")
    model = emoe.from_pretrained(path, memory_budget=0.5, auto_class=auto_class)
    assert type(model) is tf.Qwen3VLMoeForConditionalGeneration
    assert emoe.plan(path, 0.5, calibrate=False, auto_class=auto_class).kv_bytes == model.emoe.plan.kv_bytes


def test_auto_class_may_be_one_part_of_a_composite_model(tmp_path):
    thinker = _qwen3_omni_moe_thinker()
    config = tf.Qwen3OmniMoeConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)
    torch.manual_seed(0)
    whole = tf.Qwen3OmniMoeForConditionalGeneration(config).eval()
    families.randomize(whole)
    whole.save_pretrained(tmp_path)
    cls = tf.Qwen3OmniMoeThinkerForConditionalGeneration
    model = emoe.from_pretrained(tmp_path, memory_budget=0.5, auto_class=cls)
    assert type(model) is cls
    assert (_output(model) - _output(whole.thinker)).abs().max() < 1e-4
    assert emoe.plan(tmp_path, 0.5, calibrate=False, auto_class=cls.__name__).kv_bytes == model.emoe.plan.kv_bytes


def test_auto_class_goes_before_the_class_in_the_config(saved):
    path = saved("causal")
    expected = tf.AutoModel.from_pretrained(path).eval()
    model = emoe.from_pretrained(path, memory_budget=0.5, auto_class="AutoModel")
    assert type(model) is tf.GptOssModel
    assert (_output(model) - _output(expected)).abs().max() < 1e-4


@pytest.mark.parametrize("call", [emoe.from_pretrained, emoe.plan])
@pytest.mark.parametrize(
    ("auto_class", "says"),
    [
        ("AutoModelForNothing", "no model class of Transformers, such as AutoModelForCausalLM"),
        ("AutoConfig", "no model class"),
        (3, "no model class"),
        ("AutoModelForImageTextToText", "takes no GptOssConfig"),
        ("MixtralForCausalLM", "takes a MixtralConfig, not a GptOssConfig"),
    ],
)
def test_an_auto_class_that_does_not_fit_is_refused(auto_class, says, call, saved):
    with pytest.raises(ConfigError, match=rf"auto_class=.*{says}"):
        call(saved("causal"), memory_budget=0.5, auto_class=auto_class)


def test_a_config_without_architectures_goes_to_the_first_auto_class_that_takes_it():
    for name, expected in (("gpt_oss", tf.AutoModelForCausalLM), ("mixtral", tf.AutoModelForCausalLM)):
        assert auto.model_class(families.FAMILIES[name]()) is expected
    assert auto.model_class(_qwen3_vl_moe()) is tf.AutoModelForImageTextToText
    assert auto.model_class(tf.SwitchTransformersConfig()) is tf.AutoModelForSeq2SeqLM
    assert auto.model_class(tf.MixtralConfig(architectures=["LlamaForCausalLM"])) is tf.AutoModelForCausalLM
    with pytest.raises(UnsupportedModelError, match="auto_class="):
        auto.model_class(tf.PretrainedConfig())


def test_an_encoder_decoder_without_the_interface_is_refused_with_the_families_that_have_it(tmp_path):
    config = tf.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4
    )
    tf.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path)
    for call in (emoe.plan, emoe.from_pretrained):
        with pytest.raises(UnsupportedModelError, match=r"SwitchTransformersForConditionalGeneration.*mixtral"):
            call(tmp_path, memory_budget=0.5)
