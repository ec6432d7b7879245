"""The same conversion into GGUF files, for architectures whose names and numbers llama.cpp and Transformers share.

Which tensor is which is told by the table that GGUF files are read with (model/gguf_tensors.py); here is what a file
says of the model and its tokenizer. What is not certain is refused.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from emoe.convert.names import Matrix
from emoe.convert.plan import IN_GGUF, MORE, Conversion, Fallback, Shard, Tensor, chosen, in_blocks
from emoe.convert.rest import linear_keys
from emoe.errors import CheckpointError, ConfigError, UnsupportedModelError
from emoe.files import jsontext
from emoe.model.encoding import ITEMSIZE, encoding
from emoe.model.gguf_tensors import TensorNames
from emoe.model.structure import experts_modules, num_experts, param_specs
from emoe.options import CONVERTED
from emoe.store import ExpertStore
from emoe.store.headers import TensorEntry

# Family of Transformers -> architecture of llama.cpp, and whether it norms the weights of a token's experts.
ARCHITECTURES = {"qwen3_moe": ("qwen3moe", True), "qwen2_moe": ("qwen2moe", False), "olmoe": ("olmoe", False)}
_UNTIED = ("qwen2_moe", "olmoe")  # llama.cpp wants output.weight of these, also where it is the embeddings again
_ALIGNMENT = 32
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "gguf_mxfp4": "MXFP4"}
# How a tokenizer cuts text into words, as patterns in tokenizer.json, and what llama.cpp calls that.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def conversion(
    entries: dict[str, TensorEntry],
    store: ExpertStore,
    meta_model: Any,
    asked: str,
    plain: str,
    folder: Path,
    *,
    rest: str | None = None,
    keep: Collection[int] = (),
    shard_bytes: int,
) -> Conversion:
    """Says what is written where; as `emoe.convert.plan.conversion`.

    Args:
        folder: of the checkpoint, for its tokenizer; its name is that of the files.

    Raises:
        UnsupportedModelError: llama.cpp computes another model, or none, of this family or config; says what differs.
        ConfigError: GGUF has no such encoding.
        CheckpointError: the tokenizer is damaged.
    """
    config = meta_model.config
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"emoe writes GGUF of {', '.join(sorted(ARCHITECTURES))}, not of {config.model_type}; without --gguf it "
            "writes safetensors"
        )
    asked = "gguf_mxfp4" if asked == "mxfp4" else asked
    if encoding(asked).plane("blocks") is None:
        raise ConfigError(f"GGUF holds no FP8; choose one of {', '.join(each for each in CONVERTED if each != 'fp8')}")
    architecture = ARCHITECTURES[config.model_type][0]
    _require_same_model(config)
    names = TensorNames(architecture, config.num_hidden_layers, ())
    result = Conversion()
    tensors = _outside(entries, meta_model, names, rest)
    result.rest_before = sum({each.entry.name: each.entry.nbytes for each in tensors if each.entry}.values())
    result.rest_encoded = sum(each.plane != "" for each in tensors)
    result.rest_bytes = sum(each.nbytes for each in tensors)
    fallbacks: Counter[tuple[str, int, str, str]] = Counter()
    for number, ((path, module), layer) in enumerate(zip(experts_modules(meta_model), store.layers, strict=True)):
        dtypes = {piece.stored: piece.src_dtype for piece in layer.pieces[0]}
        for matrix in _matrices(path, module, names):
            own = dtypes.get(matrix.param, plain)
            wanted = (MORE[asked] or own) if number in keep else asked
            kind = chosen(wanted, matrix, own, IN_GGUF)
            tensors.append(_experts(number, matrix, kind, num_experts(module)))
            result.expert_bytes += tensors[-1].nbytes
            if kind != wanted:
                fallbacks[matrix.name.partition("ffn_")[2], matrix.cols, wanted, kind] += num_experts(module)
    result.fallbacks = [
        Fallback(place, count, cols, wanted, got) for (place, cols, wanted, got), count in sorted(fallbacks.items())
    ]
    name = f"{folder.name}-{asked.removeprefix('gguf_').upper()}"
    result.shards = _files(name, architecture, tensors, shard_bytes, partial(_describe, config, folder))
    return result


def _require_same_model(config: Any) -> None:
    """What files cannot say has to be as llama.cpp has it."""
    rope = config.rope_parameters
    wanted: dict[str, Any] = {
        "rope_parameters": rope if rope.get("rope_type") == "default" else {"rope_type": "default"},
        "norm_topk_prob": ARCHITECTURES[config.model_type][1],
        "hidden_act": "silu",
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }
    if config.model_type == "olmoe":  # its norms of keys have the width of a hidden state
        wanted["num_key_value_heads"] = config.num_attention_heads
    for name, value in wanted.items():
        if hasattr(config, name) and getattr(config, name) != value:
            raise UnsupportedModelError(
                f"llama.cpp computes {config.model_type} with {name}={value!r} alone; this one has "
                f"{getattr(config, name)!r}. Without --gguf emoe writes safetensors"
            )


def _outside(entries: dict[str, TensorEntry], meta_model: Any, names: TensorNames, rest: str | None) -> list[Tensor]:
    """All that is not an expert's; vectors and routers as float32, which llama.cpp wants, linear layers as `rest`."""
    anew = set() if rest is None else linear_keys(meta_model, rest)
    ours = {f"{path}.{param.name}" for path, module in experts_modules(meta_model) for param in param_specs(module)}
    tied = dict(meta_model.all_tied_weights_keys)
    whole = meta_model.config.model_type in _UNTIED
    found = []
    for key, parameter in meta_model.state_dict().items():
        if key in ours or (key in tied and not whole):
            continue
        made, entry = names.of(key), entries.get(tied.get(key, key))
        if made is None or len(made.sources) != 1:
            raise UnsupportedModelError(f"emoe does not know which tensor of a GGUF file {key} is")
        if entry is None or entry.dtype not in _KINDS or entry.shape != tuple(parameter.shape):
            raise UnsupportedModelError(
                f"{key} is not plain in the checkpoint: GGUF is written of weights outside experts that are float32, "
                "float16 or bfloat16"
            )
        (name,) = made.sources
        if rest is not None and key in anew:
            found.append(in_blocks(entry, rest, name, rest.upper()))
            continue
        shape = entry.shape if made.undo is None else (math.prod(entry.shape),)  # a gate of one row
        dtype = "float32" if len(shape) == 1 or ".ffn_gate_inp." in name else entry.dtype
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        found.append(Tensor(name, _KINDS[dtype], shape, nbytes, entry, as_=dtype))
    return found


def _matrices(path: str, module: Any, names: TensorNames) -> list[Matrix]:
    """Of all experts of a layer: gate, up, down."""
    called = names.experts(path)
    rows, cols = next(param.shape for param in param_specs(module) if param.name == "gate_up_proj")
    half = rows // 2
    return [
        Matrix(called["gate"], None, "gate_up_proj", half, cols),
        Matrix(called["up"], None, "gate_up_proj", half, cols, start=half),
        Matrix(called["down"], None, "down_proj", cols, half),
    ]


def _experts(layer: int, matrix: Matrix, kind: str, experts: int) -> Tensor:
    how = encoding(kind)
    (plane,) = how.planes
    shape = (experts, *how.shapes(matrix.rows, matrix.cols)[plane.name])
    nbytes = math.prod(shape) * ITEMSIZE[plane.dtype]
    return Tensor(matrix.name, _KINDS.get(kind, kind.upper()), shape, nbytes, None, layer, matrix, kind, plane.name)


def _files(
    name: str, architecture: str, tensors: list[Tensor], shard_bytes: int, describe: Callable[[Any], None]
) -> list[Shard]:
    """Headers by the library's own writer, which also divides tensors among files."""
    import gguf
    import numpy as np

    split = shard_bytes if sum(each.nbytes for each in tensors) > shard_bytes else 0
    writer = gguf.GGUFWriter(None, architecture, split_max_size=split)
    writer.data_alignment = _ALIGNMENT
    writer.add_name(name)
    describe(writer)
    for each in tensors:
        dtype = np.dtype("uint8") if each.plane == "blocks" else np.dtype("float32")
        kind = gguf.GGMLQuantizationType[each.code]
        writer.add_tensor_info(each.name, each.shape, dtype, each.nbytes, raw_dtype=kind)
    by_name = {each.name: each for each in tensors}
    with tempfile.TemporaryDirectory() as temporary:
        writer.write_header_to_file(Path(temporary) / f"{name}.gguf")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        headers = sorted(Path(temporary).iterdir())
        return [
            Shard(
                path.name,
                tuple(by_name[each] for each in each_file),
                path.read_bytes() + bytes(-path.stat().st_size % _ALIGNMENT),
                _ALIGNMENT,
            )
            for path, each_file in zip(headers, writer.tensors, strict=True)
        ]


def _describe(config: Any, folder: Path, writer: Any) -> None:
    describe_model(config, writer)
    _tokenizer(writer, folder, config.vocab_size)


def describe_model(config: Any, writer: Any) -> None:
    """Metadata of a model of `ARCHITECTURES`, after llama.cpp's converter."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if getattr(config, "clip_qkv", None) is not None:
        writer.add_clamp_kqv(config.clip_qkv)


def _tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Byte-level BPE of tokenizer.json; a checkpoint without one gives a file without one."""
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        writer.add_tokenizer_model("none")
        return
    fail = partial(CheckpointError, file=str(file))
    table = jsontext.read(file, "tokenizer", fail)
    try:
        pre = _pre(table)
        words = {int(number): word for word, number in table["model"]["vocab"].items()}
        added = {int(each["id"]): (each["content"], bool(each["special"])) for each in table["added_tokens"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise fail(f"{file}: not a tokenizer that emoe knows: {error!r}") from error
    if pre is None:
        raise UnsupportedModelError(
            f"{file} cuts text in a way that emoe has no name of llama.cpp for; it knows byte-level BPE of Qwen, GPT-2 "
            "and SmolLM. Without --gguf it writes safetensors"
        )
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(size):
        if number in added:
            tokens.append(added[number][0])
            types.append(kinds.CONTROL if added[number][1] else kinds.USER_DEFINED)
        else:
            tokens.append(words.get(number, f"[PAD{number}]"))
            types.append(kinds.NORMAL if number in words else kinds.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _pre(table: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level BPE cuts text; None where it is none of those known."""
    before = table.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    kinds = [step.get("type") for step in steps]
    if table["model"]["type"] != "BPE" or not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2" if steps[0].get("use_regex", True) else None
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    pattern = (steps[0].get("pattern") or {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    return "qwen2" if pattern == _QWEN and not steps[1].get("use_regex", True) else None
