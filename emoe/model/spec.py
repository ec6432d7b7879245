"""Parameters of one expert: names, shapes, dtypes, bytes, and where each lies in a slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from emoe.model.encoding import encoding

SLOT_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load of the kernels


@dataclass(frozen=True)
class ParamSpec:
    """A parameter of one expert, e.g. ("gate_up_proj", (2I, H), "bfloat16"); the dtype, an
    encoding by name, is the one it runs in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of it, all planes."""
        return encoding(self.dtype).nbytes(self.shape)


def slot_offsets(params: Iterable[ParamSpec]) -> tuple[dict[str, int], int]:
    """Where each parameter of one expert starts in a slot, and the bytes of the whole; both multiples of 64."""
    offsets: dict[str, int] = {}
    end = 0
    for param in params:
        offsets[param.name] = end
        end += -(-param.nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    return offsets, end
