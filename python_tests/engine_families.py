"""Models of every family that the engine's tests run: those of emoe's other tests, and some beside them."""

from __future__ import annotations

import families
import torch
import transformers as tf
from families import EXPERTS, INTERMEDIATE
from families import _config as config

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


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()
    families.randomize(model)
    return model
