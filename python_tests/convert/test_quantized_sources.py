"""Checkpoints whose weights are encoded already are converted from the numbers that those stand for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import quantized
import torch
from test_convert import IDS

import emoe
from emoe import errors
from emoe.convert.run import convert
from emoe.store.headers import checkpoint_files, read_headers


def _logits(folder) -> torch.Tensor:
    model = emoe.from_pretrained(folder, memory_budget=1.0, kernels="stock", dtype="float32")
    with torch.no_grad():
        found = model(IDS).logits
    model.emoe.close(restore=False)
    return found


@pytest.mark.parametrize("name", sorted(quantized.FORMATS))
def test_every_format_that_is_read_can_be_the_source(name, tmp_path):
    """Outside experts its bytes are kept, so that a model of both kinds of encodings comes out."""
    source = quantized.write(tmp_path / "source", quantized.FORMATS[name])
    report = convert(source, tmp_path / "out", "q8_0", progress=False)
    assert "q8_0" in report.encodings
    before, after = _logits(source), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.03 * (before.abs().median() + 1)


@pytest.mark.parametrize("experts", ["fp8", "mxfp4", "q4_0"])
@pytest.mark.parametrize("name", ["awq", "gptq", "int4 zeros said", "nvfp4 compressed", "fp8 channel", "modelopt fp8"])
def test_experts_take_other_bits_and_blocks_than_the_config_says_of_the_rest(name, experts, tmp_path):
    source = quantized.write(tmp_path / "source", quantized.FORMATS[name])
    convert(source, tmp_path / "out", experts, progress=False)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "emoe" and said["rest"] == (quantized.FORMATS[name].config or {})
    before, after = _logits(source), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.4 * before.abs().median()


def test_experts_without_zero_points_lie_beside_a_rest_that_has_them(tmp_path):
    form = replace(quantized.FORMATS["int4 zeros said"], encode=quantized.byte("_scale", 1, 0), family="qwen3_moe_72")
    groups = form.config["config_groups"]
    of_experts = {"group_1": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}
    said = {**form.config, "config_groups": {**groups, **of_experts}}
    source = quantized.write(tmp_path / "source", form, config=said)
    report = convert(source, tmp_path / "out", "q4_0", progress=False)
    assert set(report.encodings) == {"q4_0", "int4-32-bfloat16"}
    before, after = _logits(source), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.4 * before.abs().median()


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_what_a_file_of_the_quantizer_says_of_the_rest_is_kept(version, tmp_path):
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": version}
    form = quantized.FORMATS["gptq" if version == "gptq" else "gptq v2"]
    source = quantized.write(tmp_path / "source", form, config={}, files={"quantize_config.json": said})
    convert(source, tmp_path / "out", "q8_0", progress=False)
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    before, after = _logits(source), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.03 * (before.abs().median() + 1)


def test_groups_are_still_confirmed_where_emoe_wrote_the_config(tmp_path):
    source = quantized.write(
        tmp_path / "source", replace(quantized.FORMATS["int8"], linears=None, family="qwen3_moe_72")
    )
    convert(source, tmp_path / "out", "q4_0", progress=False)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["encodings"] == ["int4-32-bfloat16", "q4_0"]
    assert "rest" not in config["quantization_config"]
    before, after = _logits(source), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.4 * before.abs().median()
    config["quantization_config"]["encodings"] = ["int4-16-bfloat16", "q4_0"]
    path.write_text(json.dumps(config))
    with pytest.raises(errors.CheckpointError, match="3 scales for 72 columns"):
        emoe.plan(tmp_path / "out", memory_budget=1.0, calibrate=False)


@pytest.mark.parametrize("experts", ["q4_0", "mxfp4"])
def test_groups_that_may_be_cut_are_told_beside_a_rest_that_has_none(experts, tmp_path):
    """Three scales for 72 columns may be for 32 each or for 24, and what is said of FP8 does not tell."""
    source = quantized.write(tmp_path / "source", replace(quantized.FORMATS["fp8 blocks"], family="qwen3_moe_72"))
    report = convert(source, tmp_path / "out", experts, progress=False)
    assert "int4-32-bfloat16" in report.encodings
    before, after = _logits(source), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.4 * before.abs().median()


def test_a_config_that_has_infinity_can_be_the_source(tmp_path):
    source = quantized.write(tmp_path / "source", quantized.FORMATS["fp8 blocks"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))
    convert(source, tmp_path / "out", "q8_0", progress=False)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["time_step_limit"] == [0.0, float("inf")]
    assert torch.isfinite(_logits(tmp_path / "out")).all()


@pytest.mark.parametrize("name", ["gpt-oss", "int4", "q4_0", "fp8 blocks", "awq"])
def test_a_rest_of_q8_0_leaves_what_is_encoded_already_as_it_is(name, tmp_path):
    source = quantized.write(tmp_path / "source", quantized.FORMATS[name])
    convert(source, tmp_path / "keep", "q8_0", progress=False)
    report = convert(source, tmp_path / "out", "q8_0", rest="q8_0", progress=False)
    kept, made = (read_headers(checkpoint_files(tmp_path / folder)) for folder in ("keep", "out"))
    anew = {each.removesuffix("_q8_0") for each in set(made) - set(kept)}
    assert anew == set(kept) - set(made) and len(anew) == report.rest_encoded
    assert all(kept[each].dtype == "float32" and len(kept[each].shape) == 2 for each in anew)
    plain = name in ("gpt-oss", "int4")
    assert anew >= {"lm_head.weight"} and ("model.layers.0.self_attn.q_proj.weight" in anew) == plain
    assert not any("embed" in each or "norm" in each or "router" in each or ".gate." in each for each in anew)
    before, after = _logits(tmp_path / "keep"), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.03 * (before.abs().median() + 1)
