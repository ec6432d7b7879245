"""What a process leaves that was killed while it wrote is removed by the next; what is in use, or a user's, is not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import families
import pytest

import emoe
from emoe import errors, files
from emoe.files import owned
from emoe.store.writer import write_store

ROOT = Path(__file__).parents[2]
WAIT = "import sys, time; print('ready', flush=True); time.sleep(3600)"
CHILDREN = {
    "file": "with files.whole(folder / 't.npz') as file:\n    file.write(b'half'); file.flush(); wait()",
    "folder": "own = files.OwnFolder(folder, 'saving'); (own.path / 'x').write_text('half'); wait()",
    "store": "store = write_store(families.build('olmoe'), folder=folder); wait()",
    "nameless": "store = write_store(families.build('olmoe')); wait()",
    "recording": "with TraceRecorder(1, 1, 1, path=folder / 't.npz').saving(): wait()",
}


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Starts a process that writes into a folder and waits in the middle of it; returns how to kill it."""
    started = []

    def start(what, folder):
        folder.mkdir(exist_ok=True)
        script = (
            f"from pathlib import Path\nfrom emoe import files\nfolder = Path({str(folder)!r})\n"
            f"def wait():\n    {WAIT}\n"
            + ("import families\nfrom emoe.store.writer import write_store\n" if "store =" in CHILDREN[what] else "")
            + ("from emoe.trace.trace import TraceRecorder\n" if "Recorder" in CHILDREN[what] else "")
            + CHILDREN[what]
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python_tests'}", "EMOE_CACHE": str(folder)}
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, cwd=ROOT)
        started.append(process)
        assert process.stdout.readline() == b"ready\n"

        def kill():
            process.send_signal(signal.SIGKILL)
            process.wait()

        return kill

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _write(folder):
    with files.whole(folder / "next") as file:
        file.write(b"next")
    (folder / "next").unlink()


@pytest.mark.parametrize("what", ["file", "folder", "recording"])
def test_what_a_killed_process_left_is_removed_by_the_next_one_that_writes_there(what, child, tmp_path):
    folder = tmp_path / "folder"
    kill = child(what, folder)
    assert len(_names(folder)) == 1
    _write(folder)
    assert len(_names(folder)) == 1  # its writer lives
    kill()
    assert len(_names(folder)) == 1
    _write(folder)
    assert _names(folder) == []


def test_a_store_of_a_killed_process_is_replaced_by_the_next_one_in_its_folder(child, tmp_path):
    folder, model = tmp_path / "store", families.build("olmoe")
    kill = child("store", folder)
    with pytest.raises(errors.StoreError, match="experts-0000"):
        write_store(model, folder=folder)
    before = _names(folder)
    kill()
    (folder / "mine.bin").write_text("mine")
    assert _names(folder) == sorted([*before, "mine.bin"])
    with write_store(model, folder=folder):
        assert len(_names(folder)) == len(before) + 1
    assert _names(folder) == ["mine.bin"]


def test_a_users_file_in_the_place_of_one_that_was_left_stays(child, tmp_path):
    folder = tmp_path / "store"
    child("store", folder)()
    (folder / "experts-0000.bin").unlink()
    (folder / "mine").write_text("mine")
    (folder / "mine").rename(folder / "experts-0000.bin")
    with pytest.raises(errors.StoreError, match="experts-0000"):
        write_store(families.build("olmoe"), folder=folder)
    assert _names(folder) == ["experts-0000.bin"]  # the others were left, and are gone
    assert (folder / "experts-0000.bin").read_text() == "mine"


def test_a_store_without_names_leaves_nothing_when_it_is_killed(child, tmp_path):
    kill = child("nameless", tmp_path / "cache")
    assert _names(tmp_path / "cache") == []
    kill()
    assert _names(tmp_path / "cache") == []


def test_a_file_system_that_makes_no_nameless_files_gets_named_ones_that_lose_their_name(tmp_path, monkeypatch):
    real = os.open

    def without(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", without)
    handle = files.nameless(tmp_path)
    os.pwrite(handle, b"bytes", 0)
    assert os.pread(handle, 5, 0) == b"bytes"
    assert _names(tmp_path) == []
    os.close(handle)


def test_saving_a_model_removes_what_a_killed_save_left(child, checkpoint, tmp_path):
    folder = tmp_path / "saved"
    child("folder", folder)()
    (folder / ".saving-mine").mkdir()
    (folder / ".x.emoe-not_ours_").write_text("a name of another form")
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    model.save_pretrained(folder)
    model.emoe.close(restore=False)
    assert [name for name in _names(folder) if name.startswith(".")] == [".saving-mine", ".x.emoe-not_ours_"]


def test_links_folders_of_others_and_names_that_only_look_alike_stay(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / ".link.emoe-abcd1234").symlink_to(tmp_path / "elsewhere")
    for name in (".t.npz.abcd1234", "t.emoe-abcd1234", ".t.emoe-abcd123", ".t.emoe-ABCD1234", ".t.emoe-abcd1234.bak"):
        (tmp_path / name).touch()
    before = _names(tmp_path)
    _write(tmp_path)
    assert _names(tmp_path) == before
    assert (tmp_path / "elsewhere" / "file").exists()


def test_names_in_a_left_list_that_lead_elsewhere_are_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("x")
    inode = outside.stat().st_ino
    (tmp_path / "folder" / ".names.emoe-abcd1234").write_text(f"{inode} ../outside\n{inode} /etc/passwd\nx\n\n0 ..\n")
    owned.sweep(tmp_path / "folder")
    assert _names(tmp_path / "folder") == []
    assert outside.exists()


def test_a_write_that_begins_beside_a_sweep_is_not_swept(tmp_path, monkeypatch):
    """The sweep finds the new file between its making and its lock."""
    real, swept = owned.fcntl.flock, []

    def late(handle, operation):
        if not swept:
            swept.append(True)
            owned.sweep(tmp_path)
            assert _names(tmp_path) == []
        return real(handle, operation)

    monkeypatch.setattr(owned.fcntl, "flock", late)
    with files.whole(tmp_path / "t") as file:
        assert len(_names(tmp_path)) == 1
        file.write(b"whole")
    assert (tmp_path / "t").read_bytes() == b"whole"


@pytest.mark.parametrize("what", ["no folder", "folder", "device", "pipe"])
def test_a_place_that_cannot_be_written_is_said_before_the_block_runs(what, tmp_path):
    path = tmp_path / "t"
    if what == "no folder":
        path = tmp_path / "none" / "t"
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/null")
    else:
        os.mkfifo(path)
    with pytest.raises(errors.WriteError, match=rf"{path} cannot be written") as caught, files.whole(path):
        raise AssertionError("the block ran")
    assert isinstance(caught.value, OSError)
    assert not [name for name in _names(tmp_path) if "emoe" in name]


def test_a_full_disk_is_said_before_the_block_runs(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(errors.WriteError, match="No space left") as caught,
        files.whole(tmp_path / "t", reserve=1 << 20),
    ):
        raise AssertionError("the block ran")
    assert caught.value.errno == errno.ENOSPC
    assert _names(tmp_path) == []
