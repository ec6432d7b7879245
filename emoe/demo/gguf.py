"""Reads one kind of GGUF file, a Llama model in Q4_1, Q8_0 and float32, in a pass: metadata, weights, tokenizer.

Not a loader of GGUF files in general: the file is known by its SHA-256 and trusted. Format: ggml `docs/gguf.md`, blocks
`ggml-common.h`.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emoe.errors import DemoBuildError

if TYPE_CHECKING:
    from transformers import LlamaConfig

MAGIC, VERSION = b"GGUF", 3
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL_TOKEN = 3
_TYPES = {  # ggml's number -> name, values of a block, bytes of a block
    0: ("F32", 1, 4),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


@dataclass(frozen=True)
class _Stored:
    kind: int
    shape: tuple[int, ...]
    offset: int  # in the part of the file that holds the weights


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        code = f"<{count}{_NUMBERS[kind]}"
        self.at += struct.calcsize(code)
        return list(struct.unpack_from(code, self.data, self.at - struct.calcsize(code)))


class Gguf:
    """An open file, mapped as long as this lives.

    Attributes:
        metadata: key to value, arrays as lists.

    Raises:
        DemoBuildError: the file is none of these, by its path and what is different.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._read_header()

    def _read_header(self) -> None:
        head = _Cursor(self._data)
        magic, version = head.number("4s"), head.number("I")
        if (magic, version) != (MAGIC, VERSION):
            raise DemoBuildError(
                f"{self.path} begins with {magic!r} version {version}, not {MAGIC!r} version {VERSION}"
            )
        tensors, keys = head.number("Q"), head.number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = head.string()
            self.metadata[key] = head.value(head.number("I"))
        self._tensors: dict[str, _Stored] = {}
        for _ in range(tensors):
            name = head.string()
            shape = tuple(head.number("Q") for _ in range(head.number("I")))[::-1]
            self._tensors[name] = _Stored(head.number("I"), shape, head.number("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self._weights = -(-head.at // alignment) * alignment
        if (found := self.metadata.get("general.architecture")) != "llama":
            raise DemoBuildError(f"{self.path} holds a model of architecture {found!r}, not 'llama'")

    def tensor(self, name: str) -> Tensor:
        """One tensor as float32, in its shape in torch (the file's own order of dimensions is the other way round)."""
        stored = self._tensors[name]
        if stored.kind not in _TYPES:
            known = ", ".join(kind for kind, _, _ in _TYPES.values())
            raise DemoBuildError(f"{self.path}: {name} is of ggml type {stored.kind}; known here: {known}")
        kind, values, nbytes = _TYPES[stored.kind]
        blocks = math.prod(stored.shape) // values
        raw = np.frombuffer(self._data, np.uint8, blocks * nbytes, self._weights + stored.offset)
        return torch.from_numpy(_dequantized(kind, raw.reshape(blocks, nbytes)).reshape(stored.shape))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values as `LlamaForCausalLM` has them, float32; one tensor at a time is in memory."""
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
        for name in self._tensors:
            *block, part, _ = name.split(".")  # blk.LAYER.PART.weight, PART.weight
            tensor = self.tensor(name)
            if part in heads:  # GGUF keeps the two halves of a rotated head interleaved
                count = self.metadata[f"llama.attention.{heads[part]}"]
                tensor = tensor.view(count, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            yield (f"model.layers.{block[1]}.{_LAYER[part]}" if block else _MODEL[part]) + ".weight", tensor

    def config(self) -> LlamaConfig:
        """The model's config; its embeddings are tied."""
        from transformers import LlamaConfig

        of, ids = self.metadata, self._special()
        return LlamaConfig(
            vocab_size=len(of["tokenizer.ggml.tokens"]),
            hidden_size=of["llama.embedding_length"],
            intermediate_size=of["llama.feed_forward_length"],
            num_hidden_layers=of["llama.block_count"],
            num_attention_heads=of["llama.attention.head_count"],
            num_key_value_heads=of["llama.attention.head_count_kv"],
            max_position_embeddings=of["llama.context_length"],
            rms_norm_eps=of["llama.attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": of["llama.rope.freq_base"]},
            tie_word_embeddings=True,
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
            pad_token_id=ids["pad"],
        )

    def tokenizer(self) -> Any:
        """Byte-level BPE with the file's chat template, as a `PreTrainedTokenizerFast`."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = self.metadata["tokenizer.ggml.tokens"]
        merges = [tuple(pair.split(" ", 1)) for pair in self.metadata["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        kinds = zip(words, self.metadata["tokenizer.ggml.token_type"], strict=True)
        tokenizer.add_special_tokens(
            [AddedToken(word, normalized=False, special=True) for word, kind in kinds if kind == _CONTROL_TOKEN]
        )
        special = {f"{name}_token": words[number] for name, number in self._special().items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, chat_template=self.metadata["tokenizer.chat_template"], **special
        )

    def _special(self) -> dict[str, int]:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        return {name: self.metadata[f"tokenizer.ggml.{stored}_token_id"] for name, stored in names.items()}


def _dequantized(kind: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [blocks, values] of blocks [blocks, bytes]; a copy, never a view of the file."""

    def halves(at: int) -> NDArray[np.float32]:
        return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)

    if kind == "F32":
        return blocks.copy().view(np.float32)
    if kind == "Q8_0":  # scale, 32 int8
        return blocks[:, 2:].copy().view(np.int8) * halves(0)
    # Q4_1: scale, minimum, 16 bytes of two values: the low halves are the first 16 values
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles * halves(0) + halves(2)
