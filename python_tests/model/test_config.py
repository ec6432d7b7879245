"""Config values given as keywords, configs given as objects and paths, and what is said of a path that will not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
import transformers as tf
from commands import run

import emoe
from emoe import errors
from emoe.model.config import read_config
from emoe.planning.meta import meta_model


@torch.no_grad()
def _logits(model):
    return model(torch.tensor([[5, 6, 7, 8]])).logits


def _plain(path, **given):
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **given).eval()


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_fewer_layers_by_keyword_are_those_of_transformers_in_plan_and_model(name, checkpoint):
    path = checkpoint(name)
    given = {"num_hidden_layers": 2}
    if name == "gpt_oss":
        given["layer_types"] = tf.AutoConfig.from_pretrained(path).layer_types[:2]
    model = emoe.from_pretrained(path, memory_budget=0.5, kernels="stock", **given)
    plan = emoe.plan(path, 0.5, calibrate=False, kernels="stock", **given)
    assert model.config.num_hidden_layers == 2
    assert model.emoe.plan == plan
    assert len(plan.slots_per_layer) == len(meta_model(path, **given).model.layers) - (name == "deepseek_v3")
    torch.testing.assert_close(_logits(model), _logits(_plain(path, **given)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "mixtral"])
def test_more_experts_of_a_token_by_keyword_are_known_to_plan_model_and_trace(name, checkpoint, tmp_path):
    path = checkpoint(name)
    model = emoe.from_pretrained(path, memory_budget=0.75, kernels="stock", num_experts_per_tok=5)
    assert model.emoe.plan.top_k == 5
    assert emoe.plan(path, 0.75, num_experts_per_tok=5, calibrate=False).top_k == 5
    with model.emoe.record(tmp_path / "trace.npz"):
        ours = _logits(model)
    assert emoe.load_trace(tmp_path / "trace.npz").experts.shape[2] == 5
    torch.testing.assert_close(ours, _logits(_plain(path, num_experts_per_tok=5)), atol=1e-4, rtol=0)


def test_a_sliding_window_by_keyword_is_in_the_bytes_of_the_kv_cache(checkpoint):
    path = checkpoint("mixtral")
    whole = emoe.plan(path, 0.5, context=512, calibrate=False).kv_bytes
    assert emoe.plan(path, 0.5, context=512, sliding_window=64, calibrate=False).kv_bytes < whole


@pytest.mark.parametrize("form", [str, Path, lambda path: str(path / "config.json")], ids=["str", "path", "json"])
def test_a_config_may_be_a_folder_or_a_file(form, checkpoint, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((checkpoint("olmoe") / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 4}))
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.75, config=form(other), rms_norm_eps=0.125)
    assert model.emoe.plan.top_k == model.config.num_experts_per_tok == 4
    assert model.config.rms_norm_eps == 0.125


def test_a_config_object_is_taken_and_not_changed(checkpoint):
    config = tf.AutoConfig.from_pretrained(checkpoint("olmoe"), num_experts_per_tok=4)
    before = config.to_dict()
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.75, config=config, dtype="bfloat16")
    assert emoe.plan(checkpoint("olmoe"), 0.75, config=config, dtype="bfloat16", calibrate=False).top_k == 4
    assert model.emoe.plan.top_k == 4
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [({"config": {"num_hidden_layers": 2}}, "config=dict is not a config"), ({"config": "/nowhere"}, "no such folder"),
     ({"num_hidden_layer": 2}, "did you mean 'num_hidden_layers'"), ({"revison": "main"}, "did you mean 'revision'"),
     ({"attn_implementaton": "eager"}, "did you mean 'attn_implementation'"),
     ({"zzz": 1}, "options are: memory_budget"),
     ({"num_hidden_layers": "two"}, "num_hidden_layers='two'"),
     ({"load_in_4bit": True}, "load_in_4bit=True is no option here")],
)  # fmt: skip
def test_a_keyword_that_nobody_knows_is_refused_with_the_nearest(given, said, checkpoint):
    for call in (emoe.from_pretrained, emoe.plan):
        with pytest.raises(errors.EmoeError, match=said):
            call(checkpoint("olmoe"), memory_budget=0.5, **given)


def test_values_beside_a_config_object_are_refused_with_the_place_for_them(checkpoint):
    config = tf.AutoConfig.from_pretrained(checkpoint("olmoe"))
    with pytest.raises(errors.ConfigError, match=r"set config\.num_hidden_layers"):
        emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, config=config, num_hidden_layers=2)


def test_what_was_read_may_be_read_again(checkpoint):
    given = {"num_hidden_layers": 2, "attn_implementation": "eager", "local_files_only": True, "revision": None}
    config, rest = read_config(checkpoint("olmoe"), given)
    assert config.num_hidden_layers == 2
    assert read_config(checkpoint("olmoe"), {"config": config, **rest}) == (config, rest)
    assert rest == {"attn_implementation": "eager", "local_files_only": True, "trust_remote_code": False}


@pytest.fixture
def own_code(tmp_path):
    """A checkpoint that brings its classes with it."""
    path = families.save("qwen3_moe", tmp_path / "own")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own_moe", "auto_map": {"AutoConfig": "own_config.Own", "AutoModelForCausalLM": "own.Own"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own_config.py").write_text("raise SystemExit('this code was run')\n")
    return path


def test_code_of_a_checkpoint_is_not_run_unasked_and_the_refusal_says_how(own_code, model_folder, capsys):
    for call in (emoe.plan, emoe.from_pretrained):
        for given in ({}, {"trust_remote_code": False}, {"trust_remote_code": None}):
            with pytest.raises(errors.ConfigError, match=r"trust_remote_code=True.*read it first"):
                call(own_code, memory_budget=0.5, **given)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, own_code)
    for words in (["plan"], ["run", "--prompt", "w5"]):
        status, _, err = run(capsys, *words, "--model", own_code)
        assert status == 2
        assert "--trust-remote-code" in err


def test_code_of_a_checkpoint_is_run_when_asked_for(own_code):
    with pytest.raises(SystemExit, match="this code was run"):
        emoe.plan(own_code, 0.5, trust_remote_code=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_gguf_file_that_is_missing_or_empty_is_an_error_that_names_it(exists, tmp_path, capsys):
    file = tmp_path / "model.Q4_K_M.gguf"
    if exists:
        file.touch()
    for path in (file, str(file), *([tmp_path] if exists else [])):
        for call in (emoe.plan, emoe.from_pretrained):
            with pytest.raises(errors.CheckpointError, match=r"model\.Q4_K_M\.gguf"):
                call(path)
        status, _, err = run(capsys, "plan", "--model", path)
        assert status == 2
        assert "model.Q4_K_M.gguf" in err


def test_a_path_that_is_no_checkpoint_is_refused_by_what_it_is(tmp_path, checkpoint):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(checkpoint("olmoe") / "model.safetensors", tmp_path)
    for path, kind, said in (
        (tmp_path / "model.safetensors", errors.ConfigError, "is a file; give the folder"),
        (empty, errors.CheckpointError, "has no config.json"),
        (tmp_path / "nothing", errors.CheckpointError, "there is no folder"),
        ("./nothing", errors.CheckpointError, "there is no folder"),
        ("a/b/c", errors.CheckpointError, "there is no folder"),
        ("some/nothing", errors.CheckpointError, "some/nothing"),
    ):
        for call in (emoe.plan, emoe.from_pretrained):
            with pytest.raises(kind, match=said):
                call(path)


def test_an_encoder_decoder_is_refused_as_one_with_the_families_that_work(tmp_path):
    config = tf.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4
    )
    config.save_pretrained(tmp_path)
    for call in (emoe.plan, emoe.from_pretrained):
        with pytest.raises(errors.UnsupportedModelError, match=r"SwitchTransformersConfig.*encoder-decoder.*mixtral"):
            call(tmp_path)


def test_a_config_of_no_language_model_is_refused_by_name(tmp_path):
    tf.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(errors.UnsupportedModelError, match=r"no experts"):
        emoe.plan(tmp_path)


def test_a_config_that_makes_no_model_is_an_error_of_the_checkpoint(tmp_path):
    path = families.save("olmoe", tmp_path)
    config = json.loads((path / "config.json").read_text())
    for wrong in ({"num_hidden_layers": "two"}, {"hidden_act": "none such"}, {"model_type": "none such"}):
        (path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(errors.CheckpointError, match=str(tmp_path)):
            emoe.plan(path, 0.5)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("generation_config.json", lambda text: "[]", "generation_config.json is list, not an object of values"),
        ("generation_config.json", lambda text: "null", "generation_config.json is NoneType"),
        ("generation_config.json", lambda text: '{"a": ' + "[" * 5000 + "]" * 5000 + "}", "nested over 64 deep"),
        ("generation_config.json", lambda text: '{"a": ' + "9" * 5000 + "}", "not a generation config"),
        ("config.json", lambda text: json.dumps({**json.loads(text), "architectures": 5}), "architectures=5"),
        ("config.json", lambda text: json.dumps({**json.loads(text), "architectures": [5]}), r"architectures=\[5\]"),
        ("config.json", lambda text: json.dumps({**json.loads(text), "num_hidden_layers": 10**6}), "takes up to 512"),
    ],
)
def test_what_transformers_would_stumble_over_later_is_refused_by_plan_and_load(
    name, change, said, checkpoint, tmp_path
):
    path = shutil.copytree(checkpoint("mixtral"), tmp_path / "model")
    (path / name).write_text(change((path / name).read_text() if (path / name).exists() else ""))
    for call in (emoe.plan, emoe.from_pretrained):
        with pytest.raises(errors.CheckpointError, match=said):
            call(path, memory_budget=0.5)
