"""Routing traces: recorded, written whole or not at all, read back, and refused with a reason."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from public_traces import need

from emoe.errors import TraceError
from emoe.trace import trace as traces
from emoe.trace.trace import DECODE, PREFILL, UNKNOWN, TraceRecorder, load_trace


@pytest.fixture
def recorder(tmp_path):
    return TraceRecorder(2, 2, 8, path=tmp_path / "trace.npz", model="Tiny", expert_bytes=[10, 20])


def _forward(recorder, ids, layers=(0, 1)):
    index = np.array(ids)
    for layer in layers:
        recorder.record(layer, index + layer, np.full(index.shape, 0.5, dtype=np.float32))


def _write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_what_was_recorded_is_read_back(recorder, tmp_path):
    recorder.mark(task="code", prompt=7)
    _forward(recorder, [[0, 1], [2, 3], [4, 5]])
    _forward(recorder, [[1, 2]])
    recorder.mark(task="math", prompt="how many?")
    _forward(recorder, [[3, 4]])
    recorder.save()
    trace = load_trace(tmp_path / "trace.npz")
    assert trace.experts.tolist() == [
        [[0, 1], [2, 3], [4, 5], [1, 2], [3, 4]],
        [[1, 2], [3, 4], [5, 6], [2, 3], [4, 5]],
    ]
    assert trace.weights.shape == trace.experts.shape
    assert set(trace.weights.flatten().tolist()) == {0.5}
    assert [trace.task_names[task] for task in trace.task] == ["code"] * 4 + ["math"]
    assert trace.prompt[0] == trace.prompt[3] != trace.prompt[4]
    assert trace.phase.tolist() == [PREFILL] * 3 + [DECODE] * 2
    assert trace.expert_bytes.tolist() == [10, 20]
    assert (trace.num_experts, trace.meta["model"]) == (8, "Tiny")
    assert trace.meta["prompt_names"][trace.prompt[4]] == "how many?"


def test_the_file_holds_the_documented_arrays(recorder, tmp_path):
    _forward(recorder, [[0, 1]])
    recorder.save()
    with np.load(tmp_path / "trace.npz") as file:
        kinds = {name: str(file[name].dtype) for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    assert kinds == {"experts": "int16", "weights": "float16", "task": "int32", "prompt": "int32", "phase": "uint8"}
    assert {
        "format": "emoe-trace",
        "version": 1,
        "num_experts": 8,
        "top_k": 2,
        "n_moe_layers": 2,
    }.items() <= meta.items()


def test_rows_of_a_batch_belong_to_their_sequences(recorder):
    recorder.mark(prompt=["a", "b"])
    _forward(recorder, [[0, 1], [0, 2], [0, 3], [0, 4]])  # two sequences of two tokens
    _forward(recorder, [[1, 2], [1, 3]])  # one token of each
    trace = recorder.trace()
    a, b = trace.prompt[0], trace.prompt[2]
    assert trace.prompt.tolist() == [a, a, b, b, a, b]
    assert a != b
    assert trace.phase.tolist() == [PREFILL] * 4 + [DECODE] * 2


def test_ids_outside_the_experts_are_recorded_as_no_pick(recorder):
    _forward(recorder, [[0, 8], [-1, 2]], layers=(0,))
    recorder.record(1, np.array([[1], [2]]), np.ones((2, 1)))  # a layer with fewer picks
    trace = recorder.trace()
    assert trace.experts.tolist() == [[[0, -1], [-1, 2]], [[1, -1], [2, -1]]]


def test_a_forward_that_failed_midway_is_left_out(recorder, caplog):
    _forward(recorder, [[0, 1]], layers=(0,))
    _forward(recorder, [[2, 3]])
    with caplog.at_level(logging.WARNING, logger="emoe"):
        recorder.save()
    assert recorder.trace().experts[0].tolist() == [[2, 3]]
    assert "1 forwards" in caplog.text


@pytest.fixture
def threads():
    """Two other threads, in which a test runs one thing after the other."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        yield [lambda *call, pool=pool: pool.submit(*call).result() for pool in (one, two)]


def _layer(recorder, layer, id):
    recorder.record(layer, np.array([[id]]), np.ones((1, 1), dtype=np.float32))


def test_layers_of_forwards_in_several_threads_do_not_meet_in_one_token(recorder, threads):
    one, two = threads
    one(_layer, recorder, 0, 1)
    two(_layer, recorder, 0, 2)
    _layer(recorder, 0, 3)
    two(_layer, recorder, 1, 2)
    one(_layer, recorder, 1, 1)
    one(_layer, recorder, 0, 4)
    _layer(recorder, 1, 3)
    one(_layer, recorder, 1, 4)
    assert recorder.trace().experts[:, :, 0].tolist() == [[2, 1, 3, 4], [2, 1, 3, 4]]


def test_a_recording_that_begins_within_a_forward_begins_with_the_next_one(recorder, threads, caplog):
    _layer(recorder, 1, 7)  # the forward's first layer came before the recorder
    for token in (1, 2):
        _layer(recorder, 0, token)
        _layer(recorder, 1, token)
    threads[0](_layer, recorder, 0, 3)
    threads[1](_layer, recorder, 1, 4)
    with caplog.at_level(logging.WARNING, logger="emoe"):
        recorder.save()
    assert recorder.trace().experts[:, :, 0].tolist() == [[1, 2], [1, 2]]
    assert "3 forwards" in caplog.text


def test_a_mark_holds_for_its_thread_and_for_those_that_made_none(recorder, threads):
    one, two = threads
    recorder.mark(task="a", prompt="p")
    one(_forward, recorder, [[0, 1]])  # as the main thread marked it
    two(lambda: recorder.mark(task="b", prompt="q"))
    two(_forward, recorder, [[1, 2]])
    _forward(recorder, [[2, 3]])  # its own still holds
    one(_forward, recorder, [[3, 4]])  # has none of its own: the latest
    trace = recorder.trace()
    assert [trace.task_names[task] for task in trace.task] == ["a", "b", "a", "b"]
    assert [trace.meta["prompt_names"][prompt] for prompt in trace.prompt] == ["p", "q", "p", "q"]


def test_names_that_are_no_text_are_kept_as_far_as_they_are(recorder, tmp_path):
    recorder.mark(task="caf\udce9", prompt="\ud800!")
    _forward(recorder, [[0, 1]])
    recorder.save()
    trace = load_trace(tmp_path / "trace.npz")
    assert trace.task_names[trace.task[0]] == "caf?"
    assert trace.meta["prompt_names"][trace.prompt[0]] == "?!"


def test_a_block_that_ends_in_an_exception_leaves_the_file_as_it_was(recorder, tmp_path):
    (tmp_path / "trace.npz").write_text("old")
    with pytest.raises(ZeroDivisionError), recorder.saving():
        _forward(recorder, [[0, 1]])
        raise ZeroDivisionError
    assert (tmp_path / "trace.npz").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
    recorder.save()  # what there is, by hand
    assert load_trace(tmp_path / "trace.npz").tokens == 1


def test_a_trace_without_tokens_can_be_written_and_read(recorder, tmp_path):
    recorder.save()
    assert load_trace(tmp_path / "trace.npz").experts.shape == (2, 0, 2)


@pytest.mark.parametrize("call", [
    lambda recorder: recorder.record(2, np.zeros((1, 2), int), np.zeros((1, 2))),
    lambda recorder: recorder.record(0, np.zeros((1, 3), int), np.zeros((1, 3))),
    lambda recorder: recorder.record(0, np.zeros((1, 2), int), np.zeros((1, 1))),
    lambda recorder: recorder.mark(phase="thinking"),
    lambda recorder: recorder.mark(prompt=[]),
])  # fmt: skip
def test_the_recorder_refuses_what_does_not_fit(call, recorder):
    with pytest.raises(TraceError):
        call(recorder)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(recorder, tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        recorder.save()
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]
    assert path.read_text() == "old"


def test_a_bare_array_of_experts_is_a_trace(tmp_path):
    trace = load_trace(_write(tmp_path / "music.npz", experts=np.array([[[0, 5], [3, 1]]], dtype=np.int64)))
    assert (trace.layers, trace.tokens, trace.top_k, trace.num_experts) == (1, 2, 2, 6)
    assert trace.task_names == ("music",)
    assert trace.phase.tolist() == [UNKNOWN] * 2
    assert trace.weights is None


_IDS = np.zeros((2, 3, 1), dtype=np.int16)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"ids": _IDS}, "no array 'experts'; it has ids"),
        ({"experts": _IDS[0]}, r"int16 \[3, 1\], expected integers \[layers, tokens, k\]"),
        ({"experts": _IDS.astype(np.float32)}, "float32"),
        ({"experts": _IDS.astype(np.int64) + 40000}, "40000"),
        ({"experts": _IDS - 2}, "from -2 to"),
        ({"experts": _IDS + 9, "meta": '{"num_experts": 4}'}, "0 to 9, of 4 experts"),
        ({"experts": np.zeros((1, 1, 2), dtype=np.int16)}, "token 0 names one expert of layer 0 twice"),
        ({"experts": _IDS, "meta": "{"}, "'meta' is not JSON"),
        ({"experts": _IDS, "meta": "[]"}, "'meta' is list"),
        ({"experts": _IDS, "meta": '{"num_experts": "many"}'}, "'num_experts' in meta is 'many'"),
        ({"experts": _IDS, "meta": '{"format": "emoe-trace", "version": 2}'}, "format version 2"),
        ({"experts": _IDS, "task": np.zeros(2, dtype=np.int32)}, r"'task' has shape \(2,\), expected \(3,\)"),
        ({"experts": _IDS, "task": np.zeros(3)}, "'task' is float64"),
        ({"experts": _IDS, "task": np.array([0, 1, 2]), "meta": '{"task_names": ["a"]}'}, "up to 2, of 1 task names"),
        ({"experts": _IDS, "weights": np.zeros((2, 3, 2))}, "'weights' has shape"),
        ({"experts": _IDS, "meta": '{"expert_bytes": [1, 2, 3]}'}, "'expert_bytes' has shape"),
    ],
)
def test_a_bad_field_is_refused_by_name(arrays, words, tmp_path):
    path = _write(tmp_path / "bad.npz", **arrays)
    with pytest.raises(TraceError, match=words) as caught:
        load_trace(path)
    assert "bad.npz" in str(caught.value)


def test_files_that_are_no_traces_are_refused(tmp_path):
    for name, content in (("a.npz", b"PK not a zip"), ("b.npz", b""), ("c.csv", b"\xff\xfe\x00"), ("d.csv", b"step\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match=name):
            load_trace(tmp_path / name)
    np.savez(tmp_path / "e.npz", experts=np.array([{}], dtype=object))
    with pytest.raises(TraceError, match=r"e\.npz"):
        load_trace(tmp_path / "e.npz")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        load_trace(tmp_path / "absent.npz")


_CSV = """\
# model=tiny n_expert=16
# layer=3 expert_bytes=100
# layer=5 expert_bytes=200
turn,phase,step,layer,slot,expert,weight
0,0,0,3,0,7,0.75
0,0,0,3,1,2,0.25
0,0,0,5,0,9,1
0,1,1,3,0,4,1
1,0,0,3,0,1,1
"""


def test_a_csv_of_picks_is_a_trace(tmp_path):
    path = tmp_path / "tiny.route.csv"
    path.write_text(_CSV)
    trace = load_trace(path)
    assert trace.experts.tolist() == [[[7, 2], [4, -1], [1, -1]], [[9, -1], [-1, -1], [-1, -1]]]
    assert trace.prompt.tolist() == [0, 0, 1]
    assert trace.phase.tolist() == [PREFILL, DECODE, PREFILL]
    assert trace.expert_bytes.tolist() == [100, 200]
    assert (trace.num_experts, trace.task_names) == (16, ("tiny",))
    assert trace.weights[0, 0].tolist() == [0.75, 0.25]


@pytest.mark.parametrize(("old", "new", "words"), [
    ("expert,weight", "chosen,weight", "no column expert; it has turn"),
    ("0,1,1,3,0,4,1", "0,1,1,3,0,four,1", "four"),
    ("n_expert=16", "n_expert=some", "n_expert='some'"),
    ("n_expert=16", "n_expert=5", "-1 to 9, of 5 experts"),
])  # fmt: skip
def test_a_bad_csv_is_refused_with_the_reason(old, new, words, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(_CSV.replace(old, new))
    with pytest.raises(TraceError, match=words):
        load_trace(path)


def test_joined_traces_share_tasks_and_keep_prompts_apart(tmp_path):
    one = load_trace(_write(tmp_path / "a.npz", experts=np.array([[[0], [1]]])))
    two = load_trace(_write(tmp_path / "b.npz", experts=np.array([[[1, 0]]])))
    joined = traces.join([one, two, one])
    assert joined.experts.tolist() == [[[0, -1], [1, -1], [1, 0], [0, -1], [1, -1]]]
    assert joined.task.tolist() == [0, 0, 1, 0, 0]
    assert joined.task_names == ("a", "b")
    assert len(set(joined.prompt.tolist())) == 3
    other = load_trace(_write(tmp_path / "c.npz", experts=np.array([[[7]]])))
    with pytest.raises(TraceError, match="2 experts and of 1 layers with 8 experts"):
        traces.join([one, other])
    with pytest.raises(TraceError, match="no trace"):
        traces.join([])


def test_public_traces_are_read():
    code = load_trace(need("code.npz"))
    assert (code.experts.shape, code.num_experts) == ((48, 8000, 8), 128)
    route = load_trace(need("qwen.route.csv"))
    assert (route.layers, route.tokens, route.top_k, route.num_experts) == (48, 156, 6, 128)
    assert set(route.expert_bytes.tolist()) == {2654208, 3059712}
    assert (route.phase == PREFILL).sum() == 28
    assert (route.experts[:47] >= 0).all()  # the last layer computes only the last token of the prompt
