"""The table of encodings: bytes of arrays, blocks that do not fit, and the numbers that codes stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from emoe.errors import UnsupportedModelError
from emoe.model.decode import decode, decoded, parameter
from emoe.model.encoding import COMPUTED, ENCODINGS, ITEMSIZE, EncodedMatrix, encoding
from emoe.model.spec import ExpertForm, ParamSpec, slot_offsets
from emoe.store.headers import DTYPES

PARAMETRIC = (
    "e4m3-128x128-float32", "e4m3-row-bfloat16", "e4m3-tensor-float32", "e4m3-1x32-e8m0", "e5m2-128x128-float16",
    "int8-row-bfloat16", "int4-32-bfloat16", "int4-32-float16-zeros", "awq-128-float16", "gptq-128-float16",
    "gptq_v2-128-float16", "gptq-128-float16-order", "uint8b128-1x32-bfloat16", "gptq8-128-float16",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(ITEMSIZE))
def test_a_plain_encoding_takes_what_a_torch_tensor_of_its_dtype_takes(name):
    assert encoding(name).plain
    assert encoding(name).nbytes((3, 5, 7)) == torch.empty(3, 5, 7, dtype=getattr(torch, name)).nbytes


def test_the_kernels_dtypes_are_the_first_of_the_table():
    assert tuple(ENCODINGS)[: len(COMPUTED)] == COMPUTED


@pytest.mark.parametrize(
    ("name", "bits"),
    [("q8_0", 8.5), ("q4_0", 4.5), ("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625), ("gguf_mxfp4", 4.25),
     ("mxfp4", 4.25), ("q5_0", 5.5), ("q4_1", 5.0), ("q5_1", 6.0), ("iq4_nl", 4.5), ("iq4_xs", 4.25), ("q2_k", 2.625),
     ("iq1_s", 1.5625), ("iq1_m", 1.75), ("iq2_xxs", 2.0625), ("iq2_xs", 2.3125), ("iq2_s", 2.5625),
     ("iq3_xxs", 3.0625), ("iq3_s", 3.4375),
     ("q3_k", 3.4375), ("int4-32-bfloat16", 4.5), ("uint8b128-1x32-bfloat16", 8.5),
     ("gptq8-128-float16", 8.1875), ("awq-128-float16", 4.15625), ("gptq-128-float16", 4.15625),
     ("gptq-128-float16-order", 4.28125)],
)  # fmt: skip
def test_a_format_takes_the_bits_a_weight_that_it_is_known_for(name, bits):
    assert encoding(name).nbytes((256, 512)) * 8 == bits * 256 * 512


def test_planes_are_counted_with_the_scales_of_blocks_that_the_edge_cuts():
    fp8 = encoding("e4m3-128x128-float32")
    assert fp8.nbytes((576, 7168)) == 576 * 7168 + 5 * 56 * 4
    assert fp8.shapes(576, 7168) == {"codes": (576, 7168), "scales": (5, 56)}
    assert encoding("nvfp4").nbytes((2, 32)) == 2 * 16 + 2 * 2 + 4
    assert encoding("awq-128-float16").shapes(64, 256) == {"codes": (256, 8), "scales": (2, 64), "zeros": (2, 8)}
    assert encoding("gptq-128-float16").shapes(64, 256) == {"codes": (32, 64), "scales": (2, 64), "zeros": (2, 8)}
    assert encoding("int4-32-float16-zeros").shapes(64, 256) == {"codes": (64, 32), "scales": (64, 8), "zeros": (8, 8)}


def test_an_array_that_is_no_whole_number_of_blocks_is_refused_with_both_sizes():
    with pytest.raises(UnsupportedModelError, match=r"\[4, 65\] cannot be q8_0.*1 rows and 32 columns"):
        encoding("q8_0").nbytes((4, 65))


def test_a_number_without_axes_is_one_element():
    assert encoding("float32").nbytes(()) == 4


@pytest.mark.parametrize("name", ["q9_z", "e4m3-0x128-float32", "awq-128-float16-zeros", "int4-32-float64"])
def test_an_encoding_that_is_not_known_names_those_that_are(name):
    with pytest.raises(UnsupportedModelError, match=f"'{name}' is not one of: float32, float16.*e4m3-128x128-float32"):
        encoding(name)


def test_every_dtype_of_a_safetensors_header_is_an_encoding():
    assert set(DTYPES.values()) <= set(ENCODINGS)


def test_parameters_start_at_multiples_of_64_bytes():
    offsets, nbytes = slot_offsets((ParamSpec("a", (3, 5), "bfloat16"), ParamSpec("b", (33,), "float32")))
    assert offsets == {"a": 0, "b": 64} and nbytes == 64 + 192


def _bytes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def _words(*values: int) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


def test_e2m1_codes_lie_low_nibble_first_and_a_scale_is_a_power_of_two():
    codes = _bytes(*(low | (low + 1) << 4 for low in range(0, 16, 2)), *[0] * 8)  # 0, 1, ..., 15, then zeros
    values = decoded(encoding("mxfp4"), 1, 32, {"codes": codes, "scales": _bytes(128)})[0]
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values[:16].tolist() == [2 * each for each in positive] + [-2 * each for each in positive]


@pytest.mark.parametrize(("byte", "value"), [(127, 1.0), (0, 2.0**-127), (254, 2.0**127), (255, math.nan)])
def test_an_exponent_byte_is_a_power_of_two_and_255_is_no_number(byte, value):
    scaled = decoded(
        encoding("e4m3-1x32-e8m0"), 1, 32,
        {"codes": torch.ones(32).to(torch.float8_e4m3fn), "scales": _bytes(byte)},
    )  # fmt: skip
    assert scaled[0, 0].item() == value or (math.isnan(value) and scaled.isnan().all())


def test_a_factor_multiplies_or_divides_as_its_maker_has_it():
    planes = {
        "codes": _bytes(*[0x22] * 8),
        "scales": torch.tensor([2.0]).to(torch.float8_e4m3fn),
        "factor": torch.tensor([4.0]),
    }
    assert decoded(encoding("nvfp4"), 1, 16, planes)[0, 0] == 8.0
    assert decoded(encoding("nvfp4_divided"), 1, 16, planes)[0, 0] == 0.5


def test_the_scale_of_a_block_reaches_to_the_edge_and_no_further():
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    values = decoded(
        encoding("e4m3-128x128-float32"), 130, 129,
        {"codes": torch.ones(130, 129).to(torch.float8_e4m3fn), "scales": scales},
    )  # fmt: skip
    assert values[127, 127] == 1 and values[127, 128] == 2 and values[128, 127] == 3 and values[129, 128] == 4


def test_four_bit_integers_are_offset_by_eight_or_by_their_zero():
    planes = {"codes": _words(0x76543210), "scales": torch.ones(1, 1, dtype=torch.bfloat16)}
    assert decoded(encoding("int4-8-bfloat16"), 1, 8, planes)[0].tolist() == [i - 8.0 for i in range(8)]
    planes = {"codes": _words(*[0x76543210] * 8), "scales": torch.ones(8, 1).half(), "zeros": _words(0x76543210)}
    with_zeros = decoded(encoding("int4-8-float16-zeros"), 8, 8, planes)
    assert with_zeros[3].tolist() == [i - 3.0 for i in range(8)]  # zeros are packed along the outputs


def test_the_nibbles_of_an_awq_word_are_outputs_in_the_order_of_its_packer():
    planes = {"codes": _words(0x76543210), "scales": torch.ones(1, 8).half(), "zeros": _words(0)}
    values = decoded(encoding("awq-1-float16"), 8, 1, planes)[:, 0]
    assert values.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(("name", "zero"), [("gptq-8-float16", 8), ("gptq_v2-8-float16", 7)])
def test_the_nibbles_of_a_gptq_word_are_inputs_and_its_zeros_are_stored_less_one_in_the_first_version(name, zero):
    planes = {"codes": _words(*[0x76543210] * 8), "scales": torch.ones(1, 8).half(), "zeros": _words(0x77777777)}
    assert decoded(encoding(name), 8, 8, planes)[5].tolist() == [i - zero for i in range(8)]


def test_an_order_says_the_group_of_each_input_to_scales_and_zeros():
    order = [1, 0, 1, 1, 0, 0, 1, 0]
    planes = {
        "codes": _words(*[0x76543210] * 8), "scales": torch.tensor([[1.0], [10.0]]).expand(2, 8).half(),
        "zeros": _words(0x33333333, 0x55555555).view(2, 1), "order": torch.tensor([order], dtype=torch.int32),
    }  # fmt: skip
    values = decoded(encoding("gptq_v2-4-float16-order"), 8, 8, planes)
    assert values[2].tolist() == [(i - (3, 5)[g]) * (1, 10)[g] for i, g in enumerate(order)]


def test_a_row_of_one_group_has_no_order_and_neither_have_other_formats():
    for name in ("gptq-row-float16-order", "awq-32-float16-order", "int4-row-float16-order", "gptq-32-float16-zeros"):
        with pytest.raises(UnsupportedModelError, match=name):
            encoding(name)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_0", "q4_1", "q5_1", "gguf_mxfp4"])
def test_blocks_of_gguf_are_decoded_as_its_library_does(kind):
    import gguf

    weight = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    type_ = gguf.GGMLQuantizationType[kind.removeprefix("gguf_").upper()]
    blocks = gguf.quants.quantize(weight, type_)
    matrix = EncodedMatrix(kind, 3, 64, {"blocks": "b"}, "w")
    values = decode(matrix, {"blocks": torch.from_numpy(blocks)})
    assert torch.equal(values, torch.from_numpy(gguf.quants.dequantize(blocks, type_)))


@pytest.mark.parametrize("name", [*PARAMETRIC, *(each for each in ENCODINGS if not encoding(each).plain)])
def test_every_encoding_decodes_whatever_its_bytes_are_to_the_shape_of_the_matrix(name):
    how, generator = encoding(name), torch.Generator().manual_seed(0)
    planes = {}
    for plane in how.planes:
        shape = how.shapes(64, 256)[plane.name]
        nbytes = math.prod(shape) * ITEMSIZE[plane.dtype]
        raw = torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)
        planes[plane.name] = raw.view(getattr(torch, plane.dtype)).view(shape)
        if plane.name == "order":  # a loader has looked at it
            planes[plane.name] %= len(planes["scales"])
    with np.errstate(all="ignore"):
        values = decoded(how, 64, 256, planes)
    assert values.shape == (64, 256) and values.dtype == torch.float32


def test_a_parameter_is_put_together_of_its_matrices_interleaved_and_transposed_where_they_say_so():
    params = (ParamSpec("gate_up_proj", (8, 4), "float32"),)  # [inputs, 2 outputs]
    stored = (ParamSpec("gate", (2, 8), "bfloat16"), ParamSpec("up", (2, 8), "bfloat16"))
    matrices = tuple(
        EncodedMatrix("bfloat16", 2, 8, {"values": name}, "gate_up_proj", start=start, step=2, transposed=True)
        for start, name in enumerate(("gate", "up"))
    )
    form = ExpertForm(params, stored, matrices)
    arrays = {"gate": torch.ones(2, 8).bfloat16(), "up": 2 * torch.ones(2, 8).bfloat16()}
    made = parameter(form, "gate_up_proj", arrays.__getitem__)
    assert made.shape == (8, 4) and made[0].tolist() == [1, 2, 1, 2]
    assert form.nbytes == 64 and form.encodings == ("bfloat16",)
