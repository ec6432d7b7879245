"""Caches with room give what Transformers' own give, and write no row that anybody may still look at."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from families import build
from test_prefill import CHUNK, LENGTH, prompt
from transformers.cache_utils import DynamicLayer

from emoe.seam.kv_room import RoomyLayer
from emoe.seam.prefill import ChunkedPrefill


@pytest.fixture
def olmoe():
    return build("olmoe")


def rows(count, seed=0):
    return torch.randn(2, 2, count, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_room_in_a_cache_survives_crops_and_replaced_tensors():
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        return torch.randn(2, 2, count, 4, generator=generator)

    plain, roomy = DynamicLayer(), RoomyLayer(DynamicLayer(), 8)
    for step, count in enumerate((3, 1, 5, 1, 2)):
        keys, values = rows(count), rows(count)
        for layer in (plain, roomy):
            layer.update(keys, values)
            if step == 1:
                layer.crop(-2)
            if step == 2:
                layer.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(roomy.keys, plain.keys)
        assert torch.equal(roomy.values, plain.values)
    assert roomy.get_seq_length() == plain.get_seq_length()


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
