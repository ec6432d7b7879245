"""Copies of experts in few bits: which encodings they can have, how one lies in memory, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from emoe.errors import UnsupportedModelError
from emoe.model import layout
from emoe.model.encode import FALLBACKS, INT4, INT8, encode
from emoe.model.encoding import EncodedMatrix, encoding
from emoe.model.spec import ExpertForm, ParamSpec, slot_offsets
from emoe.options import COPIES

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class CopyLayout:
    """How the copy of an expert of one layer lies.

    Attributes:
        form: what it is; its parameters are those of the expert.
        offsets: byte at which each array starts.
        nbytes: from one copy to the next, a multiple of 64.
        native: the arguments of `_C.MlpLayout`.
    """

    form: ExpertForm
    offsets: Mapping[str, int]
    nbytes: int
    native: Mapping[str, Any]


def describe(path: str, module: Any, params: tuple[ParamSpec, ...], name: str) -> CopyLayout:
    """Lays out the copies of one layer's experts.

    Args:
        path, module: Transformers' experts module; its parameters may be on the meta device or gone.
        params: of one expert, as the model runs it.
        name: one of `emoe.options.COPIES`.

    Raises:
        UnsupportedModelError: its rows have no whole number of blocks, or the native kernels do not compute it.
    """
    form = _form(path, module, params, name)
    where = layout.describe(module, form)
    if where.native is None:
        raise UnsupportedModelError(
            f"routing='coarse' computes copies of experts with the native kernels, and those of {path} cannot be: "
            f"{where.reason} routing='exact' runs them"
        )
    offsets, nbytes = slot_offsets(form.stored)
    return CopyLayout(form, offsets, nbytes, where.native)


def _form(path: str, module: Any, params: tuple[ParamSpec, ...], name: str) -> ExpertForm:
    stored: list[ParamSpec] = []
    matrices = []
    for param in params:
        if param.name not in _WEIGHTS or len(param.shape) != 2:
            stored.append(param)
            continue
        rows, cols = reversed(param.shape) if module.is_transposed else param.shape
        how = encoding(_fitting(path, param.name, name, rows, cols))
        shapes = how.shapes(rows, cols)
        planes = {plane.name: f"{param.name}.{plane.name}" for plane in how.planes}
        stored += [ParamSpec(planes[plane.name], shapes[plane.name], plane.dtype) for plane in how.planes]
        matrices.append(EncodedMatrix(how.name, rows, cols, planes, param.name, transposed=bool(module.is_transposed)))
    return ExpertForm(params, tuple(stored), tuple(matrices))


def _fitting(path: str, param: str, name: str, rows: int, cols: int) -> str:
    """The encoding of a matrix [rows, cols]: the one of that name, else what takes about as many bits."""
    asked = COPIES[name]
    # Q4_0 loses more than INT4 in as many bits; nothing has as few bits as Q2_K and Q3_K.
    fallbacks = {"q4_k": (INT4,), "q3_k": (), "q2_k": ()}.get(asked, FALLBACKS.get(asked, ()))
    for each in (asked, *fallbacks):
        if each in (INT4, INT8) and cols % 8:
            continue
        if all(plane.holds(rows, cols) for plane in encoding(each).planes):
            return each
    raise UnsupportedModelError(
        f"coarse={name!r} cannot hold {param} of {path}: its rows have {cols} numbers, no multiple of "
        f"{8 if fallbacks else encoding(asked).planes[0].block[1]}; "
        + ("coarse='int4' can, " if not cols % 8 else "")
        + "routing='exact' needs no copies"
    )


def encode_copy(where: CopyLayout, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arrays of a copy by name, of the shapes that its form says.

    Args:
        values: the parameters of the expert.

    Raises:
        ConfigError: a number is not finite.
    """
    made = {each.name: values[each.name] for each in where.form.stored if each.name in values}
    for matrix in where.form.matrices:
        whole = values[matrix.param]
        planes = encode(matrix.encoding, whole.T if matrix.transposed else whole).planes
        made |= {name: planes[plane] for plane, name in matrix.planes.items()}
    return made


def put(where: CopyLayout, arrays: Mapping[str, torch.Tensor], memory: torch.Tensor) -> None:
    """Writes the arrays of a copy to its bytes, uint8 [nbytes]."""
    for each in where.form.stored:
        start = where.offsets[each.name]
        place = memory[start : start + each.nbytes].view(getattr(torch, each.dtype))
        place.copy_(arrays[each.name].reshape(-1)[: math.prod(each.shape)])
