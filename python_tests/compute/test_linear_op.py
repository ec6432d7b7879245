"""The native linear layer: every encoding against float64 arithmetic on what emoe.model.decode says."""

from __future__ import annotations

import pytest
import torch
from test_encoded_ops import NAMES, random_planes

from emoe import native
from emoe.compute import ops
from emoe.errors import ConfigError
from emoe.model.encoding import encoding
from emoe.model.held import Held

C = native.load()


def held(name: str, rows: int = 200, cols: int = 512) -> Held:
    made = Held(encoding(name), rows, cols)
    for plane, array in random_planes(name, rows, cols, torch.Generator().manual_seed(2)).items():
        made.raw(plane).copy_(array.contiguous().view(torch.uint8).flatten())
    return made


def tokens(count: int, cols: int = 512, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((count, cols), generator=torch.Generator().manual_seed(count)).to(dtype)


def reference(weights: Held, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weights.numbers(torch.float64).T
    return y if bias is None else y + bias.double()


def check(weights: Held, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    got, want = ops.linear(weights, x, bias), reference(weights, x, bias)
    assert got.dtype == x.dtype
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    # docs/kernels.md: rows that meet integers are 16-bit integers, the pairs of many bfloat16 rows bfloat16; and y is
    # rounded to its dtype.
    most = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
    assert error <= most, f"{weights.how.name}: error {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_every_encoding_agrees_with_float64(name):
    weights = held(name)
    for count in (1, 5, 8, 9, 40):
        check(weights, tokens(count))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["q4_0", "q6_k", "q8_0", "mxfp4", "e4m3-128x128-float32", "awq-128-float16",
                                  "bfloat16", "float16", "float32"])  # fmt: skip
def test_rows_of_two_bytes_and_biases_of_any_dtype(name, dtype):
    weights = held(name)
    for bias_dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = torch.randn(200, generator=torch.Generator().manual_seed(1)).to(bias_dtype)
        for count in (3, 40):
            check(weights, tokens(count, dtype=dtype), bias)


@pytest.mark.parametrize("name", ["q8_0", "int4-32-bfloat16", "e4m3-128x128-float32", "bfloat16", "float32"])
def test_sizes_that_no_vector_and_no_task_divides(name):
    for rows, cols in ((1, 32), (7, 96), (65, 160), (515, 288)):
        weights = held(name, rows, cols)
        for count in (1, 9, 33):
            check(weights, tokens(count, cols))
            check(weights, tokens(count, cols, torch.bfloat16))


def test_more_rows_than_a_chunk_has():
    for name in ("q4_k", "float32"):
        weights = held(name, 70, 256)
        for dtype in (torch.float32, torch.bfloat16):
            check(weights, tokens(300, 256, dtype))


@pytest.mark.parametrize("name", [*NAMES])
def test_up_to_eight_rows_each_has_the_bits_that_it_has_alone_whatever_the_threads(name):
    weights = held(name)
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens(8, dtype=dtype)
        want = ops.linear(weights, x, None)
        for rows in (slice(0, 1), slice(2, 3), slice(3, 8)):
            assert torch.equal(ops.linear(weights, x[rows], None), want[rows])
        before = C.threads()
        try:
            for threads in (1, 3):
                C.set_threads(threads)
                assert torch.equal(ops.linear(weights, x, None), want)
        finally:
            C.set_threads(before)


def test_rows_that_are_not_neighbours_and_none_at_all():
    weights = held("q8_0")
    wide = tokens(6, 1024)
    check(weights, wide[:, :512])
    check(weights, wide[::2, 512:])
    assert ops.linear(weights, torch.empty(0, 512), None).shape == (0, 200)


def test_what_is_not_a_number_comes_out_as_such():
    weights = held("e4m3-row-float32", 64, 64)
    weights.raw("codes")[5 * 64 + 3] = 0x7F
    for count in (2, 20):
        y = ops.linear(weights, tokens(count, 64), None)
        assert y[:, 5].isnan().all()
        assert y[:, :5].isfinite().all()
        assert y[:, 6:].isfinite().all()
    x = tokens(20, 64)
    x[7, 1] = torch.inf
    y = ops.linear(held("q8_0", 64, 64), x, None)
    assert not y[7].isfinite().any()
    assert y[:7].isfinite().all()


def test_what_does_not_fit_is_refused():
    weights = held("q8_0")
    with pytest.raises(ConfigError, match=r"x has shape \(2, 96\), not \(2, 512\)"):
        ops.linear(weights, torch.ones(2, 96), None)
    with pytest.raises(ConfigError, match="x is float64, not one of"):
        ops.linear(weights, torch.ones(2, 512, dtype=torch.float64), None)
    with pytest.raises(ConfigError, match=r"bias has shape \(3,\), not \(200,\)"):
        ops.linear(weights, torch.ones(2, 512), torch.ones(3))
    with pytest.raises(ConfigError, match="x is on meta"):
        ops.linear(weights, torch.ones(2, 512, device="meta"), None)
    made = C.Weights(**weights.native())
    with pytest.raises(ConfigError, match="tokens=-1 is negative"):
        C.linear(made, weights.buffer.data_ptr(), 1, "float32", -1, 1)
    with pytest.raises(ConfigError, match="address, x_ptr or y_ptr is 0"):
        C.linear(made, weights.buffer.data_ptr(), 0, "float32", 1, 1)
    with pytest.raises(ConfigError, match="x of int32 is not one of"):
        C.linear(made, weights.buffer.data_ptr(), 1, "int32", 1, 1)
