"""Checkpoints with OLMoE-1B-7B's geometry and random weights in quantized formats: GGUF and safetensors.

Not a benchmark itself. A file is written tensor by tensor, from random blocks whose scales make the weights about 0.02
large, so that nothing is quantized and a machine can make a model that it could not load. Speed depends on the bytes
and on the routing, which random routers spread over all experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import gguf
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from emoe.convert.gguf import describe_model

STD = 0.02
# Values of a block, bytes of a block, root mean square of the codes that `_blocks` draws, times their inner scales.
GGUF_BLOCKS = {
    "q4_0": (32, 18, 4.61), "q8_0": (32, 34, 73.9), "q4_k": (256, 144, 240.0), "q6_k": (256, 210, 218.0),
    "mxfp4": (32, 17, 2.9),
}  # fmt: skip
SAFETENSORS_FORMATS = ("mxfp4", "fp8")

Bytes = npt.NDArray[np.uint8]


def olmoe_1b_7b() -> Any:
    """6.9 billion parameters, 1.3 billion of them for a token."""
    return common.olmoe_config(layers=16, hidden=2048, intermediate=1024, vocab=50304)


class Random:
    """Bytes as fast as memory takes them; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.Generator(np.random.SFC64(seed))

    def bytes(self, count: int) -> Bytes:
        return self.generator.integers(0, 1 << 64, size=-(-count // 8), dtype=np.uint64).view(np.uint8)[:count]

    def blocks(self, kind: str, rows: int, cols: int) -> Bytes:
        """A matrix [rows, cols] in a block format of GGUF: [rows, bytes of a row]."""
        values, nbytes, rms = GGUF_BLOCKS[kind]
        count = rows * cols // values
        blocks = self.bytes(count * nbytes).reshape(count, nbytes)
        if kind == "mxfp4":
            blocks[:, 0] = 119 + blocks[:, 0] % 2
            return blocks.reshape(rows, -1)
        # Signs of the scales, since codes of one sign prevail in some formats; sizes within a factor of 1.5.
        scale = STD / rms * self.generator.uniform(0.8, 1.2, count) * self.generator.choice([-1.0, 1.0], count)
        at = nbytes - 2 if kind == "q6_k" else 0
        blocks[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
        if kind == "q4_k":
            blocks[:, 2:4] = (7.5 * scale).astype(np.float16)[:, None].view(np.uint8)
            blocks[:, 4:12] |= 0xA0  # all sixteen scales and minima of six bits between 32 and 63
        elif kind == "q6_k":
            blocks[:, 192:208] = (blocks[:, 192:208] & 7) + 8
        return blocks.reshape(rows, -1)

    def floats(self, rows: int, cols: int) -> npt.NDArray[np.float32]:
        return np.float32(STD) * self.generator.standard_normal((rows, cols), dtype=np.float32)


def _gguf_tensors(config: Any, kind: str, rest: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and format of every tensor. As llama.cpp quantizes: the output in Q6_K where the rest has 4 bits."""
    H, I, E, V = config.hidden_size, config.intermediate_size, config.num_experts, config.vocab_size
    yield "token_embd.weight", (V, H), rest
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}."
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            yield f"{block}{name}.weight", (H,), "norm"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"{block}{name}.weight", (H, H), rest
        yield f"{block}ffn_gate_inp.weight", (E, H), "f32"
        yield f"{block}ffn_gate_exps.weight", (E, I, H), kind
        yield f"{block}ffn_up_exps.weight", (E, I, H), kind
        yield f"{block}ffn_down_exps.weight", (E, H, I), kind
    yield "output_norm.weight", (H,), "norm"
    yield "output.weight", (V, H), "q6_k" if rest in ("q4_0", "q4_k") else rest


def write_gguf(config: Any, kind: str, file: Path, seed: int = 0, rest: str = "") -> Path:
    """A single GGUF file of architecture olmoe; one that is complete is kept.

    Args:
        config: of an OLMoE model.
        kind: the format of the weights, one of `GGUF_BLOCKS` or "bf16". Norms and routers are float32.
        file: to write; its folder is made.
        seed: of the weights.
        rest: of what is outside experts, if another.
    """
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "olmoe")
    _metadata(writer, config, kind)
    tensors = list(_gguf_tensors(config, kind, rest or kind))
    total = 0
    for name, shape, form in tensors:
        total += _add_info(writer, name, shape, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = Random(seed)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {file.name}") as bar:
        for _, shape, form in tensors:
            rows, cols = math.prod(shape[:-1]), shape[-1]
            data: npt.NDArray[Any]
            if form == "norm":
                data = np.ones(shape, dtype=np.float32)
            elif form == "bf16":  # 0.02 large on average: signs, 2^-7 or 2^-6, and a fraction
                drawn = random.bytes(2 * rows * cols).view(np.uint16)
                data = ((drawn & 0x80FF) | 0x3C00).view(np.uint8).reshape(rows, -1)
            else:
                data = random.floats(rows, cols) if form == "f32" else random.blocks(form, rows, cols)
            writer.write_tensor_data(data)
            bar.update(data.nbytes)
    writer.close()
    return temporary.replace(file)


def _add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], form: str) -> int:
    if form in ("norm", "f32"):
        nbytes = 4 * math.prod(shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)
        return nbytes
    values, block_bytes, _ = GGUF_BLOCKS.get(form, (1, 2, 1.0))
    as_bytes = (*shape[:-1], shape[-1] // values * block_bytes)
    dtype = gguf.GGMLQuantizationType[form.upper()]
    writer.add_tensor_info(name, as_bytes, np.dtype(np.uint8), math.prod(as_bytes), raw_dtype=dtype)
    return math.prod(as_bytes)


def _metadata(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    writer.add_name(f"OLMoE-1B-7B geometry, random, {kind}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    labels = {
        "q4_0": "MOSTLY_Q4_0", "q8_0": "MOSTLY_Q8_0", "q4_k": "MOSTLY_Q4_K_S", "q6_k": "MOSTLY_Q6_K",
        "mxfp4": "MOSTLY_MXFP4_MOE", "bf16": "MOSTLY_BF16",
    }  # fmt: skip
    writer.add_file_type(gguf.LlamaFileType[labels[kind]])
    describe_model(config, writer)
    # A byte-level vocabulary of the right length: three special tokens, the bytes, one merge, and words for the rest.
    units = _byte_units()
    tokens = ["<pad>", "<s>", "</s>", *units, "ab"]
    tokens += [f"[{number}]" for number in range(len(tokens), config.vocab_size)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list(tokens)
    writer.add_token_types([control] * 3 + [normal] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _byte_units() -> list[str]:
    """The printable character for each byte that byte-level BPE uses."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_safetensors(config: Any, kind: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder whose experts are quantized and whose rest is bfloat16; one that is complete is kept.

    Args:
        config: of an OLMoE model.
        kind: "mxfp4" as compressed-tensors packs it, or "fp8" with a bfloat16 scale for each 128 x 128 weights.
        folder: to write into; made if missing.
        seed: of the weights.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = Random(seed)
    weight_map: dict[str, str] = {}
    total = 0
    shards = [_rest(config, random), *(_layer(config, kind, layer) for layer in range(config.num_hidden_layers))]
    with tqdm(total=len(shards), unit="shard", desc=f"writing {folder.name}") as bar:
        for number, shapes in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _draw(random, *what) for name, what in shapes.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            total += sum(each.numel() * each.itemsize for each in tensors.values())
            weight_map |= dict.fromkeys(tensors, file)
            bar.update()
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = _QUANTIZATION[kind]
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    temporary = index.with_suffix(".tmp")
    temporary.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    temporary.replace(index)
    return folder


_NOT_EXPERTS = ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$"]
_QUANTIZATION: dict[str, dict[str, Any]] = {
    "mxfp4": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": _NOT_EXPERTS,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "mxfp4-pack-quantized",
                "weights": {
                    "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                    "scale_dtype": "torch.uint8",
                },
            }
        },
    },
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "lm_head",
            *(f"model.layers.{layer}.{part}" for layer in range(16) for part in ("self_attn", "mlp.gate")),
        ],
    },
}  # fmt: skip

# What a tensor is, and its shape.
_Drawn = tuple[str, tuple[int, ...]]


def _rest(config: Any, random: Random) -> dict[str, _Drawn]:
    H, E, V = config.hidden_size, config.num_experts, config.vocab_size
    found: dict[str, _Drawn] = {"model.embed_tokens.weight": ("bf16", (V, H)), "lm_head.weight": ("bf16", (V, H))}
    found["model.norm.weight"] = ("norm", (H,))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            found[f"{prefix}{name}.weight"] = ("norm", (H,))
        for name in "qkvo":
            found[f"{prefix}self_attn.{name}_proj.weight"] = ("bf16", (H, H))
        found[f"{prefix}mlp.gate.weight"] = ("bf16", (E, H))
    return found


def _layer(config: Any, kind: str, layer: int) -> dict[str, _Drawn]:
    H, I = config.hidden_size, config.intermediate_size
    found: dict[str, _Drawn] = {}
    for expert in range(config.num_experts):
        for name, (rows, cols) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            base = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj."
            if kind == "mxfp4":
                found[base + "weight_packed"] = ("bytes", (rows, cols // 2))
                found[base + "weight_scale"] = ("e8m0", (rows, cols // 32))
            else:
                found[base + "weight"] = ("e4m3", (rows, cols))
                found[base + "weight_scale_inv"] = ("scale", (-(-rows // 128), -(-cols // 128)))
    return found


def _draw(random: Random, what: str, shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    if what == "norm":
        return torch.ones(shape, dtype=torch.bfloat16)
    if what == "bf16":
        return torch.from_numpy(random.floats(count, 1)).bfloat16().reshape(shape)
    if what == "scale":  # the codes drawn below have a root mean square of 0.6
        return torch.from_numpy(random.generator.uniform(0.8, 1.2, shape) * STD / 0.6).bfloat16()
    drawn = torch.from_numpy(random.bytes(count)).reshape(shape)
    if what == "e8m0":  # 2^-8 to 2^-7 for codes whose root mean square is 2.9
        return 119 + drawn % 2
    # Without the highest bit of the exponent no code is NaN.
    return (drawn & 0xBF).view(torch.float8_e4m3fn) if what == "e4m3" else drawn
