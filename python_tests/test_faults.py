"""What a user meets when reading an expert fails in the middle of a run: an error that names it, no wrong token."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import emoe
from emoe import errors, native, runtime


@pytest.fixture
def faulty(monkeypatch):
    """faulty(**faults): the next model reads through a reader with these faults."""

    def arrange(**faults):
        module = native.load()
        monkeypatch.setattr(
            runtime, "make_reader", lambda kind: module.FaultyReader(module.make_reader(kind), **faults)
        )

    return arrange


def _ids():
    return torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(3))


def _logits(model):
    with torch.no_grad():
        return model(_ids()).logits


@pytest.mark.parametrize("kernels", ["native", "stock"])
def test_a_failed_read_is_named_and_the_next_attempt_gives_the_right_logits(kernels, faulty, checkpoint):
    path = checkpoint("olmoe")
    whole = emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32, kernels=kernels)
    expected = _logits(whole)
    faulty(fail_at=5, errno=errno.EIO)
    model = emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32, kernels=kernels)
    with pytest.raises(errors.ReadError, match=os.strerror(errno.EIO)) as caught:
        _logits(model)
    assert str(path) in caught.value.file
    assert "experts" in caught.value.tensor
    assert caught.value.nbytes > 0
    assert caught.value.offset >= 0
    model.emoe.check_integrity()
    assert torch.equal(_logits(model), expected)
    model.emoe.check_integrity()


def test_a_read_that_the_system_cuts_short_is_completed(faulty, checkpoint):
    path = checkpoint("olmoe")
    expected = _logits(emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32))
    faulty(short_at=5)
    model = emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32)
    assert torch.equal(_logits(model), expected)
    model.emoe.check_integrity()


def test_generate_stops_at_a_failed_read(faulty, checkpoint):
    faulty(fail_at=30, errno=errno.EIO)
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1e-6, dtype=torch.float32)
    with pytest.raises(errors.ReadError):
        model.generate(_ids(), max_new_tokens=8, do_sample=False)
    model.emoe.check_integrity()


def test_a_file_that_is_truncated_while_the_model_runs_is_named(checkpoint, tmp_path):
    import families

    path = families.save("olmoe", tmp_path / "model")
    model = emoe.from_pretrained(path, memory_budget=1e-6, dtype=torch.float32)
    expected = _logits(model)
    file = path / "model.safetensors"
    data, before = file.read_bytes(), file.stat()
    with file.open("r+b") as stream:
        stream.truncate(len(data) // 8)
    with pytest.raises(errors.ReadError) as caught:
        _logits(model)
    assert caught.value.file == str(file)
    model.emoe.check_integrity()
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # else nothing says that these are the bytes of then
    assert torch.equal(_logits(model), expected)


def test_a_slow_disk_changes_nothing_but_time(faulty, checkpoint):
    path = checkpoint("olmoe")
    expected = _logits(emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32))
    faulty(delay_ms=20)
    model = emoe.from_pretrained(path, memory_budget=0.5, dtype=torch.float32)
    assert torch.equal(_logits(model), expected)
    assert model.emoe.stats()["stall_ms"] > 0
