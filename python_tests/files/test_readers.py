"""Files that users give: one reader for each container, bounded by the file's size; it never waits and never wraps."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from emoe import errors, files, predictor
from emoe.demo.delta import load_delta
from emoe.files import jsontext, npz
from emoe.planning import bandwidth
from emoe.predictor.table import GlobalTable
from emoe.sensitivity import SensitivityProfile
from emoe.store import headers
from emoe.tasks import TaskClassifier, load_prompts
from emoe.trace.trace import join, load_trace

CONTENT = importlib.import_module("emoe.files.content")  # the package has a function of that name
READERS = {
    "npz": load_trace,
    "csv": load_trace,
    "jsonl": load_prompts,
    "json": SensitivityProfile.load,
    "predictor": predictor.load,
    "tasks": TaskClassifier.load,
    "delta": load_delta,
}


@pytest.fixture
def bounded():
    """Runs something in at most 10 s of the processor and 300 MiB."""

    def run(action, *args):
        tracemalloc.start()
        start = time.process_time()
        try:
            return action(*args)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert time.process_time() - start < 10
            assert peak < 300 << 20

    return run


@pytest.mark.parametrize("kind", READERS)
def test_a_path_without_a_file_is_missing_in_both_languages(kind, tmp_path):
    for path in (tmp_path / f"nothing.{kind}", tmp_path / "no" / f"folder.{kind}"):
        with pytest.raises(errors.MissingFileError, match=rf"there is no .*{path.name}") as caught:
            READERS[kind](path)
        assert isinstance(caught.value, (FileNotFoundError, errors.EmoeError))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("what", ["folder", "pipe", "link to a pipe", "device", "socket", "empty"])
def test_what_is_no_regular_file_is_refused_at_once(kind, what, tmp_path, bounded, monkeypatch):
    monkeypatch.setattr(CONTENT, "WRITER_SECONDS", 0.05)  # prompts may come through a pipe
    path = tmp_path / f"it.{kind}"
    with socket.socket(socket.AF_UNIX) as server:
        if what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "link to a pipe":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        elif what == "device":
            path.symlink_to("/dev/zero")
        elif what == "socket":
            server.bind(str(path))
        else:
            path.touch()
        with pytest.raises(errors.EmoeError, match=r"it\."):
            bounded(READERS[kind], path)


def _prompt_lines(count):
    return b"".join(json.dumps({"task": "code", "prompt": f"{n} " * 200}).encode() + b"\n" for n in range(count))


@contextlib.contextmanager
def _writing(open_it, *pieces):
    """A thread that writes these bytes, or sleeps for that many seconds, to what it opens."""

    def write():
        with open_it() as pipe:
            for piece in pieces:
                time.sleep(piece) if isinstance(piece, float) else (pipe.write(piece), pipe.flush())

    writer = threading.Thread(target=write)
    writer.start()
    yield
    writer.join()


def test_prompts_may_come_through_a_pipe_that_is_named_or_is_not(tmp_path):
    data = _prompt_lines(500)  # more than a pipe holds
    named = tmp_path / "prompts"
    os.mkfifo(named)
    with _writing(lambda: named.open("wb"), data[:1000], 0.05, data[1000:]):
        assert len(load_prompts(named)) == 500
    read, write = os.pipe()
    with _writing(lambda: os.fdopen(write, "wb"), 0.05, data):
        assert len(load_prompts(f"/dev/fd/{read}")) == 500
    os.close(read)


def test_a_pipe_whose_writer_comes_late_or_takes_his_time_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(CONTENT, "WRITER_SECONDS", 0.5)
    named = tmp_path / "prompt"
    os.mkfifo(named)

    def late():
        time.sleep(0.1)
        return named.open("wb")

    with _writing(late, 0.7, b"how are you"):
        assert files.content(named, "prompt", errors.ConfigError, most=100, piped=True) == b"how are you"


def test_a_pipe_without_a_writer_or_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(CONTENT, "WRITER_SECONDS", 0.05)
    named = tmp_path / "prompt"
    os.mkfifo(named)
    with pytest.raises(errors.ConfigError, match=r"prompt: the prompt is a pipe that nobody writes to"):
        files.content(named, "prompt", errors.ConfigError, most=100, piped=True)
    read, write = os.pipe()
    os.write(write, bytes(101))
    with pytest.raises(errors.ConfigError, match="more than the 100 bytes"):
        files.content(f"/dev/fd/{read}", "prompt", errors.ConfigError, most=100, piped=True)
    os.close(read)
    os.close(write)


def test_devices_are_refused_where_pipes_are_taken_but_for_standard_input():
    with pytest.raises(errors.ConfigError, match="is a device; give a regular file"):
        files.content("/dev/zero", "prompt", errors.ConfigError, most=100, piped=True)
    program = (
        "from emoe import errors, files; print(files.content('/dev/stdin', 'it', errors.ConfigError, most=9, piped=1))"
    )
    for given, said in ((b"hello", "bytearray(b'hello')"), (None, "bytearray(b'')")):
        how = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=True, **how)
        assert done.stdout.decode().strip() == said


@pytest.mark.parametrize("path", ["a\0b.npz", "\ud800.csv", "~nobody-of-that-name/x.npz", "x" * 5000 + ".csv"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(errors.EmoeError):
        load_trace(path)


# --- .npz ------------------------------------------------------------------------------------------------------------


def _npz(path, header, body=b"", **others):
    """A member `experts` with this text as its header."""
    text = header.encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        length = b"\x02\x00" + struct.pack("<I", len(text))
        archive.writestr("experts.npy", b"\x93NUMPY" + length + text + body)
        for name, data in others.items():
            archive.writestr(name, data)
    return path


def _described(shape, descr="<i2", fortran=False):
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape})


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused_before_it_is_unpacked(tmp_path, bounded):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("experts.npy", "w") as member:
        text = _described((1, 400 << 20, 1), "|i1").encode()
        member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
        for _ in range(400):
            member.write(bytes(1 << 20))
    with pytest.raises(errors.TraceError, match=r"bomb\.npz.*would take 419430400 bytes"):
        bounded(load_trace, path)


def test_several_arrays_together_are_held_to_one_bound(tmp_path, bounded):
    half = np.zeros((1, npz.FLOOR // 4, 1), dtype=np.int16)
    np.savez_compressed(tmp_path / "one.npz", experts=half)
    assert bounded(load_trace, tmp_path / "one.npz").tokens == npz.FLOOR // 4
    weights = np.zeros((1, npz.FLOOR // 2, 1), dtype=np.float32)
    np.savez_compressed(tmp_path / "two.npz", experts=half, weights=weights)
    with pytest.raises(errors.TraceError, match=r"'weights'.*would take"):
        bounded(load_trace, tmp_path / "two.npz")


def test_arrays_that_no_trace_has_are_not_unpacked(tmp_path, bounded):
    np.savez_compressed(tmp_path / "t.npz", experts=np.zeros((1, 2, 1), dtype=np.int16), other=np.zeros(80 << 20))
    assert bounded(load_trace, tmp_path / "t.npz").tokens == 2


@pytest.mark.parametrize(
    "header",
    [
        _described((1,) * 160_000),
        _described((1,) * 900),
        _described((2**62,) * 8),
        _described((0, 10**30, 1)),
        _described((-1, 2, 1)),
        _described((True, 2, 1)),
        _described((1.0, 2, 1)),
        _described([1, 2, 1]),
        _described((1, 2, 1), "|O"),
        _described((1, 2, 1), "<i2, (1000000,)i2"),
        _described((1, 2, 1), [("a", "<i2")]),
        _described((1, 2, 1), "<U1000000000"),
        _described((1, 2, 1), "<f16"),
        _described((1, 3, 1)),
        _described((1, 1, 1)),
        "(" * 3000,
        "{'descr': '<i2'",
        "{}",
        "[]",
        "1",
    ],
)
def test_a_header_that_does_not_fit_its_member_is_refused(header, tmp_path, bounded):
    path = _npz(tmp_path / "t.npz", header, bytes(4))
    with pytest.raises(errors.TraceError, match=r"t\.npz"):
        bounded(load_trace, path)


def test_arrays_of_either_order_and_byte_order_are_read(tmp_path):
    ids = np.array([[[0, 5], [3, 1]], [[2, 4], [1, 0]]])
    for number, array in enumerate((ids.astype(">i4"), np.asfortranarray(ids.astype("<i2")), ids.astype("|u1"))):
        np.savez(tmp_path / f"{number}.npz", experts=array)
        assert load_trace(tmp_path / f"{number}.npz").experts.tolist() == ids.tolist()
    _npz(tmp_path / "ok.npz", _described((1, 2, 1)), bytes([3, 0, 4, 0]))
    assert load_trace(tmp_path / "ok.npz").experts.tolist() == [[[3], [4]]]


_IDS = np.zeros((2, 3, 1), dtype=np.int16)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"task": np.array([0, 0, 2**32])}, "'task' goes from 0 to 4294967296, expected 0 to 2147483647"),
        ({"task": np.array([0, 0, 2**63], dtype=np.uint64)}, "'task' goes from 0 to 9223372036854775808"),
        ({"task": np.array([0, 0, -1])}, "'task' goes from -1"),
        ({"task": np.array([0, 0, 2**31 - 1])}, "task_names"),
        ({"prompt": np.array([0, 0, 2**32 + 5])}, "'prompt' goes from 0 to 4294967301"),
        ({"phase": np.array([0, 1, 256])}, "'phase' goes from 0 to 256, expected 0 to 255"),
        ({"weights": np.full((2, 3, 1), 1e300)}, "'weights' has values that do not fit into float32"),
        ({"weights": np.zeros((2, 3, 1), dtype=np.int64)}, "'weights' is int64"),
        ({"weights": np.zeros((2, 3, 1), dtype=np.complex64)}, "array 'weights' is of type '<c8'"),
        ({"meta": '{"num_experts": true}'}, "'num_experts' in meta is True"),
        ({"meta": '{"num_experts": 1e3}'}, "'num_experts' in meta is 1000.0"),
        ({"meta": '{"num_experts": 1000000000}'}, "is 1000000000, expected a whole number from 0 to 32768"),
        ({"meta": '{"num_experts": -4}'}, "is -4"),
        ({"meta": '{"expert_bytes": 1.5}'}, "'expert_bytes' in meta is 1.5"),
        ({"meta": '{"expert_bytes": [1, true]}'}, "'expert_bytes' in meta is True"),
        ({"meta": '{"expert_bytes": -1}'}, "'expert_bytes' in meta is -1"),
        ({"meta": '{"expert_bytes": 9223372036854775808}'}, "'expert_bytes' in meta is 9223372036854775808"),
        ({"meta": '{"task_names": "abc"}'}, "'task_names' in meta is 'abc', expected a list of texts"),
        ({"meta": '{"task_names": [1]}'}, "expected a list of texts"),
        ({"meta": '{"task_names": 7}'}, "expected a list of texts"),
        ({"meta": '{"a": ' + "[" * 5000 + "]" * 5000 + "}"}, "nested over 64 deep"),
        ({"meta": '{"a": ' + "1" * 5000 + "}"}, "a number of 5000 digits"),
        ({"meta": '{"a": NaN}'}, "NaN is no number"),
        ({"meta": np.array(["{}"])}, r"'meta' is str\d+ \[1\], expected one text"),
        ({"meta": np.array(5)}, "'meta' is int64"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_not_wrapped(arrays, words, tmp_path):
    np.savez(tmp_path / "t.npz", experts=_IDS, **arrays)
    with pytest.raises(errors.TraceError, match=words):
        load_trace(tmp_path / "t.npz")


def test_prompts_of_joined_traces_that_would_wrap_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", experts=_IDS, prompt=np.array([0, 1, 2**31 - 1]))
    trace = load_trace(tmp_path / "t.npz")
    with pytest.raises(errors.TraceError, match="2147483647"):
        join([trace, trace])


# --- .csv ------------------------------------------------------------------------------------------------------------

_CSV = "turn,phase,step,layer,expert,weight,expert_bytes\n0,0,0,0,1,0.5,10\n0,0,0,1,2,0.5,10\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("0,0,0,1,2,0.5,10", "0,0,0,1,1.5,0.5,10", "expert 1.5 in row 2"),
        ("0,0,0,1,2,0.5,10", "0,0,0,1,32768,0.5,10", "expert 32768 in row 2"),
        ("0,0,0,1,2,0.5,10", "0,0,0,1,-2,0.5,10", "expert -2 in row 2"),
        ("0,0,0,1,2,0.5,10", "0,0,0,0.5,2,0.5,10", "layer 0.5 in row 2"),
        ("0,0,0,1,2,0.5,10", "4294967296,0,0,1,2,0.5,10", "turn 4.29497e.09 in row 2"),
        ("0,0,0,1,2,0.5,10", "0,256,0,1,2,0.5,10", "phase 256"),
        ("0,0,0,1,2,0.5,10", "0,0,1e300,1,2,0.5,10", r"step 1e\+300"),
        ("0,0,0,1,2,0.5,10", "0,0,0,1,2,0.5,1.5", "expert_bytes 1.5"),
        ("0,0,0,1,2,0.5,10", "0,0,0,1,2,1e300,10", r"weight 1e\+300"),
        ("0,0,0,1,2,0.5,10", "0,0,0,1,nan,0.5,10", "row 2: expert is nan"),
        ("0,0,0,1,2,0.5,10", "0,0,0,1,2,inf,10", "row 2: weight is inf"),
        ("0,0,0,1,2,0.5,10", "0,0,0,1", "invalid column index"),
        ("turn", "# layer=x expert_bytes=5\nturn", "layer='x' is no number"),
        ("turn", "# layer=0 expert_bytes=1.5\nturn", "expert_bytes='1.5' is no number"),
        ("turn", f"# n_expert={'9' * 5000}\nturn", "n_expert='999"),
        ("turn", "# n_expert=-1\nturn", "n_expert='-1'"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_not_cut(old, new, words, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(_CSV)
    assert load_trace(path).experts.tolist() == [[[1]], [[2]]]
    path.write_text(_CSV.replace(old, new))
    with pytest.raises(errors.TraceError, match=words):
        load_trace(path)


def test_rows_that_share_no_token_and_no_layer_do_not_take_the_square_of_their_number(tmp_path, bounded):
    path = tmp_path / "t.csv"
    path.write_text("step,layer,expert\n" + "\n".join(f"{n},{n},0" for n in range(150_000)) + "\n")
    with pytest.raises(errors.TraceError, match="150000 rows of 150000 layers, 150000 tokens"):
        bounded(load_trace, path)


def test_columns_of_text_and_other_ends_of_lines_are_no_matter(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffword,step,layer,expert\r\nw\u2028\x85,0,0,1\r\n\r\n,0,1,2\r\n".encode())
    assert load_trace(path).experts.tolist() == [[[1]], [[2]]]


def test_a_line_without_end_is_not_read_into_memory(tmp_path, bounded):
    for name, read in (("t.csv", load_trace), ("p.jsonl", load_prompts)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(8 << 30)  # takes no space on the disk
        with pytest.raises(errors.EmoeError, match="line of over 16777216 bytes"):
            bounded(read, tmp_path / name)


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 65 + "]" * 65, "nested over 64 deep"),
        ("[" * 200_000, "nested over 64 deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested over 64 deep"),
        ("9" * 65, "a number of 65 digits"),
        ("9" * 1_000_000, "a number of 1000000 digits"),
        ("1e999", "1e999 does not fit"),
        ("-1e999", "-1e999 does not fit"),
        ("0." + "1" * 70, "does not fit"),
        ("[NaN]", "NaN is no number"),
        ("-Infinity", "-Infinity is no number"),
        (r'"\ud800"', "not UTF-8"),
        (r'{"\udfff": 1}', "not UTF-8"),
        ('"\ud800"', "not UTF-8"),
        (b'"\xff"', "not UTF-8"),
        ("", "Expecting value"),
        ("{,}", "Expecting property name"),
    ],
)
def test_json_out_of_bounds_is_refused(text, words, bounded):
    with pytest.raises(errors.TraceError, match=words):
        bounded(jsontext.parse, text, errors.TraceError)


def test_brackets_in_texts_are_no_depth_and_pairs_of_surrogates_are_one_letter():
    text = json.dumps(["[" * 500 + '\\"{', [[0, -1.5, 10**19]] * 200, "\U0001f600"])
    assert jsontext.parse(text, errors.TraceError) == json.loads(text)
    assert jsontext.parse("[" * 64 + "]" * 64, errors.TraceError) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 2.0}, "layers is 2.0"),
        ({"layers": True}, "layers is True"),
        ({"layers": 2**40}, "layers is 1099511627776"),
        ({"version": 1.5}, "version is 1.5"),
        ({"version": 2}, "version is 2"),
        ({"threshold": "0.5"}, "threshold is '0.5'"),
        ({"threshold": 7}, "threshold is 7"),
        ({"meta": []}, "not both objects"),
        ({"tasks": []}, "not both objects"),
        ({"tasks": {"a": {"similarity": ["1", 1, 1], "error": [0, 0, 0], "prompts": 1}}}, "similarity is '1'"),
        ({"tasks": {"a": {"similarity": [1, 1, 1], "error": [0, 0], "prompts": 1}}}, "expected 3 numbers"),
        ({"tasks": {"a": {"similarity": [1, 1, 1], "error": [0, 0, 0], "prompts": 1.5}}}, "prompts is 1.5"),
        ({"tasks": {"a": {"similarity": [1, 1, 1], "error": [0, 0, 0], "prompts": -1}}}, "prompts is -1"),
        ({"tasks": {"a": None}}, "not a sensitivity profile"),
    ],
)
def test_a_profile_whose_values_do_not_fit_is_refused(change, words, tmp_path):
    path = SensitivityProfile(("a",), 2, np.ones((1, 3)), prompts=(4,)).save(tmp_path / "s.json")
    assert SensitivityProfile.load(path).prompts == (4,)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(errors.CheckpointError, match=words):
        SensitivityProfile.load(path)


def test_a_prompt_may_hold_any_character_that_ends_no_line(tmp_path):
    path = tmp_path / "p.jsonl"
    prompt = "one\u2028two\x85three\x0bfour"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"task": "a", "prompt": prompt}, ensure_ascii=False)
                     .replace("\\u000b", "\\u000b").encode() + b"\r\n")  # fmt: skip
    assert [each.prompt for each in load_prompts(path)] == [prompt]
    path.write_text('{"task": "a", "prompt": "\\ud800"}')
    with pytest.raises(errors.ConfigError, match=r"p\.jsonl:1: .*not UTF-8"):
        load_prompts(path)


# --- safetensors -----------------------------------------------------------------------------------------------------


def _tensors(path, header, body=b"", length=None):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


def _entry(shape, offsets=(0, 8), dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "header",
    [
        _entry([2**62] * 160_000),
        _entry([1] * 160_000 + [2]),
        _entry([2**63, 2]),
        _entry([2**32, 2**32]),
        _entry([-2]),
        _entry([2.0]),
        _entry([True, 2]),
        _entry("22"),
        _entry([2], (0, 8), "F33"),
        _entry([2], (0, 8), ["F32"]),
        _entry([2], (0, 9)),
        _entry([2], (4, 12)),
        _entry([2], (8, 0)),
        _entry([2], (0, 8, 8)),
        {"x": 5},
        {"x": {"shape": [2]}},
        {**_entry([2]), "y": _entry([2])["x"]},
        [],
        5,
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused_by_every_reader(header, tmp_path, bounded):
    path = _tensors(tmp_path / "m.safetensors", header, bytes(8))
    for read in (predictor.load, TaskClassifier.load, headers.read_header):
        with pytest.raises(errors.CheckpointError, match=r"m\.safetensors"):
            bounded(read, path)
    with pytest.raises(errors.DemoBuildError, match="reinstall emoe"):
        bounded(load_delta, path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_length_of_a_header_beyond_the_file_is_refused(length, tmp_path, bounded):
    path = _tensors(tmp_path / "m.safetensors", _entry([2]), bytes(8), length)
    for read in (predictor.load, headers.read_header):
        with pytest.raises(errors.CheckpointError):
            bounded(read, path)


def test_arrays_come_back_as_they_were_and_can_be_changed(tmp_path):
    given = {
        f"a{dtype[1:]}": np.ones((2, 0 if dtype == "<i8" else 3), dtype)
        for dtype in ("<f8", "<f4", "<f2", "<i8", "|b1")
    }
    path = files.write(tmp_path / "f", "some-format", "kind", given, {"one": 1})
    kind, tensors, settings = files.read(path, "some-format", "file")
    assert (kind, settings, tensors.keys()) == ("kind", {"one": 1}, given.keys())
    for name, array in tensors.items():
        assert (array.dtype, array.shape) == (given[name].dtype, given[name].shape)
        assert array.tolist() == given[name].tolist()
        assert array.flags.writeable
    assert files.read(path, "some-format", "file", arrays=False)[1] == {}


def test_a_network_of_a_thousand_named_layers_is_not_built(tmp_path, bounded):
    predictor.class_of("xlnet")  # its imports are not what is measured
    tensors = {f"model.layer.{n}.rel_attn.q": np.ones((1, 1, 1), np.float32) for n in range(5_000)}
    tensors |= {"head": np.ones((1, 1, 1), np.float32), "tasks.weight": np.ones((2, 1), np.float32)}
    tensors["model.layer.0.ff.layer_1.weight"] = np.ones((1, 1), np.float32)
    files.write(tmp_path / "p", predictor.files.FORMAT, "xlnet", tensors, {"names": ["a"], "width": 1})
    with pytest.raises(errors.CheckpointError, match="5000 layers"):
        bounded(predictor.load, tmp_path / "p")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', "[" * 5000,
    '{"weight_map": {"a": "' + "x" * 300 + '"}}', '{"weight_map": {"a": "\\u0000"}}', '{"weight_map": {"a": "../a"}}',
    '{"weight_map": {}}'])  # fmt: skip
def test_an_index_that_is_none_is_refused(index, tmp_path):
    (tmp_path / headers.INDEX_NAME).write_text(index)
    with pytest.raises(errors.CheckpointError):
        headers.checkpoint_files(tmp_path)


# --- the cache of rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    "{half", "[]", '{"none": 5}', '{"none": {}}', '{"none": {"memory": 0, "disk": 1, "note": "", "time": 1}}',
    '{"none": {"memory": "x", "disk": 1e9, "note": "", "time": 1}}',
    '{"none": {"memory": 1e9, "disk": 1e9, "time": 1}}',
    '{"none": {"memory": NaN, "disk": 1e9, "note": "", "time": 1}}', "[" * 100_000, "\xff",
    '{"none": {"memory": 1e9, "disk": 1e9, "note": "", "time": "now"}}',
])  # fmt: skip
def test_damaged_rates_are_measured_anew_and_said_once(content, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "_memory_rate", lambda: 3e9)
    (tmp_path / "bandwidth.json").write_text(content, encoding="latin-1")
    assert bandwidth.measure(None).memory == 3e9
    assert [record.message.count("bandwidth.json is damaged") for record in caplog.records] == [1]
    monkeypatch.setattr(bandwidth, "_memory_rate", lambda: math.nan)
    assert bandwidth.measure(None).memory == 3e9  # what was measured is kept


def test_rates_of_tomorrow_are_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "_memory_rate", lambda: 3e9)
    late = {"memory": 1e9, "disk": 1e9, "note": "", "time": time.time() + 1e6}
    (tmp_path / "bandwidth.json").write_text(json.dumps({"none": late}))
    assert bandwidth.measure(None).memory == 3e9


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_rates_that_are_no_file_are_measured_and_do_not_block(what, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(bandwidth, "_memory_rate", lambda: 3e9)
    path = tmp_path / "bandwidth.json"
    path.mkdir() if what == "folder" else os.mkfifo(path)
    assert bandwidth.measure(None).memory == 3e9
    assert "are not kept" in caplog.text


def test_a_predictor_of_a_table_is_read_from_a_path_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    GlobalTable(np.ones((2, 3), np.float32)).save("~/table")
    assert predictor.load("~/table").rank().shape == (2, 3)
