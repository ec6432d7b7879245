"""Encoders: what they write decodes to what they were given, within figures that are known for each encoding.

Figures are relative RMS errors for fixed seeds. llama.cpp's own quantizer (ggml_quantize_chunk without an importance
matrix) has the same for Q4_K, Q5_K and Q6_K to within a thousandth, and 2 to 9 % more for MXFP4.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from emoe.errors import ConfigError, UnsupportedModelError
from emoe.model.decode import decoded
from emoe.model.encode import ENCODERS, FP8, INT4, INT8, encode
from emoe.model.encoding import encoding


def _matrix(kind: str, rows: int = 128, cols: int = 1024) -> torch.Tensor:
    random = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, cols, generator=random)
    return {
        "normal": normal,
        "weights": normal * 0.02,
        "outliers": normal * (1 + 20 * (torch.rand(rows, cols, generator=random) > 0.995)),
        "columns": normal * (1 + 30 * (torch.rand(cols, generator=random) > 0.99)),
        "positive": normal.abs(),
        "negative": -normal.abs(),
    }[kind]


def _error(name: str, matrix: torch.Tensor) -> float:
    """Relative RMS, by the reference decoder."""
    planes = encode(name, matrix).planes
    lost = decoded(encoding(name), *matrix.shape, planes) - matrix
    return (lost.double().square().sum() / matrix.double().square().sum()).sqrt().item()


MOST = {
    # relative RMS error of: normal, weights, outliers, columns, positive, negative
    "q8_0": (0.0054, 0.0054, 0.0110, 0.0120, 0.0054, 0.0054),
    "q4_0": (0.0863, 0.0864, 0.1390, 0.1260, 0.0855, 0.0855),
    "q5_0": (0.0429, 0.0429, 0.0830, 0.0870, 0.0427, 0.0427),
    "q5_1": (0.0381, 0.0381, 0.0510, 0.0560, 0.0215, 0.0215),
    "q2_k": (0.2680, 0.2680, 0.2290, 0.1815, 0.1800, 0.1570),
    "q3_k": (0.1540, 0.1540, 0.1510, 0.1180, 0.1470, 0.1470),
    "q4_k": (0.0718, 0.0718, 0.0960, 0.0950, 0.0428, 0.0412),
    "q5_k": (0.0363, 0.0363, 0.0490, 0.0530, 0.0210, 0.0213),
    "q6_k": (0.0179, 0.0179, 0.0312, 0.0345, 0.0179, 0.0179),
    "mxfp4": (0.1120, 0.1122, 0.1560, 0.1530, 0.1120, 0.1120),
    "gguf_mxfp4": (0.1120, 0.1122, 0.1560, 0.1530, 0.1120, 0.1120),
    INT4: (0.0844, 0.0844, 0.1390, 0.1260, 0.0834, 0.0834),
    INT8: (0.0055, 0.0055, 0.0110, 0.0121, 0.0055, 0.0055),
    FP8: (0.0266, 0.0266, 0.0266, 0.0266, 0.0266, 0.0266),
}


@pytest.mark.parametrize("name", MOST)
def test_what_is_lost_is_what_is_known_of_the_encoding(name):
    kinds = ("normal", "weights", "outliers", "columns", "positive", "negative")
    for kind, most in zip(kinds, MOST[name], strict=True):
        found = _error(name, _matrix(kind))
        assert 0.9 * most < found <= most, (kind, found)


def test_every_encoder_has_a_figure():
    assert set(MOST) == {name for name in ENCODERS if "-row-" not in name}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_error_that_is_reported_is_that_of_the_decoded_numbers(name):
    matrix = _matrix("outliers")
    found = encode(name, matrix)
    assert (found.squared_error / found.squared) ** 0.5 == pytest.approx(_error(name, matrix), rel=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_planes_have_the_shapes_that_the_table_says(name):
    planes = encode(name, _matrix("normal", 40, 512)).planes
    assert {plane: tuple(array.shape) for plane, array in planes.items()} == encoding(name).shapes(40, 512)
    assert {plane.name: plane.dtype for plane in encoding(name).planes} == {
        plane: str(array.dtype).removeprefix("torch.") for plane, array in planes.items()
    }


@pytest.mark.parametrize("name", ENCODERS)
def test_a_matrix_in_parts_gives_the_same_numbers_as_its_rows_one_by_one(name, monkeypatch):
    matrix = _matrix("outliers", 256, 512)
    whole = encode(name, matrix)
    monkeypatch.setattr("emoe.model.encode._CHUNK", 1)
    parts = encode(name, matrix)
    assert parts.squared_error == pytest.approx(whole.squared_error, rel=1e-3)
    for plane, array in whole.planes.items():  # sums in another order turn a tie here and there
        same = array.view(torch.uint8) == parts.planes[plane].view(torch.uint8)
        assert same.float().mean() > (0.99 if name in ("q4_k", "q5_k", INT4) else 0.999999), plane


@pytest.mark.parametrize("name", ENCODERS)
def test_zeros_and_equal_numbers_decode_to_themselves(name):
    for value in (0.0, 0.25, -2.0):
        matrix = torch.full((3, 256), value)
        got = decoded(encoding(name), 3, 256, encode(name, matrix).planes)
        assert torch.allclose(got, matrix, rtol=2e-3, atol=0), (value, got[0, :4])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_group_of_zeros_beside_others_stays_zero(name):
    matrix = _matrix("normal", 4, 512)
    matrix[:, 256:] = 0
    got = decoded(encoding(name), 4, 512, encode(name, matrix).planes)
    assert torch.equal(got[:, 256:], matrix[:, 256:])


@pytest.mark.parametrize("name", ENCODERS)
def test_numbers_that_are_representable_come_back_as_they_were(name):
    """What was decoded once is encoded to the same numbers, so converting twice loses nothing more."""
    once = decoded(encoding(name), 8, 512, encode(name, _matrix("normal", 8, 512)).planes)
    most = {"q4_k": 0.02, "q5_k": 0.012, "q6_k": 0.01, "q5_1": 0.003, "q4_0": 0.001, "q5_0": 0.001}.get(name, 1e-6)
    most = 0.02 if name.startswith("int4") else 0.003 if name.startswith("int8") else most
    assert _error(name, once) <= most


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_the_blocks_are_those_that_the_gguf_library_reads(name):
    matrix = _matrix("weights", 8, 512)
    blocks = encode(name, matrix).planes["blocks"].numpy()
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    assert np.abs(values - matrix.numpy()).max() < 0.02
    assert blocks.nbytes == encoding(name).nbytes((8, 512))


def test_mxfp4_never_loses_more_than_the_standard_choice_of_the_exponent():
    for kind in ("normal", "outliers", "columns"):
        matrix = _matrix(kind)
        blocks = gguf.quants.quantize(matrix.numpy(), gguf.GGMLQuantizationType.MXFP4)
        standard = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)) - matrix
        assert encode("mxfp4", matrix).squared_error < standard.double().square().sum().item()


def test_both_layouts_of_mxfp4_hold_the_same_numbers():
    matrix = _matrix("outliers", 8, 256)
    planes, blocks = encode("mxfp4", matrix).planes, encode("gguf_mxfp4", matrix).planes
    assert torch.equal(decoded(encoding("mxfp4"), 8, 256, planes), decoded(encoding("gguf_mxfp4"), 8, 256, blocks))


def test_every_value_of_e2m1_and_the_ties_between_them_are_rounded_to_even_codes():
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ties = (steps[1:] + steps[:-1]) / 2
    row = torch.cat((steps, -steps, ties, -ties, torch.zeros(2)))[None]
    got = decoded(encoding("mxfp4"), 1, 32, encode("mxfp4", row).planes)[0]
    even = torch.tensor([0, 1, 1, 2, 2, 4, 4])
    assert torch.equal(got, torch.cat((steps, -steps, even, -even, torch.zeros(2))))


def test_fp8_scales_are_of_tiles_that_the_edge_cuts():
    matrix = torch.zeros(130, 200)
    matrix[129, 199], matrix[0, 0] = 3.0, 448.0
    planes = encode(FP8, matrix).planes
    assert planes["scales"].shape == (2, 2) and planes["scales"][0, 0] == 1
    assert decoded(encoding(FP8), 130, 200, planes)[129, 199] == pytest.approx(3.0)


def test_numbers_of_any_dtype_and_stride_are_encoded():
    matrix = _matrix("weights", 64, 256)
    for given in (matrix.half(), matrix.bfloat16(), matrix.T.contiguous().T):
        assert torch.equal(
            encode("q4_k", given).planes["blocks"], encode("q4_k", given.float().contiguous()).planes["blocks"]
        )


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused(name, value):
    matrix = _matrix("normal", 2, 256)
    matrix[1, 7] = value
    with pytest.raises(ConfigError, match="not finite"):
        encode(name, matrix)


def test_rows_that_are_no_whole_number_of_blocks_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"\[4, 320\] cannot be q4_k"):
        encode("q4_k", torch.zeros(4, 320))


def test_an_encoding_that_can_only_be_read_is_refused_with_those_that_can():
    with pytest.raises(ConfigError, match=r"iq4_nl can be read and not written.*q4_k"):
        encode("iq4_nl", torch.zeros(1, 32))


def test_a_plain_dtype_is_rounded_to_the_nearest():
    found = encode("bfloat16", torch.tensor([[1.0, 1.001]]))
    assert found.planes["values"].dtype == torch.bfloat16
    assert found.squared_error == pytest.approx(1e-6, rel=1e-3)
    assert encode("bfloat16", torch.ones(1, 2, dtype=torch.bfloat16)).squared_error == 0
