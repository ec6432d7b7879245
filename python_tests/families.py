"""Tiny random models of many Mixture-of-Experts families, for tests. No download, no real weights.

`FAMILIES[name]()` is a config, `build(name)` a causal language model with random weights, `save(name, folder)` its
checkpoint as Transformers writes it. Weights are scaled to their fan-in, so that logits are of order one and routing
spreads over all experts; biases and router corrections are not zero, so that forgetting one shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB = 128
HIDDEN = 64
INTERMEDIATE = 48  # of one routed expert
EXPERTS = 8
TOP_K = 3

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": TOP_K,
}
_WIDE = {"intermediate_size": 96, "moe_intermediate_size": INTERMEDIATE}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_GROUPS = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}


def _config(cls: type[tf.PretrainedConfig], *parts: dict[str, Any], **own: Any) -> Callable[[], tf.PretrainedConfig]:
    """A factory, so that every caller gets a config of its own; later arguments win over earlier ones."""

    def make() -> tf.PretrainedConfig:
        merged: dict[str, Any] = dict(_BASE)
        for part in (*parts, own):
            merged.update(part)
        return cls(**{key: value for key, value in merged.items() if value is not ...})

    return make


FAMILIES: dict[str, Callable[[], tf.PretrainedConfig]] = {
    # plain [gate; up] layout; what differs is the router, what surrounds the experts, and the names on disk
    "mixtral": _config(tf.MixtralConfig, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
    "olmoe": _config(tf.OlmoeConfig, intermediate_size=INTERMEDIATE, num_experts=EXPERTS, tie_word_embeddings=True),
    "flex_olmo": _config(tf.FlexOlmoConfig, intermediate_size=INTERMEDIATE, num_experts=EXPERTS),
    "qwen2_moe": _config(tf.Qwen2MoeConfig, _WIDE, num_experts=EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": _config(tf.Qwen3MoeConfig, _WIDE, num_experts=EXPERTS, head_dim=16, mlp_only_layers=[0]),
    "qwen3_next": _config(
        tf.Qwen3NextConfig,
        _WIDE,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=32,
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "deepseek_v2": _config(
        tf.DeepseekV2Config, _WIDE, _MLA, _GROUPS, topk_group=..., n_group=..., first_k_dense_replace=1
    ),
    "deepseek_v3": _config(tf.DeepseekV3Config, _WIDE, _MLA, _GROUPS, first_k_dense_replace=1),
    "dots1": _config(tf.Dots1Config, _WIDE, _GROUPS, first_k_dense_replace=1),
    "glm4_moe": _config(tf.Glm4MoeConfig, _WIDE, _GROUPS, head_dim=16, first_k_dense_replace=1),
    "glm4_moe_lite": _config(tf.Glm4MoeLiteConfig, _WIDE, _MLA, _GROUPS),
    "exaone_moe": _config(tf.ExaoneMoeConfig, _WIDE, num_experts=EXPERTS, num_shared_experts=1, sliding_window=16),
    "solar_open": _config(tf.SolarOpenConfig, _WIDE, _GROUPS, head_dim=16, intermediate_size=...),
    "afmoe": _config(tf.AfmoeConfig, _WIDE, num_experts=EXPERTS, num_shared_experts=1, head_dim=16, sliding_window=16),
    "ernie4_5_moe": _config(
        tf.Ernie4_5_MoeConfig,
        _WIDE,
        moe_k=TOP_K,
        moe_num_experts=EXPERTS,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        tie_word_embeddings=True,
    ),
    "hunyuan_v1_moe": _config(
        tf.HunYuanMoEV1Config, intermediate_size=INTERMEDIATE, num_experts=EXPERTS, moe_topk=TOP_K, head_dim=16
    ),
    "phimoe": _config(
        tf.PhimoeConfig, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, num_experts_per_tok=2
    ),
    "minimax": _config(
        tf.MiniMaxConfig,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        head_dim=16,
        block_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "minimax_m2": _config(tf.MiniMaxM2Config, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, head_dim=16),
    "jamba": _config(
        tf.JambaConfig,
        num_hidden_layers=4,
        intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "lfm2_moe": _config(
        tf.Lfm2MoeConfig,
        _WIDE,
        num_experts=EXPERTS,
        num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "granitemoe": _config(tf.GraniteMoeConfig, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
    "granitemoeshared": _config(
        tf.GraniteMoeSharedConfig,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        shared_intermediate_size=32,
    ),
    # other layouts and gates
    "aria_text": _config(
        tf.AriaTextConfig,
        intermediate_size=INTERMEDIATE,
        moe_num_experts=EXPERTS,
        moe_topk=TOP_K,
        moe_num_shared_experts=1,
    ),
    "gpt_oss": _config(
        tf.GptOssConfig, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, head_dim=16, sliding_window=16
    ),
    "nemotron_h": _config(
        tf.NemotronHConfig,
        _WIDE,
        _GROUPS,
        num_hidden_layers=...,
        layers_block_type=["attention", "moe", "mamba", "moe"],
        moe_shared_expert_intermediate_size=32,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=16,
    ),
    "nemotron_h_latent": _config(
        tf.NemotronHConfig,
        _WIDE,
        _GROUPS,
        num_hidden_layers=...,
        layers_block_type=["attention", "moe", "attention", "moe"],
        moe_shared_expert_intermediate_size=32,
        moe_latent_size=40,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=16,
    ),
    "minimax_m3_text": _config(
        tf.MiniMaxM3VLTextConfig,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        head_dim=16,
        rotary_dim=8,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention"] * 3,
        swiglu_limit=1.5,
    ),
    "hy_v4": _config(
        tf.HYV4Config,
        _WIDE,
        _MLA,
        _GROUPS,
        n_group=1,
        head_dim=24,
        mlp_layer_types=["dense", "sparse", "sparse"],
        index_topk=16,
        index_head_dim=16,
        index_n_heads=2,
        hc_mult=2,
        swiglu_limit=1.5,
    ),
    "deepseek_v4": _config(
        tf.DeepseekV4Config,
        moe_intermediate_size=INTERMEDIATE,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        hc_mult=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=16,
        sliding_window=16,
        swiglu_limit=1.5,
    ),
    "gemma4_text": _config(
        tf.Gemma4TextConfig,
        _WIDE,
        head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=16,
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=TOP_K,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB,
    ),
    "inkling2_text": _config(
        tf.Inkling2TextConfig,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        unpadded_vocab_size=VOCAB,
        head_dim=16,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        sliding_window_size=16,
        d_rel=8,
        rel_extent=64,
        n_layers_per_attn_res_block=2,
    ),
    "qwen3_5_moe_text": _config(
        tf.Qwen3_5MoeTextConfig,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=32,
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "beam": _config(
        tf.BeamConfig,
        _WIDE,
        num_experts=EXPERTS,
        head_dim=16,
        n_group=2,
        topk_group=1,
        sliding_window=16,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tf.PreTrainedModel:
    """A model of family `name` with random weights in `dtype`, in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=dtype).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Fresh values for projections, embeddings, experts, routers and biases; norms, state-space parts keep theirs."""
    generator = torch.Generator().manual_seed(seed)
    for parameter, std in _scales(model):
        values = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(values.to(parameter.dtype))
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # deepseek_v4 looks its first layers' experts up by token id
            table.copy_(torch.rand(len(table), EXPERTS, generator=generator).argsort(-1)[:, : table.shape[1]])


def _scales(model: nn.Module) -> Iterator[tuple[torch.Tensor, float]]:
    """(tensor, standard deviation) for every tensor to be filled, in a fixed order, tied tensors once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        experts = hasattr(module, "is_transposed")
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if experts and tensor.dim() == 3:
                yield tensor, 1 / math.sqrt(tensor.shape[1 if module.is_transposed else 2])
            elif (experts and "bias" in name) or (isinstance(module, nn.Linear) and name == "bias"):
                yield tensor, 0.2
            elif "correction" in name or name == "expert_bias":
                yield tensor, 0.05
            elif name == "weight" and leaf in ("gate", "router") and tensor.dim() == 2:
                yield tensor, 2 / math.sqrt(tensor.shape[1])
            elif isinstance(module, nn.Embedding):
                yield tensor, 0.25  # small, so that tied output embeddings give sensible logits too
            elif isinstance(module, nn.Linear):
                yield tensor, 1 / math.sqrt(tensor.shape[1])


def save(name: str, folder: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs: Any) -> Path:
    """Writes the checkpoint of `build(name, dtype, seed)` into `folder`; `kwargs` go to `save_pretrained`."""
    build(name, dtype, seed).save_pretrained(folder, **kwargs)
    return Path(folder)


class Checkpoints:
    """Checkpoints under one folder, each written on first use: `checkpoints(name, dtype)` is its path."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
        label = "-".join([name, str(dtype).removeprefix("torch."), *(f"{k}={v}" for k, v in sorted(kwargs.items()))])
        folder = self._root / label
        if not folder.exists():
            save(name, folder, dtype, **kwargs)
        return folder
