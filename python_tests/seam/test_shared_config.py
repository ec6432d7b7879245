"""The config of a model under emoe stays what it is for everybody else who has it, or makes a model of it."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import emoe

IDS = torch.randint(3, families.VOCAB, (1, 9), generator=torch.Generator().manual_seed(5))
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]


@torch.no_grad()
def _logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_is_what_transformers_makes_of_the_checkpoint(name, checkpoint, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    model = emoe.from_pretrained(checkpoint(name), memory_budget=0.5)
    assert model.config.to_dict() == plain.config.to_dict()
    assert vars(model.config) == vars(plain.config)
    model.config.save_pretrained(tmp_path)
    assert "emoe" not in (tmp_path / "config.json").read_text()
    model.save_pretrained(tmp_path)
    assert "emoe" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    model.emoe.close()
    assert model.config.to_dict() == plain.config.to_dict()
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


@pytest.mark.parametrize("restore", [None, True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_models_are_made_of_the_config_of_a_model_under_emoe(name, restore, checkpoint):
    path = checkpoint(name)
    expected = _logits(AutoModelForCausalLM.from_pretrained(path))
    model = emoe.from_pretrained(path, memory_budget=0.5)
    if restore is not None:
        model.emoe.close(restore=restore)
    for config in (model.config, copy.deepcopy(model.config), type(model.config).from_dict(model.config.to_dict())):
        assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(path, config=config)), expected)
        assert _logits(AutoModelForCausalLM.from_config(config)).isfinite().all()
    again = emoe.from_pretrained(path, memory_budget=0.5, config=model.config)
    assert (_logits(again) - expected).abs().max() < 2e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_model_that_shares_its_config_with_a_wrapped_one_goes_on(name):
    config = families.FAMILIES[name]()
    first, second = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    assert first.config is second.config
    expected = _logits(second)
    emoe.wrap(first, memory_budget=0.5)
    assert torch.equal(_logits(second), expected)
    _logits(first)
    first.emoe.close(restore=False)
    assert torch.equal(_logits(second), expected)
    second.set_experts_implementation("eager")
    emoe.wrap(second, memory_budget=0.5).emoe.close()
    assert second.get_experts_implementation() == {"": "eager"}


def test_two_models_of_one_config_run_under_emoe_beside_each_other():
    config = families.FAMILIES["olmoe"]()
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    expected = [_logits(model) for model in models]
    for model in models:
        emoe.wrap(model, memory_budget=0.5)
    for order in (models, models[::-1]):
        for model in order:
            assert (_logits(model) - expected[models.index(model)]).abs().max() < 2e-4
    models[0].emoe.close()
    assert torch.equal(_logits(models[0]), expected[0])
    assert (_logits(models[1]) - expected[1]).abs().max() < 2e-4


def test_a_draft_model_of_the_same_config_assists_generation(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    draft = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), config=model.config)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = draft.generate(IDS, generation_config=settings)
    assert torch.equal(model.generate(IDS, generation_config=settings, assistant_model=draft), expected)
