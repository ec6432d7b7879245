"""The config of a model that lies in a GGUF file: its metadata, put into the words of Transformers.

One function for each architecture, after what llama.cpp's converter writes (`conversion/*.py`) and what its model reads
(`src/models/*.cpp`). What a model is, is never taken from a default of Transformers: those are one checkpoint's values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emoe.errors import CheckpointError, UnsupportedModelError
from emoe.files.gguf import GgufHeader

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # ggml's expert_gating_func

# Keys that say nothing of the arithmetic, or what the tensors' shapes say as well.
_DESCRIPTIVE = {
    "vocab_size", "tensor_data_layout", "expert_shared_count", "expert_shared_feed_forward_length",
    "attention.value_length", "feed_forward_length", "expert_feed_forward_length", "rope.scaling.finetuned",
}  # fmt: skip
# Keys that change the arithmetic, and the value at which they do not; where a function below does not ask for one, any
# other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (SOFTMAX,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "nextn_predict_layers": (0,),
    "interleave_moe_layer_step": (1,),
    "leading_dense_block_count": (0,),
    "attention.sliding_window": (0,),
    "rope.scaling.alpha": (0.0,),
}


class Metadata:
    """What a file says of its architecture: `of["embedding_length"]` is the key `<architecture>.embedding_length`.

    Attributes:
        architecture: ggml's name of it.
        tensors: shapes of all tensors by name, of every part.
    """

    def __init__(self, headers: Sequence[GgufHeader]) -> None:
        self._header = headers[0]
        self.architecture = self.value("general.architecture", str)
        self.tensors = {name: each.shape for header in headers for name, each in header.tensors.items()}
        self._asked: set[str] = set()

    def error(self, why: str) -> CheckpointError:
        """A CheckpointError about the file's metadata."""
        return CheckpointError(f"{self._header.path}: {why}", file=self._header.path)

    def unsupported(self, why: str) -> UnsupportedModelError:
        """For what is no damage."""
        return UnsupportedModelError(
            f"{self._header.path} ({self.architecture}): {why}. With config= (a folder with config.json, or a config "
            "object) that of the file is not asked"
        )

    def value(self, key: str, *kinds: type, default: Any = None) -> Any:
        """The value of a whole key, of one of these types; CheckpointError where it is missing and has no default."""
        if key not in self._header.metadata:
            if default is None:
                raise self.error(f"its metadata lacks {key}, without which the model is not known; config= gives it")
            return default
        value = self._header.metadata[key]
        if kinds and type(value) not in kinds:
            raise self.error(f"{key} is {value!r:.80}, not of type {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    def key(self, key: str) -> str:
        """The whole key; from now on it counts as asked for."""
        self._asked.add(key)
        return f"{self.architecture}.{key}"

    def __getitem__(self, key: str) -> int:
        """A whole number of at least 1 that has to be there; one for all layers, where there is one for each."""
        return self._whole(key, self.value(self.key(key), int, list), 1)

    def get(self, key: str, default: int) -> int:
        """A whole number of at least 0."""
        return self._whole(key, self.value(self.key(key), int, list, default=default), 0)

    def _whole(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.unsupported(f"{self.key(key)} differs from layer to layer: {value!r:.80}")
            value = value[0]
        if type(value) is not int or not least <= value < 1 << 31:
            raise self.error(f"{self.key(key)} is {value!r:.80}, no whole number of at least {least}")
        return value

    def each(self, key: str, count: int) -> list[int]:
        """A whole number for each of `count` layers."""
        value = self.value(self.key(key), int, list)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or any(type(each) is not int or each < 0 for each in values):
            raise self.error(f"{self.key(key)} is {value!r:.80}, no list of {count} whole numbers")
        return values

    def number(self, key: str, default: float | None = None) -> float:
        """A float, as short as its 32 bits allow: 1e-5 and not 9.99999974e-06."""
        value = self.value(self.key(key), int, float, default=default)
        if not np.isfinite(value):
            raise self.error(f"{self.key(key)} is {value}")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or False."""
        return bool(self.value(self.key(key), bool, int, default=default))

    def word(self, key: str, default: str) -> str:
        """A text."""
        return str(self.value(self.key(key), str, default=default))

    def said_by_tensors(self, *keys: str) -> None:
        """Keys that count as asked for, since tensors or other keys say the same."""
        self._asked.update(keys)

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return self.key(key) in self._header.metadata

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of a tensor that has to be there."""
        if tensor not in self.tensors:
            raise CheckpointError(
                f"{self._header.path} and its parts hold no tensor {tensor}", file=self._header.path, tensor=tensor
            )
        return self.tensors[tensor]

    def token(self, which: str) -> int | None:
        """The id of a special token, None where the file names none."""
        value = self._header.metadata.get(f"tokenizer.ggml.{which}_token_id")
        return value if type(value) is int else None

    def require_all_known(self) -> None:
        """UnsupportedModelError where a key that changes the arithmetic was not asked for; call it last."""
        import gguf

        prefix = f"{self.architecture}."
        known = {
            value.partition(".")[2]
            for group in vars(gguf.Keys).values()
            if isinstance(group, type)
            for value in vars(group).values()
            if isinstance(value, str) and value.startswith("{arch}.")
        }
        for key, value in self._header.metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in self._asked or name in _DESCRIPTIVE or name not in known:
                continue
            if value not in _NEUTRAL.get(name, ()):
                raise self.unsupported(f"{key} is {value!r:.80}, which emoe does not know of this architecture")


def config_values(of: Metadata, architecture: Callable[[Metadata], dict[str, Any]]) -> dict[str, Any]:
    """Fields of the config of Transformers, `model_type` among them.

    Raises:
        CheckpointError: a key is missing or damaged; names it.
        UnsupportedModelError: the file asks for what emoe does not know of this architecture.
    """
    layers = of["block_count"]
    blocks = {int(found[1]) for name in of.tensors if (found := re.match(r"blk\.(\d+)\.", name))}
    if not set(range(layers - of.get("nextn_predict_layers", 0))) <= blocks <= set(range(layers)):
        raise of.error(
            f"{of.architecture}.block_count is {layers}, and its tensors are of {len(blocks)} blocks"
            + (f", the last one {max(blocks)}" if blocks else "")
        )
    values = architecture(of)
    of.require_all_known()
    return values


def _base(of: Metadata, *, partial: bool = False, head_dim: bool = True, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """What all decoders share.

    Args:
        partial: rotary embeddings may be of a part of a head.
        head_dim: the config has a size of a head of its own; else it is hidden_size / num_attention_heads.
        eps: what the config calls that of its norms.
    """
    hidden, heads = of["embedding_length"], of["attention.head_count"]
    head = of["attention.key_length"] if of.has("attention.key_length") else hidden // heads
    if of.get("attention.value_length", head) != head:
        raise of.unsupported("its values are of another size than its keys")
    if not head_dim and head * heads != hidden:
        raise of.unsupported(f"{heads} heads of {head} are not the {hidden} of a hidden state")
    return {
        **_shared(of, eps),
        **({"head_dim": head} if head_dim else {}),
        "rope_parameters": _rope(of, head, partial),
    }


def _shared(of: Metadata, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """What does not depend on sizes of heads."""
    return {
        **_tokens(of),
        "num_hidden_layers": of["block_count"] - of.get("nextn_predict_layers", 0),
        "num_attention_heads": of["attention.head_count"],
        eps: of.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(of, of.get("rope.dimension_count", 0), partial=False),
        "hidden_act": "silu",
    }


def _tokens(of: Metadata) -> dict[str, Any]:
    """Of the vocabulary and the hidden state."""
    end = list(dict.fromkeys(each for each in (of.token("eos"), of.token("eot"), of.token("eom")) if each is not None))
    return {
        "vocab_size": of.shape("token_embd.weight")[0],
        "hidden_size": of["embedding_length"],
        "max_position_embeddings": of["context_length"],
        "tie_word_embeddings": "output.weight" not in of.tensors,
        "bos_token_id": of.token("bos"),
        "eos_token_id": end[0] if len(end) == 1 else end or None,
        "pad_token_id": of.token("padding"),
    }


def _kv_heads(of: Metadata) -> dict[str, int]:
    return {"num_key_value_heads": of.get("attention.head_count_kv", of["attention.head_count"])}


def _rope(of: Metadata, head: int, partial: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": of.number("rope.freq_base", 10000.0)}
    rotated = of.get("rope.dimension_count", head)
    if partial:
        rope["partial_rotary_factor"] = rotated / head
    elif rotated != head:
        raise of.unsupported(f"{rotated} of the {head} values of a head are rotated, which this architecture does not")
    kind = of.word("rope.scaling.type", "linear")
    factor = of.number("rope.scaling.factor", 0.0) or of.number("rope.scale_linear", 0.0) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise of.unsupported(f"positions are scaled by {kind!r}; emoe knows none, linear, yarn")
    if of.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise of.unsupported("rope.scaling.yarn_ext_factor is not 1")
    if of.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise of.unsupported("rope.scaling.attn_factor is not 1")
    rope |= {"rope_type": "yarn", "factor": factor}
    rope["original_max_position_embeddings"] = of.get("rope.scaling.original_context_length", of["context_length"])
    optional = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    for key, name in optional.items():
        if of.has(f"rope.scaling.{key}"):
            rope[name] = of.number(f"rope.scaling.{key}")
    return rope


def _experts(of: Metadata, count: str, width: str | None) -> dict[str, int]:
    """Experts, those of a token and their width, under the config's names."""
    found = {count: of["expert_count"], "num_experts_per_tok": of["expert_used_count"]}
    if width is not None:
        found[width] = _width(of)
    return found


def _width(of: Metadata) -> int:
    """Of a routed expert; older files leave it to the tensors."""
    block = next(
        (name for name in of.tensors if re.search(r"ffn_((gate|up|gate_up)_exps|(gate|up)\.\d+)\.weight$", name)), ""
    )
    rows = of.shape(block or "blk.0.ffn_up_exps.weight")[-2] // (2 if "gate_up" in block else 1)
    if (said := of.get("expert_feed_forward_length", rows)) != rows:
        raise of.error(f"expert_feed_forward_length is {said}, experts have {rows} rows")
    return rows


def _gating(of: Metadata, only: int, default: int) -> None:
    names = {0: "none", SOFTMAX: "softmax", SIGMOID: "sigmoid", SOFTMAX_OF_CHOSEN: "softmax of the chosen"}
    if (found := of.get("expert_gating_func", default)) != only:
        raise of.unsupported(
            f"experts are chosen by {names.get(found, found)}; emoe knows {names[only]} of this architecture"
        )


def _scale(of: Metadata) -> float:
    """What outputs of experts are multiplied by; 0 stands for 1."""
    return of.number("expert_weights_scale", 1.0) or 1.0


def _groups(of: Metadata) -> dict[str, int]:
    count = of.get("expert_group_count", 1) or 1
    return {"n_group": count, "topk_group": of.get("expert_group_used_count", 1) or 1 if count > 1 else 1}


def _bias(of: Metadata, block: int = 0) -> bool:
    return f"blk.{block}.attn_q.bias" in of.tensors


def qwen3moe(of: Metadata) -> dict[str, Any]:
    """Weights of a token's experts are normed: llama.cpp does so, and all published models."""
    return {
        "model_type": "qwen3_moe",
        **_base(of),
        **_kv_heads(of),
        **_experts(of, "num_experts", "moe_intermediate_size"),
        "intermediate_size": of["feed_forward_length"],
        "attention_bias": _bias(of),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def qwen3vlmoe(of: Metadata) -> dict[str, Any]:
    """The text model of Qwen3-VL and Qwen3-Omni: with text alone all three positions of a token are one, its place.

    Which frequencies follow which position, and layers that images enter, are of images, which are in another file.
    """
    of.said_by_tensors("rope.dimension_sections", "n_deepstack_layers")
    return qwen3moe(of)


def qwen2moe(of: Metadata) -> dict[str, Any]:
    """Weights of a token's experts are not normed."""
    return {
        "model_type": "qwen2_moe",
        **_base(of, head_dim=False),
        **_kv_heads(of),
        **_experts(of, "num_experts", "moe_intermediate_size"),
        "intermediate_size": of["feed_forward_length"],
        "shared_expert_intermediate_size": of.shape("blk.0.ffn_gate_shexp.weight")[0],
        "qkv_bias": _bias(of),
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def olmoe(of: Metadata) -> dict[str, Any]:
    """Weights of a token's experts are not normed."""
    values = _base(of, head_dim=False)
    # The converter writes 1e-5 whatever the config says; published models have it.
    return {
        "model_type": "olmoe",
        **values,
        **_kv_heads(of),
        **_experts(of, "num_experts", None),
        "intermediate_size": _width(of),
        "clip_qkv": of.number("attention.clamp_kqv") if of.has("attention.clamp_kqv") else None,
        "attention_bias": _bias(of),
        "norm_topk_prob": False,
    }


def gpt_oss(of: Metadata) -> dict[str, Any]:
    """Every other layer attends to a window; corrections of yarn are not rounded, which files cannot say."""
    _gating(of, SOFTMAX_OF_CHOSEN, SOFTMAX_OF_CHOSEN)
    values = _base(of)
    layers = values["num_hidden_layers"]
    if values["rope_parameters"]["rope_type"] == "yarn":
        values["rope_parameters"]["truncate"] = False
    if of.get("attention.sliding_window_pattern", 2) != 2:
        raise of.unsupported("not every other layer attends to a window")
    return {
        "model_type": "gpt_oss",
        **values,
        **_kv_heads(of),
        **_experts(of, "num_local_experts", None),
        "intermediate_size": _width(of),
        "sliding_window": of["attention.sliding_window"],
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
        "attention_bias": True,
    }


def mixtral(of: Metadata) -> dict[str, Any]:
    """Architecture llama, with experts."""
    if not of.get("expert_count", 0):
        raise of.unsupported("it is dense: there are no experts to manage")
    return {
        "model_type": "mixtral",
        **_base(of),
        **_kv_heads(of),
        **_experts(of, "num_local_experts", None),
        "intermediate_size": _width(of),
        "sliding_window": None,
    }


def deepseek2(of: Metadata) -> dict[str, Any]:
    """DeepSeek V2 where experts are chosen by softmax, else V3 and those like it (R1, Kimi K2, GLM-4.7-Flash).

    Newer files hold `kv_b_proj` as two tensors, and sizes of heads under keys of their own.
    """
    heads, rotated = of["attention.head_count"], of["rope.dimension_count"]
    split = of.has("attention.key_length_mla")
    key, value = (of[f"attention.{each}_length" + ("_mla" if split else "")] for each in ("key", "value"))
    of.said_by_tensors("attention.key_length", "attention.head_count_kv")
    values = _shared(of)
    if of.has("rope.scaling.yarn_log_multiplier"):
        # The converter writes a tenth of mscale_all_dim; mscale is the same in all published models.
        both = round(10 * of.number("rope.scaling.yarn_log_multiplier"), 6)
        values["rope_parameters"] |= {"mscale": both, "mscale_all_dim": both}
    values |= {
        "num_key_value_heads": heads,
        **_experts(of, "n_routed_experts", "moe_intermediate_size"),
        "intermediate_size": of["feed_forward_length"],
        "first_k_dense_replace": of.get("leading_dense_block_count", 0),
        "n_shared_experts": of.get("expert_shared_count", 0),
        "routed_scaling_factor": _scale(of),
        "kv_lora_rank": of["attention.kv_lora_rank"],
        "q_lora_rank": of["attention.q_lora_rank"] if _any(of, r"blk\.\d+\.attn_q_a\.weight") else None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "attention_bias": False,
        **_groups(of),
    }
    if not of.has("expert_group_count") and values["n_routed_experts"] in (160, 256):
        raise of.unsupported(
            f"the published models of {values['n_routed_experts']} experts choose among groups of them, and the file "
            "was made before converters wrote expert_group_count"
        )
    normed = of.flag("expert_weights_norm", False)
    corrected = _any(of, r"blk\.\d+\.exp_probs_b\.bias")
    if of.get("expert_gating_func", SIGMOID if corrected else SOFTMAX) == SIGMOID:
        return {**values, "model_type": "deepseek_v3", "norm_topk_prob": normed, "num_mtp_layers": 0}
    _gating(of, SOFTMAX, SOFTMAX)
    if normed:
        raise of.unsupported("weights of experts chosen by softmax are normed")
    method = "group_limited_greedy" if values["n_group"] > 1 else "greedy"
    return {**values, "model_type": "deepseek_v2", "topk_method": method, "norm_topk_prob": False}


def glm4moe(of: Metadata) -> dict[str, Any]:
    """GLM-4.5 to 4.7 and Solar Open."""
    _gating(of, SIGMOID, SIGMOID)
    if of.has("rope.dimension_sections"):
        raise of.unsupported("it is the text part of a vision model")
    return {
        "model_type": "glm4_moe",
        **_base(of, partial=True),
        **_kv_heads(of),
        **_deepseek_like(of),
        **_groups(of),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in of.tensors,
        "attention_bias": _bias(of),
        "num_mtp_layers": 0,
    }


def dots1(of: Metadata) -> dict[str, Any]:
    """As DeepSeek V3 with ordinary attention."""
    values = _base(of)
    _gating(of, SIGMOID, 0)
    return {
        "model_type": "dots1",
        **values,
        **_kv_heads(of),
        **_deepseek_like(of),
        **_groups(of),
        "attention_bias": _bias(of),
        "sliding_window": None,
        "layer_types": ["full_attention"] * values["num_hidden_layers"],
    }


def _deepseek_like(of: Metadata) -> dict[str, Any]:
    dense = of.get("leading_dense_block_count", 0)
    experts = _experts(of, "n_routed_experts", "moe_intermediate_size")
    return {
        **experts,
        # Of dense layers; where there are none, a file may not say it.
        "intermediate_size": of["feed_forward_length"] if dense else experts["moe_intermediate_size"],
        "first_k_dense_replace": dense,
        "n_shared_experts": of["expert_shared_count"],
        "routed_scaling_factor": _scale(of),
        "norm_topk_prob": of.flag("expert_weights_norm", False),
    }


def ernie4_5_moe(of: Metadata) -> dict[str, Any]:
    """Weights of a token's experts are normed."""
    values = _base(of, head_dim=False)
    experts = _experts(of, "moe_num_experts", "moe_intermediate_size")
    shared = next((shape[0] for name, shape in of.tensors.items() if name.endswith("ffn_up_shexp.weight")), 0)
    return {
        "model_type": "ernie4_5_moe",
        **values,
        **_kv_heads(of),
        **experts,
        "moe_k": experts["num_experts_per_tok"],
        "intermediate_size": of["feed_forward_length"],
        "moe_num_shared_experts": shared // experts["moe_intermediate_size"],
        "moe_layer_start_index": of.get("leading_dense_block_count", 0),
        "moe_layer_end_index": -1,
        "moe_layer_interval": of.get("interleave_moe_layer_step", 1) or 1,
        "use_bias": _bias(of),
    }


def granitemoe(of: Metadata, rotated: bool = True) -> dict[str, Any]:
    """Granite 3; with a shared expert where the file has one."""
    values = _base(of, head_dim=False)
    head = values["hidden_size"] // values["num_attention_heads"]
    shared = next((shape[0] for name, shape in of.tensors.items() if name.endswith("ffn_up_shexp.weight")), None)
    if rotated and not of.flag("rope.scaling.finetuned", True):
        raise of.unsupported("positions are not rotated")
    return {
        "model_type": "granitemoe" if shared is None else "granitemoeshared",
        **values,
        **(_kv_heads(of) if rotated else {}),
        **_experts(of, "num_local_experts", None),
        "intermediate_size": _width(of),
        **({} if shared is None else {"shared_intermediate_size": shared}),
        "logits_scaling": of.number("logit_scale"),
        "residual_multiplier": of.number("residual_scale", 1.0) or 1.0,
        "embedding_multiplier": of.number("embedding_scale", 1.0) or 1.0,
        "attention_multiplier": of.number("attention.scale", 0.0) or head**-0.5,
        "attention_bias": _bias(of),
    }


def minimax_m2(of: Metadata) -> dict[str, Any]:
    """Weights of a token's experts are normed; the sigmoid of a router decides."""
    _gating(of, SIGMOID, 0)
    return {
        "model_type": "minimax_m2",
        **_base(of, partial=True),
        **_kv_heads(of),
        **_experts(of, "num_local_experts", None),
        "intermediate_size": _width(of),
    }


def lfm2moe(of: Metadata) -> dict[str, Any]:
    """Layers without heads for keys are convolutions."""
    _gating(of, SIGMOID, 0)
    values = _base(of, head_dim=False, eps="norm_eps")
    heads = of.each("attention.head_count_kv", values["num_hidden_layers"])
    if len(set(heads) - {0}) != 1:
        raise of.unsupported(f"heads for keys differ between layers of attention: {heads}")
    return {
        "model_type": "lfm2_moe",
        **values,
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if each else "conv" for each in heads],
        **_experts(of, "num_experts", "moe_intermediate_size"),
        "intermediate_size": of["feed_forward_length"],
        "num_dense_layers": of.get("leading_dense_block_count", 0),
        "conv_L_cache": of["shortconv.l_cache"],
        "conv_bias": _any(of, r"blk\.\d+\.shortconv\.in_proj\.bias"),
        "use_expert_bias": _any(of, r"blk\.\d+\.exp_probs_b\.bias"),
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def hunyuan_moe(of: Metadata) -> dict[str, Any]:
    """The base of its rotations is stored as it is after scaling."""
    experts = _experts(of, "num_experts", None)
    width = _width(of)
    of.said_by_tensors("rope.scaling.original_context_length")
    if of.shape("blk.0.ffn_up_shexp.weight")[0] != width:
        raise of.unsupported("its shared expert is not as wide as the others")
    return {
        "model_type": "hunyuan_v1_moe",
        **_base(of),
        **_kv_heads(of),
        "num_experts": experts["num_experts"],
        "moe_topk": experts["num_experts_per_tok"],
        "intermediate_size": width,
        "attention_bias": _bias(of),
    }


def exaone_moe(of: Metadata) -> dict[str, Any]:
    """Layers that attend to all positions do not rotate them."""
    _gating(of, SIGMOID, 0)
    values = _base(of)
    return {
        "model_type": "exaone_moe",
        **values,
        **_kv_heads(of),
        **_experts(of, "num_experts", "moe_intermediate_size"),
        "intermediate_size": of["feed_forward_length"],
        "mlp_layer_types": _sparse_after(of, values["num_hidden_layers"]),
        "num_shared_experts": of["expert_shared_count"],
        "routed_scaling_factor": _scale(of),
        "norm_topk_prob": of.flag("expert_weights_norm", False),
        **_groups(of),
        "sliding_window": of["attention.sliding_window"],
        "layer_types": _windows(of, values["num_hidden_layers"], 4),
    }


def afmoe(of: Metadata) -> dict[str, Any]:
    """Embeddings are scaled by the root of their size, as llama.cpp does and published models ask for."""
    _gating(of, SIGMOID, SIGMOID)
    values = _base(of)
    if not of.flag("expert_weights_norm", True):
        raise of.unsupported("weights of a token's experts are not normed")
    return {
        "model_type": "afmoe",
        **values,
        **_kv_heads(of),
        **_experts(of, "num_experts", "moe_intermediate_size"),
        "intermediate_size": of["feed_forward_length"],
        "num_dense_layers": of.get("leading_dense_block_count", 0),
        "num_shared_experts": of["expert_shared_count"],
        "route_scale": _scale(of),
        "sliding_window": of["attention.sliding_window"],
        "layer_types": _windows(of, values["num_hidden_layers"], 4),
        "mup_enabled": True,
        "attention_bias": _bias(of),
    }


def qwen3next(of: Metadata) -> dict[str, Any]:
    """Layers with a state in place of keys and values; Qwen3-Next norms the weights of a token's experts."""
    return {
        **_linear_attention(of),
        "model_type": "qwen3_next",
        "intermediate_size": of["feed_forward_length"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def qwen35moe(of: Metadata) -> dict[str, Any]:
    """Qwen3.5 and 3.6, the text model; its axes of rotation are one and the same for text."""
    values = _linear_attention(of)
    sections = of.value(of.key("rope.dimension_sections"), list)
    if len(sections) < 3 or any(type(each) is not int for each in sections):
        raise of.error(f"{of.key('rope.dimension_sections')} is {sections!r:.80}, not at least 3 whole numbers")
    values["rope_parameters"] |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    return {**values, "model_type": "qwen3_5_moe_text"}


def _linear_attention(of: Metadata) -> dict[str, Any]:
    values = _base(of, partial=True)
    heads = of["ssm.time_step_rank"]
    linear = [f"blk.{layer}.ssm_out.weight" in of.tensors for layer in range(values["num_hidden_layers"])]
    of.said_by_tensors("full_attention_interval")
    if of["ssm.inner_size"] % heads:
        raise of.error(f"{of.key('ssm.inner_size')} is no multiple of its {heads} heads")
    return {
        **values,
        **_kv_heads(of),
        **_experts(of, "num_experts", "moe_intermediate_size"),
        "shared_expert_intermediate_size": of.shape("blk.0.ffn_up_shexp.weight")[0],
        "layer_types": ["linear_attention" if each else "full_attention" for each in linear],
        "linear_conv_kernel_dim": of["ssm.conv_kernel"],
        "linear_key_head_dim": of["ssm.state_size"],
        "linear_value_head_dim": of["ssm.inner_size"] // heads,
        "linear_num_key_heads": of["ssm.group_count"],
        "linear_num_value_heads": heads,
        "attention_bias": _bias(of, linear.index(False) if False in linear else 0),
    }


def nemotron_h_moe(of: Metadata) -> dict[str, Any]:
    """Nemotron 3: a layer is attention, a state or experts, and positions are not rotated."""
    _gating(of, SIGMOID, SIGMOID)
    layers = of["block_count"] - of.get("nextn_predict_layers", 0)
    kinds = [_mixer(of, layer) for layer in range(layers)]
    of.said_by_tensors("rope.dimension_count")  # which nothing is rotated by
    eps = (
        "attention.layer_norm_rms_epsilon"
        if of.has("attention.layer_norm_rms_epsilon")
        else "attention.layer_norm_epsilon"
    )
    heads = of["ssm.time_step_rank"]
    return {
        "model_type": "nemotron_h",
        **_tokens(of),
        "layers_block_type": kinds,
        "layer_norm_epsilon": of.number(eps),
        "num_attention_heads": of["attention.head_count"],
        **_kv_heads_of_some(of, of["attention.key_length"]),
        "head_dim": of["attention.key_length"],
        **_experts(of, "n_routed_experts", "moe_intermediate_size"),
        "intermediate_size": max(of.each("feed_forward_length", of["block_count"])),
        "n_shared_experts": of["expert_shared_count"],
        "moe_shared_expert_intermediate_size": _rows(of, r"blk\.\d+\.ffn_up_shexp\.weight"),
        "moe_latent_size": of.get("moe_latent_size", 0) or None,
        "routed_scaling_factor": _scale(of),
        "norm_topk_prob": of.flag("expert_weights_norm", False),
        **_groups(of),
        "mamba_num_heads": heads,
        "mamba_head_dim": of["ssm.inner_size"] // heads,
        "ssm_state_size": of["ssm.state_size"],
        "n_groups": of["ssm.group_count"],
        "conv_kernel": of["ssm.conv_kernel"],
        "use_conv_bias": _any(of, r"blk\.\d+\.ssm_conv1d\.bias"),
        "attention_bias": _any(of, r"blk\.\d+\.attn_q\.bias"),
        "mlp_hidden_act": "relu2",
        "num_nextn_predict_layers": 0,
    }


def _mixer(of: Metadata, layer: int) -> str:
    for tensor, kind in (("ssm_out", "mamba"), ("attn_q", "attention"), ("ffn_gate_inp", "moe"), ("ffn_up", "mlp")):
        if f"blk.{layer}.{tensor}.weight" in of.tensors:
            return kind
    raise of.error(f"block {layer} is neither attention nor a state nor experts")


def granitehybrid(of: Metadata) -> dict[str, Any]:
    """Granite 4: attention in some layers, a state in the others."""
    if not of.get("expert_count", 0):
        raise of.unsupported("it is dense: there are no experts to manage")
    values = granitemoe(of, rotated=False)
    layers, heads = values["num_hidden_layers"], of["ssm.time_step_rank"]
    linear = [f"blk.{layer}.ssm_out.weight" in of.tensors for layer in range(layers)]
    return {
        **values,
        "model_type": "granitemoehybrid",
        **_kv_heads_of_some(of, values["hidden_size"] // values["num_attention_heads"]),
        "shared_intermediate_size": values.get("shared_intermediate_size", 0),
        "layer_types": ["mamba" if each else "attention" for each in linear],
        "position_embedding_type": "rope" if of.flag("rope.scaling.finetuned", False) else "nope",
        "mamba_n_heads": heads,
        "mamba_d_head": of["ssm.inner_size"] // heads,
        "mamba_expand": of["ssm.inner_size"] // values["hidden_size"],
        "mamba_d_state": of["ssm.state_size"],
        "mamba_n_groups": of["ssm.group_count"],
        "mamba_d_conv": of["ssm.conv_kernel"],
        "mamba_conv_bias": _any(of, r"blk\.\d+\.ssm_conv1d\.bias"),
        "mamba_proj_bias": _any(of, r"blk\.\d+\.ssm_in\.bias"),
    }


def jamba(of: Metadata) -> dict[str, Any]:
    """Attention and experts come at periods, and positions are not rotated."""
    layers, hidden = of["block_count"], of["embedding_length"]
    attention = [f"blk.{layer}.attn_q.weight" in of.tensors for layer in range(layers)]
    sparse = [f"blk.{layer}.ffn_gate_inp.weight" in of.tensors for layer in range(layers)]
    return {
        "model_type": "jamba",
        **_tokens(of),
        "num_hidden_layers": layers,
        "rms_norm_eps": of.number("attention.layer_norm_rms_epsilon"),
        "num_attention_heads": of["attention.head_count"],
        **_kv_heads_of_some(of, hidden // of["attention.head_count"]),
        **_experts(of, "num_experts", None),
        "intermediate_size": _width(of),
        **_period(of, "attn_layer", attention),
        **_period(of, "expert_layer", sparse),
        "mamba_d_conv": of["ssm.conv_kernel"],
        "mamba_d_state": of["ssm.state_size"],
        "mamba_dt_rank": of["ssm.time_step_rank"],
        "mamba_expand": of["ssm.inner_size"] // hidden,
        "mamba_conv_bias": _any(of, r"blk\.\d+\.ssm_conv1d\.bias"),
        "mamba_proj_bias": _any(of, r"blk\.\d+\.ssm_in\.bias"),
    }


def _period(of: Metadata, name: str, layers: list[bool]) -> dict[str, int]:
    """Which layers, as a config says it: one in so many."""
    first = layers.index(True) if True in layers else 0
    for period in range(first + 1, len(layers) + 1):
        if layers == [layer % period == first for layer in range(len(layers))]:
            return {f"{name}_period": period, f"{name}_offset": first}
    raise of.unsupported(f"its {name}s do not come at a period")


def _kv_heads_of_some(of: Metadata, head: int) -> dict[str, int]:
    """Where only some layers are attention, so that the file lists heads by layer: by their tensors."""
    of.said_by_tensors("attention.head_count_kv")
    return {"num_key_value_heads": _rows(of, r"blk\.\d+\.attn_k\.weight") // head}


def _rows(of: Metadata, pattern: str) -> int:
    """Of the tensors of such names."""
    name = next((name for name in of.tensors if re.fullmatch(pattern, name)), "")
    return of.shape(name or pattern)[0]


def _sparse_after(of: Metadata, layers: int) -> list[str]:
    """Which layers have experts: those after the first dense ones."""
    dense = of.get("leading_dense_block_count", 0)
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def _windows(of: Metadata, layers: int, every: int) -> list[str]:
    """What each layer attends to: a window, but the last of `every` all positions, where the file does not say."""
    key = "attention.sliding_window_pattern"
    said = of.value(of.key(key), int, list, default=every)
    if isinstance(said, list):
        if len(said) < layers or any(type(each) not in (bool, int) for each in said):
            raise of.error(f"{of.key(key)} is {said!r:.80}, no list of {layers} flags")
        windows = [bool(each) for each in said[:layers]]
    else:
        windows = [said == 0 or (layer + 1) % said != 0 for layer in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in windows]


def _any(of: Metadata, pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in of.tensors)
