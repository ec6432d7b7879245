"""Parameters of one expert: names, shapes, dtypes, bytes, and where each lies in a slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SLOT_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load of the kernels


@dataclass(frozen=True)
class ParamSpec:
    """A parameter of one expert, e.g. ("gate_up_proj", (2I, H), "bfloat16"); the dtype is the one it runs in."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def itemsize(dtype: str) -> int:
    """Bytes of one element of a torch dtype by name."""
    import torch

    size: int = getattr(torch, dtype).itemsize
    return size


def slot_offsets(params: Iterable[ParamSpec]) -> tuple[dict[str, int], int]:
    """Where each parameter of one expert starts in a slot, and the bytes of the whole; both multiples of 64."""
    import math

    offsets: dict[str, int] = {}
    end = 0
    for param in params:
        offsets[param.name] = end
        nbytes = math.prod(param.shape) * itemsize(param.dtype)
        end += -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    return offsets, end
