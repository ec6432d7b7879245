"""Quantized checkpoints: experts read as they lie, the rest decoded, the numbers those that the encoder knows."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import families
import huggingface_hub
import pytest
import quantized
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import FORMATS, Format, byte, either, fp8, fused, int4, mxfp4, nvfp4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeConfig

import emoe
from emoe import errors
from emoe.model.config import without_quantization
from emoe.model.encoding import encoding
from emoe.store import read_layer
from emoe.store.companions import encoded, grouped, plane_bytes
from emoe.store.declared import declared
from emoe.store.headers import DTYPES, TensorEntry, read_headers

MIB = 1 << 20
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(name of a format) -> folder with `quantized` and `plain`, written on first use."""
    root = tmp_path_factory.mktemp("quantized")

    def get(name: str) -> Path:
        folder = root / name.replace("/", "-")
        if not folder.exists():
            quantized.write(folder, FORMATS[name])
        return folder

    return get


def _ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(3))


def _load(path: Path, budget: float = 0.5, dtype: torch.dtype = torch.float32, **options):
    return emoe.from_pretrained(path, memory_budget=budget, dtype=dtype, kernels="stock", **options)


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(_ids()).logits


def _truth(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32).eval()


def _assert_same(logits: torch.Tensor, truth: torch.Tensor) -> None:
    assert ((logits - truth).norm() / truth.norm()).item() <= 1e-5


def _assert_runs_as_the_truth(folder: Path, **options) -> None:
    model = _load(folder / "quantized", **options)
    _assert_same(_logits(model), _logits(_truth(folder)))
    model.emoe.close(restore=False)


def _fails(path: Path, error=errors.CheckpointError, **options) -> errors.CheckpointError:
    with pytest.raises(error) as caught:
        _load(path, **options)
    return caught.value


def _change(path: Path, change) -> None:
    """Rewrites every file of a checkpoint; `change` gets all tensors, and those it leaves stay where they were."""
    files = {file: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    tensors = {name: value.clone() for found in files.values() for name, value in found.items()}
    where = {name: file for file, found in files.items() for name in found}
    change(tensors)
    for file in files:
        mine = {name: value for name, value in tensors.items() if where.get(name, next(iter(files))) == file}
        save_file(mine, file, metadata={"format": "pt"})


# --- every format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_runs_as_transformers_does_on_the_numbers_that_it_stands_for(name, written):
    folder, form = written(name), FORMATS[name]
    truth = _truth(folder)
    layer = truth.config.get_text_config()
    experts = getattr(layer, "num_experts", None) or getattr(layer, "num_local_experts", None) or layer.n_routed_experts
    results, tokens = [], []
    for budget in (1e-9, 2 / experts, 0.5, 1.0):  # one slot a layer, those of a token, half, all
        model = _load(folder / "quantized", budget)
        assert model.emoe.plan.encodings == (form.encoding,)
        assert not hasattr(model.config, "quantization_config")
        results.append(_logits(model))
        tokens.append(model.generate(_ids(1), max_new_tokens=6, do_sample=False))
        model.emoe.close(restore=False)
    _assert_same(results[0], _logits(truth))
    assert all(torch.equal(results[0], each) for each in results[1:])
    wanted = truth.generate(_ids(1), max_new_tokens=6, do_sample=False)
    assert all(torch.equal(wanted, each) for each in tokens)


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4", "deepseek-v4", "gptq", "q4_0"])
def test_what_is_outside_experts_is_decoded_to_the_dtype_of_the_model(name, written):
    model = _load(written(name) / "quantized", dtype=torch.bfloat16)
    truth = _truth(written(name)).state_dict()
    outside = {key: value for key, value in model.state_dict().items() if ".experts." not in key}
    assert outside.keys() == {key for key in truth if ".experts." not in key}
    for key, value in outside.items():
        assert torch.equal(value, truth[key].to(value.dtype)), key
        assert value.dtype == torch.bfloat16 or "proj" not in key, key


@pytest.mark.parametrize("name", ["fp8 blocks", "deepseek-v4", "mxfp4 compressed"])
def test_a_rest_in_bfloat16_runs_in_float32_as_well(name, tmp_path):
    quantized.write(tmp_path, FORMATS[name], rest=torch.bfloat16)
    _assert_runs_as_the_truth(tmp_path)


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_experts_of_every_family_are_matrices_through_its_own_conversion(name, tmp_path):
    form = Format(either(byte("_scale_inv", 32, 32)), "e4m3-32x32-float32", family=name)
    quantized.write(tmp_path, form)
    model = _load(tmp_path / "quantized")
    assert form.encoding in model.emoe.plan.encodings
    _assert_same(_logits(model), _logits(_truth(tmp_path)))


def test_weights_kept_inputs_by_outputs_are_left_to_the_kernels_of_the_family(tmp_path):
    form = Format(fused(byte("_scale_inv", 32, 32)), "e4m3-32x32-float32", family="gpt_oss")
    quantized.write(tmp_path, form)
    model = _load(tmp_path / "quantized")
    assert {each.native for each in model.emoe.plan.layouts} == {None}
    assert "a row for each input" in model.emoe.plan.layouts[0].reason


def test_an_expert_lies_in_a_slot_as_in_its_files(written):
    model = _load(written("fp8 blocks bfloat16") / "quantized")
    store = model.emoe.store
    form = store.layers[0].form
    assert [(each.name, each.dtype, each.shape) for each in form.stored] == [
        ("gate_up_proj.0.codes", "float8_e4m3fn", (160, 128)), ("gate_up_proj.0.scales", "bfloat16", (2, 1)),
        ("gate_up_proj.1.codes", "float8_e4m3fn", (160, 128)), ("gate_up_proj.1.scales", "bfloat16", (2, 1)),
        ("down_proj.0.codes", "float8_e4m3fn", (128, 160)), ("down_proj.0.scales", "bfloat16", (1, 2)),
    ]  # fmt: skip
    assert form.nbytes == 3 * 160 * 128 + (2 + 2 + 2) * 2 == model.emoe.plan.bytes_per_expert
    for piece in store.layers[0].pieces[0]:
        assert piece.rows * piece.cols == piece.nbytes // (2 if piece.src_dtype == "bfloat16" else 1)
    assert {piece.tensor for piece in store.layers[1].pieces[3]} >= {GATE, f"{GATE}_scale_inv"}


# --- mixed -----------------------------------------------------------------------------------------------------------

_KINDS = {
    "gate_proj": byte("_scale_inv", 128, 128), "up_proj": mxfp4(("_packed", "_scale")), "down_proj": int4(32),
    "q_proj": byte("_scale", 0, 0), "o_proj": nvfp4(divided=False), "lm_head": nvfp4(divided=False),
}  # fmt: skip


def _by_kind(name: str):
    if ".experts." not in name and "self_attn" not in name and "lm_head" not in name:
        return None
    return next((encode for kind, encode in _KINDS.items() if f".{kind}." in f".{name}"), None)


def test_each_weight_has_an_encoding_of_its_own(tmp_path):
    quantized.write(tmp_path, FORMATS["fp8 blocks"], config={}, which=_by_kind)
    _assert_runs_as_the_truth(tmp_path)
    plan = emoe.plan(tmp_path / "quantized", calibrate=False)
    assert plan.encodings == ("e4m3-128x128-float32", "mxfp4", "int4-32-bfloat16")


def test_layers_and_matrices_may_be_plain_beside_others_that_are_not(tmp_path):
    def which(name: str):
        plain = "layers.0." in name or "up_proj" in name or "experts" not in name
        return None if plain else byte("_scale_inv", 128, 128)

    quantized.write(tmp_path, FORMATS["fp8 blocks"], config={}, which=which)
    _assert_runs_as_the_truth(tmp_path)
    plan = emoe.plan(tmp_path / "quantized", calibrate=False, dtype=torch.float32)
    assert plan.encodings == ("float32", "e4m3-128x128-float32")


def test_experts_of_one_layer_in_two_encodings_are_refused_by_both(tmp_path):
    def which(name: str):
        if "experts" not in name:
            return None
        return byte("_scale_inv", 1, 0) if "layers.1.mlp.experts.3.gate" in name else byte("_scale_inv", 64, 64)

    quantized.write(tmp_path, FORMATS["fp8 blocks"], config={}, which=which)
    error = _fails(tmp_path / "quantized")
    assert error.tensor == GATE
    assert "e4m3-row-float32" in str(error) and "e4m3-64x64-float32" in str(error)


# --- configs ---------------------------------------------------------------------------------------------------------


def test_a_config_in_the_text_config_is_found_and_taken_out():
    composite = Qwen3_5MoeConfig(text_config={"quantization_config": FORMATS["int4"].config})
    plain, found = without_quantization(composite)
    assert found == FORMATS["int4"].config
    assert not hasattr(plain.text_config, "quantization_config") and hasattr(
        composite.text_config, "quantization_config"
    )


def test_parts_of_a_config_that_say_different_things_are_all_heard(tmp_path):
    config = Qwen3_5MoeConfig()
    config.quantization_config = {"quant_method": "fp8"}
    config.text_config.quantization_config = {"quant_method": "fp8", "online_rotate": True}
    _, said = without_quantization(config)
    assert said == {"quant_method": "fp8", "text_config": {"quant_method": "fp8", "online_rotate": True}}
    with pytest.raises(errors.CheckpointError, match="online_rotate"):
        declared(said)
    config.text_config.quantization_config = {"quant_method": "fp8"}
    assert without_quantization(config)[1] == {"quant_method": "fp8"}


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_config_of_the_quantizer_beside_confirms_or_is_refused_with_both_blocks(file, tmp_path):
    said = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    path = quantized.write(tmp_path, FORMATS["nvfp4"], config={}, files={file: said})
    _assert_runs_as_the_truth(tmp_path)
    (path / file).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 32}}))
    error = _fails(path)
    assert file in str(error) and "groups of 16" in str(error) and "says 32" in str(error)
    (path / file).write_text("{half")
    assert _fails(path).file == str(path / file)


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("fp8 blocks", fp8(64, 64), ("blocks of 128x128", "blocks of 64x64")),
        ("fp8 blocks 64", fp8(128, 128), ("blocks of 64x64", "blocks of 128x128")),
        ("fp8 channel", fp8(128, 128), ("a scale a row", "blocks of 128x128")),
        ("fp8 tensor", quantized.compressed("x", num_bits=8, strategy="channel"), ("one scale", "a scale a row")),
        ("mxfp8", fp8(1, 64), ("blocks of 1x32", "blocks of 1x64")),
        ("int4", quantized.compressed("x", num_bits=4, strategy="group", group_size=64), ("groups of 32", "says 64")),
        ("int4", quantized.compressed("x", num_bits=8, strategy="group", group_size=32), ("4 bits", "[8]")),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 64}, ("groups of 32", "says 64")),
        ("gptq", {"quant_method": "gptq", "bits": 8, "group_size": 32}, ("4 bits", "[8]")),
        ("gptq 8 bits", {**FORMATS["gptq 8 bits"].config, "group_size": 64}, ("groups of 32", "says 64")),
        ("gptq 8 bits", {**FORMATS["gptq 8 bits"].config, "bits": 4}, ("8 bits", "[4]")),
        ("int8 words", quantized.compressed("x", num_bits=8, strategy="group", group_size=64), ("of 32", "says 64")),
        ("int8 words", FORMATS["int4"].config, ("8 bits", "[4]")),
        ("nvfp4", {"quant_method": "modelopt", "quant_algo": "FP8"}, ("4 bits", "[8]")),
        ("modelopt fp8", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("8 bits", "[4]")),
        ("deepseek-v4 fp8", fp8(32, 32, expert_dtype="fp4"), ("e4m3", "4 bits", "of experts")),
        ("deepseek-v4", fp8(128, 128, expert_dtype="fp8"), ("mxfp4", "8 bits", "of experts")),
    ],
)  # fmt: skip
def test_a_config_that_says_another_block_is_refused_with_both(name, said, words, tmp_path):
    path = quantized.write(tmp_path, FORMATS[name], config=said)
    error = _fails(path)
    assert error.file and error.tensor
    assert all(word in str(error) for word in (*words, "config.json")), error


@pytest.mark.parametrize(
    ("codes", "said", "words"),
    [
        (torch.int8, fp8(64, 64), ("int8", "float")),
        (
            quantized.E4M3,
            quantized.compressed("x", num_bits=8, type="int", strategy="channel"),
            ("float8_e4m3fn", "int"),
        ),
    ],
    ids=["integers", "floats"],
)
def test_bytes_of_a_kind_that_the_config_denies_are_refused(codes, said, words, tmp_path):
    block = (64, 64) if codes == torch.int8 else (1, 0)
    form = Format(byte("_scale_inv", *block, codes=codes), "")
    error = _fails(quantized.write(tmp_path, form, config=said))
    assert error.tensor.endswith(".weight") and all(word in str(error) for word in (*words, "config.json"))


def _square(side: tuple[int, int], end: str):
    """A matrix of FP8 with two scales on either side."""
    codes = TensorEntry("f", "x.weight", "float8_e4m3fn", side, 0, math.prod(side))
    scale = TensorEntry("f", f"x.{end}", "float32", (2, 2), math.prod(side), 16)
    return next(iter(grouped({each.name: each for each in (codes, scale)}).values()))


def test_two_blocks_of_a_config_that_fit_a_matrix_are_refused_by_both():
    """Two scales for 96 rows may be for 64 rows each or for 48."""
    said = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            str(size): {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [size] * 2}}
            for size in (64, 48)
        },
    }
    with pytest.raises(errors.CheckpointError, match="48x48 or blocks of 64x64"):
        encoded(_square((96, 96), "weight_scale"), declared(said), None)


def test_blocks_that_no_config_names_are_square():
    with pytest.raises(errors.CheckpointError, match="weight_block_size would tell"):
        encoded(_square((200, 300), "weight_scale_inv"), declared(None), None)
    assert encoded(_square((200, 256), "weight_scale_inv"), declared(None), None).encoding == "e4m3-128x128-float32"


def _of_parts(encode: quantized.Encoder, rows: int) -> quantized.Encoder:
    """Each `rows` rows of a matrix have a scale of their own, as those of gate and up that were put together."""

    def make(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        made = [encode(part) for part in weight.split(rows)]
        codes = torch.cat([parts[""].view(torch.uint8) for parts, _ in made]).view(quantized.E4M3)
        scales = torch.cat([parts["_scale"].view(-1) for parts, _ in made])
        return {"": codes, "_scale": scales}, torch.cat([truth for _, truth in made])

    return make


@pytest.mark.parametrize("rows", [160, 80])
def test_scales_of_weights_that_were_put_together_are_no_blocks_of_a_power_of_two(rows, tmp_path):
    """Two scales of [320, 128] may be those of gate and up, 160 rows each, and not of 256 rows and 64."""
    path = quantized.write(tmp_path, Format(fused(_of_parts(byte("_scale", 0, 0), rows)), "", family="fused"))
    error = _fails(path)
    assert error.tensor.endswith("_scale") and error.nbytes and "weight_block_size" in str(error)


def test_blocks_that_the_config_names_need_be_no_power_of_two(tmp_path):
    """80 rows of 320 and of 160 share a scale, and all columns do."""
    encode = _of_parts(byte("_scale", 0, 0), 80)
    said = {"quant_method": "fp8", "weight_block_size": [80, 160]}
    path = quantized.write(
        tmp_path, Format(encode, ""), config=said, which=lambda name: encode if "gate_proj" in name else None
    )
    model = _load(path)
    assert "e4m3-80x160-float32" in model.emoe.plan.encodings
    model.emoe.close(restore=False)
    _assert_runs_as_the_truth(tmp_path)


@pytest.mark.parametrize(("group", "fails"), [(24, True), (18, False)])
def test_groups_of_integers_that_may_be_cut_are_refused_where_two_sizes_fit(group, fails, tmp_path):
    """Three groups of 72 columns are of 24, or of 32 and the last of 8; four are of 18 alone."""
    down = "down_proj"
    path = quantized.write(
        tmp_path, Format(int4(group), "", family="qwen3_moe_72"),
        which=lambda name: int4(group) if down in name and ".experts." in name else None,
    )  # fmt: skip
    if fails:
        error = _fails(path)
        assert error.tensor.endswith("_scale") and "groups of 32 or 24" in str(error)
        said = {"quant_method": "x", "group_size": group, "bits": 4}
        shutil.rmtree(path)
        quantized.write(
            tmp_path, Format(int4(group), "", family="qwen3_moe_72"), config=said,
            which=lambda name: int4(group) if down in name and ".experts." in name else None,
        )  # fmt: skip
    _assert_runs_as_the_truth(tmp_path)


@pytest.mark.parametrize("name", ["int4", "int4 zeros said", "gptq"])
def test_groups_longer_than_a_row_are_the_row(name, tmp_path):
    """Where a config says groups of 128, weights of 72 columns beside others of 128 have one scale a row."""
    encode = {"int4": int4(128), "int4 zeros said": int4(128, zeros=True), "gptq": quantized.along_inputs("gptq", 128)}
    form = Format(encode[name], "", FORMATS[name].config, family="qwen3_moe_72")
    config = json.loads(json.dumps(form.config).replace('"group_size": 32', '"group_size": 128'))
    quantized.write(tmp_path, form, config=config)
    _assert_runs_as_the_truth(tmp_path)


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4 compressed", "int4", "awq", "gpt-oss", "deepseek-v4"])
def test_no_config_at_all_is_no_obstacle(name, tmp_path):
    quantized.write(tmp_path, FORMATS[name], config={})
    _assert_runs_as_the_truth(tmp_path)


def test_groups_of_mixed_checkpoints_may_say_different_things(tmp_path):
    said = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
            "group_1": {"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}},
            "group_2": {"weights": {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}},
            "group_3": {"weights": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}},
        },
    }
    quantized.write(tmp_path, FORMATS["fp8 blocks"], config=said, which=_by_kind)
    _assert_runs_as_the_truth(tmp_path)


def test_a_config_of_quantization_over_plain_weights_is_refused_by_its_method(tmp_path):
    path = quantized.write(tmp_path, FORMATS["fp8 blocks"], which=lambda _: None)
    with pytest.raises(errors.UnsupportedModelError, match=r"\(fp8\).*plain: take quantization_config out"):
        _load(path)


def test_codes_of_a_quantizer_that_nobody_reads_are_named_with_what_to_do(tmp_path):
    path = quantized.write(
        tmp_path, FORMATS["fp8 blocks"], which=lambda _: None, config={"quant_method": "bitsandbytes"}
    )

    def packed(tensors):  # a column of two codes a byte, and tables beside it
        for name in [each for each in tensors if "experts" in each]:
            weight = tensors.pop(name)
            tensors[name] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
            tensors[f"{name}.absmax"] = torch.ones(weight.numel() // 64)

    _change(path, packed)
    _reindex(path)
    words = (
        r"\(bitsandbytes\).*experts\.\S+ is uint8 \[\d+, 1\]\. Take the model's checkpoint in bfloat16; emoe convert"
    )
    with pytest.raises(errors.UnsupportedModelError, match=words):
        _load(path)


# --- GPTQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_symmetric_zeros_tell_the_version_where_no_config_does(version, tmp_path):
    form = Format(quantized.along_inputs(version, 32, symmetric=True), f"{version}-32-float16")
    path = quantized.write(tmp_path, form, config={})
    _assert_runs_as_the_truth(tmp_path)
    assert emoe.plan(path, calibrate=False).encodings == (form.encoding,)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_either_key_of_the_quantizer_says_the_version(key, version, tmp_path):
    form = Format(quantized.along_inputs(version, 32, symmetric=False), f"{version}-32-float16")
    path = quantized.write(tmp_path, form, config={"quant_method": "gptq", "bits": 4, "group_size": 32, key: version})
    _assert_runs_as_the_truth(tmp_path)
    assert emoe.plan(path, calibrate=False).encodings == (form.encoding,)


def test_two_keys_that_say_different_versions_are_refused(tmp_path):
    said = {**FORMATS["gptq"].config, "checkpoint_format": "gptq", "format": "gptq_v2"}
    error = _fails(quantized.write(tmp_path, FORMATS["gptq"], config=said))
    assert error.tensor.endswith(".qzeros") and "gptq_v2" in str(error)


def test_other_zeros_without_a_config_are_refused(tmp_path):
    error = _fails(quantized.write(tmp_path, FORMATS["gptq"], config={}))
    assert error.tensor.endswith(".qzeros") and "gptq_v2" in str(error)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_groups_in_an_order_of_their_own_run_in_both_versions(version, symmetric, tmp_path):
    encode = quantized.along_inputs(version, 32, order=True, symmetric=symmetric)
    said = {**FORMATS["gptq order"].config, "checkpoint_format": version}
    path = quantized.write(tmp_path, Format(encode, f"{version}-32-float16-order", said, encode))
    _assert_runs_as_the_truth(tmp_path)
    assert emoe.plan(path, calibrate=False).encodings == (f"{version}-32-float16-order",)


def test_groups_in_an_order_of_their_own_need_no_config(tmp_path):
    encode = quantized.along_inputs("gptq", 32, order=True, symmetric=True)
    quantized.write(tmp_path, Format(encode, "", linears=encode), config={})
    _assert_runs_as_the_truth(tmp_path)


@pytest.mark.parametrize(
    "ordered", ["experts.0.", "experts.3.down_proj", "layers.1.mlp", "q_proj"], ids=lambda each: each.strip(".")
)
def test_weights_in_order_beside_one_in_an_order_of_its_own_are_read_as_it_is(ordered, tmp_path):
    def which(name):
        if ".experts." in name or ("_proj" in name and ".self_attn." in name):
            return quantized.along_inputs("gptq", 32, order=ordered in name)
        return None

    path = quantized.write(tmp_path, FORMATS["gptq order"], which=which)
    plan = emoe.plan(path, calibrate=False, dtype="float32")
    assert plan.encodings == ("gptq-32-float16-order",)
    assert plan.decoded_bytes == sum(each.nbytes for each in _outside_experts(tmp_path / "plain"))
    _assert_runs_as_the_truth(tmp_path)


def _outside_experts(path: Path) -> list[torch.Tensor]:
    return [each for name, each in load_file(path / "model.safetensors").items() if "attn" in name and "_proj" in name]


def test_an_order_that_is_ascending_everywhere_is_none(tmp_path):
    path = quantized.write(tmp_path, replace(FORMATS["gptq"], config=FORMATS["gptq order"].config))
    plan = emoe.plan(path, calibrate=False)
    assert plan.encodings == ("gptq-32-float16",)
    assert [row["kernels"] for row in plan.experts] == ["native"]


def test_one_group_has_no_order_and_need_not_say_it(tmp_path):
    """Inputs of the down projections are 160 in five groups, those of the others 128 in one."""

    def which(name):
        if ".experts." not in name:
            return None
        return quantized.along_inputs("gptq", 32 if "down_proj" in name else 128, order="down_proj" in name)

    def drop(found):
        for name in [each for each in found if each.endswith("up_proj.g_idx")]:
            del found[name]

    said = {**FORMATS["gptq order"].config, "dynamic": {"+:.*(gate|up)_proj": {"group_size": 128}}}
    path = quantized.write(tmp_path, FORMATS["gptq order"], config=said, which=which, change=drop)
    (row,) = emoe.plan(path, calibrate=False).experts
    assert row["encodings"] == {
        "gate": "gptq-128-float16", "up": "gptq-128-float16", "down": "gptq-32-float16-order",
    }  # fmt: skip
    _assert_runs_as_the_truth(tmp_path)


@pytest.mark.parametrize("indices", ["for each", "for all"])
def test_groups_of_all_experts_at_once_have_an_order_for_each_or_one_for_all(indices, tmp_path):
    encoder = quantized.along_inputs("gptq", 16, order=True)

    def together(weight):
        parts, truth = encoder(weight.flatten(0, 1))
        index = parts.pop(".g_idx")
        apart = {end: part.view(len(part), len(weight), -1).transpose(0, 1) for end, part in parts.items()}
        return {**apart, ".g_idx": index}, truth.view(weight.shape)

    encode = fused(encoder) if indices == "for each" else together
    quantized.write(
        tmp_path, Format(encode, "", {**FORMATS["gptq order"].config, "group_size": 16}, family="granitemoe")
    )
    _assert_runs_as_the_truth(tmp_path)


def test_an_order_that_the_config_denies_is_refused_by_both(tmp_path):
    form = Format(quantized.along_inputs("gptq", 32, order=True), "", FORMATS["gptq"].config)
    error = _fails(quantized.write(tmp_path, form), errors.UnsupportedEncodingError)
    assert isinstance(error, errors.UnsupportedModelError)
    assert error.tensor.endswith(".g_idx") and "config.json says desc_act=False" in str(error)


def test_awq_has_no_order(tmp_path):
    def add(found):
        found[GATE.replace("weight", "g_idx")] = (torch.arange(128).flip(0) // 32).to(torch.int32)

    error = _fails(quantized.write(tmp_path, FORMATS["awq"], change=add), errors.UnsupportedEncodingError)
    assert error.tensor == GATE.replace("weight", "g_idx") and "which AWQ does not have" in str(error)


def test_an_order_of_compressed_tensors_that_was_never_written_is_none(tmp_path):
    def begun(found):
        for name in [each for each in found if each.endswith("_packed")]:
            found[name.replace("_packed", "_g_idx")] = torch.full((8 * found[name].shape[1],), -1, dtype=torch.int32)

    path = quantized.write(tmp_path, FORMATS["int4"], change=begun)
    (row,) = emoe.plan(path, calibrate=False).experts
    assert row["encodings"] == dict.fromkeys(("gate", "up", "down"), "int4-32-bfloat16")
    _assert_runs_as_the_truth(tmp_path)


def test_an_order_of_compressed_tensors_is_what_its_config_says(tmp_path):
    gone = f"{GATE}_g_idx"
    error = _fails(quantized.write(tmp_path / "gone", FORMATS["int4 order"], change=lambda found: found.pop(gone)))
    assert error.tensor == f"{GATE}_packed" and gone in str(error) and "config.json" in str(error)
    static = quantized.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="static")
    path = quantized.write(tmp_path / "static", FORMATS["int4 order"], config=static)
    error = _fails(path, errors.UnsupportedEncodingError)
    assert error.tensor.endswith("_g_idx") and "actorder is none or static" in str(error)


def test_ordered_experts_and_linear_layers_are_computed_by_torch_and_say_why(written, caplog):
    model = emoe.from_pretrained(written("gptq order") / "quantized", memory_budget=0.5, dtype=torch.float32)
    assert any("2 of 2 layers run Transformers' own" in each and "act order" in each for each in caplog.messages)
    stats = model.emoe.stats()
    assert stats["kernels"] == {"stock": 2}
    assert len(stats["dense"]["decoded"]) == 8 and not stats["dense"]["bytes"]
    assert all("act order" in each for each in stats["dense"]["decoded"].values())
    _assert_same(_logits(model), _logits(_truth(written("gptq order"))))
    model.emoe.close(restore=False)
    (row,) = model.emoe.plan.experts
    assert row["kernels"] == "stock" and "act order" in row["reason"]


def test_an_order_lies_in_a_slot_as_in_its_file(written):
    model = _load(written("gptq order") / "quantized")
    form = model.emoe.store.layers[0].form
    assert [(each.name, each.dtype, each.shape) for each in form.stored[-4:]] == [
        ("down_proj.0.codes", "int32", (20, 128)), ("down_proj.0.scales", "float16", (5, 128)),
        ("down_proj.0.zeros", "int32", (5, 16)), ("down_proj.0.order", "int32", (1, 160)),
    ]  # fmt: skip
    assert GATE.replace("weight", "g_idx") in {piece.tensor for piece in model.emoe.store.layers[1].pieces[3]}
    model.emoe.close(restore=False)


def test_an_order_that_others_have_and_one_lacks_is_missed_where_no_config_speaks_of_it(tmp_path):
    encode = quantized.along_inputs("gptq", 32, order=True, symmetric=True)
    gone = GATE.replace("weight", "g_idx")
    path = quantized.write(tmp_path, Format(encode, "", linears=encode), config={}, change=lambda each: each.pop(gone))
    error = _fails(path)
    assert error.tensor == GATE.replace("weight", "qweight") and gone in str(error)


@pytest.mark.parametrize(
    ("wide", "words"),
    [(0.25, "holds 16 bits"), (0.5, "8 bits a weight, but config.json says [4]"), (2, "holds 2 bits")],
)
def test_words_of_another_width_than_their_shape_says_are_refused(wide, words, tmp_path):
    def widen(tensors):
        for name in list(tensors):
            if name.endswith("_shape"):
                tensors[name] = torch.tensor([tensors[name][0], int(tensors[name][1] * wide)])

    assert words in str(_fails(quantized.write(tmp_path, FORMATS["int4"], change=widen)))


def _changed(end: str, made):
    def change(tensors):
        for name in [each for each in tensors if each.endswith("gate_proj.weight_packed")]:
            base = name.removesuffix("_packed")
            tensors[base + end] = made(tensors, base)

    return change


def test_eight_bits_in_words_with_zero_points_orders_or_a_cut_word_are_refused_by_name(tmp_path):
    form = FORMATS["int8 words"]
    zeros = _changed("_zero_point", lambda found, base: torch.zeros(40, 4, dtype=torch.int32))
    error = _fails(
        quantized.write(tmp_path / "zeros", form, config=None, change=zeros), errors.UnsupportedEncodingError
    )
    assert "zero points" in str(error) and error.tensor.endswith("_packed")
    order = _changed("_g_idx", lambda found, base: torch.arange(128).mul(5).remainder(128).div(32).to(torch.int32))
    said = replace(form, config=None)
    error = _fails(quantized.write(tmp_path / "order", said, change=order), errors.UnsupportedEncodingError)
    assert "act order" in str(error) and error.tensor.endswith("_g_idx")
    told = quantized.compressed("pack-quantized", num_bits=8, strategy="group", group_size=32, actorder="group")
    assert "the groups of its inputs" in str(_fails(quantized.write(tmp_path / "told", form, config=told)))
    cut = _changed("_shape", lambda found, base: torch.tensor([160, 127]))
    error = _fails(quantized.write(tmp_path / "cut", form, change=cut), errors.UnsupportedEncodingError)
    assert "no whole number of int32" in str(error)


@pytest.mark.parametrize("said", [FORMATS["int4 zeros said"].config, {}], ids=["said", "not said"])
def test_integers_without_the_zero_points_that_others_have_are_refused(said, tmp_path):
    gone = QUERY + "_zero_point"
    path = quantized.write(tmp_path, FORMATS["int4 zeros said"], config=said, change=lambda found: found.pop(gone))
    error = _fails(path)
    assert error.tensor == f"{QUERY}_packed" and gone in str(error)


def test_zero_points_that_the_config_denies_are_refused(tmp_path):
    error = _fails(quantized.write(tmp_path, FORMATS["int4 zeros said"], config=FORMATS["int4"].config))
    assert error.tensor.endswith("_zero_point") and "says that there are none" in str(error)


def test_groups_that_may_have_an_order_of_their_own_and_do_not_say_it_are_refused(tmp_path):
    def drop(found):
        for name in [each for each in found if each.endswith("g_idx")]:
            del found[name]

    for name in ("gptq v2", "gptq order"):
        error = _fails(quantized.write(tmp_path / name, FORMATS[name], change=drop))
        assert error.tensor.endswith(".qweight") and ".g_idx" in str(error) and "config.json" in str(error)
    quantized.write(tmp_path / "in order", FORMATS["gptq"], change=drop)
    _assert_runs_as_the_truth(tmp_path / "in order")


# --- damage ----------------------------------------------------------------------------------------------------------

_ONE_EXPERT = (
    "model.layers.1.mlp.experts.3.gate_proj",
    "model.layers.1.mlp.experts.gate_up_proj",
    "layers.1.ffn.experts.3.w1",
)
_LINEAR = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.kv_a_proj_with_mqa", "layers.0.attn.wq_a")


def _parts(tensors: dict, bases: tuple[str, ...]) -> list[str]:
    ends = ("g_idx", "input_scale", "input_global_scale", "_shape", "_bias")
    return [name for name in tensors if name.startswith(bases) and not name.endswith(ends)]


_OF_SEVERAL = [each for each in FORMATS if not each.startswith("q") and each != "gguf_mxfp4"]


@pytest.mark.parametrize(
    ("name", "bases"),
    [pytest.param(name, _ONE_EXPERT, id=f"{name}, expert") for name in _OF_SEVERAL]
    + [pytest.param(name, _LINEAR, id=f"{name}, attention") for name in _OF_SEVERAL if FORMATS[name].linears],
)
def test_no_weight_runs_without_one_of_its_tensors(name, bases, written, tmp_path):
    path = shutil.copytree(written(name) / "quantized", tmp_path / "model")
    tensors = read_headers(sorted(path.glob("*.safetensors")))
    (path / "model.safetensors.index.json").unlink()
    names = _parts(tensors, bases)
    assert len(names) > 1
    for gone in names:
        copy = shutil.copytree(path, tmp_path / f"{len(gone)}-{names.index(gone)}")
        _change(copy, lambda found, gone=gone: found.pop(gone))
        _reindex(copy)
        error = _fails(copy)
        assert error.file.startswith(str(copy)), error
        base = gone.rpartition(".")[0]
        assert error.tensor.startswith(base) or base in str(error), error
        assert error.tensor == gone or error.nbytes > 0 or ".experts." in gone, error


def _reindex(path: Path) -> None:
    files = sorted(path.glob("*.safetensors"))
    where = {name: file.name for file in files for name in load_file(file)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _take(tensors, name):
    return next(each for each in tensors if each == name)


_ORDER = GATE.replace("weight", "g_idx")
_DAMAGES = {
    "a scale of doubles": ("fp8 blocks", f"{GATE}_scale_inv", lambda t: t.double(), "float64"),
    "a scale of another grid": ("fp8 blocks", f"{GATE}_scale_inv", lambda t: torch.ones(3, 5), "[3, 5]"),
    "a scale with no element": ("fp8 blocks", f"{GATE}_scale_inv", lambda t: torch.ones(0, 1), "no scale"),
    "a scale of three axes": ("fp8 blocks", f"{GATE}_scale_inv", lambda t: torch.ones(2, 1, 3), "no scale"),
    "codes of another shape": ("fp8 blocks", GATE, lambda t: t[:-40].clone(), "scales for"),
    "codes that are plain": ("fp8 blocks", GATE, lambda t: t.float(), "is plain, yet"),
    "codes of another kind": ("fp8 blocks", GATE, lambda t: t.view(torch.uint8), "float32"),
    "a linear layer transposed": (
        "fp8 blocks", QUERY.replace("q_", "k_"), lambda t: t.T.contiguous(), "the shape [64, 128]",
    ),
    "groups of another size": ("mxfp4 compressed", f"{GATE}_scale", lambda t: t[:, :-1].clone(), "which are"),
    "a packed half": ("mxfp4 compressed", f"{GATE}_packed", lambda t: t[:, :-16].clone(), "which are"),
    "a factor for each row": ("nvfp4", f"{GATE}_scale_2", lambda t: t.expand(160).clone(), "which take 4 bytes"),
    "a factor in bfloat16": ("nvfp4", f"{GATE}_scale_2", lambda t: t.bfloat16(), "float32"),
    "a shape of three": ("int4", f"{GATE}_shape", lambda t: torch.tensor([1, 2, 3]), "two numbers"),
    "a shape below zero": ("int4", f"{GATE}_shape", lambda t: -t, "says the shape"),
    "scales of fewer rows": ("int4", f"{GATE}_scale", lambda t: t[:-1].clone(), "rows are"),
    "zeros of integers": ("int4 zeros", f"{GATE}_zero_point", lambda t: t.to(torch.int8), "int32"),
    "zeros of fewer rows": ("int4 zeros", f"{GATE}_zero_point", lambda t: t[:-1].clone(), "bytes"),
    "zeros of fewer groups": ("awq", GATE.replace("weight", "qzeros"), lambda t: t[:-1].clone(), "4 bits for each"),
    "an order of more inputs": ("gptq", GATE.replace("weight", "g_idx"), lambda t: t.repeat(2), "group of each"),
    "an order of fewer inputs": ("gptq order", _ORDER, lambda t: t[:-1].clone(), "group of each"),
    "an order in another dtype": ("gptq order", _ORDER, lambda t: t.long(), "group of each"),
    "an order with a group too many": ("gptq order", _ORDER, lambda t: t + 1, "into group 4; there are 4"),
    "an order with a group below zero": ("gptq order", _ORDER, lambda t: -t, "into group -"),
    "an order that is all one group": ("gptq order", _ORDER, lambda t: t * 0, "32 inputs into each of the 4"),
    "an order with one input astray": (
        "gptq order", _ORDER, lambda t: torch.cat([(t[:1] + 1) % 4, t[1:]]), "32 inputs into each of the 4",
    ),
    "an order of a linear layer": (
        "gptq order", QUERY.replace("weight", "g_idx"), lambda t: t + 100, "there are 4",
    ),
    "half a block": ("q8_0", f"{GATE}_q8_0", lambda t: t[:, :-7].clone(), "whole number of blocks"),
    "blocks of fewer rows": ("q8_0", f"{GATE}_q8_0", lambda t: t[:-1].clone(), "shape"),
    "a fused weight of fewer experts": (
        "fp8 fused", "model.layers.1.mlp.experts.gate_up_proj_scale_inv", lambda t: t[:-1].clone(), "no scale",
    ),
    "scales of gpt-oss of fewer rows": (
        "gpt-oss", "model.layers.1.mlp.experts.gate_up_proj_scales", lambda t: t[:, :-1].clone(), "which are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_tensor_of_another_shape_or_dtype_is_named_with_its_bytes(damage, written, tmp_path):
    name, tensor, change, said = _DAMAGES[damage]
    path = shutil.copytree(written(name) / "quantized", tmp_path / "model")
    _change(path, lambda found: found.update({tensor: change(found[_take(found, tensor)])}))
    error = _fails(path)
    assert said in str(error), error
    assert tensor in str(error), error
    assert error.offset > 0 and error.nbytes >= 0 and str(error.nbytes) in str(error)
    assert Path(error.file).parent == path


def test_codes_with_nothing_beside_them_are_never_taken_for_numbers(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8):
        for name in (GATE, QUERY):
            path = quantized.write(
                tmp_path / f"{dtype}-{name}",
                FORMATS["fp8 blocks"],
                config={},
                which=lambda _: None,
                change=lambda found, name=name, dtype=dtype: found.update({name: found[name].to(dtype)}),
            )
            error = _fails(path)
            assert error.tensor == name and "scale is missing" in str(error)


def test_scales_beside_what_they_do_not_belong_to_are_refused(tmp_path):
    def add(found):
        found[f"{GATE}_scale"] = torch.ones(1)

    error = _fails(quantized.write(tmp_path, FORMATS["fp8 blocks"], change=add))
    assert "either would scale" in str(error)


def test_two_weights_of_one_name_are_refused(tmp_path):
    def add(found):
        found[f"{GATE}_packed"] = torch.zeros(160, 64, dtype=torch.uint8)

    error = _fails(quantized.write(tmp_path, FORMATS["fp8 blocks"], change=add))
    assert "either would be" in str(error)


@pytest.mark.parametrize("name", ["nvfp4", "int4", "awq", "gptq", "fp8 blocks", "gpt-oss", "q4_0"])
def test_smoothing_of_what_goes_into_a_layer_is_refused_by_its_tensor(name, written, tmp_path):
    path = shutil.copytree(written(name) / "quantized", tmp_path / "model")
    base = "model.layers.1.mlp.experts.gate_up_proj_" if name == "gpt-oss" else GATE.removesuffix("weight")
    smoothing = f"{base}pre_quant_scale"
    _change(path, lambda found: found.update({smoothing: torch.ones(128)}))
    _reindex(path)
    error = _fails(path, errors.UnsupportedEncodingError)
    assert error.tensor == smoothing and Path(error.file).parent == path and error.nbytes == 512
    with pytest.raises(errors.CheckpointError, match="pre_quant_scale"):
        emoe.plan(path, calibrate=False)


def test_smoothing_is_refused_outside_experts_and_beside_a_plain_weight(tmp_path):
    smoothing = QUERY.removesuffix("weight") + "pre_quant_scale"
    for kind in ("_proj", "gate_proj"):
        path = quantized.write(
            tmp_path / kind,
            FORMATS["nvfp4"],
            which=lambda name, kind=kind: nvfp4(divided=False) if kind in name else None,
            change=lambda found: found.update({smoothing: torch.ones(128)}),
        )
        assert _fails(path, errors.UnsupportedEncodingError).tensor == smoothing


@pytest.mark.parametrize(
    "end",
    [
        "u_input.weight", "R4_input.weight", "forward_hadamard_matrix", "input_rotation",
        "weight_quantizer.svdquant_lora_a", "lora_A.weight", "smooth_factor", "weight_scale2", "act_scale",
        "out_scale", "input_quantizer._pre_quant_scale",
    ],
)  # fmt: skip
def test_what_lies_beside_an_encoded_weight_and_is_not_known_is_refused_by_its_name(end, tmp_path):
    for number, name in enumerate((GATE, QUERY)):
        stray = name.removesuffix("weight") + end
        path = quantized.write(
            tmp_path / str(number),
            FORMATS["nvfp4"],
            change=lambda found, stray=stray: found.update({stray: torch.ones(2)}),
        )
        error = _fails(path, errors.UnsupportedEncodingError)
        assert error.tensor == stray and Path(error.file).parent == path and error.nbytes == 8


def test_what_lies_beside_a_matrix_of_all_experts_is_refused_by_its_name(tmp_path):
    stray = "model.layers.0.mlp.experts.down_proj_rotation"
    path = quantized.write(tmp_path, FORMATS["gpt-oss"], change=lambda found: found.update({stray: torch.ones(2)}))
    assert _fails(path).tensor == stray


@pytest.mark.parametrize(
    "stray",
    [
        QUERY.removesuffix("weight") + "smooth_factor", QUERY.removesuffix("weight") + "scale",
        QUERY.removesuffix("weight") + "scales", QUERY.removesuffix("weight") + "lora_A.weight", "lm_head.rotation",
        "model.layers.1.input_layernorm.smooth_scale",
    ],
)  # fmt: skip
def test_what_lies_beside_a_plain_weight_of_a_quantized_checkpoint_is_refused_by_its_name(stray, tmp_path):
    path = quantized.write(
        tmp_path,
        FORMATS["nvfp4"],
        which=lambda name: nvfp4(divided=False) if "gate_proj" in name else None,
        change=lambda found: found.update({stray: torch.ones(2)}),
    )
    error = _fails(path, errors.UnsupportedEncodingError)
    assert error.tensor == stray and Path(error.file).parent == path and error.nbytes == 8


@pytest.mark.parametrize(
    "stray",
    [
        "mlp.experts.3.act.scales", "mlp.experts.3.act_fn.scale", "mlp.experts.R4.weight", "self_attn.hadamard_matrix",
        "residual_rotation",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["nvfp4", "awq", "gpt-oss"])
def test_what_a_layer_holds_beside_its_weights_is_refused_by_its_name(name, stray, tmp_path):
    stray = f"model.layers.1.{stray}"
    path = quantized.write(tmp_path, FORMATS[name], change=lambda found: found.update({stray: torch.ones(2)}))
    assert _fails(path, errors.UnsupportedEncodingError).tensor == stray
    with pytest.raises(errors.UnsupportedEncodingError, match=stray.rpartition(".")[2]):
        emoe.plan(path, calibrate=False)


def test_buffers_of_old_releases_and_layers_that_the_model_lacks_are_no_obstacle(tmp_path):
    def add(found):
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        found["model.layers.99.eh_proj.weight"] = torch.ones(4, 4)  # predicts further tokens
        found["model.visual.blocks.0.rotation"] = torch.ones(4)
        found["model.layers.0.self_attn.k_bmm_quantizer._amax"] = torch.ones(1)
        found["model.layers.0.self_attn.v_cache_scale"] = torch.ones(1)
        found["model.layers.0.self_attn.k_zero_point"] = torch.ones(1)

    quantized.write(tmp_path, FORMATS["fp8 blocks"], change=add)
    _assert_runs_as_the_truth(tmp_path)


def test_strays_of_a_checkpoint_without_encoded_weights_are_what_they_are_to_transformers(tmp_path):
    quantized.write(tmp_path, FORMATS["nvfp4"])
    stray = "model.layers.0.self_attn.hadamard_matrix"
    _change(tmp_path / "plain", lambda found: found.update({stray: torch.ones(2)}))
    _load(tmp_path / "plain").emoe.close(restore=False)


def test_a_bias_that_the_family_does_not_have_is_refused_unless_it_is_zero(tmp_path):
    for number, name in enumerate((GATE, QUERY)):
        bias = name.removesuffix("weight") + "bias"
        folder = tmp_path / str(number)
        quantized.write(folder, FORMATS["gptq"], change=lambda found, bias=bias: found.update({bias: torch.zeros(8)}))
        _assert_runs_as_the_truth(folder)
        _change(folder / "quantized", lambda found, bias=bias: found[bias].fill_(0.5))
        assert _fails(folder / "quantized", errors.UnsupportedEncodingError).tensor == bias


def test_what_scales_activations_and_caches_is_no_obstacle(tmp_path):
    def add(found):
        for end in (
            "input_scale", "input_zero_point", "input_global_scale", "output_scale", "input_scale_ub", "qscale_act",
            "input_quantizer._amax", "weight_quantizer._amax",
        ):  # fmt: skip
            for name in (GATE, QUERY):
                found[name.removesuffix("weight") + end] = torch.ones(1)
        found["model.layers.0.self_attn.kv_scale"] = torch.ones(1)
        found["model.layers.0.self_attn.q_proj.q_scale"] = torch.ones(1)

    quantized.write(tmp_path, FORMATS["fp8 blocks"], change=add)
    _assert_runs_as_the_truth(tmp_path)


def _transforms(*locations: str) -> dict:
    places = [{"targets": ["Linear"], "location": each, "inverse": False} for each in locations]
    return {"transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": places}}}}


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (_transforms("weight_input", "input"), "location input"),
        (_transforms("output"), "location output"),
        (_transforms("q_attn"), "location q_attn"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "hadamard"),
        ({"transform_config": "somewhere"}, "somewhere"),
        ({"algo_config": [{"name": "awq"}, {"name": "rotation", "r1": True, "r4": True}]}, "rotation with r4"),
        ({"algo_config": {"name": "quarot", "r4": False, "online_r1_rotation": True}}, "online_r1_rotation"),
        ({"hadamard_group_size": 128}, "hadamard_group_size"),
        ({"rotation_config": {"kind": "block"}}, "rotation_config"),
        ({"online_rotate": True}, "online_rotate"),
        ({"algorithm": {"spinquant": {"r3": True}}}, "spinquant"),
        ({"extra": {"hadamard_config": {"size": 32}}}, "hadamard_config"),
        ({"stages": [{"bits": 4}, {"rotate_inputs": True}]}, "rotate_inputs"),
    ],
)  # fmt: skip
def test_a_config_with_transforms_at_run_time_is_refused_by_file_and_key(more, word, tmp_path):
    path = quantized.write(tmp_path, FORMATS["int4"], config={**FORMATS["int4"].config, **more})
    error = _fails(path)
    assert error.file == str(path / "config.json") and word in str(error)
    with pytest.raises(errors.CheckpointError, match=word):
        emoe.plan(path, calibrate=False)


def test_transforms_in_a_file_of_the_quantizer_are_refused_by_it(tmp_path):
    path = quantized.write(tmp_path, FORMATS["nvfp4"], config={}, files={"hf_quant_config.json": {
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, **_transforms("input")}
    }})  # fmt: skip
    assert _fails(path).file == str(path / "hf_quant_config.json")


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_transforms_in_a_file_beside_a_config_that_speaks_of_encodings_are_refused_too(file, tmp_path):
    said = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    path = quantized.write(tmp_path, FORMATS["nvfp4"], files={file: {**said, "rotation_config": {"kind": "block"}}})
    error = _fails(path)
    assert error.file == str(path / file) and "rotation_config" in str(error)
    with pytest.raises(errors.CheckpointError, match="rotation_config"):
        emoe.plan(path, calibrate=False)
    (path / file).write_text(json.dumps({**said, **_transforms("weight_input")}))
    _assert_runs_as_the_truth(tmp_path)
    (path / file).write_text("{")
    assert _fails(path).file == str(path / file)


def test_rotations_that_are_folded_into_the_weights_are_no_obstacle(tmp_path):
    more = {
        **_transforms("weight_input", "weight_output"),
        "algo_config": [{"name": "rotation", "r1": True, "r4": False}],
    }
    quantized.write(tmp_path, FORMATS["int4"], config={**FORMATS["int4"].config, **more, "rotation": None})
    _assert_runs_as_the_truth(tmp_path)


@pytest.mark.parametrize("junk", [None, 0, "x", [], [1], {"a": 1}, {"weights": None}])
@pytest.mark.parametrize("key", ["config_groups", "quantization", "quantized_layers", "dynamic", "rest", "encodings"])
def test_parts_of_a_config_that_are_of_no_known_kind_confirm_nothing(key, junk):
    for method in ("emoe", "gptq", "compressed-tensors"):
        try:
            said = declared({"quant_method": method, key: junk})
        except errors.UnsupportedModelError as error:  # an encoding that there is not
            assert key == "encodings" and "1" in str(error)
        else:
            assert not said.bytes and not said.bits and said.method == method


def test_zeros_of_an_unknown_version_of_gptq_are_refused(tmp_path):
    said = {**FORMATS["gptq"].config, "checkpoint_format": "marlin"}
    error = _fails(quantized.write(tmp_path, FORMATS["gptq"], config=said))
    assert error.tensor.endswith(".qzeros") and "gptq_v2" in str(error)


def test_what_the_model_does_not_have_is_not_looked_at(tmp_path):
    def add(found):
        found["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = torch.zeros(4, 4).to(torch.float8_e4m3fn)
        found["mtp.layers.0.mlp.experts.1.gate_proj.weight_scale_inv"] = torch.zeros(3)
        found["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)

    quantized.write(tmp_path, FORMATS["fp8 blocks"], change=add)
    _assert_runs_as_the_truth(tmp_path)


@given(data=st.data())
@settings(max_examples=40)
def test_a_damaged_file_is_an_error_of_emoe_that_names_it(data, written, tmp_path_factory):
    name = data.draw(st.sampled_from(["fp8 blocks", "nvfp4", "int4", "gptq", "gpt-oss", "deepseek-v4"]))
    path = shutil.copytree(written(name) / "quantized", tmp_path_factory.mktemp("fuzz") / "model")
    file = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, 8 + header - 1))
            raw[at] = data.draw(st.sampled_from(b'0123456789{}[],:"FUIBEM8_x ')) if at >= 8 else raw[at] ^ 1
    file.write_bytes(raw)
    try:
        model = _load(path)
    except errors.CheckpointError as error:
        assert error.file, error
    except errors.UnsupportedModelError as error:
        assert str(path) in str(error)
    else:  # a name of what belongs to nothing, or a space
        model.emoe.close(restore=False)


_ENDS = ("", "_scale_inv", "_scale", "_scale_2", "_packed", "_global_scale", "_zero_point", "_shape", "_g_idx", "_q8_0")
_OTHER_ENDS = (".scale", ".qscale_weight", ".qweight", ".scales", ".qzeros", ".g_idx", "_blocks", "_scales")
_SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 128]), max_size=4).map(tuple)


def _entries(found: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorEntry]:
    names = {"B.weight" + end if end[:1] != "." else "B" + end: each for end, each in found.items()}
    return {
        name: TensorEntry("file", name, dtype, shape, 8, encoding(dtype).nbytes(shape))
        for name, (dtype, shape) in names.items()
    }


@given(
    found=st.dictionaries(
        st.sampled_from(_ENDS + _OTHER_ENDS), st.tuples(st.sampled_from(sorted(DTYPES.values())), _SHAPES), min_size=1
    ),
    raw=st.integers(0, 255),
    said=st.sampled_from(
        [None, fp8(128, 128), *(FORMATS[each].config for each in ("gptq", "gptq order", "int4 zeros said"))]
    ),
)
@settings(max_examples=600)
def test_whatever_lies_beside_a_weight_is_one_or_an_error_that_names_it(found, raw, said):
    names = grouped(_entries(found))
    for group in names.values():
        if isinstance(group, TensorEntry):
            continue
        try:
            weight = encoded(group, declared(said), lambda entry: bytes([raw]) * entry.nbytes)
        except errors.CheckpointError as error:
            assert error.file == "file" and error.tensor.startswith("B") and error.nbytes >= 0
            continue
        wanted = plane_bytes(weight.encoding, weight.shape)
        for number in range(math.prod(weight.shape[:-2])):
            for plane, entry in weight.planes.items():
                start, nbytes = weight.place(plane, number)
                assert nbytes == wanted[plane]
                assert entry.offset <= start and start + nbytes <= entry.offset + entry.nbytes


# --- the model afterwards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8 blocks", "gpt-oss", "deepseek-v4", "nvfp4", "q4_0"])
def test_saving_writes_the_numbers_and_a_config_without_quantization(name, written, tmp_path):
    model = _load(written(name) / "quantized")
    model.save_pretrained(tmp_path)
    _truth(written(name)).save_pretrained(tmp_path / "truth")
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and "expert_dtype" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    _assert_same(_logits(again), _logits(_truth(written(name))))
    names = read_headers(sorted(tmp_path.glob("*.safetensors")))
    assert set(names) == set(read_headers([tmp_path / "truth" / "model.safetensors"]))


def test_a_state_dict_and_the_restored_model_hold_the_numbers(written):
    truth = _truth(written("nvfp4 compressed"))
    model = _load(written("nvfp4 compressed") / "quantized")
    held = model.state_dict()
    assert held.keys() == truth.state_dict().keys()
    for key, value in truth.state_dict().items():
        assert torch.allclose(held[key], value, rtol=1e-6, atol=0), key
    assert set(read_layer(model.emoe.store, 0)) == {"gate_up_proj", "down_proj"}
    model.emoe.close(restore=True)
    _assert_same(_logits(model), _logits(truth))


def test_restoring_counts_the_bytes_of_the_decoded_experts(written, monkeypatch):
    model = _load(written("int4") / "quantized")
    decoded = 2 * 6 * 3 * 160 * 128 * 4
    assert model.emoe.plan.expert_bytes < decoded / 6
    monkeypatch.setattr("emoe.seam.attached.available_memory", lambda: decoded - 1)
    with pytest.raises(errors.BudgetError) as caught:
        model.emoe.close(restore=True)
    assert caught.value.needed == decoded


@pytest.mark.parametrize(
    "options",
    [{"prefetch": "look-ahead"}, {"predictor": "recent"}, {"policy": "lfu"}, {"reader": "pread"}],
    ids=lambda options: next(iter(options)),
)
def test_what_is_read_when_changes_no_number(options, written):
    _assert_runs_as_the_truth(written("fp8 blocks"), **options)


def test_lossy_routing_exchanges_experts_of_a_quantized_model(written):
    model = _load(written("int4") / "quantized", 0.5, routing="resident")
    with torch.no_grad(), model.emoe.request() as request:
        logits = [model(_ids()).logits for _ in range(2)]
    assert logits[1].isfinite().all() and request.tally.substituted_mass > 0


_CHILD = """
import json, sys
import torch, emoe
from emoe.memory import process_memory
emoe.from_pretrained(sys.argv[1], memory_budget=1e-9, kernels="stock").generate(torch.ones(1, 4, dtype=torch.long),
                                                                                 max_new_tokens=1, do_sample=False)
before = process_memory()
model = emoe.from_pretrained(sys.argv[2], memory_budget=1e-9, kernels="stock", context=16)
print(json.dumps({"before": before, "peak": process_memory()["peak"], "plan": model.emoe.plan.to_dict()}))
"""


@pytest.mark.parametrize("name", ["fp8 blocks", "awq"])
def test_loading_holds_no_second_copy_of_experts_or_of_the_rest(name, written, tmp_path):
    form = Format(FORMATS[name].encode, "", FORMATS[name].config, FORMATS[name].linears, "qwen3_moe_wide")
    quantized.write(tmp_path, form, rest=torch.bfloat16)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(written(name) / "quantized"), str(tmp_path / "quantized")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    plan = result["plan"]
    assert plan["expert_bytes"] > 14 * MIB and plan["non_expert_bytes"] > 60 * MIB
    # 8 MiB: decoding, in several threads. Experts decoded would be 54 MiB, a copy of the rest 68.
    assert result["peak"] <= result["before"]["resident"] + plan["planned_bytes"] + 8 * MIB


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8 blocks", "mxfp4 compressed", "nvfp4", "int4", "awq", "gptq order", "deepseek-v4",
                                  "gpt-oss"])  # fmt: skip
def test_a_plan_says_the_bytes_of_the_files_and_of_memory(name, written):
    path = written(name) / "quantized"
    plan = emoe.plan(path, 0.5, calibrate=False, dtype=torch.float32)
    names = read_headers(sorted(path.glob("*.safetensors")))
    weights = {each: entry for each, entry in names.items() if not each.endswith(("_shape", "input_scale"))}
    experts = [entry for each, entry in weights.items() if ".experts." in each]
    assert plan.expert_bytes == sum(entry.nbytes for entry in experts)
    model = _load(path)
    assert model.emoe.plan.layouts == plan.layouts
    outside = sum(value.nbytes for key, value in model.state_dict().items() if ".experts." not in key)
    assert plan.non_expert_bytes - outside < 4096  # buffers that are not saved
    stored = sum(entry.nbytes for each, entry in weights.items() if ".experts." not in each)
    assert abs(plan.non_expert_stored_bytes - stored) < 4096
    assert plan.model_bytes == plan.expert_bytes + plan.non_expert_stored_bytes
    assert plan.checkpoint_bytes == sum(entry.nbytes for entry in names.values())


@pytest.mark.parametrize("name", ["fp8 blocks e8m0", "fp8 tensor", "mxfp4 compressed", "awq", "gptq order",
                                  "gpt-oss", "deepseek-v4"])  # fmt: skip
def test_a_config_alone_is_planned_as_it_says_and_the_plan_notes_it(name, written, tmp_path):
    path = written(name) / "quantized"
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update({"scale_fmt": "ue8m0"} if "e8m0" in name else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    alone = emoe.plan(tmp_path, 0.5, calibrate=False)
    real = emoe.plan(path, 0.5, calibrate=False)
    assert any("no weights here" in note for note in alone.notes) and not any("no weights" in n for n in real.notes)
    assert alone.encodings == real.encodings
    assert alone.expert_bytes == pytest.approx(real.expert_bytes, rel=1e-3)


def test_a_config_alone_of_an_unknown_method_is_refused_by_it(written, tmp_path):
    config = json.loads((written("awq") / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UnsupportedModelError, match="aqlm"):
        emoe.plan(tmp_path, calibrate=False)


def _snapshot(path: Path, cache: Path) -> Path:
    """As huggingface_hub keeps it."""
    snapshot = cache / "models--some--moe" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(path, snapshot)
    (cache / "models--some--moe" / "refs").mkdir()
    (cache / "models--some--moe" / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_a_checkpoint_of_the_hub_cache_is_planned_by_its_headers_and_runs(written, tmp_path):
    _snapshot(written("fp8 blocks bfloat16") / "quantized", tmp_path)
    plan = emoe.plan("some/moe", 0.5, cache_dir=tmp_path, calibrate=False)
    assert plan.encodings == ("e4m3-128x128-bfloat16",) and not any("no weights" in note for note in plan.notes)
    model = _load("some/moe", cache_dir=tmp_path)
    _assert_same(_logits(model), _logits(_truth(written("fp8 blocks bfloat16"))))
    assert model.config.name_or_path == "some/moe"


def test_of_a_hub_id_only_config_and_headers_are_asked_for(written, tmp_path, monkeypatch):
    path = written("nvfp4 compressed") / "quantized"
    snapshot = _snapshot(path, tmp_path)
    for file in snapshot.glob("model*"):
        file.unlink()
    headers = {}
    for name, entry in read_headers(sorted(path.glob("*.safetensors"))).items():
        dtype = next(code for code, known in DTYPES.items() if known == entry.dtype)
        info = SimpleNamespace(
            dtype=dtype, shape=list(entry.shape), data_offsets=(entry.offset, entry.offset + entry.nbytes)
        )
        headers.setdefault(Path(entry.file).name, SimpleNamespace(tensors={})).tensors[name] = info
    asked = []

    def metadata(repo, **_):
        asked.append(repo)
        return SimpleNamespace(files_metadata=headers)

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    plan = emoe.plan("some/moe", 0.5, cache_dir=tmp_path, calibrate=False)
    local = emoe.plan(path, 0.5, calibrate=False)
    assert asked == ["some/moe"]
    assert plan.layouts == local.layouts and plan.planned_bytes == local.planned_bytes


def test_a_hub_id_that_cannot_be_asked_is_planned_by_its_config(written, tmp_path, monkeypatch):
    snapshot = _snapshot(written("awq") / "quantized", tmp_path)
    for file in snapshot.glob("model*"):
        file.unlink()

    def metadata(repo, **_):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    plan = emoe.plan("some/moe", 0.5, cache_dir=tmp_path, calibrate=False)
    assert plan.encodings == ("awq-32-float16",) and any("no weights here" in note for note in plan.notes)


def test_a_dtype_that_no_config_names_is_that_of_plain_weights_not_of_scales(written, tmp_path):
    path = quantized.write(tmp_path, FORMATS["fp8 blocks"], rest=torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    model = emoe.from_pretrained(path, memory_budget=0.5, kernels="stock")
    assert model.dtype == torch.bfloat16 and model.emoe.plan.dtype == "bfloat16"


def test_a_model_quantized_in_memory_is_not_wrapped(written):
    model = _truth(written("fp8 blocks"))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(errors.UnsupportedModelError, match=r"bitsandbytes.*from_pretrained"):
        emoe.wrap(model, memory_budget=0.5)
