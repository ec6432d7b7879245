"""Bytes for numbers: a matrix in an encoding, and what that loses. decode.py is the way back.

Q2_K to Q6_K search their scales as llama.cpp does (ggml-quants.c): several roundings of a group are tried, each
with the scale (and offset) that fits it best in weighted least squares (csrc/cpu/fit.inl).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch

from emoe import native
from emoe.errors import ConfigError
from emoe.model.decode import decoded
from emoe.model.encoding import encoding
from emoe.options import FP8

# Groups of 32 along the inputs, the last of a row as long as the row is.
INT4, INT8 = "int4-32-bfloat16", "int8-1x32-bfloat16"
# Where the columns are no whole number of blocks: what takes about as many bits and whose last group may be cut. What
# fits nothing stays as it is.
FALLBACKS = {
    "q2_k": ("q4_0", INT4),
    "q3_k": ("q4_0", INT4),
    "q4_k": ("q4_0", INT4),
    "q4_0": (INT4,),
    "mxfp4": (INT4,),
    "q5_k": ("q5_1", INT8),
    "q6_k": ("q8_0", INT8),
    "q8_0": (INT8,),
}
_CHUNK = 1 << 18  # numbers that are encoded at once: 1 MiB of float32, and about ten times that for what is computed
WORKSPACE = 40 << 20  # bytes that encoding takes beside the matrix and what becomes of it, for each thread
_REFITTED = 2  # times that both numbers of a block of Q2_K are fitted again
_TILE = 128  # rows and columns that share a scale of FP8
_LARGEST_E4M3 = 448.0


@dataclass(frozen=True)
class Encoded:
    """A matrix in bytes.

    Attributes:
        planes: an array for each plane of the encoding.
        squared_error, squared: sums over all numbers, of what was lost and of what there was.
    """

    planes: dict[str, torch.Tensor]
    squared_error: float
    squared: float


def encode(name: str, matrix: torch.Tensor, pool: Executor | None = None) -> Encoded:
    """Puts a matrix into an encoding.

    Args:
        name: one of `ENCODERS`, or a plain dtype.
        matrix: [rows, cols] of any floating dtype.
        pool: threads that share the rows.

    Raises:
        UnsupportedModelError: it is no whole number of blocks.
        ConfigError: it holds a number that is not finite, or the encoding can be read and not written.
    """
    how = encoding(name)
    rows, cols = matrix.shape
    shapes = how.shapes(rows, cols)
    if not how.plain and name not in ENCODERS:
        raise ConfigError(f"{name} can be read and not written; the encodings that can: {', '.join(ENCODERS)}")
    high = max(1, _CHUNK // cols)
    high = max(_TILE, high // _TILE * _TILE) if name == FP8 else high
    parts = list((pool.map if pool else map)(partial(_part, name), matrix.split(high)))
    planes = {
        plane: torch.cat([part.planes[plane] for part in parts]).reshape(shape) for plane, shape in shapes.items()
    }
    return Encoded(planes, sum(part.squared_error for part in parts), sum(part.squared for part in parts))


def _part(name: str, some: torch.Tensor) -> Encoded:
    numbers = some.float().contiguous()
    plain = encoding(name).plain
    if not plain and not torch.isfinite(numbers).all():
        raise ConfigError("it holds numbers that are not finite")
    planes = {"values": numbers.to(getattr(torch, name))} if plain else ENCODERS[name](numbers)
    rows, cols = numbers.shape
    lost = (decoded(encoding(name), rows, cols, planes) - numbers).double().square().sum().item()
    return Encoded(planes, lost, numbers.double().square().sum().item())


def _library(kind: str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """Blocks as the `gguf` library makes them."""

    def make(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        import gguf

        blocks = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kind])
        return {"blocks": torch.from_numpy(blocks)}

    return make


def _fp8(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, cols = numbers.shape
    tall, wide = -(-rows // _TILE), -(-cols // _TILE)
    padded = torch.nn.functional.pad(numbers, (0, wide * _TILE - cols, 0, tall * _TILE - rows))
    tiles = padded.view(tall, _TILE, wide, _TILE)
    largest = tiles.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / _LARGEST_E4M3, 1.0)
    codes = (tiles / scales[:, None, :, None]).clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
    return {"codes": codes.view(tall * _TILE, wide * _TILE)[:rows, :cols].contiguous(), "scales": scales}


def _mxfp4(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """The lesser error of two powers of two: the standard's, which cuts numbers over 6 off, and twice that."""
    groups = numbers.view(numbers.shape[0], -1, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent.float() - 3  # floor(log2) of the largest, less that of 6
    exponent = torch.where(largest > 0, exponent, -127.0).clamp(-127, 126)
    best, codes, error = exponent, *_e2m1(groups, exponent)
    more, more_codes, more_error = exponent + 1, *_e2m1(groups, exponent + 1)
    better = (more_error < error) & (largest > 0)
    best, codes = torch.where(better, more, best), torch.where(better, more_codes, codes)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"codes": packed.view(numbers.shape[0], -1), "scales": (best[..., 0] + 127).to(torch.uint8)}


def _e2m1(groups: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and the squared error of each group."""
    magnitude = (groups * torch.exp2(-exponent)).abs()
    # Steps of a half up to 2, of 1 up to 4, of 2 up to 6: the coarsest that applies gives the least code.
    codes = torch.minimum((2 * magnitude).round(), magnitude.round() + 2)
    codes = torch.minimum(codes, (magnitude / 2).round() + 4).clamp(max=7)
    values = torch.maximum(torch.maximum(codes / 2, codes - 2), 2 * codes - 8)
    error = (values - magnitude).square().sum(-1, keepdim=True) * torch.exp2(2 * exponent)
    return codes.to(torch.uint8) | torch.signbit(groups).to(torch.uint8) << 3, error


def _gguf_mxfp4(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in blocks: the scale first, then nibbles j and j + 16 together."""
    planes = _mxfp4(numbers)
    packed = planes["codes"].view(numbers.shape[0], -1, 16)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)  # [rows, groups, 32]
    halves = codes[..., :16] | codes[..., 16:] << 4
    return {"blocks": torch.cat((planes["scales"][..., None], halves), -1).flatten(1)}


def _int4(numbers: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Codes from -8 to 7 times a scale of either sign, all numbers weighing the same: that loses a twentieth less."""
    x, groups = _cut_groups(numbers, size)
    scale = _fit_symmetric(x, 8, squared=False).bfloat16()
    codes = (x / scale.float()).round().clamp(-8, 7).nan_to_num(0) + 8
    rows, cols = numbers.shape
    return {"codes": _words(_joined(codes, rows, cols)), "scales": scale.view(rows, groups)}


def _int8(numbers: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    x, groups = _cut_groups(numbers, size)
    scale = (x.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (x / scale.float()).round().clamp(-127, 127).nan_to_num(0)
    rows, cols = numbers.shape
    return {"codes": _joined(codes, rows, cols).to(torch.int8), "scales": scale.view(rows, groups)}


def _cut_groups(numbers: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
    """[groups, size], of whole rows where `size` is 0 or more than they have, and how many a row has; zeros fill up."""
    cols = numbers.shape[1]
    size = min(size or cols, cols)
    return torch.nn.functional.pad(numbers, (0, -cols % size)).reshape(-1, size), -(-cols // size)


def _joined(codes: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """[rows, cols] of codes in groups."""
    return codes.reshape(rows, -1)[:, :cols].contiguous()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Eight of a row in an int32, the first in the lowest bits."""
    shifted = codes.to(torch.int64).view(len(codes), -1, 8) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def _fit_affine(x: torch.Tensor, most: int, first: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset [groups, 1] such that scale * code - offset is near x, with codes from 0 to `most`.

    Numbers weigh more the larger they are. Candidates differ in how many levels the range is stretched over, from
    `most + first` on in steps of a tenth; each is fitted by least squares. The best is then rounded to again, which
    llama.cpp leaves out. Its -0.5 is a tie for the largest number of each group: here Q2_K rounds it up, which loses
    up to an eighth less where a group has outliers, and Q5_K down.

    Args:
        x: [groups, size].
    """
    x = x.contiguous()
    scale, offset = torch.empty((2, len(x), 1))
    native.load().fit_affine(x.data_ptr(), *x.shape, most, first, steps, scale.data_ptr(), offset.data_ptr())
    return scale, offset


def _fit_symmetric(x: torch.Tensor, most: int, *, squared: bool) -> torch.Tensor:
    """The scale [groups, 1] such that scale * code is near x, with codes from -most to most - 1; of either sign.

    Args:
        x: [groups, size].
        squared: numbers weigh their square; otherwise all the same.
    """
    x = x.contiguous()
    scale = torch.empty((len(x), 1))
    native.load().fit_symmetric(x.data_ptr(), *x.shape, most, squared, scale.data_ptr())
    return scale


def _affine_blocks(numbers: torch.Tensor, most: int, first: float, steps: int) -> dict[str, torch.Tensor]:
    """Q4_K and Q5_K: eight groups of 32 a block, scales and offsets in six bits times one of the block each."""
    x = numbers.view(-1, 32)
    scale, offset = (each.view(-1, 8) for each in _fit_affine(x, most, first, steps))
    unit, units = _units(scale, 63)
    low_unit, low_units = _units(offset, 63)
    step, low = (unit.float() * units).view(-1, 1), (low_unit.float() * low_units).view(-1, 1)
    codes = ((x + low) / step).round_().clamp_(0, most).nan_to_num_(0)  # a group without a step is flat
    codes = codes.to(torch.uint8).view(-1, 4, 2, 32)  # [blocks, pairs of groups, 2, 32]
    low_bits = codes & 15
    parts = [_as_bytes(unit), _as_bytes(low_unit), _packed_scales(units.to(torch.uint8), low_units.to(torch.uint8))]
    if most > 15:
        high = (codes >> 4).view(-1, 8, 32) << torch.arange(8, dtype=torch.uint8)[:, None]
        parts.append(high.sum(1, dtype=torch.uint8))
    parts.append((low_bits[:, :, 0] | low_bits[:, :, 1] << 4).flatten(1))
    return {"blocks": torch.cat(parts, 1).view(numbers.shape[0], -1)}


def _units(values: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[blocks, groups] -> a float16 each block, [blocks, 1], and how many of it, 0 to `most`."""
    largest = values.amax(1, keepdim=True).clamp(min=0)
    units = (values * (most / largest)).round().clamp(0, most).nan_to_num(0)
    return (largest / most).half(), units


def _signed_units(values: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, from -most to most - 1: there is one more of the sign that the largest has."""
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    units = (values * (-most / largest)).round().clamp(-most, most - 1).nan_to_num(0)
    return (largest / -most).half(), units


def _packed_scales(scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Twice eight numbers of six bits in twelve bytes: the upper two bits of the last four are with the first four."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = offsets[:, :4] | (offsets[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (offsets[:, 4:] & 15) << 4
    return torch.cat((first, second, third), 1)


def _q2_k(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sixteen groups of 16 a block, scales and offsets in four bits times one of the block each.

    Few bits are left for a scale, so both numbers of the block are fitted again to the codes.
    """
    x = numbers.view(-1, 16)
    scale, offset = (each.view(-1, 16) for each in _fit_affine(x, 3, -0.499, 15))
    unit, units = _units(scale, 15)
    low_unit, low_units = _units(offset, 15)

    def codes_of() -> torch.Tensor:
        step, low = (unit.float() * units).view(-1, 1), (low_unit.float() * low_units).view(-1, 1)
        return ((x + low) / step).round_().clamp_(0, 3).nan_to_num_(0)

    # Least squares from sums of groups: every number of a group has the same units.
    of_scale, of_offset = units.double(), low_units.double()
    oo = 16 * of_offset.square().sum(1)
    ox = (of_offset * x.view(-1, 16, 16).sum(2, dtype=torch.float64)).sum(1)
    for _ in range(_REFITTED):
        codes = codes_of().view(-1, 16, 16)
        c, cc = codes.sum(2), codes.square().sum(2)
        cx = (codes * x.view(-1, 16, 16)).sum(2, dtype=torch.float64)
        ss, so, sx = (of_scale.square() * cc).sum(1), (of_scale * of_offset * c).sum(1), (of_scale * cx).sum(1)
        determinant = ss * oo - so * so
        fitted = (sx * oo - ox * so) / determinant
        fitted_low = (sx * so - ox * ss) / determinant
        good = (determinant > 0) & (fitted > 0) & (fitted_low > 0)
        unit = torch.where(good, fitted, unit[:, 0].float()).half()[:, None]
        low_unit = torch.where(good, fitted_low, low_unit[:, 0].float()).half()[:, None]
    parts = (
        units.to(torch.uint8) | low_units.to(torch.uint8) << 4, _two_bits(codes_of().to(torch.uint8)),
        _as_bytes(unit), _as_bytes(low_unit),
    )  # fmt: skip
    return {"blocks": torch.cat(parts, 1).view(numbers.shape[0], -1)}


def _q3_k(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sixteen groups of 16 a block, scales in six bits times one of the block."""
    x = numbers.view(-1, 16)
    scale = _fit_symmetric(x, 4, squared=True).view(-1, 16)
    unit, units = _signed_units(scale, 32)
    codes = (x / (unit.float() * units).view(-1, 1)).round_().clamp_(-4, 3).nan_to_num_(0)
    codes = codes.add_(4).to(torch.uint8)
    high = (codes >> 2).view(-1, 8, 32) << torch.arange(8, dtype=torch.uint8)[:, None]
    six = (units + 32).to(torch.uint8)
    pairs = (six >> 4).view(-1, 4, 4) << torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    scales = torch.cat(((six[:, :8] & 15) | six[:, 8:] << 4, pairs.sum(1, dtype=torch.uint8)), 1)
    parts = (high.sum(1, dtype=torch.uint8), _two_bits(codes & 3), scales, _as_bytes(unit))
    return {"blocks": torch.cat(parts, 1).view(numbers.shape[0], -1)}


def _two_bits(codes: torch.Tensor) -> torch.Tensor:
    """[groups, 16] -> [blocks, 64]: those of 128 values in the same 32 bytes."""
    four = codes.view(-1, 2, 4, 32) << torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    return four.sum(2, dtype=torch.uint8).flatten(1)


def _q6_k(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sixteen groups of 16 a block, scales in eight bits times one of the block."""
    x = numbers.view(-1, 16)
    scale = _fit_symmetric(x, 32, squared=True).view(-1, 16)
    unit, units = _signed_units(scale, 128)
    step = (unit.float() * units).view(-1, 1)
    codes = (x / step).round_().clamp_(-32, 31).nan_to_num_(0).add_(32)
    codes = codes.to(torch.uint8).view(-1, 2, 4, 32)  # [blocks, halves, quarters of a half, 32]
    low = codes & 15
    low = torch.cat((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), -1).flatten(1)
    high = codes >> 4
    high = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(1)
    parts = (low, high, units.to(torch.int8).view(torch.uint8), _as_bytes(unit))
    return {"blocks": torch.cat(parts, 1).view(numbers.shape[0], -1)}


def _as_bytes(unit: torch.Tensor) -> torch.Tensor:
    return unit.view(torch.uint8)


ENCODERS: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "q8_0": _library("Q8_0"),
    "q4_0": _library("Q4_0"),
    "q5_0": _library("Q5_0"),
    "q5_1": _library("Q5_1"),
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": lambda numbers: _affine_blocks(numbers, 15, -1.0, 20),
    "q5_k": lambda numbers: _affine_blocks(numbers, 31, -0.501, 15),
    "q6_k": _q6_k,
    "mxfp4": _mxfp4,
    "gguf_mxfp4": _gguf_mxfp4,
    FP8: _fp8,
    INT4: lambda numbers: _int4(numbers, 32),
    INT8: lambda numbers: _int8(numbers, 32),
    "int4-row-bfloat16": lambda numbers: _int4(numbers, 0),
    "int8-row-bfloat16": lambda numbers: _int8(numbers, 0),
}
