"""Damaged and incomplete checkpoints: an error names file, tensor and bytes before any token; repaired, they work."""

from __future__ import annotations

import json
import os
import shutil
import struct

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

import emoe
from emoe import errors

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def path(checkpoint, tmp_path):
    """A checkpoint in one file that a test may damage."""
    return shutil.copytree(checkpoint("olmoe"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return families.save("olmoe", tmp_path / "sharded", max_shard_size="60KB")


def _ids():
    return torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(3))


def _load(path):
    return emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32)


def _logits(path):
    model = _load(path)
    with torch.no_grad():
        logits = model(_ids()).logits
    model.emoe.close(restore=False)
    return logits


def _change(file, change):
    """Rewrites the tensors of a safetensors file."""
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _fails(path, error=errors.CheckpointError):
    with pytest.raises(error) as caught:
        _load(path)
    return caught.value


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


CHANGES = {
    "missing expert": (_drop(GATE), GATE, "lacks"),
    "missing last expert": (_drop(GATE.replace(".3.", ".7.")), GATE.replace(".3.", ".7."), "lacks"),
    "missing norm": (_drop(NORM), NORM, "lacks"),
    "expert of another shape": (_put(GATE, lambda t: t[:-1].clone()), GATE, "shape"),
    "transposed expert": (_put(GATE, lambda t: t.T.contiguous()), GATE, "shape"),
    "norm of another shape": (_put(NORM, lambda t: t[:-1].clone()), NORM, "shape"),
    "expert of integers": (_put(GATE, lambda t: t.to(torch.int32)), GATE, "int32"),
    "expert of doubles": (_put(GATE, lambda t: t.double()), GATE, "float64"),
    "norm of integers": (_put(NORM, lambda t: t.to(torch.int64)), NORM, "int64"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_tensor_is_named_and_the_repaired_checkpoint_works(name, path):
    change, tensor, said = CHANGES[name]
    file = path / "model.safetensors"
    sound = file.read_bytes()
    _change(file, change)
    error = _fails(path)
    assert error.tensor == tensor
    assert tensor in str(error)
    assert said in str(error)
    assert error.file in (str(file), str(path))
    file.write_bytes(sound)
    assert _logits(path).isfinite().all()


def test_all_tensors_of_a_projection_missing_is_named_by_the_parameter(path):
    _change(path / "model.safetensors", lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.experts" in name])
    assert "model.layers.1.mlp.experts" in _fails(path).tensor


def test_all_of_one_of_two_projections_that_make_a_parameter_missing_is_named(path):
    _change(
        path / "model.safetensors",
        lambda t: [t.pop(name) for name in list(t) if "1.mlp.experts" in name and "up_" in name],
    )
    error = _fails(path)
    assert "without its like, mlp.experts.*.up_proj.weight, for model.layers.1.mlp.experts.gate_up_proj" in str(error)


def test_one_expert_left_of_a_projection_is_named_by_the_first_that_is_missing(path):
    others = [GATE.replace(".3.", f".{expert}.") for expert in range(families.EXPERTS) if expert != 3]
    _change(path / "model.safetensors", lambda tensors: [tensors.pop(name) for name in others])
    error = _fails(path)
    assert error.tensor == others[0]
    assert "7 are missing" in str(error)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_file_is_named_with_the_bytes_it_should_have(kept, path):
    file = path / "model.safetensors"
    sound = file.read_bytes()
    size = int(kept * len(sound)) if isinstance(kept, float) else kept
    file.write_bytes(sound[:size])
    error = _fails(path)
    assert error.file == str(file)
    assert str(size) in str(error)
    if isinstance(kept, float):  # the header is whole: the tensor is known
        assert error.tensor
        assert error.offset + error.nbytes > size
    file.write_bytes(sound)
    assert _logits(path).isfinite().all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: struct.pack("<Q", 1 << 60) + raw[8:],
        lambda raw: raw[:8] + b"x" + raw[9:],
        lambda raw: raw.replace(b'"F32"', b'"F16"', 1),
        lambda raw: raw.replace(b'"shape"', b'"shabe"', 1),
        lambda raw: raw + b"more",
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["header length", "json", "dtype", "key", "trailing bytes", "pointer of a large-file store"],
)
def test_a_damaged_header_is_a_checkpoint_error_that_names_the_file(damage, path):
    file = path / "model.safetensors"
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    error = _fails(path)
    assert error.file == str(file)
    assert str(file) in str(error)
    file.write_bytes(sound)
    assert _logits(path).isfinite().all()


def test_a_shard_that_the_index_names_but_that_is_missing_is_named(sharded):
    expected = _logits(sharded)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    moved = shard.rename(shard.with_suffix(".away"))
    error = _fails(sharded)
    assert error.file == str(shard)
    assert error.tensor in json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    moved.rename(shard)
    assert torch.equal(_logits(sharded), expected)


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 16)
    assert _fails(sharded).file == str(shard)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    _change(second, lambda tensors: tensors.update({name: torch.zeros(2)}))
    error = _fails(sharded)
    assert error.tensor == name
    assert first.name in str(error)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'],
)
def test_a_damaged_index_is_named(text, sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    assert _fails(sharded).file == str(index)


def test_an_unreadable_file_is_named(path, monkeypatch):
    file = path / "model.safetensors"
    real_open = os.open

    def refuse(name, *args, **kwargs):
        if str(name) == str(file):
            raise PermissionError(13, os.strerror(13))
        return real_open(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    error = _fails(path)
    assert error.file == str(file)
    assert "Permission denied" in str(error)
    monkeypatch.undo()
    assert _logits(path).isfinite().all()


def test_a_folder_in_place_of_a_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    assert _fails(sharded).file == str(shard)


def test_a_checkpoint_of_pickles_is_refused_with_the_way_out(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    error = _fails(path)
    assert error.file == str(path / "pytorch_model.bin")
    assert "save_pretrained" in str(error)


def test_a_folder_without_weights_is_named(path):
    (path / "model.safetensors").unlink()
    assert str(path) in str(_fails(path))


def test_a_checkpoint_of_another_size_than_its_config_is_refused(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_experts": families.EXPERTS + 1}))
    error = _fails(path)
    assert "experts.8." in error.tensor or "gate" in error.tensor
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    assert "shape" in str(_fails(path))
    (path / "config.json").write_text(json.dumps({**config, "num_experts": families.EXPERTS - 1}))
    _fails(path)
    (path / "config.json").write_text(json.dumps(config))
    assert _logits(path).isfinite().all()
