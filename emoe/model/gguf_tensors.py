"""Which tensors of a GGUF file make a parameter of Transformers, and what a converter did to them, undone.

Names are those of the `gguf` library's own map, which llama.cpp's converter uses; here is what that does not say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from emoe.errors import UnsupportedModelError
from emoe.model import gguf_config as configs

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Made:
    """A parameter and what makes it.

    Attributes:
        sources: names of tensors.
        undo: makes the parameter of their values in float32, given the config too; None: it is the one source.
        unless_whole: older files hold the parameter whole, under the library's name; that one is taken where it is.
    """

    sources: tuple[str, ...]
    undo: Callable[..., torch.Tensor] | None = None
    unless_whole: bool = False


@dataclass(frozen=True)
class Architecture:
    """One architecture of ggml.

    Attributes:
        values: fields of the config.
        made: by the name of a parameter ("{bid}" for the layer), where it is not a tensor of the library's name as it
            lies; no sources stand for that name.
        unused: patterns of tensors that Transformers' model has no place for and does not need.
        prefix: what names in the library's map begin with where the model's begin with "model.".
    """

    values: Callable[[configs.Metadata], dict[str, Any]]
    made: Mapping[str, Made] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    prefix: str = "model."


def _unpermuted(heads: str) -> Callable[..., torch.Tensor]:
    """Undoes `LlamaModel.permute` of llama.cpp, which puts the two halves of a rotated head side by side."""

    def undo(config: Any, rows: torch.Tensor) -> torch.Tensor:
        count = getattr(config, heads)
        split = rows.view(count, rows.shape[0] // count // 2, 2, *rows.shape[1:])
        return split.transpose(1, 2).reshape(rows.shape)

    return undo


_LAYERS = "model.layers.{bid}."
_EVERYWHERE = {"lm_head.weight": "output.weight"}  # the library leaves it out of architectures that tie it
_PERMUTED = {
    f"{_LAYERS}self_attn.{kind}_proj.{part}": Made((), _unpermuted(heads))
    for kind, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for part in ("weight", "bias")
}


def _kv_b(config: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[heads, rank, nope] and [heads, value, rank] -> [heads * (nope + value), rank]"""
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


_MLA = {
    f"{_LAYERS}self_attn.kv_b_proj.weight": Made(
        ("blk.{bid}.attn_k_b.weight", "blk.{bid}.attn_v_b.weight"), _kv_b, unless_whole=True
    )
}


def _less_one(config: Any, row: torch.Tensor) -> torch.Tensor:
    return row - 1


def _decay(config: Any, row: torch.Tensor) -> torch.Tensor:
    return torch.log(-row)


def _by_key_head(config: Any, qkv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Rows of all q, all k, all v, and z; Qwen3-Next has q, k, v, z of one key head after another."""
    heads, wide = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    q, k, v = qkv.split([wide, wide, len(qkv) - 2 * wide])
    return torch.cat([each.view(heads, -1, each.shape[1]) for each in (q, k, v, gate)], dim=1).flatten(0, 1)


def _grouped(config: Any, rows: torch.Tensor) -> torch.Tensor:
    """Undoes the order in which ggml repeats key heads: value heads of one key head side by side again."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    return rows.view(values // keys, keys, len(rows) // values, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _grouped_values(config: Any, rows: torch.Tensor) -> torch.Tensor:
    """As `_grouped`, for the rows of values below those of queries and keys."""
    before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat([rows[:before], _grouped(config, rows[before:])])


_NORMS = {
    name: Made((), _less_one)
    for name in (
        "model.norm.weight",
        f"{_LAYERS}input_layernorm.weight",
        f"{_LAYERS}post_attention_layernorm.weight",
        f"{_LAYERS}self_attn.q_norm.weight",
        f"{_LAYERS}self_attn.k_norm.weight",
    )
}
_SHARED_GATE = {
    f"{_LAYERS}mlp.shared_expert_gate.weight": Made(
        ("blk.{bid}.ffn_gate_inp_shexp.weight",), lambda config, row: row.reshape(1, -1)
    )
}
_LINEAR = f"{_LAYERS}linear_attn."
_QWEN3_NEXT = {
    **_NORMS,
    **_SHARED_GATE,
    f"{_LINEAR}A_log": Made(("blk.{bid}.ssm_a",), _decay),
    f"{_LINEAR}dt_bias": Made(("blk.{bid}.ssm_dt.bias",)),
    f"{_LINEAR}conv1d.weight": Made(("blk.{bid}.ssm_conv1d.weight",), lambda config, rows: rows.unsqueeze(1)),
    f"{_LINEAR}norm.weight": Made(("blk.{bid}.ssm_norm.weight",)),
    f"{_LINEAR}in_proj_ba.weight": Made(("blk.{bid}.ssm_ba.weight",)),
    f"{_LINEAR}out_proj.weight": Made(("blk.{bid}.ssm_out.weight",)),
    f"{_LINEAR}in_proj_qkvz.weight": Made(("blk.{bid}.attn_qkv.weight", "blk.{bid}.attn_gate.weight"), _by_key_head),
}
_QWEN35 = {
    **_NORMS,
    **_SHARED_GATE,
    f"{_LINEAR}A_log": Made(("blk.{bid}.ssm_a",), lambda config, row: _grouped(config, _decay(config, row))),
    f"{_LINEAR}dt_bias": Made(("blk.{bid}.ssm_dt.bias",), _grouped),
    f"{_LINEAR}conv1d.weight": Made(
        ("blk.{bid}.ssm_conv1d.weight",), lambda config, rows: _grouped_values(config, rows).unsqueeze(1)
    ),
    f"{_LINEAR}norm.weight": Made(("blk.{bid}.ssm_norm.weight",)),
    f"{_LINEAR}in_proj_a.weight": Made(("blk.{bid}.ssm_alpha.weight",), _grouped),
    f"{_LINEAR}in_proj_b.weight": Made(("blk.{bid}.ssm_beta.weight",), _grouped),
    f"{_LINEAR}in_proj_qkv.weight": Made(("blk.{bid}.attn_qkv.weight",), _grouped_values),
    f"{_LINEAR}in_proj_z.weight": Made(("blk.{bid}.attn_gate.weight",), _grouped),
    f"{_LINEAR}out_proj.weight": Made(("blk.{bid}.ssm_out.weight",), lambda config, rows: _grouped(config, rows.T).T),
}
_GRANITE = {
    f"{_LAYERS}block_sparse_moe.router.weight": Made(("blk.{bid}.ffn_gate_inp.weight",)),
    f"{_LAYERS}shared_mlp.input_linear.weight": Made(
        ("blk.{bid}.ffn_gate_shexp.weight", "blk.{bid}.ffn_up_shexp.weight"), lambda config, *rows: torch.cat(rows)
    ),
    f"{_LAYERS}shared_mlp.output_linear.weight": Made(("blk.{bid}.ffn_down_shexp.weight",)),
}


def _state_space(layer: str, *, flat: bool) -> dict[str, Made]:
    """Parameters of Mamba; those of Mamba 2 are stored as columns."""
    same = None if not flat else (lambda config, rows: rows.flatten())
    return {
        f"{layer}A_log": Made(
            ("blk.{bid}.ssm_a",), lambda config, rows: _decay(config, rows.flatten() if flat else rows)
        ),
        f"{layer}D": Made(("blk.{bid}.ssm_d",), same),
        f"{layer}conv1d.weight": Made(("blk.{bid}.ssm_conv1d.weight",), lambda config, rows: rows.unsqueeze(1)),
        f"{layer}conv1d.bias": Made(("blk.{bid}.ssm_conv1d.bias",)),
        f"{layer}in_proj.weight": Made(("blk.{bid}.ssm_in.weight",)),
        f"{layer}out_proj.weight": Made(("blk.{bid}.ssm_out.weight",)),
    }


def _mamba2(layer: str) -> dict[str, Made]:
    return {
        **_state_space(layer, flat=True),
        f"{layer}dt_bias": Made(("blk.{bid}.ssm_dt.bias",)),
        f"{layer}norm.weight": Made(("blk.{bid}.ssm_norm.weight",), lambda config, rows: rows.flatten()),
    }


_MAMBA2 = _mamba2(f"{_LAYERS}mamba.")
_NEMOTRON = {
    **_mamba2(f"{_LAYERS}mixer."),
    f"{_LAYERS}mixer.fc1_latent_proj.weight": Made(("blk.{bid}.ffn_latent_down.weight",)),
    f"{_LAYERS}mixer.fc2_latent_proj.weight": Made(("blk.{bid}.ffn_latent_up.weight",)),
}
_JAMBA = {
    **_state_space(f"{_LAYERS}mamba.", flat=False),
    **{
        f"{_LAYERS}mamba.{name}": Made((f"blk.{{bid}}.{tensor}",))
        for name, tensor in (
            ("x_proj.weight", "ssm_x.weight"), ("dt_proj.weight", "ssm_dt.weight"), ("dt_proj.bias", "ssm_dt.bias"),
            ("dt_layernorm.weight", "ssm_dt_norm.weight"), ("b_layernorm.weight", "ssm_b_norm.weight"),
            ("c_layernorm.weight", "ssm_c_norm.weight"),
        )
    },
    f"{_LAYERS}feed_forward.router.weight": Made(("blk.{bid}.ffn_gate_inp.weight",)),
}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "qwen3moe": Architecture(configs.qwen3moe),
    "qwen3vlmoe": Architecture(configs.qwen3vlmoe),
    "qwen2moe": Architecture(configs.qwen2moe, _SHARED_GATE),
    "qwen3next": Architecture(configs.qwen3next, _QWEN3_NEXT),
    "qwen35moe": Architecture(configs.qwen35moe, _QWEN35),
    "olmoe": Architecture(configs.olmoe),
    "gpt-oss": Architecture(configs.gpt_oss),
    "llama": Architecture(configs.mixtral, _PERMUTED),
    "deepseek2": Architecture(configs.deepseek2, _MLA),
    "glm4moe": Architecture(configs.glm4moe),
    "dots1": Architecture(configs.dots1),
    "ernie4_5-moe": Architecture(
        configs.ernie4_5_moe,
        {
            f"{_LAYERS}mlp.gate.moe_statics.e_score_correction_bias": Made(
                ("blk.{bid}.exp_probs_b.bias",), lambda config, row: row.reshape(1, -1)
            )
        },
    ),
    "granitemoe": Architecture(configs.granitemoe, {**_PERMUTED, **_GRANITE}),
    "minimax-m2": Architecture(configs.minimax_m2),
    "lfm2moe": Architecture(
        configs.lfm2moe,
        {f"{_LAYERS}conv.conv.weight": Made((), lambda config, rows: rows.unsqueeze(1))},
    ),
    "hunyuan-moe": Architecture(configs.hunyuan_moe),
    "nemotron_h_moe": Architecture(configs.nemotron_h_moe, _NEMOTRON, prefix="backbone."),
    "granitehybrid": Architecture(configs.granitehybrid, {**_PERMUTED, **_GRANITE, **_MAMBA2}),
    "jamba": Architecture(configs.jamba, _JAMBA),
    "exaone-moe": Architecture(configs.exaone_moe),
    "afmoe": Architecture(configs.afmoe),
}


def architecture(name: str, file: str) -> Architecture:
    """The row of that name.

    Raises:
        UnsupportedModelError: there is none, and names those there are; or the gguf library does not know it.
    """
    import gguf

    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file} holds a model of architecture {name!r}; emoe reads GGUF of: {', '.join(sorted(ARCHITECTURES))}. "
            "The model's checkpoint in safetensors works where its family does"
        )
    if name not in gguf.MODEL_ARCH_NAMES.values():
        raise UnsupportedModelError(
            f"{file} holds a model of architecture {name!r}, which this version of the gguf library does not know; "
            "a newer one does (pip install --upgrade gguf)"
        )
    return ARCHITECTURES[name]


class TensorNames:
    """Names of one checkpoint's tensors.

    Args:
        name: ggml's name of the architecture.
        layers: how many the model has.
        tensors: names there are.
    """

    def __init__(self, name: str, layers: int, tensors: Collection[str]) -> None:
        import gguf

        self._rules = ARCHITECTURES[name]
        self._tensors = tensors
        code = next(code for code, its_name in gguf.MODEL_ARCH_NAMES.items() if its_name == name)
        self._map = gguf.get_tensor_name_map(code, layers)
        self._unused = [re.compile(pattern) for pattern in self._rules.unused]
        self._layers = layers

    def of(self, key: str) -> Made | None:
        """What makes the parameter `key` of the model; None where nobody knows. The sources may be missing."""
        found = _LAYER.search(key)
        made = self._rules.made.get(_LAYER.sub(".{bid}.", key, count=1)) or Made(())
        bid = found[1] if found else ""
        name = self._named(key) or _EVERYWHERE.get(key)
        if made.sources and not (made.unless_whole and name in self._tensors):
            return replace(made, sources=tuple(each.format(bid=bid) for each in made.sources))
        return None if name is None else Made((name,), None if made.sources else made.undo)

    def _named(self, key: str) -> str | None:
        """By the library's map. Files have ".weight" and ".bias" where Transformers has nothing or "_bias"."""
        if key.startswith("model."):
            key = self._rules.prefix + key.removeprefix("model.")
        for ending, suffixes in ((".weight", (".weight",)), (".bias", (".bias",)), ("_bias", (".bias",)), ("", ())):
            if key.endswith(ending) and (name := self._map.get_name(key[: len(key) - len(ending)])):
                for suffix in suffixes or (".weight", ".bias", ""):
                    if name + suffix in self._tensors:
                        break
                return name + suffix
        return None

    def experts(self, path: str, bias: bool = False) -> dict[str, str]:
        """Tensors of the experts module `path`, by what they are: "gate", "up", "gate_up", "down"."""
        import gguf

        found = _LAYER.search(f"{path}.")
        if found is None:
            raise UnsupportedModelError(
                f"{path} is in no layer with a number, so no tensor of a GGUF file belongs to it"
            )
        kinds = gguf.MODEL_TENSOR
        names = {"gate": kinds.FFN_GATE_EXP, "up": kinds.FFN_UP_EXP, "down": kinds.FFN_DOWN_EXP}
        suffix = ".bias" if bias else ".weight"
        named = {kind: gguf.TENSOR_NAMES[code].format(bid=found[1]) + suffix for kind, code in names.items()}
        return {**named, "gate_up": f"blk.{found[1]}.ffn_gate_up_exps{suffix}"}

    def unused(self, tensor: str) -> bool:
        """Whether the model has no need of a tensor: it is of a layer beyond the model's, or known to be left out."""
        found = re.match(r"blk\.(\d+)\.", tensor)
        return bool(found and int(found[1]) >= self._layers) or any(each.fullmatch(tensor) for each in self._unused)
