"""The numbers that encoded matrices stand for, in float32: the reference of the kernels. Slow, by torch and numpy.

Blocks of GGUF are decoded by the `gguf` library; the other formats are described where they are read
(store/companions.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from emoe.model.encoding import EncodedMatrix, Encoding, Plane, codes_a_word, encoding
from emoe.model.spec import ExpertForm

# e2m1: 1 sign, 2 exponent, 1 mantissa bit (OCP Microscaling Formats 1.0).
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Which of eight neighbouring outputs the nibbles of an AWQ word hold, lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def decode(matrix: EncodedMatrix, planes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[rows, cols] float32.

    Args:
        matrix: what lies there.
        planes: an array for each plane of its encoding, of the dtype and as many elements as that says.
    """
    return decoded(encoding(matrix.encoding), matrix.rows, matrix.cols, planes)


def parameter(form: ExpertForm, name: str, stored: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A parameter of one expert, made of the matrices that lie encoded in its slot.

    Args:
        form: of the expert.
        name: of a parameter that has matrices.
        stored: gives an array by name, of the shape and dtype that `form.stored` says.

    Returns:
        A tensor of the parameter's shape and dtype.
    """
    param = next(each for each in form.params if each.name == name)
    out = torch.empty(param.shape, dtype=getattr(torch, param.dtype))
    for matrix in form.matrices:
        if matrix.param == name:
            values = decode(matrix, {plane: stored(its_name) for plane, its_name in matrix.planes.items()})
            whole, taken = out.T if matrix.transposed else out, matrix.taken
            rows = slice(matrix.start, matrix.start + len(taken) * matrix.step, matrix.step)
            whole[rows] = values[taken.start : taken.stop : taken.step].to(out.dtype)
    return out


def decoded(how: Encoding, rows: int, cols: int, planes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """As `decode`."""
    shapes = how.shapes(rows, cols)
    arrays = {name: planes[name].reshape(shape) for name, shape in shapes.items()}
    if how.plain:
        return arrays["values"].float()
    if "blocks" in arrays:
        return _gguf(how, arrays["blocks"])
    if how.codes.startswith("e2m1"):
        values = _E2M1[_nibbles(arrays["codes"])]
    elif how.codes in ("e4m3", "e5m2", "int8"):
        values = arrays["codes"].float()
    elif how.codes == "uint8b128":
        values = arrays["codes"].float() - 128
    else:
        values = _integers(how, rows, cols, arrays)
    high, wide = how.plane("scales").block  # type: ignore[union-attr]
    scales = _scales(how, arrays["scales"])
    values = values * (scales[:, _order(arrays)] if how.ordered else _spread(scales, rows, cols, high, wide))
    if "factor" in arrays:
        factor = arrays["factor"].reshape(())
        values = values / factor if how.codes == "e2m1_divided" else values * factor
    return values


# Numbers that are decoded at once, into float32 and on to the dtype that is wanted.
_AT_ONCE = 1 << 18


def decode_into(how: Encoding, planes: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
    """As `decoded`, into [rows, cols] of any dtype, a few rows at a time.

    Args:
        planes: arrays of the shapes that `how` says.
    """
    rows, cols = out.shape
    high = math.lcm(*(plane.block[0] or 1 for plane in how.planes))  # rows that no block of any plane divides
    step = max(1, _AT_ONCE // (cols * high)) * high
    for row in range(0, rows, step):
        count = min(step, rows - row)
        part = {plane.name: _rows(plane, planes[plane.name], row, count) for plane in how.planes}
        out[row : row + count] = decoded(how, count, cols, part)


def _rows(plane: Plane, array: torch.Tensor, row: int, count: int) -> torch.Tensor:
    """The part of a plane that is for rows `row` to `row + count`, which start with a block."""
    high = plane.block[0]
    if not high:
        return array
    first, last = row // high, -(-(row + count) // high)
    return array[:, first * plane.count : last * plane.count] if plane.transposed else array[first:last]


def _gguf(how: Encoding, blocks: torch.Tensor) -> torch.Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType[how.name.removeprefix("gguf_").upper()]
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))


def _scales(how: Encoding, scales: torch.Tensor) -> torch.Tensor:
    """[blocks of rows, blocks of columns] float32."""
    plane = how.plane("scales")
    if plane is not None and plane.transposed:
        scales = scales.T
    if how.scale != "e8m0":
        return scales.float()
    return torch.exp2(scales.float() - 127).masked_fill(scales == 0xFF, torch.nan)


def _integers(how: Encoding, rows: int, cols: int, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Codes less zeros, [rows, cols] float32, of formats that pack codes into words."""
    if how.codes == "int4":
        codes = _words(arrays["codes"])[:, :cols]
        zeros = _words(arrays["zeros"].T).T[:rows] if "zeros" in arrays else None
    elif how.codes == "awq":
        codes = _words(arrays["codes"], _AWQ_ORDER).T
        zeros = _words(arrays["zeros"], _AWQ_ORDER).T
    else:
        order = tuple(range(codes_a_word(how.codes)))
        codes = _words(arrays["codes"].T, order)
        zeros = _words(arrays["zeros"], order).T
        if not how.codes.endswith("_v2"):  # stored less one: all bits set stand for one more, as its kernels have it
            zeros = zeros + 1
    if zeros is None:  # of int4 alone
        return (codes - 8).float()
    if how.ordered:
        return (codes - zeros[:, _order(arrays)]).float()
    _, group = how.plane("scales").block  # type: ignore[union-attr]
    return (codes - _spread(zeros, rows, cols, 1, group)).float()


def _order(arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[cols]: the group of each input."""
    return arrays["order"].view(-1).long()


def _spread(blocks: torch.Tensor, rows: int, cols: int, high: int, wide: int) -> torch.Tensor:
    """A value for every element of [rows, cols]."""
    tall = blocks.repeat_interleave(high or rows, 0)[:rows]
    return tall.repeat_interleave(wide or cols, 1)[:, :cols]


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()


def _words(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [..., n] -> int64 codes [..., k n]; `order` is which of k codes each part of a word holds, lowest first."""
    out = torch.empty((*words.shape, len(order)), dtype=torch.int64)
    bits = 32 // len(order)
    for place, which in enumerate(order):
        out[..., which] = (words.to(torch.int64) >> (bits * place)) & ((1 << bits) - 1)
    return out.flatten(-2)
