"""Conversion of whole checkpoints: names, places, numbers, and what is said of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import emoe
from emoe.convert import run
from emoe.convert.run import convert
from emoe.convert.state import RECORD, verify
from emoe.errors import BudgetError, CheckpointError, ConfigError, UnsupportedModelError
from emoe.model.decode import decoded
from emoe.model.encode import FP8, INT4, INT8, encode
from emoe.model.encoding import ENCODINGS, encoding
from emoe.store.headers import INDEX_NAME, checkpoint_files, read_headers

BLOCKS = [name for name, each in ENCODINGS.items() if each.plane("blocks")]
FLIPPED = ("aria_text", "gpt_oss")  # keep parameters [inputs, outputs]; what is encoded along inputs is not
IDS = torch.randint(3, families.VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint_files(folder) for name, tensor in load_file(file).items()}


def plain(tensors: dict[str, torch.Tensor], flip: bool = False) -> dict[str, torch.Tensor]:
    """The tensors with what is encoded decoded, under the names of what it was."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        of = name.rpartition("_")[0]
        kind = next((kind for kind in BLOCKS if name.endswith(f"_{kind}")), "")
        if kind:
            how = encoding(kind)
            cols = tensor.shape[-1] // how.planes[0].count * how.planes[0].block[1]
            value = _each(lambda t, how=how, cols=cols: decoded(how, len(t), cols, {"blocks": t}), tensor)
            found[name.removesuffix(f"_{kind}")] = value.mT if flip else value
        elif f"{name}_scale_inv" in tensors:
            scales = tensors[f"{name}_scale_inv"]
            found[name] = _each(
                lambda t, s: decoded(encoding(FP8), *t.shape, {"codes": t, "scales": s}), tensor, scales
            )
        elif name.endswith("_packed") and tensor.dtype == torch.int32:
            value = _whole(INT4, tensor, tensors[f"{of}_scale"], 8)
            found[of] = value.mT if flip else value
        elif tensor.dtype == torch.int8:
            found[name] = _whole(INT8, tensor, tensors[f"{name}_scale"], 1)
        elif name.endswith(("_packed", "_blocks")):
            codes = tensor.flatten(-2) if name.endswith("_blocks") else tensor
            scales = tensors[f"{of}_scales" if name.endswith("_blocks") else f"{of}_scale"]
            value = _each(
                lambda t, s: decoded(encoding("mxfp4"), len(t), 2 * t.shape[1], {"codes": t, "scales": s}),
                codes,
                scales,
            )
            found[of] = value.mT if flip else value
        elif not name.endswith(("_scale_inv", "_scales")) and not (
            name.endswith("_scale") and ({of, f"{of}_packed"} & tensors.keys())
        ):
            found[name] = tensor
    return found


def _whole(name: str, codes: torch.Tensor, scales: torch.Tensor, each: int) -> torch.Tensor:
    """Of INT4 or INT8, whose last group may be cut; `each`: columns of one element of codes."""
    cols = each * codes.shape[-1]
    how = encoding(name.replace("1x32", "row").replace("-32", "-row") if cols <= 32 else name)
    return _each(lambda t, s: decoded(how, len(t), cols, {"codes": t, "scales": s}), codes, scales)


def _mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return decoded(encoding("mxfp4"), len(codes), 2 * codes.shape[1], {"codes": codes, "scales": scales})


def _each(decode, *planes):
    """Matrix by matrix, where there is one for each expert."""
    if planes[0].dim() == 2:
        return decode(*planes)
    return torch.stack([decode(*parts) for parts in zip(*planes, strict=True)])


def twin(folder: Path, out: Path, flip: bool = False) -> Path:
    """A plain checkpoint of the numbers that a converted one stands for."""
    out.mkdir()
    tensors = {name: value.contiguous().clone() for name, value in plain(tensors_of(folder), flip).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def logits(folder: Path) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        return model.eval()(IDS).logits


def wide(folder: Path, name: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16, **values: int) -> Path:
    """A checkpoint whose experts have whole blocks of 256."""
    config = families.FAMILIES[name]()
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "moe_intermediate_size": 256, "intermediate_size": 256}
    for key, value in {**sizes, **values}.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    families.randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "experts"),
    [(family, "q8_0") for family in sorted(families.FAMILIES) if family != "nemotron_h_latent"]
    + [(family, "fp8") for family in ("nemotron_h_latent", *FLIPPED, "inkling2_text", "granitemoe", "deepseek_v4")]
    + [(family, "mxfp4") for family in (*FLIPPED, "inkling2_text", "granitemoe")],
)
def test_the_checkpoint_of_every_family_holds_the_same_model_in_other_bytes(family, experts, checkpoint, tmp_path):
    """Its numbers, decoded and loaded by Transformers under their names, give nearly the logits of before; emoe reads
    the same of it."""
    source = checkpoint(family)
    convert(source, tmp_path / "out", experts, progress=False)
    got = logits(twin(tmp_path / "out", tmp_path / "plain", family in FLIPPED and experts != "fp8"))
    model = emoe.from_pretrained(tmp_path / "out", memory_budget=1.0, kernels="stock")
    with torch.no_grad():
        assert (model(IDS).logits - got).norm() < 1e-5 * got.norm()
    model.emoe.close(restore=False)
    expected = logits(source)
    most = {"q8_0": 0.02, "fp8": 0.06, "mxfp4": 0.2}[experts]
    assert (got - expected).abs().median() < most * (expected.abs().median() + 1)  # few tokens are routed elsewhere


@pytest.mark.parametrize("experts", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q8_0", "mxfp4", "fp8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_encoding_holds_what_its_encoder_gives_for_each_matrix(experts, family, tmp_path):
    source = wide(tmp_path / "source", family)
    convert(source, tmp_path / "out", experts, progress=False)
    before = tensors_of(source)
    after = plain(tensors_of(tmp_path / "out"), flip=family in FLIPPED and experts != "fp8")
    assert set(after) == set(before)
    name = FP8 if experts == "fp8" else experts
    changed, transposed = 0, family in FLIPPED and experts != "fp8"
    for key, value in before.items():
        if ".experts." not in key or key.endswith("_bias"):
            assert torch.equal(after[key], value), key
            continue
        changed += 1
        for matrix, got in zip(value.view(-1, *value.shape[-2:]), after[key].view(-1, *value.shape[-2:]), strict=True):
            given = matrix.T if transposed else matrix
            expected = decoded(encoding(name), *given.shape, encode(name, given).planes)
            assert torch.equal(got, expected.T if transposed else expected), key
    assert changed == {"qwen3_moe": 24, "gpt_oss": 4}[family]


def test_names_and_shapes_are_those_that_are_documented(tmp_path):
    source = wide(tmp_path / "source")
    names = {}
    for experts in ("q4_k", "mxfp4", "fp8"):
        convert(source, tmp_path / experts, experts, progress=False)
        entries = read_headers(checkpoint_files(tmp_path / experts))
        names[experts] = {
            name.rpartition(".gate_proj.")[2]: (entry.dtype, entry.shape)
            for name, entry in entries.items()
            if ".experts.3.gate_proj." in name
        }
    assert names == {
        "q4_k": {"weight_q4_k": ("uint8", (256, 144))},
        "mxfp4": {"weight_packed": ("uint8", (256, 128)), "weight_scale": ("uint8", (256, 8))},
        "fp8": {"weight": ("float8_e4m3fn", (256, 256)), "weight_scale_inv": ("float32", (2, 2))},
    }


def test_experts_in_one_tensor_stay_in_one_with_outputs_as_rows(tmp_path):
    source = wide(tmp_path / "source", "gpt_oss", intermediate_size=512)
    shapes = {}
    for experts in ("q4_k", "mxfp4", "fp8"):
        convert(source, tmp_path / experts, experts, progress=False)
        entries = read_headers(checkpoint_files(tmp_path / experts))
        start = "model.layers.0.mlp.experts.gate_up_proj"
        shapes[experts] = {
            name.removeprefix(start): entry.shape for name, entry in entries.items() if name.startswith(start)
        }
    assert shapes == {
        "q4_k": {"_q4_k": (8, 1024, 144), "_bias": (8, 1024)},
        "mxfp4": {"_blocks": (8, 1024, 8, 16), "_scales": (8, 1024, 8), "_bias": (8, 1024)},
        "fp8": {"": (8, 256, 1024), "_scale_inv": (8, 2, 8), "_bias": (8, 1024)},
    }


def test_rows_of_no_whole_blocks_fall_back_and_the_report_says_so(checkpoint, tmp_path):
    report = convert(checkpoint("olmoe"), tmp_path / "out", "q4_k", progress=False)  # 64 and 48 columns
    assert [(each.matrices, each.count, each.cols, each.got) for each in report.fallbacks] == [
        ("model.layers.*.mlp.experts.*.down_proj.weight", 24, 48, INT4),
        ("model.layers.*.mlp.experts.*.gate_proj.weight", 24, 64, "q4_0"),
        ("model.layers.*.mlp.experts.*.up_proj.weight", 24, 64, "q4_0"),
    ]
    assert report.encodings == {"q4_0": 48, INT4: 24}
    for asked, instead, cut in (
        ("q5_k", "q5_1", INT8), ("q6_k", "q8_0", INT8), ("q8_0", "q8_0", INT8), ("q4_0", "q4_0", INT4),
        ("mxfp4", "mxfp4", INT4),
    ):  # fmt: skip
        report = convert(checkpoint("olmoe"), tmp_path / asked, asked, progress=False)
        assert report.encodings == {instead: 48, cut: 24}, asked


@pytest.mark.parametrize("experts", ["q4_k", "q8_0", "mxfp4"])
@pytest.mark.parametrize("width", [24, 40, 48])
def test_rows_that_end_within_a_group_are_read_as_they_were_written(experts, width, tmp_path):
    """The model's own numbers, and tokens that do not depend on the budget or on the kernels."""
    source = wide(tmp_path / "source", "qwen2_moe", hidden_size=96, moe_intermediate_size=width)
    report = convert(source, tmp_path / "out", experts, progress=False)
    assert not any(name in report.encodings for name in ("bfloat16", "float32"))
    assert all(report.layer(path).relative < 0.13 for path in report.losses)
    found = {}
    for kernels in ("stock", "native"):
        for budget in (1e-9, 1.0):
            model = emoe.from_pretrained(tmp_path / "out", memory_budget=budget, dtype=torch.float32, kernels=kernels)
            assert set(model.emoe.plan.encodings) == set(report.encodings)
            with torch.no_grad():
                found[kernels, budget] = model(IDS).logits
            model.emoe.close(restore=False)
    assert torch.equal(found["stock", 1e-9], found["stock", 1.0])
    torch.testing.assert_close(found["native", 1.0], found["stock", 1.0], rtol=2e-2, atol=2e-2)
    before = logits(source)
    assert (found["stock", 1.0] - before).norm() < 0.25 * before.norm()
    assert verify(tmp_path / "out")


@pytest.mark.parametrize("family", FLIPPED)
def test_cut_groups_of_weights_kept_inputs_by_outputs_lie_along_the_inputs(family, tmp_path):
    source = wide(tmp_path / "source", family, hidden_size=96, intermediate_size=48, moe_intermediate_size=48)
    assert any(name.startswith("int4") for name in convert(source, tmp_path / "a", "mxfp4", progress=False).encodings)
    model = emoe.from_pretrained(tmp_path / "a", memory_budget=0.5, dtype=torch.float32, kernels="stock")
    with torch.no_grad():
        found = model(IDS).logits
    before = logits(source)
    assert (found - before).norm() < 0.25 * before.norm()
    model.emoe.close(restore=False)


def test_what_fits_no_encoding_is_refused_when_nothing_is_left_to_encode(tmp_path):
    source = wide(tmp_path / "source", hidden_size=52, moe_intermediate_size=44)
    with pytest.raises(ConfigError, match=r"nothing of .* can be q4_k: rows of \[44, 52\]"):
        convert(source, tmp_path / "out", "q4_k", progress=False)
    assert not list(tmp_path.glob("*out*"))


def test_the_report_counts_bytes_and_errors_of_each_layer(tmp_path):
    source = wide(tmp_path / "source", mlp_only_layers=[])
    report = convert(source, tmp_path / "out", "q4_k", progress=False)
    numbers = 2 * 8 * 3 * 256 * 256
    assert report.bytes_before["experts"] == 2 * numbers
    assert report.bytes_after["experts"] == numbers * 144 // 256
    assert report.bytes_before["rest"] == report.bytes_after["rest"] > 0
    assert list(report.losses) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for path, matrices in report.losses.items():
        assert {name: loss.matrices for name, loss in matrices.items()} == dict.fromkeys(
            ("gate_proj", "up_proj", "down_proj"), 8
        )
        assert 0.068 < report.layer(path).relative < 0.074
        assert all(loss.relative <= loss.worst < 0.08 and 0 <= loss.worst_expert < 8 for loss in matrices.values())
    assert json.loads((tmp_path / "out" / RECORD).read_text())["report"] == json.loads(json.dumps(report.to_dict()))


def test_files_are_sound_for_the_library_and_have_at_most_the_bytes_that_were_asked_for(tmp_path):
    source = wide(tmp_path / "source", mlp_only_layers=[])
    convert(source, tmp_path / "out", "q6_k", shard_bytes=300_000, progress=False)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 5
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    total = 0
    for shard in shards:
        assert shard.stat().st_size <= 300_000
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == shard.name
                total += file.get_tensor(name).nbytes
    assert total == index["metadata"]["total_size"]
    for entry in read_headers(shards).values():
        assert entry.offset % max(1, entry.nbytes // max(1, torch.Size(entry.shape).numel())) == 0, entry


def test_an_expert_is_in_one_file_whatever_the_size_of_files(tmp_path):
    source = wide(tmp_path / "source")
    convert(source, tmp_path / "out", "fp8", shard_bytes=1000, progress=False)
    places: dict[str, set[str]] = {}
    for name, entry in read_headers(checkpoint_files(tmp_path / "out")).items():
        if ".experts." in name:
            places.setdefault(".".join(name.split(".")[:6]), set()).add(entry.file)
    assert len(places) == 8 and all(len(files) == 1 for files in places.values())


def test_config_says_what_other_tools_know(tmp_path):
    source = wide(tmp_path / "source")
    found = {}
    for experts in ("q4_k", "fp8", "mxfp4"):
        convert(source, tmp_path / experts, experts, progress=False)
        found[experts] = json.loads((tmp_path / experts / "config.json").read_text())["quantization_config"]
    assert found["q4_k"] == {"quant_method": "emoe", "experts": "q4_k", "encodings": ["q4_k"]}
    assert found["fp8"]["quant_method"] == "fp8" and found["fp8"]["weight_block_size"] == [128, 128]
    assert "model.layers.1.self_attn.q_proj" in found["fp8"]["modules_to_not_convert"]
    assert "lm_head" in found["fp8"]["modules_to_not_convert"]
    assert not any(".experts" in name for name in found["fp8"]["modules_to_not_convert"])
    assert found["mxfp4"]["format"] == "mxfp4-pack-quantized"
    convert(wide(tmp_path / "gpt", "gpt_oss"), tmp_path / "gpt-out", "mxfp4", progress=False)
    assert json.loads((tmp_path / "gpt-out/config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def test_transformers_reads_fp8_and_mxfp4_of_gpt_oss_as_they_are(tmp_path):
    for family, experts in (("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")):
        source = wide(tmp_path / family, family, torch.float32)
        out = tmp_path / f"{family}-out"
        convert(source, out, experts, progress=False)
        expected = logits(twin(out, tmp_path / f"{family}-plain", flip=family in FLIPPED))
        assert (logits(out) - expected).norm() < 1e-5 * expected.norm()


def test_files_beside_the_weights_come_along_and_weights_of_other_formats_do_not(tmp_path):
    source = wide(tmp_path / "source")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_own.py", "vocab.txt"):
        (source / name).write_text("{}")
    for name in ("pytorch_model.bin", "model.gguf", ".hidden", "hf_quant_config.json"):
        (source / name).write_text("[]")
    (source / "folder").mkdir()
    convert(source, tmp_path / "out", "q8_0", progress=False)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_own.py", "vocab.txt"} <= found
    assert not {"pytorch_model.bin", "model.gguf", ".hidden", "hf_quant_config.json", "folder"} & found


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    source = wide(tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight.*not finite"):
        convert(source, tmp_path / "out", "q4_k", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_dense_model_and_an_unknown_encoding_are_refused_before_anything_is_written(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError):
        convert(tmp_path / "dense", tmp_path / "out", "q4_k")
    for options in ({"experts": "iq2_xs"}, {"experts": "q4_k", "rest": "q2"}):
        with pytest.raises(ConfigError, match="is not one of"):
            convert(tmp_path / "dense", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_too_little_memory_is_refused_with_the_least_that_works(checkpoint, tmp_path):
    with pytest.raises(BudgetError, match="of memory") as error:
        convert(checkpoint("olmoe"), tmp_path / "out", "q8_0", memory=64 << 20)
    assert error.value.needed > 64 << 20
    convert(checkpoint("olmoe"), tmp_path / "out", "q8_0", memory=error.value.needed + (8 << 20), progress=False)
    verify(tmp_path / "out")


def test_experts_of_another_dtype_than_the_config_are_read_without_rounding(tmp_path):
    source = wide(tmp_path / "source", dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    convert(source, tmp_path / "out", "q8_0", progress=False)
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    expected = encode("q8_0", load_file(source / "model.safetensors")[name]).planes["blocks"]
    assert torch.equal(tensors_of(tmp_path / "out")[f"{name}_q8_0"], expected)


def test_what_the_process_holds_already_does_not_count_against_memory_that_nobody_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "process_memory", lambda: {"resident": 3 << 30, "peak": 3 << 30})
    source = wide(tmp_path / "model", "mixtral")
    convert(source, tmp_path / "out", "q8_0", progress=False)
    with pytest.raises(BudgetError, match=r"this process holds already 3\.0 GiB; 2\.0 GiB were given"):
        convert(source, tmp_path / "refused", "q8_0", memory=2 << 30, progress=False)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_a_rest_of_q8_0_is_what_its_encoder_gives_in_every_family(family, checkpoint, tmp_path):
    source = checkpoint(family)
    convert(source, tmp_path / "keep", "q8_0", progress=False)
    report = convert(source, tmp_path / "out", "q8_0", rest="q8_0", progress=False)
    kept, made = tensors_of(tmp_path / "keep"), tensors_of(tmp_path / "out")
    anew = [name for name in kept if f"{name}_q8_0" in made]
    assert len(anew) == report.rest_encoded and set(made) ^ set(kept) == {*anew, *(f"{name}_q8_0" for name in anew)}
    for name in anew:
        assert torch.equal(made[f"{name}_q8_0"], encode("q8_0", kept[name]).planes["blocks"])
    before = {name: value for name, value in kept.items() if name not in anew}
    assert all(torch.equal(made[name].view(torch.uint8), value.view(torch.uint8)) for name, value in before.items())
    for options in ({"dense": "torch"}, {"dense": "native"}):
        model = emoe.from_pretrained(tmp_path / "out", memory_budget=1.0, kernels="stock", **options)
        with torch.no_grad():
            got, expected = model(IDS).logits, logits(source)
        assert (got - expected).abs().median() < 0.05 * (expected.abs().median() + 1)
        model.emoe.close(restore=False)


def test_a_weight_outside_experts_that_is_not_finite_is_named(checkpoint, tmp_path):
    tensors = load_file(checkpoint("qwen3_moe") / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name][3, 5] = float("nan")
    source = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "source")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite") as caught:
        convert(source, tmp_path / "out", "q8_0", rest="q8_0", progress=False)
    assert caught.value.tensor == name and caught.value.nbytes
