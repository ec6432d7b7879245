"""Writes models of tests as GGUF files, as llama.cpp's converter does (`conversion/*.py`). Shares no table with emoe.

Names go from a checkpoint's, as Transformers saves it, through the library's map; experts are stacked; what a converter
does to values is written down here once more.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

Arrays = dict[str, torch.Tensor]
_EXPERT = re.compile(r"(.*(?:experts))\.(\d+)\.(\w+)\.weight")


def halves_side_by_side(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`LlamaModel.permute`."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _permuted(name: str, value: torch.Tensor, config: Any) -> Arrays:
    for kind, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        if f"{kind}_proj." in name:
            value = halves_side_by_side(value, heads)
    return {name: value}


def _mla(name: str, value: torch.Tensor, config: Any) -> Arrays:
    if not name.endswith("kv_b_proj.weight"):
        return {name: value}
    nope, width = config.qk_nope_head_dim, config.v_head_dim
    heads = value.view(config.num_attention_heads, nope + width, -1)
    return {
        name.replace("kv_b", "k_b"): heads[:, :nope].transpose(1, 2).contiguous(),
        name.replace("kv_b", "v_b"): heads[:, nope:].contiguous(),
    }


def _granite(name: str, value: torch.Tensor, config: Any) -> Arrays:
    block = re.search(r"layers\.(\d+)\.", name)
    for ending, kinds in (
        ("block_sparse_moe.input_linear.weight", ("gate_exps", "up_exps")),
        ("shared_mlp.input_linear.weight", ("gate_shexp", "up_shexp")),
    ):
        if name.endswith(ending):
            halves = value.chunk(2, dim=-2)
            return {f"blk.{block[1]}.ffn_{kind}.weight": half for kind, half in zip(kinds, halves, strict=True)}
    return _permuted(name, value, config)


def _gpt_oss(name: str, value: torch.Tensor, config: Any) -> Arrays:
    if name.endswith("sinks"):
        return {f"{name}.weight": value}
    if not (found := re.fullmatch(r"(.*experts\.)(gate_up|down)_proj(_bias)?", name)):
        return {name: value}
    base, kind, bias = found.groups()
    value, suffix = (value, "bias") if bias else (value.mT, "weight")
    if kind == "down":
        return {f"{base}down_proj.{suffix}": value}
    return {f"{base}gate_proj.{suffix}": value[:, ::2], f"{base}up_proj.{suffix}": value[:, 1::2]}


def _conv(name: str, value: torch.Tensor, config: Any) -> Arrays:
    return {name.replace(".expert_bias", ".expert_bias.bias"): value.squeeze(1) if "conv.conv" in name else value}


def _tiled(value: torch.Tensor, config: Any, dim: int = 0) -> torch.Tensor:
    """Value heads grouped by key head become those that ggml repeats key heads for."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    shape = value.shape
    split = value.reshape(*shape[:dim], keys, values // keys, shape[dim] // values, *shape[dim + 1 :])
    return split.swapaxes(dim, dim + 1).reshape(shape)


def _state_space(name: str, value: torch.Tensor) -> Arrays:
    if name.endswith(".A_log"):
        return {name: -torch.exp(value)}
    if name.endswith(".dt_bias"):
        return {name.removesuffix("dt_bias") + "dt_proj.bias": value}
    if "conv1d" in name:
        return {name: value.squeeze()}
    return {name: value + 1 if name.endswith("norm.weight") and "linear_attn" not in name else value}


def _qwen3_next(name: str, value: torch.Tensor, config: Any) -> Arrays:
    if "in_proj_qkvz" not in name:
        return _state_space(name, value)
    heads, key = config.linear_num_key_heads, config.linear_key_head_dim
    width = config.linear_num_value_heads // heads * config.linear_value_head_dim
    parts = [
        each.flatten(0, 1) for each in value.view(heads, -1, value.shape[1]).split([key, key, width, width], dim=1)
    ]
    block = re.search(r"layers\.(\d+)\.", name)[1]
    return {f"blk.{block}.attn_qkv.weight": torch.cat(parts[:3]), f"blk.{block}.attn_gate.weight": parts[3]}


def _qwen35(name: str, value: torch.Tensor, config: Any) -> Arrays:
    before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    if ".in_proj_qkv." in name or ".conv1d." in name:
        value = torch.cat([value[:before], _tiled(value[before:], config)])
    elif re.search(r"in_proj_[zab]\.|A_log|dt_bias", name):
        value = _tiled(value, config)
    elif "linear_attn.out_proj" in name:
        value = _tiled(value, config, dim=1)
    return _state_space(name, value)


def _correction(name: str, value: torch.Tensor, config: Any) -> Arrays:
    return {name.replace("e_score_correction_bias", "e_score_correction.bias"): value.squeeze()}


def _mamba(name: str, value: torch.Tensor, config: Any) -> Arrays:
    """Mamba 2: a column for each head; the first Mamba has matrices already."""
    if name.endswith(".A_log"):
        return {name: -torch.exp(value if value.dim() > 1 else value[:, None])}
    if name.endswith(".dt_bias"):
        part = "dt_proj" if config.model_type == "granitemoehybrid" else "dt"
        return {f"{name.removesuffix('dt_bias')}{part}.bias": value}
    if name.endswith(("mixer.D", "mamba.D")):
        return {name: value[:, None] if config.model_type != "jamba" else value}
    if name.endswith("conv1d.weight"):
        return {name: value.squeeze(1)}
    if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
        return {name: value.view(getattr(config, "n_groups", 1), -1)}
    if config.model_type == "granitemoehybrid":
        return _granite(name, value, config)
    return {name.replace("e_score_correction_bias", "e_score_correction.bias"): value}


# By architecture: what a converter does to a tensor of the checkpoint; names may be those of the checkpoint or GGUF's.
CONVERTED: dict[str, Callable[[str, torch.Tensor, Any], Arrays]] = {
    "llama": _permuted,
    "granitemoe": _granite,
    "deepseek2": lambda name, value, config: _mla(*next(iter(_correction(name, value, config).items())), config),
    "gpt-oss": _gpt_oss,
    "lfm2moe": _conv,
    "afmoe": _conv,
    "qwen3next": _qwen3_next,
    **dict.fromkeys(("nemotron_h_moe", "granitehybrid", "jamba"), _mamba),
    "qwen35moe": _qwen35,
    **dict.fromkeys(("glm4moe", "dots1", "ernie4_5-moe", "minimax-m2", "exaone-moe"), _correction),
}


def arrays(model: Any, architecture: str) -> Arrays:
    """All tensors of a model in float32 by the names that GGUF gives them, in torch's order of dimensions."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(code, model.config.num_hidden_layers)
    convert = CONVERTED.get(architecture, lambda name, value, config: {name: value})
    found: Arrays = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in saved.items():
        if part := _EXPERT.fullmatch(name):
            experts.setdefault(f"{part[1]}.{part[3]}.weight", {})[int(part[2])] = value.float()
            continue
        found |= convert(name, value.float(), model.config)
    for name, each in experts.items():
        merged = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        merged = merged.replace("backbone.layers", "model.layers").replace("mixer.experts", "mlp.experts")
        own = names.get_name(name, (".weight",))
        found[name if own else merged] = torch.stack([each[number] for number in range(len(each))])
    out = {}
    for name, value in found.items():
        known = name.startswith(("blk.", "output.")) or name in ("token_embd.weight", "lm_head.weight")
        own = (
            {"lm_head.weight": "output.weight"}.get(name, name) if known else names.get_name(name, (".weight", ".bias"))
        )
        assert own is not None, name
        out[own] = value.contiguous()
    return out


def write(
    path: Path,
    architecture: str,
    tensors: Arrays,
    metadata: dict[str, Any],
    *,
    kinds: Callable[[str], str] = lambda name: "F32",
    raw: dict[str, np.ndarray] | None = None,
    parts: int = 0,
    tokenizer: Callable[[Any], None] | None = None,
) -> Path:
    """Writes a file, or the parts of one.

    Args:
        metadata: by key, without the architecture before it.
        kinds: ggml's type of a tensor by its name; the library must be able to quantize to it.
        raw: bytes [..., bytes of a row] of tensors in types that the library cannot quantize to, by name.
        parts: tensors in a part; 0 for one file.
        tokenizer: adds what a tokenizer needs to a `gguf.GGUFWriter`.

    Returns:
        The file, or the first part.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    for key, value in metadata.items():
        whole = key if key.startswith("general.") else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(whole, value)
        elif isinstance(value, int):
            writer.add_uint32(whole, value)
        elif isinstance(value, float):
            writer.add_float32(whole, value)
        elif isinstance(value, str):
            writer.add_string(whole, value)
        else:
            writer.add_array(whole, value)
    (tokenizer or words)(writer)
    for name, value in tensors.items():
        if raw and name in raw:
            data, kind = raw[name], kinds(name)
        else:
            kind = kinds(name) if value.dim() > 1 else "F32"
            data = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))[0]


def words(writer: Any, count: int = 128) -> None:
    """A vocabulary that is there and means nothing."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{number}" for number in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def blocks(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Bytes of a tensor in a block type, and the numbers that they stand for; scales are small and differ."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (np.prod(shape) // values, size), dtype=np.uint8)
    halves = {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "IQ1_M": (),
    }
    for at in halves.get(kind, (0,)):
        raw[:, at : at + 2] = (random.uniform(0.5, 1.5, (len(raw), 1)) / 2000).astype(np.float16).view(np.uint8)
    if kind == "IQ1_M":  # its scale is 0x1...
        raw[:, 55] = raw[:, 55] & 15 | 16
    if kind == "MXFP4":
        raw[:, 0] = random.integers(118, 124, len(raw))
    data = raw.reshape(*shape[:-1], -1)
    return data, torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


def base(config: Any, **own: Any) -> dict[str, Any]:
    """Metadata that all decoders share."""
    rope = getattr(config, "rope_parameters", None)
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)),
        **({"rope.freq_base": float(rope["rope_theta"])} if rope else {}),
        "expert_used_count": config.num_experts_per_tok,
    }
    if getattr(config, "intermediate_size", None):
        found["feed_forward_length"] = config.intermediate_size
    return {**found, **own}
