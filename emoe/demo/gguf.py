"""Reads one kind of GGUF file, a dense Llama model, in a pass: weights by their names in Transformers, and tokenizer.

Not a loader of GGUF files in general (store/gguf.py is): the file is known by its SHA-256 and trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from emoe.errors import CheckpointError, DemoBuildError
from emoe.files.gguf import open_header

if TYPE_CHECKING:
    from transformers import LlamaConfig

_CONTROL_TOKEN = 3
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


class Gguf:
    """A file.

    Attributes:
        metadata: key to value, arrays as lists.

    Raises:
        DemoBuildError: the file is none of these, by its path and what is different.
    """

    def __init__(self, path: Path) -> None:
        try:
            header = open_header(path)
        except CheckpointError as error:
            raise DemoBuildError(str(error)) from error
        self.path, self.metadata, self._tensors = path, header.metadata, header.tensors
        if (found := self.metadata.get("general.architecture")) != "llama":
            raise DemoBuildError(f"{path} holds a model of architecture {found!r}, not 'llama'")

    def tensor(self, name: str) -> Tensor:
        """One tensor as float32, in its shape in torch (the file's own order of dimensions is the other way round)."""
        import gguf

        stored = self._tensors[name]
        raw = np.fromfile(self.path, np.uint8, stored.nbytes, offset=stored.offset).reshape(*stored.shape[:-1], -1)
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[stored.kind])
        return torch.from_numpy(values.reshape(stored.shape))

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
