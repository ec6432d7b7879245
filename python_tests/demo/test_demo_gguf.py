"""The reader of the demo's GGUF file: a file written here byte by byte is a Llama model and its tokenizer."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM

from emoe.demo import gguf, source
from emoe.errors import DemoBuildError

LAYERS, HIDDEN, NEURONS, HEADS, KV_HEADS = 1, 32, 64, 4, 2
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["<none>", "<begin>", "<end>", *ALPHABET, "ab", "abc", "Ġa"]
MERGES = ["a b", "ab c", "Ġ a"]
TEMPLATE = "{% for m in messages %}<begin>{{ m['content'] }}<end>{% endfor %}"


def _string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value):
    """Kind and bytes of a metadata value."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def _q4_1(values, rng):
    """Bytes and meaning of random blocks of 32 values, by the definition: value i is low half i, 16 + i high half i."""
    raw, meaning = b"", []
    for _ in range(values // 32):
        scale, least = np.float16(rng.normal()), np.float16(rng.normal())
        quants = rng.integers(0, 16, 32)
        raw += scale.tobytes() + least.tobytes() + bytes(int(quants[i] | quants[i + 16] << 4) for i in range(16))
        meaning += [np.float32(scale) * np.float32(quant) + np.float32(least) for quant in quants]
    return raw, meaning


def _q8_0(values, rng):
    raw, meaning = b"", []
    for _ in range(values // 32):
        scale, quants = np.float16(rng.normal()), rng.integers(-128, 128, 32)
        raw += scale.tobytes() + quants.astype(np.int8).tobytes()
        meaning += [np.float32(scale) * np.float32(quant) for quant in quants]
    return raw, meaning


def _f32(values, rng):
    meaning = rng.normal(size=values).astype(np.float32)
    return meaning.tobytes(), list(meaning)


@pytest.fixture
def written(tmp_path):
    """written(**changed metadata) -> path, and the values of every tensor by its name in the file."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (8, len(WORDS), HIDDEN), "output_norm": (0, HIDDEN)}
    shapes |= {"blk.0.attn_norm": (0, HIDDEN), "blk.0.ffn_norm": (0, HIDDEN)}
    shapes |= {"blk.0.attn_q": (3, HIDDEN, HIDDEN), "blk.0.attn_output": (3, HIDDEN, HIDDEN)}
    shapes |= {f"blk.0.attn_{name}": (3, HIDDEN * KV_HEADS // HEADS, HIDDEN) for name in "kv"}
    shapes |= {f"blk.0.ffn_{name}": (3, NEURONS, HIDDEN) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (3, HIDDEN, NEURONS)}

    def write(**changed):
        metadata = {
            "general.architecture": "llama",
            "llama.block_count": LAYERS,
            "llama.context_length": 128,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": NEURONS,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 2.0**-17,
            "llama.rope.freq_base": 100000.0,
            "tokenizer.ggml.tokens": WORDS,
            "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(WORDS) - 3),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.chat_template": TEMPLATE,
        } | {key.replace("__", "."): value for key, value in changed.items()}
        head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata))
        head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
        data, values = b"", {}
        for name, (kind, *shape) in shapes.items():
            raw, meaning = {0: _f32, 3: _q4_1, 8: _q8_0}[kind](int(np.prod(shape)), rng)
            head += _string(f"{name}.weight")
            head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
            data += raw + bytes(-len(raw) % 32)
            values[name] = torch.tensor(np.array(meaning)).view(shape)
        path = tmp_path / "model.gguf"
        path.write_bytes(head + bytes(-len(head) % 32) + data)
        return path, values

    return write


def test_every_weight_has_the_value_that_its_blocks_say_under_its_name_in_transformers(written):
    path, values = written()
    weights = source.read_dense(path).weights
    layer = "model.layers.0."
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.0.attn_norm": layer + "input_layernorm",
        "blk.0.ffn_norm": layer + "post_attention_layernorm", "blk.0.attn_v": layer + "self_attn.v_proj",
        "blk.0.attn_output": layer + "self_attn.o_proj", "blk.0.ffn_gate": layer + "mlp.gate_proj",
        "blk.0.ffn_up": layer + "mlp.up_proj", "blk.0.ffn_down": layer + "mlp.down_proj",
    }  # fmt: skip
    for stored, name in names.items():
        assert torch.equal(weights[f"{name}.weight"], values[stored]), name
    assert len(weights) == len(values)


@pytest.mark.parametrize(("name", "heads"), [("q", HEADS), ("k", KV_HEADS)])
def test_the_halves_of_rotated_heads_are_taken_apart(written, name, heads):
    path, values = written()
    stored = values[f"blk.0.attn_{name}"]
    ours = source.read_dense(path).weights[f"model.layers.0.self_attn.{name}_proj.weight"]
    size = len(stored) // heads
    for head in range(heads):
        for row in range(size // 2):
            assert torch.equal(ours[head * size + row], stored[head * size + 2 * row])
            assert torch.equal(ours[head * size + size // 2 + row], stored[head * size + 2 * row + 1])


def test_the_model_that_is_read_runs_with_its_tied_embeddings_and_its_own_config(written):
    path, values = written()
    dense = source.read_dense(path)
    model = dense.model()
    assert isinstance(model, LlamaForCausalLM) and not model.training
    assert torch.equal(model.lm_head.weight, values["token_embd"])
    config = model.config
    assert (config.num_key_value_heads, config.max_position_embeddings) == (KV_HEADS, 128)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (2.0**-17, 100000.0)
    with torch.no_grad():
        assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, len(WORDS))


def test_the_tokenizer_merges_spaces_and_words_and_keeps_control_tokens_whole(written):
    path, _ = written()
    tokenizer = source.read_dense(path).tokenizer
    words = ["<begin>", "abc", "Ġa", "<end>"]
    assert tokenizer("<begin>abc a<end>")["input_ids"] == [WORDS.index(word) for word in words]
    assert tokenizer.decode(tokenizer("Größe 1 漢")["input_ids"]) == "Größe 1 漢"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<begin>", "<end>", "<end>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<begin>a<end>"


def test_a_file_of_another_kind_is_refused_with_what_it_is(written, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGML" + bytes(64))
    with pytest.raises(DemoBuildError, match=r"other\.gguf: is no GGUF file: it begins with b'GGML'"):
        gguf.Gguf(other)
    path, _ = written(general__architecture="falcon")
    with pytest.raises(DemoBuildError, match="'falcon', not 'llama'"):
        gguf.Gguf(path)
