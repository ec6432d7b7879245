"""The table of encodings: bytes of arrays, blocks that do not fit, and torch's own figures for plain dtypes."""

from __future__ import annotations

import pytest
import torch

from emoe.errors import UnsupportedModelError
from emoe.model.encoding import COMPUTED, ENCODINGS, Encoding, encoding
from emoe.model.spec import ParamSpec, slot_offsets
from emoe.store.headers import DTYPES


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_a_plain_encoding_takes_what_a_torch_tensor_of_its_dtype_takes(name):
    assert encoding(name).plain
    assert encoding(name).nbytes((3, 5, 7)) == torch.empty(3, 5, 7, dtype=getattr(torch, name)).nbytes


def test_the_kernels_encodings_are_the_first_of_the_table():
    assert tuple(ENCODINGS)[: len(COMPUTED)] == COMPUTED


def test_a_block_counts_all_its_planes():
    q8 = Encoding("q8", (1, 32), (("scales", 2), ("codes", 32)))
    assert q8.block_bytes == 34 and not q8.plain
    assert q8.nbytes((4, 64)) == 4 * 2 * 34
    fp8 = Encoding("fp8", (128, 128), (("codes", 128 * 128), ("scales", 4)))
    assert fp8.nbytes((2, 256, 128)) == 4 * (128 * 128 + 4)


def test_an_array_that_is_no_whole_number_of_blocks_is_refused_with_both_sizes():
    q8 = Encoding("q8", (1, 32), (("scales", 2), ("codes", 32)))
    with pytest.raises(UnsupportedModelError, match=r"\[4, 65\] cannot be q8.*1 rows and 32 columns"):
        q8.nbytes((4, 65))


def test_a_number_without_axes_is_one_element():
    assert encoding("float32").nbytes(()) == 4


def test_an_encoding_that_is_not_known_names_those_that_are():
    with pytest.raises(UnsupportedModelError, match="'q9_z' is not one of: float32, float16"):
        encoding("q9_z")


def test_every_dtype_of_a_safetensors_header_is_an_encoding():
    assert set(DTYPES.values()) <= set(ENCODINGS)


def test_parameters_start_at_multiples_of_64_bytes():
    offsets, nbytes = slot_offsets((ParamSpec("a", (3, 5), "bfloat16"), ParamSpec("b", (33,), "float32")))
    assert offsets == {"a": 0, "b": 64} and nbytes == 64 + 192
