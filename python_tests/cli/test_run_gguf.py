"""`emoe run` and `emoe plan` on a GGUF file: the tokenizer and its chat template come from the file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import families
import gguf
import gguf_models as gg
import pytest
import torch
import transformers as tf
from commands import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from emoe import errors, generate

_TEXTS = ["The quick brown fox jumps over the lazy dog.", "Numbers: 1 22 333, and\n\tspaces  too.", "ä ß 你好 🚀"]
_TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}<|assistant|>"
_SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """Byte-level BPE as GPT-2 cuts text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 4, trainer)
    return tokenizer


def _add(writer: Any, tokenizer: Tokenizer, pre: str = "gpt-2") -> None:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([word for word, _ in vocabulary])
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kinds[word in _SPECIAL] for word, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(_TEMPLATE)


def _file(folder: Path, tokenizer: Tokenizer, pre: str = "gpt-2", **kwargs: Any) -> Path:
    config = families._config(
        tf.OlmoeConfig, intermediate_size=families.INTERMEDIATE, num_experts=8, vocab_size=tokenizer.get_vocab_size()
    )()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    families.randomize(model)
    return gg.write(
        folder / "model.gguf", "olmoe", gg.arrays(model, "olmoe"), gg.base(config, expert_count=8),
        tokenizer=lambda writer: _add(writer, tokenizer, pre), **kwargs,
    )  # fmt: skip


def test_the_tokenizer_of_a_file_cuts_text_as_the_one_it_was_made_of(trained, tmp_path):
    path = _file(tmp_path, trained, parts=20)
    for named in (path, tmp_path):
        tokenizer = generate.load_tokenizer(str(named))
        for text in _TEXTS:
            assert tokenizer(text)["input_ids"] == trained.encode(text).ids
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|end|>", "<|pad|>")
        chat = generate.encode(tokenizer, _TEXTS[0])[0].tolist()
        assert [chat[0], chat[-2], chat[-1]] == [3, 2, 4]


def test_text_cut_in_a_way_that_nobody_knows_is_said(trained, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "emoe"):
        generate.load_tokenizer(str(_file(tmp_path, trained, pre="glm4")))
    assert "'glm4', which Transformers does not know; it is cut as for GPT-2" in caplog.text


def test_a_file_without_a_tokenizer_is_an_error_that_names_it(tmp_path):
    path = gg.write(
        tmp_path / "m.gguf", "olmoe", {"token_embd.weight": torch.zeros(4, 32)}, {}, tokenizer=lambda _: None
    )
    with pytest.raises(errors.ConfigError, match=r"m\.gguf has no tokenizer"):
        generate.load_tokenizer(str(path))


def test_run_and_plan_take_a_file(trained, tmp_path, capsys):
    path = _file(tmp_path, trained)
    status, out, err = run(capsys, "plan", "--model", path, "--memory-budget", "50%", "--no-forecast", "--json")
    assert status == 0, err
    assert json.loads(out)["encodings"] == ["float32"]
    common = ("--prompt", _TEXTS[0], "--max-new-tokens", "4", "--memory-budget", "50%", "--json")
    answers = []
    for model in (path, tmp_path):
        status, out, err = run(capsys, "run", "--model", model, *common)
        assert status == 0, err
        answers.append(json.loads(out))
    assert answers[0]["prompt_tokens"] == len(trained.encode(_TEXTS[0]).ids) + 3
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
