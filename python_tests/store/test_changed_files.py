"""Checkpoints that change under a running model: it goes on with the bytes it was loaded from, or says what changed."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

import emoe
from emoe import errors
from emoe.store.headers import read_header
from emoe.store.opened import OpenFile

SEEDS = range(12)


@pytest.fixture(params=["olmoe", "gpt_oss"])
def path(request, checkpoint, tmp_path):
    return shutil.copytree(checkpoint(request.param), tmp_path / "model")


def _load(path, **options):
    return emoe.from_pretrained(path, **{"memory_budget": 1e-6, "dtype": torch.float32, **options})


def _logits(model):
    with torch.no_grad():
        return [
            model(torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(seed))).logits
            for seed in SEEDS
        ]


def _same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _close(one, other):
    """Transformers' own kernels round elsewhere."""
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))


def _other(path, tmp_path):
    """Another checkpoint of the same sizes."""
    other = shutil.copytree(path, tmp_path / "other")
    for file in other.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = raw[start:][::-1]  # every float is another one
        file.write_bytes(raw)
    return other / "model.safetensors"


def _refused(model, file):
    with pytest.raises(errors.ReadError, match="changed since the model was loaded") as caught:
        _logits(model)
    assert caught.value.file == str(file)
    assert caught.value.tensor
    assert caught.value.offset >= 0
    assert caught.value.nbytes > 0
    model.emoe.check_integrity()


def _rename_over(file, other):
    other.replace(file)


def _unlink(file, other):
    file.unlink()


def _delete_folder(file, other):
    shutil.rmtree(file.parent)


def _fifo(file, other):
    file.unlink()
    os.mkfifo(file)


def _folder(file, other):
    file.unlink()
    file.mkdir()


def _socket(file, other):
    file.unlink()
    here = os.open(file.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/{file.name}")
    os.close(here)


def _link_to_other(file, other):
    file.unlink()
    file.symlink_to(other)


def _overwrite(file):
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\xff" * (file.stat().st_size // 2))


def _truncate(file):
    os.truncate(file, 600)


@pytest.mark.parametrize("change", [_overwrite, _truncate], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kernels", ["native", "stock"])
def test_weights_of_a_shard_without_experts_are_in_memory_whatever_becomes_of_the_shard(
    path, tmp_path, kernels, change
):
    plain = load_file(path / "model.safetensors")
    shards = {"model-00001-of-00002.safetensors": False, "model-00002-of-00002.safetensors": True}
    weight_map = {name: file for name in plain for file, has in shards.items() if has == ("experts" in name)}
    for file in shards:
        own = {name: plain[name] for name, where in weight_map.items() if where == file}
        save_file(own, path / file, metadata={"format": "pt"})
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = _load(path, kernels=kernels)
    expected = _logits(model)
    change(path / "model-00001-of-00002.safetensors")
    assert _same(_logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert _same(_logits(_load(tmp_path / "saved", kernels=kernels)), expected)
    model.emoe.close()
    assert _close(_logits(model), expected)


@pytest.mark.parametrize(
    "change", [_rename_over, _unlink, _delete_folder, _fifo, _folder, _socket, _link_to_other], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("first", [True, False], ids=["before the first read", "between reads"])
def test_whatever_takes_the_place_of_the_file_the_model_reads_its_own(path, tmp_path, change, first):
    model = _load(path)
    expected = _logits(_load(path))
    if not first:
        _logits(model)
    change(path / "model.safetensors", _other(path, tmp_path))
    assert _same(_logits(model), expected)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert _same(_logits(_load(saved)), expected)
    model.emoe.close()
    assert _close(_logits(model), expected)


def _overwrite(file, raw, other):
    with file.open("r+b") as stream:
        stream.write(other.read_bytes())


def _truncate(file, raw, other):
    os.truncate(file, len(raw) // 8)


def _sparse(file, raw, other):
    os.truncate(file, 0)
    os.truncate(file, len(raw))


def _rewrite(file, raw, other):
    os.truncate(file, len(raw) // 8)
    file.write_bytes(raw)


@pytest.mark.parametrize("change", [_overwrite, _truncate, _sparse, _rewrite], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reader", ["pread", "uring"])
def test_a_file_that_is_written_to_is_refused_by_every_reader_of_it(path, tmp_path, change, reader):
    try:
        model = _load(path, reader=reader)
    except errors.BackendUnavailable as error:
        pytest.skip(str(error))
    _logits(model)
    file = path / "model.safetensors"
    change(file, file.read_bytes(), _other(path, tmp_path))
    _refused(model, file)
    with pytest.raises(errors.EmoeError, match="changed since the model was loaded"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(errors.EmoeError, match="changed since the model was loaded"):
        model.state_dict()


def test_a_damaged_file_is_read_again_once_it_is_whole_with_its_time(path):
    model = _load(path)
    expected = _logits(model)
    file = path / "model.safetensors"
    before = file.stat()
    raw = file.read_bytes()
    os.truncate(file, len(raw) // 8)
    _refused(model, file)
    with file.open("r+b") as stream:  # rsync --inplace --times
        stream.write(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _same(_logits(model), expected)


def test_other_bytes_of_the_same_size_and_time_are_not_taken_for_a_repaired_file(path, tmp_path):
    model = _load(path)
    _logits(model)
    file = path / "model.safetensors"
    before, other = file.stat(), _other(path, tmp_path)
    file.rename(path / "away")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    os.truncate(path / "away", before.st_size // 8)
    for _ in range(2):
        _refused(model, file)
    with pytest.raises(errors.SaveError, match="changed since the model was loaded"):
        model.state_dict()
    with pytest.raises(errors.SaveError, match="changed since the model was loaded"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(errors.ReadError, match="changed since the model was loaded"):
        model.emoe.close(restore=True)
    model.emoe.close(restore=False)


def test_a_damaged_file_that_is_replaced_by_a_copy_with_its_time_is_opened_anew(path):
    model = _load(path)
    expected = _logits(model)
    file = path / "model.safetensors"
    before = file.stat()
    copy = Path(shutil.copy2(file, path / "copy"))
    os.truncate(file, before.st_size // 8)
    _refused(model, file)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(file)
    assert _same(_logits(model), expected)
    model.emoe.close()
    assert _close(_logits(model), expected)


def test_a_damaged_file_that_is_replaced_by_one_of_another_time_stays_refused(path, tmp_path):
    model = _load(path)
    _logits(model)
    file = path / "model.safetensors"
    other = _other(path, tmp_path)
    os.truncate(file, 100)
    _refused(model, file)
    other.replace(file)
    _refused(model, file)


def test_links_and_permissions_change_no_byte(path):
    model = _load(path)
    expected = _logits(model)
    file = path / "model.safetensors"
    os.link(file, path / "second")
    file.chmod(0o400)
    assert _same(_logits(model), expected)


def test_a_relative_path_stays_what_it_was_when_the_working_folder_changes(path, tmp_path, monkeypatch):
    expected = _logits(_load(path))
    monkeypatch.chdir(path.parent)
    model = _load(path.name)
    monkeypatch.chdir(tmp_path.parent)
    assert _same(_logits(model), expected)
    with pytest.raises(errors.SaveError, match="holds the experts"):
        model.save_pretrained(path)


@pytest.mark.parametrize("place", [_fifo, _folder, _socket], ids=lambda f: f.__name__)
def test_what_is_no_file_is_refused_at_load_and_never_waited_for(path, place):
    place(path / "model.safetensors", None)
    with pytest.raises(errors.ReadError, match=r"no regular file|No such device"):
        read_header(path / "model.safetensors")


def test_a_store_that_wrap_wrote_is_watched_too(tmp_path):
    model = emoe.wrap(families.build("olmoe"), memory_budget=1e-6, store=tmp_path / "store")
    expected = _logits(model)
    file = tmp_path / "store" / "experts-0001.bin"
    shutil.copy2(file, tmp_path / "copy")
    os.truncate(file, 5000)
    _refused(model, file)
    (tmp_path / "copy").replace(file)
    assert _same(_logits(model), expected)
    model.emoe.close()
    assert _close(_logits(model), expected)


def test_a_file_that_was_replaced_while_the_model_was_loaded_is_refused(path, tmp_path):
    file = path / "model.safetensors"
    opened = OpenFile(str(file))
    opened.require_in_place()
    other = _other(path, tmp_path)
    other.replace(file)
    with pytest.raises(errors.CheckpointError, match="changed while the model was loaded"):
        opened.require_in_place()
    opened.close()
    opened.close()


def test_more_shards_than_the_soft_limit_of_descriptors_are_opened(tmp_path):
    import resource

    model_path = families.save("olmoe", tmp_path / "shards", max_shard_size="10KB")
    shards = len(list(model_path.glob("*.safetensors")))
    assert shards > 20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + shards, hard))
    try:
        model = _load(model_path)
        assert torch.isfinite(_logits(model)[0]).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    model.emoe.close(restore=False)
