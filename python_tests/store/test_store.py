"""Where experts lie: headers, strided tensors, checkpoints of every family, stores written from memory."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
from pathlib import Path

import families
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    SplitModulelist,
    Transpose,
)

from emoe import errors
from emoe.model import structure
from emoe.model.spec import ExpertForm, slot_offsets
from emoe.planning import meta
from emoe.store import ExpertStore, Piece, StoreLayer, read_expert, read_layer
from emoe.store.checkpoint import index_checkpoint
from emoe.store.headers import TensorEntry, checkpoint_files, read_header
from emoe.store.strided import StridedTensor, blocks_of_experts
from emoe.store.writer import RECORD_ALIGNMENT, write_store

NAMES = sorted(families.FAMILIES)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _index(path: Path, dtype: torch.dtype | str = "auto") -> ExpertStore:
    return index_checkpoint(checkpoint_files(path), meta.meta_model(path, dtype=dtype))


def _assert_holds(store: ExpertStore, model: torch.nn.Module) -> None:
    assert [layer.path for layer in store.layers] == [path for path, _ in structure.find_experts(model)]
    parameters = dict(model.named_parameters())
    for number, layer in enumerate(store.layers):
        for expert in range(len(layer.pieces)):
            for name, value in read_expert(store, number, expert).items():
                assert torch.equal(value, parameters[f"{layer.path}.{name}"][expert]), (layer.path, name, expert)


_CASES = [(name, torch.float32, None) for name in NAMES] + [(name, torch.bfloat16, "40KB") for name in NAMES]
_CASES += [(name, torch.float32, "40KB") for name in ("mixtral", "gpt_oss", "inkling2_text", "nemotron_h")]
_CASES += [(name, torch.bfloat16, None) for name in ("mixtral", "gpt_oss", "inkling2_text", "nemotron_h")]


@pytest.mark.parametrize(("name", "dtype", "shard"), _CASES)
def test_every_expert_of_a_checkpoint_is_what_transformers_loads(name, dtype, shard, tmp_path):
    path = families.save(name, tmp_path, dtype, **({"max_shard_size": shard} if shard else {}))
    assert (len(checkpoint_files(path)) > 1) == (shard is not None)
    _assert_holds(_index(path), AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_a_dtype_other_than_that_on_disk_is_converted_as_transformers_does(name, stored, wanted, tmp_path):
    path = families.save(name, tmp_path, stored)
    store = _index(path, wanted)
    assert {piece.src_dtype for piece in store.layers[0].pieces[0]} == {str(stored).removeprefix("torch.")}
    _assert_holds(store, AutoModelForCausalLM.from_pretrained(path, dtype=wanted))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_checkpoint_saved_with_merged_experts_is_read_as_well(name, tmp_path):
    """`save_original_format=False` writes the fused tensors that the model holds in memory."""
    path = families.save(name, tmp_path, save_original_format=False)
    _assert_holds(_index(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def test_an_expert_of_a_freshly_saved_checkpoint_lies_in_adjacent_ranges(checkpoint):
    for pieces in _index(checkpoint("qwen3_moe")).layers[0].pieces:
        ends = [piece.offset + piece.nbytes for piece in pieces]
        assert [piece.offset for piece in pieces[1:]] == ends[:-1]


def test_an_operation_that_computes_is_refused_by_name(checkpoint, monkeypatch):
    class Doubled(MergeModulelist):
        def convert(self, input_dict, *args, **kwargs):
            return {key: value * 2 for key, value in super().convert(input_dict, *args, **kwargs).items()}

    from transformers import conversion_mapping

    original = conversion_mapping.get_model_conversion_mapping

    def mapping(*args, **kwargs):
        found = original(*args, **kwargs)
        for each in found:
            for number, operation in enumerate(getattr(each, "operations", [])):
                if isinstance(operation, MergeModulelist):
                    each.operations[number] = Doubled()
        return found

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", mapping)
    with pytest.raises(errors.UnsupportedModelError, match=r"olmoe.*Doubled"):
        _index(checkpoint("olmoe"))


# --- strided tensors -------------------------------------------------------------------------------------------------


def _entry(name: str, shape: tuple[int, ...], offset: int = 0) -> TensorEntry:
    nbytes = 4 * int(torch.tensor(shape).prod()) if shape else 4
    return TensorEntry("file", name, "float32", shape, offset, nbytes)


def _rebuilt(tensor: StridedTensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that the byte ranges of `tensor` give."""
    experts = []
    for blocks in blocks_of_experts(tensor):
        target = torch.full(tuple(tensor.shape[1:]), -1.0)
        for block in blocks:
            source = values[block.source.name].reshape(-1)[block.start : block.start + block.rows * block.cols]
            strides = (block.dst_row_stride, block.dst_col_stride)
            torch.as_strided(target, (block.rows, block.cols), strides, block.dst_offset).copy_(
                source.view(block.rows, block.cols)
            )
        experts.append(target)
    return torch.stack(experts)


def _apply(operations: list[ConversionOps], tensors: dict[str, list], sources: list[str], targets: list[str]):
    for operation in operations:
        tensors = operation.convert(tensors, source_patterns=sources, target_patterns=targets)
    return {key: value[0] if isinstance(value, list) else value for key, value in tensors.items()}


_CHAINS = {
    "merge, concatenate": ([MergeModulelist(0), Concatenate(1)], ["*.a", "*.b"], ["t"], 5, (4, 3)),
    "merge": ([MergeModulelist(0)], ["*.a"], ["t"], 5, (4, 3)),
    "interleave rows": ([Interleave(1)], ["a"], ["t"], 1, (5, 4, 3)),
    "interleave rows back": ([Interleave(1, inverse=True)], ["a"], ["t"], 1, (5, 4, 3)),
    "interleave columns": ([Interleave(2)], ["a"], ["t"], 1, (5, 3, 4)),
    "interleave twice": ([Interleave(1), Interleave(1)], ["a"], ["t"], 1, (2, 8, 3)),
    "transpose": ([Transpose(1, 2)], ["a"], ["t"], 1, (5, 4, 3)),
    "transpose, interleave": ([Transpose(1, 2), Interleave(1)], ["a"], ["t"], 1, (5, 3, 4)),
    "concatenate fused": ([Concatenate(1)], ["a", "b"], ["t"], 1, (5, 4, 3)),
    "concatenate, interleave back": ([Concatenate(1), Interleave(1, inverse=True)], ["a", "b"], ["t"], 1, (5, 4, 3)),
    "chunk": ([Chunk(1)], ["a"], ["t", "u"], 1, (5, 4, 3)),
    "interleave, chunk": ([Interleave(1), Chunk(1)], ["a"], ["t", "u"], 1, (5, 4, 3)),
    "interleave biases": ([Interleave(1)], ["a"], ["t"], 1, (5, 6)),
}


@pytest.mark.parametrize("name", _CHAINS)
def test_transformers_operations_move_the_same_elements_as_on_real_tensors(name):
    operations, sources, targets, count, shape = _CHAINS[name]
    entries = {pattern: [_entry(f"{pattern}{i}", shape) for i in range(count)] for pattern in sources}
    values = {entry.name: torch.randn(shape) for group in entries.values() for entry in group}
    real = _apply(operations, {p: [values[e.name] for e in group] for p, group in entries.items()}, sources, targets)
    moved = _apply(
        operations, {p: [StridedTensor.of(e) for e in group] for p, group in entries.items()}, sources, targets
    )
    assert real.keys() == moved.keys()
    for key, expected in real.items():
        assert tuple(moved[key].shape) == tuple(expected.shape)
        assert torch.equal(_rebuilt(moved[key], values), expected)


def test_splitting_a_module_list_is_followed_too():
    entry = _entry("a", (3, 4, 2))
    value = torch.randn(3, 4, 2)
    moved = _apply([SplitModulelist(0)], {"a": [StridedTensor.of(entry)]}, ["a"], ["t.*"])
    for number in range(3):
        part = moved[f"t.{number}"].unsqueeze(0)
        assert torch.equal(_rebuilt(part, {"a": value})[0], value[number])


@st.composite
def _programs(draw):
    """A shape and a random walk of rearrangements that are valid on it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    steps = []
    probe = torch.empty(shape, device="meta")
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["transpose", "halves", "narrow", "merge", "split", "cat"]))
        dim = draw(st.integers(0, probe.dim() - 1))
        if kind == "transpose":
            other = draw(st.integers(0, probe.dim() - 1))
            step = lambda t, a=dim, b=other: torch.transpose(t, a, b)  # noqa: E731
        elif kind == "halves" and probe.shape[dim] % 2 == 0:
            sizes = [*probe.shape[:dim], probe.shape[dim] // 2, 2, *probe.shape[dim + 1 :]]
            whole = list(probe.shape)
            step = lambda t, s=sizes, d=dim, w=whole: t.reshape(s).transpose(d, d + 1).reshape(w)  # noqa: E731
        elif kind == "narrow":
            start = draw(st.integers(0, probe.shape[dim] - 1))
            length = draw(st.integers(1, probe.shape[dim] - start))
            step = lambda t, d=dim, a=start, n=length: torch.narrow(t, d, a, n)  # noqa: E731
        elif kind == "merge" and probe.dim() > 2 and dim + 1 < probe.dim():
            sizes = [*probe.shape[:dim], probe.shape[dim] * probe.shape[dim + 1], *probe.shape[dim + 2 :]]
            step = lambda t, s=sizes: t.reshape(s)  # noqa: E731
        elif kind == "split" and probe.shape[dim] % 3 == 0:
            sizes = [*probe.shape[:dim], 3, probe.shape[dim] // 3, *probe.shape[dim + 1 :]]
            step = lambda t, s=sizes: t.reshape(s)  # noqa: E731
        elif kind == "cat":
            step = lambda t, d=dim: torch.cat([t, t], d)  # noqa: E731
        else:
            continue
        probe = step(probe)
        steps.append(step)
    return shape, steps


@settings(max_examples=150)
@given(_programs())
def test_random_rearrangements_are_right_or_refused(program):
    from emoe.store.strided import InexpressibleError

    shape, steps = program
    value = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    moved, real = StridedTensor.of(_entry("a", tuple(shape))), value
    try:
        for step in steps:
            moved, real = step(moved), step(real)
    except InexpressibleError:
        return
    assert torch.equal(_rebuilt(moved, {"a": value}), real)


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("headers") / "small.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_a_header_gives_the_bytes_that_the_library_reads(small_file):
    data = small_file.read_bytes()
    with safetensors.safe_open(small_file, "pt") as opened:
        for name, entry in read_header(small_file).items():
            raw = bytearray(data[entry.offset : entry.offset + entry.nbytes])
            expected = opened.get_tensor(name)
            dtype = getattr(torch, entry.dtype)
            value = (
                torch.frombuffer(raw, dtype=dtype).view(entry.shape) if raw else torch.empty(entry.shape, dtype=dtype)
            )
            assert torch.equal(value, expected)


def _check_mutant(path: Path) -> None:
    """Reads a damaged file: a CheckpointError, or entries that the library agrees with and that lie in the file."""
    try:
        entries = read_header(path)
    except errors.CheckpointError as error:
        assert str(path) in str(error)
        return
    with safetensors.safe_open(path, "pt") as opened:
        assert set(opened.keys()) == set(entries)
        for name, entry in entries.items():
            assert tuple(opened.get_slice(name).get_shape()) == entry.shape
            assert 8 <= entry.offset <= entry.offset + entry.nbytes <= path.stat().st_size


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(small_file, tmp_path, data):
    raw = bytearray(small_file.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "length", "insert"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "length":
        raw[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    else:
        at = data.draw(st.integers(0, len(raw)))
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    _check_mutant(path)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.sampled_from(["F32", "BF16", "X9", ""]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F32", "BF16", "U8"]) | _VALUES,
                "shape": st.lists(st.integers(0, 4), max_size=3) | _VALUES,
                "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | _VALUES,
            },
        )
        | _VALUES,
        max_size=3,
    )
)
def test_any_header_is_refused_or_read_as_the_library_reads_it(tmp_path, header):
    raw = json.dumps(header).encode()
    path = tmp_path / "made.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(40))
    _check_mutant(path)


# --- stores written from memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["ram", "folder", "nameless"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h"])
def test_a_written_store_holds_the_model_and_goes_away_with_close(name, where, tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    model = families.build(name, torch.bfloat16)
    folder = tmp_path / "new" / "store"
    store = write_store(model, folder=folder if where == "folder" else None, ram=where == "ram")
    _assert_holds(store, model)
    for layer in store.layers:
        for pieces in layer.pieces:
            assert pieces[0].offset % RECORD_ALIGNMENT == 0
            offsets, _ = slot_offsets(layer.params)
            assert [piece.offset - pieces[0].offset for piece in pieces] == list(offsets.values())
    assert folder.exists() == (where == "folder")
    assert not list((tmp_path / "cache").glob("*"))  # nameless files have no name even while they are used
    store.close()
    store.close()
    assert not (tmp_path / "new").exists()
    with pytest.raises(errors.ClosedError):
        read_expert(store, 0, 0)


def test_a_store_that_is_forgotten_takes_its_files_away(tmp_path):
    store = write_store(families.build("olmoe"), folder=tmp_path / "store")
    assert list((tmp_path / "store").iterdir())
    del store
    assert not (tmp_path / "store").exists()


def test_files_of_others_in_the_folder_stay(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with write_store(families.build("olmoe"), folder=tmp_path):
        assert len(list(tmp_path.iterdir())) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_stores_in_one_folder_are_refused_and_the_first_stays_whole(tmp_path):
    model = families.build("olmoe")
    with write_store(model, folder=tmp_path) as store:
        with pytest.raises(errors.StoreError, match="experts-0000"):
            write_store(model, folder=tmp_path)
        _assert_holds(store, model)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_full_disk_is_named_and_leaves_nothing_behind(call, tmp_path, monkeypatch):
    model = families.build("olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(errors.StoreError, match=r"experts-000.*bytes.*No space left") as caught:
        write_store(model, folder=tmp_path / "store")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not (tmp_path / "store").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with write_store(model, folder=tmp_path / "store") as store:
        _assert_holds(store, model)


def test_a_limit_of_the_system_on_file_sizes_is_met_like_a_full_disk(tmp_path):
    model = families.build("olmoe")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(errors.StoreError, match="bytes"):
            write_store(model, folder=tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "store").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.StoreError, match="file/store"):
        write_store(families.build("olmoe"), folder=tmp_path / "file" / "store")


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_store(families.build("olmoe"), folder=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_experts_that_are_not_in_memory_are_refused(tmp_path):
    model = meta.meta_model(families.save("olmoe", tmp_path))
    with pytest.raises(errors.UnsupportedModelError, match="meta device"):
        write_store(model)


def test_a_child_process_does_not_remove_the_files_of_its_parent(tmp_path):
    store = write_store(families.build("olmoe"), folder=tmp_path / "store")
    child = os.fork()
    if child == 0:
        store.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert list((tmp_path / "store").iterdir())
    store.close()
    assert not (tmp_path / "store").exists()


def test_a_short_file_is_a_read_error_with_all_that_is_known(tmp_path):
    file = tmp_path / "short.bin"
    file.write_bytes(bytes(10))
    piece = Piece(str(file), 4, 16, "t", "float32", "w", 1, 4, 0, 4, 1)
    store = ExpertStore([StoreLayer("layer", ExpertForm.plain(()), ((piece,),))], "test")
    with pytest.raises(errors.ReadError, match="ends after 6") as caught:
        read_expert(store, 0, 0)
    assert (caught.value.file, caught.value.tensor) == (str(file), "t")
    assert (caught.value.offset, caught.value.nbytes) == (4, 16)


def test_a_layer_is_its_experts_in_order(checkpoint):
    store = _index(checkpoint("olmoe"))
    layer = read_layer(store, 0)
    for expert in range(families.EXPERTS):
        for name, value in read_expert(store, 0, expert).items():
            assert torch.equal(layer[name][expert], value)
