"""What addresses experts' weights while they are in a store: it works, or says where they are; nothing is dropped."""

from __future__ import annotations

import copy
import io
import pickle

import families
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, core_model_loading

import emoe
from emoe.errors import ClosedError, ConfigError, EmoeError, ExpertsElsewhereError, SaveError, UnsupportedModelError
from emoe.model import structure
from emoe.seam.elsewhere import Placeholder

FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"]
IDS = torch.randint(3, families.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=["from_pretrained", "wrap"])
def ways_in(request, checkpoint):
    """ways_in(family) -> (the model under emoe, the same one under Transformers alone)."""

    def make(name, **options):
        plain = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
        if request.param == "wrap":
            model = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
            return emoe.wrap(model, memory_budget=0.5, **options), plain
        return emoe.from_pretrained(checkpoint(name), memory_budget=0.5, **options), plain

    return make


@pytest.fixture
def model(checkpoint):
    return emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5)


@torch.no_grad()
def _logits(model):
    return model(IDS).logits.float()


def _assert_close(model, plain, tolerance=2e-4):
    assert (_logits(model) - _logits(plain)).abs().max() < tolerance


def _experts(model):
    return structure.experts_modules(model)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_listed_and_counted_as_in_the_plain_model(name, ways_in):
    model, plain = ways_in(name)
    forms = {key: (each.shape, each.dtype) for key, each in model.named_parameters()}
    assert forms == {key: (each.shape, each.dtype) for key, each in plain.named_parameters()}
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() == structure.unique_bytes(plain) - model.emoe.plan.expert_bytes
    assert not any(each.requires_grad for each in model.parameters())
    assert any(isinstance(each, Placeholder) for each in model.parameters())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_asking_for_an_expert_parameter_by_name_says_where_it_is(name, ways_in):
    model, _ = ways_in(name)
    path, module = _experts(model)
    for parameter in module._parameters:
        for ask in (lambda p=parameter: model.get_parameter(f"{path}.{p}"), lambda p=parameter: getattr(module, p)):
            with pytest.raises(ExpertsElsewhereError, match=rf"{path}\.{parameter} is in emoe's store.*close\(\)"):
                ask()


def test_computing_with_what_stands_for_an_expert_parameter_says_where_it_is(model):
    placeholder = next(each for each in model.parameters() if isinstance(each, Placeholder))
    computations = [
        lambda: placeholder.norm(),
        lambda: placeholder + 1,
        lambda: torch.stack([placeholder]),
        lambda: placeholder[0],
        lambda: placeholder.data,
        lambda: placeholder.float(),
        lambda: placeholder.copy_(torch.zeros(placeholder.shape)),
        lambda: torch.nn.utils.parameters_to_vector(model.parameters()),
        lambda: torch.zeros(placeholder.shape).copy_(placeholder),
        lambda: copy.deepcopy(placeholder),
        lambda: pickle.dumps(placeholder),
    ]
    for compute in computations:
        with pytest.raises(ExpertsElsewhereError, match=r"experts\.gate_up_proj is in emoe's store"):
            compute()
    assert "in emoe's store" in repr(placeholder)


def test_pruning_parametrizing_and_new_parameters_of_experts_are_refused(model):
    _, module = _experts(model)
    attempts = [
        lambda: prune.l1_unstructured(module, "down_proj", 0.5),
        lambda: parametrize.register_parametrization(module, "down_proj", torch.nn.Identity()),
        lambda: setattr(module, "down_proj", torch.nn.Parameter(torch.zeros(8, 64, 48))),
    ]
    before = _logits(model)
    for attempt in attempts:
        with pytest.raises(ExpertsElsewhereError, match="down_proj"):
            attempt()
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_close_gives_the_module_its_class_and_values_back(name, checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name))
    classes = [type(each) for each in model.modules()]
    _, module = _experts(model)
    module.down_proj.requires_grad_(False)
    emoe.wrap(model, memory_budget=0.5).emoe.close()
    assert [type(each) for each in model.modules()] == classes
    assert [name for name, each in module.named_parameters() if not each.requires_grad] == ["down_proj"]
    for (key, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    assert copy.deepcopy(model).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_takes_its_own_state_dict(name, ways_in):
    model, plain = ways_in(name)
    assert model.load_state_dict(model.state_dict()) == model.load_state_dict(plain.state_dict(), strict=False)
    result = model.load_state_dict(plain.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    _assert_close(model, plain)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_state_dict_with_other_experts_is_refused_and_nothing_of_it_is_loaded(name, strict, ways_in):
    model, plain = ways_in(name)
    new = families.build(name, seed=7).state_dict()
    with pytest.raises(ExpertsElsewhereError, match=r"experts\.\w+ than emoe's store.*nothing was loaded.*emoe\.wrap"):
        model.load_state_dict(new, strict=strict)
    _assert_close(model, plain)


def test_one_changed_expert_in_a_state_dict_is_found_at_any_module(model):
    path, module = _experts(model)
    state = model.state_dict()
    state[f"{path}.down_proj"].data[-1, -1, -1] += 1  # .data: torch's own count of changes does not see it
    embeddings = model.get_input_embeddings().weight.clone()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] + 1
    inner = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    own = {key.removeprefix(f"{path}."): value for key, value in state.items() if key.startswith(f"{path}.")}
    outer = torch.nn.ModuleList([model.model])
    prefixed = {f"0.{key}": value for key, value in inner.items()}
    for target, values in ((model, state), (model.model, inner), (module, own), (outer, prefixed)):
        with pytest.raises(ExpertsElsewhereError, match="down_proj"):
            target.load_state_dict(values)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_what_one_load_has_compared_says_nothing_of_the_next(model):
    """Values are changed in place between two loads, of which the first was refused, or taken."""
    state, before = model.state_dict(), _logits(model)
    first, *_, last = [name for name in state if name.endswith("experts.down_proj")]
    good, state[last] = state[last], state[last] + 1
    with pytest.raises(ExpertsElsewhereError, match=last):
        model.load_state_dict(state)
    state[last] = good
    state[first].add_(5)
    with pytest.raises(ExpertsElsewhereError, match=first):
        model.load_state_dict(state)
    state[first].sub_(5).copy_(model.state_dict()[first])
    model.load_state_dict(state)
    state[first].add_(5)
    with pytest.raises(ExpertsElsewhereError, match=first):
        model.load_state_dict(state)
    assert torch.equal(_logits(model), before)


def test_a_state_dict_of_everything_but_experts_is_loaded_and_what_it_lacks_is_named(model):
    before = _logits(model)
    state = {key: value for key, value in model.state_dict().items() if "experts" not in key}
    state["lm_head.weight"] = 2 * state["lm_head.weight"]
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    result = model.load_state_dict(state, strict=False)
    assert sorted(result.missing_keys) == sorted(key for key, _ in model.named_parameters() if "experts" in key)
    assert not torch.equal(_logits(model), before)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.down_proj"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        model.load_state_dict(model.state_dict() | {"model.layers.0.mlp.experts.other": torch.zeros(1)})


def test_a_state_dict_after_a_close_without_experts_is_refused(model):
    state = model.state_dict()
    model.emoe.close(restore=False)
    with pytest.raises(ExpertsElsewhereError, match="closed"):
        model.load_state_dict(state)


GIVEN = "was given values for this forward .functional_call does so., which would be ignored"


@pytest.mark.parametrize("kernels", ["native", "stock"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_functional_call_with_an_expert_parameter_is_refused_and_any_other_is_right(name, kernels, ways_in):
    model, plain = ways_in(name, kernels=kernels)
    before = _logits(model)
    path, module = _experts(model)
    own = {key for key, each in model.named_parameters() if isinstance(each, Placeholder)}
    assert len(own) >= 4
    for key in own:
        new = {key: torch.zeros_like(plain.get_parameter(key))}
        for given in (new, dict(model.named_parameters()) | new):
            with torch.no_grad(), pytest.raises(ExpertsElsewhereError, match=rf"{key} {GIVEN}"):
                functional_call(model, given, (IDS,))
    with torch.no_grad(), pytest.raises(ExpertsElsewhereError, match=GIVEN):
        functional_call(model, dict(plain.named_parameters()), (IDS,))
    other = {key: 2 * each.detach() for key, each in plain.named_parameters() if key not in own and "norm" in key}
    with torch.no_grad():
        expected = functional_call(plain, other, (IDS,)).logits
        assert (functional_call(model, other, (IDS,)).logits - expected).abs().max() < 1e-3
        assert (
            functional_call(model, dict(model.named_parameters()) | other, (IDS,)).logits - expected
        ).abs().max() < 1e-3
    assert not torch.equal(before, expected)
    assert torch.equal(_logits(model), before)
    model.emoe.close()
    with torch.no_grad():
        changed = {f"{path}.{key}": 0 * each.detach() for key, each in module.named_parameters()}
        expected = functional_call(plain, changed, (IDS,)).logits
        assert (functional_call(model, changed, (IDS,)).logits - expected).abs().max() < 1e-3


@pytest.mark.parametrize("make", [torch.nn.Parameter, torch.Tensor.clone], ids=["parameter", "tensor"])
def test_values_written_into_a_module_past_its_attributes_are_refused_until_they_are_gone(make, model):
    before = _logits(model)
    path, module = _experts(model)
    placed = module._parameters["down_proj"]
    module._parameters["down_proj"] = make(torch.zeros(placed.shape))
    with pytest.raises(ExpertsElsewhereError, match=rf"{path}.down_proj {GIVEN}"):
        _logits(model)
    module._parameters["down_proj"] = placed
    assert torch.equal(_logits(model), before)


def test_a_forward_beside_a_save_is_not_taken_for_one_with_given_values(model, monkeypatch, tmp_path):
    expected, found = _logits(model), []
    revert = core_model_loading.revert_weight_conversion

    def beside(*args, **kwargs):
        found.append(torch.equal(_logits(model), expected))
        return revert(*args, **kwargs)

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", beside)
    model.save_pretrained(tmp_path / "saved")
    assert len(found) > 1 and all(found)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: emoe.wrap(model, memory_budget=0.5),
        lambda model: emoe.wrap(PeftModel(model, LoraConfig(target_modules=["q_proj"])), memory_budget=0.5),
        lambda model: model.load_state_dict(families.build("olmoe").state_dict()),
        lambda model: model.set_experts_implementation("eager"),
        lambda model: copy.deepcopy(model),
        lambda model: _experts(model)[1].down_proj,
        lambda model: _experts(model.double())[1].down_proj,
    ],
    ids=["wrap", "wrap with adapter", "state dict", "implementation", "copy", "parameter", "dtype"],
)
def test_a_model_that_gave_its_experts_up_says_so_and_not_that_close_brings_them_back(ask, model):
    model.emoe.close(restore=False)
    with pytest.raises(EmoeError, match="given up when emoe was closed without restoring them; load the model anew"):
        ask(model)
    model.emoe.close()
    with pytest.raises(ClosedError, match="were not restored"):
        _logits(model)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", {"": "eager"}])
def test_another_experts_implementation_is_refused_until_close(implementation, ways_in):
    model, plain = ways_in("qwen3_moe")
    for module in (model, model.model):
        assert set(module.get_experts_implementation().values()) == {"emoe"}
        with pytest.raises(ConfigError, match="kernels='stock'"):
            module.set_experts_implementation(implementation)
        module.set_experts_implementation(module.get_experts_implementation())
    _assert_close(model, plain)
    model.emoe.close()
    model.set_experts_implementation(implementation)
    assert model.get_experts_implementation() == {"": "eager" if isinstance(implementation, dict) else implementation}
    _assert_close(model, plain)


@pytest.mark.parametrize(
    "copying",
    [
        copy.deepcopy,
        pickle.dumps,
        lambda model: torch.save(model, io.BytesIO()),
        lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8),
        lambda model: copy.deepcopy(model.emoe),
        lambda model: copy.copy(_experts(model)[1]),
    ],
    ids=["deepcopy", "pickle", "torch.save", "quantize_dynamic", "deepcopy of the runtime", "copy of experts"],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_copy_of_the_model_is_refused_with_the_way_to_make_another(copying, model):
    with pytest.raises(SaveError, match=r"save_pretrained\(folder\).*emoe\.from_pretrained"):
        copying(model)
    model.emoe.close(restore=False)
    if copying is copy.deepcopy:
        with pytest.raises(SaveError):
            copying(model)


@pytest.mark.parametrize("kernels", ["native", "stock"])
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_follow_a_change_of_dtype(name, kernels, checkpoint, tmp_path):
    path = checkpoint(name, torch.bfloat16)
    model = emoe.from_pretrained(path, memory_budget=0.5, kernels=kernels)
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    for change, tolerance in ((torch.nn.Module.float, 2e-4), (torch.nn.Module.half, 2e-2)):
        change(model), change(plain)
        _assert_close(model, plain, tolerance)
    for (key, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key
    model.float()
    plain.float()
    model.save_pretrained(tmp_path)
    model.emoe.close()
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    expected = {key: value.float() for key, value in AutoModelForCausalLM.from_pretrained(path).state_dict().items()}
    for key, value in model.state_dict().items():
        assert torch.equal(saved[key], value), key
        if "experts" in key:
            assert torch.equal(value, expected[key]), key


def test_to_a_device_moves_all_but_experts(model):
    before = _logits(model)
    assert model.to("cpu") is model
    assert model.to(torch.float32).cpu() is model
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_embeddings_can_be_resized(name, ways_in):
    model, plain = ways_in(name)
    model.resize_token_embeddings(families.VOCAB - 8)
    plain.resize_token_embeddings(families.VOCAB - 8)
    ids = IDS.clamp(max=families.VOCAB - 9)
    with torch.no_grad():
        assert (model(ids).logits - plain(ids).logits).abs().max() < 2e-4


@pytest.mark.parametrize("training", [False, True])
def test_a_backward_pass_is_refused_where_it_begins(training, ways_in):
    model, plain = ways_in("mixtral")
    model.train(training)
    output = model(IDS, labels=IDS)
    assert abs(output.loss.item() - plain(IDS, labels=IDS).loss.item()) < 1e-4
    with pytest.raises(EmoeError, match="no gradients; train the plain model"):
        output.loss.backward()
    own = torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten())
    with pytest.raises(EmoeError, match="no gradients"):
        own.backward()
    with torch.no_grad():
        assert not model(IDS, labels=IDS).loss.requires_grad
    model.emoe.close()
    model(IDS, labels=IDS).loss.backward()
    assert _experts(model)[1].down_proj.grad is not None


def test_trainer_is_refused_at_its_first_step(model, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    with pytest.raises(EmoeError, match="no gradients"):
        Trainer(model=model, args=arguments, train_dataset=data).train()


@pytest.mark.parametrize("kernels", ["native", "stock"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_compiled_model_computes_the_same(name, kernels, checkpoint):
    model = emoe.from_pretrained(checkpoint(name), memory_budget=0.4, kernels=kernels)
    expected = _logits(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert (_logits(compiled) - expected).abs().max() < 2e-4
    assert (compiled(IDS).logits - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda module: prune.l1_unstructured(module, "down_proj", 0.5), "prune.remove"),
        (
            lambda module: parametrize.register_parametrization(module, "down_proj", torch.nn.Identity()),
            "remove_parametrizations",
        ),
    ],
    ids=["pruned", "parametrized"],
)
def test_experts_whose_weights_are_computed_are_not_wrapped(change, remedy):
    model = families.build("olmoe")
    change(_experts(model)[1])
    expected = _logits(model)
    with pytest.raises(UnsupportedModelError, match=rf"mlp\.experts.*{remedy}"):
        emoe.wrap(model, memory_budget=0.5)
    assert torch.equal(_logits(model), expected)


def test_an_activation_that_is_replaced_after_loading_is_not_ignored(checkpoint):
    path = checkpoint("olmoe")
    model = emoe.from_pretrained(path, memory_budget=0.5)
    before, module = _logits(model), _experts(model)[1]
    kept, module.act_fn = module.act_fn, torch.nn.ReLU()
    with pytest.raises(ConfigError, match=r"act_fn of experts 0 was replaced.*kernels='stock'"):
        _logits(model)
    model.emoe.check_integrity()
    module.act_fn = kept
    assert torch.equal(_logits(model), before)
    model.emoe.close(restore=False)
    stock = emoe.from_pretrained(path, memory_budget=0.5, kernels="stock")
    before = _logits(stock)
    _experts(stock)[1].act_fn = torch.nn.ReLU()
    assert not torch.allclose(_logits(stock), before)
    stock.emoe.close(restore=False)
