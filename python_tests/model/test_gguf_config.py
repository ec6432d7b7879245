"""GGUF files of every architecture: config, names and values are those of the model that was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import gguf_models as gg
import pytest
import torch
import transformers as tf

import emoe
from emoe import errors
from emoe.model.config import read_config
from emoe.model.gguf_tensors import ARCHITECTURES
from emoe.seam import linear, load

E, WIDTH, TOP_K = families.EXPERTS, families.INTERMEDIATE, families.TOP_K
_WIDE, _MLA, _GROUPS = families._WIDE, families._MLA, families._GROUPS
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, and what its file's metadata says beyond `gguf_models.base`."""

    architecture: str
    config: Callable[[], Any]
    said: dict[str, Any]


def _case(architecture: str, cls: Any, *parts: Any, said: dict[str, Any], **own: Any) -> Case:
    return Case(architecture, families._config(cls, *parts, **own), {"expert_count": E, **said})


_MLA_KEYS = {
    "attention.head_count_kv": 1, "attention.kv_lora_rank": 16, "attention.key_length": 24,
    "attention.value_length": 16, "attention.key_length_mla": 24, "attention.value_length_mla": 16,
    "rope.dimension_count": 8, "expert_feed_forward_length": WIDTH, "expert_shared_count": 1,
    "leading_dense_block_count": 1, "vocab_size": 128,
}  # fmt: skip
_SHARED = {"expert_feed_forward_length": WIDTH, "expert_shared_count": 1, "leading_dense_block_count": 1}
_HEAD = {"attention.key_length": 16, "attention.value_length": 16}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_LINEAR_KEYS = {
    **_HEAD, "expert_feed_forward_length": WIDTH, "expert_shared_feed_forward_length": 32, "ssm.conv_kernel": 4,
    "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 64,
    "full_attention_interval": 2, "rope.dimension_count": 4,
}  # fmt: skip

CASES = {
    "qwen3moe": _case(
        "qwen3moe", tf.Qwen3MoeConfig, _WIDE, num_experts=E, head_dim=32, norm_topk_prob=True,
        said={"attention.key_length": 32, "attention.value_length": 32, "expert_feed_forward_length": WIDTH},
    ),
    "qwen3vlmoe": _case(
        "qwen3vlmoe", tf.Qwen3MoeConfig, _WIDE, num_experts=E, head_dim=32, norm_topk_prob=True,
        said={
            "attention.key_length": 32, "attention.value_length": 32, "expert_feed_forward_length": WIDTH,
            "rope.dimension_sections": [6, 5, 5, 0], "n_deepstack_layers": 3,
        },
    ),
    "qwen3moe_yarn": _case(
        "qwen3moe", tf.Qwen3MoeConfig, _WIDE, num_experts=E, head_dim=16, norm_topk_prob=True, rope_parameters=_YARN,
        said={**_HEAD, **_YARN_KEYS},  # older files do not say how wide an expert is
    ),
    "qwen2moe": _case(
        "qwen2moe", tf.Qwen2MoeConfig, _WIDE, num_experts=E, shared_expert_intermediate_size=32,
        said={"expert_feed_forward_length": WIDTH, "expert_shared_feed_forward_length": 32},
    ),
    "olmoe": _case("olmoe", tf.OlmoeConfig, intermediate_size=WIDTH, num_experts=E, said={}),
    "olmoe_tied": _case(
        "olmoe", tf.OlmoeConfig, intermediate_size=WIDTH, num_experts=E, tie_word_embeddings=True, said={}
    ),
    "gpt-oss": _case(
        "gpt-oss", tf.GptOssConfig, intermediate_size=WIDTH, num_local_experts=E, head_dim=16, sliding_window=16,
        said={
            **_HEAD, "attention.sliding_window": 16, "expert_feed_forward_length": WIDTH, "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        },
    ),
    "mixtral": _case(
        "llama", tf.MixtralConfig, intermediate_size=WIDTH, num_local_experts=E,
        said={"rope.dimension_count": 16, "vocab_size": 128},
    ),
    "deepseek_v2": _case(
        "deepseek2", tf.DeepseekV2Config, _WIDE, _MLA, _GROUPS, topk_group=..., n_group=..., first_k_dense_replace=1,
        said={**_MLA_KEYS, "attention.q_lora_rank": 32, "expert_weights_scale": 1.0},
    ),
    "deepseek_v2_lite": _case(
        "deepseek2", tf.DeepseekV2Config, _WIDE, _MLA, _GROUPS, topk_group=..., n_group=..., first_k_dense_replace=1,
        q_lora_rank=None, rope_parameters={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        said={**_MLA_KEYS, **_YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.0707},
    ),
    "deepseek_v3": _case(
        "deepseek2", tf.DeepseekV3Config, _WIDE, _MLA, _GROUPS, first_k_dense_replace=1, routed_scaling_factor=2.5,
        said={
            **_MLA_KEYS, "attention.q_lora_rank": 32, "expert_weights_scale": 2.5, "expert_weights_norm": True,
            "expert_gating_func": 2, "expert_group_count": 2, "expert_group_used_count": 1,
        },
    ),
    "glm4moe": _case(
        "glm4moe", tf.Glm4MoeConfig, _WIDE, _GROUPS, n_group=1, topk_group=1, head_dim=16, first_k_dense_replace=1,
        use_qk_norm=True, attention_bias=True,
        said={
            **_HEAD, **_SHARED, "rope.dimension_count": 8, "expert_gating_func": 2, "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
        },
    ),
    "dots1": _case(
        "dots1", tf.Dots1Config, _WIDE, _GROUPS, n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=16,
        norm_topk_prob=True, routed_scaling_factor=1.5,
        said={
            **_HEAD, **_SHARED, "expert_gating_func": 2, "expert_weights_scale": 1.5, "expert_weights_norm": True,
        },
    ),
    "ernie4_5-moe": _case(
        "ernie4_5-moe", tf.Ernie4_5_MoeConfig, _WIDE, moe_k=TOP_K, moe_num_experts=E, moe_num_shared_experts=2,
        moe_layer_start_index=1, tie_word_embeddings=True, num_experts_per_tok=TOP_K,
        said={**_SHARED, "expert_shared_count": 2, "interleave_moe_layer_step": 1},
    ),
    "granitemoe": _case(
        "granitemoe", tf.GraniteMoeConfig, intermediate_size=WIDTH, num_local_experts=E, logits_scaling=6.0,
        residual_multiplier=0.25, embedding_multiplier=12.0, attention_multiplier=0.125,
        said={
            "logit_scale": 6.0, "residual_scale": 0.25, "embedding_scale": 12.0, "attention.scale": 0.125,
            "rope.dimension_count": 16,
        },
    ),
    "granitemoeshared": _case(
        "granitemoe", tf.GraniteMoeSharedConfig, intermediate_size=WIDTH, num_local_experts=E,
        shared_intermediate_size=32, logits_scaling=2.0, attention_multiplier=0.25, tie_word_embeddings=True,
        said={"logit_scale": 2.0, "expert_shared_feed_forward_length": 32},
    ),
    "minimax-m2": _case(
        "minimax-m2", tf.MiniMaxM2Config, intermediate_size=WIDTH, num_local_experts=E, head_dim=16, rotary_dim=8,
        said={**_HEAD, "rope.dimension_count": 8, "expert_gating_func": 2, "expert_feed_forward_length": WIDTH},
    ),
    "lfm2moe": _case(
        "lfm2moe", tf.Lfm2MoeConfig, _WIDE, num_experts=E, num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"],
        said={
            "attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3, "leading_dense_block_count": 1,
            "expert_gating_func": 2, "expert_feed_forward_length": WIDTH, "vocab_size": 128,
        },
    ),
    "hunyuan-moe": _case(
        "hunyuan-moe", tf.HunYuanMoEV1Config, intermediate_size=WIDTH, num_experts=E, moe_topk=TOP_K, head_dim=16,
        said={
            **_HEAD, "expert_feed_forward_length": WIDTH, "expert_shared_feed_forward_length": WIDTH,
            "expert_shared_count": 1, "rope.scaling.type": "none", "rope.scaling.factor": 1.0,
            "rope.scaling.original_context_length": 262144,
        },
    ),
    "exaone-moe": _case(
        "exaone-moe", tf.ExaoneMoeConfig, _WIDE, num_experts=E, num_shared_experts=1, sliding_window=16, head_dim=16,
        num_hidden_layers=5, n_group=1, topk_group=1,
        said={
            **_HEAD, **_SHARED, "attention.sliding_window": 16, "expert_gating_func": 2, "expert_weights_scale": 2.5,
            "expert_weights_norm": True, "rope.scaling.type": "none", "nextn_predict_layers": 0,
            "attention.sliding_window_pattern": [True, True, True, False, True],
        },
    ),
    "afmoe": _case(
        "afmoe", tf.AfmoeConfig, _WIDE, num_experts=E, num_shared_experts=1, head_dim=16, sliding_window=16,
        num_hidden_layers=5, num_dense_layers=1, mup_enabled=True, route_scale=1.25,
        said={**_HEAD, **_SHARED, "attention.sliding_window": 16, "expert_weights_scale": 1.25,
              "expert_weights_norm": True, "expert_gating_func": 2},
    ),
    "nemotron_h_moe": _case(
        "nemotron_h_moe", tf.NemotronHConfig, _WIDE, _GROUPS, num_hidden_layers=..., head_dim=16, moe_latent_size=40,
        layers_block_type=["attention", "moe", "mamba", "moe"], moe_shared_expert_intermediate_size=32, n_groups=2,
        mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, chunk_size=16,
        said={
            **_HEAD, "attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": [2, 0, 0, 0],
            "feed_forward_length": [0, WIDTH, 0, WIDTH], "expert_shared_count": 1, "expert_weights_norm": True,
            "expert_weights_scale": 1.0, "expert_group_count": 2, "expert_group_used_count": 1, "moe_latent_size": 40,
            "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.group_count": 2, "ssm.inner_size": 64,
            "ssm.time_step_rank": 4, "rope.dimension_count": 16, "rope.scaling.finetuned": False,
        },
    ),
    "granitehybrid": _case(
        "granitehybrid", tf.GraniteMoeHybridConfig, intermediate_size=WIDTH, num_local_experts=E,
        shared_intermediate_size=32, layer_types=["mamba", "attention", "mamba"], mamba_n_heads=8, mamba_n_groups=1,
        mamba_d_state=16, mamba_d_head=16, mamba_expand=2, mamba_chunk_size=16, position_embedding_type="nope",
        logits_scaling=2.0, attention_multiplier=0.25,
        said={
            "attention.head_count_kv": [0, 2, 0], "logit_scale": 2.0, "attention.scale": 0.25, "ssm.conv_kernel": 4,
            "ssm.state_size": 16, "ssm.group_count": 1, "ssm.inner_size": 128, "ssm.time_step_rank": 8,
            "rope.dimension_count": 16, "rope.scaling.finetuned": False, "expert_shared_feed_forward_length": 32,
        },
    ),
    "jamba": _case(
        "jamba", tf.JambaConfig, num_hidden_layers=4, intermediate_size=WIDTH, num_experts=E, attn_layer_period=2,
        attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False,
        said={
            "attention.head_count_kv": [0, 2, 0, 2], "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.inner_size": 128,
            "ssm.time_step_rank": 4,
        },
    ),
    "qwen3next": _case(
        "qwen3next", tf.Qwen3NextConfig, _WIDE, _LINEAR, num_experts=E, shared_expert_intermediate_size=32, head_dim=16,
        said=_LINEAR_KEYS,
    ),
    "qwen35moe": _case(
        "qwen35moe", tf.Qwen3_5MoeTextConfig, _LINEAR, moe_intermediate_size=WIDTH, num_experts=E,
        shared_expert_intermediate_size=32, head_dim=16,
        said={**_LINEAR_KEYS, "rope.dimension_sections": [1, 1, 0, 0]},
    ),
}  # fmt: skip


def build(config: Any) -> Any:
    """A model with random weights; norms too, which tell a shift of one."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    families.randomize(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def write(case: Case, folder: Path, model: Any = None, **kwargs: Any) -> tuple[Any, Path]:
    """(the model, its file)"""
    model = model or build(case.config())
    tensors = gg.arrays(model, case.architecture)
    said = {**gg.base(model.config), **case.said}
    return model, gg.write(folder / "model.gguf", case.architecture, tensors, said, **kwargs)


def logits(model: Any) -> torch.Tensor:
    """[2, 40, vocabulary] float32"""
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids).logits.float()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def whole(path: Path, **kwargs: Any) -> Any:
    """The model of a checkpoint with its experts back in memory."""
    model, store = load.load_without_experts(path, dtype=torch.float32, **kwargs)
    load.attach_experts(model, store)
    store.close()
    return model


def test_every_architecture_of_the_table_has_a_case():
    assert {case.architecture for case in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_config_and_the_logits_of_its_model(name, tmp_path):
    model, path = write(CASES[name], tmp_path)
    got = whole(path)
    assert type(got) is type(model)
    assert difference(logits(got), logits(model)) < 1e-5
    said, own = got.config.to_dict(), model.config.to_dict()
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
    ):
        assert said.get(key) == own.get(key), key


@pytest.mark.parametrize("name", CASES)
def test_no_architecture_takes_a_choice_of_experts_that_is_not_its_own(name, tmp_path):
    case, taken = CASES[name], []
    for gating in (1, 2, 3):
        path = write(Case(case.architecture, case.config, {**case.said, "expert_gating_func": gating}), tmp_path)[1]
        try:
            read_config(path, {})
        except errors.UnsupportedModelError as error:
            assert "expert_gating_func" in str(error) or " chosen by " in str(error)
        else:
            taken.append(gating)
    assert len(taken) == 1 or (case.architecture == "deepseek2" and taken == [1, 2])


def test_the_text_model_of_qwen3_vl_is_qwen3_moe():
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": WIDTH, "head_dim": 32,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": E,
        "num_experts_per_tok": TOP_K,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**sizes, "rope_parameters": {**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}
    torch.manual_seed(0)
    both = tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(text_config=text)).eval()
    alone = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes, rope_parameters=rope, norm_topk_prob=True)).eval()
    named = {name.replace("language_model.", ""): value for name, value in both.state_dict().items()}
    alone.load_state_dict({name: named[name] for name in alone.state_dict()})
    assert difference(logits(alone), logits(both)) < 1e-5


def _qwen3moe(folder: Path, **said: Any) -> Path:
    case = CASES["qwen3moe"]
    metadata = {key: value for key, value in {**case.said, **said}.items() if value is not None}
    return write(Case(case.architecture, case.config, metadata), folder)[1]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("expert_weights_scale", 2.5, r"expert_weights_scale is 2\.5, which emoe does not know"),
        ("expert_gating_func", 2, "expert_gating_func is 2, which emoe does not know"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping is 30"),
        ("attention.sliding_window", 4096, "attention.sliding_window is 4096"),
        ("rope.scaling.type", "longrope", "positions are scaled by 'longrope'; emoe knows none, linear, yarn"),
        ("rope.dimension_count", 16, "16 of the 32 values of a head are rotated"),
        ("attention.value_length", 16, "values are of another size than its keys"),
    ],
)
def test_what_the_arithmetic_of_an_architecture_does_not_know_is_refused_by_its_key(key, value, said, tmp_path):
    path = _qwen3moe(tmp_path, **{key: value})
    for call in (emoe.plan, emoe.from_pretrained):
        with pytest.raises(errors.UnsupportedModelError, match=said):
            call(path, memory_budget=0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("expert_weights_scale", 1.0), ("expert_group_count", 1), ("expert_gating_func", 1), ("attention.causal", True),
     ("rope.scaling.type", "none"), ("vocab_size", 128), ("expert_shared_count", 0), ("nobody.knows", 3)],
)  # fmt: skip
def test_keys_that_change_nothing_are_taken(key, value, tmp_path):
    assert read_config(_qwen3moe(tmp_path, **{key: value}), {})[0].num_experts == E


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("expert_count", None, r"lacks qwen3moe\.expert_count.*config="),
        ("block_count", 4, r"block_count is 4, and its tensors are of 3 blocks"),
        ("block_count", 2, r"block_count is 2, and its tensors are of 3 blocks"),
        ("attention.head_count", 0, r"attention\.head_count is 0, no whole number of at least 1"),
        ("attention.head_count", "four", r"attention\.head_count is 'four', not of type int"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan"),
        ("expert_feed_forward_length", 64, f"expert_feed_forward_length is 64, experts have {WIDTH} rows"),
        ("embedding_length", 128, "has not the shape"),
        ("expert_used_count", 9, "num_experts_per_tok=9"),
    ],
)
def test_damaged_or_missing_metadata_is_an_error_that_names_the_key(key, value, said, tmp_path):
    path = _qwen3moe(tmp_path, **{key: value})
    with pytest.raises((errors.CheckpointError, errors.ConfigError), match=said):
        emoe.from_pretrained(path, memory_budget=0.5)


def test_an_unknown_architecture_is_refused_with_those_that_work(tmp_path):
    path = gg.write(tmp_path / "m.gguf", "arctic", {"token_embd.weight": torch.zeros(4, 32)}, {"block_count": 1})
    with pytest.raises(errors.UnsupportedModelError, match=r"architecture 'arctic'.*deepseek2, .*qwen3moe"):
        emoe.plan(path)


def test_a_dense_model_of_a_known_architecture_is_refused(tmp_path):
    config = families._config(tf.LlamaConfig, intermediate_size=96, num_experts_per_tok=...)()
    tensors = gg.arrays(build(config), "llama")
    metadata = gg.base(config.__class__(**config.to_dict(), num_experts_per_tok=0))
    with pytest.raises(errors.UnsupportedModelError, match="it is dense"):
        emoe.plan(gg.write(tmp_path / "m.gguf", "llama", tensors, metadata))


def test_values_of_the_config_and_a_config_of_ones_own_win(tmp_path):
    model, path = write(CASES["qwen3moe"], tmp_path)
    assert read_config(path, {"rms_norm_eps": 0.5})[0].rms_norm_eps == 0.5
    assert len(load.load_without_experts(path, num_hidden_layers=2)[1].layers) == 2
    with pytest.raises(errors.ConfigError, match="num_hiden_layers"):
        read_config(path, {"num_hiden_layers": 2})
    model.config.rms_norm_eps = 0.25
    model.config.save_pretrained(tmp_path / "own")
    for config in (model.config, tmp_path / "own"):
        assert whole(path, config=config).config.rms_norm_eps == 0.25


def test_a_config_of_ones_own_serves_where_that_of_the_file_is_refused(tmp_path):
    model, _ = write(CASES["qwen3moe"], tmp_path)
    path = _qwen3moe(tmp_path, final_logit_softcapping=30.0, expert_count=None)
    assert difference(logits(whole(path, config=model.config)), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("kinds", "dtype"), [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("Q8_0", "bfloat16")]
)
def test_a_model_runs_in_the_dtype_that_its_file_is_in(kinds, dtype, tmp_path):
    model, path = write(
        CASES["qwen3moe"],
        tmp_path,
        kinds=lambda name: "F32" if "norm" in name or ("ffn_down" in name and kinds == "Q8_0") else kinds,
    )
    assert str(load.load_without_experts(path)[0].dtype) == f"torch.{dtype}"
    assert emoe.plan(path, 0.5, calibrate=False).dtype == dtype
    model.config.dtype = None
    assert str(load.load_without_experts(path, config=model.config)[0].dtype) == f"torch.{dtype}"
    assert load.load_without_experts(path, dtype="float32")[0].dtype == torch.float32


def test_deepseek_files_that_hold_kv_b_whole_are_read(tmp_path):
    case = CASES["deepseek_v3"]
    model = build(case.config())
    tensors = gg.arrays(model, "deepseek2")
    for layer in range(3):
        del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
        kept = model.model.layers[layer].self_attn.kv_b_proj.weight.detach()
        tensors[f"blk.{layer}.attn_kv_b.weight"] = kept.clone()
    said = {key: value for key, value in case.said.items() if not key.endswith("_mla")}
    said |= {"attention.key_length": 24, "attention.value_length": 16, "attention.head_count_kv": 4}
    path = gg.write(tmp_path / "m.gguf", "deepseek2", tensors, {**gg.base(model.config), **said})
    assert difference(logits(whole(path)), logits(model)) < 1e-5


def test_deepseek_files_without_groups_are_refused_where_the_published_models_have_them(tmp_path):
    case = CASES["deepseek_v3"]
    said = {key: value for key, value in case.said.items() if "group" not in key}
    path = write(Case("deepseek2", case.config, {**said, "expert_count": 256}), tmp_path)[1]
    with pytest.raises(errors.UnsupportedModelError, match="expert_group_count"):
        emoe.plan(path)


def test_layers_that_only_predict_further_tokens_are_left_out(tmp_path):
    case = CASES["glm4moe"]
    model = build(case.config())
    tensors = gg.arrays(model, "glm4moe")
    tensors |= {name.replace("blk.2.", "blk.3."): value for name, value in tensors.items() if name.startswith("blk.2.")}
    tensors["blk.3.nextn.eh_proj.weight"] = torch.zeros(64, 128)
    said = {**gg.base(model.config), **case.said, "block_count": 4, "nextn_predict_layers": 1}
    path = gg.write(tmp_path / "m.gguf", "glm4moe", tensors, said)
    assert difference(logits(whole(path)), logits(model)) < 1e-5


# What stays in the tensors of its file although rows change places or tensors are put together.
REARRANGED = {
    "mixtral": ["self_attn.q_proj", "self_attn.k_proj"],
    "granitemoe": ["self_attn.q_proj", "self_attn.k_proj"],
    "qwen3next": ["linear_attn.in_proj_qkvz"],
    "qwen35moe": ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"],
}


@pytest.mark.parametrize("name", CASES)
def test_linear_layers_stay_in_the_blocks_of_the_file_with_rows_in_the_models_order(name, tmp_path):
    model = build(CASES[name].config())
    shapes = {key: value.shape for key, value in gg.arrays(model, CASES[name].architecture).items()}

    def kinds(tensor: str) -> str:
        plain = any(word in tensor for word in ("norm", "conv", "gate_inp", "ssm_a", "ssm_d", "exps"))
        return "F32" if plain or len(shapes[tensor]) != 2 or shapes[tensor][1] % 32 else "Q8_0"

    _, path = write(CASES[name], tmp_path, model, kinds=kinds)
    decoded, kept = whole(path), whole(path, dense=linear.Dense(linear.decode_and_multiply))
    found = linear.encoded_weights(kept)
    assert any("attn" in each or "mixer" in each or "mamba" in each for each in found)
    for each, (_, weight) in found.items():
        assert torch.equal(weight.numbers(), decoded.get_parameter(f"{each}.weight")), each
    assert difference(logits(kept), logits(decoded)) < 1e-5
    for each in REARRANGED.get(name, ()):
        assert any(path.endswith(each) for path in found), each
    in_plan = emoe.plan(path, calibrate=False, dtype="float32").non_expert_bytes
    elsewhere = [
        each for part, module in kept.named_modules() if ".experts" in f".{part}" for each in module.parameters()
    ]
    left_out = {id(each) for each in (*elsewhere, *(weight for _, weight in found.values()))}
    plain = [each for each in (*kept.parameters(), *kept.buffers()) if id(each) not in left_out]
    assert in_plan == linear.held_bytes(kept) + sum(each.numel() * each.dtype.itemsize for each in plain)
