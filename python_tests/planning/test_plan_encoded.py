"""Plans of quantized checkpoints: from headers, and from a config alone, with no weight on the disk."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import families
import pytest
import quantized
import torch
import transformers as tf
from quantized import FORMATS
from safetensors.torch import save_file

import emoe
from emoe import errors
from emoe.planning import bandwidth
from emoe.planning import plan as planning
from emoe.planning.encoded import stored
from emoe.planning.meta import meta_model
from emoe.store.headers import read_headers

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}  # fmt: skip
QWEN = {"num_hidden_layers": 48, "head_dim": 128, "dtype": "bfloat16"}


def _alone(folder: Path, config: tf.PretrainedConfig) -> Path:
    config.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json"}
    return folder


def _plan(folder: Path, **options):
    return emoe.plan(folder, options.pop("budget", 0.5), calibrate=False, **options)


# --- published sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "published", "encoding"),
    [
        # Each `total_size` of model.safetensors.index.json, DeepSeek's with its layer of multi-token prediction.
        pytest.param(
            lambda: tf.GptOssConfig(num_hidden_layers=24, num_local_experts=32, quantization_config=GPT_OSS),
            13_761_264_768, "mxfp4", id="gpt-oss-20b",
        ),
        pytest.param(
            lambda: tf.DeepseekV3Config(quantization_config=BLOCKS),
            688_586_727_753, "e4m3-128x128-float32", id="DeepSeek-V3",
        ),
        pytest.param(
            lambda: tf.Qwen3MoeConfig(**QWEN, quantization_config={**BLOCKS, "modules_to_not_convert": ["lm_head"]}),
            31.2e9, "e4m3-128x128-float32", id="Qwen3-30B-A3B-FP8",
        ),
    ],
)  # fmt: skip
def test_a_config_alone_gives_the_published_size(config, published, encoding, tmp_path):
    folder = _alone(tmp_path, config())
    began = time.process_time()
    plan = _plan(folder)
    assert time.process_time() - began < 10
    assert plan.checkpoint_bytes == pytest.approx(published, rel=0.002)
    assert plan.source == "config" and any("no weights here" in note for note in plan.notes)
    assert plan.encodings == (encoding,) and plan.dtype == "bfloat16"
    assert plan.checkpoint_bytes == pytest.approx(plan.model_bytes + plan.not_loaded_bytes, rel=1e-4)
    json.dumps(plan.to_dict())


def _sizes(folder: Path, config: tf.PretrainedConfig):
    """Of the checkpoint and one expert, without what a plan asks beside it."""
    model = meta_model(_alone(folder, config))
    found = stored(folder, model, config, {})
    assert found.source == "config"
    return found.forms.sizes, found.forms.experts[0].nbytes


def test_a_layer_of_multi_token_prediction_is_counted_and_said_not_to_be_loaded(tmp_path):
    sizes, expert = _sizes(tmp_path, tf.DeepseekV3Config(quantization_config=BLOCKS))
    shared = 2 * 129280 * 7168 * 2  # embedding and output projection once more
    assert sizes.not_loaded == pytest.approx(shared + 256 * expert + 7168 * 14336 * 2, rel=0.03)
    without, _ = _sizes(tmp_path / "without", tf.DeepseekV3Config(quantization_config=BLOCKS, num_mtp_layers=0))
    assert without.not_loaded == 0 and without.nbytes == sizes.nbytes - sizes.not_loaded


def test_a_layer_of_multi_token_prediction_that_cannot_be_made_is_as_the_last_of_the_model(tmp_path):
    config = tf.DeepseekV4Config(num_hidden_layers=3, quantization_config={**BLOCKS, "expert_dtype": "fp4"})
    sizes, expert = _sizes(tmp_path, config)
    assert sizes.not_loaded == pytest.approx(config.n_routed_experts * expert, rel=0.2)


# --- as the files ----------------------------------------------------------------------------------------------------

# Configs that say of linear layers what the tests' checkpoints have.
_SAID = {
    "mxfp4 compressed": {"ignore": ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"]},
    "int4": {"ignore": ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"]},
    "nvfp4": {"ignore": ["lm_head"]},
}
_EXACT = [
    "fp8 blocks", "fp8 blocks 64", "fp8 ragged", "fp8 ragged even", "fp8 one scale", "fp8 qscale", "mxfp8",
    "fp8 channel", "fp8 tensor", "fp8 compressed blocks", "int8", "gpt-oss", "mxfp4 compressed",
    "deepseek-v4", "deepseek-v4 32x32",
    "nvfp4", "nvfp4 compressed", "int4", "awq", "gptq", "gptq order",
]  # fmt: skip


@pytest.mark.parametrize("name", _EXACT)
def test_a_config_alone_says_what_the_files_do(name, tmp_path):
    config = {**FORMATS[name].config, **_SAID.get(name, {})}
    full = quantized.write(tmp_path, FORMATS[name], config=config)
    (tmp_path / "alone").mkdir()
    shutil.copy(full / "config.json", tmp_path / "alone")
    by_files, by_config = _plan(full), _plan(tmp_path / "alone")
    assert (by_files.source, by_config.source) == ("headers", "config")
    assert by_config.layouts == by_files.layouts and by_config.experts == by_files.experts
    assert by_config.expert_bytes == by_files.expert_bytes
    assert (by_config.encoded_bytes, by_config.decoded_bytes) == (by_files.encoded_bytes, by_files.decoded_bytes)
    tensors = read_headers(sorted(full.glob("*.safetensors"))).values()
    assert by_files.checkpoint_bytes == sum(each.nbytes for each in tensors)
    # Scales of activations are not said.
    assert by_config.checkpoint_bytes == by_files.checkpoint_bytes - by_files.not_loaded_bytes


@pytest.mark.parametrize("name", families.FAMILIES)
def test_plain_checkpoints_of_every_family_are_as_large_as_their_config_says(name, checkpoint, tmp_path):
    shutil.copy(Path(checkpoint(name)) / "config.json", tmp_path)
    by_files, by_config = _plan(checkpoint(name)), _plan(tmp_path)
    assert by_config.checkpoint_bytes - by_config.not_loaded_bytes == by_files.checkpoint_bytes
    assert by_files.not_loaded_bytes == by_files.encoded_bytes == by_config.encoded_bytes == 0
    assert by_config.layouts == by_files.layouts


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_planned_in_fp8_by_its_config_alone(name, checkpoint, tmp_path):
    config = json.loads((Path(checkpoint(name)) / "config.json").read_text())
    said = {**BLOCKS, "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    plan, plain = _plan(tmp_path, dense="torch"), _plan(checkpoint(name))
    assert plan.encodings == ("e4m3-16x16-float32",)
    assert 0.25 * plain.expert_bytes < plan.expert_bytes < 0.28 * plain.expert_bytes  # of float32
    assert plan.encoded_bytes == pytest.approx(plan.decoded_bytes * 0.254, rel=0.01)
    assert plan.non_expert_bytes == plain.non_expert_bytes
    assert plan.non_expert_stored_bytes == plan.non_expert_bytes - plan.decoded_bytes + plan.encoded_bytes
    kept = _plan(tmp_path)  # what stays encoded takes less memory, and as much of the disk
    assert kept.non_expert_stored_bytes == plan.non_expert_stored_bytes and kept.model_bytes == plan.model_bytes
    assert kept.encoded_bytes <= plan.encoded_bytes and kept.non_expert_bytes <= plan.non_expert_bytes
    assert kept.kept_bytes == plan.encoded_bytes - kept.encoded_bytes and plan.kept_bytes == 0
    assert kept.kept_encodings == (plan.encodings if kept.kept_bytes else ())
    in_memory = kept.non_expert_stored_bytes + kept.decoded_bytes - kept.encoded_bytes
    assert 0 <= kept.non_expert_bytes - in_memory < 0.01 * in_memory  # planes lie at multiples of 64 bytes


def test_the_plan_says_which_kernels_compute_the_experts(tmp_path):
    full = quantized.write(tmp_path, FORMATS["fp8 blocks"])
    assert [(row["kernels"], row["reason"]) for row in _plan(full).experts] == [("native", "")]
    assert [(row["kernels"], row["reason"]) for row in _plan(full, kernels="stock").experts] == [
        ("stock", "kernels='stock'")
    ]


def test_tensors_of_no_part_of_the_model_are_said_not_to_be_loaded(tmp_path):
    full = quantized.write(tmp_path, FORMATS["fp8 blocks"])
    before = _plan(full)
    index = json.loads((full / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(
        ("model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"), "more.safetensors"
    )
    more = {"model.layers.2.eh_proj.weight": torch.zeros(128, 256), "model.layers.2.enorm.weight": torch.zeros(128)}
    save_file(more, full / "more.safetensors")
    (full / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = _plan(full)
    assert plan.not_loaded_bytes == 4 * (128 * 256 + 128)
    assert plan.checkpoint_bytes == before.checkpoint_bytes + plan.not_loaded_bytes
    assert (plan.expert_bytes, plan.non_expert_bytes) == (before.expert_bytes, before.non_expert_bytes)


# --- where it is said ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json"])
def test_a_quantizer_s_file_beside_the_config_is_believed_where_that_says_nothing(file, tmp_path):
    said = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.self_attn*"]}}
    if file == "quantize_config.json":
        said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    quantized.MODELS["qwen3_moe"]().save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(said))
    plan = _plan(tmp_path, dense="torch")
    assert plan.encodings == (("nvfp4",) if "quantization" in said else ("gptq-32-float16",))
    assert plan.dtype == "bfloat16" and any(f"what {file} says" in note for note in plan.notes)
    assert bool(plan.encoded_bytes) == (file == "quantize_config.json")


def test_a_config_within_the_text_config_is_believed(tmp_path):
    config = tf.Qwen3_5MoeConfig(
        text_config={**families.FAMILIES["qwen3_5_moe_text"]().to_dict(), "quantization_config": FORMATS["int4"].config}
    )
    config.architectures = ["Qwen3_5MoeForConditionalGeneration"]
    plan = _plan(_alone(tmp_path, config))
    assert plan.encodings == ("int4-32-bfloat16",)


def test_without_a_word_of_encodings_weights_are_planned_as_plain(tmp_path):
    plan = _plan(_alone(tmp_path, quantized.MODELS["qwen3_moe"]()), dtype="bfloat16")
    assert plan.encodings == ("bfloat16",) and plan.source == "config" and not plan.notes


def test_the_caller_s_dtype_changes_memory_and_not_the_disk(tmp_path):
    folder = _alone(tmp_path, tf.Qwen3MoeConfig(num_hidden_layers=1, dtype="bfloat16", quantization_config=BLOCKS))
    half, single = _plan(folder), _plan(folder, dtype="float32")
    assert half.checkpoint_bytes == single.checkpoint_bytes and half.expert_bytes == single.expert_bytes
    assert single.non_expert_bytes == 2 * half.non_expert_bytes or single.decoded_bytes == 2 * half.decoded_bytes


@pytest.mark.parametrize("said", [{"quant_method": "hqq"}, {"quant_method": "gptq", "bits": 4, "group_size": 7}])
def test_what_a_config_leaves_open_is_refused_with_the_way_out(said, tmp_path):
    folder = _alone(tmp_path, quantized.MODELS["qwen3_moe"]())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    with pytest.raises(errors.UnsupportedModelError, match=r"config\.json says"):
        _plan(folder)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that cannot be asked, with a cache that holds what a test puts into `snapshot`."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot, {"cache_dir": tmp_path / "hub"}


def test_a_hub_id_is_planned_by_its_config_alone(hub):
    snapshot, where = hub
    tf.Qwen3MoeConfig(num_hidden_layers=1, quantization_config=BLOCKS).save_pretrained(snapshot)
    plan = emoe.plan("some/model", 0.5, calibrate=False, **where)
    assert plan.source == "config" and plan.encodings == ("e4m3-128x128-float32",)


def test_a_hub_id_whose_files_are_in_the_cache_is_planned_by_their_headers(hub, tmp_path):
    snapshot, where = hub
    full = quantized.write(tmp_path, FORMATS["fp8 blocks bfloat16"])
    for path in full.iterdir():
        shutil.copy(path, snapshot)
    plan = emoe.plan("some/model", 0.5, calibrate=False, **where)
    assert plan.source == "headers" and plan.encodings == ("e4m3-128x128-bfloat16",)
    next(snapshot.glob("*-00002-*")).unlink()
    plan = emoe.plan("some/model", 0.5, calibrate=False, **where)
    assert plan.source == "config" and plan.encodings == ("e4m3-128x128-float32",)


# --- what a plan makes of it -----------------------------------------------------------------------------------------


def test_the_forecast_goes_by_the_bytes_of_encoded_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "measure", lambda folder: bandwidth.Rates(10e9, 1e9, "made up"))
    folder = _alone(tmp_path, tf.GptOssConfig(num_hidden_layers=2, num_local_experts=8, quantization_config=GPT_OSS))
    plan = emoe.plan(folder, 0.5)
    each = 2 * 4 * plan.bytes_per_expert  # layers, experts of a token
    seconds = (plan.non_expert_bytes + each) / 10e9 + 0.5 * each / 1e9
    assert plan.tokens_per_second[0] == pytest.approx(1 / seconds)


def test_the_forecast_goes_by_the_bytes_of_each_layer():
    rates = bandwidth.Rates(10.0, 1.0, "")
    low, high = planning._forecast(rates, 100, [10, 30], (4, 4), (4, 4), 2, copies=(), masses=(1.0,))
    assert low == high == pytest.approx(1 / ((100 + 2 * 40) / 10))


def test_layers_that_are_encoded_alike_are_told_together(tmp_path):
    kinds = {0: "fp8 blocks", 1: "int4"}

    def which(name):
        if ".experts." not in name:
            return None
        if "down_proj" in name:
            return FORMATS["fp8 blocks"].encode
        return FORMATS[kinds[int(name.split(".")[2])]].encode

    plan = _plan(quantized.write(tmp_path, FORMATS["fp8 blocks"], config={}, which=which))
    fp8, int4 = "e4m3-128x128-float32", "int4-32-bfloat16"
    assert [row["layers"] for row in plan.experts] == [[0], [1]]
    assert [row["encodings"] for row in plan.experts] == [
        {"gate": fp8, "up": fp8, "down": fp8}, {"gate": int4, "up": int4, "down": fp8},
    ]  # fmt: skip
    sizes = [row["bytes_per_expert"] for row in plan.experts]
    assert plan.bytes_per_expert == max(sizes) and plan.expert_bytes == 6 * sum(sizes)
    assert plan.decoded is None


def test_what_is_outside_experts_is_decoded_and_the_plan_says_from_what_and_why(tmp_path):
    folder = quantized.write(tmp_path, FORMATS["fp8 blocks"], rest=torch.bfloat16)
    plan = _plan(folder, dense="torch")
    assert plan.decoded["stored_bytes"] == plan.encoded_bytes < plan.decoded["bytes"] == plan.decoded_bytes
    assert "torch" in plan.decoded["why"] and plan.to_dict()["decoded"] == plan.decoded
    assert plan.non_expert_stored_bytes == plan.non_expert_bytes - plan.decoded_bytes + plan.encoded_bytes
    kept = _plan(folder)
    assert kept.decoded is None and not any("decoded to" in note for note in kept.notes)
    assert kept.non_expert_stored_bytes == plan.non_expert_stored_bytes


def test_weights_that_are_encoded_when_they_are_loaded_are_as_large_on_the_disk_as_before(tmp_path):
    folder = _alone(tmp_path, tf.Qwen3MoeConfig(num_hidden_layers=1, dtype="bfloat16"))
    plain, smaller = _plan(folder), _plan(folder, dense_encoding="q8_0")
    assert smaller.non_expert_bytes < plain.non_expert_bytes == plain.non_expert_stored_bytes
    assert smaller.non_expert_stored_bytes == plain.non_expert_bytes and smaller.decoded is None


def test_the_rest_in_memory_is_what_is_no_expert(tmp_path):
    folder = _alone(tmp_path, tf.Qwen3MoeConfig(num_hidden_layers=1, dtype="bfloat16"))
    model = meta_model(folder)
    outside = [each for name, each in model.named_parameters() if ".experts." not in name]
    kept = sum(each.numel() * 2 for each in outside)
    assert planning.rest_bytes(model) - kept == sum(each.numel() * each.itemsize for each in model.buffers())


def test_a_wrapped_model_has_no_checkpoint():
    model = emoe.wrap(families.build("olmoe"), memory_budget=0.5)
    plan = model.emoe.plan
    assert (plan.source, plan.checkpoint_bytes, plan.decoded) == ("model", None, None)
    assert [row["encodings"]["gate"] for row in plan.experts] == ["float32"]
    model.emoe.close()
