"""What a quantizer's config says of each weight, and what it leaves open."""

from __future__ import annotations

import pytest

from emoe.errors import CheckpointError, UnsupportedModelError
from emoe.planning.formats import formats_said

EXPERT = "model.layers.3.mlp.experts.0.gate_proj"
QUERY = "model.layers.3.self_attn.q_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def said(config, where="config.json"):
    return formats_said(config, where)


def group(**weights):
    return {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}


def compressed(format, **weights):
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"a": group(**weights)}}


FLOAT8, FLOAT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


@pytest.mark.parametrize(
    ("config", "expert", "linear"),
    [
        (FP8, "e4m3-128x128-float32", "e4m3-128x128-float32"),
        ({**FP8, "scale_fmt": "ue8m0"}, "e4m3-128x128-e8m0", "e4m3-128x128-e8m0"),
        ({**FP8, "expert_dtype": "fp4", "scale_fmt": "ue8m0"}, "mxfp4", "e4m3-128x128-e8m0"),
        ({**FP8, "moe_quant_algo": "NVFP4"}, "nvfp4", "e4m3-128x128-float32"),
        ({"quant_method": "fp8", "weight_block_size": None}, "e4m3-tensor-float32", "e4m3-tensor-float32"),
        ({"quant_method": "fbgemm_fp8"}, "e4m3-row-float32", "e4m3-row-float32"),
        ({"quant_method": "mxfp8"}, "e4m3-1x32-e8m0", "e4m3-1x32-e8m0"),
        ({"quant_method": "mxfp4"}, "mxfp4", None),
        (compressed("float-quantized", **FLOAT8, strategy="channel"), "e4m3-row-bfloat16", "e4m3-row-bfloat16"),
        (compressed("float-quantized", **FLOAT8, strategy="tensor"), "e4m3-tensor-bfloat16", "e4m3-tensor-bfloat16"),
        (
            compressed("float-quantized", **FLOAT8, strategy="block", block_structure=[128, 128]),
            "e4m3-128x128-bfloat16", "e4m3-128x128-bfloat16",
        ),
        (compressed("pack-quantized", **INT4), "int4-32-bfloat16", "int4-32-bfloat16"),
        (
            compressed("pack-quantized", **INT4, actorder="group"),
            "int4-32-bfloat16-order", "int4-32-bfloat16-order",
        ),
        (compressed("pack-quantized", **INT4, actorder="static"), "int4-32-bfloat16", "int4-32-bfloat16"),
        (
            compressed("pack-quantized", **{**INT4, "symmetric": False}),
            "int4-32-bfloat16-zeros", "int4-32-bfloat16-zeros",
        ),
        (compressed("mxfp4-pack-quantized", **FLOAT4, strategy="group", group_size=32), "mxfp4", "mxfp4"),
        (
            compressed("nvfp4-pack-quantized", **FLOAT4, strategy="tensor_group", group_size=16),
            "nvfp4_divided", "nvfp4_divided",
        ),
        (
            compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
            "uint8b128-row-bfloat16", "uint8b128-row-bfloat16",
        ),
        (
            compressed("pack-quantized", **{**INT4, "num_bits": 8}),
            "uint8b128-1x32-bfloat16", "uint8b128-1x32-bfloat16",
        ),
        (compressed("dense", **INT4), None, None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", "nvfp4"),
        ({"quant_algo": "FP8"}, "e4m3-tensor-float32", "e4m3-tensor-float32"),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "e4m3-tensor-float32",
         "e4m3-tensor-float32"),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "config_groups": {
                "a": {**group(**FLOAT8, strategy="tensor"), "targets": ["re:.*self_attn.*"]},
                "b": {**group(**FLOAT4, group_size=16), "targets": ["re:.*experts.*"]},
            }},
            "nvfp4", "e4m3-tensor-bfloat16",
        ),
        (AWQ, "awq-128-float16", "awq-128-float16"),
        ({**AWQ, "group_size": -1}, "awq-row-float16", "awq-row-float16"),
        (GPTQ, "gptq-128-float16", "gptq-128-float16"),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "gptq_v2-128-float16", "gptq_v2-128-float16"),
        ({**GPTQ, "bits": 8}, "gptq8-128-float16", "gptq8-128-float16"),
        ({**GPTQ, "desc_act": True}, "gptq-128-float16-order", "gptq-128-float16-order"),
        ({**GPTQ, "desc_act": True, "static_groups": True}, "gptq-128-float16", "gptq-128-float16"),
        ({**GPTQ, "desc_act": True, "group_size": -1}, "gptq-row-float16", "gptq-row-float16"),
        ({**GPTQ, "modules_in_block_to_quantize": [["mlp.experts"]]}, "gptq-128-float16", None),
        ({"quant_method": "emoe", "experts": "q4_k", "encodings": ["q4_k"]}, "q4_k", None),
    ],
)  # fmt: skip
def test_a_config_gives_experts_and_linear_layers_their_encodings(config, expert, linear):
    formats = said(config)
    assert formats.encoding(EXPERT, expert=True) == expert
    assert formats.encoding(QUERY) == linear


@pytest.mark.parametrize(
    "entry",
    [
        QUERY, "self_attn", "layers.3.self_attn.q_proj", "q_proj", "model.layers.*.self_attn", "*.self_attn.*",
        "*self_attn.*", "re:.*self_attn.q_proj$", r"model\.layers\.(1|3)\.self_attn",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"])
def test_names_globs_and_expressions_leave_modules_plain(entry, key):
    formats = said({**FP8, key: [entry]})
    assert formats.encoding(QUERY) is None
    assert formats.encoding("model.layers.3.self_attn2.q_proj2") is not None
    assert formats.encoding(EXPERT, expert=True) is not None


def test_the_name_of_a_router_leaves_no_gate_projection_plain():
    formats = said({**FP8, "modules_to_not_convert": ["gate", "model.layers.3.mlp.gate"]})
    assert formats.encoding("model.layers.3.mlp.gate") is None
    assert formats.encoding(EXPERT, expert=True) == formats.encoding("model.layers.3.mlp.gate_proj") is not None


def test_a_layer_that_is_named_has_its_own_encoding():
    layers = {
        "model.layers.3.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.3.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    }
    formats = said({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}, "hf_quant_config.json")
    assert formats.encoding(QUERY) == "e4m3-tensor-float32"
    assert formats.encoding(EXPERT, expert=True) == "nvfp4"
    assert formats.encoding(EXPERT.replace(".3.", ".4."), expert=True) is None


def test_names_come_before_patterns_and_these_before_all_linear_layers():
    config = compressed("mixed-precision", **FLOAT8, strategy="channel")
    config["config_groups"]["b"] = {**group(**INT4), "targets": ["re:.*experts.*"]}
    config["config_groups"]["c"] = {**group(**FLOAT8, strategy="tensor"), "targets": [EXPERT]}
    formats = said(config)
    assert formats.encoding(QUERY) == "e4m3-row-bfloat16"
    assert formats.encoding(EXPERT.replace("gate", "up"), expert=True) == "int4-32-bfloat16"
    assert formats.encoding(EXPERT, expert=True) == "e4m3-tensor-bfloat16"


def test_two_groups_that_name_a_module_alike_and_differ_are_refused():
    config = compressed("mixed-precision", **FLOAT8, strategy="channel")
    config["config_groups"]["b"] = group(**INT4)
    with pytest.raises(UnsupportedModelError, match=rf"{QUERY} would be e4m3-row-bfloat16.* and int4-32-bfloat16"):
        said(config).encoding(QUERY)


def test_gptq_may_leave_modules_out_and_give_others_groups_of_their_own():
    formats = said({**GPTQ, "dynamic": {r"-:.*self_attn.*": {}, r"+:.*experts.*": {"group_size": 64}}})
    assert formats.encoding(QUERY) is None
    assert formats.encoding(EXPERT, expert=True) == "gptq-64-float16"
    assert formats.encoding("model.layers.0.mlp.up_proj") == "gptq-128-float16"


def test_thousands_of_named_layers_are_looked_up_at_once():
    layers = {f"model.layers.{i}.mlp.experts.{j}.w1": {"quant_algo": "NVFP4"} for i in range(100) for j in range(100)}
    formats = said({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    for layer in range(100):
        assert formats.encoding(f"model.layers.{layer}.mlp.experts.0.w1", expert=True) == "nvfp4"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"bits": 4}, "an unknown method"),
        ({**FP8, "expert_dtype": "int3"}, "int3"),
        ({**FP8, "moe_quant_algo": "INT3"}, "INT3"),
        (compressed("marlin-24", **INT4), "marlin-24"),
        (compressed("pack-quantized", num_bits=8, type="int", strategy="tensor"), "'num_bits': 8"),
        (compressed("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="channel"), "'num_bits': 8"),
        (compressed("pack-quantized", **{**INT4, "num_bits": 3}), "'num_bits': 3"),
        (compressed("naive-quantized", **FLOAT4, strategy="group", group_size=64), "'group_size': 64"),
        ({**compressed("float-quantized", **FLOAT8), "sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
        ({"quant_method": "compressed-tensors"}, "no groups"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "groups of 32"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
        ({**AWQ, "version": "gemv"}, "gemv"),
        ({**AWQ, "bits": 3}, "awq of 3 bits"),
        ({**GPTQ, "bits": 3}, "gptq of 3 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "emoe", "experts": "mix", "encodings": ["q4_k", "q6_k"]}, "q4_k, q6_k"),
    ],
)  # fmt: skip
def test_what_leaves_open_how_weights_lie_is_refused_by_name(config, named):
    with pytest.raises(UnsupportedModelError) as caught:
        said(config)
    assert named in str(caught.value) and "config.json says" in str(caught.value)
    assert "safetensors files beside it" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {**FP8, "modules_to_not_convert": -1}, {**FP8, "ignored_layers": ["re:("]}, {**GPTQ, "dynamic": {"a": 1}},
        {**GPTQ, "dynamic": {"-:(": {}}}, {**compressed("pack-quantized", **INT4), "sparsity_config": "dense"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": 1.5, "weights": INT4}}},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}},
    ],
)  # fmt: skip
def test_values_of_a_kind_that_no_quantizer_writes_are_an_error_that_names_the_file(config):
    with pytest.raises(CheckpointError, match=r"config\.json says of encodings what emoe cannot read") as caught:
        said(config)
    assert caught.value.file == "config.json"


def test_one_name_is_as_good_as_a_list_of_it():
    assert said({**FP8, "modules_to_not_convert": "lm_head"}).plain == ("lm_head",)
