"""Slot layouts: what the native kernels take over is recognised by what a family computes, not by its name."""

from __future__ import annotations

import ctypes

import families
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from emoe import native
from emoe.compute import ops
from emoe.model import layout, structure
from emoe.model.spec import ExpertForm, ParamSpec

NAMES = sorted(families.FAMILIES)
GATES = {
    "gpt_oss": "swiglu_clamped",
    "minimax_m3_text": "swiglu_clamped",
    "hy_v4": "silu_clamped",
    "deepseek_v4": "silu_clamped",
    "gemma4_text": "gelu_tanh",
    "nemotron_h": "relu2",
    "nemotron_h_latent": "relu2",
    "inkling2_text": None,
}


def _experts(name, dtype=torch.float32):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.FAMILIES[name](), dtype=dtype)
    return structure.find_experts(model)[-1][1]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_recognised_on_the_meta_device(name):
    module = _experts(name)
    found = layout.describe(module, ExpertForm.plain(structure.param_specs(module)))
    expected = GATES.get(name, "silu")
    if expected is None:
        assert found.native is None
        assert found.reason.endswith(".")
        assert type(module).__name__ in found.reason
    else:
        assert found.reason == ""
        assert found.native["activation"] == expected
        assert found.native["interleaved"] == (name == "gpt_oss")
        assert found.native["transposed"] == (name in ("gpt_oss", "aria_text"))
        assert found.native["has_gate"] == (not name.startswith("nemotron"))


def test_the_numbers_of_a_clamped_gate_are_the_modules_own():
    found = layout.describe(
        module := _experts("minimax_m3_text"), ExpertForm.plain(structure.param_specs(module))
    ).native
    assert (found["alpha"], found["limit"]) == (module.swiglu_alpha, 1.5)
    found = layout.describe(module := _experts("hy_v4"), ExpertForm.plain(structure.param_specs(module))).native
    assert found["limit"] == 1.5


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h_latent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_are_aligned_disjoint_and_inside_the_slot(name, dtype):
    module = _experts(name, dtype)
    params = structure.param_specs(module)
    found = layout.describe(module, ExpertForm.plain(params))
    ends = 0
    for param in params:
        start = found.offsets[param.name]
        assert start % 64 == 0
        assert start >= ends
        ends = start + param.nbytes
    assert ends <= found.nbytes
    assert found.nbytes % 64 == 0


class _Config:
    _experts_implementation = "eager"


def _plain(act):
    """An experts module of no known family: the plain forward with this activation."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    eager = MixtralExperts.forward.__wrapped__
    body = {"forward": lambda self, *args: eager(self, *args)}

    def init(self, config):
        nn.Module.__init__(self)
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.empty(4, 16, 8, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
        self.act_fn = act

    made = type("HomeMadeExperts", (nn.Module,), {"__init__": init, **body})
    return use_experts_implementation(made)(_Config())


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (lambda x: torch.relu(x) ** 2, "relu2"),
        (nn.Identity(), "identity"),
        (torch.tanh, None),
        (nn.SELU(), None),
        (lambda x: x * torch.sigmoid(1.702 * x), None),  # near to gelu, but not it
        (lambda x: torch.nn.functional.silu(x) * 1.0001, None),
    ],
    ids=["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "tanh", "selu", "quick_gelu", "scaled silu"],
)
def test_an_unknown_class_is_judged_by_its_activation(act, expected):
    module = _plain(act)
    found = layout.describe(module, ExpertForm.plain(structure.param_specs(module)))
    assert (found.native["activation"] if found.native else None) == expected
    assert bool(found.reason) == (expected is None)


def test_two_modules_of_one_class_with_other_numbers_are_told_apart():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    class Config:
        _experts_implementation = "eager"
        num_local_experts, hidden_size, intermediate_size, hidden_act = 2, 8, 8, "silu"

    limits = []
    for limit in (2.0, 3.0):
        config = Config()
        config.swiglu_limit = limit
        module = DeepseekV4Experts(config)
        limits.append(layout.describe(module, ExpertForm.plain(structure.param_specs(module))).native["limit"])
    assert limits == [2.0, 3.0]


def test_a_forward_that_weights_before_the_activation_is_not_taken_over():
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    eager = MixtralExperts.forward.__wrapped__

    class Scaled(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 4
            self.gate_up_proj = nn.Parameter(torch.empty(4, 16, 8, device="meta"))
            self.down_proj = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
            self.act_fn = nn.SiLU()

        def forward(self, hidden, index, weights):
            return eager(self, hidden, index, weights.square())

    module = use_experts_implementation(Scaled)(_Config())
    found = layout.describe(module, ExpertForm.plain(structure.param_specs(module)))
    assert found.native is None
    assert "Scaled" in found.reason


def test_a_normalised_expert_runs_transformers_own_code():
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    class Config:
        _experts_implementation = "eager"
        num_experts, num_local_experts, n_routed_experts = 4, 4, 4
        hidden_size = moe_hidden_size = moe_intermediate_size = intermediate_size = 8
        hidden_act, post_norm_eps = "silu", 1e-5

    with torch.device("meta"):
        module = MuseSparkExperts(Config())
    found = layout.describe(module, ExpertForm.plain(structure.param_specs(module)))
    assert found.native is None
    assert "normalises" in found.reason


def test_mixed_and_foreign_dtypes_run_transformers_own_code():
    module = _plain(nn.SiLU())
    params = structure.param_specs(module)
    mixed = (params[0], ParamSpec(params[1].name, params[1].shape, "bfloat16"))
    assert "bfloat16 and float32" in layout.describe(module, ExpertForm.plain(mixed)).reason
    double = tuple(ParamSpec(param.name, param.shape, "float64") for param in params)
    assert "float64" in layout.describe(module, ExpertForm.plain(double)).reason


@pytest.mark.parametrize("name", [name for name in NAMES if GATES.get(name, "silu")])
def test_the_native_kernel_computes_what_the_family_computes(name):
    """One slot an expert, straight from the layout: the whole chain from description to kernel."""
    model = families.build(name)
    module = structure.find_experts(model)[-1][1]
    params = structure.param_specs(module)
    found = layout.describe(module, ExpertForm.plain(params))
    slab = native.load().Slab(module.num_experts, found.nbytes)
    memory = torch.frombuffer(_view(slab), dtype=torch.uint8)
    for expert in range(module.num_experts):
        for param in params:
            value = module.get_parameter(param.name).detach()[expert].contiguous().view(-1).view(torch.uint8)
            start = expert * slab.slot_bytes + found.offsets[param.name]
            memory[start : start + value.numel()] = value
    hidden = torch.randn(11, found.native["hidden"], generator=torch.Generator().manual_seed(0)) * 3
    index = torch.rand(11, module.num_experts, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :3]
    weights = torch.rand(11, 3, generator=torch.Generator().manual_seed(2))
    out = torch.zeros(11, 3, found.native["hidden_out"])
    slots = np.arange(module.num_experts, dtype=np.int32)
    ops.gather_mlp(ops.make_layout(found.native), slab, slots, hidden, index.contiguous(), weights, out, "pairs")
    with torch.no_grad():
        expected = type(module).forward.__wrapped__(module, hidden, index, weights)
    assert ((out.sum(1) - expected).abs().max() / expected.abs().max()).item() < 1e-5


def _view(slab):
    return (ctypes.c_char * (slab.slots * slab.slot_bytes)).from_address(slab.address)
