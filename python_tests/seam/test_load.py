"""The seam to Transformers: loading without experts, taking them out and back, saving the whole model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import families
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, modeling_utils

from emoe import errors
from emoe.model import structure
from emoe.planning import meta
from emoe.seam import load as seam
from emoe.seam.elsewhere import Placeholder, placeholders
from emoe.store.writer import write_store

# One of each way that experts lie on disk and in memory.
SHAPES = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "aria_text", "nemotron_h", "inkling2_text", "deepseek_v4"]


def _state(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()


def _assert_same(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def _names_on_disk(folder: Path) -> set[str]:
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


@pytest.fixture
def loaded(checkpoint):
    """loaded(family) -> (model, store, guard)."""

    def load(name):
        model, store = seam.load_without_experts(checkpoint(name), dtype=torch.float32)
        return model, store, seam.guard_saving(model, store)

    return load


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_loading_leaves_experts_out_and_all_else_as_transformers_loads_it(name, checkpoint):
    model, store = seam.load_without_experts(checkpoint(name), dtype=torch.float32)
    experts = {f"{layer.path}.{param.name}" for layer in store.layers for param in layer.params}
    expected = {key: value for key, value in _state(checkpoint(name)).items() if key not in experts}
    _assert_same(model.state_dict(), expected)
    assert not model.training
    resident = [each for each in model.parameters() if not isinstance(each, Placeholder)]
    assert {parameter.device.type for parameter in resident} == {"cpu"}


def test_nothing_of_the_way_it_was_loaded_stays_on_model_or_config(checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"))
    model, _ = seam.load_without_experts(checkpoint("olmoe"))
    assert model.config.to_dict() == plain.config.to_dict()
    assert not {key for key in model.config.__dict__ if "quant" in key} - set(plain.config.__dict__)
    assert not {key for key in model.__dict__ if "quant" in key or "emoe" in key} - set(plain.__dict__)
    assert model._keys_to_ignore_on_load_unexpected == plain._keys_to_ignore_on_load_unexpected
    assert structure.find_experts(model)


def test_weights_do_not_lie_in_the_mapping_of_the_checkpoint(checkpoint):
    path = checkpoint("olmoe")
    seam.load_without_experts(path)
    kept, _ = seam.load_without_experts(path)
    mapped = seam._mappings({os.path.realpath(path / "model.safetensors")})
    for tensor in (*kept.parameters(), *kept.buffers()):
        assert not any(low <= tensor.data_ptr() < high for low, high in mapped)


def test_tied_weights_stay_tied(checkpoint):
    model, _ = seam.load_without_experts(checkpoint("olmoe"))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float32])
def test_the_dtype_is_the_one_transformers_takes(dtype, checkpoint):
    path = checkpoint("olmoe", torch.bfloat16)
    model, store = seam.load_without_experts(path, dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    assert model.dtype == expected.dtype
    assert {param.dtype for param in store.layers[0].params} == {str(expected.dtype).removeprefix("torch.")}


@pytest.mark.parametrize(
    ("option", "value"),
    [("device_map", "auto"), ("quantization_config", {"load_in_8bit": True}), ("state_dict", {}),
     ("torch_dtype", "bfloat16"), ("experts_implementation", "eager"), ("tp_plan", "auto")],
)  # fmt: skip
def test_an_option_that_contradicts_emoe_is_refused_by_name(option, value, checkpoint):
    with pytest.raises(errors.ConfigError, match=option):
        seam.load_without_experts(checkpoint("olmoe"), **{option: value})


def test_options_of_transformers_are_handed_on(checkpoint):
    model, _ = seam.load_without_experts(checkpoint("olmoe"), attn_implementation="eager", device_map="cpu")
    assert model.config._attn_implementation == "eager"
    config = meta.meta_model(checkpoint("olmoe")).config
    config.rms_norm_eps = 0.125
    assert seam.load_without_experts(checkpoint("olmoe"), config=config)[0].config.rms_norm_eps == 0.125


def test_a_quantized_checkpoint_is_refused_by_its_method(tmp_path):
    path = families.save("olmoe", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UnsupportedModelError, match="fp8"):
        seam.load_without_experts(path)


def test_a_dense_model_is_refused_with_the_families_that_work(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(errors.UnsupportedModelError, match=r"LlamaForCausalLM.*mixtral.*qwen3_moe"):
        seam.find_experts(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(errors.UnsupportedModelError, match="LlamaForCausalLM"):
        seam.load_without_experts(tmp_path)


def test_the_families_that_work_are_those_of_the_installed_transformers():
    found = structure.families_that_work()
    assert {"mixtral", "olmoe", "gpt_oss", "deepseek_v3", "nemotron_h"} <= set(found)
    assert "llama" not in found


@pytest.mark.parametrize("name", SHAPES)
def test_state_dict_gives_the_whole_model_in_the_usual_order(name, loaded, checkpoint):
    model, store, guard = loaded(name)
    expected = _state(checkpoint(name))
    _assert_same(model.state_dict(), expected)
    base = model.base_model_prefix + "."
    inner = {key.removeprefix(base): value for key, value in expected.items() if key.startswith(base)}
    _assert_same(model.base_model.state_dict(), inner)
    guard.remove()
    guard.remove()
    assert len(model.state_dict()) == len(expected) - sum(len(layer.params) for layer in store.layers)
    assert "save_pretrained" not in model.__dict__


@pytest.mark.parametrize("name", SHAPES)
def test_save_pretrained_writes_what_transformers_writes(name, loaded, checkpoint, tmp_path):
    model, _, _ = loaded(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert _names_on_disk(tmp_path) == _names_on_disk(checkpoint(name))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == _names_on_disk(tmp_path)
    assert {*index["weight_map"].values()} == {file.name for file in tmp_path.glob("*.safetensors")}
    assert not list(tmp_path.glob(".*"))
    _assert_same(_state(tmp_path), _state(checkpoint(name)))
    again, _ = seam.load_without_experts(tmp_path, dtype=torch.float32)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def test_save_pretrained_can_keep_merged_experts(loaded, checkpoint, tmp_path):
    model, _, _ = loaded("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in _names_on_disk(tmp_path))
    _assert_same(_state(tmp_path), _state(checkpoint("mixtral")))


def test_saving_over_an_earlier_checkpoint_replaces_it(loaded, checkpoint, tmp_path):
    families.save("olmoe", tmp_path, seed=1)
    (tmp_path / "tokenizer.json").write_text("{}")
    model, _, _ = loaded("olmoe")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "tokenizer.json").exists()
    _assert_same(_state(tmp_path), _state(checkpoint("olmoe")))


def test_saving_into_the_folder_the_experts_are_read_from_is_refused(tmp_path):
    path = families.save("olmoe", tmp_path / "model")
    expected = _state(path)
    (tmp_path / "link").symlink_to(path)
    model, store = seam.load_without_experts(path)
    seam.guard_saving(model, store)
    for folder in (path, tmp_path / "link"):
        with pytest.raises(errors.SaveError, match="another folder"):
            model.save_pretrained(folder)
    _assert_same(_state(path), expected)


@pytest.mark.parametrize("option", ["variant", "push_to_hub", "distributed_checkpoint"])
def test_an_option_of_saving_that_is_not_kept_is_refused(option, loaded, tmp_path):
    model, _, _ = loaded("olmoe")
    with pytest.raises(errors.SaveError, match=option):
        model.save_pretrained(tmp_path / "saved", **{option: "x"})
    assert not (tmp_path / "saved").exists()


def test_a_given_state_dict_is_saved_only_with_its_experts(loaded, checkpoint, tmp_path):
    model, _, _ = loaded("olmoe")
    whole = model.state_dict()
    with pytest.raises(errors.SaveError, match="lacks experts"):
        model.save_pretrained(tmp_path, state_dict={name: v for name, v in whole.items() if "experts" not in name})
    model.save_pretrained(tmp_path, state_dict=whole)
    _assert_same(_state(tmp_path), _state(checkpoint("olmoe")))


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(loaded, tmp_path, monkeypatch):
    path = families.save("olmoe", tmp_path, seed=1)
    expected = _state(path)
    model, _, _ = loaded("olmoe")
    real, calls = safetensors.torch.save_file, []

    def full(tensors, file, metadata):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, os.strerror(28))
        real(tensors, file, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(errors.SaveError, match="No space left"):
        model.save_pretrained(tmp_path)
    _assert_same(_state(path), expected)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert not torch.equal(_state(path)["lm_head.weight"], expected["lm_head.weight"])


@pytest.mark.parametrize("given", [False, True], ids=["all", "a state dict"])
def test_a_disk_that_is_full_when_transformers_writes_is_a_saving_error_too(loaded, given, tmp_path, monkeypatch):
    model, _, _ = loaded("olmoe")
    state = {"state_dict": model.state_dict()} if given else {}

    def full(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: IoError(Os { code: 28 })")

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(errors.SaveError, match=r"saving into .*out failed: Error while serializing"):
        model.save_pretrained(tmp_path / "out", **state)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "out", **state)
    _assert_same(_state(tmp_path / "out"), _state(families.save("olmoe", tmp_path / "same")))


def test_experts_that_cannot_be_read_any_more_stop_saving_and_state_dict(tmp_path):
    path = families.save("olmoe", tmp_path / "model")
    model, store = seam.load_without_experts(path)
    seam.guard_saving(model, store)
    with (path / "model.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(errors.SaveError, match=r"model\.safetensors"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())
    with pytest.raises(errors.SaveError, match="experts"):
        model.state_dict()


def test_a_state_dict_that_does_not_fit_into_memory_is_refused_with_the_way_out(loaded, monkeypatch):
    from emoe.seam import saving

    model, _, _ = loaded("olmoe")
    monkeypatch.setattr(saving, "available_memory", lambda: 1000)
    with pytest.raises(errors.SaveError, match=r"1000 bytes are free.*save_pretrained"):
        model.state_dict()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_taken_out_and_put_back_are_the_same(name):
    model = families.build(name)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    with write_store(model, ram=True) as store:
        seam.detach_experts(model, store.layers)
        assert all(list(m._parameters) == list(placeholders(m)) for _, m in structure.find_experts(model))
        guard = seam.guard_saving(model, store)
        _assert_same(model.state_dict(), expected)
        guard.remove()
        seam.attach_experts(model, store)
    _assert_same(model.state_dict(), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_that_cannot_be_read_leave_the_model_as_it_was(tmp_path):
    model = families.build("olmoe")
    store = write_store(model, folder=tmp_path)
    seam.detach_experts(model, store.layers)
    before = list(model.state_dict())
    sorted(tmp_path.iterdir())[-1].write_bytes(b"")
    with pytest.raises(errors.ReadError):
        seam.attach_experts(model, store)
    assert list(model.state_dict()) == before


def test_a_wrapped_model_that_was_made_from_a_config_is_saved_whole(tmp_path):
    model = families.build("granitemoe")
    model.save_pretrained(tmp_path / "plain")
    with write_store(model, ram=True) as store:
        seam.detach_experts(model, store.layers)
        seam.guard_saving(model, store)
        model.save_pretrained(tmp_path / "guarded")
    assert _names_on_disk(tmp_path / "guarded") == _names_on_disk(tmp_path / "plain")
    _assert_same(_state(tmp_path / "guarded"), _state(tmp_path / "plain"))


def test_a_model_closed_without_its_experts_is_not_saved_without_them(checkpoint, tmp_path):
    import emoe

    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    model.emoe.close(restore=False)
    with pytest.raises(errors.SaveError, match="closed"):
        model.save_pretrained(tmp_path)
    with pytest.raises(errors.SaveError, match="closed"):
        model.state_dict()
    assert not list(tmp_path.iterdir())


def test_a_config_without_a_dtype_takes_that_of_the_checkpoint(tmp_path):
    path = families.save("olmoe", tmp_path, torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: v for key, v in config.items() if key != "dtype"}))
    assert meta.meta_model(path).dtype == torch.bfloat16
    assert seam.load_without_experts(path)[0].dtype == torch.bfloat16


def test_a_model_of_the_hub_cache_is_found_by_its_id(tmp_path):
    """As huggingface_hub keeps it: a snapshot of links into a folder of blobs."""
    import emoe

    repository = tmp_path / "models--some--olmoe"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    families.save("olmoe", repository / "blobs", max_shard_size="60KB")
    snapshot.mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    model = emoe.from_pretrained("some/olmoe", memory_budget=0.5, cache_dir=tmp_path)
    _assert_same(model.state_dict(), _state(repository / "blobs"))
    for folder in (snapshot, repository / "blobs"):
        with pytest.raises(errors.SaveError, match="another folder"):
            model.save_pretrained(folder)
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
