"""Every family that engines know runs the way the table says, and each request gets the tokens of `generate`."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as tf
from engines import PROMPTS, alone, together
from families import EXPERTS, INTERMEDIATE
from families import _config as config

from emoe.engine import trial
from emoe.engine.engine import Engine
from emoe.engine.families import KNOWN
from emoe.errors import UnsupportedModelError

_SPARSE = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16, "first_k_dense_replace": 1}
_HYBRID = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip


def _compressed():
    base = families.FAMILIES["deepseek_v4"]()
    layers = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    return type(base)(**{**base.to_dict(), "layer_types": layers})


# Beside those that emoe's own tests have: what attends to a choice of keys, and other states.
FAMILIES = {
    **families.FAMILIES,
    "deepseek_v32": config(tf.DeepseekV32Config, families._WIDE, families._MLA, families._GROUPS, _SPARSE),
    "glm_moe_dsa": config(
        tf.GlmMoeDsaConfig, families._WIDE, families._MLA, families._GROUPS, _SPARSE,
        n_group=1, mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "zaya": config(tf.ZayaConfig, families._WIDE, num_experts=EXPERTS, head_dim=16, num_experts_per_tok=1),
    "llama4_text": config(
        tf.Llama4TextConfig, intermediate_size=INTERMEDIATE, intermediate_size_mlp=96, num_local_experts=EXPERTS,
        num_experts_per_tok=1, head_dim=16, attention_chunk_size=16, interleave_moe_layer_step=1,
        no_rope_layers=[1, 0, 1],
    ),
    "granitemoehybrid": config(
        tf.GraniteMoeHybridConfig, _HYBRID, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS,
        shared_intermediate_size=32, layer_types=["mamba", "attention", "mamba"],
    ),
    "deepseek_v4_compressed": _compressed,
    # Its last two layers attend to the keys of others, through a mapping that layers share.
    "gemma4_shared": config(
        tf.Gemma4TextConfig, families._WIDE, num_hidden_layers=4, head_dim=16, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16, enable_moe_block=True,
        num_experts=EXPERTS, top_k_experts=families.TOP_K, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=families.VOCAB,
    ),
}  # fmt: skip
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


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()
    families.randomize(model)
    return model


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
