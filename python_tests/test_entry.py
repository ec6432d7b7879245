"""The ways in refuse what they cannot keep before a weight is loaded or a byte of experts written."""

from __future__ import annotations

import inspect
import subprocess
import sys
from fractions import Fraction

import families
import numpy as np
import pytest
import torch

import emoe
from emoe import entry, errors
from emoe.options import Options, rows
from emoe.predictor.table import GlobalTable


class Scores:
    """A predictor of a model of another shape."""

    names = ()

    def begin(self, task):
        pass

    def observe(self, picks):
        pass

    def rank(self):
        return np.ones((5, 7), dtype=np.float32)

    def anew(self):
        return self


@pytest.fixture
def other_model(tmp_path_factory):
    """A predictor's file for a model of another shape."""
    path = tmp_path_factory.mktemp("files") / "other.safetensors"
    GlobalTable(np.ones((5, 7), dtype=np.float32)).save(path)
    return path


@pytest.fixture
def garbage(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "garbage"
    path.write_bytes(b"no predictor, no profile")
    return path


WRONG = [
    ({"policy": "lifo"}, "policy='lifo' is not one of: lru, lfu"),
    ({"policy": "belady"}, "policy='belady'"),
    ({"reader": "mmap"}, "reader='mmap' is not one of: auto, uring, pread"),
    ({"predictor": "psychic"}, "neither a file nor one of: recent"),
    ({"predictor": 3}, "has no method rank"),
    ({"predictor": Scores()}, r"scores \[5, 7\]"),
    ({"prefetch": "psychic"}, "one of: look-ahead"),
    ({"prefetch": Scores()}, "has no method next_layer"),
    ({"sensitivity": "nowhere.json"}, "sensitivity='nowhere.json' is not a file"),
    ({"sensitivity": Scores()}, "has no method insensitive"),
    ({"kernels": "stok"}, "did you mean 'stock'"),
    ({"miss": "never"}, "miss='never' is not one of: load, cpu, auto"),
    ({"device": "tpu"}, "device='tpu' is not one of: cpu, cuda"),
    ({"pinned_memory": "25%"}, "pinned_memory='25%' is not one of: bytes"),
    ({"pinned_memory": 0}, "pinned_memory=0"),
    ({"period": 0}, "period=0"),
    ({"period": "often"}, "nor 'adaptive'"),
    ({"slack": 1.5}, "slack=1.5 is not a share"),
    ({"slack": True}, "slack=True is not a share"),
    ({"context": 0}, "context=0 is not a whole number"),
    ({"batch": 1.5}, "batch=1.5 is not a whole number"),
    ({"bias": 0.5}, "goes with routing='biased'"),
    ({"routing": "biased"}, "needs bias="),
    ({"routing": "residnet"}, "did you mean 'resident'"),
    ({"max_substituted_mass": 0.1}, "goes with routing='resident'"),
    ({"memory_budget": "lots"}, "GiB"),
    ({"memory_buget": "8GiB"}, "did you mean 'memory_budget'"),
    ({"perfetch": "look-ahead"}, "did you mean 'prefetch'"),
]


def _refused(call, options, said, other_model, garbage):
    with pytest.raises(errors.ConfigError, match=said):
        call(**{"memory_budget": 0.5, **options})
    for name in ("predictor", "prefetch", "sensitivity"):
        with pytest.raises(errors.EmoeError):
            call(memory_budget=0.5, **{name: garbage})
    with pytest.raises(errors.ConfigError, match=r"scores \[5, 7\]"):
        call(memory_budget=0.5, predictor=other_model)


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrap_refuses_before_a_byte_is_written_and_leaves_the_model_untouched(
    options, said, tmp_path, monkeypatch, other_model, garbage
):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(entry, "write_store", lambda *_, **__: pytest.fail("experts were written"))
    model = families.build("olmoe")
    model.train()
    before = {name: (tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    folder = tmp_path / "experts"
    _refused(lambda **given: emoe.wrap(model, store=folder, **given), options, said, other_model, garbage)
    assert {name: (tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.named_parameters()} == before
    assert model.training
    assert getattr(model, "emoe", None) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said for _, said in WRONG])
def test_from_pretrained_refuses_before_a_weight_is_loaded(
    options, said, checkpoint, monkeypatch, other_model, garbage
):
    monkeypatch.setattr(entry.load, "load_without_experts", lambda *_, **__: pytest.fail("weights were loaded"))
    path = checkpoint("olmoe")
    _refused(lambda **given: emoe.from_pretrained(path, **given), options, said, other_model, garbage)


def test_wrap_refuses_a_store_that_is_a_file_or_no_path(tmp_path):
    (tmp_path / "file").touch()
    for store in (tmp_path / "file", 3, ""):
        with pytest.raises(errors.ConfigError, match="store="):
            emoe.wrap(families.build("olmoe"), memory_budget=0.5, store=store)


def test_wrap_refuses_a_router_it_does_not_know_before_experts_are_written(monkeypatch):
    monkeypatch.setattr(entry, "write_store", lambda *_, **__: pytest.fail("experts were written"))
    model = families.build("mixtral")
    model.model.layers[1].mlp.gate = torch.nn.Linear(families.HIDDEN, families.EXPERTS)
    for options in ({"routing": "resident"}, {"routing": "biased", "bias": 1}, {"prefetch": "look-ahead"}):
        with pytest.raises(errors.UnsupportedModelError, match=r"model\.layers\.1\.mlp\.gate"):
            emoe.wrap(model, memory_budget=0.5, **options)


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [("context", np.int64(64), 64), ("batch", np.int32(2), 2), ("period", np.int16(3), 3),
     ("slack", np.float32(0.5), 0.5), ("slack", Fraction(1, 4), 0.25), ("memory_budget", np.int64(1 << 31), 1 << 31),
     ("memory_budget", np.float64(0.5), 0.5), ("memory_budget", np.float32(0.5), 0.5),
     ("dtype", torch.bfloat16, "bfloat16"), ("dtype", "torch.float16", "float16"),
     ("dtype", "half", "float16"), ("dtype", None, "auto"), ("device", torch.device("cpu"), "cpu"),
     ("device", torch.device("cuda", 1), "cuda:1"), ("device", 0, "cuda:0"), ("device", "cpu:0", "cpu"),
     ("pinned_memory", np.int64(1 << 20), 1 << 20)],
)  # fmt: skip
def test_a_value_of_another_type_is_what_it_says(option, value, meant):
    found = getattr(Options(**{option: value}), option)
    assert (type(found), found) == (type(meant), meant)


def test_a_budget_from_numpy_gives_the_same_plan(checkpoint):
    path = checkpoint("olmoe")
    assert emoe.plan(path, np.int64(1 << 31), calibrate=False) == emoe.plan(path, "2G", calibrate=False)
    assert emoe.plan(path, np.float32(0.5), context=np.int64(64), calibrate=False) == emoe.plan(
        path, 0.5, context=64, calibrate=False
    )


@pytest.mark.parametrize(
    "device_map", ["cpu", "cpu:0", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")},
                   {"model": "cpu", "lm_head": torch.device("cpu")}], ids=str,
)  # fmt: skip
def test_a_device_map_that_names_one_device_is_that_device(device_map, checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, device_map=device_map)
    # Placeholders stand on the meta device for what is in the store.
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    model.emoe.close(restore=False)
    assert emoe.plan(checkpoint("olmoe"), 0.5, device_map=device_map, calibrate=False).resident_share == 0.5


@pytest.mark.parametrize(
    ("device_map", "device"),
    [(0, "cuda:0"), ({"": 1}, "cuda:1"), ({"": "cuda"}, "cuda"), (torch.device("cuda:1"), "cuda:1")],
    ids=str,
)  # fmt: skip
def test_a_device_map_that_names_a_gpu_is_device(device_map, device):
    assert Options.split({"device_map": device_map}, "load") == (Options(device=device), {})


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "sequential", {}, {"": "disk"}, {"": "meta"}, {"a": "cpu", "b": 0}, [0]], ids=str
)
def test_a_device_map_that_names_no_one_device_is_refused_with_the_option_that_does(device_map, checkpoint):
    with pytest.raises(errors.ConfigError, match=r"device_map=.*does not name one device.*device="):
        emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, device_map=device_map)


def test_a_device_and_a_device_map_that_differ_are_refused():
    with pytest.raises(errors.ConfigError, match="name two devices"):
        Options.split({"device_map": {"": 0}, "device": "cpu"}, "load")
    assert Options.split({"device_map": "cpu", "device": torch.device("cpu")}, "load")[0].device == "cpu"


@pytest.mark.parametrize(
    ("function", "way"), [(emoe.from_pretrained, "load"), (emoe.wrap, "wrap"), (emoe.plan, "plan")],
    ids=["load", "wrap", "plan"],
)  # fmt: skip
def test_help_shows_every_option_with_its_default_and_text(function, way):
    shown = inspect.signature(function).parameters
    for name, (each, row) in rows(way).items():
        assert shown[name].default == each.default
        assert f"\n        {name}: {row.help.split()[0]}" in function.__doc__
    assert "{options}" not in function.__doc__
    assert max(map(len, function.__doc__.splitlines())) <= 120


def test_plan_takes_what_from_pretrained_takes(checkpoint):
    path, plain = checkpoint("olmoe"), emoe.plan(checkpoint("olmoe"), 0.5, calibrate=False)
    assert emoe.plan(path, 0.5, calibrate=False, routing="resident", device="cuda") == plain
    for given in ({"kernels": "stock"}, {"attn_implementation": "eager"}):  # what a prompt takes depends on them alone
        made = emoe.plan(path, 0.5, calibrate=False, **given)
        assert made.activation_bytes > plain.activation_bytes
        more = made.activation_bytes - plain.activation_bytes
        assert made.planned_bytes == plain.planned_bytes + more
    with pytest.raises(errors.ConfigError, match=r"auto.*device='cuda'.*bytes or a share"):
        emoe.plan(path, device="cuda")
    with pytest.raises(errors.ConfigError, match="did you mean 'context'"):
        emoe.plan(path, 0.5, contxt=3)


def test_options_load_no_arrays():
    code = "import sys, emoe.options; print({'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_names_in_the_table_are_those_of_the_rooms_that_use_them():
    from emoe import options, predictor
    from emoe.slots import policy

    assert tuple(predictor.MADE) == options.PREDICTORS
    assert {*rows()["policy"][1].check.choices} == {*policy.POLICIES} - {"belady"}  # which needs the future


@pytest.mark.parametrize("given", [5, None, "model", torch.nn.Linear(2, 2)])
def test_wrap_says_what_it_takes(given):
    with pytest.raises(errors.ConfigError, match=r"wrap takes a model of Transformers.*not <class"):
        emoe.wrap(given, memory_budget=0.5)


def test_wrap_of_a_model_in_a_container_says_to_give_what_is_in_it():
    with pytest.raises(errors.ConfigError, match=r"DataParallel.*give its \.module"):
        emoe.wrap(torch.nn.DataParallel(families.build("olmoe")), memory_budget=0.5)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"store": "a" * 300}, "store='a+ is no path.*too long"),
        ({"store": "a\0b"}, "store=.* is no path"),
        ({"predictor": "a" * 300}, "predictor='a+ is no path"),
        ({"policy": lambda layer: None}, "gave None for layer 0, which has no touch"),
    ],
)
def test_values_that_only_the_system_or_a_later_call_would_refuse_are_named(option, said):
    model = families.build("olmoe")
    with pytest.raises(errors.ConfigError, match=said):
        emoe.wrap(model, memory_budget=0.5, **option)
    emoe.wrap(model, memory_budget=0.5).emoe.close()


@pytest.mark.parametrize("option", [{"variant": "fp16"}, {"use_safetensors": False}])
def test_files_that_transformers_does_not_find_are_a_checkpoint_error(option, checkpoint):
    with pytest.raises(errors.CheckpointError, match="Error no file named"):
        emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, **option)


@pytest.mark.parametrize("path", ["a" * 300, f"./{'a' * 300}", "/" + "a" * 300])
@pytest.mark.parametrize("call", [emoe.plan, emoe.from_pretrained])
def test_a_name_that_no_file_system_takes_is_said_to_be_no_path(call, path):
    with pytest.raises(errors.ConfigError, match="is no path: File name too long"):
        call(path, memory_budget=0.5)


@pytest.mark.parametrize(
    ("use", "error", "said"),
    [
        (lambda runtime, path: runtime.record(None), errors.ConfigError, "path=None of a trace is no path"),
        (lambda runtime, path: runtime.record("a\0b"), errors.ConfigError, "is no path of a file"),
        (lambda runtime, path: runtime.request(tokens="5"), errors.ConfigError, "tokens='5' of a request"),
        (lambda runtime, path: runtime.request(tokens=float("nan")), errors.ConfigError, "tokens=nan"),
        (lambda runtime, path: runtime.request(others=[5]), errors.ConfigError, r"others=\[5\] of a request"),
        (lambda runtime, path: runtime.probe("x"), errors.ConfigError, "share='x' is not a number"),
        (lambda runtime, path: runtime.probe(None), errors.ConfigError, "share=None is not a number"),
        (lambda runtime, path: _mark(runtime, path, prompt={}), errors.TraceError, "prompt={} is no number or text"),
        (lambda runtime, path: _mark(runtime, path, prompt=[[1]]), errors.TraceError, r"prompt=\[\[1\]\]"),
        (lambda runtime, path: _mark(runtime, path, task=5), errors.TraceError, "task=5 is no name of a task"),
        (lambda runtime, path: _mark(runtime, path, phase=[1]), errors.TraceError, r"phase=\[1\] is not one of"),
    ],
)
def test_what_a_runtime_is_told_is_checked_when_it_is_told(use, error, said, checkpoint, tmp_path):
    with emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5).emoe as runtime:
        with pytest.raises(error, match=said):
            use(runtime, tmp_path / "trace.npz")
        runtime.check_integrity()


def _mark(runtime, path, **what):
    with runtime.record(path) as recorder:
        recorder.mark(**what)


def test_a_trace_under_two_spellings_is_one_file_and_a_link_stays_one(checkpoint, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    with model.emoe.record(tmp_path / "link.npz"):
        for other in (tmp_path / "d" / ".." / "link.npz", tmp_path / "real.npz"):
            with pytest.raises(errors.ConfigError, match="give each a file of its own"), model.emoe.record(other):
                pass
        model(torch.tensor([[5, 6, 7]]))
    assert (tmp_path / "link.npz").is_symlink()
    assert emoe.load_trace(tmp_path / "real.npz").tokens == 3
    model.emoe.close()
