"""The demo model as a difference: what turns a dense Llama-shaped checkpoint into a `qwen2_moe` one.

A delta file (safetensors) holds, for L layers of H hidden values, I neurons and E routed experts: `order` [L, I] int16
(shared neurons first, then expert by expert), `router` [L, E, H] and norms in float16, and for each weight a low-rank
correction of rank r, `NAME.a` [L, r, in] and `NAME.b` [L, r, out] in int8 with one scale per row: W + b^T a.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from emoe.errors import DemoBuildError
from emoe.files import jsontext
from emoe.files.arrays import load

FORMAT = "emoe-demo-delta-1"
FEED_FORWARD = ("gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
NORMS = {"input": "input_layernorm", "post": "post_attention_layernorm"}


@dataclass(frozen=True)
class Shape:
    """How the neurons of a layer are divided; `shared + experts * width` is the dense intermediate size."""

    shared: int
    experts: int
    width: int
    top_k: int

    @property
    def neurons(self) -> int:
        return self.shared + self.experts * self.width


@dataclass(frozen=True)
class Delta:
    """A delta in memory; tensors as in the file, dequantized to float32."""

    shape: Shape
    tensors: dict[str, Tensor]

    def correction(self, name: str, layer: int) -> Tensor:
        """[out, in] of one weight in one layer."""
        return self.tensors[f"{name}.b"][layer].T @ self.tensors[f"{name}.a"][layer]


def save_delta(delta: Delta, path: Path) -> None:
    """Writes a delta; low-rank factors lose precision to int8."""
    stored: dict[str, Tensor] = {}
    for name, tensor in delta.tensors.items():
        if name.endswith((".a", ".b")):
            scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            stored[name] = (tensor / scale).round().to(torch.int8)
            stored[f"{name}.scale"] = scale.float()
        else:
            stored[name] = tensor.to(torch.int16 if name == "order" else torch.float16)
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(stored, path, metadata={"format": FORMAT, "shape": json.dumps(asdict(delta.shape))})


def load_delta(path: Path) -> Delta:
    """Reads a delta.

    Raises:
        DemoBuildError: the file is not a delta of this format.
    """

    def fail(why: str) -> DemoBuildError:
        return DemoBuildError(f"{why}; reinstall emoe")

    metadata, arrays = load(path, "delta of the demo model", fail)
    if metadata.get("format") != FORMAT:
        raise fail(f"{path} has format {metadata.get('format')!r}, this emoe reads {FORMAT!r}")
    values = jsontext.parse(metadata.get("shape", ""), lambda why: fail(f"{path} has no shape: {why}"))
    try:
        shape = Shape(
            **{field.name: jsontext.whole_number(values[field.name], field.name, 1, 1 << 20) for field in fields(Shape)}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise fail(f"{path} has no shape: {error}") from error
    stored = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(".scale"):
            continue
        scale = stored.get(f"{name}.scale")
        tensors[name] = tensor.long() if name == "order" else tensor.float() * (1 if scale is None else scale)
    return Delta(shape, tensors)


def moe_config(dense: Any, shape: Shape, dtype: torch.dtype) -> Any:
    """The `Qwen2MoeConfig` of the carved model, from the dense model's `LlamaConfig`."""
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        hidden_act=dense.hidden_act,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dict(dense.rope_parameters),
        tie_word_embeddings=True,
        qkv_bias=False,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        moe_intermediate_size=shape.width,
        shared_expert_intermediate_size=shape.shared,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        dtype=dtype,
    )


def carved_tensors(dense: Mapping[str, Tensor], delta: Delta, layer: int) -> dict[str, Tensor]:
    """One layer of the `qwen2_moe` checkpoint, float32, by full name.

    Args:
        dense: state dict of the dense model.

    The routing weights of the k active experts sum to 1 where the dense layer weighs every neuron by 1, so routed down
    projections are multiplied by k. The shared expert's gate is zero, its sigmoid 1/2: its down projection is doubled.
    """
    shape, prefix = delta.shape, f"model.layers.{layer}"
    order = delta.tensors["order"][layer]
    out = {f"{prefix}.{name}.weight": delta.tensors[f"norm.{key}"][layer] for key, name in NORMS.items()}
    for name in ATTENTION:
        key = f"{prefix}.self_attn.{name}_proj.weight"
        out[key] = dense[key].float() + delta.correction(name, layer)

    gate, up = (
        dense[f"{prefix}.mlp.{name}_proj.weight"].float()[order] + delta.correction(name, layer)
        for name in ("gate", "up")
    )  # [I, H]
    down = dense[f"{prefix}.mlp.down_proj.weight"].float()[:, order] + delta.correction("down", layer)  # [H, I]
    parts = {"mlp.shared_expert": (slice(0, shape.shared), 2)} | {
        f"mlp.experts.{e}": (slice(shape.shared + e * shape.width, shape.shared + (e + 1) * shape.width), shape.top_k)
        for e in range(shape.experts)
    }
    for part, (rows, factor) in parts.items():
        out[f"{prefix}.{part}.gate_proj.weight"] = gate[rows]
        out[f"{prefix}.{part}.up_proj.weight"] = up[rows]
        out[f"{prefix}.{part}.down_proj.weight"] = down[:, rows] * factor
    out[f"{prefix}.mlp.gate.weight"] = delta.tensors["router"][layer]
    out[f"{prefix}.mlp.shared_expert_gate.weight"] = torch.zeros(1, gate.shape[1])
    return out


def check_fits(dense: Any, delta: Delta) -> None:
    """Raises DemoBuildError where the delta was made for a dense model of another shape (`LlamaConfig`)."""
    layers, hidden = dense.num_hidden_layers, dense.hidden_size
    wanted = {"order": (layers, dense.intermediate_size), "router": (layers, delta.shape.experts, hidden)}
    found = {name: tuple(delta.tensors[name].shape) for name in wanted}
    if found != wanted or delta.shape.neurons != dense.intermediate_size:
        raise DemoBuildError(
            f"the delta has {found} and {delta.shape.neurons} neurons a layer; the dense model needs {wanted}"
        )
