"""A tensor that knows where each of its elements lies in a file, and moves none.

Transformers' conversion operations run on it unchanged: it answers the torch functions that only rearrange elements
(stack, cat, transpose, reshape, chunk, split, squeeze) by rewriting its description, and refuses all others. What
comes out says which byte ranges make up the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from emoe.store.companions import EncodedWeight
from emoe.store.headers import TensorEntry

# What lies in a file. Of an encoded weight it is the numbers that are moved here, not their bytes.
Source = TensorEntry | EncodedWeight

# More ranges than this for one parameter of one expert would be read element by element: taken for inexpressible.
MOST_PIECES = 1 << 16
# A parameter of one expert is made of no more matrices: gate and up, or two halves of each.
_MOST_MATRICES = 4


class InexpressibleError(Exception):
    """The rearrangement is not a set of strided copies."""


class Axis(NamedTuple):
    """Elements `start + k * step` of a dimension, k < size; they lie `stride` elements apart in the file."""

    size: int
    start: int
    step: int
    stride: int


@dataclass(frozen=True)
class Region:
    """A part of a tensor that lies in one tensor of a file: one axis per dimension, from element `offset` on."""

    source: Source
    offset: int
    axes: tuple[Axis, ...]

    def with_axes(self, dim: int, until: int, *axes: Axis, offset: int = 0) -> Region:
        """Axes [dim, until) replaced."""
        return replace(self, offset=self.offset + offset, axes=(*self.axes[:dim], *axes, *self.axes[until:]))


class StridedTensor:
    """Stands for a tensor in Transformers' conversion operations (see the head of this file)."""

    def __init__(self, shape: Sequence[int], regions: Iterable[Region]) -> None:
        self.shape = torch.Size(shape)
        self.regions = tuple(regions)

    @classmethod
    def of(cls, entry: Source) -> StridedTensor:
        """The tensor as it lies in its file."""
        strides = [math.prod(entry.shape[dim + 1 :]) for dim in range(len(entry.shape))]
        axes = tuple(Axis(size, 0, 1, stride) for size, stride in zip(entry.shape, strides, strict=True))
        return cls(entry.shape, [Region(entry, 0, axes)])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in _FUNCTIONS:
            raise InexpressibleError(f"torch.{getattr(function, '__name__', function)} does more than move elements")
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def contiguous(self) -> StridedTensor:
        return self

    def _dim(self, dim: int, extra: int = 0) -> int:
        count = len(self.shape) + extra
        if not -count <= dim < count:
            raise InexpressibleError(f"dimension {dim} of a tensor of shape {list(self.shape)}")
        return dim % count

    def transpose(self, dim0: int, dim1: int) -> StridedTensor:
        order = list(range(self.ndim))
        a, b = self._dim(dim0), self._dim(dim1)
        order[a], order[b] = order[b], order[a]
        return StridedTensor(
            [self.shape[d] for d in order],
            [replace(region, axes=tuple(region.axes[d] for d in order)) for region in self.regions],
        )

    def unsqueeze(self, dim: int) -> StridedTensor:
        dim = self._dim(dim, extra=1)
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        return StridedTensor(shape, [region.with_axes(dim, dim, Axis(1, 0, 1, 0)) for region in self.regions])

    def squeeze(self, dim: int) -> StridedTensor:
        dim = self._dim(dim)
        if self.shape[dim] != 1:
            return self
        shape = (*self.shape[:dim], *self.shape[dim + 1 :])
        return StridedTensor(shape, [region.with_axes(dim, dim + 1) for region in self.regions])

    def narrow(self, dim: int, start: int, length: int) -> StridedTensor:
        dim = self._dim(dim)
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return StridedTensor(
            shape, [part for region in self.regions for part in _narrow(region, dim, start, start + length)]
        )

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[StridedTensor, ...]:
        total = self.shape[self._dim(dim)]
        if isinstance(sizes, int):
            sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
        if sum(sizes) != total:
            raise InexpressibleError(f"parts of {list(sizes)} from a dimension of {total}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[StridedTensor, ...]:
        return self.split(max(1, -(-self.shape[self._dim(dim)] // chunks)), dim)

    def reshape(self, *shape: Any) -> StridedTensor:
        wanted = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
        if wanted.count(-1) == 1:
            wanted[wanted.index(-1)] = self.numel() // -math.prod(wanted)
        if math.prod(wanted) != self.numel() or min(wanted, default=1) < 1:
            raise InexpressibleError(f"shape {list(self.shape)} as {list(shape)}")
        regions: list[Region] = list(self.regions)
        dim = 0
        for old, new in _groups(self.shape, wanted):
            regions = [part for region in regions for part in _merge(region, dim, old)]
            regions = [part for region in regions for part in _unmerge(region, dim, new)]
            dim += len(new)
        return StridedTensor(wanted, regions)

    view = reshape


def _stack(tensors: Sequence[StridedTensor], dim: int = 0) -> StridedTensor:
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _cat(tensors: Sequence[StridedTensor], dim: int = 0) -> StridedTensor:
    first = tensors[0]
    dim = first._dim(dim)
    regions: list[Region] = []
    end = 0
    for tensor in tensors:
        if tensor.ndim != first.ndim or any(
            a != b for d, (a, b) in enumerate(zip(tensor.shape, first.shape, strict=True)) if d != dim
        ):
            raise ShapeError(tensor, first.shape)
        for region in tensor.regions:
            axis = region.axes[dim]
            regions.append(region.with_axes(dim, dim + 1, axis._replace(start=axis.start + end)))
        end += tensor.shape[dim]
    return StridedTensor((*first.shape[:dim], end, *first.shape[dim + 1 :]), regions)


class ShapeError(Exception):
    """A tensor does not fit the ones it is joined with."""

    def __init__(self, tensor: StridedTensor, shape: Sequence[int]) -> None:
        super().__init__(f"does not fit the others, which have shape {list(shape)}")
        self.source = tensor.regions[0].source if tensor.regions else None


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.transpose: StridedTensor.transpose,
    torch.swapaxes: StridedTensor.transpose,
    torch.reshape: StridedTensor.reshape,
    torch.chunk: StridedTensor.chunk,
    torch.split: StridedTensor.split,
    torch.narrow: StridedTensor.narrow,
    torch.squeeze: StridedTensor.squeeze,
    torch.unsqueeze: StridedTensor.unsqueeze,
}


def _narrow(region: Region, dim: int, low: int, high: int) -> list[Region]:
    axis = region.axes[dim]
    first = max(0, -((axis.start - low) // axis.step))  # least k with start + k * step >= low
    last = min(axis.size, -((axis.start - high) // axis.step))
    if first >= last:
        return []
    cut = axis._replace(size=last - first, start=axis.start + first * axis.step - low)
    return [region.with_axes(dim, dim + 1, cut, offset=first * axis.stride)]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions that hold the same elements in both shapes."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        while not (left and right and math.prod(left) == math.prod(right)):
            if j >= len(new) or (i < len(old) and math.prod(left) <= math.prod(right)):
                left.append(old[i])
                i += 1
            else:
                right.append(new[j])
                j += 1
            if i >= len(old) and j >= len(new):
                break
        groups.append((left, right))
    return groups


def _merge(region: Region, dim: int, sizes: Sequence[int]) -> list[Region]:
    """Dimensions of `sizes` from `dim` on become one."""
    if not sizes:
        return [region.with_axes(dim, dim, Axis(1, 0, 1, 0))]
    regions = [region]
    for inner_size in sizes[1:]:
        regions = [part for each in regions for part in _merge_two(each, dim, inner_size)]
    return regions


def _merge_two(region: Region, dim: int, inner_size: int) -> list[Region]:
    outer, inner = region.axes[dim], region.axes[dim + 1]
    full = inner.size == inner_size and inner.step == 1
    if full and outer.step == 1 and (outer.size == 1 or outer.stride == inner.size * inner.stride):
        return [
            region.with_axes(dim, dim + 2, Axis(outer.size * inner.size, outer.start * inner_size, 1, inner.stride))
        ]
    if outer.size <= inner.size:  # one region for each index of the shorter axis
        return [
            region.with_axes(
                dim,
                dim + 2,
                Axis(inner.size, (outer.start + k * outer.step) * inner_size + inner.start, inner.step, inner.stride),
                offset=k * outer.stride,
            )
            for k in range(outer.size)
        ]
    return [
        region.with_axes(
            dim,
            dim + 2,
            Axis(
                outer.size,
                outer.start * inner_size + inner.start + k * inner.step,
                outer.step * inner_size,
                outer.stride,
            ),
            offset=k * inner.stride,
        )
        for k in range(inner.size)
    ]


def _unmerge(region: Region, dim: int, sizes: Sequence[int]) -> list[Region]:
    """Dimension `dim` becomes dimensions of `sizes`."""
    if not sizes:
        return [region.with_axes(dim, dim + 1)]
    regions = [region]
    for position in range(len(sizes) - 1):
        inner_size = math.prod(sizes[position + 1 :])
        regions = [part for each in regions for part in _unmerge_one(each, dim + position, inner_size)]
    return regions


def _unmerge_one(region: Region, dim: int, inner_size: int) -> list[Region]:
    size, start, step, stride = region.axes[dim]
    if size == 1 or step % inner_size == 0:
        outer = Axis(size, start // inner_size, max(1, step // inner_size), stride)
        return [region.with_axes(dim, dim + 1, outer, Axis(1, start % inner_size, 1, 0))]
    if step != 1:
        raise InexpressibleError(f"every {step}th element split into rows of {inner_size}")
    parts = []
    done = 0
    while done < size:  # a head, whole rows, a tail
        row, column = divmod(start + done, inner_size)
        rows = (size - done) // inner_size if column == 0 else 0
        if rows:
            axes = (Axis(rows, row, 1, stride * inner_size), Axis(inner_size, 0, 1, stride))
            count = rows * inner_size
        else:
            count = min(inner_size - column, size - done)
            axes = (Axis(1, row, 1, 0), Axis(count, column, 1, stride))
        parts.append(region.with_axes(dim, dim + 1, *axes, offset=done * stride))
        done += count
    return parts


class Rows(NamedTuple):
    """Rows `first`, `first + every`, ... of a matrix, `length` of them.

    They are rows `start`, `start + step`, ... of a parameter, or columns if `transposed`.
    """

    source: Source
    matrix: int
    transposed: bool
    first: int
    every: int
    length: int
    start: int
    step: int


def matrices_of_experts(tensor: StridedTensor) -> list[list[Rows]]:
    """For each index of dimension 0 of [E, a, b], the matrices that make up the rest, by where their rows start.

    Raises:
        InexpressibleError: columns are cut or come in another order, or rows in one that is no even step.
    """
    found: list[list[Rows]] = [[] for _ in range(tensor.shape[0])]
    for region in tensor.regions:
        source, experts = region.source, region.axes[0]
        transposed, rows = _row_axis(source, region.axes[1:], tensor.shape[1:])
        every, apart = divmod(rows.stride, source.shape[-1]) if rows.size > 1 else (1, 0)
        for k in range(experts.size):
            matrix, inside = divmod(region.offset + k * experts.stride, math.prod(source.shape[-2:]))
            first, column = divmod(inside, source.shape[-1])
            if column or apart:
                raise InexpressibleError(f"columns of {source.name} are cut, or come in another order")
            found[experts.start + k * experts.step].append(
                Rows(source, matrix, transposed, first, every, rows.size, rows.start, rows.step)
            )
    return [_joined(rows) for rows in found]


def _row_axis(source: Source, axes: Sequence[Axis], shape: Sequence[int]) -> tuple[bool, Axis]:
    """Whether columns are the parameter's first dimension, and where the rows are."""
    if len(axes) != 2 or len(source.shape) < 2:
        raise InexpressibleError(f"{source.name} is no matrix")
    for transposed in (False, True):
        rows, cols = reversed(axes) if transposed else axes
        whole = cols.size == source.shape[-1] == shape[0 if transposed else 1]
        if whole and (cols.start, cols.step) == (0, 1) and (cols.stride == 1 or cols.size == 1):
            return transposed, rows
    raise InexpressibleError(f"columns of {source.name} are cut, or come in another order")


def _joined(rows: list[Rows]) -> list[Rows]:
    """Those that follow one another at one step, in the file and in the parameter, are one."""
    joined: list[Rows] = []
    for each in sorted(rows, key=lambda rows: rows.start):
        if joined and (longer := _continued(joined[-1], each)) is not None:
            joined[-1] = longer
        else:
            joined.append(each)
    if len(joined) > _MOST_MATRICES:
        raise InexpressibleError(f"rows of {rows[0].source.name} come in another order")
    return joined


def _continued(head: Rows, tail: Rows) -> Rows | None:
    every = head.every if head.length > 1 else tail.first - head.first
    step = head.step if head.length > 1 else tail.start - head.start
    same = (head.source.name, head.matrix, head.transposed) == (tail.source.name, tail.matrix, tail.transposed)
    same = same and (tail.length == 1 or (tail.every, tail.step) == (every, step))
    follows = (tail.first, tail.start) == (head.first + head.length * every, head.start + head.length * step)
    if not (same and follows and every > 0):
        return None
    return head._replace(every=every, step=step, length=head.length + tail.length)


class Block(NamedTuple):
    """A contiguous run of a file tensor: `rows * cols` elements from `start`; where they go, in elements."""

    source: TensorEntry
    start: int
    rows: int
    cols: int
    dst_offset: int
    dst_row_stride: int
    dst_col_stride: int


def blocks_of_experts(tensor: StridedTensor) -> list[list[Block]]:
    """For each index of dimension 0, the contiguous file ranges that make up the rest, in file order.

    Raises:
        InexpressibleError: an expert would fall into more than MOST_PIECES ranges, or is encoded.
    """
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(1, tensor.ndim)]
    blocks: list[list[Block]] = [[] for _ in range(tensor.shape[0])]
    for region in tensor.regions:
        if not isinstance(region.source, TensorEntry):
            raise InexpressibleError(f"{region.source.name} is encoded")
        experts, rest = region.axes[0], region.axes[1:]
        dst = sum(axis.start * stride for axis, stride in zip(rest, strides, strict=True))
        moves = [
            (axis.size, axis.stride, axis.step * stride)
            for axis, stride in zip(rest, strides, strict=True)
            if axis.size > 1
        ]
        for k in range(experts.size):
            start = region.offset + k * experts.stride
            blocks[experts.start + k * experts.step].extend(_blocks(region.source, start, dst, moves))
    for each in blocks:
        if len(each) > MOST_PIECES:
            raise InexpressibleError(f"an expert lies in {len(each)} separate ranges")
        each.sort(key=lambda block: (block.source.file, block.source.offset, block.start))
    return blocks


def _blocks(source: TensorEntry, start: int, dst: int, moves: list[tuple[int, int, int]]) -> list[Block]:
    """`moves` are (size, stride in the file, stride in the parameter) of each dimension longer than one."""
    moves = sorted(moves, key=lambda move: -move[1])
    inner: list[tuple[int, int, int]] = []
    extent = 1
    while moves and len(inner) < 2 and moves[-1][1] == extent:
        inner.insert(0, moves.pop())
        extent *= inner[0][0]
    cols, _, col_stride = inner[-1] if inner else (1, 1, 1)
    rows, _, row_stride = inner[0] if len(inner) == 2 else (1, cols, cols * col_stride)
    if math.prod(size for size, _, _ in moves) > MOST_PIECES:
        raise InexpressibleError(f"{source.name} would be read in more than {MOST_PIECES} ranges")
    starts = [(start, dst)]
    for size, stride, dst_stride in moves:
        starts = [(at + k * stride, to + k * dst_stride) for at, to in starts for k in range(size)]
    return [Block(source, at, rows, cols, to, row_stride, col_stride) for at, to in starts]
