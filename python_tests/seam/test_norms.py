"""RMSNorms by emoe's kernel: what Transformers' own give, for those that are plain, while emoe runs the model."""

from __future__ import annotations

import copy
import io

import families
import pytest
import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

import emoe
from emoe.compute import ops
from emoe.errors import ConfigError
from emoe.seam.norms import Norms, is_plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Counted:
    def __init__(self):
        self.rows = []

    def __call__(self, x, weight, epsilon):
        self.rows.append(x.numel() // x.shape[-1])
        return ops.rms_norm(x, weight, epsilon)


def norm(width=48, dtype=torch.float32, kind=OlmoeRMSNorm):
    made = kind(width, eps=0.01).to(dtype).requires_grad_(False)
    made.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(1)))
    return made


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_a_class_of_norms_is_known_by_what_it_computes():
    assert is_plain(OlmoeRMSNorm)
    assert not is_plain(GptOssRMSNorm)  # rounds once, after the product
    assert not is_plain(Qwen3NextRMSNorm)  # its weight is an offset from one
    assert not is_plain(Qwen3NextRMSNormGated)
    assert not is_plain(nn.LayerNorm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 48, 1000])
def test_every_dtype_and_width_gives_what_torch_gives(dtype, width):
    own = norm(width, dtype)
    truth = copy.deepcopy(own)
    counted = Counted()
    Norms(own, counted)
    step = torch.finfo(dtype).eps  # sums are taken in another order: the last bit may differ, before each rounding
    for shape in ((width,), (1, 1, width), (2, 70, width)):
        x = 3 * rows(*shape, dtype=dtype)
        torch.testing.assert_close(own(x), truth(x), rtol=4 * step, atol=0)
    x = rows(width, 5, dtype=dtype).t()
    torch.testing.assert_close(own(x), truth(x), rtol=4 * step, atol=0)
    assert counted.rows == [1, 1, 140, 5]


def test_a_row_has_the_bits_that_it_has_alone():
    x = rows(300, 1000, dtype=torch.bfloat16)
    weight = rows(1000, dtype=torch.bfloat16)
    together = ops.rms_norm(x, weight, 1e-5)
    for row in (0, 7, 8, 299):
        assert torch.equal(ops.rms_norm(x[row], weight, 1e-5), together[row])


OTHERS = {
    "gradients": lambda own: own(rows(2, 48).requires_grad_()),
    "gradients of the weight": lambda own: own.requires_grad_()(rows(2, 48)),
    "another dtype than the weight's": lambda own: own(rows(2, 48, dtype=torch.bfloat16)),
    "float64": lambda own: own.double()(rows(2, 48).double()),
    "vmap": lambda own: torch.func.vmap(own)(rows(2, 48)),
    "no rows": lambda own: own(rows(0, 48)),
    "a width that broadcasts": lambda own: own(rows(2, 1)),
}


@pytest.mark.parametrize("use", OTHERS)
def test_transformers_own_forward_runs(use):
    own = norm()
    truth = OTHERS[use](copy.deepcopy(own))
    counted = Counted()
    Norms(own, counted)
    found = OTHERS[use](own)
    assert not counted.rows
    assert torch.equal(found, truth)
    assert (found.dtype, found.requires_grad) == (truth.dtype, truth.requires_grad)


def test_copies_and_pickles_are_norms_of_transformers_and_removing_gives_its_class_back():
    own = norm()
    before = own.weight
    norms = Norms(own, ops.rms_norm)
    assert isinstance(own, OlmoeRMSNorm)
    assert type(own).__name__ == "OlmoeRMSNorm"
    file = io.BytesIO()
    torch.save(own, file)
    assert b"emoe" not in file.getvalue()
    file.seek(0)
    for twin in (copy.deepcopy(own), torch.load(file, weights_only=False)):
        assert type(twin) is OlmoeRMSNorm
        torch.testing.assert_close(twin(rows(2, 48)), own(rows(2, 48)))
    for _ in range(2):
        norms.remove()
        assert type(own) is OlmoeRMSNorm
    assert own.weight is before


def test_a_tensor_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"weight has shape \(47,\), not \(48,\)"):
        ops.rms_norm(rows(2, 48), rows(47), 1e-5)
    with pytest.raises(ConfigError, match="weight is float32, not one of: bfloat16"):
        ops.rms_norm(rows(2, 48, dtype=torch.bfloat16), rows(48), 1e-5)


@pytest.mark.parametrize(
    ("family", "found"),
    [("olmoe", 13), ("mixtral", 7), ("qwen3_moe", 13), ("deepseek_v3", 13), ("jamba", 15), ("gpt_oss", 0)],
)
def test_a_model_gives_the_logits_and_tokens_that_it_gives_with_its_own_norms(family, found):
    truth = families.build(family)
    model = emoe.wrap(families.build(family), memory_budget=0.5)
    assert model.emoe.stats()["norms"] == found
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, truth(ids).logits, rtol=1e-3, atol=1e-4)
    given = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), truth.generate(ids, **given))
    classes = [type(module) for module in truth.modules()]
    model.emoe.close()
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("options", [{"norms": "torch"}, {"kernels": "stock"}])
def test_a_model_keeps_its_own_where_it_is_asked_to(options):
    model = emoe.wrap(families.build("olmoe"), memory_budget=1.0, **options)
    assert model.emoe.stats()["norms"] == 0
    assert type(model.model.norm) is OlmoeRMSNorm
    model.emoe.close()
