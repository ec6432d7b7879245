"""Every family that engines know runs the way the table says, and each request gets the tokens of `generate`."""

from __future__ import annotations

import pytest
import torch
from engine_families import FAMILIES, build
from engines import PROMPTS, alone, together

from emoe.engine import trial
from emoe.engine.engine import Engine
from emoe.engine.families import KNOWN
from emoe.errors import UnsupportedModelError

FORKED = (
    "deepseek_v32", "deepseek_v4_compressed", "gemma4_shared", "glm_moe_dsa", "granitemoehybrid", "hy_v4",
    "inkling2_text", "lfm2_moe", "llama4_text", "nemotron_h", "nemotron_h_latent", "qwen3_next", "qwen3_5_moe_text",
    "zaya",
)  # fmt: skip
WAYS = {
    **dict.fromkeys(FAMILIES, ("packed", False)),
    **dict.fromkeys(FORKED, ("forked", False)),
    "jamba": ("forked", True),
    "minimax": ("alone", True),
}


@pytest.mark.parametrize("family", WAYS)
def test_a_family_runs_the_fastest_right_way(family):
    model = build(family)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with Engine(model, chunk_rows=11, most_running=3) as engine:
        assert (engine.choice.way, engine.choice.whole) == WAYS[family]
        assert together(engine, PROMPTS) == expected
    kind = model.config.get_text_config(decoder=True).model_type
    assert family == "gemma4_shared" or KNOWN.get(kind, WAYS[family]) == WAYS[family]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen3_next", "deepseek_v32", "llama4_text"])
@pytest.mark.parametrize("way", ["packed", "forked", "alone"])
def test_every_way_that_a_family_runs_gives_the_same(family, way):
    model = build(family)
    if way == "packed" and WAYS[family][0] != "packed":
        with pytest.raises(UnsupportedModelError, match="packed"):
            Engine(model, way=way)
        return
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with Engine(model, chunk_rows=11, way=way) as engine:
        assert engine.choice.way == way
        assert together(engine, PROMPTS) == expected


def test_every_family_of_the_table_is_tried_here():
    tried = {make().get_text_config(decoder=True).model_type for make in FAMILIES.values()}
    assert set(KNOWN) - tried == {"qwen3_vl_moe_text"}  # test_images.py


@pytest.mark.parametrize("family", ["olmoe", "jamba", "minimax", "qwen3_next"])
def test_in_16_bits_the_table_says_how_a_family_runs(family):
    assert trial.choose(build(family, torch.bfloat16)).way == WAYS[family][0]
    assert trial.choose(build(family, torch.bfloat16)).whole == WAYS[family][1]


def test_in_16_bits_states_of_families_that_nobody_knows_get_whole_prompts(monkeypatch):
    monkeypatch.setattr(trial, "KNOWN", {})
    choice = trial.choose(build("qwen3_next", torch.bfloat16))
    assert choice.whole and choice.way in ("forked", "alone")
    assert not trial.choose(build("qwen3_next")).whole
    assert not trial.choose(build("olmoe", torch.bfloat16)).whole


def test_the_trial_finds_chunks_that_lose_a_state(monkeypatch):
    """What the table knows of jamba, found without it."""
    monkeypatch.setattr(trial, "KNOWN", {})
    choice = trial.choose(build("jamba"))
    assert (choice.way, choice.whole) == ("forked", True)
    assert "differ by" in choice.reasons["forked, chunks"]
