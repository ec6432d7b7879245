"""Plain linear layers outside experts that emoe's kernels compute: right numbers, and weights as ordinary as before."""

from __future__ import annotations

import copy
import io

import families
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import emoe
from emoe.compute import ops
from emoe.errors import ConfigError
from emoe.seam.plain_linear import NARROW_ROWS, NativeWeight, Plain, PlainWeights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba")
NATIVE = Plain(ops.plain_linear, *ops.plain_dtypes("native"))


class Counted:
    """A product that counts."""

    def __init__(self) -> None:
        self.shapes = []

    def __call__(self, weight, x, bias):
        self.shapes.append((len(x), *weight.shape))
        return ops.plain_linear(weight, x, bias)


def counted():
    product = Counted()
    return product, Plain(product, *ops.plain_dtypes("native"))


def ids(rows=1, length=12):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(3))


def layer(bias=True, dtype=torch.float32, inputs=40, outputs=24):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def error(got, truth):
    return ((got.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


MOST = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_number_of_rows_agrees_with_float64(dtype, bias):
    own = layer(bias, dtype)
    truth = copy.deepcopy(own).double()
    product, plain = counted()
    weights = PlainWeights(own, plain)
    for shape in ((40,), (1, 40), (2, 3, 40), (8, 40), (9, 40), (300, 40)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
        y = own(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 24)
        assert error(y, truth(x.double())) <= MOST[dtype]
    assert [rows for rows, *_ in product.shapes] == [1, 1, 6, 8, 9, 300]
    weights.remove()
    assert type(own.weight) is nn.Parameter


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_beside_seven_others(dtype):
    own = layer(dtype=dtype, inputs=200)
    PlainWeights(own, NATIVE)
    x = torch.randn(NARROW_ROWS, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = own(x)
    for row in range(NARROW_ROWS):
        assert torch.equal(own(x[row : row + 1]), together[row : row + 1])


def test_rows_and_biases_that_are_views_are_right():
    own = layer()
    own.bias = nn.Parameter(torch.randn(48)[::2], requires_grad=False)
    truth = copy.deepcopy(own)
    PlainWeights(own, NATIVE)
    x = torch.randn(40, 3).t()
    torch.testing.assert_close(own(x), truth(x))


TO_TORCH = {
    "gradients of x": lambda own: own(torch.ones(1, 40, requires_grad=True)),
    "gradients of the weight": lambda own: own.requires_grad_()(torch.ones(1, 40)),
    "autocast": lambda own: torch.autocast("cpu", torch.bfloat16)(own)(torch.ones(1, 40)),
    "vmap": lambda own: torch.func.vmap(own)(torch.ones(2, 40)),
    "jvp": lambda own: torch.func.jvp(own, (torch.ones(1, 40),), (torch.ones(1, 40),))[0],
    "a trace": lambda own: torch.jit.trace(own, torch.ones(1, 40), check_trace=False)(torch.ones(1, 40)),
    "no rows": lambda own: own(torch.ones(0, 40)),
    "a weight that is transposed": lambda own: F.linear(torch.ones(1, 24), own.weight.t()),
    "a part of the weight": lambda own: F.linear(torch.ones(1, 40), own.weight[:3]),
    "another dtype": lambda own: own.double()(torch.ones(1, 40, dtype=torch.double)),
    "parameters of others": lambda own: torch.func.functional_call(
        own, {"weight": torch.ones(24, 40)}, (torch.ones(1, 40),)
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("use", TO_TORCH)
def test_torch_computes(use):
    own = layer()
    truth = TO_TORCH[use](copy.deepcopy(own))
    product, plain = counted()
    PlainWeights(own, plain)
    found = TO_TORCH[use](own)
    assert not product.shapes
    assert (found.shape, found.dtype, found.requires_grad) == (truth.shape, truth.dtype, truth.requires_grad)
    assert torch.equal(found, truth)


def test_a_wrong_width_or_dtype_is_refused_as_torch_refuses_it():
    own = layer()
    PlainWeights(own, NATIVE)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        own(torch.ones(2, 39))
    with pytest.raises(RuntimeError, match="same dtype"):
        own(torch.ones(2, 40).double())


def test_the_weight_is_an_ordinary_parameter_for_whoever_has_it():
    own = layer()
    before = own.weight
    numbers = before.detach().clone()
    PlainWeights(own, NATIVE)
    assert own.weight is before
    assert isinstance(own.weight, nn.Parameter)
    assert own.weight.data_ptr() == own.state_dict()["weight"].data_ptr()
    assert type(own.state_dict()["weight"]) is torch.Tensor
    assert type(own.weight * 2) is torch.Tensor
    assert torch.equal(copy.deepcopy(own).weight, numbers)
    file = io.BytesIO()
    torch.save(own, file)
    assert b"emoe" not in file.getvalue()
    file.seek(0)
    assert type(torch.load(file, weights_only=False).weight) is nn.Parameter
    with torch.no_grad():
        own.weight.mul_(2)
    torch.testing.assert_close(own(torch.eye(40)), 2 * numbers.t() + own.bias)
    own.load_state_dict({"weight": numbers, "bias": own.bias})
    own.half()
    assert own(torch.eye(40).half()).dtype == torch.half


def test_training_gives_the_gradients_that_it_gives_without_emoe():
    own = layer().requires_grad_()
    truth = copy.deepcopy(own)
    PlainWeights(own, NATIVE)
    for each in (own, truth):
        each(torch.ones(2, 40)).pow(2).sum().backward()
        torch.optim.SGD(each.parameters(), 0.1).step()
    assert torch.equal(own.weight.grad, truth.weight.grad)
    assert torch.equal(own.weight, truth.weight)


def test_a_compiled_layer_is_torch_s():
    own = layer()
    PlainWeights(own, NATIVE)
    x = torch.randn(2, 40)
    torch.testing.assert_close(torch.compile(own, backend="eager")(x), own(x))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_logits_and_tokens_that_it_gives_with_torch_s_products(family, checkpoint):
    truth = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    model = emoe.from_pretrained(checkpoint(family), memory_budget=0.5, dtype=torch.float32, dense="native")
    native = [path for path, each in model.named_parameters() if isinstance(each, NativeWeight)]
    assert model.emoe.stats()["dense"]["plain"] == len(native)
    assert {path.rpartition(".")[0] for path in native} >= {
        path for path, each in truth.named_modules() if type(each) is nn.Linear and each is not truth.lm_head
    }
    with torch.no_grad():
        torch.testing.assert_close(model(ids(2)).logits, truth(ids(2)).logits, rtol=2e-4, atol=2e-4)
    given = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids(), **given), truth.generate(ids(), **given))
    model.emoe.close()
    assert all(type(each) is nn.Parameter for each in model.parameters())
    assert torch.equal(model(ids()).logits, truth(ids()).logits)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_a_wrapped_model_decodes_the_same_bits_in_every_budget(family):
    found = []
    for budget in (0.4, 1.0):
        model = emoe.wrap(families.build(family).bfloat16(), memory_budget=budget, dense="native")
        found.append(model.generate(ids(), max_new_tokens=8, do_sample=False, output_scores=True,
                                    return_dict_in_generate=True))  # fmt: skip
        model.emoe.close()
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        assert torch.equal(one, other)


def test_tied_weights_are_one_and_stay_tied():
    model = families.build("olmoe")
    weight = model.lm_head.weight
    emoe.wrap(model, memory_budget=1.0, dense="native")
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert isinstance(weight, NativeWeight)
    assert torch.equal(model.model.embed_tokens(ids()), F.embedding(ids(), weight.detach()))
    model.emoe.close()
    assert type(weight) is nn.Parameter


def test_adapters_train_merge_and_are_taken_off_again():
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    truth = families.build("qwen3_moe")
    torch.manual_seed(0)
    truth = get_peft_model(truth, config).eval()
    model = emoe.wrap(families.build("qwen3_moe"), memory_budget=1.0, dense="native")
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        wanted = truth(ids(2)).logits
        torch.testing.assert_close(adapted(ids(2)).logits, wanted, rtol=2e-4, atol=2e-4)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(ids(2)).logits, wanted, rtol=2e-4, atol=2e-4)
        adapted.unmerge_adapter()
    query = adapted.base_model.model.model.layers[0].self_attn.q_proj
    query(torch.ones(1, families.HIDDEN)).sum().backward()
    assert query.lora_A["default"].weight.grad is not None
    model.emoe.close()


def test_saving_while_emoe_runs_it_gives_the_weights(checkpoint, tmp_path):
    model = emoe.from_pretrained(checkpoint("mixtral"), memory_budget=0.5, dtype=torch.float32, dense="native")
    model.save_pretrained(tmp_path)
    model.emoe.close(restore=False)
    before = AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("options", [{"dense": "torch"}, {"dense": "auto", "kernels": "stock"}])
def test_torch_computes_all_where_it_is_asked_to(options, checkpoint):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1.0, dtype=torch.float32, **options)
    assert model.emoe.stats()["dense"]["plain"] == 0
    assert not any(isinstance(each, NativeWeight) for each in model.parameters())
    model.emoe.close(restore=False)


def test_auto_takes_few_rows_and_many_where_torch_has_no_product_of_its_own(monkeypatch):
    for isa, own, wanted in (
        ("avx2", False, (set(DTYPES), {torch.bfloat16, torch.float16})),
        ("avx512bf16", True, (set(DTYPES), set())),
        ("scalar", False, (set(), set())),
    ):
        loaded = type("Module", (), {"isa": staticmethod(lambda isa=isa: isa)})
        known = type("Known", (), {f"_is_mkldnn_{each}_supported": staticmethod(lambda own=own: own)
                                   for each in ("bf16", "fp16")})  # fmt: skip
        monkeypatch.setattr(ops.native, "load", lambda loaded=loaded: loaded)
        monkeypatch.setattr(torch.ops, "mkldnn", known)
        assert tuple(map(set, ops.plain_dtypes("auto"))) == wanted


def test_a_model_without_emoe_knows_no_other_product():
    with pytest.raises(ConfigError, match="dense='blas' is not one of: auto, native, torch"):
        emoe.wrap(families.build("olmoe"), dense="blas")


def test_forward_mode_gradients_are_torch_s():
    product, plain = counted()
    own = layer()
    x, tangent = torch.randn(2, 40), torch.randn(2, 40)
    expected = F.linear(tangent, own.weight)
    PlainWeights(own, plain)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        y = own(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(y).tangent, expected, atol=1e-6)
    assert not product.shapes
