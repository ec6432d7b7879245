"""GGUF files that `emoe convert --gguf` writes: the model that emoe reads of them, and what they say of themselves."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from test_convert import IDS, wide
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import emoe
from emoe import generate
from emoe.convert.gguf import _QWEN
from emoe.convert.run import convert
from emoe.convert.state import RECORD, unfinished, verify
from emoe.errors import ConfigError, UnsupportedModelError
from emoe.model.encode import encode

FAMILIES = {
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": False},
    "olmoe": {"intermediate_size": 256, "num_key_value_heads": 4},
}


def model_of(folder, family="olmoe", **values):
    return wide(folder / "source", family, **{**FAMILIES[family], **values})


def logits(folder):
    model = emoe.from_pretrained(folder, memory_budget=1.0, kernels="stock", dtype="float32")
    with torch.no_grad():
        found = model(IDS).logits
    model.emoe.close(restore=False)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", ["q2_k", "q3_k", "q4_k", "q8_0", "mxfp4"])
def test_the_model_of_the_gguf_is_that_of_the_safetensors(family, experts, tmp_path):
    source = model_of(tmp_path, family)
    convert(source, tmp_path / "gguf", experts, gguf=True, progress=False)
    convert(source, tmp_path / "safetensors", experts, progress=False)
    expected = logits(tmp_path / "safetensors")
    assert (logits(tmp_path / "gguf") - expected).norm() < 1e-5 * expected.norm()
    names = [path.name for path in (tmp_path / "gguf").iterdir()]
    assert sorted(names) == sorted([f"source-{experts.upper()}.gguf", RECORD])


def test_tensors_have_the_types_that_llama_cpp_wants(tmp_path):
    source = model_of(tmp_path, "qwen2_moe", moe_intermediate_size=320)
    report = convert(source, tmp_path / "out", "q4_k", gguf=True, progress=False)
    reader = gguf.GGUFReader(tmp_path / "out/source-Q4_K.gguf")
    kinds = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert kinds["blk.1.ffn_gate_exps.weight"] == ("Q4_K", [256, 320, 8])
    assert kinds["blk.1.ffn_down_exps.weight"] == ("Q5_0", [320, 256, 8])
    assert kinds["blk.1.ffn_gate_inp.weight"] == ("F32", [256, 8])
    assert kinds["blk.1.ffn_gate_inp_shexp.weight"] == ("F32", [256])
    assert kinds["blk.0.attn_norm.weight"][0] == "F32" and kinds["blk.0.attn_q.weight"][0] == "BF16"
    assert [(each.matrices, each.got) for each in report.fallbacks] == [("down_exps.weight", "q5_0")]
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen2moe"
    assert fields["qwen2moe.expert_feed_forward_length"] == 320
    assert fields["qwen2moe.expert_shared_feed_forward_length"] == 32


def test_llama_cpp_gets_the_output_that_it_wants_where_it_is_the_embeddings(tmp_path):
    for family, wanted in (("olmoe", True), ("qwen2_moe", True), ("qwen3_moe", False)):
        source = model_of(tmp_path / family, family, tie_word_embeddings=True)
        convert(source, tmp_path / family / "out", "q8_0", gguf=True, progress=False)
        reader = gguf.GGUFReader(tmp_path / family / "out/source-Q8_0.gguf")
        assert ("output.weight" in {tensor.name for tensor in reader.tensors}) == wanted
        assert logits(tmp_path / family / "out").isfinite().all()


def test_values_are_those_of_the_encoder(tmp_path):
    source = model_of(tmp_path)
    convert(source, tmp_path / "out", "q6_k", gguf=True, progress=False)
    from safetensors.torch import load_file

    before = load_file(source / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "out/source-Q6_K.gguf")
    data = {tensor.name: tensor.data for tensor in reader.tensors}
    for kind in ("gate", "up", "down"):
        expected = encode("q6_k", before[f"model.layers.1.mlp.experts.5.{kind}_proj.weight"]).planes["blocks"]
        assert torch.equal(torch.from_numpy(data[f"blk.1.ffn_{kind}_exps.weight"][5].copy()), expected)


def test_a_model_larger_than_a_file_is_in_parts_that_resume(tmp_path, monkeypatch):
    source = model_of(tmp_path)
    whole = convert(source, tmp_path / "whole", "q8_0", gguf=True, progress=False)
    from emoe.convert import run

    write = run._write

    def stop(folder, shard, *rest):
        if len(list(folder.glob("*.gguf"))) == 2:
            raise KeyboardInterrupt
        return write(folder, shard, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "_write", stop)
        convert(source, out, "q8_0", gguf=True, shard_bytes=1 << 20, progress=False)
    assert len(list(unfinished(out).glob("*.gguf"))) == 2
    report = convert(source, out, "q8_0", gguf=True, shard_bytes=1 << 20, progress=False)
    assert report.resumed == 2 and report.losses == whole.losses
    verify(out)
    assert len(list(out.glob("*.gguf"))) > 3
    assert torch.equal(logits(out), logits(tmp_path / "whole"))


TEXTS = ["The quick brown fox doesn't jump over 22 lazy dogs.", "Numbers: 1 22 333, and\n\tspaces  too.", "ä ß 你好 🚀"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def add_tokenizer(source, cut):
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(source)


@pytest.mark.parametrize("name", CUTS)
def test_the_tokenizer_of_the_file_cuts_text_as_that_of_the_checkpoint(name, tmp_path):
    source = model_of(tmp_path, vocab_size=400)
    add_tokenizer(source, CUTS[name])
    convert(source, tmp_path / "out", "q8_0", gguf=True, progress=False)
    file = tmp_path / "out/source-Q8_0.gguf"
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    before, after = generate.load_tokenizer(str(source)), generate.load_tokenizer(str(file))
    for text in (*TEXTS, "it's 2026"):
        ids = before(text, add_special_tokens=False)["input_ids"]
        assert after(text, add_special_tokens=False)["input_ids"] == ids
    assert (after.bos_token_id, after.eos_token_id) == (1, 2)


def test_a_tokenizer_that_llama_cpp_may_cut_otherwise_is_refused(tmp_path):
    source = model_of(tmp_path, vocab_size=400)
    add_tokenizer(source, pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES]))
    with pytest.raises(UnsupportedModelError, match="cuts text"):
        convert(source, tmp_path / "out", "q8_0", gguf=True, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "values", "said"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("olmoe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(family, values, said, tmp_path):
    source = model_of(tmp_path, family, **values)
    with pytest.raises(UnsupportedModelError, match=said):
        convert(source, tmp_path / "out", "q8_0", gguf=True, progress=False)


def test_other_families_and_fp8_are_refused(checkpoint, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"of olmoe, qwen2_moe, qwen3_moe, not of mixtral"):
        convert(checkpoint("mixtral"), tmp_path / "out", "q8_0", gguf=True)
    with pytest.raises(ConfigError, match="GGUF holds no FP8"):
        convert(model_of(tmp_path), tmp_path / "out", "fp8", gguf=True)
    assert json.loads((tmp_path / "source/config.json").read_text())["model_type"] == "olmoe"


def test_a_gguf_file_is_no_source(tmp_path):
    convert(model_of(tmp_path), tmp_path / "out", "q8_0", gguf=True, progress=False)
    for given in (tmp_path / "out", tmp_path / "out/source-Q8_0.gguf"):
        with pytest.raises(UnsupportedModelError, match="GGUF already"):
            convert(given, tmp_path / "again", "q4_0")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rest_of_q8_0_is_that_of_the_safetensors(family, tmp_path):
    source = model_of(tmp_path, family)
    report = convert(source, tmp_path / "gguf", "q4_k", rest="q8_0", gguf=True, progress=False)
    same = convert(source, tmp_path / "safetensors", "q4_k", rest="q8_0", progress=False)
    assert report.rest_encoded == same.rest_encoded > 0
    expected = logits(tmp_path / "safetensors")
    assert (logits(tmp_path / "gguf") - expected).norm() < 1e-5 * expected.norm()
    kinds = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf"))).tensors
    }
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["token_embd.weight"] == "BF16" and kinds["blk.0.attn_norm.weight"] == "F32"
