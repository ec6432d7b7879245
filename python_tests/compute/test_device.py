"""Models on the emulated device, end to end: the tokens of the CPU path, failures, misses left to the CPU."""

from __future__ import annotations

import dataclasses
import functools
import threading

import numpy as np
import pytest
import torch

import emoe
from emoe.compute import misses
from emoe.compute.choose import open_device
from emoe.compute.emulated import EmulatedCall
from emoe.compute.gpu_experts import OnDevice
from emoe.errors import (
    BackendUnavailable,
    BudgetError,
    ClosedError,
    ConfigError,
    EmoeError,
    ReadError,
    TransferError,
    UnsupportedModelError,
)
from emoe.generate import load_tokenizer

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, found_device):
    """Names of devices; on a machine with a GPU the same tests run there."""
    return found_device(request.param)


@pytest.fixture
def emulated(found_device):
    """The native module of the emulation."""
    return open_device(found_device("emulated")).module


@pytest.fixture
def prompt():
    return torch.arange(3, 15).view(1, -1)


def generate(model, prompt, n=4):
    return model.generate(prompt.to(model.device), max_new_tokens=n, do_sample=False, pad_token_id=0)[0].tolist()


def moe_block(model):
    """The block of `model.emoe.layers[0]`; the family's first layer is dense."""
    block = model.model.layers[1].mlp
    assert block.experts._emoe is model.emoe.layers[0]
    return block


def small_layout(module):
    return module.MlpLayout(8, 8, 8, "float32", True, False, False, "silu", gate_up_offset=0, down_offset=1024)


@pytest.mark.parametrize("budget", [0.25, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_decode_on_the_device_gives_the_tokens_of_the_cpu(device, checkpoint, prompt, family, budget):
    folder = checkpoint(family)
    on_cpu = emoe.from_pretrained(folder, memory_budget=budget)
    expected, reference = generate(on_cpu, prompt), on_cpu(prompt).logits
    on_cpu.emoe.close(restore=False)
    model = emoe.from_pretrained(folder, memory_budget=budget, device=device)
    assert generate(model, prompt) == expected
    torch.testing.assert_close(model(prompt.to(model.device)).logits.cpu(), reference, rtol=1e-4, atol=1e-5)
    stats = model.emoe.stats()
    assert stats["device"].startswith(device)
    assert stats["kernels"] == {stats["device"]: len(model.emoe.layers)}
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


def resident(folder, where, **options):
    return emoe.from_pretrained(folder, memory_budget=0.5, routing="resident", device=where, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_resident_routing_on_the_device_gives_the_tokens_and_counts_of_the_cpu(device, checkpoint, prompt, family):
    tokens, counts = [], []
    for where in ("cpu", device):
        model = resident(checkpoint(family), where)
        generate(model, prompt)  # its experts fill the slots
        with model.emoe.request("chat", "counted") as request:
            tokens.append(generate(model, prompt))
        counts.append(request.to_dict())
        stats = model.emoe.stats()
        assert stats["evictions"] == 0
        model.emoe.close(restore=False)
    assert tokens[0] == tokens[1]
    assert counts[0] == pytest.approx(counts[1], abs=1e-5)
    assert counts[0]["substituted"] > 0
    assert stats["settled"] > 0


def test_full_slots_take_the_host_out_of_every_step_and_a_change_of_experts_is_seen(device, checkpoint, prompt):
    model = resident(checkpoint("qwen3_moe"), device)
    with torch.no_grad():
        model.emoe.graphs.settle()
        for _ in range(2):
            before = model.emoe.stats()["settled"]
            model(prompt.to(model.device))
            assert model.emoe.stats()["settled"] == before + len(model.emoe.layers)
        logits = model(prompt.to(model.device)).logits.cpu()
        for layer in range(len(model.emoe.layers)):
            absent = [e for e in range(8) if model.emoe.cache.lookup(layer, e) is None]
            for _ in model.emoe.loader.rounds(layer, absent):
                pass
        changed = model(prompt.to(model.device)).logits.cpu()
    assert not torch.allclose(changed, logits)
    resident_now = [model.emoe.cache.resident(layer) for layer in range(len(model.emoe.layers))]
    stats = model.emoe.stats()
    assert stats["settled"] == 4 * len(model.emoe.layers)
    model.emoe.close(restore=False)
    with torch.no_grad():
        on_cpu = resident(checkpoint("qwen3_moe"), "cpu")
        for layer, experts in enumerate(resident_now):
            for _ in on_cpu.emoe.loader.rounds(layer, experts):
                pass
        torch.testing.assert_close(on_cpu(prompt).logits, changed, rtol=1e-4, atol=1e-5)
    on_cpu.emoe.close(restore=False)


def test_exact_with_all_experts_in_memory_takes_the_host_out_of_every_step(device, checkpoint, prompt):
    on_cpu = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=1.0)
    expected, reference = generate(on_cpu, prompt), on_cpu(prompt).logits
    on_cpu.emoe.close(restore=False)
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=1.0, device=device)
    layers = len(model.emoe.layers)
    model(prompt.to(model.device))
    assert model.emoe.stats()["settled"] < layers, "slots were free: the host had to see what to load"
    model.emoe.graphs.settle()
    loads, before = model.emoe.stats()["loads"], model.emoe.stats()["settled"]
    with model.emoe.graphs.replaying():
        pass
    torch.testing.assert_close(model(prompt.to(model.device)).logits.cpu(), reference, rtol=1e-4, atol=1e-5)
    assert generate(model, prompt) == expected
    stats = model.emoe.stats()
    assert stats["loads"] == loads
    assert stats["settled"] == before + layers * (1 + 4), "the prompt, then its generation of four tokens"
    model.emoe.close(restore=False)


def test_exact_with_a_slot_too_few_asks_the_host(device, checkpoint, prompt):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.9, device=device)
    generate(model, prompt)
    assert model.emoe.stats()["settled"] == 0
    with pytest.raises(ConfigError, match="all experts in memory"):
        model.emoe.graphs.settle()
    model.emoe.close(restore=False)


def test_a_prefetch_under_way_brings_the_host_back_until_it_is_over(device, checkpoint, prompt):
    model = resident(checkpoint("qwen3_moe"), device)
    with torch.no_grad():
        model.emoe.graphs.settle()
        absent = next(e for e in range(8) if model.emoe.cache.lookup(1, e) is None)
        assert model.emoe.loader.prefetch(1, [absent]) == 1
        before = model.emoe.stats()["settled"]
        model(prompt.to(model.device))
        assert model.emoe.stats()["settled"] == before + len(model.emoe.layers) - 1
        model.emoe.graphs.settle()
        before = model.emoe.stats()["settled"]
        model(prompt.to(model.device))
        assert model.emoe.stats()["settled"] == before + len(model.emoe.layers)
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


def test_replays_are_refused_before_layers_are_settled_and_where_a_step_may_load(device, checkpoint, prompt):
    model = resident(checkpoint("qwen3_moe"), device)
    with pytest.raises(EmoeError, match=r"layer 0 is not settled; call settle\(\)"), model.emoe.graphs.replaying():
        pass
    model.emoe.graphs.settle()
    with model.emoe.graphs.replaying():
        pass
    model.emoe.close(restore=False)
    with pytest.raises(ClosedError):
        model.emoe.graphs.settle()
    for where, options in (("cpu", {}), (device, {"max_substituted_mass": 0.1})):
        model = resident(checkpoint("qwen3_moe"), where, **options)
        with pytest.raises(ConfigError, match="may need the host in any step"):
            model.emoe.graphs.settle()
        model.emoe.close(restore=False)


def test_a_layer_with_fewer_slots_than_picks_is_said_to_need_the_host(device, checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.25, routing="resident", device=device)
    slots = len(model.emoe.cache.slots(0))
    model.emoe.plan = dataclasses.replace(model.emoe.plan, top_k=slots + 1)
    with pytest.raises(ConfigError, match=f"layer 0 has {slots} slots, fewer than the {slots + 1} experts"):
        model.emoe.graphs.settle()
    model.emoe.close(restore=False)


def test_replays_run_between_the_reads_of_every_slot_and_nobody_loads_meanwhile(device, checkpoint):
    model = resident(checkpoint("qwen3_moe"), device)
    model.emoe.graphs.settle()
    native, calls, taken = model.emoe._device.native, [], []

    class Watched:
        def __getattr__(self, name):
            if name.endswith("_read"):
                calls.append(name)
                return functools.partial(self.noted, getattr(native, name))
            return getattr(native, name)

        def noted(self, call, slab, slots, stream):
            calls.append(slots.tolist())
            call(slab, slots, stream)

    model.emoe._device.native = Watched()
    slots = list(range(model.emoe.stats()["slots"]))
    with pytest.raises(KeyError), model.emoe.graphs.replaying():
        calls.append("replay")
        other = threading.Thread(target=lambda: taken.append(model.emoe._lock.acquire(blocking=False)))
        other.start()
        other.join()
        raise KeyError("in the block")
    assert calls == ["begin_read", slots, "replay", "end_read", slots]
    assert taken == [False], "a load of another thread would not know of the replays"
    model.emoe._device.native = native
    model.emoe.close(restore=False)


def test_a_settled_call_in_parts_or_without_rows_is_the_one_of_the_host(device, checkpoint):
    model = resident(checkpoint("qwen3_moe"), device)
    model.emoe.graphs.settle()
    block = moe_block(model)
    hidden = torch.randn(1, 9, model.config.hidden_size, device=model.device)
    with torch.no_grad():
        whole, before = block(hidden), model.emoe.stats()["settled"]
        model.emoe.layers[0].compute._pair_bytes = 1
        torch.testing.assert_close(block(hidden), whole, rtol=1e-4, atol=1e-5)
        assert block(hidden[:, :0]).shape == (1, 0, model.config.hidden_size)
        assert model.emoe.stats()["settled"] == before + 2
    model.emoe.close(restore=False)


def test_picks_that_a_later_hook_puts_in_the_place_of_the_routers_are_loaded_and_not_left_out(device, checkpoint):
    model = resident(checkpoint("qwen3_moe"), device)
    model.emoe.graphs.settle()
    block = moe_block(model)
    absent = [e for e in range(8) if model.emoe.cache.lookup(0, e) is None]
    picks = torch.tensor(absent, device=model.device).repeat(3, 1)[:, : model.config.num_experts_per_tok]
    weights = torch.full(picks.shape, 0.5, device=model.device)
    hidden = torch.randn(1, 3, model.config.hidden_size, device=model.device)
    hook = block.gate.register_forward_hook(lambda module, args, output: (output[0], weights, picks))
    with torch.no_grad():
        found = block(hidden).cpu()
    hook.remove()
    expected = block.experts._emoe.forward(hidden[0], picks, weights).cpu()
    torch.testing.assert_close(found[0], expected)
    assert bool(expected.any())
    model.emoe.close(restore=False)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_a_step_that_needs_no_host_does_not_synchronise_and_can_be_captured(device, checkpoint, prompt, routing):
    if device == "emulated":
        pytest.skip("torch captures graphs on a GPU only; csrc/tests/test_cuda_graph.cpp captures what emoe launches")
    share = 0.5 if routing == "resident" else 1.0
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=share, routing=routing, device=device)
    moe = moe_block(model)
    hidden = torch.randn(1, 5, model.config.hidden_size, device=device)
    with torch.no_grad(), torch.cuda.device(device):
        model(prompt.to(device))
        model.emoe.graphs.settle()
        before = model.emoe.stats()["settled"]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            moe(hidden)
            torch.cuda.set_sync_debug_mode("error")
            try:
                moe(hidden)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = moe(hidden)
        changes = (False, True) if routing == "resident" else (False,)
        for change in changes:
            if change:
                absent = [e for e in range(8) if model.emoe.cache.lookup(0, e) is None]
                for _ in model.emoe.loader.rounds(0, absent):
                    pass
            hidden.normal_()
            with model.emoe.graphs.replaying():
                graph.replay()
            torch.testing.assert_close(captured, moe(hidden))
        assert model.emoe.stats()["settled"] == before + 3 + len(changes), "the capture is one of them"
    model.emoe.close(restore=False)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["exact", "resident"])
def test_the_demo_model_with_a_quarter_of_its_experts_answers_on_the_device_as_on_the_cpu(device, demo_folder, routing):
    # Tokens that lead by more than 1 in the logits; other orders of summing move such leads by up to 0.6 in bfloat16.
    # 11 tokens go through the tiles kernels, those that follow through rows.
    tokenizer = load_tokenizer(str(demo_folder))
    prompt = tokenizer("1, 2, 3, 4,", return_tensors="pt").input_ids
    assert prompt.shape == (1, 11)
    answers = []
    for where in ("cpu", device):
        model = emoe.from_pretrained(demo_folder, memory_budget=0.25, routing=routing, device=where, context=64)
        assert model.emoe.plan.to_dict()["resident_share"] <= 0.25
        answers.append(tokenizer.decode(generate(model, prompt, 3)))
        assert model.emoe.stats()["kernels"].keys() == (
            {model.emoe.stats()["device"]} if where == device else {"native"}
        )
        model.emoe.close(restore=False)
    assert answers[0] == answers[1] == "1, 2, 3, 4, 5,"


def test_decode_on_the_device_is_bit_identical_between_budgets(device, checkpoint, prompt):
    results = []
    for budget in (0.01, 0.5, 1.0):
        model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=budget, device=device)
        results.append(model(prompt[:, :1].to(model.device)).logits)
        model.emoe.close(restore=False)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_small_pinned_store_reads_experts_again_and_a_large_one_does_not(device, checkpoint, prompt):
    reads = {}
    for pinned in ("tiny", None):
        options = {}
        if pinned:
            plan = emoe.plan(checkpoint("qwen3_moe"), 0.25, calibrate=False)
            options["pinned_memory"] = 3 * plan.slot_bytes
        model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.25, device=device, **options)
        generate(model, prompt)
        stats = model.emoe.stats()
        reads[pinned] = stats["host_misses"]
        experts = sum(model.emoe.plan.experts_per_layer)
        model.emoe.close(restore=False)
    assert reads[None] <= experts < reads["tiny"]


@pytest.mark.parametrize("miss", ["cpu", "auto"])
def test_misses_left_to_the_cpu_give_the_same_tokens(device, checkpoint, prompt, miss):
    folder = checkpoint("qwen3_moe")
    reference = emoe.from_pretrained(folder, memory_budget=0.25)
    expected = generate(reference, prompt)
    reference.emoe.close(restore=False)
    model = emoe.from_pretrained(folder, memory_budget=0.25, device=device, miss=miss)
    assert generate(model, prompt) == expected
    stats = model.emoe.stats()
    if miss == "cpu":
        assert stats["on_cpu"] > 0
        assert stats["evictions"] == 0
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


def test_the_cpu_computes_its_misses_while_the_device_computes_its_hits(emulated, checkpoint, prompt, monkeypatch):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.25, device="emulated", miss="cpu")
    expected = model(prompt).logits  # fills the slots
    enqueued, began, order = threading.Event(), threading.Event(), []
    call, layer = EmulatedCall.gather, OnDevice._compute_here

    def gather(self, slot_of):
        order.append("gather")
        assert began.wait(30), "the CPU had not begun when the device got its work"
        call(self, slot_of)
        enqueued.set()

    def compute_here(self, fetched, ids, experts):
        began.set()
        order.append("compute")
        assert enqueued.wait(30), "the device had nothing to do while the CPU computed"
        return layer(self, fetched, ids, experts)

    monkeypatch.setattr(EmulatedCall, "gather", gather)
    monkeypatch.setattr(OnDevice, "_compute_here", compute_here)
    only = model.emoe.layers[-1]
    hidden = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    index = torch.arange(8).view(4, 2) % only.num_experts
    weights = torch.full((4, 2), 0.5)
    before = only.compute.on_cpu
    mixed = only.forward(hidden, index, weights)
    assert set(order) == {"gather", "compute"} and only.compute.on_cpu > before
    monkeypatch.undo()
    torch.testing.assert_close(only.forward(hidden, index, weights), mixed, rtol=0, atol=0)
    torch.testing.assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-5)
    model.emoe.close(restore=False)


@pytest.mark.parametrize("half", ["cpu", "device"])
def test_an_error_in_either_half_leaves_nothing_held_and_the_next_forward_works(
    half, emulated, checkpoint, prompt, monkeypatch
):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.25, device="emulated", miss="cpu")
    expected = model(prompt).logits
    queue = model.emoe.loader._queue
    broken = {"cpu": (OnDevice, "_compute_here"), "device": (EmulatedCall, "gather")}[half]

    def fail(*args):
        raise TransferError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(*broken, fail)
        with pytest.raises(TransferError, match="broken on purpose"):
            model(prompt)
    assert queue.store.used == 0
    model.emoe.check_integrity()
    torch.testing.assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-5)
    model.emoe.close(restore=False)


def test_moving_an_expert_counts_by_how_often_moved_ones_are_used(emulated, checkpoint, monkeypatch):
    seen = []
    real = misses.split
    monkeypatch.setattr(misses, "split", lambda *args, **kw: seen.append(kw["expected_uses"]) or real(*args, **kw))
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, device="emulated", miss="auto")
    only = model.emoe.layers[0]
    hidden, weights = torch.ones(1, model.config.hidden_size), torch.ones(1, 1)
    slots = model.emoe.loader.capacity(0)
    for expert in range(slots):  # as many moves
        only.forward(hidden, torch.tensor([[expert]]), weights)
    for _ in range(3 * slots):  # and three hits for each
        only.forward(hidden, torch.tensor([[0]]), weights)
    only.forward(hidden, torch.tensor([[slots]]), weights)
    assert seen[:slots] == [1] * slots and seen[-1] == 4
    model.emoe.close(restore=False)


def test_wrap_on_the_device_and_back_restores_the_model(device, checkpoint, prompt):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"))
    expected = generate(model, prompt)
    emoe.wrap(model, memory_budget=0.5, device=device)
    assert generate(model, prompt) == expected
    model.emoe.close(restore=True)
    assert generate(model, prompt) == expected


def test_prefetched_experts_are_hits_on_the_device(device, checkpoint, prompt):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=1.0, device=device)
    loader = model.emoe.loader
    for layer in range(len(model.emoe.layers)):
        loader.prefetch(layer, list(range(model.emoe.layers[layer].num_experts)))
    expected = generate(model, prompt)
    stats = model.emoe.stats()
    assert stats["prefetch_hits"] > 0
    assert expected
    model.emoe.close(restore=False)


def test_long_prompts_run_in_parts(device, checkpoint):
    prompt = torch.arange(3, 43).view(1, -1)
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, device=device)
    whole = model(prompt.to(model.device)).logits
    for layer in model.emoe.layers:
        layer.compute._pair_bytes = 1
    torch.testing.assert_close(model(prompt.to(model.device)).logits, whole, rtol=1e-4, atol=1e-5)
    model.emoe.close(restore=False)


def test_a_read_that_fails_raises_and_the_next_attempt_works(emulated, checkpoint, prompt, monkeypatch):
    make = emulated.make_reader
    model = None
    monkeypatch.setattr(emulated, "make_reader", lambda kind: emulated.FaultyReader(make(kind), fail_at=3))
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.25, device="emulated")
    with pytest.raises(ReadError):
        generate(model, prompt)
    model.emoe.check_integrity()
    assert len(generate(model, prompt)) == 16
    model.emoe.close(restore=False)


def test_device_memory_that_is_too_small_is_a_budget_error_and_everything_is_given_back(emulated, monkeypatch):
    monkeypatch.setenv("EMU_DEVICE_MIB", "1")
    device = emulated.CudaDevice(0)
    with pytest.raises(BudgetError, match="bytes on device 0, which has"):
        device.slab(1000, 1 << 20)


def test_stock_kernels_are_refused_on_a_device(device, checkpoint):
    with pytest.raises(ConfigError, match="runs on the CPU only"):
        emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, device=device, kernels="stock")


def test_a_family_without_native_kernels_is_refused_by_layer_and_reason(device, checkpoint):
    with pytest.raises(UnsupportedModelError, match="cannot be computed on "):
        emoe.from_pretrained(checkpoint("inkling2_text"), memory_budget=0.5, device=device)


def test_a_slot_table_that_names_a_slot_too_many_is_refused(emulated):
    device = open_device("emulated")
    layout = small_layout(emulated)
    slab = device.native.slab(2, 4096)
    memory = device.native.allocate(4096)
    with pytest.raises(ConfigError, match="slot 2 is not one of"):
        device.native.gather_mlp(
            layout, slab, np.array([2], dtype=np.int32), memory, "float32", 1, memory, memory, "float32", 1, memory, 0
        )
    device.native.free(memory)


def test_expert_ids_of_another_width_are_refused_before_their_address_is_passed_on(emulated):
    device = open_device("emulated")
    layout = small_layout(emulated)
    hidden, weights = torch.zeros(1, 8), torch.ones(1, 1)
    with pytest.raises(ConfigError, match="expert ids are"):
        device.call(layout, device.native.slab(2, 4096), hidden, torch.zeros(1, 1, dtype=torch.int32), weights)


def test_an_unknown_device_is_refused_with_the_choices():
    for name in ("gpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ConfigError, match="is not one of: cpu, cuda"):
            open_device(name)
    assert open_device("cpu").name == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named_by_what_is_missing(checkpoint):
    with pytest.raises(BackendUnavailable, match=r"no CUDA|built without CUDA"):
        open_device("cuda:0")


class Resident:
    """A layer of 4 experts on the emulation, 3 slots for them, and a call of it with the slot table on the device."""

    experts, top_k = 4, 2

    def __init__(self, module, tokens):
        self.tokens, self.device = tokens, open_device("emulated").native
        self.layout = small_layout(module)
        self.slab = self.device.slab(3, 4096)
        self.fill([0, 1, 2])
        self.hidden, self.weights = torch.randn(tokens, 8), torch.rand(tokens, self.top_k)
        self.index = torch.arange(tokens * self.top_k).view(tokens, self.top_k) % self.experts
        self.inputs = [self.copy(tensor) for tensor in (self.hidden, self.index, self.weights)]
        self.table = self.copy(torch.full((self.experts,), -1, dtype=torch.int32))
        sizes = self.layout, self.slab, self.experts, "float32", tokens, "float32", self.top_k
        self.workspace_bytes = self.device.workspace_bytes(*sizes)
        self.workspace = self.device.allocate(self.workspace_bytes)

    def fill(self, records):
        for slot, record in enumerate(records):
            self.put(self.slab.address + slot * 4096, self.record(record))

    @staticmethod
    def record(number):
        """The matrices of an expert; 4096 bytes."""
        return torch.linspace(-1, 1, 1024) * (number + 1)

    def put(self, address, tensor):
        self.device.upload(address, tensor.data_ptr(), tensor.nbytes, 0)

    def copy(self, tensor):
        address = self.device.allocate(tensor.nbytes)
        self.put(address, tensor)
        return address

    def enqueue(self, slots, table, **changed):
        """Returns the address of the pairs."""
        self.put(self.table, torch.tensor(table, dtype=torch.int32))
        hidden, index, weights = self.inputs
        sizes = {"experts": self.experts, "tokens": self.tokens, "top_k": self.top_k}
        dtypes = {"hidden_dtype": "float32", "weights_dtype": "float32"}
        addresses = {"table_ptr": self.table, "hidden_ptr": hidden, "index_ptr": index, "weights_ptr": weights}
        scratch = {"workspace_ptr": self.workspace, "workspace_bytes": self.workspace_bytes}
        out = self.copy(torch.zeros(self.tokens, self.top_k, 8))
        arguments = {**sizes, **dtypes, **addresses, **scratch, "out_ptr": out, "stream": 0, **changed}
        self.device.gather_mlp_resident(self.layout, self.slab, slots, **arguments)
        return out

    def pairs(self, address):
        pairs = torch.empty(self.tokens, self.top_k, 8)
        self.device.download(pairs.data_ptr(), address, pairs.nbytes, 0)
        return pairs

    def __call__(self, slots, table, **changed):
        return self.pairs(self.enqueue(slots, table, **changed))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("tokens", [3, 12])
def test_a_slot_table_on_the_device_gives_the_pairs_of_one_on_the_host(emulated, tokens, dtype):
    call = Resident(emulated, tokens)
    hidden, index, weights = call.inputs
    for table in ([2, -1, 0, 1], [1, 1, -1, 0], [-1] * 4):  # an expert without a slot leaves its pairs at zero
        out = call.copy(torch.zeros(tokens, call.top_k, 8))
        call.device.gather_mlp(
            call.layout, call.slab, np.array(table, dtype=np.int32), hidden, "float32", tokens, index, weights,
            "float32", call.top_k, out, 0,
        )  # fmt: skip
        expected = call.pairs(out)
        slots = np.array(sorted({slot for slot in table if slot >= 0}), dtype=dtype)
        assert torch.equal(call(slots, table), expected)
        assert bool(expected.any()) == any(slot >= 0 for slot in table)


def test_resident_calls_run_between_the_copies_into_their_slots(emulated, tmp_path):
    call = Resident(emulated, 3)
    path = tmp_path / "records"
    path.write_bytes(b"".join(call.record(number).numpy().tobytes() for number in range(8)))
    table = emulated.RecordTable()
    file = table.add_file(str(path))
    piece = ("record", "float32", 0, "float32", 32, 32, 32, 1)
    records = [table.add_record([(file, 4096 * number, 4096, *piece)]) for number in range(8)]
    queue = emulated.DeviceQueue(
        call.device, call.slab, table, emulated.make_reader("pread"), emulated.PinnedCache(8, 4096)
    )
    held, steps = [0, 1, 2], []
    for step in range(16):
        slot, record = step % 3, (step * 5 + 3) % 8
        queue.order_after(queue.submit(records[record], slot), 0)
        held[slot] = record
        steps.append((list(held), call.enqueue(np.arange(3), [0, 1, 2, -1])))
    results = [call.pairs(out) for _, out in steps]
    queue.close()
    for (held, _), result in zip(steps, results, strict=True):
        call.fill(held)
        assert torch.equal(call(np.arange(3), [0, 1, 2, -1]), result)


def test_a_resident_call_that_contradicts_itself_is_refused_with_the_value(emulated):
    call = Resident(emulated, 2)
    table = [0, 1, 2, -1]
    with pytest.raises(ConfigError, match="slot 3 is not one of"):
        call(np.array([0, 3]), table)
    with pytest.raises(ConfigError, match="array of integers"):
        call(np.array([0.5]), table)
    with pytest.raises(ConfigError, match=f"a workspace of 1 bytes .* needs {call.workspace_bytes}"):
        call(np.arange(3), table, workspace_bytes=1)
    with pytest.raises(ConfigError, match="slot_of is at address 0"):
        call(np.arange(3), table, table_ptr=0)
    with pytest.raises(ConfigError, match="experts=9000"):
        call(np.arange(3), table, experts=9000)
    assert not call.device.capturing(0)
    assert call(np.arange(3), table).any()


def test_reads_of_many_slots_take_an_array_of_their_numbers(emulated):
    call = Resident(emulated, 2)
    for slots in (np.arange(3), np.array([2], dtype=np.int32), np.array([])):
        call.device.begin_read(call.slab, slots, 0)
        call.device.end_read(call.slab, slots, 0)
    with pytest.raises(ConfigError, match="slot -1 is not one of"):
        call.device.begin_read(call.slab, np.array([-1]), 0)
