"""Look-ahead scores what the next layer's own router would choose, for every kind of router."""

from __future__ import annotations

import families
import pytest
import torch

from emoe.errors import ConfigError
from emoe.routing import find_routers
from emoe.routing.look_ahead import LookAhead


@torch.no_grad()
def _seen_by_routers(model, tokens):
    """Of each layer with a rule: hidden states [T, H] that entered its router, and picks [T, K]."""
    seen = {}
    handles = [
        site.module.register_forward_hook(
            lambda _module, given, output, layer=site.layer: seen.update(
                {layer: (given[0].reshape(-1, given[0].shape[-1]), output[2].reshape(-1, output[2].shape[-1]))}
            )
        )
        for site in find_routers(model)
        if site.rule is not None
    ]
    vocab = model.config.get_text_config().vocab_size
    model(torch.randint(3, vocab, (1, tokens), generator=torch.Generator().manual_seed(5)))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_a_token_in_the_router_of_the_next_layer_gets_that_routers_picks(name):
    model = families.build(name)
    ahead = LookAhead.of(model)
    for layer, (hidden, picks) in _seen_by_routers(model, 6).items():
        if not layer:
            continue
        for row, chosen in zip(hidden, picks, strict=True):
            scores = ahead.next_layer(layer - 1, row)
            assert scores.shape == (families.EXPERTS,)
            best = torch.from_numpy(scores).topk(len(chosen)).indices
            assert set(best.tolist()) == set(chosen.tolist()), layer


def test_of_many_tokens_the_most_wanted_experts_come_first():
    model = families.build("qwen3_moe")
    hidden, picks = _seen_by_routers(model, 40)[1]
    scores = LookAhead.of(model).next_layer(0, hidden.reshape(4, 10, -1))
    wanted = torch.bincount(picks.reshape(-1), minlength=families.EXPERTS)
    assert wanted[scores.argmax()] >= wanted.sort(descending=True).values[1]


def test_looking_ahead_calls_no_hooks_and_leaves_no_gradient():
    model = families.build("qwen3_moe")
    calls = []
    for site in find_routers(model):
        site.module.register_forward_hook(lambda *_: calls.append(1))
    scores = LookAhead.of(model).next_layer(0, torch.randn(1, families.HIDDEN, requires_grad=True))
    assert scores.dtype.name == "float32"
    assert not calls


def test_the_last_layer_has_no_next():
    ahead = LookAhead.of(families.build("qwen3_moe"))
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        ahead.next_layer(1, torch.randn(1, families.HIDDEN))
