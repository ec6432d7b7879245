"""Files that emoe learned something into: whatever happens to one, it loads as it was or is refused by name."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import task_trace

from emoe import files as emoe_files
from emoe.errors import CheckpointError, ConfigError
from emoe.predictor import KINDS, UNKNOWN_TASK, files, load
from emoe.predictor.fitting import TRAINED, fit
from emoe.sensitivity import SensitivityProfile
from emoe.tasks import KINDS as CLASSIFIERS
from emoe.tasks import TaskClassifier, make
from emoe.tasks.classifier import FORMAT

TEXTS = ["add the numbers", "add two numbers", "add it all up", "sort the list", "sort a list", "sort it all"]
LABELS = ["math"] * 3 + ["code"] * 3


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) % 40 for letter in text] for text in texts]}


@pytest.fixture(scope="module")
def embedding():
    return torch.nn.Embedding(40, 6), Letters()


class Made:
    """A file that was saved: its bytes, what was in it, and how it is read."""

    def __init__(self, path, read):
        self.whole, self.path, self.read = path.read_bytes(), path.with_suffix(".changed"), read
        self.kind, self.tensors, self.settings = _content(path, read)

    def __repr__(self):
        return f"a file of kind {self.kind}"


@pytest.fixture(scope="module")
def made(tmp_path_factory, embedding):
    folder, found = tmp_path_factory.mktemp("made"), {}
    for kind in KINDS:
        _predictor(kind).save(folder / kind)
        found[kind] = Made(folder / kind, load)
    for kind in CLASSIFIERS:
        make(kind, *embedding).fit(TEXTS * 4, LABELS * 4).save(folder / kind)
        found[kind] = Made(folder / kind, lambda path: TaskClassifier.load(path, *embedding))
    return found


def _predictor(kind):
    if kind != TRAINED:
        return fit(kind, task_trace(1, prompts=12, num_experts=4))
    from emoe.predictor.sequence import SequenceModel, Shape, Size, build

    shape = Shape(2, 2, 4, 3, Size(8, 1, 2, 8))
    return SequenceModel(build(shape, np.ones((2, 4), dtype=np.float32), 0), shape, ("task 0", "task 1"))


def _content(path, read):
    format = files.FORMAT if read is load else FORMAT
    kind, tensors, settings = emoe_files.read(path, format, "file")
    return kind, tensors, settings


def of_every_kind(test):
    every = pytest.mark.parametrize("kind", [*KINDS, *CLASSIFIERS])
    return every(settings(max_examples=60)(test))


@of_every_kind
@given(data=st.data())
def test_a_damaged_file_is_refused_or_loads_as_it_was(kind, made, data):
    whole = made[kind].whole
    start = data.draw(st.integers(0, len(whole) - 1), label="start")
    end = data.draw(st.integers(start, min(len(whole), start + 16)) | st.just(len(whole)), label="end")
    _is_refused_or_the_same(made[kind], whole[:start] + data.draw(st.binary(max_size=16), label="put") + whole[end:])


@pytest.mark.parametrize("kind", [*KINDS, *CLASSIFIERS])
def test_a_file_with_one_wrong_bit_is_refused_or_loads_as_it_was(kind, made):
    whole, rng = made[kind].whole, np.random.default_rng(0)
    for place in rng.integers(len(whole), size=100).tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        _is_refused_or_the_same(made[kind], bytes(changed))


def _is_refused_or_the_same(file, damaged):
    file.path.write_bytes(damaged)
    try:
        loaded = file.read(file.path)
    except CheckpointError as error:
        assert str(file.path) in str(error)
        return
    loaded.save(file.path)
    kind, tensors, given_settings = _content(file.path, file.read)
    assert (kind, given_settings) == (file.kind, file.settings)
    assert tensors.keys() == file.tensors.keys()
    assert all(np.array_equal(tensor, file.tensors[name]) for name, tensor in tensors.items())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@of_every_kind
@given(data=st.data())
def test_settings_that_do_not_fit_are_refused_though_the_digest_does(kind, made, data):
    changed = copy.deepcopy(made[kind].settings)
    places = list(_places(changed))
    if places:
        _put(changed, data.draw(st.sampled_from(places), label="place"), data.draw(JSON, label="value"))
        _works_or_is_refused(made[kind], made[kind].tensors, changed)


@of_every_kind
@given(data=st.data())
def test_tensors_that_do_not_fit_are_refused_though_the_digest_does(kind, made, data):
    tensors = dict(made[kind].tensors)
    name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
    shape = list(tensors[name].shape)
    shape[data.draw(st.integers(0, len(shape) - 1), label="axis")] = data.draw(st.integers(0, 5), label="size")
    dtype = data.draw(st.sampled_from(["<f4", "<f8", "<f2", "<i4", "|u1", "|b1"]), label="dtype")
    value = data.draw(st.sampled_from([0, 1, np.nan, np.inf]), label="value")
    what = data.draw(st.sampled_from(["change", "remove", "add"]), label="what")
    if what == "remove":
        del tensors[name]
    else:
        with np.errstate(invalid="ignore"):
            tensors["other" if what == "add" else name] = np.full(shape, value).astype(dtype)
    _works_or_is_refused(made[kind], tensors, made[kind].settings)


def _works_or_is_refused(file, tensors, changed):
    """A hand that changes the file and its digest may change what is predicted, but not how much memory that takes."""
    format = files.FORMAT if file.read is load else FORMAT
    emoe_files.write(file.path, format, file.kind, tensors, changed)
    try:
        loaded = file.read(file.path)
    except ConfigError as error:
        assert "embeddings of shape" in str(error)
        return
    except CheckpointError as error:
        assert str(file.path) in str(error)
        return
    if isinstance(loaded, TaskClassifier):
        assert len(loaded.classify("add a list").probabilities) == len(set(loaded.names))
        return
    shape = loaded.rank().shape
    for task in (UNKNOWN_TASK, *range(len(loaded.names))):
        loaded.begin(task)
        loaded.observe(np.zeros((shape[0], 3, 1), dtype=np.int16))
        assert loaded.rank().shape == shape


def _places(value, before=()):
    """Paths to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*before, key)
        yield from _places(each, (*before, key))


def _put(value, place, new):
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


def test_a_file_of_an_earlier_version_is_refused_with_both_versions(made):
    file = made["linear"]
    file.path.write_bytes(file.whole.replace(b'"version":"2"', b'"version":"1"'))
    with pytest.raises(CheckpointError, match="format version 1; this emoe reads version 2"):
        load(file.path)


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        (TRAINED, "width", 0, "'width' is 0"),
        (TRAINED, "names", ["a"], "1 task names for a network of 2 tasks"),
        ("task-table", "names", "ab", "'names' is 'ab', expected a list of texts"),
        ("next-use", "names", None, "'names' is None"),
        ("linear", "names", ["a"], r"shape \(2, 2, 4\) does not fit 1 task names"),
        ("across-requests", "share", float("inf"), "Infinity is no number"),
        ("keywords", "temperature", 0, "'temperature' is 0.0"),
        ("embeddings", "threshold", 7, "'threshold' is 7.0"),
    ],
)
def test_a_value_that_does_not_fit_is_named(made, kind, name, value, said):
    file = made[kind]
    format = files.FORMAT if file.read is load else FORMAT
    emoe_files.write(file.path, format, kind, file.tensors, {**file.settings, name: value})
    with pytest.raises(CheckpointError, match=said) as caught:
        file.read(file.path)
    assert caught.value.file == str(file.path)


@given(data=st.data())
def test_a_damaged_sensitivity_profile_is_refused_or_is_one(tmp_path, data):
    path = SensitivityProfile(("a", "b"), 2, np.array([[1, 0.9, 0.5], [1, 0.8, 0.7]])).save(tmp_path / "s.json")
    values = json.loads(path.read_text())
    _put(values, data.draw(st.sampled_from(list(_places(values)))), data.draw(JSON))
    path.write_text(json.dumps(values))
    try:
        loaded = SensitivityProfile.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert all(len(loaded.insensitive(task)) == loaded.layers for task in loaded.tasks)
