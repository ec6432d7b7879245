"""A conversion that was stopped goes on, one of something else starts anew, and nothing of others is touched."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emoe.convert import run as running
from emoe.convert import state
from emoe.convert.run import convert
from emoe.convert.state import RECORD, unfinished, verify
from emoe.errors import CheckpointError, ConfigError, WriteError

SHARD = 60_000  # bytes: about ten files of the tiny checkpoint
KILLED = """
import os, signal, sys
from emoe.convert import run, state
before = state.Unfinished.record
def record(self, name, facts):
    before(self, name, facts)
    if len(self.shards) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
state.Unfinished.record = record
run.convert(sys.argv[1], sys.argv[2], "q8_0", shard_bytes=int(sys.argv[3]), progress=False)
"""


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECORD}


@pytest.fixture
def source(checkpoint, tmp_path):
    """A copy, so that tests may change it."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in checkpoint("olmoe").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def go(source: Path, out: Path, experts: str = "q8_0"):
    return convert(source, out, experts, shard_bytes=SHARD, progress=False)


def interrupted(source: Path, out: Path, monkeypatch, files: int = 3) -> None:
    """Runs until so many files are finished."""
    with monkeypatch.context() as patch:
        write = running._write

        def stop(folder, shard, *rest):
            if len(list(folder.glob("*.safetensors"))) == files:
                raise KeyboardInterrupt
            return write(folder, shard, *rest)

        patch.setattr(running, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            go(source, out)


def test_a_killed_conversion_goes_on_where_it_was_and_gives_the_same_files(source, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    go(source, whole)
    done = subprocess.run([sys.executable, "-c", KILLED, source, out, str(SHARD)], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    left = {path.name: path.stat().st_mtime_ns for path in unfinished(out).glob("*.safetensors")}
    assert len(left) == 3
    report = go(source, out)
    assert report.resumed == 3
    assert content_of(out) == content_of(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in left} == left
    assert not unfinished(out).exists()


def test_the_report_of_a_resumed_conversion_is_that_of_one_in_one_go(source, tmp_path, monkeypatch):
    whole = go(source, tmp_path / "whole")
    interrupted(source, tmp_path / "out", monkeypatch)
    report = go(source, tmp_path / "out")
    assert report.resumed == 3
    assert report.losses == whole.losses and report.bytes_after == whole.bytes_after


def test_an_interrupt_in_the_middle_of_a_file_leaves_finished_files_alone(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch)
    left = {path.name for path in unfinished(tmp_path / "out").iterdir()}
    assert left == {RECORD, *(name for name in left if name.startswith("model-"))} and len(left) == 4


def test_a_failure_before_the_first_file_leaves_nothing(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch, files=0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("what", ["options", "source"])
def test_what_is_of_other_options_or_another_source_starts_anew_and_says_so(
    what, source, tmp_path, monkeypatch, caplog
):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    experts = "q8_0"
    if what == "options":
        experts = "q4_0"
    else:
        os.utime(source / "model.safetensors", ns=(1, 1))
    report = go(source, out, experts)
    assert report.resumed == 0
    assert f"unfinished conversion of another {what}" in caplog.text and "starts anew" in caplog.text
    verify(out)


def test_a_damaged_file_of_an_earlier_run_is_written_again(source, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    go(source, whole)
    interrupted(source, out, monkeypatch)
    damaged = sorted(unfinished(out).glob("*.safetensors"))[1]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert go(source, out).resumed == 2
    assert content_of(out) == content_of(whole)


def test_a_damaged_record_starts_anew(source, tmp_path, monkeypatch, caplog):
    interrupted(source, tmp_path / "out", monkeypatch)
    (unfinished(tmp_path / "out") / RECORD).write_text("{")
    assert go(source, tmp_path / "out").resumed == 0
    assert "damaged" in caplog.text
    verify(tmp_path / "out")


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_is_there_already_is_never_written_over(what, source, tmp_path):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("precious")
    elif what == "folder":
        out.mkdir()
        (out / "precious").write_text("precious")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is there already"):
        go(source, out)
    assert out.read_text() == "precious" if what == "file" else out.is_symlink() or (out / "precious").exists()


def test_the_source_itself_and_a_finished_conversion_are_not_written_over(source, tmp_path):
    before = content_of(source)
    with pytest.raises(ConfigError, match="is there already"):
        go(source, source)
    assert content_of(source) == before
    go(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a finished conversion"):
        go(source, tmp_path / "out")


def test_an_empty_folder_is_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    go(source, tmp_path / "out")
    verify(tmp_path / "out")


def test_a_folder_under_the_unfinished_name_that_others_made_is_not_touched(source, tmp_path):
    other = unfinished(tmp_path / "out")
    other.mkdir()
    (other / "precious").write_text("precious")
    with pytest.raises(ConfigError, match="in the way"):
        go(source, tmp_path / "out")
    assert (other / "precious").read_text() == "precious"


def test_two_conversions_into_one_folder_do_not_meet(source, tmp_path):
    path = unfinished(tmp_path / "out")
    path.mkdir()
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(WriteError, match="another process converts"):
        go(source, tmp_path / "out")
    os.close(handle)
    go(source, tmp_path / "out")


def test_a_disk_that_is_too_small_is_known_before_the_first_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(WriteError, match=r"1000 bytes free; .* are needed"):
        go(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_fills_up_keeps_what_is_finished(source, tmp_path, monkeypatch):
    reserve, calls = running._reserve, []

    def full(handle, nbytes):
        calls.append(nbytes)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        reserve(handle, nbytes)

    monkeypatch.setattr(running, "_reserve", full)
    with pytest.raises(WriteError, match="No space left"):
        go(source, tmp_path / "out")
    assert len(list(unfinished(tmp_path / "out").glob("*"))) == 3
    assert go(source, tmp_path / "out").resumed == 2


def test_a_source_that_changes_meanwhile_is_an_error(source, tmp_path, monkeypatch):
    write = running._write

    def touch(folder, shard, *rest):
        os.utime(source / "model.safetensors", ns=(5, 5))
        return write(folder, shard, *rest)

    monkeypatch.setattr(running, "_write", touch)
    with pytest.raises(CheckpointError, match="changed since"):
        go(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_names_the_file_that_is_not_as_it_was_written(source, tmp_path):
    out = tmp_path / "out"
    go(source, out)
    record = verify(out)
    assert set(record["files"]) == {path.name for path in out.iterdir()} - {RECORD}
    path = sorted(out.glob("*.safetensors"))[2]
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path.name} is not what was written") as error:
        verify(out)
    assert error.value.file == str(path)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name} has {len(data) - 1} bytes, not the {len(data)}"):
        verify(out)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is missing"):
        verify(out)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "finished": false, "files": {}}', '{"format": 2}'])
def test_what_is_no_record_of_a_finished_conversion_is_refused(text, tmp_path):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(CheckpointError, match="record"):
        verify(tmp_path)


@pytest.mark.parametrize("facts", ["[]", "{}", '{"bytes": "x", "sha256": 1}', '{"bytes": 1e9, "sha256": "0"}'])
def test_a_record_with_damaged_entries_is_an_error_and_nothing_else(facts, tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / RECORD).write_text(f'{{"format": 1, "finished": true, "files": {{"a": {facts}}}}}')
    with pytest.raises(CheckpointError):
        verify(tmp_path)


def test_a_record_cannot_lead_out_of_its_folder(source, tmp_path):
    go(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    record["files"] = {"../source/model.safetensors": next(iter(record["files"].values()))}
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        verify(tmp_path / "out")


def test_checksums_are_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert state.checksum(tmp_path / "a").startswith("ba7816bf8f01cfea")
