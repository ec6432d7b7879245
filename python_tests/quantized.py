"""Tiny checkpoints in every quantized format, and the same model in float32 beside each: the tests' own encoders.

An encoder is written from a format's description. It gives the tensors of a weight by the ends of their names, as
emoe/store/companions.py lists them, and the numbers that these stand for, which it knows without reading them back.
`write` puts tensors that belong together into different files. Magnitudes change from block to block, so that a reader
that mixes up blocks, gate and up, or scales gives other logits.
"""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
Encoder = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]  # [out, in] -> (tensors, what they stand for)

F32, E4M3 = torch.float32, torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
EXPERTS = r"\bexperts\.|block_sparse_moe\.(in|out)put_linear"


# --- encoders --------------------------------------------------------------------------------------------------------


def grid(weight: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The largest magnitude of each block, [blocks of rows, blocks of columns]; the last may be cut off."""
    high, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // cols)
    padded = torch.zeros(high * rows, wide * cols)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded.view(high, rows, wide, cols).abs().amax((1, 3)).clamp(min=1e-9)


def spread(blocks: torch.Tensor, shape: torch.Size, rows: int, cols: int) -> torch.Tensor:
    """A value for every element, from one for each block."""
    tall = blocks.repeat_interleave(rows, 0)[: shape[0]]
    return tall.repeat_interleave(cols, 1)[:, : shape[1]]


def byte(end: str, rows: int, cols: int, scale: torch.dtype = F32, codes: torch.dtype = E4M3) -> Encoder:
    """A byte each; `rows` and `cols` share a scale, 0 stands for all. uint8 scales are exponents too."""
    largest = {E4M3: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}[codes]

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        high, wide = rows or weight.shape[0], cols or weight.shape[1]
        scales = grid(weight, high, wide) / largest
        if scale in (torch.uint8, torch.float8_e8m0fnu):
            exponents = scales.log2().ceil()
            scales, stored = torch.exp2(exponents), (exponents + 127).to(torch.uint8).view(scale)
        else:
            stored = scales.to(scale)
            scales = stored.float()
        wide_scales = spread(scales, weight.shape, high, wide)
        values = (weight / wide_scales).clamp(-largest, largest)
        values = (values.round() if codes is torch.int8 else values).to(codes)
        return {"": values, end: stored}, values.float() * wide_scales

    return encode


def shaped(encoder: Encoder, shapes: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> Encoder:
    """With some tensors in another shape."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        parts, truth = encoder(weight)
        return {end: shapes.get(end, lambda each: each)(part) for end, part in parts.items()}, truth

    return encode


def beside(encoder: Encoder, **more: torch.Tensor) -> Encoder:
    """With tensors that have nothing to do with the weight."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        parts, truth = encoder(weight)
        return {**parts, **{f".{name}": value.clone() for name, value in more.items()}}, truth

    return encode


def _e2m1(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes a byte, the first column in the low bits; and the numbers."""
    codes = (values[..., None] - E2M1).abs().argmin(-1)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), E2M1[codes]


def mxfp4(names: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype] = (torch.uint8, torch.uint8)) -> Encoder:
    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        exponents = grid(weight, 1, 32).log2().floor() - 2
        scales = spread(torch.exp2(exponents), weight.shape, 1, 32)
        packed, values = _e2m1(weight / scales)
        stored = (exponents + 127).to(torch.uint8)
        if names[0] == "_blocks":
            packed = packed.view(len(packed), -1, 16)
        return {names[0]: packed.view(dtypes[0]), names[1]: stored.view(dtypes[1])}, values * scales

    return encode


def nvfp4(divided: bool) -> Encoder:
    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        whole = weight.abs().amax() / (6 * 448)
        whole = 1 / (1 / whole) if divided else whole
        scales = (grid(weight, 1, 16) / 6 / whole).to(E4M3)
        each = spread(scales.float(), weight.shape, 1, 16)
        packed, values = _e2m1(weight / each / whole)
        if divided:
            factor = (1 / whole).view(1)
            return {"_packed": packed, "_scale": scales, "_global_scale": factor}, values * each / factor
        return {"": packed, "_scale": scales, "_scale_2": whole.view(())}, values * each * whole

    return encode


def _words(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes [..., k n] in an int32 [..., n], lowest bits first; `order` has k numbers, 8 or 4."""
    each = len(order)
    parts = codes.long().view(*codes.shape[:-1], -1, each)[..., list(order)]
    return (parts << (32 // each * torch.arange(each))).sum(-1).to(torch.int32)


def int8_words(group: int, scale: torch.dtype = torch.bfloat16) -> Encoder:
    """compressed-tensors pack-quantized with num_bits 8; group 0: a scale for a row."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        size = group or weight.shape[1]
        scales = (grid(weight, 1, size) / 127).to(scale)
        each = spread(scales.float(), weight.shape, 1, size)
        codes = (weight / each).round().clamp(-128, 127)
        packed = _words(codes + 128, (0, 1, 2, 3))
        return {"_packed": packed, "_scale": scales, "_shape": torch.tensor(weight.shape)}, codes * each

    return encode


def int4(
    group: int, scale: torch.dtype = torch.bfloat16, zeros: bool = False, shape: bool = True, order: bool = False
) -> Encoder:
    """compressed-tensors pack-quantized; group 0: a scale for a row; `order` as in `along_inputs`."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        if order:  # columns of a group are brought together, and all goes back
            own = _generator(f"order {zlib.crc32(weight.numpy().tobytes())}")
            apart = torch.randperm(weight.shape[1], generator=own)
            parts, truth = int4(group, scale, zeros, shape)(weight[:, apart].contiguous())
            back = apart.argsort()
            codes = (parts["_packed"][..., None] >> (4 * torch.arange(8)) & 15).flatten(-2)
            index = (torch.arange(weight.shape[1]) // group)[back].to(torch.int32)
            return {**parts, "_packed": _words(codes[:, back]), "_g_idx": index}, truth[:, back].contiguous()
        size = group or weight.shape[1]
        scales = (grid(weight, 1, size) / 7).to(scale)
        each = spread(scales.float(), weight.shape, 1, size)
        zero = torch.full(scales.shape, 8.0)
        if zeros:
            zero = torch.randint(5, 11, scales.shape, generator=_generator("zeros")).float()
        its_zero = spread(zero, weight.shape, 1, size)
        codes = ((weight / each).round() + its_zero).clamp(0, 15)
        parts = {"_packed": _words(codes), "_scale": scales}
        if shape:
            parts["_shape"] = torch.tensor(weight.shape)
        if zeros:
            parts["_zero_point"] = _words(zero.T.contiguous()).T.contiguous()
        return parts, (codes - its_zero) * each

    return encode


def along_inputs(kind: str, group: int, order: bool = False, symmetric: bool = False, bits: int = 4) -> Encoder:
    """AWQ and GPTQ; `order` puts inputs into groups at random, each weight its own, as desc_act=True does."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        turned = weight.T.contiguous()  # [in, out]
        index = torch.arange(len(turned)) // group
        if order:
            own = _generator(f"order {zlib.crc32(weight.numpy().tobytes())}")
            index = index[torch.randperm(len(index), generator=own)]
        groups = int(index.max()) + 1
        most, middle = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
        scales = torch.stack([turned[index == each].abs().amax(0) for each in range(groups)]).div(most).half()
        zero = torch.full(scales.shape, middle)
        if not symmetric:
            zero = torch.randint(middle - 2, middle + 2, scales.shape, generator=_generator("zeros"))
        codes = ((turned / scales.float()[index]).round() + zero[index]).clamp(0, 2**bits - 1)
        truth = ((codes - zero[index]) * scales.float()[index]).T.contiguous()
        if kind == "awq":
            nibbles = (0, 2, 4, 6, 1, 3, 5, 7)
            return {".qweight": _words(codes, nibbles), ".qzeros": _words(zero, nibbles), ".scales": scales}, truth
        places = tuple(range(32 // bits))
        stored = {
            ".qweight": _words(codes.T.contiguous(), places).T.contiguous(),
            ".qzeros": _words(zero - 1 if kind == "gptq" else zero, places),
            ".scales": scales,
            ".g_idx": index.to(torch.int32),
        }
        return stored, truth

    return encode


def blocks(name: str) -> Encoder:
    """Blocks of GGUF under emoe's own names; those that the library does not make are drawn."""
    import gguf

    kind = gguf.GGMLQuantizationType[name.removeprefix("gguf_").upper()]
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    halves = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q2_k": (80, 82), "q3_k": (108,)}.get(name)

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        if halves is None:
            raw = gguf.quants.quantize(weight.numpy(), kind)
        else:
            count = weight.numel() // size
            seed = zlib.crc32(weight.numpy().tobytes())
            raw = np.random.default_rng(seed).integers(0, 256, (count, nbytes), dtype=np.uint8)
            for at in halves:
                raw[:, at : at + 2] = np.full((count, 1), 0.002 / weight.shape[1] ** 0.5, np.float16).view(np.uint8)
            raw = raw.reshape(len(weight), -1)
        return {f"_{name}": torch.from_numpy(raw)}, torch.from_numpy(gguf.quants.dequantize(raw, kind))

    return encode


def fused(encoder: Encoder) -> Encoder:
    """Of all experts at once: [E, out, in] -> tensors with a dimension more."""

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        made = [encoder(each) for each in weight]
        parts = {end: torch.stack([parts[end] for parts, _ in made]) for end in made[0][0]}
        return parts, torch.stack([truth for _, truth in made])

    return encode


def either(encoder: Encoder) -> Encoder:
    """Of one expert or of all at once, as the family has them."""
    whole = fused(encoder)
    return lambda weight: encoder(weight) if weight.dim() == 2 else whole(weight)


def turned(encoder: Encoder) -> Encoder:
    """Of parameters [E, in, out], as gpt-oss has them: stored a row for each output."""
    inner = fused(encoder)

    def encode(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        parts, truth = inner(weight.mT.contiguous())
        return parts, truth.mT.contiguous()

    return encode


# --- formats ---------------------------------------------------------------------------------------------------------


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors; activations have a group of their own, which says nothing here."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
    return {
        "quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {**group, "input_activations": inputs}},
    }  # fmt: skip


def fp8(*block: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block) or None, **more}


@dataclass(frozen=True)
class Format:
    """Attributes:
    encode: of experts.
    encoding: the name of it in emoe's table.
    config: `quantization_config`, None for no word of it.
    linears: of the linear layers outside experts; None leaves them plain.
    family: the model.
    """

    encode: Encoder
    encoding: str
    config: dict[str, Any] | None = None
    linears: Encoder | None = None
    family: str = "qwen3_moe"
    options: dict[str, Any] = field(default_factory=dict)


def _everywhere(
    encode: Encoder, encoding: str, config: dict[str, Any] | None = None, family: str = "qwen3_moe"
) -> Format:
    return Format(encode, encoding, config, encode, family)


E8M0, HALF, BF16, UINT8 = torch.float8_e8m0fnu, torch.float16, torch.bfloat16, torch.uint8
_INPUT = {"input_scale": torch.tensor(3.0)}
_4D = {"_scale": lambda scale: scale[:, None, :, None].contiguous()}
_SCALAR = {"_scale": lambda scale: scale.view(()), "_scale_inv": lambda scale: scale.view(())}

FORMATS: dict[str, Format] = {
    "fp8 blocks": _everywhere(byte("_scale_inv", 128, 128), "e4m3-128x128-float32", fp8(128, 128)),
    "fp8 blocks bfloat16": _everywhere(byte("_scale_inv", 128, 128, BF16), "e4m3-128x128-bfloat16", fp8(128, 128)),
    "fp8 blocks float16": _everywhere(byte("_scale_inv", 128, 128, HALF), "e4m3-128x128-float16", fp8(128, 128)),
    "fp8 blocks e8m0": _everywhere(byte("_scale_inv", 128, 128, E8M0), "e4m3-128x128-e8m0", fp8(128, 128)),
    "fp8 blocks 64": _everywhere(byte("_scale_inv", 64, 64), "e4m3-64x64-float32", fp8(64, 64)),
    "fp8 ragged": _everywhere(
        byte("_scale_inv", 128, 128), "e4m3-128x128-float32", fp8(128, 128), "deepseek_v3_ragged",
    ),
    "fp8 ragged even": _everywhere(byte("_scale_inv", 128, 128), "e4m3-128x128-float32", fp8(128, 128), "deepseek_v3"),
    "fp8 one scale": _everywhere(
        shaped(byte("_scale_inv", 0, 0), _SCALAR), "e4m3-tensor-float32", fp8(activation_scheme="static")
    ),
    "fp8 qscale": _everywhere(byte(".qscale_weight", 0, 0), "e4m3-tensor-float32", fp8()),
    "mxfp8": _everywhere(byte("_scale_inv", 1, 32, UINT8), "e4m3-1x32-e8m0", {**fp8(1, 32), "quant_method": "mxfp8"}),
    "mxfp8 e8m0": _everywhere(byte("_scale", 1, 32, E8M0), "e4m3-1x32-e8m0"),
    "fp8 e5m2": _everywhere(byte("_scale_inv", 128, 128, codes=torch.float8_e5m2), "e5m2-128x128-float32"),
    "modelopt fp8": _everywhere(
        beside(shaped(byte("_scale", 0, 0), _SCALAR), **_INPUT), "e4m3-tensor-float32",
    ),
    "modelopt fp8 blocks": _everywhere(shaped(byte("_scale", 128, 128), _4D), "e4m3-128x128-float32"),
    "fp8 channel": _everywhere(
        byte("_scale", 1, 0, BF16), "e4m3-row-bfloat16",
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "fp8 channel flat": _everywhere(
        shaped(byte("_scale", 1, 0), {"_scale": lambda scale: scale.view(-1)}), "e4m3-row-float32"
    ),
    "fp8 tensor": _everywhere(
        shaped(byte("_scale", 0, 0, BF16), {"_scale": lambda each: each.view(1)}), "e4m3-tensor-bfloat16",
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    ),
    "fp8 compressed blocks": _everywhere(
        byte("_scale", 128, 128, BF16), "e4m3-128x128-bfloat16",
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure="128x128"),
    ),
    "int8": _everywhere(
        byte("_scale", 1, 0, BF16, torch.int8), "int8-row-bfloat16",
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "int8 groups": _everywhere(byte("_scale", 1, 32, HALF, torch.int8), "int8-1x32-float16"),
    "gpt-oss": Format(
        turned(mxfp4(("_blocks", "_scales"))), "mxfp4", {"quant_method": "mxfp4"}, family="gpt_oss",
    ),
    "mxfp4 compressed": Format(
        mxfp4(("_packed", "_scale")), "mxfp4",
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "mxfp4 modelopt": _everywhere(mxfp4(("", "_scale")), "mxfp4"),
    "deepseek-v4": Format(
        mxfp4(("", ".scale"), (torch.int8, E8M0)), "mxfp4", fp8(128, 128, scale_fmt="ue8m0"),
        byte(".scale", 128, 128, E8M0), "deepseek_v4", {"expert_dtype": "fp4"},
    ),
    "deepseek-v4 32x32": Format(
        mxfp4(("", ".scale"), (torch.int8, E8M0)), "mxfp4", fp8(32, 32, expert_dtype="fp4"),
        byte(".scale", 32, 32, E8M0), "deepseek_v4",
    ),
    "deepseek-v4 nvfp4": Format(
        nvfp4(divided=False), "nvfp4", fp8(128, 128, moe_quant_algo="NVFP4"), byte(".scale", 128, 128, E8M0),
        "deepseek_v4",
    ),
    "deepseek-v4 fp8": Format(
        byte(".scale", 32, 32, E8M0), "e4m3-32x32-e8m0", fp8(32, 32), byte(".scale", 32, 32, E8M0), "deepseek_v4",
    ),
    "nvfp4": _everywhere(
        beside(nvfp4(divided=False), **_INPUT), "nvfp4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "quantization": {"group_size": 16}},
    ),
    "nvfp4 compressed": _everywhere(
        beside(nvfp4(divided=True), input_global_scale=torch.tensor([3.0])), "nvfp4_divided",
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
    "int4": Format(
        int4(32), "int4-32-bfloat16",
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "int4 zeros": _everywhere(int4(32, HALF, zeros=True), "int4-32-float16-zeros"),
    "int4 zeros said": _everywhere(
        int4(32, zeros=True), "int4-32-bfloat16-zeros",
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    ),
    "int4 order": _everywhere(
        int4(32, order=True), "int4-32-bfloat16-order",
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, actorder="group"),
    ),
    "int4 zeros order": _everywhere(int4(32, HALF, zeros=True, order=True), "int4-32-float16-zeros-order"),
    "int4 rows": _everywhere(
        int4(0, shape=False), "int4-row-bfloat16",
        compressed("pack-quantized", num_bits=4, type="int", strategy="channel", group_size=None),
    ),
    "int8 words": _everywhere(
        int8_words(32), "uint8b128-1x32-bfloat16",
        compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32),
    ),
    "int8 words rows": _everywhere(
        int8_words(0, HALF), "uint8b128-row-float16",
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel", group_size=None),
    ),
    "int8 words unsaid": _everywhere(int8_words(64), "uint8b128-1x64-bfloat16"),
    "awq": _everywhere(
        along_inputs("awq", 32), "awq-32-float16", {"quant_method": "awq", "bits": 4, "group_size": 32},
    ),
    "gptq": _everywhere(
        along_inputs("gptq", 32), "gptq-32-float16",
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"},
    ),
    "gptq v2": _everywhere(
        along_inputs("gptq_v2", 32), "gptq_v2-32-float16",
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "gptq order": _everywhere(
        along_inputs("gptq", 32, order=True), "gptq-32-float16-order",
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    ),
    "gptq 8 bits": _everywhere(
        along_inputs("gptq", 32, bits=8), "gptq8-32-float16",
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False},
    ),
    "gptq 8 bits v2 order": _everywhere(
        along_inputs("gptq_v2", 32, order=True, bits=8), "gptq8_v2-32-float16-order",
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "gptq 8 bits unsaid": _everywhere(along_inputs("gptq", 32, symmetric=True, bits=8), "gptq8-32-float16"),
    "q8_0": _everywhere(blocks("q8_0"), "q8_0"),
    "q4_0": Format(blocks("q4_0"), "q4_0", linears=blocks("q8_0")),
    "gguf_mxfp4": Format(blocks("gguf_mxfp4"), "gguf_mxfp4"),
    "q4_k": Format(blocks("q4_k"), "q4_k", linears=blocks("q6_k"), family="qwen3_moe_256"),
    "fp8 fused": Format(fused(byte("_scale_inv", 128, 128)), "e4m3-128x128-float32", fp8(128, 128), family="fused"),
    "fp8 fused one scale": Format(
        fused(shaped(byte("_scale", 0, 0), _SCALAR)), "e4m3-tensor-float32", family="fused"
    ),
    "fp8 fused rows": Format(fused(byte("_scale_inv", 1, 0)), "e4m3-row-float32", family="fused"),
    "q8_0 fused": Format(fused(blocks("q8_0")), "q8_0", family="fused"),
    "q8_0 turned": Format(turned(blocks("q8_0")), "q8_0", family="gpt_oss"),
}  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------

_BASE = {"vocab_size": 128, "hidden_size": 128, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1}


def _qwen3_moe(
    hidden: int = 128, intermediate: int = 160, layers: int = 2, vocabulary: int = 128
) -> tf.PretrainedConfig:
    return tf.Qwen3MoeConfig(
        **{**_BASE, "hidden_size": hidden, "vocab_size": vocabulary}, intermediate_size=256,
        moe_intermediate_size=intermediate, num_hidden_layers=layers, head_dim=hidden // 4, num_attention_heads=4,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip


def _deepseek_v3(rank: int) -> tf.PretrainedConfig:
    """`kv_a_proj_with_mqa` has rank + 32 rows: 320 in a grid of 3, or 160 in one of 2."""
    return tf.DeepseekV3Config(
        **_BASE, intermediate_size=160, moe_intermediate_size=96, num_hidden_layers=2, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=rank, qk_rope_head_dim=32,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5, tie_word_embeddings=False,
    )  # fmt: skip


def _deepseek_v4() -> tf.PretrainedConfig:
    return tf.DeepseekV4Config(
        **_BASE, moe_intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32, q_lora_rank=64,
        partial_rotary_factor=0.5, num_experts_per_tok=2, n_routed_experts=8, o_groups=2, o_lora_rank=32,
        layer_types=["sliding_attention"] * 2, mlp_layer_types=["hash_moe", "moe"], sliding_window=16,
        index_n_heads=4, index_head_dim=32, num_nextn_predict_layers=0,
    )  # fmt: skip


def _gpt_oss() -> tf.PretrainedConfig:
    """Experts are square, so that only their names and the module tell rows from columns."""
    return tf.GptOssConfig(
        **_BASE, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_local_experts=6, num_experts_per_tok=2, sliding_window=16,
    )  # fmt: skip


MODELS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen3_moe_256": lambda: _qwen3_moe(256, 256),
    "qwen3_moe_wide": lambda: _qwen3_moe(1024, 768, vocabulary=16384),
    "qwen3_moe_72": lambda: _qwen3_moe(intermediate=72),  # no whole number of blocks
    "fused": _qwen3_moe,  # saved as the model holds it
    "deepseek_v3": lambda: _deepseek_v3(128),
    "deepseek_v3_ragged": lambda: _deepseek_v3(288),
    "deepseek_v4": _deepseek_v4,
    "gpt_oss": _gpt_oss,
}


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def vary(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Other magnitudes for each block of 32 rows and 16 columns, by factors of two."""
    rows, cols = -(-weight.shape[-2] // 32), -(-weight.shape[-1] // 16)
    factors = torch.exp2(torch.randint(-1, 2, (*weight.shape[:-2], rows, cols), generator=_generator(name)).float())
    tall = factors.repeat_interleave(32, -2)[..., : weight.shape[-2], :]
    return weight * tall.repeat_interleave(16, -1)[..., : weight.shape[-1]]


def plain_tensors(family: str) -> tuple[tf.PretrainedConfig, Parts]:
    """Random weights in float32 as a checkpoint of the family has them; of `families` as well."""
    torch.manual_seed(0)
    config = (MODELS.get(family) or families.FAMILIES[family])()
    model = tf.AutoModelForCausalLM.from_config(config, dtype=F32)
    families.randomize(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_original_format=family != "fused")
        tensors = load_file(Path(folder) / "model.safetensors")
    if family == "deepseek_v4":  # as its makers name them
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return config, tensors


# --- checkpoints -----------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    form: Format,
    *,
    rest: torch.dtype = F32,
    config: dict[str, Any] | None = None,
    files: dict[str, Any] | None = None,
    which: Callable[[str], Encoder | None] | None = None,
    change: Callable[[Parts], object] | None = None,
    source: Path | None = None,
) -> Path:
    """Writes folder/quantized and folder/plain; returns the first.

    Args:
        form: what experts and linear layers become.
        rest: dtype of what stays plain.
        config: in the place of the format's `quantization_config`; {} for none.
        files: written beside config.json, as JSON.
        which: an encoder for a tensor by name, in the place of the format's.
        change: may alter the tensors before they are written.
        source: a plain checkpoint in one file, in the place of the family's.
    """
    if source is None:
        made, plain = plain_tensors(form.family)
        own = made.to_dict()
    else:
        own, plain = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    stored: Parts = {}
    truth: Parts = {}
    for name, weight in plain.items():
        encode = which(name) if which else _encoder(name, weight, form)
        if encode is None:
            keep = not weight.is_floating_point() or "correction_bias" in name
            stored[name] = weight if keep else weight.to(rest)
            truth[name] = stored[name].to(weight.dtype)
        else:
            parts, truth[name] = encode(vary(name, weight))
            stored.update({_named(name, end): part.contiguous() for end, part in parts.items()})
    if change is not None:
        change(stored)
    said = form.config if config is None else config
    values = {**own, **form.options, "dtype": str(rest).removeprefix("torch.")}
    save(folder / "quantized", {**values, **({"quantization_config": said} if said else {})}, stored, shards=2)
    for name, content in (files or {}).items():
        (folder / "quantized" / name).write_text(json.dumps(content))
    save(folder / "plain", {**own, "dtype": "float32"}, truth, shards=1)
    return folder / "quantized"


def _encoder(name: str, weight: torch.Tensor, form: Format) -> Encoder | None:
    if weight.dim() < 2 or "bias" in name or re.search(r"(gate|router|norm)(\.\w+)?$", name.removesuffix(".weight")):
        return None
    if re.search(EXPERTS, name):
        return form.encode
    return form.linears if form.linears and re.search(r"(attn|mlp|ffn|shared_experts?)\.\w+\.weight$", name) else None


def _named(name: str, end: str) -> str:
    return name.removesuffix(".weight") + end if end.startswith(".") else name + end


def save(folder: Path, config: dict[str, Any], tensors: Parts, *, shards: int) -> None:
    """Tensors that follow one another by name, such as a weight and its scale, go into different files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    names = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
        index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file, metadata={"format": "pt"})
