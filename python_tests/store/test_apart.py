"""Checkpoints whose experts lie apart though the family has them in one tensor: as quantizers write them."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager

import families
import pytest
import quantized
import torch
import transformers as tf
from quantized import Format, byte, int4, nvfp4
from safetensors.torch import load_file, save_file
from seam.test_model_classes import MODELS

import emoe
from emoe import errors
from emoe.convert.run import convert

FUSED = ("aria_text", "gemma4_text", "gpt_oss", "granitemoe", "granitemoeshared", "minimax_m3_text")
WAYS = {"llm-compressor": "{expert}.{layer}", "modelopt": "{layer}.{expert}"}
WHOLE = re.compile(
    r"(?P<experts>.*\bexperts)\.(?P<what>gate_up_proj|down_proj|fc1|fc2)(\.weight)?(?P<bias>_bias)?"
    r"|(?P<granite>.*block_sparse_moe)\.(?P<linear>input|output)_linear\.weight"
)


def _taken_apart(tensors: dict, config: tf.PretrainedConfig, way: str) -> dict:
    """Experts as linear layers of their own, [out, in], gate and up apart."""
    made = {}
    for name, tensor in tensors.items():
        found = WHOLE.fullmatch(name)
        if found is None:
            made[name] = tensor
            continue
        bias = found["bias"] is not None
        if config.model_type in ("gpt_oss", "aria_text") and not bias:
            tensor = tensor.mT
        gated = (found["what"] or found["linear"]) in ("gate_up_proj", "fc1", "input")
        halves = {"down_proj": tensor}
        if gated and config.model_type == "gpt_oss":
            halves = {"gate_proj": tensor[:, ::2], "up_proj": tensor[:, 1::2]}
        elif gated:
            halves = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True))
        path = found["experts"] or f"{found['granite']}.experts"
        for layer, half in halves.items():
            for expert, each in enumerate(half):
                key = WAYS[way].format(expert=expert, layer=layer)
                made[f"{path}.{key}.{'bias' if bias else 'weight'}"] = each.clone(memory_format=torch.contiguous_format)
    assert len(made) > len(tensors)
    return made


def _written(folder, family: str, way: str, form: Format | None = None):
    """folder/whole as the family has it, folder/apart; of a format, folder/quantized and folder/plain."""
    families.save(family, folder / "whole")
    apart = _apart(folder, way)
    return apart if form is None else quantized.write(folder, form, source=apart)


def _apart(folder, way: str):
    """folder/apart of folder/whole."""
    config = tf.AutoConfig.from_pretrained(folder / "whole")
    apart = folder / "apart"
    apart.mkdir()
    (apart / "config.json").write_text((folder / "whole" / "config.json").read_text())
    tensors = _taken_apart(load_file(folder / "whole" / "model.safetensors"), config, way)
    save_file(tensors, apart / "model.safetensors", metadata={"format": "pt"})
    return apart


def _logits(model) -> torch.Tensor:
    ids = torch.randint(3, families.VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


def _stock(path):
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@contextmanager
def _running(path, **options):
    options = {"memory_budget": 0.5, "dtype": torch.float32, "attn_implementation": "eager", **options}
    model = emoe.from_pretrained(path, **options)
    yield model
    model.emoe.close(restore=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FUSED)
def test_plain_experts_that_lie_apart_are_those_of_the_family(family, way, tmp_path):
    apart = _written(tmp_path, family, way)
    with _running(apart, kernels="stock") as model:
        torch.testing.assert_close(_logits(model), _logits(_stock(tmp_path / "whole")), rtol=1e-5, atol=1e-5)


FORMATS = {"fp8": byte("_scale_inv", 32, 32), "nvfp4": nvfp4(False), "int4": int4(16)}


@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, "fp8") for family in FUSED), *((family, name) for family in FUSED[1:3] for name in ("nvfp4", "int4"))],
)
def test_quantized_experts_that_lie_apart_run_on_the_numbers_that_they_stand_for(family, name, tmp_path):
    way = "modelopt" if name == "nvfp4" else "llm-compressor"
    _written(tmp_path, family, way, Format(FORMATS[name], "", family=family))
    with _running(tmp_path / "quantized", kernels="stock") as model:
        assert not {"float32", "bfloat16"} >= set(model.emoe.plan.encodings)
        logits = _logits(model)
    with _running(tmp_path / "plain", kernels="stock") as model:  # held to Transformers above
        torch.testing.assert_close(logits, _logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe", "gemma4"])
def test_models_with_images_find_experts_that_lie_apart(name, way, tmp_path):
    cls, config = MODELS[name]
    torch.manual_seed(0)
    plain = cls(config()).eval()
    plain.save_pretrained(tmp_path / "whole", save_original_format=False)
    apart = _apart(tmp_path, way)
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(5))
    with _running(apart, kernels="stock", attn_implementation=None) as model, torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_native_kernels_compute_on_experts_that_lie_apart(tmp_path):
    _written(tmp_path, "gemma4_text", "llm-compressor", Format(FORMATS["fp8"], "", family="gemma4_text"))
    with _running(tmp_path / "quantized", kernels="native") as model:
        assert {each.native is None for each in model.emoe.plan.layouts} == {False}
        logits = _logits(model)
    with _running(tmp_path / "plain", kernels="stock") as model:
        torch.testing.assert_close(logits, _logits(model), rtol=0.02, atol=0.02)


def test_loading_experts_that_lie_apart_reports_no_tensor_as_unexpected(tmp_path, caplog):
    apart = _written(tmp_path, "granitemoe", "modelopt")
    tf.logging.enable_propagation()
    with caplog.at_level(logging.WARNING), _running(apart):
        assert "UNEXPECTED" not in caplog.text


def _fails(path) -> errors.CheckpointError:
    with pytest.raises(errors.CheckpointError) as caught, _running(path):
        pass
    return caught.value


def _changed(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_is_missing_among_those_apart_is_named(way, tmp_path):
    apart = _written(tmp_path, "minimax_m3_text", way)
    lost = "model.layers.1.mlp.experts." + WAYS[way].format(expert=5, layer="up_proj") + ".weight"
    _changed(apart, lambda tensors: tensors.pop(lost))
    assert lost in str(_fails(apart))


def test_all_of_a_layer_missing_among_those_apart_is_refused(tmp_path):
    apart = _written(tmp_path, "gemma4_text", "modelopt")
    _changed(apart, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.experts.up" in name])
    assert "without its like, experts.up_proj.*.weight, for model.layers.1.experts.gate_up_proj" in str(_fails(apart))


def test_experts_that_lie_there_apart_and_in_one_tensor_are_refused_by_both(tmp_path):
    apart = _written(tmp_path, "gemma4_text", "llm-compressor")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    name = "model.layers.0.experts.down_proj"
    _changed(apart, lambda tensors: tensors.update({name: whole[name]}))
    message = str(_fails(apart))
    assert name in message and re.search(r"experts\.\d+\.down_proj\.weight", message)


def test_a_plan_by_headers_alone_counts_experts_that_lie_apart(tmp_path):
    apart = _written(tmp_path, "granitemoe", "llm-compressor")
    planned, whole = (emoe.plan(path, memory_budget=0.5) for path in (apart, tmp_path / "whole"))
    assert planned.bytes_per_expert == whole.bytes_per_expert
    assert planned.non_expert_bytes == whole.non_expert_bytes


def test_conversion_reads_experts_that_lie_apart(tmp_path):
    apart = _written(tmp_path, "minimax_m3_text", "llm-compressor")
    convert(apart, tmp_path / "out", "q8_0", progress=False)
    with _running(tmp_path / "out", kernels="stock") as model:
        logits = _logits(model)
    torch.testing.assert_close(logits, _logits(_stock(tmp_path / "whole")), rtol=0.1, atol=0.1)
