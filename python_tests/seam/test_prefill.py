"""Prompts in chunks: a forward gives what it gives whole, in every family whose forward goes on from its cache."""

from __future__ import annotations

import logging
import sys
import threading
import types

import pytest
import torch
from families import FAMILIES, build
from interrupts import interrupted
from transformers import DynamicCache

import emoe
from emoe import memory
from emoe.errors import ConfigError
from emoe.planning.activations import whole_because
from emoe.seam import prefill
from emoe.seam.prefill import ChunkedPrefill

LENGTH, CHUNK = 50, 13
WHOLE = ("deepseek_v4", "hy_v4", "jamba", "minimax")
GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def prompt(batch=2, length=LENGTH, seed=1):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, columns):
    """Its first row padded on the left, and the mask."""
    mask = torch.ones_like(ids)
    mask[0, :columns] = 0
    return ids * mask, mask


@pytest.fixture
def olmoe():
    return build("olmoe")


def test_the_families_that_are_computed_whole_are_those_whose_forward_begins_anew():
    assert tuple(sorted(name for name in FAMILIES if whole_because(build(name)))) == WHOLE


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(WHOLE)))
@torch.no_grad()
def test_chunks_give_the_logits_and_tokens_of_one_forward(name):
    model = build(name)
    ids, mask = padded(prompt(), 2 * CHUNK + 3)  # two chunks of the first row are nothing but padding
    whole = model(ids, attention_mask=mask)
    last = model(ids, attention_mask=mask, logits_to_keep=20).logits
    tokens = model.generate(ids, attention_mask=mask, **GENERATE)
    chunked = ChunkedPrefill(model, CHUNK, LENGTH)
    output = model(ids, attention_mask=mask)
    for row, first in ((0, 2 * CHUNK + 3), (1, 0)):
        torch.testing.assert_close(output.logits[row, first:], whole.logits[row, first:], atol=1e-4, rtol=1e-4)
    kept = model(ids, attention_mask=mask, logits_to_keep=20).logits
    torch.testing.assert_close(kept, last, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATE), tokens)
    chunked.remove()
    following = prompt(length=1, seed=2)
    after = [model(following, past_key_values=each.past_key_values).logits for each in (whole, output)]
    torch.testing.assert_close(after[1][1], after[0][1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_of_at_most_a_chunk_is_one_forward_bit_for_bit(olmoe):
    for length in (1, CHUNK):
        ids = prompt(length=length)
        expected = olmoe(ids).logits
        chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
        calls = []
        hook = olmoe.model.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        assert torch.equal(olmoe(ids).logits, expected)
        assert len(calls) == 1
        hook.remove()
        chunked.remove()


@torch.no_grad()
def test_a_second_prompt_goes_on_from_the_cache_of_the_first(olmoe):
    first, second = prompt(length=20), prompt(length=30, seed=2)
    expected = olmoe(torch.cat([first, second], 1)).logits[:, 20:]
    ChunkedPrefill(olmoe, CHUNK, LENGTH)
    cache = DynamicCache(config=olmoe.config)
    olmoe(first, past_key_values=cache)
    logits = olmoe(input_ids=second, past_key_values=cache, attention_mask=torch.ones(2, 50, dtype=torch.long)).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 50


@torch.no_grad()
def test_embeddings_and_positions_are_cut_too(olmoe):
    ids = prompt()
    expected = olmoe(ids).logits
    ChunkedPrefill(olmoe, CHUNK, LENGTH)
    embeddings = olmoe.get_input_embeddings()(ids)
    positions = torch.arange(LENGTH).expand(2, -1)
    torch.testing.assert_close(
        olmoe(inputs_embeds=embeddings, position_ids=positions).logits, expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"use_cache": False}, "it has no KV cache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"labels": prompt()}, "labels cannot be cut"),
        ({"return_dict": False}, "return_dict=False"),
        ({"logits_to_keep": torch.arange(3)}, "logits_to_keep is a tensor"),
        ({"logits_to_keep": -1}, "logits_to_keep=-1"),
        ({"attention_mask": torch.zeros(2, 1, LENGTH, LENGTH)}, "attention_mask is not of shape"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_cut_runs_whole_and_the_log_says_why_once(given, reason, olmoe, caplog):
    expected = olmoe(prompt(), **given)[0]
    ChunkedPrefill(olmoe, CHUNK, LENGTH)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(olmoe(prompt(), **given)[0], expected)
    (said,) = [record.message for record in caplog.records if "runs whole" in record.message]
    assert reason in said


@torch.no_grad()
def test_generation_without_a_cache_goes_on_as_before(olmoe):
    expected = olmoe.generate(prompt(), use_cache=False, **GENERATE)
    ChunkedPrefill(olmoe, CHUNK, LENGTH)
    assert torch.equal(olmoe.generate(prompt(), use_cache=False, **GENERATE), expected)


@torch.no_grad()
def test_a_chunk_that_fails_leaves_the_next_forward_right_and_the_allocator_as_it_was(olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", 64)
    expected = olmoe(prompt()).logits
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    calls = []

    def fail(*_):
        calls.append(1)
        assert len(memory.LargeBlocks._threads) == 1
        if len(calls) == 3:
            raise RuntimeError("on purpose")

    olmoe.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        olmoe(prompt())
    assert not chunked._open
    assert not memory.LargeBlocks._threads
    torch.testing.assert_close(olmoe(prompt()).logits, expected, atol=1e-4, rtol=1e-4)
    assert not memory.LargeBlocks._threads


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "lfm2_moe"])
@pytest.mark.parametrize(
    "how",
    [
        {}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3},
        {"assistant_model": ...}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"inputs_embeds": ...},
    ],
    ids=lambda how: next(iter(how), "greedy"),
)  # fmt: skip
@torch.no_grad()
def test_every_way_to_generate_gives_the_same_tokens(how, name):
    model, draft, ids = build(name), build(name, seed=5), prompt(batch=1)
    options = {**GENERATE, "max_new_tokens": 12, "input_ids": ids, **how}
    if "assistant_model" in how:
        options["assistant_model"] = draft
    if "inputs_embeds" in how:
        del options["input_ids"]
        options["inputs_embeds"] = model.get_input_embeddings()(ids)
    torch.manual_seed(0)
    expected = model.generate(**options)
    for each in (model, draft):
        ChunkedPrefill(each, CHUNK, 16)  # room that has to grow
    torch.manual_seed(0)
    assert torch.equal(model.generate(**options), expected)


def _clean(chunked):
    return not (chunked._open or memory.LargeBlocks._threads or memory.LargeBlocks._large)


@pytest.mark.parametrize("opcodes", [False, True])
@torch.no_grad()
def test_an_interrupt_at_any_moment_leaves_the_next_forward_right(opcodes, olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", 64)
    # At the bytecodes before a `with` lets it go Python takes no signal; one that comes there all the same keeps it.
    monkeypatch.setattr(memory.LargeBlocks, "_lock", threading.RLock())
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    expected = olmoe(prompt()).logits
    rooms = ("seam/prefill.py", "seam/kv_room.py", "memory.py")
    at = 0
    while interrupted(lambda: olmoe(prompt()), at, rooms, opcodes=opcodes):
        assert torch.equal(olmoe(prompt()).logits, expected)
        assert _clean(chunked)
        at += 97 if opcodes else 11
    assert at > 400
    chunked.remove()
    assert not olmoe._forward_hooks


@torch.no_grad()
def test_what_an_interrupt_left_goes_with_the_hooks(olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", 64)
    whole = olmoe(prompt()).logits
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)

    def interrupt(_, args):
        if args[0].shape[1] == LENGTH % CHUNK:  # of the last chunk, when logits of the others are kept
            raise KeyboardInterrupt

    hook = olmoe.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        olmoe(prompt())
    assert chunked._open
    hook.remove()
    chunked.remove()
    assert _clean(chunked)
    assert not olmoe._forward_hooks
    assert torch.equal(olmoe(prompt()).logits, whole)


@torch.no_grad()
def test_a_thread_that_ended_in_a_forward_holds_nothing_for_others(olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", 64)
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    expected = olmoe(prompt()).logits
    hook = olmoe.lm_head.register_forward_pre_hook(lambda _, args: sys.exit() if args[0].shape[1] < CHUNK else None)

    def run():
        with torch.no_grad(), pytest.raises(SystemExit):
            olmoe(prompt())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    hook.remove()
    assert chunked._open.keys() == memory.LargeBlocks._threads == {thread.ident}
    assert torch.equal(olmoe(prompt()).logits, expected)
    assert not memory.LargeBlocks._threads
    chunked._open[threading.get_ident()] = chunked._open.pop(thread.ident)  # as where its id is given to another
    assert olmoe(prompt(length=CHUNK)).logits.shape[1] == CHUNK
    assert _clean(chunked)


@torch.no_grad()
def test_hooks_that_are_removed_while_another_thread_runs_a_forward_let_it_end(olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", 64)
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    expected = olmoe(prompt()).logits

    def remove(_, args):
        if args[0].shape[1] == LENGTH % CHUNK:
            thread = threading.Thread(target=chunked.remove)
            thread.start()
            thread.join()

    olmoe.lm_head.register_forward_pre_hook(remove)
    assert torch.equal(olmoe(prompt()).logits, expected)
    assert _clean(chunked)
    assert not olmoe._forward_hooks
    assert not olmoe._forward_pre_hooks


def within(model, run, *, calls, layer=1):
    """`run` is called from a hook of a layer, in those of its calls; what it gives is in the list."""
    got, count = [], [0]

    def hook(*_):
        count[0] += 1
        if count[0] in calls and len(got) < len(calls):
            number = len(got)
            got.append(None)
            got[number] = run()

    model.model.layers[layer].register_forward_pre_hook(hook)
    return got


LAST = -(-LENGTH // CHUNK)  # calls of a layer, one a chunk
INNER = {
    "a token": lambda model: model(prompt(length=1, seed=7)),
    "a prompt in chunks": lambda model: model(prompt(seed=7)),
    "generate": lambda model: types.SimpleNamespace(logits=model.generate(prompt(seed=7), **GENERATE)),
    "positional and without a cache": lambda model: model(prompt(seed=7), use_cache=False),
}


@pytest.mark.parametrize("large", [1, 64, 512])
@pytest.mark.parametrize("call", [1, 2, LAST], ids=["first chunk", "second", "last"])
@pytest.mark.parametrize("inner", INNER)
@torch.no_grad()
def test_a_forward_within_a_chunk_of_another_leaves_each_its_rows(inner, call, large, olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", large)
    expected, expected_inner = olmoe(prompt()).logits, INNER[inner](olmoe).logits
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    got = within(olmoe, lambda: INNER[inner](olmoe), calls=[call])
    torch.testing.assert_close(olmoe(prompt()).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[0].logits, expected_inner, atol=1e-4, rtol=1e-4)
    assert _clean(chunked)


@torch.no_grad()
def test_a_forward_within_one_within_one_of_the_same_input_leaves_each_its_rows(olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", 64)
    ids = prompt()
    expected = olmoe(ids).logits
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    got = within(olmoe, lambda: olmoe(ids).logits, calls=[LAST, LAST + 1, LAST + 3])
    for each in (olmoe(input_ids=ids).logits, *got):
        torch.testing.assert_close(each, expected, atol=1e-4, rtol=1e-4)
    assert len(got) == 3 and _clean(chunked)


@pytest.mark.parametrize("call", [2, LAST])
@torch.no_grad()
def test_a_forward_with_the_very_input_of_a_chunk_is_not_taken_for_it(call, olmoe):
    expected = olmoe(prompt()).logits
    ChunkedPrefill(olmoe, CHUNK, LENGTH)
    seen = []
    olmoe.model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    got = within(olmoe, lambda: olmoe(input_ids=seen[-1]).logits, calls=[call])
    torch.testing.assert_close(olmoe(prompt()).logits, expected, atol=1e-4, rtol=1e-4)
    assert got[0].shape[1] == (CHUNK if call < LAST else LENGTH % CHUNK)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inner_length", [1, LENGTH])
@torch.no_grad()
def test_a_forward_that_ends_early_within_another_leaves_that_its_rows(inner_length, error, olmoe, monkeypatch):
    monkeypatch.setattr(prefill, "_LARGE", 64)
    expected = olmoe(prompt()).logits
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    fails = []

    def fail(*_):
        if fails:
            raise error

    olmoe.model.layers[0].register_forward_pre_hook(fail)

    def run():
        fails.append(1)
        with pytest.raises(error):
            olmoe(prompt(length=inner_length, seed=7))
        fails.clear()

    within(olmoe, run, calls=[LAST])
    torch.testing.assert_close(olmoe(prompt()).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(olmoe(prompt(length=1)).logits, olmoe(prompt(length=1)).logits) and _clean(chunked)


@pytest.mark.parametrize("call", [2, LAST])
@torch.no_grad()
def test_hooks_that_are_removed_within_a_forward_let_it_end(call, olmoe):
    expected = olmoe(prompt()).logits
    chunked = ChunkedPrefill(olmoe, CHUNK, LENGTH)
    within(olmoe, chunked.remove, calls=[call])
    torch.testing.assert_close(olmoe(prompt()).logits, expected, atol=1e-4, rtol=1e-4)
    assert _clean(chunked)
    assert not olmoe._forward_hooks and not olmoe._forward_pre_hooks


def test_decode_after_chunks_is_bit_identical_between_budgets(checkpoint):
    ids = prompt(batch=1)
    seen = []
    for share in (0.25, 0.5, 1.0):
        with emoe.from_pretrained(checkpoint("olmoe"), memory_budget=share, prefill_chunk=CHUNK).emoe as runtime:
            assert runtime.plan.prefill_chunk == CHUNK
            output = runtime._model.generate(ids, output_logits=True, return_dict_in_generate=True, **GENERATE)
            seen.append(torch.cat(output.logits))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_a_model_under_emoe_answers_in_chunks_as_whole(name, checkpoint):
    ids, mask = padded(prompt(), 20)
    answers = []
    for chunk in (CHUNK, None, 0):
        model = emoe.from_pretrained(checkpoint(name), memory_budget=0.5, prefill_chunk=chunk, batch=2, context=64)
        answers.append(model.generate(ids, attention_mask=mask, **GENERATE))
        model.emoe.close()
        assert not model._forward_pre_hooks
        assert not model._forward_hooks
        assert model.generation_config.prefill_chunk_size is None
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_prompt_in_chunks_is_one_request(checkpoint):
    with emoe.from_pretrained(
        checkpoint("olmoe"), memory_budget=0.5, prefill_chunk=CHUNK, predictor="recent"
    ).emoe as runtime:
        for _ in range(3):
            runtime._model.generate(prompt(batch=1), **GENERATE)
        assert runtime.stats()["prediction"]["requests"] == 3


@pytest.mark.parametrize("name", WHOLE)
def test_a_family_that_begins_anew_is_planned_whole_and_refuses_a_number(name, checkpoint):
    plan = emoe.plan(checkpoint(name), 0.5, calibrate=False)
    assert plan.prefill_chunk is None
    assert any("prompts are computed whole" in note for note in plan.notes)
    with pytest.raises(ConfigError, match=r"prefill_chunk=7.*not known to go on"):
        emoe.plan(checkpoint(name), 0.5, calibrate=False, prefill_chunk=7)
