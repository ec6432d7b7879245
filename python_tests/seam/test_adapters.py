"""PEFT adapters under emoe: on attention and routers they work, on experts they are refused and never dropped."""

from __future__ import annotations

import families
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import emoe
from emoe.errors import EmoeError, ExpertsElsewhereError, SaveError, UnsupportedModelError
from emoe.model import structure

# PEFT asks Transformers for a name it will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, families.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
# The linear layers of attention, and the router as a parameter, by family.
ATTENTION = {
    "qwen3_moe": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "olmoe": ["k_proj"],
    "deepseek_v3": ["q_b_proj"],
    "gpt_oss": ["q_proj", "o_proj"],
}
ROUTER = dict.fromkeys(ATTENTION, "mlp.gate.weight") | {"gpt_oss": "mlp.router.weight"}
# Adapters that name the experts: merged tensors, biases among them, or the whole block.
ON_EXPERTS = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "one": {"target_parameters": ["experts.down_proj"]},
    "with attention": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
}


def _plain(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


def _random(peft_model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return peft_model.eval()


def _adapter(path, folder, **target):
    """The folder of an adapter with random weights, as PEFT saves it."""
    target = {"target_modules": []} | target
    _random(get_peft_model(_plain(path), LoraConfig(r=4, lora_alpha=8, **target))).save_pretrained(folder)
    return folder


@torch.no_grad()
def _logits(model):
    return model(IDS).logits


def _assert_close(model, expected):
    assert (_logits(model) - expected).abs().max() < 5e-4


@pytest.fixture
def adapted(checkpoint, tmp_path):
    """adapted(family) -> (checkpoint, adapter on attention and router, logits with it under Transformers alone)."""

    def make(name):
        path = checkpoint(name)
        folder = _adapter(path, tmp_path, target_modules=ATTENTION[name], target_parameters=[ROUTER[name]])
        with_adapter = PeftModel.from_pretrained(_plain(path), folder).eval()
        expected = _logits(with_adapter)
        assert (expected - _logits(_plain(path))).abs().max() > 1e-2
        return path, folder, expected

    return make


@pytest.mark.parametrize("name", ATTENTION)
def test_an_adapter_on_attention_and_router_gives_what_it_gives_the_plain_model(name, adapted):
    path, folder, expected = adapted(name)
    before = _logits(emoe.from_pretrained(path, memory_budget=0.5))
    model = PeftModel.from_pretrained(emoe.from_pretrained(path, memory_budget=0.5), folder).eval()
    _assert_close(model, expected)
    with model.disable_adapter():
        assert torch.equal(_logits(model), before)
    merged = model.merge_and_unload()
    _assert_close(merged, expected)
    merged.emoe.close()
    _assert_close(merged, expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_load_adapter_of_transformers_works_and_its_save_writes_the_adapter_alone(name, adapted, tmp_path):
    path, folder, expected = adapted(name)
    model = emoe.from_pretrained(path, memory_budget=0.5)
    model.load_adapter(str(folder))
    _assert_close(model, expected)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(file.suffix for file in (tmp_path / "saved").iterdir() if file.suffix == ".safetensors") == [
        ".safetensors"
    ]
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in key for key in file.keys())  # noqa: SIM118
    _assert_close(PeftModel.from_pretrained(_plain(path), tmp_path / "saved").eval(), expected)


def test_a_merged_model_is_saved_whole(adapted, tmp_path):
    path, folder, expected = adapted("mixtral")
    model = PeftModel.from_pretrained(emoe.from_pretrained(path, memory_budget=0.5), folder).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    _assert_close(_plain(tmp_path / "merged"), expected)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_a_wrapped_peft_model_runs_with_its_adapters_and_is_given_back(name, adapted, tmp_path):
    path, folder, expected = adapted(name)
    given = PeftModel.from_pretrained(_plain(path), folder).eval()
    model = emoe.wrap(given, memory_budget=0.5)
    assert model is given
    assert model.emoe is model.get_base_model().emoe
    _assert_close(model, expected)
    assert model.emoe.stats()["loads"] > 0
    model.save_pretrained(tmp_path / "again")
    _assert_close(PeftModel.from_pretrained(_plain(path), tmp_path / "again").eval(), expected)
    model.emoe.close()
    _assert_close(model, expected)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("where", ON_EXPERTS)
def test_an_adapter_on_experts_is_refused_however_it_comes(name, where, checkpoint, tmp_path):
    path, target = checkpoint(name), ON_EXPERTS[where]
    if where == "with attention":
        target = target | {"target_modules": ATTENTION[name]}
    folder = _adapter(path, tmp_path, **target)
    config = LoraConfig(r=4, **({"target_modules": []} | target))
    before = _logits(emoe.from_pretrained(path, memory_budget=0.5))
    attempts = [
        lambda model: PeftModel.from_pretrained(model, folder),
        lambda model: model.load_adapter(str(folder)),
        lambda model: get_peft_model(model, config),
        lambda model: model.add_adapter(config),
    ]
    for attempt in attempts:
        model = emoe.from_pretrained(path, memory_budget=0.5)
        with pytest.raises(ExpertsElsewhereError, match=r"experts\.\w+ is in emoe's store.*emoe\.wrap"):
            attempt(model)
        assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("where", ON_EXPERTS)
def test_a_model_with_an_adapter_on_experts_is_not_wrapped_before_it_is_merged(name, where, checkpoint, tmp_path):
    path = checkpoint(name)
    folder = _adapter(path, tmp_path, **ON_EXPERTS[where])
    given = PeftModel.from_pretrained(_plain(path), folder).eval()
    expected = _logits(given)
    for model in (given, given.get_base_model()):
        with pytest.raises(UnsupportedModelError, match=r"PEFT adapter on .*experts: model\.merge_and_unload\(\)"):
            emoe.wrap(model, memory_budget=0.5)
        assert torch.equal(_logits(given), expected)
    _assert_close(emoe.wrap(given.merge_and_unload(), memory_budget=0.5), expected)


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "w1", "w2", "w3"]])
def test_names_of_modules_that_peft_turns_into_experts_are_refused_too(modules, checkpoint):
    model = emoe.from_pretrained(checkpoint("mixtral"), memory_budget=0.5)
    with pytest.raises(ExpertsElsewhereError, match=r"experts\.gate_up_proj"):
        get_peft_model(model, LoraConfig(r=4, target_modules=modules))


def test_a_copy_of_the_experts_to_be_trained_is_refused(checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)
    with pytest.raises(SaveError, match="neither copied"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["experts"]))


def test_a_state_dict_goes_through_a_peft_model_as_through_its_base(adapted):
    path, folder, expected = adapted("olmoe")
    model = PeftModel.from_pretrained(emoe.from_pretrained(path, memory_budget=0.5), folder).eval()
    state = model.state_dict()
    model.load_state_dict(state)
    _assert_close(model, expected)
    name = next(key for key in state if key.endswith("experts.down_proj"))
    with pytest.raises(ExpertsElsewhereError, match=r"experts\.down_proj"):
        model.load_state_dict(state | {name: state[name] + 1})


def test_training_an_adapter_is_refused_in_the_forward(checkpoint):
    model = get_peft_model(
        emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5), LoraConfig(r=4, target_modules=["q_proj"])
    )
    with pytest.raises(EmoeError, match="no gradients"):
        model(IDS, labels=IDS).loss.backward()


def test_resizing_keeps_experts_and_adapters(adapted):
    path, folder, _ = adapted("mixtral")
    plain = PeftModel.from_pretrained(_plain(path), folder).eval()
    model = PeftModel.from_pretrained(emoe.from_pretrained(path, memory_budget=0.5), folder).eval()
    for each in (plain, model):
        each.resize_token_embeddings(families.VOCAB + 8, mean_resizing=False)
        with torch.no_grad():
            each.get_output_embeddings().weight[families.VOCAB :] = 0
    _assert_close(model, _logits(plain))
    assert len(structure.experts_modules(model)) == 3
