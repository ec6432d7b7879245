"""What a family calls its experts' matrices on disk, found by running Transformers' own way back on descriptions.

`revert_weight_conversion` is what `save_pretrained` uses. It runs here on `StridedTensor`s that stand for the
parameters, and what comes out says which rows of which parameter of which expert a tensor of the checkpoint is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from emoe.model.spec import ParamSpec
from emoe.model.structure import experts_modules, num_experts, param_specs
from emoe.store.headers import TensorEntry
from emoe.store.strided import Region, StridedTensor


@dataclass(frozen=True)
class Matrix:
    """A matrix of experts as a checkpoint names it: rows are outputs, columns inputs.

    Attributes:
        name: of the tensor.
        expert: whose it is; None: the tensor has a first dimension for all experts.
        param: the parameter that it is part of.
        rows, cols: of one expert; a vector, which is never encoded, has one row.
        start, step: its row r is output `start + r * step` of the parameter.
        transposed: the parameter is [inputs, outputs].
        flipped: the checkpoint has it [inputs, outputs]; so it is written where it is not encoded.
        vector: it has one dimension an expert.
    """

    name: str
    expert: int | None
    param: str
    rows: int
    cols: int
    start: int = 0
    step: int = 1
    transposed: bool = False
    flipped: bool = False
    vector: bool = False

    def of(self, value: Any) -> Any:
        """[rows, cols] of it, from the parameter of one expert."""
        if self.vector:
            return value[None]
        value = value.T if self.transposed else value
        return value[self.start : self.start + self.rows * self.step : self.step]


def matrices(model: Any) -> Iterator[tuple[str, list[Matrix]]]:
    """For each experts module its path, and the matrices of its experts as `save_pretrained` would name them.

    A parameter whose matrices are no whole rows of one tensor on disk keeps the name it has in the model, all experts
    in one tensor; Transformers reads that as well.

    Args:
        model: on the meta device.
    """
    for path, module in experts_modules(model):
        params = {param.name: param for param in param_specs(module)}
        transposed = bool(module.is_transposed)
        found: dict[str, list[Matrix]] = {name: [] for name in params}
        broken: set[str] = set()
        for name, tensor in _saved(model, path, num_experts(module), params).items():
            of = {region.source.name for region in tensor.regions}
            matrix = _matrix(name, tensor, params, transposed) if len(tensor.regions) == 1 else None
            if matrix is None:
                broken |= of
            else:
                found[matrix.param].append(matrix)
        whole = []
        for name, param in params.items():
            if name in broken or not _complete(found[name], param, num_experts(module)):
                found[name] = [_as_in_model(f"{path}.{name}", param, transposed)]
            whole.extend(found[name])
        yield path, whole


def _saved(model: Any, path: str, experts: int, params: dict[str, ParamSpec]) -> dict[str, StridedTensor]:
    from transformers.core_model_loading import revert_weight_conversion

    state = {
        f"{path}.{param.name}": StridedTensor.of(
            TensorEntry("", param.name, param.dtype, (experts, *param.shape), 0, 0)
        )
        for param in params.values()
    }
    try:
        return dict(revert_weight_conversion(model, dict(state)))
    except Exception:  # operations that need values, or other parameters beside these, raise as they like
        return state


def _matrix(name: str, tensor: StridedTensor, params: dict[str, ParamSpec], transposed: bool) -> Matrix | None:
    """What one tensor on disk is; None where it is no set of whole rows."""
    region = tensor.regions[0]
    param = params[region.source.name]
    size = math.prod(param.shape)
    expert, offset = divmod(region.offset, size)
    axes = list(region.axes)
    fused = len(axes) == len(param.shape) + 1
    if fused:
        if (axes[0].start, axes[0].step, axes[0].stride) != (0, 1, size) or expert:
            return None
        axes = axes[1:]
    if len(axes) != len(param.shape) or any((axis.start, axis.step) != (0, 1) for axis in axes):
        return None
    which = None if fused else expert
    if len(param.shape) == 1:
        if offset or axes[0].size != param.shape[0]:
            return None
        return Matrix(name, which, param.name, 1, param.shape[0], vector=True)
    place = _rows(region, axes, param.shape, offset, transposed)
    if place is None:
        return None
    rows, cols, start, step, flipped = place
    return Matrix(name, which, param.name, rows, cols, start, step, transposed, flipped)


def _rows(
    region: Region, axes: list[Any], shape: tuple[int, ...], offset: int, transposed: bool
) -> tuple[int, int, int, int, bool] | None:
    """Rows, columns, first row, step between rows, and whether the tensor is [inputs, outputs]."""
    high, wide = shape
    row, column = divmod(offset, wide)
    outputs, inputs = (wide, high) if transposed else (high, wide)
    apart, along = (1, wide) if transposed else (wide, 1)  # elements from an output, an input, to the next
    start, other = (column, row) if transposed else (row, column)
    for out, into, flipped in ((axes[0], axes[1], False), (axes[1], axes[0], True)):
        if other == 0 and into.size == inputs and into.stride == along and out.stride % apart == 0:
            step = max(1, out.stride // apart)
            if start + (out.size - 1) * step < outputs:
                return out.size, inputs, start, step, flipped
    return None


def _complete(found: list[Matrix], param: ParamSpec, experts: int) -> bool:
    """Whether the matrices make up the whole parameter of every expert."""
    numbers = sum(each.rows * each.cols * (experts if each.expert is None else 1) for each in found)
    return numbers == experts * math.prod(param.shape)


def _as_in_model(name: str, param: ParamSpec, transposed: bool) -> Matrix:
    if len(param.shape) == 1:
        return Matrix(name, None, param.name, 1, param.shape[0], vector=True)
    rows, cols = reversed(param.shape) if transposed else param.shape
    return Matrix(name, None, param.name, rows, cols, transposed=transposed, flipped=transposed)
