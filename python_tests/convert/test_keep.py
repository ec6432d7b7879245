"""Layers that tasks need keep more bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_convert import tensors_of, wide

import emoe
from emoe.convert import run as running
from emoe.convert.keep import layers_to_keep, needed
from emoe.convert.run import convert
from emoe.errors import ConfigError


def test_the_fewest_layers_that_account_for_half_of_a_tasks_loss_are_kept():
    assert needed(np.array([[0.1, 0.5, 0.2, 0.1]])) == {1}
    assert needed(np.array([[0.3, 0.1, 0.3, 0.3]])) == {0, 2}
    assert needed(np.array([[0.25, 0.25, 0.25, 0.25]])) == {0, 1}


def test_every_task_counts_and_gains_do_not():
    assert needed(np.array([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]])) == {0, 2}
    assert needed(np.array([[-5.0, 0.1, 0.3]])) == {2}
    assert needed(np.zeros((2, 3))) == frozenset()
    assert needed(np.array([[0.2, 0.3, 0.5]]), share=1.0) == {0, 1, 2}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"task": task, "prompt": f"w{n} w{n + 1} w{n + 2}", "reference": f"w{n + 3} w{n + 4}", "split": split}
        for task, first in (("a", 5), ("b", 60))
        for n, split in ((first, "train"), (first + 9, "train"), (first + 20, "dev"))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_the_need_of_each_layer_is_measured_on_the_prompts(model_folder, prompts):
    steps = []
    found = layers_to_keep(model_folder, prompts, 1 << 30, lambda *step: steps.append(step))
    assert found["tasks"] == ["a", "b"] and 0 < len(found["layers"]) < 3
    assert all(len(loss) == 3 for loss in found["loss"].values())
    assert steps[-1][0] == steps[-1][1]
    assert set(found["layers"]) == needed(np.array(list(found["loss"].values())))


@pytest.mark.parametrize(
    ("experts", "more"),
    [("q4_k", "q6_k"), ("q4_0", "q8_0"), ("mxfp4", "e4m3-128x128-float32"), ("q8_0", "bfloat16")],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_kept_layers_have_the_next_encoding_and_the_model_runs(family, experts, more, tmp_path, monkeypatch):
    source = wide(tmp_path / "source", family, mlp_only_layers=[])
    monkeypatch.setattr(running, "layers_to_keep", lambda *_: {"layers": [1], "tasks": ["a"], "loss": {}})
    report = convert(source, tmp_path / "out", experts, keep_tasks="prompts.jsonl", progress=False)
    assert report.kept == {"layers": [1], "tasks": ["a"], "loss": {}}
    matrices = {"qwen3_moe": 24, "gpt_oss": 16}[family]
    assert report.encodings == {experts: matrices, more: matrices}
    names = tensors_of(tmp_path / "out")
    if family == "qwen3_moe" and experts == "q4_k":
        assert "model.layers.0.mlp.experts.0.up_proj.weight_q4_k" in names
        assert "model.layers.1.mlp.experts.0.up_proj.weight_q6_k" in names
    model = emoe.from_pretrained(tmp_path / "out", memory_budget=0.5, kernels="stock")
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    model.emoe.close(restore=False)


def test_kept_layers_of_gguf_have_more_bits_too(tmp_path, monkeypatch):
    source = wide(tmp_path / "source", "qwen3_moe", mlp_only_layers=[], norm_topk_prob=True)
    monkeypatch.setattr(running, "layers_to_keep", lambda *_: {"layers": [0], "tasks": ["a"], "loss": {}})
    report = convert(source, tmp_path / "out", "mxfp4", keep_tasks="prompts.jsonl", gguf=True, progress=False)
    assert report.encodings == {"gguf_mxfp4": 24, "q8_0": 24}


def test_prompts_that_are_not_there_are_known_before_anything_is_written(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="no file of prompts"):
        convert(model_folder, tmp_path / "out", "q8_0", keep_tasks=tmp_path / "none.jsonl", progress=False)
    assert not list(tmp_path.iterdir())
