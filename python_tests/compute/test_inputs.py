"""What a layer is given that does not fit is refused by name, alike by every compute, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

import emoe
from emoe.errors import ConfigError, EmoeError, UnsupportedModelError

H, E, K, T = 64, 8, 3, 4


def _ids(*shape, fill=0, dtype=torch.int64):
    return torch.full(shape, fill, dtype=dtype)


WRONG = {
    "ids of 32 bits": ({"index": _ids(T, K, dtype=torch.int32)}, ConfigError, "index is torch.int32 .* int64"),
    "ids that are no integers": ({"index": torch.zeros(T, K)}, ConfigError, "index is torch.float32"),
    "ids of one dimension": ({"index": _ids(T)}, ConfigError, r"index is torch.int64 \[4\]"),
    "ids without a pick": ({"index": _ids(T, 0), "weights": torch.ones(T, 0)}, ConfigError, "K at least 1"),
    "sparse ids": ({"index": _ids(T, K).to_sparse()}, ConfigError, "dense tensors"),
    "weights with a rank less": ({"weights": torch.ones(T, K - 1)}, ConfigError, r"weights is torch.float32 \[4, 2\]"),
    "weights with rows less": ({"weights": torch.ones(2, K)}, ConfigError, r"weights is torch.float32 \[2, 3\]"),
    "weights that are integers": ({"weights": _ids(T, K)}, ConfigError, "weights is torch.int64"),
    "weights of 64 bits": ({"weights": torch.ones(T, K, dtype=torch.float64)}, ConfigError, "float64"),
    "rows that were not given": ({"hidden": torch.randn(2, H)}, ConfigError, r"hidden is torch.float32 \[2, 64\]"),
    "narrow states": ({"hidden": torch.randn(T, 32)}, ConfigError, r"hidden is .* \[4, 64\]"),
    "wide states": ({"hidden": torch.randn(T, 128)}, ConfigError, r"hidden is .* \[4, 64\]"),
    "states of three dimensions": ({"hidden": torch.randn(1, T, H)}, ConfigError, r"hidden is .*\[1, 4, 64\]"),
    "states that are integers": ({"hidden": _ids(T, H)}, ConfigError, "hidden is torch.int64"),
    "states of 64 bits": ({"hidden": torch.randn(T, H, dtype=torch.float64)}, ConfigError, "float64"),
    "states without values": ({"hidden": torch.randn(T, H, device="meta")}, UnsupportedModelError, "are on meta"),
    "ids without values": ({"index": _ids(T, K).to("meta")}, UnsupportedModelError, "are on cpu, meta, cpu"),
    "states with a gradient": ({"hidden": torch.randn(T, H, requires_grad=True)}, EmoeError, "inference only"),
}  # fmt: skip


@pytest.fixture(params=["native", "stock", "emulated"], scope="module")
def model(request, checkpoint, found_device):
    where = {"device": found_device("emulated")} if request.param == "emulated" else {"kernels": request.param}
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=0.5, dtype=torch.float32, **where)
    assert model.config.hidden_size == H and model.emoe.layers[0].num_experts == E
    yield model
    model.emoe.close(restore=False)


def _call(model, **changes):
    generator = torch.Generator().manual_seed(0)
    given = {"hidden": torch.randn(T, H, generator=generator), "index": _ids(T, K), "weights": torch.ones(T, K)}
    given.update(changes)
    return model.emoe.layers[0].module(given["hidden"], given["index"], given["weights"])


@pytest.mark.parametrize("wrong", WRONG)
def test_an_input_that_does_not_fit_is_refused_by_name_and_the_next_call_is_right(wrong, model):
    changes, kind, said = WRONG[wrong]
    expected = _call(model)
    if wrong == "weights of 64 bits" and model.emoe.layers[0].kernels == "stock":  # Transformers' own loop takes them
        torch.testing.assert_close(_call(model, **changes), expected, check_dtype=False)
        return
    with pytest.raises(kind, match=said):
        _call(model, **changes)
    model.emoe.check_integrity()
    assert torch.equal(_call(model), expected)


@pytest.mark.parametrize("expert", [-1, E, 1 << 40, -(1 << 63)])
def test_ids_that_are_no_expert_add_nothing(expert, model):
    index = _ids(T, K)
    index[0] = expert
    index[1, 1:] = expert
    found = _call(model, index=index)
    whole, part = _call(model), _call(model, index=_ids(T, 1), weights=torch.ones(T, 1))
    assert torch.equal(found[0], torch.zeros(H))
    torch.testing.assert_close(found[1], part[1])
    torch.testing.assert_close(found[2:], whole[2:])
    assert torch.equal(_call(model, index=_ids(T, K, fill=expert)), torch.zeros(T, H))
    model.emoe.check_integrity()


def test_no_tokens_give_no_rows(model):
    found = _call(model, hidden=torch.randn(0, H), index=_ids(0, K), weights=torch.ones(0, K))
    assert found.shape == (0, H)


def test_views_of_one_row_are_taken_as_the_rows_they_show(model):
    row = torch.randn(1, H, generator=torch.Generator().manual_seed(1))
    found = _call(model, hidden=row.expand(T, H), index=_ids(1, 1).expand(T, K), weights=torch.ones(1, 1).expand(T, K))
    torch.testing.assert_close(found, _call(model, hidden=row.repeat(T, 1)))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "inkling2_text"])
def test_other_families_refuse_what_does_not_fit_as_well(family, checkpoint):
    model = emoe.from_pretrained(checkpoint(family), memory_budget=0.5, kernels="stock", dtype=torch.float32)
    layer = model.emoe.layers[0]
    width = model.config.hidden_size
    with torch.no_grad():
        good = layer.module(torch.ones(2, width), _ids(2, 2), torch.ones(2, 2))
        for hidden, index, weights in (
            (torch.ones(2, width + 1), _ids(2, 2), torch.ones(2, 2)),
            (torch.ones(2, width, dtype=torch.float64), _ids(2, 2), torch.ones(2, 2)),
            (torch.ones(2, width), _ids(2, 2, dtype=torch.int32), torch.ones(2, 2)),
            (torch.ones(2, width), _ids(2, 2), torch.ones(1, 2)),
        ):
            with pytest.raises(ConfigError):
                layer.module(hidden, index, weights)
        assert not layer.module(torch.ones(2, width), _ids(2, 2, fill=10_000), torch.ones(2, 2)).any()
        assert torch.equal(layer.module(torch.ones(2, width), _ids(2, 2), torch.ones(2, 2)), good)
    model.emoe.close(restore=False)
