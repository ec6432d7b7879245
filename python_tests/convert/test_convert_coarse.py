"""`emoe convert MODEL --coarse`: copies made beforehand are those that loading would make."""

from __future__ import annotations

import logging

import pytest
import torch
from commands import run, run_json

import emoe
from emoe.convert.coarse import keep_copies
from emoe.errors import ConfigError
from emoe.files import cache_folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))


def _load(folder, coarse):
    model = emoe.from_pretrained(folder, memory_budget=0.5, context=64, routing="coarse", coarse=coarse)
    with torch.no_grad():
        logits = model(torch.arange(3, 19).unsqueeze(0)).logits
    model.emoe.close(restore=False)
    return logits


@pytest.mark.parametrize(("family", "coarse"), [("olmoe", "q8_0"), ("qwen3_moe", "q4_k"), ("gpt_oss", "int8")])
def test_they_are_the_bytes_that_loading_makes_and_loading_reads_them(family, coarse, checkpoint, caplog):
    folder = checkpoint(family)
    expected = _load(folder, coarse)
    (file,) = cache_folder().glob("copies-*.bin")
    made = file.read_bytes()
    file.unlink()
    kept = keep_copies(folder, coarse)
    assert kept.made and kept.file == str(file) and file.read_bytes() == made
    assert 0 < kept.copy_bytes < kept.expert_bytes
    assert not keep_copies(folder, coarse).made, "they are there already"
    with caplog.at_level(logging.INFO, "emoe"):
        assert torch.equal(_load(folder, coarse), expected)
    assert f"read from {file}" in caplog.text
    assert "made copies of" not in caplog.text


def test_damaged_ones_are_made_anew(checkpoint):
    kept = keep_copies(checkpoint("olmoe"), "q8_0")
    (file,) = cache_folder().glob("copies-*.bin")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = keep_copies(checkpoint("olmoe"), "q8_0")
    assert again.made and again.file == kept.file and file.read_bytes() == good


def test_what_is_made_and_where_is_said(checkpoint, capsys):
    folder = checkpoint("olmoe")
    status, text, _ = run(capsys, "convert", folder, "--coarse", "q8_0")
    (file,) = cache_folder().glob("copies-*.bin")
    assert status == 0 and text.startswith(f"made: {file}, copies of all experts in q8_0: ")
    status, text, _ = run(capsys, "convert", folder, "--coarse", "q8_0")
    assert status == 0 and text.startswith(f"there already: {file}")
    status, found = run_json(capsys, "convert", folder, "--coarse", "q8_0")
    assert status == 0 and found["file"] == str(file) and found["made"] is False and found["coarse"] == "q8_0"


@pytest.mark.parametrize("words", [
    ("OUT",), ("--experts", "q8_0"), ("--verify", "OUT"), ("--gguf",), ("--rest", "q8_0"), ("--memory", "1G"),
    ("--keep-tasks", "/nowhere"), ("--perplexity", "/nowhere"),
])  # fmt: skip
def test_it_goes_with_a_model_and_nothing_else(words, checkpoint, tmp_path, capsys):
    given = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    status, _, err = run(capsys, "convert", checkpoint("olmoe"), *given, "--coarse", "q8_0")
    assert status == 2 and f"--coarse ENCODING does not go with {words[0]}" in err
    assert not (tmp_path / "out").exists() and not list(cache_folder().glob("copies-*"))


def test_an_encoding_that_is_none_is_refused_with_the_choices(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="coarse='q3' is not one of: int4, int8, q4_k"):
        keep_copies(checkpoint("olmoe"), "q3")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EMOE_CACHE", str(blocked / "cache"))
    with pytest.raises(ConfigError, match="file"):
        keep_copies(checkpoint("olmoe"), "q8_0")
