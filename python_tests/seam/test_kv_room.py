"""Caches with room give what Transformers' own give, and write no row that anybody may still look at."""

from __future__ import annotations

import copy
import io
import pickle

import families
import pytest
import torch
from families import build
from test_prefill import CHUNK, LENGTH, prompt
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import emoe
from emoe.seam.kv_room import RoomyLayer, WindowLayer, with_room
from emoe.seam.prefill import ChunkedPrefill


@pytest.fixture
def olmoe():
    return build("olmoe")


def rows(count, seed=0):
    return torch.randn(2, 2, count, 4, generator=torch.Generator().manual_seed(seed))


def layers(kind, tokens):
    """A layer of Transformers, and one with room that was made from another."""
    make = DynamicLayer if kind == "all" else lambda: DynamicSlidingWindowLayer(7)
    return make(), with_room(make(), tokens)


def append(layer, keys, values):
    """By `update`, or by a row that is written and taken, where there is one to be had."""
    if keys.shape[2] > 1 or not layer.get_seq_length():
        return layer.update(keys, values)
    row = layer.next_row()
    for made, new in zip(row, (keys, values), strict=True):
        made[:, :, -1:] = new
    layer.take(*row)
    return row


WAYS = {
    "all": (RoomyLayer, RoomyLayer.update),
    "all, rows one by one": (RoomyLayer, append),
    "window": (WindowLayer, WindowLayer.update),
}


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("tokens", [4, 400])
@torch.no_grad()
def test_whatever_is_done_to_a_layer_it_holds_and_gives_what_transformers_own_does(kind, tokens):
    plain, roomy = layers(kind.partition(",")[0], tokens)
    made, way = WAYS[kind]
    assert type(roomy) is made
    steps = {
        2: lambda layer: layer.crop(-2),  # the window is not full yet
        4: lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        5: lambda layer: layer.batch_repeat_interleave(2),
        8: lambda layer: layer.batch_select_indices(torch.tensor([3, 0])),
        90: lambda layer: layer.reset(),
    }
    batch = {6: 4, 7: 4, 8: 4}
    for step, count in enumerate([3, 1, 2, 5, 1, 1, 90, 1, 2, *[1] * 150, 5, 80]):
        keys = torch.randn(batch.get(step, 2), 2, count, 4, generator=torch.Generator().manual_seed(step))
        values = torch.cat([keys, keys + 1], dim=-1)
        for mine, reference in zip(way(roomy, keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(mine, reference)
        for layer in (plain, roomy):
            steps.get(step, lambda layer: None)(layer)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(4) == plain.get_mask_sizes(4)
        if plain.keys is not None:
            assert torch.equal(roomy.keys, plain.keys)
            assert torch.equal(roomy.values, plain.values)


@torch.no_grad()
def test_a_window_that_records_its_past_is_cropped_to_it_as_transformers_own():
    plain, roomy = layers("window", 40)
    for layer in (plain, roomy):
        layer.activate_past_recording()
    for step, (count, removed) in enumerate(
        [(9, 0), (4, -3), (4, -4), (1, 0), (5, -1), (60, -2), (3, 0), (2, None)] * 3
    ):
        new = rows(count, step)
        for mine, reference in zip(roomy.update(new, new), plain.update(new, new), strict=True):
            assert torch.equal(mine, reference)
        if removed is not None:
            for layer in (plain, roomy):
                layer.crop(removed)
        assert torch.equal(roomy.keys, plain.keys)


class Stock(DynamicCache):
    """Of another class, and so left as it is."""


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "exaone_moe"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 8},
    ],
    ids=lambda how: next(iter(how), "greedy"),
)
def test_generate_gives_the_very_tokens_that_it_gives_with_joined_caches(family, how):
    model = build(family)
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        chunked = ChunkedPrefill(model, None, 24)
        cache = DynamicCache(config=model.config) if in_place else Stock(config=model.config)
        given = {"max_new_tokens": 30, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        ids = prompt(length=20)[: 1 if "prompt_lookup_num_tokens" in how else 2]
        found.append(model.generate(ids, past_key_values=cache, **given | how))
        chunked.remove()
        kinds = {type(layer) for layer in cache.layers}
        assert kinds <= ({RoomyLayer, WindowLayer} if in_place else {DynamicLayer, DynamicSlidingWindowLayer})
    assert torch.equal(found[0].sequences, found[1].sequences)
    for before, now in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(now, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "exaone_moe"])
@torch.no_grad()
def test_a_full_cache_takes_no_more_than_the_plan_leaves_for_it(family, tmp_path):
    families.save(family, tmp_path)
    model = emoe.from_pretrained(tmp_path, memory_budget=1.0, context=200, prefill_chunk=64)
    plan = model.emoe.plan
    cache = model(prompt(length=150)).past_key_values
    for _ in range(50):
        model(prompt(length=1), past_key_values=cache)
    taken = sum(layer.keys.untyped_storage().nbytes() * 2 for layer in cache.layers)
    assert plan.kv_bytes <= taken <= plan.kv_bytes + plan.activation_bytes
    windows = [layer for layer in cache.layers if type(layer) is WindowLayer]
    assert windows
    for layer in windows:
        assert (
            layer.keys.untyped_storage().nbytes() <= layer.keys.nbytes / layer.keys.shape[-2] * 2 * layer.sliding_window
        )
    model.emoe.close(restore=False)


@torch.no_grad()
def test_a_copy_of_a_cache_does_not_see_what_is_appended_to_the_other(olmoe):
    ChunkedPrefill(olmoe, CHUNK, LENGTH)
    cache = olmoe(prompt(length=20)).past_key_values
    twin = copy.deepcopy(cache)
    before = twin.layers[0].keys.clone()
    olmoe(prompt(length=5), past_key_values=cache)
    assert torch.equal(twin.layers[0].keys, before)
    olmoe(prompt(length=3, seed=5), past_key_values=twin)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (25, 23)


@torch.no_grad()
def test_a_view_that_is_kept_is_not_written_to_after_a_crop_or_a_reset():
    layer = RoomyLayer(DynamicLayer(), 16)
    layer.update(rows(5), rows(5, 1))
    kept = [(layer.keys, layer.keys.clone()), (layer.values, layer.values.clone())]
    layer.crop(-3)
    layer.update(rows(2, 2), rows(2, 3))
    layer.keys, layer.values = (view for view, _ in kept)  # back to where it was
    layer.update(rows(1, 4), rows(1, 5))
    layer.reset()
    layer.update(rows(4, 6), rows(4, 7))
    for view, before in kept:
        assert torch.equal(view, before)
    assert torch.equal(layer.keys, rows(4, 6))


@torch.no_grad()
def test_a_view_of_a_window_is_not_written_to_by_later_tokens():
    _, layer = layers("window", 400)
    kept = []
    for step in range(200):
        layer.update(rows(1, step), rows(1, -step))
        kept.append((layer.keys, layer.keys.clone(), layer.values, layer.values.clone()))
    for keys, copied_keys, values, copied_values in kept:
        assert torch.equal(keys, copied_keys)
        assert torch.equal(values, copied_values)


@torch.no_grad()
def test_a_copy_of_a_window_is_transformers_own_and_goes_on():
    plain, roomy = layers("window", 400)
    for layer in (plain, roomy):
        layer.update(rows(20), rows(20, 1))
    twin = copy.deepcopy(roomy)
    assert type(twin) is DynamicSlidingWindowLayer
    assert twin.keys.untyped_storage().nbytes() == twin.keys.numel() * 4
    for layer in (plain, twin):
        layer.update(rows(3, 2), rows(3, 3))
    assert torch.equal(twin.keys, plain.keys)
    assert twin.get_mask_sizes(1) == plain.get_mask_sizes(1)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_a_copy_is_a_layer_of_transformers_with_tensors_of_its_own(how):
    layer = RoomyLayer(DynamicLayer(), 4096)
    layer.update(rows(5), rows(5, 1))
    twin = how(layer)
    assert type(twin) is DynamicLayer
    assert twin.keys.untyped_storage().nbytes() == twin.keys.numel() * 4
    layer.update(rows(1, 2), rows(1, 3))
    twin.update(rows(2, 4), rows(2, 5))
    assert torch.equal(layer.keys, torch.cat([rows(5), rows(1, 2)], 2))
    assert torch.equal(twin.keys, torch.cat([rows(5), rows(2, 4)], 2))
    assert torch.equal(twin.values, torch.cat([rows(5, 1), rows(2, 5)], 2))


@torch.no_grad()
def test_a_saved_cache_has_the_size_of_its_tokens_and_goes_on(olmoe):
    ChunkedPrefill(olmoe, CHUNK, 4096)
    cache = olmoe(prompt(length=20)).past_key_values
    file = io.BytesIO()
    torch.save(cache, file)
    taken = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert taken < file.tell() < 2 * taken
    assert b"emoe" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    following = prompt(length=3, seed=5)
    expected = olmoe(following, past_key_values=cache).logits
    assert torch.equal(olmoe(following, past_key_values=loaded).logits, expected)
