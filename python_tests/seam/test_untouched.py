"""`wrap` that is cut off, or fails late, leaves the model as it was, and one that can be wrapped."""

from __future__ import annotations

import families
import pytest
import torch
from interrupts import interrupted

import emoe
from emoe import runtime
from emoe.seam.untouched import Untouched

ROOMS = ("entry.py", "runtime.py", "seam", "compute/bank.py")
IDS = torch.arange(3, 12).view(1, -1)


def _looks(model):
    """Classes, hooks, flags, names of attributes and parameters of everything in it, and its config."""
    modules = {
        path: (
            type(module), sorted(vars(module)), list(module._forward_hooks), list(module._forward_pre_hooks),
            list(module._state_dict_hooks), list(module._load_state_dict_pre_hooks), module.training,
        )
        for path, module in model.named_modules()
    }  # fmt: skip
    parameters = {name: (type(each), each.requires_grad) for name, each in model.named_parameters()}
    return modules, parameters, model.config._attn_implementation


@torch.no_grad()
def _logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_wrap_that_is_interrupted_at_any_line_leaves_a_model_that_runs_and_can_be_wrapped(family):
    model = families.build(family)
    expected, looks, cut = _logits(model), _looks(model), 0
    hook = model.register_forward_hook(lambda *_: None)  # somebody's own, which he takes away in the end
    looks = _looks(model)
    for line in range(0, 100_000, 103):
        if not interrupted(lambda: emoe.wrap(model, memory_budget=0.5), line, ROOMS):
            break
        cut += 1
        assert torch._C._is_torch_function_enabled()
        assert _looks(model) == looks
        assert torch.equal(_logits(model), expected)
    assert cut > 10
    model.emoe.check_integrity()
    model.emoe.close()
    assert torch.equal(_logits(model), expected)
    hook.remove()
    assert not model._forward_hooks


def test_a_wrap_that_fails_at_its_very_end_does_as_well(monkeypatch):
    model = families.build("olmoe").train()
    model.lm_head.weight.requires_grad_(False)
    expected, looks = model.state_dict(), _looks(model)
    monkeypatch.setattr(runtime.Bank, "log_start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        emoe.wrap(model, memory_budget=0.5)
    assert _looks(model) == looks
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    monkeypatch.undo()
    emoe.wrap(model, memory_budget=0.5).emoe.close()


def test_what_is_taken_does_not_keep_the_memory_of_experts():
    model = families.build("olmoe")
    experts = model.model.layers[0].mlp.experts
    before = Untouched(model, [experts])
    value = torch.nn.Parameter(torch.ones(1))
    experts._parameters["down_proj"] = value
    model.lm_head.own = 1
    before.restore()
    assert experts.down_proj is value
    assert not hasattr(model.lm_head, "own")
