"""The life of a wrapped model: wrap, run, save, close; what users touch through `model.emoe`."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import families
import numpy as np
import pytest
import torch
from interrupts import interrupted
from transformers import AutoModelForCausalLM

import emoe
from emoe import errors
from emoe.compute.bank import Bank
from emoe.compute.experts import Recording


@pytest.fixture
def ids():
    return torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(3))


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_importing_emoe_takes_neither_torch_nor_the_native_module():
    code = "import sys, emoe; print('torch' in sys.modules, 'emoe._C' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("store", [None, "ram", "folder"])
def test_wrap_gives_the_same_logits_and_close_restores_the_model(store, ids, tmp_path):
    model = families.build("qwen3_moe")
    before = _logits(model, ids)
    names = set(model.state_dict())
    emoe.wrap(model, memory_budget=0.5, store=tmp_path / "store" if store == "folder" else store)
    assert model.emoe.plan.resident_share == 0.5
    under = _logits(model, ids)
    assert ((under - before).abs().max() / before.abs().max()).item() < 1e-5
    model.emoe.close()
    assert not model.emoe
    assert torch.equal(_logits(model, ids), before)
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrap_frees_the_memory_of_the_experts():
    model = families.build("olmoe")
    emoe.wrap(model, memory_budget=0.5)
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    left = sum(parameter.numel() for parameter in experts if not parameter.is_meta)
    assert left == 0
    model.emoe.close()


def test_wrapping_twice_is_refused(ids):
    model = emoe.wrap(families.build("olmoe"), memory_budget=0.5)
    with pytest.raises(errors.ConfigError, match="already runs under emoe"):
        emoe.wrap(model, memory_budget=0.5)
    model.emoe.close()


def test_save_pretrained_writes_the_whole_model(checkpoint, ids, tmp_path):
    model = emoe.from_pretrained(checkpoint("mixtral"), memory_budget=0.5, dtype=torch.float32)
    expected = _logits(AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32), ids)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(_logits(again, ids), expected)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_state_dict_names_every_tensor_of_the_whole_model(checkpoint):
    whole = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), dtype=torch.float32).state_dict()
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, dtype=torch.float32)
    given = model.state_dict()
    assert given.keys() == whole.keys()
    assert all(torch.equal(given[name], whole[name]) for name in whole)


def test_close_restores_a_model_that_was_loaded_without_its_experts(checkpoint, ids):
    expected = _logits(AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), dtype=torch.float32), ids)
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, dtype=torch.float32)
    model.emoe.close()
    assert torch.equal(_logits(model, ids), expected)


def test_a_model_closed_without_restoring_refuses_to_run(checkpoint, ids):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    model.emoe.close(restore=False)
    model.emoe.close()  # again: nothing happens
    with pytest.raises(errors.ClosedError, match="closed"):
        _logits(model, ids)


def test_stats_add_up_and_per_layer_counts_sum_to_the_total(checkpoint, ids):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    _logits(model, ids)
    stats = model.emoe.stats(per_layer=True)
    assert stats["misses"] > 0
    assert stats["hits"] == sum(layer["hits"] for layer in stats["layers"])
    assert stats["misses"] == sum(layer["misses"] for layer in stats["layers"])
    assert stats["bytes_read"] >= stats["misses"] * model.emoe.plan.bytes_per_expert
    assert stats["hit_rate"] == stats["hits"] / (stats["hits"] + stats["misses"])
    json.dumps(stats)


def test_a_fully_resident_model_reads_each_expert_once(checkpoint, ids):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0)
    _logits(model, ids)
    first = model.emoe.stats()
    _logits(model, ids)
    second = model.emoe.stats()
    assert second["bytes_read"] == first["bytes_read"]
    assert second["evictions"] == 0


def test_a_recorded_trace_holds_the_routing_of_every_layer_and_token(checkpoint, ids, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    with model.emoe.record(tmp_path / "trace.npz") as recorder:
        recorder.mark(task="code", prompt=0)
        _logits(model, ids)
    trace = emoe.load_trace(tmp_path / "trace.npz")
    plan = model.emoe.plan
    assert trace.experts.shape == (len(plan.slots_per_layer), ids.shape[1], plan.top_k)
    with np.load(tmp_path / "trace.npz") as raw:
        assert raw["experts"].dtype == np.int16


def _picks(trace):
    return [trace.experts[:, token].tolist() for token in range(trace.tokens)]


def test_a_forward_within_another_threads_forward_keeps_its_tokens_apart(checkpoint, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0)
    texts = [torch.randint(3, 100, (1, 1), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    alone = []
    for ids in texts:
        with model.emoe.record(tmp_path / "alone.npz"):
            _logits(model, ids)
        alone += _picks(emoe.load_trace(tmp_path / "alone.npz"))
    inner = iter(texts[1:])

    with ThreadPoolExecutor(1) as other:

        def within(*_):
            if threading.current_thread() is threading.main_thread():
                other.submit(_logits, model, next(inner)).result()

        hook = model.model.layers[1].register_forward_pre_hook(within)
        with model.emoe.record(tmp_path / "both.npz"):
            _logits(model, texts[0])
            hook.remove()
            _logits(model, texts[5])
    assert _picks(emoe.load_trace(tmp_path / "both.npz")) == [alone[1], alone[0], alone[5]]


def test_recorders_that_overlap_each_have_all_that_ran_while_they_were_open(checkpoint, ids, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0)
    with model.emoe.record(tmp_path / "outer.npz") as outer:
        outer.mark(task="outer")
        _logits(model, ids[:, :3])
        with model.emoe.record(tmp_path / "inner.npz") as inner:
            inner.mark(task="inner")
            _logits(model, ids[:, :5])
            with pytest.raises(errors.ConfigError, match=r"inner\.npz.*a file of its own"):
                model.emoe.record(tmp_path / "inner.npz").__enter__()
        _logits(model, ids[:, :2])
    _logits(model, ids[:, :7])
    found = {name: emoe.load_trace(tmp_path / f"{name}.npz") for name in ("outer", "inner")}
    assert {name: trace.tokens for name, trace in found.items()} == {"outer": 10, "inner": 5}
    assert _picks(found["outer"])[3:8] == _picks(found["inner"])
    assert {trace.task_names[trace.task[0]] for trace in found.values()} == {"outer", "inner"}
    assert not any(isinstance(each, Recording) for each in model.emoe._bank.observers)


def test_a_trace_that_cannot_be_written_is_said_before_anything_runs(checkpoint, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    with pytest.raises(errors.WriteError, match="there is no folder"), model.emoe.record(tmp_path / "none" / "t.npz"):
        raise AssertionError("the block ran")
    assert not any(isinstance(each, Recording) for each in model.emoe._bank.observers)
    runtime = model.emoe
    runtime.close()
    with pytest.raises(errors.ClosedError):
        runtime.record(tmp_path / "t.npz").__enter__()
    assert not list(tmp_path.glob("*t.npz*"))


def test_a_recording_goes_on_to_its_file_when_the_runtime_closes_within(checkpoint, ids, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    with model.emoe.record(tmp_path / "t.npz"):
        _logits(model, ids)
        model.emoe.close()
        _logits(model, ids)  # an ordinary model again
    assert emoe.load_trace(tmp_path / "t.npz").tokens == ids.shape[1]


@pytest.mark.parametrize("value", [0, -1, 9, 2**40])
def test_a_number_of_experts_a_token_that_the_model_lacks_is_refused_by_plan_and_load(value, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("olmoe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": value}))
    for use in (emoe.plan, emoe.from_pretrained):
        for budget in (0.5, "1MiB"):  # that it would not fit either is not what is wrong
            with pytest.raises(errors.ConfigError, match=rf"num_experts_per_tok={value!r}.* from 1 to 8"):
                use(folder, memory_budget=budget)


@pytest.mark.parametrize(
    ("option", "choices"),
    [({"routing": "fast"}, "exact"), ({"kernels": "cuda"}, "native, stock"), ({"policy": "random"}, "lru"),
     ({"reader": "mmap"}, "uring"), ({"memory_budget": "lots"}, "GiB")],
)  # fmt: skip
def test_an_unknown_option_is_refused_with_its_choices(option, choices, checkpoint):
    with pytest.raises(errors.ConfigError, match=choices):
        emoe.from_pretrained(checkpoint("olmoe"), **{"memory_budget": 0.5, **option})


def test_a_failing_option_leaves_a_wrapped_model_whole(ids):
    model = families.build("olmoe")
    before = _logits(model, ids)
    with pytest.raises(errors.ConfigError):
        emoe.wrap(model, memory_budget=0.5, reader="mmap")
    assert torch.equal(_logits(model, ids), before)


def test_a_budget_that_is_too_small_names_the_smallest_that_works_and_that_one_works(checkpoint, ids):
    with pytest.raises(errors.BudgetError, match="smallest budget") as caught:
        emoe.from_pretrained(checkpoint("olmoe"), memory_budget="1MiB")
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=caught.value.needed)
    assert set(model.emoe.plan.slots_per_layer) == {1}
    _logits(model, ids)
    with pytest.raises(errors.BudgetError):
        emoe.from_pretrained(checkpoint("olmoe"), memory_budget=caught.value.needed - 1)


def test_auto_says_what_it_took(checkpoint, caplog):
    with caplog.at_level(logging.INFO, logger="emoe"):
        model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget="auto")
    assert "auto took" in caplog.text
    assert model.emoe.plan.resident_share == 1.0


def test_a_dense_model_is_refused_with_its_class_and_the_families_that_work():
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(errors.UnsupportedModelError, match=r"LlamaForCausalLM.*mixtral"):
        emoe.wrap(AutoModelForCausalLM.from_config(config), memory_budget=0.5)


def test_gradients_through_the_experts_are_refused(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, dtype=torch.float32)
    embeddings = model.get_input_embeddings()(torch.tensor([[1, 2, 3]])).detach().requires_grad_()
    with pytest.raises(errors.EmoeError, match="inference only"):
        model(inputs_embeds=embeddings)


def test_the_output_projection_gets_dense_rows_and_close_takes_the_hook_away(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe", torch.bfloat16), memory_budget=0.5)
    strides = []
    projection = model.get_output_embeddings()
    hook = projection.register_forward_hook(lambda module, args, out: strides.append(args[0].stride()))
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), logits_to_keep=1)
    hook.remove()
    assert strides == [(64, 64, 1)]
    model.emoe.close()
    assert not projection._forward_pre_hooks


def test_a_text_generation_pipeline_runs_on_the_model(checkpoint):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    generate = pipeline("text-generation", model=model, tokenizer=fast)
    answer = generate("w5 w6", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert answer.startswith("w5 w6")
    assert answer.count("w") == 6


def _recorder_of(tmp_path):
    """A bank's recorders without a model, and what tells them of requests."""
    bank = Bank.__new__(Bank)
    layer = types.SimpleNamespace(form=types.SimpleNamespace(nbytes=8), num_experts=4)
    bank.layers, bank._store = [layer], types.SimpleNamespace(layers=[layer])
    bank.observers, bank.lock = [], threading.RLock()
    told = [object(), object()]
    return bank, told, lambda name: bank.recorded(tmp_path / name, "model", 2, told, lambda: None)


def _record_blocks(record, bank):
    with record("one.npz"):
        _one_token(bank)
        with record("two.npz"):
            _one_token(bank)


def _stacked_record_blocks(record, bank):
    with contextlib.ExitStack() as stack:
        stack.enter_context(record("two.npz"))
        _one_token(bank)


def _one_token(bank):
    for each in bank.observers:
        each.before(0, None, torch.tensor([[1, 2]]), torch.ones(1, 2))


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize(
    ("blocks", "keeps"), [(_record_blocks, True), (_record_blocks, False), (_stacked_record_blocks, False)]
)
def test_an_interrupt_at_any_moment_leaves_no_recorder_open(blocks, keeps, opcodes, tmp_path):
    at, rooms = 0, ["compute/bank.py", "compute/experts.py", "requests.py", "trace/trace.py"]
    while True:
        kept = []
        bank, told, record = _recorder_of(tmp_path)

        def run(record=record, bank=bank, kept=kept):
            try:
                blocks(record, bank)
            except KeyboardInterrupt as interrupt:
                if keeps:
                    kept.append(interrupt)  # as sys.last_traceback does, with all frames
                raise

        where = interrupted(run, at, rooms, opcodes=opcodes)
        if blocks is _stacked_record_blocks:
            gc.collect(1)  # its frames are in a circle with the interrupt
        assert all(each.over for each in bank._recordings()), where
        _one_token(bank)
        assert all(each.recorder.trace().tokens <= 2 for each in bank._recordings())
        with record("one.npz") as recorder:
            assert [each.recorder for each in bank._recordings()] == [recorder]
            assert len(told) == 3
            _one_token(bank)
        assert emoe.load_trace(tmp_path / "one.npz").tokens == 1
        assert not bank.observers and len(told) == 2
        kept.clear()
        gc.collect(1)
        assert not list(tmp_path.glob(".*.emoe-*")), where
        if not where:
            break
        at += 5 if opcodes else 1
    assert at > (500 if opcodes else 80)
